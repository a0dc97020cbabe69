"""Does a training step fit into a budget, and how large may it grow: trials, counted or real, and the search over them.

Counted, the network runs forward and backward on PyTorch's ``meta`` device, where tensors have shapes and no data:
autograd and checkpoints make, keep and free the tensors that they would elsewhere, and a network that needs a terabyte
takes seconds. What an operator uses inside is not seen; of fastdense's block operators it is added, from
docs/memory.md.
"""

from __future__ import annotations

import gc
import time
import traceback
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdense.recompute import WORKSPACE_BYTES

Build = Callable[[], Any]  # a network; Any, because Module.to(memory_format=...) has no type
Shape = tuple[int, ...]
STEPS = 2  # from the second on there is momentum
GUESSES = 6  # probes that may follow the curve; then they halve what is left


class Counted(NamedTuple):
    """Bytes of a training step with SGD and momentum.

    Attributes:
        parameters: parameters, their momentum and the buffers: there all the time.
        gradients: of the parameters, when all of them exist.
        kept: what there is after the forward pass, beside parameters and the batch.
        peak: the most at one time, of everything.
    """

    parameters: int
    gradients: int
    kept: int
    peak: int


def counted_bytes(network: Callable[[], nn.Module], shape: Shape, classes: int) -> Counted:
    """Counts one training step of ``network()`` on a batch of ``shape``.

    Parameters, buffers, momentum, the batch, and each tensor that forward and backward make, for as long as it lives;
    not what a convolution takes for itself, nor what an allocator loses to rounding and gaps.
    """
    with torch.device("meta"):
        model, x = network().train(), torch.empty(shape)
        labels = torch.empty(shape[0], dtype=torch.int64)
        there = [x, labels, *model.parameters(), *model.buffers()]
        with LiveBytes(there) as live:
            loss = F.cross_entropy(model(x), labels)
            kept = live.now
            loss.backward()
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    parameters = 2 * gradients + buffers  # each of them, and its momentum
    return Counted(parameters, gradients, kept, parameters + _size(x) + _size(labels) + live.peak)


