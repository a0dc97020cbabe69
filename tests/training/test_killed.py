"""Training that is killed at any moment, and goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("sklearn")

from helpers.processes import HELPERS, python

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.mark.slow
def test_killed_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    done = python(HELPERS / "killed_worker.py", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads(done.stdout)
    assert said["outside"] >= 3 and said["writing"] >= 8, said
    for how in ("outside", "writing"):
        assert said[f"{how} differs"] == "", said
        # No leftovers, and every name is there.
        assert said[f"{how} files"] == ["best.pt", "last.pt", "metrics.jsonl", "step-00000008.pt"], said
