"""One network in training: its recipe, a step, an evaluation, and what a checkpoint holds of it.

The recipe is the DenseNet paper's (Huang et al., arXiv 1608.06993, section 4.2) with ``schedule="step"``; the default
is half a cosine after a short linear warm-up (Loshchilov and Hutter, arXiv 1608.03983, without restarts).
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .. import memory
from ..data.source import Source
from ..nn import DenseBlock
from .config import AMP, TrainConfig
from .distributed import Processes
from .events import SCORES, EpochEvent, StepEvent, Summary

WARM_UP_START = 0.1  # of the learning rate
STATEFUL = ("model", "optimizer", "scheduler", "scaler")  # parts of a run that a checkpoint holds under their names
LEAST_SCALE = 1.0  # of the loss in float16: below, gradients overflow though nothing enlarges them


def _rng_states(device: torch.device) -> list[Tensor]:
    """States of the generators that a step on ``device`` draws from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def lr_scheduler(optimizer: torch.optim.Optimizer, steps: int, config: TrainConfig | None = None) -> LRScheduler:
    """Returns a linear warm-up from a tenth, then half a cosine down to zero, or one fall at each milestone."""
    config = config or TrainConfig()
    warm_up = math.ceil(config.warm_up_fraction * steps) if steps > 1 else 0
    rest: LRScheduler
    if config.schedule == "step":
        falls = [round(fraction * steps) - warm_up for fraction in config.milestones]
        rest = MultiStepLR(optimizer, milestones=falls, gamma=config.gamma)
    else:
        rest = CosineAnnealingLR(optimizer, T_max=steps - warm_up)
    if warm_up == 0:
        return rest
    linear = LinearLR(optimizer, start_factor=WARM_UP_START, total_iters=warm_up)
    return SequentialLR(optimizer, [linear, rest], milestones=[warm_up])


def saved_for_backward(model: nn.Module, images: Tensor, labels: Tensor, amp: torch.dtype | None = None) -> int:
    """Measures the bytes that one forward of a copy saves for backward, parameters and buffers left out."""
    probe = copy.deepcopy(model).train()
    forked = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices=forked), memory.saved_bytes(probe) as saved, autocast(images.device, amp):
        F.cross_entropy(probe(images), labels)
    for block, probed in zip(model.modules(), probe.modules(), strict=True):
        if isinstance(block, DenseBlock) and isinstance(probed, DenseBlock):
            block.resolved_recompute = probed.resolved_recompute
    return saved.bytes


def autocast(device: torch.device, amp: torch.dtype | None) -> torch.autocast:
    """Computes in ``amp`` where PyTorch finds it safe; ``None`` leaves everything as it is."""
    return torch.autocast(device.type, dtype=amp, enabled=amp is not None)


