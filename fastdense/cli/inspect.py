"""``fastdense inspect``: gradient flow and feature reuse of a model, as pictures and numbers."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from typer import Option

from ..analysis.gradient_flow import BlockFlow, BlockReuse, feature_reuse, gradient_flow
from ..analysis.plain import without_dense_connections
from ..conversion.blocks import dense_blocks
from ..environment import versions
from ..reference import widths
from ..training.config import TrainConfig
from .subject import LARGE_STEM_IMAGE, Batch, Subject, batch, subject

__all__ = ["inspect"]

inspect = typer.Typer(
    help="See a DenseNet's gradients flow and its features being used again.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_MODEL = (
    "densenet121, 161, 169, 201 or 264, named in full; or package.module:function of any model that "
    "fastdense.convert understands, as torchvision.models:densenet121."
)
_OWN_NETWORK = "what --weights says, or the network that `fastdense train` trains"
_WEIGHTS = "A checkpoint of `fastdense train`, or a file with a state_dict."
_DATA = "digits, a folder of images or of CIFAR's files, or random: noise."
_OWN_SIZE = f"the data's own; {LARGE_STEM_IMAGE} for digits in front of an ImageNet stem"
_PLAIN = "Draw the same layers without dense connections beside it, freshly initialised."
_PLAIN_WEIGHTS = "Draw a network of `fastdense train --plain` instead: its checkpoint."
_EVALUATION = "BatchNorm with its running statistics, not with the batch's as in training."
_DEVICE = "cpu, cuda, cuda:1. It computes in float64, which most GPUs are slow at."
Model = Annotated[str | None, Option(help=_MODEL, show_default=_OWN_NETWORK)]
Weights = Annotated[Path | None, Option(help=_WEIGHTS, show_default="none: untrained")]
Ema = Annotated[bool, Option("--ema", help="Of a checkpoint, the averaged weights.")]
Depth = Annotated[int | None, Option(help="Three equal blocks, as in `fastdense train`.", show_default="100")]
Blocks = Annotated[str | None, Option(help="Layers of each block, as 6,12,24.")]
GrowthRate = Annotated[int | None, Option(help="Channels that each layer adds.", show_default="12")]
Data = Annotated[str | None, Option(help=_DATA, show_default="what --weights was trained on, or digits")]
Images = Annotated[int, Option(help="How many of the training images make the batch.", min=2)]
ImageSize = Annotated[int | None, Option(help="Height and width in pixels.", show_default=_OWN_SIZE)]
Plain = Annotated[bool, Option(help=_PLAIN)]
PlainWeights = Annotated[Path | None, Option(help=_PLAIN_WEIGHTS)]
Evaluation = Annotated[bool, Option("--eval", help=_EVALUATION)]
Seed = Annotated[int, Option(help="Of initial weights and noise.")]
Device = Annotated[str, Option(help=_DEVICE)]
Out = Annotated[Path, Option(help="The picture.")]
Json = Annotated[Path | None, Option("--json", help="Write the matrices to this file too.")]
PLAIN = "the same layers without dense connections"


@inspect.command()
def flow(
    model: Model = None,
    weights: Weights = None,
    ema: Ema = False,
    depth: Depth = None,
    block_config: Blocks = None,
    growth_rate: GrowthRate = None,
    data: Data = None,
    images: Images = 64,
    image_size: ImageSize = None,
    plain: Plain = True,
    plain_weights: PlainWeights = None,
    evaluation: Evaluation = False,
    seed: Seed = 0,
    device: Device = "cpu",
    out: Out = Path("flow.png"),
    json_file: Json = None,
) -> None:
    """Where the gradient of each feature map comes from, and how large it is at every depth, for one batch.

    dLoss/dH_i is the sum of what every later layer sends back. Heat maps show the terms, curves the sums.
    """
    from ..analysis.plots import flow_picture  # matplotlib takes long to import, and no other command needs it

    with _errors(out):
        looked_at = subject(model, weights, ema, seed, depth, block_config, growth_rate)
        seen = batch(looked_at, data, count=images, image_size=image_size, seed=seed)
        networks = {f"{looked_at.kind}, {looked_at.state}": looked_at}
        networks |= _beside(looked_at, plain, plain_weights, ema, seed)
        with Console(highlight=False, markup=False).status("one step forward and backward, in float64"):
            curves = {label: _flows(network, seen, device, evaluation) for label, network in networks.items()}
    loss = "cross-entropy" + ("" if seen.labels is not None else " against the model's own arg-max")
    caption = (
        f"Loss: {loss}, mean over {len(seen.images)} images of {seen.description}. BatchNorm takes "
        f"{'its running' if evaluation else 'the batch'} statistics. Computed in float64."
    )
    title = f"Gradient flow: {looked_at.description}, {looked_at.state}"
    record = {"title": title, "caption": caption, **_facts(looked_at, seed), "device": device, "dtype": "float64"}
    record |= {"loss": loss, "images": len(seen.images), "data": seen.description, "evaluation": evaluation}
    record["flows"] = {label: [_numbers(flow) for flow in flows] for label, flows in curves.items()}
    draw = partial(flow_picture, curves, title=title, caption=caption)
    _finish(out, draw, json_file, record, _flow_table(curves))


@inspect.command()
def reuse(
    model: Model = None,
    weights: Weights = None,
    ema: Ema = False,
    depth: Depth = None,
    block_config: Blocks = None,
    growth_rate: GrowthRate = None,
    seed: Seed = 0,
    out: Out = Path("reuse.png"),
    json_file: Json = None,
) -> None:
    """How strongly each layer reads each earlier feature map: figure 5 of the DenseNet paper, for your model."""
    from ..analysis.plots import reuse_picture

    with _errors(out):
        looked_at = subject(model, weights, ema, seed, depth, block_config, growth_rate)
        if looked_at.plain:
            raise ValueError(f"--weights {weights} is of a network without dense connections: it uses no feature again")
        found = feature_reuse(looked_at.model)
    title = f"Feature reuse: {looked_at.description}, {looked_at.state}"
    record = {"title": title, **_facts(looked_at, seed), "blocks": [_numbers(block) for block in found]}
    draw = partial(reuse_picture, found, title=title, caption="After arXiv 1608.06993, fig. 5.")
    _finish(out, draw, json_file, record, _reuse_table(found))


@contextmanager
def _errors(out: Path) -> Iterator[None]:
    """Wrong options become one line and an exit code, also the name of a picture, before anything is computed."""
    try:
        if out.suffix.lower() != ".png":
            raise ValueError(f"--out must name a PNG file, as flow.png, got {out}")
        yield
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from error


def _beside(looked_at: Subject, plain: bool, weights: Path | None, ema: bool, seed: int) -> dict[str, Subject]:
    """The network without dense connections to draw beside ``looked_at``, by its name in the legend, if any."""
    if weights is None:
        if looked_at.plain or not plain:
            return {}
        torch.manual_seed(seed)
        return {f"{PLAIN}, freshly initialised": replace(looked_at, model=without_dense_connections(looked_at.model))}
    twin = subject(None, weights, ema, seed)
    if not twin.plain:
        raise ValueError(f"--plain-weights {weights} is of a network with dense connections: use --weights")
    if twin.stem.in_channels != looked_at.stem.in_channels:
        raise ValueError(
            f"--plain-weights {weights} reads images of {twin.stem.in_channels} channels, the other network of "
            f"{looked_at.stem.in_channels}: train both on the same data"
        )
    return {f"{PLAIN}, {twin.state}": twin}


def _flows(of: Subject, seen: Batch, device: str, evaluation: bool) -> list[BlockFlow]:
    at = TrainConfig(device=device).resolve_device()
    return gradient_flow(of.model.train(not evaluation).to(at), seen.images.to(at), seen.labels)


def _facts(of: Subject, seed: int) -> dict[str, Any]:
    """What it takes to reproduce the numbers, and each block's ``C_0 .. C_L``: the channels that its layers read."""
    return {
        "command": shlex.join(["fastdense", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "network": of.description,
        "state": of.state,
        "seed": seed,
        "channels": {name: widths(layers) for name, _, layers in dense_blocks(of.model)},
    }


def _finish(
    out: Path, draw: Callable[[Path], None], json_file: Path | None, record: dict[str, Any], table: Table
) -> None:
    _write(out, draw)
    if json_file is not None:
        _write(json_file, lambda unfinished: unfinished.write_text(json.dumps(record, indent=1) + "\n"))
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print(f"Picture: {out}", soft_wrap=True)


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make ``path``, which is there as a whole or as it was."""
    unfinished = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(unfinished)
        unfinished.replace(path)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise typer.BadParameter(f"{path} cannot be written: {error.strerror or error}") from error


def _numbers(block: BlockFlow | BlockReuse) -> dict[str, Any]:
    return {name: value if isinstance(value, str) else value.tolist() for name, value in vars(block).items()}


def _table(left: Sequence[str], right: Sequence[str], caption: str) -> Table:
    table = Table(caption=caption)
    for heading in (*left, *right):
        table.add_column(heading, justify="left" if heading in left else "right")
    return table


def _flow_table(curves: Mapping[str, Sequence[BlockFlow]]) -> Table:
    headings = ("first layer's\noutput", "last layer's\noutput", "largest /\nsmallest")
    table = _table(("network", "block"), headings, "norm of the gradient of what a layer writes")
    for label, flows in curves.items():
        for i, block in enumerate(flows):
            written = block.total[1:]  # H_0 has other channels
            ratio = (written.max() / written.min()).item()
            spread = f"{ratio:,.1f}" if ratio < 1e6 else f"{ratio:.1e}"
            numbers = f"{written[0].item():.2e}", f"{written[-1].item():.2e}", spread
            table.add_row("" if i else label, _short(block), *numbers, end_section=block is flows[-1])
    return table


def _reuse_table(found: Sequence[BlockReuse]) -> Table:
    headings = ("layers", "of what enters\nthe block", "of the layer\njust before", "of all it reads")
    table = _table(("block",), headings, "mean absolute weight, averaged over the layers that read")
    for block in found:
        L = block.weights.shape[1]
        reads = [block.weights[: j + 1, j].mean().item() for j in range(L)]
        means = (block.weights[0].mean().item(), block.weights.diagonal().mean().item(), sum(reads) / L)
        table.add_row(_short(block), str(L), *(f"{mean:.4f}" for mean in means))
    return table


def _short(block: BlockFlow | BlockReuse) -> str:
    return block.name.removeprefix("features.")