def _size(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make while it is on, until they are freed.

    Args:
        there: tensors that exist before, and are not counted.

    Attributes:
        now, peak: bytes alive, and the most there were.
    """

    def __init__(self, there: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._there = {tensor.untyped_storage()._cdata for tensor in there}
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = torch.empty_like(args[0]) if _adds_alike(func, args) else func(*args, **(kwargs or {}))
        self._note(found)
        inside = _inside(str(func), args) if func.namespace == "fastdense" else 0
        self.peak = max(self.peak, self.now + inside)
        return found

    def _note(self, found: Any) -> None:
        if isinstance(found, tuple | list):
            for each in found:
                self._note(each)
        elif isinstance(found, Tensor):
            storage = found.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._there or key in self._alive:
                return
            self._alive[key] = weakref.ref(storage, lambda _: self._freed(key, size))
            self.now += size

    def _freed(self, key: int, size: int) -> None:
        del self._alive[key]
        self.now -= size


def _adds_alike(func: Any, args: Any) -> bool:
    """Whether this adds two tensors without data whose dimensions lie in one order: the sum's do, too.

    These are gradients, one sum for every pair of layers, and PyTorch takes long to come to the same conclusion.
    """
    if func is not torch.ops.aten.add.Tensor or not all(isinstance(arg, Tensor) and arg.is_meta for arg in args):
        return False
    a, b = args
    return a.shape == b.shape and a.dtype == b.dtype and a.dim_order() == b.dim_order()


def _inside(operator: str, args: Any) -> int:
    """Bytes that fastdense's operator uses while it runs, beside its inputs and outputs.

    In the letters of docs/memory.md: backward makes ``D`` of the block and of a bottleneck, and a bottleneck that is
    computed again; forward, a bottleneck that nobody keeps. Of ``recompute="activations"`` that is ``m*B`` too much.
    """
    bytes_ = WORKSPACE_BYTES
    if operator.startswith("fastdense.dense_block"):
        backward = "backward" in operator
        features, params = (args[3], args[9]) if backward else (args[0], args[3])
        pixels = features.numel() // features.shape[1]
        bottleneck = params[2].shape[0]  # the first convolution's outputs
        channels = features.shape[1] + 2 * bottleneck if backward else bottleneck
        bytes_ += pixels * channels * features.element_size()
    return int(bytes_)


@dataclass(frozen=True)
class Trial:
    """One size, tried.

    Attributes:
        fits: whether it stays within the budget.
        bytes: the peak, where it is known: a step that ran out of memory has none.
        details: more, for the record.
    """

    fits: bool
    bytes: int | None
    details: dict[str, Any]


class CudaMemory:
    """PyTorch's CUDA allocator, which raises ``torch.OutOfMemoryError`` beyond the budget."""

    def __init__(self, budget: int, device: torch.device) -> None:
        self.budget, self.device = budget, device
        total = torch.cuda.mem_get_info(device)[1]
        if budget > total:
            raise ValueError(f"the GPU has {total / 1e9:.1f} GB, less than the budget of {budget / 1e9:.1f} GB")
        torch.cuda.set_per_process_memory_fraction(budget / total, device)

    def start(self) -> None:
        """Forget earlier peaks."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """What the allocator had reserved at most, gaps included: that is what a card must have."""
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_reserved(self.device)

    def release(self) -> int:
        """Empty the cache; returns what is still in use."""
        gc.collect()  # before: what it frees goes to the cache
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(self.device)

    def close(self) -> None:
        """Lift the limit."""
        torch.cuda.set_per_process_memory_fraction(1.0, self.device)


def real_trial(build: Build, shape: Shape, classes: int, memory: CudaMemory) -> Trial:
    """Trains for some steps; running out of memory is an answer, and leaves nothing behind for the next trial."""
    try:
        peak = _train(build, shape, classes, memory)
        fits, found, details = peak <= memory.budget, peak, {}
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not out_of_memory(error):
            raise
        fits, found, details = False, None, {"error": str(error).split(". ")[0]}
        _forget(error)
    return Trial(fits, found, {**details, "bytes_left": memory.release()})


def out_of_memory(error: BaseException) -> bool:
    """Whether the device had no memory left: PyTorch's own error, or a library's."""
    texts = ("out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def _train(build: Build, shape: Shape, classes: int, memory: CudaMemory) -> int:
    """The peak of some steps. Whatever it makes is its own, and goes when it returns."""
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


def _forget(error: BaseException | None) -> None:
    """Drop what the frames of a failed step hold: network, gradients, graph."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def counted_trial(network: Callable[[], nn.Module], shape: Shape, classes: int, budget: int) -> Trial:
    """The same without a device."""
    counted = counted_bytes(network, shape, classes)
    details = {name: value for name, value in counted._asdict().items() if name != "peak"}
    return Trial(counted.peak <= budget, counted.peak, details)


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        largest: the largest size that fits; 0 if the first one does not.
        complete: whether the next size was tried, and does not fit.
        trials: all of them, by size.
    """

    largest: int
    complete: bool
    trials: dict[int, Trial]


def largest(attempt: Callable[[int], Trial], budget: int, *, first: int = 1, until: float | None = None) -> Search:
    """The largest size that fits: doubled until one does not, then by bisection.

    Bytes grow smoothly with the size, so a probe goes where the curve through the last two crosses the budget; after
    ``GUESSES`` of those between the bounds, every other probe is their middle.

    Args:
        attempt: a trial of one size. If a size does not fit, no larger one does.
        budget: bytes.
        first: the smallest size, tried first.
        until: ``time.monotonic()`` after which no further trial begins.
    """
    trials: dict[int, Trial] = {}
    low, high, size, between = first - 1, None, first, 0
    while high is None or high - low > 1:
        if until is not None and time.monotonic() > until:
            break
        trials[size] = trial = attempt(size)
        low, high = (size, high) if trial.fits else (low, size)
        guess = _crossing(trials, budget)
        if high is None:
            size = max(low + 1, min(2 * low, guess or 2 * low))
            continue
        between += 1
        middle = (low + high) // 2
        halve = guess is None or (between > GUESSES and between % 2 == 0)
        size = middle if halve or guess is None else max(low + 1, min(high - 1, guess))
    complete = high is not None and high - low == 1
    return Search(low if low >= first else 0, complete, dict(sorted(trials.items())))


def _crossing(trials: dict[int, Trial], budget: int) -> int | None:
    """The last whole size before the budget on the line through the two known points that are nearest to it."""
    known = sorted((abs(trial.bytes - budget), size, trial.bytes) for size, trial in trials.items() if trial.bytes)
    if len(known) < 2:
        return None
    (_, x0, y0), (_, x1, y1) = known[:2]
    slope = (y1 - y0) / (x1 - x0)
    return int(x0 + (budget - y0) / slope) if slope > 0 else None
