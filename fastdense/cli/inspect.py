"""``fastdense inspect``: gradient flow and feature reuse of a model, as pictures and numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Column, Table
from typer import Option

from ..analysis.gradient_flow import BlockFlow, BlockReuse, feature_reuse, gradient_flow
from ..analysis.plain import without_dense_connections
from ..conversion.api import dense_blocks
from ..reference import widths
from ..training.checkpoint import replacing
from ..training.config import TrainConfig
from .options import errors_as_bad_options, give_options, provenance
from .subject import LARGE_STEM_IMAGE, Subject, batch, subject

inspect = typer.Typer(
    help="See a DenseNet's gradients flow and its features being used again.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_MODEL = "densenet121, 161, 169, 201, 264; or package.module:function of a model that fastdense.convert understands."
_OWN_SIZE = f"the data's own; {LARGE_STEM_IMAGE} for digits in front of an ImageNet stem"
_PLAIN = "Draw the same layers without dense connections beside it, freshly initialised."
_PLAIN_WEIGHTS = "Draw a network of `fastdense train --plain` instead: its checkpoint."
_EVALUATION = "BatchNorm with its running statistics, not with the batch's as in training."
NETWORK = {
    "model": (str | None, Option(None, help=_MODEL, show_default="as in `fastdense train`, or as --weights says")),
    "weights": (Path | None, Option(None, help="A checkpoint of `fastdense train`, or a file with a state_dict.")),
    "ema": (bool, Option(False, "--ema", help="Of a checkpoint, the averaged weights.")),
    "depth": (int | None, Option(None, help="Three equal blocks, as in `fastdense train`.", show_default="100")),
    "block_config": (str | None, Option(None, help="Layers of each block, as 6,12,24.")),
    "growth_rate": (int | None, Option(None, help="Channels that each layer adds.", show_default="12")),
    "seed": (int, Option(0, help="Of initial weights and noise.")),
}
SEEN = {
    "data": (str | None, Option(None, help="As in `fastdense train`, or random: noise.", show_default="as trained on")),
    "images": (int, Option(64, help="How many of the training images make the batch.", min=2)),
    "image_size": (int | None, Option(None, help="Height and width in pixels.", show_default=_OWN_SIZE)),
    "plain": (bool, Option(True, help=_PLAIN)),
    "plain_weights": (Path | None, Option(None, help=_PLAIN_WEIGHTS)),
    "evaluation": (bool, Option(False, "--eval", help=_EVALUATION)),
    "device": (str, Option("cpu", help="cpu, cuda, cuda:1. It computes in float64, which most GPUs are slow at.")),
}
JSON = {"json_file": (Path | None, Option(None, "--json", help="Write the matrices to this file too."))}
PLAIN = "the same layers without dense connections"
_right = partial(Column, justify="right")


def flow(context: typer.Context, *, out: Path, json_file: Path | None, **options: Any) -> None:
    """Where the gradient of each feature map comes from, and how large it is at every depth, for one batch.

    dLoss/dH_i is the sum of what every later layer sends back. Heat maps show the terms, curves the sums.
    """
    from ..analysis.plots import flow_picture  # matplotlib takes long to import, and no other command needs it

    seed, evaluation, device = options["seed"], options["evaluation"], options["device"]
    with errors_as_bad_options():
        looked_at = _subject(out, options)
        sizes = {"count": options["images"], "image_size": options["image_size"]}
        seen = batch(looked_at, options["data"], **sizes, seed=seed)
        kind = "without dense connections" if looked_at.plain else "DenseNet"
        networks = {f"{kind}, {looked_at.state}": looked_at, **_beside(looked_at, options)}
        at = TrainConfig(device=device).resolve_device()
        curves = {}
        with Console(highlight=False, markup=False).status("one step forward and backward, in float64"):
            for label, network in networks.items():
                model = network.model.train(not evaluation).to(at)
                curves[label] = gradient_flow(model, seen.images.to(at), seen.labels)
    loss = "cross-entropy" + ("" if seen.labels is not None else " against the model's own arg-max")
    statistics = "its running" if evaluation else "the batch"
    caption = f"Loss: {loss}, mean over {len(seen.images)} images of {seen.description}. BatchNorm takes {statistics} "
    caption += "statistics. Computed in float64."
    title = f"Gradient flow: {looked_at.description}, {looked_at.state}"
    record = {"title": title, "caption": caption, **_facts(looked_at, seed), "device": device, "dtype": "float64"}
    record |= {"loss": loss, "images": len(seen.images), "data": seen.description, "evaluation": evaluation}
    record["flows"] = {label: [_numbers(flow) for flow in flows] for label, flows in curves.items()}
    _finish(out, partial(flow_picture, curves, title=title, caption=caption), json_file, record, _flow_table(curves))


def reuse(context: typer.Context, *, out: Path, json_file: Path | None, **options: Any) -> None:
    """How strongly each layer reads each earlier feature map: figure 5 of the DenseNet paper, for your model."""
    from ..analysis.plots import reuse_picture

    with errors_as_bad_options():
        looked_at = _subject(out, options)
        if looked_at.plain:
            weights = options["weights"]
            raise ValueError(f"--weights {weights} is of a network without dense connections: it uses no feature again")
        found = feature_reuse(looked_at.model)
    title = f"Feature reuse: {looked_at.description}, {looked_at.state}"
    record = {"title": title, **_facts(looked_at, options["seed"]), "blocks": [_numbers(block) for block in found]}
    draw = partial(reuse_picture, found, title=title, caption="After arXiv 1608.06993, fig. 5.")
    _finish(out, draw, json_file, record, _reuse_table(found))


for _command, _options in ((flow, NETWORK | SEEN), (reuse, NETWORK)):
    _out = {"out": (Path, Option(Path(f"{_command.__name__}.png"), help="The picture."))}
    give_options(_command, _options | _out | JSON)
    inspect.command()(_command)


def _subject(out: Path, options: Mapping[str, Any]) -> Subject:
    if out.suffix.lower() != ".png":  # before anything is computed
        raise ValueError(f"--out must name a PNG file, as flow.png, got {out}")
    return subject(**{name: options[name] for name in NETWORK})


def _beside(looked_at: Subject, options: Mapping[str, Any]) -> dict[str, Subject]:
    """The network without dense connections to draw beside ``looked_at``, by its name in the legend, if any."""
    weights, seed = options["plain_weights"], options["seed"]
    if weights is None:
        if looked_at.plain or not options["plain"]:
            return {}
        torch.manual_seed(seed)
        return {f"{PLAIN}, freshly initialised": replace(looked_at, model=without_dense_connections(looked_at.model))}
    twin = subject(None, weights, options["ema"], seed)
    if not twin.plain:
        raise ValueError(f"--plain-weights {weights} is of a network with dense connections: use --weights")
    if twin.stem.in_channels != looked_at.stem.in_channels:
        other = f"{twin.stem.in_channels} channels, the other network of {looked_at.stem.in_channels}"
        raise ValueError(f"--plain-weights {weights} reads images of {other}: train both on the same data")
    return {f"{PLAIN}, {twin.state}": twin}


def _facts(of: Subject, seed: int) -> dict[str, Any]:
    """What it takes to reproduce the numbers, and each block's ``C_0 .. C_L``: the channels that its layers read."""
    channels = {name: widths(layers) for name, _, layers in dense_blocks(of.model)}
    return provenance("date") | {"network": of.description, "state": of.state, "seed": seed, "channels": channels}


