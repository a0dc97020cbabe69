"""What the schedule is written in: the records that describe a block, and the primitives that a backend provides."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from .features import Features, LazyGradient

Sums = tuple[Tensor, Tensor]  # sum(dy) and sum(dy*(v - mu)), each [C] in the accumulation dtype


class Norm(NamedTuple):
    """One reader's BatchNorm: scale and shift ``[C]``, and its own moments if it is frozen (evaluation mode)."""

    gamma: Tensor
    beta: Tensor
    eps: float
    frozen: tuple[Tensor, Tensor] | None = None  # running (mean, var), used instead of the batch's


class Conv(NamedTuple):
    """BN-ReLU-Conv: the norm, the weight ``[out, in, *kernel]``, and which of (gamma, beta, weight) need gradients."""

    norm: Norm
    weight: Tensor
    needs: tuple[bool, bool, bool] = (True, True, True)


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
    def earlier(self) -> slice:
        """The channels of ``[H_0, ..., H_l]``."""
        return slice(0, self.reads)

    @property
    def new(self) -> slice:
        """The channels of ``H_{l+1}``."""
        return slice(self.reads, self.reads + self.writes)


class Backend(Protocol):
    """Five primitives over rows of pixels, channels last, for one call of one block.

    The two merges are apart from their producers so that other processes' shares can be added in between.
    """

    @property
    def m(self) -> int:
        """Values per channel."""

    def copy_with_moments(self, x: Tensor, out: Features) -> Any:
        """``out = x``; returns partial moments of ``out`` (``None`` if it is not tracked)."""

    def bn_relu_conv(self, source: Features, conv: Conv, out: Features, dropout: Dropout | None = None) -> Any:
        """``out = dropout(conv(relu(bn(source))))``; returns partial moments of ``out`` as stored, or ``None``."""

    def merge_moments(self, partial: Any, out: Features) -> None:
        """Partial moments into ``out.mean, out.var``, by Chan's formula."""

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
    ) -> tuple[Tensor | None, Sums | None]:
        """With ``dy = conv^T(grad) * (relu's mask)``, add ``gamma*r*dy`` to ``into.D``, or write it there.

        Returns the weight's gradient and the sums ``sum(dy), sum(dy*(v - mu))``, each ``None`` if nobody needs it.
        """

    def merge_gradients(
        self, sums: Sums, norm: Norm, source: Features, into: LazyGradient | None
    ) -> tuple[Tensor, Tensor]:
        """``dgamma, dbeta`` from the sums; the batch statistics' share goes to ``into.a`` and ``into.b``."""

    def gradient_buffer(self, of: Features) -> LazyGradient:
        """``(D, a, b)`` of a bottleneck: ``D`` unwritten and shared by all of them, ``a`` and ``b`` zero."""

    def resolve(self, grad: LazyGradient, of: Features) -> Tensor:
        """``D + a + b*(v - mu)`` as images ``[N, C, *spatial]``."""
