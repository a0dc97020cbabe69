"""Launch configurations of the main kernels at DenseNet-121's resolutions, timed by replaying graphs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastdense.kernels import launch

from ..compiled import traffic
from ..harness.runner import Timing
from .machine import device_timing, measured_rates, state, synchronize
from .primitives import Case, Primitive, bind, errors, expected, passes
from .stage import Job

BATCH = 64
DTYPE = torch.bfloat16
SECONDS_A_ROW = 3.0  # the most that one row takes: its kernel may have to be compiled
CACHE_BYTES = 60 << 20  # more than the largest cache: what a replay reads has left it
LAUNCHES, REPLAYS = 20, 5

Change = dict[str, Any]
REHEARSED: tuple[Change, ...] = ({}, {"num_warps": 8}, {})


def _tile(block_m: int, block_c: int, block_k: int, num_warps: int, num_stages: int, **more: Any) -> Change:
    tile = {"block_m": block_m, "block_c": block_c, "block_k": block_k}
    return {**tile, "num_warps": num_warps, "num_stages": num_stages, **more}


_OUT: Change = {"resolved": True}  # the lazy gradient written out first
# Of each operation: what is tried beside the table's own choice.
CHANGES: dict[str, tuple[Change, ...]] = {
    "forward 1x1": (
        _tile(64, 64, 64, 4, 3), _tile(64, 64, 64, 4, 4), _tile(64, 32, 64, 4, 3), _tile(64, 64, 128, 4, 4),
        _tile(32, 64, 128, 4, 3), _tile(64, 32, 128, 4, 4), _tile(64, 128, 64, 4, 3), _tile(128, 64, 64, 8, 3),
    ),
    "forward 3x3": (
        _tile(64, 128, 32, 4, 2), _tile(128, 64, 32, 8, 3), _tile(128, 64, 32, 4, 3), _tile(32, 64, 32, 4, 3),
        _tile(64, 64, 32, 4, 4), _tile(32, 128, 32, 4, 3), _tile(64, 64, 16, 4, 3), {"form": "scratch"},
    ),
    "backward 1x1": (
        _OUT, _tile(64, 64, 128, 8, 3, **_OUT), _tile(64, 64, 128, 4, 3, **_OUT), _tile(64, 64, 128, 4, 2, **_OUT),
        _tile(128, 64, 128, 8, 2, **_OUT), _tile(64, 32, 128, 4, 3, **_OUT), _tile(32, 64, 128, 4, 3, **_OUT),
        _tile(64, 64, 128, 8, 4),
    ),
    "backward 3x3": (
        _OUT, _tile(64, 64, 32, 4, 3, **_OUT), _tile(32, 64, 32, 4, 3, **_OUT), _tile(128, 64, 32, 8, 3, **_OUT),
        _tile(64, 128, 32, 8, 3, **_OUT), {"weight_block_c": 64, **_OUT}, {"weight_block_m": 32, **_OUT},
        {"weight_block_m": 128, **_OUT},
    ),
    traffic.MOMENTS: (
        *({"programs_per_sm": n, "block_m": m} for n in (2, 8) for m in (32, 64)),
        *({"programs_per_sm": n, "block_m": 128, "num_warps": 8} for n in (2, 4)),
    ),
    traffic.MAX_POOL[0]: tuple({"programs_per_sm": n, "block_m": m} for n in (2, 4, 8) for m in (16, 32)),
    traffic.MAX_POOL[1]: tuple({"programs_per_sm": n, "block_m": m} for n in (2, 4) for m in (16, 32)),
    traffic.TRANSITION[0]: (
        _tile(64, 32, 128, 8, 2), _tile(64, 64, 128, 8, 2), _tile(32, 64, 128, 4, 2), _tile(32, 64, 64, 4, 2),
        _tile(32, 32, 64, 4, 2), _tile(16, 64, 128, 4, 1),
    ),
    traffic.TRANSITION[1]: (
        _tile(32, 32, 64, 4, 2, group=4), _tile(64, 32, 64, 8, 1, group=4), _tile(32, 64, 64, 8, 1, group=2),
        _tile(32, 32, 64, 8, 1, group=4),
    ),
}  # fmt: skip
OPERATION = {  # of the launch table
    **dict.fromkeys((*traffic.FORWARD, traffic.TRANSITION[0]), "bn_relu_conv"),
    **dict.fromkeys((*traffic.BACKWARD, traffic.TRANSITION[1]), "bn_relu_conv_backward"),
    **dict(zip((traffic.MOMENTS, *traffic.MAX_POOL), ("copy", "max_pool", "pool_backward"), strict=True)),
}


def cases(batch: int = BATCH, size: int = 224) -> Iterator[Case]:
    """Each main kernel in the middle layer of each of DenseNet-121's blocks, then what stands round the blocks."""
    network = traffic.NETWORKS["densenet121"]
    k, wide = network.growth_rate, network.growth_rate * (network.bn_size or 1)
    for layers, block in zip(network.layers, traffic.blocks(network, batch, size), strict=True):
        reads = block.entering + layers // 2 * k
        for name in (*traffic.FORWARD, *traffic.BACKWARD):
            shape = (reads, wide, 1) if name.endswith("1x1") else (wide, k, 9)
            yield Case(name, traffic.Shape(block.m, *shape, DTYPE.itemsize), batch, block.leaving)
    for name, _, around, _ in traffic.around(network, batch, size, DTYPE.itemsize):
        if name in CHANGES:
            yield Case(name, around, batch, around.reads)


