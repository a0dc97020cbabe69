"""The run on a GPU: no stage takes another down, nothing wrong is timed, and all of it can be rehearsed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import runner, traffic
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import graphs, steps
from benchmarks.gpu import run as run_module
from benchmarks.gpu.run import FILE_BYTES, FILES, LOG, PICTURE, RECORD, Run, _variables
from benchmarks.gpu.stage import Job, Stage
from benchmarks.gpu.summary import CHARACTERS, summary

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


def test_a_stage_that_cannot_run_here_says_why_and_the_run_is_complete(run: Callable[..., Any], tmp_path: Path) -> None:
    complete, said = run(stage("cannot_run_here"))
    assert complete and "skipped: no such tool" in said[0]
    assert entries(tmp_path)["cannot-run-here"]["error"] == "no such tool"


def test_without_time_a_stage_is_not_reached(run: Callable[..., Any], tmp_path: Path) -> None:
    assert run(stage("finish"), minutes=0.0)[0] is False
    assert entries(tmp_path)["finish"]["status"] == "not reached"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_rehearsal_of_everything(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(out), "--rehearse"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = done.stdout[done.stdout.index("REHEARSAL") :]
    assert len(report) <= CHARACTERS + 1 and "no picture" not in done.stdout
    found = entries(out)
    status = {name: entry["status"] for name, entry in found.items()}
    assert status.pop("depth") in ("ok", "skipped")
    assert status == {one.name: "ok" for one in command.STAGES if one.name != "depth"}
    assert all(entry["environment"]["rehearsal"] for entry in found.values())
    assert {path.name for path in out.iterdir()} == {RECORD, LOG, PICTURE}
    assert all(path.stat().st_size <= FILE_BYTES for path in out.iterdir())
    results = {name: entry["result"] for name, entry in found.items()}
    assert results["gpu-tests"]["passed"] >= 2
    rows = results["kernels"]["rows"]
    assert {row["operation"] for row in rows} == {
        traffic.COPY, *traffic.FORWARD, *traffic.BACKWARD, *traffic.AROUND
    } and all(row["checked"] and row["floor_seconds"] > 0 for row in rows)  # fmt: skip
    timed = [name for name in results if name.startswith("densenet") or name == "host"]
    labels = set()
    for name in timed:
        providers = results[name]["providers"]
        assert all(row["step"]["median"] > 0 for row in providers.values())
        assert all(row["checked"] for label, row in providers.items() if label.startswith("fastdense"))
        labels |= providers.keys()
    assert {"fastdense converted triton", "fastdense bottlenecks triton", steps.COMPILED} <= labels
    assert results["densenet121-batch64"]["modelled"]["floor_seconds"] > 0
    assert len(results["graphs"]["rows"]) == 2 * len(graphs.WAYS)
    assert all("step" in row for row in results["graphs"]["rows"].values())
    assert results["sanitizer"]["primitives"] == 13


def test_what_a_run_leaves_is_small_and_few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for day in range(10, 20):
        (tmp_path / f"gpu-2026-01-{day}.json").write_text("{}")
    (tmp_path / LOG).write_bytes(b"x" * 5000 + b"the end")
    (tmp_path / "gpu.json.tmp").write_text("half of it")
    monkeypatch.setattr(run_module, "FILE_BYTES", 4000)
    one = Run(tmp_path, minutes=1.0, rehearsal=True, say=lambda line: None)
    one._enter(stage("finish"), {"status": "ok", "seconds": 1.0, "result": {"kept": 1}})
    one._enter(stage("fail"), {"status": "ok", "seconds": 1.0, "result": {"rows": ["long"] * 1000}})
    run_module.tidy(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == FILES == 8 and "gpu-2026-01-19.json" in left and "gpu-2026-01-13.json" not in left
    assert all(path.stat().st_size <= 4000 for path in tmp_path.iterdir())
    assert (tmp_path / LOG).read_bytes().endswith(b"the end")
    found = entries(tmp_path)
    assert found["finish"]["result"] == {"kept": 1} and "exceed" in found["fail"]["result"]["dropped"]


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
