"""One stage: what the run knows of it, what it is given, and the process that stages run in, one after another.

    python -m benchmarks.gpu.stage FOLDER --until TIME [--rehearse] NAME=MODULE:FUNCTION=SECONDS ...

is how a run starts stages. Each function gets a :class:`Job`, fills ``job.result`` and calls ``job.save()`` whenever
something worth keeping has come in: a stage that is stopped half way keeps what it saved. The stages share the process,
because starting one takes seconds; one that breaks the device's context ends it, and the run starts another.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..harness.runner import plain, write_record

ERROR_CHARACTERS = 3000  # of a traceback: its end says what went wrong


@dataclass(frozen=True)
class Stage:
    """What a run knows of a stage.

    Attributes:
        name: in records and on the command line.
        target: ``"module:function"``; the function takes a :class:`Job`.
        seconds: the longest that it may take.
        runs: ``"first"``, ``"again"`` (the second run, of what takes minutes) or ``"both"``.
        background: runs in a process of its own, beside the stages that follow, until the first that is timed.
        timed: waits until it has the machine to itself.
        apart: needs a process that no other stage has used.
    """

    name: str
    target: str
    seconds: float
    runs: str = "first"
    background: bool = False
    timed: bool = False
    apart: bool = False


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
        write_record(self.record, {"status": "running", "until": self.until, **entry, "result": self.result})


class Skip(Exception):
    """Raised by a stage that cannot run here; its message says why. The run counts as complete without it."""


def describe(error: BaseException) -> dict[str, str]:
    """Status and message of a failure; running out of memory is a result of its own."""
    out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    text = "".join(traceback.format_exception(error))
    return {"status": "out of memory" if out_of_memory else "failed", "error": text[-ERROR_CHARACTERS:]}


def _is_skip(error: BaseException) -> bool:
    return type(error).__name__ == Skip.__name__  # the module of this process is there twice, and so is its class


def carry_out(job: Job, target: str) -> None:
    """Run one stage; how it ended, and after how long, is in its record."""
    start = time.monotonic()
    module, _, name = target.partition(":")
    job.save()  # from now on its time is running
    ended: dict[str, str] = {"status": "ok"}
    try:
        function: Callable[[Job], None] = getattr(importlib.import_module(module), name)
        function(job)
    except Exception as error:
        ended = {"status": "skipped", "error": str(error)} if _is_skip(error) else describe(error)
        if ended["status"] != "skipped":
            traceback.print_exc()
    job.save(**ended, seconds=round(time.monotonic() - start, 1))
    print(f"{job.record.stem}: {ended['status']}", flush=True)


def _usable(device: torch.device) -> bool:
    """Give back what a stage held; whether the device still answers. After an illegal access it never does."""
    if device.type != "cuda":
        return True
    try:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:  # whatever a broken context raises
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages that were asked for, in turn, each within its own time."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.stage", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where each stage's record goes, and where those before it are")
    parser.add_argument("--until", type=float, required=True, help="time.time() at which the whole run ends")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("stages", nargs="+", metavar="NAME=MODULE:FUNCTION=SECONDS")
    options = parser.parse_args(arguments)
    earlier: dict[str, Any] = {}
    for path in options.folder.glob("*.stage.json"):
        entry = json.loads(path.read_text())
        if entry["status"] == "ok":
            earlier[path.name.removesuffix(".stage.json")] = entry["result"]
    for stage in options.stages:
        name, target, seconds = stage.split("=")
        until = min(time.time() + float(seconds), options.until)
        job = Job(options.rehearse, until, earlier, options.folder / f"{name}.stage.json")
        carry_out(job, target)
        if json.loads(job.record.read_text())["status"] == "ok":
            earlier[name] = plain(job.result)
        del job
        if not _usable(torch.device("cpu" if options.rehearse else "cuda")):
            sys.stdout.flush()
            os._exit(1)  # nothing more can be measured in this process, nor ended in order


if __name__ == "__main__":
    main()
