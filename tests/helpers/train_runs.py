"""Training on digits in this process: experiments, `fastdense train`, and what a run leaves behind."""

import dataclasses
import json
import re
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("sklearn")

from typer.testing import CliRunner, Result

from fastdense.cli.app import app
from fastdense.data.source import Dataset, digits
from fastdense.training.config import TrainConfig
from fastdense.training.events import Event
from fastdense.training.experiment import Experiment

DIGITS = digits()
FEW = dataclasses.replace(
    DIGITS,
    **{name: getattr(DIGITS, name)[:200] for name in ("train_images", "train_labels")},
    **{name: getattr(DIGITS, name)[:37] for name in ("test_images", "test_labels")},
)
TINY = TrainConfig(depth=10, growth_rate=4, epochs=2, batch_size=480, device="cpu", impl="torch")
SMALL = ["train", "--depth", "10", "--growth-rate", "4", "--device", "cpu"]
COMMAND = [*SMALL, "--impl", "torch", "--batch-size", "480", "--epochs", "2"]  # of TINY: four steps
UNLIKE = ("time", "seconds", "images_per_second", "metrics_bytes")  # in which two runs of the same training differ


def prepared(config: TrainConfig = TINY, data: Dataset = DIGITS, **changes: Any) -> Experiment:
    return Experiment(dataclasses.replace(config, **changes), data)


def trained(config: TrainConfig = TINY, data: Dataset = DIGITS, **changes: Any) -> tuple[Experiment, list[Event]]:
    """An experiment at its end, and its events."""
    experiment = prepared(config, data, **changes)
    return experiment, list(chain.from_iterable(experiment.rounds()))


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), prog_name="fastdense")


def words(text: str) -> str:
    """Without colours, frames and line breaks."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[─-╿]", " ", text).split())


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def records(path: Path, event: str = "") -> list[dict[str, Any]]:
    """Those in ``metrics.jsonl`` of a folder, or in a file; of one kind only if ``event`` names it."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    lines = (path / "metrics.jsonl" if path.is_dir() else path).read_text().splitlines()
    found = [json.loads(line, parse_constant=refuse) for line in lines]
    return [record for record in found if event in ("", record["event"])]


def steps(out: Path, event: str = "step") -> list[int]:
    return [record["step"] for record in records(out, event)]


def same(found: Any, wanted: Any, name: str = "state") -> str:
    """Empty if both are the same bit for bit, otherwise the name of what differs."""
    if isinstance(wanted, dict):
        if found.keys() != wanted.keys():
            return f"{name}: {found.keys()} and {wanted.keys()}"
        parts = [same(found[key], wanted[key], f"{name}.{key}") for key in wanted if key not in UNLIKE]
    elif isinstance(wanted, list | tuple):
        if len(found) != len(wanted):
            return f"{name}: {len(found)} and {len(wanted)} of them"
        parts = [same(f, w, f"{name}.{i}") for i, (f, w) in enumerate(zip(found, wanted, strict=True))]
    elif isinstance(wanted, torch.Tensor):
        return "" if found.dtype == wanted.dtype and torch.equal(found, wanted) else name
    else:
        return "" if found == wanted else f"{name}: {found!r} and {wanted!r}"
    return next(filter(None, parts), "")


def same_runs(out: Path, wanted: Path) -> str:
    """Empty if the last checkpoints of two folders hold the same runs."""
    return same(load(out / "last.pt")["runs"], load(wanted / "last.pt")["runs"])
