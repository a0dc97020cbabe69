"""Committed records are whole, those of `make micro` too; pages agree with them, and pictures can be drawn of them."""

import copy
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.processes import Done, python

from benchmarks.harness import runner
from benchmarks.report import render
from benchmarks.report.record import complaints
from benchmarks.report.tables import speed_conditions

OTHER_FORMS = (
    "compiled/kernels.json", "compiled/waves.json",  # a sum of the compile report, a count of waves
    "cpu/host-densenet121.json", "cpu/micro.json",  # of the form before kinds; pytest-benchmark's
    "h100/first.json", "h100/gpu.json", "h100/again.json",  # the stages of a GPU run
)  # fmt: skip
RECORDS = [path for path in sorted(runner.RESULTS.glob("*/*.json")) if "/".join(path.parts[-2:]) not in OTHER_FORMS]
TABLE = re.compile(rf"<!-- ({'|'.join(render.TABLES)}): .*?\n\|[^\n]*(\d)[^\d\n]*\|\n", re.DOTALL)


def speed_record() -> dict[str, Any]:
    """The committed one, with every kind of row."""
    record = json.loads((runner.RESULTS / "cpu" / "speed-densenet121-8x128.json").read_text())
    row = record["results"]["torchvision"]
    phases = ("forward", "backward", "optimizer", "step", "images_per_second")
    row["batches"] = {"4": {name: copy.deepcopy(row[name]) for name in phases}}
    wrong = {"relative_difference": "nan", "checked": False}
    record["results"] |= {"wrong": wrong, "absent": {"unavailable": "no compiler"}}
    return record


def memory_record() -> dict[str, Any]:
    """The committed one, with depths."""
    record = json.loads((runner.RESULTS / "cpu" / "memory-8x224.json").read_text())
    depths = {"densenet121": 121, "densenet201": 201}
    record["settings"]["depths"] = {"of": depths, "size": 32, "growth_rate": 12}
    return record


@pytest.mark.parametrize("page", render.PAGES, ids=lambda page: page.name)
def test_pages_agree_with_the_records_and_a_changed_number_is_noticed(page: Path) -> None:
    text = page.read_text()
    found = TABLE.search(text)
    assert found is not None, "there is no number in a table"
    assert render.render(text) == text
    digit = found.start(2)
    changed = f"{text[:digit]}{(int(text[digit]) + 1) % 10}{text[digit + 1 :]}"
    assert render.render(changed) == text


def test_a_gpus_tables_are_of_its_record() -> None:
    record = json.loads((runner.RESULTS / "h100" / "gpu.json").read_text())
    table, kernels = render.gpu_table(record, "h100/gpu.json"), render.gpu_kernels_table(record, "h100/gpu.json")
    row = record["stages"]["batch64"]["result"]["rows"]["fastdense activations, graph"]
    row["step"]["median"], row["images_per_second"] = 0.0123, 5203.0
    assert "12.3 ms" not in table and "memory_efficient, graph" not in table
    (line,) = set(render.gpu_table(record, "h100/gpu.json").splitlines()) - set(table.splitlines())
    assert line.startswith("| fastdense activations, graph | 12.3 ms | ") and "x | 5,203 |" in line
    record["stages"]["layers"]["result"]["fastdense activations, batch 64"]["rows"][0]["seconds"] = 1.0
    (line,) = [line for line in render.gpu_kernels_table(record, "").splitlines() if "1000.00 ms" in line]
    assert line not in kernels


