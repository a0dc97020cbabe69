"""``fastdense train`` and ``fastdense env``, beside ``fastdense bench``: options, files and exit codes."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from io import RawIOBase
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from .bench_commands import bench
from .data import digits
from .display import display, environment_tables, introduction, result_table
from .environment import environment, versions
from .inspect_commands import inspect
from .train import Experiment, NonFiniteLoss
from .train_config import SMALL_IMAGES, TrainConfig

__all__ = ["app"]

INTERRUPTED = 130  # 128 + SIGINT, as shells say

app = typer.Typer(
    help="DenseNets that are cheap to train.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench, name="bench")
app.add_typer(inspect, name="inspect")

NETWORK, TRAINING, MACHINE = "Network", "Training", "Machine and output"
Model = Annotated[
    str | None,
    typer.Option(
        help="densenet121, 161, 169, 201 or 264, named in full. From --image-size 32 on it keeps its "
        "ImageNet stem, which divides the resolution by 4; below, it starts with one 3x3 convolution like "
        "the others.",
        rich_help_panel=NETWORK,
    ),
]
Depth = Annotated[
    int | None,
    typer.Option(
        help="Three equal blocks: depth = 6*n + 4, or 3*n + 4 without bottlenecks.",
        rich_help_panel=NETWORK,
        show_default="100",
    ),
]
Blocks = Annotated[str | None, typer.Option(help="Layers of each block, as 6,12,24.", rich_help_panel=NETWORK)]
GrowthRate = Annotated[
    int | None,
    typer.Option(
        help="Channels that each layer adds.",
        rich_help_panel=NETWORK,
        show_default="12, or the model's own",
    ),
]
BnSize = Annotated[
    str,
    typer.Option(help="Bottleneck channels over the growth rate; 0 or none: no bottleneck.", rich_help_panel=NETWORK),
]
DropRate = Annotated[float, typer.Option(help="Dropout after each layer.", rich_help_panel=NETWORK)]
ImageSize = Annotated[
    int, typer.Option(help="Enlarge the 8x8 digits to this many pixels, bilinearly.", rich_help_panel=NETWORK)
]
Epochs = Annotated[int, typer.Option(help="Passes over the training images.", rich_help_panel=TRAINING)]
Steps = Annotated[
    int | None,
    typer.Option(
        help="Stop after so many steps; the learning rate's schedule ends there too.",
        rich_help_panel=TRAINING,
    ),
]
BatchSize = Annotated[int, typer.Option(help="Images a step.", rich_help_panel=TRAINING)]
LearningRate = Annotated[
    float,
    typer.Option(
        help="Highest learning rate: reached after a warm-up of 5 % of the steps, then a cosine to 0.",
        rich_help_panel=TRAINING,
    ),
]
Momentum = Annotated[float, typer.Option(help="Nesterov momentum of SGD.", rich_help_panel=TRAINING)]
WeightDecay = Annotated[float, typer.Option(help="Weight decay of SGD.", rich_help_panel=TRAINING)]
Seed = Annotated[int, typer.Option(help="Of weights, order of images and dropout.", rich_help_panel=TRAINING)]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda, cuda:1.",
        rich_help_panel=MACHINE,
        show_default="cuda where there is one, else cpu",
    ),
]
Impl = Annotated[
    str,
    typer.Option(help="auto, triton, torch, or reference: the textbook torch.cat.", rich_help_panel=MACHINE),
]
Recompute = Annotated[
    str | None,
    typer.Option(
        help="activations; bottlenecks, which keeps fewer bytes and takes longer; or auto.",
        rich_help_panel=MACHINE,
        show_default="activations",
    ),
]
Compare = Annotated[
    bool,
    typer.Option(
        "--compare",
        help="Train the textbook torch.cat network too, from the same weights on the same batches, step by "
        "step beside the other.",
        rich_help_panel=TRAINING,
    ),
]
CheckSteps = Annotated[
    int,
    typer.Option(
        help="With --compare: steps that both make in float64 first, where rounding hides nothing; 0: none.",
        rich_help_panel=TRAINING,
    ),
]
Metrics = Annotated[
    Path | None,
    typer.Option(help="Write every step, epoch and result to this file, as JSON lines.", rich_help_panel=MACHINE),
]
Threads = Annotated[
    int | None,
    typer.Option(
        help="CPU threads. Layers of small images are too short to share.",
        rich_help_panel=MACHINE,
        show_default=f"1 below {SMALL_IMAGES} pixels, else PyTorch's",
    ),
]


class MetricsError(RuntimeError):
    """The file of measurements cannot be written."""


class MetricsFile:
    """JSON lines, each written out before training goes on; ``None`` writes nothing."""

    def __init__(self, file: RawIOBase | None) -> None:
        self.file = file

    def write(self, record: dict[str, Any]) -> None:
        if self.file is None:
            return
        # JSON has no NaN and no infinity; float() reads these words back.
        plain = {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
        try:
            self.file.write(f"{json.dumps(plain, allow_nan=False)}\n".encode())
        except OSError as error:
            raise MetricsError(f"the file of --metrics cannot be written: {error.strerror}") from error


@contextmanager
def _metrics_file(path: Path | None) -> Iterator[MetricsFile]:
    with ExitStack() as stack:
        try:
            # Unbuffered: what has been measured is in the file, and a full disk shows here and not on closing.
            file = None if path is None else stack.enter_context(path.open("wb", buffering=0))
        except OSError as error:
            raise typer.BadParameter(f"--metrics {path} cannot be written: {error.strerror}") from error
        yield MetricsFile(file)


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


@app.command()
def train(
    model: Model = None,
    depth: Depth = None,
    block_config: Blocks = None,
    growth_rate: GrowthRate = None,
    bn_size: BnSize = "4",
    drop_rate: DropRate = TrainConfig.drop_rate,
    image_size: ImageSize = TrainConfig.image_size,
    compare: Compare = TrainConfig.compare,
    check_steps: CheckSteps = TrainConfig.check_steps,
    epochs: Epochs = TrainConfig.epochs,
    steps: Steps = None,
    batch_size: BatchSize = TrainConfig.batch_size,
    lr: LearningRate = TrainConfig.lr,
    momentum: Momentum = TrainConfig.momentum,
    weight_decay: WeightDecay = TrainConfig.weight_decay,
    seed: Seed = TrainConfig.seed,
    device: Device = None,
    impl: Impl = TrainConfig.impl,
    recompute: Recompute = None,
    metrics: Metrics = None,
    threads: Threads = None,
) -> None:
    """Train a DenseNet on scikit-learn's digits: 1,797 real images of 8x8 pixels that need no download.

    The network is given by one of --model, --depth and --block-config. At the end: loss, accuracy, step time
    and the bytes that a step keeps for its backward pass.
    """
    options = {name: value for name, value in locals().items() if name != "metrics"}
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    try:
        experiment = _prepare(options)
        with _metrics_file(metrics) as file:
            _train(Console(highlight=False, markup=False), experiment, file)
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        errors.print(f"Out of memory: {reason}. Try a smaller --batch-size or --recompute bottlenecks.", style="red")
        raise typer.Exit(1) from error
    except (NonFiniteLoss, MetricsError) as error:
        errors.print(f"Stopped: {error}.", style="red")
        raise typer.Exit(1) from error
    except KeyboardInterrupt as interrupt:
        errors.print(str(interrupt) or "Interrupted.", style="red")
        raise typer.Exit(INTERRUPTED) from interrupt


def _prepare(options: dict[str, Any]) -> Experiment:
    """Everything that can be wrong with the options is found here; later a ``ValueError`` is a defect."""
    try:
        options["bn_size"] = _bn_size(options["bn_size"])
        options["block_config"] = _block_config(options["block_config"])
        config = TrainConfig(**options)
        torch.set_num_threads(config.cpu_threads)
        return Experiment(config, digits(config.image_size))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _train(console: Console, experiment: Experiment, metrics: MetricsFile) -> None:
    """Train, and show what came of it even where that ended early."""
    console.print(introduction(experiment), soft_wrap=not console.is_terminal)
    try:
        metrics.write(_header(experiment))
        with display(console, experiment) as shown:
            for event in experiment.events():
                metrics.write({"event": event.event, **asdict(event)})
                shown.update(event)
    except NonFiniteLoss as error:
        where = {"run": error.run, "epoch": error.epoch, "step": error.step}
        metrics.write({"event": "error", **where, "message": str(error)})
        raise
    except KeyboardInterrupt as interrupt:
        message = f"Interrupted after step {min(len(run.losses) for run in experiment.runs)} of {experiment.steps}."
        metrics.write({"event": "error", "message": message})
        raise KeyboardInterrupt(message) from interrupt
    finally:
        _report(console, experiment, metrics)


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
        "steps_per_epoch": experiment.steps_per_epoch,
        "runs": {run.name: run.impl for run in experiment.runs},
    }


def _report(console: Console, experiment: Experiment, metrics: MetricsFile) -> None:
    summaries = [run.summary() for run in experiment.runs]
    comparison = experiment.comparison()
    console.print(result_table(summaries))
    if comparison is not None:
        # Whole on one line in a log, where somebody may search for it; wrapped at words on a screen.
        console.print(f"{comparison}.", soft_wrap=not console.is_terminal)
    for summary in summaries:
        metrics.write({"event": summary.event, **asdict(summary)})
    if comparison is not None:
        metrics.write({"event": comparison.event, **asdict(comparison)})


@app.command()
def env(
    as_json: Annotated[bool, typer.Option("--json", help="The same for machines.")] = False,
) -> None:
    """Show what is installed, which devices there are, and which implementation runs on each, and why."""
    found = environment()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        Console(highlight=False, markup=False).print(*environment_tables(found), sep="\n")
