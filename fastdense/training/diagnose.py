"""Gradient flow while a network trains, and which layer breaks first when a loss is not finite."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from ..analysis.gradient_flow import BlockFlow, first_not_finite, gradient_flow
from .events import FlowEvent
from .run import Run

__all__ = ["diagnose", "flow", "flows"]

IMAGES = 32  # at most, of a step's batch: float64 takes twice the memory, and a GPU many times the time


def flow(run: Run, images: Tensor, labels: Tensor, *, step: int, epoch: int) -> FlowEvent:
    """The gradient flow of ``run`` as it is now, on the first images of the newest batch; never changes the run."""
    blocks = gradient_flow(run.model, images[:IMAGES], labels[:IMAGES])
    total = {block.name: _six_digits(block.total.tolist()) for block in blocks}
    contributions = {block.name: [_six_digits(row) for row in block.contributions.tolist()] for block in blocks}
    return FlowEvent(run.name, step, epoch, total, contributions)


def _six_digits(numbers: list[float]) -> list[float]:
    return [float(f"{number:.6g}") for number in numbers]


def flows(event: FlowEvent) -> list[BlockFlow]:
    """What ``event`` holds, as :func:`fastdense.gradient_flow` returns it."""
    return [
        BlockFlow(name, torch.tensor(total).double(), torch.tensor(event.contributions[name]).double())
        for name, total in event.total.items()
    ]


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