def candidates() -> Iterator[tuple[Case, Change]]:
    """Everything that is tried, in turn over the cases.

    The table's own choice comes first and last: a difference smaller than between those two is noise.
    """
    for number in range(max(map(len, CHANGES.values())) + 2):
        for case in cases():
            changes: list[Change] = [{}, *CHANGES[case.operation], {}]
            if number < len(changes):
                yield case, changes[number]


def run_as(case: Case, change: Change) -> Any:
    """A ``with`` in which the launch table's choice for ``case`` is changed."""
    return launch.override(OPERATION[case.operation], **change) if change else nullcontext()


def measure(job: Job) -> None:
    """Check, then time everything; ``rows`` is complete up to where the time ran out."""
    job.result |= {"before": state(job.device), "rows": [], "not_reached": 0}
    todo = list(candidates())
    if job.rehearsal:
        todo = [(Case("forward 1x1", traffic.Shape(128, 16, 32, 1, 2), 2, 32), change) for change in REHEARSED]
    rates = measured_rates(job)
    bound: dict[Case, tuple[list[Primitive], dict[str, Tensor]]] = {}
    for number, (case, change) in enumerate(todo):
        if job.seconds_left() < SECONDS_A_ROW:
            job.result["not_reached"] = len(todo) - number
            break
        row = {"operation": case.operation, **case.shape._asdict(), "change": change}
        try:
            if case not in bound:
                bound[case] = _bound(case, job)
            with run_as(case, change):
                row |= _row(*bound[case], job)
        except Exception as error:  # one kernel that does not compile must not take the others' times with it
            synchronize(job.device)  # raises if it has broken the device's context: nothing more can be measured here
            row |= {"checked": False, "error": f"{type(error).__name__}: {error}"[:300]}
        if rates is not None:
            row["floor_seconds"] = traffic.floor_seconds(*case.floor, *rates)
        job.result["rows"].append(row)
        if number % 8 == 0:  # writing the whole file for every row would take longer than the row
            job.save()
    job.result["after"] = state(job.device)


def _bound(case: Case, job: Job) -> tuple[list[Primitive], dict[str, Tensor]]:
    """The primitive on as many sets of tensors as no cache can hold, and what the first one must find."""
    dtype = torch.float16 if job.rehearsal else DTYPE  # which the interpreter has no arithmetic for
    count = 1 if job.rehearsal else max(2, math.ceil(CACHE_BYTES / case.floor.bytes) + 1)
    sets = [bind(case, dtype, job.device) for _ in range(count)]
    return sets, expected(sets[0])


def _row(sets: list[Primitive], want: dict[str, Tensor], job: Job) -> dict[str, Any]:
    """Errors of a run on the first set; if they are small enough, the time of a launch."""
    found = errors(sets[0], want)
    checked = passes(found, sets[0].dtype)
    row: dict[str, Any] = {"checked": checked, "worst": max(found.items(), key=lambda pair: pair[1])}
    if checked:
        row["timing"] = _graph_timing(sets, job.device)
    return row


def _graph_timing(sets: list[Primitive], device: torch.device) -> Timing:
    """Seconds of one call, from replays of a graph of many: the host takes no part."""
    if device.type != "cuda":
        return device_timing(sets[0], device)
    for primitive in sets:
        primitive()
    rounds = max(1, LAUNCHES // len(sets))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for primitive in sets:
                primitive()
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    for mark in marks[:-1]:
        mark.record()
        graph.replay()
    marks[-1].record()
    synchronize(device)
    return Timing.of([a.elapsed_time(b) / 1e3 / (rounds * len(sets)) for a, b in pairwise(marks)])
