"""One stage: what the run knows of it, what the stage is given, and the process that it runs in.

    python -m benchmarks.gpu.stage MODULE:FUNCTION --record FILE --earlier FILE --until TIME [--rehearse]

is how a run starts a stage. The function gets a :class:`Job`, fills ``job.result`` and calls ``job.save()`` whenever
something worth keeping has come in: a stage that is stopped half way keeps what it saved.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..runner import write_record
from .skip import Skip

ERROR_CHARACTERS = 3000  # of a traceback: its end says what went wrong


@dataclass(frozen=True)
class Stage:
    """What a run knows of a stage.

    Attributes:
        name: in records and on the command line.
        target: ``"module:function"``; the function takes a :class:`Job`.
        seconds: the longest that it may take in a run of nine minutes or less; a longer run stretches it.
        background: run beside the stages that follow, until the first that is timed. For compiling ahead.
        timed: waits until it has the machine to itself.
        deterministic: needs repeatable matrix products, which PyTorch must be told about before it starts.
    """

    name: str
    target: str
    seconds: float
    background: bool = False
    timed: bool = False
    deterministic: bool = False


@dataclass
class Job:
    """What a stage is given, and where it leaves its results.

    Attributes:
        rehearsal: tiny shapes in Triton's interpreter, on the CPU; nothing found means anything about a GPU.
        until: ``time.time()`` at which the process is killed.
        earlier: results of the stages that have finished, by name.
        record: file that ``save`` writes.
        result: anything that JSON can hold.
    """

    rehearsal: bool
    until: float
    earlier: dict[str, Any]
    record: Path
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the stage runs."""
        return torch.device("cpu" if self.rehearsal else "cuda")

    def seconds_left(self) -> float:
        """Until the process is killed. A stage with many rows stops by itself when the next one may not fit."""
        return self.until - time.time()

    def save(self, **entry: Any) -> None:
        """Keep ``result`` as it is now; ``entry`` is how the stage ended, if it has."""
        write_record(self.record, {"status": "running", **entry, "result": self.result})


def describe(error: BaseException) -> dict[str, str]:
    """Status and message of a failure; running out of memory is a result of its own."""
    out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    text = "".join(traceback.format_exception(error))
    return {"status": "out of memory" if out_of_memory else "failed", "error": text[-ERROR_CHARACTERS:]}


def main() -> None:
    """Run one stage in this process; exits with 1 if it failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.stage", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", help="MODULE:FUNCTION")
    parser.add_argument("--record", type=Path, required=True, help="file for what the stage finds")
    parser.add_argument("--earlier", type=Path, required=True, help="the run's record so far")
    parser.add_argument("--until", type=float, required=True, help="time.time() at which this process is killed")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    start = time.monotonic()
    stages = json.loads(options.earlier.read_text())["stages"]
    earlier = {name: entry["result"] for name, entry in stages.items() if entry["status"] == "ok"}
    job = Job(options.rehearse, options.until, earlier, options.record)
    module, _, name = options.target.partition(":")
    try:
        function: Callable[[Job], None] = getattr(importlib.import_module(module), name)
        function(job)
    except Skip as reason:
        job.save(status="skipped", error=str(reason), seconds=round(time.monotonic() - start, 1))
        return
    except Exception as error:
        traceback.print_exc()
        job.save(**describe(error), seconds=round(time.monotonic() - start, 1))
        sys.exit(1)
    job.save(status="ok", seconds=round(time.monotonic() - start, 1))


if __name__ == "__main__":
    main()
