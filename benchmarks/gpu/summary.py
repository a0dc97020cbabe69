"""What a run found, as text short enough to be read in one go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from io import StringIO
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..roofline import Bar, bars, of_profile

CHARACTERS = 10_000
WIDTH = 118
ROWS = 12  # of a table of kernels
LISTED = 5  # of what went wrong in one stage
REHEARSAL = "REHEARSAL on the CPU, in Triton's interpreter: it ran, and no figure below says anything about a GPU."

Result = Mapping[str, Any]


def summary(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """All stages of a record (``gpu.json``'s ``"stages"``) in at most ``CHARACTERS`` characters."""
    text = StringIO()
    console = Console(file=text, width=WIDTH, color_system=None, highlight=False, markup=False, emoji=False)
    for block in _blocks(stages):
        console.print(block)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    found = "\n".join(line for line in lines if line)
    note = "\n... the rest is in gpu.json"
    return found if len(found) <= CHARACTERS else found[: CHARACTERS - len(note)] + note


def _blocks(stages: Mapping[str, Mapping[str, Any]]) -> Iterator[str | Table]:
    if not stages:
        return
    made = list(stages.values())[-1]["environment"]
    rehearsal = made.get("rehearsal", False)
    if rehearsal:
        yield REHEARSAL
    names = ("device", "driver", "torch", "triton", "python", "commit", "sources", "date")
    yield ", ".join(f"{name} {made.get(name)}" for name in names)
    yield _status(stages)
    show: dict[str, Callable[[Result], Iterator[str | Table]]] = {  # where it is too much, the end is cut off
        "rates": _rates,
        "smoke": _smoke,
        "check": _check,
        "tests": _tests,
        "tests-again": _tests,
        "batch64": _steps,
        "batch256": _steps,
        "compiled-batch64": _steps,
        "compiled-batch256": _steps,
        "compiled-batch8": _steps,
        "densenet201": _steps,
        "batch1": _steps,
        "depth": _depth,
        "sanitizer": _sanitizer,
        "layers": _layers,
        "candidates": _candidates,
        "counters": _counters,
    }
    for name, blocks in show.items():
        result = stages.get(name, {}).get("result")
        if result and not (rehearsal and name == "rates"):
            yield from blocks(result)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def _milliseconds(seconds: float | None, digits: int = 2) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.{digits}f}"


def _status(stages: Mapping[str, Mapping[str, Any]]) -> Table:
    table = _table("stages", "stage", "status", "s", "")
    for name, entry in stages.items():
        last = entry.get("error", "").strip().splitlines()[-1:]
        table.add_row(name, entry["status"], f"{entry['seconds']:.0f}", "".join(last)[:70])
    return table


def _smoke(result: Result) -> Iterator[str]:
    for label, found in result.items():
        used = {name: _float(row["error"]) / _float(row["allowed"]) for name, row in found["errors"].items()}
        worst = max(used, key=lambda name: used[name])
        verdict = f"WRONG: {', '.join(found['wrong'][:LISTED])}" if found["wrong"] else "right"
        again = f"; {found['differing_reruns']} RERUNS DIFFER" if found["differing_reruns"] else ""
        yield f"smoke, {label}: {verdict}{again}; {worst} uses {used[worst]:.2f} of its error budget"
        for name, simpler in found.get("simpler", {}).items():
            yield f"  with {name}: {simpler}"[:WIDTH]


def _check(result: Result) -> Iterator[str]:
    for label, row in result.items():
        errors = (f"{name} {_float(row[name]['error']):.1e} (torchvision {_float(row[name]['torchvision']):.1e})"
                  for name in row if name != "checked")  # fmt: skip
        yield f"{label}: {'right' if row['checked'] else 'WRONG'}; error {', '.join(errors)}"


def _float(value: float | str) -> float:
    """NaN and infinity are recorded by name."""
    return float(value)


def _tests(result: Result) -> Iterator[str]:
    counts = ", ".join(f"{result[key]} {key}" for key in ("passed", "failed", "skipped"))
    yield f"tests: {counts} of {result['selected']}"
    yield from (f"  failed: {name}"[:WIDTH] for name in list(result["failures"])[:LISTED])


def _rates(result: Result) -> Iterator[str]:
    products = (f"{name} {result[name]['per_second'] / 1e12:.0f}" for name in ("bfloat16", "float16", "tf32"))
    yield f"rates: copy {result['copy']['per_second'] / 1e12:.3f} TB/s; products in Tflop/s: {', '.join(products)}"


def _layers(result: Result) -> Iterator[str | Table]:
    for label, found in result.items():
        busy = f"; the device is busy for {found['busy']:.0%} of the eager step" if "busy" in found else ""
        yield (
            f"{label}: {found['kernels']} kernels, {_milliseconds(found['device_seconds'])} ms on the device, "
            f"{_milliseconds(found['ours_seconds'])} ms of it in ours{busy}"
        )
    label, found = list(result.items())[-1]
    # One table in full: the others are in the record, and in the picture.
    yield _kernel_table(f"{label}: ms a step on the device; floors modelled", bars(of_profile(found)))
    others = sorted(found["others"].items(), key=lambda pair: -pair[1])[:LISTED]
    yield "not ours: " + "; ".join(f"{name[:40]} {_milliseconds(seconds)} ms" for name, seconds in others)


