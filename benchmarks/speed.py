"""How long a training step takes, how many bytes it needs, and how many images a second: fastdense and its peers.

    python -m benchmarks.speed [--model densenet121] [--batch 8] [--size 128] [--threads 2] [--json FILE]

`fastdense bench speed` is the same with all options. A provider whose output or gradients differ from torchvision's is
reported and not timed.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console, Group
from rich.table import Table

from .harness.options import Options
from .harness.providers import MODELS, PROVIDERS, Provider
from .harness.runner import RESULTS, Seconds, Timing, environment, in_fresh_process, interleave, write_record
from .harness.training import Check, Step, attempt, build, count_bytes, images

Record = dict[str, Any]
Event = tuple[str, str, Any]  # what, whose, its value
SWEEP_REPEATS = 3
STATUS = {"unavailable": "not available", "error": "failed"}


def measure(options: Options, names: list[str], first: bool) -> Iterator[Event]:
    """One process's measurements of the providers ``names``, as they come.

    Args:
        options: what to measure.
        names: of providers; those that fail are told of and left out.
        first: whether to check and to count bytes too, and to go through ``options.batches``.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    device, spec = options.torch_device, options.spec
    x, cotangent = images(options.batch, options.size, spec.num_classes, options)
    check = Check(spec, options.batch, options.size, options) if first else None
    steps: dict[str, Step] = {}
    for name in names:
        provider = PROVIDERS[name]

        def prepare(provider: Provider = provider) -> Record:
            step = Step(build(provider, spec, options), x, cotangent, options.dtype)
            start = time.perf_counter()
            step()  # before the check, which compiles too
            seconds = time.perf_counter() - start
            row: Record = dict(check(provider)) if check else {"checked": True}
            if row["checked"]:
                row |= {"first_seconds": seconds, **count_bytes(step)} if first else {}
                steps[provider.name] = step
            return row

        row = attempt(prepare, device)
        if first:
            yield "row", name, row
    yield from _rounds(steps, options.repeats, "rounds")
    for batch in options.batches if first else ():
        x, cotangent = images(batch, options.size, spec.num_classes, options)
        again = {name: Step(step.model, x, cotangent, options.dtype) for name, step in steps.items()}
        yield from _rounds(again, SWEEP_REPEATS, f"batch {batch}")


def _rounds(steps: dict[str, Step], repeats: int, what: str) -> Iterator[Event]:
    """Interleaved rounds, one event each; a provider that fails in one is left out of the next."""
    failed: set[str] = set()

    def run(name: str, step: Step) -> dict[str, float]:
        found = attempt(step, step.x.device)
        if "error" in found:
            failed.add(name)
        return dict(found)

    for round_ in range(repeats):
        going = {name: lambda name=name, step=step: run(name, step) for name, step in steps.items()}
        going = {name: step for name, step in going.items() if name not in failed}
        for name, phases in interleave(going, repeats=1, warmup=1 if round_ == 0 else 0).items():
            yield what, name, {phase: values[0] for phase, values in phases.items()}


class Progress:
    """A record that grows with every event."""

    def __init__(self, options: Options) -> None:
        gpu = options.torch_device.type == "cuda"
        self.options = options
        self.seconds: dict[str, Seconds] = {}
        settings = {**options.settings(), "processes": options.processes}
        head = {**environment(gpu=gpu), "kind": "speed", "complete": False}
        self.record: Record = {**head, "settings": settings, "results": {}}
        if options.threads:
            self.record["threads"] = options.threads

    def __call__(self, event: Event) -> None:
        """Put it into the record."""
        what, name, value = event
        row = self.record["results"].setdefault(PROVIDERS[name].label, {})
        if what == "row" or "error" in value:
            row |= value if what in ("row", "rounds") else {}
            if what.startswith("batch"):
                row.setdefault("batches", {})[what.removeprefix("batch ")] = value
            return
        phases = self.seconds.setdefault(what, {}).setdefault(name, {})
        for phase, duration in value.items():
            phases.setdefault(phase, []).append(duration)
        timings = {phase: Timing.of(values) for phase, values in phases.items()}
        batch = self.options.batch if what == "rounds" else int(what.removeprefix("batch "))
        found = {**timings, "images_per_second": batch / timings["step"].median}
        if what == "rounds":
            row |= found
        else:
            row.setdefault("batches", {})[str(batch)] = found


