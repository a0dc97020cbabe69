"""The folder of a run, whose files docs/train.md lists, and what happens when they cannot be written."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from . import checkpoint
from .config import AT_LEAST_0, Rule, check_options, option
from .events import Event, Note, Record, Stopped
from .experiment import Experiment
from .logs import JsonLines, TensorBoard, WholeWrites, draw_flow

LAST, BEST, METRICS = "last.pt", "best.pt", "metrics.jsonl"
BEFORE = "metrics.before.jsonl"
FIRST_RECORD = b'{"event": "header"'  # by which a log is known to be ours
FIRST_TENSORBOARD = "events.out.tfevents." + 10 * "[0-9]" + ".0"  # the files of runs that began in their folder
EVERY = re.compile(r"([1-9]\d*) ?(epochs?|steps?)?")
_EVERY = Rule("a number of epochs or steps, as in 2epochs or 500steps", EVERY.fullmatch)
_output = partial(option, "Output")


@dataclass(frozen=True)
class OutputOptions:
    """What is written besides what is printed, as each field's help says; raises ``ValueError`` for a wrong value."""

    out: Path | None = _output(None, "Folder for checkpoints, metrics.jsonl and TensorBoard's files.")  # noqa: RUF009
    resume: bool = _output(False, "Resume from last.pt in --out, bit for bit; its options hold.")
    save_every: str = _output("1epoch", "How often last.pt is written: 2epochs, 500steps.", _EVERY)
    keep: int = _output(0, "Let so many of the newest checkpoints stay as step-N.pt.", AT_LEAST_0)
    tensorboard: bool = _output(True, "Write TensorBoard's files to --out.")
    metrics: Path | None = _output(None, "Write every step, epoch and result to this file, as JSON lines.")  # noqa: RUF009

    def __post_init__(self) -> None:
        check_options(self)
        if self.resume and self.out is None:
            raise ValueError("--resume needs --out, the folder of the run to resume")

    def steps(self, steps_per_epoch: int) -> int:
        found = EVERY.fullmatch(self.save_every)
        assert found is not None
        return int(found[1]) * (1 if (found[2] or "").startswith("step") else steps_per_epoch)


def prepare(options: OutputOptions) -> None:
    """Makes the folder ready for a run, or for resuming one.

    A run that never wrote a checkpoint, as on a full disk, cannot be resumed: a new one takes its place, and what it
    measured stays as ``metrics.before.jsonl``. Raises ``ValueError`` if the folder cannot be written or holds a run.
    """
    out = options.out
    if out is None:
        return
    if options.tensorboard:
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
        if held and not options.resume:
            remedy = "resume it with --resume, or name another folder" if LAST in held else "name another folder"
            raise ValueError(f"--out {out} already holds a run ({', '.join(held)}): {remedy}")
        out.mkdir(parents=True, exist_ok=True)
        for partial_file in out.glob("*.partial.*"):  # of a process that was killed while it wrote
            partial_file.unlink()
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error.strerror}. Name a folder that can") from error


