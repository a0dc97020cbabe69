"""How many bytes a training step saves for backward and needs at its peak: fastdense against torchvision, on the CPU.

``python -m benchmarks.memory`` is ``fastdense bench memory``. What computes something else is left out.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator

import torch
from rich.table import Table

from .harness.options import Options
from .harness.providers import BASE, MODELS, PROVIDERS, NetworkSpec, Provider, cifar
from .harness.runner import Watch, fill, in_fresh_process
from .harness.training import Check, Step, attempt, build, count_bytes, images
from .report.tables import console_table
from .speed import OF_BYTES, Record, bytes_cells

DEPTHS_SIZE = 32  # pixels; CIFAR's images
GROWTH_RATE = 12  # of the networks of --depths


def networks(options: Options) -> dict[str, tuple[NetworkSpec, int]]:
    """Each network by its name, and the size of its images."""
    found = {name: (MODELS[name], options.size) for name in options.models}
    deep = {f"densenet-bc-{depth}": (cifar(depth, GROWTH_RATE), DEPTHS_SIZE) for depth in sorted(options.depths)}
    return found | deep


def measure(options: Options) -> Iterator[tuple[str, str, Record]]:
    """Yields network, label and row of each provider."""
    if options.threads:
        torch.set_num_threads(options.threads)
    for network, (spec, size) in networks(options).items():
        check = Check(spec, 2, min(size, 64), options)
        for name in options.labels():
            row = attempt(options.torch_device, _row, PROVIDERS[name], check, size, options)
            yield network, PROVIDERS[name].label, row


def _row(provider: Provider, check: Check, size: int, options: Options) -> Record:
    row = check(provider)
    if row["checked"]:
        x, cotangent = images(options.batch, size, check.spec.num_classes, options)
        row |= count_bytes(Step(build(provider, check.spec, options), x, cotangent, options.dtype))
    return row


def run(options: Options, watch: Watch = lambda record: None) -> Record:
    """Checks, then counts; see :func:`benchmarks.speed.run`."""
    record = options.new_record("memory", "batch", "size", models=list(networks(options)))
    if options.depths:
        depths = {f"densenet-bc-{depth}": depth for depth in sorted(options.depths)}
        record["settings"]["depths"] = {"of": depths, "size": DEPTHS_SIZE, "growth_rate": GROWTH_RATE}

    def add() -> Iterator[None]:
        for network, label, row in in_fresh_process(measure, options):
            record["results"].setdefault(network, {})[label] = row
            yield

    return fill(record, add(), watch)


def table(record: Record) -> Table:
    """The record as a table; ratios are against torchvision's plain network."""
    settings = record["settings"]
    deep = settings.get("depths", {"of": {}})
    lines = []
    for network, rows in record["results"].items():
        size = deep["size"] if network in deep["of"] else settings["size"]
        for label, row in rows.items():
            lines.append((f"{network}, {size}^2", label, *bytes_cells(row, rows.get(BASE, {}))))
    title = f"{settings['batch']} images, {settings['dtype']}, {settings['layout']}, {record['device']}"
    return console_table(title, ("", *OF_BYTES), lines, words=2)


def file_name(options: Options) -> str:
    """Of the record, without ``.json``."""
    size = options.size if options.models else DEPTHS_SIZE
    what = "memory" + ("-depths" if options.depths and not options.models else "")
    return f"{what}-{options.batch}x{size}{options.suffix()}"


if __name__ == "__main__":
    importlib.import_module("fastdense.cli.bench").bench(["memory", *sys.argv[1:]])
