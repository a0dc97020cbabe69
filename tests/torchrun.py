"""Starts a worker of the tests in two processes with gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent


def two_processes(worker: str, names: Sequence[str], file: Path) -> dict[str, list[str]]:
    """What both processes say of each case; all cases in one run, because starting takes longer than they do."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    path = os.pathsep.join((str(HERE), str(HERE.parent)))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(HERE / worker), str(file), *names],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    found = [json.loads(Path(f"{file}.{rank}").read_text()) for rank in range(2) if Path(f"{file}.{rank}").exists()]
    assert len(found) == 2, done.stderr[-4000:]
    return {name: [one.get(name, "did not run") for one in found] for name in names}
