"""Training steps of whole networks, all with the same weights: time, the host's time, peak memory, greatest depth.

A step is forward, cross-entropy and backward under autocast to bfloat16, channels last, without an optimizer; eager, or
captured as a CUDA graph.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdense
from fastdense.memory import peak_bytes

from .. import depth
from ..compiled.traffic import NETWORKS, Network, network_floor_seconds, network_traffic
from ..harness.peers import torchvision_densenet
from ..harness.runner import Timing, interleave
from .machine import measured_rates, name_of, relative_error, state, synchronize
from .stage import Job, describe, release

DTYPE = torch.bfloat16
REHEARSED, REHEARSED_SIZE = Network(8, (1, 1), 16), 16
SIZE, CLASSES = 224, 1000
MODES = ("activations", "bottlenecks")
BASE, EFFICIENT = "torchvision", "torchvision memory_efficient"
COMPILED, REDUCED = "torchvision compile", "torchvision compile reduce-overhead"
OURS = tuple(f"fastdense {mode}" for mode in MODES)
CONVERTED = "fastdense converted"
PLAIN = (BASE, EFFICIENT, *OURS)
MOST_ROUNDS, LEAST_ROUNDS = 15, 3
SAME = 1e-3  # relative 2-norm of a graph's gradients against the eager step's
DEPTH_BYTES = 12 * 10**9
SPARE_SECONDS = 8.0  # for the trial of a depth that runs when time is up


# By the stage's name: who is timed on which network and how many images, eager, and as a CUDA graph.
COMPARISONS: dict[str, tuple[str, int, tuple[str, ...], tuple[str, ...]]] = {
    "batch64": ("densenet121", 64, PLAIN, PLAIN),  # the main question
    "batch256": ("densenet121", 256, PLAIN, PLAIN),  # where launches no longer matter
    "compiled-batch64": ("densenet121", 64, (BASE, *OURS, COMPILED), ()),
    "compiled-batch256": ("densenet121", 256, (BASE, *OURS, COMPILED), ()),
    # A small batch, where torch.compile uses CUDA graphs, too.
    "compiled-batch8": ("densenet121", 8, (*PLAIN, COMPILED, REDUCED), (BASE, *OURS)),
    "densenet201": ("densenet201", 64, PLAIN, PLAIN),  # whose layers read more
    "batch1": ("densenet121", 1, PLAIN, PLAIN),  # what is left is the host's time
}
COMPILATIONS = {"compile-batch8": (8, REDUCED), "compile-batch64": (64, COMPILED), "compile-batch256": (256, COMPILED)}


def rehearsed(job: Job, name: str, batch: int, size: int = SIZE) -> tuple[Network, int, int]:
    """Network, images and their size; in a rehearsal, whose steps are interpreted, two small layers and images."""
    return (REHEARSED, 2, REHEARSED_SIZE) if job.rehearsal else (NETWORKS[name], batch, size)


def build(of: Network, label: str, *, rehearsal: bool = False) -> Any:
    """A provider's network; ``Any``, because ``Module.to(memory_format=...)`` has no type."""
    arguments = of.growth_rate, of.layers, of.init_features
    if label in OURS:
        # The interpreter takes seconds for a step: in a rehearsal one mode runs the kernels, the other PyTorch's.
        impl = "torch" if rehearsal and label == OURS[0] else "triton"
        mode = MODES[OURS.index(label)]
        return fastdense.DenseNet(*arguments, num_classes=CLASSES, recompute=mode, impl=impl)
    densenet = torchvision_densenet().DenseNet
    model = densenet(*arguments, num_classes=CLASSES, memory_efficient=label == EFFICIENT)
    if label == CONVERTED:
        return fastdense.convert(model, impl="torch" if rehearsal else "triton", verify=False)
    if label in (COMPILED, REDUCED):  # one batch size a process: nothing to generalise; Inductor takes a minute
        options = {"mode": "reduce-overhead"} if label == REDUCED else {}
        model.compile(dynamic=False, **({"backend": "eager"} if rehearsal else options))
    return model


def models(of: Network, labels: Iterable[str], device: torch.device, *, rehearsal: bool = False) -> dict[str, Any]:
    """The providers' networks, all with the same weights."""
    torch.manual_seed(0)
    weights = build(of, BASE).state_dict()
    found = {label: build(of, label, rehearsal=rehearsal) for label in labels}
    for label, model in found.items():
        model.load_state_dict(weights)
        found[label] = model.to(device).to(memory_format=torch.channels_last)
    return found


