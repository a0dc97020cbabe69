"""Tile sizes and how the rows are split over programs: small tables, one pure function, no search.

The tables hold tiles that compile without spills, of those that were tried the ones with the fewest instructions to
issue (``python -m benchmarks.compiled`` lists the rows); they are to be settled by measurement on a GPU. A tile that
covers a short dimension is cut down to it.
Importing this module needs neither Triton nor a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch

OPERATIONS = (
    "bn_relu_conv", "bn_relu_conv_backward", "copy", "resolve", "reduce", "activation",
    "max_pool", "mean", "pool_backward",
)  # fmt: skip
FORMS = ("rows", "taps", "scratch")

MAX_UNITS = 4  # weight gradient tiles that a program of a 1x1's backward can hold beside its data gradient
MIN_TILES_PER_SPLIT = 4  # a split of the rows leaves a whole weight gradient behind: worth it for some tiles only
NORMALISE = 128  # what loading and normalising a tile costs, in output channels of its product: modelled
# From so many pixels on a lazy gradient is written out before a convolution of several taps loads it: an H100 took
# 2.5 ns a pixel without, 1.3 with (benchmarks/results/h100), and what is summed over many pixels must have no bias.
MATERIALISE_PIXELS = 1 << 14


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
        programs_per_sm: how many programs a multiprocessor holds at once; 0, as many as fit whatever their registers.
        resolved: backward, a lazy gradient is written out before the launch.
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
    programs_per_sm: int = 0
    resolved: bool = False

    def __post_init__(self) -> None:
        for name in ("block_m", "block_c", "block_k", "num_warps", "weight_block_m", "weight_block_c"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two, got {value}")
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {self.form!r}")
        if self.programs_per_sm < 0:
            raise ValueError(f"programs_per_sm must not be negative, got {self.programs_per_sm}")

    @property
    def resident(self) -> int:
        """Programs that a multiprocessor holds at once: 8 warps of 255 registers, the most that a thread has, fit."""
        return self.programs_per_sm or max(1, 8 // self.num_warps)


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
    ("bn_relu_conv_backward", "many taps"): LaunchConfig(64, 64, 32, 4, 1, group=3),
    ("bn_relu_conv_backward", "wide taps"): LaunchConfig(64, 64, 64, 4, 2, group=1, weight_block_c=128),
    ("bn_relu_conv_backward", "lazy wide taps"): LaunchConfig(64, 64, 64, 8, 2, group=1),
    ("copy", ""): LaunchConfig(32, 64, 64, 4, 1, programs_per_sm=6),
    ("resolve", ""): LaunchConfig(64, 32, 32, 4, 1),
    ("reduce", ""): LaunchConfig(16, 64, 16, 4, 1),
    ("activation", ""): LaunchConfig(64, 64, 64, 4, 1),
    ("bn_relu_conv", "pooled"): LaunchConfig(64, 32, 128, 8, 1),
    ("bn_relu_conv_backward", "pooled"): LaunchConfig(64, 32, 64, 8, 1, group=4),
    ("bn_relu_conv_backward", "many pooled"): LaunchConfig(32, 32, 64, 4, 1, group=2),
    ("bn_relu_conv_backward", "wide pooled"): LaunchConfig(64, 64, 64, 8, 1, group=2),
    ("max_pool", ""): LaunchConfig(32, 32, 32, 4, 1, programs_per_sm=6),
    ("mean", ""): LaunchConfig(64, 64, 64, 4, 1),
    ("pool_backward", ""): LaunchConfig(32, 32, 32, 4, 1, programs_per_sm=6),
}
_SM90: _Table = _SM80 | {
    ("bn_relu_conv", "1x1"): LaunchConfig(64, 64, 128, 4, 3),
    ("bn_relu_conv", "narrow taps"): LaunchConfig(64, 32, 16, 4, 3),
    ("bn_relu_conv", "taps"): LaunchConfig(64, 64, 32, 4, 3),
    ("bn_relu_conv", "wide taps"): LaunchConfig(64, 32, 64, 4, 3),
    ("bn_relu_conv_backward", "1x1"): LaunchConfig(64, 64, 128, 8, 3),
    ("bn_relu_conv_backward", "wide"): LaunchConfig(64, 32, 64, 8, 2, group=4),
    ("bn_relu_conv_backward", "wide pooled"): LaunchConfig(64, 64, 64, 8, 1, group=4),
    ("max_pool", ""): LaunchConfig(16, 32, 32, 4, 1, programs_per_sm=8),
    ("pool_backward", ""): LaunchConfig(16, 64, 64, 4, 1, programs_per_sm=6),
    ("bn_relu_conv_backward", "taps"): LaunchConfig(64, 64, 32, 4, 3, group=3, weight_block_c=128),
    ("bn_relu_conv_backward", "lazy taps"): LaunchConfig(64, 64, 32, 4, 2, group=3),
    ("bn_relu_conv_backward", "wide taps"): LaunchConfig(64, 64, 64, 4, 2, group=3),
    ("bn_relu_conv_backward", "lazy wide taps"): LaunchConfig(64, 64, 64, 8, 2, group=3, weight_block_c=128),
}
_SM100: _Table = _SM90 | {
    ("bn_relu_conv", "1x1"): LaunchConfig(64, 64, 128, 4, 2),
    ("bn_relu_conv_backward", "wide"): LaunchConfig(64, 64, 64, 4, 2),
    ("bn_relu_conv", "dropout"): LaunchConfig(64, 32, 32, 4, 1),
    ("bn_relu_conv_backward", "pooled"): LaunchConfig(32, 32, 64, 4, 1, group=2),
    ("bn_relu_conv_backward", "many pooled"): LaunchConfig(64, 32, 64, 8, 1, group=2),
    ("bn_relu_conv_backward", "lazy taps"): LaunchConfig(64, 64, 32, 4, 1, group=3),
    ("max_pool", ""): LaunchConfig(32, 32, 32, 4, 1, programs_per_sm=4),
    ("pool_backward", ""): LaunchConfig(32, 32, 32, 4, 1, programs_per_sm=6),
    ("copy", ""): LaunchConfig(32, 32, 32, 4, 1, programs_per_sm=8),
}
_SM86: _Table = _SM80 | {
    ("bn_relu_conv_backward", "wide"): LaunchConfig(32, 32, 64, 8, 1, group=4),
    ("bn_relu_conv_backward", "pooled"): LaunchConfig(32, 32, 64, 4, 1, group=4),
}


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
    ("bn_relu_conv_backward", "many taps"): _weight_32(8, 2),
    ("bn_relu_conv_backward", "lazy many taps"): _weight_32(8, 1),
    ("bn_relu_conv_backward", "wide taps"): _weight_32(8, 2),
    ("bn_relu_conv_backward", "lazy wide taps"): _weight_32(8, 1),
    ("bn_relu_conv_backward", "pooled"): _weight_32(8, 1),
    ("bn_relu_conv_backward", "many pooled"): _weight_32(8, 1),
    ("bn_relu_conv_backward", "wide pooled"): _weight_32(8, 1),
    ("copy", ""): LaunchConfig(32, 32, 32, 4, 1, programs_per_sm=6),
}
_FP32_SM86: _Table = _FP32_SM80 | {
    ("bn_relu_conv", "wide taps"): LaunchConfig(32, 16, 64, 4, 2),
    ("bn_relu_conv_backward", "1x1"): LaunchConfig(32, 16, 128, 8, 1),
}
_FP32_SM90: _Table = _FP32_SM80 | {
    ("bn_relu_conv", "1x1"): LaunchConfig(64, 16, 64, 4, 2),
    ("bn_relu_conv", "taps"): LaunchConfig(32, 16, 32, 4, 2),
    ("bn_relu_conv", "many taps"): LaunchConfig(32, 16, 32, 4, 2),
    ("bn_relu_conv_backward", "1x1"): LaunchConfig(16, 32, 128, 8, 2),
    ("bn_relu_conv_backward", "taps"): _weight_32(4, 2),
    ("bn_relu_conv_backward", "lazy taps"): _weight_32(4, 2),
    ("bn_relu_conv_backward", "lazy many taps"): _weight_32(4, 2),
    ("bn_relu_conv_backward", "pooled"): LaunchConfig(16, 16, 16, 4, 1, weight_block_m=32, weight_block_c=32),
    ("bn_relu_conv_backward", "many pooled"): LaunchConfig(16, 16, 16, 4, 1, weight_block_m=32, weight_block_c=32),
}
_FP32_SM100: _Table = _FP32_SM90 | {
    ("bn_relu_conv_backward", "taps"): _weight_32(8, 2),
    ("bn_relu_conv_backward", "lazy taps"): _weight_32(8, 2),
    ("bn_relu_conv_backward", "many pooled"): LaunchConfig(16, 32, 32, 4, 1, weight_block_m=32, weight_block_c=32),
}
# The interpreter pays for each step of a loop, not for each element.
_INTERPRETER: _Table = {
    key: replace(config, block_m=128, block_c=64, group=9 if "taps" in key[1] else config.group, programs_per_sm=2)
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


def _for_all_multiprocessors(config: LaunchConfig, shape: Shape, sm_count: int) -> LaunchConfig:
    """A forward tile of fewer rows or output channels where a map is so small that multiprocessors would be idle.

    Fewer channels mean that features are normalised once more for every column: taken only if the model says that it is
    a tenth faster. The rows count rounded up to four bits: an epoch's last batch, smaller by an image, gets the same.
    """
    places, shifts = sm_count * config.resident, 3 if shape.taps > 1 else 1
    bits = max(shape.m.bit_length() - 4, 0)
    rows = (-(-shape.m >> bits)) << bits

    def time(tile: tuple[int, int]) -> int:
        work = Work(-(-rows // (tile[0] - shifts + 1)), -(-shape.writes // tile[1]))
        normalise, products = NORMALISE * shape.window, shifts * tile[1]
        return (_time(places, [work], share(places, work)) - 1) * tile[0] * (normalise + products)

    whole = config.block_m, config.block_k
    if -(-rows // whole[0]) * -(-shape.writes // whole[1]) >= sm_count:
        return config
    least_m, least_k = min(whole[0], 64), min(whole[1], 16 if shape.taps > 1 else 32)
    smaller = [(m, k) for m in _halves(whole[0], least_m) for k in _halves(whole[1], least_k)]
    best = min(smaller, key=lambda tile: (time(tile), -tile[0] * tile[1]))
    if 10 * time(best) > 9 * time(whole):
        return config
    return replace(config, block_m=best[0], block_k=best[1])


def _halves(size: int, least: int) -> list[int]:
    """``size``, half of it, and so on down to ``least``."""
    return [size >> n for n in range((size // least).bit_length())]


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
    config = replace(config, block_c=block_c, block_k=block_k)
    return _for_all_multiprocessors(config, shape, sm_count) if arch and op == "bn_relu_conv" else config


def configuration(op: str, shape: Shape, dtype: torch.dtype, arch: int, sm_count: int) -> LaunchConfig:
    """``choose()``, or what ``override()`` says."""
    config = choose(op, shape, dtype, arch, sm_count)
    if op not in _overrides:
        return config
    changes = _overrides[op]
    return replace(config, **({} if changes.keys() <= {"form"} else {"programs_per_sm": 0}) | changes)


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


class Work(NamedTuple):
    """What programs of one kind share: tiles of rows, for each of ``columns``; one tile's time; a program's fewest."""

    tiles: int
    columns: int
    cost: int = 1
    at_least: int = 1


class Split(NamedTuple):
    """``programs`` share the rows, each has ``each`` tiles; the last may have fewer."""

    programs: int
    each: int


@lru_cache(maxsize=4096)
def share(places: int, *kinds: Work) -> tuple[Split, ...]:
    """How many programs of each kind share the rows of a launch, so that all are through soonest.

    The device holds ``places`` programs at once; as one ends the next begins, and what counts is how many rounds of
    ``places`` there are and how long the longest program of a round takes. So the programs are made to fill one round,
    or two where that gives a shorter sum, and never begin another one for a few. With the device, and not with the
    number of rows, grows what they leave behind to be added up.

    Args:
        places: multiprocessors times the programs that each holds.
        kinds: what there is to do; kinds of one launch run side by side.

    Returns:
        For each kind, programs for every column; their tiles cover the rows, and none is without.
    """
    return min((_fill(rounds * places, kinds) for rounds in (1, 2)), key=lambda split: _time(places, kinds, split))


def _fill(most: int, kinds: Sequence[Work]) -> tuple[Split, ...]:
    """At most ``most`` programs, or one a column: fewer of the kind that suffers least, until they fit."""
    counts = [min(max(most // k.columns, 1), max(-(-k.tiles // k.at_least), 1)) for k in kinds]
    while sum(k.columns * count for k, count in zip(kinds, counts, strict=True)) > most and max(counts) > 1:
        times = [
            -(-k.tiles // (count - 1)) * k.cost if count > 1 else float("inf")
            for k, count in zip(kinds, counts, strict=True)
        ]
        counts[times.index(min(times))] -= 1
    each = [max(-(-k.tiles // count), min(k.at_least, k.tiles), 1) for k, count in zip(kinds, counts, strict=True)]
    return tuple(Split(max(-(-k.tiles // tiles), 1), tiles) for k, tiles in zip(kinds, each, strict=True))


def _time(places: int, kinds: Sequence[Work], splits: Sequence[Split]) -> int:
    """Modelled: rounds times the longest program's tiles, and one more for how it begins and ends."""
    programs = sum(k.columns * split.programs for k, split in zip(kinds, splits, strict=True))
    longest = max(k.cost * split.each for k, split in zip(kinds, splits, strict=True))
    return -(-programs // places) * (longest + max(k.cost for k in kinds))
