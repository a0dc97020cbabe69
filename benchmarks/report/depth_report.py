"""A record of ``benchmarks.depth`` as tables and as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from fastdense.recompute import WORKSPACE_BYTES

from ..harness.providers import BASE
from .tables import console_table, markdown

CHECKPOINTED = "memory-efficient"

# Colour and line of each provider; the last one overlaps another's where it keeps the same.
STYLES: dict[str, tuple[str, str]] = {
    BASE: ("#7f7f7f", "-"),
    CHECKPOINTED: ("#d95f02", "-"),
    "efficient-densenet": ("#f2b134", "--"),
    "fastdense-activations": ("#6baed6", "-"),
    "fastdense-bottlenecks": ("#08519c", "-"),
    "fastdense-activations-triton": ("#74c476", "-"),
    "fastdense-bottlenecks-triton": ("#006d2c", "-"),
}
OTHER = ("#984ea3", "-")


def rows(record: dict[str, Any]) -> Iterator[tuple[str, list[list[str]]]]:
    """The title of each question, and for each provider cells as :data:`HEADER` names them."""
    for answers in record["results"].values():
        found, grows, lines = answers["providers"], answers["grows"], []
        for row in found.values():
            cells = [row["label"], f"{row[grows]:,}" + ("" if row["complete"] else " or more")]
            for other in (BASE, CHECKPOINTED):
                base = found.get(other, {}).get(grows, 0)
                cells.append(f"{row[grows] / base:.1f}" if base else "-")
            lines.append(cells + ["-" if part is None else f"{part / 1e9:.2f} GB" for part in _parts(row)])
        yield answers["title"], lines


HEADER = ["", "largest", "/ torchvision", "/ memory_efficient", "parameters", "the rest"]


def _best(row: dict[str, Any]) -> dict[str, Any]:
    return next((trial for trial in row["trials"] if trial["size"] == row["size"]), {})


def _parts(row: dict[str, Any]) -> tuple[int | None, int | None]:
    """Bytes of parameters, gradients and momentum at the largest size, and of everything else; if they were counted."""
    best = _best(row)
    if "parameters" not in best:
        return None, best.get("bytes")
    share = best["parameters"] + best["gradients"]
    return share, best["bytes"] - share


def tables(record: dict[str, Any]) -> list[Table]:
    """One table for each question."""
    settings, found = record["settings"], []
    for title, cells in rows(record):
        found.append(console_table(f"{title}, {settings['budget'] / 1e9:g} GB", HEADER, cells))
        found[-1].caption = settings["method"]
    return found


def depth_table(record: dict[str, Any], file: str) -> str:
    """The record as Markdown, with its conditions and what limits the deepest network."""
    lines: list[str] = []
    for title, cells in rows(record):
        lines += ["", f"**{title[0].upper()}{title[1:]}**", "", *markdown(HEADER, cells)]
    settings = record["settings"]
    errors = [
        f"{measured['kept_counted'] / measured['kept_measured'] - 1:+.1%} and "
        f"{measured['peak_counted'] / measured['peak_measured'] - 1:+.1%} for {row['label']}"
        for row in record["checks"].values()
        if (measured := row.get("counted_beside_measured"))
    ]
    conditions = (
        f"Within {settings['budget'] / 1e9:g} GB, {settings['dtype']}, {settings['optimizer']}; "
        f"**{settings['method']}**. The column *parameters* holds their gradients and momentum, too. Counted against "
        f"measured in one real step of a small network on the CPU, bytes kept and peak (of fastdense's, the scratch "
        f"inside its operators is an upper bound, with {WORKSPACE_BYTES >> 20} MiB that do not grow): "
        f"{', '.join(errors)}. PyTorch {record['torch']}, {record['date'][:10]}. "
        f"Reproduce: `python -m benchmarks.depth`. Record: [{file}](../benchmarks/results/{file})."
    )
    return "\n".join([*lines, "", *_limits(record), "", conditions, ""])


def _limits(record: dict[str, Any]) -> list[str]:
    """What the deepest network of each question is limited by, in words."""
    sentences = []
    for answers in record["results"].values():
        if answers["grows"] != "depth":
            continue
        found = answers["providers"]
        deepest = max(found.values(), key=lambda row: row["depth"])
        share, rest = _parts(deepest)
        if share is None or rest is None or not {BASE, CHECKPOINTED} <= found.keys():
            continue
        times = [deepest["depth"] / found[name]["depth"] for name in (BASE, CHECKPOINTED)]
        sentences.append(
            f"- {answers['title'][0].upper()}{answers['title'][1:]}: {deepest['label']} goes {times[0]:.1f} times as "
            f"deep as torchvision and {times[1]:.1f} times as deep as memory_efficient. Parameters, gradients and "
            f"momentum take {share / (share + rest):.0%} of the memory there."
        )
    return sentences


def plot(record: dict[str, Any], path: Path) -> None:
    """Memory against depth, a panel for each network that grows deeper, and the largest batches as bars."""
    from matplotlib.figure import Figure

    results = record["results"]
    curves = [answers for answers in results.values() if answers["grows"] == "depth"]
    bars = [answers for answers in results.values() if answers["grows"] == "batch"]
    panels = len(curves) + bool(bars)
    figure = Figure(figsize=(5.6 * panels, 5.0))
    axes = figure.subplots(1, panels, squeeze=False)
    for axis, answers in zip(axes[0], curves, strict=False):
        _curves(axis, answers, record["settings"]["budget"])
    if bars:
        _bars(axes[0][-1], bars)
    settings = record["settings"]
    budget = f"{settings['budget'] / 1e9:g} GB"
    figure.suptitle(f"What trains within {budget} ({settings['dtype']}, {settings['optimizer']})", fontsize=13)
    figure.text(0.5, 0.005, f"{settings['method']}; {record['date'][:10]}", ha="center", fontsize=8, color="#555555")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, format="png")


def _curves(axis: Any, answers: dict[str, Any], budget: int) -> None:
    """One line for each provider, up to the budget, and a mark with its depth where it ends."""
    line = budget / 1e9
    found = sorted(answers["providers"].items(), key=lambda item: item[1]["depth"])
    marked: set[int] = set()
    for name, row in found:
        colour, dashes = STYLES.get(name, OTHER)
        points = [
            (trial["depth"], trial["bytes"] / 1e9)
            for trial in row["trials"]
            if trial["bytes"] is not None and trial["fits"]
        ]
        if points:
            axis.plot(*zip(*points, strict=True), dashes, color=colour, linewidth=2, label=row["label"])
        if (best := _best(row)).get("bytes"):
            axis.plot(row["depth"], best["bytes"] / 1e9, "o", color=colour, zorder=3)
            axis.annotate(
                f"{row['depth']:,}", (row["depth"], line), (0, 4), textcoords="offset points", rotation=40,
                fontsize=9, fontweight="bold", color=colour, visible=row["depth"] not in marked,
            )  # fmt: skip
            marked.add(row["depth"])
    deepest = max(answers["providers"].values(), key=lambda row: row["depth"])
    shares = [
        (trial["depth"], (trial["parameters"] + trial["gradients"]) / 1e9)
        for trial in deepest["trials"]
        if "parameters" in trial and trial["fits"]
    ]
    if shares:
        label = "parameters, gradients, momentum alone"
        axis.plot(*zip(*shares, strict=True), ":", color="#333333", linewidth=1.3, label=label)
    axis.axhline(line, color="#b2182b", linewidth=1, label="the budget; above it, the deepest that fits")
    axis.set(
        ylim=(0, 2.1 * line),
        xlim=(0, 1.12 * max(1, deepest["depth"])),
        xlabel="depth (convolutions and classifier)",
        ylabel="memory [GB]",
    )
    axis.set_title(_wrapped(answers["title"]), fontsize=10)
    axis.legend(loc="upper right", fontsize=8, framealpha=1)
    axis.spines[["top", "right"]].set_visible(False)


def _bars(axis: Any, questions: list[dict[str, Any]]) -> None:
    """The largest batch of each provider, a group for each network."""
    ticks, place = [], 0.0
    for answers in reversed(questions):
        start = place
        for name, row in sorted(answers["providers"].items(), key=lambda item: -item[1]["batch"]):
            axis.barh(place, row["batch"], color=STYLES.get(name, OTHER)[0], height=0.8)
            axis.text(row["batch"], place, f" {row['batch']:,}  {row['label']}", va="center", fontsize=8)
            place += 1
        ticks.append(
            ((start + place - 1) / 2, answers["title"].removeprefix("largest batch of ").replace(" at ", "\n"))
        )
        place += 1
    most = max(row["batch"] for answers in questions for row in answers["providers"].values())
    axis.set_yticks([position for position, _ in ticks], [label for _, label in ticks], fontsize=9)
    axis.set(xlim=(0, 1.6 * most), xlabel="images in a batch")
    axis.set_title("largest batch", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


def _wrapped(title: str) -> str:
    first, _, rest = title.partition(", k = ")
    return f"{first}\nk = {rest}" if rest else title
