"""BatchNorm's two sums and partial results, added up in a fixed order by the last program to arrive, or the next."""

import triton
import triton.language as tl

from .common import last_to_arrive

SPLITS = tl.constexpr(32)  # partial results that one step of a sum takes


@triton.jit
def add_up(out_ptr, partial_ptr, elements, splits, program, programs, BLOCK: tl.constexpr):
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
    dgamma_ptr, dbeta_ptr, a_ptr, b_ptr, sums_ptr, counter_ptr, sum_dy, sum_centred, reader_ptrs,
    m, C, start, eps, split, splits, column, c, HAS_BATCH: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``dbeta = sum(dy)``, ``dgamma = r*sum(dy*(x - mu))``; ``a -= gamma*r*dbeta/m``, ``b -= gamma*r^2*dgamma/m``.

    The last program of a column tile to arrive adds up what all splits of the rows found, in their order.
    """
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
        r = tl.rsqrt(tl.load(reader_ptrs[1] + c, mask=c_mask, other=1.0).to(tl.float32) + eps)
        scale = tl.load(reader_ptrs[2] + c, mask=c_mask, other=0.0).to(tl.float32) * r
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
