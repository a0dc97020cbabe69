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
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from datetime import datetime
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from ..harness.runner import SCHEMA, Timing


@dataclass(frozen=True)
class Row:
    """What was found of one provider: a value of ``results`` of speed, and of each network in ``results`` of memory.

    Attributes:
        checked: whether output and gradients agree with torchvision's; where not, nothing else was measured.
        relative_difference: 2-norm over 2-norm of output and all gradients as one vector. In float64 against
            torchvision (at most 1e-9 passes); for compiled code and kernels, in float32 against torchvision's float64.
        unavailable: why it cannot run here.
        error: what happened to it: out of memory, for instance.
        bytes_kept: saved by the forward pass for backward, each storage once; without parameters and images.
        bytes_peak: most bytes at one time during forward and backward minus those at the start; without parameters and
            their gradients.
        first_seconds: of the first step in a new process with an empty ``torch.compile`` cache.
        step, forward, backward, optimizer: timings; SGD with momentum. ``step`` is the host's clock from start until
            the device has finished.
        images_per_second: ``batch`` over the median step.
        batches: with ``--batches``: from a batch size to the same timings and ``images_per_second``, or an ``error``.
    """

    checked: bool = False
    relative_difference: float | str = 0.0
    unavailable: str = ""
    error: str = ""
    bytes_kept: int = 0
    bytes_peak: int = 0
    first_seconds: float = 0.0
    step: dict[str, Any] | None = None
    forward: dict[str, Any] | None = None
    backward: dict[str, Any] | None = None
    optimizer: dict[str, Any] | None = None
    images_per_second: float = 0.0
    batches: dict[str, Any] | None = None


@dataclass(frozen=True)
class Settings:
    """What speed and memory measured.

    Attributes:
        batch, size: images a step, their height and width in pixels.
        dtype: ``float32``, ``TF32``, or ``float16`` and ``bfloat16``: parameters in float32, the step under autocast.
        layout: of images and weights: ``channels_last`` or ``contiguous``.
        model, processes: of speed: a name of ``providers.MODELS``; fresh processes whose steps are pooled.
        models, depths: of memory: names; ``{"of": {network: depth}, "size", "growth_rate"}`` of CIFAR-style networks.
    """

    batch: int
    size: int
    dtype: str
    layout: str
    model: str = ""
    processes: int = 0
    models: list[str] | None = None
    depths: dict[str, Any] | None = None


@dataclass(frozen=True)
class Record:
    """One answer of a benchmark.

    Attributes:
        schema: version of this form.
        kind: ``speed``, ``memory``, ``depth`` ...
        complete: ``False``: interrupted; it holds what had been measured.
        date, command: ISO 8601 in UTC; what was typed.
        commit, sources: git's description, or the version of what is installed; a digest of the code.
        device: ``cpu``, or the GPU's name; then there are ``driver``, ``cuda`` and ``cudnn`` too.
        processor, threads, platform: the host.
        python, torch, triton, torchvision: versions; ``None``: not installed.
        settings: what was measured. Of depth: ``budget`` in bytes, ``method`` (bytes counted, or steps on a GPU),
            ``dtype``, ``optimizer``, ``seconds`` (a limit of the search).
        results: what came of it. Of speed from a provider's label to its :class:`Row`; of memory the same for each
            network; of depth from a question to its ``title``, what ``grows``, and for each provider the largest that
            fits, whether the search is ``complete``, and its ``trials`` with their bytes.
        checks: of depth: each provider's check, and its counted bytes beside those of a real step.
    """

    schema: int
    kind: str
    complete: bool
    date: str
    command: str
    commit: str
    sources: str
    device: str
    processor: str
    threads: int
    platform: str
    python: str
    torch: str
    triton: str | None
    torchvision: str | None
    settings: dict[str, Any]
    results: dict[str, Any]
    driver: str = ""
    cuda: str | None = None
    cudnn: int | None = None
    checks: dict[str, Any] | None = None

    @classmethod
    def complaints(cls, found: Any) -> list[str]:
        """What is wrong with a record, as read from its file; empty if nothing is."""
        if not isinstance(found, dict):
            return [f"a record is an object, not {type(found).__name__}"]
        return list(_wrong(found))


def _wrong(record: dict[str, Any]) -> Iterator[str]:
    if record.get("schema") != SCHEMA:
        yield f"schema must be {SCHEMA}, got {record.get('schema')!r}"
    yield from _fields("", record, Record)
    try:
        datetime.fromisoformat(str(record.get("date")))
    except ValueError:
        yield f"date: {record.get('date')!r} is no date of ISO 8601"
    yield from _timings("", record)
    kind, settings, results = record.get("kind"), record.get("settings"), record.get("results")
    if kind not in ("speed", "memory") or not isinstance(settings, dict) or not isinstance(results, dict):
        return
    yield from _fields("settings.", settings, Settings, closed=True)
    for group, rows in ({"": results} if kind == "speed" else results).items():
        for label, row in rows.items():
            where = f"results.{group}{'.' if group else ''}{label}."
            yield from _fields(where, row, Row, closed=True)
            if not {"checked", "unavailable", "error"} & row.keys():
                yield f"{where} must say checked, unavailable or error"
            if {"step", "bytes_kept", "bytes_peak"} & row.keys() and row.get("checked") is not True:
                yield f"{where} was measured although its check did not pass"


def _fields(where: str, found: Mapping[str, Any], form: Any, *, closed: bool = False) -> Iterator[str]:
    """Fields of ``form`` without a default must be there, those that are must have their type."""
    hints = get_type_hints(form)
    for field in fields(form):
        if field.name not in found:
            if field.default is MISSING:
                yield f"{where}{field.name} is missing"
        elif not _has_type(found[field.name], hints[field.name]):
            yield f"{where}{field.name} is {found[field.name]!r}"
    if closed:
        yield from (f"{where}{key} is not known" for key in found.keys() - hints.keys())


def _has_type(value: Any, hint: Any) -> bool:
    kinds = tuple(get_origin(kind) or kind for kind in (get_args(hint) if isinstance(hint, UnionType) else (hint,)))
    return isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)


def _timings(where: str, value: Any) -> Iterator[str]:
    """Every timing, however deep: whole, positive and in order."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return
    if "median" not in value:
        for key, inner in value.items():
            yield from _timings(f"{where}{key}.", inner)
        return
    wrong = list(_fields(where, value, Timing))
    yield from wrong
    if not wrong and not (0 <= value["p20"] <= value["median"] <= value["p80"] and value["repeats"] > 0):
        yield f"{where} is no timing: {value}"


def main() -> None:
    """Command line."""
    read = {path: json.loads(Path(path).read_text()) for path in sys.argv[1:]}
    sys.exit("\n".join(f"{path}: {text}" for path, found in read.items() for text in Record.complaints(found)) or 0)


if __name__ == "__main__":
    main()
