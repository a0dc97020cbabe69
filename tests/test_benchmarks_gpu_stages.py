"""What the stages of a run on a GPU do: nothing wrong is timed, and whatever is missing is said."""

from __future__ import annotations

import math
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import runner, traffic
from benchmarks.gpu import around, deepest, graphs, kernels, primitives, sanitize, steps
from benchmarks.gpu.case import Case
from benchmarks.gpu.skip import Skip
from benchmarks.gpu.stage import Job
from benchmarks.gpu.summary import CHARACTERS, summary
from fastdense.kernels import launch
from fastdense.torch_backend import TorchBackend

CPU = torch.device("cpu")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(True, time.time() + 300, {}, tmp_path / "stage.json")


SMALL = traffic.Network(8, (2, 1), 16)


def test_cases_are_those_of_the_networks_and_the_largest_come_first() -> None:
    larger = traffic.Network(8, (2, 2), 16)
    found = kernels.cases({"small": SMALL, "larger": larger}, batch=2, size=32)
    round_blocks = 4 + 2 + 2 + 2  # stem; inputs' gradients; transition; head
    assert sum(times.get("small", 0) for times in found.values()) == 2 + 4 * 3 + round_blocks
    assert sum(times.get("larger", 0) for times in found.values()) == 2 + 4 * 4 + round_blocks
    first = [case for case, times in found.items() if "small" in times]
    assert list(found)[: len(first)] == first
    moved = [times["small"] * traffic.primitive(case.operation, case.shape).bytes for case, times in found.items()
             if case in first]  # fmt: skip
    assert moved == sorted(moved, reverse=True)
    assert all(case.batch * case.spatial[0] * case.spatial[1] == case.shape.m for case in found)
    assert {case.width for case in first if case.operation not in traffic.AROUND} == {32, 24}
    assert {case.operation for case in first} == {
        traffic.COPY, *traffic.FORWARD, *traffic.BACKWARD, *traffic.AROUND
    }  # fmt: skip


