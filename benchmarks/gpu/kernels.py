"""Each kernel at a network's layer shapes against its floor, and launch configurations that may be better."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch

from fastdense.kernels import launch

from .. import traffic
from ..traffic import Network
from .case import Case
from .machine import measured_rates
from .measure import device_timing, host_seconds, state, synchronize
from .primitives import check, passes
from .stage import Job

NETWORKS = ("densenet121", "densenet201")
BATCH, SIZE = 64, 224
DTYPES = (torch.bfloat16, torch.float16)
REHEARSED = Network(8, (1, 1), 16)  # at 2 images of 16 x 16 pixels
SECONDS_A_ROW = 8.0  # the most that one row takes: its kernels may have to be compiled

# Fields of a configuration that an operation does not read.
ONLY_CONVOLUTIONS = ("block_k", "form", "group", "weight_block_m", "weight_block_c")
UNUSED = {"bn_relu_conv": ("group", "weight_block_m", "weight_block_c"), "bn_relu_conv_backward": ("form",)}

Occurrences = dict[str, int]  # network: times a step


def floor(case: Case) -> traffic.Traffic:
    """What a case must move and compute at least."""
    return traffic.primitive(case.operation, case.shape, window=2**case.dims)


def cases(networks: dict[str, Network], batch: int, size: int) -> dict[Case, Occurrences]:
    """Every primitive of the networks at 16 bit, with how often a training step of each network runs it.

    The first network's come first, and among one network's those with the most to do.
    """
    found: dict[tuple[str, traffic.Shape], tuple[Case, Occurrences]] = {}
    for name, network in networks.items():
        widths = [block.leaving for block in traffic.blocks(network, batch, size)]
        listed = traffic.operations(network, batch, size, itemsize=2)
        listed += [o for o in traffic.around(network, batch, size, itemsize=2) if o.name not in traffic.STEM]
        for operation in sorted(listed, key=lambda o: -o.times * traffic.primitive(o.name, o.shape).bytes):
            own = (
                operation.block == 0 or operation.name in traffic.TRANSITION
            )  # they read a buffer as wide as they need
            width = operation.shape.reads if own else widths[operation.block - 1]
            case = Case(operation.name, operation.shape, batch, width)
            _, times = found.setdefault((operation.name, operation.shape), (case, {}))
            times[name] = times.get(name, 0) + operation.times
    return dict(found.values())


# A transition's launches differ with its windows and outputs: one in 3D, and one wider than all in the networks.
MORE_TRANSITIONS = tuple(
    Case(operation, traffic.Shape(pixels, reads, writes, 1, 2), batch=4, width=reads, dims=dims)
    for pixels, reads, writes, dims in ((4 * 16**3, 256, 128, 3), (4 * 64**2, 1024, 512, 2))
    for operation in traffic.TRANSITION
)


def _cases(job: Job) -> dict[Case, Occurrences]:
    if job.rehearsal:
        return cases({"rehearsed": REHEARSED}, batch=2, size=16)
    return cases({name: traffic.NETWORKS[name] for name in NETWORKS}, BATCH, SIZE)


def measure(job: Job) -> None:
    """Check, then time every case; ``rows`` is complete up to where the time ran out."""
    job.result |= {"before": state(job.device), "rows": [], "not_reached": 0}
    dtypes = DTYPES[1:] if job.rehearsal else DTYPES
    todo = [(dtype, case, times) for dtype in dtypes for case, times in _cases(job).items()]
    for number, (dtype, case, times) in enumerate(todo):
        if job.seconds_left() < SECONDS_A_ROW:
            job.result["not_reached"] = len(todo) - number
            break
        job.result["rows"].append(_row(job, case, dtype) | {"times": times})
        if number % 8 == 0:  # writing the whole file for every row would take longer than the row
            job.save()
    job.result["after"] = state(job.device)


def _row(job: Job, case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """One case: its errors; if they are small enough its times, beside the floor that the measured rates imply."""
    moved = floor(case)
    row: dict[str, Any] = {"operation": case.operation, "dtype": str(dtype).removeprefix("torch.")}
    row |= {**case.shape._asdict(), "width": case.width, "bytes": moved.bytes, "flops": moved.flops}
    try:
        primitive, errors = check(case, dtype, job.device, "triton")
    except Exception as error:  # one kernel that does not compile must not take the others' times with it
        synchronize(job.device)  # raises if it has broken the device's context: nothing more can be measured here
        return row | {"checked": False, "error": f"{type(error).__name__}: {error}"[:500]}
    row |= {"checked": passes(errors, dtype), "errors": errors}
    if not row["checked"]:
        return row
    row["timing"] = device_timing(primitive, job.device)
    row["host_seconds"] = host_seconds(primitive, job.device)
    if (rates := measured_rates(job, dtype)) is not None:
        row["floor_seconds"] = traffic.floor_seconds(*moved, *rates)
    return row


@contextmanager
def _looked_up() -> Iterator[dict[str, Any]]:
    """The launch table's operations that are looked up within the ``with``, and their configurations."""
    used: dict[str, Any] = {}
    before = launch.configuration

    def record(op: str, *arguments: Any) -> Any:
        used[op] = before(op, *arguments)
        return used[op]

    launch.configuration = record
    try:
        yield used
    finally:
        launch.configuration = before