def _finish(out: Path, draw: Callable[[Path], None], json_file: Path | None, record: Any, table: Table) -> None:
    _write(out, draw)
    if json_file is not None:
        _write(json_file, lambda partial: partial.write_text(json.dumps(record, indent=1) + "\n"))
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print(f"Picture: {out}", soft_wrap=True)


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            write(partial)
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be written: {error.strerror or error}") from error


def _numbers(block: BlockFlow | BlockReuse) -> dict[str, Any]:
    return {name: value if isinstance(value, str) else value.tolist() for name, value in vars(block).items()}


def _flow_table(curves: Mapping[str, Sequence[BlockFlow]]) -> Table:
    headings = map(_right, ("first layer's\noutput", "last layer's\noutput", "largest /\nsmallest"))
    table = Table("network", "block", *headings, caption="norm of the gradient of what a layer writes")
    for label, flows in curves.items():
        for block in flows:
            written = block.total[1:]  # H_0 has other channels
            ratio = written.max() / written.min()
            numbers = f"{written[0]:.2e}", f"{written[-1]:.2e}", f"{ratio:,.1f}" if ratio < 1e6 else f"{ratio:.1e}"
            table.add_row("" if block is not flows[0] else label, _short(block), *numbers)
    return table


def _reuse_table(found: Sequence[BlockReuse]) -> Table:
    headings = map(_right, ("layers", "of what enters\nthe block", "of the layer\njust before", "of all it reads"))
    table = Table("block", *headings, caption="mean absolute weight, averaged over the layers that read")
    for block in found:
        L = block.weights.shape[1]
        reads = sum(block.weights[: j + 1, j].mean() for j in range(L)) / L
        means = (block.weights[0].mean(), block.weights.diagonal().mean(), reads)
        table.add_row(_short(block), str(L), *(f"{mean:.4f}" for mean in means))
    return table


def _short(block: BlockFlow | BlockReuse) -> str:
    return block.name.removeprefix("features.")
