"""What is left of the host's time: one image a step, as CUDA graphs and under torch.compile's "reduce-overhead"."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..runner import Timing, interleave
from ..traffic import NETWORKS
from .measure import relative_error, state, synchronize
from .stage import Job, describe
from .steps import BASE, DTYPE, REHEARSED, REHEARSED_SIZE, SIZE, Step, images, models, outcome

LABELS = (BASE, "fastdense activations triton", "fastdense bottlenecks triton")
REHEARSED_LABELS = (BASE, "fastdense bottlenecks torch")  # the interpreter takes seconds for a step
SECONDS_A_MODEL = {"eager": 2.0, "graph": 10.0, "reduce-overhead": 60.0}  # the last may have to be compiled
ROUNDS = 30

Build = Callable[[nn.Module, Tensor], nn.Module]


def _graphed(model: nn.Module, x: Tensor) -> nn.Module:
    if x.device.type != "cuda":
        return model
    with torch.autocast("cuda", DTYPE, cache_enabled=False):  # cached casts would belong to the capture
        torch.cuda.make_graphed_callables(model, (x,))
    return model


def _compiled(model: nn.Module, x: Tensor) -> nn.Module:
    if x.device.type == "cuda":
        model.compile(mode="reduce-overhead", dynamic=False)
    return model


WAYS: dict[str, Build] = {"eager": lambda model, x: model, "graph": _graphed, "reduce-overhead": _compiled}


def measure(job: Job) -> None:
    """Each network each way, checked against float64 as torchvision's own is, then timed in turn."""
    network = REHEARSED if job.rehearsal else NETWORKS["densenet121"]
    batch, size = (2, REHEARSED_SIZE) if job.rehearsal else (1, SIZE)
    x, classes = images(batch, size, job.device)
    job.result |= {"batch": batch, "size": size, "before": state(job.device), "rows": {}}
    base = models(network, [BASE], job)[BASE]
    truth = outcome(base, x, torch.float64)
    theirs = relative_error(outcome(base, x, DTYPE), truth)
    steps: dict[str, Step] = {}
    for way, build in WAYS.items():
        for label in REHEARSED_LABELS if job.rehearsal else LABELS:
            row: dict[str, Any] = {"checked": None}
            job.result["rows"][f"{label}, {way}"] = row
            if job.seconds_left() < SECONDS_A_MODEL[way]:
                row["status"] = "not reached"
                continue
            start = time.perf_counter()
            try:
                model = build(models(network, [label], job)[label], x)
                error = relative_error(outcome(model, x, DTYPE, own=True), truth)
                row |= {"error": error, "torchvision": theirs, "checked": error <= 1.3 * theirs}
                row["first_seconds"] = time.perf_counter() - start
                if row["checked"]:
                    steps[f"{label}, {way}"] = Step(model, x, classes)
            except Exception as failure:  # one way that does not work must not take the others' times with it
                row |= describe(failure)
                synchronize(job.device)
            job.save()
        for name, phases in interleave(steps, repeats=1 if job.rehearsal else ROUNDS, warmup=1).items():
            job.result["rows"][name] |= {phase: Timing.of(values) for phase, values in phases.items()}
        job.save()
    job.result["after"] = state(job.device)
