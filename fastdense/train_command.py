"""What ``fastdense train`` does with its options: prepares, trains, reports, and explains what went wrong."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime, timezone
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import typer

from . import checkpoint
from .data import UnreadableImage, open_data
from .display import display, introduction, result_table
from .environment import versions
from .events import NonFiniteLoss
from .interrupts import Interrupted, noted
from .logs import JsonLines
from .outputs import LAST, OutputError, OutputOptions, Outputs, prepare
from .printing import Printer, PrintError
from .processes import LostProcess, Processes, lost_process, processes
from .train import Experiment
from .train_config import TrainConfig

__all__ = ["MetricsFile", "run", "train"]

OUTPUT_OPTIONS = [field.name for field in dataclasses.fields(OutputOptions)]


class MetricsError(RuntimeError):
    """The file of measurements cannot be written."""


class MetricsFile:
    """The file of ``--metrics``; ``None`` writes nothing."""

    def __init__(self, file: JsonLines | None) -> None:
        self.file = file

    def write(self, record: dict[str, Any]) -> None:
        """Append ``record``, before training goes on."""
        if self.file is None:
            return
        try:
            self.file.write(record)
        except OSError as error:
            path = self.file.file.file.name
            raise MetricsError(
                f"--metrics {path} cannot be written: {error.strerror}. Make room or name another file"
            ) from error


@contextmanager
def _metrics_file(path: Path | None) -> Iterator[MetricsFile]:
    if path is None:
        yield MetricsFile(None)
        return
    try:
        if not path.parent.exists():
            path.parent.mkdir(parents=True)
        lines = JsonLines(path, length=0)
    except OSError as error:
        raise typer.BadParameter(f"--metrics {path} cannot be written: {error.strerror}. Name another file") from error
    try:
        yield MetricsFile(lines)
    finally:
        lines.file.close()


def _bn_size(text: str) -> int | None:
    if text.lower() in ("0", "none"):
        return None
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"--bn-size must be a whole number, 0 or none, got {text!r}") from error


def _block_config(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(layers) for layers in text.split(","))
    except ValueError as error:
        raise ValueError(f"--block-config must be whole numbers, as in 6,12,24, got {text!r}") from error


def _milestones(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(Fraction(fraction)) for fraction in text.split(","))
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"--milestones must be fractions of all steps, as in 1/3,2/3, got {text!r}") from error


PARSERS = {"bn_size": _bn_size, "block_config": _block_config, "milestones": _milestones}


def run(options: Mapping[str, Any], given: frozenset[str]) -> None:
    """Train as the command line says.

    Args:
        options: all of them, by name, as they were written.
        given: those that somebody wrote; the others have their defaults.

    Raises:
        typer.BadParameter: an option is wrong.
        typer.Exit: training ended early, or something could not be written.
    """
    errors = Printer(stderr=True, soft_wrap=True, highlight=False, markup=False)
    with processes() as everybody:
        try:
            _run(dict(options), given, everybody, errors)
        except BaseException as error:
            # What stops one process stops all of them, and one message is enough.
            if everybody.count > 1 and not everybody.first_to_fail():
                raise typer.Exit(_exit_code(error)) from error
            message = _explained(error)
            if message is None:
                raise
            errors.print(message, style="red")
            raise typer.Exit(_exit_code(error)) from error


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 128 + (error.signal if isinstance(error, Interrupted) else signal.SIGINT)  # as shells say
    if isinstance(error, typer.Exit | typer.BadParameter):
        return error.exit_code
    return 1


def _explained(error: BaseException) -> str | None:
    """What to say of it; ``None`` for a defect, which shows its traceback, and for what explains itself."""
    if isinstance(error, torch.OutOfMemoryError):
        reason = str(error).partition(". ")[0]
        return f"Out of memory: {reason}. Try a smaller --batch-size or --recompute bottlenecks."
    if isinstance(error, NonFiniteLoss | MetricsError | OutputError | PrintError | LostProcess | UnreadableImage):
        return f"Stopped: {str(error).rstrip('.')}."
    if isinstance(error, RuntimeError) and lost_process(error):
        return "Stopped: another process has ended before training began."
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "Interrupted."
    return None


def _run(options: dict[str, Any], given: frozenset[str], everybody: Processes, errors: Printer) -> None:
    metrics = options.pop("metrics")
    experiment, output, state = _prepare(options, given, everybody)
    console = Printer(highlight=False, markup=False, quiet=not everybody.first)

    def warn(message: str) -> None:
        errors.print(message, style="yellow")

    with (
        _metrics_file(metrics if everybody.first else None) as file,
        Outputs(output, experiment, warn, resumed=state) as outputs,
    ):
        train(console, experiment, file, outputs)
    if outputs.failed:
        raise OutputError(f"the last checkpoint could not be written to {outputs.out}. {outputs.remedy}")


def _prepare(
    options: dict[str, Any], given: frozenset[str], everybody: Processes
) -> tuple[Experiment, OutputOptions, dict[str, Any] | None]:
    """Everything that can be wrong with the options is found here; later a ``ValueError`` is a defect."""
    try:
        for name, parse in PARSERS.items():
            options[name] = None if options[name] is None else parse(options[name])
        resume, state = options.pop("resume"), None
        writing = {name: options.pop(name) for name in OUTPUT_OPTIONS}
        out = writing["out"]
        if resume and out is None:
            raise ValueError("--resume needs --out, the folder of the run to go on with")
        if resume:
            state = checkpoint.load(out / LAST)
            config = checkpoint.resumed(out / LAST, state, {name: options[name] for name in options if name in given})
            writing |= {name: value for name, value in state["output"].items() if name not in given}
        else:
            config = TrainConfig(**options)
        output = OutputOptions(**writing)
        if out is not None and everybody.first:
            prepare(out, resume=resume, tensorboard=output.tensorboard)
        experiment = _experiment(config, everybody)
        if state is not None:
            checkpoint.restore(experiment, out / LAST, state)
        return experiment, output, state
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _experiment(config: TrainConfig, everybody: Processes) -> Experiment:
    data = open_data(
        config.data,
        image_size=config.image_size,
        augment=config.augment,
        seed=config.seed,
        workers=config.workers,
        on_error=config.on_error,
    )
    torch.set_num_threads(dataclasses.replace(config, image_size=data.image_size).cpu_threads)
    return Experiment(config, data, everybody)


class _Unreadable:
    """Images that are skipped, each named once: by the process that found it, and in the records of the first one."""

    def __init__(self, experiment: Experiment, warn: Callable[[str], None]) -> None:
        self.experiment, self.warn = experiment, warn
        self.named = self.recorded = 0
        self.everybodys: list[str] = []

    def name(self) -> int:
        """Warn of those found since the last call; how many are not recorded."""
        found = self.experiment.data.unreadable
        for line in found[self.named :]:
            self.warn(f"Skipped an image that cannot be read: {line}")
        self.named = len(found)
        return self.named - self.recorded

    def record(self, write: Callable[[dict[str, Any]], None]) -> None:
        """Record everybody's; every process must call it."""
        new = self.experiment.data.unreadable[self.recorded :]
        self.recorded += len(new)
        for line in itertools.chain(*self.experiment.processes.gather(new)):
            if line not in self.everybodys:
                self.everybodys.append(line)
                write({"event": "unreadable", "message": line})


