"""``fastdense bench``: what it prints, writes and exits with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import peers

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner, Result

from fastdense.cli import bench
from fastdense.cli.app import app

complaints: Any = bench.benchmark("report.record").complaints
TINY = ["--quick", "--device", "cpu", "--model", "densenet-bc-40", "--size", "16", "--batch", "2", "--repeats", "2"]
ONE = ["--providers", "fastdense-activations"]


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    peers.torchvision()
    for variable in ("FASTDENSE_IMPL", "TRITON_INTERPRET", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(variable, raising=False)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_speed_writes_record_and_pictures(tmp_path: Path) -> None:
    result = invoke("speed", *TINY, *ONE, "--batches", "1,3", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    name = "speed-densenet-bc-40-2x16"
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {f"{name}.json", f"{name}-step-memory.png", f"{name}-images-batch.png"}
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert not complaints(record)
    assert list(record["results"]) == ["torchvision", "fastdense activations torch"]
    assert record["results"]["torchvision"]["batches"].keys() == {"1", "3"}
    assert "fastdense activations" in result.output and "images/s" in result.output


def test_memory_of_depths_for_machines(tmp_path: Path) -> None:
    result = invoke("memory", "--device", "cpu", "--depths", 10, 16, *ONE, "--batch", 2, "--json", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert not complaints(record)
    assert list(record["results"]) == ["densenet-bc-10", "densenet-bc-16"]
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["speed", "--dtype", "fp8"], "dtype must be one of"),
        (["speed", "--providers", "mine"], "provider must be one of"),
        (["speed", "--batches", "two"], "--batches must be whole numbers"),
        (["speed", "--model", "resnet"], "model must be one of"),
        (["memory", "40"], "unknown arguments: 40"),
        (["memory", "--depths", "41"], "6*n + 4"),
        (["memory", "--depths", "40", "x"], "--depths must be whole numbers"),
        (["speed", "--device", "tpu"], "device must be cpu or cuda"),
    ],
)
def test_wrong_options_are_told_in_a_line(arguments: list[str], words: str, tmp_path: Path) -> None:
    result = invoke(*arguments, "--out", tmp_path)
    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


def test_providers_are_listed() -> None:
    result = invoke("speed", "--providers", "list")
    assert result.exit_code == 0
    assert "efficient-densenet" in result.output and "compile-max-autotune" in result.output


def test_depth_is_handed_options_and_its_record_is_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real, given = bench.benchmark, []

    class Depth:
        @staticmethod
        def run(options: Any) -> dict[str, Any]:
            given.append(options)
            return {"complete": True, "results": {}}

        @staticmethod
        def plot(record: dict[str, Any], path: Path) -> None:
            path.write_text(str(record["results"]))

    monkeypatch.setattr(bench, "benchmark", lambda name: Depth if name == "depth" else real(name))
    result = invoke("depth", "--device", "cpu", "--budget", "3GB", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert (given[0].budget, given[0].device) == ("3GB", "cpu")
    assert {path.name for path in tmp_path.iterdir()} == {"depth.json", "depth.png"}


@pytest.mark.slow
def test_ctrl_c_leaves_what_was_measured(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastdense", "bench", "speed", *TINY[:-1], "100000", *ONE, "--out", tmp_path]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, env={**os.environ})
    try:
        assert process.stdout is not None
        line = process.stdout.readline()  # after ten seconds: steps have been made
        while "steps each" not in line and process.poll() is None:
            line = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == bench.INTERRUPTED, rest
    assert "Interrupted" in rest and "Traceback" not in rest
    record = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert record["complete"] is False and record["results"]["torchvision"]["step"]["repeats"] > 0
    assert list(tmp_path.glob("*.png"))


@pytest.mark.slow
def test_a_quick_run_of_everything_is_quick(tmp_path: Path) -> None:
    start = time.monotonic()
    result = invoke("all", "--quick", "--device", "cpu", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png"}
    assert len(list(tmp_path.iterdir())) == 5
    assert time.monotonic() - start < 240  # twice what it promises: others may be at work here
