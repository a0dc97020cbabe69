"""The networks that are compared, all with the same weights, and whether they are right."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastdense

from ..compiled.traffic import NETWORKS, Network
from ..harness.peers import torchvision_densenet
from .machine import tf32
from .measure import relative_error
from .stage import Job

DTYPE = torch.bfloat16
REHEARSED, REHEARSED_SIZE = Network(8, (1, 1), 16), 16
SIZE, CLASSES = 224, 1000
BASE, EFFICIENT = "torchvision", "torchvision memory_efficient"
COMPILED, REDUCED = "torchvision compile", "torchvision compile reduce-overhead"
OURS = ("fastdense activations", "fastdense bottlenecks")


def network(job: Job, name: str) -> Network:
    """The network of that name; in a rehearsal, whose steps are interpreted, one of two layers."""
    return REHEARSED if job.rehearsal else NETWORKS[name]


def _fastdense(of: Network, recompute: str, rehearsal: bool) -> nn.Module:
    # The interpreter takes seconds for a step: in a rehearsal one mode runs the kernels, the other PyTorch's.
    impl = "torch" if rehearsal and recompute == "activations" else "triton"
    return fastdense.DenseNet(
        of.growth_rate, of.layers, of.init_features, num_classes=CLASSES, recompute=recompute, impl=impl
    )


def _torchvision(of: Network, rehearsal: bool = False, **options: Any) -> nn.Module:
    densenet = torchvision_densenet().DenseNet
    return densenet(of.growth_rate, of.layers, of.init_features, num_classes=CLASSES, **options)


def _converted(of: Network, rehearsal: bool) -> nn.Module:
    return fastdense.convert(_torchvision(of), impl="torch" if rehearsal else "triton", verify=False)


def _compiled(of: Network, rehearsal: bool, **options: Any) -> nn.Module:
    model = _torchvision(of)
    # One batch size a process: nothing to generalise. Inductor takes a minute.
    model.compile(dynamic=False, **({"backend": "eager"} if rehearsal else options))
    return model


PROVIDERS: dict[str, Callable[..., Any]] = {  # of a network; Any, because Module.to(memory_format=...) has no type
    BASE: _torchvision,
    EFFICIENT: partial(_torchvision, memory_efficient=True),
    **{f"fastdense {mode}": partial(_fastdense, recompute=mode) for mode in ("activations", "bottlenecks")},
    "fastdense converted": _converted,
    COMPILED: _compiled,
    REDUCED: partial(_compiled, mode="reduce-overhead"),
}


def models(of: Network, labels: Iterable[str], job: Job) -> dict[str, Any]:
    """The providers' networks, all with the same weights."""
    torch.manual_seed(0)
    weights = _torchvision(of).state_dict()
    found = {}
    for label in labels:
        model = PROVIDERS[label](of, rehearsal=job.rehearsal)
        model.load_state_dict(weights)
        found[label] = model.to(job.device).to(memory_format=torch.channels_last)
    return found


def images(batch: int, size: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random images, channels last, and random classes."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(batch, 3, size, size, generator=generator, device=device)
    classes = torch.randint(CLASSES, (batch,), generator=generator, device=device)
    return x.contiguous(memory_format=torch.channels_last), classes


def outcome(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Class scores and all gradients of one step of a copy, as one vector; a ``dtype`` of 16 bit means autocast."""
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    model = copy.deepcopy(model).to(arithmetic)
    with torch.autocast(x.device.type, dtype, enabled=dtype.itemsize == 2):
        scores = model(x.to(arithmetic))
    generator = torch.Generator().manual_seed(1)
    scores.backward(torch.randn(scores.shape, generator=generator).to(scores))
    found = [scores.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    return torch.cat([tensor.double().flatten() for tensor in found])


def errors(candidates: Mapping[str, nn.Module], base: nn.Module, x: Tensor) -> dict[str, dict[str, Any]]:
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


def check(job: Job) -> None:
    """Whether DenseNet-121 is right in both modes and converted: one that is wrong is not timed.

    Raises:
        RuntimeError: if one is not.
    """
    of = network(job, "densenet121")
    batch, size = (2, REHEARSED_SIZE) if job.rehearsal else (16, 64)
    found = models(of, [BASE, *OURS, "fastdense converted"], job)
    job.result |= errors(found, found.pop(BASE), images(batch, size, job.device, seed=1)[0])
    job.save()
    wrong = [label for label, row in job.result.items() if not row["checked"]]
    if wrong:
        raise RuntimeError(f"wrong: {', '.join(wrong)}")
