"""The optimizer and its learning rate.

SGD with Nesterov momentum 0.9 and weight decay 1e-4, as in the DenseNet paper (Huang et al., arXiv 1608.06993, section
4.2). The paper's learning rate falls to a tenth at milestones (``schedule="step"``); the default is half a cosine
after a short linear warm-up (Loshchilov and Hutter, arXiv 1608.03983, without restarts).
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, SequentialLR

from .train_config import TrainConfig

__all__ = ["schedule", "sgd"]

WARM_UP_START = 0.1  # of the learning rate


def sgd(model: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """SGD as ``config`` says, for all parameters alike."""
    return torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov and config.momentum > 0,
    )


def schedule(optimizer: torch.optim.Optimizer, steps: int, config: TrainConfig | None = None) -> LRScheduler:
    """A linear warm-up from a tenth, then half a cosine down to zero, or one fall at each milestone.

    The step that crosses a milestone, a fraction of all ``steps``, is the first with the lower rate. A single step has
    no warm-up.
    """
    config = config or TrainConfig()
    warm_up = math.ceil(config.warm_up_fraction * steps) if steps > 1 else 0
    rest: LRScheduler
    if config.schedule == "step":
        falls = [math.floor(fraction * steps) - warm_up for fraction in config.milestones]
        rest = MultiStepLR(optimizer, milestones=falls, gamma=config.gamma)
    else:
        rest = CosineAnnealingLR(optimizer, T_max=steps - warm_up)
    if warm_up == 0:
        return rest
    linear = LinearLR(optimizer, start_factor=WARM_UP_START, total_iters=warm_up)
    return SequentialLR(optimizer, [linear, rest], milestones=[warm_up])
