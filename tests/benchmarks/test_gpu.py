"""The run on a GPU: no stage takes another down, nothing wrong is timed, and all of it can be rehearsed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import gpu_stages
from helpers.processes import ROOT, python

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import steps
from benchmarks.gpu.run import LOG, PICTURE, RECORD, START_SECONDS, Run, Stage, _Worker
from benchmarks.gpu.summary import CHARACTERS, summary

CPU = torch.device("cpu")


def stage(name: str, seconds: float = 120.0, **options: Any) -> Stage:
    return Stage(name.replace("_", "-"), getattr(gpu_stages, name), seconds, **options)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., tuple[bool, list[str]]]]:
    """Runs stages into one folder; returns whether all finished, and what was said."""

    def run_them(*stages: Stage, minutes: float = 9.0) -> tuple[bool, list[str]]:
        said: list[str] = []
        complete = Run(tmp_path, minutes=minutes, rehearsal=True, say=said.append).run(stages)
        return complete, said

    yield run_them
    assert {path.name for path in tmp_path.iterdir()} <= {RECORD, LOG}


def entries(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RECORD).read_text(), parse_constant=pytest.fail)["stages"]


def test_a_stage_that_ended_long_before_it_is_asked_for_was_in_time(tmp_path: Path) -> None:
    worker = _Worker.__new__(_Worker)
    worker.pipe, theirs = multiprocessing.Pipe()
    worker.begun = time.time() - 10 * START_SECONDS
    for entry in ({"status": "running", "until": 0.0}, {"status": "ok", "seconds": 1.0, "result": {}}):
        theirs.send(entry)
    assert worker.wait() == {"status": "ok", "seconds": 1.0, "result": {}}


@pytest.mark.slow
def test_however_a_stage_ends_the_next_one_runs(run: Callable[..., Any], tmp_path: Path) -> None:
    names = ("fail", "run_out_of_memory", "crash", "exit_early", "hang", "finish", "cannot_run_here")
    complete, said = run(*(stage(name, 1.2 if name == "hang" else 120.0) for name in names))
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
        "cannot-run-here": "skipped",
    }
    assert "this stage fails" in found["fail"]["error"]
    assert found["fail"]["result"] == {"saved": 1}
    assert found["crash"]["result"] == {"saved": 2}
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
def test_stages_share_a_process_until_one_breaks_it_or_asks_for_its_own(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    def finish(name: str, **options: Any) -> Stage:
        return Stage(name, gpu_stages.finish, 120, **options)

    complete, _ = run(finish("a"), finish("b"), stage("exit_early"), finish("c"), finish("d", apart=True), finish("e"))
    assert not complete
    found = entries(tmp_path)
    assert found["exit-early"]["status"] == "crashed"
    processes = {name: entry["result"].get("process") for name, entry in found.items() if name != "exit-early"}
    assert processes["a"] == processes["b"] and len(set(processes.values())) == 4
    assert found["e"]["result"]["earlier"] == ["a", "b", "c", "d"]


@pytest.mark.slow
def test_after_a_stage_that_broke_the_device_the_next_one_has_a_new_process(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    first, last = (Stage(name, gpu_stages.finish, 120) for name in ("first", "last"))
    complete, _ = run(first, stage("break_the_device"), last)
    found = entries(tmp_path)
    assert complete and found["break-the-device"].keys() == {"status", "seconds", "result", "environment"}
    assert found["first"]["result"]["process"] != found["last"]["result"]["process"]


@pytest.mark.slow
def test_stages_in_the_background_end_before_the_first_timed_one(run: Callable[..., Any], tmp_path: Path) -> None:
    background = Stage("beside", gpu_stages.finish, 120, background=True)
    timed = Stage("timed", gpu_stages.finish, 120, timed=True)
    complete, said = run(background, stage("finish"), timed)
    assert complete
    assert [line.partition(":")[0] for line in said] == ["finish", "beside", "timed"]
    found = entries(tmp_path)
    assert found["timed"]["result"]["earlier"] == ["beside", "finish"]


@pytest.mark.parametrize("rehearsal", [False, True])
@pytest.mark.parametrize("given", ["0", "1"])
def test_only_a_rehearsal_is_interpreted(
    given: str, rehearsal: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found: list[str | None] = []

    def run(self: Run, stages: Any) -> bool:
        found.append(os.environ.get("TRITON_INTERPRET"))
        return True

    monkeypatch.setenv("TRITON_INTERPRET", given)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Run, "run", run)
    monkeypatch.setattr(command, "summary", lambda stages: "")
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--out", str(tmp_path), *["--rehearse"] * rehearsal])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as exit_:
        command.main()
    assert exit_.value.code == 0 and found == ["1" if rehearsal else None]


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
    results: dict[str, Any] = {}
    for again in (False, True):
        out = tmp_path / str(again)
        options = ["--again"] * again
        done = python("-m", "benchmarks.gpu", "--out", out, "--rehearse", "--minutes", 50, *options)
        assert done.returncode == 0, done.stdout + done.stderr
        report = done.stdout[done.stdout.index("REHEARSAL") :]
        assert len(report) <= CHARACTERS + 1 and "no picture" not in done.stdout
        found = entries(out)
        skipped = {name for name, entry in found.items() if entry["status"] == "skipped"}
        assert skipped <= {"counters", "depth"}
        assert all(found[name]["status"] == "ok" for name in found.keys() - skipped)
        assert found.keys() == {one.name for one in command.chosen(None, again=again)}
        assert {path.name for path in out.iterdir()} == {RECORD, LOG, *[PICTURE] * (not again)}
        results |= {name: entry["result"] for name, entry in found.items()}
    assert results["tests"]["passed"] >= 2
    assert {row["operation"] for row in results["candidates"]["rows"]} == {"forward 1x1"}
    assert all("timing" in row and row["floor_seconds"] > 0 for row in results["candidates"]["rows"])
    (profile,) = results["layers"].values()
    assert {"bn_relu_conv 1x1", "bn_relu_conv_backward 1x1"} <= {row["operation"] for row in profile["rows"]}
    labels: set[str] = set()
    for name in ("batch64", "batch256", "batch1", "densenet201", "compiled-batch8", "compiled-batch256"):
        rows = results[name]["rows"]
        timed = {label: row for label, row in rows.items() if "cannot be captured" not in row.get("status", "")}
        assert all(row["step"]["median"] > 0 and row["images_per_second"] > 0 for row in timed.values())
        assert all(row["checked"] for label, row in rows.items() if label.startswith("fastdense"))
        labels |= timed.keys()
    assert labels == {
        *(f"{label}, eager" for label in (*steps.PLAIN, steps.COMPILED, steps.REDUCED)),
        *(f"{label}, graph" for label in steps.PLAIN if label != steps.EFFICIENT),
    }
    assert all(row["differs_by"] == 0 for row in results["batch64"]["rows"].values() if "differs_by" in row)
    assert results["sanitizer"]["primitives"] == 13


def test_stages_that_need_the_machine_to_themselves_come_after_those_that_do_not() -> None:
    for again in (False, True):
        kinds = [one.timed for one in command.chosen(None, again=again) if one.name not in ("check", "smoke", "tests")]
        assert kinds == sorted(kinds)
    names = [one.name for one in command.STAGES]
    assert len(set(names)) == len(names) and command.chosen(["smoke"], again=True) == [command.STAGES[6]]


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
from benchmarks.harness import checkout
checkout.enable()
checkout.enable()
import fastdense.kernels.launch
print(fastdense.kernels.__name__, fastdense.kernels.__file__, fastdense.kernels.launch.__file__)
"""


def test_kernels_import_from_a_checkout_that_is_not_installed() -> None:
    done = python("-S", "-c", UNINSTALLED)
    assert done.returncode == 0, done.stderr
    folder = ROOT / "kernels"
    assert done.stdout.split() == ["fastdense.kernels", str(folder / "__init__.py"), str(folder / "launch.py")]


def test_pytest_runs_in_a_checkout_that_is_not_installed() -> None:
    code = f"""
import sys
sys.path += [{sysconfig.get_path("purelib")!r}]
import pytest
sys.exit(pytest.main(["-q", "-p", "benchmarks.harness.checkout", "tests/kernels/test_sources.py", "-k", "override"]))
"""
    done = python("-S", "-c", code)
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_this_checkouts_package_is_given_these_kernels() -> None:
    from benchmarks.harness.checkout import _Kernels

    assert _Kernels.find_spec("fastdense.kernels", ["/elsewhere/fastdense"]) is None
    assert _Kernels.find_spec("fastdense.nn", [str(ROOT / "fastdense")]) is None
    found = _Kernels.find_spec("fastdense.kernels", [str(ROOT / "fastdense")])
    assert found is not None and found.origin == str(ROOT / "kernels" / "__init__.py")
