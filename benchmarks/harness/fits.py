"""Does a training step fit into a budget, counted or trained, and how large may it grow.

Counted, the network runs forward and backward on PyTorch's ``meta`` device, where tensors have shapes and no data:
autograd and checkpoints make, save and free the tensors that they would elsewhere, and a network that needs a terabyte
takes seconds. What an operator uses inside is not seen; of fastdense's it is added, from docs/memory.md.
"""

from __future__ import annotations

import gc
import math
import re
import time
import traceback
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fastdense.recompute import WORKSPACE_BYTES

Build = Callable[[], Any]  # a network; Any, because Module.to(memory_format=...) has no type
Shape = tuple[int, ...]
STEPS = 2  # from the second on there is momentum


class Counted(NamedTuple):
    """Bytes of a training step with SGD and momentum."""

    parameters: int  # with their momentum and the buffers: there all the time
    gradients: int  # of all parameters
    kept: int  # what there is after the forward pass, beside parameters and the batch
    peak: int  # the most at one time, of everything


def counted_bytes(network: Build, shape: Shape, classes: int) -> Counted:
    """Counts one training step of ``network()`` on a batch of ``shape``.

    Parameters, buffers, momentum, the batch, and each tensor that forward and backward make, for as long as it lives;
    not what a convolution takes for itself, nor what an allocator loses to rounding and gaps.
    """
    with torch.device("meta"):
        model, x = network().train(), torch.empty(shape)
        labels = torch.empty(shape[0], dtype=torch.int64)
        with LiveBytes([x, labels, *model.parameters(), *model.buffers()]) as live:
            loss = F.cross_entropy(model(x), labels)
            kept = live.now
            loss.backward()
    gradients = sum(p.nbytes for p in model.parameters())
    parameters = 2 * gradients + sum(b.nbytes for b in model.buffers())  # each of them, and its momentum
    return Counted(parameters, gradients, kept, parameters + x.nbytes + labels.nbytes + live.peak)


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make while it is on, until they are freed.

    ``now`` and ``peak`` are the bytes alive, and the most there were; tensors that are ``there`` before do not count.
    """

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._there = {tensor.untyped_storage()._cdata for tensor in there}
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, found)
        inside = _inside(str(func), args) if func.namespace == "fastdense" else 0
        self.peak = max(self.peak, self.now + inside)
        return found

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._there and key not in self._alive:
            self._alive[key] = weakref.ref(storage, lambda _: self._freed(key, size))
            self.now += size

    def _freed(self, key: int, size: int) -> None:
        del self._alive[key]
        self.now -= size


def _inside(operator: str, args: Any) -> int:
    """Bytes that fastdense's operator uses while it runs, beside its inputs and outputs.

    In the letters of docs/memory.md: backward makes ``D`` of the block and of a bottleneck, and a bottleneck that is
    computed again; forward, a bottleneck that is not saved. Of ``recompute="activations"`` that is ``m*B`` too much.
    """
    if not operator.startswith("fastdense.dense_block"):
        return WORKSPACE_BYTES
    backward = "backward" in operator
    features, params = (args[3], args[9]) if backward else (args[0], args[3])
    bottleneck = params[2].shape[0]  # the first convolution's outputs
    channels = features.shape[1] + 2 * bottleneck if backward else bottleneck
    return int(WORKSPACE_BYTES + features.nbytes // features.shape[1] * channels)


class Fit(NamedTuple):
    """Whether a step of one size stays within the budget."""

    fits: bool
    bytes: int | None  # the peak; a step that ran out of memory has none
    details: dict[str, Any]  # for the record


class CudaMemory:
    """PyTorch's CUDA allocator, which raises ``torch.OutOfMemoryError`` beyond the budget."""

    def __init__(self, budget: int, device: torch.device) -> None:
        self.budget, self.device = budget, device
        total = torch.cuda.mem_get_info(device)[1]
        if budget > total:
            raise ValueError(f"the GPU has {total / 1e9:.1f} GB, less than the budget of {budget / 1e9:.1f} GB")
        torch.cuda.set_per_process_memory_fraction(budget / total, device)

    def start(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_reserved(self.device)  # gaps included: that is what a card must have

    def release(self) -> int:
        """Empty the cache; returns what is still in use."""
        gc.collect()  # before: what it frees goes to the cache
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(self.device)

    def close(self) -> None:
        torch.cuda.set_per_process_memory_fraction(1.0, self.device)


def trained_fit(build: Build, shape: Shape, classes: int, memory: CudaMemory) -> Fit:
    """Trains for some steps; running out of memory is an answer, and leaves nothing behind for the next size."""
    peak, details = None, {}
    try:
        peak = _train(build, shape, classes, memory)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not out_of_memory(error):
            raise
        details["error"] = str(error).split(". ")[0]
        cause: BaseException | None = error
        while cause is not None:  # its frames hold network, gradients and graph
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__cause__ or cause.__context__
    return Fit(peak is not None and peak <= memory.budget, peak, {**details, "bytes_left": memory.release()})


def out_of_memory(error: BaseException) -> bool:
    """Whether the device had no memory left: PyTorch's own error, or a library's."""
    return isinstance(error, torch.OutOfMemoryError) or re.search("out of memory|ALLOC_FAILED", str(error)) is not None


def _train(build: Build, shape: Shape, classes: int, memory: CudaMemory) -> int:
    """Returns the peak of some steps; what they made is freed by then."""
    memory.start()
    torch.manual_seed(0)
    model = build().to(memory.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, foreach=False)
    x = torch.randn(shape, device=memory.device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(classes, shape[:1], device=memory.device)
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return memory.peak()


def search(attempt: Callable[[int], Fit], budget: int, until: float = math.inf) -> dict[int, Fit]:
    """Searches the largest size that fits: doubled until one does not, then by bisection. Returns all sizes tried.

    Bytes grow smoothly with the size: two of three tries are where the line through earlier ones meets the budget.
    After ``until``, a ``time.monotonic()``, no further size is tried. If a size does not fit, no larger one does.
    """
    tried: dict[int, Fit] = {}
    low, high, size = 0, None, 1
    while high != low + 1 and time.monotonic() <= until:
        tried[size] = fit = attempt(size)
        low, high = (size, high) if fit.fits else (low, size)
        usual, most = (2 * low, 2 * low) if high is None else ((low + high) // 2, high - 1)
        guess = _crossing(tried, budget) if high is None or len(tried) % 3 else None
        size = max(low + 1, min(guess or usual, most))
    return dict(sorted(tried.items()))


def _crossing(tried: dict[int, Fit], budget: int) -> int | None:
    """The last size before the budget on the line through the two known points that are nearest to it."""
    known = sorted((abs(fit.bytes - budget), size, fit.bytes) for size, fit in tried.items() if fit.bytes)
    if len(known) < 2:
        return None
    (_, x0, y0), (_, x1, y1) = known[:2]
    slope = (y1 - y0) / (x1 - x0)
    return int(x0 + (budget - y0) / slope) if slope > 0 else None
