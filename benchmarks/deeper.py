"""What a training step of a very deep network takes: peak resident memory of the process, bytes kept, seconds.

    python -m benchmarks.deeper [--depths 250 1000] [--steps 4] [--json FILE] [--png FILE]
    python -m benchmarks.deeper --train        # `fastdense train` at both depths, and how it ended

Unlike ``benchmarks.depth``, which counts bytes, this trains, on the CPU, each network in a process of its own, and asks
the operating system: what users see, with Python, PyTorch's libraries, what malloc does not give back, everything.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import fastdense
from fastdense.data import digits
from fastdense.memory import saved_bytes
from fastdense.train_config import layers_per_block

from .runner import RESULTS, Timing, environment, in_fresh_process, write_record

__all__ = ["NETWORKS", "Options", "main", "measure", "peak_resident", "run", "trained"]

NETWORKS: dict[str, dict[str, Any]] = {
    "textbook": {"impl": "reference"},
    "fastdense activations": {"impl": "torch", "recompute": "activations"},
    "fastdense bottlenecks": {"impl": "torch", "recompute": "bottlenecks"},
}
GROWTH_RATE = 12
SIZE = 8  # pixels of the digits
SAME = 1e-4  # relative, of the first loss in float32, after a thousand layers of rounding
TRAINED = {250: ("--epochs", "3"), 1000: ("--epochs", "2", "--lr", "0.01")}

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        depths: of DenseNet-BC with three equal blocks, ``6n + 4``.
        batch: images a step.
        steps: of each network; from the second on the momentum is there. The first is not timed.
        networks: keys of ``NETWORKS``.
    """

    depths: tuple[int, ...] = (250, 1000)
    batch: int = 32
    steps: int = 4
    networks: tuple[str, ...] = tuple(NETWORKS)

    def __post_init__(self) -> None:
        for depth in self.depths:
            layers_per_block(depth, bottleneck=True)
        if self.steps < 3:
            raise ValueError(f"steps must be at least 3: one that makes the momentum, two to time; got {self.steps}")
        if not 2 <= self.batch <= 1437:
            raise ValueError(f"batch must be 2 to 1437, the training images, got {self.batch}")
        unknown = [name for name in self.networks if name not in NETWORKS]
        if unknown:
            raise ValueError(f"networks must be of {', '.join(NETWORKS)}, got {', '.join(unknown)}")


def peak_resident() -> int:
    """The most bytes of memory that this process has had at one time (Linux: ``VmHWM``)."""
    try:  # ru_maxrss would hold what the process that started this one had
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return _maxrss(resource.getrusage(resource.RUSAGE_SELF))


# What the system says of an ended child may be the peak of the process that started it.
_NOTES_ITS_PEAK = f"""
import atexit, pathlib, sys
file, sys.path[:] = pathlib.Path(sys.argv.pop(1)), {sys.path!r}
from {__package__}.deeper import peak_resident
atexit.register(lambda: file.write_text(str(peak_resident())))
from fastdense.cli import main
sys.exit(main())
"""


def _maxrss(usage: resource.struct_rusage) -> int:
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(network: str, depth: int, pixels: Any, classes: Any, steps: int) -> Iterator[dict[str, Any]]:
    """One row of the record, for a fresh process: train ``steps`` steps, then count what a forward pass keeps.

    Args:
        network: a key of ``NETWORKS``.
        depth: ``6n + 4``.
        pixels, classes: the batch as NumPy arrays, so that this process need not import what they come from.
        steps: see :class:`Options`.
    """
    torch.set_num_threads(1)  # as `fastdense train` does for images of this size
    images, labels = torch.from_numpy(pixels), torch.from_numpy(classes)
    torch.manual_seed(0)
    n = layers_per_block(depth, bottleneck=True)
    model = fastdense.DenseNet(
        GROWTH_RATE,
        (n, n, n),
        2 * GROWTH_RATE,
        in_channels=1,
        num_classes=10,
        small_inputs=True,
        **NETWORKS[network],
    )
    # A rate at which nothing grows: without a warm-up, the usual one makes a thousand layers diverge in two steps.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, nesterov=True, weight_decay=1e-4)
    row: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "resident_start": peak_resident()}
    seconds, losses = [], []
    for step in range(steps):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
        del loss
        if step == 0:
            row["resident_first_step"] = peak_resident()
    row |= {"resident": peak_resident(), "first_loss": losses[0], "step": Timing.of(seconds[1:])}
    with saved_bytes(model, images, labels) as kept:
        loss = F.cross_entropy(model(images), labels)
    del loss
    yield row | {"bytes_kept": kept.bytes}


