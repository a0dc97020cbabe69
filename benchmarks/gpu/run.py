"""Run stages one after another, each in its own process with its own time limit, and keep what they find.

Nothing that a stage does ends the run: one that raises, crashes, hangs or runs out of memory is recorded as such, and
the next one starts. ``gpu.json`` is complete after every stage; ``gpu.log`` holds the end of what each one printed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..runner import ROOT, SCHEMA, environment, plain, write_record
from .stage import ERROR_CHARACTERS, Stage

RECORD, LOG, PICTURE = "gpu.json", "gpu.log", "kernels.png"
MINUTES = 9.0  # the run for which stages give their seconds
LEAST_SECONDS = 5.0  # what starting a process and importing PyTorch takes: with less there is no use in trying
LOG_BYTES = 1 << 20  # kept of what one stage printed

# What a run leaves in its folder: no file larger, no more files, and no folders in it. Whatever carries results away
# from a machine with a GPU may take no more.
FILE_BYTES, FILES = 16 << 20, 8

# What one record is about: one machine, one set of versions, one state of the code.
SAME = ("device", "driver", "torch", "triton", "sources", "rehearsal")

Entry = dict[str, Any]


@dataclass
class _Running:
    """A stage's process."""

    stage: Stage
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    record: Path
    started: float
    seconds: float

    def wait(self) -> Entry:
        """What became of it: status, seconds, results, and the error if there was one."""
        timed_out = False
        try:
            self.process.wait(max(0.0, self.started + self.seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            timed_out = True
        seconds = time.monotonic() - self.started
        self.kill()
        self.output.flush()
        entry: Entry = {"status": "running", "seconds": round(seconds, 1), "result": {}}
        with contextlib.suppress(OSError):
            entry |= json.loads(self.record.read_text())
        if entry["status"] != "running":  # it said itself how it ended
            return entry
        if timed_out:
            return entry | {"status": "timed out", "error": f"stopped after {self.seconds:.0f} s"}
        code = self.process.returncode
        reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return entry | {"status": "crashed", "error": f"{self._printed(ERROR_CHARACTERS)}\n{reason}"}

    def kill(self) -> None:
        """End the process and everything that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def close(self, log: Path) -> None:
        """Move the end of what it printed into ``log`` and remove its files."""
        with log.open("a") as file:
            file.write(f"===== {self.stage.name}\n{self._printed(LOG_BYTES)}\n")
        self.output.close()
        for path in (Path(self.output.name), self.record):
            path.unlink(missing_ok=True)

    def _printed(self, most: int) -> str:
        self.output.seek(0, os.SEEK_END)
        self.output.seek(-min(most, self.output.tell()), os.SEEK_END)
        return self.output.read().decode(errors="replace")


class Run:
    """One run into one folder.

    Args:
        out: for ``gpu.json`` and ``gpu.log``; a record of the same machine and code that is there already is continued.
        minutes: the longest that all stages together may take.
        rehearsal: on the CPU, in Triton's interpreter.
        again: run finished stages again, too.
        say: takes a line about each stage as it ends.
    """

    def __init__(
        self, out: Path, *, minutes: float, rehearsal: bool, again: bool = False, say: Callable[[str], None] = print
    ) -> None:
        self.out, self.minutes, self.rehearsal, self.again, self.say = out, minutes, rehearsal, again, say
        self.deadline = time.monotonic() + 60 * minutes
        self.environment = environment(gpu=not rehearsal) | {"rehearsal": rehearsal}
        self.stages: dict[str, Entry] = {}
        self._alive: list[_Running] = []
        out.mkdir(parents=True, exist_ok=True)
        self._resume()
        self._keep()

    def _resume(self) -> None:
        """Take up the folder's record, or move it aside if it is of another machine or of other code."""
        path = self.out / RECORD
        with contextlib.suppress(FileNotFoundError):
            record = json.loads(path.read_text())
            before = record["environment"]
            if all(before.get(key) == self.environment.get(key) for key in SAME):
                self.stages = record["stages"]
            else:
                path.rename(path.with_name(f"gpu-{before['date'].replace(':', '')}.json"))

    def _keep(self) -> None:
        record = {"schema": SCHEMA, "minutes": self.minutes, "environment": self.environment, "stages": self.stages}
        write_record(self.out / RECORD, record)
        while (self.out / RECORD).stat().st_size > FILE_BYTES:
            largest = max(self.stages.values(), key=lambda entry: len(json.dumps(plain(entry["result"]))))
            if "dropped" in largest["result"]:
                break
            largest["result"] = {"dropped": f"the record would exceed {FILE_BYTES} bytes"}
            write_record(self.out / RECORD, record)

    def finished(self, stage: Stage) -> bool:
        """Whether an earlier run into this folder has this stage's results."""
        return not self.again and self.stages.get(stage.name, {}).get("status") == "ok"

    def run(self, stages: Sequence[Stage]) -> bool:
        """Run ``stages`` in turn; whether all of them have finished."""
        try:
            for stage in stages:
                if self.finished(stage):
                    self.say(f"{stage.name}: finished earlier")
                    continue
                if stage.timed:
                    self._collect()
                if not self._start(stage):
                    self._enter(stage, {"status": "not reached", "seconds": 0.0, "result": {}})
                elif not stage.background:
                    self._collect(last=1)
            self._collect()
        finally:
            for running in self._alive:
                running.kill()
            tidy(self.out)
        return all(self.stages[stage.name]["status"] in ("ok", "skipped") for stage in stages)

    def _collect(self, last: int = 0) -> None:
        """Wait for the processes that run, or for the ``last`` of them."""
        for running in self._alive[-last:]:
            entry = running.wait()
            running.close(self.out / LOG)
            self._alive.remove(running)
            self._enter(running.stage, entry)

    def _enter(self, stage: Stage, entry: Entry) -> None:
        self.stages[stage.name] = {**entry, "environment": self.environment}
        self._keep()
        last = entry.get("error", "").strip().splitlines()[-1:]
        self.say(f"{stage.name}: {': '.join([entry['status'], *last])} ({entry['seconds']:.0f} s)")

    def _start(self, stage: Stage) -> bool:
        """Start the stage's process, unless no time is left for it."""
        # A shorter run reaches fewer stages, but those that it reaches get what they need.
        seconds = min(stage.seconds * max(1.0, self.minutes / MINUTES), self.deadline - time.monotonic())
        if seconds < LEAST_SECONDS:
            return False
        record = self.out / f"{stage.name}.json"
        record.unlink(missing_ok=True)
        output = (self.out / f"{stage.name}.log").open("w+b")
        command = [sys.executable, "-m", "benchmarks.gpu.stage", stage.target, "--record", str(record.resolve())]
        command += ["--earlier", str((self.out / RECORD).resolve()), "--until", str(time.time() + seconds)]
        command += ["--rehearse"] * self.rehearsal
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=dict(_variables(stage, self.rehearsal)),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=os.setpgrp,  # a group of its own, so that killing it reaches the compilers that it started
        )
        self._alive.append(_Running(stage, process, output, record, time.monotonic(), seconds))
        return True


def tidy(out: Path, most: int = FILES) -> None:
    """Remove what stages have left unfinished, the oldest records put aside, and the beginning of a log too long."""
    for path in out.glob("*.tmp"):
        path.unlink()
    log = out / LOG
    if log.exists() and log.stat().st_size > FILE_BYTES:
        log.write_bytes(log.read_bytes()[-FILE_BYTES // 2 :])
    aside = sorted(out.glob("gpu-*.json"))
    others = sum(path.is_file() for path in out.iterdir()) - len(aside)
    for path in aside[: max(0, others + len(aside) - most)]:
        path.unlink()


def _variables(stage: Stage, rehearsal: bool) -> Iterator[tuple[str, str]]:
    """The environment variables of a stage's process."""
    yield from ((key, value) for key, value in os.environ.items() if key != "TRITON_INTERPRET")
    yield "PYTHONUNBUFFERED", "1"
    if rehearsal:
        yield "TRITON_INTERPRET", "1"
    if stage.deterministic:
        # Without it, torch.use_deterministic_algorithms makes every matrix product raise. It may cost time, so no
        # timed stage gets it.
        yield "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
