"""Does a training step fit into a budget, and how large may it grow: trials on a device, and the search over them."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from .counted import counted_bytes

Build = Callable[[], Any]  # a network; Any, because Module.to(memory_format=...) has no type
STEPS = 2  # from the second on there is momentum
GUESSES = 6  # probes that may follow the curve; then they halve what is left


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


class Memory(Protocol):
    """A device's memory, limited to a budget."""

    device: torch.device
    budget: int

    def start(self) -> None:
        """Forget earlier peaks."""

    def peak(self) -> int:
        """The most bytes since ``start``."""

    def release(self) -> int:
        """Hand back what is unused; returns the bytes that are still in use."""


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


def real_trial(build: Build, shape: tuple[int, ...], classes: int, memory: Memory) -> Trial:
    """Train for some steps; running out of memory is an answer, and leaves nothing behind for the next trial."""
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


def _train(build: Build, shape: tuple[int, ...], classes: int, memory: Memory) -> int:
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


def counted_trial(network: Callable[[], nn.Module], shape: tuple[int, ...], classes: int, budget: int) -> Trial:
    """The same without a device: see ``counted``."""
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
