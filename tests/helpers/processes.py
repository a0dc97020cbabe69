"""Processes that tests start: Python with the checkout and the helpers in reach, alone or twice with gloo."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

HELPERS = Path(__file__).parent
ROOT = HELPERS.parents[1]
# Where kernels are compiled, not interpreted as in the tests' own process.
COMPILED = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
LIBRARIES = [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")

Done: TypeAlias = subprocess.CompletedProcess[str]


def python(*arguments: Any, environment: dict[str, str] | None = None, **options: Any) -> Done:
    """``python arguments``, in the root of the checkout unless ``cwd`` says otherwise; what it said and returned."""
    path = os.pathsep.join((str(HELPERS.parent), str(ROOT)))
    environment = {**(os.environ if environment is None else environment), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, **{"cwd": ROOT, **options})


def compiled(code: str, *arguments: Any) -> str:
    """What a program prints in whose process kernels are compiled."""
    done = python("-c", code, *arguments, environment=COMPILED)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def two_processes(worker: str, names: Sequence[str], file: Path) -> dict[str, list[str]]:
    """What both processes say of each case; all cases in one run, because starting takes longer than they do."""
    done = python(*TORCHRUN, HELPERS / worker, file, *names)
    found = [json.loads(Path(f"{file}.{rank}").read_text()) for rank in range(2) if Path(f"{file}.{rank}").exists()]
    assert len(found) == 2, done.stderr[-4000:]
    return {name: [one.get(name, "did not run") for one in found] for name in names}
