"""Training in two processes with gloo, and in processes that are killed or fail."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

pytest.importorskip("typer")
pytest.importorskip("sklearn")

from helpers import train_worker
from helpers.processes import HELPERS, python, two_processes

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
NAMES = [case.__name__ for case in train_worker.CASES]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return two_processes("train_worker.py", [*NAMES, "failed"], tmp_path_factory.mktemp("torchrun") / "said")


@pytest.mark.parametrize("case", NAMES)
def test_two_processes(case: str, said: dict[str, list[str]]) -> None:
    assert said[case] == ["ok", "ok"], "\n".join(said["failed"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_and_failing_training_can_go_on(tmp_path: Path) -> None:
    """One test, because all children are forked from one process."""
    done = python(HELPERS / "killed_worker.py", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    said: dict[str, Any] = json.loads(done.stdout)
    # Killed while it computed, logged, or wrote a checkpoint: bit for bit what an undisturbed run leaves.
    for how, least in (("writing", 8), ("training", 3)):
        found = said[how]
        assert found["kills"] >= least and found["differs"] == "" and found["metrics"] == ["", ""], found
        # No leftovers, and every name is there.
        assert found["files"] == ["best.pt", "last.pt", "metrics.jsonl", "step-00000008.pt"], found

    killed, unreadable = said["killed"], said["unreadable"]
    assert killed["codes"] == [1, -9], killed
    (line,) = [line for line in killed["said"].splitlines() if "Stopped" in line]
    start = f"torchrun --nproc-per-node 2 -m fastdense train --out {tmp_path / 'killed'} --resume."
    assert line.endswith(f"Stopped: another process has ended, after step 3 of 132. Resume with: {start}"), line

    assert unreadable["codes"] == [1, 1], unreadable
    assert unreadable["said"].count("Stopped: ") == unreadable["said"].count("Stopped: cat.png cannot be read.") == 1
    for found in (killed, unreadable):
        assert found["saved"] and found["said"].count("images to train on") == 1
        assert "Traceback" not in found["said"] and "gloo" not in found["said"], found
