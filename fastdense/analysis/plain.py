"""The same network without dense connections, to compare with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..conversion.api import dense_blocks, with_dense_blocks
from ..reference import BATCH_NORM, CONV, stages, widths


class PlainBlock(nn.ModuleDict):
    """A dense block's layers as a chain: layer ``l`` reads ``H_l`` alone, and the last output alone leaves the block.

    Shapes and settings are those of ``layers`` of a dense block, values are not. It maps ``[N, C0, *spatial]`` to
    ``[N, C0 + sum(k), *spatial]``, so that what follows fits: zeros, then ``H_L``.
    """

    watch: Callable[[Sequence[Tensor]], None] | None = None  # is shown H_0 .. H_L of each forward pass

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()
        C = widths(layers)
        for i, layer in enumerate(layers):
            self.add_module(f"denselayer{i + 1}", _plain_layer(layer, C[i] - C[i - 1] if i else C[0]))
        self.padding = C[-2]  # C0 + (L - 1)*k

    def forward(self, x: Tensor) -> Tensor:
        """Zeros for all that a dense block would pass on besides its last output."""
        features = [x]
        for layer in self.values():
            features.append(layer(features[-1]))
        if self.watch is not None:
            self.watch(features)
        return F.pad(features[-1], (0, 0) * (x.dim() - 2) + (self.padding, 0))


def without_dense_connections(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in which every layer reads the one before it, and nothing else.

    The layers' weights are drawn anew (He et al.'s normal, as in DenseNet): they read fewer channels. Everything
    outside the dense blocks keeps its values. ``ValueError`` if no block is own, converted, or one for ``convert``.
    """
    given = with_dense_blocks(model)
    model = copy.deepcopy(given) if given is model else given
    for name, _, layers in list(dense_blocks(model)):
        block = PlainBlock(layers).train(layers[0].norm1.training)
        if not name:
            return block
        model.set_submodule(name, block)
    return model


def _plain_layer(layer: Any, channels: int) -> nn.Sequential:
    """BN-ReLU-Conv, once or twice, and dropout."""
    plain = nn.Sequential()
    for number in range(1, 1 + len(stages(layer))):
        norm, conv = getattr(layer, f"norm{number}"), getattr(layer, f"conv{number}")
        dims, where = conv.weight.dim() - 2, {"device": conv.weight.device, "dtype": conv.weight.dtype}
        own_norm = BATCH_NORM[dims](channels, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, **where)
        own_conv: Any = CONV[dims](
            channels, conv.out_channels, conv.kernel_size, padding=conv.padding, bias=False, **where
        )
        with torch.no_grad():
            nn.init.kaiming_normal_(own_conv.weight)
        plain.add_module(f"norm{number}", own_norm)
        plain.add_module(f"relu{number}", nn.ReLU(inplace=True))
        plain.add_module(f"conv{number}", own_conv)
        channels = conv.out_channels
    if layer.drop_rate > 0:
        plain.add_module("dropout", nn.Dropout(layer.drop_rate))
    return plain
