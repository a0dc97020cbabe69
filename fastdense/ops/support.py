"""What the fused path can take, and why something else runs on the reference path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _module

from ..backends.sync_batchnorm import group_of
from ..core import checks
from ..core.warn import say_once
from ..reference import CONVOLUTIONS, NORMS, ConcatDenseLayer

_KNOWN = frozenset((*NORMS, *CONVOLUTIONS, nn.ReLU))


def refusal(impl: str, reason: str) -> str:
    """The warning with which something goes to the reference path; raises where ``impl`` leaves no choice."""
    if impl != "auto":
        raise RuntimeError(f"impl={impl!r} cannot run this block: {reason}; use impl='auto' or impl='reference'")
    return f"fastdense runs the reference path (slower, more memory): {reason}"


def falls_back(impl: str, reason: str | None) -> bool:
    """Whether there is a ``reason`` for the reference path; says it once, or raises where ``impl`` leaves no choice."""
    if reason is not None:
        say_once(refusal(impl, reason))
    return reason is not None


def runs_by_modules(impl: str, what: str, reason: str | None) -> bool:
    """Whether the modules of ``what`` are to be called one by one: as ``impl`` says, or for a ``reason``, said once."""
    impl = checks.impl_name(impl)
    return impl == "reference" or falls_back(impl, process_unsupported_reason() or (reason and f"{what}: {reason}"))


def unsupported_reason(layers: Sequence[nn.Module], *, moments: bool = False) -> str | None:
    """The reason why these layers cannot run fused (with ``moments`` in or out), or ``None`` if they can.

    The fused path reads the children's tensors and does not call them: a child that would do anything else when called
    (a hook, a parametrization, another type) sends the whole block to the reference path.
    """
    if reason := process_unsupported_reason():
        return reason
    shares = False
    for i, layer in enumerate(layers):
        children = layer._modules
        if isinstance(layer, ConcatDenseLayer) and type(layer).forward is not ConcatDenseLayer.forward:
            return f"layer {i}: a {type(layer).__name__} has a forward of its own"
        if reason := changed(layer) or _structure(children):
            return f"layer {i}: {reason}"
        for name, child in children.items():
            if type(child) not in _KNOWN:
                return f"layer {i}: its child {name!r} is a {type(child).__name__}, which fastdense does not know"
            if reason := changed(child):
                return f"layer {i}: its child {name!r} {reason}"
            shares = shares or type(child) is nn.SyncBatchNorm
            if type(child) in CONVOLUTIONS and (reason := convolution_unsupported_reason(child, name)):
                return f"layer {i}: {reason}"
        if getattr(layer, "drop_channels", False) != getattr(layers[0], "drop_channels", False):
            return f"layer {i}: it drops whole channels where layer 0 drops elements, or the other way round"
    if not shares:
        return None
    return sync_unsupported_reason(
        [c for layer in layers for c in layer.children() if isinstance(c, NORMS)], moments=moments
    )


def sync_unsupported_reason(norms: Sequence[nn.Module], *, moments: bool = False) -> str | None:
    """Why these norms' statistics cannot be shared between processes, or ``None``."""
    group = group_of(norms)
    if group is None:
        return "some of its norms share batch statistics with other processes and others do not"
    if group and moments:
        return "batch moments that other processes share (SyncBatchNorm) cannot be handed in or out"
    return None


def process_unsupported_reason() -> str | None:
    """What makes every block of this process, or of this export, run the reference path, or ``None``."""
    if _module._global_forward_hooks or _module._global_forward_pre_hooks or _module._global_backward_hooks:
        return "a global module hook is registered"
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return "the model is being exported (torch.export, torch.jit or ONNX)"
    return None


