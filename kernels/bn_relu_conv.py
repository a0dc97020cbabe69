"""The forward kernel: BatchNorm, ReLU and pooling while loading, a convolution, dropout and moments while storing."""

import triton
import triton.language as tl

from .common import (
    assume_multiple_of,
    divmod_pid,
    dot,
    dropout_scale,
    in_window,
    load_norm,
    neighbour,
    offsets,
    opaque_zero,
    pixel,
    relu,
    source_rows,
    to_storage,
)
from .reductions import add_tile, finish_moments


@triton.jit
def _load_activation(
    x_ptr, norm_ptrs, first_row, local, place, tap, c, m, C, D, H, W, stride_xm, eps,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SHIFTS: tl.constexpr,
    X_UNIT: tl.constexpr, W_UNIT: tl.constexpr,
):  # fmt: skip
    """``relu(bn(x))`` ``[BLOCK_M, BLOCK_C]`` of the pixels one tap away (one row of taps where ``SHIFTS > 1``)."""
    c_mask = c < assume_multiple_of(C, W_UNIT)
    dx = 0 if SHIFTS > 1 else tap % KW - KW // 2
    dz, dy = tap // (KH * KW) - KD // 2, tap // KW % KH - KH // 2
    distance, inside = neighbour(place, dz, dy, dx, m, D, H, W, KD * KH * KW)
    mask = inside[:, None] & (c < tl.cdiv(C, X_UNIT) * X_UNIT)[None, :]
    stride = assume_multiple_of(stride_xm, X_UNIT)
    x = tl.load(x_ptr + (first_row + distance) * stride + offsets(local, c, stride), mask=mask, other=0.0)
    mean, scale, beta = load_norm(norm_ptrs, c, c_mask, eps)
    # Centre first: with mean*scale folded into beta, digits would cancel where |mean| >> deviation.
    activation = relu((x.to(tl.float32) - mean[None, :]) * scale[None, :] + beta[None, :])
    if KD * KH * KW > 1:  # padding comes after the ReLU
        activation = tl.where(inside[:, None], activation, 0.0)
    if X_UNIT > W_UNIT:  # the columns beyond C hold whatever the row holds there
        activation = tl.where(c_mask[None, :], activation, 0.0)
    return to_storage(activation, x_ptr.dtype.element_ty)


@triton.jit
def _load_average(
    x_ptr, norm_ptrs, first_source, source, inside, c, C, XH, XW, stride_xm, eps,
    PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, X_UNIT: tl.constexpr, W_UNIT: tl.constexpr,
):  # fmt: skip
    """The average of ``relu(bn(x))`` ``[BLOCK_M, BLOCK_C]`` over the windows that begin at the ``source`` rows."""
    c_mask = c < assume_multiple_of(C, W_UNIT)
    mask = inside[:, None] & (c < tl.cdiv(C, X_UNIT) * X_UNIT)[None, :]
    stride = assume_multiple_of(stride_xm, X_UNIT)
    mean, scale, beta = load_norm(norm_ptrs, c, c_mask, eps)
    window = offsets(source, c, stride)
    total = tl.zeros(window.shape, tl.float32)
    for place in tl.static_range(PD * PH * PW):
        begin = x_ptr + (first_source + in_window(place, XH, XW, PH, PW)) * stride
        x = tl.load(begin + window, mask=mask, other=0.0)
        total += relu((x.to(tl.float32) - mean[None, :]) * scale[None, :] + beta[None, :])
    if X_UNIT > W_UNIT:  # the columns beyond C hold whatever the row holds there
        total = tl.where(c_mask[None, :], total, 0.0)
    return to_storage(total * (1.0 / (PD * PH * PW)), x_ptr.dtype.element_ty)


