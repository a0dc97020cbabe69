"""Write the tables of the README and of docs/ from the records under ``benchmarks/results``.

    python -m benchmarks.report.render [--check]

A table stands between ``<!-- KIND: FILE -->`` and ``<!-- end of KIND -->``; the kinds are the keys of ``TABLES``.
``--check`` changes nothing and exits with 1 if a table is not what its record says.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ..harness.runner import RESULTS, ROOT
from ..roofline import bars
from .depth_report import depth_table
from .tables import images, markdown, measured, speed_conditions

Record = dict[str, Any]

README = ROOT / "README.md"
PAGES = (README, *(ROOT / "docs" / f"{name}.md" for name in ("kernels", "memory", "depth")))


def _table(headings: Sequence[str], rows: Iterable[Sequence[Any]], conditions: str, *, words: int = 1) -> str:
    return "\n".join(["", *markdown(headings, rows, words=words), "", conditions, ""])


def _bytes(row: Record, base: Record, *keys: str) -> Iterator[str]:
    for key in keys:
        yield f"{row[key] / 1e6:.1f} MB"
        yield "" if row[key] == base[key] else f"{base[key] / row[key]:.1f}x less"


def _record(file: str, root: str = "../") -> str:
    return f"Record: [{file}]({root}benchmarks/results/{file})."


def speed_table(record: Record, file: str) -> str:
    """A record of ``benchmarks.speed`` as a Markdown table, with its conditions."""
    base = record["results"]["torchvision"]
    rows = []
    for label, row in measured(record["results"], "step", "bytes_kept").items():
        slower = row["step"]["median"] / base["step"]["median"]
        rows.append((label, *_bytes(row, base, "bytes_kept"), f"{row['step']['median'] * 1e3:.0f} ms", f"{slower:.2f}"))
    conditions = f"{speed_conditions(record)} Reproduce: `make bench`. {_record(file, '')}"
    return _table(("", "saved for backward", "", "training step", ""), rows, conditions)


def memory_table(record: Record, file: str) -> str:
    """A record of ``benchmarks.memory`` as a Markdown table, with its conditions."""
    rows = [
        (name, label, *_bytes(row, group["torchvision"], "bytes_kept", "bytes_peak"))
        for name, group in record["results"].items()
        for label, row in measured(group, "bytes_peak").items()
    ]
    conditions = (
        f"{images(record['settings'])}, on the CPU; parameters, their gradients and the images left out. PyTorch "
        f"{record['torch']}, {record['date'][:10]}. Reproduce: `python -m benchmarks.memory`. {_record(file)}"
    )
    return _table(("", "", "saved for backward", "", "peak of a training step", ""), rows, conditions, words=2)


def compiled_table(record: Record, file: str) -> str:
    """The convolutions that a record of ``benchmarks.compiled`` shows, as a Markdown table."""
    rows = []
    for row in record["shown"]:
        tile = "{block_m} x {block_c} x {block_k}, {num_warps}".format_map(row["config"])
        kernel = f"{row['kernel']}, {row['shape']['reads']} to {row['shape']['writes']}"
        modelled = [f"{row[key]:.0f} us" for key in ("modelled_issue_us", "modelled_h100_floor_us")]
        shared = f"{row['shared_bytes'] / 1024:.0f} KB"
        rows.append((row["growth_rate"], kernel, tile, row["registers"], shared, *modelled))
    headings = ("`k`", "kernel", "tile, warps", "registers", "shared memory", "modelled issue time", "modelled floor")
    conditions = (
        f"Compiled for sm_90 in bfloat16 by Triton {record['triton']}, 64 images of 56 x 56 pixels. Both times are "
        "*modelled*: issuing the inner loops' instructions at 70 % of an H100's rate, and moving the floor's bytes at "
        f"3.0 TB/s. Nothing in this table was measured. {_record(file)}"
    )
    return _table(headings, rows, conditions, words=3)


def _machine(made: Record) -> str:
    versions = f"PyTorch {made['torch']}, Triton {made['triton']}"
    return f"{made['device']}, {versions}, commit {made['commit']}, {made['date'][:10]}"


def gpu_table(record: Record, file: str) -> str:
    """The training steps of a record of ``benchmarks.gpu`` as a Markdown table, with its conditions."""
    stages, made = record["stages"], record["environment"]
    found = [stages[name]["result"] for name in ("batch64", "batch256", "densenet201", "batch1") if name in stages]
    headings = [""]
    for one in found:
        headings += [f"{one['network']}, batch {one['batch']}", "x", "images/s", "peak memory"]
    labels = [label for label in found[0]["rows"] if all("step" in one["rows"].get(label, {}) for one in found)]
    rows = [[label, *(cell for one in found for cell in _gpu_cells(one["rows"], label))] for label in labels]
    one = found[0]
    conditions = (
        f"Images of {one['size']} x {one['size']}, {one['dtype']} autocast, {one['layout']}: "
        "forward, cross-entropy and backward. *x*: times as fast as torchvision, eager. *graph*: the whole step as one "
        f"CUDA graph, whose memory is not told apart. {_machine(made)}; medians of interleaved steps. Reproduce: "
        f"`python -m benchmarks.gpu`. Record: `benchmarks/results/{file}`."
    )
    return _table(headings, rows, conditions)


def _gpu_cells(rows: Record, label: str) -> list[str]:
    row, base = rows[label], rows["torchvision, eager"]["step"]["median"]
    seconds, peak = row["step"]["median"], row.get("peak_bytes")
    memory = "" if peak is None else f"{peak / 1e9:.2f} GB"
    return [f"{seconds * 1e3:.1f} ms", f"{base / seconds:.2f}x", f"{row['images_per_second']:,.0f}", memory]


def gpu_kernels_table(record: Record, file: str) -> str:
    """Where the device's time goes in a step of a record of ``benchmarks.gpu``: operations, the longest first."""
    name, made = "fastdense activations, batch 64", record["environment"]
    found, rows = record["stages"]["layers"]["result"][name], []
    for bar in bars(found["rows"])[:16]:
        times = [f"{(seconds or 0.0) * 1e3:.2f} ms" for seconds in (bar.measured, bar.floor)]
        rows.append((bar.operation, f"{bar.m:,}", bar.times, *times, f"{bar.fraction:.0%}"))
    ours, everything = found["ours_seconds"] * 1e3, found["device_seconds"] * 1e3
    conditions = (
        f"{found['network']}, {name}, images of 224 x 224: {ours:.1f} ms in these kernels, {everything:.1f} ms in all, "
        f"by PyTorch's profiler. {_machine(made)}. {_record(file)}"
    )
    headings = ("kernel", "pixels", "times a step", "measured", "modelled floor", "of the floor's rate")
    return _table(headings, rows, conditions)


TABLES: dict[str, Callable[[Record, str], str]] = {
    "figures": speed_table,
    "memory": memory_table,
    "depth": depth_table,
    "compiled": compiled_table,
    "gpu-kernels": gpu_kernels_table,
    "gpu": gpu_table,
}
_MARKED = re.compile(rf"(?s)(<!-- (?P<kind>{'|'.join(TABLES)}): (?P<file>\S+) -->\n).*?(<!-- end of (?P=kind) -->)")


def render(text: str) -> str:
    """The ``text`` of a page, with every marked table made again from its record."""

    def table(match: re.Match[str]) -> str:
        record = json.loads((RESULTS / match["file"]).read_text())
        return f"{match[1]}{TABLES[match['kind']](record, match['file'])}{match[4]}"

    return _MARKED.sub(table, text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report.render", description="write the pages' tables")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is out of date")
    options = parser.parse_args()
    for page in PAGES:
        text = page.read_text()
        rendered = render(text)
        if options.check and rendered != text:
            sys.exit(f"{page.name} is out of date: run python -m benchmarks.report.render")
        page.write_text(rendered)


if __name__ == "__main__":
    main()
