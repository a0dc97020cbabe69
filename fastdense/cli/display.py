"""What ``fastdense`` shows: loss curves as they grow, or a few plain lines, and tables."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from ..recompute import in_words
from ..training.events import CheckEvent, EpochEvent, Event, FlowEvent, StepEvent, Summary
from ..training.experiment import Experiment

BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "_.-=+*#@"
CURVE_WIDTH = 20
PRINTED_EPOCHS = 20  # epochs that a log reports, however many there are
REDRAW_SECONDS = 0.25
HEARTBEAT_SECONDS = 30.0  # longest silence in a log while it trains
STEP_TIME_WINDOW = 20  # steps whose median is shown while training


def number(value: float | None, form: str) -> str:
    """Formats ``value``; a dash for ``None``."""
    return "-" if value is None else format(value, form)


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
        f"{config.architecture.description}: {experiment.parameters:,} parameters.",
        f"{data.name}: {data.train_count:,} images to train on, {data.test_count:,} to test on.",
        f"{experiment.steps:,} steps of {config.batch_size} images, {experiment.steps_per_epoch:,} an epoch; "
        f"SGD, learning rate {config.lr:g}, seed {config.seed}{recipe}.",
        f"On {where}, implementation {experiment.runs[-1].impl}.",
        f"recompute='auto' resolved to {in_words(modes)}." if modes else "",
        f"Resuming after step {experiment.step:,}." if experiment.step else "",
    ]
    return "\n".join(filter(None, lines))


class Display:
    """Lines for a log, about 20 in all, and a sign of life where an epoch takes long; rendered, state and curves."""

    def __init__(self, console: Console, experiment: Experiment) -> None:
        self.console, self.experiment = console, experiment
        self.every = -(-experiment.epochs // PRINTED_EPOCHS)
        self.first_step, self.start = experiment.step, time.monotonic()  # for what is left
        self.last_line = self.drawn = self.start
        self.live: Live | None = None

    def update(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, CheckEvent):
                self.start = time.monotonic()
                if event.step == self.experiment.check_steps:
                    largest = max(abs(step.reference - step.fastdense) for step in self.experiment.checked)
                    self._print(f"check in float64: losses of {event.step} steps differ by at most {largest:.1e}")
            elif event.run == self.experiment.runs[-1].name:
                if isinstance(event, FlowEvent):
                    blocks = {name.removeprefix("features."): total for name, total in event.total.items()}
                    ends = ", ".join(f"{name} {total[1]:.1e} .. {total[-1]:.1e}" for name, total in blocks.items())
                    self._print(f"gradient norm of first .. last layer's output after step {event.step}: {ends}")
                elif self._due(event):
                    self._print("; ".join(self._state()))
        if self.live is not None and time.monotonic() - self.drawn > REDRAW_SECONDS:
            self.drawn = time.monotonic()
            self.live.refresh()

    def _due(self, event: StepEvent | EpochEvent) -> bool:
        over = event.step == self.experiment.steps
        if isinstance(event, EpochEvent):
            return over or event.epoch % self.every == 0
        return not over and time.monotonic() - self.last_line > HEARTBEAT_SECONDS

    def _state(self) -> list[str]:
        """Where training is; loss, test accuracy and step time of each run; speed and what is left."""
        experiment, seconds = self.experiment, 1.0
        lines = [f"epoch {experiment.epoch}/{experiment.epochs} step {experiment.step}/{experiment.steps}"]
        for run in experiment.runs:
            accuracy = number(run.evaluations[-1].test_accuracy if run.evaluations else None, ".1%")
            loss, seconds = run.losses[-1], statistics.median(run.seconds[-STEP_TIME_WINDOW:])
            lines.append(f"{run.label}: loss {loss:.4f}, {accuracy} right, {1e3 * seconds:.0f} ms")
        speed = f"{experiment.config.batch_size / seconds:,.0f} images/s"  # evaluation and reading left out
        pace = (time.monotonic() - self.start) / max(experiment.step - self.first_step, 1)
        left = pace * (experiment.steps - experiment.step)
        return [*lines, f"{speed}, {duration(left)} left" if left else speed]

    def _print(self, text: str) -> None:
        self.last_line = time.monotonic()
        self.console.print(text, soft_wrap=not self.console.is_terminal, highlight=False, markup=False)

    def __rich__(self) -> RenderableType:
        runs, steps = self.experiment.runs, self.experiment.steps
        if not all(run.losses for run in runs):
            return ""
        # Losses of 0 have no logarithm; three decades below the highest is as deep as eight bars can show.
        losses = [max(loss, 1e-12) for run in runs for loss in run.losses]
        lowest, highest = max(min(losses), max(losses) / 1e3), max(losses)
        bars = ASCII_BARS if self.console.options.ascii_only else BARS
        where, *states, speed = self._state()
        table = Table.grid("", Column(width=CURVE_WIDTH, no_wrap=True), padding=(0, 2))
        bar = ProgressBar(total=steps, completed=self.experiment.step, width=CURVE_WIDTH)
        table.add_row(f"{where}; {speed}", bar)
        for run, state in zip(runs, states, strict=True):
            shape = curve(run.losses, steps, lowest, highest, width=CURVE_WIDTH, bars=bars)
            table.add_row(state, Text(shape, style="cyan" if run.name == "reference" else "green"))
        return table


@contextmanager
def display(console: Console, experiment: Experiment) -> Iterator[Display]:
    """The display that suits the console; on leaving, however that happens, the terminal is as it was."""
    shown = Display(console, experiment)
    if console.is_terminal and not (console.quiet or console.is_dumb_terminal):
        shown.live = Live(shown, console=console, auto_refresh=False)  # a thread that lives at exit may abort
    with shown.live or nullcontext():
        yield shown


def result_table(summaries: Sequence[Summary]) -> Table:
    """One row a run, and one for its average where there is one."""
    headings = ("train\nloss", "test\nloss", "test\naccuracy", "step time\n(median)", "saved for\nbackward")
    table = Table("run", *(Column(heading, justify="right") for heading in headings))
    for run in summaries:
        milliseconds = "-" if run.step_seconds is None else f"{1e3 * run.step_seconds:.1f} ms"
        scores = (number(run.train_loss, ".4f"), number(run.test_loss, ".4f"), number(run.test_accuracy, ".2%"))
        table.add_row(run.label, *scores, milliseconds, f"{run.kept_bytes / 1e6:.1f} MB")
        if run.ema_test_loss is not None:
            averaged = f"{run.ema_test_loss:.4f}", number(run.ema_test_accuracy, ".2%")
            table.add_row(f"{run.label}, averaged weights", "-", *averaged, "-", "-")
    return table


def environment_tables(found: dict[str, Any]) -> list[Table]:
    """What ``environment()`` found: versions and settings, then a row for each device."""
    settings = Table(show_header=False)
    for package, version in found["versions"].items():
        settings.add_row(package, version or "not installed")
    for name, key in {"CUDA (torch's build)": "cuda", "system": "os", "CPU threads": "cpu_threads"}.items():
        settings.add_row(name, str(found[key] or "none"))
    for variable, value in found["variables"].items():
        settings.add_row(variable, "not set" if value is None else value)
    devices = Table(*(Column(heading, overflow="fold") for heading in ("device", "name", "impl='auto'", "why")))
    for device in found["devices"]:
        name = device["name"]
        if "capability" in device:
            name += f"\ncapability {device['capability']}, {device['memory_bytes'] / 1e9:.0f} GB"
        devices.add_row(device["device"], name, device["impl"] or "none", device["reason"])
    return [settings, devices]
