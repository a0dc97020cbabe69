"""The run on a GPU: no stage takes another down, nothing wrong is timed, and all of it can be rehearsed."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import runner, traffic
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import around, kernels, primitives, steps
from benchmarks.gpu.case import Case
from benchmarks.gpu.run import RECORD, Run, _variables
from benchmarks.gpu.stage import Job, Stage
from benchmarks.gpu.summary import CHARACTERS, summary
from fastdense.kernels import launch
from fastdense.torch_backend import TorchBackend

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def stage(name: str, seconds: float = 120.0, **options: Any) -> Stage:
    return Stage(name.replace("_", "-"), f"stages_for_tests:{name}", seconds, **options)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(True, time.time() + 300, {}, tmp_path / "stage.json")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[bool, list[str]]]]:
    """Runs stages into one folder; returns whether all finished, and what was said."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))

    def run_them(*stages: Stage, minutes: float = 9.0, again: bool = False) -> tuple[bool, list[str]]:
        said: list[str] = []
        complete = Run(tmp_path, minutes=minutes, rehearsal=True, again=again, say=said.append).run(stages)
        return complete, said

    yield run_them
    left = {path.name for path in tmp_path.iterdir() if not path.match("gpu-*.json")}
    assert left <= {RECORD, "gpu.log"}


def entries(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RECORD).read_text(), parse_constant=pytest.fail)["stages"]


@pytest.mark.slow
def test_however_a_stage_ends_the_next_one_runs(run: Callable[..., Any], tmp_path: Path) -> None:
    names = ("fail", "run_out_of_memory", "crash", "exit_early", "hang", "finish")
    complete, said = run(*(stage(name, 12.0 if name == "hang" else 120.0) for name in names))
    assert not complete
    assert [line.partition(":")[0] for line in said] == [name.replace("_", "-") for name in names]
    found = entries(tmp_path)
    assert {name: entry["status"] for name, entry in found.items()} == {
        "fail": "failed",
        "run-out-of-memory": "out of memory",
        "crash": "crashed",
        "exit-early": "crashed",
        "hang": "timed out",
        "finish": "ok",
    }
    assert "this stage fails" in found["fail"]["error"]
    assert found["fail"]["result"] == {"kept": 1}
    assert found["crash"]["result"] == {"kept": 2}
    assert "SIGSEGV" in found["crash"]["error"] and "the last thing that it said" in found["crash"]["error"]
    assert found["hang"]["seconds"] < 30
    assert gone(found["hang"]["result"]["helper"])
    assert found["finish"]["result"]["not finite"] == ["nan", "inf"]
    assert found["finish"]["result"]["earlier"] == []  # what has failed is no result to build on
    assert "printed by a stage" in (tmp_path / "gpu.log").read_text()
    required = {"device", "torch", "triton", "commit", "sources", "date", "command", "rehearsal"}
    assert all(required <= entry["environment"].keys() for entry in found.values())
    assert len(summary(found)) <= CHARACTERS


