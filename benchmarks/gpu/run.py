"""Runs stages one after another, each within its own time limit, and records what they find.

Nothing that a stage does ends the run: one that raises, crashes, hangs or runs out of memory is recorded as such, with
what it had saved, and the next one starts. Stages run in a worker process, and share it, because starting one takes
seconds; a worker that a stage has broken is replaced.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ..harness.runner import ROOT, SCHEMA, environment, plain, query_gpu, write_record

RECORD, LOG, PICTURE = "gpu.json", "gpu.log", "kernels.png"
MINUTES = 5.0
LEAST_SECONDS = 2.0  # with less a stage is not started
START_SECONDS = 60.0  # until a worker begins its first stage: importing PyTorch over a slow disk takes long
REHEARSAL_PATIENCE = 10.0  # times as long: a rehearsal is about what runs, on however busy a machine
ERROR_CHARACTERS = 3000  # of a traceback: its end says what went wrong
STATE = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")  # of the GPU after each stage
HEADING = "====="  # before the name of each stage in the log

Entry = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """What a run knows of a stage."""

    name: str  # in records and on the command line
    function: Callable[[Job], None]
    seconds: float  # the longest that it may take
    runs: str = "first"  # or "again" (the second run, of what takes minutes), or "both"
    background: bool = False  # in a worker of its own, beside the stages that follow, until the first that is timed
    timed: bool = False  # waits until it has the machine to itself
    apart: bool = False  # needs a worker that no other stage has used


@dataclass
class Job:
    """What a stage is given, and where it leaves its results."""

    name: str  # of the stage
    until: float  # time.time() at which its process is killed
    rehearsal: bool  # tiny shapes in Triton's interpreter, on the CPU; nothing found means anything about a GPU
    earlier: dict[str, Any] = field(default_factory=dict)  # results of the stages that have finished, by name
    result: dict[str, Any] = field(default_factory=dict)  # anything that JSON can hold
    pipe: Connection | None = None  # to the run
    begun: float = field(default_factory=time.time)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearsal else "cuda")

    def seconds_left(self) -> float:
        """Returns the seconds until the process is killed. A stage with many rows stops when the next may not fit."""
        return self.until - time.time()

    def save(self, status: str = "running", **entry: Any) -> None:
        """Hands ``result`` as it is now to the run, which has it then however the stage ends."""
        if self.pipe is not None:
            seconds = round(time.time() - self.begun, 1)
            self.pipe.send({"status": status, "seconds": seconds, "result": plain(self.result), **entry})


class Skip(Exception):
    """Raised by a stage that cannot run here; its message says why. The run counts as complete without it."""


def describe(error: BaseException) -> dict[str, str]:
    """Returns status and message of a failure; running out of memory is a result of its own."""
    status = "out of memory" if isinstance(error, torch.OutOfMemoryError | MemoryError) else "failed"
    return {"status": status, "error": "".join(traceback.format_exception(error))[-ERROR_CHARACTERS:]}


def brief(error: BaseException) -> str:
    """Returns the kind and the beginning of the message of a failure."""
    return f"{type(error).__name__}: {error}"[:300]


def last_line(entry: Mapping[str, Any]) -> str:
    """Returns the end of an entry's error."""
    return entry.get("error", "").strip().rpartition("\n")[2]


