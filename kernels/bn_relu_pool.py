"""The kernels round the blocks: BatchNorm, ReLU and maximum pooling (stem), or the mean over all pixels (head)."""

import triton
import triton.language as tl

from .common import assume_multiple_of, divmod_pid, load_norm, offsets, opaque_zero, relu, to_storage
from .reductions import add_tile, finish_moments, finish_sums


@triton.jit
def _largest(
    x_ptr, norm_ptrs, rows, row_mask, c, C, D, H, W, XD, XH, XW, stride_xm, eps,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    OD: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The maximum over each window, and at which tap: the first one in scan order, or the last NaN, as PyTorch's.

    Values are compared as they would be stored. Every window has a pixel in the image, and no value is negative.
    """
    c_mask = c < C
    mean, scale, beta = load_norm(norm_ptrs, c, c_mask, eps)
    n, z, y, x = rows // (W * H * D), rows // (W * H) % D * SD - OD, rows // W % H * SH - OH, rows % W * SW - OW
    first = ((n * XD + z) * XH + y) * XW + x
    best = tl.full([rows.shape[0], c.shape[0]], -1.0, tl.float32)
    tap = tl.zeros([rows.shape[0], c.shape[0]], tl.int32)
    for t in tl.static_range(KD * KH * KW):
        dz, dy, dx = t // (KH * KW), t // KW % KH, t % KW
        inside = (
            row_mask & (z + dz >= 0) & (z + dz < XD) & (y + dy >= 0) & (y + dy < XH) & (x + dx >= 0) & (x + dx < XW)
        )
        mask = inside[:, None] & c_mask[None, :]
        row = (first + (dz * XH + dy) * XW + dx).to(tl.int64)
        stride = assume_multiple_of(stride_xm, UNIT)
        v = tl.load(x_ptr + row[:, None] * stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
        v = relu((v - mean[None, :]) * scale[None, :] + beta[None, :])
        v = to_storage(v, x_ptr.dtype.element_ty).to(tl.float32)
        larger = mask & ((v > best) | (v != v))
        best = tl.where(larger, v, best)
        tap = tl.where(larger, t, tap)
    return best, tap


@triton.jit(
    do_not_specialize=["m", "tiles_per_program"],
    do_not_specialize_on_alignment=["C", "D", "H", "W", "XD", "XH", "XW", "stride_om", "stride_xm"],
)
def bn_relu_max_pool_kernel(
    out_ptr, out_mean_ptr, out_var_ptr, tap_ptr, partial_ptr, counter_ptr,
    x_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr,
    m, C, D, H, W, XD, XH, XW, tiles_per_program,
    stride_om, stride_xm,
    eps,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    OD: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    HAS_MOMENTS: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``out = max_pool(relu((x - mean)*gamma/sqrt(var + eps) + beta))``, or, for backward, where each maximum lies.

    out [m, C, feature dtype, rows apart], m over [N, D, H, W], its moments out_mean, out_var [C, fp32]; or else
    tap [m, C, uint8]; partial, counter: see finish_moments
    x [N*XD*XH*XW, C, feature dtype, rows apart]; mean, var, gamma, beta [C]; UNIT divides C and the strides
    Windows of KD*KH*KW taps, SD, SH, SW apart, the first one OD, OH, OW before the image.
    Grid: (programs * column tiles), columns fastest; a program has ``tiles_per_program`` tiles of BLOCK_M rows.
    """
    C = assume_multiple_of(C, UNIT)
    program, column = divmod_pid(tl.program_id(0).to(tl.int64), tl.cdiv(C, BLOCK_C))
    tiles = tl.cdiv(m, BLOCK_M)
    first_tile = program * tiles_per_program
    sums = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    for i in range(tl.minimum(tiles_per_program, tiles - first_tile)):
        tile = first_tile + i
        c = column * BLOCK_C + tl.arange(0, BLOCK_C) + opaque_zero(tile)
        rows = (tile * BLOCK_M).to(tl.int32) + tl.arange(0, BLOCK_M)
        row_mask = rows < m
        best, tap = _largest(
            x_ptr, (mean_ptr, var_ptr, gamma_ptr, beta_ptr), rows, row_mask, c, C, D, H, W, XD, XH, XW, stride_xm, eps,
            KD, KH, KW, SD, SH, SW, OD, OH, OW, UNIT,
        )  # fmt: skip
        mask = row_mask[:, None] & (c < C)[None, :]
        if tap_ptr is not None:
            taps = tap_ptr + tile * BLOCK_M * C + offsets(tl.arange(0, BLOCK_M), c, C)
            tl.store(taps, tap.to(tl.uint8), mask=mask)
        else:
            out_tile = out_ptr + tile * BLOCK_M * assume_multiple_of(stride_om, UNIT)
            out_tile += offsets(tl.arange(0, BLOCK_M), c, assume_multiple_of(stride_om, UNIT))
            tl.store(out_tile, to_storage(best, out_ptr.dtype.element_ty), mask=mask)
        if HAS_MOMENTS:
            count = tl.minimum(m - tile * BLOCK_M, BLOCK_M).to(tl.float32)
            origin_ptr = partial_ptr + program * 3 * C
            values = tl.where(mask, best, 0.0)
            sums = add_tile(sums, origin_ptr, values, row_mask, count, i == 0, c, C, BLOCK_C)
    if HAS_MOMENTS:
        c = column * BLOCK_C + tl.arange(0, BLOCK_C)
        finish_moments(
            out_mean_ptr, out_var_ptr, partial_ptr, counter_ptr, sums, program, tl.cdiv(tiles, tiles_per_program),
            tiles_per_program * BLOCK_M, m, column, c, C,
        )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["C", "pixels", "stride_om", "stride_xm"])
