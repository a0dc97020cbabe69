"""Single kernels of DenseNet-121: other launch configurations, hardware counters, and memory errors.

    ncu ... python -m benchmarks.gpu.kernels counters
    compute-sanitizer ... python -m benchmarks.gpu.kernels sanitizer

are what the stages ``counters`` and ``sanitizer`` run: each kernel once, on fresh random values.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from glob import glob
from itertools import product
from operator import itemgetter
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import Tensor

from fastdense.kernels import launch

from ..compiled import traffic
from ..harness.runner import ROOT, Timing
from .machine import device_timing, measured_rates, synchronize
from .primitives import METHOD, Case, Primitive, errors, expected, passes
from .run import ERROR_CHARACTERS, Job, Skip, brief

BATCH, SIZE = 64, 224
DTYPE = torch.bfloat16
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SECONDS_A_ROW = 3.0  # the most that one row takes: its kernel may have to be compiled
CACHE_BYTES = 60 << 20  # more than the largest cache: what a replay reads has left it
GRAPH_MS = 5  # that the launches of one graph take together

Change = dict[str, Any]
REHEARSED = {Case("forward 1x1", traffic.Shape(128, 16, 32, 1, 2), 2, 32): [{}, {"num_warps": 8}, {}]}


_OPTIONS = {"w": "num_warps", "s": "num_stages", "g": "group"}


def _tiles(listed: str, **more: Any) -> list[Change]:
    """Of ``"64x32x128 w4 s3, ..."``: rows of a tile, channels, products; then warps, stages, group."""
    found = []
    for tile, *options in map(str.split, listed.split(", ")):
        change: Change = dict(zip(("block_m", "block_c", "block_k"), map(int, tile.split("x")), strict=True))
        found.append(change | {_OPTIONS[option[0]]: int(option[1:]) for option in options} | more)
    return found


def _grid(**values: tuple[int, ...]) -> list[Change]:
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


_OUT: Change = {"resolved": True}  # the lazy gradient written out first
# Of each operation: what is tried beside the table's own choice.
CHANGES: dict[str, list[Change]] = {
    "forward 1x1": _tiles("64x64x64 w4 s3, 64x64x64 w4 s4, 64x32x64 w4 s3, 64x64x128 w4 s4, 32x64x128 w4 s3, "
                          "64x32x128 w4 s4, 64x128x64 w4 s3, 128x64x64 w8 s3"),
    "forward 3x3": [*_tiles("64x128x32 w4 s2, 128x64x32 w8 s3, 128x64x32 w4 s3, 32x64x32 w4 s3, 64x64x32 w4 s4, "
                            "32x128x32 w4 s3, 64x64x16 w4 s3"), {"form": "scratch"}],
    "backward 1x1": [_OUT, *_tiles("64x64x128 w8 s3, 64x64x128 w4 s3, 64x64x128 w4 s2, 128x64x128 w8 s2, "
                                   "64x32x128 w4 s3, 32x64x128 w4 s3", **_OUT), *_tiles("64x64x128 w8 s4")],
    "backward 3x3": [_OUT, *_tiles("64x64x32 w4 s3, 32x64x32 w4 s3, 128x64x32 w8 s3, 64x128x32 w8 s3", **_OUT),
                     *({**size, **_OUT} for size in _grid(weight_block_c=(64,)) + _grid(weight_block_m=(32, 128)))],
    traffic.MOMENTS: _grid(programs_per_sm=(2, 8), block_m=(32, 64))
                     + _grid(programs_per_sm=(2, 4), block_m=(128,), num_warps=(8,)),
    traffic.MAX_POOL[0]: _grid(programs_per_sm=(2, 4, 8), block_m=(16, 32)),
    traffic.MAX_POOL[1]: _grid(programs_per_sm=(2, 4), block_m=(16, 32)),
    traffic.TRANSITION[0]: _tiles("64x32x128 w8 s2, 64x64x128 w8 s2, 32x64x128 w4 s2, 32x64x64 w4 s2, "
                                  "32x32x64 w4 s2, 16x64x128 w4 s1"),
    traffic.TRANSITION[1]: _tiles("32x32x64 w4 s2 g4, 64x32x64 w8 s1 g4, 32x64x64 w8 s1 g2, 32x32x64 w8 s1 g4"),
}  # fmt: skip
OPERATION = METHOD | dict(  # of the launch table
    zip((traffic.MOMENTS, *traffic.MAX_POOL), ("copy", "max_pool", "pool_backward"), strict=True)
)


def cases() -> Iterator[Case]:
    """Yields each main kernel in the middle layer of each block of DenseNet-121, then those round the blocks."""
    network = traffic.NETWORKS["densenet121"]
    k, wide = network.growth_rate, network.growth_rate * (network.bn_size or 1)
    for layers, block in zip(network.layers, traffic.blocks(network, BATCH, SIZE), strict=True):
        reads = block.entering + layers // 2 * k
        for name in (*traffic.FORWARD, *traffic.BACKWARD):
            shape = (reads, wide, 1) if name.endswith("1x1") else (wide, k, 9)
            yield Case(name, traffic.Shape(block.m, *shape, DTYPE.itemsize), BATCH, block.leaving)
    for name, _, around, _ in traffic.around(network, BATCH, SIZE, DTYPE.itemsize):
        if name in CHANGES:
            yield Case(name, around, BATCH, around.reads)


def tried() -> dict[Case, list[Change]]:
    """Returns the changes that are tried in each case.

    The table's own choice comes first and last: a difference smaller than between those two is noise.
    """
    return {case: [{}, *CHANGES[case.operation], {}] for case in cases()}


def candidates(job: Job) -> None:
    """Checks, then times everything; ``rows`` is complete up to where the time ran out."""
    job.result["rows"] = []
    rates = measured_rates(job)
    for case, changes in (REHEARSED if job.rehearsal else tried()).items():
        bound = None
        for change in changes:
            if job.seconds_left() < SECONDS_A_ROW:
                return
            bound = bound or _bound(case, job)
            row = {"operation": case.operation, **case.shape._asdict(), "change": change}
            try:
                with launch.override(OPERATION[case.operation], **change):
                    row |= _row(*bound, job)
            except Exception as error:  # one kernel that does not compile must not take the others' times with it
                synchronize(job.device)  # raises if it has broken the device's context: nothing more can be measured
                row |= {"checked": False, "error": brief(error)}
            if rates is not None:
                row["floor_seconds"] = traffic.floor_seconds(*case.floor, *rates)
            job.result["rows"].append(row)
            job.save()


def _bound(case: Case, job: Job) -> tuple[list[Primitive], dict[str, Tensor]]:
    """Binds the primitive to as many sets of tensors as no cache can hold; returns them and the first one's results."""
    dtype = torch.float16 if job.rehearsal else DTYPE  # which the interpreter has no arithmetic for
    count = 1 if job.rehearsal else max(2, math.ceil(CACHE_BYTES / case.floor.bytes) + 1)
    sets = [Primitive(case, dtype, job.device) for _ in range(count)]
    return sets, expected(sets[0])


