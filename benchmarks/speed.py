"""How long a training step takes, and how many bytes it keeps: fastdense against torchvision, on this machine's CPU.

    python -m benchmarks.speed [--model densenet121] [--batch 8] [--size 128] [--threads 2] [--json FILE]

A provider whose output or gradients differ from torchvision's is reported and not timed.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import fastdense

from .peers import torchvision_densenet
from .runner import (
    RESULTS,
    Seconds,
    Timing,
    environment,
    in_fresh_processes,
    interleave,
    training_step,
    write_record,
)

TOLERANCE = 1e-9  # relative 2-norm of output and all gradients together, in float64


def providers(name: str) -> dict[str, torch.nn.Module]:
    """The networks to compare, all with the same weights, all channels last and in training mode."""
    theirs, ours = getattr(torchvision_densenet(), name), getattr(fastdense, name)
    models = {
        "torchvision": theirs(),
        "torchvision memory_efficient": theirs(memory_efficient=True),
        "fastdense activations": ours(),
        "fastdense bottlenecks": ours(recompute="bottlenecks"),
    }
    weights = models["torchvision"].state_dict()
    for model in models.values():
        model.load_state_dict(weights)
        model.to(memory_format=torch.channels_last)
    return models


def step_in_float64(model: torch.nn.Module) -> torch.Tensor:
    """Output and all gradients of one step of a float64 copy on a small input, as one vector.

    In float32 two right implementations differ by a percent in a network this deep: a value within a rounding of 0
    switches a ReLU, and everything after it.
    """
    model = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(1)
    output = model(torch.randn(2, 3, 64, 64, generator=generator).double())
    output.backward(torch.randn(output.shape, generator=generator).double())
    found = [output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    return torch.cat([tensor.flatten() for tensor in found])


def inputs(batch: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images, channels last, and a random cotangent of the class scores."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, size, size, generator=generator)
    return x.contiguous(memory_format=torch.channels_last), torch.randn(batch, 1000, generator=generator)


def measure(name: str, labels: list[str], batch: int, size: int, repeats: int, threads: int) -> Seconds:
    """Seconds of interleaved training steps of the providers named by ``labels``, in this process."""
    torch.set_num_threads(threads)
    x, cotangent = inputs(batch, size)
    steps = {label: training_step(model, x, cotangent) for label, model in providers(name).items() if label in labels}
    return interleave(steps, repeats=repeats)


def run(name: str, batch: int, size: int, repeats: int, threads: int, processes: int) -> dict[str, Any]:
    """Check, count bytes, time in ``processes`` fresh processes; returns the record."""
    torch.set_num_threads(threads)
    x, _ = inputs(batch, size)
    models = providers(name)
    want = step_in_float64(models["torchvision"])
    results: dict[str, dict[str, Any]] = {}
    for label, model in models.items():
        error = ((step_in_float64(model) - want).norm() / want.norm()).item()
        with fastdense.memory.saved_bytes(model) as kept:
            model(x)
        results[label] = {"relative_difference": error, "checked": error <= TOLERANCE, "bytes_kept": kept.bytes}
    right = [label for label, row in results.items() if row["checked"]]
    seconds = in_fresh_processes(measure, name, right, batch, size, repeats, threads, processes=processes)
    for label, phases in seconds.items():
        results[label] |= {phase: Timing.of(values) for phase, values in phases.items()}
    settings = {"model": name, "batch": batch, "size": size, "dtype": "float32", "layout": "channels_last"}
    return {**environment(), "settings": {**settings, "processes": processes}, "results": results}


def show(record: dict[str, Any], console: Console) -> None:
    """The record as a table; ratios are against torchvision's plain network."""
    settings = record["settings"]
    title = f"{settings['model']}, {settings['batch']} x {settings['size']}^2, float32, {record['threads']} threads"
    table = Table("", "step [ms]", "p20 - p80", "ratio", "kept [MB]", "ratio", title=title)
    base = record["results"]["torchvision"]
    for label, row in record["results"].items():
        kept, timing = row["bytes_kept"], row.get("step")
        cells = [f"not timed: differs by {row['relative_difference']:.1e}", "", ""]
        if isinstance(timing, Timing):
            cells = [
                f"{timing.median * 1e3:.0f}",
                f"{timing.p20 * 1e3:.0f} - {timing.p80 * 1e3:.0f}",
                f"{timing.median / base['step'].median:.2f}",
            ]
        table.add_row(label, *cells, f"{kept / 1e6:.1f}", f"{kept / base['bytes_kept']:.2f}")
    console.print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="densenet121", choices=[f"densenet{n}" for n in (121, 161, 169, 201)])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=128, help="height and width in pixels")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each provider in each process")
    parser.add_argument("--processes", type=int, default=5, help="fresh processes, one after another")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/cpu/speed-MODEL-BATCHxSIZE.json")
    options = parser.parse_args()
    console = Console()
    with console.status("checking, then timing"):
        record = run(options.model, options.batch, options.size, options.repeats, options.threads, options.processes)
    show(record, console)
    path = options.json or RESULTS / "cpu" / f"speed-{options.model}-{options.batch}x{options.size}.json"
    write_record(path, record)
    console.print(f"record: {path}")


if __name__ == "__main__":
    main()
