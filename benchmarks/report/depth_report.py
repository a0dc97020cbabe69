"""A record of ``benchmarks.depth`` as tables and as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastdense.recompute import WORKSPACE_BYTES

from ..harness.providers import BASE, PROVIDERS
from .tables import markdown

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


def depth_table(record: dict[str, Any], file: str) -> str:
    """The record as Markdown, with its conditions and what limits the deepest network."""
    lines: list[str] = []
    for title, cells in rows(record):
        lines += ["", f"**{title[0].upper()}{title[1:]}**", "", *markdown(HEADER, cells)]
    settings, errors = record["settings"], []
    for row in record["checks"].values():
        if of := row.get("counted_beside_measured"):
            kept, peak = (of[f"{what}_counted"] / of[f"{what}_measured"] - 1 for what in ("kept", "peak"))
            errors.append(f"{kept:+.1%} and {peak:+.1%} for {row['label']}")
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

    from .plots import colours

    settings, questions = record["settings"], record["results"].values()
    columns = min(2, len(questions))
    lines = -(-len(questions) // columns)
    figure = Figure(figsize=(6 * columns, 4 * lines), layout="constrained")
    shades = dict(zip(PROVIDERS, colours(provider.label for provider in PROVIDERS.values()), strict=True))
    for axis, answers in zip(figure.subplots(lines, columns, squeeze=False).flat, questions, strict=False):
        draw = _curves if answers["grows"] == "depth" else _bars
        draw(axis, answers["providers"], shades, settings["budget"] / 1e9)
        axis.set_title(answers["title"], fontsize=10)
    what = f"{settings['budget'] / 1e9:g} GB ({settings['dtype']}, {settings['optimizer']})"
    figure.suptitle(f"What trains within {what}, {settings['method']}; {record['date'][:10]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _curves(axis: Any, found: dict[str, Any], shades: dict[str, str], budget: float) -> None:
    """One line for each provider, which ends at the deepest network that fits; dashes, because some lie on others."""
    fitting: list[dict[str, Any]] = []
    for name, row in sorted(found.items(), key=lambda item: item[1]["depth"]):
        fitting = [trial for trial in row["trials"] if trial["fits"]]
        points = [trial["depth"] for trial in fitting], [trial["bytes"] / 1e9 for trial in fitting]
        style = {"color": shades[name], "linestyle": "-" if list(PROVIDERS).index(name) % 2 else "--", "marker": "o"}
        axis.plot(*points, label=f"{row['label']}: {row['depth']:,}", markevery=slice(-1, None), **style)
    if counted := [trial for trial in fitting if "parameters" in trial]:
        shares = [(trial["parameters"] + trial["gradients"]) / 1e9 for trial in counted]
        label = "parameters, gradients, momentum alone"
        axis.plot([trial["depth"] for trial in counted], shares, ":", color="black", label=label)
    axis.axhline(budget, color="red", linewidth=1, label="the budget")
    axis.set(ylim=(0, 2 * budget), xlabel="depth (convolutions and classifier)", ylabel="memory [GB]")
    axis.legend(loc="upper right", fontsize=8)


def _bars(axis: Any, found: dict[str, Any], shades: dict[str, str], budget: float) -> None:
    batches = [row["batch"] for row in found.values()]
    bars = axis.barh(list(found), batches, color=[shades[name] for name in found])
    axis.bar_label(bars, [f"{row['batch']:,}  {row['label']}" for row in found.values()], padding=3, fontsize=8)
    axis.set(yticks=[], xlim=(0, 1.6 * max([1, *batches])), xlabel="images in a batch")
    axis.invert_yaxis()
