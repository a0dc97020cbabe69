"""Training steps of whole networks, all with the same weights: time, the host's time, peak memory, time by kernel.

A step is forward, cross-entropy and backward under autocast to bfloat16, channels last, without an optimizer; eager, or
captured as a CUDA graph.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fastdense
from fastdense.backends.triton_backend import TritonBackend
from fastdense.memory import peak_bytes

from .. import depth
from ..compiled import launches
from ..compiled.report import traffic_of
from ..compiled.traffic import NETWORKS, Network, floor_seconds, network_floor_seconds
from ..harness.providers import torchvision_densenet
from ..harness.runner import Timing, interleave
from .machine import measured_rates, name_of, relative_error, synchronize
from .run import Job, describe, release

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
PROFILED_BATCHES = (64, 256)
OTHERS, NAME_CHARACTERS = 12, 80  # kernels that are not ours, listed by name
DEPTH_BYTES = 12 * 10**9
SPARE_SECONDS = 8.0  # for the depth that is being tried when time is up
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
    """Returns network, images and their size; for a rehearsal, whose steps are interpreted, small ones."""
    return (REHEARSED, 2, REHEARSED_SIZE) if job.rehearsal else (NETWORKS[name], batch, size)


def build(of: Network, label: str) -> Any:
    """Returns a provider's network; ``Any``, because ``Module.to(memory_format=...)`` has no type."""
    arguments, rehearsal = (of.growth_rate, of.layers, of.init_features), of is REHEARSED
    if label in OURS:
        # The interpreter takes seconds for a step: in a rehearsal one mode runs the kernels, the other PyTorch's.
        impl = "torch" if rehearsal and label == OURS[0] else "triton"
        return fastdense.DenseNet(*arguments, num_classes=CLASSES, recompute=MODES[OURS.index(label)], impl=impl)
    densenet = torchvision_densenet().DenseNet
    model = densenet(*arguments, num_classes=CLASSES, memory_efficient=label == EFFICIENT)
    if label == CONVERTED:
        return fastdense.convert(model, impl="torch" if rehearsal else "triton", verify=False)
    if label in (COMPILED, REDUCED):  # one batch size a process: nothing to generalise; Inductor takes a minute
        options = {"mode": "reduce-overhead"} if label == REDUCED else {}
        model.compile(dynamic=False, **({"backend": "eager"} if rehearsal else options))
    return model


def models(of: Network, labels: Iterable[str], device: torch.device) -> dict[str, Any]:
    """Returns the providers' networks, all with the same weights."""
    torch.manual_seed(0)
    weights = build(of, BASE).state_dict()
    found = {label: build(of, label) for label in labels}
    for label, model in found.items():
        model.load_state_dict(weights)
        found[label] = model.to(device).to(memory_format=torch.channels_last)
    return found