def gone(pid: int) -> bool:
    """Whether a process has ended; where nobody waits for orphans it stays as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.slow
def test_what_has_finished_is_kept_until_the_code_or_the_user_changes(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(stage("finish"), stage("fail"))[0] is False
    first = entries(tmp_path)["finish"]
    complete, said = run(stage("finish"), stage("fail"))
    assert not complete
    assert said[0] == "finish: finished earlier" and said[1].startswith("fail: failed")
    assert entries(tmp_path)["finish"] == first
    assert run(stage("finish"), again=True)[1][0].startswith("finish: ok")
    monkeypatch.setattr(runner, "_sources", lambda: "other code")
    assert run(stage("finish"))[1][0].startswith("finish: ok")
    (aside,) = tmp_path.glob("gpu-*.json")
    assert json.loads(aside.read_text())["stages"].keys() == {"finish", "fail"}
    assert entries(tmp_path).keys() == {"finish"}


@pytest.mark.slow
def test_stages_in_the_background_end_before_the_first_timed_one(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)  # whoever has set it
    background = Stage("beside", "stages_for_tests:finish", 120, background=True)
    timed = Stage("timed", "stages_for_tests:finish", 120, timed=True)
    complete, said = run(background, stage("finish", deterministic=True), timed)
    assert complete
    assert [line.partition(":")[0] for line in said] == ["finish", "beside", "timed"]
    found = entries(tmp_path)
    assert found["timed"]["result"]["earlier"] == ["beside", "finish"]
    variables = {"TRITON_INTERPRET": "1", "PYTHONUNBUFFERED": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    assert found["finish"]["result"]["variables"] == variables
    assert found["timed"]["result"]["variables"] == {**variables, "CUBLAS_WORKSPACE_CONFIG": None}


def test_only_a_rehearsal_is_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    for given in ("0", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", given)
        found = [dict(_variables(stage("finish"), rehearsal)).get("TRITON_INTERPRET") for rehearsal in (False, True)]
        assert found == [None, "1"]


def test_without_time_a_stage_is_not_reached(run: Callable[..., Any], tmp_path: Path) -> None:
    assert run(stage("finish"), minutes=0.0)[0] is False
    assert entries(tmp_path)["finish"]["status"] == "not reached"


@pytest.mark.slow
def test_a_short_rehearsal(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stages = ("environment", "gpu-tests", "rates", "densenet121-batch64")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(out), "--rehearse", "--stages", *stages],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "REHEARSAL" in done.stdout
    found = entries(out)
    assert {name: entry["status"] for name, entry in found.items()} == dict.fromkeys(stages, "ok")
    assert all(entry["environment"]["rehearsal"] for entry in found.values())
    assert found["gpu-tests"]["result"]["passed"] >= 2
    providers = found["densenet121-batch64"]["result"]["providers"]
    assert all(row["step"]["median"] > 0 for row in providers.values())
    assert {label for label, row in providers.items() if row["checked"]} == {
        label for label in providers if label.startswith("fastdense")
    }
    assert found["densenet121-batch64"]["result"]["modelled"]["floor_seconds"] > 0


def test_every_stage_names_a_function_and_together_they_fit() -> None:
    for one in command.STAGES:
        module, _, function = one.target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
    timed = [one.timed for one in command.STAGES]
    assert timed == sorted(timed), "whatever checks comes before whatever times"
    assert not any(one.timed and one.deterministic for one in command.STAGES)


def test_without_a_gpu_the_run_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        command.main()
    assert exit_.value.code == 2 and "--rehearse" in capsys.readouterr().err


UNINSTALLED = f"""
import importlib.util, sys
sys.path += [{sysconfig.get_path("purelib")!r}]  # without its .pth files, and so without the editable install
assert importlib.util.find_spec("fastdense.kernels") is None
from benchmarks import checkout
checkout.enable()
checkout.enable()
import fastdense.kernels.launch
print(fastdense.kernels.__name__, fastdense.kernels.__file__, fastdense.kernels.launch.__file__)
"""


def test_kernels_import_from_a_checkout_that_is_not_installed() -> None:
    done = subprocess.run([sys.executable, "-S", "-c", UNINSTALLED], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = ROOT / "kernels"
    assert done.stdout.split() == ["fastdense.kernels", str(folder / "__init__.py"), str(folder / "launch.py")]


def test_pytest_runs_in_a_checkout_that_is_not_installed() -> None:
    code = f"""
import sys
sys.path += [{sysconfig.get_path("purelib")!r}]
import pytest
sys.exit(pytest.main(["-q", "-p", "benchmarks.checkout", "tests/test_kernel_sources.py", "-k", "override"]))
"""
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_this_checkouts_package_is_given_these_kernels() -> None:
    from benchmarks.checkout import _Kernels

    assert _Kernels.find_spec("fastdense.kernels", ["/elsewhere/fastdense"]) is None
    assert _Kernels.find_spec("fastdense.nn", [str(ROOT / "fastdense")]) is None
    found = _Kernels.find_spec("fastdense.kernels", [str(ROOT / "fastdense")])
    assert found is not None and found.origin == str(ROOT / "kernels" / "__init__.py")


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
    monkeypatch.setattr(steps, "PROVIDERS", providers | {steps.COMPILED: steps._compiled})
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
    table = [line.split() for line in text[text.index("kernels of densenet121, bfloat16") :].splitlines()[3:23]]
    above = [float(line[-2]) for line in table]
    assert above == sorted(above, reverse=True) and above[0] == 3.0 and above[-1] == 0.0
