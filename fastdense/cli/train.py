"""What ``fastdense train`` does with its options: prepares, trains, reports, and explains what went wrong."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer

from ..data.images import UnreadableImage
from ..data.source import open_data
from ..training import checkpoint
from ..training.config import TrainConfig
from ..training.distributed import Processes, lost_process, processes
from ..training.events import NonFiniteLoss, Note, Stopped
from ..training.experiment import Experiment
from ..training.outputs import LAST, OutputOptions, Outputs, prepare
from .display import display, introduction, result_table
from .options import errors_as_bad_options, given_options, parsed, provenance
from .terminal import DeferSignals, Interrupted, Printer


def run(context: typer.Context, **options: Any) -> None:
    """Train a DenseNet: on scikit-learn's digits, 1,797 real images that need no download, or on a folder of images.

    The network is given by one of --model, --depth and --block-config. At the end: loss, accuracy, step time
    and the bytes that a step keeps for its backward pass. Under torchrun, all processes train one network.
    """
    errors = Printer(stderr=True, soft_wrap=True, highlight=False, markup=False)
    with processes() as ranks:
        console = Printer(highlight=False, markup=False, quiet=ranks.rank > 0)
        try:
            with errors_as_bad_options():
                experiment, prepared = _prepare(options, given_options(context), ranks, errors)
            with prepared as outputs:
                train(console, experiment, outputs)
            outputs.require_last()
        except BaseException as error:
            # What stops one process stops all of them, and one message is enough.
            code, message = _ending(error)
            if ranks.count == 1 or ranks.first_to_fail():
                if message is None:
                    raise
                errors.print(message, style="red")
            raise typer.Exit(code) from error


def _ending(error: BaseException) -> tuple[int, str | None]:
    """The exit status, and the message for the user; none for a defect, which shows its traceback, or typer's own."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + getattr(error, "signal", signal.SIGINT), str(error) or "Interrupted."  # as shells say
    if isinstance(error, typer.Exit | typer.BadParameter):
        return error.exit_code, None
    if isinstance(error, torch.OutOfMemoryError):
        reason = str(error).partition(". ")[0]
        return 1, f"Out of memory: {reason}. Try a smaller --batch-size or --recompute bottlenecks."
    if isinstance(error, Stopped | UnreadableImage):
        return 1, f"Stopped: {str(error).rstrip('.')}."
    return 1, "Stopped: another process has ended before training began." if lost_process(error) else None


def _prepare(
    options: Mapping[str, Any], given: frozenset[str], ranks: Processes, errors: Printer
) -> tuple[Experiment, Outputs]:
    """Everything that can be wrong with the options is found here; later a ``ValueError`` is a defect."""
    training, writing = parsed(options)
    output, state, last = OutputOptions(**writing), None, (writing["out"] or Path()) / LAST
    if output.resume:
        state = checkpoint.load(last)
        config = checkpoint.resumed(last, state, {name: training[name] for name in training if name in given})
        output = replace(output, **{name: value for name, value in state["output"].items() if name not in given})
    else:
        config = TrainConfig(**training)
    if ranks.rank == 0:
        prepare(output)
    names = ("image_size", "augment", "seed", "workers", "on_error")
    data = open_data(config.data, **{name: getattr(config, name) for name in names})
    torch.set_num_threads(replace(config, image_size=data.image_size).cpu_threads)
    experiment = Experiment(config, data, ranks)
    if state is not None:
        checkpoint.restore(experiment, last, state)
    return experiment, Outputs(output, experiment, partial(errors.print, style="yellow"), resumed=state)


def train(console: Printer, experiment: Experiment, outputs: Outputs) -> None:
    """Trains, and shows what came of it even where that ended early."""
    try:
        outputs.log(_header(experiment))
        console.print(introduction(experiment), soft_wrap=not console.is_terminal)
        with display(console, experiment) as shown, DeferSignals() as deferred:
            for events in experiment.rounds():
                outputs.update(events)  # first: what is printed may reach no one
                shown.update(events)
                new = outputs.warn_of_unreadable()
                signum, failure, some = experiment.processes.largest(deferred.signal, console.failure, len(new))
                if some:
                    outputs.record_unreadable(new)
                if (signum or failure) and not experiment.over:
                    outputs.save()
                    raise _unprintable(experiment, outputs, failure) if failure else Interrupted(signum)
    except NonFiniteLoss as error:
        outputs.log(Note("error", {**vars(error), "message": str(error)}))  # run, epoch and step
        raise
    except KeyboardInterrupt as interrupt:
        message = f"Interrupted {_where(experiment)}"
        outputs.log(Note("error", {"message": f"{message}."}))
        raise Interrupted(getattr(interrupt, "signal", signal.SIGINT), outputs.advise(message)) from interrupt
    except RuntimeError as error:
        if not lost_process(error):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it now, and this process has something to say
        raise Stopped(outputs.advise(f"another process has ended, {_where(experiment)}")) from error
    finally:
        outputs.warn_of_unreadable()
        _report(console, experiment, outputs)
    if console.failure:
        raise _unprintable(experiment, outputs, console.failure)


def _where(experiment: Experiment) -> str:
    return f"after step {min(len(run.losses) for run in experiment.runs)} of {experiment.steps}"


def _unprintable(experiment: Experiment, outputs: Outputs, failure: int) -> Stopped:
    reason = f"standard output cannot be written: {os.strerror(failure)}"
    return Stopped(outputs.advise(f"{reason}, {_where(experiment)}"))


def _header(experiment: Experiment) -> Note:
    config = experiment.config
    fields = {
        **provenance("time"),
        "device": str(experiment.device),
        "threads": torch.get_num_threads(),
        "seed": config.seed,
        "config": asdict(config),
        "network": config.architecture.description,
        "data": experiment.data.name,
        "processes": experiment.processes.count,
        "runs": {run.name: run.impl for run in experiment.runs},
    }
    names = ("parameters", "steps", "step", "steps_per_epoch")
    return Note("header", fields | {name: getattr(experiment, name) for name in names})


def _report(console: Printer, experiment: Experiment, outputs: Outputs) -> None:
    summaries, comparison = [run.summary() for run in experiment.runs], experiment.comparison()
    outputs.log(*summaries, *([] if comparison is None else [comparison]))
    console.print(result_table(summaries))
    if comparison is not None:
        # Whole on one line in a log, to be searched for; wrapped at words on a screen.
        console.print(f"{comparison}.", soft_wrap=not console.is_terminal)
    if unreadable := outputs.unreadable:
        told = f"Images that could not be read: {len(unreadable)}, the first {unreadable[0].rstrip('.')}."
        console.print(f"{told} In training each was replaced by the next, in tests left out.", soft_wrap=True)
