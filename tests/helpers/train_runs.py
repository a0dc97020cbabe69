"""`fastdense train` in this process, on digits: the command, and what it leaves behind."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner, Result

from fastdense.cli.app import app

COMMAND = [
    *("train", "--depth", "10", "--growth-rate", "4", "--device", "cpu", "--impl", "torch"),
    *("--batch-size", "480", "--epochs", "2"),
]


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, prog_name="fastdense")


def words(text: str) -> str:
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[─-╿]", " ", text).split())


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
