"""The dense blocks of any model, and their layers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..nn import DenseBlock
from .api import convert
from .converted import BlockSpec, Converted, block_layers


def dense_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[Any]]]:
    """Every dense block of ``model``, own or converted: its name, itself, and its layers.

    A layer has ``norm1, conv1``, maybe ``norm2, conv2`` in ``_modules``, and ``drop_rate``. ``ValueError`` where a
    converted block cannot run fused any more: a hook on an inner layer, for instance.
    """
    for name, module in model.named_modules():
        if isinstance(module, DenseBlock):
            yield name, module, list(module.values())
        elif _is_converted(module):
            layers, reason = block_layers(module)
            if reason is not None:
                raise ValueError(f"the block {name or 'that the model is'} cannot run fused: {reason}")
            yield name, module, layers


def with_dense_blocks(model: nn.Module) -> nn.Module:
    """``model``, or a converted copy where none of its blocks is ours; ``ValueError`` if it has no dense block."""
    if any(isinstance(module, DenseBlock) or _is_converted(module) for module in model.modules()):
        return model
    model = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert(model)
    if not any(map(_is_converted, model.modules())):
        raise ValueError(
            f"this {type(model).__name__} has no dense block that fastdense understands: fastdense.plan(model) says why"
        )
    return model


def _is_converted(module: nn.Module) -> bool:
    return isinstance(module, Converted) and isinstance(vars(module).get("_fastdense"), BlockSpec)
