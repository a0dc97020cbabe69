"""A record of ``benchmarks.depth`` as tables and as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from fastdense.recompute import WORKSPACE_BYTES

from ..harness.providers import BASE, PROVIDERS
from .tables import console_table, markdown

CHECKPOINTED = "memory-efficient"
HEADER = ["", "largest", "/ torchvision", "/ memory_efficient", "parameters", "the rest"]


def rows(record: dict[str, Any]) -> Iterator[tuple[str, list[list[str]]]]:
    """Yields the title of each question, and for each provider cells as :data:`HEADER` names them."""
    for answers in record["results"].values():
        found, grows, lines = answers["providers"], answers["grows"], []
        for row in found.values():
            cells = [row["label"], f"{row[grows]:,}" + ("" if row["complete"] else " or more")]
            for other in (BASE, CHECKPOINTED):
                base = found.get(other, {}).get(grows, 0)
                cells.append(f"{row[grows] / base:.1f}" if base else "-")
            lines.append(cells + [f"{part / 1e9:.2f} GB" if part else "-" for part in _parts(row)])
        yield answers["title"], lines


def _parts(row: dict[str, Any]) -> tuple[int, int]:
    """Bytes of parameters, gradients and momentum at the largest size, if they were counted, and of everything else."""
    best: dict[str, int] = next((trial for trial in row["trials"] if trial["size"] == row["size"]), {})
    share = best.get("parameters", 0) + best.get("gradients", 0)
    return share, best.get("bytes", 0) - share


def tables(record: dict[str, Any]) -> Iterator[Table]:
    """Yields one table for each question."""
    for title, cells in rows(record):
        table = console_table(f"{title}, {record['settings']['budget'] / 1e9:g} GB", HEADER, cells)
        table.caption = record["settings"]["method"]
        yield table


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


def _limits(record: dict[str, Any]) -> Iterator[str]:
    """What the deepest network of each question is limited by, in words."""
    for answers in record["results"].values():
        if answers["grows"] == "depth":
            found, title = answers["providers"], answers["title"]
            deepest = max(found.values(), key=lambda row: row["depth"])
            share, rest = _parts(deepest)
            plain, checkpointed = (deepest["depth"] / found[name]["depth"] for name in (BASE, CHECKPOINTED))
            yield (
                f"- {title[0].upper()}{title[1:]}: {deepest['label']} goes {plain:.1f} times as deep as torchvision "
                f"and {checkpointed:.1f} times as deep as memory_efficient. Parameters, gradients and momentum take "
                f"{share / (share + rest):.0%} of the memory there."
            )


def plot(record: dict[str, Any], path: Path) -> None:
    """One panel for each question: memory against depth, or the largest batches as bars."""
    from matplotlib.figure import Figure

    settings, questions = record["settings"], record["results"].values()
    columns = min(2, len(questions))
    lines = -(-len(questions) // columns)
    figure = Figure(figsize=(6 * columns, 4 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis, answers in zip(axes.flat, questions, strict=False):
        if answers["grows"] == "depth":
            _curves(axis, answers, settings["budget"] / 1e9)
        else:
            _bars(axis, answers["providers"])
        axis.set_title(answers["title"], fontsize=10)
    what = f"{settings['budget'] / 1e9:g} GB ({settings['dtype']}, {settings['optimizer']})"
    figure.suptitle(f"What trains within {what}, {settings['method']}; {record['date'][:10]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _style(name: str) -> dict[str, Any]:
    """A colour for each provider; dashes, because some lines lie on others."""
    from .plots import colours

    place = list(PROVIDERS).index(name)
    shades = colours(provider.label for provider in PROVIDERS.values())
    return {"color": shades[place], "linestyle": "-" if place % 2 else "--"}


def _curves(axis: Any, answers: dict[str, Any], budget: float) -> None:
    """One line for each provider, which ends at the deepest network that fits."""
    found = sorted(answers["providers"].items(), key=lambda item: item[1]["depth"])
    for name, row in found:
        fitting = [trial for trial in row["trials"] if trial["bytes"] is not None and trial["fits"]]
        points = [trial["depth"] for trial in fitting], [trial["bytes"] / 1e9 for trial in fitting]
        label = f"{row['label']}: {row['depth']:,}"
        axis.plot(*points, label=label, marker="o", markevery=[-1] if fitting else [], **_style(name))
    counted = [trial for trial in found[-1][1]["trials"] if "parameters" in trial and trial["fits"]]
    if counted:
        shares = [(trial["parameters"] + trial["gradients"]) / 1e9 for trial in counted]
        depths = [trial["depth"] for trial in counted]
        axis.plot(depths, shares, ":", color="black", label="parameters, gradients, momentum alone")
    axis.axhline(budget, color="red", linewidth=1, label="the budget")
    axis.set(ylim=(0, 2 * budget), xlabel="depth (convolutions and classifier)", ylabel="memory [GB]")
    axis.legend(loc="upper right", fontsize=8)


def _bars(axis: Any, found: dict[str, Any]) -> None:
    """The largest batch of each provider."""
    batches = [row["batch"] for row in found.values()]
    bars = axis.barh(list(found), batches, color=[_style(name)["color"] for name in found])
    axis.bar_label(bars, [f"{row['batch']:,}  {row['label']}" for row in found.values()], padding=3, fontsize=8)
    axis.set(yticks=[], xlim=(0, 1.6 * max([1, *batches])), xlabel="images in a batch")
    axis.invert_yaxis()
