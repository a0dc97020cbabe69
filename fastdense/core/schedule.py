"""The DenseBlock, forward and backward, on one page.

Notation of the DenseNet paper (Huang et al., arXiv 1608.06993): layer ``l`` reads ``[H_0, ..., H_l]``, which are the
first ``C_l`` channels of one shared buffer ``X``, and writes the next ``k`` channels, ``H_{l+1}``:

    Z_l     = conv1x1(relu(bn([H_0, ..., H_l])))        the bottleneck, absent in the paper's basic layer
    H_{l+1} = conv3x3(relu(bn(Z_l)))

Forward, a channel's batch moments are computed once, where the channel is written, and shared by all its consumers.
Backward, the gradient of features ``v`` is a triple that its consumers add to, ``grad(v) = D + a + b*(v - mu)``,
formed while it is loaded. docs/algorithm.md derives both.

The arithmetic is a backend's (``primitives.py`` names it, ``torch_backend.py`` does it); the order of things is here.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .features import Features, LazyGradient
from .primitives import Backend, Gradients, Layer


def forward(
    be: Backend, x: Tensor, layers: Sequence[Layer], X: Features, Z: Sequence[Features], *, given_moments: bool
) -> None:
    """Fill the block's buffer ``X`` and every ``Z_l`` from ``x [N, C0, *spatial]``.

    ``Z`` may name one buffer several times: a bottleneck that is not saved is overwritten by the next
    layer's. With ``given_moments`` the moments of ``x`` are in ``X`` already.
    """
    layers = _prepared(be, layers)
    H_0 = X[: x.shape[1]]
    be.copy_with_moments(x, out=H_0.without_moments() if given_moments else H_0)

    for l, layer in enumerate(layers):
        H, new = X[layer.earlier], X[layer.new]
        if layer.conv1x1 is not None:
            be.bn_relu_conv(H, layer.conv1x1, out=Z[l])
            H = Z[l]
        be.bn_relu_conv(H, layer.conv3x3, out=new, dropout=layer.dropout)


def backward(
    be: Backend,
    G: LazyGradient,
    layers: Sequence[Layer],
    X: Features,
    Z: Sequence[Features],
    *,
    first: int,
    recompute: bool,
) -> list[Gradients]:
    """Gradients of every layer's parameters; on return ``G[:C0]`` is that of the channels which entered.

    ``G`` is ``(D, a, b)`` of ``X`` and starts as the gradients of ``(X, mean, var)``: ``(E, g_mean/m, 2*g_var/m)``.
    Layers below ``first`` need no gradient and are not visited. With ``recompute``, ``Z_l`` holds its moments only:
    its rows are scratch, filled again here.
    """
    layers = _prepared(be, layers)
    gradients: list[Gradients] = [[] for _ in layers]
    for l in reversed(range(first, len(layers))):
        layer = layers[l]
        H, new = X[layer.earlier], X[layer.new]
        G_H = G[layer.earlier] if G.start < layer.reads else None
        G_new = G[layer.new]

        if layer.conv1x1 is None:
            gradients[l] = be.bn_relu_conv_backward(G_new, new, layer.conv3x3, H, G_H, layer.dropout, accumulate=True)
            continue

        if recompute:
            be.bn_relu_conv(H, layer.conv1x1, out=Z[l].without_moments())
        G_Z = be.gradient_buffer(Z[l]) if G_H is not None or any(layer.conv1x1.needs) else None
        d3x3 = be.bn_relu_conv_backward(G_new, new, layer.conv3x3, Z[l], G_Z, layer.dropout, accumulate=False)
        d1x1: Gradients = [None, None, None]
        if G_Z is not None:
            d1x1 = be.bn_relu_conv_backward(G_Z, Z[l], layer.conv1x1, H, G_H, accumulate=True)
        gradients[l] = d1x1 + d3x3
    be.finish()
    return gradients


def _prepared(be: Backend, layers: Sequence[Layer]) -> list[Layer]:
    """The layers with their weights as the backend reads them."""
    ready = iter(be.prepare([conv for layer in layers for conv in layer.convs]))
    return [layer._replace(conv1x1=layer.conv1x1 and next(ready), conv3x3=next(ready)) for layer in layers]
