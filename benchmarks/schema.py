"""Whether a record is what schema.md says; records of earlier schemas stay readable.

python -m benchmarks.schema FILE ...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from .runner import SCHEMA

HEADER: dict[str, type | tuple[type, ...]] = {
    "schema": int, "date": str, "command": str, "commit": str, "device": str, "processor": str, "threads": int,
    "platform": str, "python": str, "torch": str,
}  # fmt: skip
SINCE_2: dict[str, type | tuple[type, ...]] = {
    "sources": str,
    "triton": (str, type(None)),
    "torchvision": (str, type(None)),
}
SETTINGS: dict[str, type | tuple[type, ...]] = {"batch": int, "size": int, "dtype": str, "layout": str}
TIMING: dict[str, type | tuple[type, ...]] = {"median": float, "p20": float, "p80": float, "repeats": int}
ROW: dict[str, type | tuple[type, ...]] = {
    "relative_difference": (float, str), "checked": bool, "unavailable": str, "error": str, "first_seconds": float,
    "bytes_kept": int, "bytes_peak": int, "images_per_second": float, "batches": dict,
    "step": dict, "forward": dict, "backward": dict, "optimizer": dict,
}  # fmt: skip
MEASURED = {"step", "bytes_kept", "bytes_peak"}


def complaints(record: Any) -> list[str]:
    """What is wrong with a record, as read from its file; empty if nothing is."""
    return list(_record(record))


def _record(record: Any) -> Iterator[str]:
    if not isinstance(record, dict):
        yield f"a record is an object, not {type(record).__name__}"
        return
    version = record.get("schema")
    if not isinstance(version, int) or not 1 <= version <= SCHEMA:
        yield f"schema must be 1 to {SCHEMA}, got {version!r}"
        return
    yield from _fields("", record, HEADER if version == 1 else HEADER | SINCE_2, required=True)
    try:
        datetime.fromisoformat(str(record.get("date")))
    except ValueError:
        yield f"date: {record.get('date')!r} is no date of ISO 8601"
    yield from _timings("", record)
    settings, results = record.get("settings"), record.get("results")
    if not isinstance(settings, dict) or not isinstance(results, dict):
        yield "settings and results must be objects"
        return
    kind = record.get("kind") or _kind(settings)
    if kind not in ("speed", "memory"):
        return  # their own pages say what they hold
    yield from _fields("settings.", settings, SETTINGS, required=True)
    if version > 1:
        yield from _fields("", record, {"kind": str, "complete": bool}, required=True)
    groups = {"": results} if kind == "speed" else results
    for group, rows in groups.items():
        for label, row in rows.items():
            yield from _row(f"results.{group}{'.' if group else ''}{label}.", row)


def _kind(settings: Mapping[str, Any]) -> str | None:
    """Of a record of schema 1, which does not say it."""
    return "memory" if "models" in settings else "speed" if "processes" in settings else None


def _row(where: str, row: Any) -> Iterator[str]:
    if not isinstance(row, dict):
        yield f"{where} is no object"
        return
    yield from _fields(where, row, ROW, required=False)
    yield from (f"{where}{key} is not known" for key in row.keys() - ROW.keys())
    if not {"checked", "unavailable", "error"} & row.keys():
        yield f"{where} must say checked, unavailable or error"
    if MEASURED & row.keys() and row.get("checked") is not True:
        yield f"{where} was measured although its check did not pass"


def _fields(where: str, found: Mapping[str, Any], wanted: Mapping[str, Any], *, required: bool) -> Iterator[str]:
    for key, kind in wanted.items():
        if key not in found:
            if required:
                yield f"{where}{key} is missing"
        elif not isinstance(found[key], kind) or (isinstance(found[key], bool) and kind is not bool):
            yield f"{where}{key} is {found[key]!r}"


def _timings(where: str, value: Any) -> Iterator[str]:
    """Every timing, however deep: whole, positive and in order."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return
    if "median" in value:
        wrong = list(_fields(where, value, TIMING, required=True))
        yield from wrong
        if not wrong and not (0 <= value["p20"] <= value["median"] <= value["p80"] and value["repeats"] > 0):
            yield f"{where} is no timing: {value}"
        return
    for key, inner in value.items():
        yield from _timings(f"{where}{key}.", inner)


def main() -> None:
    """Command line."""
    found = [f"{path}: {text}" for path in sys.argv[1:] for text in complaints(json.loads(Path(path).read_text()))]
    sys.exit("\n".join(found) or 0)


if __name__ == "__main__":
    main()
