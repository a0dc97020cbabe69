"""What a record holds, and whether one is whole.

    python -m benchmarks.report.record FILE ...    # says what is wrong with each; a test asks it of the committed ones

Every benchmark writes one JSON file an answer, under ``benchmarks/results/<device>/``, or into ``./fastdense-bench``
where fastdense is installed. JSON knows neither NaN nor infinity: they are the strings ``"nan"``, ``"inf"``,
``"-inf"``. Forms of their own have ``compiled/kernels.json`` (:mod:`benchmarks.compiled.report`), ``cpu/micro.json``
(pytest-benchmark's) and the records of ``benchmarks.gpu`` (stages).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from ..harness.runner import SCHEMA

Form = dict[str, Any]  # the type of each field

# One answer of a benchmark.
RECORD: Form = {
    "schema": int,  # version of this form
    "kind": str,  # speed, memory, depth
    "complete": bool,  # false: interrupted; it holds what had been measured
    "date": str,  # ISO 8601 in UTC
    "command": str,  # what was typed
    "commit": str,  # git's description, or the version of what is installed
    "sources": str,  # a digest of the code
    "device": str,  # cpu, or the GPU's name
    "processor": str,
    "threads": int,
    "platform": str,
    "python": str,
    "torch": str,
    "triton": str | None,  # None: not installed
    "torchvision": str | None,
    # What was measured. Of depth: `budget` in bytes, `method` (bytes counted, or steps on a GPU), `dtype`, `optimizer`,
    # `seconds` (a limit of the search).
    "settings": dict,
    # Of speed, from a provider's label to a ROW; of memory the same for each network; of depth, from a question to its
    # `title`, what `grows`, and for each provider the largest that fits, whether the search is `complete`, and its
    # `trials` with their bytes.
    "results": dict,
}
# Of a GPU; and of depth: each provider's check, and its counted bytes beside those of a real step.
SOMETIMES: Form = {"driver": str, "cuda": str | None, "cudnn": int | None, "checks": dict}

# What speed and memory measured.
SETTINGS: Form = {
    "batch": int,  # images a step
    "size": int,  # their height and width in pixels
    "dtype": str,  # float32, TF32; float16, bfloat16: parameters in float32, the step under autocast
    "layout": str,  # of images and weights: channels_last or contiguous
}
SETTINGS_OF: dict[str, Form] = {
    "speed": {"model": str, "processes": int},  # a name of providers.MODELS; fresh processes whose steps are pooled
    "memory": {"models": list, "depths": dict},  # CIFAR-style: {"of": {network: depth}, "size", "growth_rate"}
}

TIMING: Form = {"median": float, "p20": float, "p80": float, "repeats": int}

# What was found of one provider.
ROW: Form = {
    "checked": bool,  # whether output and gradients agree with torchvision's; where not, nothing else was measured
    # 2-norm over 2-norm of output and all gradients as one vector. In float64 against torchvision (at most 1e-9
    # passes); for compiled code and kernels, in float32 against torchvision's float64.
    "relative_difference": float | str,
    "unavailable": str,  # why it cannot run here
    "error": str,  # what happened to it: out of memory, for instance
    "bytes_kept": int,  # saved by the forward pass for backward, each storage once; without parameters and images
    "bytes_peak": int,  # most at one time during a step minus those at its start; without parameters and gradients
    "first_seconds": float,  # of the first step in a new process with an empty torch.compile cache
    "step": dict,  # a TIMING by the host's clock, from start until the device has finished
    "forward": dict,
    "backward": dict,
    "optimizer": dict,  # SGD with momentum
    "images_per_second": float,  # `batch` over the median step
    "batches": dict,  # with --batches: from a batch size to the same timings and images_per_second, or an `error`
}


def complaints(record: Any) -> list[str]:
    """Returns what is wrong with a record, as read from its file; empty if nothing is."""
    return list(_wrong(record)) if isinstance(record, dict) else ["a record is an object"]


def _wrong(record: dict[str, Any]) -> Iterator[str]:
    if record.get("schema") != SCHEMA:
        yield f"schema must be {SCHEMA}, got {record.get('schema')!r}"
    yield from (f"{name} is missing" for name in RECORD if name not in record)
    yield from _types("", record, RECORD | SOMETIMES)
    try:
        datetime.fromisoformat(str(record.get("date")))
    except ValueError:
        yield f"date: {record.get('date')!r} is no date of ISO 8601"
    yield from _timings("", record)
    kind, settings, results = record.get("kind"), record.get("settings"), record.get("results")
    if kind in SETTINGS_OF and isinstance(settings, dict) and isinstance(results, dict):
        yield from (f"settings.{name} is missing" for name in SETTINGS if name not in settings)
        yield from _types("settings.", settings, SETTINGS | SETTINGS_OF[kind], closed=True)
        for group, rows in ({"": results} if kind == "speed" else results).items():
            for label, row in rows.items():
                yield from _row(f"results.{group}.{label}.", row)


def _row(where: str, row: dict[str, Any]) -> Iterator[str]:
    yield from _types(where, row, ROW, closed=True)
    if not {"checked", "unavailable", "error"} & row.keys():
        yield f"{where} must say checked, unavailable or error"
    if {"step", "bytes_kept", "bytes_peak"} & row.keys() and row.get("checked") is not True:
        yield f"{where} was measured although its check did not pass"


def _types(where: str, found: dict[str, Any], form: Form, *, closed: bool = False) -> Iterator[str]:
    for name, value in found.items():
        kind = form.get(name)
        if kind is None and closed:
            yield f"{where}{name} is not known"
        elif kind is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            yield f"{where}{name} is {value!r}"


def _timings(where: str, value: Any) -> Iterator[str]:
    """Every timing, however deep: whole, positive and in order."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return
    if "median" not in value:
        for key, inner in value.items():
            yield from _timings(f"{where}{key}.", inner)
    elif value.keys() != TIMING.keys() or any(_types(where, value, TIMING)):
        yield f"{where} is no timing: {value}"
    elif not 0 <= value["p20"] <= value["median"] <= value["p80"] or value["repeats"] < 1:
        yield f"{where} is no timing, which has an order: {value}"


def main() -> None:
    """Command line."""
    read = {path: json.loads(Path(path).read_text()) for path in sys.argv[1:]}
    sys.exit("\n".join(f"{path}: {text}" for path, found in read.items() for text in complaints(found)) or 0)


if __name__ == "__main__":
    main()
