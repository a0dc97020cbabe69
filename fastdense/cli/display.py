"""What ``fastdense`` shows: loss curves as they grow, or a few plain lines, and tables."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from ..recompute import in_words
from ..training.events import CheckEvent, EpochEvent, Event, FlowEvent, StepEvent, Summary
from ..training.experiment import Experiment
from ..training.run import Run

BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "_.-=+*#@"
CURVE_WIDTH = 30
PLAIN_LINES = 20  # epochs that a log reports, however many there are
HEARTBEAT_SECONDS = 30.0  # longest silence in a log while it trains
STEP_TIME_WINDOW = 20  # steps whose median is shown while training


def number(value: float | None, form: str) -> str:
    """``value`` in the format ``form``; a dash for ``None``."""
    return "-" if value is None else format(value, form)


def _newest(run: Run) -> tuple[str, str, str]:
    """Loss, test accuracy and step time."""
    accuracy = run.evaluations[-1].test_accuracy if run.evaluations else None
    milliseconds = 1e3 * statistics.median(run.seconds[-STEP_TIME_WINDOW:]) if run.seconds else None
    loss = number(run.losses[-1] if run.losses else None, ".4f")
    return loss, number(accuracy, ".1%"), f"{number(milliseconds, '.0f')} ms"


def _speed(experiment: Experiment) -> str:
    """Images a second in the newest steps, of all processes together; evaluation and reading left out."""
    seconds = experiment.runs[-1].seconds[-STEP_TIME_WINDOW:]
    return f"{experiment.config.batch_size / statistics.median(seconds):,.0f} images/s" if seconds else "- images/s"


def duration(seconds: float) -> str:
    """``seconds`` in words, to two units."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def curve(losses: Sequence[float], steps: int, lowest: float, highest: float, *, width: int, bars: str) -> str:
    """Draws a line, each character the mean of its share of the ``steps``, on a logarithmic scale."""
    span = math.log(highest / lowest) if highest > lowest else 1.0
    shown = []
    for i in range(width):
        share = losses[i * steps // width : max((i + 1) * steps // width, i * steps // width + 1)]
        if share:
            height = math.log(max(statistics.fmean(share), lowest) / lowest) / span
            shown.append(bars[min(int(height * len(bars)), len(bars) - 1)])
    return "".join(shown)


def introduction(experiment: Experiment) -> str:
    """What is about to be trained, on what and how."""
    config, data, count = experiment.config, experiment.data, experiment.processes.count
    parameters = sum(parameter.numel() for parameter in experiment.runs[0].model.parameters())
    milestones = ", ".join(f"{fraction:.0%}" for fraction in config.milestones)
    unusual = {
        f", times {config.gamma:g} at {milestones}": config.schedule == "step",
        f", {config.amp}": config.amp != "off",
        f", weights averaged with decay {config.ema}": config.ema is not None,
        f"; {count} processes" + (" with SyncBatchNorm" if config.sync_bn else ""): count > 1,
    }
    recipe = "".join(text for text, applies in unusual.items() if applies)
    where = str(experiment.device)
    if experiment.device.type == "cpu":
        where += f" ({config.cpu_threads} thread{'s' if config.cpu_threads > 1 else ''})"
    modes = experiment.runs[-1].recompute_modes
    lines = [
        f"{config.architecture.description}: {parameters:,} parameters.",
        f"{data.name}: {data.train_count:,} images to train on, {data.test_count:,} to test on.",
        f"{experiment.steps:,} steps of {config.batch_size} images, {experiment.steps_per_epoch:,} an epoch; "
        f"SGD, learning rate {config.lr:g}, seed {config.seed}{recipe}.",
        f"On {where}, implementation {experiment.runs[-1].impl}.",
        f"recompute='auto' resolved to {in_words(modes)}." if modes else "",
        f"Resuming after step {experiment.step:,}." if experiment.step else "",
    ]
    return "\n".join(filter(None, lines))


def flow_line(event: FlowEvent) -> str:
    """The gradient at both ends of each block."""
    ends = ", ".join(f"{name.removeprefix('features.')} {t[1]:.1e} .. {t[-1]:.1e}" for name, t in event.total.items())
    return f"gradient norm of first .. last layer's output after step {event.step}: {ends}"


class LiveDisplay:
    """A progress bar and, for each run, its loss, accuracy, step time and loss curve, redrawn in place."""

    def __init__(self, console: Console, experiment: Experiment) -> None:
        self.console, self.experiment, self.flow = console, experiment, ""
        bar, left = BarColumn(bar_width=None), (TimeRemainingColumn(), TextColumn("left"))
        columns = (TextColumn("{task.description}"), bar, MofNCompleteColumn(), TextColumn("steps,"), *left)
        self.progress = Progress(*columns, console=console, expand=True)
        checks, done = experiment.check_steps, experiment.step
        self.check = self.progress.add_task("check in float64", total=checks, visible=checks > 0)
        self.training = self.progress.add_task("training", total=experiment.steps, completed=done, start=not checks)

    def update(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, CheckEvent):
                self.progress.update(self.check, completed=event.step)
            elif isinstance(event, FlowEvent):
                self.flow = flow_line(event)
            else:
                self.progress.start_task(self.training)
                description = f"epoch {event.epoch}/{self.experiment.epochs}, {_speed(self.experiment)}"
                self.progress.update(self.training, completed=event.step, description=description)

    def __rich__(self) -> Group:
        return Group(self.progress, self._table(), *([Text(self.flow)] if self.flow else []))

    def _table(self) -> Table:
        runs = self.experiment.runs
        # Losses of 0 have no logarithm; three decades below the highest is as deep as eight bars can show.
        losses = [max(loss, 1e-12) for run in runs for loss in run.losses]
        highest = max(losses, default=1.0)
        lowest = max(min(losses, default=1.0), highest / 1e3)
        table = Table(
            Column("run", no_wrap=True),
            *(Column(heading, justify="right", no_wrap=True) for heading in ("loss", "test acc.", "step")),
            Column("training loss (log scale)", width=CURVE_WIDTH, no_wrap=True),
            box=None, expand=True, pad_edge=False,
        )  # fmt: skip
        bars = ASCII_BARS if self.console.options.ascii_only else BARS
        for run in runs:
            shape = curve(run.losses, self.experiment.steps, lowest, highest, width=CURVE_WIDTH, bars=bars)
            table.add_row(run.label, *_newest(run), Text(shape, style="cyan" if run.name == "reference" else "green"))
        return table


class PlainDisplay:
    """Lines for a log: after an epoch, about 20 in all, and a sign of life where an epoch takes long."""

    def __init__(self, console: Console, experiment: Experiment) -> None:
        self.console, self.experiment = console, experiment
        self.every = -(-experiment.epochs // PLAIN_LINES)
        self.first_step, self.start = experiment.step, time.monotonic()  # for what is left
        self.last_line = self.start

    def update(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, CheckEvent):
                self.start = time.monotonic()
                if event.step == self.experiment.check_steps:
                    largest = max(abs(step.reference - step.fastdense) for step in self.experiment.checked)
                    self._line(f"check in float64: losses of {event.step} steps differ by at most {largest:.1e}")
            elif event.run == self.experiment.runs[-1].name:
                if isinstance(event, FlowEvent):
                    self._line(flow_line(event))
                elif self._due(event):
                    self._line(self._progress(event))

    def _due(self, event: StepEvent | EpochEvent) -> bool:
        over = event.step == self.experiment.steps
        if isinstance(event, EpochEvent):
            return over or event.epoch % self.every == 0
        return not over and time.monotonic() - self.last_line > HEARTBEAT_SECONDS

    def _progress(self, event: StepEvent | EpochEvent) -> str:
        experiment, left = self.experiment, self.experiment.steps - event.step
        parts = [f"epoch {event.epoch}/{experiment.epochs} step {event.step}/{experiment.steps}"]
        for run in experiment.runs:
            loss, accuracy, step_time = _newest(run)
            parts.append(f"{run.label}: loss {loss}, {accuracy} right, {step_time}")
        pace = (time.monotonic() - self.start) / max(event.step - self.first_step, 1)
        parts.append(_speed(experiment) + (f", {duration(pace * left)} left" if left else ""))
        return "; ".join(parts)

    def _line(self, text: str) -> None:
        self.last_line = time.monotonic()
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)


@contextmanager
def display(console: Console, experiment: Experiment) -> Iterator[PlainDisplay | LiveDisplay]:
    """The display that suits the console; on leaving, however that happens, the terminal is as it was."""
    if console.quiet or not console.is_terminal or console.is_dumb_terminal:
        yield PlainDisplay(console, experiment)
    else:
        live = LiveDisplay(console, experiment)
        with Live(live, console=console, refresh_per_second=4):
            yield live


def result_table(summaries: Sequence[Summary]) -> Table:
    """One row a run, and one for its average where there is one."""
    headings = ("train\nloss", "test\nloss", "test\naccuracy", "step time\n(median)", "saved for\nbackward")
    table = Table("run", *(Column(heading, justify="right") for heading in headings))
    for run in summaries:
        milliseconds = "-" if run.step_seconds is None else f"{1e3 * run.step_seconds:.1f} ms"
        scores = (number(run.train_loss, ".4f"), number(run.test_loss, ".4f"), number(run.test_accuracy, ".2%"))
        table.add_row(run.label, *scores, milliseconds, f"{run.kept_bytes / 1e6:.1f} MB")
        if run.ema_test_loss is not None:
            averaged = (number(run.ema_test_loss, ".4f"), number(run.ema_test_accuracy, ".2%"))
            table.add_row(f"{run.label}, averaged weights", "-", *averaged, "-", "-")
    return table


def environment_tables(found: dict[str, Any]) -> list[Table]:
    """What ``environment()`` found: versions and settings, then a row for each device."""
    settings = Table(show_header=False)
    for package, version in found["versions"].items():
        settings.add_row(package, version or "not installed")
    settings.add_row("CUDA (torch's build)", found["cuda"] or "none")
    settings.add_row("system", found["os"])
    settings.add_row("CPU threads", str(found["cpu_threads"]))
    for variable, value in found["variables"].items():
        settings.add_row(variable, "not set" if value is None else value)

    devices = Table(*(Column(heading, overflow="fold") for heading in ("device", "name", "impl='auto'", "why")))
    for device in found["devices"]:
        name = device["name"]
        if "capability" in device:
            name += f"\ncapability {device['capability']}, {device['memory_bytes'] / 1e9:.0f} GB"
        devices.add_row(device["device"], name, device["impl"] or "none", device["reason"])
    return [settings, devices]
