"""What every benchmark shares: check first, interleave, report medians, write a record."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Seconds = dict[str, dict[str, list[float]]]  # provider, phase, every round

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
SCHEMA = 1


@dataclass(frozen=True)
class Timing:
    """Seconds of one repeated measurement: median, 20th and 80th percentile, and how often it ran."""

    median: float
    p20: float
    p80: float
    repeats: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Summary of raw timings."""
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered))


def interleave(steps: Mapping[str, Callable[[], Mapping[str, float]]], *, repeats: int, warmup: int = 2) -> Seconds:
    """Run every step in turn, ``repeats`` times over, so that a drifting machine favours none.

    Args:
        steps: for each provider a function that runs one step and returns seconds by phase.
        repeats: counted rounds.
        warmup: rounds that are not counted.

    Returns:
        For each provider and phase the seconds of every counted round.
    """
    seconds: Seconds = {name: {} for name in steps}
    for round_ in range(warmup + repeats):
        for name, step in steps.items():
            phases = step()
            if round_ >= warmup:
                for phase, duration in phases.items():
                    seconds[name].setdefault(phase, []).append(duration)
    return seconds


def in_fresh_processes(measure: Callable[..., Seconds], *arguments: Any, processes: int) -> Seconds:
    """``measure(*arguments)`` in one new process after another, all seconds pooled.

    Where a process's memory comes to lie moves a whole run by several percent either way: one process is one sample.
    """
    pooled: Seconds = {}
    context = multiprocessing.get_context("spawn")
    for _ in range(processes):
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            for name, phases in pool.submit(measure, *arguments).result().items():
                for phase, values in phases.items():
                    pooled.setdefault(name, {}).setdefault(phase, []).extend(values)
    return pooled


def training_step(
    model: torch.nn.Module, x: torch.Tensor, cotangent: torch.Tensor
) -> Callable[[], Mapping[str, float]]:
    """One step without an optimizer: forward, and backward from a fixed random cotangent. CPU only."""

    def step() -> Mapping[str, float]:
        model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        output = model(x)
        middle = time.perf_counter()
        output.backward(cotangent)
        end = time.perf_counter()
        return {"forward": middle - start, "backward": end - middle, "step": end - start}

    return step


def environment(*, gpu: bool = False) -> dict[str, Any]:
    """Device, versions, commit, date and command: what a record needs to be reproduced.

    Args:
        gpu: whether the record is about the GPU, and not about the processor.
    """
    record = {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.executable).name, "-m", *sys.orig_argv[2:]]),
        "commit": _commit(),
        "sources": _sources(),
        "device": "cpu",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
    }
    if gpu:
        found = query_gpu("name", "driver_version")
        record |= {"device": found.get("name", "unknown GPU"), "driver": found.get("driver_version", "unknown")}
        record |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        record |= {"torchvision": _version("torchvision")}
    return record


def _commit() -> str:
    """What git says, or ``FASTDENSE_COMMIT`` where the checkout came without its history."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FASTDENSE_COMMIT", "unknown")


def _sources() -> str:
    """A fingerprint of the code itself: two records of one fingerprint measured the same, committed or not."""
    digest = hashlib.sha256()
    for path in sorted(
        path for folder in ("fastdense", "kernels", "benchmarks") for path in ROOT.glob(f"{folder}/**/*.py")
    ):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def query_gpu(*fields: str) -> dict[str, str]:
    """Fields of ``nvidia-smi --query-gpu`` for the GPU that PyTorch sees first; empty where there is no answer.

    Reads only. Through the driver's own program, because asking CUDA would open a context that takes memory.
    """
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0] or "0"
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in answer.strip().split(",")), strict=False))


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: timings as dictionaries, NaN and infinity, which JSON does not know, by name."""
    if isinstance(value, Timing):
        return asdict(value)
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """One JSON file, keys in the order given; whole or not at all, whenever the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(plain(dict(record)), indent=1, allow_nan=False) + "\n")
    unfinished.replace(path)
