"""What the kernels share: the matrix product, BN-ReLU, pixels and their neighbours, dropout's mask, arrival."""

import triton
import triton.language as tl

# Interpreted, 16-bit brain floats are raw bit patterns: operands of a product are widened there.
INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _to_tf32(x):
    """fp32 rounded to the ten bits that tensor cores look at; by themselves they would cut the others off."""
    return (x.to(tl.int32, bitcast=True) + 0x1000).to(tl.float32, bitcast=True)


@triton.jit
def dot(a, b, acc, INPUT_PRECISION: tl.constexpr):
    """``acc + a @ b`` in fp32."""
    if INTERPRET:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        if INPUT_PRECISION == "tf32":
            a, b = _to_tf32(a), _to_tf32(b)
        acc = tl.dot(a, b, acc, input_precision=INPUT_PRECISION)
        # Uses the result, so that the compiler waits for it: Triton before 3.7 lets Hopper's asynchronous products run
        # into the next step of a pipelined loop, which overwrites the registers that they still read (issue 9433).
        acc = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [acc], dtype=tl.float32, is_pure=True, pack=1
        )  # fmt: skip
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
def to_storage_unbiased(x, index, dtype: tl.constexpr):
    """``x``, fp32, as one of the two values of a 16-bit ``dtype`` beside it, the nearer one more often: no bias.

    What is on that grid already and gets a shift far smaller than its spacing would lose all of it to the nearest
    value, in every row alike. Which of the two, a hash of ``index`` says (Wellons' lowbias32): reruns are bit-equal.
    """
    LOW: tl.constexpr = 16 if dtype == tl.bfloat16 else 13  # bits of fp32 that dtype has not
    noise = index.to(tl.uint32)
    noise = (noise ^ (noise >> 16)) * 0x7FEB352D
    noise = (noise ^ (noise >> 15)) * 0x846CA68B
    noise = ((noise ^ (noise >> 16)) >> (32 - LOW)).to(tl.int32)
    bits = x.to(tl.int32, bitcast=True)
    is_finite = (bits & 0x7F800000) != 0x7F800000
    rounded = ((bits + noise) >> LOW << LOW).to(tl.float32, bitcast=True)
    return tl.where(is_finite, rounded, x).to(dtype)


@triton.jit
def divmod_pid(program, columns):
    """``program // columns`` as int64, ready to meet a stride, and ``program % columns``; divided in 32 bits."""
    program = program.to(tl.int32)
    return (program // columns).to(tl.int64), program % columns


@triton.jit
def assume_multiple_of(x, UNIT: tl.constexpr):
    """``x``, a multiple of ``UNIT``, in a form from which the compiler sees that it is one: loads become wide."""
    return (x // UNIT) * UNIT


@triton.jit
def opaque_zero(tile):
    """0, but the compiler cannot know: index arithmetic with it is done where it is used, not kept for all tiles.

    Hoisted out of the loop over tiles, addresses and masks of every layout would fill the registers, and spill.
    """
    return (tile >> 40).to(tl.int32) * 16  # in units of 16, so that alignment stays visible


@triton.jit
def load_norm(norm_ptrs, channels, mask, eps):
    """One BatchNorm's ``mu, gamma/sqrt(var + eps), beta`` of some channels, in fp32; zeros outside ``mask``."""
    mean_ptr, var_ptr, gamma_ptr, beta_ptr = norm_ptrs
    mean = tl.load(mean_ptr + channels, mask=mask, other=0.0).to(tl.float32)
    var = tl.load(var_ptr + channels, mask=mask, other=1.0).to(tl.float32)
    gamma = tl.load(gamma_ptr + channels, mask=mask, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + channels, mask=mask, other=0.0).to(tl.float32)
    return mean, gamma * tl.rsqrt(var + eps), beta


@triton.jit
def relu(y):
    """``max(y, 0)`` that keeps NaN, as PyTorch's."""
    return tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def pixel(first_row, local, D, H, W, TAPS: tl.constexpr):
    """Row number and ``z, y, x`` of a tile's pixels within their images; not needed where there is one tap."""
    row = first_row.to(tl.int32) + local  # m < 2**31, and a 64-bit division is slow
    if TAPS == 1:
        return row, row, row, row
    return row, row // (W * H) % D, row // W % H, row % W


@triton.jit
def neighbour(place, dz, dy, dx, m, D, H, W, TAPS: tl.constexpr):
    """How many rows away the pixel ``(dz, dy, dx)`` further lies, and for which rows that is inside their image."""
    row, z, y, x = place
    inside = (row >= 0) & (row < m)
    if TAPS > 1:
        inside &= (x + dx >= 0) & (x + dx < W) & (y + dy >= 0) & (y + dy < H) & (z + dz >= 0) & (z + dz < D)
    return (dz * H + dy) * W + dx, inside


@triton.jit
def window_row(row, D, H, W, XD, XH, XW, PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr):
    """Of an output pixel of ``D*H*W``, the row of the first pixel in its window among those of ``XD*XH*XW``."""
    z, y, x = row // (W * H) % D, row // W % H, row % W
    return ((row // (W * H * D) * XD + z * PD) * XH + y * PH) * XW + x * PW


@triton.jit
def source_rows(
    first_row, local, D, H, W, XD, XH, XW, PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr
):  # fmt: skip
    """Where a tile of output rows reads: the first one's row, and how far away each one's is; no pool, no change."""
    if PD * PH * PW == 1:
        return first_row, local
    first = window_row(first_row.to(tl.int32), D, H, W, XD, XH, XW, PD, PH, PW)
    rows = window_row(first_row.to(tl.int32) + local, D, H, W, XD, XH, XW, PD, PH, PW)
    return first.to(tl.int64), rows - first


@triton.jit
def in_window(place, XH, XW, PH: tl.constexpr, PW: tl.constexpr):
    """How many rows from its first pixel a window's pixel number ``place`` lies."""
    return (place // (PH * PW) * XH + place // PW % PH) * XW + place % PW


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
def last_to_arrive(counter_ptr, expected):
    """Whether this program is the last of ``expected`` here; it then sees all that the others stored before.

    Only who comes last depends on the timing, not what is added up in which order. The counter is left at 0.
    """
    tl.debug_barrier()  # every thread has stored before one of them counts
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == expected - 1
    if last:
        tl.store(counter_ptr, 0)
    return last
