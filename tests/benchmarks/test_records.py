"""Committed records are whole, and pictures can be drawn of records."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import runner
from benchmarks.report.record import complaints
from benchmarks.report.tables import speed_conditions

# A sum of the compile report and a count of waves; pytest-benchmark's; the stages of a GPU run.
OTHER_FORMS = (
    "compiled/kernels.json",
    "compiled/waves.json",
    "cpu/host-densenet121.json",  # of the form before kinds
    "cpu/micro.json",
    "h100/first.json",
    "h100/gpu.json",
    "h100/again.json",
)
RECORDS = [
    path
    for path in sorted(runner.RESULTS.glob("*/*.json"))
    if path.relative_to(runner.RESULTS).as_posix() not in OTHER_FORMS
]
TIMING = {"median": 0.2, "p20": 0.1, "p80": 0.3, "repeats": 7}


def header(kind: str) -> dict[str, Any]:
    return {**runner.environment(), "kind": kind, "complete": True}


def speed_record() -> dict[str, Any]:
    phases = {"forward": TIMING, "backward": TIMING, "optimizer": TIMING, "step": TIMING, "images_per_second": 40.0}
    right = {
        "relative_difference": 0.0,
        "checked": True,
        "bytes_kept": 10**8,
        "bytes_peak": 10**8,
        "first_seconds": 1.0,
    }
    rows = {name: {**right, **phases, "batches": {"4": phases}} for name in ("torchvision", "fastdense activations")}
    rows["wrong"] = {"relative_difference": "nan", "checked": False}
    rows["absent"] = {"unavailable": "no compiler"}
    arithmetic = {"dtype": "float32", "layout": "channels_last"}
    settings = {"model": "densenet121", "batch": 8, "size": 64, **arithmetic, "processes": 1}
    return {**header("speed"), "settings": settings, "results": rows}


def memory_record() -> dict[str, Any]:
    row = {"relative_difference": 0.0, "checked": True, "bytes_kept": 10**8, "bytes_peak": 10**8}
    depths = {"densenet-bc-22": 22, "densenet-bc-40": 40}
    settings = {"models": list(depths), "batch": 8, "size": 32, "dtype": "float32", "layout": "channels_last"}
    settings["depths"] = {"of": depths, "size": 32, "growth_rate": 12}
    return {**header("memory"), "settings": settings, "results": {name: {"torchvision": row} for name in depths}}


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_committed_records_are_as_documented(path: Path) -> None:
    assert not complaints(json.loads(path.read_text()))


def test_records_of_every_kind_are_as_documented() -> None:
    assert len(RECORDS) >= 3
    assert not complaints(speed_record()) and not complaints(memory_record())


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["schema"], 99, "schema must be"),
        (["commit"], None, "commit is None"),
        (["date"], "yesterday", "no date"),
        (["settings", "batch"], True, "settings.batch"),
        (["results", "torchvision", "step", "p20"], 0.25, "no timing"),
        (["results", "torchvision", "step", "repeats"], 0, "no timing"),
        (["results", "torchvision", "checked"], False, "although its check did not pass"),
        (["results", "torchvision", "speedup"], 2.0, "speedup is not known"),
        (["results", "wrong"], {}, "must say checked"),
    ],
)
def test_what_is_not_documented_is_noticed(path: list[str], value: Any, words: str) -> None:
    record = copy.deepcopy(speed_record())
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    assert any(words in text for text in complaints(record)), complaints(record)


@pytest.mark.parametrize(
    ("record", "names"),
    [(speed_record, ["step-memory", "images-batch"]), (memory_record, ["depth"])],
    ids=["speed", "memory"],
)
def test_pictures_are_drawn_of_records(record: Any, names: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.report import plots

    paths = plots.pictures(record(), tmp_path / "name")
    assert [path.name for path in paths] == [f"name-{name}.png" for name in names]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_nothing_measured_is_no_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.report import plots

    assert plots.pictures({**speed_record(), "results": {"absent": {"unavailable": "why"}}}, tmp_path / "x") == []
    assert plots.pictures({**memory_record(), "results": {}}, tmp_path / "x") == []


def test_a_record_says_its_conditions() -> None:
    record = speed_record()
    caption = speed_conditions(record)
    for condition in ("float32", "channels_last", "7 interleaved steps", record["torch"], record["processor"]):
        assert condition in caption
    assert "interrupted" not in caption and "interrupted" in speed_conditions({**record, "complete": False})
