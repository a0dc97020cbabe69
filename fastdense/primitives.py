"""What the schedule is written in: the records that describe a block, and the primitives that a backend provides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from .features import Features, LazyGradient

Gradients = list[Tensor | None]


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
    operand: Tensor | None = None  # the weight as the backend reads it, if that is another tensor


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
    """What the schedule asks of a backend, over rows of pixels, channels last, for one call of one block.

    Batch moments and BatchNorm's gradients belong to whoever produces the values: each primitive merges its own partial
    sums. Another process's share of a channel's moments is merged with ``out.mean, out.var`` after the call, its share
    of ``a`` and ``b`` (linear in the sums) before they are read.
    """

    @property
    def m(self) -> int:
        """Values per channel."""

    def prepare(self, layers: Sequence[Layer]) -> Sequence[Layer]:
        """The layers with their weights as this backend reads them: a block's casts and copies in a few calls."""

    def copy_with_moments(self, x: Tensor, out: Features) -> None:
        """``out = x``, with the moments of ``out`` if it is tracked."""

    def bn_relu_conv(self, source: Features, conv: Conv, out: Features, dropout: Dropout | None = None) -> None:
        """``out = dropout(conv(relu(bn(source))))``, with the moments of ``out`` as stored if it is tracked."""

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
        """``[dgamma, dbeta, dweight]``, each ``None`` if nobody needs it, from ``grad`` of ``output``.

        With ``dy = conv^T(grad) * (relu's mask)``, adds ``gamma*r*dy`` to ``into.D`` and the batch statistics' share to
        ``into.a`` and ``into.b``, or writes them there.
        """

    def gradient_buffer(self, of: Features) -> LazyGradient:
        """``(D, a, b)`` of a bottleneck, unwritten; ``D`` is shared by all of them."""

    def resolve(self, grad: LazyGradient, of: Features) -> Tensor:
        """``D + a + b*(v - mu)`` as images ``[N, C, *spatial]``."""

    def finish(self) -> None:
        """Complete what was put off: the weights' gradients are whole only now."""
