"""What the schedule is written in: the records that describe a block, and the primitives that a backend provides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from .features import Features, LazyGradient

Gradients = list[Tensor | None]


class Norm(NamedTuple):
    """A consumer's BatchNorm: scale and shift ``[C]``, and its own moments if it is frozen (evaluation mode)."""

    gamma: Tensor
    beta: Tensor
    eps: float
    frozen: tuple[Tensor, Tensor] | None = None  # running (mean, var), used instead of the batch's


class Pool(NamedTuple):
    """Pooling of what a BatchNorm and its ReLU make of some features: windows, one size for each spatial dimension."""

    kind: str  # "average" (disjoint windows), "maximum", or "mean": over all pixels of an image
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()

    def sizes(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """The spatial size of the output; none for ``"mean"``."""
        windows = zip(spatial, self.kernel, self.stride, self.padding, strict=self.kind != "mean")
        return tuple((size + 2 * padding - kernel) // stride + 1 for size, kernel, stride, padding in windows)

    @property
    def taps(self) -> int:
        """Pixels in a window."""
        return math.prod(self.kernel)


class Conv(NamedTuple):
    """BN-ReLU-Conv: the norm, the weight ``[out, in, *kernel]``, and which of (gamma, beta, weight) need gradients."""

    norm: Norm
    weight: Tensor
    needs: tuple[bool, bool, bool] = (True, True, True)
    operand: Tensor | None = None  # the weight as the backend reads it, if that is another tensor
    pool: Pool | None = None  # average pooling between the ReLU and a 1x1 convolution


class Dropout(NamedTuple):
    """Dropout after a layer's last convolution; the mask is a pure function of (seed, layer, element)."""

    seed: Tensor  # [1], int64
    layer: int
    p: float
    per_channel: bool  # one decision for each (image, channel), as nn.Dropout2d, instead of for each element


class Layer(NamedTuple):
    """One layer: it reads the first ``reads`` channels of the buffer and writes the ``writes`` that follow them."""

    reads: int  # C_l
    writes: int  # k
    conv1x1: Conv | None  # absent in the paper's basic layer
    conv3x3: Conv
    dropout: Dropout | None = None

    @property
    def convs(self) -> list[Conv]:
        """Its convolutions, in the order of their execution."""
        return [self.conv3x3] if self.conv1x1 is None else [self.conv1x1, self.conv3x3]

    @property
    def earlier(self) -> slice:
        """The channels of ``[H_0, ..., H_l]``."""
        return slice(0, self.reads)

    @property
    def new(self) -> slice:
        """The channels of ``H_{l+1}``."""
        return slice(self.reads, self.reads + self.writes)


class Backend(Protocol):
    """What a schedule asks of a backend, over rows of pixels, channels last, for one call of one block.

    Batch moments and BatchNorm's gradients belong to the primitive that produces the values: each merges its own
    partial sums. Another process's share of a channel's moments is merged with ``out.mean, out.var`` after the call,
    its share of ``a`` and ``b`` (linear in the sums) before they are read.
    """

    @property
    def m(self) -> int:
        """Values per channel."""

    def prepare(self, convs: Sequence[Conv]) -> Sequence[Conv]:
        """The convolutions with their weights as this backend reads them: a block's casts and copies in a few calls."""

    def moments(self, of: Features) -> None:
        """The batch moments of ``of``, from its rows."""

    def copy_with_moments(self, x: Tensor, out: Features) -> None:
        """``out = x``, with the moments of ``out`` if it is tracked."""

    def bn_relu_conv(self, source: Features, conv: Conv, out: Features, dropout: Dropout | None = None) -> None:
        """``out = dropout(conv(pool(relu(bn(source)))))``, with the moments of ``out`` as stored if it is tracked."""

    def bn_relu_pool(self, source: Features, norm: Norm, pool: Pool, out: Features) -> None:
        """``out = pool(relu(bn(source)))``, with the moments of ``out`` as stored if it is tracked."""

    def bn_relu_conv_backward(
        self,
        grad: LazyGradient,
        output: Features,
        conv: Conv,
        source: Features,
        into: LazyGradient | None,
        dropout: Dropout | None = None,
        *,
        accumulate: bool,
    ) -> Gradients:
        """``[dgamma, dbeta, dweight]``, each ``None`` if it is not needed, from ``grad`` of ``output``.

        With ``dy = pool^T(conv^T(grad)) * (relu's mask)``, adds ``gamma*r*dy`` to ``into.D`` and the batch statistics'
        share to ``into.a`` and ``into.b``, or writes them there.
        """

    def bn_relu_pool_backward(
        self, grad: Tensor, norm: Norm, pool: Pool, source: Features, into: LazyGradient | None
    ) -> Gradients:
        """``[dgamma, dbeta]`` from the output's gradient, rows ``[m_out, C]``; writes the input's to ``into``."""

    def gradient_buffer(self, of: Features) -> LazyGradient:
        """``(D, a, b)`` of a bottleneck, unwritten; ``D`` is shared by all of them."""

    def resolve(self, grad: LazyGradient, of: Features, out: Tensor | None = None) -> Tensor:
        """``D + a + b*(v - mu)`` as images ``[N, C, *spatial]``, in ``out`` (which may be ``D``'s memory) if given."""

    def finish(self) -> None:
        """Complete what was put off: the weights' gradients are whole only now."""
