"""What the kernels share: the matrix product, BN-ReLU, positions of pixels, dropout's mask, moments of a tile."""

import triton
import triton.language as tl

# Interpreted, 16-bit brain floats are raw bit patterns: operands of a product are widened there.
INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc, INPUT_PRECISION: tl.constexpr):
    """``acc + a @ b`` in fp32."""
    if INTERPRET:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        acc = tl.dot(a, b, acc, input_precision=INPUT_PRECISION)
    return acc


@triton.jit
def to_storage(x, dtype: tl.constexpr):
    """``x``, fp32, rounded to the nearest value of ``dtype``; the interpreter would truncate to bfloat16."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def load_reader(mean_ptr, var_ptr, gamma_ptr, beta_ptr, channels, mask, eps):
    """One BatchNorm's ``mu, gamma/sqrt(var + eps), beta`` of some channels, in fp32."""
    mean = tl.load(mean_ptr + channels, mask=mask, other=0.0).to(tl.float32)
    var = tl.load(var_ptr + channels, mask=mask, other=1.0).to(tl.float32)
    gamma = tl.load(gamma_ptr + channels, mask=mask, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + channels, mask=mask, other=0.0).to(tl.float32)
    return mean, gamma * (1.0 / tl.sqrt(var + eps)), beta


@triton.jit
def relu(y):
    """``max(y, 0)`` that keeps NaN, as PyTorch's."""
    return tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def neighbours(
    first_row, local, tap, m, D, H, W, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SIGN: tl.constexpr
):
    """How many rows away ``SIGN`` times one tap's offset lies, and for which rows that is inside their image."""
    row = first_row.to(tl.int32) + local  # m < 2**31, and a 64-bit division is slow
    if KD * KH * KW == 1:
        distance = 0
        inside = row < m
    else:
        dz = SIGN * (tap // (KH * KW) - KD // 2)
        dy = SIGN * (tap // KW % KH - KH // 2)
        dx = SIGN * (tap % KW - KW // 2)
        x = row % W + dx
        y = row // W % H + dy
        z = row // (W * H) % D + dz
        inside = (row < m) & (x >= 0) & (x < W) & (y >= 0) & (y < H) & (z >= 0) & (z < D)
        distance = (dz * H + dy) * W + dx
    return distance, inside


@triton.jit
def offsets(local, columns, stride_m):
    """Of a tile's elements from its first row: 32 bits, because the first row's own offset is a 64-bit scalar."""
    return local[:, None] * stride_m + columns[None, :]


@triton.jit
def dropout_scale(seed_ptr, rows, channels, C, pixels, layer, threshold, scale, PER_CHANNEL: tl.constexpr):
    """``scale`` where an element is kept, else 0: Philox-4x32-10 on the element's index, as in philox.py."""
    if PER_CHANNEL:
        rows = rows // pixels
    index = rows[:, None] * C + channels[None, :]  # [BLOCK_M, BLOCK_N], int64
    counter = index >> 2
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    third = (low * 0 + layer).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), low, high, third, tl.zeros_like(low))
    word = index & 3
    first = tl.where(word == 0, w0, w1)
    second = tl.where(word == 2, w2, w3)
    drawn = tl.where(word < 2, first, second)
    return tl.where(drawn.to(tl.int64) >= threshold, scale, 0.0)


@triton.jit
def store_moments(partial_ptr, tile, stored, row_mask, count, c, C, c_mask):
    """Mean and ``M2`` of a tile's columns in fp32; ``stored`` [BLOCK_M, BLOCK_N] is 0 outside ``row_mask``.

    The mean is kept as two numbers, what one pass finds and what that lost to rounding: where |mean| is thousands of
    deviations, the difference between two tiles' means would not survive in one.
    """
    mean = tl.sum(stored, 0) / count
    centred = tl.where(row_mask[:, None], stored - mean[None, :], 0.0)
    rest = tl.sum(centred, 0) / count
    m2 = tl.sum(centred * centred, 0) - count * rest * rest
    tl.store(partial_ptr + tile * 3 * C + c, mean, mask=c_mask)
    tl.store(partial_ptr + (tile * 3 + 1) * C + c, rest, mask=c_mask)
    tl.store(partial_ptr + (tile * 3 + 2) * C + c, m2, mask=c_mask)