def test_a_checkout_without_history_is_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it lies in another repository."""
    monkeypatch.setenv("FASTDENSE_COMMIT", "abc")
    assert runner.environment()["commit"] == "abc"


def test_committed_records_are_as_documented_and_so_are_rows_of_every_kind() -> None:
    assert len(RECORDS) >= 3
    assert {path: found for path in RECORDS if (found := complaints(json.loads(path.read_text())))} == {}
    assert not complaints(speed_record()) and not complaints(memory_record())
    assert "interrupted" in speed_conditions({**speed_record(), "complete": False})


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [("schema", 99, "schema must be"), ("commit", None, "commit is None"), ("date", "yesterday", "no date"),
     ("settings/batch", True, "settings.batch"), ("results/torchvision/step/p20", 99.0, "no timing"),
     ("results/torchvision/checked", False, "although its check did not pass"),
     ("results/wrong/bytes_peak", 1, "although its check did not pass"),
     ("results/torchvision/speedup", 2.0, "speedup is not known"), ("results/wrong", {}, "must say checked")],
)  # fmt: skip
def test_what_is_not_documented_is_noticed(place: str, value: Any, words: str) -> None:
    record = inner = speed_record()
    *path, last = place.split("/")
    for key in path:
        inner = inner[key]
    inner[last] = value
    assert any(words in text for text in complaints(record)), complaints(record)


@pytest.mark.parametrize(
    ("record", "names"), [(speed_record, ["step-memory", "images-batch"]), (memory_record, ["depth"])],
    ids=["speed", "memory"],
)  # fmt: skip
def test_pictures_are_drawn_of_records_and_none_where_nothing_was_measured(
    record: Any, names: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.report import plots

    paths = plots.pictures(record(), tmp_path / "name")
    assert [path.name for path in paths] == [f"name-{name}.png" for name in names]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in paths)
    for results in ({}, {"absent": {"unavailable": "why"}} if record is speed_record else {}):
        assert plots.pictures({**record(), "results": results}, tmp_path / "none") == []


MICRO = runner.RESULTS / "cpu" / "micro.json"


def micro(*options: str) -> Done:
    """The suite behind ``make micro`` in a process of its own: without Triton's interpreter, no worker of this run."""
    pytest.importorskip("pytest_benchmark")
    hidden = ("PYTEST_", "TRITON_INTERPRET")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    return python("-m", "pytest", "benchmarks/micro", "-p", "no:cacheprovider", *options, environment=environment)


def check_micro(path: Path) -> list[str]:
    """It holds what records hold, and neither every round's time nor names; returns its benchmarks."""
    record = json.loads(path.read_text())
    assert {"schema", "date", "command", "commit", "device", "processor", "threads", "torch"} <= record.keys()
    assert "node" not in record["machine_info"] and "branch" not in record["commit_info"]
    for benchmark in record["benchmarks"]:
        assert 0 < benchmark["stats"]["min"] <= benchmark["stats"]["median"] and "data" not in benchmark["stats"]
        assert benchmark["options"]["timer"] == "thread_time"
    return [benchmark["fullname"] for benchmark in record["benchmarks"]]


def test_all_micro_benchmarks_run_and_are_in_the_committed_record() -> None:
    recorded = check_micro(MICRO)
    if importlib.util.find_spec("torchvision") is None:  # found, not imported: a CPU build of PyTorch cannot
        pytest.skip("torchvision is not installed")
    done = micro("--benchmark-disable", "-v")
    assert done.returncode == 0, done.stdout[-4000:]
    ran = re.findall(r"^(benchmarks/micro/\S+::.+?) PASSED", done.stdout, re.MULTILINE)
    assert sorted(ran) == sorted(recorded), "run `make micro-baseline`"


def test_a_micro_benchmark_that_became_slower_fails_and_one_that_became_faster_does_not(tmp_path: Path) -> None:
    record, before, after = json.loads(MICRO.read_text()), tmp_path / "before.json", tmp_path / "after.json"
    slower = "test_plan_recompute"
    for benchmark in record["benchmarks"]:
        benchmark["stats"]["min"] *= 1e-3 if benchmark["name"] == slower else 1e3
    before.write_text(json.dumps(record))
    compare = (f"--benchmark-compare={before}", "--benchmark-compare-fail=min:50%", f"--benchmark-json={after}")
    timed = ("--benchmark-only", "--benchmark-timer=time.thread_time", "--benchmark-max-time=0.05")
    done = micro("-k", "test_plan_recompute or (test_choose and warm)", *timed, *compare)
    assert done.returncode != 0 and "2 selected" in done.stdout, done.stdout[-4000:]
    regressions = re.findall(r"^\t(\S+).* has failed ", done.stdout + done.stderr, re.MULTILINE)
    assert regressions == [slower], done.stdout[-4000:] + done.stderr[-4000:]
    check_micro(after)
