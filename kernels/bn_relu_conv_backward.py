"""The backward kernels: data gradient with ReLU's mask and BatchNorm's sums, weight gradient, and their reduction."""

import triton
import triton.language as tl

from .common import dot, dropout_scale, load_reader, neighbours, offsets, relu, to_storage


@triton.jit
def load_lazy(
    D_ptr, v_ptr, a_ptr, b_ptr, mean_ptr, first_row, local, k, mask, k_mask, stride_Dm, stride_vm, LAZY: tl.constexpr
):
    """``D + a + b*(v - mu)`` in fp32, 0 outside ``mask``; ``D`` itself where nothing is lazy."""
    g = tl.load(D_ptr + first_row * stride_Dm + offsets(local, k, stride_Dm), mask=mask, other=0.0).to(tl.float32)
    if LAZY:
        v_tile = v_ptr + first_row * stride_vm
        v = tl.load(v_tile + offsets(local, k, stride_vm), mask=mask, other=0.0).to(tl.float32)
        a = tl.load(a_ptr + k, mask=k_mask, other=0.0)
        b = tl.load(b_ptr + k, mask=k_mask, other=0.0)
        mean = tl.load(mean_ptr + k, mask=k_mask, other=0.0)
        g = tl.where(mask, g + a[None, :] + b[None, :] * (v - mean[None, :]), 0.0)
    return g


