"""A training step of a whole network: fastdense beside torchvision's variants, with its peak memory; and its host time.

A step is forward, cross-entropy and backward under autocast to bfloat16, channels last, without an optimizer.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdense

from ..peers import torchvision_densenet
from ..runner import Timing, interleave
from ..traffic import NETWORKS, Network, network_floor_seconds, network_traffic
from .machine import measured_rates, tf32
from .measure import relative_error, state, synchronize
from .stage import Job, describe

DTYPE = torch.bfloat16
REHEARSED_PROVIDERS = {  # of each network size: an interpreted step takes seconds
    ("densenet121", 64): ("torchvision", "fastdense bottlenecks triton", "fastdense activations torch"),
    ("densenet121", 256): ("torchvision", "torchvision compile"),
    ("densenet201", 64): ("torchvision", "fastdense converted triton"),
    ("densenet121", 1): ("torchvision", "fastdense bottlenecks torch"),
}
REHEARSED, REHEARSED_SIZE = Network(8, (1, 1), 16), 16
SIZE, CLASSES = 224, 1000
BASE, COMPILED = "torchvision", "torchvision compile"
CHECKED = "fastdense"  # what begins so is ours: it must be right before it is timed
MOST_ROUNDS, LEAST_ROUNDS = 15, 3


def _fastdense(network: Network, **options: Any) -> nn.Module:
    return fastdense.DenseNet(
        network.growth_rate, network.layers, network.init_features, num_classes=CLASSES, **options
    )


def _torchvision(network: Network, **options: Any) -> nn.Module:
    densenet = torchvision_densenet().DenseNet
    return densenet(network.growth_rate, network.layers, network.init_features, num_classes=CLASSES, **options)


def _converted(network: Network, **options: Any) -> nn.Module:
    return fastdense.convert(_torchvision(network), **options)


def _compiled(network: Network, backend: str = "inductor") -> nn.Module:
    model = _torchvision(network)
    model.compile(dynamic=False, backend=backend)  # one batch size a process: nothing to generalise
    return model


PROVIDERS: dict[str, Callable[..., Any]] = {  # of a network; Any, because Module.to(memory_format=...) has no type
    BASE: _torchvision,
    "torchvision memory_efficient": partial(_torchvision, memory_efficient=True),
    **{
        f"fastdense {recompute} {impl}": partial(_fastdense, recompute=recompute, impl=impl)
        for impl in ("triton", "torch")
        for recompute in ("activations", "bottlenecks")
    },
    "fastdense converted triton": partial(_converted, impl="triton", verify=False),  # checked with the others
    COMPILED: _compiled,
}


class Step:
    """One training step of one provider, on fixed random images and classes."""

    def __init__(self, model: nn.Module, x: Tensor, classes: Tensor, dtype: torch.dtype = DTYPE) -> None:
        self.model, self.x, self.classes, self.dtype = model, x, classes, dtype

    def __call__(self) -> Mapping[str, float]:
        """Seconds until the device has finished, until the host has queued everything, and on the device by phase."""
        self.model.zero_grad(set_to_none=True)
        synchronize(self.x.device)
        mark = _marks(self.x.device)
        start = time.perf_counter()
        begin = mark()
        with torch.autocast(self.x.device.type, self.dtype):
            loss = F.cross_entropy(self.model(self.x), self.classes)
        middle = mark()
        loss.backward()
        end = mark()
        queued = time.perf_counter()
        synchronize(self.x.device)
        done = time.perf_counter()
        forward, backward = _between(begin, middle), _between(middle, end)
        return {"step": done - start, "host": queued - start, "forward": forward, "backward": backward}


def _marks(device: torch.device) -> Callable[[], Any]:
    """A function that notes the present time: the device's, or on the CPU the host's."""
    if device.type != "cuda":
        return time.perf_counter

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return mark


def _between(first: Any, second: Any) -> float:
    return second - first if isinstance(first, float) else first.elapsed_time(second) / 1e3


def images(batch: int, size: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random images, channels last, and random classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, size, size, generator=generator).contiguous(memory_format=torch.channels_last)
    return x.to(device), torch.randint(CLASSES, (batch,), generator=generator).to(device)


def models(network: Network, labels: Iterable[str], job: Job) -> dict[str, nn.Module]:
    """The providers' networks, all with the same weights."""
    torch.manual_seed(0)
    weights = _torchvision(network).state_dict()
    found = {}
    for label in labels:
        backend = {"backend": "eager"} if job.rehearsal and label == COMPILED else {}  # compiling takes a minute
        model = PROVIDERS[label](network, **backend)
        model.load_state_dict(weights)
        found[label] = model.to(job.device).to(memory_format=torch.channels_last)
    return found


