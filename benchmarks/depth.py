"""The deepest DenseNet, and the largest batch, that train within a given memory.

    python -m benchmarks.depth [--budget 12GB] [--device cpu|cuda] [--quick] [--json FILE] [--plot FILE]

On CUDA by training steps under a limit on PyTorch's allocator. Elsewhere by bytes counted, not by steps, as
:mod:`benchmarks.harness.fits` says. Whatever computes something else than torchvision takes no part.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console

from fastdense.memory import peak_bytes, saved_bytes

from .harness.fits import CudaMemory, Fit, counted_bytes, search, trained_fit
from .harness.options import Options as Options  # benchmarks.gpu takes it from here
from .harness.providers import BASE, MODELS, PROVIDERS, NetworkSpec, Provider, cifar
from .harness.runner import RESULTS, environment, write_record
from .harness.training import Check, attempt
from .report.depth_report import HEADER, plot, rows
from .report.tables import console_table

COUNTED = "by bytes counted, not by steps on a GPU"
STEPPED = "by training steps on the GPU, under a limit on PyTorch's allocator"
DEFAULT_BUDGET, QUICK_BUDGET, QUICK_SECONDS = "12GB", "500MB", 60.0
BATCH = 16  # of the step that counts are compared with
FLOAT32_TOLERANCE = 1e-2  # relative 2-norm, of providers that cannot run in float64

_UNITS = {"": 1, "B": 1, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Question:
    """What grows, and how."""

    title: str
    network: Callable[[int], NetworkSpec]  # of a size
    pixels: int  # height and width of the images
    batch: int | None = None  # None: as many images as the size says

    @property
    def grows(self) -> str:
        return "depth" if self.batch else "batch"

    def shape(self, size: int) -> tuple[int, int, int, int]:
        return (self.batch or size, 3, self.pixels, self.pixels)

    def answer(self, size: int) -> int:
        """What people call the size: the network's depth, or the images of a batch."""
        return self.network(size).depth if self.batch and size else size


def _densenet264(size: int) -> NetworkSpec:
    """Its third and fourth block in the same proportion; 16 is DenseNet-264 itself."""
    return replace(MODELS["densenet264"], block_config=(6, 12, 4 * size, 3 * size))


_CIFAR = "deepest DenseNet-BC, k = 12, three equal blocks, 64 images of 32 x 32"
_DENSENET264 = "deepest network of DenseNet-264's form, k = 32, 32 images of 224 x 224"
QUESTIONS = {
    "cifar": Question(_CIFAR, lambda size: cifar(6 * size + 4), 32, batch=64),
    "densenet264": Question(_DENSENET264, _densenet264, 224, batch=32),
}
for _name in ("densenet121", "densenet201"):
    _network = partial(lambda name, size: MODELS[name], _name)
    QUESTIONS[f"batch-{_name}"] = Question(f"largest batch of {_name} at 224 x 224", _network, 224)
QUICK = ("cifar", "batch-densenet121")

# Counted: operators as they are written, whatever implements them. A compiler decides by itself what it saves.
COUNTABLE = (BASE, "memory-efficient", "efficient-densenet", "fastdense-activations", "fastdense-bottlenecks")
ON_CUDA = (*COUNTABLE, "fastdense-activations-triton", "fastdense-bottlenecks-triton")


def parse_bytes(text: str) -> int:
    """``"12GB"`` is 12,000,000,000; ``"12GiB"`` is 12 * 2**30."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", text.strip().upper())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"a budget is a number with MB, GB, MiB or GiB, as 12GB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def beside_measured(provider: Provider) -> dict[str, int]:
    """Bytes of one step of a small network: counted on the meta device, and measured on the CPU.

    ``kept`` after the forward pass; ``peak`` without parameters, momentum and the batch.
    """
    spec, shape = cifar(40), (BATCH, 3, 32, 32)
    counted = counted_bytes(lambda: provider.network(spec), shape, spec.num_classes)
    model, x = provider.build(spec), torch.randn(shape)
    labels = torch.zeros(BATCH, dtype=torch.int64)
    with saved_bytes(model, x, labels) as saved:
        loss = F.cross_entropy(model(x), labels)
    found = {"kept_counted": counted.kept, "kept_measured": saved.bytes + loss.nbytes}
    del loss
    with peak_bytes("cpu") as peak:
        F.cross_entropy(model(x), labels).backward()
    found["peak_counted"] = counted.peak - (counted.parameters + x.nbytes + labels.nbytes)
    return {**found, "peak_measured": peak.bytes}


def budget_bytes(options: Options) -> int:
    """What a step may take; ``quick`` asks for less than the usual."""
    usual = options.budget in (None, DEFAULT_BUDGET)
    return parse_bytes(str(QUICK_BUDGET if options.quick and usual else options.budget or DEFAULT_BUDGET))


def run(options: Options, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Checks, then searches; returns the record. ``say`` is told what was found, a line at a time."""
    if options.dtype != "fp32":
        raise ValueError(f"depth is found out in fp32, got dtype {options.dtype!r}")
    budget, cuda = budget_bytes(options), options.torch_device.type == "cuda"
    seconds = QUICK_SECONDS if options.quick and options.seconds is None else options.seconds
    until = math.inf if seconds is None else time.monotonic() + seconds
    checks = _checks(options, say)
    asked = options.questions or (QUICK if options.quick else QUESTIONS)
    jobs = list(product(asked, [name for name, row in checks.items() if row["checked"]]))
    results: dict[str, dict[str, Any]] = {}
    for (name, provider), row in _answers(options, jobs, budget, until):
        question = QUESTIONS[name]
        answers = results.setdefault(name, {"title": question.title, "grows": question.grows, "providers": {}})
        answers["providers"][provider] = row
        say(f"{name}, {row['label']}: {row[question.grows]}{'' if row['complete'] else ' or more: time was up'}")
    settings = {"budget": budget, "method": STEPPED if cuda else COUNTED, "dtype": "float32"}
    settings |= {"optimizer": "SGD with momentum", "seconds": seconds}
    complete = all(row["complete"] for answers in results.values() for row in answers["providers"].values())
    about = {**environment(gpu=cuda), "kind": "depth", "complete": complete}
    return {**about, "settings": settings, "checks": checks, "results": results}


