"""Training a DenseNet, alone or beside its textbook twin: what ``fastdense train`` runs, without any display.

An :class:`Experiment` holds one or two :class:`Run` objects and hands out an event after every step and
epoch; who wants a progress bar, a file of measurements or nothing at all reads those events.

The recipe is the DenseNet paper's (Huang et al., arXiv 1608.06993, section 4.2): SGD with Nesterov momentum
0.9 and weight decay 1e-4. The learning rate follows a cosine after a short linear warm-up.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from . import memory
from .data import Dataset, batches
from .nn import DenseBlock
from .train_config import TrainConfig

__all__ = [
    "CheckEvent",
    "Comparison",
    "EpochEvent",
    "Event",
    "Experiment",
    "NonFiniteLoss",
    "Run",
    "StepEvent",
    "Summary",
    "TrainConfig",
    "kept_for_backward",
    "schedule",
]

WARM_UP = 0.05  # of all steps
WARM_UP_START = 0.1  # of the learning rate
EVALUATION_BATCH = 256
SAME_CURVE = 1e-9  # relative, in float64, whose rounding errors are of the order of 1e-16


@dataclass(frozen=True)
class CheckEvent:
    """One step of the check in float64: both training losses."""

    step: int
    reference: float
    fastdense: float
    event: ClassVar[str] = "check"


@dataclass(frozen=True)
class StepEvent:
    """One step of one run. ``seconds``: forward, backward and optimizer, until the device has finished."""

    run: str
    step: int
    epoch: int
    loss: float
    seconds: float
    images_per_second: float
    event: ClassVar[str] = "step"


@dataclass(frozen=True)
class EpochEvent:
    """One run after an epoch, or after the last step. ``train_loss`` is the mean over the epoch's steps."""

    run: str
    epoch: int
    step: int
    train_loss: float
    test_loss: float
    test_accuracy: float  # in [0, 1]
    event: ClassVar[str] = "epoch"


Event = CheckEvent | StepEvent | EpochEvent


@dataclass(frozen=True)
class Summary:
    """What a run came to. ``None`` stands for what it did not live to see."""

    run: str
    label: str
    impl: str
    steps: int
    train_loss: float | None  # mean over the steps of the last epoch
    test_loss: float | None
    test_accuracy: float | None  # in [0, 1]
    step_seconds: float | None  # median
    kept_bytes: int
    event: ClassVar[str] = "summary"


@dataclass(frozen=True)
class Comparison:
    """fastdense against the textbook block.

    Attributes:
        steps: steps that both runs have made.
        difference: largest difference of their training losses. In float32 the two drift apart, as any two
            ways of rounding do: a ReLU whose input is zero but for rounding opens in one of them only.
        check_steps: steps made in float64 as well; 0 where there was no such check.
        check_difference: largest difference of the training losses there.
        same_curve: whether those losses are equal to 1e-9 of themselves; ``None`` without the check.
        check_skipped: why there was none, otherwise ``None``.
        kept_ratio: textbook bytes kept for backward over fastdense's.
        time_ratio: fastdense's median step time over the textbook's.
    """

    steps: int
    difference: float
    check_steps: int
    check_difference: float | None
    same_curve: bool | None
    check_skipped: str | None
    kept_ratio: float
    time_ratio: float
    event: ClassVar[str] = "comparison"

    def __str__(self) -> str:
        over_all = f"over all {self.steps} steps in float32"
        if self.check_difference is None:
            curve = (
                f"loss curves not compared in float64, because {self.check_skipped} (largest difference of "
                f"the training loss {over_all}: {self.difference:.1e})"
            )
        else:
            verdict = "same loss curve" if self.same_curve else "DIFFERENT loss curves"
            curve = (
                f"{verdict} (largest difference of the training loss over the first {self.check_steps} steps "
                f"in float64: {self.check_difference:.1e}; {over_all}, where rounding errors grow: "
                f"{self.difference:.1e})"
            )
        fewer = f"{self.kept_ratio:.1f} times fewer bytes kept for backward"
        if self.kept_ratio < 1:
            fewer = f"{1 / self.kept_ratio:.1f} times MORE bytes kept for backward"
        return f"{curve}, {fewer}, step time {self.time_ratio:.2f} times"


class NonFiniteLoss(RuntimeError):
    """A loss became infinite or NaN; ``run``, ``epoch`` and ``step`` say where."""

    def __init__(self, run: str, epoch: int, step: int, message: str) -> None:
        super().__init__(message)
        self.run, self.epoch, self.step = run, epoch, step


def _rng_states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_rng_states(states: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)


