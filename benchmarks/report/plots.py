"""Pictures of records, drawn by matplotlib without a display; each takes a record and a path."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..harness.runner import plain
from .tables import made, measured, speed_conditions

Record = dict[str, Any]
CAPTION_CHARACTERS = 120
OURS = ("#0b6e4f", "#2a9d5c", "#66bb6a", "#1b4332", "#95d5b2")
THEIRS = ("#555555", "#c1666b", "#d4a017", "#4a6fa5", "#7b5ea7")


def colours(labels: Iterable[str]) -> list[str]:
    """A colour for each provider: greens are fastdense's."""
    ours, theirs = cycle(OURS), cycle(THEIRS)
    return [next(ours if label.startswith("fastdense") else theirs) for label in labels]


def step_against_memory(record: Record, path: Path) -> None:
    """A record of speed: step time against bytes saved, each provider a point; the lower left corner is best."""
    rows = measured(record["results"], "step", "bytes_kept")
    axes = _axes(rows)
    for label, row in rows.items():
        median, p20, p80 = (row["step"][name] * 1e3 for name in ("median", "p20", "p80"))
        spread = [[median - p20], [p80 - median]]
        axes.errorbar(row["bytes_kept"] / 1e6, median, spread, capsize=3, label=label, linestyle="none")
    axes.set(xlabel="saved for backward [MB]", ylabel="training step [ms], bars: 20 % to 80 %", xlim=(0, None))
    arrow = {"arrowstyle": "->", "color": "#777777"}
    axes.annotate("better", (0.02, 0.03), (0.12, 0.13), xycoords="axes fraction", color="#777777", arrowprops=arrow)
    _save(axes, f"One training step of {record['settings']['model']}", speed_conditions(record), path)


def images_against_batch(record: Record, path: Path) -> None:
    """A record of speed with several batches: images a second against the batch size."""
    batch, rows = record["settings"]["batch"], measured(record["results"], "step")
    axes, sizes, steps = _axes(rows), {batch}, set()
    for label, row in rows.items():
        points = {batch: row, **_sweep(row)}
        axes.plot(sorted(points), [points[size]["images_per_second"] for size in sorted(points)], label=label)
        sizes |= points.keys()
        steps |= {found["step"]["repeats"] for found in _sweep(row).values()}
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(sizes), list(map(str, sorted(sizes))))
    axes.set(xlabel="images a step (batch size)", ylabel="images a second, training")
    caption = f"{speed_conditions(record)} Batches other than {batch}: {min(steps)} steps."
    _save(axes, f"{record['settings']['model']}: higher is better", caption, path)


def memory_against_depth(record: Record, path: Path) -> None:
    """A record of memory with depths: bytes saved for an image against the number of layers."""
    settings, results, depths = record["settings"], record["results"], record["settings"]["depths"]
    labels = list(dict.fromkeys(label for name in depths["of"] for label in results.get(name, {})))
    axes = _axes(labels)
    for label in labels:
        rows = [(depth, results.get(name, {}).get(label, {})) for name, depth in depths["of"].items()]
        saved = {depth: row["bytes_kept"] / settings["batch"] / 1e6 for depth, row in rows if "bytes_kept" in row}
        axes.plot(list(saved), list(saved.values()), label=label)
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
    speed, rows = record["kind"] == "speed", record["results"]
    swept = speed and any(map(_sweep, measured(rows, "step").values()))
    known = (
        (step_against_memory, "step-memory", speed and measured(rows, "step", "bytes_kept")),
        (images_against_batch, "images-batch", swept),
        (memory_against_depth, "depth", not speed and rows and "depths" in record["settings"]),
    )
    found = {stem.with_name(f"{stem.name}-{name}.png"): draw for draw, name, shown in known if shown}
    for path, draw in found.items():
        draw(record, path)
    return list(found)


def _sweep(row: Record) -> dict[int, Record]:
    """What was measured at further batch sizes."""
    return {int(size): found for size, found in row.get("batches", {}).items() if "step" in found}


def _axes(labels: Iterable[str]) -> Axes:
    """Axes on which each of ``labels`` gets a colour and a marker, smaller and smaller: points may coincide."""
    axes = Figure(figsize=(9, 5), dpi=150, layout="constrained").add_subplot()
    shades = colours(labels)
    markers = ("osD^vP*Xh<" * len(shades))[: len(shades)]
    axes.set_prop_cycle(color=shades, marker=list(markers), markersize=np.linspace(12, 6, len(shades)))
    axes.grid(color="#e3e3e3")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _save(axes: Axes, title: str, caption: str, path: Path) -> None:
    axes.set_ylim(bottom=0)
    axes.set_title(title, loc="left", fontweight="bold")
    figure: Any = axes.figure
    figure.legend(loc="outside right upper", fontsize=9, frameon=False)
    figure.supxlabel(textwrap.fill(caption, CAPTION_CHARACTERS), fontsize=7.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
