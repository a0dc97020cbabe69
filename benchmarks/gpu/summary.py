"""What a run found, as text short enough to be read in one go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table

from ..report.tables import console_table
from ..roofline import bars
from .run import last_line
from .steps import COMPARISONS

CHARACTERS = 10_000
WIDTH = 118
ROWS = 12  # of a table of kernels
LISTED = 5  # of what went wrong in one stage
REHEARSAL = "REHEARSAL on the CPU, in Triton's interpreter: it ran, and no number below says anything about a GPU."
MADE = ("device", "driver", "torch", "triton", "python", "commit", "sources", "date")

Result = Mapping[str, Any]
Blocks = Iterator[str | Table]


def summary(stages: Mapping[str, Result]) -> str:
    """Renders the stages of a record (``gpu.json``'s ``"stages"``) in at most ``CHARACTERS`` characters."""
    text = StringIO()
    console = Console(file=text, width=WIDTH, color_system=None, highlight=False, markup=False, emoji=False)
    for block in _blocks(stages):
        console.print(block)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    found = "\n".join(line for line in lines if line)
    note = "\n... the rest is in gpu.json"
    return found if len(found) <= CHARACTERS else found[: CHARACTERS - len(note)] + note


def _blocks(stages: Mapping[str, Result]) -> Blocks:
    made = list(stages.values())[-1]["environment"]
    rehearsal = made.get("rehearsal", False)
    if rehearsal:
        yield REHEARSAL
    yield ", ".join(f"{name} {made.get(name)}" for name in MADE)
    rows = ((name, one["status"], f"{one['seconds']:.0f}", last_line(one)[:70]) for name, one in stages.items())
    yield _table("stages", ("stage", "status", "s", ""), rows)
    for name, show in SHOWN.items():
        result = stages.get(name, {}).get("result")
        if result and not (rehearsal and name == "rates"):
            yield from show(result)


def _table(title: str, headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    table = console_table(title, headings, rows)
    for column in table.columns:
        column.no_wrap, column.overflow = True, "ellipsis"
    return table


def _ms(seconds: float, digits: int = 2) -> str:
    return f"{seconds * 1e3:.{digits}f}"


def _rates(result: Result) -> Blocks:
    products = (f"{name} {result[name]['per_second'] / 1e12:.0f}" for name in ("bfloat16", "float16", "tf32"))
    yield f"rates: copy {result['copy']['per_second'] / 1e12:.3f} TB/s; products in Tflop/s: {', '.join(products)}"


def _smoke(result: Result) -> Blocks:
    for label, found in result.items():
        # NaN and infinity are recorded by name.
        used = {name: float(row["error"]) / float(row["allowed"]) for name, row in found["errors"].items()}
        worst = max(used, key=lambda name: used[name])
        verdict = f"WRONG: {', '.join(found['wrong'][:LISTED])}" if found["wrong"] else "right"
        again = f"; {found['differing_reruns']} RERUNS DIFFER" if found["differing_reruns"] else ""
        yield f"smoke, {label}: {verdict}{again}; {worst} uses {used[worst]:.2f} of its error budget"
        yield from (f"  with {name}: {simpler}"[:WIDTH] for name, simpler in found.get("simpler", {}).items())


def _check(result: Result) -> Blocks:
    for label, row in result.items():
        errors = [(name, *map(float, both.values())) for name, both in row.items() if name != "checked"]
        listed = ", ".join(f"{name} {mine:.1e} (torchvision {theirs:.1e})" for name, mine, theirs in errors)
        yield f"{label}: {'right' if row['checked'] else 'WRONG'}; error {listed}"


def _tests(result: Result) -> Blocks:
    counts = ", ".join(f"{result[key]} {key}" for key in ("passed", "failed", "skipped"))
    yield f"tests: {counts} of {result['selected']}"
    yield from (f"  failed: {name}"[:WIDTH] for name in list(result["failures"])[:LISTED])


def _steps(result: Result) -> Blocks:
    title = f"{result['network']}, {result['batch']} x {result['size']}^2, {result['dtype']}, training step"
    if floor := result.get("modelled", {}).get("floor_seconds"):
        title += f"; modelled floor {floor * 1e3:.2f} ms, {result['batch'] / floor:.0f} img/s"
    rows, missing = [], []
    base = result["rows"].get("torchvision, eager", {}).get("step", {}).get("median")
    for label, row in result["rows"].items():
        if "step" not in row:
            status = row.get("status", "not timed" + ": wrong" * (row["checked"] is False))
            missing.append(": ".join(filter(None, (label, status, last_line(row))))[:WIDTH])
            continue
        median, p20, p80 = (_ms(row["step"][key], 1) for key in ("median", "p20", "p80"))
        peak = f"{row['peak_bytes'] / 1e6:.0f}" if row.get("peak_bytes") else ""
        times = f"{base / row['step']['median']:.2f}" if base else ""
        speed, host = f"{row['images_per_second']:.0f}", _ms(row["host"]["median"], 1)
        rows.append((label, median, f"{p20} - {p80}", times, speed, host, peak, f"{row['first_seconds']:.1f}"))
    yield _table(title, ("", "ms", "p20 - p80", "x torchvision", "img/s", "host ms", "peak MB", "first s"), rows)
    yield from missing


def _depth(result: Result) -> Blocks:
    for question in result.get("results", {}).values():
        rows = question["providers"].values()
        answers = (f"{row['label']} {row[question['grows']]}{'' if row['complete'] else ' or more'}" for row in rows)
        yield f"{question['title']}: {'; '.join(answers) or 'no provider took part'}"


def _sanitizer(result: Result) -> Blocks:
    for name, row in result.items():
        if isinstance(row, Mapping):
            found = "did not finish" if row["found"] is None else f"{row['found']} found"
            yield f"{name}: {found}, {row['ran']} primitives run"


def _layers(result: Result) -> Blocks:
    for label, found in result.items():
        busy = f"; the device is busy for {found['busy']:.0%} of the eager step" if "busy" in found else ""
        device, ours = _ms(found["device_seconds"]), _ms(found["ours_seconds"])
        yield f"{label}: {found['kernels']} kernels, {device} ms on the device, {ours} ms of it in ours{busy}"
    # One table in full: the others are in the record, and in the picture. First where most is lost above the floor.
    label, found = list(result.items())[-1]
    rows = []
    for bar in sorted(bars(found["rows"]), key=lambda bar: bar.floor - (bar.measured or 0.0))[:ROWS]:
        measured = bar.measured or 0.0
        times = (_ms(measured, 3), _ms(bar.floor, 3), f"{measured / bar.floor:.2f}" if bar.floor else "")
        rows.append((bar.operation, bar.m, bar.times, *times, _ms(measured - bar.floor, 3)))
    columns = ("kernel", "m", "times", "measured", "floor", "x floor", "above floor")
    yield _table(f"{label}: ms a step on the device; floors modelled", columns, rows)
    others = sorted(found["others"].items(), key=lambda pair: -pair[1])[:LISTED]
    yield "not ours: " + "; ".join(f"{name[:40]} {_ms(seconds)} ms" for name, seconds in others)


def _candidates(result: Result) -> Blocks:
    """For each kernel and map the table's own choice and the best of the others."""
    cases: dict[tuple[str, int], list[Result]] = {}
    for row in result["rows"]:
        cases.setdefault((row["operation"], row["m"]), []).append(row)
        if not row["checked"]:
            why = row.get("error", row.get("worst"))
            yield f"not timed: {row['operation']} m={row['m']} {_change(row)}: {why}"[:WIDTH]
    lines = []
    for (operation, m), rows in cases.items():
        timed = [(row["timing"]["median"], _change(row)) for row in rows if "timing" in row]
        own = [f"{seconds * 1e6:.0f}" for seconds, change in timed if not change]
        tried = [f"{seconds * 1e6:.0f} {change}" for seconds, change in sorted(timed) if change]
        if own and tried:
            floor = f"{rows[0].get('floor_seconds', 0.0) * 1e6:.0f}"
            lines.append((operation, str(m), floor, own[0], own[-1], tried[0], "; ".join(tried[1:2])))
    columns = ("kernel", "m", "floor", "chosen", "again", "best", "others")
    yield _table("launch configurations, microseconds", columns, lines)


def _change(row: Result) -> str:
    """A change in short: ``128x64x128 w8 s3``."""
    change = dict(row["change"])
    tile = "x".join(str(change.pop(name)) for name in ("block_m", "block_c", "block_k") if name in change)
    rest = (f"{name.removeprefix('num_')[0]}{value}" for name, value in change.items())
    return " ".join(filter(None, (tile, *rest)))


def _counters(result: Result) -> Blocks:
    rows = []
    for row in result["rows"]:
        stalls = sorted(((value, name) for name, value in row.items() if name.startswith("stalled")), reverse=True)
        shares = (f"{row.get(name, math.nan):.0f}" for name in ("L2 hits %", "issue slots %", "warps active %"))
        stalled = ", ".join(f"{name[9:]} {value:.1f}" for value, name in stalls[:3])
        waves = f"{row.get('waves', math.nan):.2f}"
        rows.append((row["operation"], str(row["m"]), f"{row['nanoseconds'] / 1e3:.1f}", *shares, waves, stalled))
    columns = ("kernel", "m", "us", "L2 hit %", "issue %", "warps %", "waves", "most stalled")
    yield _table("hardware counters", columns, rows)


# In this order: where it is too much, the end is cut off.
SHOWN: dict[str, Callable[[Result], Blocks]] = {
    "rates": _rates, "smoke": _smoke, "check": _check, "tests": _tests, "tests-again": _tests,
    **dict.fromkeys(COMPARISONS, _steps), "depth": _depth, "sanitizer": _sanitizer,
    "layers": _layers, "candidates": _candidates, "counters": _counters,
}  # fmt: skip