def _kernel_table(title: str, group: list[Bar]) -> Table:
    """One line for an operation and a resolution; first where most is lost above the floor."""
    table = _table(title, "kernel", "m", "times", "measured", "floor", "x floor", "above floor")
    for bar in sorted(group, key=lambda bar: bar.floor - (bar.measured or 0.0))[:ROWS]:
        measured = bar.measured or 0.0
        ratio = f"{measured / bar.floor:.2f}" if bar.floor else ""
        cells = (_milliseconds(value, 3) for value in (measured, bar.floor))
        table.add_row(bar.operation, str(bar.m), str(bar.times), *cells, ratio, _milliseconds(measured - bar.floor, 3))
    return table


def _depth(result: Result) -> Iterator[str]:
    for question in result.get("results", {}).values():
        rows = question["providers"].values()
        answers = (f"{row['label']} {row[question['grows']]}{'' if row['complete'] else ' or more'}" for row in rows)
        yield f"{question['title']}: {'; '.join(answers) or 'nobody took part'}"


def _sanitizer(result: Result) -> Iterator[str]:
    for name, row in result.items():
        if isinstance(row, Mapping):
            found = "did not finish" if row["found"] is None else f"{row['found']} found"
            yield f"{name}: {found}, {row['ran']} primitives run"


def _steps(result: Result) -> Iterator[str | Table]:
    floor = result.get("modelled", {}).get("floor_seconds")
    title = f"{result['network']}, {result['batch']} x {result['size']}^2, {result['dtype']}, training step"
    if floor:
        title += f"; modelled floor {floor * 1e3:.2f} ms, {result['batch'] / floor:.0f} img/s"
    table = _table(title, "", "ms", "p20 - p80", "x torchvision", "img/s", "host ms", "peak MB", "first s")
    rows, missing = result["rows"], []
    base = rows.get("torchvision, eager", {}).get("step", {}).get("median")
    for label, row in rows.items():
        if (step := row.get("step")) is None:
            status = row.get("status", "not timed" if row["checked"] is not False else "not timed: wrong")
            why = row.get("error", "").strip().splitlines()[-1:]
            missing.append(": ".join([label, status, *why])[:WIDTH])
            continue
        peak = row.get("peak_bytes")
        table.add_row(
            label,
            _milliseconds(step["median"], 1),
            f"{_milliseconds(step['p20'], 1)} - {_milliseconds(step['p80'], 1)}",
            f"{base / step['median']:.2f}" if base else "",
            f"{row['images_per_second']:.0f}",
            _milliseconds(row["host"]["median"], 1),
            "" if peak is None else f"{peak / 1e6:.0f}",
            f"{row['first_seconds']:.1f}",
        )
    yield table
    yield from missing


def _candidates(result: Result) -> Iterator[str | Table]:
    """Of each kernel and map the table's own choice and the best of the others."""
    cases: dict[tuple[str, int], list[Result]] = {}
    for row in result["rows"]:
        cases.setdefault((row["operation"], row["m"]), []).append(row)
        if not row["checked"]:
            yield f"not timed: {row['operation']} m={row['m']} {_change(row)}: {row.get('error', row.get('worst'))}"[
                :WIDTH
            ]
    table = _table("launch configurations, microseconds", "kernel", "m", "floor", "chosen", "again", "best", "others")
    for (operation, m), rows in cases.items():
        own = [row["timing"]["median"] for row in rows if not row["change"] and "timing" in row]
        tried = sorted((row["timing"]["median"], _change(row)) for row in rows if row["change"] and "timing" in row)
        if own and tried:
            floor = f"{rows[0].get('floor_seconds', 0.0) * 1e6:.0f}"
            best, *others = (f"{seconds * 1e6:.0f} {change}" for seconds, change in tried[:2])
            table.add_row(
                operation, str(m), floor, f"{own[0] * 1e6:.0f}", f"{own[-1] * 1e6:.0f}", best, "; ".join(others)
            )
    yield table


def _change(row: Result) -> str:
    """A change in short: ``128x64x128 w8 s3``."""
    change = dict(row["change"])
    tile = "x".join(str(change.pop(name)) for name in ("block_m", "block_c", "block_k") if name in change)
    rest = [f"{name[0] if name.startswith('num') is False else name[4]}{value}" for name, value in change.items()]
    return " ".join([*([tile] if tile else []), *rest])


def _counters(result: Result) -> Iterator[Table]:
    table = _table("hardware counters", "kernel", "m", "us", "L2 hit %", "issue %", "warps %", "waves", "most stalled")
    for row in result["rows"]:
        stalls = sorted(((value, name) for name, value in row.items() if name.startswith("stalled")), reverse=True)
        table.add_row(
            row["operation"], str(row["m"]), f"{row['nanoseconds'] / 1e3:.1f}",
            *(f"{row.get(name, math.nan):.0f}" for name in ("L2 hits %", "issue slots %", "warps active %")),
            f"{row.get('waves', math.nan):.2f}", ", ".join(f"{name[9:]} {value:.1f}" for value, name in stalls[:3]),
        )  # fmt: skip
    yield table
