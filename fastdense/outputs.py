"""The folder of a run that goes on for long: checkpoints and logs, and what happens when they cannot be written.

``last.pt`` is the newest checkpoint, ``best.pt`` the one with the best test accuracy; ``step-N.pt`` are the newest few
(``--keep``). ``metrics.jsonl`` and TensorBoard's files hold what was measured, ``flow-RUN-N.png`` are pictures of the
gradient flow (``--watch-flow``).
"""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from . import checkpoint
from .events import Event, FlowEvent
from .logs import JsonLines, TensorBoard
from .train import Experiment
from .watch import flows

__all__ = ["LAST", "OutputError", "OutputOptions", "Outputs", "prepare"]

LAST, BEST, METRICS = "last.pt", "best.pt", "metrics.jsonl"
BEFORE = "metrics.before.jsonl"
FIRST_RECORD = b'{"event": "header"'  # by which a log is known to be ours
FIRST_TENSORBOARD = "events.out.tfevents." + 10 * "[0-9]" + ".0"  # the files of runs that began in their folder
EVERY = re.compile(r"([1-9]\d*) ?(epochs?|steps?)?")


class OutputError(RuntimeError):
    """A file that training leaves behind cannot be written."""


@dataclass(frozen=True)
class OutputOptions:
    """What is written besides what is printed.

    Attributes:
        out: the folder; ``None`` for nothing.
        save_every: how often ``last.pt`` is written: ``"2"`` or ``"2epochs"``, or ``"500steps"``.
        keep: how many of the newest checkpoints are there as ``step-N.pt``, too.
        tensorboard: whether TensorBoard's files are written.

    Raises:
        ValueError: a value is not allowed.
    """

    out: Path | None = None
    save_every: str = "1epoch"
    keep: int = 0
    tensorboard: bool = True

    def __post_init__(self) -> None:
        if EVERY.fullmatch(self.save_every) is None:
            raise ValueError(
                f"--save-every must be a number of epochs or steps, as in 2epochs or 500steps, got {self.save_every!r}"
            )
        if self.keep < 0:
            raise ValueError(f"--keep must be at least 0, got {self.keep}")

    def steps(self, steps_per_epoch: int) -> int:
        """Steps from one checkpoint to the next."""
        found = EVERY.fullmatch(self.save_every)
        assert found is not None
        return int(found[1]) * (1 if (found[2] or "").startswith("step") else steps_per_epoch)


def prepare(out: Path, *, resume: bool, tensorboard: bool) -> None:
    """Make the folder ready for a run, or for going on with one.

    A run that never came to a checkpoint, as on a full disk, cannot be gone on with: a new one takes its place, and
    what it measured stays as ``metrics.before.jsonl``.

    Raises:
        ValueError: it cannot be written, or holds a run already.
        ModuleNotFoundError: tensorboardX is not installed.
    """
    if tensorboard:
        importlib.import_module("tensorboardX")  # before anything is written
    try:
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out {out} is a file, not a folder: name another one")
        held = [name for name in (LAST, BEST, METRICS) if (out / name).exists()]
        if held == [METRICS] and (out / METRICS).read_bytes()[: len(FIRST_RECORD)] in (b"", FIRST_RECORD):
            (out / METRICS).replace(out / BEFORE)
            for log in (*out.glob(FIRST_TENSORBOARD), *out.glob("flow-*.png")):  # whose numbers it has, too
                log.unlink()
            held = []
        if held and not resume:
            remedy = "go on with --resume, or name another folder" if LAST in held else "name another folder"
            raise ValueError(f"--out {out} already holds a run ({', '.join(held)}): {remedy}")
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.remove_leftovers(out)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error.strerror}. Name a folder that can") from error


