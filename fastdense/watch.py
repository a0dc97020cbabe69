"""What ``fastdense train`` asks of gradient flow: pictures as training goes on, and who is to blame when it breaks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .events import FlowEvent
from .inspect import BlockFlow, first_not_finite, gradient_flow
from .runs import Run

__all__ = ["diagnose", "flow", "flows"]

IMAGES = 32  # at most, of a step's batch: float64 takes twice the memory, and a GPU many times the time


def flow(run: Run, images: Tensor, labels: Tensor, *, step: int, epoch: int) -> Iterator[FlowEvent]:
    """The gradient flow of ``run`` as it is now, on the first images of the newest batch; never changes the run."""
    seen = gradient_flow(run.model, images[:IMAGES], labels[:IMAGES])
    blocks = {block.name: _plain(block.total) for block in seen}
    yield FlowEvent(run.name, step, epoch, blocks, {block.name: _plain(block.contributions) for block in seen})


def flows(event: FlowEvent) -> list[BlockFlow]:
    """What ``event`` tells, as :func:`fastdense.gradient_flow` does."""
    return [
        BlockFlow(name, torch.tensor(total).double(), torch.tensor(event.contributions[name]).double())
        for name, total in event.total.items()
    ]


def _plain(tensor: Tensor) -> list:  # type: ignore[type-arg]
    """Numbers of six digits, which is what a file of measurements can use."""
    if tensor.dim() > 1:
        return [_plain(row) for row in tensor]
    return [float(f"{value:.6g}") for value in tensor.tolist()]


def diagnose(run: Run, images: Tensor, labels: Tensor) -> str | None:
    """Which layer's values or gradient went first on this batch, in words; never changes the run.

    It repeats the step on a copy, in the arithmetic of the step. ``None`` where that is finite or cannot be done.
    """
    scale = run.scaler.get_scale()

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return scale * F.cross_entropy(output, target)

    autocast = torch.autocast(images.device.type, dtype=run.amp, enabled=run.amp is not None)
    try:
        with autocast, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return first_not_finite(run.model, images, labels, loss_fn)
    except Exception:  # it explains another error, and must not hide that one: out of memory, say
        return None
