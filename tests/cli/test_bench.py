"""``fastdense bench``: what it prints, writes and exits with."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import peers

pytest.importorskip("matplotlib")

from helpers.train_runs import command, words

from fastdense.cli import bench

benchmark: Any = bench.benchmark
complaints = benchmark("report.record").complaints
ONE = ["--device", "cpu", "--providers", "fastdense-activations"]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures small networks, and in this process."""
    peers.torchvision()
    for name in ("speed", "memory"):
        monkeypatch.setattr(benchmark(name), "in_fresh_process", lambda measure, *arguments: measure(*arguments))
    providers, options = benchmark("harness.providers"), benchmark("harness.options")
    monkeypatch.setitem(providers.MODELS, "tiny", providers.NetworkSpec(4, (2, 1), 8, 5))
    monkeypatch.setattr(options, "QUICK_MODEL", "tiny")
    monkeypatch.setattr(options, "QUICK_DEPTHS", (10, 16))


def written(folder: Path) -> dict[str, Any]:
    """The records in a folder, and its pictures, by their names."""
    records = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert not any(map(complaints, records.values()))
    return records | {path.name: path for path in folder.glob("*.png")}


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ("speed --model tiny --size 16 --batch 2 --batches 1,3 --repeats 2 --processes 1",
         ["speed-tiny-2x16-images-batch.png", "speed-tiny-2x16-step-memory.png", "speed-tiny-2x16.json"]),
        ("memory --depths 10 16 --batch 2", ["memory-depths-2x32-depth.png", "memory-depths-2x32.json"]),
        ("all --quick", ["memory-depths-8x32-depth.png", "memory-depths-8x32.json",
         "speed-tiny-8x32-images-batch.png", "speed-tiny-8x32-step-memory.png", "speed-tiny-8x32.json"]),
    ],
    ids=["speed", "memory", "all"],
)  # fmt: skip
def test_records_and_pictures_are_written(tiny: None, tmp_path: Path, arguments: str, names: list[str]) -> None:
    result = command("bench", *arguments.split(), *ONE, "--json", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    files, printed = written(tmp_path), json.loads(result.stdout)
    assert sorted(files) == names
    for record in printed if isinstance(printed, list) else [printed]:
        assert record in files.values(), "for machines: the same on standard output"
        rows, all_ = record["results"], arguments.startswith("all")
        if record["kind"] == "memory":
            assert list(rows) == ["densenet-bc-10", "densenet-bc-16"]
        else:
            assert list(rows) == ["torchvision", "fastdense activations torch"]
            assert rows["torchvision"]["batches"].keys() == ({"4", "16"} if all_ else {"1", "3"})
            assert rows["torchvision"]["step"]["repeats"] == (5 if all_ else 2)
    assert "fastdense activations" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("speed --dtype fp8", "dtype must be one of"),
        ("speed --providers mine", "provider must be one of"),
        ("speed --batches two", "--batches must be whole numbers"),
        ("memory 40", "unknown arguments: 40"),
        ("memory --depths 41", "6*n + 4"),
        ("speed --device tpu", "device must be cpu or cuda"),
    ],
)
def test_wrong_options_are_told_in_a_line(arguments: str, message: str, tmp_path: Path) -> None:
    result = command("bench", *arguments.split(), "--out", tmp_path)
    assert result.exit_code == 2
    assert message in words(result.output)
    assert not list(tmp_path.iterdir())


def test_providers_are_listed() -> None:
    result = command("bench", "speed", "--providers", "list")
    assert result.exit_code == 0
    assert "efficient-densenet" in result.output and "compile-max-autotune" in result.output


def test_depth_is_handed_options_and_its_record_is_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[Any] = []
    depth = SimpleNamespace(
        run=lambda options: given.append(options) or {"complete": True, "results": {}},
        plot=lambda record, path: path.write_text(str(record["results"])),
    )
    monkeypatch.setattr(bench, "benchmark", lambda name: depth if name == "depth" else benchmark(name))
    result = command("bench", "depth", "--device", "cpu", "--budget", "3GB", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert (given[0].budget, given[0].device) == ("3GB", "cpu")
    assert {path.name for path in tmp_path.iterdir()} == {"depth.json", "depth.png"}


def test_ctrl_c_leaves_what_was_measured(tmp_path: Path) -> None:
    program = "from fastdense.cli import bench, main; bench.HEARTBEAT_SECONDS = 0; main.main()"
    options = ["--quick", "--model", "densenet-bc-40", "--size", "16", "--batch", "2", "--repeats", "100000"]
    started = [sys.executable, "-c", program, "bench", "speed", *ONE, *options, "--out", str(tmp_path)]
    with subprocess.Popen(started, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if re.search(r"2 rows, at least [1-9]\d* steps each", line):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stdout.read()
    assert process.returncode == bench.INTERRUPTED, rest
    assert "Interrupted" in rest and "Traceback" not in rest
    files = written(tmp_path)
    (record,) = [files[name] for name in files if name.endswith(".json")]
    assert record["complete"] is False and record["results"]["torchvision"]["step"]["repeats"] > 0
    assert any(name.endswith(".png") for name in files)


@pytest.mark.minutes
def test_a_quick_run_of_all_comes_to_its_end(tmp_path: Path) -> None:
    peers.torchvision()
    result = command("bench", "all", "--quick", "--device", "cpu", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert len(written(tmp_path)) == 5
