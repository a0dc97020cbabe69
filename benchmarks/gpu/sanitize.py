"""compute-sanitizer on every kernel at small, odd shapes: accesses out of bounds, and races in shared memory.

    python -m benchmarks.gpu.sanitize [--cpu]

is what runs under the tool: each primitive once in each dtype, on fresh random values.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import torch

from ..compiled import traffic
from ..harness.runner import ROOT
from .case import Case
from .counters import find_tool
from .measure import synchronize
from .primitives import bind
from .stage import ERROR_CHARACTERS, Job, Skip

TOOLS = ("memcheck", "racecheck")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FOUND = 9  # the tool's exit status where it has found something
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")


def cases() -> Iterator[Case]:
    """Every primitive at 2 images of 7 x 7 (a transition's of 14 x 14), with channels that fill no tile."""
    m, k, bottleneck, entering = 2 * 7 * 7, 12, 40, 20
    widths = {"1x1": (entering, bottleneck, 1), "3x3": (bottleneck, k, 9)}
    for operation in (traffic.COPY, *traffic.FORWARD, *traffic.BACKWARD, *traffic.AROUND):
        reads, writes, taps = widths.get(operation[-3:], (entering, entering, 1))
        if operation in traffic.TRANSITION:
            writes = k
        yield Case(operation, traffic.Shape(m, reads, writes, taps, 2), 2, entering + 2 * k)


def run_all(device: torch.device) -> int:
    """Run every primitive once in each dtype; how many."""
    count = 0
    for dtype in DTYPES if device.type == "cuda" else DTYPES[1:2]:
        for case in cases():
            primitive, _ = bind(case, dtype, device, "triton")
            primitive.poison()
            primitive()
            synchronize(device)
            print(f"ran {case.operation} in {dtype}", flush=True)
            count += 1
    return count


def check(job: Job) -> None:
    """Both tools in turn, each with half of the time.

    Raises:
        RuntimeError: if one of them found something, or did not finish.
    """
    if job.rehearsal:
        job.result["primitives"] = run_all(job.device)
        return
    tool = find_tool("compute-sanitizer")
    if tool is None:
        raise Skip("compute-sanitizer is not installed here")
    wrong = []
    for number, name in enumerate(TOOLS):
        seconds = (job.seconds_left() - 3) / (len(TOOLS) - number)
        status = job.result[name] = _under(tool, name, seconds)
        job.save()
        if status["found"] != 0:
            wrong.append(f"{name}: {status['found']} found, exit status {status['exit']}")
    if wrong:
        raise RuntimeError("; ".join(wrong))


def _under(tool: str, name: str, seconds: float) -> dict[str, int | str | None]:
    """How the tool ended, how many errors or hazards it counted (``None`` if it did not), the end of what it said."""
    command = [tool, "--tool", name, "--error-exitcode", str(FOUND), sys.executable, "-m", "benchmarks.gpu.sanitize"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that every tensor has bounds of its own
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=max(seconds, 1.0),
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        output: bytes | str = late.stdout or b""
        text = output if isinstance(output, str) else output.decode(errors="replace")
        return {"exit": None, "found": None, "ran": text.count("ran "), "said": text[-ERROR_CHARACTERS:]}
    counted = SUMMARY.findall(done.stdout)
    found = int(counted[-1][0] or counted[-1][1]) if counted else None
    said = done.stdout[-ERROR_CHARACTERS:]
    return {"exit": done.returncode, "found": found, "ran": done.stdout.count("ran "), "said": said}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.sanitize", description="run every kernel once")
    parser.add_argument("--cpu", action="store_true", help="in Triton's interpreter (TRITON_INTERPRET=1)")
    run_all(torch.device("cpu" if parser.parse_args().cpu else "cuda"))


if __name__ == "__main__":
    main()
