"""Tile sizes and how the rows are split over programs: small tables, one pure function, no search.

The tables hold tiles that compile without spills, of those that were tried the ones with the fewest instructions to
issue (``python -m benchmarks.kernels`` lists the rows); they are to be settled by measurement on a GPU. A tile that
covers a short dimension is cut down to it.
Importing this module needs neither Triton nor a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch

OPERATIONS = (
    "bn_relu_conv", "bn_relu_conv_backward", "copy", "resolve", "add_up", "activation",
    "max_pool", "mean", "pool_backward",
)  # fmt: skip
FORMS = ("rows", "taps", "scratch")

MAX_UNITS = 4  # weight gradient tiles that a program of a 1x1's backward can hold beside its data gradient
MIN_TILES_PER_SPLIT = 4  # a split of the rows leaves a whole weight gradient behind: worth it for some tiles only
MATERIALISE_ELEMENTS = 1 << 22  # from here on a lazy gradient is written out for many taps; a guess, not measured


class Shape(NamedTuple):
    """One convolution: values per channel, channels read and written, taps; dropout, a lazy gradient, pooling."""

    m: int
    reads: int
    writes: int
    taps: int
    dropout: bool = False
    lazy: bool = False  # backward: the output gradient is formed while it is loaded
    window: int = 1  # a transition's: pixels that are averaged before the convolution


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """How one kernel is launched.

    Attributes:
        block_m: rows (pixels) a tile.
        block_c: channels of the features that are normalised, a tile.
        block_k: output channels of the convolution, a tile.
        num_warps: warps a program.
        num_stages: loads in flight, as depth of the software pipeline.
        form: of a convolution with several taps, forward: ``"rows"`` loads and normalises once for each row of taps,
            ``"taps"`` once for each tap, ``"scratch"`` once for all, into memory that a convolution of PyTorch reads.
        group: weight gradient tiles ``[block_c, block_k]`` that a backward program holds.
        weight_block_m, weight_block_c: the tiles of backward programs that form weight gradients alone.
    """

    block_m: int
    block_c: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 2
    form: str = "rows"
    group: int = 1
    weight_block_m: int = 64
    weight_block_c: int = 64

    def __post_init__(self) -> None:
        for name in ("block_m", "block_c", "block_k", "num_warps", "weight_block_m", "weight_block_c"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two, got {value}")
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {self.form!r}")


_Table = dict[tuple[str, str], LaunchConfig]

# Operation and variant: of bn_relu_conv "1x1", "narrow taps" (at most 16 output channels), "taps", "wide taps" (more
# than 32), "many taps" (3D), "dropout" or "pooled"; of its backward "1x1", "wide" (more than one unit), "pooled", "many
# pooled" (3D), "wide pooled" (more units than a program holds), "taps", "wide taps", "many taps", these three "lazy".
# What has no row for many taps takes that for taps. All for 16-bit features.
_SM80: _Table = {
    ("bn_relu_conv", "1x1"): LaunchConfig(128, 64, 128, 8, 2),
    ("bn_relu_conv", "narrow taps"): LaunchConfig(128, 32, 16, 4, 2),
    ("bn_relu_conv", "taps"): LaunchConfig(128, 32, 32, 4, 2),
    ("bn_relu_conv", "wide taps"): LaunchConfig(64, 32, 64, 4, 1),
    ("bn_relu_conv", "many taps"): LaunchConfig(64, 32, 32, 4, 2),
    ("bn_relu_conv", "dropout"): LaunchConfig(64, 32, 32, 8, 2),
    ("bn_relu_conv_backward", "1x1"): LaunchConfig(64, 32, 128, 4, 2),
    ("bn_relu_conv_backward", "wide"): LaunchConfig(32, 32, 64, 4, 2, group=4),
    ("bn_relu_conv_backward", "taps"): LaunchConfig(64, 64, 32, 4, 2, group=3),
    ("bn_relu_conv_backward", "lazy taps"): LaunchConfig(64, 64, 32, 4, 1, group=3),
    ("bn_relu_conv_backward", "wide taps"): LaunchConfig(64, 64, 64, 4, 2, group=1, weight_block_c=128),
    ("bn_relu_conv_backward", "lazy wide taps"): LaunchConfig(64, 64, 64, 8, 2, group=1),
    ("copy", ""): LaunchConfig(32, 64, 64, 4, 1),
    ("resolve", ""): LaunchConfig(64, 32, 32, 4, 1),
    ("add_up", ""): LaunchConfig(16, 64, 16, 4, 1),
    ("activation", ""): LaunchConfig(64, 64, 64, 4, 1),
    ("bn_relu_conv", "pooled"): LaunchConfig(64, 32, 128, 8, 1),
    ("bn_relu_conv_backward", "pooled"): LaunchConfig(32, 32, 64, 4, 1, group=4),
    ("bn_relu_conv_backward", "many pooled"): LaunchConfig(32, 32, 64, 4, 1, group=2),
    ("bn_relu_conv_backward", "wide pooled"): LaunchConfig(64, 64, 64, 8, 1, group=2),
    ("max_pool", ""): LaunchConfig(32, 32, 32, 4, 1),
    ("mean", ""): LaunchConfig(64, 64, 64, 4, 1),
    ("pool_backward", ""): LaunchConfig(32, 32, 32, 4, 1),
}
_SM90: _Table = _SM80 | {
    ("bn_relu_conv", "narrow taps"): LaunchConfig(64, 32, 16, 4, 2),
    ("bn_relu_conv", "taps"): LaunchConfig(64, 64, 32, 4, 2),
    ("bn_relu_conv", "wide taps"): LaunchConfig(64, 32, 64, 4, 2),
    ("bn_relu_conv_backward", "1x1"): LaunchConfig(64, 64, 128, 8, 2),
    ("bn_relu_conv_backward", "wide"): LaunchConfig(64, 32, 64, 8, 2, group=4),
    ("bn_relu_conv_backward", "wide pooled"): LaunchConfig(64, 64, 64, 8, 1, group=4),
    ("max_pool", ""): LaunchConfig(16, 32, 32, 4, 1),
    ("pool_backward", ""): LaunchConfig(32, 64, 64, 4, 1),
    ("bn_relu_conv_backward", "taps"): LaunchConfig(64, 64, 32, 4, 2, group=3, weight_block_c=128),
    ("bn_relu_conv_backward", "wide taps"): LaunchConfig(64, 64, 64, 4, 2, group=3),
    ("bn_relu_conv_backward", "lazy wide taps"): LaunchConfig(64, 64, 64, 8, 2, group=3, weight_block_c=128),
}
_SM100: _Table = _SM90 | {
    ("bn_relu_conv", "1x1"): LaunchConfig(64, 64, 128, 4, 2),
    ("bn_relu_conv_backward", "wide"): LaunchConfig(64, 64, 64, 4, 2),
    ("bn_relu_conv_backward", "pooled"): LaunchConfig(32, 32, 64, 4, 1, group=2),
    ("max_pool", ""): LaunchConfig(32, 32, 32, 4, 1),
    ("pool_backward", ""): LaunchConfig(32, 32, 32, 4, 1),
    ("copy", ""): LaunchConfig(32, 32, 32, 4, 1),
}
_SM86: _Table = _SM80 | {("bn_relu_conv_backward", "wide"): LaunchConfig(64, 32, 64, 8, 1, group=4)}


def _weight_32(num_warps: int, num_stages: int) -> LaunchConfig:
    """A backward tile for fp32 features and several taps."""
    return LaunchConfig(32, 32, 32, num_warps, num_stages, weight_block_m=32, weight_block_c=32)


# fp32 features: smaller tiles for the same registers and shared memory.
_FP32_SM80: _Table = _SM80 | {
    ("bn_relu_conv", "1x1"): LaunchConfig(64, 32, 64, 4, 2),
    ("bn_relu_conv", "narrow taps"): LaunchConfig(32, 32, 16, 4, 2),
    ("bn_relu_conv", "taps"): LaunchConfig(32, 32, 32, 4, 2),
    ("bn_relu_conv", "wide taps"): LaunchConfig(32, 32, 64, 8, 2),
    ("bn_relu_conv", "many taps"): LaunchConfig(32, 32, 32, 4, 2),
    ("bn_relu_conv", "dropout"): LaunchConfig(32, 16, 32, 4, 1),
    ("bn_relu_conv_backward", "1x1"): LaunchConfig(16, 32, 128, 8, 1),
    ("bn_relu_conv_backward", "wide"): LaunchConfig(32, 32, 64, 8, 1, group=4),
    ("bn_relu_conv_backward", "taps"): _weight_32(8, 2),
    ("bn_relu_conv_backward", "lazy taps"): _weight_32(8, 2),
    ("bn_relu_conv_backward", "lazy many taps"): _weight_32(8, 1),
    ("bn_relu_conv_backward", "wide taps"): _weight_32(8, 2),
    ("bn_relu_conv_backward", "lazy wide taps"): _weight_32(8, 1),
    ("bn_relu_conv_backward", "pooled"): _weight_32(8, 1),
    ("bn_relu_conv_backward", "many pooled"): _weight_32(8, 1),
    ("bn_relu_conv_backward", "wide pooled"): _weight_32(8, 1),
    ("copy", ""): LaunchConfig(32, 32, 32, 4, 1),
}
_FP32_SM86: _Table = _FP32_SM80 | {
    ("bn_relu_conv", "wide taps"): LaunchConfig(32, 16, 64, 4, 2),
    ("bn_relu_conv_backward", "1x1"): LaunchConfig(32, 16, 128, 8, 1),
}
_FP32_SM90: _Table = _FP32_SM80 | {
    ("bn_relu_conv", "1x1"): LaunchConfig(64, 16, 64, 4, 2),
    ("bn_relu_conv", "taps"): LaunchConfig(32, 16, 32, 4, 2),
    ("bn_relu_conv", "many taps"): LaunchConfig(32, 16, 32, 4, 2),
    ("bn_relu_conv_backward", "taps"): _weight_32(4, 1),
    ("bn_relu_conv_backward", "lazy taps"): _weight_32(4, 1),
    ("bn_relu_conv_backward", "pooled"): LaunchConfig(16, 16, 16, 4, 1, weight_block_m=16, weight_block_c=32),
}
_FP32_SM100: _Table = _FP32_SM90 | {
    ("bn_relu_conv_backward", "taps"): _weight_32(8, 2),
    ("bn_relu_conv_backward", "lazy taps"): _weight_32(8, 1),
}
# The interpreter pays for each step of a loop, not for each element.
_INTERPRETER: _Table = {
    key: replace(config, block_m=128, block_c=64, group=9 if "taps" in key[1] else config.group)
    for key, config in _SM80.items()
}

TABLES = {0: _INTERPRETER, 80: _SM80, 86: _SM86, 89: _SM86, 90: _SM90, 100: _SM100, 120: _SM86}
FP32_TABLES = {
    0: _INTERPRETER, 80: _FP32_SM80, 86: _FP32_SM86, 89: _FP32_SM86, 90: _FP32_SM90, 100: _FP32_SM100, 120: _FP32_SM86,
}  # fmt: skip

_overrides: dict[str, dict[str, Any]] = {}


def _covering(size: int) -> int:
    """The smallest tile that a matrix product takes and that covers ``size``."""
    return max(16, 1 << (size - 1).bit_length())


def _block_of_outputs(writes: int, taps: int) -> int:
    """Output channels a unit of the backward kernel: few units, little padding, at most 128 (64 beside taps)."""
    most = 128 if taps == 1 else 64
    whole = _covering(writes)
    if whole <= most and (taps > 1 or 3 * whole <= 4 * writes or whole <= 32):
        return whole
    units = {block: -(-writes // block) for block in (64, 32)}
    if min(units.values()) > MAX_UNITS:
        return 64
    return min(units, key=lambda block: (units[block] > MAX_UNITS, units[block] * block))


def _variant(op: str, shape: Shape) -> str:
    if shape.window > 1:
        if op == "bn_relu_conv":
            return "pooled"
        wide = -(-shape.writes // _block_of_outputs(shape.writes, 1)) > MAX_UNITS
        return "wide pooled" if wide else "pooled" if shape.window <= 4 else "many pooled"
    if op == "bn_relu_conv" and (shape.dropout or shape.taps == 1):
        return "dropout" if shape.dropout else "1x1"
    if op == "bn_relu_conv_backward" and shape.taps == 1:
        return "1x1" if _block_of_outputs(shape.writes, 1) >= shape.writes else "wide"
    if not op.startswith("bn_relu_conv"):
        return ""
    lazy = "lazy " if shape.lazy and op == "bn_relu_conv_backward" else ""
    if shape.writes > 32:
        return lazy + "wide taps"
    narrow = "narrow " if shape.writes <= 16 and op == "bn_relu_conv" else ""
    return lazy + ("many " if shape.taps > 9 else narrow) + "taps"


@lru_cache(maxsize=4096)
def choose(op: str, shape: Shape, dtype: torch.dtype, arch: int, sm_count: int) -> LaunchConfig:
    """The configuration for one kernel on one shape: a pure function of its arguments.

    Args:
        op: one of ``OPERATIONS``.
        shape: the convolution.
        dtype: of the features.
        arch: compute capability times ten, for instance 90; 0 for the interpreter.
        sm_count: multiprocessors of the device.
    """
    if op not in OPERATIONS:
        raise ValueError(f"op must be one of {', '.join(OPERATIONS)}, got {op!r}")
    tables = FP32_TABLES if dtype == torch.float32 else TABLES
    table = tables[max((known for known in tables if known <= arch), default=0)]
    variant = _variant(op, shape)
    config = table.get((op, variant)) or table[op, variant.replace("many ", "")]
    if op == "bn_relu_conv_backward":
        block_k = _block_of_outputs(shape.writes, shape.taps)
        units = shape.taps * -(-shape.writes // block_k)
        group = min(units, config.group)
        weight_block_c = min(config.weight_block_c, max(_covering(shape.reads), 64))  # a matrix product of 64 rows
        return replace(config, block_k=block_k, group=group, weight_block_c=weight_block_c)
    if not op.startswith("bn_relu"):
        return config
    block_k, block_c = min(config.block_k, _covering(shape.writes)), min(config.block_c, _covering(shape.reads))
    block_m, columns = config.block_m, -(-shape.writes // block_k)
    # Halve the rows while that still gives idle multiprocessors something to do.
    while block_m > 64 and arch and -(-shape.m // block_m) * columns < sm_count:
        block_m //= 2
    return replace(config, block_m=block_m, block_c=block_c, block_k=block_k)


def configuration(op: str, shape: Shape, dtype: torch.dtype, arch: int, sm_count: int) -> LaunchConfig:
    """``choose()``, or what ``override()`` says."""
    config = choose(op, shape, dtype, arch, sm_count)
    return replace(config, **_overrides[op]) if op in _overrides else config


@contextmanager
def override(op: str, **changes: Any) -> Iterator[None]:
    """Within the ``with``, ``op`` is launched with these fields changed, in every thread; for tests and tuning.

    Example:
        >>> with launch.override("bn_relu_conv", block_m=64, num_warps=4):
        ...     model(x)
    """
    if op not in OPERATIONS:
        raise ValueError(f"op must be one of {', '.join(OPERATIONS)}, got {op!r}")
    before = _overrides.get(op)
    _overrides[op] = (before or {}) | changes
    try:
        yield
    finally:
        if before is None:
            del _overrides[op]
        else:
            _overrides[op] = before


def share(tiles: int, columns: int, sm_count: int, at_least: int = 1) -> tuple[int, int]:
    """How many programs share ``tiles`` of rows, and how many tiles each of them gets.

    Two programs a multiprocessor, counting the ``columns`` that share no rows: what the programs leave behind to be
    added up is then bounded by the device, whatever the number of rows. ``at_least`` so many tiles each, if there are.
    """
    wanted = max(-(-2 * sm_count // columns), 1)
    each = max(-(-tiles // wanted), min(at_least, tiles), 1)
    return -(-tiles // each), each
