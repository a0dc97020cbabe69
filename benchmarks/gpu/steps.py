"""Training steps of whole networks, eager and as CUDA graphs: time, the host's time, peak memory; and how deep they go.

Under autocast to bfloat16, channels last.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdense.memory import peak_bytes

from .. import depth
from ..runner import Timing, interleave
from ..traffic import network_floor_seconds, network_traffic
from .machine import measured_rates, name_of, relative_error, state, synchronize
from .networks import BASE, COMPILED, DTYPE, EFFICIENT, OURS, REDUCED, GraphedStep, Step, images, models, rehearsed
from .stage import Job, describe

MOST_ROUNDS, LEAST_ROUNDS = 15, 3
SAME = 1e-3  # relative 2-norm of a graph's gradients against the eager step's
DEPTH_BYTES = 12 * 10**9
SPARE_SECONDS = 8.0  # for the trial of a depth that runs when time is up


class Comparison(NamedTuple):
    """Who is timed on which network and how many images of 224 x 224: eager, and as a CUDA graph."""

    network: str
    batch: int
    eager: tuple[str, ...]
    graphed: tuple[str, ...] = ()


PLAIN = (BASE, EFFICIENT, *OURS)
COMPARISONS = {  # by the stage's name
    "batch64": Comparison("densenet121", 64, PLAIN, PLAIN),  # the main question
    "batch256": Comparison("densenet121", 256, PLAIN, PLAIN),  # where launches no longer matter
    "batch1": Comparison("densenet121", 1, PLAIN, PLAIN),  # what is left is the host's time
    "densenet201": Comparison("densenet201", 64, PLAIN, PLAIN),  # whose layers read more
    "compiled-batch64": Comparison("densenet121", 64, (BASE, *OURS, COMPILED)),
    "compiled-batch256": Comparison("densenet121", 256, (BASE, *OURS, COMPILED)),
    # A small batch, where torch.compile uses CUDA graphs, too.
    "compiled-batch8": Comparison("densenet121", 8, (*PLAIN, COMPILED, REDUCED), (BASE, *OURS)),
}
COMPILATIONS = {"compile-batch8": (8, REDUCED), "compile-batch64": (64, COMPILED), "compile-batch256": (256, COMPILED)}


def compare(job: Job) -> None:
    """Check and time the steps of the comparison that is called as the stage."""
    measure(job, COMPARISONS[job.name])


def compile_ahead(job: Job) -> None:
    """Fill Inductor's cache on disk while the tests run: what the timed stages compile then takes seconds."""
    batch, label = COMPILATIONS[job.name]
    of, batch, size = rehearsed(job, "densenet121", batch)
    (model,) = models(of, [label], job.device, rehearsal=job.rehearsal).values()
    start = time.perf_counter()
    Step(model, *images(batch, size, job.device))()
    job.result["first_seconds"] = time.perf_counter() - start


def measure(job: Job, compared: Comparison) -> None:
    """Interleaved steps of all providers that are right and fit into memory."""
    of, batch, size = rehearsed(job, compared.network, compared.batch)
    job.result |= {"network": compared.network, "batch": batch, "size": size, "dtype": name_of(DTYPE)}
    job.result |= {"layout": "channels_last", "before": state(job.device), "rows": {}}
    moved = network_traffic(of, batch, size, DTYPE.itemsize)
    job.result["modelled"] = {"bytes": moved.bytes, "flops": moved.flops}
    if (rates := measured_rates(job, DTYPE)) is not None:
        job.result["modelled"]["floor_seconds"] = network_floor_seconds(of, batch, size, DTYPE.itemsize, *rates)
    x, classes = images(batch, size, job.device)
    ways: dict[type[Step], tuple[str, ...]] = {Step: compared.eager, GraphedStep: compared.graphed}
    for way, labels in ways.items():  # one after another: a graph holds its memory
        if job.rehearsal and (compared.network, compared.batch) != ("densenet121", 64):
            # The interpreter takes seconds for a step: the kernels run in one of the stages.
            labels = tuple(label for label in labels if label != OURS[1])
        steps = {}
        for label, model in models(of, labels, job.device, rehearsal=job.rehearsal).items():
            if (step := _prepared(job, label, way, model, x, classes)) is not None:
                steps[f"{label}, {way.way}"] = step
        _interleave(job, steps)
        steps.clear()
        gc.collect()  # a capture cannot ask for what is cached
        synchronize(job.device)
        if job.device.type == "cuda":
            torch.cuda.empty_cache()
    job.result["after"] = state(job.device)


def _prepared(job: Job, label: str, way: type[Step], model: nn.Module, x: Tensor, classes: Tensor) -> Step | None:
    """The step, warmed up, if it is right and fits into memory; what is known of it is in ``job.result``."""
    row: dict[str, Any] = {"checked": job.earlier.get("check", {}).get(label, {}).get("checked")}
    job.result["rows"][f"{label}, {way.way}"] = row
    if row["checked"] is False:
        return None
    if way is GraphedStep and label == EFFICIENT:  # and what has failed under capture may take later captures along
        row["status"] = "cannot be captured: checkpointing asks for the random generator's state"
        return None
    try:
        start = time.perf_counter()
        step = way(model, x, classes)
        step()
        synchronize(job.device)
        row["first_seconds"] = time.perf_counter() - start  # with compiling whatever was not compiled yet
        if isinstance(step, GraphedStep):
            replayed = step.gradients()
            eager = Step(model, x, classes).gradients()
            # The stem's own convolution is cuDNN's, which may add up its weight's gradient in any order.
            row |= {"equals_eager": torch.equal(replayed, eager), "differs_by": relative_error(replayed, eager)}
            if label in OURS and not row["differs_by"] < SAME:
                row["checked"] = False
                return None
        else:
            row["peak_bytes"] = _peak_bytes(step)
    except Exception as error:  # one provider that does not fit must not take the others' times with it
        row |= describe(error)
        synchronize(job.device)  # raises if it has broken the device's context: nothing more can be measured here
        model.zero_grad(set_to_none=True)
        return None
    finally:
        job.save()
    return step


def _peak_bytes(step: Step) -> int | None:
    """Peak memory of one step minus what was there before it."""
    if step.x.device.type != "cuda":
        return None
    step.model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    with peak_bytes(step.x.device) as peak:
        step()
    return peak.bytes


def _interleave(job: Job, steps: Mapping[str, Step]) -> None:
    """As many rounds as fit into a quarter of what time is left, within reason."""
    rounds = 1
    if steps and not job.rehearsal:
        seconds = sum(step()["step"] for step in steps.values())
        rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(job.seconds_left() / 4 / seconds)))
    for label, phases in interleave(steps, repeats=rounds, warmup=0).items():
        row = job.result["rows"][label]
        row |= {phase: Timing.of(values) for phase, values in phases.items()}
        row["images_per_second"] = job.result["batch"] / row["step"].median
    job.save()


def deepest(job: Job) -> None:
    """The deepest network and the largest batch that train within 12 GB, or bounds where time was up before."""
    seconds = max(1.0, job.seconds_left() - SPARE_SECONDS)
    if job.rehearsal:
        quick = depth.Options.quick("cpu")
        options = replace(quick, budget=10**8, seconds=min(seconds, 5.0), providers=("fastdense-activations",))
    else:
        options = depth.Options(budget=DEPTH_BYTES, device="cuda", seconds=seconds)

    job.result["said"] = []

    def say(line: str) -> None:
        job.result["said"].append(line)
        job.save()

    job.result |= depth.run(options, say)
