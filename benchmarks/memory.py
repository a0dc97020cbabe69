"""How many bytes a training step keeps and needs at its peak: fastdense against torchvision, on this machine's CPU.

    python -m benchmarks.memory [--models densenet121 densenet201] [--batch 8] [--size 224] [--depths 40 100 190]

`fastdense bench memory` is the same with all options. On the CPU bytes do not depend on the machine's speed or load. A
provider whose output or gradients differ from torchvision's is reported and not measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from .harness.options import Options
from .harness.providers import MODELS, PROVIDERS, NetworkSpec, cifar
from .harness.runner import RESULTS, environment, in_fresh_process, write_record
from .harness.training import Check, Step, attempt, build, count_bytes, images
from .speed import Record, bytes_cells, trouble

DEPTHS_SIZE = 32  # pixels; CIFAR's images
GROWTH_RATE = 12  # of the networks of --depths


def networks(options: Options) -> dict[str, tuple[NetworkSpec, int]]:
    """Each network by its name, and the size of its images."""
    found = {name: (MODELS[name], options.size) for name in options.models}
    deep = {f"densenet-bc-{depth}": (cifar(depth, GROWTH_RATE), DEPTHS_SIZE) for depth in sorted(options.depths)}
    return found | deep


def measure(options: Options) -> Iterator[tuple[str, str, Record]]:
    """Network, label and row of each provider."""
    if options.threads:
        torch.set_num_threads(options.threads)
    for network, (spec, size) in networks(options).items():
        x, cotangent = images(options.batch, size, spec.num_classes, options)
        check = Check(spec, 2, min(size, 64), options)
        for name in options.labels():
            provider = PROVIDERS[name]

            def count(provider: Any = provider, spec: NetworkSpec = spec, check: Check = check) -> Record:
                row: Record = dict(check(provider))
                if row["checked"]:
                    row |= count_bytes(Step(build(provider, spec, options), x, cotangent, options.dtype))  # noqa: B023
                return row

            yield network, provider.label, dict(attempt(count, options.torch_device))


def run(options: Options, watch: Callable[[Record], None] = lambda record: None) -> Record:
    """Check, then count; see :func:`benchmarks.speed.run`."""
    head = {**environment(gpu=options.torch_device.type == "cuda"), "kind": "memory", "complete": False}
    names = list(networks(options))
    settings: Record = {"models": names, "batch": options.batch, "size": options.size, **options.arithmetic()}
    if options.depths:
        depths = {f"densenet-bc-{depth}": depth for depth in sorted(options.depths)}
        settings["depths"] = {"of": depths, "size": DEPTHS_SIZE, "growth_rate": GROWTH_RATE}
    record: Record = {**head, "settings": settings, "results": {}}
    if options.threads:
        record["threads"] = options.threads
    try:
        for network, label, row in in_fresh_process(measure, options):
            record["results"].setdefault(network, {})[label] = row
            watch(record)
        record["complete"] = True
    except KeyboardInterrupt:
        pass
    return record


def table(record: Record) -> Table:
    """The record as a table; ratios are against torchvision's plain network."""
    settings = record["settings"]
    found = Table("", "", "kept [MB]", "ratio", "peak [MB]", "ratio", box=box.SIMPLE, pad_edge=False)
    found.title = f"{settings['batch']} images, {settings['dtype']}, {settings['layout']}, {record['device']}"
    for network, rows in record["results"].items():
        deep = settings.get("depths", {})
        size = deep["size"] if network in deep.get("of", {}) else settings["size"]
        base = rows.get("torchvision", {})
        for label, row in rows.items():
            found.add_row(f"{network}, {size}^2", label, *_cells(row, base))
    return found


def _cells(row: Record, base: Record) -> list[str]:
    return [words] if (words := trouble(row)) is not None else bytes_cells(row, base)


def file_name(options: Options) -> str:
    """Of the record, without ``.json``."""
    size = options.size if options.models else DEPTHS_SIZE
    what = "memory" + ("-depths" if options.depths and not options.models else "")
    return f"{what}-{options.batch}x{size}{options.suffix()}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["densenet121", "densenet201"], choices=list(MODELS))
    parser.add_argument("--depths", nargs="*", type=int, default=[], help="of CIFAR's DenseNet-BC: 6*n + 4")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, help="height and width in pixels")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/cpu/memory-BATCHxSIZE.json")
    arguments = parser.parse_args()
    models, depths = tuple(arguments.models), tuple(arguments.depths)
    options = Options(batch=arguments.batch, size=arguments.size, models=models, depths=depths)
    console = Console()
    with console.status("checking, then measuring"):
        record = run(options)
    console.print(table(record))
    path = arguments.json or RESULTS / "cpu" / f"{file_name(options)}.json"
    write_record(path, record)
    console.print(f"record: {path}")


if __name__ == "__main__":
    main()
