"""Tables: on a terminal by rich, in a page as Markdown. Their first columns are words, the others numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.table import Table


def console_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[Any]] = (), *, words: int = 1) -> Table:
    """A table of ``rows``, whose first ``words`` columns are words."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(
            heading, justify="left" if i < words else "right", overflow="fold", no_wrap=i == 0 or i >= words
        )
    for row in rows:
        table.add_row(*map(str, row))
    return table


def markdown(headings: Sequence[str], rows: Iterable[Sequence[Any]], *, words: int = 1) -> list[str]:
    """The lines of a Markdown table, whose first ``words`` columns are words."""
    marks = ["---"] * words + ["--:"] * (len(headings) - words)
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (headings, *rows)]
    return [lines[0], f"|{'|'.join(marks)}|", *lines[1:]]