@triton.jit
def _add_shifted(products, x, W, KW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """``out[p] = sum_j products[j][p + j - KW//2]`` over neighbours in the same image row; right but at the tile's rim.

    What the taps of one row found at a pixel belongs to its neighbours: shifting narrow products once is cheaper than
    loading and normalising wide inputs for every tap.
    """
    out = products[KW // 2]
    for j in tl.static_range(KW):
        if j != KW // 2:
            at = tl.arange(0, BLOCK_M) + (j - KW // 2)
            index = tl.minimum(tl.maximum(at, 0), BLOCK_M - 1)
            shifted = tl.gather(products[j], tl.broadcast_to(index[:, None], [BLOCK_M, BLOCK_N]), 0)
            inside = (x + (j - KW // 2) >= 0) & (x + (j - KW // 2) < W)
            out += tl.where(inside[:, None], shifted, 0.0)
    return out


@triton.jit
def _convolve(
    x_ptr, norm_ptrs, w_ptr, first_row, local, k,
    m, C, K, D, H, W, XD, XH, XW, stride_xm, stride_wk, stride_wc, stride_wt, eps,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SHIFTS: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    X_UNIT: tl.constexpr, W_UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``conv(pool(relu(bn(x))))`` ``[BLOCK_M, BLOCK_N]`` in fp32, at a tile of pixels and of output channels ``k``."""
    place = pixel(first_row, local, D, H, W, KD * KH * KW)
    first_source, source = source_rows(first_row, local, D, H, W, XD, XH, XW, PD, PH, PW)
    c_blocks = tl.cdiv(C, BLOCK_C)
    products = ()
    for _ in tl.static_range(SHIFTS):
        products += (tl.zeros([BLOCK_M, BLOCK_N], tl.float32),)
    for step in range(KD * KH * KW // SHIFTS * c_blocks):
        tap = step // c_blocks * SHIFTS
        c = step % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
        if PD * PH * PW > 1:
            activation = _load_average(
                x_ptr, norm_ptrs, first_source, source, first_row + local < m, c, C, XH, XW, stride_xm, eps,
                PD, PH, PW, X_UNIT, W_UNIT,
            )  # fmt: skip
        else:
            activation = _load_activation(
                x_ptr, norm_ptrs, first_row, local, place, tap, c,
                m, C, D, H, W, stride_xm, eps, KD, KH, KW, SHIFTS, X_UNIT, W_UNIT,
            )  # fmt: skip
        w_tile = w_ptr + c[:, None] * stride_wc + k[None, :] * assume_multiple_of(stride_wk, W_UNIT)
        w_mask = (c < assume_multiple_of(C, W_UNIT))[:, None] & (k < K)[None, :]
        added = ()
        for j in tl.static_range(SHIFTS):
            w = tl.load(w_tile + (tap + j) * assume_multiple_of(stride_wt, W_UNIT), mask=w_mask, other=0.0)
            added += (dot(activation, w, products[j], INPUT_PRECISION),)
        products = added
    return _add_shifted(products, place[3], W, SHIFTS, BLOCK_M, BLOCK_N)


@triton.jit(
    do_not_specialize=["m", "layer", "threshold", "tiles_per_program"],
    do_not_specialize_on_alignment=[
        "C", "K", "D", "H", "W", "XD", "XH", "XW", "stride_om", "stride_xm", "stride_wk", "stride_wc", "stride_wt",
    ],
)  # fmt: skip
def bn_relu_conv_kernel(
    out_ptr, out_mean_ptr, out_var_ptr, partial_ptr, counter_ptr,
    x_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, w_ptr, seed_ptr,
    m, C, K, D, H, W, XD, XH, XW, tiles_per_program,
    stride_om, stride_xm, stride_wk, stride_wc, stride_wt,
    eps, layer, threshold, keep_scale,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SHIFTS: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    HAS_MOMENTS: tl.constexpr, HAS_DROPOUT: tl.constexpr, PER_CHANNEL: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    X_UNIT: tl.constexpr, W_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``out = dropout(conv(pool(relu((x - mean)*gamma/sqrt(var + eps) + beta))))``, padded with 0 after the ReLU.

    out [m, K, feature dtype, rows ``stride_om`` apart], m over [N, D, H, W]; its moments out_mean, out_var [K, fp32]
    partial, counter: see finish_moments; pool: averages over windows of PD*PH*PW pixels, before a 1x1 convolution
    x [N*XD*XH*XW, C, feature dtype, rows ``stride_xm`` apart, readable up to X_UNIT]; mean, var, gamma, beta [C]
    w [K, C, KD*KH*KW, feature dtype, any strides; W_UNIT divides C and all but the smallest]; seed [1, int64]; OUT_UNIT
    divides K and ``stride_om``
    SHIFTS is KW: x is loaded once for each row of taps, whose products are shifted; or 1: once for each tap.
    Grid: (programs * output-channel tiles), channels fastest; a tile yields ROWS = BLOCK_M - SHIFTS + 1 rows of out.
    """
    K = assume_multiple_of(K, OUT_UNIT)
    HALO: tl.constexpr = SHIFTS // 2
    ROWS: tl.constexpr = BLOCK_M - SHIFTS + 1
    tiles = tl.cdiv(m, ROWS)
    program, column = divmod_pid(tl.program_id(0).to(tl.int64), tl.cdiv(K, BLOCK_N))
    first_tile = program * tiles_per_program
    sums = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    for i in range(tl.minimum(tiles_per_program, tiles - first_tile)):
        tile = first_tile + i
        first_row, local = tile * ROWS - HALO, tl.arange(0, BLOCK_M) + opaque_zero(tile)
        k = column * BLOCK_N + tl.arange(0, BLOCK_N) + opaque_zero(tile)
        out = _convolve(
            x_ptr, (mean_ptr, var_ptr, gamma_ptr, beta_ptr), w_ptr, first_row, local, k,
            m, C, K, D, H, W, XD, XH, XW, stride_xm, stride_wk, stride_wc, stride_wt, eps,
            KD, KH, KW, SHIFTS, PD, PH, PW, INPUT_PRECISION, X_UNIT, W_UNIT, BLOCK_M, BLOCK_N, BLOCK_C,
        )  # fmt: skip
        rows = first_row + local
        if HAS_DROPOUT:
            out *= dropout_scale(seed_ptr, rows, k, K, D * H * W, layer, threshold, keep_scale, PER_CHANNEL)
        mine = (local >= HALO) & (local < BLOCK_M - HALO) & (rows < m)
        out_stride = assume_multiple_of(stride_om, OUT_UNIT)
        out_tile = out_ptr + first_row * out_stride + offsets(local, k, out_stride)
        out_mask = mine[:, None] & (k < assume_multiple_of(K, OUT_UNIT))[None, :]
        tl.store(out_tile, to_storage(out, out_ptr.dtype.element_ty), mask=out_mask)
        if HAS_MOMENTS:
            # Read again, in the layout of the store: its threads hold whole pieces of columns, the product's do not.
            tl.debug_barrier()
            stored = tl.load(out_tile, mask=out_mask, other=0.0)
            count = tl.minimum(m - tile * ROWS, ROWS).to(tl.float32)
            origin_ptr = partial_ptr + program * 3 * K
            sums = add_tile(sums, origin_ptr, stored.to(tl.float32), mine, count, i == 0, k, K, BLOCK_N)
    if HAS_MOMENTS:
        k = column * BLOCK_N + tl.arange(0, BLOCK_N)
        finish_moments(
            out_mean_ptr, out_var_ptr, partial_ptr, counter_ptr, sums, program, tl.cdiv(tiles, tiles_per_program),
            tiles_per_program * ROWS, m, column, k, K,
        )  # fmt: skip


@triton.jit(do_not_specialize=["m"], do_not_specialize_on_alignment=["C", "stride_om", "stride_xm"])
def activation_kernel(
    out_ptr, x_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr,
    m, C, stride_om, stride_xm, eps,
    UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``out = relu((x - mean)*gamma/sqrt(var + eps) + beta)``.

    out, x [m, C, feature dtype, rows apart]; mean, var, gamma, beta [C]; UNIT divides C and both strides
    Grid: (row tiles * column tiles), columns fastest.
    """
    tile, column = divmod_pid(tl.program_id(0).to(tl.int64), tl.cdiv(C, BLOCK_C))
    first_row, local = tile * BLOCK_M, tl.arange(0, BLOCK_M)
    c = column * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < assume_multiple_of(C, UNIT)
    mask = (first_row + local < m)[:, None] & c_mask[None, :]
    stride = assume_multiple_of(stride_xm, UNIT)
    x_tile = x_ptr + first_row * stride + offsets(local, c, stride)
    x = tl.load(x_tile, mask=mask, other=0.0).to(tl.float32)
    mean, scale, beta = load_norm((mean_ptr, var_ptr, gamma_ptr, beta_ptr), c, c_mask, eps)
    out = relu((x - mean[None, :]) * scale[None, :] + beta[None, :])
    out_stride = assume_multiple_of(stride_om, UNIT)
    out_tile = out_ptr + first_row * out_stride + offsets(local, c, out_stride)
    tl.store(out_tile, to_storage(out, out_ptr.dtype.element_ty), mask=mask)
