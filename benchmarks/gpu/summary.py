"""What a run found, as text short enough to be read in one go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from io import StringIO
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

CHARACTERS = 10_000
WIDTH = 118
ROWS = 20  # of a table of kernels
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
    show: dict[str, Callable[[Result], Iterator[str | Table]]] = {
        "smoke": _smoke,
        "gpu-tests": _tests,
        "kernel-tests": _tests,
        "rates": _rates,
        "kernels": _kernels,
        "densenet121-batch64": _steps,
        "densenet121-batch256": _steps,
        "densenet201-batch64": _steps,
        "host": _steps,
        "candidates": _candidates,
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
            those = [row for row in timed if network in row["times"] and row["dtype"] == dtype]
            if those:
                yield _kernel_table(f"kernels of {network}, {dtype}, ms a step; floors modelled", network, those)


def _kernel_table(title: str, network: str, rows: list[Result]) -> Table:
    """One line for an operation and a resolution; first where most is lost above the floor."""
    sums: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        times = row["times"][network]
        floor, host = row.get("floor_seconds", 0.0), row["host_seconds"]
        sums.setdefault((row["operation"], row["m"]), [0.0] * 4)
        for i, value in enumerate((1.0, row["timing"]["median"], floor, host)):
            sums[row["operation"], row["m"]][i] += times * value
    table = _table(title, "primitive", "m", "times", "measured", "floor", "x floor", "above floor", "host")
    for (operation, m), (times, measured, floor, host) in sorted(
        sums.items(), key=lambda pair: pair[1][2] - pair[1][1]
    )[:ROWS]:
        ratio = f"{measured / floor:.2f}" if floor else ""
        cells = (_milliseconds(value, 3) for value in (measured, floor))
        above = _milliseconds(measured - floor, 3)
        table.add_row(operation, str(m), f"{times:.0f}", *cells, ratio, above, _milliseconds(host, 3))
    return table


def _steps(result: Result) -> Iterator[Table]:
    floor = result.get("modelled", {}).get("floor_seconds")
    title = f"{result['network']}, {result['batch']} x {result['size']}^2, {result['dtype']}, training step"
    if floor:
        title += f"; modelled floor {floor * 1e3:.2f} ms"
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
