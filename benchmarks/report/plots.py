"""Pictures of records, drawn by matplotlib without a display; each takes a record and a path."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..harness.runner import plain

Record = dict[str, Any]
WIDTH, HEIGHT, DPI = 8.0, 5.2, 150
CAPTION_CHARACTERS = 120
OURS, THEIRS = (
    ("#0b6e4f", "#2a9d5c", "#66bb6a", "#1b4332", "#95d5b2"),
    ("#555555", "#c1666b", "#d4a017", "#4a6fa5", "#7b5ea7"),
)
MARKERS = "osD^vP*Xh<"


def step_against_memory(record: Record, path: Path) -> None:
    """A record of speed: step time against bytes kept, each provider a point; the lower left corner is best."""
    results = measured(record, "step", "bytes_kept")
    figure, axes = _figure()
    for label, row in results.items():
        step, style = row["step"], _style(label, list(results))
        x, y = row["bytes_kept"] / 1e6, step["median"] * 1e3
        spread = [[y - step["p20"] * 1e3], [step["p80"] * 1e3 - y]]
        axes.errorbar(x, y, yerr=spread, capsize=3, label=label, **{**style, "linestyle": "none"})
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0, top=1.25 * max(row["step"]["p80"] for row in results.values()) * 1e3)
    axes.set_xlabel("saved for backward [MB]")
    axes.set_ylabel("training step [ms], bars: 20 % to 80 %")
    axes.annotate("better", (0.02, 0.03), (0.12, 0.13), xycoords="axes fraction", color="#777777",
                  arrowprops={"arrowstyle": "->", "color": "#777777"})  # fmt: skip
    _finish(figure, axes, _title(record), speed_caption(record), path)


def images_against_batch(record: Record, path: Path) -> None:
    """A record of speed with several batches: images a second against the batch size."""
    settings = record["settings"]
    figure, axes = _figure()
    results = measured(record, "step")
    for label, row in results.items():
        points = {settings["batch"]: row["images_per_second"]}
        sweep = row.get("batches", {}).items()
        points |= {int(batch): found["images_per_second"] for batch, found in sweep if "step" in found}
        axes.plot(*zip(*sorted(points.items()), strict=True), label=label, **_style(label, list(results)))
    axes.set_xscale("log", base=2)
    _plain_numbers(axes, sorted({settings["batch"], *_batches(results)}))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("images a step (batch size)")
    axes.set_ylabel("images a second, training")
    swept = [
        found["step"]["repeats"] for row in results.values() for found in row["batches"].values() if "step" in found
    ]
    caption = f"{speed_caption(record)} Batches other than {settings['batch']}: {min(swept)} steps."
    _finish(figure, axes, f"{settings['model']}: higher is better", caption, path)


def memory_against_depth(record: Record, path: Path) -> None:
    """A record of memory with depths: bytes kept an image against the number of layers."""
    settings = record["settings"]
    depths: dict[str, int] = settings["depths"]["of"]
    labels = list(dict.fromkeys(label for name in depths for label in record["results"].get(name, {})))
    figure, axes = _figure()
    for label in labels:
        rows = {depth: record["results"].get(name, {}).get(label, {}) for name, depth in depths.items()}
        points = {d: row["bytes_kept"] / settings["batch"] / 1e6 for d, row in rows.items() if "bytes_kept" in row}
        if points:
            axes.plot(*zip(*sorted(points.items()), strict=True), label=label, **_style(label, labels))
    _plain_numbers(axes, sorted(depths.values()))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("depth (convolutions and classifier)")
    axes.set_ylabel("saved for backward [MB an image]")
    caption = (
        f"DenseNet-BC, k = {settings['depths']['growth_rate']}, three equal blocks, images of "
        f"{settings['depths']['size']} x {settings['depths']['size']}, batch {settings['batch']}, "
        f"{_arithmetic(settings)}. "
        f"Parameters and images left out. {_where(record)}"
    )
    _finish(figure, axes, "Memory against depth: lower is better", caption, path)


def pictures(record: Record, stem: Path) -> list[Path]:
    """Every picture that there is of ``record``, as ``STEM-*.png``; the files written."""
    record = plain(record)
    found = []
    if record["kind"] == "speed":
        if measured(record, "step", "bytes_kept"):
            found.append((step_against_memory, "step-memory"))
        if _batches(measured(record, "step")):
            found.append((images_against_batch, "images-batch"))
    elif "depths" in record["settings"] and record["results"]:
        found.append((memory_against_depth, "depth"))
    paths = []
    for draw, name in found:
        path = stem.with_name(f"{stem.name}-{name}.png")
        draw(record, path)
        paths.append(path)
    return paths


def measured(record: Record, *keys: str) -> dict[str, Record]:
    """The rows that have all of ``keys``."""
    return {label: row for label, row in record["results"].items() if all(key in row for key in keys)}


def _batches(results: dict[str, Record]) -> set[int]:
    return {
        int(batch) for row in results.values() for batch, found in row.get("batches", {}).items() if "step" in found
    }


def _title(record: Record) -> str:
    settings = record["settings"]
    size = settings["size"]
    return f"One training step of {settings['model']}, {settings['batch']} images of {size} x {size}"


def speed_caption(record: Record) -> str:
    """The conditions of a record of speed."""
    settings = record["settings"]
    size, processes = settings["size"], settings["processes"]
    repeats = next((row["step"]["repeats"] for row in measured(record, "step").values()), 0)
    in_words = f"{repeats} interleaved steps in {processes} process" + "es" * (processes != 1)
    return (
        f"Images of {size} x {size}, {_arithmetic(settings)}. Forward, backward and SGD: medians of {in_words}. "
        f"{_where(record)}"
    )


def _arithmetic(settings: Record) -> str:
    return f"{settings['dtype']}, {settings['layout']}"


def _where(record: Record) -> str:
    threads = f", {record['threads']} thread" + "s" * (record["threads"] != 1)
    device = f"{record['processor']}{threads}" if record["device"] == "cpu" else record["device"]
    part = "" if record.get("complete", True) else " Interrupted: not all that was asked for."
    return f"{device}; PyTorch {record['torch']}; {record['date'][:10]}.{part}"


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _style(label: str, labels: list[str]) -> dict[str, Any]:
    """Greens are fastdense; the marker tells apart what lies on one spot."""
    ours = [name for name in labels if name.startswith("fastdense")]
    theirs = [name for name in labels if name not in ours]
    colours, place = (OURS, ours.index(label)) if label in ours else (THEIRS, theirs.index(label))
    index = labels.index(label)
    return {
        "color": colours[place % len(colours)], "marker": MARKERS[index % len(MARKERS)], "alpha": 0.9,
        "markersize": max(11 - index, 5), "linestyle": ("-", "--", ":")[index % 3],
    }  # fmt: skip


def _plain_numbers(axes: Axes, values: list[int]) -> None:
    axes.set_xticks(values, [str(value) for value in values])
    axes.set_xticks([], minor=True)


def _finish(figure: Figure, axes: Axes, title: str, caption: str, path: Path) -> None:
    axes.set_title(title, loc="left", fontweight="bold")
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _caption(figure, caption)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _caption(figure: Figure, words: str) -> None:
    text = "\n".join(textwrap.wrap(words, CAPTION_CHARACTERS))
    figure.supxlabel(text, fontsize=7.5, color="#555555", x=0.01, ha="left")