def release(device: torch.device) -> None:
    """Gives memory back; raises what a broken context raises: after an illegal access the device never answers."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _serve(pipe: Connection, log: Path, rehearsal: bool) -> None:
    """Carries out stages as the run sends them, until it kills this process."""
    os.setsid()  # a group of its own: killing that reaches the processes that a stage starts
    os.chdir(ROOT)
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    while True:
        stage, until, earlier = pipe.recv()
        print(HEADING, stage.name, flush=True)
        seconds = stage.seconds * (REHEARSAL_PATIENCE if rehearsal else 1.0)
        job = Job(stage.name, min(time.time() + seconds, until), rehearsal, earlier, pipe=pipe)
        job.save(until=job.until)
        ended: dict[str, Any] = {"status": "ok"}
        try:
            stage.function(job)
        except Skip as reason:
            ended = {"status": "skipped", "error": str(reason)}
        except Exception as error:
            ended = describe(error)
            traceback.print_exc()
        try:
            release(job.device)
        except Exception:
            ended["broken"] = True
        job.save(**ended)
        sys.stdout.flush()


class _Worker:
    """A process that carries out stages in turn."""

    def __init__(self, log: Path, rehearsal: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.log = log
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, log, rehearsal))
        self.process.start()
        theirs.close()

    def begin(self, stage: Stage, until: float, earlier: dict[str, Any]) -> None:
        self.name, self.begun = stage.name, time.time()
        self.pipe.send((stage, until, earlier))

    def wait(self) -> Entry:
        """Returns how the stage ended: status, seconds, results, and the error. A broken process is closed."""
        entry: Entry = {"status": "running", "seconds": 0.0, "result": {}}
        until = self.begun + START_SECONDS
        try:
            while self.pipe.poll(max(0.0, until - time.time())):
                entry |= self.pipe.recv()
                until = entry.pop("until", until)
                if entry["status"] != "running":
                    if entry.pop("broken", False):
                        self.close()
                    return entry
            entry |= {"status": "timed out", "error": "stopped: its time was up"}
        except (EOFError, ConnectionError):
            self.process.join()
            printed = self.log.read_text(errors="replace").rpartition(f"{HEADING} {self.name}\n")[2]
            code = self.process.exitcode or 0
            reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            entry |= {"status": "crashed", "error": f"{printed[-ERROR_CHARACTERS:]}\n{reason}"}
        self.close()
        return entry | {"seconds": round(time.time() - self.begun, 1)}

    def close(self) -> None:
        assert self.process.pid is not None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()  # where it has no group of its own yet
        self.process.join()


class Run:
    """One run into one folder: ``gpu.json`` and ``gpu.log`` there are overwritten, ``say`` takes a line a stage."""

    def __init__(self, out: Path, *, minutes: float, rehearsal: bool, say: Callable[[str], None]) -> None:
        self.out, self.minutes, self.rehearsal, self.say = out, minutes, rehearsal, say
        self.until = time.time() + 60 * minutes
        self.environment = environment(gpu=not rehearsal) | {"rehearsal": rehearsal}
        self.stages: dict[str, Entry] = {}
        self._workers: list[_Worker] = []
        self._background: list[_Worker] = []
        out.mkdir(parents=True, exist_ok=True)
        (out / LOG).unlink(missing_ok=True)
        self._save()

    def run(self, stages: Sequence[Stage]) -> bool:
        """Runs ``stages`` in turn; returns whether all of them have finished."""
        shared: _Worker | None = None
        try:
            for stage in stages:
                if stage.timed:
                    self._collect()
                if stage.background:
                    self._background.append(self._begin(stage, None))
                elif self.until - time.time() < LEAST_SECONDS:
                    self._enter(stage.name, {"status": "not reached", "seconds": 0.0, "result": {}})
                else:
                    if shared is not None and stage.apart:
                        shared.close()
                    shared = self._begin(stage, shared)
                    self._enter(stage.name, shared.wait())
                    if stage.apart:
                        shared.close()
            self._collect()
        finally:
            for worker in self._workers:
                worker.close()
        return all(self.stages[stage.name]["status"] in ("ok", "skipped") for stage in stages)

    def _begin(self, stage: Stage, worker: _Worker | None) -> _Worker:
        """Returns the worker that carries out ``stage``: ``worker``, or a new one where that has ended."""
        if worker is None or not worker.process.is_alive():
            worker = _Worker(self.out.resolve() / LOG, self.rehearsal)
            self._workers.append(worker)
        earlier = {name: entry["result"] for name, entry in self.stages.items() if entry["status"] == "ok"}
        worker.begin(stage, self.until, earlier)
        return worker

    def _collect(self) -> None:
        for worker in self._background:
            self._enter(worker.name, worker.wait())
            worker.close()
        self._background.clear()

    def _enter(self, name: str, entry: Entry) -> None:
        gpu = {} if self.rehearsal else {"gpu": query_gpu(*STATE)}  # a card that has slowed down shows here
        self.stages[name] = {**entry, "environment": self.environment, **gpu}
        self._save()
        status = ": ".join(filter(None, (entry["status"], last_line(entry))))
        self.say(f"{name}: {status} ({entry['seconds']:.0f} s)")

    def _save(self) -> None:
        record = {"schema": SCHEMA, "minutes": self.minutes, "environment": self.environment, "stages": self.stages}
        write_record(self.out / RECORD, record)
