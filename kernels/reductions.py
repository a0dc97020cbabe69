"""Reductions over rows: batch moments while values are stored, and BatchNorm's two sums in backward.

Partial results are merged in a fixed order by the last program to arrive, or the next launch. Here too: the copy of a
block's input, which takes its moments on the way.
"""

import triton
import triton.language as tl

from .common import assume_multiple_of, divmod_pid, last_to_arrive

GROUP = tl.constexpr(16)  # programs whose moments one of them merges; what is left is merged once more
SPLITS = tl.constexpr(32)  # partial results that one step of a sum takes


@triton.jit
def _to_thread_layout(x, BLOCK: tl.constexpr):
    """``x``, one element a thread: what a sum over rows leaves in many copies would fill the registers of a loop."""
    return tl.gather(x, tl.arange(0, BLOCK), 0)


@triton.jit
def add_tile(sums, origin_ptr, values, row_mask, count, is_first, c, C, BLOCK: tl.constexpr):
    """``sum(v - origin), sum((v - origin)^2)`` with one more tile; ``origin`` is the mean of a program's first tile.

    values [BLOCK_M, BLOCK, fp32]; count: rows in ``row_mask``; origin [BLOCK, fp32, in memory: registers are scarce]
    One of a program's T tiles lies round the origin, so var >= (mean - origin)^2/T, and what cancels in M2 is at most T
    roundings, however large the common mean.
    """
    c_mask = c < C
    if is_first:
        tl.store(origin_ptr + c, tl.sum(tl.where(row_mask[:, None], values, 0.0), 0) / count, mask=c_mask)
        tl.debug_barrier()
    origin = tl.load(origin_ptr + c, mask=c_mask, other=0.0)
    away = tl.where(row_mask[:, None], values - origin[None, :], 0.0)
    return sums[0] + _to_thread_layout(tl.sum(away, 0), BLOCK), sums[1] + _to_thread_layout(
        tl.sum(away * away, 0), BLOCK
    )


@triton.jit
def _merge(partial_ptr, begin, end, m, slot_rows, c, C, c_mask):
    """Chan, Golub, LeVeque (1979): ``M2 = sum_i M2_i + sum_i n_i*(mean_i - mean)^2`` over slots ``begin .. end-1``.

    Slot ``i`` covers the rows from ``i*slot_rows`` on. A mean is two numbers, an origin and the rest: in one, the
    difference of two means would not survive where they are thousands of standard deviations from 0.
    """
    slot = begin + tl.arange(0, GROUP)
    mask = (slot < end)[:, None] & c_mask[None, :]
    partial = partial_ptr + (slot * 3 * C)[:, None] + c[None, :]
    # .cg: from L2, where other multiprocessors' stores are.
    origins = tl.load(partial, mask=mask, other=0.0, cache_modifier=".cg")
    rests = tl.load(partial + C, mask=mask, other=0.0, cache_modifier=".cg")
    m2 = tl.load(partial + 2 * C, mask=mask, other=0.0, cache_modifier=".cg")
    rows = tl.minimum(m - slot * slot_rows, slot_rows)
    count = tl.where(slot < end, rows, 0).to(tl.float32)[:, None]
    origin = tl.load(partial_ptr + begin * 3 * C + c, mask=c_mask, other=0.0, cache_modifier=".cg")
    means = (origins - origin[None, :]) + rests
    rest = tl.sum(tl.where(mask, means, 0.0) * count, 0) / tl.sum(count, 0)
    away = means - rest[None, :]
    return origin, rest, tl.sum(tl.where(mask, m2 + away * away * count, 0.0), 0)


@triton.jit
def _store_slot(partial_ptr, slot, origin, rest, m2, c, C, c_mask):
    tl.store(partial_ptr + slot * 3 * C + c, origin, mask=c_mask)
    tl.store(partial_ptr + (slot * 3 + 1) * C + c, rest, mask=c_mask)
    tl.store(partial_ptr + (slot * 3 + 2) * C + c, m2, mask=c_mask)