def images(batch: int, size: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns random images, channels last, and random classes."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(batch, 3, size, size, generator=generator, device=device)
    classes = torch.randint(CLASSES, (batch,), generator=generator, device=device)
    return x.contiguous(memory_format=torch.channels_last), classes


class Step:
    """One training step: forward, cross-entropy and backward under autocast, without an optimizer.

    With ``graphed`` it is captured once as a CUDA graph, then replayed; gradients lie where the capture put them.
    """

    loss: Tensor
    graph: torch.cuda.CUDAGraph | None = None

    def __init__(
        self, model: nn.Module, x: Tensor, classes: Tensor, dtype: torch.dtype = DTYPE, *, graphed: bool = False
    ) -> None:
        self.model, self.x, self.classes, self.dtype, self.graphed = model, x, classes, dtype, graphed
        if not graphed or not x.is_cuda:
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # as PyTorch's documentation asks for before a capture
                self.launch()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        model.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            self.launch()
        self.graph = graph

    def launch(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        self.model.zero_grad(set_to_none=True)
        low = self.dtype.itemsize == 2
        # Casts of the weights that autocast remembers would outlive a capture.
        with torch.autocast(self.x.device.type, self.dtype, enabled=low, cache_enabled=not self.graphed):
            self.loss = F.cross_entropy(self.model(self.x), self.classes)
        self.loss.backward()

    def __call__(self) -> Mapping[str, float]:
        """Returns the seconds until the device has finished, and until the host has queued everything."""
        synchronize(self.x.device)
        start = time.perf_counter()
        self.launch()
        queued = time.perf_counter()
        synchronize(self.x.device)
        return {"step": time.perf_counter() - start, "host": queued - start}

    def gradients(self) -> Tensor:
        """Returns the loss and all gradients of a step, as one vector."""
        self()
        found = [self.loss.detach(), *(p.grad for p in self.model.parameters() if p.grad is not None)]
        return torch.cat([tensor.double().flatten() for tensor in found])


def compile_ahead(job: Job) -> None:
    """Fills Inductor's cache on disk while the tests run: what the timed stages compile then takes seconds."""
    batch, label = COMPILATIONS[job.name]
    of, batch, size = rehearsed(job, "densenet121", batch)
    (model,) = models(of, [label], job.device).values()
    start = time.perf_counter()
    Step(model, *images(batch, size, job.device))()
    job.result["first_seconds"] = time.perf_counter() - start


def compare(job: Job) -> None:
    """Times interleaved steps of the stage's providers, those that are right and fit into memory."""
    network, count, eager, graphed = COMPARISONS[job.name]
    of, batch, size = rehearsed(job, network, count)
    job.result |= {"network": network, "batch": batch, "size": size, "dtype": name_of(DTYPE), "layout": "channels_last"}
    job.result["rows"] = {}
    if (rates := measured_rates(job)) is not None:
        floor = network_floor_seconds(of, batch, size, DTYPE.itemsize, *rates)
        job.result["modelled"] = {"floor_seconds": floor}
    x, classes = images(batch, size, job.device)
    for way, labels in (("eager", eager), ("graph", graphed)):  # one after another: a graph holds its memory
        if job.rehearsal and (network, count) != ("densenet121", 64):
            # The interpreter takes seconds for a step: the kernels run in one of the stages.
            labels = tuple(label for label in labels if label != OURS[1])
        steps = {}
        for label, model in models(of, labels, job.device).items():
            if (step := _prepared(job, label, way, model, x, classes)) is not None:
                steps[f"{label}, {way}"] = step
        rounds = 1
        if steps and not job.rehearsal:  # as many as fit into a quarter of what time is left, within reason
            seconds = sum(step()["step"] for step in steps.values())
            rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(job.seconds_left() / 4 / seconds)))
        for label, phases in interleave(steps, repeats=rounds, warmup=0).items():
            row = job.result["rows"][label]
            row |= {phase: Timing.of(values) for phase, values in phases.items()}
            row["images_per_second"] = job.result["batch"] / row["step"].median
        job.save()
        steps.clear()
        release(job.device)  # a capture cannot ask for what is cached


def _prepared(job: Job, label: str, way: str, model: nn.Module, x: Tensor, classes: Tensor) -> Step | None:
    """The step, warmed up, if it is right and fits into memory; what is known of it is in ``job.result``."""
    row = {"checked": job.earlier.get("check", {}).get(label, {}).get("checked")}
    job.result["rows"][f"{label}, {way}"] = row
    if way == "graph" and label == EFFICIENT:  # and what has failed under capture may take later captures along
        row["status"] = "cannot be captured: checkpointing asks for the random generator's state"
    if row["checked"] is False or "status" in row:
        return None
    step: Step | None = None
    try:
        start = time.perf_counter()
        step = Step(model, x, classes, graphed=way == "graph")
        step()
        row["first_seconds"] = time.perf_counter() - start  # with compiling whatever was not compiled yet
        if step.graphed:
            # The stem's own convolution is cuDNN's, which may add up its weight's gradient in any order.
            row["differs_by"] = relative_error(step.gradients(), Step(model, x, classes).gradients())
            if label in OURS and not row["differs_by"] < SAME:
                row["checked"], step = False, None
        elif not job.rehearsal:
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            with peak_bytes(job.device) as peak:  # above what was there before the step
                step()
            row["peak_bytes"] = peak.bytes
    except Exception as error:  # one provider that does not fit must not take the others' times with it
        row |= describe(error)
        job.save()
        synchronize(job.device)  # raises if it has broken the device's context: nothing more can be measured here
        model.zero_grad(set_to_none=True)
        return None
    job.save()
    return step