def images(batch: int, size: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random images, channels last, and random classes."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(batch, 3, size, size, generator=generator, device=device)
    classes = torch.randint(CLASSES, (batch,), generator=generator, device=device)
    return x.contiguous(memory_format=torch.channels_last), classes


class Step:
    """One training step: forward, cross-entropy and backward under autocast, without an optimizer.

    Args:
        model: one provider's network.
        x, classes: fixed images and their classes.
        dtype: of 16 bit for autocast.
    """

    way = "eager"
    keeps_casts = True  # of the weights, from their first use in the step on

    def __init__(self, model: nn.Module, x: Tensor, classes: Tensor, dtype: torch.dtype = DTYPE) -> None:
        self.model, self.x, self.classes, self.dtype = model, x, classes, dtype
        self.loss: Tensor | None = None

    def launch(self) -> None:
        """Queue the step."""
        self.model.zero_grad(set_to_none=True)
        low = self.dtype.itemsize == 2
        with torch.autocast(self.x.device.type, self.dtype, enabled=low, cache_enabled=self.keeps_casts):
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
        return with_gradients(self.loss, self.model).float()


class GraphedStep(Step):
    """The same, captured once as a CUDA graph and replayed; gradients lie where the capture put them."""

    way = "graph"
    keeps_casts = False  # they would outlive the capture
    warmups = 3  # before a capture, as PyTorch's documentation asks for

    def __init__(self, model: nn.Module, x: Tensor, classes: Tensor) -> None:
        super().__init__(model, x, classes)
        self.graph: torch.cuda.CUDAGraph | None = None
        if x.device.type != "cuda":
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self.warmups):
                super().launch()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        model.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            super().launch()
        self.graph = graph

    def launch(self) -> None:
        """Queue the step."""
        if self.graph is None:
            super().launch()
        else:
            self.graph.replay()


def with_gradients(output: Tensor, model: nn.Module) -> Tensor:
    """``output`` and all gradients of ``model`` as one vector, in float64."""
    found = [output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    return torch.cat([tensor.double().flatten() for tensor in found])


def compare(job: Job) -> None:
    """Check and time the steps of the comparison that is called as the stage."""
    measure(job, *COMPARISONS[job.name])


def compile_ahead(job: Job) -> None:
    """Fill Inductor's cache on disk while the tests run: what the timed stages compile then takes seconds."""
    batch, label = COMPILATIONS[job.name]
    of, batch, size = rehearsed(job, "densenet121", batch)
    (model,) = models(of, [label], job.device, rehearsal=job.rehearsal).values()
    start = time.perf_counter()
    Step(model, *images(batch, size, job.device))()
    job.result["first_seconds"] = time.perf_counter() - start


def measure(job: Job, network: str, count: int, eager: tuple[str, ...], graphed: tuple[str, ...]) -> None:
    """Interleaved steps of all providers that are right and fit into memory."""
    of, batch, size = rehearsed(job, network, count)
    job.result |= {"network": network, "batch": batch, "size": size, "dtype": name_of(DTYPE)}
    job.result |= {"layout": "channels_last", "before": state(job.device), "rows": {}}
    moved = network_traffic(of, batch, size, DTYPE.itemsize)
    job.result["modelled"] = {"bytes": moved.bytes, "flops": moved.flops}
    if (rates := measured_rates(job)) is not None:
        job.result["modelled"]["floor_seconds"] = network_floor_seconds(of, batch, size, DTYPE.itemsize, *rates)
    x, classes = images(batch, size, job.device)
    ways: dict[type[Step], tuple[str, ...]] = {Step: eager, GraphedStep: graphed}
    for way, labels in ways.items():  # one after another: a graph holds its memory
        if job.rehearsal and (network, count) != ("densenet121", 64):
            # The interpreter takes seconds for a step: the kernels run in one of the stages.
            labels = tuple(label for label in labels if label != OURS[1])
        steps = {}
        for label, model in models(of, labels, job.device, rehearsal=job.rehearsal).items():
            if (step := _prepared(job, label, way, model, x, classes)) is not None:
                steps[f"{label}, {way.way}"] = step
        _interleave(job, steps)
        steps.clear()
        release(job.device)  # a capture cannot ask for what is cached
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
        elif job.rehearsal:
            row["peak_bytes"] = None
        else:
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            with peak_bytes(job.device) as peak:  # above what was there before the step
                step()
            row["peak_bytes"] = peak.bytes
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


def deepest(job: Job) -> None:
    """The deepest network and the largest batch that train within 12 GB, or bounds where time was up before."""
    seconds = max(1.0, job.seconds_left() - SPARE_SECONDS)
    if job.rehearsal:
        quick = depth.Options.quick("cpu")
        options = replace(quick, budget=10**8, seconds=min(seconds, 5.0), providers=("fastdense-activations",))
    else:
        options = depth.Options(budget=DEPTH_BYTES, device="cuda", seconds=seconds)
    said = job.result["said"] = []

    def say(line: str) -> None:
        said.append(line)
        job.save()

    job.result |= depth.run(options, say)
