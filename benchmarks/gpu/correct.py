"""Whether the kernels are right on this device, asked before anything is timed: a first look, then the tests."""

from __future__ import annotations

import importlib.util
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdense
from fastdense.kernels import launch
from fastdense.reference import ConcatDenseBlock, ConcatTransition

from ..harness.runner import ROOT
from .machine import tf32
from .measure import relative_error
from .stage import Job

# About one rounding of a result, beside twice PyTorch's own error: the tests' budget.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
MODES = ("activations", "bottlenecks")
RERUNS = 20
KEPT_FAILURES = 100
REASON_CHARACTERS = 400
# What the kernels can do without, by name: shifts of whole rows of taps, loads ahead of their use.
_ONE_STAGE = {op: {"num_stages": 1} for op in ("bn_relu_conv", "bn_relu_conv_backward")}
SIMPLER: dict[str, dict[str, dict[str, Any]]] = {
    "taps": {"bn_relu_conv": {"form": "taps"}},
    "one stage": _ONE_STAGE,
    "taps, one stage": {**_ONE_STAGE, "bn_relu_conv": {"form": "taps", "num_stages": 1}},
}

Results = dict[str, Tensor]


def smoke(job: Job) -> None:
    """A block and a transition in every dtype and mode against the textbook ones in float64; reruns bit for bit.

    Where something is wrong, the same at once in forms with fewer parts, to say which part is at fault.

    Raises:
        RuntimeError: if a result is wrong. Which one, and by how much, is in ``job.result``.
    """
    wrong: list[str] = []
    for dtype in TOLERANCE:
        # A rehearsal's steps take a second each: one mode a dtype, each mode once.
        for mode in MODES[dtype == torch.float16 :][:1] if job.rehearsal else MODES:
            label = f"{str(dtype).removeprefix('torch.')} {mode}"
            found = job.result[label] = _look(dtype, mode, job)
            if found["wrong"] or found["differing_reruns"]:
                wrong += [f"{label}: {name} is off by {found['errors'][name]['error']:.1e}" for name in found["wrong"]]
                wrong += [f"{label}: {found['differing_reruns']} reruns differ"] * bool(found["differing_reruns"])
                found["simpler"] = _narrowed(dtype, mode, job)
            job.save()
    if wrong:
        raise RuntimeError("the Triton kernels are wrong here: " + "; ".join(wrong))