def neighbours(op: str, config: Any) -> Iterator[dict[str, Any]]:
    """Every change of one field to the next smaller or larger value that a kernel may take, and every other form."""
    for field in [field for field in fields(config) if field.name not in UNUSED.get(op, ONLY_CONVOLUTIONS)]:
        value = getattr(config, field.name)
        if field.name == "form":
            yield from ({"form": form} for form in launch.FORMS if form != value)
            continue
        least = 16 if "block" in field.name else 1
        steps = (value - 1, value + 1) if field.name == "num_stages" else (value // 2, value * 2)
        for changed in steps:
            if changed >= least:
                yield {field.name: changed}


def _variant(case: Case) -> tuple[str, str]:
    """What the launch table tells apart among cases of one operation."""
    if case.operation not in traffic.TRANSITION:
        return case.operation, ""
    op = "bn_relu_conv" if case.operation == traffic.TRANSITION[0] else "bn_relu_conv_backward"
    m, reads, writes, taps, _ = case.shape
    return case.operation, launch._variant(op, launch.Shape(m, reads, writes, taps, window=2**case.dims))


def _largest(job: Job) -> list[Case]:
    """Of each variant the case that loses most above its floor, or moves most where nothing was timed."""
    measured = {
        (row["operation"], row["m"], row["reads"]): row["timing"]["median"] - row.get("floor_seconds", 0.0)
        for row in job.earlier.get("kernels", {}).get("rows", [])
        if "timing" in row and row["dtype"] == "bfloat16"
    }
    found = dict(_cases(job))
    if not job.rehearsal:
        found |= {case: {"": 1} for case in MORE_TRANSITIONS}
    chosen: dict[tuple[str, str], tuple[float, Case]] = {}
    for case, times in found.items():
        moved = floor(case).bytes * 1e-15
        lost = max(times.values()) * measured.get((case.operation, case.shape.m, case.shape.reads), moved)
        if _variant(case) not in chosen or chosen[_variant(case)][0] < lost:
            chosen[_variant(case)] = lost, case
    return [case for _, case in sorted(chosen.values(), key=lambda pair: -pair[0])]


def candidates(job: Job) -> None:
    """One field of the launch table changed at a time, for the largest case of each operation.

    The table's own choice is timed before and after its neighbours: a difference smaller than between those two is
    noise. Rows keep to the order in which they were measured.
    """
    job.result |= {"before": state(job.device), "rows": [], "not_reached": 0}
    todo = [iter(_variants(job, case)) for case in _largest(job)[: 2 if job.rehearsal else None]]
    while todo:  # in turn, so that a short run has tried something on every kernel
        for variants in list(todo):
            if job.seconds_left() < SECONDS_A_ROW:
                job.result["not_reached"] = len(todo)  # cases with untried configurations
                todo = []
                break
            row = next(variants, None)
            if row is None:
                todo.remove(variants)
                continue
            job.result["rows"].append(row)
            job.save()
    job.result["after"] = state(job.device)


def _variants(job: Job, case: Case) -> Iterator[dict[str, Any]]:
    """The table's choice, each of its neighbours for each kernel that the primitive launches, the table's choice."""
    with _looked_up() as used:
        first = _candidate(job, case)
    yield {"kernel": None, "change": {}, **first}
    for op, config in sorted(used.items()):
        for change in list(neighbours(op, config))[: 1 if job.rehearsal else None]:
            with launch.override(op, **change):
                row = _candidate(job, case)
            yield {"kernel": op, "change": change, **row}
    yield {"kernel": None, "change": {}, **_candidate(job, case)}


def _candidate(job: Job, case: Case) -> dict[str, Any]:
    row = _row(job, case, torch.float16 if job.rehearsal else torch.bfloat16)
    return {key: row[key] for key in ("operation", *case.shape._fields, "checked", "error", "timing") if key in row}