class Outputs(ExitStack):
    """Checkpoints and logs of one experiment; every process calls the same methods, and only the first one writes.

    ``warn`` is told what could not be written; ``resumed`` is the checkpoint that ``experiment`` resumes from. Raises
    ``Stopped`` if a file cannot be written and is not skipped, ``ValueError`` if that of ``--metrics`` cannot be.
    """

    def __init__(
        self, options: OutputOptions, experiment: Experiment, warn: Callable[[str], None], resumed: Any = None
    ) -> None:
        super().__init__()
        self.options, self.experiment, self.warn, self.out = options, experiment, warn, options.out
        self.writing = experiment.processes.rank == 0
        self.files: dict[str, WholeWrites] = {}  # by their names in messages
        self.logs: dict[str, Callable[[Record], None]] = {}  # what is told of each event: the files, and more
        self.saved: tuple[int, bool] | None = None  # step and whether it was evaluated
        self.failing: set[str] = set()  # what could not be written when that was last tried
        self.warned = 0  # of so many images that this process could not read
        self.unreadable: list[str] = []  # the images that were skipped by any process
        if (path := options.metrics) is not None and self.writing:
            try:
                if not path.parent.exists():
                    path.parent.mkdir(parents=True)
                self._open(f"--metrics {path}", JsonLines, path, 0)
            except OSError as error:
                raise ValueError(f"--metrics {path} cannot be written: {error.strerror}. Name another file") from error
        if resumed is None:
            self.save()  # a folder without a checkpoint could not be resumed, and a full disk shows at once
        else:
            self.saved = (experiment.step, experiment.evaluated)
        if self.out is not None and self.writing:
            if resumed is not None:  # after a kill between last.pt and its other names
                self._attempt(LAST, self._link)
            self._open_logs(self.out, 0 if resumed is None else resumed["metrics_bytes"])

    def _open_logs(self, out: Path, length: int) -> None:
        config, step = self.experiment.config, self.experiment.step
        self._attempt(METRICS, self._open, METRICS, JsonLines, out / METRICS, length, "resumed" if step else "header")
        if config.watch_flow is not None:
            importlib.import_module("matplotlib")  # before the first picture
            draw = partial(draw_flow, out, config.architecture.description, self.experiment.data.name)
            self.logs["a picture of the gradient flow"] = draw
        if self.options.tensorboard:
            name = "TensorBoard's file"
            self._attempt(name, self._open, name, TensorBoard, out, step)

    def _open(self, what: str, kind: Callable[..., JsonLines | TensorBoard], *arguments: Any) -> None:
        log = kind(*arguments)
        self.enter_context(log.file)
        self.files[what], self.logs[what] = log, log.update

    def log(self, *events: Record) -> None:
        for event in events:
            for what, update in self.logs.items():
                self._attempt(what, update, event)

    def update(self, events: Sequence[Event]) -> None:
        """Logs what happened in a round, and writes a checkpoint if one is due."""
        self.log(*events)
        experiment = self.experiment
        due = experiment.step % self.options.steps(experiment.steps_per_epoch) == 0
        if experiment.step and experiment.evaluated and (due or experiment.over or self._best()):
            self.save()

    def warn_of_unreadable(self) -> list[str]:
        """Warns of the images that were skipped since the last call, and returns them."""
        new = self.experiment.data.unreadable[self.warned :]
        for line in new:
            self.warn(f"Skipped an image that cannot be read: {line}")
        self.warned += len(new)
        return new

    def record_unreadable(self, new: list[str]) -> None:
        """Records the ``new`` ones of all processes, each once; every process must call it."""
        for line in chain(*self.experiment.processes.gather(new)):
            if line not in self.unreadable:
                self.unreadable.append(line)
                self.log(Note("unreadable", {"message": line}))

    def _best(self) -> bool:
        """Whether the newest step has the best test accuracy so far: the average's, where there is one."""
        evaluations = self.experiment.runs[-1].evaluations
        if not evaluations or evaluations[-1].step != self.experiment.step:
            return False
        score = "test_accuracy" if self.experiment.config.ema is None else "ema_test_accuracy"
        *earlier, newest = [getattr(evaluation, score) for evaluation in evaluations]
        return bool(newest > max(earlier, default=-1.0))

    def save(self) -> None:
        """Writes a checkpoint, unless this very state has been written; every process must call it."""
        state = (self.experiment.step, self.experiment.evaluated)
        if self.out is None or self.saved == state:
            return
        options = {name: getattr(self.options, name) for name in ("save_every", "keep", "tensorboard")}
        contents = checkpoint.contents(self.experiment) | {"output": options}
        self.saved = state  # or tried to: all ranks must agree whether there is something to do
        if self.writing:
            self._attempt(LAST, self._save, self.out / LAST, contents)

    def _save(self, path: Path, contents: dict[str, Any]) -> None:
        # The logs first, so that they reach at least as far as the checkpoint whatever happens in between.
        lengths = {what: file.sync() for what, file in self.files.items()}
        checkpoint.save({**contents, "metrics_bytes": lengths.get(METRICS, 0)}, path)
        self._link()

    def _link(self) -> None:
        assert self.out is not None
        last = self.out / LAST
        if self._best():
            checkpoint.link(last, self.out / BEST)
        if self.options.keep and self.experiment.step:
            checkpoint.link(last, self.out / f"step-{self.experiment.step:08d}.pt")
            for old in sorted(self.out.glob("step-*.pt"))[: -self.options.keep]:
                old.unlink()

    def _attempt(self, what: str, write: Callable[..., None], *arguments: Any) -> None:
        """Calls ``write(*arguments)``; an error is the end, or a warning, one for each file until it can be written."""
        try:
            write(*arguments)
            self.failing.discard(what)
        except OSError as error:
            if what.startswith("--metrics"):
                reason = f"{what} cannot be written: {error.strerror}."
                raise Stopped(f"{reason} Make room or name another file") from error
            assert self.out is not None
            reason = f"{what} in {self.out} cannot be written: {error.strerror or error}."
            if self.experiment.config.on_error == "stop":
                self.logs.clear()  # nothing is written any more
                whole = "What was written before is whole. " if (self.out / LAST).exists() else ""
                raise Stopped(f"{reason} {whole}{self._remedy}") from error
            if what not in self.failing:
                self.warn(reason)
            self.failing.add(what)

    def require_last(self) -> None:
        """Raises ``Stopped`` if the last checkpoint could not be written."""
        if LAST in self.failing:
            raise Stopped(f"the last checkpoint could not be written to {self.out}. {self._remedy}")

    def advise(self, message: str) -> str:
        """Returns ``message``, and how to resume this run if it has a folder."""
        if self.out is None:
            return f"{message}."
        over = f"Training is over, and {self.out} holds what came of it"
        return f"{message}. {over if self.experiment.over else self._remedy}"

    @property
    def _remedy(self) -> str:
        assert self.out is not None
        if not (self.out / LAST).exists():
            return "There is no checkpoint to resume from: once --out can be written, start again with the same command"
        count = self.experiment.processes.count
        start = f"torchrun --nproc-per-node {count} -m fastdense" if count > 1 else "fastdense"
        return f"Resume with: {start} train --out {shlex.quote(str(self.out))} --resume"
