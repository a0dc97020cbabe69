"""A thousand layers train in less than 2 GB of a process, and the records of it."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("sklearn")
from benchmarks import deeper, runner
from benchmarks.deeper import NETWORKS, TRAINED, Options, peak_resident

RECORD = runner.RESULTS / "cpu" / "deeper.json"
TRAINED_RECORD = runner.RESULTS / "cpu" / "deeper-train.json"
GIGABYTE = 10**9
FAST = ("fastdense activations", "fastdense bottlenecks")


@lru_cache
def rows(depth: int, networks: tuple[str, ...], batch: int = 32) -> dict[str, dict[str, Any]]:
    record = deeper.run(Options((depth,), batch=batch, steps=3, networks=networks))
    found: dict[str, dict[str, Any]] = record["results"][str(depth)]
    return found


def textbook_bytes(depth: int, images: int = 32, size: int = 8) -> int:
    """A bound from below of what the textbook network keeps in float32: what each convolution reads, and each norm.

    A layer that reads ``C`` channels keeps them concatenated, normalised (ReLU works in place), its ``4k`` bottleneck
    channels and these normalised.
    """
    n, growth, channels, pixels, total = (depth - 4) // 6, 12, 24, images * size * size, 0
    for _ in range(3):
        total += sum(2 * (channels + l * growth) + 2 * 4 * growth for l in range(n)) * pixels
        channels, pixels = (channels + n * growth) // 2, pixels // 4
    return 4 * total


def test_what_the_textbook_keeps_is_what_was_counted() -> None:
    row = rows(100, tuple(NETWORKS), batch=64)["textbook"]
    assert 0.9 < textbook_bytes(100, images=64) / row["bytes_kept"] <= 1.0


def test_a_deep_network_takes_less() -> None:
    found = rows(100, tuple(NETWORKS), batch=64)
    grown = {name: row["resident"] - row["resident_start"] for name, row in found.items()}
    assert all(row["checked"] and row["step"].repeats == 2 for row in found.values())
    assert all(row["resident_start"] < row["resident_first_step"] <= row["resident"] for row in found.values())
    assert found["fastdense bottlenecks"]["bytes_kept"] < found["fastdense activations"]["bytes_kept"] / 3
    assert found["fastdense activations"]["bytes_kept"] < found["textbook"]["bytes_kept"] / 4
    assert all(grown[name] < grown["textbook"] - 0.8e8 for name in FAST), grown


@pytest.mark.slow
def test_a_thousand_layers_train_within_two_gigabytes() -> None:
    # The one that keeps more; a record has both.
    row = rows(1000, ("fastdense activations",))["fastdense activations"]
    assert row["resident"] < 2 * GIGABYTE, f"{row['resident']:,}"
    assert textbook_bytes(1000) > 2 * GIGABYTE


def test_a_process_knows_its_own_peak_alone() -> None:
    mine = peak_resident()
    assert 0 < mine <= 1.01 * deeper._maxrss(resource.getrusage(resource.RUSAGE_SELF)) + 2**24
    ballast = torch.ones(max(2**26, mine // 4))
    assert peak_resident() > mine - 2**24 + ballast.nbytes // 2
    code = "from benchmarks.deeper import peak_resident; print(peak_resident())"
    child = subprocess.run([sys.executable, "-c", code], cwd=runner.ROOT, capture_output=True, text=True, check=True)
    assert int(child.stdout) < peak_resident()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"depths": (101,)}, "depth 101 does not fit.*nearest 100 and 106"),
        ({"steps": 2}, "steps must be at least 3.*got 2"),
        ({"batch": 1}, "batch must be 2 to 1437.*got 1"),
        ({"networks": ("mine",)}, "networks must be of textbook, .* got mine"),
    ],
)
def test_bad_options_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**wrong)


def test_a_record_and_its_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "deeper.json"
    deeper.main(["--depths", "10", "16", "--steps", "3", "--networks", FAST[0], "--json", str(path)])
    assert json.loads(path.read_text())["results"].keys() == {"10", "16"}
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_training_command_is_run_and_its_end_noted() -> None:
    pytest.importorskip("typer")
    row = deeper.trained(10, 32, ["--epochs", "1", "--steps", "3"])
    assert row["command"] == "fastdense train --depth 10 --recompute bottlenecks --batch-size 32 --epochs 1 --steps 3"
    assert row["steps"] == len(row["losses"]) == 3 and 0 <= row["test_accuracy"] <= 1
    assert 10**8 < row["resident"] < 2 * GIGABYTE
    with pytest.raises(RuntimeError, match=r"(?s)fastdense train ended with .*--depth 11"):
        deeper.trained(11, 32, [])


def test_the_committed_records_keep_the_promise() -> None:
    found = json.loads(RECORD.read_text())["results"]
    assert found.keys() == {"250", "1000"}
    assert all(row["checked"] for rows in found.values() for row in rows.values())
    assert found["1000"]["textbook"]["resident"] > 3 * GIGABYTE
    assert all(found["1000"][name]["resident"] < 2 * GIGABYTE for name in FAST)
    ended = json.loads(TRAINED_RECORD.read_text())["results"]
    assert ended.keys() == {str(depth) for depth in TRAINED}
    for row in ended.values():
        assert row["resident"] < 2 * GIGABYTE and len(row["losses"]) == row["steps"]
