"""The deepest DenseNet, and the largest batch, that train within a given memory.

    python -m benchmarks.depth [--budget 12GB] [--device cpu|cuda] [--quick] [--json FILE] [--plot FILE]

On CUDA by training steps under a limit on PyTorch's allocator. Elsewhere by bytes counted, not by steps: see
``counted``. There, each provider's count is first compared with what a real step on the CPU keeps and takes. A provider
whose output or gradients differ from torchvision's takes no part.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console

from fastdense.memory import peak_bytes, saved_bytes

from .harness import options as options_module
from .harness.fits import CudaMemory, Search, Trial, counted_bytes, counted_trial, largest, real_trial
from .harness.providers import BASE, MODELS, PROVIDERS, NetworkSpec, Provider, Unavailable, cifar
from .harness.runner import RESULTS, environment, write_record
from .harness.training import Check
from .report.depth_report import plot, tables

__all__ = ["QUESTIONS", "Options", "Question", "main", "parse_bytes", "plot", "run"]

COUNTED = "by bytes counted, not by steps on a GPU"
STEPPED = "by training steps on the GPU, under a limit on PyTorch's allocator"
DEFAULT_BUDGET = "12GB"
BATCH = 16  # of the step that counts are compared with

_UNITS = {"": 1, "B": 1, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}
FLOAT32_TOLERANCE = 1e-2  # relative 2-norm, of providers that cannot run in float64


@dataclass(frozen=True)
class Question:
    """What grows, and how.

    Attributes:
        title: for tables and pictures.
        grows: ``"depth"`` or ``"batch"``.
        network: of a size.
        shape: of a batch, of a size.
    """

    title: str
    grows: str
    network: Callable[[int], NetworkSpec]
    shape: Callable[[int], tuple[int, int, int, int]]

    def answer(self, size: int) -> int:
        """What people call the size: the network's depth, or the images of a batch."""
        return size if self.grows == "batch" or size == 0 else self.network(size).depth


def _densenet264(size: int) -> NetworkSpec:
    """Its third and fourth block in the same proportion; 16 is DenseNet-264 itself."""
    return replace(MODELS["densenet264"], block_config=(6, 12, 4 * size, 3 * size))


def _deepest(title: str, network: Callable[[int], NetworkSpec], *shape: int) -> Question:
    batch, pixels = shape
    title = f"deepest {title}, {batch} images of {pixels} x {pixels}"
    return Question(title, "depth", network, lambda size: (batch, 3, pixels, pixels))


def _largest_batch(name: str) -> Question:
    title = f"largest batch of {name} at 224 x 224"
    return Question(title, "batch", lambda size: MODELS[name], lambda size: (size, 3, 224, 224))


QUESTIONS = {
    "cifar": _deepest("DenseNet-BC, k = 12, three equal blocks", lambda size: cifar(6 * size + 4), 64, 32),
    "densenet264": _deepest("network of DenseNet-264's form, k = 32", _densenet264, 32, 224),
    "batch-densenet121": _largest_batch("densenet121"),
    "batch-densenet201": _largest_batch("densenet201"),
}
QUICK = ("cifar", "batch-densenet121")

# Counted: operators as they are written, whatever implements them. A compiler decides by itself what it keeps.
COUNTABLE = (BASE, "memory-efficient", "efficient-densenet", "fastdense-activations", "fastdense-bottlenecks")
ON_CUDA = (*COUNTABLE, "fastdense-activations-triton", "fastdense-bottlenecks-triton")


@dataclass(frozen=True)
class Options:
    """What to find out.

    Attributes:
        budget: bytes.
        device: ``"cpu"`` counts, ``"cuda"`` trains.
        questions: keys of ``QUESTIONS``.
        providers: keys of ``PROVIDERS``; empty for those that the device can run.
        seconds: after which no further trial begins, all questions together; what is known then is a lower bound.
        processes: that count at the same time; on CUDA there is one.
    """

    budget: int = 12 * 10**9
    device: str = "cpu"
    questions: tuple[str, ...] = tuple(QUESTIONS)
    providers: tuple[str, ...] = ()
    seconds: float | None = None
    processes: int = 1

    @classmethod
    def quick(cls, device: str = "cpu") -> Options:
        """A small budget and two questions: under a minute on two CPU cores."""
        return cls(budget=5 * 10**8, device=device, questions=QUICK, seconds=60.0)


