"""One stage: what the run knows of it, what it is given, and the process that stages run in, one after another.

``python -m benchmarks.gpu.stage JSON`` is how a run starts stages. Each target gets a :class:`Job`, fills its result
and saves whenever something worth keeping has come in: a stage that is stopped half way keeps what it saved. The stages
share the process, because starting one takes seconds; one that breaks the device's context ends it, and the run starts
another.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..harness.runner import plain, write_record

ERROR_CHARACTERS = 3000  # of a traceback: its end says what went wrong
RECORDS = ".stage.json"  # a stage's name and this: the file in which it leaves its results


@dataclass(frozen=True)
class Stage:
    """What a run knows of a stage."""

    name: str  # in records and on the command line
    target: str  # "module:function", which takes a Job
    seconds: float  # the longest that it may take
    runs: str = "first"  # or "again" (the second run, of what takes minutes), or "both"
    background: bool = False  # in a process of its own, beside the stages that follow, until the first that is timed
    timed: bool = False  # waits until it has the machine to itself
    apart: bool = False  # needs a process that no other stage has used


@dataclass
class Job:
    """What a stage is given, and where it leaves its results."""

    name: str  # of the stage
    folder: Path  # of its record
    until: float  # time.time() at which the process is killed
    rehearsal: bool  # tiny shapes in Triton's interpreter, on the CPU; nothing found means anything about a GPU
    earlier: dict[str, Any] = field(default_factory=dict)  # results of the stages that have finished, by name
    result: dict[str, Any] = field(default_factory=dict)  # anything that JSON can hold

    @property
    def device(self) -> torch.device:
        """Where the stage runs."""
        return torch.device("cpu" if self.rehearsal else "cuda")

    def seconds_left(self) -> float:
        """Until the process is killed. A stage with many rows stops by itself when the next one may not fit."""
        return self.until - time.time()

    def save(self, **entry: Any) -> None:
        """Keep ``result`` as it is now; ``entry`` is how the stage ended, if it has."""
        record = {"status": "running", "until": self.until, **entry, "result": self.result}
        write_record(self.folder / f"{self.name}{RECORDS}", record)


class Skip(Exception):
    """Raised by a stage that cannot run here; its message says why. The run counts as complete without it."""


def describe(error: BaseException) -> dict[str, str]:
    """Status and message of a failure; running out of memory is a result of its own."""
    out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    text = "".join(traceback.format_exception(error))
    return {"status": "out of memory" if out_of_memory else "failed", "error": text[-ERROR_CHARACTERS:]}


def last_line(entry: Mapping[str, Any]) -> str:
    """The end of an entry's error."""
    return "".join(entry.get("error", "").strip().splitlines()[-1:])


def carry_out(job: Job, target: str) -> bool:
    """Run one stage; how it ended, and after how long, is in its record. Whether it ended well."""
    start = time.monotonic()
    module, _, name = target.partition(":")
    job.save()  # from now on its time is running
    ended: dict[str, str] = {"status": "ok"}
    try:
        function: Callable[[Job], None] = getattr(importlib.import_module(module), name)
        function(job)
    except Skip as reason:
        ended = {"status": "skipped", "error": str(reason)}
    except Exception as error:
        ended = describe(error)
        traceback.print_exc()
    job.save(**ended, seconds=round(time.monotonic() - start, 1))
    print(f"{job.name}: {ended['status']}", flush=True)
    return ended["status"] == "ok"


def release(device: torch.device) -> None:
    """Give memory back; raises what a broken context raises: after an illegal access the device never answers."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def main() -> None:
    """Run the stages that were asked for, in turn, each within its own time and all before ``until``."""
    asked = json.loads(sys.argv[1])
    folder = Path(asked["folder"])
    earlier: dict[str, Any] = {}
    for path in folder.glob(f"*{RECORDS}"):
        entry = json.loads(path.read_text())
        if entry["status"] == "ok":
            earlier[path.name.removesuffix(RECORDS)] = entry["result"]
    for name, target, seconds in asked["stages"]:
        job = Job(name, folder, min(time.time() + seconds, asked["until"]), asked["rehearsal"], earlier)
        if carry_out(job, target):
            earlier[name] = plain(job.result)
        device = job.device
        del job
        try:
            release(device)
        except Exception:
            sys.stdout.flush()
            os._exit(1)  # nothing more can be measured in this process, nor ended in order


if __name__ == "__main__":
    importlib.import_module("benchmarks.gpu.stage").main()  # the module whose Skip the stages raise: this is a copy
