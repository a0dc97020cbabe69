"""Measures bytes: what a forward pass saves for backward, what a training step needs at its peak, and what is free."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._profiler import _EventType

__all__ = ["PeakBytes", "SavedBytes", "free_bytes", "peak_bytes", "saved_bytes"]


@dataclass
class SavedBytes:
    """What autograd holds on to: each storage once, however many tensors share it."""

    storages: dict[int, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())


@contextmanager
def saved_bytes(*owners: nn.Module | Tensor) -> Iterator[SavedBytes]:
    """Counts the bytes that forward passes inside the ``with`` save for backward, on any device.

    Storages are counted once each; those of ``owners`` (a model's parameters and buffers, an input tensor) not at all,
    because they exist without the pass. Equivalent to summing ``untyped_storage().nbytes()`` over what
    ``torch.autograd.graph.saved_tensors_hooks`` sees.

    Example:
        >>> with fastdense.memory.saved_bytes(model) as saved:
        ...     loss = model(x).square().mean()
        >>> print(f"{saved.bytes / 1e6:.1f} MB")
    """
    own: set[int] = set()
    for owner in owners:
        tensors = [owner] if isinstance(owner, Tensor) else [*owner.parameters(), *owner.buffers()]
        own.update(tensor.untyped_storage().data_ptr() for tensor in tensors)
    saved = SavedBytes()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved.storages[storage.data_ptr()] = storage.nbytes()
        # Detached: a node that saved its own output would otherwise keep itself alive.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


@dataclass
class PeakBytes:
    """The most bytes that were allocated at one time inside :func:`peak_bytes`.

    Attributes:
        bytes: the peak, above what was there at the start.
        events: on the CPU, ``(address, size)`` of each allocation, in order; the size of what is freed is negative.
    """

    bytes: int = 0
    events: list[tuple[int, int]] | None = field(default=None, repr=False)

    def without(self, *owners: nn.Module | Tensor) -> int:
        """The peak, had the gradients of ``owners`` (a model, a parameter) and ``owners`` themselves taken no memory.

        For what was allocated inside the ``with`` and is still alive. Raises ``RuntimeError`` on CUDA, whose allocator
        counts bytes and not tensors: there, let the gradients exist before.
        """
        if self.events is None:
            raise RuntimeError("CUDA's counter cannot leave tensors out: allocate them before peak_bytes() instead")
        tensors = [t for owner in owners for t in ([owner] if isinstance(owner, Tensor) else owner.parameters())]
        tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
        return sum(_live_at_peak(self.events, {tensor.untyped_storage().data_ptr() for tensor in tensors}))

    def at_peak(self) -> list[int]:
        """Sizes of what was alive at the peak, largest first; empty on CUDA."""
        return sorted(_live_at_peak(self.events or [], set()), reverse=True)


def _live_at_peak(events: Sequence[tuple[int, int]], left_out: set[int]) -> list[int]:
    """Sizes of what is alive at the peak; ``left_out`` are addresses of allocations that were never freed."""
    last = {address: i for i, (address, _) in enumerate(events)}
    skipped = {last[address] for address in left_out if address in last}
    live: dict[int, int] = {}
    now = peak = 0
    at_peak: list[int] = []
    for i, (address, size) in enumerate([*events, (0, -1)]):
        if size < 0:
            if now > peak:  # before it falls
                peak, at_peak = now, list(live.values())
            now -= live.pop(address, 0)  # 0: it was there before the start
        elif i not in skipped:
            live[address] = size
            now += size
    return at_peak


@contextmanager
def peak_bytes(device: torch.device | str) -> Iterator[PeakBytes]:
    """Measures the most bytes that tensors allocated inside the ``with`` occupy at one time, in custom operators too.

    What was allocated before is not counted. On CUDA it is ``torch.cuda.max_memory_allocated`` minus
    ``torch.cuda.memory_allocated`` at the start (PyTorch's own peak is reset). On the CPU it is the sum over the memory
    events of ``torch.profiler.profile(profile_memory=True)``: everything that PyTorch's allocator hands out, but not
    what a library like oneDNN takes for itself. ``ValueError`` for another device.

    Example:
        >>> with fastdense.memory.peak_bytes("cpu") as peak:
        ...     model(x).square().mean().backward()
        >>> print(f"{peak.bytes / 1e6:.1f} MB, {peak.without(model) / 1e6:.1f} MB without the parameters' gradients")
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be a CUDA device or the CPU, got {str(device)!r}")
    peak = PeakBytes()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - start
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield peak
    peak.events = _memory_events(profiler)
    peak.bytes = peak.without()


def _memory_events(profiler: torch.profiler.profile) -> list[tuple[int, int]]:
    """``(address, size)`` of what was allocated on the CPU, or freed (a negative size), in order of time."""
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    found: list[tuple[int, int, int]] = []
    rest = list(profiler.profiler.kineto_results.experimental_event_tree())
    while rest:
        event = rest.pop()
        rest.extend(event.children)
        if event.tag == _EventType.Allocation:
            fields: Any = event.extra_fields
            if fields.device.type == "cpu":
                found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    return [(address, size) for _, address, size in sorted(found, key=lambda entry: entry[0])]


def free_bytes(device: torch.device) -> int:
    """Memory that a further allocation may use: on CUDA what is free or in PyTorch's cache, else the free RAM."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1 << 62  # unknown: behave as if there were enough