def _checks(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Each provider's check: one that does not pass takes no part."""
    found: dict[str, Any] = {}
    cuda, check = options.torch_device.type == "cuda", Check(cifar(22), 4, 16, options)
    for name in options.labels() if options.providers else ON_CUDA if cuda else COUNTABLE:
        provider = PROVIDERS[name]
        row: dict[str, Any] = {"unavailable": "its bytes cannot be counted without a device"}
        if cuda or name in COUNTABLE:
            row = attempt(options.torch_device, check, provider)
        row = {"label": provider.label, "checked": False, **row}
        if not provider.exact:  # in float32, where half switched ReLUs part right networks
            row["checked"] = row["checked"] and row["relative_difference"] <= FLOAT32_TOLERANCE
        if not row["checked"]:
            why = row.get("unavailable") or row.get("error") or f"differs by {row['relative_difference']:.1e}"
            say(f"{provider.label} takes no part: {why}")
        elif not cuda:
            row["counted_beside_measured"] = beside_measured(provider)
        found[name] = row
    return found


Job = tuple[str, str]  # a question and a provider


def _answers(options: Options, jobs: Sequence[Job], budget: int, until: float) -> Iterator[tuple[Job, dict[str, Any]]]:
    processes, answer = min(options.processes, os.cpu_count() or 1), partial(_answer, budget=budget, until=until)
    if options.torch_device.type == "cuda":
        with closing(CudaMemory(budget, options.torch_device)) as memory:
            yield from ((job, answer(job, memory=memory)) for job in jobs)
    elif processes == 1:
        yield from zip(jobs, map(answer, jobs), strict=True)
    else:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            yield from zip(jobs, pool.map(answer, jobs), strict=True)


def _answer(job: Job, budget: int, until: float, memory: CudaMemory | None = None) -> dict[str, Any]:
    question, provider = QUESTIONS[job[0]], PROVIDERS[job[1]]

    def fit(size: int) -> Fit:
        spec, shape = question.network(size), question.shape(size)
        if memory is not None:
            return trained_fit(lambda: provider.build(spec), shape, spec.num_classes, memory)
        details = counted_bytes(lambda: provider.network(spec), shape, spec.num_classes)._asdict()
        peak = details.pop("peak")
        return Fit(peak <= budget, peak, details)

    tried, grows = search(fit, budget, until), question.grows
    largest = max((size for size, found in tried.items() if found.fits), default=0)
    trials = [
        {"size": size, grows: question.answer(size), "fits": found.fits, "bytes": found.bytes, **found.details}
        for size, found in tried.items()
    ]
    row = {"label": provider.label, "size": largest, grows: question.answer(largest)}
    return {**row, "complete": largest + 1 in tried, "trials": trials}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.depth", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=parse_bytes, help="as 12GB or 24GiB (default: 12GB; with --quick 500MB)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--questions", nargs="+", choices=list(QUESTIONS))
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS))
    parser.add_argument("--processes", type=int, default=2, help="that count at the same time, without a GPU")
    parser.add_argument("--quick", action="store_true", help="a small budget, two questions: under a minute")
    parser.add_argument("--json", type=Path, help="the record; default: benchmarks/results/cpu/depth-BUDGET.json")
    parser.add_argument("--plot", type=Path, help="a PNG of memory against depth; default: beside the record")
    given = vars(parser.parse_args(arguments))
    path, picture = given.pop("json"), given.pop("plot")
    options = Options(**{name: value for name, value in given.items() if value is not None})
    console = Console()
    with console.status("checking, then searching"):
        record = run(options, say=lambda line: console.print(line, style="dim", highlight=False))
    budget = f"{record['settings']['budget'] / 1e9:g}"
    if path is None and not options.quick and options.device == "cpu":  # a GPU's folder has the card's name
        path = RESULTS / "cpu" / f"depth-{budget}GB.json"
    picture = picture or (path.with_suffix(".png") if path else None)
    for title, cells in rows(record):
        console.print(console_table(f"{title}, {budget} GB, {record['settings']['method']}", HEADER, cells))
    if path is not None:
        write_record(path, record)
        console.print(f"record: {path}")
    if picture is not None:
        plot(record, picture)
        console.print(f"picture: {picture}")


if __name__ == "__main__":
    main()
