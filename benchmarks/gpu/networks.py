"""The networks that are compared, all with the same weights, and a training step of one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdense

from ..peers import torchvision_densenet
from ..traffic import NETWORKS, Network
from .machine import synchronize
from .stage import Job

DTYPE = torch.bfloat16
REHEARSED, REHEARSED_SIZE = Network(8, (1, 1), 16), 16
SIZE, CLASSES = 224, 1000
MODES = ("activations", "bottlenecks")
BASE, EFFICIENT = "torchvision", "torchvision memory_efficient"
COMPILED, REDUCED = "torchvision compile", "torchvision compile reduce-overhead"
OURS = tuple(f"fastdense {mode}" for mode in MODES)
CONVERTED = "fastdense converted"


def rehearsed(job: Job, name: str, batch: int, size: int = SIZE) -> tuple[Network, int, int]:
    """Network, images and their size; in a rehearsal, whose steps are interpreted, two small layers and images."""
    return (REHEARSED, 2, REHEARSED_SIZE) if job.rehearsal else (NETWORKS[name], batch, size)


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
    **{label: partial(_fastdense, recompute=mode) for label, mode in zip(OURS, MODES, strict=True)},
    CONVERTED: _converted,
    COMPILED: _compiled,
    REDUCED: partial(_compiled, mode="reduce-overhead"),
}


def models(of: Network, labels: Iterable[str], device: torch.device, *, rehearsal: bool = False) -> dict[str, Any]:
    """The providers' networks, all with the same weights."""
    torch.manual_seed(0)
    weights = _torchvision(of).state_dict()
    found = {}
    for label in labels:
        model = PROVIDERS[label](of, rehearsal=rehearsal)
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