# The backend's method behind each operation, and how many results it has, if not rows and two moments.
PRIMITIVE = {
    traffic.COPY: "copy_with_moments",
    traffic.MOMENTS: "moments",
    traffic.RESOLVE: "resolve",
    traffic.MAX_POOL[0]: "bn_relu_pool",
    traffic.MEAN[0]: "bn_relu_pool",
    traffic.MAX_POOL[1]: "bn_relu_pool_backward",
    traffic.MEAN[1]: "bn_relu_pool_backward",
    **dict.fromkeys((*traffic.FORWARD, traffic.TRANSITION[0]), "bn_relu_conv"),
    **dict.fromkeys((*traffic.BACKWARD, traffic.TRANSITION[1]), "bn_relu_conv_backward"),
}
RESULTS = {
    **dict.fromkeys((*traffic.BACKWARD, traffic.TRANSITION[1]), 6),
    traffic.MAX_POOL[1]: 5, traffic.MEAN[1]: 5, traffic.MEAN[0]: 1, traffic.RESOLVE: 1, traffic.MOMENTS: 2,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("operation", [traffic.COPY, *traffic.FORWARD, *traffic.BACKWARD, *traffic.AROUND])
def test_a_right_primitive_passes_and_one_that_skips_a_row_or_scales_a_gradient_does_not(
    operation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(case for case in kernels.cases({"": SMALL}, 2, 32) if case.operation == operation)
    _, errors = primitives.check(case, dtype, CPU, "torch")
    assert primitives.passes(errors, dtype), errors
    assert len(errors) == RESULTS.get(operation, 3)

    class Wrong(TorchBackend):
        pass

    name = PRIMITIVE[operation]
    real = getattr(TorchBackend, name)

    def all_but_one(self: Any, *arguments: Any, **options: Any) -> Any:
        out = options.get("out", arguments[-1])
        rows = out.mean if operation == traffic.MOMENTS else out if isinstance(out, torch.Tensor) else out.rows
        kept = rows[1].clone()
        result = real(self, *arguments, **options)
        rows[1] = kept
        return result

    def too_small(self: Any, *arguments: Any, **options: Any) -> Any:
        *others, last = real(self, *arguments, **options)
        assert last is not None
        return [*others, last * 0.9]

    setattr(Wrong, name, too_small if name.endswith("backward") else all_but_one)
    create = primitives.backends.create
    for module in (primitives, around):
        monkeypatch.setattr(module.backends, "create", lambda impl, x: Wrong(x) if impl == "wrong" else create(impl, x))
    _, errors = primitives.check(case, dtype, CPU, "wrong")
    assert not primitives.passes(errors, dtype)
    assert name.endswith("backward") or any(math.isnan(e) for e in errors.values()), "what nobody wrote is NaN"


def test_a_kernel_that_is_wrong_or_does_not_compile_is_not_timed(monkeypatch: pytest.MonkeyPatch, job: Job) -> None:
    def check(case: Case, dtype: torch.dtype, device: torch.device, impl: str) -> Any:
        if case.operation == "forward 3x3":
            raise RuntimeError("out of resource: shared memory")
        error = float("nan") if case.operation == "forward 1x1" else 0.0
        return (lambda: None), {"rows": error}

    monkeypatch.setattr(kernels, "check", check)
    job.earlier["rates"] = {name: {"per_second": 1e12} for name in ("copy", "bfloat16", "float16", "tf32")}
    kernels.measure(job)
    for row in job.result["rows"]:
        assert ("timing" in row) == ("floor_seconds" in row) == (row["operation"] not in traffic.FORWARD)
    text = summary({"kernels": {"status": "ok", "seconds": 1.0, "result": runner.plain(job.result), "environment": {}}})
    assert "out of resource" in text and "nan" in text


def test_candidates_differ_in_one_field_and_the_table_comes_first_and_last(
    monkeypatch: pytest.MonkeyPatch, job: Job
) -> None:
    seen: list[launch.LaunchConfig] = []
    configuration = launch.configuration
    shape = launch.Shape(64, 16, 32, 1)

    def row(job: Job, case: Case, dtype: torch.dtype) -> dict[str, Any]:
        seen.append(launch.configuration("bn_relu_conv", shape, dtype, 80, 100))
        return {"operation": case.operation, **case.shape._asdict(), "checked": True}

    monkeypatch.setattr(kernels, "_row", row)
    job.rehearsal = False
    case = Case("forward 1x1", traffic.Shape(64, 16, 32, 1, 2), 1, 32)
    rows = list(kernels._variants(job, case))
    assert rows[0]["change"] == rows[-1]["change"] == {} and seen[0] == seen[-1]
    for found, config in zip(rows[1:-1], seen[1:-1], strict=True):
        ((field, value),) = found["change"].items()
        assert getattr(config, field) == value != getattr(seen[0], field)
    assert len(rows) > 8
    assert launch.configuration is configuration
    assert launch.configuration("bn_relu_conv", shape, torch.bfloat16, 80, 100) == seen[0]


def test_every_operation_and_variant_of_the_launch_table_has_candidates(
    monkeypatch: pytest.MonkeyPatch, job: Job
) -> None:
    job.rehearsal = False
    chosen = kernels._largest(job)
    variants = {kernels._variant(case) for case in chosen}
    assert {case.operation for case in chosen} == set(PRIMITIVE)
    assert {variant for _, variant in variants} == {"", "pooled", "many pooled", "wide pooled"}
    config = launch.LaunchConfig(32, 32, 32)
    for op in launch.OPERATIONS:
        changed = {field for change in kernels.neighbours(op, config) for field in change}
        assert {"block_m", "block_c", "num_warps"} <= changed
        assert ("form" in changed) == (op == "bn_relu_conv") and ("group" in changed) == (op == "bn_relu_conv_backward")


def test_a_network_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch, job: Job) -> None:
    class Wrong(nn.Module):
        def __init__(self, network: traffic.Network) -> None:
            super().__init__()
            self.model = steps._fastdense(network, impl="torch")

        def load_state_dict(self, state: Any, *arguments: Any, **options: Any) -> Any:
            return self.model.load_state_dict(state)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x.flip(0))

    class Greedy(nn.Module):
        def __init__(self, network: traffic.Network) -> None:
            super().__init__()
            self.register_parameter("weight", nn.Parameter(torch.zeros(())))

        def load_state_dict(self, state: Any, *arguments: Any, **options: Any) -> Any:
            return None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    right = steps.PROVIDERS["fastdense bottlenecks torch"]
    providers = {steps.BASE: steps._torchvision, "greedy": Greedy, "fastdense right": right, "fastdense wrong": Wrong}
    providers[steps.COMPILED] = steps._compiled
    monkeypatch.setattr(steps, "PROVIDERS", providers)
    monkeypatch.setitem(steps.REHEARSED_PROVIDERS, ("densenet121", 64), tuple(providers))
    steps.densenet121_batch64(job)
    rows = job.result["providers"]
    assert rows["fastdense right"]["checked"] and not rows["fastdense wrong"]["checked"]
    assert rows["greedy"]["status"] == "out of memory"
    timed = {label for label, row in rows.items() if "step" in row}
    assert timed == {steps.BASE, "fastdense right", steps.COMPILED}
    text = summary({"host": {"status": "ok", "seconds": 1.0, "result": runner.plain(job.result), "environment": {}}})
    assert "not timed: wrong" in text and "out of memory" in text


