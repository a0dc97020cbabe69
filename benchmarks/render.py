"""Write the tables of the README and of docs/ from the records under ``benchmarks/results``.

    python -m benchmarks.render [--check]

A table stands between ``<!-- KIND: FILE -->`` and ``<!-- end of KIND -->``; kinds are ``figures``, ``memory``,
``depth``, ``compiled``, ``gpu`` and ``gpu-kernels``.
``--check`` changes nothing and exits with 1 if a table is not
what its record says.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .depth_report import depth_table
from .roofline import bars, of_profile
from .runner import RESULTS

README = Path(__file__).parents[1] / "README.md"
DOCS = README.parent / "docs"
_RENDERED = ("kernels", "memory", "depth")
PAGES = (README, *(DOCS / f"{name}.md" for name in _RENDERED))
_KINDS = "figures|memory|depth|compiled|gpu-kernels|gpu"
_TABLE = re.compile(
    rf"(<!-- (?P<kind>{_KINDS}): (?P<file>\S+) -->\n).*?(<!-- end of (?P=kind) -->)",
    re.DOTALL,
)


def speed_table(record: dict[str, Any], file: str) -> str:
    """A record of ``benchmarks.speed`` as a Markdown table, with its conditions."""
    settings, results = record["settings"], record["results"]
    base = results["torchvision"]
    lines = [
        "| | kept for backward | | training step | |",
        "|---|--:|--:|--:|--:|",
    ]
    for label, row in results.items():
        if "step" not in row or "bytes_kept" not in row:  # failed, or not to be had: the record says why
            continue
        kept, seconds = row["bytes_kept"], row["step"]["median"]
        less, slower = base["bytes_kept"] / kept, seconds / base["step"]["median"]
        lines.append(f"| {label} | {kept / 1e6:.1f} MB | 1/{less:.1f} | {seconds * 1e3:.0f} ms | {slower:.2f} |")
    conditions = (
        f"{settings['model']}, {settings['batch']} images of {settings['size']} x {settings['size']}, "
        f"{settings['dtype']}, {settings['layout']}; {record['processor']}, {record['threads']} threads, "
        f"PyTorch {record['torch']}, {record['date'][:10]}; medians of {base['step']['repeats']} interleaved steps "
        f"({'forward, backward, SGD' if 'optimizer' in base else 'forward and backward'}) in {settings['processes']} "
        f"processes. Reproduce: `make bench`. "
        f"Record: [{file}](benchmarks/results/{file})."
    )
    return "\n".join([*lines, "", conditions, ""])


def memory_table(record: dict[str, Any], file: str) -> str:
    """A record of ``benchmarks.memory`` as a Markdown table, with its conditions."""
    lines = ["| | | kept for backward | | peak of a training step | |", "|---|---|--:|--:|--:|--:|"]
    for name, rows in record["results"].items():
        for label, row in rows.items():
            if "bytes_peak" not in row:
                continue
            cells = []
            for key in ("bytes_kept", "bytes_peak"):
                cells += [f"{row[key] / 1e6:.1f} MB", f"1/{rows['torchvision'][key] / row[key]:.1f}"]
            lines.append(f"| {name} | {label} | {' | '.join(cells)} |")
    settings = record["settings"]
    conditions = (
        f"{settings['batch']} images of {settings['size']} x {settings['size']}, {settings['dtype']}, "
        f"{settings['layout']}, on the CPU; parameters, their gradients and the images left out. PyTorch "
        f"{record['torch']}, {record['date'][:10]}. Reproduce: `python -m benchmarks.memory`. "
        f"Record: [{file}](../benchmarks/results/{file})."
    )
    return "\n".join(["", *lines, "", conditions, ""])


def compiled_table(record: list[dict[str, Any]], file: str) -> str:
    """A record of ``benchmarks.kernels`` as a Markdown table: the large 2D rows of one architecture and dtype."""
    lines = [
        "| `k` | kernel | tile, warps | registers | shared memory | modelled issue time | modelled floor |",
        "|--:|---|---|--:|--:|--:|--:|",
    ]
    rows = [row for row in record if row["arch"] == 90 and row["dtype"] == "bf16" and row["shape"].get("m", 0) > 10**5]
    for row in rows:
        if row["modelled_issue_us"] is None or not row["kernel"].startswith("bn_relu_conv"):
            continue
        config, shape = row["config"], row["shape"]
        tile = f"{config['block_m']} x {config['block_c']} x {config['block_k']}, {config['num_warps']}"
        lines.append(
            f"| {row['growth_rate']} | {row['kernel']}, {shape['reads']} to {shape['writes']} | {tile} "
            f"| {row['registers']} | {row['shared_bytes'] / 1024:.0f} KB | {row['modelled_issue_us']:.0f} us "
            f"| {row['modelled_h100_floor_us']:.0f} us |"
        )
    conditions = (
        f"Compiled for sm_90 in bfloat16 by Triton {rows[0]['triton']}, 64 images of 56 x 56 pixels. Both times are "
        "*modelled*: issuing the inner loops' instructions at 70 % of an H100's rate, and moving the floor's bytes at "
        f"3.0 TB/s. Nothing in this table was measured. Record: [{file}](../benchmarks/results/{file})."
    )
    return "\n".join(["", *lines, "", conditions, ""])


def _machine(made: dict[str, Any]) -> str:
    versions = f"PyTorch {made['torch']}, Triton {made['triton']}"
    return f"{made['device']}, {versions}, commit {made['commit']}, {made['date'][:10]}"


def gpu_table(record: dict[str, Any], file: str) -> str:
    """The training steps of a record of ``benchmarks.gpu`` as a Markdown table, with its conditions."""
    stages, made = record["stages"], record["environment"]
    found = [stages[name]["result"] for name in ("batch64", "batch256", "densenet201", "batch1") if name in stages]
    heads = [f"{one['network']}, batch {one['batch']} | x | images/s | peak memory" for one in found]
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'--:|' * 4 * len(found)}"]
    for label in found[0]["rows"]:
        cells = []
        for one in found:
            row, base = one["rows"].get(label, {}), one["rows"]["torchvision, eager"]["step"]["median"]
            if "step" not in row:
                break
            seconds, peak = row["step"]["median"], row.get("peak_bytes")
            cells += [f"{seconds * 1e3:.1f} ms", f"{base / seconds:.2f}x", f"{row['images_per_second']:,.0f}"]
            cells.append("" if peak is None else f"{peak / 1e9:.2f} GB")
        else:
            lines.append(f"| {label} | {' | '.join(cells)} |")
    one = found[0]
    conditions = (
        f"Images of {one['size']} x {one['size']}, {one['dtype']} autocast, {one['layout']}: "
        "forward, cross-entropy and backward. *x*: times as fast as torchvision, eager. *graph*: the whole step as one "
        f"CUDA graph, whose memory is not told apart. {_machine(made)}; medians of interleaved steps. Reproduce: "
        f"`python -m benchmarks.gpu`. Record: `benchmarks/results/{file}`."
    )
    return "\n".join(["", *lines, "", conditions, ""])


def gpu_kernels_table(record: dict[str, Any], file: str) -> str:
    """Where the device's time goes in a step of a record of ``benchmarks.gpu``: operations, the longest first."""
    name, made = "fastdense activations, batch 64", record["environment"]
    found = record["stages"]["layers"]["result"][name]
    lines = ["| kernel | pixels | times a step | measured | modelled floor | of the floor's rate |"]
    lines.append("|---|--:|--:|--:|--:|--:|")
    for bar in bars(of_profile(found))[:16]:
        assert bar.measured is not None
        cells = f"{bar.measured * 1e3:.2f} ms | {bar.floor * 1e3:.2f} ms | {bar.floor / bar.measured:.0%}"
        lines.append(f"| {bar.operation} | {bar.m:,} | {bar.times} | {cells} |")
    ours, everything = found["ours_seconds"] * 1e3, found["device_seconds"] * 1e3
    conditions = (
        f"{found['network']}, {name}, images of 224 x 224: {ours:.1f} ms in these kernels, {everything:.1f} ms in all, "
        f"by PyTorch's profiler. {_machine(made)}. Record: [{file}](../benchmarks/results/{file})."
    )
    return "\n".join(["", *lines, "", conditions, ""])


_TABLES: dict[str, Callable[[Any, str], str]] = {
    "figures": speed_table,
    "memory": memory_table,
    "depth": depth_table,
    "compiled": compiled_table,
    "gpu": gpu_table,
    "gpu-kernels": gpu_kernels_table,
}


def render(text: str, root: str = "") -> str:
    """``text`` with every marked table made again from its record, and every picture that exists.

    Args:
        text: of a page.
        root: the way from the page to the repository's root, as ``"../"``.
    """

    def table(match: re.Match[str]) -> str:
        record = json.loads((RESULTS / match["file"]).read_text())
        return f"{match[1]}{_TABLES[match['kind']](record, match['file'])}{match[4]}"

    return _TABLE.sub(table, text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.render", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is out of date")
    options = parser.parse_args()
    for page in PAGES:
        text = page.read_text()
        rendered = render(text, "" if page == README else "../")
        if options.check and rendered != text:
            sys.exit(f"{page.name} is out of date: run python -m benchmarks.render")
        page.write_text(rendered)


if __name__ == "__main__":
    main()
