"""The benchmarks run, refuse to time what is wrong, and the README says what the records say."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from benchmarks import memory, render, runner, speed


@pytest.mark.parametrize("page", render.PAGES, ids=lambda page: page.name)
def test_pages_agree_with_the_records(page: Path) -> None:
    text = page.read_text()
    assert any(f"<!-- {kind}:" in text for kind in ("figures", "memory", "compiled", "host"))
    assert render.render(text) == text


@pytest.mark.parametrize("page", render.PAGES, ids=lambda page: page.name)
def test_a_changed_figure_is_noticed(page: Path) -> None:
    text = page.read_text()
    changed = text.replace(" MB |", " GB |", 1).replace(" KB |", " GB |", 1).replace(" ms |", " s |", 1)
    assert changed != text and render.render(changed) == text


def test_a_picture_is_shown_once_it_exists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = "<!-- picture: cpu/depth.png | How deep. -->\n<!-- end of picture -->\n"
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    assert render.render(page) == page
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "depth.png").touch()
    shown = render.render(page)
    assert "\n![How deep.](benchmarks/results/cpu/depth.png)\n" in shown and render.render(shown) == shown


def test_timing_summary() -> None:
    timing = runner.Timing.of([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert (timing.median, timing.p20, timing.p80, timing.repeats) == (3.5, 2.0, 5.0, 6)


def test_rounds_are_interleaved_and_warm_up_is_not_counted() -> None:
    calls: list[str] = []

    def step(name: str) -> dict[str, float]:
        calls.append(name)
        return {"step": float(len(calls))}

    found = runner.interleave({name: lambda name=name: step(name) for name in "ab"}, repeats=3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert found == {"a": {"step": [3.0, 5.0, 7.0]}, "b": {"step": [4.0, 6.0, 8.0]}}


def test_fresh_processes_are_pooled() -> None:
    found = runner.in_fresh_processes(_process, 3.0, processes=2)
    first, second = found["a"].pop("process")
    assert first != second
    assert found == {"a": {"step": [3.0, 3.0]}}


def _process(value: float) -> runner.Seconds:
    return {"a": {"step": [value], "process": [float(os.getpid())]}}


def test_speed_times_what_is_right_and_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def networks(name: str) -> dict[str, torch.nn.Module]:
        torch.manual_seed(0)
        first, second = (
            torch.nn.Sequential(torch.nn.Conv2d(3, 1000, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
            for _ in range(2)
        )
        return {"torchvision": first, "right": first, "wrong": second}

    monkeypatch.setattr(speed, "providers", networks)
    monkeypatch.setattr(speed, "in_fresh_processes", lambda measure, *arguments, processes: measure(*arguments))
    record = speed.run("densenet121", batch=2, size=16, repeats=2, threads=1, processes=1)
    assert record["results"]["right"]["step"].repeats == 2
    assert not record["results"]["wrong"]["checked"]
    assert "step" not in record["results"]["wrong"]
    runner.write_record(tmp_path / "record.json", record)
    written = json.loads((tmp_path / "record.json").read_text())
    assert written["schema"] == runner.SCHEMA
    assert {"date", "command", "commit", "processor", "threads", "torch"} <= written.keys()


def test_memory_measures_what_is_right_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def networks(name: str) -> dict[str, torch.nn.Module]:
        torch.manual_seed(0)
        first, second = (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(1000)) for _ in range(2))
        for network in (first, second):
            network(torch.ones(1, 3, 64, 64))
        return {"torchvision": first, "right": first, "wrong": second}

    monkeypatch.setattr(memory, "providers", networks)
    record = memory.run(["densenet121"], batch=2, size=64)
    rows = record["results"]["densenet121"]
    assert rows["right"]["bytes_kept"] == 2 * 3 * 64 * 64 * 4  # the images in the order that Flatten wants
    assert rows["right"]["bytes_peak"] == rows["right"]["bytes_kept"] + 2 * 1000 * 4
    assert not rows["wrong"]["checked"]
    assert "bytes_peak" not in rows["wrong"]