@triton.jit
def masked_gradient(
    D_ptr,
    product,
    x,
    reader,
    first_row,
    local,
    c,
    mask,
    start,
    stride_Dm,
    HAS_INTO: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """``dy, x - mu, y`` from the convolution's ``product``; ``D (+)= gamma*r*dy`` for channels from ``start`` on."""
    mean, scale, beta = reader
    centred = x - mean[None, :]
    y = centred * scale[None, :] + beta[None, :]
    dy = tl.where((y <= 0.0) | ~mask, 0.0, product)  # a NaN in y passes the gradient on, as PyTorch's ReLU does
    if HAS_INTO:
        D_mask = mask & (c >= start)[None, :]
        D_tile = D_ptr + first_row * stride_Dm + offsets(local, c - start, stride_Dm)
        share = dy * scale[None, :]
        if ACCUMULATE:
            share += tl.load(D_tile, mask=D_mask, other=0.0).to(tl.float32)
        tl.store(D_tile, to_storage(share, D_ptr.dtype.element_ty), mask=D_mask)
    return dy, centred, y


@triton.jit(do_not_specialize=["layer", "threshold"])
def resolve_kernel(
    g_ptr, D_ptr, v_ptr, a_ptr, b_ptr, mean_ptr, seed_ptr,
    m, K, pixels,
    stride_gm, stride_Dm, stride_vm,
    layer, threshold, keep_scale,
    LAZY: tl.constexpr, HAS_DROPOUT: tl.constexpr, PER_CHANNEL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``g = (D + a + b*(v - mean)) * dropout's mask``: the lazy gradient, formed once.

    g, D, v [m, K, feature dtype, rows ``stride_*m`` apart]; g may be D
    a, b, mean [K, fp32]; seed [1, int64]
    Grid: (row tiles * column tiles), columns fastest.
    """
    pid = tl.program_id(0).to(tl.int64)
    column_tiles = tl.cdiv(K, BLOCK_C)
    first_row, local = pid // column_tiles * BLOCK_M, tl.arange(0, BLOCK_M)
    k = (pid % column_tiles).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
    k_mask = k < K
    mask = (first_row + local < m)[:, None] & k_mask[None, :]
    g = load_lazy(D_ptr, v_ptr, a_ptr, b_ptr, mean_ptr, first_row, local, k, mask, k_mask, stride_Dm, stride_vm, LAZY)
    if HAS_DROPOUT:
        g *= dropout_scale(seed_ptr, first_row + local, k, K, pixels, layer, threshold, keep_scale, PER_CHANNEL)
    tl.store(
        g_ptr + first_row * stride_gm + offsets(local, k, stride_gm), to_storage(g, g_ptr.dtype.element_ty), mask=mask
    )


@triton.jit(do_not_specialize=["first", "start", "tiles_per_split"])
def pointwise_backward_kernel(
    D_ptr, dw_ptr, sums_ptr, G_ptr, v_ptr, a_ptr, b_ptr, v_mean_ptr,
    x_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, w_ptr,
    m, C, K, first, start, tiles_per_split,
    stride_Dm, stride_Gm, stride_vm, stride_xm, stride_wk, stride_wc,
    eps,
    LAZY: tl.constexpr, HAS_INTO: tl.constexpr, ACCUMULATE: tl.constexpr, NEEDS_DY: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """1x1: ``dy = (g @ w) * mask``, ``D (+)= gamma*r*dy``, ``dw = g^T @ relu(bn(x))``; g is lazy, read once.

    D [m, C - start, feature dtype]; dw [splits, K, C, fp32]; sums [splits, 2, C, fp32]: sum(dy), sum(dy*(x - mean))
    G, v [m, K, feature dtype], a, b, v_mean [K, fp32]: g = G + a + b*(v - v_mean)
    x [m, C, feature dtype]; mean, var, gamma, beta [C]; w [K, C, feature dtype, any strides]; K <= BLOCK_K
    Grid: (splits of the rows * column tiles from channel ``first`` on), columns fastest.
    """
    pid = tl.program_id(0).to(tl.int64)
    column_tiles = tl.cdiv(C - first, BLOCK_C)
    split = pid // column_tiles
    c = first + (pid % column_tiles).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)
    c_mask, k_mask = c < C, k < K
    reader = load_reader(mean_ptr, var_ptr, gamma_ptr, beta_ptr, c, c_mask, eps)
    w_offset = k[:, None] * stride_wk + c[None, :] * stride_wc
    w = tl.load(w_ptr + w_offset, mask=k_mask[:, None] & c_mask[None, :], other=0.0)  # [BLOCK_K, BLOCK_C]
    local = tl.arange(0, BLOCK_M)
    sum_dy = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    sum_centred = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    dw = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    for i in range(tiles_per_split):
        first_row = (split * tiles_per_split + i) * BLOCK_M
        row_mask = first_row + local < m
        g_mask = row_mask[:, None] & k_mask[None, :]
        g = load_lazy(
            G_ptr, v_ptr, a_ptr, b_ptr, v_mean_ptr, first_row, local, k, g_mask, k_mask, stride_Gm, stride_vm, LAZY
        )
        g = to_storage(g, x_ptr.dtype.element_ty)  # [BLOCK_M, BLOCK_K]
        mask = row_mask[:, None] & c_mask[None, :]
        x_tile = x_ptr + first_row * stride_xm
        x = tl.load(x_tile + offsets(local, c, stride_xm), mask=mask, other=0.0).to(tl.float32)
        product = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        if NEEDS_DY:
            product = dot(g, w, product, INPUT_PRECISION)
        dy, centred, y = masked_gradient(
            D_ptr, product, x, reader, first_row, local, c, mask, start, stride_Dm, HAS_INTO, ACCUMULATE
        )
        sum_dy += dy
        sum_centred += dy * centred
        if NEEDS_WEIGHT:
            activation = to_storage(tl.where(mask, relu(y), 0.0), x_ptr.dtype.element_ty)
            dw = dot(tl.trans(g), activation, dw, INPUT_PRECISION)
    if NEEDS_DY:
        tl.store(sums_ptr + split * 2 * C + c, tl.sum(sum_dy, 0), mask=c_mask)
        tl.store(sums_ptr + (split * 2 + 1) * C + c, tl.sum(sum_centred, 0), mask=c_mask)
    if NEEDS_WEIGHT:
        dw_offset = (split * K + k)[:, None] * C + c[None, :]
        tl.store(dw_ptr + dw_offset, dw, mask=k_mask[:, None] & c_mask[None, :])


@triton.jit(do_not_specialize=["first", "start", "tiles_per_split"])
def data_gradient_kernel(
    D_ptr, sums_ptr, g_ptr, x_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, w_ptr,
    m, C, K, D, H, W, first, start, tiles_per_split,
    stride_Dm, stride_gm, stride_xm, stride_wk, stride_wc, stride_wt,
    eps,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    HAS_INTO: tl.constexpr, ACCUMULATE: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``dy = conv^T(g) * mask``, ``D (+)= gamma*r*dy``, and the sums of ``dy`` and ``dy*(x - mean)``.

    D [m, C - start, feature dtype]; sums [splits, 2, C, fp32]
    g [m, K, feature dtype]; x [m, C, feature dtype]; m runs over [N, D, H, W]
    mean, var, gamma, beta [C]; w [K, C, KD*KH*KW, feature dtype, any strides]
    Grid: (splits of the rows * column tiles from channel ``first`` on), columns fastest.
    """
    pid = tl.program_id(0).to(tl.int64)
    column_tiles = tl.cdiv(C - first, BLOCK_C)
    split = pid // column_tiles
    c = first + (pid % column_tiles).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    reader = load_reader(mean_ptr, var_ptr, gamma_ptr, beta_ptr, c, c_mask, eps)
    k_blocks = tl.cdiv(K, BLOCK_K)
    local = tl.arange(0, BLOCK_M)
    sum_dy = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    sum_centred = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for i in range(tiles_per_split):
        first_row = (split * tiles_per_split + i) * BLOCK_M
        product = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for step in range(KD * KH * KW * k_blocks):
            tap = step // k_blocks
            k = (step % k_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
            k_mask = k < K
            # A pixel was read through a tap by the pixel on the tap's other side.
            distance, inside = neighbours(first_row, local, tap, m, D, H, W, KD, KH, KW, -1)
            g_mask = inside[:, None] & k_mask[None, :]
            g_tile = g_ptr + (first_row + distance) * stride_gm
            g = tl.load(g_tile + offsets(local, k, stride_gm), mask=g_mask, other=0.0)  # [BLOCK_M, BLOCK_K]
            w_offset = k[:, None] * stride_wk + c[None, :] * stride_wc + tap * stride_wt
            w = tl.load(w_ptr + w_offset, mask=k_mask[:, None] & c_mask[None, :], other=0.0)  # [BLOCK_K, BLOCK_C]
            product = dot(g, w, product, INPUT_PRECISION)
        mask = (first_row + local < m)[:, None] & c_mask[None, :]
        x_tile = x_ptr + first_row * stride_xm
        x = tl.load(x_tile + offsets(local, c, stride_xm), mask=mask, other=0.0).to(tl.float32)
        dy, centred, _ = masked_gradient(
            D_ptr, product, x, reader, first_row, local, c, mask, start, stride_Dm, HAS_INTO, ACCUMULATE
        )
        sum_dy += dy
        sum_centred += dy * centred
    tl.store(sums_ptr + split * 2 * C + c, tl.sum(sum_dy, 0), mask=c_mask)
    tl.store(sums_ptr + (split * 2 + 1) * C + c, tl.sum(sum_centred, 0), mask=c_mask)


@triton.jit(do_not_specialize=["tiles_per_split"])
def weight_gradient_kernel(
    dw_ptr, g_ptr, x_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr,
    m, C, K, D, H, W, tiles_per_split,
    stride_gm, stride_xm,
    eps,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``dw[k, tap, c] = sum_p g[p, k] * relu(bn(x[p + tap, c]))``.

    dw [splits, K, KD*KH*KW, C, fp32, contiguous]
    g [m, K, feature dtype]; x [m, C, feature dtype]; mean, var, gamma, beta [C]
    Grid: (splits of the rows * taps * k tiles * column tiles), columns fastest.
    """
    TAPS: tl.constexpr = KD * KH * KW
    pid = tl.program_id(0).to(tl.int64)
    column_tiles = tl.cdiv(C, BLOCK_C)
    k_tiles = tl.cdiv(K, BLOCK_K)
    c = (pid % column_tiles).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = (pid // column_tiles % k_tiles).to(tl.int32) * BLOCK_K + tl.arange(0, BLOCK_K)
    tap = (pid // (column_tiles * k_tiles) % TAPS).to(tl.int32)
    split = pid // (column_tiles * k_tiles * TAPS)
    c_mask, k_mask = c < C, k < K
    mean, scale, beta = load_reader(mean_ptr, var_ptr, gamma_ptr, beta_ptr, c, c_mask, eps)
    local = tl.arange(0, BLOCK_M)
    dw = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    for i in range(tiles_per_split):
        first_row = (split * tiles_per_split + i) * BLOCK_M
        g_mask = (first_row + local < m)[:, None] & k_mask[None, :]
        g_tile = g_ptr + first_row * stride_gm
        g = tl.load(g_tile + offsets(local, k, stride_gm), mask=g_mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        distance, inside = neighbours(first_row, local, tap, m, D, H, W, KD, KH, KW, 1)
        mask = inside[:, None] & c_mask[None, :]
        x_tile = x_ptr + (first_row + distance) * stride_xm
        x = tl.load(x_tile + offsets(local, c, stride_xm), mask=mask, other=0.0).to(tl.float32)
        activation = relu((x - mean[None, :]) * scale[None, :] + beta[None, :])
        activation = to_storage(tl.where(mask, activation, 0.0), x_ptr.dtype.element_ty)  # [BLOCK_M, BLOCK_C]
        dw = dot(tl.trans(g), activation, dw, INPUT_PRECISION)
    dw_offset = ((split * K + k) * TAPS + tap)[:, None] * C + c[None, :]
    tl.store(dw_ptr + dw_offset, dw, mask=k_mask[:, None] & c_mask[None, :])


@triton.jit
def _add_up(partial_ptr, e, mask, n, splits, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr):
    """The sum over ``splits`` of elements ``e`` of partial [splits, n]."""
    total = tl.zeros([BLOCK_S, BLOCK_E], tl.float32)
    for begin in range(0, splits, BLOCK_S):
        s = begin + tl.arange(0, BLOCK_S).to(tl.int64)
        both = (s < splits)[:, None] & mask[None, :]
        total += tl.load(partial_ptr + (s * n)[:, None] + e[None, :], mask=both, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["first", "weights", "sums", "weight_splits", "sum_splits"])
def reduce_partials_kernel(
    dw_ptr, sums_ptr, dw_partial_ptr, sums_partial_ptr,
    C, taps, first, weights, sums, weight_splits, sum_splits,
    stride_wk, stride_wc, stride_wt,
    BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Adds up what the splits of the rows found, always in the same order: two runs agree bit for bit.

    dw [K, C, taps, fp32, any strides] from dw_partial [weight_splits, K, taps, C, fp32]; weights = K*taps*C, or 0
    sums [2, C, fp32], from channel ``first`` on, from sums_partial [sum_splits, 2, C, fp32]; sums = 2*C, or 0
    Grid: (blocks of the weights + blocks of the sums).
    """
    block = tl.program_id(0).to(tl.int64)
    weight_blocks = tl.cdiv(weights, BLOCK_E)
    if block < weight_blocks:
        e = block * BLOCK_E + tl.arange(0, BLOCK_E)
        mask = e < weights
        total = _add_up(dw_partial_ptr, e, mask, weights, weight_splits, BLOCK_S, BLOCK_E)
        row = e // C
        out = dw_ptr + row // taps * stride_wk + row % taps * stride_wt + e % C * stride_wc
        tl.store(out, total, mask=mask)
    else:
        e = (block - weight_blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
        mask = (e < sums) & (e % C >= first)
        total = _add_up(sums_partial_ptr, e, mask, sums, sum_splits, BLOCK_S, BLOCK_E)
        tl.store(sums_ptr + e, total, mask=mask)
