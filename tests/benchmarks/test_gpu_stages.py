"""The stages of a run on a GPU: nothing wrong is timed, and whatever is wrong or missing is said."""

import dataclasses
import math
import os
import time
import types
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.compiled import traffic
from benchmarks.gpu import checks, kernels, primitives, steps
from benchmarks.gpu.primitives import METHOD, Case
from benchmarks.gpu.run import Job, Skip
from benchmarks.gpu.summary import CHARACTERS, summary
from benchmarks.harness import runner
from fastdense.backends.torch_backend import TorchBackend
from fastdense.kernels import launch

CPU = torch.device("cpu")


@pytest.fixture
def job() -> Job:
    return Job("batch64", time.time() + 300, rehearsal=True)


def entry(result: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"status": "ok", "seconds": 1.0, "environment": {}, "result": runner.plain(result), **more}


# Every primitive at a shape that fills no tile.
SMALL = {case.operation: case for case in kernels.sanitized()}
# The launch table's operation behind those that have no method of its name.
OF_TABLE = {traffic.MOMENTS: "copy", traffic.MAX_POOL[0]: "max_pool", traffic.MAX_POOL[1]: "pool_backward"}


def test_candidates_are_of_every_main_kernel_on_every_map_and_the_table_comes_first_and_last() -> None:
    found = kernels.tried()
    for case, changes in found.items():
        assert kernels.OPERATION[case.operation] == {**METHOD, **OF_TABLE}[case.operation]
        assert all(dataclasses.replace(launch.LaunchConfig(16, 16, 16), **change).num_warps for change in changes)
        assert changes[0] == changes[-1] == {} and all(changes[1:-1])
        assert case.width >= case.shape.reads or case.shape.taps > 1
    in_blocks = {*traffic.FORWARD, *traffic.BACKWARD}
    blocks = [case for case in found if case.operation in in_blocks]
    assert len(blocks) == 16 and {case.spatial[0] for case in blocks} == {56, 28, 14, 7}
    assert all(len(found[case]) > 7 for case in blocks) and len(found) == 16 + 3 + 2 * 3
    around = {traffic.MOMENTS, *traffic.MAX_POOL, *traffic.TRANSITION}
    assert {case.operation for case in found} == in_blocks | around


# How many results each operation has, if not rows and two moments.
RESULTS = {
    **dict.fromkeys((*traffic.BACKWARD, traffic.TRANSITION[1]), 6),
    traffic.MAX_POOL[1]: 5, traffic.MEAN[1]: 5, traffic.MEAN[0]: 1, traffic.RESOLVE: 1, traffic.MOMENTS: 2,
}  # fmt: skip


def errors_of(case: Case, dtype: torch.dtype, impl: str = "torch") -> dict[str, float]:
    primitive = primitives.Primitive(case, dtype, CPU, impl)
    return primitives.errors(primitive, primitives.expected(primitive))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("operation", SMALL)
