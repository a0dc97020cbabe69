"""Tile sizes and how the rows are split over programs: small tables, one pure function, no search.

The tables are a first choice, to be settled by measurement on a GPU; a tile that covers a short dimension is cut down
to it.
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
    "bn_relu_conv",
    "bn_relu_conv_dropout",
    "pointwise_backward",
    "data_gradient",
    "weight_gradient",
    "copy",
    "resolve",
    "merge",
    "reduce",
)

MAX_POINTWISE_OUTPUT = 256  # output channels that one program of the one-pass 1x1 backward can hold
MAX_LAZY_COLUMN_TILES = 4  # beyond, forming the lazy gradient once is cheaper than in every column tile


class Shape(NamedTuple):
    """One convolution: values per channel, channels read, channels written, kernel taps."""

    m: int
    reads: int
    writes: int
    taps: int


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """How one kernel is launched.

    Attributes:
        block_m: rows (pixels) a tile.
        block_c: channels of the features that are normalised, a tile.
        block_k: output channels of the convolution, a tile.
        num_warps: warps a program.
        num_stages: loads in flight, as depth of the software pipeline.
    """

    block_m: int
    block_c: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self) -> None:
        for name in ("block_m", "block_c", "block_k", "num_warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two, got {value}")


# Operation, or operation and whether the kernel has more than one tap; 16-bit features.
_SM80 = {
    ("bn_relu_conv", False): LaunchConfig(128, 32, 128, 8, 3),
    ("bn_relu_conv", True): LaunchConfig(128, 32, 64, 4, 3),
    ("bn_relu_conv_dropout", False): LaunchConfig(64, 32, 64, 8, 3),
    ("pointwise_backward", False): LaunchConfig(64, 32, 128, 8, 1),
    ("data_gradient", False): LaunchConfig(64, 64, 32, 8, 2),
    ("data_gradient", True): LaunchConfig(64, 64, 32, 8, 2),
    ("weight_gradient", False): LaunchConfig(64, 64, 64, 4, 2),
    ("weight_gradient", True): LaunchConfig(64, 64, 64, 4, 2),
    ("copy", False): LaunchConfig(64, 64, 64, 4, 1),
    ("resolve", False): LaunchConfig(64, 64, 64, 4, 1),
    ("merge", False): LaunchConfig(32, 32, 32, 4, 1),
    ("reduce", False): LaunchConfig(16, 128, 16, 4, 1),
}
_SM90 = _SM80 | {
    ("bn_relu_conv", False): LaunchConfig(128, 64, 128, 8, 3),
    ("pointwise_backward", False): LaunchConfig(64, 32, 128, 8, 2),
}
# fp32 features: half the tile for the same registers and shared memory.
_FP32 = {
    ("bn_relu_conv", False): LaunchConfig(64, 32, 64, 4, 2),
    ("bn_relu_conv", True): LaunchConfig(64, 32, 32, 4, 2),
    ("bn_relu_conv_dropout", False): LaunchConfig(64, 32, 32, 4, 2),
    ("pointwise_backward", False): LaunchConfig(32, 32, 128, 8, 1),
    ("data_gradient", False): LaunchConfig(32, 32, 32, 4, 2),
    ("data_gradient", True): LaunchConfig(32, 32, 32, 4, 2),
    ("weight_gradient", False): LaunchConfig(32, 32, 32, 4, 2),
    ("weight_gradient", True): LaunchConfig(32, 32, 32, 4, 2),
}
# 100 KB of shared memory a multiprocessor instead of 164: shallower pipelines.
_SM86 = {key: replace(config, num_stages=min(config.num_stages, 2)) for key, config in _SM80.items()}
# The interpreter pays for each step of a loop, not for each element.
_INTERPRETER = dict.fromkeys(_SM80, LaunchConfig(128, 64, 64)) | {("reduce", False): LaunchConfig(16, 4096, 16)}

TABLES = {0: _INTERPRETER, 80: _SM80, 86: _SM86, 89: _SM86, 90: _SM90, 100: _SM90, 120: _SM86}

_overrides: dict[str, dict[str, int]] = {}


def _covering(size: int) -> int:
    """The smallest tile that a matrix product takes and that covers ``size``."""
    return max(16, 1 << (size - 1).bit_length())


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
    table = TABLES[max((known for known in TABLES if known <= arch), default=0)]
    if arch and dtype == torch.float32:
        table = table | _FP32
    config = table.get((op, shape.taps > 1)) or table[op, False]
    block_m, block_c, block_k = config.block_m, config.block_c, config.block_k
    if op == "pointwise_backward":  # all output channels at once: fewer columns where there are many
        block_k = _covering(shape.writes)
        if block_k > 128:
            block_m, block_c = min(block_m, 32), max(16, block_c * 128 // block_k)
    elif op not in ("merge", "reduce"):
        block_k = min(block_k, _covering(shape.writes))
        block_c = min(block_c, _covering(shape.reads))
        # Halve the rows while that still gives idle multiprocessors something to do.
        columns = -(-shape.writes // block_k) if op.startswith("bn_relu_conv") else -(-shape.reads // block_c)
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


def splits(m: int, block_m: int, programs: int, sm_count: int) -> tuple[int, int]:
    """How many programs share the rows, and how many row tiles each gets.

    Two programs a multiprocessor, counting the ``programs`` that share no rows: what the splits leave behind to be
    added up is then bounded by the device, whatever ``m``.
    """
    tiles = -(-m // block_m)
    wanted = min(max(-(-2 * sm_count // programs), 1), tiles)
    each = -(-tiles // wanted)
    return -(-tiles // each), each
