"""A counter-based generator: dropout masks, recomputed where they are needed and never stored, and unbiased roundings.

The generator is Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Its key is
the 64-bit seed, its counter ``(index // 4 low, index // 4 high, layer, 0)``, and element ``index`` takes word
``index % 4`` of the output. A mask is therefore a pure function of (seed, layer, element): forward and backward,
and every backend, see the same one.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def philox_4x32(seed: Tensor, counter: Tensor, layer: int) -> Tensor:
    """Four 32-bit words for each counter value.

    Args:
        seed: one int64 value, shape ``[1]`` or ``[]``.
        counter: int64 ``[n]``, not negative.
        layer: third word of the counter, so that layers draw independent streams from one seed.

    Returns:
        int64 ``[n, 4]``, each value in ``[0, 2**32)``.
    """
    key0, key1 = seed.reshape(()) & _WORD, (seed.reshape(()) >> 32) & _WORD
    c0, c1 = counter & _WORD, (counter >> 32) & _WORD
    c2, c3 = torch.full_like(counter, layer), torch.zeros_like(counter)
    for _ in range(10):
        # int64 products wrap modulo 2**64; shift and mask still give the exact upper and lower words.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((product1 >> 32) & _WORD) ^ c1 ^ key0, ((product0 >> 32) & _WORD) ^ c3 ^ key1
        c1, c3 = product1 & _WORD, product0 & _WORD
        key0, key1 = (key0 + _KEY_INCREMENTS[0]) & _WORD, (key1 + _KEY_INCREMENTS[1]) & _WORD
    return torch.stack((c0, c1, c2, c3), dim=1)


def keep_mask(seed: Tensor, layer: int, start: int, count: int, p: float) -> Tensor:
    """Which of the elements ``start .. start+count-1`` survive dropout with probability ``p`` of being zeroed.

    Returns:
        bool ``[count]`` on the seed's device.
    """
    first, last = start // 4, (start + count + 3) // 4
    counter = torch.arange(first, last, device=seed.device, dtype=torch.int64)
    words = philox_4x32(seed, counter, layer).view(-1)[start - 4 * first :][:count]
    return words >= round(p * 2**32)


def rounding_noise(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """For each of ``count`` places as many random bits as float32 has beyond a 16-bit ``dtype``, int32 ``[count]``."""
    counter = torch.arange(-(-count // 4), device=device)
    words = philox_4x32(counter.new_zeros(1), counter, 0).view(-1)[:count]
    return words.bitwise_right_shift(32 - _bits_beyond(dtype)).int()


def rounded(x: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """``x``, dense float32, as one of the two values of a 16-bit ``dtype`` beside it, the nearer more often: no bias.

    What is on that grid already and gets a shift far smaller than its spacing would lose all of it to the nearest
    value, in every row alike. ``noise`` [elements of x], of ``rounding_noise``, decides.
    """
    bits = torch.add(x.view(torch.int32), noise.view_as(x)).bitwise_and_(-1 << _bits_beyond(dtype))
    return torch.where(x.isfinite(), bits.view(x.dtype), x).to(dtype)


def _bits_beyond(dtype: torch.dtype) -> int:
    return 16 if dtype is torch.bfloat16 else 13
