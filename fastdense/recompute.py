"""``recompute="auto"``: of a block by itself, and of a whole network, whose sizes follow from the shape of an input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import memory
from .backends.select import may_query
from .core.warn import say_once
from .memory import BlockSize
from .ops.common import autocasts
from .ops.validate import windows
from .reference import BATCH_NORM, CONVOLUTIONS, ConcatDenseBlock, ConcatTransition, stages

__all__ = ["for_block", "in_words", "network_sizes", "plan"]

USABLE = 0.9  # of the free memory: allocators round sizes up, and leave gaps

_NORMS = tuple(BATCH_NORM.values())
_MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)


def for_block(x: Tensor, layers: Sequence[Any], picked: Callable[[str], None] | None = None) -> str:
    """The mode of a block that does not know the others, said once and told to ``picked``.

    Args:
        x: what enters the block.
        layers: those whose parameters or inputs need a gradient. Without any nothing is saved in either mode; then, and
            where the device cannot be asked, it is ``"bottlenecks"``.
    """
    if not layers or not may_query(x.device):
        return "bottlenecks"
    channels = sum(layer.conv1.out_channels for layer in layers if len(stages(layer)) == 2)
    size, free = x.numel() // x.shape[1] * channels * x.element_size(), memory.free_bytes(x.device)
    mode = memory.choose_recompute(size, free)
    _say(f"{mode!r} for a block by itself", f"its bottlenecks have {size / 1e6:.1f} MB, {free / 1e6:.1f} MB are free")
    if picked is not None:
        picked(mode)
    return mode


def _say(choice: str, figures: str) -> None:
    """Once for each choice: the numbers vary from step to step."""
    say_once(f"fastdense: recompute='auto' resolved to {choice}: {figures}", key=choice)


def plan(network: Any, x: Any) -> dict[str, str]:
    """The mode of each block of a :class:`fastdense.DenseNet` for a forward pass of ``x``, by the block's name.

    Empty where nothing is planned, and each block goes by its own rule: a block's ``recompute`` is not ``"auto"``, no
    gradient is needed, the device cannot be asked (a compiler traces, a CUDA graph is captured), or the network has
    modules whose sizes are not known.
    """
    blocks = [child for child in network.features.children() if isinstance(child, ConcatDenseBlock)]
    if not blocks or any(block.recompute != "auto" for block in blocks) or not torch.is_grad_enabled():
        return {}
    if not isinstance(x, Tensor) or x.dim() < 3 or not x.is_floating_point() or not may_query(x.device):
        return {}
    sizes, also_kept = network_sizes(network, x)
    if not sizes:
        return {}
    free = memory.free_bytes(x.device)
    modes = memory.plan_recompute(list(sizes.values()), int(USABLE * free), also_kept)
    kept, peak = memory.planned_bytes(list(sizes.values()), modes, also_kept)
    figures = f"keeps {kept / 1e6:.1f} MB, needs {peak / 1e6:.1f} MB at its peak, {free / 1e6:.1f} MB are free"
    _say(in_words(dict(zip(sizes, modes, strict=True))), figures)
    return dict(zip(sizes, modes, strict=True))


def in_words(modes: dict[str, str]) -> str:
    """For instance ``'bottlenecks' for denseblock1, 'activations' for denseblock2, denseblock3``."""
    by_mode: dict[str, list[str]] = {}
    for name, mode in modes.items():
        by_mode.setdefault(mode, []).append(name)
    return ", ".join(f"{mode!r} for {', '.join(names)}" for mode, names in by_mode.items())


def network_sizes(network: Any, x: Tensor) -> tuple[dict[str, BlockSize], int]:
    """The blocks that keep something for backward, by name, and the bytes that are needed beside them.

    Beside the blocks there are the stem's convolution's output and the gradients that do not exist yet. Nothing of
    ``x`` but its shape and dtype is looked at. Without blocks where a module's output size is not known.
    """
    autocast = autocasts(x.device.type) and x.dtype != torch.float64
    itemsize = (torch.get_autocast_dtype(x.device.type) if autocast else x.dtype).itemsize
    sizes: dict[str, BlockSize] = {}
    also_kept = sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad and p.grad is None)
    spatial, channels, learns = tuple(x.shape[2:]), x.shape[1], x.requires_grad
    children: dict[str, Any] = network.features._modules
    for name, child in children.items():
        pixels = x.shape[0] * torch.Size(spatial).numel()
        if isinstance(child, ConcatDenseBlock):
            size = _block_size(list(child.values()), pixels, itemsize, learns)
            if size is not None:
                sizes[name], learns = size, True
            channels = _leaving(list(child.values()))
            continue
        learns = learns or any(parameter.requires_grad for parameter in child.parameters())
        if type(child) in _NORMS and name != "norm5":
            also_kept += learns * pixels * channels * itemsize
        elif type(child) in CONVOLUTIONS:
            channels = child.out_channels
            steps = zip(spatial, child.padding, child.dilation, child.kernel_size, child.stride, strict=True)
            spatial = tuple((n + 2 * pad - dil * (size - 1) - 1) // step + 1 for n, pad, dil, size, step in steps)
        elif type(child) in _MAX_POOLS:
            spatial = windows("maximum", child).sizes(spatial)
        elif isinstance(child, ConcatTransition):
            conv: Any = child.conv
            channels = conv.out_channels
            spatial = windows("average", child.pool).sizes(spatial)
        elif type(child) not in (nn.ReLU, *_NORMS):
            return {}, also_kept
    return sizes, also_kept


def _leaving(layers: Sequence[Any]) -> int:
    return layers[0].conv1.in_channels + sum(stages(layer)[-1][1].out_channels for layer in layers)


def _block_size(layers: Sequence[Any], pixels: int, itemsize: int, learns: bool) -> BlockSize | None:
    """``learns``: whether a gradient goes further back than this block; ``None`` if it does not even come so far."""
    if not learns:
        learning = [i for i, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters())]
        if not learning:
            return None
        layers = layers[learning[0] :]
    reads = tuple(layer.conv1.in_channels for layer in layers)
    bottlenecks = tuple(layer.conv1.out_channels for layer in layers if len(stages(layer)) == 2)
    return BlockSize(pixels, _leaving(layers), reads, bottlenecks, itemsize)
