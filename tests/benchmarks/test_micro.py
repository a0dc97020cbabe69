"""The suite behind ``make micro`` runs, its record is whole, and what became slower fails the comparison."""

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
from helpers.processes import ROOT, Done, python

pytest.importorskip("pytest_benchmark")

RECORD = ROOT / "benchmarks" / "results" / "cpu" / "micro.json"


def suite(*options: str) -> Done:
    """The suite in a process of its own: without Triton's interpreter, and no worker of this run."""
    hidden = ("PYTEST_", "TRITON_INTERPRET")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    return python("-m", "pytest", "benchmarks/micro", "-p", "no:cacheprovider", *options, environment=environment)


def check_record(path: Path) -> list[str]:
    """It holds what records hold, and neither every round's time nor names; returns its benchmarks."""
    record = json.loads(path.read_text())
    assert {"schema", "date", "command", "commit", "device", "processor", "threads", "torch"} <= record.keys()
    assert "node" not in record["machine_info"] and "branch" not in record["commit_info"]
    for benchmark in record["benchmarks"]:
        assert 0 < benchmark["stats"]["min"] <= benchmark["stats"]["median"] and "data" not in benchmark["stats"]
        assert benchmark["options"]["timer"] == "thread_time"
    return [benchmark["fullname"] for benchmark in record["benchmarks"]]


def test_all_benchmarks_run_and_are_in_the_committed_record() -> None:
    recorded = check_record(RECORD)
    if importlib.util.find_spec("torchvision") is None:  # found, not imported: a CPU build of PyTorch cannot
        pytest.skip("torchvision is not installed")
    done = suite("--benchmark-disable", "-v")
    assert done.returncode == 0, done.stdout[-4000:]
    ran = re.findall(r"^(benchmarks/micro/\S+::.+?) PASSED", done.stdout, re.MULTILINE)
    assert sorted(ran) == sorted(recorded), "run `make micro-baseline`"


def test_a_benchmark_that_became_slower_fails_and_one_that_became_faster_does_not(tmp_path: Path) -> None:
    record, before, after = json.loads(RECORD.read_text()), tmp_path / "before.json", tmp_path / "after.json"
    slower = "test_plan_recompute"
    for benchmark in record["benchmarks"]:
        benchmark["stats"]["min"] *= 1e-3 if benchmark["name"] == slower else 1e3
    before.write_text(json.dumps(record))
    compare = (f"--benchmark-compare={before}", "--benchmark-compare-fail=min:50%", f"--benchmark-json={after}")
    timed = ("--benchmark-only", "--benchmark-timer=time.thread_time", "--benchmark-max-time=0.05")
    done = suite("-k", "test_plan_recompute or (test_choose and warm)", *timed, *compare)
    assert done.returncode != 0 and "2 selected" in done.stdout, done.stdout[-4000:]
    regressions = re.findall(r"^\t(\S+).* has failed ", done.stdout + done.stderr, re.MULTILINE)
    assert regressions == [slower], done.stdout[-4000:] + done.stderr[-4000:]
    check_record(after)