def test_the_summary_stays_short_and_puts_the_largest_loss_first() -> None:
    rows = [
        {
            "operation": operation,
            "dtype": dtype,
            "m": 10**m,
            "reads": 64,
            "checked": True,
            "errors": {},
            "timing": {"median": 1e-3 * (m + 1)},
            "floor_seconds": 1e-3,
            "host_seconds": 1e-5,
            "times": {"densenet121": 1, "densenet201": 2},
        }
        for operation in (traffic.COPY, *traffic.FORWARD, *traffic.BACKWARD)
        for dtype in ("bfloat16", "float16")
        for m in range(4)
    ]
    environment = {"device": "some GPU", "rehearsal": False}
    failed = {"status": "failed", "seconds": 1.0, "result": {}, "environment": environment, "error": "x" * 3000}
    stages = {f"stage {i}": failed for i in range(20)}
    stages["kernels"] = {**failed, "result": {"rows": rows, "not_reached": 3}}
    text = summary(stages)
    assert len(text) <= CHARACTERS
    assert "REHEARSAL" not in text and "3 of 43 shapes not reached" in text
    table = [
        line.split() for line in text[text.index("kernels of densenet121, bfloat16, ms a step") :].splitlines()[3:15]
    ]
    above = [float(line[-2]) for line in table]
    assert above == sorted(above, reverse=True) and above[0] == 3.0 and above[-1] == 1.0


def test_a_network_that_is_wrong_as_a_graph_is_not_timed(monkeypatch: pytest.MonkeyPatch, job: Job) -> None:
    def wrong(model: nn.Module, x: torch.Tensor) -> nn.Module:
        model.register_forward_pre_hook(lambda module, arguments: (arguments[0].flip(0),))
        return model

    monkeypatch.setattr(graphs, "REHEARSED_LABELS", (steps.BASE,))
    monkeypatch.setattr(graphs, "WAYS", {"eager": lambda model, x: model, "graph": wrong})
    graphs.measure(job)
    rows = job.result["rows"]
    assert rows["torchvision, eager"]["checked"] and rows["torchvision, eager"]["step"].repeats == 1
    assert not rows["torchvision, graph"]["checked"] and "step" not in rows["torchvision, graph"]
    text = summary({"graphs": {"status": "ok", "seconds": 1, "result": runner.plain(job.result), "environment": {}}})
    assert "not timed: wrong" in text


TOOL = """#!{python}
import os, sys, time
name = sys.argv[sys.argv.index("--tool") + 1]
assert os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1" and sys.argv[-2:] == ["-m", "benchmarks.gpu.sanitize"]
print("ran resolve in torch.float16", flush=True)
behaviour = "{behaviour}"
if name == "racecheck" and behaviour == "hang":
    time.sleep(60)
if behaviour == "crash":
    sys.exit(1)
found = 2 if name == "racecheck" and behaviour == "hazard" else 0
print(f"========= {{'RACECHECK' if name == 'racecheck' else 'ERROR'}} SUMMARY: {{found}} "
      f"{{'hazards displayed (2 errors)' if name == 'racecheck' else 'errors'}}")
sys.exit(9 if found else 0)
"""


@pytest.mark.parametrize(
    ("behaviour", "found"), [("right", (0, 0)), ("hazard", (0, 2)), ("hang", (0, None)), ("crash", (None, None))]
)
def test_what_the_sanitizer_says(
    behaviour: str, found: tuple[int | None, int | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(TOOL.format(python=sys.executable, behaviour=behaviour))
    tool.chmod(0o755)
    monkeypatch.setattr(sanitize, "_tool", lambda: str(tool))
    job = Job(False, time.time() + (9 if behaviour == "hang" else 60), {}, tmp_path / "stage.json")
    if behaviour == "right":
        sanitize.check(job)
    else:
        with pytest.raises(RuntimeError, match="racecheck: "):
            sanitize.check(job)
    assert tuple(job.result[name]["found"] for name in sanitize.TOOLS) == found
    assert all(job.result[name]["ran"] == 1 for name in sanitize.TOOLS)
    text = summary({"sanitizer": {"status": "ok", "seconds": 1, "result": job.result, "environment": {}}})
    assert ("did not finish" in text) == (None in found) and ("2 found" in text) == (2 in found)


def test_without_the_tool_the_sanitizers_stage_is_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sanitize, "_tool", lambda: None)
    with pytest.raises(Skip, match="not installed"):
        sanitize.check(Job(False, time.time() + 60, {}, tmp_path / "stage.json"))


def test_every_primitive_goes_under_the_sanitizer() -> None:
    cases = list(sanitize.cases())
    assert {case.operation for case in cases} == set(PRIMITIVE)
    assert all(case.shape.m % 16 and case.shape.reads % 16 for case in cases)  # tiles that are not full


def test_depth_is_asked_for_12_gb_and_for_no_longer_than_there_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    @dataclass(frozen=True)
    class Options:
        budget: int = 0
        device: str = ""
        seconds: float = 0.0

    asked: list[Options] = []

    def run(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
        asked.append(options)
        say("one line")
        row = {"label": "fastdense", "depth": 1204, "complete": False}
        return {"results": {"cifar": {"title": "deepest", "grows": "depth", "providers": {"a": row}}}}

    monkeypatch.setattr(deepest, "depth", types.SimpleNamespace(Options=Options, run=run))
    job = Job(False, time.time() + 60, {}, tmp_path / "stage.json")
    deepest.measure(job)
    (options,) = asked
    assert (options.budget, options.device) == (12 * 10**9, "cuda") and 40 < options.seconds < 60
    text = summary({"depth": {"status": "ok", "seconds": 1, "result": job.result, "environment": {}}})
    assert "deepest: fastdense 1204 or more" in text
