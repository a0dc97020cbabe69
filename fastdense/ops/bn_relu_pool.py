"""What stands between and around the blocks, as two ``torch.library`` operators: BatchNorm, ReLU, pooling.

``fastdense::bn_relu_pool`` is, by the kind of its pooling,

    stem         max_pool(relu(bn(x)))             windows may overlap
    transition   conv1x1(avg_pool(relu(bn(x))))    disjoint windows; pooling first is the same for a quarter of the work
    head         mean of relu(bn(x)) over all pixels

It saves ``x`` and its moments; activation, mask and arg-max are computed again in backward. Moments that the caller
has are taken, and if they are differentiable their gradients go back to what computed them, with ``D`` as the
gradient of ``x``: the lazy gradient of ``schedule.py``. The moments of the output are for its consumer: what that
makes of them belongs to the gradient that it returns for the output itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.features import CHANNELS_LAST, Features, LazyGradient, accumulation_dtype, as_rows, empty_features
from ..core.primitives import Backend, Conv, Gradients, Norm, Pool
from .common import backend_of, gradients_like, plain_arithmetic, raise_not_twice


def channels_last(x: Tensor) -> Tensor:
    """``x [N, C, *spatial]`` with its channels side by side: itself if they are, else a differentiable copy."""
    strides = x.stride()
    pixels = 1
    for size, stride in zip(reversed(x.shape[2:]), reversed(strides[2:]), strict=True):
        if size != 1 and stride != pixels * strides[-1]:
            break
        pixels *= size
    else:
        dense = x.shape[0] == 1 or strides[0] == pixels * strides[-1]
        if strides[1] == 1 and dense and strides[-1] >= x.shape[1]:
            return x
    if x.dim() in CHANNELS_LAST:  # no view, of whose strides compilers make less where sizes are symbols
        return x.contiguous(memory_format=CHANNELS_LAST[x.dim()])
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def forward(be: Backend, x: Features, norm: Norm, weight: Tensor | None, pool: Pool, out: Features) -> None:
    """``out = pool(relu(bn(x)))``, convolved if there is a ``weight``."""
    if weight is None:
        be.bn_relu_pool(x, norm, pool, out)
        return
    (conv,) = be.prepare([Conv(norm, weight, pool=pool)])
    be.bn_relu_conv(x, conv, out)


def backward(
    be: Backend,
    grad: Tensor,
    x: Features,
    norm: Norm,
    weight: Tensor | None,
    pool: Pool,
    needs: Sequence[bool],
    into: LazyGradient | None,
) -> Gradients:
    """``[dgamma, dbeta, dweight]``; ``into`` becomes ``(D, a, b)`` of ``x``."""
    if weight is None:
        return [*be.bn_relu_pool_backward(grad, norm, pool, x, into), None]
    (conv,) = be.prepare([Conv(norm, weight, (needs[0], needs[1], needs[2]), pool=pool)])
    output = Features(grad, None, None)  # nothing of it is read: its gradient is no lazy one
    gradients = be.bn_relu_conv_backward(LazyGradient(grad, None, None), output, conv, x, into, accumulate=False)
    be.finish()
    return gradients


def _outputs(
    x: Tensor, weight: Tensor | None, pool: Pool, own_moments: bool, output_moments: bool, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised outputs of ``bn_relu_pool``."""
    channels, acc = x.shape[1], accumulation_dtype(x.dtype)
    writes = channels if weight is None else weight.shape[0]
    if pool.kind == "mean":
        y = x.new_empty(x.shape[0], writes)
    else:
        y = empty_features((x.shape[0], writes, *pool.sizes(x.shape[2:])), dtype=x.dtype, device=x.device)
    y_mean, y_var = (x.new_empty(writes if output_moments else 0, dtype=acc) for _ in range(2))
    mean = x.new_empty(channels if own_moments else 0, dtype=acc)
    return y, y_mean, y_var, mean, x.new_empty(mean.shape[0] + bool(group), dtype=acc)


