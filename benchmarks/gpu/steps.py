"""A training step of a whole network, eager and as a CUDA graph: time, the host's time, peak memory.

A step is forward, cross-entropy and backward under autocast to bfloat16, channels last, without an optimizer.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compiled.traffic import network_floor_seconds, network_traffic
from ..harness.runner import Timing, interleave
from .machine import measured_rates
from .measure import relative_error, state, synchronize
from .networks import BASE, COMPILED, DTYPE, EFFICIENT, OURS, REDUCED, REHEARSED_SIZE, SIZE, images, models, network
from .stage import Job, describe

MOST_ROUNDS, LEAST_ROUNDS = 15, 3
SAME = 1e-3  # relative 2-norm of a graph's gradients against the eager step's
WARMUPS = 3  # before a capture, as PyTorch's documentation asks for


class Step:
    """One training step of one provider, on fixed random images and classes."""

    way = "eager"

    def __init__(self, model: nn.Module, x: Tensor, classes: Tensor) -> None:
        self.model, self.x, self.classes = model, x, classes
        self.loss: Tensor | None = None

    def launch(self) -> None:
        """Queue the step."""
        self.model.zero_grad(set_to_none=True)
        with torch.autocast(self.x.device.type, DTYPE):
            self.loss = F.cross_entropy(self.model(self.x), self.classes)
        self.loss.backward()

    def __call__(self) -> Mapping[str, float]:
        """Seconds until the device has finished, and until the host has queued everything."""
        synchronize(self.x.device)
        start = time.perf_counter()
        self.launch()
        queued = time.perf_counter()
        synchronize(self.x.device)
        return {"step": time.perf_counter() - start, "host": queued - start}

    def gradients(self) -> Tensor:
        """Loss and all gradients of a step, as one vector."""
        self()
        assert self.loss is not None
        found = [self.loss.detach(), *(p.grad for p in self.model.parameters() if p.grad is not None)]
        return torch.cat([tensor.float().flatten() for tensor in found])


class GraphedStep(Step):
    """The same, captured once as a CUDA graph and replayed; gradients lie where the capture put them."""

    way = "graph"

    def __init__(self, model: nn.Module, x: Tensor, classes: Tensor) -> None:
        super().__init__(model, x, classes)
        self.graph: torch.cuda.CUDAGraph | None = None
        if x.device.type != "cuda":
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUPS):
                self._queue()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        model.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            self._queue()
        self.graph = graph

    def _queue(self) -> None:
        self.model.zero_grad(set_to_none=True)
        with torch.autocast(self.x.device.type, DTYPE, cache_enabled=False):  # cached casts would outlive the capture
            self.loss = F.cross_entropy(self.model(self.x), self.classes)
        self.loss.backward()

    def launch(self) -> None:
        """Queue the step."""
        if self.graph is None:
            self._queue()
        else:
            self.graph.replay()


def _peak_bytes(step: Step) -> int | None:
    """Peak memory of one step minus what was there before it."""
    if step.x.device.type != "cuda":
        return None
    step.model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - start


def _measure(job: Job, name: str, batch: int, labels: Sequence[str], ways: Sequence[type[Step]]) -> None:
    of, size = network(job, name), REHEARSED_SIZE if job.rehearsal else SIZE
    if job.rehearsal:
        # The interpreter takes seconds for a step: the kernels run in one of the stages.
        labels = [label for label in labels if label != OURS[1] or (name, batch) == ("densenet121", 64)]
        batch = 2
    job.result |= {"network": name, "batch": batch, "size": size, "dtype": str(DTYPE).removeprefix("torch.")}
    job.result |= {"layout": "channels_last", "before": state(job.device), "rows": {}}
    moved = network_traffic(of, batch, size, DTYPE.itemsize)
    job.result["modelled"] = {"bytes": moved.bytes, "flops": moved.flops}
    if (rates := measured_rates(job, DTYPE)) is not None:
        job.result["modelled"]["floor_seconds"] = network_floor_seconds(of, batch, size, DTYPE.itemsize, *rates)
    x, classes = images(batch, size, job.device)
    for way in ways:  # one after another: a graph holds its memory
        steps = {}
        for label, model in models(of, labels, job).items():
            if (step := _prepared(job, label, way, model, x, classes)) is not None:
                steps[f"{label}, {way.way}"] = step
        _interleave(job, steps)
        steps.clear()
        release(job.device)
    job.result["after"] = state(job.device)


def release(device: torch.device) -> None:
    """Give memory back: a capture could not ask for what is cached."""
    gc.collect()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()


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


BOTH: tuple[type[Step], ...] = (Step, GraphedStep)
PLAIN = (BASE, EFFICIENT, *OURS)


def batch64(job: Job) -> None:
    """The main question: a training step of DenseNet-121, 64 images of 224 x 224."""
    _measure(job, "densenet121", 64, PLAIN, BOTH)


def batch256(job: Job) -> None:
    """The same with 256 images, where launches no longer matter."""
    _measure(job, "densenet121", 256, PLAIN, BOTH)


def batch1(job: Job) -> None:
    """A single image: what is left is the host's time."""
    _measure(job, "densenet121", 1, PLAIN, BOTH)


def compiled_batch8(job: Job) -> None:
    """A small batch, where torch.compile uses CUDA graphs, too."""
    _measure(job, "densenet121", 8, (*PLAIN, COMPILED, REDUCED), (Step,))
    rows = job.result["rows"].copy()
    _measure(job, "densenet121", 8, (BASE, *OURS), (GraphedStep,))
    job.result["rows"] = rows | job.result["rows"]


def compiled_batch64(job: Job) -> None:
    """Beside torch.compile."""
    _measure(job, "densenet121", 64, (BASE, *OURS, COMPILED), (Step,))


def compiled_batch256(job: Job) -> None:
    """Beside torch.compile, with 256 images."""
    _measure(job, "densenet121", 256, (BASE, *OURS, COMPILED), (Step,))


def densenet201(job: Job) -> None:
    """DenseNet-201, whose layers read more, with 64 images."""
    _measure(job, "densenet201", 64, PLAIN, BOTH)


def _compile(batch: int, label: str) -> Callable[[Job], None]:
    def ahead(job: Job) -> None:
        """Fill Inductor's cache on disk while the tests run: what the timed stages compile then takes seconds."""
        of, size = network(job, "densenet121"), REHEARSED_SIZE if job.rehearsal else SIZE
        (model,) = models(of, [label], job).values()
        start = time.perf_counter()
        Step(model, *images(2 if job.rehearsal else batch, size, job.device))()
        job.result["first_seconds"] = time.perf_counter() - start

    return ahead


compile_batch8, compile_batch64, compile_batch256 = (
    _compile(8, REDUCED),
    _compile(64, COMPILED),
    _compile(256, COMPILED),
)