def bn_relu_mean_kernel(
    out_ptr, x_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr,
    C, pixels,
    stride_om, stride_xm,
    eps,
    UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``out[n] = mean_p relu((x[n, p] - mean)*gamma/sqrt(var + eps) + beta)``.

    out [N, C, feature dtype, rows apart]; x [N*pixels, C, feature dtype, rows apart]; mean, var, gamma, beta [C]
    UNIT divides C and the strides
    Grid: (images * column tiles), columns fastest.
    """
    C = assume_multiple_of(C, UNIT)
    image, column = divmod_pid(tl.program_id(0).to(tl.int64), tl.cdiv(C, BLOCK_C))
    c = column * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    mean, scale, beta = load_norm((mean_ptr, var_ptr, gamma_ptr, beta_ptr), c, c_mask, eps)
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    stride = assume_multiple_of(stride_xm, UNIT)
    for tile in range(tl.cdiv(pixels, BLOCK_M)):
        local = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (local < pixels)[:, None] & c_mask[None, :]
        x_tile = x_ptr + (image * pixels + tile * BLOCK_M) * stride + offsets(tl.arange(0, BLOCK_M), c, stride)
        x = tl.load(x_tile, mask=mask, other=0.0).to(tl.float32)
        total += tl.where(mask, relu((x - mean[None, :]) * scale[None, :] + beta[None, :]), 0.0)
    out = to_storage(tl.sum(total, 0) / pixels, out_ptr.dtype.element_ty)
    tl.store(out_ptr + image * assume_multiple_of(stride_om, UNIT) + c, out, mask=c_mask)


@triton.jit
def _from_windows(
    g_ptr, tap_ptr, rows, row_mask, c, C, D, H, W, XD, XH, XW, stride_gm,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    OD: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """What a pixel gets from the windows that it is the maximum of: at most ``ceil(K/S)`` in each direction."""
    ND: tl.constexpr = (KD + SD - 1) // SD
    NH: tl.constexpr = (KH + SH - 1) // SH
    NW: tl.constexpr = (KW + SW - 1) // SW
    n, z, y, x = rows // (XW * XH * XD), rows // (XW * XH) % XD + OD, rows // XW % XH + OH, rows % XW + OW
    total = tl.zeros([rows.shape[0], c.shape[0]], tl.float32)
    for i in tl.static_range(ND * NH * NW):
        wz, wy, wx = z // SD - i // (NH * NW), y // SH - i // NW % NH, x // SW - i % NW
        dz, dy, dx = z - wz * SD, y - wy * SH, x - wx * SW
        inside = row_mask & (wz >= 0) & (wz < D) & (wy >= 0) & (wy < H) & (wx >= 0) & (wx < W)
        inside &= (dz < KD) & (dy < KH) & (dx < KW)
        mask = inside[:, None] & (c < C)[None, :]
        window = (((n * D + wz) * H + wy) * W + wx).to(tl.int64)[:, None]
        tap = tl.load(tap_ptr + window * C + c[None, :], mask=mask, other=255)
        stride = assume_multiple_of(stride_gm, UNIT)
        g = tl.load(g_ptr + window * stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
        mine = (dz * KH + dy) * KW + dx
        total += tl.where(mask & (tap.to(tl.int32) == mine[:, None]), g, 0.0)
    return total


@triton.jit(
    do_not_specialize=["m", "tiles_per_split"],
    do_not_specialize_on_alignment=[
        "C", "pixels", "D", "H", "W", "XD", "XH", "XW", "stride_Dm", "stride_gm", "stride_xm",
    ],
)  # fmt: skip
def bn_relu_pool_backward_kernel(
    D_ptr, dgamma_ptr, dbeta_ptr, da_ptr, db_ptr, sums_ptr, counter_ptr,
    g_ptr, tap_ptr, x_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr,
    m, C, pixels, D, H, W, XD, XH, XW, tiles_per_split,
    stride_Dm, stride_gm, stride_xm,
    eps,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    OD: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    MAXIMUM: tl.constexpr, HAS_INTO: tl.constexpr, HAS_BATCH: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``dy = pool^T(g) * mask``, ``D = gamma*r*dy``, and BatchNorm's sums; the pooling is maximum, or else mean.

    D [m, C, feature dtype, rows apart], m over [N, XD, XH, XW]; dgamma, dbeta, da, db [C, fp32]
    sums [splits, 2, C, fp32], counter [column tiles, int32, zeros]: see finish_sums
    g [windows or images, C, feature dtype, rows apart]; tap [windows, C, uint8]: where each maximum lies
    x [m, C, feature dtype, rows apart]; mean, var, gamma, beta [C]; UNIT divides C and the strides
    Grid: (splits of the rows * column tiles), columns fastest; a split has ``tiles_per_split`` tiles of BLOCK_M rows.
    """
    C = assume_multiple_of(C, UNIT)
    split, column = divmod_pid(tl.program_id(0).to(tl.int64), tl.cdiv(C, BLOCK_C))
    tiles = tl.cdiv(m, BLOCK_M)
    columns = column * BLOCK_C + tl.arange(0, BLOCK_C)
    sum_dy = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    sum_centred = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    norm_ptrs = (mean_ptr, var_ptr, gamma_ptr, beta_ptr)
    first_tile = split * tiles_per_split
    for step in range(tl.minimum(tiles_per_split, tiles - first_tile)):
        tile = first_tile + step
        c = columns + opaque_zero(tile)
        local = tl.arange(0, BLOCK_M)
        rows = (tile * BLOCK_M).to(tl.int32) + local
        row_mask, c_mask = rows < m, c < C
        mask = row_mask[:, None] & c_mask[None, :]
        if MAXIMUM:
            product = _from_windows(
                g_ptr, tap_ptr, rows, row_mask, c, C, D, H, W, XD, XH, XW, stride_gm,
                KD, KH, KW, SD, SH, SW, OD, OH, OW, UNIT,
            )  # fmt: skip
        else:
            image = (rows // pixels).to(tl.int64)[:, None]
            product = tl.load(g_ptr + image * assume_multiple_of(stride_gm, UNIT) + c[None, :], mask=mask, other=0.0)
            product = product.to(tl.float32) / pixels
        stride = assume_multiple_of(stride_xm, UNIT)
        x = tl.load(x_ptr + tile * BLOCK_M * stride + offsets(local, c, stride), mask=mask, other=0.0)
        mean, scale, beta = load_norm(norm_ptrs, c, c_mask, eps)
        centred = x.to(tl.float32) - mean[None, :]
        y = centred * scale[None, :] + beta[None, :]
        dy = tl.where((y <= 0.0) | ~mask, 0.0, product)  # NaN in y passes the gradient on, as PyTorch's ReLU
        sum_dy += dy
        sum_centred += dy * centred
        if HAS_INTO:
            D_stride = assume_multiple_of(stride_Dm, UNIT)
            D_tile = D_ptr + tile * BLOCK_M * D_stride + offsets(local, c, D_stride)
            tl.store(D_tile, to_storage(dy * scale[None, :], D_ptr.dtype.element_ty), mask=mask)
    sum_ptrs = (dgamma_ptr, dbeta_ptr, da_ptr, db_ptr, sums_ptr, counter_ptr)
    finish_sums(
        sum_ptrs, tl.sum(sum_dy, 0), tl.sum(sum_centred, 0), norm_ptrs,
        m, C, 0, eps, split, tl.cdiv(tiles, tiles_per_split), column, columns, HAS_BATCH, False, BLOCK_C,
    )  # fmt: skip
