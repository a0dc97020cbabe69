"""What may enter the operators: each error names the value and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..core import checks
from ..core.features import accumulation_dtype
from ..core.primitives import Pool
from ..reference import stages
from .common import NOT_TWICE, autocasts

_RANKS = {nn.BatchNorm1d: 3, nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}  # nn.SyncBatchNorm takes any
_POOLED_DIMS: dict[type[nn.Module], int] = {
    nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3, nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3
}  # fmt: skip


def block_input(x: Any, layers: Sequence[Any]) -> None:
    """Raises unless ``x`` fits the first of ``layers``."""
    _features(x)
    if not layers:
        raise ValueError("layers must hold at least one layer, got none")
    weight = getattr(getattr(layers[0], "conv1", None), "weight", None)
    if isinstance(weight, Tensor) and x.dim() != weight.dim():
        raise ValueError(
            f"x must have {weight.dim()} dimensions [N, C, {weight.dim() - 2} spatial], as the layers' convolutions, "
            f"got shape {tuple(x.shape)}"
        )
    expected = getattr(getattr(layers[0], "norm1", None), "num_features", None)
    if expected is not None and x.shape[1] != expected:
        raise ValueError(f"x must have {expected} channels, as the first layer reads, got shape {tuple(x.shape)}")
    _pixels(x)


def block_layers(x: Tensor, layers: Sequence[Any]) -> None:
    """Raises unless each of ``layers`` reads ``x`` and what those before it write."""
    channels, count, casts = x.shape[1], len(stages(layers[0])), autocasts(x.device.type)
    for i, layer in enumerate(layers):
        checks.probability(f"drop_rate of layer {i}", layer.drop_rate)
        reads, pairs = channels, stages(layer)
        if len(pairs) != count:
            raise ValueError(f"layers must all have a bottleneck or all have none; layer {i} differs from layer 0")
        for number, (norm, conv) in enumerate(pairs, 1):
            if norm.num_features != reads or conv.in_channels != reads:
                raise ValueError(
                    f"layer {i} (counted from 0) must read {reads} channels in norm{number} and conv{number}, got "
                    f"{norm.num_features} and {conv.in_channels}"
                )
            reads = conv.out_channels
            for name, tensor in (("conv", conv.weight), ("norm", norm.weight), ("norm", norm.running_mean)):
                if tensor is not None and tensor.device != x.device:
                    raise _elsewhere(x, f"{name}{number} of layer {i}", tensor)
            if conv.weight.dtype != x.dtype and not casts:
                raise _of_another_dtype(x, f"conv{number} of layer {i}", conv.weight)
        channels += reads


def pool_input(x: Any, norm: Any, weight: Tensor | None, pool: Pool) -> None:
    """Raises unless ``norm``, ``pool`` and a convolution of ``weight`` behind them can read ``x``."""
    _features(x)
    if not 3 <= x.dim() <= 5:
        raise ValueError(f"x must be [N, C, *spatial] with 1 to 3 spatial dimensions, got shape {tuple(x.shape)}")
    ranks = {
        "norm": _RANKS.get(type(norm)),
        "pooling": len(pool.kernel) + 2 if pool.kernel else None,
        "conv": None if weight is None else weight.dim(),
    }
    for name, rank in ranks.items():
        if rank not in (None, x.dim()):
            raise ValueError(f"x must have {rank} dimensions, as the {name} reads, got shape {tuple(x.shape)}")
    if x.shape[1] != norm.num_features:
        raise ValueError(f"x must have {norm.num_features} channels, as the norm reads, got shape {tuple(x.shape)}")
    if weight is not None and weight.shape[1] != x.shape[1]:
        raise ValueError(f"the conv must read the norm's {x.shape[1]} channels, got a weight of {tuple(weight.shape)}")
    _pixels(x)
    if any(size < 1 for size in pool.sizes(x.shape[2:])):
        raise ValueError(f"x must have at least {pool.kernel} pixels, as the pooling takes, got shape {tuple(x.shape)}")
    tensors = {"conv's weight": weight, "norm's weight": norm.weight, "norm's statistics": norm.running_mean}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != x.device:
            raise _elsewhere(x, f"the {name}", tensor)
    if weight is not None and weight.dtype != x.dtype and not autocasts(x.device.type):
        raise _of_another_dtype(x, "the conv's weight", weight)


def _features(x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor (float16, bfloat16, float32 or float64), got {x.dtype}")


def _pixels(x: Tensor) -> None:
    if 0 in x.shape[2:]:
        raise ValueError(f"x must have at least one pixel, got shape {tuple(x.shape)}")


def _elsewhere(x: Tensor, name: str, tensor: Tensor) -> ValueError:
    ours, other = str(x.device), str(tensor.device)
    return ValueError(f"x is on device {ours!r}, but {name} is on {other!r}: move one of them with .to()")


def _of_another_dtype(x: Tensor, name: str, weight: Tensor) -> ValueError:
    return ValueError(
        f"x is {x.dtype}, but {name} is {weight.dtype}: convert one of them with .to(), or use torch.autocast"
    )


def moments(x: Tensor, given: Any) -> None:
    """Raises unless ``given`` is ``None`` or moments of ``x``."""
    if given is None:
        return
    if not (isinstance(given, tuple) and len(given) == 2 and all(map(torch.is_tensor, given))):
        raise ValueError(f"moments must be a pair of tensors (mean, var) or None, got {given!r}")
    expected = accumulation_dtype(x.dtype)
    for name, moment in zip(("mean", "var"), given, strict=True):
        if moment.shape != x.shape[1:2] or moment.dtype != expected or moment.device != x.device:
            raise ValueError(
                f"moments must be (mean, var), each [{x.shape[1]}] {expected} on {str(x.device)!r}; {name} is "
                f"{list(moment.shape)} {moment.dtype} on {str(moment.device)!r}"
            )


def values_per_channel(x: Tensor) -> int:
    """How many values a channel of ``x`` has; raises, as PyTorch does, if that is one, whose variance is 0."""
    m = x.shape[0] * x.shape[2:].numel()
    if m == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
    return m


def differentiable_once(x: Tensor) -> None:
    """Raises under ``torch.func`` transforms and forward-mode differentiation."""
    if torch.compiler.is_compiling():
        return
    transforms = getattr(torch._C, "_are_functorch_transforms_active", None)
    dual = forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None
    if dual or (transforms is not None and transforms()):
        raise RuntimeError(NOT_TWICE)


def windows(kind: str, pool: Any) -> Pool:
    """The windows of a pooling module, one size for each dimension."""
    dims = _POOLED_DIMS[type(pool)]

    def sizes(value: Any) -> tuple[int, ...]:
        values = tuple(value) if isinstance(value, tuple | list) else (value,)
        return values * dims if len(values) == 1 else values

    found = Pool(kind, sizes(pool.kernel_size), sizes(pool.stride), sizes(pool.padding))
    if {len(found.kernel), len(found.stride), len(found.padding)} != {dims}:
        raise ValueError(f"the pooling must have one size, or one for each of {dims} dimensions, got {pool}")
    if min(*found.kernel, *found.stride) < 1 or any(
        not 0 <= 2 * padding <= size for size, padding in zip(found.kernel, found.padding, strict=True)
    ):
        raise ValueError(f"the pooling must have positive sizes, and at most half of one as padding, got {pool}")
    return found
