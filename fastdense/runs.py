"""One network in training: its recipe, a step, an evaluation, and what a checkpoint holds of it.

The recipe is SGD with Nesterov momentum 0.9 and weight decay 1e-4, as in the DenseNet paper (Huang et al., arXiv
1608.06993, section 4.2). The paper's learning rate falls to a tenth at milestones (``lr_schedule="step"``); the default
is half a cosine after a short linear warm-up (Loshchilov and Hutter, arXiv 1608.03983, without restarts).
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from . import memory
from .events import EpochEvent, Summary
from .nn import DenseBlock
from .processes import Processes
from .train_config import TrainConfig

__all__ = ["LastStep", "Run", "average", "lr_scheduler", "rng_states", "saved_for_backward", "sgd"]

WARM_UP_START = 0.1  # of the learning rate
LEAST_SCALE = 1.0  # of the loss in float16: below, gradients overflow though nothing enlarges them


class LastStep(NamedTuple):
    """What a step was like; see :class:`fastdense.events.StepEvent`."""

    loss: float
    grad_norm: float
    lr: float
    images: int
    skipped: bool


def rng_states(device: torch.device) -> list[Tensor]:
    """States of the generators that a step on ``device`` draws from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_rng_states(states: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)


def sgd(model: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """SGD as ``config`` says, for all parameters alike."""
    return torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov and config.momentum > 0,
    )


def lr_scheduler(optimizer: torch.optim.Optimizer, steps: int, config: TrainConfig | None = None) -> LRScheduler:
    """A linear warm-up from a tenth, then half a cosine down to zero, or one fall at each milestone.

    So many steps as a milestone's fraction of all ``steps``, rounded, are made before it. A single step has no warm-up.
    """
    config = config or TrainConfig()
    warm_up = math.ceil(config.warm_up_fraction * steps) if steps > 1 else 0
    rest: LRScheduler
    if config.lr_schedule == "step":
        falls = [round(fraction * steps) - warm_up for fraction in config.milestones]
        rest = MultiStepLR(optimizer, milestones=falls, gamma=config.gamma)
    else:
        rest = CosineAnnealingLR(optimizer, T_max=steps - warm_up)
    if warm_up == 0:
        return rest
    linear = LinearLR(optimizer, start_factor=WARM_UP_START, total_iters=warm_up)
    return SequentialLR(optimizer, [linear, rest], milestones=[warm_up])