def settled(options: Options | options_module.Options) -> Options:
    """The options that all benchmarks share, as this one's.

    Raises:
        ValueError: for another arithmetic than float32, whose bytes nobody has counted, or a budget that is none.
    """
    if isinstance(options, Options):
        return options
    if options.dtype != "fp32":
        raise ValueError(f"depth is found out in fp32, got dtype {options.dtype!r}")
    device = options.torch_device.type
    own = Options.quick(device) if options.quick else Options(device=device)
    if options.budget is not None and not (options.quick and options.budget == DEFAULT_BUDGET):
        own = replace(own, budget=parse_bytes(options.budget))
    providers = tuple(options.labels()) if options.providers else ()
    return replace(own, providers=providers, processes=1 if options.quick else 2)


def parse_bytes(text: str) -> int:
    """``"12GB"`` is 12,000,000,000; ``"12GiB"`` is 12 * 2**30.

    Raises:
        ValueError: for anything that is no positive number with one of these units.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", text.strip().upper())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"a budget is a number with MB, GB, MiB or GiB, as 12GB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def beside_measured(provider: Provider, depth: int = 40) -> dict[str, int]:
    """Bytes of one step of a small network: counted on the meta device, and measured on the CPU.

    ``kept`` after the forward pass; ``peak`` without parameters, momentum and the batch.
    """
    spec, shape = cifar(depth), (BATCH, 3, 32, 32)
    counted = counted_bytes(lambda: provider.network(spec), shape, spec.num_classes)
    model, x = provider.build(spec), torch.randn(shape)
    labels = torch.zeros(BATCH, dtype=torch.int64)
    with saved_bytes(model, x, labels) as kept:
        loss = F.cross_entropy(model(x), labels)
    measured = kept.bytes + loss.nbytes
    del loss
    with peak_bytes("cpu") as peak:
        F.cross_entropy(model(x), labels).backward()
    there = counted.parameters + x.nbytes + labels.nbytes
    figures = {"kept_counted": counted.kept, "kept_measured": measured}
    return {**figures, "peak_counted": counted.peak - there, "peak_measured": peak.bytes}


def run(options: Options | options_module.Options, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Check, then search; returns the record.

    Args:
        options: what to find out.
        say: is told what was found, a line at a time.
    """
    options = settled(options)
    until = None if options.seconds is None else time.monotonic() + options.seconds
    cuda = options.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise ValueError("device 'cuda' needs a CUDA GPU; 'cpu' counts bytes without one")
    checks, right = _checked(options, say)
    results: dict[str, dict[str, Any]] = {}
    for name, provider, row in (_on_cuda if cuda else _by_counting)(options, right, until):
        question = QUESTIONS[name]
        answers = results.setdefault(name, {"title": question.title, "grows": question.grows, "providers": {}})
        answers["providers"][provider.name] = row
        say(f"{name}, {provider.label}: {row[question.grows]}{'' if row['complete'] else ' or more: time was up'}")
    settings = {"budget": options.budget, "method": STEPPED if cuda else COUNTED, "dtype": "float32"}
    settings |= {"optimizer": "SGD with momentum", "seconds": options.seconds}
    complete = all(row["complete"] for answers in results.values() for row in answers["providers"].values())
    about = {**environment(gpu=cuda), "kind": "depth", "complete": complete}
    return {**about, "settings": settings, "checks": checks, "results": results}


Found = Iterator[tuple[str, Provider, dict[str, Any]]]  # question, who, and the row


def _on_cuda(options: Options, providers: Sequence[Provider], until: float | None) -> Found:
    memory = CudaMemory(options.budget, torch.device("cuda"))
    try:
        for name, provider in product(options.questions, providers):
            found = largest(_attempt(QUESTIONS[name], provider, options, memory), options.budget, until=until)
            yield name, provider, _row(QUESTIONS[name], provider, found)
    finally:
        memory.close()