def test_a_right_primitive_passes_and_one_that_skips_a_row_or_scales_a_gradient_does_not(
    operation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, name = SMALL[operation], METHOD[operation]
    errors = errors_of(case, dtype)
    assert primitives.passes(errors, dtype), errors
    assert len(errors) == RESULTS.get(operation, 3)
    real = getattr(TorchBackend, name)

    def all_but_one(self: Any, *arguments: Any, **options: Any) -> Any:
        out = options.get("out", arguments[-1])
        rows = out.mean if operation == traffic.MOMENTS else out if isinstance(out, torch.Tensor) else out.rows
        before = rows[1].clone()
        result = real(self, *arguments, **options)
        rows[1] = before
        return result

    def too_small(self: Any, *arguments: Any, **options: Any) -> Any:
        *others, last = real(self, *arguments, **options)
        return [*others, last * 0.9]

    backward = name.endswith("backward")
    wrong = type("Wrong", (TorchBackend,), {name: too_small if backward else all_but_one})
    create = primitives.select.create
    monkeypatch.setattr(primitives.select, "create", lambda impl, x: wrong(x) if impl == "wrong" else create(impl, x))
    errors = errors_of(case, dtype, "wrong")
    assert not primitives.passes(errors, dtype)
    assert backward or any(math.isnan(e) for e in errors.values()), "what nobody wrote is NaN"


def test_a_maximum_is_checked_against_values_that_were_rounded_before() -> None:
    """The variance of rounded values is off by a percent from that of unrounded ones."""
    case = Case(traffic.MAX_POOL[0], traffic.Shape(2 * 112 * 112, 16, 16, 1, 2), 2, 16)
    errors = errors_of(case, torch.bfloat16)
    assert primitives.passes(errors, torch.bfloat16), errors


def test_the_reason_of_a_failed_test_and_of_a_crashed_worker_is_recorded(job: Job, tmp_path: Path) -> None:
    assert all((runner.ROOT / name).is_file() for name in checks.TESTS)
    failing = tmp_path / "test_it.py"
    failing.write_text("def test_a(): pass\ndef test_b(): assert 1 == 2, 'x' * 9999\n")
    recorder = checks._Recorder(job)
    assert pytest.main([str(failing), "-p", "no:cacheprovider", "-p", "no:terminal"], plugins=[recorder]) == 1
    assert [job.result[name] for name in ("passed", "failed", "skipped", "selected")] == [1, 1, 0, 2]
    ((name, reason),) = job.result["failures"].items()
    assert name.endswith("test_it.py::test_b (call)") and reason.startswith("AssertionError: xxx")
    assert len(reason) == checks.REASON_CHARACTERS
    crashed = {"when": "???", "passed": False, "failed": True, "outcome": "failed", "nodeid": "a test"}
    recorder.pytest_runtest_logreport(types.SimpleNamespace(**crashed, longrepr="gw1 crashed", longreprtext="crashed"))
    assert job.result["failures"]["a test (???)"] == "crashed"


def test_a_candidate_that_is_wrong_or_does_not_compile_is_not_timed(monkeypatch: pytest.MonkeyPatch, job: Job) -> None:
    real = kernels._row

    def row(sets: Any, truth: Any, job: Job) -> dict[str, Any]:
        if launch.configuration("bn_relu_conv", launch.Shape(64, 16, 32, 1), torch.float16, 0, 2).num_warps == 1:
            raise RuntimeError("out of resource: shared memory")
        return real(sets, truth, job)

    monkeypatch.setattr(kernels, "_row", row)
    (case,) = kernels.REHEARSED
    monkeypatch.setattr(kernels, "REHEARSED", {case: ({}, {"num_warps": 1}, {})})
    job.earlier["rates"] = {name: {"per_second": 1e12} for name in ("copy", "bfloat16", "float16", "tf32")}
    kernels.candidates(job)
    rows = job.result["rows"]
    assert [row["checked"] for row in rows] == [True, False, True] and all(row["floor_seconds"] > 0 for row in rows)
    assert ["timing" in row for row in rows] == [True, False, True]
    assert "out of resource" in summary({"candidates": entry(job.result)})
    monkeypatch.setattr(kernels, "passes", lambda errors, dtype: False)
    kernels.candidates(job)
    assert not any("timing" in row for row in job.result["rows"])


@pytest.mark.parametrize("operation", traffic.BACKWARD)
def test_a_candidates_check_starts_from_the_same_gradients_every_time(
    operation: str, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets, truth = kernels._bound(SMALL[operation], job)
    for _ in range(2):
        row = kernels._row(sets, truth, job)
        assert row["checked"], row
    monkeypatch.setattr(sets[0], "reset", lambda: None)
    assert kernels._row(sets, truth, job)["checked"] == (operation == traffic.BACKWARD[1])


NCU = """==PROF== Connected to process 7
ran forward 1x1
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","bn_relu_conv_kernel","gpu__time_duration.sum","ns","12,345"
"0","7","bn_relu_conv_kernel","lts__t_sector_hit_rate.pct","%","56.5"
"0","7","bn_relu_conv_kernel","smsp__average_warps_issue_stalled_wait_per_issue_active.ratio","inst","2.5"
"1","7","bn_relu_conv_kernel","gpu__time_duration.sum","ns","500"
"1","7","bn_relu_conv_kernel","some_other_metric","","1"
"""


def test_what_ncu_prints_is_read() -> None:
    first, second = kernels.rows(NCU)
    assert first["operation"] == "forward 1x1" and first["m"] == 64 * 56**2
    assert (first["nanoseconds"], first["L2 hits %"], first["stalled: wait"]) == (12345.0, 56.5, 2.5)
    assert second["operation"] == "forward 3x3" and second["nanoseconds"] == 500.0
    text = summary({"counters": entry({"rows": [first]})})
    assert "12.3" in text and "wait 2.5" in text
    assert list(kernels.rows("==ERROR== no permission")) == []


def test_a_network_that_is_wrong_or_does_not_fit_is_not_timed(monkeypatch: pytest.MonkeyPatch, job: Job) -> None:
    real = steps.build

    def no_memory(module: nn.Module, given: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def build(of: traffic.Network, label: str) -> Any:
        model = real(of, steps.OURS[0] if label == steps.OURS[1] else label)
        if label == steps.EFFICIENT:
            model.register_forward_pre_hook(no_memory)
        if label == steps.OURS[1]:
            model.register_forward_pre_hook(lambda module, given: (given[0].flip(0),))
        return model

    monkeypatch.setattr(steps, "build", build)
    with pytest.raises(RuntimeError, match="wrong: fastdense bottlenecks"):
        checks.networks(job)
    job.earlier["check"] = job.result
    job.result = {}
    steps.compare(job)
    rows = job.result["rows"]
    assert rows["fastdense activations, eager"]["checked"] and not rows["fastdense bottlenecks, graph"]["checked"]
    assert rows[f"{steps.EFFICIENT}, eager"]["status"] == "out of memory"
    timed = {label for label, row in rows.items() if "step" in row}
    assert timed == {f"{label}, {way}" for label in (steps.BASE, steps.OURS[0]) for way in ("eager", "graph")}
    text = summary({"batch64": entry(job.result)})
    assert "not timed: wrong" in text and "out of memory" in text


def test_a_graph_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch, job: Job) -> None:
    class Stale(steps.Step):
        def launch(self) -> None:
            super().launch()
            for parameter in self.model.parameters():
                if self.graphed and parameter.grad is not None:
                    parameter.grad *= 1.01

    monkeypatch.setattr(steps, "Step", Stale)
    monkeypatch.setitem(steps.COMPARISONS, job.name, ("densenet121", 64, (), (steps.BASE, steps.OURS[0])))
    steps.compare(job)
    rows = job.result["rows"]
    assert not rows["fastdense activations, graph"]["checked"] and "step" not in rows["fastdense activations, graph"]
    assert "step" in rows["torchvision, graph"] and rows["torchvision, graph"]["differs_by"] > 1e-3


def test_where_the_kernels_are_wrong_it_says_which_part_is(monkeypatch: pytest.MonkeyPatch, job: Job) -> None:
    real = checks.step

    def step(pair: Any, x: torch.Tensor, seed: int) -> Any:
        found = real(pair, x, seed)
        config = launch.configuration("bn_relu_conv", launch.Shape(64, 16, 8, 9), torch.float32, 0, 2)
        if config.form == "rows" and getattr(pair[0], "impl", "") == "triton":
            found["output"] = found["output"] * 1.1
        return found

    monkeypatch.setattr(checks, "step", step)
    monkeypatch.setattr(checks, "TOLERANCE", {torch.float32: 1e-6})
    monkeypatch.setattr(checks, "_differing", lambda *given: 0)
    with pytest.raises(RuntimeError, match="output is off by"):
        checks.smoke(job)
    (found,) = job.result.values()
    assert found["wrong"] == ["output"] and found["simpler"]["one stage"]["wrong"] == ["output"]
    assert found["simpler"]["taps"] == {"wrong": [], "differing_reruns": 0}
    text = summary({"smoke": entry(job.result, status="failed")})
    assert "WRONG: output" in text and "with taps" in text


def test_reruns_that_differ_are_counted(monkeypatch: pytest.MonkeyPatch, job: Job) -> None:
    pair = checks.pair((1, 8, 4, 4))
    assert checks._differing(pair, torch.float32, job) == 0
    real, noise = checks.step, iter(range(10**6))
    monkeypatch.setattr(checks, "step", lambda *given: {**real(*given), "output": torch.tensor(float(next(noise)))})
    assert checks._differing(pair, torch.float32, job) == 1


def test_the_summary_stays_short_and_puts_the_largest_loss_first() -> None:
    row = {"times": 2, "floor_seconds": 1e-3}
    operations = (traffic.COPY, *traffic.FORWARD, *traffic.BACKWARD)
    rows = [row | {"operation": name, "m": 10**m, "seconds": 1e-3 * (m + 1)} for name in operations for m in range(4)]
    failed = entry({}, status="failed", error="x" * 3000, environment={"device": "some GPU", "rehearsal": False})
    stages: dict[str, Any] = {f"stage {i}": failed for i in range(20)}
    profile = {"kernels": 9, "device_seconds": 0.1, "ours_seconds": 0.1, "busy": 0.5, "rows": rows, "others": {"a": 1}}
    stages["layers"] = {**failed, "result": {"fastdense, batch 64": profile}}
    text = summary(stages)
    assert len(text) <= CHARACTERS
    assert "REHEARSAL" not in text and "busy for 50%" in text
    table = [line.split() for line in text[text.index("ms a step on the device; floors modelled") :].splitlines()[3:15]]
    above = [float(line[-1]) for line in table]
    assert above == sorted(above, reverse=True) and above[0] == 6.0 and above[-1] == 2.0


TOOL = """#!/bin/sh
echo "ran resolve in torch.float16"
case "$PYTORCH_NO_CUDA_MEMORY_CACHING $*" in
    "1 --tool "*" -m benchmarks.gpu.kernels sanitizer") ;;
    *) exit 1 ;;
esac
case "$2 {behaviour}" in
    *" crash") exit 1 ;;
    "racecheck hang") exec sleep 600 ;;
    "racecheck hazard") echo "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors)"; exit 9 ;;
    racecheck*) echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors)" ;;
    *) echo "========= ERROR SUMMARY: 0 errors" ;;
esac
"""
FOUND: dict[str, list[int | None]] = {"right": [0, 0], "hazard": [0, 2], "hang": [0, None], "crash": [None, None]}


@pytest.mark.parametrize("behaviour", FOUND)
def test_what_the_sanitizer_says_is_read(behaviour: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(TOOL.format(behaviour=behaviour))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    job = Job("stage", time.time() + (9 if behaviour == "hang" else 60), rehearsal=False)
    with nullcontext() if behaviour == "right" else pytest.raises(RuntimeError, match="racecheck: "):
        kernels.sanitizer(job)
    assert [job.result[name]["found"] for name in kernels.SANITIZERS] == FOUND[behaviour]
    assert [job.result[name]["ran"] for name in kernels.SANITIZERS] == [1, 1]
    text = summary({"sanitizer": entry(job.result)})
    assert ("did not finish" in text) == (None in FOUND[behaviour])
    assert ("2 found" in text) == (behaviour == "hazard")


def test_every_primitive_goes_under_the_sanitizer_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert SMALL.keys() == METHOD.keys()
    assert all(case.shape.m % 16 and case.shape.reads % 16 for case in SMALL.values())  # tiles that are not full
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(kernels, "PLACES", ())
    with pytest.raises(Skip, match="not installed"):
        kernels.sanitizer(Job("stage", time.time() + 60, rehearsal=False))


def test_depth_is_asked_for_12_gb_and_for_no_longer_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def run(options: Any, say: Callable[[str], None]) -> dict[str, Any]:
        asked.append(options)
        row = {"label": "fastdense", "depth": 1204, "complete": False}
        return {"results": {"cifar": {"title": "deepest", "grows": "depth", "providers": {"a": row}}}}

    monkeypatch.setattr(steps, "depth", types.SimpleNamespace(Options=types.SimpleNamespace, run=run))
    job = Job("stage", time.time() + 6000, rehearsal=False)
    steps.deepest(job)
    (options,) = asked
    assert (options.budget, options.device) == (12 * 10**9, "cuda") and 5000 < options.seconds < 6000
    assert "deepest: fastdense 1204 or more" in summary({"depth": entry(job.result)})
