"""Pooling round the blocks as launches: the stem's maximum, the head's mean."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.features import Features, LazyGradient
from ..core.primitives import Gradients, Norm, Pool
from ..kernels import bn_relu_pool
from ..kernels.launch import Work
from .triton_launcher import Launcher
from .triton_operands import norm_vectors, three, unit_of

_ONES, _ZEROS = (1, 1, 1), (0, 0, 0)


def _windows(pool: Pool) -> tuple[int, ...]:
    """Size, distance and padding of the windows, for depth, height and width."""
    missing = 3 - len(pool.kernel)
    return (*three(pool.kernel), *three(pool.stride), *_ZEROS[:missing], *pool.padding)


def pool_forward(be: Launcher, source: Features, norm: Norm, pool: Pool, out: Features) -> None:
    """``out.rows = pool(relu(bn(source)))`` with the moments of the stored values."""
    if pool.kind == "maximum":
        _maximum(be, source, norm, pool, out, None)
        return
    x, channels, itemsize = source.rows, source.rows.shape[1], be.dtype.itemsize
    config = be.choose("mean", channels, channels)
    be.launch(
        bn_relu_pool.bn_relu_mean_kernel, be.images * -(-channels // config.block_c),
        out.rows, x, *norm_vectors(norm, source),
        channels, be.pixels,
        out.rows.stride(0), x.stride(0),
        norm.eps,
        UNIT=unit_of(itemsize, channels, out.rows.stride(0), x.stride(0)),
        BLOCK_M=config.block_m, BLOCK_C=config.block_c, config=config,
    )  # fmt: skip
    assert out.mean is None, "the head's output is not normalised"


def _maximum(be: Launcher, source: Features, norm: Norm, pool: Pool, out: Features | None, taps: Tensor | None) -> None:
    """The largest of each window into ``out``, or where it lies into ``taps`` ``[windows, C]``."""
    x, channels = source.rows, source.rows.shape[1]
    sizes = three(pool.sizes(be.spatial))
    m = be.images * math.prod(sizes)
    config = be.choose("max_pool", channels, channels)
    columns = -(-channels // config.block_c)
    programs, each = be.share(config, Work(-(-m // config.block_m), columns))
    nothing = None, None, None, None
    mean, var, partial, counter = nothing if out is None else be.moments_workspace(out, programs, columns)
    stride = 0 if out is None else out.rows.stride(0)
    be.launch(
        bn_relu_pool.bn_relu_max_pool_kernel, programs * columns,
        None if out is None else out.rows, mean, var, taps, partial, counter,
        x, *norm_vectors(norm, source),
        m, channels, *sizes, *be.depth_height_width, each,
        stride, x.stride(0),
        norm.eps,
        *_windows(pool),
        HAS_MOMENTS=mean is not None, UNIT=unit_of(be.dtype.itemsize, channels, stride, x.stride(0)),
        BLOCK_M=config.block_m, BLOCK_C=config.block_c, config=config,
    )  # fmt: skip


def pool_backward(
    be: Launcher, grad: Tensor, norm: Norm, pool: Pool, source: Features, into: LazyGradient | None
) -> Gradients:
    """``[dgamma, dbeta]``; ``dy = pool^T(grad) * (relu's mask)``, ``into.D = gamma*r*dy``, ``into.a``, ``into.b``."""
    x, channels = source.rows, source.rows.shape[1]
    maximum = pool.kind == "maximum"
    taps, sizes = None, _ONES
    windows: tuple[int, ...] = (*_ONES, *_ONES, *_ZEROS)
    if maximum:
        taps = torch.empty(grad.shape, dtype=torch.uint8, device=be.device)
        _maximum(be, source, norm, pool, None, taps)
        sizes, windows = three(pool.sizes(be.spatial)), _windows(pool)
    config = be.choose("pool_backward", channels, channels)
    columns = -(-channels // config.block_c)
    splits, each = be.share(config, Work(-(-be.m // config.block_m), columns))
    dgamma, dbeta = be.empty(channels), be.empty(channels)
    D, da, db = (None, None, None) if into is None else (into.D, into.a, into.b)
    strides = (0 if D is None else D.stride(0), grad.stride(0), x.stride(0))
    be.launch(
        bn_relu_pool.bn_relu_pool_backward_kernel, splits * columns,
        D, dgamma, dbeta, da, db, be.empty(splits, 2, channels), be.counter(columns),
        grad, taps, x, *norm_vectors(norm, source),
        be.m, channels, be.pixels, *sizes, *be.depth_height_width, each,
        *strides,
        norm.eps,
        *windows,
        MAXIMUM=maximum, HAS_INTO=D is not None, HAS_BATCH=da is not None and norm.frozen is None,
        UNIT=unit_of(be.dtype.itemsize, channels, *strides),
        BLOCK_M=config.block_m, BLOCK_C=config.block_c, config=config,
    )  # fmt: skip
    return [dgamma, dbeta]
