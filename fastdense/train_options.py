"""The options of ``fastdense train``: their types and what ``--help`` says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .train_config import SMALL_IMAGES

__all__ = [
    "Amp",
    "Augment",
    "BatchSize",
    "Blocks",
    "BnSize",
    "CheckSteps",
    "Compare",
    "Data",
    "Depth",
    "Device",
    "DropRate",
    "Ema",
    "Epochs",
    "Gamma",
    "GrowthRate",
    "ImageSize",
    "Impl",
    "Keep",
    "LearningRate",
    "Metrics",
    "Milestones",
    "Model",
    "Momentum",
    "Nesterov",
    "OnError",
    "Out",
    "Plain",
    "Recompute",
    "Resume",
    "SaveEvery",
    "Schedule",
    "Seed",
    "Steps",
    "SyncBn",
    "TensorBoard",
    "Threads",
    "WarmUp",
    "WatchFlow",
    "WeightDecay",
    "Workers",
]

NETWORK, DATA, TRAINING = "Network", "Data", "Training"
MACHINE, OUTPUT = "Machine", "Output"
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
Plain = Annotated[
    bool,
    typer.Option("--plain", help="The same layers without dense connections.", rich_help_panel=NETWORK),
]
Data = Annotated[
    str,
    typer.Option(help="digits, or a folder: CIFAR's files, or a folder of images a class.", rich_help_panel=DATA),
]
ImageSize = Annotated[
    int | None,
    typer.Option(
        help="Scale images to this many pixels.", rich_help_panel=DATA, show_default="digits 8, CIFAR 32, a folder 224"
    ),
]
Augment = Annotated[
    str, typer.Option(help="How training images are varied; auto: as suits the data.", rich_help_panel=DATA)
]
Workers = Annotated[int, typer.Option(help="Processes that read images.", rich_help_panel=DATA)]
OnError = Annotated[
    str,
    typer.Option(
        help="An image that cannot be read, or a file of --out that cannot be written: stop, or skip and warn.",
        rich_help_panel=DATA,
    ),
]
Epochs = Annotated[int, typer.Option(help="Passes over the training images.", rich_help_panel=TRAINING)]
Steps = Annotated[
    int | None,
    typer.Option(
        help="Stop after so many steps; the learning rate's schedule ends there too.",
        rich_help_panel=TRAINING,
    ),
]
BatchSize = Annotated[int, typer.Option(help="Images a step, over all processes.", rich_help_panel=TRAINING)]
LearningRate = Annotated[
    float,
    typer.Option(
        help="Highest learning rate, reached after the warm-up.",
        rich_help_panel=TRAINING,
    ),
]
Schedule = Annotated[
    str,
    typer.Option(
        help="cosine: down to 0 at the end; step: times --gamma at each of --milestones.", rich_help_panel=TRAINING
    ),
]
Milestones = Annotated[
    str, typer.Option(help="With --schedule step: fractions of all steps, as 1/3,2/3.", rich_help_panel=TRAINING)
]
Gamma = Annotated[float, typer.Option(help="What a milestone multiplies the rate by.", rich_help_panel=TRAINING)]
WarmUp = Annotated[
    float | None,
    typer.Option(
        help="Fraction of all steps in which the learning rate rises from a tenth.",
        rich_help_panel=TRAINING,
        show_default="0.05 for cosine, 0 for step",
    ),
]
Momentum = Annotated[float, typer.Option(help="Momentum of SGD.", rich_help_panel=TRAINING)]
Nesterov = Annotated[bool, typer.Option(help="Nesterov's momentum.", rich_help_panel=TRAINING)]
Amp = Annotated[
    str, typer.Option(help="Mixed precision: bf16, fp16 (with a scaled loss), or off.", rich_help_panel=TRAINING)
]
Ema = Annotated[
    float | None,
    typer.Option(
        help="Decay a step of an average of the weights, as 0.999: evaluated and saved too.", rich_help_panel=TRAINING
    ),
]
SyncBn = Annotated[
    bool,
    typer.Option("--sync-bn", help="BatchNorm over the images of all processes.", rich_help_panel=TRAINING),
]
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
Out = Annotated[
    Path | None,
    typer.Option(
        help="Folder for checkpoints (last.pt, best.pt), metrics.jsonl and TensorBoard's files.", rich_help_panel=OUTPUT
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Go on from last.pt in --out, bit for bit; its options hold.", rich_help_panel=OUTPUT
    ),
]
SaveEvery = Annotated[
    str, typer.Option(help="How often last.pt is written: 2epochs, 500steps.", rich_help_panel=OUTPUT)
]
Keep = Annotated[
    int, typer.Option(help="Let so many of the newest checkpoints stay as step-N.pt.", rich_help_panel=OUTPUT)
]
TensorBoard = Annotated[bool, typer.Option(help="Write TensorBoard's files to --out.", rich_help_panel=OUTPUT)]
WatchFlow = Annotated[
    int | None,
    typer.Option(help="Look at what flows through the layers every so many steps.", rich_help_panel=OUTPUT),
]
Metrics = Annotated[
    Path | None,
    typer.Option(help="Write every step, epoch and result to this file, as JSON lines.", rich_help_panel=OUTPUT),
]
Threads = Annotated[
    int | None,
    typer.Option(
        help="CPU threads. Layers of small images are too short to share.",
        rich_help_panel=MACHINE,
        show_default=f"1 below {SMALL_IMAGES} pixels, else PyTorch's",
    ),
]
