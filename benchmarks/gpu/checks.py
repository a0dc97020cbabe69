"""Whether blocks, networks and kernels are right on this device, asked before anything is timed; and the tests."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdense
from fastdense.kernels import launch

from ..harness.runner import ROOT
from ..harness.training import arithmetic
from .machine import name_of, relative_error
from .run import Job, brief
from .steps import BASE, CONVERTED, DTYPE, MODES, OURS, Step, images, models, rehearsed

# About one rounding of a result, beside twice PyTorch's own error: the tests' budget.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
BLOCK, SHAPE = (3, 64, 4, 32), (8, 64, 28, 27)  # layers, channels, bn_size, growth rate; of the images
LARGER = (8, 64, 56, 56)  # on which every multiprocessor has work
REHEARSED_BLOCK, REHEARSED_SHAPE = (1, 8, 4, 4), (2, 8, 5, 4)
RERUNS = 20
CHECKED = (16, 64)  # images of a whole network, and their size
MOST_FAILURES, REASON_CHARACTERS = 100, 400
TESTS = tuple(f"tests/kernels/test_{name}.py" for name in ("gpu", "dense_block", "pooling", "launches"))
PROCESSES = 12
# What the kernels can do without, by name: shifts of whole rows of taps, loads ahead of their use.
SIMPLER: dict[str, dict[str, Any]] = {
    "taps": {"form": "taps"}, "one stage": {"num_stages": 1}, "taps, one stage": {"form": "taps", "num_stages": 1}
}  # fmt: skip


@contextmanager
def changed(**changes: Any) -> Iterator[None]:
    """Within the ``with``, convolutions are launched with these changes, forward and backward."""
    with launch.override("bn_relu_conv", **changes), launch.override("bn_relu_conv_backward", **changes):
        yield


def smoke(job: Job) -> None:
    """Checks a block and a transition in every dtype and mode against float64, and reruns bit for bit.

    Where something is wrong, the same at once in forms with fewer parts, to say which part is at fault.
    """
    wrong: list[str] = []
    for dtype in TOLERANCE:
        # A rehearsal's steps take a second each: one mode a dtype, each mode once.
        for mode in MODES[dtype == torch.float16 :][:1] if job.rehearsal else MODES:
            label = f"{name_of(dtype)} {mode}"
            found = job.result[label] = _look(dtype, mode, job)
            problems = [f"{label}: {name} is off by {found['errors'][name]['error']:.1e}" for name in found["wrong"]]
            if found["differing_reruns"]:
                problems.append(f"{label}: {found['differing_reruns']} reruns differ")
            if problems:
                wrong += problems
                found["simpler"] = {name: _look_again(changes, dtype, mode, job) for name, changes in SIMPLER.items()}
            job.save()
    if wrong:
        raise RuntimeError("the Triton kernels are wrong here: " + "; ".join(wrong))


def _look_again(changes: dict[str, Any], dtype: torch.dtype, mode: str, job: Job) -> dict[str, Any]:
    try:
        with changed(**changes):
            looked = _look(dtype, mode, job)
    except Exception as error:  # what does not even run says something, too
        return {"error": brief(error)}
    return {name: looked[name] for name in ("wrong", "differing_reruns")}


def _look(dtype: torch.dtype, mode: str, job: Job) -> dict[str, Any]:
    """Root mean square errors over a few inputs, what twice PyTorch's own allows, and how many reruns differ.

    A value within a rounding of 0 switches a ReLU, on any backend: hence several inputs, and for PyTorch's error the
    larger one of the reference's and the torch backend's.
    """
    squares: defaultdict[str, Any] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
    arguments, shape, seeds = (REHEARSED_BLOCK, REHEARSED_SHAPE, 1) if job.rehearsal else (BLOCK, SHAPE, 3)
    *peers, fast = (pair(arguments, impl, mode) for impl in ("reference", "torch", "triton"))
    for seed in range(seeds):
        torch.manual_seed(seed)
        truth = pair(arguments).to(job.device, dtype)
        for norm in truth.modules():
            if isinstance(norm, nn.BatchNorm2d):  # near a gamma of 0 a few roundings decide whole channels
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.uniform_(norm.bias, -0.5, 0.5)
        weights = truth.state_dict()  # rounded to the dtype: all start from the same values
        for one in (*peers, fast):
            one.to(job.device, dtype).load_state_dict(weights)
        x = features(shape, dtype, job.device)
        with arithmetic("fp32", job.device):
            want = step(truth.double(), x.double(), seed)
            theirs = [step(peer, x, seed) for peer in peers]
            torch.use_deterministic_algorithms(True, warn_only=True)  # memory that nobody has written is NaN
            try:
                got = step(fast, x, seed)
            finally:
                torch.use_deterministic_algorithms(False)
        for name in want:
            mine, *others = (relative_error(one[name], want[name]) for one in (got, *theirs))
            squares[name] += torch.tensor([mine, max(others)], dtype=torch.float64).square()
    errors = {}
    for name, both in squares.items():
        mine, their = (both / seeds).sqrt().tolist()
        errors[name] = {"error": mine, "allowed": 2 * their + TOLERANCE[dtype]}
    wrong = [name for name, row in errors.items() if not row["error"] <= row["allowed"]]
    return {"wrong": wrong, "differing_reruns": _differing(fast, dtype, job), "errors": errors}


def _differing(fast: nn.Module, dtype: torch.dtype, job: Job) -> int:
    """Of a few reruns, how many differ in a single bit."""
    x = features(REHEARSED_SHAPE if job.rehearsal else LARGER, dtype, job.device)
    first, *others = (step(fast, x, 0) for _ in range(2 if job.rehearsal else 1 + RERUNS))
    names = [name for name in first if "running" not in name]  # what a step leaves behind differs, as it should
    return sum(not all(torch.equal(first[name], other[name]) for name in names) for other in others)


def features(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns random features, channels last."""
    return torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)


