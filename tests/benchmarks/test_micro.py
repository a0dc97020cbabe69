"""The suite behind ``make micro`` runs, its record is whole, and a slower host fails the comparison."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
from helpers.processes import ROOT, Done, python

pytest.importorskip("pytest_benchmark")

RECORD = ROOT / "benchmarks" / "results" / "cpu" / "micro.json"
ONE = "test_plan_recompute"


def suite(*options: str) -> Done:
    """The suite in a process of its own: without Triton's interpreter, and no worker of this run."""
    hidden = ("PYTEST_", "TRITON_INTERPRET")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    return python("-m", "pytest", "benchmarks/micro", "-p", "no:cacheprovider", *options, environment=environment)


def names(output: str) -> set[str]:
    return set(re.findall(r"^(benchmarks/micro/\S+::.+?) PASSED", output, re.MULTILINE))


@pytest.mark.slow
def test_all_run_and_all_are_in_the_record() -> None:
    if importlib.util.find_spec("torchvision") is None:  # found, not imported: a CPU build of PyTorch cannot
        pytest.skip("torchvision is not installed")
    done = suite("--benchmark-disable", "-v")
    assert done.returncode == 0, done.stdout[-4000:]
    recorded = {benchmark["fullname"] for benchmark in json.loads(RECORD.read_text())["benchmarks"]}
    assert names(done.stdout) == recorded, "run `make micro-baseline`"


def test_the_record_holds_what_records_hold_and_no_more() -> None:
    record = json.loads(RECORD.read_text())
    assert {"schema", "date", "command", "commit", "device", "processor", "threads", "torch"} <= record.keys()
    assert "node" not in record["machine_info"] and "branch" not in record["commit_info"]
    for benchmark in record["benchmarks"]:
        assert 0 < benchmark["stats"]["min"] <= benchmark["stats"]["median"] and "data" not in benchmark["stats"]
        assert benchmark["options"]["timer"] == "thread_time"


@pytest.mark.parametrize(("factor", "fails"), [(0.2, True), (5.0, False)])
def test_what_became_slower_fails(tmp_path: Path, factor: float, fails: bool) -> None:
    options = ("-k", ONE, "--benchmark-only", "--benchmark-max-time=0.05")
    before = tmp_path / "before.json"
    assert suite(*options, f"--benchmark-json={before}").returncode == 0
    record = json.loads(before.read_text())
    (benchmark,) = record["benchmarks"]
    assert "data" not in benchmark["stats"] and "node" not in record["machine_info"] and record["schema"] >= 1
    benchmark["stats"]["min"] *= factor
    before.write_text(json.dumps(record))
    done = suite(*options, f"--benchmark-compare={before}", "--benchmark-compare-fail=min:50%")
    assert (done.returncode != 0) == fails, done.stdout[-4000:]
    assert ("Performance has regressed" in done.stdout + done.stderr) == fails