def run(options: Options, say: Say = lambda line: None) -> dict[str, Any]:
    """Every network at every depth, each in a fresh process; returns the record."""
    results: dict[str, dict[str, Any]] = {}
    data = digits(SIZE)
    batch = data.train_images[: options.batch].numpy(), data.train_labels[: options.batch].numpy()
    for depth in options.depths:
        rows = results.setdefault(str(depth), {})
        for network in options.networks:
            (row,) = in_fresh_process(measure, network, depth, *batch, options.steps)
            base = rows[next(iter(rows))]["first_loss"] if rows else row["first_loss"]
            difference = abs(row["first_loss"] - base) / abs(base)
            rows[network] = {**row, "relative_difference": difference, "checked": difference <= SAME}
            say(f"depth {depth}, {network}: {row['resident'] / 1e9:.2f} GB")
    settings = {"batch": options.batch, "size": SIZE, "growth_rate": GROWTH_RATE, "dtype": "float32"}
    settings |= {"steps": options.steps, "optimizer": "SGD with momentum", "load": _load()}
    return {**environment(), "kind": "deeper", "complete": True, "threads": 1, "settings": settings, "results": results}


def _load() -> float:
    """Processes that the machine was busy with, over fifteen minutes; this one is one of them."""
    return round(os.getloadavg()[2], 1)


def trained(depth: int, batch: int, options: Sequence[str], say: Say = lambda line: None) -> dict[str, Any]:
    """How ``fastdense train --depth DEPTH --recompute bottlenecks ...`` ends, and its peak resident memory.

    Raises:
        RuntimeError: the command failed; the message is its own.
    """
    with tempfile.TemporaryDirectory(prefix="fastdense-") as folder:
        metrics = Path(folder) / "metrics.jsonl"
        words = ["train", "--depth", str(depth), "--recompute", "bottlenecks", "--batch-size", str(batch), *options]
        say("fastdense " + " ".join(words))
        peak = Path(folder) / "peak"
        with (Path(folder) / "log").open("w+") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", _NOTES_ITS_PEAK, str(peak), *words, "--metrics", str(metrics)],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            if process.wait():
                log.seek(0)
                raise RuntimeError(f"fastdense train ended with {process.returncode}: {log.read()[-1000:]}")
        resident = int(peak.read_text())
        events = [json.loads(line) for line in metrics.read_text().splitlines()]
    (summary,) = (event for event in events if event["event"] == "summary")
    seconds = [event["seconds"] for event in events if event["event"] == "step"]
    losses = [event["loss"] for event in events if event["event"] == "step"]
    row = {key: summary[key] for key in ("steps", "train_loss", "test_loss", "test_accuracy", "kept_bytes")}
    row |= {"first_loss": losses[0], "last_loss": losses[-1], "losses": losses, "step": Timing.of(seconds)}
    return {"command": "fastdense " + " ".join(words), **row, "resident": resident}


def train_all(batch: int, say: Say = lambda line: None) -> dict[str, Any]:
    """The record of ``--train``."""
    results = {str(depth): trained(depth, batch, options, say) for depth, options in TRAINED.items()}
    settings = {"batch": batch, "size": SIZE, "growth_rate": GROWTH_RATE, "dtype": "float32", "load": _load()}
    return {**environment(), "kind": "deeper-train", "complete": True, "settings": settings, "results": results}


def show(record: dict[str, Any]) -> Table:
    """The record of ``run`` as a table."""
    table = Table("depth", "", "before", "first step", "peak resident", "kept", "a step")
    for depth, rows in record["results"].items():
        for label, row in rows.items():
            gigabytes = [f"{row[key] / 1e9:.2f} GB" for key in ("resident_start", "resident_first_step", "resident")]
            if not row["checked"]:
                label += f" (ITS LOSS DIFFERS by {row['relative_difference']:.1e})"
            table.add_row(depth, label, *gigabytes, f"{row['bytes_kept'] / 1e6:,.0f} MB", f"{row['step'].median:.2f} s")
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deeper", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--depths", nargs="+", type=int, default=[250, 1000], help="6n + 4 each")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--train", action="store_true", help="run `fastdense train` at depth 250 and 1000 instead")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/cpu/deeper.json or deeper-train.json")
    parser.add_argument("--png", type=Path, help="default: beside the record")
    given = parser.parse_args(arguments)
    console = Console()

    def say(line: str) -> None:
        console.print(line, style="dim", highlight=False)

    path = given.json or RESULTS / "cpu" / ("deeper-train.json" if given.train else "deeper.json")
    if given.train:
        write_record(path, train_all(given.batch, say))
    else:
        options = Options(tuple(given.depths), given.batch, given.steps, tuple(given.networks))
        with console.status("training"):
            record = run(options, say)
        console.print(show(record))
        write_record(path, record)
        from .plots import memory_by_depth

        memory_by_depth(record, given.png or path.with_suffix(".png"))
    console.print(f"record: {path}")


if __name__ == "__main__":
    main()
