"""Converted networks, what may be changed in them later, and the ways in which copies of them are made."""

import copy
import functools
import io
from typing import Any

import torch
from torch import Tensor, nn

import fastdense
from fastdense.conversion.converted import KINDS, Converted
from helpers import foreign
from helpers.blocks import random_input, randomise

BLOCKS = {"block1": "block", "between": "transition", "block2": "block"}
FEATURES = {
    "features": "stem", "features.denseblock1": "block", "features.transition1": "transition",
    "features.denseblock2": "block",
}  # fmt: skip


def twins(net: nn.Module, **options: Any) -> tuple[Any, Any]:
    """``net`` with random statistics, and its converted copy."""
    randomise(net)
    return net, fastdense.convert(copy.deepcopy(net), **options)


@functools.cache
def _made(style: str) -> tuple[Any, Any, tuple[int, ...]]:
    net, shape = foreign.build(style)
    return *twins(net), shape


def pair(style: str = "list", **options: Any) -> tuple[Any, Any, Tensor]:
    """A network of one of ``foreign.STYLES``, its converted copy, and an input; each call has copies of its own."""
    theirs, ours, shape = copy.deepcopy(_made(style))
    torch.manual_seed(0)  # whether this call made them or an earlier one
    return theirs, fastdense.convert(ours, **options), random_input(shape)


def kinds(model: nn.Module) -> dict[str, str]:
    """The names of what is converted, and what it is."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Converted)}
    return {name: KINDS[type(module._fastdense)] for name, module in found.items() if "_fastdense" in vars(module)}


def types(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def _save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _replica(model: nn.Module) -> nn.Module:
    """What DataParallel makes of every module."""
    replica = model._replicate_for_data_parallel()
    for name, child in model._modules.items():
        if child is not None:
            replica._modules[name] = _replica(child)
    for name, parameter in model._parameters.items():
        setattr(replica, name, parameter)
    return replica


COPIES = {
    "deepcopy": copy.deepcopy, "save": _save, "replica": _replica,
    "averaged": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
}  # fmt: skip
