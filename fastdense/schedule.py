"""The DenseBlock, forward and backward, on one page.

Notation of the DenseNet paper (Huang et al., arXiv 1608.06993): layer ``l`` reads ``[H_0, ..., H_l]``, which are the
first ``C_l`` channels of one shared buffer ``X``, and writes the next ``k`` channels, ``H_{l+1}``:

    Z_l     = conv1x1(relu(bn(X[:C_l])))      the bottleneck (absent in the paper's basic layer)
    H_{l+1} = conv3x3(relu(bn(Z_l)))

Forward, a channel's batch moments are computed once, by whoever writes the channel, and shared by all its readers.
Backward, the gradient of features ``v`` is kept as a triple that its readers add to, ``grad(v) = D + a + b*(v - mu)``.

The arithmetic is a backend's (``torch_backend.py`` is the one in plain PyTorch); the order of things is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from .features import Features, LazyGradient


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
    reads: int  # C_l
    writes: int  # k
    conv1x1: Conv | None
    conv3x3: Conv
    dropout: Dropout | None = None


class Backend(Protocol):
    """The five primitives, and the buffers that they work on. All features are rows of pixels, channels last."""

    m: int  # values per channel

    def features(self, channels: int, *, tracked: bool) -> Features: ...

    def gradient(self, of: Features, start: int = 0) -> LazyGradient: ...

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
    ) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
        """Writes or adds to ``into.D``; returns the weight's gradient and ``(sum(dy), sum(dy*(v - mu)))``."""

    def merge_gradients(
        self, sums: tuple[Tensor, Tensor], norm: Norm, source: Features, into: LazyGradient | None
    ) -> tuple[Tensor, Tensor]:
        """The sums into ``dgamma, dbeta``, which it returns, and, for batch statistics, into ``into.a, into.b``."""

    def resolve(self, grad: LazyGradient, of: Features) -> Tensor:
        """``D + a + b*(v - mu)`` as images ``[N, C, *spatial]``."""


def bn_relu_conv(
    be: Backend, source: Features, conv: Conv, out: Features, dropout: Dropout | None = None
) -> None:
    partial = be.bn_relu_conv(source, conv, out, dropout)
    if out.mean is not None:
        be.merge_moments(partial, out)


def forward(
    be: Backend, x: Tensor, layers: Sequence[Layer], X: Features, Z: Sequence[Features], *, given_moments: bool
) -> None:
    """Fill the block's buffer ``X`` and every ``Z_l`` from ``x [N, C0, *spatial]``.

    ``Z`` may name one buffer several times: what nobody keeps, the next layer overwrites. With ``given_moments`` the
    moments of ``x`` are already in ``X``.
    """
    entering = X[: x.shape[1]]
    if given_moments:
        be.copy_with_moments(x, Features(entering.rows, None, None))
    elif (partial := be.copy_with_moments(x, entering)) is not None:
        be.merge_moments(partial, entering)

    for l, layer in enumerate(layers):
        H, new = X[: layer.reads], X[layer.reads : layer.reads + layer.writes]
        if layer.conv1x1 is not None:
            bn_relu_conv(be, H, layer.conv1x1, out=Z[l])
            H = Z[l]
        bn_relu_conv(be, H, layer.conv3x3, out=new, dropout=layer.dropout)


def bn_relu_conv_backward(
    be: Backend,
    grad: LazyGradient,
    output: Features,
    conv: Conv,
    source: Features,
    into: LazyGradient | None,
    dropout: Dropout | None = None,
    *,
    accumulate: bool,
) -> list[Tensor | None]:
    d_weight, sums = be.bn_relu_conv_backward(
        grad, output, conv, source, into, dropout, accumulate=accumulate
    )
    if sums is None:
        return [None, None, d_weight]
    return [*be.merge_gradients(sums, conv.norm, source, into), d_weight]


def backward(
    be: Backend,
    G: LazyGradient,
    layers: Sequence[Layer],
    X: Features,
    Z: Sequence[Features],
    *,
    first: int,
    recompute: bool,
) -> list[list[Tensor | None]]:
    """Gradients of every layer's parameters; on return ``G`` holds the gradient of the channels that entered.

    ``G`` is ``(D, a, b)`` of ``X`` and starts as the gradients of ``(X, mean, var)``: ``(E, g_mean/m, 2*g_var/m)``.
    Layers below ``first`` need no gradient and are not visited. With ``recompute``, ``Z_l`` holds its moments only:
    its rows are scratch, filled again here.
    """
    gradients: list[list[Tensor | None]] = [[] for _ in layers]
    for l in reversed(range(first, len(layers))):
        layer = layers[l]
        H, new = X[: layer.reads], X[layer.reads : layer.reads + layer.writes]
        grad_new = G[layer.reads : layer.reads + layer.writes]
        grad_H = G[: layer.reads] if G.start < layer.reads else None

        if layer.conv1x1 is None:
            gradients[l] = bn_relu_conv_backward(
                be, grad_new, new, layer.conv3x3, H, into=grad_H, dropout=layer.dropout, accumulate=True
            )
            continue
        if recompute:
            be.bn_relu_conv(H, layer.conv1x1, Features(Z[l].rows, None, None))
        grad_Z = be.gradient(Z[l]) if grad_H is not None or any(layer.conv1x1.needs) else None
        conv3x3 = bn_relu_conv_backward(
            be, grad_new, new, layer.conv3x3, Z[l], into=grad_Z, dropout=layer.dropout, accumulate=False
        )
        conv1x1: list[Tensor | None] = [None, None, None]
        if grad_Z is not None:
            conv1x1 = bn_relu_conv_backward(
                be, grad_Z, Z[l], layer.conv1x1, H, into=grad_H, accumulate=True
            )
        gradients[l] = conv1x1 + conv3x3
    return gradients
