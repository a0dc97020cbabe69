"""Kernels under NVIDIA's tools: hardware counters by Nsight Compute, bounds and races by compute-sanitizer.

    ncu ... python -m benchmarks.gpu.tools counters
    compute-sanitizer ... python -m benchmarks.gpu.tools sanitizer

are what the two stages run: each kernel once, on fresh random values.
"""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ..compiled import traffic
from ..harness.runner import ROOT
from .candidates import DTYPE, cases
from .machine import synchronize
from .primitives import Case, bind
from .stage import ERROR_CHARACTERS, Job, Skip

PLACES = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute", "/opt/cuda/bin")
BLOCKS = (0, 2)  # of DenseNet-121: counted is the middle layer of its first block and of its third
_STALLS = ("barrier", "long_scoreboard", "short_scoreboard", "math_pipe_throttle", "mio_throttle", "lg_throttle",
           "wait", "not_selected", "no_instruction", "gmma", "sleeping", "membar")  # fmt: skip
METRICS = {
    "gpu__time_duration.sum": "nanoseconds",
    "dram__bytes_read.sum": "memory read", "dram__bytes_write.sum": "memory written",
    "lts__t_bytes.sum": "L2", "lts__t_sector_hit_rate.pct": "L2 hits %",
    "sm__inst_executed_pipe_tensor.sum": "tensor instructions", "smsp__inst_executed.sum": "instructions",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue slots %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps active %",
    "sm__cycles_active.avg": "cycles active", "sm__cycles_elapsed.avg": "cycles",
    "l1tex__data_bank_conflicts_pipe_lsu.sum": "bank conflicts",
    "launch__registers_per_thread": "registers", "launch__occupancy_limit_registers": "programs by registers",
    "launch__occupancy_limit_shared_mem": "programs by shared memory", "launch__waves_per_multiprocessor": "waves",
    **{f"smsp__average_warps_issue_stalled_{stall}_per_issue_active.ratio": f"stalled: {stall}" for stall in _STALLS},
}  # fmt: skip
SANITIZERS = ("memcheck", "racecheck")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FOUND = 9  # compute-sanitizer's exit status where it has found something
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")


def counted() -> list[Case]:
    """The cases whose kernels are counted."""
    listed = list(cases())
    return [case for block in BLOCKS for case in listed[4 * block : 4 * block + 4]]


def sanitized() -> Iterator[Case]:
    """Every primitive at 2 images of 7 x 7 (a transition's of 14 x 14), with channels that fill no tile."""
    m, k, bottleneck, entering = 2 * 7 * 7, 12, 40, 20
    widths = {"1x1": (entering, bottleneck, 1), "3x3": (bottleneck, k, 9)}
    for operation in (traffic.COPY, *traffic.FORWARD, *traffic.BACKWARD, *traffic.AROUND):
        reads, writes, taps = widths.get(operation[-3:], (entering, entering, 1))
        if operation in traffic.TRANSITION:
            writes = k
        yield Case(operation, traffic.Shape(m, reads, writes, taps, 2), 2, entering + 2 * k)


def counters(job: Job) -> None:
    """One row for each launch of the four main kernels: what each one waits for."""
    if job.rehearsal:
        raise Skip("nothing is counted in a rehearsal")
    options = ["--clock-control", "none", "--csv", "--kernel-name", "regex:bn_relu_conv", "--print-units", "base"]
    options += ["--metrics", ",".join(METRICS)]
    status, said = _under("ncu", options, "counters", job.seconds_left() - 2)
    job.result["rows"] = list(rows(said)) if status is not None else []
    if not job.result["rows"]:
        verdict = "did not finish" if status is None else "counted nothing"
        raise RuntimeError(f"ncu {verdict}: {said[-ERROR_CHARACTERS:]}")


def rows(printed: str) -> Iterator[dict[str, Any]]:
    """The launches of what ncu printed as CSV, beside the cases that they belong to."""
    start = printed.find('"ID"')
    found: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for line in csv.DictReader(io.StringIO(printed[start:] if start >= 0 else "")):
        if line.get("Metric Name") in METRICS:
            found[line["ID"]]["kernel"] = line["Kernel Name"]
            value = (line["Metric Value"] or "nan").replace(",", "")
            found[line["ID"]][METRICS[line["Metric Name"]]] = float(value)
    for case, row in zip(counted(), found.values(), strict=False):
        yield {"operation": case.operation, **case.shape._asdict(), **row}


def sanitizer(job: Job) -> None:
    """Accesses out of bounds, and races in shared memory: each with half of the time.

    Raises:
        RuntimeError: if one of the tools found something, or did not finish.
    """
    if job.rehearsal:
        job.result["primitives"] = run_once(sanitized(), DTYPES[1:2], job.device)
        return
    wrong = []
    for number, name in enumerate(SANITIZERS):
        options = ["--tool", name, "--error-exitcode", str(FOUND)]
        seconds = (job.seconds_left() - 3) / (len(SANITIZERS) - number)
        status, said = _under("compute-sanitizer", options, "sanitizer", seconds)
        summaries = [] if status is None else SUMMARY.findall(said)
        found = int("".join(summaries[-1])) if summaries else None
        job.result[name] = {"exit": status, "found": found, "ran": said.count("ran "), "said": said[-ERROR_CHARACTERS:]}
        job.save()
        if found != 0:
            wrong.append(f"{name}: {found} found, exit status {status}")
    if wrong:
        raise RuntimeError("; ".join(wrong))


def run_once(cases: Iterable[Case], dtypes: Iterable[torch.dtype], device: torch.device) -> int:
    """Run every primitive once in each dtype; how many."""
    count = 0
    for dtype, case in product(dtypes, cases):
        primitive = bind(case, dtype, device)
        primitive.reset()
        primitive()
        synchronize(device)
        print(f"ran {case.operation} in {dtype}", flush=True)
        count += 1
    return count


def find_tool(name: str) -> str | None:
    """A tool of CUDA's, on the path or where it is usually installed."""
    places = (path for place in PLACES for path in sorted(Path(place).glob(f"**/{name}")) if path.is_file())
    return shutil.which(name) or next(map(str, places), None)


def _under(tool: str, options: list[str], what: str, seconds: float) -> tuple[int | None, str]:
    """Run ``what`` of this module under a tool: its exit status (``None`` if its time was up), and what it said.

    Raises:
        Skip: where the tool is not installed.
    """
    if (found := find_tool(tool)) is None:
        raise Skip(f"{tool} is not installed here")
    command = [found, *options, sys.executable, "-m", "benchmarks.gpu.tools", what]
    # Under the sanitizer every tensor has bounds of its own.
    environment = os.environ | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if what == "sanitizer" else {})
    to: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "timeout": max(seconds, 1.0)}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, **to)
    except subprocess.TimeoutExpired as late:
        return None, (late.stdout or b"").decode(errors="replace")
    return done.returncode, done.stdout.decode(errors="replace")


if __name__ == "__main__":
    if sys.argv[1:] == ["sanitizer"]:
        run_once(sanitized(), DTYPES, torch.device("cuda"))
    else:
        run_once(counted(), [DTYPE], torch.device("cuda"))
