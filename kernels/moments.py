"""Batch moments: taken while features are copied, merged from partial ones; and the merge of BatchNorm's gradients."""

import triton
import triton.language as tl

from .common import load_reader, store_moments


@triton.jit
def copy_with_moments_kernel(
    out_ptr, partial_ptr, x_ptr,
    m, C, D, H, W,
    stride_om, stride_xn, stride_xc, stride_xd, stride_xh, stride_xw,
    HAS_MOMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``out = x``, channels last, with each tile's mean and ``M2``.

    out [m, C, feature dtype, rows ``stride_om`` apart]
    partial [ceil(m/BLOCK_M), 3, C, fp32, contiguous]: mean (as two numbers) and M2 of a tile's rows
    x [N, C, D, H, W, feature dtype, any strides]
    Grid: (row tiles * column tiles), columns fastest.
    """
    pid = tl.program_id(0).to(tl.int64)
    column_tiles = tl.cdiv(C, BLOCK_C)
    tile = pid // column_tiles
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    c = pid % column_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    row_mask, c_mask = rows < m, c < C
    mask = row_mask[:, None] & c_mask[None, :]
    pixel = rows.to(tl.int32)
    n, z = (pixel // (W * H * D)).to(tl.int64), (pixel // (W * H) % D).to(tl.int64)
    y, x = (pixel // W % H).to(tl.int64), (pixel % W).to(tl.int64)
    offset = n * stride_xn + z * stride_xd + y * stride_xh + x * stride_xw
    v = tl.load(x_ptr + offset[:, None] + c[None, :] * stride_xc, mask=mask, other=0.0)
    tl.store(out_ptr + rows[:, None] * stride_om + c[None, :], v, mask=mask)
    if HAS_MOMENTS:
        count = tl.minimum(m - tile * BLOCK_M, BLOCK_M).to(tl.float32)
        store_moments(partial_ptr, tile, v.to(tl.float32), row_mask, count, c, C, c_mask)


@triton.jit
def _load_partial(partial_ptr, origin, begin, m, C, tiles, tile_rows, c, c_mask, BLOCK_T: tl.constexpr):
    """Some tiles' ``mean - origin``, number of rows (0 beyond the last tile) and ``M2``."""
    t = begin + tl.arange(0, BLOCK_T).to(tl.int64)
    mask = (t < tiles)[:, None] & c_mask[None, :]
    offset = (t * 3 * C)[:, None] + c[None, :]
    mean = tl.load(partial_ptr + offset, mask=mask, other=0.0)
    rest = tl.load(partial_ptr + offset + C, mask=mask, other=0.0)
    m2 = tl.load(partial_ptr + offset + 2 * C, mask=mask, other=0.0)
    count = tl.maximum(tl.minimum(m - t * tile_rows, tile_rows), 0).to(tl.float32)
    return (mean - origin[None, :]) + rest, count[:, None], m2


@triton.jit(do_not_specialize=["tiles"])
def merge_moments_kernel(
    mean_ptr, var_ptr, partial_ptr,
    m, C, tiles, tile_rows,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Chan, Golub, LeVeque (1979): ``m*var = sum_i M2_i + sum_i n_i*(mean_i - mean)^2``.

    mean, var [C, fp32]: var is biased
    partial [tiles, 3, C, fp32, contiguous]: tile i has n_i = min(tile_rows, m - i*tile_rows) rows
    Grid: (column tiles).
    """
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    # Relative to the first tile, so that a large common mean does not cancel.
    origin = tl.load(partial_ptr + c, mask=c_mask, other=0.0)
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for begin in range(0, tiles, BLOCK_T):
        mean, count, _ = _load_partial(partial_ptr, origin, begin, m, C, tiles, tile_rows, c, c_mask, BLOCK_T)
        total += mean * count
    shift = tl.sum(total, 0) / m
    m2 = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for begin in range(0, tiles, BLOCK_T):
        mean, count, own = _load_partial(partial_ptr, origin, begin, m, C, tiles, tile_rows, c, c_mask, BLOCK_T)
        away = mean - shift[None, :]
        m2 += own + away * away * count
    tl.store(mean_ptr + c, origin + shift, mask=c_mask)
    tl.store(var_ptr + c, tl.sum(m2, 0) / m, mask=c_mask)


@triton.jit(do_not_specialize=["start"])
def merge_gradients_kernel(
    dgamma_ptr, a_ptr, b_ptr, sum_ptr, centred_ptr, mean_ptr, var_ptr, gamma_ptr,
    C, start, minus_inverse_m, eps,
    HAS_BATCH: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``dgamma = r*sum(dy*(v - mu))``; ``a -= gamma*r*sum(dy)/m``, ``b -= gamma*r^2*dgamma/m``.

    dgamma [C, fp32]; a, b [C - start, fp32]: added to, unless the norm is frozen
    sum, centred [C, fp32]: sum(dy), sum(dy*(v - mu))
    mean, var, gamma [C]
    Grid: (column tiles).
    """
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    _, scale, _ = load_reader(mean_ptr, var_ptr, gamma_ptr, gamma_ptr, c, c_mask, eps)
    var = tl.load(var_ptr + c, mask=c_mask, other=1.0).to(tl.float32)
    r = 1.0 / tl.sqrt(var + eps)
    dbeta = tl.load(sum_ptr + c, mask=c_mask, other=0.0)
    dgamma = tl.load(centred_ptr + c, mask=c_mask, other=0.0) * r
    tl.store(dgamma_ptr + c, dgamma, mask=c_mask)
    if HAS_BATCH:
        mine = c_mask & (c >= start)
        a = tl.load(a_ptr + c - start, mask=mine, other=0.0)
        b = tl.load(b_ptr + c - start, mask=mine, other=0.0)
        tl.store(a_ptr + c - start, a + scale * dbeta * minus_inverse_m, mask=mine)
        tl.store(b_ptr + c - start, b + scale * r * dgamma * minus_inverse_m, mask=mine)
