"""The reference DenseBlock: ``torch.cat``, BatchNorm, ReLU, convolution, differentiated by autograd.

This is the ground truth that everything else is compared with, and the path that runs where fastdense cannot help. It
does nothing clever, on purpose.

Source: Huang, Liu, van der Maaten, Weinberger, "Densely Connected Convolutional Networks", arXiv 1608.06993, section 3.
Module names and ``state_dict`` keys are torchvision's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .core import checks

__all__ = ["ConcatDenseBlock", "ConcatDenseLayer", "ConcatTransition", "dense_block", "stages", "widths"]

CONV: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORM: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVOLUTIONS = tuple(CONV.values())
NORMS = (*BATCH_NORM.values(), nn.SyncBatchNorm)
AVG_POOL: dict[int, type[nn.Module]] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
_OLD_KEY = re.compile(r"(^|\.)(norm|relu|conv)\.([12])(?=\.)")
_CHANNEL_DROPOUT = {3: F.dropout1d, 4: F.dropout2d, 5: F.dropout3d}


class ConcatDenseLayer(nn.Module):
    """One layer, ``H_{l+1} = f_l([H_0, ..., H_l])``.

    With ``bn_size`` it is the bottleneck layer of DenseNet-B, BN-ReLU-Conv1x1-BN-ReLU-Conv3x3; with
    ``bn_size=None`` the basic layer of the paper, BN-ReLU-Conv3x3 (children ``norm1, relu1, conv1``).

    Args:
        num_input_features: channels of all earlier feature maps together.
        growth_rate: ``k``, channels that the layer adds.
        bn_size: bottleneck channels over ``growth_rate``, or ``None``.
        drop_rate: probability of dropout after the last convolution.
        spatial_dims: 1, 2 or 3.
    """

    norm2: nn.Module  # absent, like relu2 and conv2, without a bottleneck
    relu2: nn.Module
    conv2: nn.Module
    drop_channels = False  # drop whole (image, channel) maps, as nn.Dropout2d, instead of single elements

    def __init__(
        self,
        num_input_features: int,
        growth_rate: int,
        bn_size: int | None,
        drop_rate: float = 0.0,
        *,
        spatial_dims: int = 2,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.block_arguments(1, num_input_features, bn_size, growth_rate, drop_rate, spatial_dims)
        conv, norm = CONV[spatial_dims], BATCH_NORM[spatial_dims]
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        channels = num_input_features
        if bn_size is not None:
            self.norm1 = norm(channels, **at)
            self.relu1 = nn.ReLU(inplace=True)
            self.conv1 = conv(channels, bn_size * growth_rate, kernel_size=1, bias=False, **at)
            channels = bn_size * growth_rate
        last = 1 if bn_size is None else 2
        self.add_module(f"norm{last}", norm(channels, **at))
        self.add_module(f"relu{last}", nn.ReLU(inplace=True))
        self.add_module(f"conv{last}", conv(channels, growth_rate, kernel_size=3, padding=1, bias=False, **at))
        self.drop_rate = float(drop_rate)

    def forward(self, features: Tensor | Sequence[Tensor]) -> Tensor:
        """New features ``[N, k, *spatial]`` from all earlier ones (a list, or already concatenated)."""
        h = features if isinstance(features, Tensor) else torch.cat(list(features), dim=1)
        h = self.conv1(self.relu1(self.norm1(h)))
        if len(stages(self)) == 2:
            h = self.conv2(self.relu2(self.norm2(h)))
        if self.drop_rate > 0:
            drop = _CHANNEL_DROPOUT[h.dim()] if self.drop_channels else F.dropout
            h = drop(h, p=self.drop_rate, training=self.training)
        return h

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        rename_old_keys(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def rename_old_keys(module: Any, state_dict: dict[str, Any], prefix: str) -> None:
    """Checkpoints of before 2018 say ``norm.1.weight`` for ``norm1.weight``: a key that ``module`` knows."""
    known = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key[len(prefix) :]
        if name not in known and (renamed := _OLD_KEY.sub(r"\1\2\3", name)) in known:
            state_dict[prefix + renamed] = state_dict.pop(key)


def stages(layer: Any) -> list[tuple[Any, Any]]:
    """``(norm, conv)`` of each BN-ReLU-Conv of ``layer``, in the order of their execution: two with a bottleneck."""
    pairs = [(layer.norm1, layer.conv1)]
    return [*pairs, (layer.norm2, layer.conv2)] if "conv2" in layer._modules else pairs


def dense_block(x: Tensor, layers: Sequence[nn.Module]) -> Tensor:
    """``[x, f_0(x), f_1([x, f_0(x)]), ...]`` along the channels: ``[N, C0 + sum(k), *spatial]``."""
    features = [x]
    for layer in layers:
        features.append(layer(features))
    return torch.cat(features, dim=1)


class ConcatDenseBlock(nn.ModuleDict):
    """The reference block: same constructor, modules and keys as :class:`fastdense.DenseBlock`.

    ``memory_efficient``, ``recompute`` and ``impl`` are checked and kept, but change nothing here.
    """

    layer_type: type[ConcatDenseLayer] = ConcatDenseLayer

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        bn_size: int | None,
        growth_rate: int,
        drop_rate: float = 0.0,
        memory_efficient: bool = False,
        *,
        recompute: str | None = None,
        impl: str = "auto",
        spatial_dims: int = 2,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.block_arguments(num_layers, num_input_features, bn_size, growth_rate, drop_rate, spatial_dims)
        checks.recompute_mode(recompute, memory_efficient)
        checks.choice("impl", impl, checks.IMPL)
        self.memory_efficient, self.recompute, self.impl = memory_efficient, recompute, impl
        at: dict[str, Any] = {"spatial_dims": spatial_dims, "device": device, "dtype": dtype}
        for i in range(num_layers):
            layer = self.layer_type(num_input_features + i * growth_rate, growth_rate, bn_size, drop_rate, **at)
            self.add_module(f"denselayer{i + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        return dense_block(x, list(self.values()))


class ConcatTransition(nn.Sequential):
    """Between two blocks: BN-ReLU-Conv1x1-AvgPool2, which halves the resolution."""

    def __init__(
        self,
        num_input_features: int,
        num_output_features: int,
        *,
        impl: str = "auto",
        spatial_dims: int = 2,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.positive_int("num_input_features", num_input_features)
        checks.positive_int("num_output_features", num_output_features)
        checks.choice("impl", impl, checks.IMPL)
        checks.choice("spatial_dims", spatial_dims, (1, 2, 3))
        self.impl = impl
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = BATCH_NORM[spatial_dims](num_input_features, **at)
        self.relu = nn.ReLU(inplace=True)
        self.conv = CONV[spatial_dims](num_input_features, num_output_features, kernel_size=1, bias=False, **at)
        self.pool = AVG_POOL[spatial_dims](kernel_size=2, stride=2)


def widths(layers: Sequence[Any]) -> list[int]:
    """``C_0 .. C_L``: how many channels each layer of a block reads, and how many leave the block."""
    growth_rate = stages(layers[-1])[-1][1].out_channels
    return [*(layer.conv1.in_channels for layer in layers), layers[-1].conv1.in_channels + growth_rate]
