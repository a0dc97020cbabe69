"""How many bytes a forward pass keeps for its backward pass."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class SavedBytes:
    """What autograd holds on to: each storage once, however many tensors share it."""

    storages: dict[int, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Sum of the storages' sizes."""
        return sum(self.storages.values())


@contextmanager
def saved_bytes(*owners: nn.Module | Tensor) -> Iterator[SavedBytes]:
    """Count the bytes that forward passes inside the ``with`` keep for backward.

    Storages are counted once each; those of ``owners`` (a model's parameters and buffers, an input tensor) not at all,
    because they exist without the pass. Works on every device. Equivalent to summing ``untyped_storage().nbytes()``
    over what ``torch.autograd.graph.saved_tensors_hooks`` sees.

    Example:
        >>> with fastdense.memory.saved_bytes(model) as kept:
        ...     loss = model(x).square().mean()
        >>> print(f"{kept.bytes / 1e6:.1f} MB")
    """
    own: set[int] = set()
    for owner in owners:
        tensors = [owner] if isinstance(owner, Tensor) else [*owner.parameters(), *owner.buffers()]
        own.update(tensor.untyped_storage().data_ptr() for tensor in tensors)
    kept = SavedBytes()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept.storages[storage.data_ptr()] = storage.nbytes()
        # Detached: a node that saved its own output would otherwise keep itself alive.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def free_bytes(device: torch.device) -> int:
    """Memory that a further allocation may use: on CUDA what is free or in PyTorch's cache, else the free RAM."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1 << 62  # unknown: behave as if there were enough


def choose_recompute(bottleneck_bytes: int, device: torch.device) -> str:
    """The mode behind ``recompute="auto"``.

    ``"activations"`` while a block's bottlenecks fit into a quarter of the free memory, else ``"bottlenecks"``.
    """
    return "activations" if 4 * bottleneck_bytes <= free_bytes(device) else "bottlenecks"
