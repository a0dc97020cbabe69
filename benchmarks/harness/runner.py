"""What every benchmark shares: check first, interleave, report medians, write a record."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

import fastdense
from fastdense.environment import versions

Seconds = dict[str, dict[str, list[float]]]  # provider, phase, every round
Watch = Callable[[dict[str, Any]], None]  # is shown a record whenever something has come in

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parents[1] / "results"
CHECKOUT = (ROOT / "pyproject.toml").is_file() and (ROOT / "kernels").is_dir()  # or installed from a wheel
SCHEMA = 2  # report/record.py says what a record holds


@dataclass(frozen=True)
class Timing:
    """Seconds of one repeated measurement: median, 20th and 80th percentile, and how often it ran."""

    median: float
    p20: float
    p80: float
    repeats: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        values, places = (torch.tensor(numbers, dtype=torch.float64) for numbers in (seconds, [0.5, 0.2, 0.8]))
        median, p20, p80 = values.quantile(places).tolist()
        return cls(median, p20, p80, len(seconds))


def interleave(steps: Mapping[str, Callable[[], Mapping[str, float]]], *, repeats: int, warmup: int = 2) -> Seconds:
    """Runs every step in turn, ``repeats`` times over, so that a drifting machine favours none.

    ``steps`` return seconds by phase; rounds of ``warmup`` are not counted.
    """
    rounds = [{name: step() for name, step in steps.items()} for _ in range(warmup + repeats)][warmup:]
    return {name: {phase: [found[name][phase] for found in rounds] for phase in rounds[0][name]} for name in steps}


def in_fresh_process(generate: Callable[..., Iterable[Any]], *arguments: Any) -> Iterator[Any]:
    """Yields what ``generate(*arguments)`` yields in a new process, as it comes.

    Where a process's memory comes to lie moves a whole run by several percent either way: one process is one sample.
    ``RuntimeError`` if it ended early.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(there, generate, arguments), daemon=True)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its notes on each profile would run through the table
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the process inherits: this one ends it after Ctrl-C
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, handler)
    there.close()
    try:
        while True:
            yield here.recv()
    except EOFError:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"the process that measured ended with status {process.exitcode}") from None
    finally:
        process.terminate()
        process.join()


def _send(pipe: Connection, generate: Callable[..., Iterable[Any]], arguments: tuple[Any, ...]) -> None:
    for item in generate(*arguments):
        pipe.send(item)


def fill(record: dict[str, Any], steps: Iterable[None], watch: Watch) -> dict[str, Any]:
    """Goes through ``steps``, which add to ``record``, and shows it to ``watch``; returns it, after Ctrl-C as it is."""
    with suppress(KeyboardInterrupt):
        for _ in steps:
            watch(record)
        record["complete"] = True
    return record


def environment(*, gpu: bool = False) -> dict[str, Any]:
    """Device (the GPU or the processor), versions, commit, date and command: what it takes to reproduce a record."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    record = {"schema": SCHEMA, "date": now, "command": _command(), "commit": _commit(), "sources": _sources()}
    record |= {"device": "cpu", "processor": _processor(), "threads": torch.get_num_threads()}
    record |= {"platform": platform.platform(), **versions()}
    del record["fastdense"]  # the commit says more
    if gpu:
        found = query_gpu("name", "driver_version")
        record |= {"device": found.get("name", "unknown GPU"), "driver": found.get("driver_version", "unknown")}
        record |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return record


def _command() -> str:
    """What was typed, without the folders of this machine."""
    if sys.orig_argv[1:2] == ["-m"]:
        return " ".join([Path(sys.executable).name, *sys.orig_argv[1:]])
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _commit() -> str:
    """``FASTDENSE_COMMIT``, for a checkout that came without its history, or what git says; a release has a version."""
    if "FASTDENSE_COMMIT" in os.environ:
        return os.environ["FASTDENSE_COMMIT"]
    described = CHECKOUT and (_output("git", "describe", "--always", "--dirty", "--abbrev=12") or "unknown")
    return described or fastdense.__version__


def _sources() -> str:
    """A fingerprint of the code itself: two records of one fingerprint measured the same, committed or not."""
    digest = hashlib.sha256()
    folders = ("fastdense", "kernels", "benchmarks") if CHECKOUT else (".",)
    for path in sorted(path for folder in folders for path in ROOT.glob(f"{folder}/**/*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _output(*command: str) -> str:
    """What ``command`` prints; nothing where it fails or is not installed."""
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.check_output(command, cwd=ROOT, stderr=subprocess.DEVNULL, text=True, timeout=20).strip()
    return ""


def query_gpu(*fields: str) -> dict[str, str]:
    """Fields of ``nvidia-smi --query-gpu`` for the GPU that PyTorch sees first; empty where there is no answer.

    Through the driver's own program, because asking CUDA would open a context that takes memory.
    """
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0] or "0"
    answer = _output("nvidia-smi", f"--id={index}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    return dict(zip(fields, answer.split(", "), strict=False)) if answer else {}


def _processor() -> str:
    listed = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", listed.read_text(), re.MULTILINE) if listed.exists() else None
    return found[1] if found else platform.processor() or "unknown"


def plain(value: Any) -> Any:
    """Returns ``value`` as JSON can hold it: timings as dictionaries, NaN and infinity, which JSON lacks, by name."""
    value = tree_map_only(Timing, asdict, value)
    return tree_map_only(float, lambda found: found if math.isfinite(found) else str(found), value)


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """One JSON file, keys in the order given; whole or not at all, whenever the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(plain(dict(record)), indent=1, allow_nan=False) + "\n")
    unfinished.replace(path)
