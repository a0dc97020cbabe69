"""What a training run tells while it trains, and its results."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

SCORES = ("test_loss", "test_accuracy", "ema_test_loss", "ema_test_accuracy")


@dataclass(frozen=True)
class CheckEvent:
    """One step of the check in float64: both training losses."""

    step: int
    reference: float
    fastdense: float
    event: ClassVar[str] = "check"


@dataclass(frozen=True)
class StepEvent:
    """One step of one run."""

    run: str
    step: int
    epoch: int
    loss: float  # mean over the batch, before the step
    seconds: float  # forward, backward and optimizer, until the device has finished
    images_per_second: float  # of all processes together
    lr: float
    grad_norm: float  # 2-norm of all gradients together
    skipped: bool  # whether the gradients overflowed float16, so that the weights stayed as they were
    event: ClassVar[str] = "step"


@dataclass(frozen=True)
class EpochEvent:
    """One run after an epoch, or after the last step; losses and accuracies (in [0, 1]) are over all test images."""

    run: str
    epoch: int
    step: int
    train_loss: float  # mean over the epoch's steps
    test_loss: float
    test_accuracy: float
    ema_test_loss: float | None = None  # with averaged weights; None without --ema
    ema_test_accuracy: float | None = None
    peak_bytes: int | None = None  # most bytes that PyTorch has had allocated on the GPU; None elsewhere
    event: ClassVar[str] = "epoch"


@dataclass(frozen=True)
class FlowEvent:
    """The gradient flow of one run after a step, see :func:`fastdense.gradient_flow`; norms of six digits."""

    run: str
    step: int
    epoch: int
    total: dict[str, list[float]]  # by block, ||dLoss/dH_i|| for i = 0 .. L
    contributions: dict[str, list[list[float]]]  # by block, row i, column j: what layer j sends back to H_i
    event: ClassVar[str] = "flow"


@dataclass(frozen=True)
class Summary:
    """The results of a run; ``None`` where it ended earlier."""

    run: str
    label: str
    impl: str
    steps: int
    train_loss: float | None  # mean over the steps of the last epoch
    step_seconds: float | None  # median
    kept_bytes: int  # saved for backward in a step
    test_loss: float | None = None
    test_accuracy: float | None = None  # in [0, 1]
    ema_test_loss: float | None = None
    ema_test_accuracy: float | None = None
    event: ClassVar[str] = "summary"


@dataclass(frozen=True)
class Comparison:
    """fastdense against the reference block; in float32 the losses drift apart, as with any two ways of rounding."""

    steps: int  # that both runs have made
    difference: float  # largest of their training losses
    check_steps: int  # made in float64 as well; 0 without that check
    check_difference: float | None  # largest of the training losses there
    same_curve: bool | None  # whether those losses are equal to 1e-9 of themselves
    check_skipped: str | None  # why there was no check
    kept_ratio: float  # the reference's bytes saved for backward over fastdense's
    time_ratio: float  # fastdense's median step time over the reference's
    event: ClassVar[str] = "comparison"

    def __str__(self) -> str:
        over_all = f"over all {self.steps} steps in float32"
        if self.check_difference is None:
            verdict, where = f"loss curves not compared in float64, because {self.check_skipped}", over_all
        else:
            verdict = "same loss curve" if self.same_curve else "DIFFERENT loss curves"
            first = f"over the first {self.check_steps} steps in float64: {self.check_difference:.1e}"
            where = f"{first}; {over_all}, where rounding errors grow"
        curve = f"{verdict} (largest difference of the training loss {where}: {self.difference:.1e})"
        ratio, word = (self.kept_ratio, "fewer") if self.kept_ratio >= 1 else (1 / self.kept_ratio, "MORE")
        return f"{curve}, {ratio:.1f} times {word} bytes saved for backward, step time {self.time_ratio:.2f} times"


@dataclass(frozen=True)
class Note:
    """Anything else that is recorded: ``event`` is header, error or unreadable."""

    event: str
    fields: dict[str, Any]


Event = CheckEvent | StepEvent | EpochEvent | FlowEvent  # while training
Record = Event | Summary | Comparison | Note


def record(event: Record) -> dict[str, Any]:
    """Returns ``event`` as a line of measurements."""
    return {"event": event.event, **(event.fields if isinstance(event, Note) else asdict(event))}


class Stopped(RuntimeError):
    """Training ended early; the message says why, and what to do."""


class NonFiniteLoss(Stopped):
    """A loss or a gradient became infinite or NaN; ``run``, ``epoch`` and ``step`` say where.

    Weights, running statistics, optimizer and random generators of that run are still those of the step before.
    """

    def __init__(self, run: str, epoch: int, step: int, what: str, values: str, advice: str) -> None:
        super().__init__(f"the {what} at epoch {epoch}, step {step} ({values}): {advice}")
        self.run, self.epoch, self.step = run, epoch, step
