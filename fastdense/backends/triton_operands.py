"""How tensors are handed to the kernels: weights, strides, and what divides them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.features import Features
from ..core.primitives import Conv, Dropout, Norm

NO_DROPOUT = (0, 0, 0.0)  # layer, threshold, scale


class Weight(NamedTuple):
    """A convolution's weight ``[out, in, *kernel]`` in the feature dtype, as the kernels address it."""

    values: Tensor
    strides: tuple[int, int, int]  # of output channel, input channel, tap
    kernel: tuple[int, int, int]  # depth, height, width

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @classmethod
    def of(cls, conv: Conv) -> Weight:
        weight = conv.weight if conv.operand is None else conv.operand
        tap = tap_stride(weight)
        if tap is None:
            weight, tap = weight.contiguous(), 1
        return cls(weight, (weight.stride(0), weight.stride(1), tap), three(weight.shape[2:]))


def three(sizes: Sequence[int]) -> tuple[int, int, int]:
    """One to three sizes as depth, height, width."""
    depth, height, width = (1,) * (3 - len(sizes)) + tuple(sizes)
    return depth, height, width


def tap_stride(weight: Tensor) -> int | None:
    """The distance between neighbouring taps, if all of them lie equally far apart."""
    tap, taps = 0, 1
    for size, stride in zip(reversed(weight.shape[2:]), reversed(weight.stride()[2:]), strict=True):
        if size == 1:
            continue
        if taps == 1:
            tap = stride
        elif stride != tap * taps:
            return None
        taps *= size
    return tap


def is_channels_last(weight: Tensor) -> bool:
    """Whether neighbouring input channels lie side by side, with all taps equally far apart."""
    return (weight.stride(1) == 1 or weight.shape[1] == 1) and tap_stride(weight) is not None


def unit_of(itemsize: int, *numbers: int) -> int:
    """The largest power of two, up to 16 bytes of elements, that divides all ``numbers``."""
    return math.gcd(16 // itemsize, *numbers)


def weight_unit(weight: Tensor) -> int:
    """What divides the number of input channels and every stride but theirs, for wide loads and stores."""
    tap = tap_stride(weight) or 0
    return unit_of(weight.element_size(), weight.shape[1], weight.stride(0), tap) if weight.stride(1) == 1 else 1


def dense_like(weight: Tensor) -> Tensor:
    """Uninitialised fp32 with the layout of ``weight``, without gaps."""
    out = torch.empty_like(weight, dtype=torch.float32)
    return out if tap_stride(out) is not None else torch.empty(weight.shape, dtype=torch.float32, device=weight.device)


def norm_vectors(norm: Norm, source: Features) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``mean, var, gamma, beta`` as one BatchNorm uses them."""
    mean, var = norm.frozen or (source.mean, source.var)
    assert mean is not None and var is not None
    return mean, var, norm.gamma, norm.beta


def readable(rows: Tensor) -> int:
    """In units of how many channels rows may be read beyond their last one: there is memory, of whatever content."""
    (m, channels), stride, itemsize = rows.shape, rows.stride(0), rows.element_size()
    first = int(rows.storage_offset())
    unit = unit_of(itemsize, stride, first % stride)
    end = first + (m - 1) * stride + -(-channels // unit) * unit
    return unit if end * itemsize <= rows.untyped_storage().nbytes() else unit_of(itemsize, stride, channels)


def dropout_arguments(dropout: Dropout | None) -> tuple[int, int, float]:
    """Layer, threshold of 32 random bits, and the scale of what is kept."""
    if dropout is None:
        return NO_DROPOUT
    return dropout.layer, round(dropout.p * 2**32), 1 / (1 - dropout.p) if dropout.p < 1 else 0.0
