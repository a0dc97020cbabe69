"""Several processes that train one network together: what ``torchrun`` starts, or this process alone.

Every process has the whole network, takes its share of each batch, and gets the mean of all gradients
(``torch.nn.parallel.DistributedDataParallel``). Rank 0 prints and writes files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel


def lost_process(error: BaseException) -> bool:
    """Whether ``error`` is what a collective raises when a process at its other end is gone."""
    if not dist.is_available() or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or ("gloo" in str(error) and "peer" in str(error))


@dataclass(frozen=True)
class Processes:
    """All processes, as one of them sees them."""

    rank: int = 0  # 0 prints and writes
    count: int = 1
    local: int | None = None  # number of this process on its machine; None where it is alone
    store: Any = None  # what the processes know in common, also while one of them fails

    def share(self, numbers: Tensor) -> Tensor:
        """Returns the part of ``numbers`` that is for this process."""
        return numbers[self.rank :: self.count]

    def sum(self, values: Tensor) -> Tensor:
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def largest(self, *numbers: int) -> list[int]:
        """Of each of the ``numbers`` the largest that a process has."""
        shared = torch.tensor(numbers)
        if self.count > 1:
            dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return [int(number) for number in shared.tolist()]

    def gather(self, mine: Any) -> list[Any]:
        if self.count == 1:
            return [mine]
        gathered: list[Any] = [None] * self.count
        dist.all_gather_object(gathered, mine)
        return gathered

    def wrap(self, model: nn.Module, device: torch.device, *, sync_bn: bool) -> nn.Module:
        """Returns ``model`` as called in training; ``sync_bn`` turns its norms into ``nn.SyncBatchNorm``, in place."""
        if self.count == 1:
            return model
        wrapped = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
        if sync_bn:
            # DDP refuses SyncBatchNorm on the CPU when it wraps, because PyTorch's own needs a GPU; fastdense's does
            # not. The norms keep their Parameters and buffers, so DDP's hooks and broadcasts stay right.
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return wrapped

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Gives all ranks the running statistics of rank 0."""
        if self.count > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def first_to_fail(self) -> bool:
        """Whether no other process has called this before: the one that explains why all of them stop."""
        if self.store is None:
            return True
        try:
            return int(self.store.add("fastdense/failed", 1)) == 1
        except RuntimeError:  # the store went down with the process that held it, which has said why
            return False


@contextmanager
def processes() -> Iterator[Processes]:
    """Joins the processes that ``torchrun`` started, with gloo on the CPU and nccl on GPUs; alone without it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_available():
        yield Processes()
        return
    store, rank, count = next(rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    local = int(os.environ.get("LOCAL_RANK", rank))
    if local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    yield Processes(rank, count, local, store)
    # Not after an error: the others may be waiting in a collective that this process will not join.
    dist.destroy_process_group()