def pools_first(conv: Any, pool: Any) -> bool:
    """Whether ``conv(pool(x))`` equals ``pool(conv(x))``: a 1x1 convolution, and an average without padding."""
    return (
        type(conv) in CONVOLUTIONS
        and set(conv.kernel_size) == set(conv.stride) == {1}
        and conv.padding in ((0,) * len(conv.kernel_size), "valid", "same")
        and type(pool) in (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
        and set(_tuple(pool.padding)) == {0}
        and getattr(pool, "divisor_override", None) is None
        and not (changed(conv) or changed(pool))
    )


def norm_unsupported_reason(norm: Any, relu: Any) -> str | None:
    """Why BatchNorm and ReLU (``None`` if none is called) cannot run fused, or ``None``."""
    for name, module, known in (("norm", norm, NORMS), ("ReLU", relu, (nn.ReLU,))):
        if module is None:
            continue
        if type(module) not in known:
            return f"its {name} is a {type(module).__name__}, which fastdense does not know"
        if reason := changed(module):
            return f"its {name} {reason}"
    return None


def average_unsupported_reason(conv: Any, pool: Any) -> str | None:
    """Why average pooling and a 1x1 convolution cannot run fused, or ``None``."""
    if not pools_first(conv, pool):
        return "its pooling and its convolution cannot change places"
    if conv.bias is not None or conv.groups != 1:
        return f"its convolution has {'a bias' if conv.bias is not None else f'{conv.groups} groups'}"
    if _sizes(pool.kernel_size) != _sizes(pool.stride) or pool.ceil_mode:
        return f"its windows overlap, leave gaps or reach over the rim ({pool})"
    return None


def maximum_unsupported_reason(pool: Any) -> str | None:
    """Why maximum pooling cannot run fused, or ``None``."""
    if type(pool) not in (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d):
        return f"its pooling is a {type(pool).__name__}, which fastdense does not know"
    if reason := changed(pool):
        return f"its pooling {reason}"
    if set(_tuple(pool.dilation)) != {1} or pool.ceil_mode or pool.return_indices:
        return f"its pooling is dilated, reaches over the rim or returns indices ({pool})"
    return None


def _sizes(value: int | Sequence[int]) -> set[int] | tuple[int, ...]:
    """For a comparison: one number stands for all dimensions."""
    sizes = _tuple(value)
    return set(sizes) if len(set(sizes)) == 1 else sizes


def _tuple(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def changed(module: Any) -> str | None:
    """What makes calling ``module`` differ from its class's ``forward``, or ``None``."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "carries a hook"
    if "forward" in module.__dict__:
        return "has a forward of its own"
    return None


def _structure(children: dict[str, nn.Module | None]) -> str | None:
    kinds = {"norm": NORMS, "relu": (nn.ReLU,), "conv": CONVOLUTIONS}
    last = "2" if "conv2" in children else "1"
    for name in ("norm1", "conv1", f"norm{last}", f"conv{last}"):
        if name not in children:
            return f"it has no child {name!r}"
    for name, child in children.items():
        kind = kinds.get(name[:-1])
        if kind is None or name[-1] not in "12":
            return f"it has a child {name!r}, which a DenseNet layer does not have"
        if type(child) in _KNOWN and not isinstance(child, kind):
            return f"its child {name!r} is a {type(child).__name__}"
    return None


def convolution_unsupported_reason(conv: Any, name: str) -> str | None:
    """Why ``conv`` cannot run fused, or ``None``.

    It must have stride 1, no dilation, groups or bias, and an odd kernel with zero padding that keeps the size.
    """
    if conv.bias is not None:
        return f"{name} has a bias"
    if conv.groups != 1:
        return f"{name} has {conv.groups} groups"
    if any(stride != 1 for stride in conv.stride) or any(dilation != 1 for dilation in conv.dilation):
        return f"{name} has stride {conv.stride} and dilation {conv.dilation}; only 1 is accelerated"
    if conv.padding_mode != "zeros" or conv.padding != tuple(size // 2 for size in conv.kernel_size):
        return f"{name} has padding {conv.padding!r} ({conv.padding_mode}); only zero padding that keeps the size is"
    if any(size % 2 == 0 for size in conv.kernel_size):
        return f"{name} has an even kernel size {conv.kernel_size}"
    return None
