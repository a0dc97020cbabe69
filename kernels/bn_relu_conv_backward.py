"""The backward kernel: lazy gradient in, data and weight gradient, ReLU's mask and BatchNorm's sums in one pass."""

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
    to_storage_unbiased,
)
from .reductions import finish_sums, reduce


@triton.jit(do_not_specialize=["elements", "splits"])
def reduce_kernel(out_ptr, partial_ptr, elements, splits, BLOCK_E: tl.constexpr):
    """``out = partial.sum(0)``, always in the same order.

    out [elements, fp32]; partial [splits, elements, fp32]
    Grid: (blocks of elements).
    """
    reduce(out_ptr, partial_ptr, elements, splits, tl.program_id(0).to(tl.int64), tl.num_programs(0), BLOCK_E)


@triton.jit
def _load_gradient(
    lazy_ptrs, first_row, local, k, mask, K, stride_Gm, stride_vm, dtype: tl.constexpr, LAZY: tl.constexpr
):
    """``G + a + b*(v - mu)`` as ``dtype``, 0 outside ``mask``; ``G`` itself where nothing is lazy."""
    g = tl.load(lazy_ptrs[0] + first_row * stride_Gm + offsets(local, k, stride_Gm), mask=mask, other=0.0)
    if LAZY:
        v_tile = lazy_ptrs[1] + first_row * stride_vm + offsets(local, k, stride_vm)
        v = tl.load(v_tile, mask=mask, other=0.0).to(tl.float32)
        a = tl.load(lazy_ptrs[2] + k, mask=k < K, other=0.0)
        b = tl.load(lazy_ptrs[3] + k, mask=k < K, other=0.0)
        mean = tl.load(lazy_ptrs[4] + k, mask=k < K, other=0.0)
        lazy = g.to(tl.float32) + a[None, :] + b[None, :] * (v - mean[None, :])
        g = to_storage(tl.where(mask, lazy, 0.0), dtype)
    return g


