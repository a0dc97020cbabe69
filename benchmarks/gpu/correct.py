"""Whether the kernels are right on this device, asked before anything is timed: a first look, then the tests."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdense
from fastdense.reference import ConcatDenseBlock

from ..runner import ROOT
from .machine import tf32
from .measure import relative_error
from .stage import ERROR_CHARACTERS, Job

# About one rounding of a result, beside twice PyTorch's own error: the tests' budget.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
MODES = ("activations", "bottlenecks")
KEPT_FAILURES = 20

Results = dict[str, Tensor]


def smoke(job: Job) -> None:
    """One block in every dtype and mode against the textbook block in float64; reruns must agree bit for bit.

    Raises:
        RuntimeError: if a result is wrong. Which one, and by how much, is in ``job.result``.
    """
    wrong = []
    for dtype in TOLERANCE:
        # A rehearsal's steps take a second each: one mode a dtype, each mode once.
        modes = MODES[dtype == torch.float16 :][:1] if job.rehearsal else MODES
        for mode in modes:
            label = f"{str(dtype).removeprefix('torch.')} {mode}"
            rows, repeatable = _errors(dtype, mode, job)
            bad = [name for name, row in rows.items() if not row["error"] <= row["allowed"]]
            job.result[label] = {"wrong": bad, "repeatable": repeatable, "errors": rows}
            job.save()
            wrong += [f"{label}: {name} is off by {rows[name]['error']:.1e}" for name in bad]
            wrong += [] if repeatable else [f"{label}: two runs differ"]
    if wrong:
        raise RuntimeError("the Triton kernels are wrong here: " + "; ".join(wrong))


def _errors(dtype: torch.dtype, mode: str, job: Job) -> tuple[dict[str, dict[str, float]], bool]:
    """Root mean square errors over a few inputs, and what twice PyTorch's own error allows; whether reruns agree.

    A value within a rounding of 0 switches a ReLU, whoever computes: hence several inputs, and for PyTorch's error the
    larger one of the textbook block's and the torch backend's.
    """
    sums: dict[str, tuple[float, float]] = {}
    repeatable = True
    arguments, shape = ((1, 8, 4, 4), (2, 8, 5, 4)) if job.rehearsal else ((3, 64, 4, 32), (8, 64, 28, 27))
    seeds = 1 if job.rehearsal else 3
    for seed in range(seeds):
        torch.manual_seed(seed)
        truth = _ordinary_gammas(ConcatDenseBlock(*arguments).to(job.device, dtype))
        weights = truth.state_dict()  # rounded to the dtype: all start from the same values
        blocks = [ConcatDenseBlock(*arguments)]
        blocks += [fastdense.DenseBlock(*arguments, impl=impl, recompute=mode) for impl in ("torch", "triton")]
        for block in blocks:
            block.to(job.device, dtype).load_state_dict(weights)
        x = torch.randn(shape, device=job.device).to(dtype).contiguous(memory_format=torch.channels_last)
        with tf32(False):
            want = _step(truth.double(), x.double(), seed)
            peers = [_step(block, x, seed) for block in blocks[:2]]
            weights = {name: tensor.clone() for name, tensor in blocks[2].state_dict().items()}
            with _unwritten_memory_is_nan():
                got = _step(blocks[2], x, seed)
                if seed == 0:
                    blocks[2].load_state_dict(weights)
                    again = _step(blocks[2], x, seed)
                    repeatable = all(torch.equal(got[name], again[name]) for name in got)
        for name in want:
            mine, theirs = sums.get(name, (0.0, 0.0))
            mine += relative_error(got[name], want[name]) ** 2
            theirs += max(relative_error(peer[name], want[name]) for peer in peers) ** 2
            sums[name] = mine, theirs
    rows = {
        name: {"error": math.sqrt(mine / seeds), "allowed": 2 * math.sqrt(theirs / seeds) + TOLERANCE[dtype]}
        for name, (mine, theirs) in sums.items()
    }
    return rows, repeatable


def _ordinary_gammas(block: nn.Module) -> nn.Module:
    """A gamma near 1: near 0 a few roundings decide whole channels, for PyTorch as for us."""
    with torch.no_grad():
        for norm in block.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.uniform_(-0.5, 0.5)
    return block


def _step(block: nn.Module, x: Tensor, seed: int) -> Results:
    """Output, gradients for a random cotangent, and running statistics."""
    x = x.detach().requires_grad_()
    block.zero_grad(set_to_none=True)
    output = block(x)
    generator = torch.Generator().manual_seed(seed)
    output.backward(torch.randn(output.shape, generator=generator).to(output.device, output.dtype))
    found = {"output": output.detach(), "x.grad": x.grad}
    found |= {f"{name}.grad": parameter.grad for name, parameter in block.named_parameters()}
    found |= {name: buffer.clone() for name, buffer in block.named_buffers() if buffer.is_floating_point()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


@contextmanager
def _unwritten_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class _Recorder:
    """Keeps each test's outcome as it comes, so that a run which is stopped has told what it knew."""

    def __init__(self, job: Job) -> None:
        self.job = job
        job.result |= {"passed": 0, "failed": 0, "skipped": 0, "selected": 0, "failures": {}}

    def pytest_collection_finish(self, session: Any) -> None:
        self._selected(len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self._selected(len(ids))  # with several processes, this one collects nothing itself

    def _selected(self, count: int) -> None:
        self.job.result["selected"] = max(count, self.job.result["selected"])
        self.job.save()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            self.job.result[report.outcome] += 1
        failures = self.job.result["failures"]
        if report.failed and len(failures) < KEPT_FAILURES:
            failures[f"{report.nodeid} ({report.when})"] = report.longreprtext[-ERROR_CHARACTERS:]
        if report.when == "teardown":
            self.job.save()


def _pytest(job: Job, *arguments: str, processes: int = 0) -> None:
    """Run some tests in this process, or in several where pytest-xdist is there to start them.

    Raises:
        RuntimeError: if one failed, or none was found.
    """
    options = ["--rootdir", str(ROOT), "-p", "no:cacheprovider", "-p", "benchmarks.checkout"]
    options += ["--continue-on-collection-errors"]  # a package that some other test needs may be missing
    if processes > 1 and importlib.util.find_spec("xdist") is not None:
        options += ["--numprocesses", str(processes)]
    code = pytest.main([*options, *arguments], plugins=[_Recorder(job)])
    if code != pytest.ExitCode.OK:
        first = next(iter(job.result["failures"]), "none failed")
        raise RuntimeError(f"pytest: {pytest.ExitCode(code).name}, {job.result['failed']} failed, first: {first}")


def gpu_tests(job: Job) -> None:
    """The tests that need a GPU; in a rehearsal, where all of them would be skipped, a few that run anywhere."""
    _pytest(job, *(("tests/test_traffic.py", "-k", "hand") if job.rehearsal else ("tests", "-m", "gpu")))


def kernel_tests(job: Job) -> None:
    """The kernels' own tests, compiled where there is a GPU; in a rehearsal one of them, interpreted.

    Compiling for every shape is most of the work, and each process does its own.
    """
    if job.rehearsal:
        _pytest(job, "tests/test_kernels.py", "-k", "kernels_of_another_size")
    else:
        _pytest(job, "tests/test_kernels.py", "-m", "not gpu", processes=min(8, len(os.sched_getaffinity(0)) // 2))
