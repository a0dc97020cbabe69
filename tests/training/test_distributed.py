"""``fastdense train`` in two processes with gloo, started by torchrun."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch.distributed as dist

pytest.importorskip("typer")
pytest.importorskip("sklearn")

from helpers import train_worker
from helpers.processes import HELPERS, TORCHRUN, Done, python, two_processes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
]

NAMES = [case.__name__ for case in train_worker.CASES]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return two_processes("train_worker.py", [*NAMES, "failed"], tmp_path_factory.mktemp("torchrun") / "said")


@pytest.mark.parametrize("case", NAMES)
def test_two_processes(case: str, said: dict[str, list[str]]) -> None:
    assert said[case] == ["ok", "ok"], "\n".join(said["failed"])


def failing(out: Path, **environment: str) -> Done:
    """Training in which process 1 fails in step 3."""
    arguments = ["train", "--depth", "10", "--growth-rate", "4", "--device", "cpu", "--out", out]
    return python(*TORCHRUN, HELPERS / "failing_worker.py", *arguments, environment=os.environ | environment)


def test_a_killed_process_is_one_line(tmp_path: Path) -> None:
    done = failing(tmp_path / "run", KILLED="1")
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if "Stopped" in line]
    start = f"torchrun --nproc-per-node 2 -m fastdense train --out {tmp_path / 'run'} --resume."
    assert line.endswith(f"Stopped: another process has ended, after step 3 of 132. Resume with: {start}"), line
    assert "commands.py" not in done.stderr and "gloo" not in done.stderr, "a traceback of ours"


def test_what_one_cannot_read_stops_both_with_one_message(tmp_path: Path) -> None:
    """No hang, a status that is not zero, and a checkpoint to go on from."""
    done = failing(tmp_path / "run")
    assert done.returncode != 0
    assert done.stderr.count("Stopped: cat.png cannot be read.") == 1, done.stderr[-4000:]
    assert "commands.py" not in done.stderr, "a traceback of ours"
    assert done.stdout.count("images to train on") == 1
    assert (tmp_path / "run" / "last.pt").exists()
