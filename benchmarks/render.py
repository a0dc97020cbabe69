"""Write the README's figures from the records under ``benchmarks/results``.

    python -m benchmarks.render [--check]

A table stands between ``<!-- figures: FILE -->`` and ``<!-- end of figures -->``; ``--check`` changes nothing and exits
with 1 if a table is not what its record says.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from .runner import RESULTS

README = Path(__file__).parents[1] / "README.md"
_FIGURES = re.compile(r"(<!-- figures: (?P<file>\S+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)


def speed_table(record: dict[str, Any], file: str) -> str:
    """A record of ``benchmarks.speed`` as a Markdown table, with its conditions."""
    settings, results = record["settings"], record["results"]
    base = results["torchvision"]
    lines = [
        "| | kept for backward | | training step | |",
        "|---|--:|--:|--:|--:|",
    ]
    for label, row in results.items():
        kept, seconds = row["bytes_kept"], row["step"]["median"]
        less, slower = base["bytes_kept"] / kept, seconds / base["step"]["median"]
        lines.append(f"| {label} | {kept / 1e6:.1f} MB | 1/{less:.1f} | {seconds * 1e3:.0f} ms | {slower:.2f} |")
    conditions = (
        f"{settings['model']}, {settings['batch']} images of {settings['size']} x {settings['size']}, "
        f"{settings['dtype']}, {settings['layout']}; {record['processor']}, {record['threads']} threads, "
        f"PyTorch {record['torch']}, {record['date'][:10]}; medians of {base['step']['repeats']} interleaved steps "
        f"(forward and backward) in {settings['processes']} processes. Reproduce: `make bench`. "
        f"Record: [{file}](benchmarks/results/{file})."
    )
    return "\n".join([*lines, "", conditions, ""])


def render(text: str) -> str:
    """``text`` with every marked table made again from its record."""

    def table(match: re.Match[str]) -> str:
        file = match["file"]
        record = json.loads((RESULTS / file).read_text())
        return f"{match[1]}{speed_table(record, file)}{match[3]}"

    return _FIGURES.sub(table, text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.render", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is out of date")
    options = parser.parse_args()
    text = README.read_text()
    rendered = render(text)
    if options.check:
        sys.exit("README.md is out of date: run python -m benchmarks.render" if rendered != text else 0)
    README.write_text(rendered)


if __name__ == "__main__":
    main()