@torch.library.custom_op("fastdense::bn_relu_pool", mutates_args=())
def bn_relu_pool(
    x: Tensor,
    x_mean: Tensor | None,
    x_var: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor | None,
    frozen_stats: Sequence[Tensor],
    eps: float,
    kind: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_moments: bool,
    impl: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``y``, its mean and variance, and those of ``x`` where they were not given.

    Args:
        x: ``[N, C, *spatial]``; channels last (see ``channels_last``) it is read where it lies.
        x_mean, x_var: batch moments of ``x`` if the caller has them, ``[C]`` in the accumulation dtype.
        gamma, beta, eps, frozen_stats: the norm; its running ``mean, var`` if it is frozen.
        weight: ``[K, C, 1, ...]`` of the convolution behind average pooling; ``None`` behind any other.
        kind, kernel, stride, padding: see ``Pool``.
        output_moments: whether anyone uses the moments of ``y``; else they come back empty.
        impl: backend name, ``"torch"`` or ``"triton"``.
        group: the process group that batch statistics are shared with (SyncBatchNorm), or ``""``; then the last of
            the returned variances is its number of values per channel.
    """
    pool = Pool(kind, tuple(kernel), tuple(stride), tuple(padding))
    own = x_mean is None and not frozen_stats
    y, y_mean, y_var, mean, var = _outputs(x, weight, pool, own, output_moments, group)
    rows, moments = as_rows(channels_last(x)), (mean, var[: mean.shape[0]]) if own else (x_mean, x_var)
    source = Features(rows, *moments)
    with plain_arithmetic(x):
        be = backend_of(impl, x, group, var)
        if own:
            be.moments(source)
        out = Features(_output_rows(y), *((y_mean, y_var) if output_moments else (None, None)))
        forward(be, source, _norm(gamma, beta, eps, frozen_stats), weight, pool, out)
    return y, y_mean, y_var, mean, var


def _norm(gamma: Tensor, beta: Tensor, eps: float, frozen_stats: Sequence[Tensor]) -> Norm:
    return Norm(gamma, beta, eps, (frozen_stats[0], frozen_stats[1]) if frozen_stats else None)


def _output_rows(y: Tensor) -> Tensor:
    return y if y.dim() == 2 else as_rows(y)


@bn_relu_pool.register_fake
def _(
    x: Tensor, x_mean: Any, x_var: Any, gamma: Any, beta: Any, weight: Any, frozen_stats: Any, eps: Any, kind: str,
    kernel: Any, stride: Any, padding: Any, output_moments: bool, impl: str, group: str,
) -> Any:  # fmt: skip
    pool = Pool(kind, tuple(kernel), tuple(stride), tuple(padding))
    return _outputs(x, weight, pool, x_mean is None and not frozen_stats, output_moments, group)


@torch.library.custom_op("fastdense::bn_relu_pool_backward", mutates_args=())
def bn_relu_pool_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor | None,
    frozen_stats: Sequence[Tensor],
    eps: float,
    kind: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    impl: str,
    group: str,
    lazy: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``x, x_mean, x_var, gamma, beta, weight``; empty tensors where none is needed.

    ``needs`` says which of ``x, gamma, beta, weight`` need one. With ``lazy`` that of ``x`` leaves out what goes
    through its moments, which get their own.
    """
    pool = Pool(kind, tuple(kernel), tuple(stride), tuple(padding))
    source = Features(as_rows(channels_last(x)), *((None, None) if frozen_stats else (mean, var[: mean.shape[0]])))
    grad_x, into = x.new_empty(0), None
    if needs[0]:
        grad_x = empty_features(x.shape, dtype=x.dtype, device=x.device)
        a, b = (None, None) if frozen_stats else x.new_empty(2, x.shape[1], dtype=accumulation_dtype(x.dtype))
        into = LazyGradient(as_rows(grad_x), a, b)
    with plain_arithmetic(x):
        be = backend_of(impl, x, group, var)
        rows = _output_rows(grad if grad.dim() == 2 else channels_last(grad))
        norm = _norm(gamma, beta, eps, frozen_stats)
        gradients = backward(be, rows, source, norm, weight, pool, needs[1:], into)
        grad_mean, grad_var = mean.new_empty(0), var.new_empty(0)
        if into is not None and into.a is not None and into.b is not None:
            if lazy:
                grad_mean, grad_var = into.a * be.m, into.b * (be.m / 2)
            else:
                be.resolve(into, source, out=grad_x)
    # A parameter that there is not has no gradient either: any tensor stands for it.
    dgamma, dbeta, dweight = gradients_like([gamma, beta, gamma if weight is None else weight], gradients, needs[1:])
    return grad_x, grad_mean, grad_var, dgamma, dbeta, dweight


@bn_relu_pool_backward.register_fake
def _(
    grad: Any, x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor | None,
    frozen_stats: Any, eps: Any, kind: Any, kernel: Any, stride: Any, padding: Any, impl: Any, group: Any,
    lazy: bool, needs: Any,
) -> Any:  # fmt: skip
    grad_x = empty_features(x.shape, dtype=x.dtype, device=x.device) if needs[0] else x.new_empty(0)
    moments = [mean.new_empty(x.shape[1] if needs[0] and lazy and not frozen_stats else 0) for _ in range(2)]
    wanted = (*needs[1:3], needs[3] and weight is not None)
    return grad_x, *moments, *(
        torch.empty_like(param) if want else param.new_empty(0)
        for param, want in zip((gamma, beta, gamma if weight is None else weight), wanted, strict=True)
    )  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, x_mean, x_var, gamma, beta, weight, frozen_stats, *static = inputs
    y, y_mean, y_var, mean, var = output
    ctx.mark_non_differentiable(y_mean, y_var, mean, var)
    ctx.set_materialize_grads(False)
    if x_mean is not None:
        mean, var = x_mean, x_var
    ctx.save_for_backward(x, mean, var, gamma, beta, weight, *frozen_stats)
    *ctx.static, _, ctx.impl, ctx.group = static
    ctx.output_shape = y.shape


def _backward_of_op(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
    x, mean, var, gamma, beta, weight, *frozen_stats = ctx.saved_tensors
    lazy = any(ctx.needs_input_grad[1:3]) and not frozen_stats  # a frozen norm reads no batch moments
    needs = [ctx.needs_input_grad[0] or lazy, *ctx.needs_input_grad[3:6]]
    if grad is None:
        grad = torch.zeros(ctx.output_shape, dtype=x.dtype, device=x.device)
    gradients = torch.ops.fastdense.bn_relu_pool_backward(
        grad, x, mean, var, gamma, beta, weight, frozen_stats, *ctx.static, ctx.impl, ctx.group, lazy, needs
    )
    wanted = (needs[0], lazy, lazy, *needs[1:])
    return (
        *(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)),
        [None] * len(frozen_stats),
        # Autograd wants the structure of the arguments, and an empty list is one.
        *([] if isinstance(value, list) and not value else None for value in ctx.static),
        *(None for _ in range(3)),
    )


bn_relu_pool.register_autograd(_backward_of_op, setup_context=_setup_context)
bn_relu_pool_backward.register_autograd(raise_not_twice)