def _narrowed(dtype: torch.dtype, mode: str, job: Job) -> dict[str, dict[str, Any]]:
    """What is wrong, and how many reruns differ, where the kernels take simpler forms."""
    found = {}
    for name, changes in SIMPLER.items():
        with ExitStack() as stack:
            for op, change in changes.items():
                stack.enter_context(launch.override(op, **change))
            try:
                looked = _look(dtype, mode, job)
                found[name] = {"wrong": looked["wrong"], "differing_reruns": looked["differing_reruns"]}
            except Exception as error:  # what does not even run says something, too
                found[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
    return found


def _look(dtype: torch.dtype, mode: str, job: Job) -> dict[str, Any]:
    """Root mean square errors over a few inputs, what twice PyTorch's own allows, and how many reruns differ.

    A value within a rounding of 0 switches a ReLU, whoever computes: hence several inputs, and for PyTorch's error the
    larger one of the textbook's and the torch backend's.
    """
    sums: dict[str, tuple[float, float]] = {}
    arguments, shape = ((1, 8, 4, 4), (2, 8, 5, 4)) if job.rehearsal else ((3, 64, 4, 32), (8, 64, 28, 27))
    seeds = 1 if job.rehearsal else 3
    pairs: list[nn.Module] = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        truth = _ordinary_gammas(_pair(arguments).to(job.device, dtype))
        weights = truth.state_dict()  # rounded to the dtype: all start from the same values
        pairs = [_pair(arguments), *(_pair(arguments, impl=impl, recompute=mode) for impl in ("torch", "triton"))]
        for pair in pairs:
            pair.to(job.device, dtype).load_state_dict(weights)
        x = torch.randn(shape, device=job.device).to(dtype).contiguous(memory_format=torch.channels_last)
        with tf32(False):
            want = _step(truth.double(), x.double(), seed)
            peers = [_step(pair, x, seed) for pair in pairs[:2]]
            with _unwritten_memory_is_nan():
                got = _step(pairs[2], x, seed)
        for name in want:
            mine, theirs = sums.get(name, (0.0, 0.0))
            mine += relative_error(got[name], want[name]) ** 2
            theirs += max(relative_error(peer[name], want[name]) for peer in peers) ** 2
            sums[name] = mine, theirs
    errors = {
        name: {"error": math.sqrt(mine / seeds), "allowed": 2 * math.sqrt(theirs / seeds) + TOLERANCE[dtype]}
        for name, (mine, theirs) in sums.items()
    }
    wrong = [name for name, row in errors.items() if not row["error"] <= row["allowed"]]
    return {"wrong": wrong, "differing_reruns": _differing(pairs[2], shape, dtype, job), "errors": errors}


def _differing(pair: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, job: Job) -> int:
    """Of a few reruns, on images so large that every multiprocessor has work, how many differ in a single bit."""
    if not job.rehearsal:
        shape = (*shape[:2], 56, 56)
    x = torch.randn(shape, device=job.device).to(dtype).contiguous(memory_format=torch.channels_last)
    first, *others = (_step(pair, x, 0) for _ in range(2 if job.rehearsal else 1 + RERUNS))
    names = [name for name in first if "running" not in name]  # what a step leaves behind differs, as it should
    return sum(not all(torch.equal(first[name], other[name]) for name in names) for other in others)


def _pair(arguments: tuple[int, int, int, int], **options: Any) -> nn.Module:
    """A block and a transition behind it: the textbook ones, or with ``options`` fastdense's."""
    layers, entering, _, growth_rate = arguments
    leaving = entering + layers * growth_rate
    if not options:
        return nn.Sequential(ConcatDenseBlock(*arguments), ConcatTransition(leaving, leaving // 2))
    transition = fastdense.Transition(leaving, leaving // 2, impl=options["impl"])
    return nn.Sequential(fastdense.DenseBlock(*arguments, **options), transition)


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that cuBLAS is not repeatable: the memory is what this is about
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def reason(traceback: str) -> str:
    """What a failed test's traceback comes to: the lines that pytest marks, or its last one."""
    marked = [line[1:].strip() for line in traceback.splitlines() if line.startswith("E ")]
    return "\n".join(marked or traceback.strip().splitlines()[-1:])[:REASON_CHARACTERS]


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
            failures[f"{report.nodeid} ({report.when})"] = reason(report.longreprtext)
        if report.when == "teardown":
            self.job.save()


def _pytest(job: Job, *arguments: str, processes: int = 0) -> None:
    """Run some tests in this process, or in several where pytest-xdist is there to start them.

    Raises:
        RuntimeError: if one failed, or none was found.
    """
    options = ["--rootdir", str(ROOT), "-p", "no:cacheprovider", "-p", "benchmarks.harness.checkout"]
    options += ["--continue-on-collection-errors"]  # a package that some other test needs may be missing
    if processes > 1 and importlib.util.find_spec("xdist") is not None:
        options += ["--numprocesses", str(processes)]
    code = pytest.main([*options, *arguments], plugins=[_Recorder(job)])
    if code != pytest.ExitCode.OK:
        first = next(iter(job.result["failures"]), "none failed")
        raise RuntimeError(f"pytest: {pytest.ExitCode(code).name}, {job.result['failed']} failed, first: {first}")


def gpu_tests(job: Job) -> None:
    """The tests that need a GPU, then the kernels' own, compiled; in a rehearsal, a few that run anywhere.

    Compiling for every shape is most of the work, and each process does its own.
    """
    if job.rehearsal:
        _pytest(job, "tests/test_traffic.py", "-k", "hand")
        return
    files = [f"tests/test_{name}.py" for name in ("gpu", "kernels", "pooling_kernels", "launches", "peak")]
    _pytest(job, *files, processes=min(12, len(os.sched_getaffinity(0))))
