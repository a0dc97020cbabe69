"""The forward kernel: BatchNorm and ReLU while loading, a convolution, dropout and moments while storing."""

import triton
import triton.language as tl

from .common import dot, dropout_scale, load_reader, neighbours, offsets, relu, store_moments, to_storage


@triton.jit(do_not_specialize=["layer", "threshold"])
def bn_relu_conv_kernel(
    out_ptr, partial_ptr, x_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, w_ptr, seed_ptr,
    m, C, K, D, H, W,
    stride_om, stride_xm, stride_wk, stride_wc, stride_wt,
    eps, layer, threshold, keep_scale,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    HAS_MOMENTS: tl.constexpr, HAS_DROPOUT: tl.constexpr, PER_CHANNEL: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``out = dropout(conv(relu((x - mean)*gamma/sqrt(var + eps) + beta)))``, padded with 0 after the ReLU.

    out [m, K, feature dtype, rows ``stride_om`` apart]
    partial [ceil(m/BLOCK_M), 3, K, fp32, contiguous]: mean (as two numbers) and M2 of a tile of ``out`` as stored
    x [m, C, feature dtype, rows ``stride_xm`` apart]; m runs over [N, D, H, W]
    mean, var, gamma, beta [C]; w [K, C, KD*KH*KW, feature dtype, any strides]; seed [1, int64]
    Grid: (row tiles * output-channel tiles), channels fastest.
    """
    pid = tl.program_id(0).to(tl.int64)
    k_tiles = tl.cdiv(K, BLOCK_N)
    tile = pid // k_tiles
    first_row, local = tile * BLOCK_M, tl.arange(0, BLOCK_M)
    k = (pid % k_tiles).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, k_mask = first_row + local < m, k < K
    c_blocks = tl.cdiv(C, BLOCK_C)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(KD * KH * KW * c_blocks):
        tap = step // c_blocks
        c = (step % c_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
        c_mask = c < C
        distance, inside = neighbours(first_row, local, tap, m, D, H, W, KD, KH, KW, 1)
        mask = inside[:, None] & c_mask[None, :]
        x_tile = x_ptr + (first_row + distance) * stride_xm
        x = tl.load(x_tile + offsets(local, c, stride_xm), mask=mask, other=0.0).to(tl.float32)
        mean, scale, beta = load_reader(mean_ptr, var_ptr, gamma_ptr, beta_ptr, c, c_mask, eps)
        # Centre first: with mean*scale folded into beta, digits would cancel where |mean| >> deviation.
        activation = relu((x - mean[None, :]) * scale[None, :] + beta[None, :])
        activation = to_storage(tl.where(mask, activation, 0.0), x_ptr.dtype.element_ty)
        w_offset = c[:, None] * stride_wc + k[None, :] * stride_wk + tap * stride_wt
        w = tl.load(w_ptr + w_offset, mask=c_mask[:, None] & k_mask[None, :], other=0.0)  # [BLOCK_C, BLOCK_N]
        acc = dot(activation, w, acc, INPUT_PRECISION)
    if HAS_DROPOUT:
        acc *= dropout_scale(seed_ptr, first_row + local, k, K, D * H * W, layer, threshold, keep_scale, PER_CHANNEL)
    stored = to_storage(acc, out_ptr.dtype.element_ty)
    mask = row_mask[:, None] & k_mask[None, :]
    tl.store(out_ptr + first_row * stride_om + offsets(local, k, stride_om), stored, mask=mask)
    if HAS_MOMENTS:
        count = tl.minimum(m - tile * BLOCK_M, BLOCK_M).to(tl.float32)
        store_moments(partial_ptr, tile, tl.where(mask, stored.to(tl.float32), 0.0), row_mask, count, k, K, k_mask)
