"""Hardware counters of the four main kernels, by Nsight Compute: what each one waits for.

    ncu ... python -m benchmarks.gpu.counters

is what runs under the tool: each kernel once, in the middle layer of DenseNet-121's first block and of its third.
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..harness.runner import ROOT
from .candidates import DTYPE, cases
from .case import Case
from .measure import synchronize
from .primitives import bind
from .stage import ERROR_CHARACTERS, Job, Skip

PLACES = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute", "/opt/cuda/bin")
BLOCKS = (0, 2)  # of the network
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


def chosen() -> list[Case]:
    """The cases whose kernels are counted."""
    listed = list(cases())
    return [case for block in BLOCKS for case in listed[4 * block : 4 * block + 4]]


def find_tool(name: str) -> str | None:
    """A tool of CUDA's, on the path or where it is usually installed."""
    places = (path for place in PLACES for path in sorted(Path(place).glob(f"**/{name}")) if path.is_file())
    return shutil.which(name) or next(map(str, places), None)


def measure(job: Job) -> None:
    """One row for each launch under the tool."""
    if job.rehearsal:
        raise Skip("nothing is counted in a rehearsal")
    tool = find_tool("ncu")
    if tool is None:
        raise Skip("ncu is not installed here")
    command = [tool, "--clock-control", "none", "--csv", "--kernel-name", "regex:bn_relu_conv", "--print-units", "base"]
    command += ["--metrics", ",".join(METRICS), sys.executable, "-m", "benchmarks.gpu.counters"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=max(1.0, job.seconds_left() - 2),
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        said = late.stdout or b""
        raise RuntimeError("ncu did not finish: " + str(said)[-ERROR_CHARACTERS:]) from None
    job.result["rows"] = list(rows(done.stdout))
    if not job.result["rows"]:
        raise RuntimeError(f"ncu counted nothing: {done.stdout[-ERROR_CHARACTERS:]}")


def rows(printed: str) -> Iterator[dict[str, Any]]:
    """The launches of what ncu printed as CSV, beside the cases that they belong to."""
    start = printed.find('"ID"')
    found: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for line in csv.DictReader(io.StringIO(printed[start:] if start >= 0 else "")):
        if line.get("Metric Name") in METRICS:
            found[line["ID"]]["kernel"] = line["Kernel Name"]
            value = (line["Metric Value"] or "nan").replace(",", "")
            found[line["ID"]][METRICS[line["Metric Name"]]] = float(value)
    for case, row in zip(chosen(), found.values(), strict=False):
        yield {"operation": case.operation, **case.shape._asdict(), **row}


def main() -> None:
    """Run the kernels once; compiled code comes from Triton's cache."""
    device = torch.device("cuda")
    for case in chosen():
        primitive, _ = bind(case, DTYPE, device, "triton")
        primitive()
        synchronize(device)
        print(f"ran {case.operation}", flush=True)


if __name__ == "__main__":
    main()