def pair(arguments: tuple[int, int, int, int], impl: str = "reference", recompute: str = MODES[0]) -> nn.Module:
    """Returns a block and the transition behind it."""
    layers, entering, _, growth_rate = arguments
    leaving = entering + layers * growth_rate
    block = fastdense.DenseBlock(*arguments, impl=impl, recompute=recompute)
    return nn.Sequential(block, fastdense.Transition(leaving, leaving // 2, impl=impl))


def step(block: nn.Module, x: Tensor, seed: int) -> dict[str, Tensor]:
    """Computes the output, gradients for a random cotangent, and running statistics."""
    x = x.detach().requires_grad_()
    block.zero_grad(set_to_none=True)
    output = block(x)
    generator = torch.Generator().manual_seed(seed)
    output.backward(torch.randn(output.shape, generator=generator).to(output))
    found = {"output": output.detach(), "x.grad": x.grad}
    found |= {f"{name}.grad": parameter.grad for name, parameter in block.named_parameters()}
    found |= {name: buffer.clone() for name, buffer in block.named_buffers() if buffer.is_floating_point()}
    return found


def networks(job: Job) -> None:
    """Checks DenseNet-121 in both modes and converted: one that is wrong is not timed.

    A value within a rounding of 0 switches a ReLU, and a network this deep everything after it: two right ones differ
    by as much as a percent in float32, and in bfloat16 torchvision itself is off by 70 %, where gradients of 0 would be
    off by 100. So float32 is what finds a wrong network, and bfloat16 must be about as good as torchvision's. The tight
    bounds are the kernels' own.
    """
    of, batch, size = rehearsed(job, "densenet121", *CHECKED)
    found = models(of, [BASE, *OURS, CONVERTED], job.device)
    given = images(batch, size, job.device, seed=1)
    base = found.pop(BASE)
    truth = _outcome(base, *given, torch.float64)
    job.result |= {label: {"checked": True} for label in found}
    for dtype in (torch.float32, DTYPE):
        with arithmetic("fp32", job.device):
            theirs = relative_error(_outcome(base, *given, dtype), truth)
            allowed = 4 * theirs + 1e-2 if dtype == torch.float32 else 1.3 * theirs
            for label, model in found.items():
                mine = relative_error(_outcome(model, *given, dtype), truth)
                job.result[label][name_of(dtype)] = {"error": mine, "torchvision": theirs}
                job.result[label]["checked"] &= mine <= allowed
    job.save()
    wrong = [label for label, row in job.result.items() if not row["checked"]]
    if wrong:
        raise RuntimeError(f"wrong: {', '.join(wrong)}")


def _outcome(model: nn.Module, x: Tensor, classes: Tensor, dtype: torch.dtype) -> Tensor:
    """Loss and all gradients of one step of a copy; a ``dtype`` of 16 bit means autocast."""
    exact = torch.promote_types(dtype, torch.float32)
    return Step(copy.deepcopy(model).to(exact), x.to(exact), classes, dtype).gradients()


def gpu_tests(job: Job) -> None:
    """Runs the tests that need a GPU, then the kernels' own, compiled; in a rehearsal, a few that run anywhere.

    Compiling for every shape is most of the work, and each process does its own.
    """
    options = ["--rootdir", str(ROOT), "-p", "no:cacheprovider", "-p", "benchmarks.harness.checkout"]
    options += ["--continue-on-collection-errors"]  # a package that some other test needs may be missing
    options += ["tests/benchmarks/test_traffic.py", "-k", "hand"] if job.rehearsal else TESTS
    if not job.rehearsal and importlib.util.find_spec("xdist") is not None:
        options += ["--numprocesses", str(min(PROCESSES, len(os.sched_getaffinity(0))))]
    code = pytest.main(options, plugins=[_Recorder(job)])
    if code != pytest.ExitCode.OK:
        first = next(iter(job.result["failures"]), "none failed")
        raise RuntimeError(f"pytest: {pytest.ExitCode(code).name}, {job.result['failed']} failed, first: {first}")


class _Recorder:
    """Records each test's outcome as it comes, so that a run which is stopped has told what it knew."""

    def __init__(self, job: Job) -> None:
        self.job = job
        job.result |= {"passed": 0, "failed": 0, "skipped": 0, "selected": 0, "failures": {}}

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session

    def pytest_runtest_logreport(self, report: Any) -> None:
        result = self.job.result
        if report.when == "call" or not report.passed:
            result[report.outcome] += 1
        result["selected"] = self.session.testscollected
        if report.failed and len(result["failures"]) < MOST_FAILURES:
            crash = getattr(report.longrepr, "reprcrash", None)  # none where a worker crashed
            reason = crash.message if crash else report.longreprtext
            result["failures"][f"{report.nodeid} ({report.when})"] = reason[:REASON_CHARACTERS]
        if report.when == "teardown":
            self.job.save()