def _row(sets: list[Primitive], want: dict[str, Tensor], job: Job) -> dict[str, Any]:
    """Errors of a run on the first set; if they are small enough, the time of a launch."""
    found = errors(sets[0], want)
    row: dict[str, Any] = {"checked": passes(found, sets[0].dtype), "worst": max(found.items(), key=itemgetter(1))}
    if row["checked"] and job.rehearsal:
        row["timing"] = device_timing(sets[0], job.device)
    elif row["checked"]:  # from replays of a graph of many launches: the host takes no part
        from triton.testing import do_bench_cudagraph  # needs a GPU's driver

        def all_in_turn() -> None:
            for one in sets:
                one()

        times = do_bench_cudagraph(all_in_turn, rep=GRAPH_MS, return_mode="all")
        row["timing"] = Timing.of([ms / 1e3 / len(sets) for ms in times])
    return row


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
PLACES = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute/*", "/opt/cuda/bin")  # of NVIDIA's tools, beside the path
SANITIZERS = ("memcheck", "racecheck")
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")


def counted() -> list[Case]:
    """Returns the cases whose kernels are counted: the middle layers of the first block and of the third."""
    listed = list(cases())
    return listed[:4] + listed[8:12]


def sanitized() -> Iterator[Case]:
    """Yields every primitive at 2 images of 7 x 7 (a transition's of 14 x 14), with channels that fill no tile."""
    for operation in (traffic.COPY, *traffic.FORWARD, *traffic.BACKWARD, *traffic.AROUND):
        widths = {"1x1": (20, 40, 1), "3x3": (40, 12, 9)}.get(operation[-3:], (20, 20, 1))
        if operation in traffic.TRANSITION:
            widths = 20, 12, 1
        yield Case(operation, traffic.Shape(2 * 7 * 7, *widths, 2), 2, 44)


def counters(job: Job) -> None:
    """Records a row for each launch of the four main kernels: what each one waits for."""
    if job.rehearsal:
        raise Skip("nothing is counted in a rehearsal")
    options = ["--clock-control", "none", "--csv", "--kernel-name", "regex:bn_relu_conv", "--print-units", "base"]
    status, said = _under("ncu", [*options, "--metrics", ",".join(METRICS)], "counters", job.seconds_left() - 2)
    job.result["rows"] = list(rows(said))
    if not job.result["rows"]:
        raise RuntimeError(f"ncu counted nothing, exit status {status}: {said[-ERROR_CHARACTERS:]}")


def rows(printed: str) -> Iterator[dict[str, Any]]:
    """Yields the launches of what ncu printed as CSV, beside the cases that they belong to."""
    found: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for line in csv.DictReader(io.StringIO("".join(printed.partition('"ID"')[1:]))):
        if line.get("Metric Name") in METRICS:
            value = float((line["Metric Value"] or "nan").replace(",", ""))
            found[line["ID"]] |= {"kernel": line["Kernel Name"], METRICS[line["Metric Name"]]: value}
    for case, row in zip(counted(), found.values(), strict=False):
        yield {"operation": case.operation, **case.shape._asdict(), **row}


def sanitizer(job: Job) -> None:
    """Looks for accesses out of bounds, and for races in shared memory: each with half of the time."""
    if job.rehearsal:
        run_once(sanitized(), [torch.float16], job.device)
        job.result["primitives"] = len(list(sanitized()))
        return
    wrong = []
    for left, name in zip((2, 1), SANITIZERS, strict=True):
        status, said = _under("compute-sanitizer", ["--tool", name], "sanitizer", (job.seconds_left() - 3) / left)
        summaries = [] if status is None else SUMMARY.findall(said)
        found = int("".join(summaries[-1])) if summaries else None
        job.result[name] = {"exit": status, "found": found, "ran": said.count("ran "), "said": said[-ERROR_CHARACTERS:]}
        job.save()
        if found != 0:
            wrong.append(f"{name}: {found} found, exit status {status}")
    if wrong:
        raise RuntimeError("; ".join(wrong))


def run_once(cases: Iterable[Case], dtypes: Iterable[torch.dtype], device: torch.device) -> None:
    """Runs every primitive once in each dtype."""
    for dtype, case in product(dtypes, cases):
        primitive = Primitive(case, dtype, device)
        primitive.reset()
        primitive()
        synchronize(device)
        print(f"ran {case.operation} in {dtype}", flush=True)


def _under(tool: str, options: list[str], what: str, seconds: float) -> tuple[int | None, str]:
    """Runs ``what`` of this module under a tool; returns its exit status (``None`` if its time was up) and its output.

    Raises:
        Skip: the tool is not installed.
    """
    places = [os.environ["PATH"], *(place for pattern in PLACES for place in sorted(glob(pattern)))]
    if (found := shutil.which(tool, path=os.pathsep.join(places))) is None:
        raise Skip(f"{tool} is not installed here")
    command = [found, *options, sys.executable, "-m", "benchmarks.gpu.kernels", what]
    # Under the sanitizer every tensor has bounds of its own.
    environment = os.environ | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if what == "sanitizer" else {})
    run = partial(subprocess.call, command, cwd=ROOT, env=environment, timeout=max(seconds, 1.0))
    with TemporaryFile("w+", errors="replace") as output:
        try:
            status = run(stdout=output, stderr=output)
        except subprocess.TimeoutExpired:
            status = None
        output.seek(0)
        return status, output.read()


if __name__ == "__main__":
    chosen, dtypes = (sanitized(), DTYPES) if sys.argv[1:] == ["sanitizer"] else (counted(), (DTYPE,))
    run_once(chosen, dtypes, torch.device("cuda"))
