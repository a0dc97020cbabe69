"""How feature maps and their gradients lie in memory, and the two small records that the schedule passes round.

Feature maps are kept channels last, as *rows*: ``rows[p, c]`` is channel ``c`` of pixel ``p``, where ``p`` runs
over batch and space together, so that a BatchNorm averages over ``m = N*H*W`` rows and a 1x1 convolution is one
matrix product. A layer reads the channels ``[:C_l]`` of its block's buffer and writes ``[C_l : C_l+k]``: slices,
never copies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROW_ALIGNMENT_BYTES = 16
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # rank: memory format


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, moments and lazy coefficients: float64 for float64 features, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_stride(channels: int, dtype: torch.dtype) -> int:
    """``channels``, rounded up so that rows fill whole 16-byte words."""
    per_word = max(1, ROW_ALIGNMENT_BYTES // dtype.itemsize)
    return (channels + per_word - 1) // per_word * per_word


def empty_features(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised ``[N, C, *spatial]`` tensor, channels last, every pixel's row aligned to 16 bytes.

    The row stride is ``C`` itself wherever ``C`` elements fill whole 16-byte words, as in every named DenseNet; the
    result is then contiguous in PyTorch's ``channels_last`` sense. It owns its memory (it is no view), so that the
    user may modify it in place like the output of any other operator.
    """
    n, channels, *spatial = shape
    row = row_stride(channels, dtype)
    strides = [row * math.prod(spatial), 1]
    strides += [row * math.prod(spatial[axis + 1 :]) for axis in range(len(spatial))]
    return torch.empty_strided((n, channels, *spatial), strides, dtype=dtype, device=device)


_CHANNELS_TO_LAST = {3: (0, 2, 1), 4: (0, 2, 3, 1), 5: (0, 2, 3, 4, 1)}  # rank: permutation
_CHANNELS_TO_SECOND = {3: (0, 2, 1), 4: (0, 3, 1, 2), 5: (0, 4, 1, 2, 3)}


def as_rows(images: Tensor) -> Tensor:
    """View channels-last ``[N, C, *spatial]`` as rows ``[m, C]``; raises if that would need a copy."""
    n, channels, *spatial = images.shape
    return images.permute(_CHANNELS_TO_LAST[images.dim()]).view(n * math.prod(spatial), channels)


def as_images(rows: Tensor, spatial: Sequence[int]) -> Tensor:
    """View rows ``[n*prod(spatial), C]`` as channels-last images ``[n, C, *spatial]``."""
    m, channels = rows.shape
    images = rows.view(m // max(1, math.prod(spatial)), *spatial, channels)
    return images.permute(_CHANNELS_TO_SECOND[len(spatial) + 2])


@dataclass(frozen=True, slots=True)
class Features:
    """Feature maps with their batch moments.

    Attributes:
        rows: values ``[m, C]`` in the feature dtype, usually a channel slice of a wider buffer.
        mean: batch mean of each channel ``[C]``, in the accumulation dtype; ``None`` where no consumer asks for it.
        var: biased batch variance of each channel ``[C]``, likewise.
    """

    rows: Tensor
    mean: Tensor | None
    var: Tensor | None

    def __getitem__(self, channels: slice) -> Features:
        if self.mean is None or self.var is None:
            return Features(self.rows[:, channels], None, None)
        return Features(self.rows[:, channels], self.mean[channels], self.var[channels])

    def without_moments(self) -> Features:
        """The same rows, for a write whose moments are not wanted."""
        return Features(self.rows, None, None)


@dataclass(frozen=True, slots=True)
class LazyGradient:
    """The gradient of some features ``v`` whose BatchNorm corrections have not been applied yet.

    It stands for ``grad(v) = D + a + b*(v - mu)``. The correction that BatchNorm makes for its batch statistics is
    affine in ``v`` with coefficients per channel, and coefficients of several consumers simply add up; so each of
    them adds ``gamma*r*dy`` to ``D`` and two numbers per channel to ``a`` and ``b``, and ``grad(v)`` is formed
    while it is loaded. docs/algorithm.md derives it.

    Attributes:
        D: direct part ``[m, C]``, in the feature dtype.
        a, b: coefficients ``[C]`` in the accumulation dtype; ``None`` where no consumer uses batch statistics.
        start: the first channel of the buffer that has a gradient; slices are given in the buffer's numbering.
        balanced: whether it sums to 0 over the pixels in every channel, as what comes through a BatchNorm alone does.
    """

    D: Tensor
    a: Tensor | None
    b: Tensor | None
    start: int = 0
    balanced: bool = False

    def __getitem__(self, channels: slice) -> LazyGradient:
        lo = max((channels.start or 0) - self.start, 0)
        hi = channels.stop - self.start
        if self.a is None or self.b is None:
            return LazyGradient(self.D[:, lo:hi], None, None, self.start + lo, self.balanced)
        return LazyGradient(self.D[:, lo:hi], self.a[lo:hi], self.b[lo:hi], self.start + lo, self.balanced)
