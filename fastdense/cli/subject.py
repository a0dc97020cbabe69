"""What ``fastdense inspect`` looks at: a network, its weights, and a batch of images."""

from __future__ import annotations

import pkgutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion.api import with_dense_blocks
from ..data.source import open_data
from ..training import checkpoint
from ..training.config import TrainConfig, flag, parse
from .options import FIELDS

LARGE_STEM_IMAGE = 64  # pixels for a model from elsewhere, whose stem divides them by 4
RANDOM = "random"


@dataclass(frozen=True)
class Subject:
    """A network to look at, in training mode."""

    model: nn.Module
    description: str  # for a picture's title
    state: str  # where the weights come from
    data: str | None = None  # what a checkpoint was trained on
    image_size: int | None = None
    plain: bool = False  # without dense connections

    @property
    def stem(self) -> Any:
        convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        return next(module for module in self.model.modules() if isinstance(module, convolutions))


@dataclass(frozen=True)
class Batch:
    """Images ``[n, C, *spatial]`` float32, their classes ``[n]`` if the network knows these, and what they are."""

    images: Tensor
    labels: Tensor | None
    description: str


def subject(model: str | None, weights: Path | None, ema: bool = False, seed: int = 0, **network: Any) -> Subject:
    """Builds the network that the options of ``fastdense inspect`` describe, with its weights.

    ``model`` is a name in ``NAMED`` or ``"package.module:function"``, ``weights`` a checkpoint of ``fastdense train``,
    which describes its network, or a file with a ``state_dict``. ``network`` holds ``depth``, ``block_config`` and
    ``growth_rate``. Raises ``ValueError`` if an option contradicts another, or the file does not fit.
    """
    network = {name: parse(FIELDS[name], value) for name, value in {"model": model, **network}.items()}
    named = [flag(name) for name, value in network.items() if value is not None]
    stored = {} if weights is None else _read(weights)
    torch.manual_seed(seed)
    if "config" in stored and "runs" in stored:
        if named:
            raise ValueError(f"{named[0]} is not needed: the checkpoint {weights} says which network it is of")
        return _from_checkpoint(stored, weights, ema)
    if ema:
        raise ValueError("--ema is for --weights with a checkpoint of `fastdense train --ema`")
    if model is not None and ":" in model:
        if named[1:]:
            raise ValueError(f"{named[1]} is for fastdense's own networks, not for --model {model}")
        built, description = with_dense_blocks(_imported(model)), model
    else:
        own = TrainConfig(**network, image_size=None if model is None else LARGE_STEM_IMAGE).architecture
        channels, classes = (1, 10) if model is None else (3, 1000)
        first, last = stored.get("features.conv0.weight"), stored.get("classifier.weight")  # torchvision's names
        if isinstance(first, Tensor) and isinstance(last, Tensor):
            channels, classes = first.shape[1], last.shape[0]
        built, description = own.build(channels=channels, classes=classes), own.description
    if weights is None:
        return Subject(built, description, "freshly initialised")
    _load(built, stored, weights)
    return Subject(built, description, f"weights of {weights.name}")


def batch(of: Subject, data: str | None, *, count: int, image_size: int | None, seed: int) -> Batch:
    """Returns ``count`` images that ``of.model`` can read: the first of the training images, or noise.

    ``ValueError`` if there is no such data, it has too few images, or the network reads other channels.
    """
    data = data or of.data or "digits"
    channels, spatial_dims = of.stem.in_channels, of.stem.weight.dim() - 2
    if data == RANDOM:
        shape = [image_size or of.image_size or LARGE_STEM_IMAGE] * spatial_dims
        images = torch.randn(count, channels, *shape, generator=torch.Generator().manual_seed(seed))
        return Batch(images, None, f"noise, {'x'.join(map(str, shape))}")
    if spatial_dims != 2:
        theirs = f"the network reads {spatial_dims}D ones"
        raise ValueError(f"--data {data} has flat images and {theirs}: use --data {RANDOM}")
    size: int | None = image_size or (of.image_size if data == of.data else None)
    if size is None and data == "digits" and max(of.stem.stride) > 1:
        size = LARGE_STEM_IMAGE
    try:
        source = open_data(data, image_size=size, augment="none")
    except ValueError as error:
        raise ValueError(f"{error} (or --data {RANDOM})") from error
    if count > source.train_count:
        raise ValueError(f"--images must be at most {source.train_count}, the training images, got {count}")
    images, labels = next(iter(source.train([torch.arange(count)], epoch=1)))
    if images.shape[1] == 1 < channels:
        images = images.expand(-1, channels, -1, -1)
    if images.shape[1] != channels:
        theirs = f"those of --data {data} have {images.shape[1]}"
        raise ValueError(f"the network reads images of {channels} channels, {theirs}")
    scores = [module.out_features for module in of.model.modules() if isinstance(module, nn.Linear)]
    return Batch(images, labels if scores and scores[-1] >= source.classes else None, source.name)


def _imported(spec: str) -> nn.Module:
    if "" not in sys.path:
        sys.path.insert(0, "")  # the user's own files, as `python -m` finds them
    try:
        model = pkgutil.resolve_name(spec)()
    except Exception as error:  # user code may raise anything when it is imported or called
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"--model {spec} cannot be built ({reason}): it must be package.module:function") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {spec} returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def _read(path: Path) -> dict[str, Any]:
    try:
        found = checkpoint.read(path, ": save a state_dict with torch.save")
    except ValueError as error:
        raise ValueError(f"--weights {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"--weights {path} holds a {type(found).__name__}, not a state_dict")
    return found


def _from_checkpoint(stored: dict[str, Any], path: Path | None, ema: bool) -> Subject:
    """The last of a checkpoint's runs: with ``--compare`` fastdense's, not the reference block's."""
    config = TrainConfig(**stored["config"])
    run = list(stored["runs"].values())[-1]
    if ema and run["ema"] is None:
        raise ValueError(f"--weights {path} has no averaged weights: leave --ema out")
    weights = run["ema"]["model"] if ema else run["model"]
    sizes = {name: stored["data"][name] for name in ("channels", "classes")}
    model = config.architecture.build(**sizes, drop_rate=config.drop_rate)
    _load(model, weights, path)
    state = f"{'averaged weights ' if ema else ''}after {stored['step']:,} steps"
    return Subject(model, config.architecture.description, state, config.data, config.image_size, config.plain)


def _load(model: nn.Module, weights: dict[str, Any], path: Path | None) -> None:
    for key in ("state_dict", "model"):  # as many files wrap it
        weights = weights[key] if isinstance(weights.get(key), dict) else weights
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = [*str(error).splitlines()[1:], str(error)][0].strip()[:200]
        network = "the network that --model, --depth, --block-config and --growth-rate describe"
        raise ValueError(f"--weights {path} does not fit {network}: {first}") from error