def _by_counting(options: Options, providers: Sequence[Provider], until: float | None) -> Found:
    jobs = list(product(options.questions, providers))
    if options.processes == 1:
        yield from ((name, provider, _count(name, provider.name, options, until)) for name, provider in jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, mp_context=context) as pool:
        found = [pool.submit(_count, name, provider.name, options, until) for name, provider in jobs]
        yield from ((name, provider, row.result()) for (name, provider), row in zip(jobs, found, strict=True))


def _count(name: str, provider: str, options: Options, until: float | None) -> dict[str, Any]:
    attempt = _attempt(QUESTIONS[name], PROVIDERS[provider], options, None)
    return _row(QUESTIONS[name], PROVIDERS[provider], largest(attempt, options.budget, until=until))


def _checked(options: Options, say: Callable[[str], None]) -> tuple[dict[str, Any], list[Provider]]:
    """What became of each provider's check, and those that are right."""
    rows: dict[str, Any] = {}
    right = []
    cuda = options.device == "cuda"
    check = Check(cifar(22), 4, 16, options_module.Options(device=options.device))
    for name in options.providers or (ON_CUDA if cuda else COUNTABLE):
        provider = PROVIDERS[name]
        row: dict[str, Any] = {"label": provider.label}
        rows[name] = row
        try:
            if not cuda and name not in COUNTABLE:
                raise Unavailable("its bytes cannot be counted without a device")
            row |= check(provider)
            if not provider.exact:  # in float32, where half switched ReLUs part right networks
                row["checked"] = row["checked"] and row["relative_difference"] <= FLOAT32_TOLERANCE
        except Unavailable as reason:
            row |= {"checked": False, "unavailable": str(reason)}
        if row["checked"]:
            right.append(provider)
            row |= {} if cuda else {"counted_beside_measured": beside_measured(provider)}
        else:
            why = row["unavailable"] if "unavailable" in row else f"differs by {row['relative_difference']:.1e}"
            say(f"{provider.label} takes no part: {why}")
    return rows, right


def _attempt(
    question: Question, provider: Provider, options: Options, memory: CudaMemory | None
) -> Callable[[int], Trial]:
    def attempt(size: int) -> Trial:
        spec, shape = question.network(size), question.shape(size)
        if memory is None:
            return counted_trial(lambda: provider.network(spec), shape, spec.num_classes, options.budget)
        return real_trial(lambda: provider.build(spec), shape, spec.num_classes, memory)

    return attempt


def _row(question: Question, provider: Provider, found: Search) -> dict[str, Any]:
    trials = [
        {"size": size, question.grows: question.answer(size), "fits": trial.fits, "bytes": trial.bytes, **trial.details}
        for size, trial in found.trials.items()
    ]
    return {
        "label": provider.label,
        "size": found.largest,
        question.grows: question.answer(found.largest),
        "complete": found.complete,
        "trials": trials,
    }


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
    given = parser.parse_args(arguments)
    options = Options.quick(given.device) if given.quick else Options(device=given.device)
    chosen = {name: getattr(given, name) for name in ("budget", "questions", "providers") if getattr(given, name)}
    chosen |= {name: tuple(chosen[name]) for name in chosen.keys() & {"questions", "providers"}}
    options = replace(options, processes=given.processes, **chosen)
    path = given.json
    if path is None and not given.quick and given.device == "cpu":  # elsewhere a folder is named by who knows the card
        path = RESULTS / "cpu" / f"depth-{options.budget / 1e9:g}GB.json"
    picture = given.plot or (path.with_suffix(".png") if path else None)
    console = Console()
    with console.status("checking, then searching"):
        record = run(options, say=lambda line: console.print(line, style="dim", highlight=False))
    for table in tables(record):
        console.print(table)
    if path is not None:
        write_record(path, record)
        console.print(f"record: {path}")
    if picture is not None:
        plot(record, picture)
        console.print(f"picture: {picture}")


if __name__ == "__main__":
    main()