def outcome(model: nn.Module, x: Tensor, dtype: torch.dtype, *, own: bool = False) -> Tensor:
    """Class scores and all gradients of one step as one vector; a ``dtype`` of 16 bit means autocast.

    Of a copy, unless ``own``: then of the model itself, which may be a graph, and is in float32.
    """
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    if own:
        model.zero_grad(set_to_none=True)
    else:
        model = copy.deepcopy(model).to(arithmetic)
    with torch.autocast(x.device.type, dtype, enabled=dtype.itemsize == 2):
        scores = model(x.to(arithmetic))
    generator = torch.Generator().manual_seed(1)
    scores.backward(torch.randn(scores.shape, generator=generator).to(scores))
    found = [scores.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    return torch.cat([tensor.double().flatten() for tensor in found])


def _small_images(job: Job) -> Tensor:
    batch, size = (2, REHEARSED_SIZE) if job.rehearsal else (16, 64)
    return images(batch, size, job.device, seed=1)[0]


def check(candidates: Mapping[str, nn.Module], base: nn.Module, x: Tensor) -> dict[str, dict[str, Any]]:
    """Each network's error against float64, beside torchvision's in the same arithmetic.

    A value within a rounding of 0 switches a ReLU, and a network this deep everything after it: two right ones differ
    by as much as a percent in float32, and in bfloat16 torchvision itself is off by 70 %, where gradients of 0 would be
    off by 100. So float32 is what finds a wrong network, and bfloat16 must be about as good as torchvision's. The tight
    bounds are the kernels' own.
    """
    truth = outcome(base, x, torch.float64)
    rows: dict[str, dict[str, Any]] = {label: {"checked": True} for label in candidates}
    for dtype in (torch.float32, DTYPE):
        with tf32(False):
            theirs = relative_error(outcome(base, x, dtype), truth)
            for label, model in candidates.items():
                mine = relative_error(outcome(model, x, dtype), truth)
                name = str(dtype).removeprefix("torch.")
                rows[label][name] = {"error": mine, "torchvision": theirs}
                rows[label]["checked"] &= mine <= (4 * theirs + 1e-2 if dtype == torch.float32 else 1.3 * theirs)
    return rows


def _peak_bytes(step: Callable[[], Any], device: torch.device) -> int | None:
    """Peak memory of one step minus what was there before it."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    step()
    return torch.cuda.max_memory_allocated(device) - start


def _prepare(job: Job, network: Network, batch: int, size: int, labels: Sequence[str]) -> dict[str, Step]:
    """The steps that are right and fit into memory, warmed up; what is known of all of them is in ``job.result``."""
    rows = job.result["providers"]
    found = models(network, labels, job)
    ours = {label: model for label, model in found.items() if label.startswith(CHECKED)}
    if ours:
        base = models(network, [BASE], job)[BASE]
        rows |= check(ours, base, _small_images(job))
        job.save()
    x, classes = images(batch, size, job.device)
    steps = {}
    for label, model in found.items():
        row = rows.setdefault(label, {"checked": None})  # PyTorch's own: what ours are checked against
        if row["checked"] is False:
            continue
        step = Step(model, x, classes)
        try:
            start = time.perf_counter()
            step()
            row["first_seconds"] = time.perf_counter() - start  # with compiling whatever was not compiled yet
            row["peak_bytes"] = _peak_bytes(step, job.device)
            steps[label] = step
        except Exception as error:  # one provider that does not fit must not take the others' times with it
            row |= describe(error)
            synchronize(job.device)  # raises if it has broken the device's context: nothing more can be measured here
            model.zero_grad(set_to_none=True)
        job.save()
    return steps


def _measure(job: Job, name: str, batch: int, *, compiled: bool = True) -> None:
    network, size = NETWORKS[name], SIZE
    only = REHEARSED_PROVIDERS[name, batch] if job.rehearsal else tuple(PROVIDERS)
    if job.rehearsal:
        name, network, batch, size = "rehearsed", REHEARSED, 2, REHEARSED_SIZE
    dtype = str(DTYPE).removeprefix("torch.")
    job.result |= {"network": name, "batch": batch, "size": size, "dtype": dtype, "layout": "channels_last"}
    job.result |= {"before": state(job.device), "providers": {}}
    moved = network_traffic(network, batch, size, DTYPE.itemsize)
    job.result["modelled"] = {"bytes": moved.bytes, "flops": moved.flops}
    if (rates := measured_rates(job, DTYPE)) is not None:
        floor = network_floor_seconds(network, batch, size, DTYPE.itemsize, *rates)
        job.result["modelled"]["floor_seconds"] = floor
    steps: dict[str, Step] = {}
    for labels in _groups(only)[: None if compiled else -1]:
        steps |= _prepare(job, network, batch, size, labels)
        _interleave(job, steps)
    job.result["after"] = state(job.device)


def _groups(only: Sequence[str]) -> list[list[str]]:
    """Providers by what may go wrong with them: whatever a group does, the figures of those before it are kept.

    What is plain PyTorch, then the kernels, then torch.compile, which may take longer than there is.
    """
    labels = [label for label in PROVIDERS if label in only]
    kernels = [label for label in labels if label.endswith("triton")]
    plain = [label for label in labels if label not in (*kernels, COMPILED)]
    return [plain, kernels, [label for label in labels if label == COMPILED]]


def _interleave(job: Job, steps: Mapping[str, Step]) -> None:
    """As many rounds as fit into a quarter of what time is left, within reason."""
    rounds = 1
    if steps and not job.rehearsal:
        seconds = sum(step()["step"] for step in steps.values())
        rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(job.seconds_left() / 4 / seconds)))
    for label, phases in interleave(steps, repeats=rounds, warmup=0).items():
        job.result["providers"][label] |= {phase: Timing.of(values) for phase, values in phases.items()}
    job.save()


def densenet121_batch64(job: Job) -> None:
    """The main question: a training step of DenseNet-121, 64 images of 224 x 224."""
    _measure(job, "densenet121", 64)


def densenet121_batch256(job: Job) -> None:
    """The same with 256 images, where launches no longer matter."""
    _measure(job, "densenet121", 256)


def densenet201_batch64(job: Job) -> None:
    """The same for DenseNet-201, whose layers read more."""
    _measure(job, "densenet201", 64)


def host(job: Job) -> None:
    """DenseNet-121 with a single image: the device has next to nothing to do, what is left is the host's time.

    Without torch.compile, which would take a minute more for one more batch size.
    """
    _measure(job, "densenet121", 1, compiled=False)
    network = REHEARSED if job.rehearsal else NETWORKS["densenet121"]
    x, classes = images(job.result["batch"], job.result["size"], job.device)
    ours = () if job.rehearsal else ("fastdense activations triton", "fastdense bottlenecks triton")
    for label in (BASE, *ours):  # the interpreter launches nothing, and the profiler would note each of its steps
        if "step" in (row := job.result["providers"].get(label, {})):
            row["launches"] = launches(Step(models(network, [label], job)[label], x, classes))
            job.save()


def launches(step: Step) -> int:
    """Kernel launches of one step, as the profiler sees the host make them."""
    from torch.profiler import ProfilerActivity, profile

    step()
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]) as found:
        step()
    return sum("LaunchKernel" in event.name for event in found.events())


def compile_ahead(job: Job) -> None:
    """Fill Inductor's cache on disk while the tests run: what the timed stages compile then takes seconds."""
    _run_once(job, [COMPILED], [DTYPE])


def kernels_ahead(job: Job) -> None:
    """Fill Triton's cache on disk likewise, at the timed stages' shapes and dtypes."""
    labels = ["fastdense bottlenecks triton"]  # which launches everything that the other mode does
    if job.rehearsal:  # the timed stages check and run as much
        _run_once(job, labels, [DTYPE])
        return
    found = models(NETWORKS["densenet121"], [BASE, *labels], job)
    base = found.pop(BASE)
    job.result["check"] = check(found, base, _small_images(job))
    job.save()
    _run_once(job, labels, [DTYPE, torch.float16])


def _run_once(job: Job, labels: Sequence[str], dtypes: Sequence[torch.dtype]) -> None:
    sizes = [("densenet121", 64), ("densenet121", 256), ("densenet201", 64)]
    for name, batch in [("rehearsed", 2)] if job.rehearsal else sizes:
        network, size = (REHEARSED, REHEARSED_SIZE) if job.rehearsal else (NETWORKS[name], SIZE)
        for label, model in models(network, labels, job).items():
            for dtype in dtypes:
                torch.compiler.reset()
                start = time.perf_counter()
                Step(model, *images(batch, size, job.device), dtype)()
                job.result[f"{label}, {name}, batch {batch}, {dtype}"] = {"first_seconds": time.perf_counter() - start}
                job.save()
