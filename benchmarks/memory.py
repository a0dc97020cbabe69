"""How many bytes a training step keeps and needs at its peak: fastdense against torchvision, on this machine's CPU.

    python -m benchmarks.memory [--models densenet121 densenet201] [--batch 8] [--size 224] [--json FILE]

Bytes do not depend on the machine's speed or load. A provider whose output or gradients differ from torchvision's is
reported and not measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastdense.memory import peak_bytes, saved_bytes

from .runner import RESULTS, environment, write_record
from .speed import TOLERANCE, inputs, providers, step_in_float64


def measure(model: torch.nn.Module, batch: int, size: int) -> dict[str, int]:
    """Bytes of one training step in float32 without parameters, their gradients, and the input.

    ``bytes_kept`` is what the forward pass keeps for backward; ``bytes_peak`` the most that there is at one time.
    """
    x, cotangent = inputs(batch, size)
    with saved_bytes(model, x) as kept:
        output = model(x)
    del output
    with peak_bytes("cpu") as peak:
        model(x).backward(cotangent)
    found = {"bytes_kept": kept.bytes, "bytes_peak": peak.without(model)}
    model.zero_grad(set_to_none=True)
    return found


def run(models: list[str], batch: int, size: int) -> dict[str, Any]:
    """Check, then measure; returns the record."""
    results: dict[str, dict[str, Any]] = {}
    for name in models:
        networks = providers(name)
        want = step_in_float64(networks["torchvision"])
        for label, model in networks.items():
            error = ((step_in_float64(model) - want).norm() / want.norm()).item()
            row: dict[str, Any] = {"relative_difference": error, "checked": error <= TOLERANCE}
            results.setdefault(name, {})[label] = row | (measure(model, batch, size) if row["checked"] else {})
    settings = {"models": models, "batch": batch, "size": size, "dtype": "float32", "layout": "channels_last"}
    return {**environment(), "settings": settings, "results": results}


def show(record: dict[str, Any], console: Console) -> None:
    """The record as a table; ratios are against torchvision's plain network."""
    settings = record["settings"]
    table = Table("", "", "kept [MB]", "ratio", "peak [MB]", "ratio")
    table.title = f"{settings['batch']} x {settings['size']}^2, float32"
    for name, rows in record["results"].items():
        base = rows["torchvision"]
        for label, row in rows.items():
            cells = [f"not measured: differs by {row['relative_difference']:.1e}", "", "", ""]
            if row["checked"]:
                pairs = ((row[key], base[key]) for key in ("bytes_kept", "bytes_peak"))
                cells = [cell for bytes_, most in pairs for cell in (f"{bytes_ / 1e6:.1f}", f"{bytes_ / most:.2f}")]
            table.add_row(name, label, *cells)
    console.print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").splitlines()[0])
    names = [f"densenet{n}" for n in (121, 161, 169, 201)]
    parser.add_argument("--models", nargs="+", default=["densenet121", "densenet201"], choices=names)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, help="height and width in pixels")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/cpu/memory-BATCHxSIZE.json")
    options = parser.parse_args()
    console = Console()
    with console.status("checking, then measuring"):
        record = run(options.models, options.batch, options.size)
    show(record, console)
    path = options.json or RESULTS / "cpu" / f"memory-{options.batch}x{options.size}.json"
    write_record(path, record)
    console.print(f"record: {path}")


if __name__ == "__main__":
    main()