@triton.jit
def finish_moments(
    mean_ptr, var_ptr, partial_ptr, counter_ptr, sums, program, programs, program_rows, m, column, c, C
):  # fmt: skip
    """The programs' sums merged into ``mean`` and biased ``var``, 16 programs first, then the groups of 16.

    partial [programs + groups, 3, C, fp32]; counter [column tiles, 1 + groups, int32], zeros
    Program i has the rows from ``i*program_rows`` on. A fixed order, whichever comes last: two runs agree bit for bit.
    """
    c_mask = c < C
    count = tl.minimum(m - program * program_rows, program_rows).to(tl.float32)
    rest = sums[0] / count
    m2 = tl.maximum(sums[1] - sums[0] * rest, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(partial_ptr + (program * 3 + 1) * C + c, rest, mask=c_mask)
    tl.store(partial_ptr + (program * 3 + 2) * C + c, m2, mask=c_mask)
    groups = tl.cdiv(programs, GROUP)
    group = program // GROUP
    begin = group * GROUP
    end = tl.minimum(begin + GROUP, programs)
    counter_ptr += column * (1 + groups)
    if last_to_arrive(counter_ptr + 1 + group, end - begin):
        origin, rest, m2 = _merge(partial_ptr, begin, end, m, program_rows, c, C, c_mask)
        groups_ptr = partial_ptr + programs * 3 * C
        _store_slot(groups_ptr, group, origin, rest, m2, c, C, c_mask)
        if last_to_arrive(counter_ptr, groups):
            _finish_groups(mean_ptr, var_ptr, groups_ptr, groups, m, program_rows * GROUP, c, C, c_mask)


@triton.jit
def _finish_groups(mean_ptr, var_ptr, groups_ptr, groups, m, group_rows, c, C, c_mask):
    """The last merge, ``GROUP`` groups at a time: one step on any GPU of today."""
    origin, rest, m2 = _merge(groups_ptr, 0, tl.minimum(GROUP, groups), m, group_rows, c, C, c_mask)
    for begin in range(GROUP, groups, GROUP):
        end = tl.minimum(begin + GROUP, groups)
        next_origin, next_rest, next_m2 = _merge(groups_ptr, begin, end, m, group_rows, c, C, c_mask)
        before = (begin * group_rows).to(tl.float32)
        count = tl.minimum(m - begin * group_rows, group_rows * GROUP).to(tl.float32)
        away = (next_origin - origin) + (next_rest - rest)
        share = count / (before + count)
        m2 += next_m2 + away * away * before * share
        rest += away * share
    tl.store(mean_ptr + c, origin + rest, mask=c_mask)
    tl.store(var_ptr + c, m2 / m, mask=c_mask)


@triton.jit(
    do_not_specialize=["m", "tiles_per_program"],
    do_not_specialize_on_alignment=[
        "C", "D", "H", "W", "stride_om", "stride_xn", "stride_xc", "stride_xd", "stride_xh", "stride_xw",
    ],
)  # fmt: skip
def copy_with_moments_kernel(
    out_ptr, mean_ptr, var_ptr, partial_ptr, counter_ptr, x_ptr,
    m, C, D, H, W, tiles_per_program,
    stride_om, stride_xn, stride_xc, stride_xd, stride_xh, stride_xw,
    HAS_MOMENTS: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``out = x``, channels last, with the moments of every channel; moments alone without ``out``.

    out [m, C, feature dtype, rows ``stride_om`` apart]; mean, var [C, fp32]; partial, counter: see finish_moments
    x [N, C, D, H, W, feature dtype, any strides]; UNIT divides C and every stride but that of the channels
    Grid: (programs * column tiles), columns fastest; a program has ``tiles_per_program`` tiles of BLOCK_M rows.
    """
    C = assume_multiple_of(C, UNIT)
    program, column = divmod_pid(tl.program_id(0).to(tl.int64), tl.cdiv(C, BLOCK_C))
    c = column * BLOCK_C + tl.arange(0, BLOCK_C)
    first_tile = program * tiles_per_program
    sums = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    tiles = tl.cdiv(m, BLOCK_M)
    for i in range(tl.minimum(tiles_per_program, tiles - first_tile)):
        tile = first_tile + i
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        pixels = rows.to(tl.int32)
        mask = (rows < m)[:, None] & (c < C)[None, :]
        n, z = (pixels // (W * H * D)).to(tl.int64), (pixels // (W * H) % D).to(tl.int64)
        y, x = (pixels // W % H).to(tl.int64), (pixels % W).to(tl.int64)
        offset = n * assume_multiple_of(stride_xn, UNIT) + z * assume_multiple_of(stride_xd, UNIT)
        offset += y * assume_multiple_of(stride_xh, UNIT) + x * assume_multiple_of(stride_xw, UNIT)
        v = tl.load(x_ptr + offset[:, None] + c[None, :] * stride_xc, mask=mask, other=0.0)
        if out_ptr is not None:
            tl.store(out_ptr + rows[:, None] * assume_multiple_of(stride_om, UNIT) + c[None, :], v, mask=mask)
        if HAS_MOMENTS:
            count = tl.minimum(m - tile * BLOCK_M, BLOCK_M).to(tl.float32)
            origin_ptr = partial_ptr + program * 3 * C
            sums = add_tile(sums, origin_ptr, v.to(tl.float32), rows < m, count, i == 0, c, C, BLOCK_C)
    if HAS_MOMENTS:
        finish_moments(
            mean_ptr, var_ptr, partial_ptr, counter_ptr, sums, program, tl.cdiv(tiles, tiles_per_program),
            tiles_per_program * BLOCK_M, m, column, c, C,
        )  # fmt: skip


@triton.jit
def reduce(out_ptr, partial_ptr, elements, splits, program, programs, BLOCK: tl.constexpr):
    """``out[e] = sum_s partial[s, e]``, both dense; ``programs`` programs share the elements."""
    for block in range(program, tl.cdiv(elements, BLOCK), programs):
        e = block * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([SPLITS, BLOCK], tl.float32)
        for begin in range(0, splits, SPLITS):
            s = begin + tl.arange(0, SPLITS).to(tl.int64)
            mask = (s < splits)[:, None] & (e < elements)[None, :]
            total += tl.load(partial_ptr + s[:, None] * elements + e[None, :], mask=mask, other=0.0)
        tl.store(out_ptr + e, tl.sum(total, 0), mask=e < elements)


@triton.jit
def finish_sums(
    sum_ptrs, sum_dy, sum_centred, norm_ptrs, m, C, start, eps, split, splits, column, c,
    HAS_BATCH: tl.constexpr, ACCUMULATE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``dbeta = sum(dy)``, ``dgamma = r*sum(dy*(x - mu))``; ``a -= gamma*r*dbeta/m``, ``b -= gamma*r^2*dgamma/m``.

    The last program of a column tile to arrive adds up what all splits of the rows found, in their order.
    """
    dgamma_ptr, dbeta_ptr, a_ptr, b_ptr, sums_ptr, counter_ptr = sum_ptrs
    c_mask = c < C
    tl.store(sums_ptr + split * 2 * C + c, sum_dy, mask=c_mask)
    tl.store(sums_ptr + (split * 2 + 1) * C + c, sum_centred, mask=c_mask)
    if last_to_arrive(counter_ptr + column, splits):
        total_dy = tl.zeros([SPLITS, BLOCK_C], tl.float32)
        total_centred = tl.zeros([SPLITS, BLOCK_C], tl.float32)
        for begin in range(0, splits, SPLITS):
            s = begin + tl.arange(0, SPLITS).to(tl.int64)
            mask = (s < splits)[:, None] & c_mask[None, :]
            tile = sums_ptr + s[:, None] * 2 * C + c[None, :]
            # .cg: from L2, where other multiprocessors' stores are.
            total_dy += tl.load(tile, mask=mask, other=0.0, cache_modifier=".cg")
            total_centred += tl.load(tile + C, mask=mask, other=0.0, cache_modifier=".cg")
        r = tl.rsqrt(tl.load(norm_ptrs[1] + c, mask=c_mask, other=1.0).to(tl.float32) + eps)
        scale = tl.load(norm_ptrs[2] + c, mask=c_mask, other=0.0).to(tl.float32) * r
        dbeta = tl.sum(total_dy, 0)
        dgamma = tl.sum(total_centred, 0) * r
        tl.store(dbeta_ptr + c, dbeta, mask=c_mask)
        tl.store(dgamma_ptr + c, dgamma, mask=c_mask)
        if HAS_BATCH:
            mine = c_mask & (c >= start)
            a = -scale * dbeta / m
            b = -scale * r * dgamma / m
            if ACCUMULATE:
                a += tl.load(a_ptr + c - start, mask=mine, other=0.0)
                b += tl.load(b_ptr + c - start, mask=mine, other=0.0)
            tl.store(a_ptr + c - start, a, mask=mine)
            tl.store(b_ptr + c - start, b, mask=mine)