def average(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of ``model``: ``average = decay * average + (1 - decay) * value`` a step.

    Running statistics are averaged like the weights: those of the newest weights would not fit the averaged ones.
    """
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def saved_for_backward(model: nn.Module, images: Tensor, labels: Tensor, amp: torch.dtype | None = None) -> int:
    """Bytes that one training forward saves for backward, parameters and buffers left out.

    It runs on a copy of the model and forks the generators, so that it does not change the training.
    """
    probe = copy.deepcopy(model).train()
    forked = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices=forked), memory.saved_bytes(probe) as saved, _autocast(images.device, amp):
        loss = F.cross_entropy(probe(images), labels)
    del loss
    for block, probed in zip(model.modules(), probe.modules(), strict=True):
        if isinstance(block, DenseBlock) and isinstance(probed, DenseBlock):
            block.picked = probed.picked
    return saved.bytes


def _autocast(device: torch.device, amp: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if amp is None else torch.autocast(device.type, dtype=amp)


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class _Buffers:
    """A model's buffers as they were: one copy for each dtype, because there are hundreds of small ones."""

    def __init__(self, model: nn.Module) -> None:
        self.groups: dict[torch.dtype, list[Tensor]] = {}
        for buffer in model.buffers():
            self.groups.setdefault(buffer.dtype, []).append(buffer)
        self.values = [torch.cat([buffer.flatten() for buffer in group]) for group in self.groups.values()]

    def restore(self) -> None:
        for group, values in zip(self.groups.values(), self.values, strict=True):
            for buffer, value in zip(group, values.split([buffer.numel() for buffer in group]), strict=True):
                buffer.copy_(value.view_as(buffer))


@dataclass
class Run:
    """One network in training, and its history.

    Attributes:
        name: ``"reference"`` or ``"fastdense"``, as in the file of measurements.
        model: the network; ``state_dict`` has its plain names.
        network: what is called in training: ``model``, or DDP round it.
        rng: states of the random generators that belong to this run.
        amp: what autocast computes in; ``None`` without it.
        scaler: of the loss, for float16; idle otherwise.
        ema: the averaged network; ``None`` without one.
        epoch_start: number of steps before the current epoch.
        last: the newest step.
    """

    name: str
    impl: str
    model: nn.Module
    network: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    scaler: torch.amp.GradScaler
    rng: list[Tensor]
    amp: torch.dtype | None = None
    ema: AveragedModel | None = None
    processes: Processes = field(default_factory=Processes)
    kept_bytes: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    evaluations: list[EpochEvent] = field(default_factory=list)
    epoch_start: int = 0
    last: LastStep | None = None

    @property
    def label(self) -> str:
        return "textbook torch.cat" if self.name == "reference" else "fastdense"

    @property
    def picked(self) -> dict[str, str]:
        """What ``recompute="auto"`` resolved to, by block; empty where it was not asked for."""
        return {
            name.removeprefix("features."): block.picked
            for name, block in self.model.named_modules()
            if isinstance(block, DenseBlock) and block.recompute == "auto" and block.picked is not None
        }

    @property
    def train_loss(self) -> float | None:
        """Mean over the current epoch's steps."""
        epoch = self.losses[self.epoch_start :] or self.losses[-1:]
        return statistics.fmean(epoch) if epoch else None

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One optimizer step; sets ``last`` and appends to ``losses`` and ``seconds``.

        A loss or a gradient that is not finite changes nothing else: weights, optimizer, running statistics and
        generators stay as they were. Where float16 overflows in the gradients alone, the scale falls and the step is
        skipped, as far as weights, schedule and average are concerned.
        """
        device = images.device
        _set_rng_states(self.rng, device)
        self.model.train()
        _finish(device)
        start = time.perf_counter()
        before = _Buffers(self.model)
        self.optimizer.zero_grad(set_to_none=True)
        with _autocast(device, self.amp):
            loss = F.cross_entropy(self.network(images), labels)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        value, norm = self._loss_and_norm(loss.detach())
        finite = math.isfinite(value) and math.isfinite(norm)
        overflow = math.isfinite(value) and not finite and self.scaler.is_enabled()
        self.last = LastStep(value, norm, self.optimizer.param_groups[0]["lr"], len(labels), overflow)
        if finite:
            self._apply()
        if finite or overflow:
            self.scaler.update()
            self.rng = rng_states(device)
        else:
            before.restore()
        _finish(device)
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(value)

    def _loss_and_norm(self, loss: Tensor) -> tuple[float, float]:
        """The mean loss over all ranks and the norm of the gradients, which DDP has averaged; in one transfer."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        loss = self.processes.sum(loss.clone()) / self.processes.count
        value, length = torch.stack([loss, norm.to(loss.dtype)]).tolist()
        return value, length

    def _apply(self) -> None:
        self.scaler.step(self.optimizer)
        self.scheduler.step()
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    @property
    def finite(self) -> bool:
        """Whether the newest step could be made, or its like may succeed with a smaller scale of the loss."""
        assert self.last is not None
        if self.last.skipped:
            return self.scaler.get_scale() >= LEAST_SCALE
        return math.isfinite(self.last.loss) and math.isfinite(self.last.grad_norm)

    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, ...]:
        """Mean cross-entropy and accuracy in evaluation mode, then those of the average if there is one.

        Args:
            batches: this process's share of the test images.
        """
        models = [self.model] if self.ema is None else [self.model, self.ema.module]
        for model in models:
            self.processes.broadcast_buffers(model)
            model.eval()
        # All logits at once, so that the mean is PyTorch's own, whatever the batches: 4 bytes a class and image.
        logits: list[list[Tensor]] = [[] for _ in models]
        labels: list[Tensor] = []
        with torch.inference_mode():
            for images, right in batches:
                labels.append(right)
                with _autocast(images.device, self.amp):
                    for model, seen in zip(models, logits, strict=True):
                        seen.append(model(images))
            return tuple(number for seen in logits for number in self._score(seen, labels))

    def _score(self, logits: Sequence[Tensor], labels: Sequence[Tensor]) -> tuple[float, float]:
        totals = torch.zeros(3, dtype=torch.float64)  # loss, right answers, images
        if labels:  # fewer test images than processes leave some without any
            scores, truth = torch.cat(list(logits)).float(), torch.cat(list(labels))
            loss, right = F.cross_entropy(scores, truth, reduction="sum"), (scores.argmax(1) == truth).sum()
            totals = torch.stack([loss.double(), right.double()]).cpu()
            totals = torch.cat([totals, totals.new_full((1,), len(truth))])
        loss, right, count = self.processes.sum(totals)
        return (loss / count).float().item(), (right / count).item()

    def summary(self) -> Summary:
        """The results so far."""
        last = asdict(self.evaluations[-1]) if self.evaluations else {}
        scores = ("test_loss", "test_accuracy", "ema_test_loss", "ema_test_accuracy")
        return Summary(
            run=self.name,
            label=self.label,
            impl=self.impl,
            steps=len(self.losses),
            train_loss=self.train_loss,
            step_seconds=statistics.median(self.seconds) if self.seconds else None,
            kept_bytes=self.kept_bytes,
            **{score: last.get(score) for score in scores},
        )

    def state_dict(self) -> dict[str, Any]:
        """All that training resumes from bit for bit, in types that ``torch.load(weights_only=True)`` reads.

        Every process must call it: each adds the states of its generators.
        """
        ema = self.ema
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if ema is None else {"steps": int(ema.n_averaged), "model": ema.module.state_dict()},
            "rng": self.processes.gather(self.rng),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "seconds": torch.tensor(self.seconds, dtype=torch.float64),
            "evaluations": [asdict(evaluation) for evaluation in self.evaluations],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned, with as many processes."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"]["model"])
            self.ema.n_averaged.fill_(state["ema"]["steps"])
        self.rng = state["rng"][self.processes.rank]
        self.losses = state["losses"].tolist()
        self.seconds = state["seconds"].tolist()
        self.evaluations = [EpochEvent(**evaluation) for evaluation in state["evaluations"]]
