"""What is measured: torchvision's DenseNet and its variants, torch.compile, and fastdense, all with equal weights."""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastdense
from fastdense.backends import select
from fastdense.reference import ConcatDenseLayer

BASE = "torchvision"  # the provider that all others are compared with
_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")


class Unavailable(RuntimeError):
    """A provider cannot run here; the message is the reason."""


@dataclass(frozen=True)
class NetworkSpec:
    """A DenseNet-BC, in torchvision's arguments; ``small_inputs`` means one 3x3 convolution as the stem."""

    growth_rate: int
    block_config: tuple[int, ...]
    num_init_features: int
    num_classes: int
    small_inputs: bool = False

    @property
    def depth(self) -> int:
        """Convolutions and the classifier, as the paper counts; its "DenseNet-264" has 265."""
        return 2 * sum(self.block_config) + len(self.block_config) + 1


def cifar(depth: int, growth_rate: int = 12) -> NetworkSpec:
    """DenseNet-BC with three equal blocks for images of 32 x 32: ``depth = 6*n + 4``, as in arXiv 1608.06993."""
    layers, rest = divmod(depth - 4, 6)
    if layers < 1 or rest:
        raise ValueError(f"a depth must be 6*n + 4, as 40, 100 or 190, got {depth}")
    return NetworkSpec(growth_rate, (layers,) * 3, 2 * growth_rate, 10, small_inputs=True)


MODELS = {
    "densenet121": NetworkSpec(32, (6, 12, 24, 16), 64, 1000),
    "densenet161": NetworkSpec(48, (6, 12, 36, 24), 96, 1000),
    "densenet169": NetworkSpec(32, (6, 12, 32, 32), 64, 1000),
    "densenet201": NetworkSpec(32, (6, 12, 48, 32), 64, 1000),
    "densenet264": NetworkSpec(32, (6, 12, 64, 48), 64, 1000),
    "densenet-bc-40": cifar(40),
    "densenet-bc-100": cifar(100),
    "densenet-bc-190": cifar(190, growth_rate=40),
}


@dataclass(frozen=True)
class Provider:
    """One way to run a network."""

    name: str  # what a command line calls it
    label: str  # what tables and records call it
    network: Callable[[NetworkSpec], nn.Module]
    unsupported_reason: Callable[[torch.device], str | None] = lambda device: None  # why it cannot run on a device
    compile_mode: str | None = None  # of torch.compile
    exact: bool = True  # whether it can be checked in float64: plain PyTorch operators, run as they are written

    def require(self, device: torch.device) -> None:
        """Raises :class:`Unavailable` where this provider cannot run on ``device``."""
        if (reason := self.unsupported_reason(device)) is not None:
            raise Unavailable(reason)

    def build(self, spec: NetworkSpec) -> nn.Module:
        """The network in training mode; under one seed of PyTorch's generator every provider has the same weights."""
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        model = self.network(spec)
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                weight = torch.empty(module.weight.shape)  # in one layout: a layout changes what is drawn first
                nn.init.kaiming_normal_(weight, generator=generator)
                module.weight.data.copy_(weight)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        if self.compile_mode is not None:  # at the first call
            model.compile(dynamic=False, mode=self.compile_mode)
        return model


def torchvision_densenet() -> ModuleType:
    """The module ``torchvision.models.densenet``, also where torchvision's compiled part does not fit this PyTorch."""
    try:
        import torchvision.models.densenet as densenet
    except RuntimeError:  # "operator torchvision::nms does not exist"
        for name in ("nms", "qnms"):
            _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision.models.densenet as densenet
    return densenet


def _torchvision(spec: NetworkSpec, **options: Any) -> nn.Module:
    if (reason := _no_torchvision()) is not None:
        raise Unavailable(reason)
    arguments = asdict(spec)
    small_inputs = arguments.pop("small_inputs")
    model: Any = torchvision_densenet().DenseNet(**arguments, **options)
    if small_inputs:  # torchvision knows ImageNet's stem alone
        stem = nn.Conv2d(3, spec.num_init_features, kernel_size=3, padding=1, bias=False)
        layers = OrderedDict(model.features.named_children(), conv0=stem)
        for name in ("norm0", "relu0", "pool0"):
            del layers[name]
        model.features = nn.Sequential(layers)
    return model


def _no_torchvision(device: torch.device | None = None) -> str | None:
    return None if importlib.util.find_spec("torchvision") else "torchvision is not installed: pip install torchvision"


def _fastdense(spec: NetworkSpec, **options: Any) -> nn.Module:
    return fastdense.DenseNet(**asdict(spec), **options)


def _converted(spec: NetworkSpec) -> nn.Module:
    return fastdense.convert(_torchvision(spec))


class _EfficientLayer(ConcatDenseLayer):
    """Computes concatenation, BatchNorm and ReLU again in backward, and saves the output of the 1x1 convolution.

    Running statistics are updated in backward a second time, as in the authors' code. Their shared storage is PyTorch's
    caching allocator here: what is computed again is freed after each layer.

    Source: arXiv 1707.06990, section 3.
    """

    def forward(self, features: Tensor | list[Tensor]) -> Tensor:  # type: ignore[override]
        earlier = [features] if isinstance(features, Tensor) else features
        bottleneck = checkpoint(self._bottleneck, *earlier, use_reentrant=False)
        return self.conv2(self.relu2(self.norm2(bottleneck)))

    def _bottleneck(self, *earlier: Tensor) -> Tensor:
        return self.conv1(self.relu1(self.norm1(torch.cat(earlier, dim=1))))


def _efficient(spec: NetworkSpec) -> nn.Module:
    model = _fastdense(spec, impl="reference")
    for module in model.modules():
        if isinstance(module, ConcatDenseLayer):
            module.__class__ = _EfficientLayer
    return model


def _no_compiler(device: torch.device) -> str | None:
    from torch._inductor.cpp_builder import get_cpp_compiler  # takes a second, and most runs do not need it

    found = _no_torchvision()
    if device.type == "cuda":
        return found or (None if importlib.util.find_spec("triton") else "torch.compile needs Triton on a GPU")
    try:
        get_cpp_compiler()
    except RuntimeError:
        return found or "torch.compile needs a C++ compiler on the CPU, and finds none"
    return found


def _ours(recompute: str, impl: str) -> Provider:
    label, network = f"fastdense {recompute} {impl}", partial(_fastdense, recompute=recompute, impl=impl)
    if impl == "torch":
        return Provider(f"fastdense-{recompute}", label, network)
    return Provider(f"fastdense-{recompute}-triton", label, network, select.triton_unsupported_reason, exact=False)


_MEMORY_EFFICIENT = partial(_torchvision, memory_efficient=True)
_LISTED = (
    Provider(BASE, "torchvision", _torchvision, _no_torchvision),
    Provider("memory-efficient", "torchvision memory_efficient", _MEMORY_EFFICIENT, _no_torchvision),
    Provider("efficient-densenet", "efficient_densenet_pytorch's scheme", _efficient),
    Provider("compile", "torch.compile", _torchvision, _no_compiler, "default", exact=False),
    Provider("compile-max-autotune", "torch.compile max-autotune", _torchvision, _no_compiler, "max-autotune", False),
    _ours("activations", "torch"),
    _ours("bottlenecks", "torch"),
    _ours("activations", "triton"),
    _ours("bottlenecks", "triton"),
    Provider("convert", "fastdense.convert of torchvision", _converted, _no_torchvision, exact=False),
)
PROVIDERS: dict[str, Provider] = {provider.name: provider for provider in _LISTED}
REFERENCE = Provider("reference", "reference", partial(_fastdense, impl="reference"))