def run(options: Options, watch: Callable[[Record], None] = lambda record: None) -> Record:
    """Check, count bytes, time in fresh processes.

    Args:
        options: what to measure.
        watch: is shown the record whenever something has come in; it says ``complete`` at the end.

    Returns:
        The record. After Ctrl-C, what there is of it: then ``complete`` is false.
    """
    progress = Progress(options)
    names = options.labels()
    try:
        with _cold_compilers():
            for process in range(options.processes):
                for event in in_fresh_process(measure, options, names, process == 0):
                    progress(event)
                    watch(progress.record)
                rows = progress.record["results"]
                names = [name for name in names if "step" in rows.get(PROVIDERS[name].label, {})]
        progress.record["complete"] = True
    except KeyboardInterrupt:
        pass
    return progress.record


@contextmanager
def _cold_compilers() -> Iterator[None]:
    """The processes share a cache of what torch.compile made, which nobody has filled before: its time counts."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory(prefix="fastdense-bench-", ignore_cleanup_errors=True) as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before


def table(record: Record) -> Group:
    """The record as two tables, times and bytes; ratios are against torchvision's plain network."""
    settings, results = record["settings"], record["results"]
    on = threads_in_words(record["threads"]) if record["device"] == "cpu" else record["device"]
    what = f"{settings['model']}, {settings['batch']} x {settings['size']}^2"
    title = f"{what}, {settings['dtype']}, {settings['layout']}, {on}"
    times = _table("step [ms]", "p20 - p80", "ratio", "forward", "backward", "SGD", "images/s")
    sizes = _table("kept [MB]", "ratio", "peak [MB]", "ratio", "first step [s]")
    times.title, base = title, results.get("torchvision", {})
    for label, row in results.items():
        times.add_row(label, *_times(row, base))
        if "bytes_kept" in row:
            sizes.add_row(label, *bytes_cells(row, base), f"{row['first_seconds']:.1f}")
    return Group(times, sizes)


def threads_in_words(threads: int) -> str:
    """Of the CPU."""
    return f"{threads} CPU thread" + "s" * (threads != 1)


def _table(*columns: str) -> Table:
    found = Table("", box=box.SIMPLE, pad_edge=False)
    for column in columns:
        found.add_column(column, justify="right", overflow="fold")
    return found


def trouble(row: Record) -> str | None:
    """Why a row has no figures, if it has none."""
    for status, words in STATUS.items():
        if status in row and "step" not in row:
            return f"{words}: {row[status]}"
    return None if row.get("checked", True) else f"not measured: differs by {row['relative_difference']:.1e}"


def _times(row: Record, base: Record) -> list[str]:
    if (words := trouble(row)) is not None:
        return [words]
    if "step" not in row:
        return []
    step = row["step"]
    spread = f"{step.p20 * 1e3:.1f} - {step.p80 * 1e3:.1f}"
    ratio = f"{step.median / base['step'].median:.2f}" if "step" in base else ""
    parts = [f"{row[phase].median * 1e3:.1f}" for phase in ("forward", "backward", "optimizer")]
    return [f"{step.median * 1e3:.1f}", spread, ratio, *parts, f"{row['images_per_second']:.1f}"]


def bytes_cells(row: Record, base: Record) -> list[str]:
    """Kept and peak, each with its ratio."""
    cells = []
    for key in ("bytes_kept", "bytes_peak"):
        cells += [f"{row[key] / 1e6:.1f}", f"{row[key] / base[key]:.2f}" if key in base else ""]
    return cells


def file_name(options: Options) -> str:
    """Of the record, without ``.json``."""
    return f"speed-{options.model}-{options.batch}x{options.size}{options.suffix()}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="densenet121", choices=list(MODELS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=128, help="height and width in pixels")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each provider in each process")
    parser.add_argument("--processes", type=int, default=5, help="fresh processes, one after another")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/cpu/speed-MODEL-BATCHxSIZE.json")
    arguments = vars(parser.parse_args())
    path = arguments.pop("json")
    options = Options(**arguments)
    console = Console()
    with console.status("checking, then timing"):
        record = run(options)
    console.print(table(record))
    path = path or RESULTS / "cpu" / f"{file_name(options)}.json"
    write_record(path, record)
    console.print(f"record: {path}")


if __name__ == "__main__":
    main()
