"""Records of ``benchmarks.deeper`` as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Record = dict[str, Any]


def _markdown(header: str, rows: Iterable[Iterable[str]], conditions: str, words: int = 1) -> str:
    """A table whose first ``words`` columns are words, and what holds for all of it."""
    columns = header.count("|") + 1
    lines = [f"| {header} |", "|---" * words + "|--:" * (columns - words) + "|"]
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join(["", *lines, "", conditions, ""])


def _source(record: Record, file: str, command: str) -> str:
    return (
        f"{record['processor']}, one thread, PyTorch {record['torch']}, {record['date'][:10]}. "
        f"Reproduce: `{command}`. Record: [{file}](../benchmarks/results/{file})."
    )


def _load(settings: Record) -> str:
    load = settings.get("load")
    return "on a busy machine" if load is None else f"with {load:.1f} processes at work on the machine"


def deeper_table(record: Record, file: str) -> str:
    """Peak resident memory, bytes kept and step time by depth."""
    settings, rows = record["settings"], []
    for depth, networks in record["results"].items():
        for label, row in networks.items():
            gigabytes = [f"{row[key] / 1e9:.2f} GB" for key in ("resident_start", "resident_first_step", "resident")]
            rows.append(
                [
                    f"{int(depth):,}",
                    label,
                    *gigabytes,
                    f"{row['bytes_kept'] / 1e6:,.0f} MB",
                    f"{row['step']['median']:.1f} s",
                ]
            )
    parameters = ", ".join(
        f"{next(iter(networks.values()))['parameters'] / 1e6:.1f} million parameters at depth {int(depth):,}"
        for depth, networks in record["results"].items()
    )
    conditions = (
        f"DenseNet-BC, k = {settings['growth_rate']}, three equal blocks, {settings['batch']} images of "
        f"{settings['size']} x {settings['size']}, {settings['dtype']}, {settings['optimizer']}; {parameters}. "
        f"Peak resident memory of a fresh process before the first step, after it and after "
        f"step {settings['steps']}. Step times: medians of {settings['steps'] - 1}, {_load(settings)}. "
        f"{_source(record, file, 'python -m benchmarks.deeper')}"
    )
    header = "depth | | before | after a step | peak | kept for backward | a step"
    return _markdown(header, rows, conditions, words=2)


def deeper_train_table(record: Record, file: str) -> str:
    """How ``fastdense train`` ended."""
    rows = [
        [
            f"`{row['command']}`",
            str(row["steps"]),
            f"{row['first_loss']:.2f}",
            f"{row['train_loss']:.2f}",
            f"{row['test_accuracy']:.1%}",
            f"{row['step']['median']:.1f} s",
            f"{row['resident'] / 1e9:.2f} GB",
        ]
        for row in record["results"].values()
    ]
    header = "command | steps | first loss | mean loss, last epoch | test accuracy | a step | peak resident memory"
    conditions = (
        f"Step times: medians, {_load(record['settings'])}. The peak holds scikit-learn and the evaluation as well. "
        f"{_source(record, file, 'python -m benchmarks.deeper --train')}"
    )
    return _markdown(header, rows, conditions)
