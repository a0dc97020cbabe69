"""Training a DenseNet, alone or beside its reference twin: what ``fastdense train`` runs, without any display.

An :class:`Experiment` holds one or two :class:`~.run.Run` objects and hands out events after every step and epoch.
Between two rounds of them ``state_dict`` stores it, to be resumed bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..analysis.gradient_flow import first_not_finite, gradient_flow
from ..data.source import Source, batches
from .config import TrainConfig
from .distributed import Processes
from .events import SCORES, CheckEvent, Comparison, EpochEvent, Event, FlowEvent, NonFiniteLoss
from .run import Run, autocast, saved_for_backward

EVALUATION_BATCH = 256  # images, of each process
SAME_CURVE = 1e-9  # relative, in float64, whose rounding errors are of the order of 1e-16
FLOW_IMAGES = 32  # at most, of a step's batch: float64 takes twice the memory, and a GPU many times the time


class Experiment:
    """One network, or with ``config.compare`` two that start from the same weights and see the same batches.

    The images' size comes from ``data``. Raises ``ValueError`` if the device is not there, ``impl`` cannot run on it,
    or a batch is too large or cannot be shared by the ``processes``.
    """

    def __init__(self, config: TrainConfig, data: Source, processes: Processes | None = None) -> None:
        self.processes = processes or Processes()
        self.config = config = dataclasses.replace(config, image_size=data.image_size)
        self.device = config.resolve_device(self.processes.local)
        size, count = config.batch_size, self.processes.count
        if size > data.train_count:
            raise ValueError(f"--batch-size must be at most {data.train_count}, the training images, got {size}")
        if size % count:
            near = max(size // count, 1) * count
            raise ValueError(f"--batch-size must be divisible by the {count} processes, as {near} is; got {size}")
        if not config.sync_bn:
            config.check_batch(size // count)
        self.data = data.to(self.device)
        self.step = 0  # made so far
        self.steps_per_epoch = data.train_count // config.batch_size
        self.steps = min(config.epochs * self.steps_per_epoch, config.steps or sys.maxsize)
        self.runs = self._runs(torch.float32)
        self.parameters = sum(parameter.numel() for parameter in self.runs[0].model.parameters())
        first = self.processes.share(torch.arange(config.batch_size))
        images, labels = next(iter(self.data.train([first], epoch=1)))
        for run in self.runs:
            run.kept_bytes = saved_for_backward(run.model, images, labels, run.amp)
        self.checked: list[CheckEvent] = []
        reasons = {
            "the two draw different dropout masks by construction": config.drop_rate > 0,
            "mps has no float64": self.device.type == "mps",
            "--check-steps is 0": not (config.compare and config.check_steps),
        }
        self.check_skipped = next((reason for reason, applies in reasons.items() if applies), None)
        self.check_steps = 0 if self.check_skipped else min(config.check_steps, self.steps)

    @property
    def epoch(self) -> int:
        """The epoch of the newest step, from 1; 0 before the first."""
        return -(-self.step // self.steps_per_epoch)

    @property
    def epochs(self) -> int:
        """How many there will be; the last may be cut short."""
        return -(-self.steps // self.steps_per_epoch)

    @property
    def over(self) -> bool:
        return self.step == self.steps and self.evaluated

    @property
    def evaluated(self) -> bool:
        """Whether no evaluation is due at the newest step."""
        due = self.step > 0 and (self.step % self.steps_per_epoch == 0 or self.step == self.steps)
        return not due or all(run.evaluations and run.evaluations[-1].step == self.step for run in self.runs)

    def _runs(self, dtype: torch.dtype) -> list[Run]:
        config, impl = self.config, self.config.resolve_impl(self.device)
        impls = {"reference": "reference"} if config.compare else {}
        impls["reference" if impl == "reference" else "fastdense"] = impl
        if "reference" in impls and config.sync_bn and self.processes.count > 1 and self.device.type == "cpu":
            theirs = "--sync-bn in the reference block is PyTorch's SyncBatchNorm"
            raise ValueError(f"{theirs}, which needs a GPU: leave it out")
        where = self.steps, self.device, dtype
        runs = [Run(name, impls[name], config, self.data, self.processes, *where) for name in impls]
        runs[-1].model.load_state_dict(runs[0].model.state_dict())
        return runs

    def _epochs(self, start: int, end: int) -> Iterator[tuple[int, Iterator[Tensor]]]:
        """Each epoch and this process's image numbers of its steps, from the one after ``start`` to ``end``."""
        order = torch.Generator().manual_seed(self.config.seed)
        for epoch in range(1, self.epochs + 1):
            before = (epoch - 1) * self.steps_per_epoch
            numbers = list(batches(self.data.train_count, self.config.batch_size, order))  # also of epochs long over
            left = numbers[max(start - before, 0) : max(end - before, 0)]
            if left:
                yield epoch, map(self.processes.share, left)

    def rounds(self) -> Iterator[list[Event]]:
        """Trains from the current step on, and yields what happened in each step and in each evaluation.

        With ``compare``, the first steps are made in float64 beforehand, where a difference is a defect, not rounding.
        Raises ``NonFiniteLoss`` if a loss or a gradient is infinite or NaN, or too large for float16 with any scale.
        """
        if self.step == 0:
            yield from self._check()
        if not self.evaluated:  # stored between the step and its evaluation
            yield self._evaluate()
        for epoch, numbers in self._epochs(self.step, self.steps):
            for images, labels in self.data.train(numbers, epoch=epoch):
                self.step += 1
                yield self._step(images, labels)
                if not self.evaluated:
                    yield self._evaluate()

    def _check(self) -> Iterator[list[Event]]:
        if self.check_steps == 0:
            return
        self.checked, runs = [], self._runs(torch.float64)
        for epoch, numbers in self._epochs(0, self.check_steps):
            for images, labels in self.data.train(numbers, epoch=epoch):
                for run in runs:
                    run.step(images.double(), labels)
                step, losses = len(self.checked) + 1, [run.losses[-1] for run in runs]
                self._require_finite("training loss (in float64)", losses, step, epoch)
                self.checked.append(CheckEvent(step, *losses))
                yield [self.checked[-1]]

    def _step(self, images: Tensor, labels: Tensor) -> list[Event]:
        step, epoch = self.step, self.epoch
        for run in self.runs if step % 2 else reversed(self.runs):  # a machine that slows down favours neither
            run.step(images, labels)
        for run in self.runs:
            if not run.finite:
                self._stop(run, diagnose(run, images, labels))
        events: list[Event] = [run.last for run in self.runs]
        if self.config.watch_flow is not None and step % self.config.watch_flow == 0:
            events += [flow(run, images, labels, step=step, epoch=epoch) for run in self.runs]
        return events

    def _stop(self, bad: Run, diagnosis: str) -> None:
        because = f". {diagnosis}" if diagnosis else ""
        self._require_finite("training loss", [run.losses[-1] for run in self.runs], self.step, self.epoch, because)
        what, advice = f"gradient of run {bad.name} is not finite", self._smaller_lr
        if bad.last.skipped:
            what, advice = f"gradient of run {bad.name} overflows float16 with any scale", "try --amp bf16 or off"
        raise NonFiniteLoss(bad.name, self.epoch, self.step, what, f"loss {bad.last.loss:g}", advice + because)

    def _require_finite(self, what: str, values: Sequence[float], step: int, epoch: int, because: str = "") -> None:
        by_run = {run.name: value for run, value in zip(self.runs, values, strict=True)}
        for bad, value in by_run.items():
            if not math.isfinite(value):
                both = ", ".join(f"{name} {value:g}" for name, value in by_run.items())
                what = f"{what} of run {bad} is not finite"
                raise NonFiniteLoss(bad, epoch, step, what, both, self._smaller_lr + because)

    @property
    def _smaller_lr(self) -> str:
        return f"try a smaller --lr than {self.config.lr:g}"

    def _evaluate(self) -> list[Event]:
        share = self.processes.share(torch.arange(self.data.test_count))
        results = [run.evaluate(self.data.test(share, EVALUATION_BATCH)) for run in self.runs]
        for losses in zip(*(result[::2] for result in results), strict=True):
            self._require_finite("test loss", losses, self.step, self.epoch)
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        for run, result in zip(self.runs, results, strict=True):
            assert run.train_loss is not None
            scores: dict[str, Any] = {"peak_bytes": peak, **dict(zip(SCORES, result, strict=False))}
            run.evaluations.append(EpochEvent(run.name, self.epoch, self.step, run.train_loss, **scores))
        return [run.evaluations[-1] for run in self.runs]

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of training between two rounds; every process must call it."""
        checked, runs = map(dataclasses.asdict, self.checked), {run.name: run.state_dict() for run in self.runs}
        return {"step": self.step, "epoch": self.epoch, "checked": list(checked), "runs": runs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from there, in an experiment of the same configuration that has not begun."""
        self.step = state["step"]
        self.checked = [CheckEvent(**check) for check in state["checked"]]
        for run in self.runs:
            run.load_state_dict(state["runs"][run.name])

    def comparison(self) -> Comparison | None:
        """Compares the two runs; ``None`` without ``compare`` or before the first step."""
        if len(self.runs) < 2 or not all(run.losses for run in self.runs):
            return None
        (reference, chosen), checked = self.runs, self.checked
        differences = [abs(a - b) for a, b in zip(reference.losses, chosen.losses, strict=False)]
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


def flow(run: Run, images: Tensor, labels: Tensor, *, step: int, epoch: int) -> FlowEvent:
    """Measures the gradient flow of ``run`` as it is now, on the first of ``images``; never changes the run."""
    blocks = gradient_flow(run.model, images[:FLOW_IMAGES], labels[:FLOW_IMAGES])

    def six_digits(numbers: Any) -> Any:
        return [six_digits(x) if isinstance(x, list) else float(f"{x:.6g}") for x in numbers]

    total = {block.name: six_digits(block.total.tolist()) for block in blocks}
    contributions = {block.name: six_digits(block.contributions.tolist()) for block in blocks}
    return FlowEvent(run.name, step, epoch, total, contributions)


def diagnose(run: Run, images: Tensor, labels: Tensor) -> str:
    """Returns a sentence on which layer's values or gradient went first on this batch; never changes the run.

    It repeats the step on a copy, in its arithmetic. Empty where that is finite or cannot be done.
    """

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return run.scaler.get_scale() * F.cross_entropy(output, target)

    # It explains another error, and must not hide that one: out of memory, say.
    with suppress(Exception), autocast(images.device, run.amp), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return first_not_finite(run.model, images, labels, loss_fn) or ""
    return ""