class Outputs(AbstractContextManager["Outputs"]):
    """Checkpoints and logs of one experiment, in this process.

    Every process has one and calls the same methods; only the first one writes.

    Args:
        options: what to write.
        experiment: of what.
        warn: told what could not be written and was skipped.
        resumed: the checkpoint that the experiment goes on from.

    Raises:
        OutputError: a log cannot be opened, or the first checkpoint not be written.
    """

    def __init__(
        self,
        options: OutputOptions,
        experiment: Experiment,
        warn: Callable[[str], None],
        resumed: Mapping[str, Any] | None = None,
    ) -> None:
        self.options, self.experiment, self.warn = options, experiment, warn
        self.out = options.out
        self.writing = options.out is not None and experiment.processes.first
        self.metrics: JsonLines | None = None
        self.tensorboard: TensorBoard | None = None
        self.saved: tuple[int, bool] | None = None
        self.failed = False  # whether the newest checkpoint could not be written
        self.failing: set[str] = set()  # what could not be written when that was last tried
        self.stopped = False  # whether a log failed, or a checkpoint, that must not
        if resumed is not None:
            self.saved = (experiment.step, experiment.evaluated)
            if self.writing:  # a kill between last.pt and its other names
                self._attempt(LAST, self._link)
        else:
            self.save()  # a folder without a checkpoint could not be resumed, and a full disk shows at once
        if self.writing:
            length = 0 if resumed is None else resumed["metrics_bytes"]
            self._attempt(METRICS, partial(self._open_metrics, length), "Training goes on without it.")
            if options.tensorboard:
                self._attempt("TensorBoard's file", self._open_tensorboard, "Training goes on without it.")
            if experiment.config.watch_flow is not None:
                from . import inspect_plots  # noqa: F401  (matplotlib may be missing: now is better than at a picture)

    def _open_metrics(self, length: int) -> None:
        assert self.out is not None
        self.metrics = JsonLines(self.out / METRICS, length)

    def _open_tensorboard(self) -> None:
        assert self.out is not None
        self.tensorboard = TensorBoard(self.out, self.experiment.step)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for log in (self.metrics, self.tensorboard):
            if log is not None:
                log.file.close()

    def write(self, record: dict[str, Any]) -> None:
        """Append ``record`` to ``metrics.jsonl``."""
        if self.metrics is not None:
            self._log(METRICS, partial(self.metrics.write, record))

    def update(self, events: Sequence[Event]) -> None:
        """Log what happened in a round, and write a checkpoint if one is due."""
        for event in events:
            self.write({"event": event.event, **asdict(event)})
            if isinstance(event, FlowEvent) and self.writing:
                self._log("a picture of the gradient flow", partial(self._draw, event))
            if self.tensorboard is not None:
                self._log("TensorBoard's file", partial(self.tensorboard.update, event))
        experiment = self.experiment
        if experiment.step and experiment.evaluated and (self._due() or self._best()):
            self.save()

    def _draw(self, event: FlowEvent) -> None:
        from .inspect_plots import flow_picture  # matplotlib takes long to import

        assert self.out is not None
        path = self.out / f"flow-{event.run}-{event.step:08d}.png"
        config = self.experiment.config
        network = config.architecture.description + (", without dense connections" if config.plain else "")
        title = f"Gradient flow: {network}, after {event.step:,} steps"
        caption = f"Loss: cross-entropy, on images of the newest batch of {self.experiment.data.name}; float64."
        unfinished = path.with_suffix(".partial.png")
        try:
            flow_picture({event.run: flows(event)}, unfinished, title=title, caption=caption)
            unfinished.replace(path)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise

    def _due(self) -> bool:
        step, every = self.experiment.step, self.options.steps(self.experiment.steps_per_epoch)
        return step % every == 0 or step == self.experiment.steps

    def _best(self) -> bool:
        """Whether the newest step has the best test accuracy so far: the average's, where there is one."""
        run = self.experiment.runs[-1]
        if not run.evaluations or run.evaluations[-1].step != self.experiment.step:
            return False
        *earlier, newest = [
            event.test_accuracy if event.ema_test_accuracy is None else event.ema_test_accuracy
            for event in run.evaluations
        ]
        return newest > max(earlier, default=-1.0)

    def save(self, *, last: bool = False) -> None:
        """Write a checkpoint now, unless this very state has been written; every process must call it.

        Args:
            last: whether training ends here, so that no later save makes good for this one.

        Raises:
            OutputError: it cannot be written, and ``on_error`` is ``"stop"``.
        """
        state = (self.experiment.step, self.experiment.evaluated)
        if self.out is None or self.saved == state:
            return
        contents = checkpoint.contents(self.experiment)
        contents["output"] = {name: value for name, value in asdict(self.options).items() if name != "out"}
        self.saved = state  # or tried to: everybody must agree whether there is something to do
        if self.writing:
            later = "" if last or self.experiment.over else "Training goes on; the next save tries again."
            self.failed = not self._attempt(LAST, partial(self._save, contents), later)

    def _save(self, contents: dict[str, Any]) -> None:
        assert self.out is not None
        # The logs first, so that they reach at least as far as the checkpoint whatever happens in between.
        contents["metrics_bytes"] = self.metrics.file.sync() if self.metrics is not None else 0
        if self.tensorboard is not None:
            self.tensorboard.file.sync()
        checkpoint.save(contents, self.out / LAST)
        self._link()

    def _link(self) -> None:
        """Give ``last.pt`` its other names."""
        assert self.out is not None
        last = self.out / LAST
        if self._best():
            checkpoint.link(last, self.out / BEST)
        if self.options.keep and self.experiment.step:
            checkpoint.link(last, self.out / f"step-{self.experiment.step:08d}.pt")
            for old in sorted(self.out.glob("step-*.pt"))[: -self.options.keep]:
                old.unlink()

    def _log(self, what: str, write: Callable[[], None]) -> None:
        if not self.stopped:
            self._attempt(what, write, "Training goes on, and so does the log once there is space.")

    def _attempt(self, what: str, write: Callable[[], None], later: str = "") -> bool:
        """Whether ``write`` succeeded; an error is the end, or a warning that says what comes ``later``.

        A disk that stays full is worth one warning for each file, until that can be written again.
        """
        assert self.out is not None
        try:
            write()
        except OSError as error:
            reason = f"{what} in {self.out} cannot be written: {error.strerror or error}."
            if self.experiment.config.on_error == "stop":
                self.stopped = True
                whole = "What was written before is whole. " if (self.out / LAST).exists() else ""
                raise OutputError(f"{reason} {whole}{self.remedy}") from error
            if what not in self.failing:
                self.warn(f"{reason} {later}".rstrip())
            self.failing.add(what)
            return False
        self.failing.discard(what)
        return True

    @property
    def remedy(self) -> str:
        """How to go on with this run."""
        assert self.out is not None
        if not (self.out / LAST).exists():
            return "There is no checkpoint to go on from: once --out can be written, start again with the same command"
        count = self.experiment.processes.count
        start = f"torchrun --nproc-per-node {count} -m fastdense" if count > 1 else "fastdense"
        return f"Go on with: {start} train --out {shlex.quote(str(self.out))} --resume"