def kept_for_backward(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Bytes that one training forward keeps for backward, parameters and buffers left out.

    It runs on a copy of the model and forks the generators, so that looking does not change the training.
    """
    probe = copy.deepcopy(model).train()
    forked = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices=forked), memory.saved_bytes(probe) as kept:
        loss = F.cross_entropy(probe(images), labels)
    del loss
    for block, probed in zip(model.modules(), probe.modules(), strict=True):
        if isinstance(block, DenseBlock) and isinstance(probed, DenseBlock):
            block.picked = probed.picked
    return kept.bytes


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """A linear warm-up over the first 5 % of the steps, then half a cosine down to zero."""
    warm_up = math.ceil(WARM_UP * steps) if steps > 1 else 0
    cosine = CosineAnnealingLR(optimizer, T_max=steps - warm_up)
    if warm_up == 0:
        return cosine
    linear = LinearLR(optimizer, start_factor=WARM_UP_START, total_iters=warm_up)
    return SequentialLR(optimizer, [linear, cosine], milestones=[warm_up])


@dataclass
class Run:
    """One network in training, and its history.

    Attributes:
        name: ``"reference"`` or ``"fastdense"``, as in the file of measurements.
        rng: states of the random generators that belong to this run.
        epoch_start: number of steps before the current epoch.
    """

    name: str
    impl: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    rng: list[Tensor]
    kept_bytes: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    evaluations: list[EpochEvent] = field(default_factory=list)
    epoch_start: int = 0

    @property
    def label(self) -> str:
        return "textbook torch.cat" if self.name == "reference" else "fastdense"

    @property
    def picked(self) -> dict[str, str]:
        """What ``recompute="auto"`` came to, by block; empty where it was not asked for."""
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
        """One optimizer step; appends to ``losses`` and ``seconds``."""
        device = images.device
        _set_rng_states(self.rng, device)
        self.model.train()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        value = loss.item()  # queued behind the optimizer's work, so it waits for that too
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(value)
        self.scheduler.step()
        self.rng = _rng_states(device)

    def evaluate(self, images: Tensor, labels: Tensor) -> tuple[float, float]:
        """Mean cross-entropy and accuracy, in evaluation mode."""
        self.model.eval()
        with torch.inference_mode():
            logits = torch.cat([self.model(part) for part in images.split(EVALUATION_BATCH)])
            loss = F.cross_entropy(logits, labels).item()
            return loss, (logits.argmax(1) == labels).double().mean().item()

    def summary(self) -> Summary:
        last = self.evaluations[-1] if self.evaluations else None
        return Summary(
            run=self.name,
            label=self.label,
            impl=self.impl,
            steps=len(self.losses),
            train_loss=self.train_loss,
            test_loss=last.test_loss if last else None,
            test_accuracy=last.test_accuracy if last else None,
            step_seconds=statistics.median(self.seconds) if self.seconds else None,
            kept_bytes=self.kept_bytes,
        )


class Experiment:
    """One network, or with ``config.compare`` two that start from the same weights and see the same batches.

    Args:
        config: what to train.
        data: what to train on.

    Raises:
        ValueError: the device is not there, ``impl`` cannot run on it, or a batch exceeds the training set.
    """

    def __init__(self, config: TrainConfig, data: Dataset) -> None:
        self.config = config
        self.device = config.resolve_device()
        self.data = data.to(self.device)
        images = len(data.train_labels)
        if config.batch_size > images:
            raise ValueError(f"--batch-size must be at most {images}, the training images, got {config.batch_size}")
        self.steps_per_epoch = images // config.batch_size
        self.steps = config.epochs * self.steps_per_epoch
        if config.steps is not None:
            self.steps = min(self.steps, config.steps)
        self.runs = self._runs(torch.float32)
        first = slice(config.batch_size)
        for run in self.runs:
            run.kept_bytes = kept_for_backward(run.model, self.data.train_images[first], self.data.train_labels[first])
        self.checked: list[CheckEvent] = []
        self.check_steps = min(config.check_steps, self.steps) if config.compare else 0
        self.check_skipped: str | None = None
        if config.drop_rate > 0:
            self.check_steps, self.check_skipped = 0, "the two draw different dropout masks by construction"
        elif self.device.type == "mps":
            self.check_steps, self.check_skipped = 0, "mps has no float64"
        elif self.check_steps == 0:
            self.check_skipped = "--check-steps is 0"

    def _runs(self, dtype: torch.dtype) -> list[Run]:
        impl = self.config.resolve_impl(self.device)
        chosen = self._run("reference" if impl == "reference" else "fastdense", impl, dtype)
        if not self.config.compare:
            return [chosen]
        reference = self._run("reference", "reference", dtype)
        chosen.model.load_state_dict(reference.model.state_dict())
        return [reference, chosen]

    def _run(self, name: str, impl: str, dtype: torch.dtype) -> Run:
        """Build everything from the seed, so that a run does not depend on whether another runs beside it."""
        config = self.config
        torch.manual_seed(config.seed)
        model = config.architecture.build(
            channels=self.data.channels,
            classes=self.data.classes,
            drop_rate=config.drop_rate,
            recompute=config.recompute,
            impl=impl,
        ).to(self.device, dtype)
        optimizer = torch.optim.SGD(
            model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.momentum > 0,
        )
        return Run(name, impl, model, optimizer, schedule(optimizer, self.steps), _rng_states(self.device))

    def _batches(self, steps: int) -> Iterator[tuple[int, int, Tensor]]:
        """``(step, epoch, image numbers)`` of the first ``steps`` steps, both counted from 1."""
        order = torch.Generator().manual_seed(self.config.seed)
        step = 0
        while step < steps:
            epoch = step // self.steps_per_epoch + 1
            for batch in batches(len(self.data.train_labels), self.config.batch_size, order):
                if step < steps:
                    step += 1
                    yield step, epoch, batch.to(self.device)

    def events(self) -> Iterator[Event]:
        """Train, handing out what happens.

        With ``compare``, the first steps are made in float64 beforehand, where a difference is no rounding
        but a defect. Then each run makes a step before any makes the next, in alternating order, so that a
        machine whose speed changes meanwhile favours neither.

        Raises:
            NonFiniteLoss: a training or test loss is infinite or NaN.
        """
        yield from self._check()
        for step, epoch, batch in self._batches(self.steps):
            if step % self.steps_per_epoch == 1 % self.steps_per_epoch:
                for run in self.runs:
                    run.epoch_start = step - 1
            yield from self._step(step, epoch, batch)
            if step % self.steps_per_epoch == 0 or step == self.steps:
                yield from self._evaluate(step, epoch)

    def _check(self) -> Iterator[CheckEvent]:
        if self.check_steps == 0:
            return
        runs = self._runs(torch.float64)
        for step, epoch, batch in self._batches(self.check_steps):
            images, labels = self.data.train_images[batch].double(), self.data.train_labels[batch]
            for run in runs:
                run.step(images, labels)
            losses = [run.losses[-1] for run in runs]
            self._require_finite("training loss (in float64)", losses, step, epoch)
            self.checked.append(CheckEvent(step, reference=losses[0], fastdense=losses[1]))
            yield self.checked[-1]

    def _step(self, step: int, epoch: int, batch: Tensor) -> Iterator[StepEvent]:
        images, labels = self.data.train_images[batch], self.data.train_labels[batch]
        for run in self.runs if step % 2 else reversed(self.runs):
            run.step(images, labels)
        self._require_finite("training loss", [run.losses[-1] for run in self.runs], step, epoch)
        for run in self.runs:
            seconds = run.seconds[-1]
            yield StepEvent(run.name, step, epoch, run.losses[-1], seconds, len(labels) / seconds)

    def _evaluate(self, step: int, epoch: int) -> Iterator[EpochEvent]:
        results = [run.evaluate(self.data.test_images, self.data.test_labels) for run in self.runs]
        self._require_finite("test loss", [loss for loss, _ in results], step, epoch)
        for run, (loss, accuracy) in zip(self.runs, results, strict=True):
            assert run.train_loss is not None
            run.evaluations.append(EpochEvent(run.name, epoch, step, run.train_loss, loss, accuracy))
            yield run.evaluations[-1]

    def _require_finite(self, what: str, values: Sequence[float], step: int, epoch: int) -> None:
        for bad, value in zip(self.runs, values, strict=True):
            if not math.isfinite(value):
                both = ", ".join(f"{run.name} {v:g}" for run, v in zip(self.runs, values, strict=True))
                where = f"the {what} of run {bad.name} is not finite at epoch {epoch}, step {step} ({both})"
                remedy = f"try a smaller --lr than {self.config.lr:g}"
                raise NonFiniteLoss(bad.name, epoch, step, f"{where}: {remedy}")

    def comparison(self) -> Comparison | None:
        """The two runs beside each other; ``None`` without ``compare`` or before the first step."""
        if len(self.runs) < 2 or not all(run.losses for run in self.runs):
            return None
        reference, chosen = self.runs
        differences = [abs(a - b) for a, b in zip(reference.losses, chosen.losses, strict=False)]
        checked = self.checked
        close = [math.isclose(c.reference, c.fastdense, rel_tol=SAME_CURVE, abs_tol=SAME_CURVE) for c in checked]
        return Comparison(
            steps=len(differences),
            # A NaN compares as neither larger nor smaller, and must not go under.
            difference=max(differences, key=lambda difference: (math.isnan(difference), difference)),
            check_steps=len(checked),
            check_difference=max((abs(c.reference - c.fastdense) for c in checked), default=None),
            same_curve=all(close) if close else None,
            check_skipped=self.check_skipped,
            kept_ratio=reference.kept_bytes / chosen.kept_bytes,
            time_ratio=statistics.median(chosen.seconds) / statistics.median(reference.seconds),
        )