def train(console: Printer, experiment: Experiment, metrics: MetricsFile, outputs: Outputs) -> None:
    """Train, and show what came of it even where that ended early."""
    unreadable = _Unreadable(experiment, outputs.warn)
    header = _header(experiment)

    def write(record: dict[str, Any]) -> None:
        metrics.write(record)
        outputs.write(record)

    try:
        metrics.write(header)
        outputs.write(header if experiment.step == 0 else {**header, "event": "resumed"})
        console.print(introduction(experiment), soft_wrap=not console.is_terminal)
        with display(console, experiment) as shown, noted() as stop:
            for events in experiment.rounds():
                # Files first: what is printed may reach nobody.
                for event in events:
                    metrics.write({"event": event.event, **asdict(event)})
                outputs.update(events)
                for event in events:
                    shown.update(event)
                signum, failure, new = experiment.processes.largest(
                    stop.signal or 0, console.failure, unreadable.name()
                )
                if new:
                    unreadable.record(write)
                if (signum or failure) and not experiment.over:
                    outputs.save(last=True)
                    raise _unprintable(experiment, outputs, failure) if failure else Interrupted(signum, "")
    except NonFiniteLoss as error:
        where = {"run": error.run, "epoch": error.epoch, "step": error.step}
        write({"event": "error", **where, "message": str(error)})
        raise
    except KeyboardInterrupt as interrupt:
        message = f"Interrupted {_where(experiment)}."
        write({"event": "error", "message": message})
        if outputs.out is not None:
            message += f" {outputs.remedy}"
        raise Interrupted(getattr(interrupt, "signal", signal.SIGINT), message) from interrupt
    except RuntimeError as error:
        if not lost_process(error):
            raise
        with suppress(ValueError):  # outside the main thread
            signal.signal(
                signal.SIGTERM, signal.SIG_IGN
            )  # torchrun sends it now, and this process has something to say
        raise _alone(experiment, outputs) from error
    finally:
        unreadable.name()
        _report(console, experiment, write, unreadable.everybodys)
    if console.failure:
        raise _unprintable(experiment, outputs, console.failure)


