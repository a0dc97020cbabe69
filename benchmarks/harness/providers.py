"""Who is measured: torchvision's DenseNet and its variants, torch.compile, and fastdense, all with equal weights.

torch.manual_seed(0)
provider = PROVIDERS["fastdense-activations"]
provider.require(device)                               # raises Unavailable, with the reason
model = provider.wrap(provider.build(spec).to(device))
"""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastdense
from fastdense.backends import select
from fastdense.reference import ConcatDenseBlock, ConcatDenseLayer

from .peers import torchvision_densenet

BASE = "torchvision"  # the provider that all others are compared with


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
    bn_size: int = 4

    def arguments(self) -> dict[str, Any]:
        """Keywords of torchvision's ``DenseNet``."""
        return {
            "growth_rate": self.growth_rate, "block_config": self.block_config, "bn_size": self.bn_size,
            "num_init_features": self.num_init_features, "num_classes": self.num_classes,
        }  # fmt: skip

    @property
    def depth(self) -> int:
        """Convolutions and the classifier, as the paper counts; its "DenseNet-264" has 265."""
        return 2 * sum(self.block_config) + len(self.block_config) + 1


def cifar(depth: int, growth_rate: int = 12, num_classes: int = 10) -> NetworkSpec:
    """DenseNet-BC with three equal blocks for images of 32 x 32: ``depth = 6*n + 4``, as in arXiv 1608.06993.

    Raises:
        ValueError: for a depth that is not of that form.
    """
    layers, rest = divmod(depth - 4, 6)
    if layers < 1 or rest:
        raise ValueError(f"a depth must be 6*n + 4, as 40, 100 or 190, got {depth}")
    return NetworkSpec(growth_rate, (layers,) * 3, 2 * growth_rate, num_classes, small_inputs=True)


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
    """One way to run a network.

    Attributes:
        name: what a command line calls it.
        label: what tables and records call it.
        network: makes the module of a spec.
        obstacle: why it cannot run on a device, or ``None``.
        compile_mode: how ``torch.compile`` is asked to compile it, or ``None``.
        exact: whether it can be checked in float64: plain PyTorch operators, run as they are written.
    """

    name: str
    label: str
    network: Callable[[NetworkSpec], nn.Module]
    obstacle: Callable[[torch.device], str | None] = lambda device: None
    compile_mode: str | None = None
    exact: bool = True

    def require(self, device: torch.device) -> None:
        """Raises :class:`Unavailable` where this provider cannot run on ``device``."""
        if (reason := self.obstacle(device)) is not None:
            raise Unavailable(reason)

    def build(self, spec: NetworkSpec) -> nn.Module:
        """The network in training mode; under one seed of PyTorch's generator every provider has the same weights.

        Raises:
            Unavailable: a package that it is made from is not installed.
        """
        seed = int(torch.randint(2**31, (1,), device="cpu"))
        model = self.network(spec)
        _initialise(model, seed)
        return model

    def wrap(self, model: nn.Module) -> nn.Module:
        """``model``, which compiles at its first call where that is what the provider is about; in place."""
        if self.compile_mode is not None:
            model.compile(dynamic=False, mode=self.compile_mode)
        return model


