"""Pictures of records, drawn by matplotlib without a display; each takes a record and a path."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..harness.runner import plain
from .tables import made, speed_conditions

Record = dict[str, Any]
CAPTION_CHARACTERS = 120


def step_against_memory(record: Record, path: Path) -> None:
    """A record of speed: step time against bytes saved, each provider a point; the lower left corner is best."""
    axes = _axes()
    for label, row in measured(record, "step", "bytes_kept").items():
        median, p20, p80 = (row["step"][name] * 1e3 for name in ("median", "p20", "p80"))
        spread = [[median - p20], [p80 - median]]
        axes.errorbar(row["bytes_kept"] / 1e6, median, spread, capsize=3, label=label, linestyle="none")
    axes.set(xlabel="saved for backward [MB]", ylabel="training step [ms], bars: 20 % to 80 %", xlim=(0, None))
    _save(axes, f"One training step of {record['settings']['model']}", speed_conditions(record), path)


def images_against_batch(record: Record, path: Path) -> None:
    """A record of speed with several batches: images a second against the batch size."""
    batch, axes = record["settings"]["batch"], _axes()
    for label, row in measured(record, "step").items():
        points = {batch: row["images_per_second"]}
        points |= {size: found["images_per_second"] for size, found in _sweep(row).items()}
        axes.plot(*zip(*sorted(points.items()), strict=True), label=label)
    swept = [(size, found) for row in measured(record, "step").values() for size, found in _sweep(row).items()]
    axes.set_xscale("log", base=2)
    sizes = sorted({batch, *(size for size, _ in swept)})
    axes.set_xticks(sizes, list(map(str, sizes)))
    axes.set(xlabel="images a step (batch size)", ylabel="images a second, training")
    steps = min(found["step"]["repeats"] for _, found in swept)
    caption = f"{speed_conditions(record)} Batches other than {batch}: {steps} steps."
    _save(axes, f"{record['settings']['model']}: higher is better", caption, path)


def memory_against_depth(record: Record, path: Path) -> None:
    """A record of memory with depths: bytes saved for an image against the number of layers."""
    settings, results, axes = record["settings"], record["results"], _axes()
    depths = settings["depths"]
    for label in dict.fromkeys(label for name in depths["of"] for label in results.get(name, {})):
        rows = {depth: results.get(name, {}).get(label, {}) for name, depth in sorted(depths["of"].items())}
        saved = {depth: row["bytes_kept"] for depth, row in rows.items() if "bytes_kept" in row}
        megabytes = [saved[depth] / settings["batch"] / 1e6 for depth in sorted(saved)]
        axes.plot(sorted(saved), megabytes, label=label)
    axes.set_xticks(sorted(depths["of"].values()))
    axes.set(xlabel="depth (convolutions and classifier)", ylabel="saved for backward [MB an image]", xlim=(0, None))
    caption = (
        f"DenseNet-BC, k = {depths['growth_rate']}, three equal blocks, images of {depths['size']} x {depths['size']}, "
        f"batch {settings['batch']}, {settings['dtype']}, {settings['layout']}. "
        f"Parameters and images left out. {made(record)}."
    )
    _save(axes, "Memory against depth: lower is better", caption, path)


def pictures(record: Record, stem: Path) -> list[Path]:
    """Draws every picture that there is of ``record``, as ``STEM-*.png``; returns the files written."""
    record = plain(record)
    found = []
    if record["kind"] == "speed":
        if measured(record, "step", "bytes_kept"):
            found.append((step_against_memory, "step-memory"))
        if any(map(_sweep, measured(record, "step").values())):
            found.append((images_against_batch, "images-batch"))
    elif "depths" in record["settings"] and record["results"]:
        found.append((memory_against_depth, "depth"))
    paths = []
    for draw, name in found:
        paths.append(stem.with_name(f"{stem.name}-{name}.png"))
        draw(record, paths[-1])
    return paths


def measured(record: Record, *keys: str) -> dict[str, Record]:
    """The rows that have all of ``keys``."""
    return {label: row for label, row in record["results"].items() if all(key in row for key in keys)}


def _sweep(row: Record) -> dict[int, Record]:
    """What was measured at further batch sizes."""
    return {int(size): found for size, found in row.get("batches", {}).items() if "step" in found}


def _axes() -> Axes:
    axes = Figure(figsize=(9, 5), dpi=150, layout="constrained").add_subplot()
    colours = matplotlib.color_sequences["tab10"]
    axes.set_prop_cycle(color=colours, marker=list("osD^vP*Xh<"), markersize=range(11, 1, -1))  # points may coincide
    axes.grid(alpha=0.4)
    return axes


def _save(axes: Axes, title: str, caption: str, path: Path) -> None:
    axes.set_ylim(bottom=0)
    axes.set_title(title, loc="left")
    figure: Any = axes.figure
    figure.legend(loc="outside right upper", fontsize=9)
    figure.supxlabel(textwrap.fill(caption, CAPTION_CHARACTERS), fontsize=7.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
