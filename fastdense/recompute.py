"""``recompute="auto"``: of a block by itself, and the cheapest plan for a network that fits into its free memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import memory
from .backends.select import may_query
from .core.warn import say_once
from .ops.common import autocasts
from .ops.validate import windows
from .reference import BATCH_NORM, CONVOLUTIONS, ConcatDenseBlock, ConcatTransition, stages, widths

__all__ = ["WORKSPACE_BYTES", "BlockSize", "plan_recompute", "planned_bytes"]

# What does not grow with the network: buffers for chunks of rows (torch_backend.CHUNK_BYTES), sums.
WORKSPACE_BYTES = 24 << 20

USABLE = 0.9  # of the free memory: allocators round sizes up, and leave gaps

_NORMS = tuple(BATCH_NORM.values())


def choose_recompute(bottleneck_bytes: int, free_bytes: int) -> str:
    """``recompute="auto"`` of a block by itself: ``"activations"`` if its bottlenecks take at most a quarter of it."""
    return "activations" if 4 * bottleneck_bytes <= free_bytes else "bottlenecks"


def for_block(x: Tensor, layers: Sequence[Any], on_resolved: Callable[[str], None] | None = None) -> str:
    """The mode of a block that does not know the others, said once and told to ``on_resolved``.

    Args:
        x: what enters the block.
        layers: those whose parameters or inputs need a gradient. Without any nothing is saved in either mode; then, and
            where the device cannot be asked, it is ``"bottlenecks"``.
    """
    if not layers or not may_query(x.device):
        return "bottlenecks"
    channels = sum(layer.conv1.out_channels for layer in layers if len(stages(layer)) == 2)
    size, free = x.numel() // x.shape[1] * channels * x.element_size(), memory.free_bytes(x.device)
    mode = choose_recompute(size, free)
    _say(f"{mode!r} for a block by itself", f"its bottlenecks have {size / 1e6:.1f} MB, {free / 1e6:.1f} MB are free")
    if on_resolved is not None:
        on_resolved(mode)
    return mode


def _say(choice: str, sizes: str) -> None:
    """Once for each choice: the numbers vary from step to step."""
    say_once(f"fastdense: recompute='auto' resolved to {choice}: {sizes}", key=choice)


def plan(network: Any, x: Any) -> dict[str, str]:
    """The mode of each block of a :class:`fastdense.DenseNet` for a forward pass of ``x``, by the block's name.

    Empty where each block goes by its own rule: a block's ``recompute`` is not ``"auto"``, no gradient is needed, the
    device cannot be asked (a compiler traces, a CUDA graph is captured), or a module's sizes are not known.
    """
    blocks = [child for child in network.features.children() if isinstance(child, ConcatDenseBlock)]
    if not blocks or any(block.recompute != "auto" for block in blocks) or not torch.is_grad_enabled():
        return {}
    if not isinstance(x, Tensor) or x.dim() < 3 or not x.is_floating_point() or not may_query(x.device):
        return {}
    sizes, also_saved = network_sizes(network, x)
    if not sizes:
        return {}
    free = memory.free_bytes(x.device)
    modes = plan_recompute(list(sizes.values()), int(USABLE * free), also_saved)
    saved, peak = planned_bytes(list(sizes.values()), modes, also_saved)
    by_name = dict(zip(sizes, modes, strict=True))
    bytes_in_words = f"saves {saved / 1e6:.1f} MB, needs {peak / 1e6:.1f} MB at its peak, {free / 1e6:.1f} MB are free"
    _say(in_words(by_name), bytes_in_words)
    return by_name


def in_words(modes: dict[str, str]) -> str:
    """For instance ``'bottlenecks' for denseblock1, 'activations' for denseblock2, denseblock3``."""
    by_mode: dict[str, list[str]] = {}
    for name, mode in modes.items():
        by_mode.setdefault(mode, []).append(name)
    return ", ".join(f"{mode!r} for {', '.join(names)}" for mode, names in by_mode.items())


class BlockSize(NamedTuple):
    """What the plan needs of a block: its layers from the first that needs a gradient on, and where they run.

    In the letters of docs/algorithm.md; ``bottlenecks`` is empty for the paper's basic layer, which has none.
    """

    pixels: int  # m = N*H*W
    channels: int  # C, leaving
    reads: tuple[int, ...]  # C_l of each layer
    bottlenecks: tuple[int, ...]  # B_l of each layer
    itemsize: int  # bytes of an element

    @property
    def freed(self) -> int:
        """Bytes of all bottlenecks: what ``"bottlenecks"`` does not save."""
        return self.pixels * sum(self.bottlenecks) * self.itemsize

    @property
    def work(self) -> int:
        """Multiplications that ``"bottlenecks"`` repeats: ``m * sum(C_l * B_l)``."""
        return self.pixels * sum(c * b for c, b in zip(self.reads, self.bottlenecks, strict=False))

    def saved(self, mode: str) -> int:
        """Bytes saved for backward: ``X``, and every ``Z_l`` unless they are recomputed."""
        return self.pixels * self.channels * self.itemsize + (self.freed if mode == "activations" else 0)

    def scratch(self, mode: str) -> int:
        """Bytes that the block's backward needs beside that.

        The gradient that arrives and ``D``, ``C`` channels each; ``D`` of a bottleneck or, later, the gradient handed
        on; and if they are recomputed, a bottleneck.
        """
        widest = max(self.bottlenecks, default=0)
        channels = 2 * self.channels + max(widest, self.reads[0]) + (widest if mode == "bottlenecks" else 0)
        return self.pixels * channels * self.itemsize


def planned_bytes(blocks: Sequence[BlockSize], modes: Sequence[str], also_saved: int = 0) -> tuple[int, int]:
    """``(saved, peak)`` of a training step: after the forward pass, and at the worst moment of the backward pass.

    Backward goes from the last block to the first, and each frees what it saved: while block ``b`` is at work there is
    what blocks ``0 .. b`` save, and the scratch of ``b``.

    Args:
        blocks: in the order of their execution.
        modes: ``"activations"`` or ``"bottlenecks"`` for each.
        also_saved: bytes that are there all the time: what the stem saves, gradients that do not exist yet.
    """
    saved = peak = also_saved
    for block, mode in zip(blocks, modes, strict=True):
        saved += block.saved(mode)
        peak = max(peak, saved + block.scratch(mode))
    return saved, peak + WORKSPACE_BYTES


def plan_recompute(blocks: Sequence[BlockSize], free_bytes: int, also_saved: int = 0) -> list[str]:
    """``"activations"`` or ``"bottlenecks"`` for each block, so that :func:`planned_bytes` fits into ``free_bytes``.

    While it does not, one more block recomputes, the one where that costs least for each byte that it frees:
    ``m*sum(C_l*B_l)`` multiplications for ``m*sum(B_l)`` elements is the mean of ``C_l``, so early blocks come first,
    which are also the largest. Those that were unnecessary after all are taken back, the dearest first. If the network
    does not fit in any case, all blocks recompute.
    """
    modes = ["activations"] * len(blocks)
    price = {i: block.work / block.freed for i, block in enumerate(blocks) if block.freed}
    cheapest_first = sorted(price, key=price.__getitem__)

    def fits() -> bool:
        return planned_bytes(blocks, modes, also_saved)[1] <= free_bytes

    for i in cheapest_first:
        if not fits():
            modes[i] = "bottlenecks"
    for i in reversed(cheapest_first):
        if modes[i] == "bottlenecks" and fits():
            modes[i] = "activations"
            if not fits():
                modes[i] = "bottlenecks"
    return modes


def network_sizes(network: Any, x: Tensor) -> tuple[dict[str, BlockSize], int]:
    """The blocks that save something for backward, by name, and the bytes that are needed beside them.

    Those are the output of the stem's convolution and the gradients that do not exist yet. Of ``x``, only shape and
    dtype matter. Without blocks where a module's output size is not known.
    """
    autocast = autocasts(x.device.type) and x.dtype != torch.float64
    itemsize = (torch.get_autocast_dtype(x.device.type) if autocast else x.dtype).itemsize
    sizes: dict[str, BlockSize] = {}
    also_saved = sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad and p.grad is None)
    spatial, channels, learns = tuple(x.shape[2:]), x.shape[1], x.requires_grad
    children: dict[str, Any] = network.features._modules
    for name, child in children.items():
        pixels = x.shape[0] * torch.Size(spatial).numel()
        if isinstance(child, ConcatDenseBlock):
            size = _block_size(list(child.values()), pixels, itemsize, learns)
            if size is not None:
                sizes[name], learns = size, True
            channels = widths(list(child.values()))[-1]
            continue
        learns = learns or any(parameter.requires_grad for parameter in child.parameters())
        if type(child) in _NORMS and name != "norm5":
            also_saved += learns * pixels * channels * itemsize
        elif type(child) in CONVOLUTIONS:
            channels = child.out_channels
            steps = zip(spatial, child.padding, child.dilation, child.kernel_size, child.stride, strict=True)
            spatial = tuple((n + 2 * pad - dil * (size - 1) - 1) // step + 1 for n, pad, dil, size, step in steps)
        elif isinstance(child, nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d):
            spatial = windows("maximum", child).sizes(spatial)
        elif isinstance(child, ConcatTransition):
            conv: Any = child.conv
            channels = conv.out_channels
            spatial = windows("average", child.pool).sizes(spatial)
        elif type(child) not in (nn.ReLU, *_NORMS):
            return {}, also_saved
    return sizes, also_saved


def _block_size(layers: Sequence[Any], pixels: int, itemsize: int, learns: bool) -> BlockSize | None:
    """``None`` if no gradient comes to this block; ``learns``: whether one goes further back."""
    if not learns:
        learning = [i for i, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters())]
        if not learning:
            return None
        layers = layers[learning[0] :]
    *reads, channels = widths(layers)
    bottlenecks = tuple(layer.conv1.out_channels for layer in layers if len(stages(layer)) == 2)
    return BlockSize(pixels, channels, tuple(reads), bottlenecks, itemsize)