@torch.no_grad()
def _initialise(model: nn.Module, seed: int) -> None:
    """He et al.'s normal for convolutions, PyTorch's uniform for the classifier; what comes first is drawn first."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            weight = torch.empty(module.weight.shape, device="cpu")
            module.weight.copy_(nn.init.kaiming_normal_(weight, generator=generator))
        elif isinstance(module, nn.Linear):
            weight = torch.empty(module.weight.shape, device="cpu")
            module.weight.copy_(nn.init.uniform_(weight, -1, 1, generator=generator) / module.in_features**0.5)
            module.bias.zero_()


def _torchvision(spec: NetworkSpec, **options: Any) -> nn.Module:
    if (reason := _no_torchvision()) is not None:
        raise Unavailable(reason)
    model: Any = torchvision_densenet().DenseNet(**spec.arguments(), **options)
    if spec.small_inputs:  # torchvision knows ImageNet's stem alone
        stem = nn.Conv2d(3, spec.num_init_features, kernel_size=3, padding=1, bias=False)
        rest = [(name, child) for name, child in model.features.named_children() if name not in _STEM]
        model.features = nn.Sequential(OrderedDict([("conv0", stem), *rest]))
    return model


_STEM = ("conv0", "norm0", "relu0", "pool0")


def _no_torchvision(device: torch.device | None = None) -> str | None:
    return None if importlib.util.find_spec("torchvision") else "torchvision is not installed: pip install torchvision"


def _fastdense(spec: NetworkSpec, **options: Any) -> nn.Module:
    return fastdense.DenseNet(**spec.arguments(), small_inputs=spec.small_inputs, **options)


def _converted(spec: NetworkSpec) -> nn.Module:
    return fastdense.convert(_torchvision(spec))


class _EfficientLayer(ConcatDenseLayer):
    """What Pleiss et al. do: concatenation, BatchNorm and ReLU are computed again in backward, not kept.

    Kept is the output of the 1x1 convolution. Running statistics are updated in backward a second time, as in their
    code. Their shared storage is PyTorch's caching allocator here: what is computed again is freed after each layer.

    Source: arXiv 1707.06990, section 3.
    """

    def forward(self, features: Tensor | list[Tensor]) -> Tensor:  # type: ignore[override]
        earlier = [features] if isinstance(features, Tensor) else features
        bottleneck = checkpoint(self._bottleneck, *earlier, use_reentrant=False)
        return self.conv2(self.relu2(self.norm2(bottleneck)))

    def _bottleneck(self, *earlier: Tensor) -> Tensor:
        return self.conv1(self.relu1(self.norm1(torch.cat(earlier, dim=1))))


class _EfficientBlock(ConcatDenseBlock):
    layer_type = _EfficientLayer


def _efficient(spec: NetworkSpec) -> nn.Module:
    model: Any = _fastdense(spec, impl="reference")
    channels = spec.num_init_features
    for name, child in model.features.named_children():
        if isinstance(child, ConcatDenseBlock):
            block = _EfficientBlock(len(child), channels, spec.bn_size, spec.growth_rate)
            setattr(model.features, name, block)
            channels += len(child) * spec.growth_rate
        elif name.startswith("transition"):
            channels //= 2
    return model


def _no_compiler(device: torch.device) -> str | None:
    if (reason := _no_torchvision()) is not None:
        return reason
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "torch.compile needs Triton on a GPU"
    return _no_cxx_compiler()


@lru_cache(maxsize=1)
def _no_cxx_compiler() -> str | None:
    from torch._inductor.cpp_builder import get_cpp_compiler  # takes a second, and most runs do not need it
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        return "torch.compile needs a C++ compiler on the CPU, and finds none"
    return None


def _all() -> list[Provider]:
    compiled: dict[str, Any] = {"obstacle": _no_compiler, "exact": False}
    return [
        Provider(BASE, "torchvision", _torchvision, _no_torchvision),
        Provider(
            "memory-efficient",
            "torchvision memory_efficient",
            partial(_torchvision, memory_efficient=True),
            _no_torchvision,
        ),
        Provider("efficient-densenet", "efficient_densenet_pytorch's scheme", _efficient),
        Provider("compile", "torch.compile", _torchvision, compile_mode="default", **compiled),
        Provider(
            "compile-max-autotune",
            "torch.compile max-autotune",
            _torchvision,
            compile_mode="max-autotune",
            **compiled,
        ),
        *(
            Provider(
                f"fastdense-{recompute}" + ("-triton" if impl == "triton" else ""),
                f"fastdense {recompute} {impl}",
                partial(_fastdense, recompute=recompute, impl=impl),
                select.triton_unsupported_reason if impl == "triton" else lambda device: None,
                exact=impl == "torch",
            )
            for impl in ("torch", "triton")
            for recompute in ("activations", "bottlenecks")
        ),
        Provider("convert", "fastdense.convert of torchvision", _converted, _no_torchvision, exact=False),
    ]


PROVIDERS: dict[str, Provider] = {provider.name: provider for provider in _all()}