def _where(experiment: Experiment) -> str:
    return f"after step {min(len(run.losses) for run in experiment.runs)} of {experiment.steps}"


def _unprintable(experiment: Experiment, outputs: Outputs, failure: int) -> PrintError:
    message = f"standard output cannot be written: {os.strerror(failure)}, {_where(experiment)}"
    if outputs.out is None:
        return PrintError(message)
    over = f"Training is over, and {outputs.out} holds what came of it"
    return PrintError(f"{message}. {over if experiment.over else outputs.remedy}")


def _alone(experiment: Experiment, outputs: Outputs) -> LostProcess:
    message = f"another process has ended, {_where(experiment)}"
    return LostProcess(message if outputs.out is None else f"{message}. {outputs.remedy}")


def _header(experiment: Experiment) -> dict[str, Any]:
    return {
        "event": "header",
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["fastdense", *sys.argv[1:]]),
        "versions": versions(),
        "device": str(experiment.device),
        "threads": torch.get_num_threads(),
        "seed": experiment.config.seed,
        "config": asdict(experiment.config),
        "network": experiment.config.architecture.description,
        "parameters": sum(parameter.numel() for parameter in experiment.runs[0].model.parameters()),
        "data": experiment.data.name,
        "steps": experiment.steps,
        "step": experiment.step,
        "processes": experiment.processes.count,
        "steps_per_epoch": experiment.steps_per_epoch,
        "runs": {run.name: run.impl for run in experiment.runs},
    }


def _report(
    console: Printer, experiment: Experiment, write: Callable[[dict[str, Any]], None], unreadable: Sequence[str]
) -> None:
    summaries = [run.summary() for run in experiment.runs]
    comparison = experiment.comparison()
    for summary in summaries:
        write({"event": summary.event, **asdict(summary)})
    if comparison is not None:
        write({"event": comparison.event, **asdict(comparison)})
    console.print(result_table(summaries))
    if comparison is not None:
        # Whole on one line in a log, where somebody may search for it; wrapped at words on a screen.
        console.print(f"{comparison}.", soft_wrap=not console.is_terminal)
    if unreadable:
        told = f"Images that could not be read: {len(unreadable)}, the first {unreadable[0].rstrip('.')}."
        console.print(f"{told} In training each was replaced by the next, in tests left out.", soft_wrap=True)
