"""What a run found, as text short enough to be read in one go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from io import StringIO
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..roofline import Bar, bars

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
        "smoke": _smoke,
        "gpu-tests": _tests,
        "kernel-tests": _tests,
        "rates": _rates,
        "densenet121-batch64": _steps,
        "densenet121-batch256": _steps,
        "kernels": _kernels,
        "sanitizer": _sanitizer,
        "depth": _depth,
        "host": _steps,
        "graphs": _graphs,
        "densenet201-batch64": _steps,
        "candidates": _candidates,
    }
    for name, blocks in show.items():
        result = stages.get(name, {}).get("result")
        if result and "dropped" not in result and not (rehearsal and name == "rates"):
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
        again = "" if found["repeatable"] else "; TWO RUNS DIFFER"
        yield f"smoke, {label}: {verdict}{again}; {worst} uses {used[worst]:.2f} of its error budget"


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


def _kernels(result: Result) -> Iterator[str | Table]:
    rows = result["rows"]
    for row in [row for row in rows if not row["checked"]][:LISTED]:
        why = row.get("error") or "off by " + ", ".join(f"{name} {_float(e):.1e}" for name, e in row["errors"].items())
        yield f"not timed: {row['operation']} {row['dtype']} m={row['m']} reads={row['reads']}: {why}"[: 2 * WIDTH]
    if result["not_reached"]:
        yield f"kernels: {result['not_reached']} of {len(rows) + result['not_reached']} shapes not reached"
    timed = [row for row in rows if "timing" in row]
    for network in dict.fromkeys(name for row in timed for name in row["times"]):
        for dtype in dict.fromkeys(row["dtype"] for row in timed):
            found = bars([row for row in timed if row["dtype"] == dtype], network)
            if found:
                yield _totals(f"kernels of {network}, {dtype}", found)
    if timed:  # one table in full: the others are in the record, and in the picture
        network, dtype = next(iter(timed[0]["times"])), timed[0]["dtype"]
        group = bars([row for row in timed if row["dtype"] == dtype], network)
        yield _kernel_table(f"kernels of {network}, {dtype}, ms a step; floors modelled", group)


def _totals(what: str, group: list[Bar]) -> str:
    measured, floor = sum(bar.measured or 0.0 for bar in group), sum(bar.floor for bar in group)
    reached = f", {floor / measured:.0%} of the floor's rate" if floor and measured else ""
    return f"{what}: {measured * 1e3:.2f} ms a step, floor (modelled) {floor * 1e3:.2f} ms{reached}"


def _kernel_table(title: str, group: list[Bar]) -> Table:
    """One line for an operation and a resolution; first where most is lost above the floor."""
    table = _table(title, "primitive", "m", "times", "measured", "floor", "x floor", "above floor", "host")
    for bar in sorted(group, key=lambda bar: bar.floor - (bar.measured or 0.0))[:ROWS]:
        measured = bar.measured or 0.0
        ratio = f"{measured / bar.floor:.2f}" if bar.floor else ""
        cells = (_milliseconds(value, 3) for value in (measured, bar.floor))
        above, host = _milliseconds(measured - bar.floor, 3), _milliseconds(bar.host, 3)
        table.add_row(bar.operation, str(bar.m), str(bar.times), *cells, ratio, above, host)
    return table


def _graphs(result: Result) -> Iterator[Table]:
    table = _table(f"batch {result['batch']}: the host's time, eager and without it", "", "ms", "host ms", "first s")
    for label, row in result["rows"].items():
        if "step" in row:
            cells = [_milliseconds(row[key]["median"], 2) for key in ("step", "host")]
            table.add_row(label, *cells, f"{row['first_seconds']:.1f}")
        else:
            table.add_row(label, row.get("status", "not timed: wrong"))
    yield table


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


def _steps(result: Result) -> Iterator[Table]:
    floor = result.get("modelled", {}).get("floor_seconds")
    title = f"{result['network']}, {result['batch']} x {result['size']}^2, {result['dtype']}, training step"
    if floor:
        title += f"; modelled floor {floor * 1e3:.2f} ms, {result['batch'] / floor:.0f} img/s"
    table = _table(title, "", "ms", "p20 - p80", "ratio", "img/s", "host ms", "peak MB", "launches", "first s")
    providers = result["providers"]
    base = providers.get("torchvision", {}).get("step", {}).get("median")
    for label, row in providers.items():
        if (step := row.get("step")) is None:
            right = "not timed" if row["checked"] is not False else "not timed: wrong"
            table.add_row(label, row.get("status", right))
            continue
        peak, launches = row.get("peak_bytes"), row.get("launches")
        table.add_row(
            label,
            _milliseconds(step["median"], 1),
            f"{_milliseconds(step['p20'], 1)} - {_milliseconds(step['p80'], 1)}",
            f"{step['median'] / base:.2f}" if base else "",
            f"{result['batch'] / step['median']:.0f}",
            _milliseconds(row["host"]["median"], 1),
            "" if peak is None else f"{peak / 1e6:.0f}",
            "" if launches is None else str(launches),
            f"{row['first_seconds']:.1f}",
        )
    yield table


def _candidates(result: Result) -> Iterator[Table]:
    """The launch configurations that gained most against the table's own choice, timed first and last."""
    base: dict[tuple[Any, ...], list[float]] = {}
    gains = []
    for row in result["rows"]:
        if "timing" not in row:
            continue
        case = (row["operation"], row["m"], row["reads"])
        if row["kernel"] is None:
            base.setdefault(case, []).append(row["timing"]["median"])
        else:
            gains.append((row["timing"]["median"] / base[case][0], case, row))
    table = _table("launch configurations against the table's choice", "primitive", "m", "change", "ms", "x", "again")
    for ratio, case, row in sorted(gains, key=lambda gain: gain[0])[: 2 * LISTED]:
        change = f"{row['kernel']}: {', '.join(f'{key}={value}' for key, value in row['change'].items())}"
        again = f"{base[case][-1] / base[case][0]:.2f}" if len(base[case]) > 1 else ""
        table.add_row(case[0], str(case[1]), change, _milliseconds(row["timing"]["median"], 3), f"{ratio:.2f}", again)
    yield table