@triton.jit(
    do_not_specialize=["m", "layer", "threshold"],
    do_not_specialize_on_alignment=["K", "width", "pixels", "stride_gm", "stride_Dm", "stride_vm"],
)
def resolve_kernel(
    g_ptr, D_ptr, v_ptr, a_ptr, b_ptr, mean_ptr, seed_ptr,
    m, K, width, pixels,
    stride_gm, stride_Dm, stride_vm,
    layer, threshold, keep_scale,
    LAZY: tl.constexpr, HAS_DROPOUT: tl.constexpr, PER_CHANNEL: tl.constexpr, UNBIASED: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``g = (D + a + b*(v - mean)) * dropout's mask``: the lazy gradient, formed once; UNBIASED if it is to be summed.

    g [m, width, feature dtype, rows ``stride_gm`` apart]: 0 from column K on; D, v [m, K, feature dtype, rows apart]
    a, b, mean [K, fp32]; seed [1, int64]; UNIT divides K, ``width`` and the strides
    Grid: (row tiles * column tiles), columns fastest.
    """
    K, width = assume_multiple_of(K, UNIT), assume_multiple_of(width, UNIT)
    tile, column = divmod_pid(tl.program_id(0).to(tl.int64), tl.cdiv(width, BLOCK_C))
    first_row, local = tile * BLOCK_M, tl.arange(0, BLOCK_M)
    k = column * BLOCK_C + tl.arange(0, BLOCK_C)
    row_mask = first_row + local < m
    mask = row_mask[:, None] & (k < K)[None, :]
    g = _load_gradient(
        (D_ptr, v_ptr, a_ptr, b_ptr, mean_ptr), first_row, local, k, mask, K,
        assume_multiple_of(stride_Dm, UNIT), assume_multiple_of(stride_vm, UNIT), tl.float32, LAZY,
    ).to(tl.float32)  # fmt: skip
    if HAS_DROPOUT:
        g *= dropout_scale(seed_ptr, first_row + local, k, K, pixels, layer, threshold, keep_scale, PER_CHANNEL)
    g_mask = row_mask[:, None] & (k < width)[None, :]
    stride = assume_multiple_of(stride_gm, UNIT)
    g_tile = g_ptr + first_row * stride + offsets(local, k, stride)
    g = tl.where(mask, g, 0.0)
    if UNBIASED:
        g = to_storage_unbiased(g, offsets(first_row.to(tl.int32) + local, k, K), g_ptr.dtype.element_ty)
    else:
        g = to_storage(g, g_ptr.dtype.element_ty)
    tl.store(g_tile, g, mask=g_mask)


@triton.jit
def _unit_gradient(
    unit, place, lazy_ptrs, first_row, local, m, K, D, H, W, stride_Gm, stride_vm,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, K_BLOCKS: tl.constexpr,
    dtype: tl.constexpr, LAZY: tl.constexpr, G_UNIT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The output gradient ``[BLOCK_M, BLOCK_K]`` of those pixels that read this tile through one tap."""
    tap = unit // K_BLOCKS
    k = unit % K_BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
    # A pixel was read through a tap by the pixel on the tap's other side.
    dz, dy, dx = KD // 2 - tap // (KH * KW), KH // 2 - tap // KW % KH, KW // 2 - tap % KW
    distance, inside = neighbour(place, dz, dy, dx, m, D, H, W, KD * KH * KW)
    limit = tl.where(tap < KD * KH * KW, tl.cdiv(K, G_UNIT) * G_UNIT, 0)  # the last group may not be full
    mask = inside[:, None] & (k < limit)[None, :]
    strides = assume_multiple_of(stride_Gm, G_UNIT), assume_multiple_of(stride_vm, G_UNIT)
    return _load_gradient(lazy_ptrs, first_row + distance, local, k, mask, K, strides[0], strides[1], dtype, LAZY)


@triton.jit
def _unit_weight(
    unit, w_ptr, c, C, K, strides,
    K_BLOCKS: tl.constexpr, W_UNIT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tap's weights ``[BLOCK_K, BLOCK_C]``."""
    k = unit % K_BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
    offset = k[:, None] * assume_multiple_of(strides[0], W_UNIT) + c[None, :] * strides[1]
    mask = (k < K)[:, None] & (c < assume_multiple_of(C, W_UNIT))[None, :]
    return tl.load(w_ptr + unit // K_BLOCKS * assume_multiple_of(strides[2], W_UNIT) + offset, mask=mask, other=0.0)


@triton.jit
def _gradient_tile(D_ptr, first_row, local, c, mask, start, stride_Dm, D_UNIT: tl.constexpr):
    """Pointers to a tile of ``D``, which begins at channel ``start``, and what of it there is."""
    stride, first = assume_multiple_of(stride_Dm, D_UNIT), assume_multiple_of(start, D_UNIT)
    return D_ptr + first_row * stride + offsets(local, c - first, stride), mask & (c >= first)[None, :]


@triton.jit
def _load_so_far(D_ptr, first_row, local, c, m, C, start, stride_Dm, D_UNIT: tl.constexpr):
    """A tile of ``D`` as earlier layers left it."""
    mask = (first_row + local < m)[:, None] & (c < C)[None, :]
    D_tile, D_mask = _gradient_tile(D_ptr, first_row, local, c, mask, start, stride_Dm, D_UNIT)
    return tl.load(D_tile, mask=D_mask, other=0.0)


@triton.jit
def _through_norm(
    D_ptr, x_ptr, product, norm, sum_dy, sum_centred, activation, IS_ONLY: tl.constexpr, so_far, AHEAD: tl.constexpr,
    first_x, source, c, x_mask, mask, start, stride_Dm, stride_xm,
    HAS_INTO: tl.constexpr, ACCUMULATE: tl.constexpr, NEEDS_DY: tl.constexpr, NEEDS_WEIGHT: tl.constexpr,
    BALANCED: tl.constexpr, X_UNIT: tl.constexpr, D_UNIT: tl.constexpr,
):  # fmt: skip
    """Back through ReLU and BatchNorm at a tile of pixels: ``D``, the sums, the activation (added to that before).

    What ``D`` is added to has been read AHEAD, or is read here.
    """
    mean, scale, beta = norm
    stride = assume_multiple_of(stride_xm, X_UNIT)
    x = tl.load(x_ptr + first_x * stride + offsets(source, c, stride), mask=x_mask, other=0.0)
    centred = x.to(tl.float32) - mean[None, :]
    y = centred * scale[None, :] + beta[None, :]
    if NEEDS_DY:
        dy = tl.where((y <= 0.0) | ~mask, 0.0, product)  # a NaN in y passes the gradient on, as PyTorch's ReLU does
        sum_dy += dy
        sum_centred += dy * centred
        if HAS_INTO:
            share = dy * scale[None, :]
            D_tile, D_mask = _gradient_tile(D_ptr, first_x, source, c, mask, start, stride_Dm, D_UNIT)
            if AHEAD:
                share += so_far.to(tl.float32)
            elif ACCUMULATE:
                share += tl.load(D_tile, mask=D_mask, other=0.0).to(tl.float32)
            tl.store(D_tile, to_storage(share, D_ptr.dtype.element_ty), mask=D_mask)
    if NEEDS_WEIGHT:
        mine = relu(y)
        if BALANCED:
            mine -= relu(beta)[None, :]
        mine = tl.where(mask, mine, 0.0)
        activation = mine if IS_ONLY else activation + mine
    return sum_dy, sum_centred, activation


@triton.jit
def _add_products(a, b, sums, GROUP: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    """``sums[i] + a @ b[i]`` for each of GROUP."""
    added = ()
    for i in tl.static_range(GROUP):
        added += (dot(a, b[i], sums[i], INPUT_PRECISION),)
    return added


@triton.jit
def _products(
    lazy_ptrs, w_ptr, w, group, first_row, local, c, m, C, K, D, H, W, stride_Gm, stride_vm, w_strides,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, K_BLOCKS: tl.constexpr, GROUP: tl.constexpr,
    dtype: tl.constexpr, LAZY: tl.constexpr, NEEDS_WEIGHT: tl.constexpr, BOTH: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, G_UNIT: tl.constexpr, W_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``conv^T(g)`` ``[BLOCK_M, BLOCK_C]`` of a tile, and GROUP units' output gradients where weights need them."""
    place = pixel(first_row, local, D, H, W, KD * KH * KW)
    product = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    g = ()
    if NEEDS_WEIGHT:
        for i in tl.static_range(GROUP):
            g += (_unit_gradient(
                group * GROUP + i, place, lazy_ptrs, first_row, local, m, K, D, H, W, stride_Gm, stride_vm,
                KD, KH, KW, K_BLOCKS, dtype, LAZY, G_UNIT, BLOCK_K,
            ),)  # fmt: skip
            if BOTH:
                product = dot(g[i], w[i], product, INPUT_PRECISION)
    else:
        for unit in range(KD * KH * KW * K_BLOCKS):
            g_unit = _unit_gradient(
                unit, place, lazy_ptrs, first_row, local, m, K, D, H, W, stride_Gm, stride_vm,
                KD, KH, KW, K_BLOCKS, dtype, LAZY, G_UNIT, BLOCK_K,
            )  # fmt: skip
            w_unit = _unit_weight(unit, w_ptr, c, C, K, w_strides, K_BLOCKS, W_UNIT, BLOCK_K)
            product = dot(g_unit, w_unit, product, INPUT_PRECISION)
    return product, g


@triton.jit
def _through_windows(
    D_ptr, x_ptr, product, norm_ptrs, sum_dy, sum_centred, so_far, AHEAD: tl.constexpr,
    first_row, local, c, m, C, D, H, W, XD, XH, XW, start, stride_Dm, stride_xm, eps,
    PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, HAS_INTO: tl.constexpr, ACCUMULATE: tl.constexpr,
    NEEDS_DY: tl.constexpr, NEEDS_WEIGHT: tl.constexpr, BALANCED: tl.constexpr,
    X_UNIT: tl.constexpr, D_UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Back through pooling, ReLU and BatchNorm: ``D``, the sums, and the activation ``[BLOCK_M, BLOCK_C]`` in fp32."""
    PLACES: tl.constexpr = PD * PH * PW
    UNROLLED: tl.constexpr = 2 if PLACES % 2 == 0 else 1
    first_source, source = source_rows(first_row, local, D, H, W, XD, XH, XW, PD, PH, PW)
    if PLACES > 1:
        product *= 1.0 / PLACES
    row_mask, c_mask = first_row + local < m, c < C
    x_mask = row_mask[:, None] & (c < tl.cdiv(C, X_UNIT) * X_UNIT)[None, :]
    norm = load_norm(norm_ptrs, c, c_mask, eps)
    mask = row_mask[:, None] & c_mask[None, :]
    activation = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for first_place in range(0, PLACES, UNROLLED):  # all places written out would not fit into registers
        for n in tl.static_range(UNROLLED):
            begin = first_source + in_window(first_place + n, XH, XW, PH, PW)
            sum_dy, sum_centred, activation = _through_norm(
                D_ptr, x_ptr, product, norm, sum_dy, sum_centred, activation, PLACES == 1, so_far, AHEAD,
                begin, source, c, x_mask, mask, start, stride_Dm, stride_xm,
                HAS_INTO, ACCUMULATE, NEEDS_DY, NEEDS_WEIGHT, BALANCED, X_UNIT, D_UNIT,
            )  # fmt: skip
    if NEEDS_WEIGHT and PLACES > 1:
        activation *= 1.0 / PLACES
    return sum_dy, sum_centred, activation


@triton.jit
def _store_weights(
    dw_ptr, dw, group, split, columns, C, K, weights, dw_strides,
    UNITS: tl.constexpr, K_BLOCKS: tl.constexpr, GROUP: tl.constexpr, DW_UNIT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A split's share of the weight gradients of GROUP units."""
    for i in tl.static_range(GROUP):
        unit = group * GROUP + i
        k = unit % K_BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = (columns < assume_multiple_of(C, DW_UNIT))[:, None] & (k < tl.where(unit < UNITS, K, 0))[None, :]
        dw_tile = dw_ptr + split * assume_multiple_of(weights, DW_UNIT) + columns[:, None] * dw_strides[1]
        dw_tile += k[None, :] * assume_multiple_of(dw_strides[0], DW_UNIT)
        tl.store(dw_tile + unit // K_BLOCKS * assume_multiple_of(dw_strides[2], DW_UNIT), dw[i], mask=mask)


@triton.jit
def _pass_over_rows(
    D_ptr, dw_ptr, sum_ptrs, lazy_ptrs, x_ptr, norm_ptrs, w_ptr,
    m, values, C, K, D, H, W, XD, XH, XW, start, first_column, tiles_per_split, program, weights,
    stride_Dm, stride_Gm, stride_vm, stride_xm, w_strides, dw_strides, eps,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, K_BLOCKS: tl.constexpr, GROUP: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, LAZY: tl.constexpr, HAS_INTO: tl.constexpr,
    ACCUMULATE: tl.constexpr, HAS_BATCH: tl.constexpr, NEEDS_DY: tl.constexpr, NEEDS_WEIGHT: tl.constexpr,
    BALANCED: tl.constexpr, INPUT_PRECISION: tl.constexpr, X_UNIT: tl.constexpr, D_UNIT: tl.constexpr,
    G_UNIT: tl.constexpr, W_UNIT: tl.constexpr, DW_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What one program does: a column tile's data gradient, the weight gradients of GROUP units, or both."""
    C = assume_multiple_of(C, W_UNIT)
    if LAZY:  # otherwise rows are filled up to G_UNIT
        K = assume_multiple_of(K, G_UNIT)
    BOTH: tl.constexpr = NEEDS_DY and NEEDS_WEIGHT  # each output gradient serves both: then GROUP is all units
    AHEAD: tl.constexpr = NEEDS_DY and HAS_INTO and ACCUMULATE and PD * PH * PW * KD * KH * KW == 1
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    tiles, splits = tl.cdiv(m, BLOCK_M), tl.cdiv(tl.cdiv(m, BLOCK_M), tiles_per_split)
    row, column = divmod_pid(program, tl.cdiv(C, BLOCK_C) - first_column)
    group, split = divmod_pid(row, splits)
    group, split = group.to(tl.int32), split.to(tl.int32)
    columns = (first_column + column) * BLOCK_C + tl.arange(0, BLOCK_C)
    sum_dy = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)  # added up over rows at the end
    sum_centred = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    dw, w = (), ()
    for i in tl.static_range(GROUP if NEEDS_WEIGHT else 0):
        dw += (tl.zeros([BLOCK_C, BLOCK_K], tl.float32),)
        if BOTH:
            w += (_unit_weight(i, w_ptr, columns, C, K, w_strides, K_BLOCKS, W_UNIT, BLOCK_K),)
    first_tile = split * tiles_per_split  # 32 bits: a counter that lives throughout takes half the registers
    split = split.to(tl.int64)
    for step in range(tl.minimum(tiles_per_split, tiles - first_tile)):
        tile = (first_tile + step).to(tl.int64)
        first_row, local = tile * BLOCK_M, tl.arange(0, BLOCK_M) + opaque_zero(tile)
        c = columns + opaque_zero(tile)
        # On its way while the products are formed.
        so_far = _load_so_far(D_ptr, first_row, local, c, m, C, start, stride_Dm, D_UNIT) if AHEAD else 0.0
        product, g = _products(
            lazy_ptrs, w_ptr, w, group, first_row, local, c, m, C, K, D, H, W, stride_Gm, stride_vm, w_strides,
            KD, KH, KW, K_BLOCKS, GROUP, dtype, LAZY, NEEDS_WEIGHT, BOTH, INPUT_PRECISION, G_UNIT, W_UNIT,
            BLOCK_M, BLOCK_C, BLOCK_K,
        )  # fmt: skip
        sum_dy, sum_centred, activation = _through_windows(
            D_ptr, x_ptr, product, norm_ptrs, sum_dy, sum_centred, so_far, AHEAD, first_row, local, c,
            m, C, D, H, W, XD, XH, XW, start, stride_Dm, stride_xm, eps, PD, PH, PW,
            HAS_INTO, ACCUMULATE, NEEDS_DY, NEEDS_WEIGHT, BALANCED, X_UNIT, D_UNIT, BLOCK_M, BLOCK_C,
        )  # fmt: skip
        if NEEDS_WEIGHT:
            dw = _add_products(tl.trans(to_storage(activation, dtype)), g, dw, GROUP, INPUT_PRECISION)
    if NEEDS_DY:
        finish_sums(
            sum_ptrs, tl.sum(sum_dy, 0), tl.sum(sum_centred, 0), norm_ptrs,
            values, C, start, eps, split, splits, column, columns, HAS_BATCH, ACCUMULATE, BLOCK_C,
        )  # fmt: skip
    if NEEDS_WEIGHT:
        _store_weights(
            dw_ptr, dw, group, split, columns, C, K, weights, dw_strides,
            KD * KH * KW * K_BLOCKS, K_BLOCKS, GROUP, DW_UNIT, BLOCK_K,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "m", "values", "start", "first_column", "tiles_per_split", "weight_tiles_per_split", "data_programs",
        "weights", "pending_elements", "pending_splits",
    ],
    do_not_specialize_on_alignment=[
        "C", "K", "D", "H", "W", "XD", "XH", "XW", "stride_Dm", "stride_Gm", "stride_vm", "stride_xm",
        "stride_wk", "stride_wc", "stride_wt", "stride_dk", "stride_dc", "stride_dt",
    ],
)  # fmt: skip
def bn_relu_conv_backward_kernel(
    D_ptr, dw_ptr, dgamma_ptr, dbeta_ptr, da_ptr, db_ptr, pending_out_ptr, sums_ptr, counter_ptr, pending_ptr,
    G_ptr, v_ptr, a_ptr, b_ptr, v_mean_ptr, x_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, w_ptr,
    m, values, C, K, D, H, W, XD, XH, XW, start, first_column,
    tiles_per_split, weight_tiles_per_split, data_programs,
    weights, pending_elements, pending_splits,
    stride_Dm, stride_Gm, stride_vm, stride_xm, stride_wk, stride_wc, stride_wt, stride_dk, stride_dc, stride_dt,
    eps,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, K_BLOCKS: tl.constexpr, GROUP: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    LAZY: tl.constexpr, HAS_INTO: tl.constexpr, ACCUMULATE: tl.constexpr, HAS_BATCH: tl.constexpr,
    NEEDS_DY: tl.constexpr, NEEDS_WEIGHT: tl.constexpr, TOGETHER: tl.constexpr, HAS_PENDING: tl.constexpr,
    BALANCED: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    X_UNIT: tl.constexpr, D_UNIT: tl.constexpr, G_UNIT: tl.constexpr, W_UNIT: tl.constexpr, DW_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    WEIGHT_BLOCK_M: tl.constexpr, WEIGHT_BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """``dy = pool^T(conv^T(g)) * mask``, ``D (+)= gamma*r*dy``, ``dw[k, c, t] = sum_p g[p - t, k]*relu(bn(x[p, c]))``.

    D [values, C - start, feature dtype]; dw [splits, weights = K*C*taps, fp32]; dgamma, dbeta [C]; da, db [C - start]
    sums [splits, 2, C, fp32], counter [column tiles, int32, zeros]: see finish_sums; pending: see reduce_kernel
    G, v [m, K, feature dtype], a, b, v_mean [K, fp32]: g = G + a + b*(v - v_mean) if LAZY, else G, 0 up to G_UNIT
    x [values, C, feature dtype, readable up to X_UNIT]; mean, var, gamma, beta [C]; w [K, C, taps, feature dtype]
    Rows of x lie over [N, XD, XH, XW], those of G over [N, D, H, W]: as many, or pooled windows of PD*PH*PW pixels.
    BALANCED: g sums to 0 over all rows, so that dw takes ``relu(bn(x)) - relu(beta)``, which weighs g's roundings less.
    A unit is BLOCK_K output channels of one tap. One pass over x serves data and weights TOGETHER, or else the first
    ``data_programs`` programs form the data gradient, the others GROUP units of the weight gradient each.
    Grid: (groups of units * splits of the rows * column tiles, from ``first_column`` on for data), columns fastest.
    """
    pid = tl.program_id(0).to(tl.int64)
    sum_ptrs = (dgamma_ptr, dbeta_ptr, da_ptr, db_ptr, sums_ptr, counter_ptr)
    lazy_ptrs = (G_ptr, v_ptr, a_ptr, b_ptr, v_mean_ptr)
    norm_ptrs = (mean_ptr, var_ptr, gamma_ptr, beta_ptr)
    w_strides, dw_strides = (stride_wk, stride_wc, stride_wt), (stride_dk, stride_dc, stride_dt)
    if HAS_PENDING:
        reduce(pending_out_ptr, pending_ptr, pending_elements, pending_splits, pid, tl.num_programs(0), BLOCK_E)
    if pid < data_programs:
        if NEEDS_DY or TOGETHER:
            _pass_over_rows(
                D_ptr, dw_ptr, sum_ptrs, lazy_ptrs, x_ptr, norm_ptrs, w_ptr,
                m, values, C, K, D, H, W, XD, XH, XW, start, first_column, tiles_per_split, pid, weights,
                stride_Dm, stride_Gm, stride_vm, stride_xm, w_strides, dw_strides, eps,
                KD, KH, KW, K_BLOCKS, GROUP, PD, PH, PW, LAZY, HAS_INTO, ACCUMULATE, HAS_BATCH, NEEDS_DY,
                NEEDS_WEIGHT and TOGETHER, BALANCED, INPUT_PRECISION, X_UNIT, D_UNIT, G_UNIT, W_UNIT, DW_UNIT,
                BLOCK_M, BLOCK_C, BLOCK_K,
            )  # fmt: skip
    elif NEEDS_WEIGHT and not TOGETHER:
        _pass_over_rows(
            D_ptr, dw_ptr, sum_ptrs, lazy_ptrs, x_ptr, norm_ptrs, w_ptr,
            m, values, C, K, D, H, W, XD, XH, XW, start, 0, weight_tiles_per_split, pid - data_programs, weights,
            stride_Dm, stride_Gm, stride_vm, stride_xm, w_strides, dw_strides, eps,
            KD, KH, KW, K_BLOCKS, GROUP, PD, PH, PW, LAZY, HAS_INTO, ACCUMULATE, HAS_BATCH, False, True,
            BALANCED, INPUT_PRECISION, X_UNIT, D_UNIT, G_UNIT, W_UNIT, DW_UNIT, WEIGHT_BLOCK_M, WEIGHT_BLOCK_C, BLOCK_K,
        )  # fmt: skip
