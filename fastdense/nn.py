"""DenseNet as ``nn.Module``: torchvision's names, arguments and ``state_dict`` keys on fastdense's algorithm."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import functional, recompute
from .core import checks
from .functional import Moments
from .ops.support import changed, process_unsupported_reason
from .reference import BATCH_NORM, CONV, CONVOLUTIONS, ConcatDenseBlock, ConcatDenseLayer, ConcatTransition

__all__ = [
    "DenseBlock",
    "DenseLayer",
    "DenseNet",
    "Transition",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet264",
]


class DenseLayer(ConcatDenseLayer):
    """One layer's parameters, as ordinary children ``norm1, relu1, conv1, norm2, relu2, conv2``.

    A :class:`DenseBlock` reads them and runs all its layers together; called by itself, the layer is the reference one.
    Arguments are those of :class:`fastdense.reference.ConcatDenseLayer`.
    """

    def __init__(
        self, num_input_features: int, growth_rate: int, bn_size: int | None, drop_rate: float = 0.0, **options: Any
    ) -> None:
        super().__init__(num_input_features, growth_rate, bn_size, drop_rate, **options)
        for conv in _convolutions(self):
            # As [out, *kernel, in], the order in which a channels-last convolution reads it.
            conv.weight.data = conv.weight.data.movedim(1, -1).contiguous().movedim(-1, 1)


class DenseBlock(ConcatDenseBlock):
    """A DenseBlock on one shared buffer: a drop-in for torchvision's ``_DenseBlock``.

    Args:
        num_layers: ``L``.
        num_input_features: ``C0``, channels entering.
        bn_size: bottleneck channels over ``growth_rate``; ``None`` for the paper's basic layer without bottleneck.
        growth_rate: ``k``, channels each layer adds.
        drop_rate: element-wise dropout after each layer.
        memory_efficient: torchvision's flag; the same as ``recompute="bottlenecks"``.
        recompute: ``"activations"`` (save features and bottlenecks), ``"bottlenecks"`` (save the features alone),
            ``"auto"`` (the first while the bottlenecks fit into a quarter of the free memory; a :class:`DenseNet`
            plans for all its blocks) or ``None`` (what ``memory_efficient`` says).
        impl: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``; ``"auto"`` obeys ``FASTDENSE_IMPL``.
        spatial_dims: 1, 2 or 3.

    Shape:
        ``[N, C0, *spatial]`` to ``[N, C0 + L*k, *spatial]``, channels last.

    The children are not called. Where one carries a hook, a parametrization or an unknown type the block says so once
    and runs the reference path. Equivalent to :class:`fastdense.reference.ConcatDenseBlock` with the same parameters.

    Source: arXiv 1608.06993.
    """

    layer_type = DenseLayer
    resolved_recompute: str | None = None  # what recompute="auto" resolved to, the last time

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)[0]

    def _run(
        self, x: Tensor, moments: Moments | None = None, want_moments: bool = False, planned: str | None = None
    ) -> tuple[Tensor, Moments | None]:
        """``forward`` with moments in and out; ``planned`` is what ``recompute="auto"`` resolved to, if known."""
        mode = planned or checks.recompute_mode(self.recompute, self.memory_efficient)
        if planned is not None:
            self.resolved_recompute = planned
        remember = partial(setattr, self, "resolved_recompute")
        return functional.run_block(
            x, list(self.values()), mode, self.impl, moments, want_moments, on_resolved=remember
        )

    def extra_repr(self) -> str:
        recompute = repr(checks.recompute_mode(self.recompute, self.memory_efficient))
        if self.recompute == "auto" and self.resolved_recompute is not None:
            recompute += f" (resolved to {self.resolved_recompute!r})"
        return f"recompute={recompute}, impl={self.impl!r}"


def _convolutions(module: nn.Module) -> Iterator[Any]:
    return (child for child in module.modules() if isinstance(child, CONVOLUTIONS))


class Transition(ConcatTransition):
    """Between two blocks: BN-ReLU-Conv1x1-AvgPool2, with the pooling done first.

    Args:
        num_input_features: channels entering.
        num_output_features: channels leaving; the paper halves them.

    Shape:
        ``[N, C, *spatial]`` to ``[N, C_out, *(spatial // 2)]``.

    Pooling and a 1x1 convolution commute: the result is the same for a quarter of the convolution's work. The input
    alone is saved for backward. Equivalent to ``pool(conv(relu(norm(x))))``.

    Source: arXiv 1608.06993, section 3.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)[0]

    def _run(
        self, x: Tensor, moments: Moments | None = None, want_moments: bool = False
    ) -> tuple[Tensor, Moments | None]:
        if checks.impl_name(self.impl) == "reference":
            return super().forward(x), None
        parts = self.norm, self.relu, self.conv, self.pool
        return functional.run_transition(x, *parts, self.impl, moments, want_moments)


class DenseNet(nn.Module):
    """DenseNet-BC with torchvision's modules and keys (``features.denseblock1.denselayer1.norm1.weight`` ...).

    Args:
        growth_rate: ``k``.
        block_config: layers in each block.
        num_init_features: channels that the stem makes.
        bn_size: bottleneck channels over ``growth_rate``, or ``None`` for no bottleneck.
        drop_rate: dropout after each layer.
        num_classes: width of the classifier.
        memory_efficient: torchvision's flag; the same as ``recompute="bottlenecks"``.
        in_channels: channels of the input.
        small_inputs: CIFAR's stem, one 3x3 convolution, instead of ImageNet's 7x7 convolution and pooling.
        recompute, impl: see :class:`DenseBlock`. ``recompute="auto"`` plans each training step for the whole network:
            ``recompute.plan_recompute`` with nine tenths of the free memory.
        spatial_dims: 1, 2 or 3.

    Shape:
        ``[N, in_channels, *spatial]`` to ``[N, num_classes]``. Blocks halve the resolution between them; ImageNet's
        stem divides it by 4 first.

    Equivalent to ``torchvision.models.DenseNet`` with the same arguments: under one seed, the same initial weights.
    Source: arXiv 1608.06993, table 1 and section 4.
    """

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int | None = 4,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        memory_efficient: bool = False,
        *,
        in_channels: int = 3,
        small_inputs: bool = False,
        recompute: str | None = None,
        impl: str = "auto",
        spatial_dims: int = 2,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not block_config:
            raise ValueError(f"block_config must name at least one block's layers, got {block_config!r}")
        checks.positive_int("num_classes", num_classes)
        checks.positive_int("in_channels", in_channels)
        checks.positive_int("num_init_features", num_init_features)
        checks.choice("spatial_dims", spatial_dims, (1, 2, 3))
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        options = {"impl": impl, "spatial_dims": spatial_dims, **at}
        self.features = nn.Sequential(_stem(in_channels, num_init_features, small_inputs, spatial_dims, at))
        channels = num_init_features
        for i, num_layers in enumerate(block_config, 1):
            block = DenseBlock(
                num_layers, channels, bn_size, growth_rate, drop_rate, memory_efficient, recompute=recompute, **options
            )
            self.features.add_module(f"denseblock{i}", block)
            channels += num_layers * growth_rate
            if i < len(block_config):
                transition = Transition(channels, max(1, channels // 2), **options)
                self.features.add_module(f"transition{i}", transition)
                channels = max(1, channels // 2)
        self.features.add_module("norm5", BATCH_NORM[spatial_dims](channels, **at))
        self.classifier = nn.Linear(channels, num_classes, **at)
        self.impl = impl
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """torchvision's: He et al.'s normal for convolutions, 1 and 0 for norms, 0 for the classifier's bias."""
        for conv in _convolutions(self):
            # Through a contiguous copy: random values fill memory in order, and the weight may be channels last.
            weight = torch.empty_like(conv.weight, memory_format=torch.contiguous_format)
            conv.weight.copy_(nn.init.kaiming_normal_(weight))
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self._by_modules():
            features = F.relu(self.features(x), inplace=True)
            return self.classifier(features.flatten(2).mean(2))
        return self.classifier(self._pooled_features(x))

    def _by_modules(self) -> bool:
        """Whether ``features`` is to be called as the module that it is: it may be hooked, replaced or exported."""
        plain = type(self.features) is nn.Sequential and not _changed(self.features)
        return not plain or checks.impl_name(self.impl) == "reference" or process_unsupported_reason() is not None

    def _pooled_features(self, x: Tensor) -> Tensor:
        """What the head hands to the classifier, ``[N, C]``; moments pass to the next consumer."""
        moments: Moments | None = None
        children: list[tuple[str, Any]] = list(self.features._modules.items())
        plan = recompute.plan(self, x)
        while children:
            name, child = children.pop(0)
            if name == "norm0" and [follower for follower, _ in children[:2]] == ["relu0", "pool0"]:
                (_, relu), (_, pool) = children.pop(0), children.pop(0)
                x, moments = functional.run_stem(x, child, relu, pool, self.impl, _wants_moments(children))
            elif type(child) is DenseBlock and not _changed(child):
                x, moments = child._run(x, moments, _wants_moments(children), plan.get(name))
            elif type(child) is Transition and not _changed(child):
                x, moments = child._run(x, moments, _wants_moments(children))
            elif name == "norm5" and not children:
                return functional.run_head(x, child, self.impl, moments)
            else:
                x, moments = child(x), None
        return F.relu(x).flatten(2).mean(2)


def _changed(module: nn.Module) -> bool:
    """Whether calling ``module`` is more than its ``forward``: hooks, ``module.compile()``."""
    return changed(module) is not None or getattr(module, "_compiled_call_impl", None) is not None


def _wants_moments(children: list[tuple[str, Any]]) -> bool:
    """Whether the next of ``children`` normalises what it reads with batch statistics."""
    if not children:
        return False
    child = children[0][1]
    if type(child) is DenseBlock:
        child = next(iter(child.values())).norm1
    elif type(child) is Transition:
        child = child.norm
    return isinstance(child, _BatchNorm) and (child.training or child.running_mean is None)


def _stem(
    in_channels: int, out_channels: int, small: bool, spatial_dims: int, at: dict[str, Any]
) -> OrderedDict[str, nn.Module]:
    conv, norm = CONV[spatial_dims], BATCH_NORM[spatial_dims]
    if small:
        return OrderedDict(conv0=conv(in_channels, out_channels, kernel_size=3, padding=1, bias=False, **at))
    pool = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}[spatial_dims]
    return OrderedDict(
        conv0=conv(in_channels, out_channels, kernel_size=7, stride=2, padding=3, bias=False, **at),
        norm0=norm(out_channels, **at),
        relu0=nn.ReLU(inplace=True),
        pool0=pool(kernel_size=3, stride=2, padding=1),
    )


def _named(
    growth_rate: int, block_config: tuple[int, ...], num_init_features: int, options: dict[str, Any]
) -> DenseNet:
    return DenseNet(
        **{"growth_rate": growth_rate, "block_config": block_config, "num_init_features": num_init_features, **options}
    )


def densenet121(**kwargs: Any) -> DenseNet:
    """DenseNet-121: ``k = 32``, blocks of 6, 12, 24, 16 layers. Keywords go to :class:`DenseNet`."""
    return _named(32, (6, 12, 24, 16), 64, kwargs)


def densenet161(**kwargs: Any) -> DenseNet:
    """DenseNet-161: ``k = 48``, blocks of 6, 12, 36, 24 layers. Keywords go to :class:`DenseNet`."""
    return _named(48, (6, 12, 36, 24), 96, kwargs)


def densenet169(**kwargs: Any) -> DenseNet:
    """DenseNet-169: ``k = 32``, blocks of 6, 12, 32, 32 layers. Keywords go to :class:`DenseNet`."""
    return _named(32, (6, 12, 32, 32), 64, kwargs)


def densenet201(**kwargs: Any) -> DenseNet:
    """DenseNet-201: ``k = 32``, blocks of 6, 12, 48, 32 layers. Keywords go to :class:`DenseNet`."""
    return _named(32, (6, 12, 48, 32), 64, kwargs)


def densenet264(**kwargs: Any) -> DenseNet:
    """DenseNet-264: ``k = 32``, blocks of 6, 12, 64, 48 layers (``growth_rate=48`` gives the wide one)."""
    return _named(32, (6, 12, 64, 48), 64, kwargs)