def deepest(job: Job) -> None:
    """Finds the deepest network and the largest batch that train within 12 GB, or bounds where time was up before."""
    seconds = max(1.0, job.seconds_left() - SPARE_SECONDS)
    if job.rehearsal:
        of = ("fastdense-activations",)
        options = depth.Options(quick=True, processes=1, budget=10**8, seconds=min(seconds, 5.0), providers=of)
    else:
        options = depth.Options(budget=DEPTH_BYTES, device="cuda", seconds=seconds)
    job.result |= depth.run(options, print)


def profile_layers(job: Job) -> None:
    """Traces a step of torchvision's network and of ours, at each batch size: time on the device by kernel."""
    for batch in PROFILED_BATCHES[: 1 if job.rehearsal else None]:
        for label in OURS[1:] if job.rehearsal else (BASE, *OURS):
            of, count, size = rehearsed(job, "densenet121", batch)
            (model,) = models(of, [label], job.device).values()
            found = _profile(Step(model, *images(count, size, job.device)), job)
            job.result[f"{label}, batch {batch}"] = found | {"network": "densenet121", "batch": batch}
            timed = job.earlier.get(f"batch{batch}", {"rows": {}})["rows"].get(f"{label}, eager", {})
            if "step" in timed:
                job.result[f"{label}, batch {batch}"]["busy"] = found["device_seconds"] / timed["step"]["median"]
            job.save()


def _profile(step: Step, job: Job) -> dict[str, Any]:
    for _ in range(1 if job.rehearsal else 3):
        step()
    with launches_recorded() as recorded:
        if job.rehearsal:  # the launches stand for what would have been traced
            step()
            kernels = [(launch.kernel.__name__, 1e-6) for launch in recorded]
        else:
            kernels = traced(step)
    names = {launch.kernel.__name__ for launch in recorded}
    ours = [seconds for name, seconds in kernels if name in names]
    others: defaultdict[str, float] = defaultdict(float)
    for name, seconds in kernels:
        if name not in names:
            others[name[:NAME_CHARACTERS]] += seconds
    return {
        "kernels": len(kernels),
        "device_seconds": sum(seconds for _, seconds in kernels),
        "ours_seconds": sum(ours),
        "rows": _rows(recorded, ours, job) if len(ours) == len(recorded) else [],
        "others": dict(sorted(others.items(), key=lambda pair: -pair[1])[:OTHERS]),
    }


@contextmanager
def launches_recorded() -> Iterator[list[launches.Launch]]:
    """Notes the launches that are made within the ``with``, in order, without their tensors."""
    found: list[launches.Launch] = []
    make = TritonBackend.launch

    def launch(self: TritonBackend, kernel: Any, programs: int, *arguments: Any, config: Any, **constants: Any) -> None:
        make(self, kernel, programs, *arguments, config=config, **constants)
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        plain = {name: "tensor" if isinstance(value, Tensor) else value for name, value in named.items()}
        found.append(launches.Launch(kernel, programs, plain, config))

    with patch.object(TritonBackend, "launch", launch):
        yield found


def traced(step: Step) -> list[tuple[str, float]]:
    """Returns the kernels of one step in the order in which the device ran them, with their seconds."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kernels = sorted((event for event in events if event.get("cat") == "kernel"), key=lambda event: event["ts"])
    return [(event["name"], event["dur"] / 1e6) for event in kernels]


def _rows(recorded: list[launches.Launch], kernels: list[float], job: Job) -> list[dict[str, Any]]:
    """Launches of one kernel and shape together: how often, seconds of one, floor of one."""
    rates = measured_rates(job)
    found: defaultdict[tuple[tuple[str, Any], ...], list[float]] = defaultdict(list)
    for launch, seconds in zip(recorded, kernels, strict=True):
        tile, (moved, shape) = launch.config, traffic_of(launch, DTYPE.itemsize)
        config = f"{tile.block_m}x{tile.block_c}x{tile.block_k} w{tile.num_warps} s{tile.num_stages}"
        row = {"operation": launches.name_of(launch), **shape, "programs": launch.programs, "config": config}
        row |= moved._asdict() | ({} if rates is None else {"floor_seconds": floor_seconds(*moved, *rates)})
        found[tuple(row.items())].append(seconds)
    return [dict(row) | {"times": len(seconds), "seconds": fmean(seconds)} for row, seconds in found.items()]
