"""Tables, on a terminal by rich, in a page as Markdown, and a record's conditions in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.table import Table


def console_table(
    title: str | None, headings: Sequence[str], rows: Iterable[Sequence[Any]] = (), *, words: int = 1
) -> Table:
    """A table of ``rows``, whose first ``words`` columns are words, and the others numbers."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < words else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(str, row))
    return table


def markdown(headings: Sequence[str], rows: Iterable[Sequence[Any]], *, words: int = 1) -> list[str]:
    """The lines of a Markdown table, whose first ``words`` columns are words."""
    marks = ["---"] * words + ["--:"] * (len(headings) - words)
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (headings, *rows)]
    return [lines[0], f"|{'|'.join(marks)}|", *lines[1:]]


def measured(rows: dict[str, dict[str, Any]], *keys: str) -> dict[str, dict[str, Any]]:
    """The rows that have all of ``keys``."""
    return {label: row for label, row in rows.items() if row.keys() >= set(keys)}


def images(settings: dict[str, Any]) -> str:
    """The images of a step."""
    size = settings["size"]
    return f"{settings['batch']} images of {size} x {size}, {settings['dtype']}, {settings['layout']}"


def made(record: dict[str, Any]) -> str:
    """Where and when a record was made, and whether it was to hold more."""
    threads = f"{record['threads']} thread" + "s" * (record["threads"] != 1)
    device = f"{record['processor']}, {threads}" if record["device"] == "cpu" else record["device"]
    part = "" if record["complete"] else ", interrupted"
    return f"{device}, PyTorch {record['torch']}, {record['date'][:10]}{part}"


def speed_conditions(record: dict[str, Any]) -> str:
    """What a record of speed measured."""
    settings = record["settings"]
    repeats = next((row["step"]["repeats"] for row in record["results"].values() if "step" in row), 0)
    return (
        f"{settings['model']}, {images(settings)}; {made(record)}; medians of {repeats} interleaved steps "
        f"(forward, backward, SGD) in {settings['processes']} process{'es' * (settings['processes'] != 1)}."
    )
