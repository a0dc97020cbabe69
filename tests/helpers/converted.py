"""Converted networks, and the ways in which copies of them are made."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
from torch import Tensor, nn

import fastdense
from helpers import foreign
from helpers.blocks import random_input, randomise

SHAPES = {1: (3, 3, 23), 2: (2, 3, 13, 10), 3: (2, 3, 9, 10, 11)}


def stem_pair(dims: int = 2, **options: Any) -> tuple[Any, Any, Tensor]:
    torch.manual_seed(0)
    theirs = foreign.Features(foreign.AppendingBlock if dims != 2 else foreign.StarBlock, dims).double()
    randomise(theirs)
    return theirs, fastdense.convert(copy.deepcopy(theirs), **options), random_input(SHAPES[dims])


def _deepcopy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def _pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _averaged(model: nn.Module) -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(model).module


def _replica(model: nn.Module) -> nn.Module:
    """What DataParallel makes of every module."""
    replica = model._replicate_for_data_parallel()
    for name, child in model._modules.items():
        if child is not None:
            replica._modules[name] = _replica(child)
    for name, parameter in model._parameters.items():
        setattr(replica, name, parameter)
    return replica


COPIES = {f.__name__.strip("_"): f for f in (_deepcopy, _pickle, _save, _averaged, _replica)}