def _copy(tensors: list[Tensor], to: list[Tensor]) -> None:
    """Copies hundreds of small tensors, in one operation for each dtype."""
    for dtype in {tensor.dtype for tensor in tensors}:
        source, target = ([tensor for tensor in group if tensor.dtype == dtype] for group in (tensors, to))
        torch._foreach_copy_(target, source)


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class Run:
    """One network in training, and its history; built from the seed alone, and without autocast in float64."""

    last: StepEvent  # the newest
    finite: bool  # whether it could be made, or its like may succeed with a smaller scale of the loss

    def __init__(
        self,
        name: str,
        impl: str,
        config: TrainConfig,
        data: Source,
        processes: Processes,
        steps: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.name, self.impl, self.processes = name, impl, processes  # name: reference or fastdense
        self.label = "reference (torch.cat)" if name == "reference" else name
        amp = "off" if dtype is torch.float64 else config.amp
        self.amp, self.scaler = AMP[amp], torch.amp.GradScaler(device.type, enabled=amp == "fp16")
        torch.manual_seed(config.seed)
        blocks = {"drop_rate": config.drop_rate, "recompute": config.recompute, "impl": impl}
        model = config.architecture.build(channels=data.channels, classes=data.classes, **blocks)
        self.model = model.to(device, dtype)  # whose state_dict has the plain names
        if processes.rank > 0:  # other images, other dropout masks
            torch.manual_seed((config.seed + processes.rank) % 2**63)
        self.rng = _rng_states(device)  # of this run alone
        nesterov = config.nesterov and config.momentum > 0
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay, nesterov=nesterov
        )
        self.scheduler = lr_scheduler(self.optimizer, steps, config)
        self.ema: AveragedModel | None = None
        if config.ema is not None:
            # Running statistics are averaged like the weights: those of the newest weights would not fit the average.
            average = get_ema_multi_avg_fn(config.ema)
            self.ema = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
        self.network = processes.wrap(self.model, device, sync_bn=config.sync_bn)  # what is called in training
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.evaluations: list[EpochEvent] = []
        self.kept_bytes = 0  # saved for backward in a step
        self.steps_per_epoch = data.train_count // config.batch_size

    @property
    def recompute_modes(self) -> dict[str, str]:
        """What ``recompute="auto"`` resolved to, by block; empty where it was not asked for."""
        return {
            name.removeprefix("features."): block.resolved_recompute
            for name, block in self.model.named_modules()
            if isinstance(block, DenseBlock) and block.recompute == "auto" and block.resolved_recompute is not None
        }

    @property
    def train_loss(self) -> float | None:
        in_epoch = (len(self.losses) - 1) % self.steps_per_epoch + 1
        return statistics.fmean(self.losses[-in_epoch:]) if self.losses else None

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Makes one optimizer step; sets ``last`` and ``finite``, and appends to ``losses`` and ``seconds``.

        A loss or a gradient that is not finite changes nothing else. Where float16 overflows in the gradients alone,
        the scale falls and the step is skipped, as far as weights, schedule and average are concerned.
        """
        device = images.device
        torch.set_rng_state(self.rng[0])
        for state in self.rng[1:]:
            torch.cuda.set_rng_state(state, device)
        self.model.train()
        _finish(device)
        start = time.perf_counter()
        buffers = list(self.model.buffers())
        before = [torch.empty_like(buffer) for buffer in buffers]
        _copy(buffers, before)
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(device, self.amp):
            loss = F.cross_entropy(self.network(images), labels)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        # The mean loss of all ranks and the norm of the gradients, which DDP has averaged, in one transfer.
        mean = self.processes.sum(loss.detach().clone()) / self.processes.count
        length = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        value, norm = torch.stack([mean, length.to(mean.dtype)]).tolist()
        finite = math.isfinite(value) and math.isfinite(norm)
        overflow = math.isfinite(value) and not finite and self.scaler.is_enabled()
        lr = self.optimizer.param_groups[0]["lr"]
        if finite:
            self.scaler.step(self.optimizer)
            self.scheduler.step()
            if self.ema is not None:
                self.ema.update_parameters(self.model)
        if finite or overflow:
            self.scaler.update()
            self.rng = _rng_states(device)
        else:
            _copy(before, buffers)
        _finish(device)
        seconds = time.perf_counter() - start
        self.finite = finite or (overflow and self.scaler.get_scale() >= LEAST_SCALE)
        epoch, speed = len(self.losses) // self.steps_per_epoch + 1, len(labels) * self.processes.count / seconds
        self.losses.append(value)
        self.seconds.append(seconds)
        self.last = StepEvent(self.name, len(self.losses), epoch, value, seconds, speed, lr, norm, overflow)

    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, ...]:
        """Computes mean cross-entropy and accuracy over the ``batches`` of all processes, then those of the average."""
        models = [self.model] if self.ema is None else [self.model, self.ema.module]
        for model in models:
            self.processes.broadcast_buffers(model)
            model.eval()
        totals = torch.zeros(len(models), 3, dtype=torch.float64)  # of each: loss, right answers, images
        with torch.inference_mode():
            for images, labels in batches:
                for total, model in zip(totals, models, strict=True):
                    with autocast(images.device, self.amp):
                        scores = model(images)
                    loss = F.cross_entropy(scores.float(), labels, reduction="sum")
                    right = (scores.argmax(1) == labels).sum()
                    total += torch.tensor([loss.item(), right.item(), len(labels)])
        self.processes.sum(totals)
        return tuple((totals[:, :2] / totals[:, 2:]).flatten().tolist())

    def summary(self) -> Summary:
        scores = {score: getattr(self.evaluations[-1], score) for score in SCORES} if self.evaluations else {}
        seconds = statistics.median(self.seconds) if self.seconds else None
        steps = len(self.losses)
        return Summary(self.name, self.label, self.impl, steps, self.train_loss, seconds, self.kept_bytes, **scores)

    def state_dict(self) -> dict[str, Any]:
        """Returns all that training is resumed from; every process must call it."""
        ema = self.ema
        return {
            **{part: getattr(self, part).state_dict() for part in STATEFUL},
            "ema": None if ema is None else {"steps": int(ema.n_averaged), "model": ema.module.state_dict()},
            "rng": self.processes.gather(self.rng),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "seconds": torch.tensor(self.seconds, dtype=torch.float64),
            "evaluations": [asdict(evaluation) for evaluation in self.evaluations],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned, with as many processes."""
        for part in STATEFUL:
            getattr(self, part).load_state_dict(state[part])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"]["model"])
            self.ema.n_averaged.fill_(state["ema"]["steps"])
        self.rng = state["rng"][self.processes.rank]
        self.losses, self.seconds = state["losses"].tolist(), state["seconds"].tolist()
        self.evaluations = [EpochEvent(**evaluation) for evaluation in state["evaluations"]]
