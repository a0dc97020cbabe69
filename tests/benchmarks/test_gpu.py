"""The run on a GPU: no stage takes another down, the command records and sums up what they found, all is rehearsed."""

import json
import multiprocessing
import os
import signal
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import gpu_stages
from helpers.processes import LIBRARIES, ROOT, python

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import steps
from benchmarks.gpu.run import LOG, PICTURE, RECORD, START_SECONDS, Run, Stage, _Worker
from benchmarks.gpu.summary import CHARACTERS, summary
from benchmarks.harness import checkout


def stage(name: str, function: str = "finish", seconds: float = 120.0, **options: Any) -> Stage:
    return Stage(name, getattr(gpu_stages, function), seconds, **options)


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RECORD).read_text(), parse_constant=pytest.fail)["stages"]


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Runs stages into one folder; returns whether all finished, of which stages was said something, the record."""

    def run_them(*stages: Stage, minutes: float = 9.0) -> tuple[bool, list[str], dict[str, Any]]:
        said: list[str] = []
        complete = Run(tmp_path, minutes=minutes, rehearsal=True, say=said.append).run(stages)
        assert {path.name for path in tmp_path.iterdir()} <= {RECORD, LOG}
        return complete, [line.partition(":")[0] for line in said], read(tmp_path)

    return run_them


def test_a_stage_that_ended_long_before_it_is_asked_for_was_in_time() -> None:
    worker = _Worker.__new__(_Worker)
    worker.pipe, theirs = multiprocessing.Pipe()
    worker.begun = time.time() - 10 * START_SECONDS
    for entry in ({"status": "running", "until": 0.0}, {"status": "ok", "seconds": 1.0, "result": {}}):
        theirs.send(entry)
    assert worker.wait() == {"status": "ok", "seconds": 1.0, "result": {}}


def test_however_a_stage_ends_the_next_one_runs(run: Any, tmp_path: Path) -> None:
    ends = {
        "fail": "failed", "run_out_of_memory": "out of memory", "crash": "crashed", "exit_early": "crashed",
        "hang": "timed out", "finish": "ok", "cannot_run_here": "skipped",
    }  # fmt: skip
    complete, said, found = run(*(stage(name, name, 0.5 if name == "hang" else 120.0) for name in ends))
    assert not complete and said == list(ends)
    assert {name: entry["status"] for name, entry in found.items()} == ends
    assert "this stage fails" in found["fail"]["error"]
    assert (found["fail"]["result"], found["crash"]["result"]) == ({"saved": 1}, {"saved": 2})
    assert "SIGSEGV" in found["crash"]["error"] and "the last thing that it said" in found["crash"]["error"]
    assert found["hang"]["seconds"] < START_SECONDS
    helper = Path(f"/proc/{found['hang']['result']['helper']}/stat")  # where nobody waits for orphans: a zombie
    assert not helper.exists() or helper.read_text().rpartition(")")[2].split()[0] == "Z"
    assert found["finish"]["result"]["not finite"] == ["nan", "inf"]
    assert found["finish"]["result"]["earlier"] == []  # what has failed is no result to build on
    assert found["cannot_run_here"]["error"] == "no such tool"
    assert "printed by a stage" in (tmp_path / LOG).read_text()
    required = {"device", "torch", "triton", "commit", "sources", "date", "command", "rehearsal"}
    assert all(required <= entry["environment"].keys() for entry in found.values())
    assert len(summary(found)) <= CHARACTERS


def test_stages_share_a_process_until_one_breaks_the_device_or_asks_for_its_own(run: Any) -> None:
    """And those in the background end before the first timed one."""
    complete, said, found = run(
        stage("beside", background=True), stage("a"), stage("b"), stage("broken", "break_the_device"),
        stage("c"), stage("apart", apart=True), stage("timed", timed=True), stage("none", "cannot_run_here"),
    )  # fmt: skip
    assert complete and said == ["a", "b", "broken", "c", "apart", "beside", "timed", "none"]
    assert found["broken"].keys() == {"status", "seconds", "result", "environment"}
    processes = {name: entry["result"].get("process") for name, entry in found.items()}
    assert processes["a"] == processes["b"]
    assert len({processes[name] for name in ("beside", "a", "c", "apart", "timed")}) == 5
    assert found["timed"]["result"]["earlier"] == ["a", "apart", "b", "beside", "broken", "c"]


def test_without_time_a_stage_is_not_reached(run: Any) -> None:
    complete, _, found = run(stage("finish"), minutes=0.0)
    assert not complete and found["finish"]["status"] == "not reached"


@pytest.mark.parametrize(
    ("gpu", "options", "status"), [(True, [], 0), (True, ["--rehearse"], 0), (False, [], 2)],
    ids=["on a GPU", "in a rehearsal", "without a GPU"],
)  # fmt: skip
def test_kernels_are_interpreted_only_in_a_rehearsal_whatever_the_environment_says(
    gpu: bool, options: list[str], status: int, monkeypatch: Any, tmp_path: Path, capsys: Any
) -> None:
    found: list[str | None] = []
    monkeypatch.setenv("TRITON_INTERPRET", "0" if options else "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(Run, "run", lambda *_: found.append(os.environ.get("TRITON_INTERPRET")) or True)
    monkeypatch.setattr(command, "summary", lambda stages: "")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--out", str(tmp_path), *options])
    with pytest.raises(SystemExit) as exit_:
        command.main()
    assert exit_.value.code == status
    assert found == ([] if not gpu else ["1"] if options else [None])
    assert ("--rehearse" in capsys.readouterr().err) == (not gpu)


def rehearse(folder: Path, *options: Any) -> dict[str, Any]:
    """The results of a rehearsal on the command line, by stage, those left out that cannot run here."""
    done = python("-m", "benchmarks.gpu", "--out", folder, "--rehearse", "--minutes", 50, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    report = done.stdout[done.stdout.index("REHEARSAL") :]
    assert len(report) <= CHARACTERS + 1 and "no picture" not in done.stdout
    found = read(folder)
    skipped = {name for name, entry in found.items() if entry["status"] == "skipped"}
    assert skipped <= {"counters", "depth"}
    assert all(found[name]["status"] == "ok" and f" {name} " in report for name in found.keys() - skipped)
    assert {path.name for path in folder.iterdir()} == {RECORD, LOG, *[PICTURE] * ("layers" in found)}
    return {name: entry["result"] for name, entry in found.items()}


def check_profile(results: dict[str, Any]) -> None:
    """Each kernel of a step has a row, and so has each candidate, with its floor."""
    (profile,) = results["layers"].values()
    assert {"bn_relu_conv 1x1", "bn_relu_conv_backward 1x1"} <= {row["operation"] for row in profile["rows"]}
    assert {row["operation"] for row in results["candidates"]["rows"]} == {"forward 1x1"}
    assert all("timing" in row and row["floor_seconds"] > 0 for row in results["candidates"]["rows"])


def test_a_rehearsal_of_a_few_stages(tmp_path: Path) -> None:
    stages = ("rates", "layers", "candidates", "counters")
    results = rehearse(tmp_path, "--stages", *stages)
    assert tuple(results) == stages
    check_profile(results)


@pytest.mark.minutes
def test_a_rehearsal_of_everything(tmp_path: Path) -> None:
    results: dict[str, Any] = {}
    for again in (False, True):
        found = rehearse(tmp_path / str(again), *["--again"] * again)
        assert found.keys() == {one.name for one in command.chosen(None, again=again)}
        results |= found
    check_profile(results)
    assert results["tests"]["passed"] >= 2 and results["sanitizer"]["primitives"] == 13
    for name in steps.COMPARISONS.keys() & results.keys():
        for label, row in results[name]["rows"].items():
            captured = "cannot be captured" not in row.get("status", "")
            assert not captured or (row["step"]["median"] > 0 and row["images_per_second"] > 0), (name, label)
            assert row["checked"] or not label.startswith("fastdense"), (name, label)
            assert row.get("differs_by", 0) == 0 or name != "batch64", (name, label)


def test_timed_stages_come_last_but_for_the_checks_and_time_every_provider() -> None:
    for again in (False, True):
        kinds = [one.timed for one in command.chosen(None, again=again) if one.name not in ("check", "smoke", "tests")]
        assert kinds == sorted(kinds)
    names = [one.name for one in command.STAGES]
    assert len(set(names)) == len(names) and command.chosen(["smoke"], again=True) == [command.STAGES[6]]
    assert set(names) >= steps.COMPARISONS.keys() | steps.COMPILATIONS.keys()
    _, _, eager, graphed = zip(*steps.COMPARISONS.values(), strict=True)
    assert {*chain(*eager)} == {*steps.PLAIN, steps.COMPILED, steps.REDUCED} and {*chain(*graphed)} == {*steps.PLAIN}


# Without the .pth files of the environment, and so without the editable install.
UNINSTALLED = f"""
import importlib.util, sys
sys.path += {LIBRARIES}
assert importlib.util.find_spec("fastdense.kernels") is None
import pytest
some = ["tests/benchmarks/test_traffic.py", "-k", "hand"]
status = pytest.main(["-q", "-p", "no:cacheprovider", "-p", "benchmarks.harness.checkout", *some])
from benchmarks.harness import checkout
checkout.enable()
import fastdense.kernels.launch
print(int(status), sys.meta_path.count(checkout._Kernels))
print(fastdense.kernels.__name__, fastdense.kernels.__file__, fastdense.kernels.launch.__file__)
"""


def test_tests_run_in_a_checkout_that_is_not_installed_and_only_its_package_is_given_its_kernels() -> None:
    done = python("-S", "-c", UNINSTALLED)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, counts, files = done.stdout.splitlines()
    assert counts == "0 1", done.stdout
    kernels = [str(ROOT / "kernels" / name) for name in ("__init__.py", "launch.py")]
    assert files.split() == ["fastdense.kernels", *kernels]
    assert checkout._Kernels.find_spec("fastdense.kernels", ["/elsewhere/fastdense"]) is None
    assert checkout._Kernels.find_spec("fastdense.nn", [str(ROOT / "fastdense")]) is None
