"""What a record holds, and whether one is whole.

Every benchmark writes one JSON file an answer, under ``benchmarks/results/<device>/``, or into ``./fastdense-bench``
where fastdense is installed. JSON knows neither NaN nor infinity: they are the strings ``"nan"``, ``"inf"``,
``"-inf"``. Forms of their own have ``compiled/kernels.json`` (:mod:`benchmarks.compiled.report`), ``cpu/micro.json``
(pytest-benchmark's) and the records of ``benchmarks.gpu`` (stages).
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
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

TIMING = ("p20", "median", "p80", "repeats")

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


def complaints(record: dict[str, Any]) -> list[str]:
    """Returns what is wrong with a record, as read from its file; empty if nothing is."""
    return list(_wrong(record))


def _wrong(record: dict[str, Any]) -> Iterator[str]:
    if record.get("schema") != SCHEMA:
        yield f"schema must be {SCHEMA}, got {record.get('schema')!r}"
    yield from _types("", record, RECORD, SOMETIMES)
    try:
        datetime.fromisoformat(str(record.get("date")))
    except ValueError:
        yield f"date: {record.get('date')!r} is no date of ISO 8601"
    yield from _timings("", record)
    kind, results = record.get("kind"), record.get("results", {})
    if kind in SETTINGS_OF:
        yield from _types("settings.", record.get("settings", {}), SETTINGS, SETTINGS_OF[kind])
        for group, rows in ({"": results} if kind == "speed" else results).items():
            for label, row in rows.items():
                yield from _row(f"results.{group}.{label}.", row)


def _row(where: str, row: dict[str, Any]) -> Iterator[str]:
    yield from _types(where, row, {}, ROW)
    if not {"checked", "unavailable", "error"} & row.keys():
        yield f"{where} must say checked, unavailable or error"
    if {"step", "bytes_kept", "bytes_peak"} & row.keys() and row.get("checked") is not True:
        yield f"{where} was measured although its check did not pass"


def _types(where: str, found: dict[str, Any], always: Form, sometimes: Form) -> Iterator[str]:
    yield from (f"{where}{name} is missing" for name in always.keys() - found.keys())
    form = always | sometimes
    for name, value in found.items():
        if name not in form:
            yield f"{where}{name} is not known"
        elif not isinstance(value, form[name]) or (isinstance(value, bool) and form[name] is not bool):
            yield f"{where}{name} is {value!r}"


def _timings(where: str, value: Any) -> Iterator[str]:
    """Every timing, however deep: whole, positive and in order."""
    if isinstance(value, dict) and "median" in value:
        p20, median, p80, repeats = (value.get(name, -1) for name in TIMING)
        if value.keys() != set(TIMING) or not 0 <= p20 <= median <= p80 or repeats < 1:
            yield f"{where} is no timing, which has an order: {value}"
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _timings(f"{where}{key}.", inner)
