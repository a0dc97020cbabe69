"""Run stages one after another, each within its own time limit, and keep what they find.

Nothing that a stage does ends the run: one that raises, crashes, hangs or runs out of memory is recorded as such, and
the next one starts, in a new process if that one is gone. ``gpu.json`` is complete after every stage; ``gpu.log`` holds
the end of what the stages printed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from ..harness.runner import ROOT, SCHEMA, environment, write_record
from .stage import ERROR_CHARACTERS, RECORDS, Stage, last_line

RECORD, LOG, PICTURE = "gpu.json", "gpu.log", "kernels.png"
MINUTES = 5.0
LEAST_SECONDS = 2.0  # with less there is no use in beginning a stage
START_SECONDS = 60.0  # until a process has begun a stage: importing PyTorch over a slow disk takes long
REHEARSAL_PATIENCE = 10.0  # times as long: a rehearsal is about what runs, on however busy a machine
POLL_SECONDS = 0.05
LOG_BYTES = 1 << 20  # kept of what the stages printed

Entry = dict[str, Any]


class _Process:
    """A process that carries out stages in turn."""

    def __init__(self, stages: Sequence[Stage], out: Path, until: float, rehearsal: bool) -> None:
        self.stages, self.out = list(stages), out
        self.patience = REHEARSAL_PATIENCE if rehearsal else 1.0
        listed = [(stage.name, stage.target, stage.seconds * self.patience) for stage in stages]
        asked = {"folder": str(out.resolve()), "until": until, "rehearsal": rehearsal, "stages": listed}
        self.log = (out / f"{stages[0].name}.part.log").open("w+b")
        self.idle_since = time.time()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.stage", json.dumps(asked)],
            cwd=ROOT,
            env=variables(rehearsal),
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # and so a group of its own: killing it reaches the processes that it started
        )

    def wait(self, stage: Stage) -> Entry | None:
        """What became of a stage: status, seconds, results, and the error; ``None`` if the process ended before it."""
        path = self.out / f"{stage.name}{RECORDS}"
        while True:
            gone = self.process.poll() is not None  # asked first: what it wrote before it went is then read
            entry: Entry = {"status": "running", "seconds": 0.0, "result": {}}
            with contextlib.suppress(OSError):
                entry |= json.loads(path.read_text())
            if gone and "until" not in entry and stage is not self.stages[0]:
                return None
            until = entry.pop("until", self.idle_since + START_SECONDS)
            if entry["status"] != "running":  # it said itself how it ended
                self.idle_since = time.time()
                return entry
            if gone or time.time() > until:
                break
            time.sleep(POLL_SECONDS)
        self.kill()
        entry["seconds"] = round(time.time() - max(self.idle_since, until - stage.seconds * self.patience), 1)
        if not gone:
            return entry | {"status": "timed out", "error": "stopped: its time was up"}
        code = self.process.returncode
        reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return entry | {"status": "crashed", "error": f"{self._printed(ERROR_CHARACTERS)}\n{reason}"}

    def kill(self) -> None:
        """End the process and everything that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def close(self, log: Path) -> None:
        """End it, move the end of what it printed into ``log`` and remove its file."""
        self.kill()
        with log.open("a") as file:
            file.write(f"===== {', '.join(stage.name for stage in self.stages)}\n{self._printed(LOG_BYTES)}\n")
        self.log.close()
        Path(self.log.name).unlink(missing_ok=True)

    def _printed(self, most: int) -> str:
        self.log.flush()
        self.log.seek(0, os.SEEK_END)
        self.log.seek(-min(most, self.log.tell()), os.SEEK_END)
        return self.log.read().decode(errors="replace")


class Run:
    """One run into one folder.

    Args:
        out: for ``gpu.json`` and ``gpu.log``; what an earlier run left there is overwritten.
        minutes: the longest that all stages together may take.
        rehearsal: on the CPU, in Triton's interpreter.
        say: takes a line about each stage as it ends.
    """

    def __init__(self, out: Path, *, minutes: float, rehearsal: bool, say: Callable[[str], None]) -> None:
        self.out, self.minutes, self.rehearsal, self.say = out, minutes, rehearsal, say
        self.until = time.time() + 60 * minutes
        self.environment = environment(gpu=not rehearsal) | {"rehearsal": rehearsal}
        self.stages: dict[str, Entry] = {}
        self._background: list[_Process] = []
        out.mkdir(parents=True, exist_ok=True)
        for left in (*out.glob(f"*{RECORDS}"), *out.glob("*.part.log"), out / LOG):
            left.unlink(missing_ok=True)
        self._save()

    def run(self, stages: Sequence[Stage]) -> bool:
        """Run ``stages`` in turn; whether all of them have finished."""
        process: _Process | None = None
        try:
            for index, stage in enumerate(stages):
                if stage.timed:
                    self._collect()
                if stage.background:
                    self._background.append(self._start([stage]))
                    continue
                if self.until - time.time() < LEAST_SECONDS:
                    self._enter(stage, {"status": "not reached", "seconds": 0.0, "result": {}})
                    continue
                entry = process.wait(stage) if process is not None and stage in process.stages else None
                if process is None or entry is None:  # this stage needs another one
                    if process is not None:
                        process.close(self.out / LOG)
                    process = self._start(_together(stages[index:], alone=bool(self._background)))
                    entry = process.wait(stage)
                self._enter(stage, entry)
            self._collect()
        finally:
            for one in [*self._background, *([process] if process else [])]:
                one.close(self.out / LOG)
            for left in (*self.out.glob(f"*{RECORDS}"), *self.out.glob("*.tmp")):
                left.unlink()
        return all(self.stages[stage.name]["status"] in ("ok", "skipped") for stage in stages)

    def _start(self, stages: Sequence[Stage]) -> _Process:
        return _Process(stages, self.out, self.until, self.rehearsal)

    def _collect(self) -> None:
        """Wait for what runs in the background."""
        for running in self._background:
            self._enter(running.stages[0], running.wait(running.stages[0]))
            running.close(self.out / LOG)
        self._background.clear()

    def _enter(self, stage: Stage, entry: Entry | None) -> None:
        assert entry is not None  # a process's first stage always has one
        self.stages[stage.name] = {**entry, "environment": self.environment}
        self._save()
        status = ": ".join(filter(None, (entry["status"], last_line(entry))))
        self.say(f"{stage.name}: {status} ({entry['seconds']:.0f} s)")

    def _save(self) -> None:
        record = {"schema": SCHEMA, "minutes": self.minutes, "environment": self.environment, "stages": self.stages}
        write_record(self.out / RECORD, record)


def _together(stages: Sequence[Stage], *, alone: bool) -> list[Stage]:
    """The first stage and those after it that its process can carry out: none that must wait for what runs beside."""
    first, *others = stages
    if first.apart:
        return [first]
    return [first, *takewhile(lambda stage: not (stage.apart or stage.background or (stage.timed and alone)), others)]


def variables(rehearsal: bool) -> dict[str, str]:
    """The environment variables of a process: in a rehearsal alone kernels are interpreted."""
    found = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"PYTHONUNBUFFERED": "1"}
    return found | {"TRITON_INTERPRET": "1"} if rehearsal else found
