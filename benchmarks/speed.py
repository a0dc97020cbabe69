"""How long a training step takes, how many bytes it needs, and how many images a second: fastdense and its peers.

``python -m benchmarks.speed`` is ``fastdense bench speed``. A provider whose output or gradients differ from
torchvision's is reported and not timed.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Group

from .harness.options import Options
from .harness.providers import BASE, MODELS, PROVIDERS
from .harness.runner import Timing, Watch, fill, in_fresh_process, interleave
from .harness.training import Check, Step, attempt, build, count_bytes, images
from .report.tables import console_table, measured
from .report.tables import images as images_of

Record = dict[str, Any]
Event = tuple[str, int | None, Record]  # a provider; a batch of options.batches, or None; what was found
SWEEP_REPEATS = 3
OF_BYTES = ("", "kept [MB]", "ratio", "peak [MB]", "ratio")
STATUS = {"unavailable": "not available", "error": "failed"}


def measure(options: Options, names: list[str], first: bool) -> Iterator[Event]:
    """Yields one process's measurements of the providers ``names``, as they come; those that fail are left out.

    The ``first`` process checks and counts bytes too, and goes through ``options.batches``.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    device, spec = options.torch_device, MODELS[options.model]
    x, cotangent = images(options.batch, options.size, spec.num_classes, options)
    check = Check(spec, options.batch, options.size, options) if first else None
    steps: dict[str, Step] = {}

    def prepare(name: str) -> Record:
        step = Step(build(PROVIDERS[name], spec, options), x, cotangent, options.dtype)
        start = time.perf_counter()
        step()  # before the check, which compiles too
        seconds = time.perf_counter() - start
        row = check(PROVIDERS[name]) if check else {"checked": True}
        if row["checked"]:
            row |= {"first_seconds": seconds, **count_bytes(step)} if first else {}
            steps[name] = step
        return row

    for name in names:
        row = attempt(device, prepare, name)
        if first:
            yield name, None, row
    yield from _rounds(steps, options.repeats, None)
    for batch in options.batches if first else ():
        swept = images(batch, options.size, spec.num_classes, options)
        again = {name: Step(step.model, *swept, options.dtype) for name, step in steps.items()}
        yield from _rounds(again, SWEEP_REPEATS, batch)


def _rounds(steps: dict[str, Step], repeats: int, batch: int | None) -> Iterator[Event]:
    """Interleaved rounds, one event each; a provider that fails in one is left out of the next."""
    going = {name: partial(attempt, step.x.device, step) for name, step in steps.items()}
    for round_ in range(repeats):
        for name, values in interleave(going, repeats=1, warmup=int(round_ == 0)).items():
            found = {key: value[0] for key, value in values.items()}
            if "error" in found:
                del going[name]
            yield name, batch, found


def run(options: Options, watch: Watch = lambda record: None) -> Record:
    """Checks, counts bytes and times in fresh processes; returns the record. ``watch`` is shown it as it grows."""
    record = options.new_record("speed", "model", "batch", "size", "processes")
    return fill(record, _processes(options, record["results"]), watch)


def _processes(options: Options, rows: Record) -> Iterator[None]:
    """One process after another adds its timings to ``rows``; they share a torch.compile cache that was empty."""
    names = options.labels()
    samples: dict[tuple[str, int | None], list[dict[str, float]]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="fastdense-bench-", ignore_cleanup_errors=True) as folder,
        patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder),
    ):
        for process in range(options.processes):
            for name, batch, found in in_fresh_process(measure, options, names, process == 0):
                row = rows.setdefault(PROVIDERS[name].label, {})
                if batch is not None:
                    row = row.setdefault("batches", {}).setdefault(str(batch), {})
                if "step" in found:
                    seconds = samples.setdefault((name, batch), [])
                    seconds.append(found)
                    found = {phase: Timing.of([one[phase] for one in seconds]) for phase in found}
                    found["images_per_second"] = (batch or options.batch) / found["step"].median
                row |= found
                yield
            names = [name for name in names if "step" in rows.get(PROVIDERS[name].label, {})]


def table(record: Record) -> Group:
    """The record as two tables, times and bytes; ratios are against torchvision's plain network."""
    settings, results = record["settings"], record["results"]
    title = f"{settings['model']}, {images_of(settings)}, {record['threads']} threads, {record['device']}"
    base, sizes = results.get(BASE, {}), []
    times = [(label, *_times(row, base)) for label, row in results.items()]
    for label, row in measured(results, "bytes_kept").items():
        sizes.append((label, *bytes_cells(row, base), f"{row['first_seconds']:.1f}"))
    of_times = ("", "step [ms]", "p20 - p80", "ratio", "forward", "backward", "SGD", "images/s")
    return Group(console_table(title, of_times, times), console_table(None, (*OF_BYTES, "first step [s]"), sizes))


def _trouble(row: Record) -> str:
    """Why a row has no results, if it was to have some."""
    for status, words in STATUS.items():
        if status in row:
            return f"{words}: {row[status]}"
    return "" if row.get("checked", True) else f"not measured: differs by {row['relative_difference']:.1e}"


def _times(row: Record, base: Record) -> list[str]:
    if "step" not in row:
        return [_trouble(row)]
    step = row["step"]
    spread = f"{step.p20 * 1e3:.1f} - {step.p80 * 1e3:.1f}"
    ratio = f"{step.median / base['step'].median:.2f}" if "step" in base else ""
    parts = [f"{row[phase].median * 1e3:.1f}" for phase in ("forward", "backward", "optimizer")]
    return [f"{step.median * 1e3:.1f}", spread, ratio, *parts, f"{row['images_per_second']:.1f}"]


def bytes_cells(row: Record, base: Record) -> list[str]:
    """Saved bytes and peak, each with its ratio; or why there are none."""
    if "bytes_kept" not in row:
        return [_trouble(row)]
    cells = []
    for key in ("bytes_kept", "bytes_peak"):
        cells += [f"{row[key] / 1e6:.1f}", f"{row[key] / base[key]:.2f}" if key in base else ""]
    return cells


def file_name(options: Options) -> str:
    """Of the record, without ``.json``."""
    return f"speed-{options.model}-{options.batch}x{options.size}{options.suffix()}"


if __name__ == "__main__":
    importlib.import_module("fastdense.cli.bench").bench(["speed", *sys.argv[1:]])
