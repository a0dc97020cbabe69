"""What a DenseNet's training step must move and compute at least: modelled floors, no measurement.

A primitive's floor counts every feature map that it cannot do without once for each reading and once for each
writing, and its weight. Vectors of a few numbers a channel are left out. For a layer that reads ``C_l`` channels, has a
bottleneck of ``B`` and adds ``k``, that is, in elements a pixel,

    forward     C_l + B  (1x1)     + B + k   (3x3)
    backward  3*C_l + 2B (1x1)    + 2B + 2k  (3x3)

Backward, a convolution reads the gradient that arrives as ``(D, a, b)`` together with the values ``v`` that it is lazy
in, and the features that it was computed from; it writes their ``D``, or reads it and adds to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

GRADIENT_BYTES = 4  # weight gradients leave a kernel in fp32

FORWARD = ("forward 1x1", "forward 3x3")
BACKWARD = ("backward 1x1", "backward 3x3")
COPY = "copy"


class Shape(NamedTuple):
    """One primitive's size: values per channel, channels read and written, kernel taps, bytes of a feature."""

    m: int
    reads: int
    writes: int
    taps: int
    itemsize: int


class Traffic(NamedTuple):
    """Bytes to and from memory, and floating-point operations (a multiply-add is two)."""

    bytes: int
    flops: int


def forward(shape: Shape) -> Traffic:
    """``bn_relu_conv``: reads features and weight, writes features."""
    m, reads, writes, taps, itemsize = shape
    return Traffic((m * (reads + writes) + taps * reads * writes) * itemsize, 2 * m * reads * writes * taps)


def backward(shape: Shape, *, accumulate: bool) -> Traffic:
    """``bn_relu_conv_backward`` of the convolution that reads ``reads`` and writes ``writes`` channels.

    Args:
        shape: of the forward convolution.
        accumulate: whether the gradient of what it read is added to ``D``, which is then read as well as written.
    """
    m, reads, writes, taps, itemsize = shape
    features = m * (2 * writes + (3 if accumulate else 2) * reads)
    weight = taps * reads * writes
    return Traffic(features * itemsize + weight * (itemsize + GRADIENT_BYTES), 4 * m * reads * writes * taps)


def pooled_forward(values: int, shape: Shape) -> Traffic:
    """``bn_relu_conv`` of averages over windows: reads ``values`` pixels, writes ``shape.m``."""
    m, reads, writes, _, itemsize = shape
    return Traffic((values * reads + m * writes + reads * writes) * itemsize, 2 * m * reads * writes)


def pooled_backward(values: int, shape: Shape) -> Traffic:
    """Its backward: reads ``values`` pixels and writes their ``D``; the output's gradient is no lazy one."""
    m, reads, writes, _, itemsize = shape
    weight = reads * writes
    moved = (2 * values * reads + m * writes) * itemsize + weight * (itemsize + GRADIENT_BYTES)
    return Traffic(moved, 4 * m * weight)


def copy_with_moments(shape: Shape) -> Traffic:
    """``copy_with_moments``: every value once in and once out."""
    return Traffic(shape.m * (shape.reads + shape.writes) * shape.itemsize, 0)


def moments(shape: Shape) -> Traffic:
    """``moments``: every value once in."""
    return Traffic(shape.m * shape.reads * shape.itemsize, 0)


def primitive(operation: str, shape: Shape, *, bottleneck: bool = True) -> Traffic:
    """The floor of an operation of :func:`operations`.

    Behind a bottleneck a 3x3 convolution is the only reader of its input, so it writes ``D`` where every other
    backward adds to it.
    """
    if operation == COPY:
        return copy_with_moments(shape)
    if operation in FORWARD:
        return forward(shape)
    return backward(shape, accumulate=not (bottleneck and operation == "backward 3x3"))


def floor_seconds(bytes_: float, flops: float, copy_rate: float, matmul_rate: float) -> float:
    """The larger of what moving and what computing takes, at measured rates (bytes and operations a second)."""
    return max(bytes_ / copy_rate, flops / matmul_rate)


@dataclass(frozen=True)
class Network:
    """What decides a DenseNet's shapes.

    Attributes:
        growth_rate: ``k``.
        layers: layers of each block.
        init_features: channels that the stem hands on.
        bn_size: ``B/k``; ``None`` for the basic layer without bottleneck.
        stem_stride: by how much the stem divides height and width.
    """

    growth_rate: int
    layers: tuple[int, ...]
    init_features: int
    bn_size: int | None = 4
    stem_stride: int = 4


NETWORKS = {
    "densenet121": Network(32, (6, 12, 24, 16), 64),
    "densenet161": Network(48, (6, 12, 36, 24), 96),
    "densenet169": Network(32, (6, 12, 32, 32), 64),
    "densenet201": Network(32, (6, 12, 48, 32), 64),
    "densenet264": Network(32, (6, 12, 64, 48), 64),
}


class Operation(NamedTuple):
    """One primitive of a network: which, in which block (from 1), on what shape, how often a step."""

    name: str
    block: int
    shape: Shape
    times: int


class Block(NamedTuple):
    """A block's size: values per channel, channels entering and leaving."""

    m: int
    entering: int
    leaving: int


def blocks(network: Network, batch: int, size: int) -> Iterator[Block]:
    """The blocks of ``network`` for ``batch`` images of ``size`` x ``size`` pixels."""
    side, entering = size // network.stem_stride, network.init_features
    for layers in network.layers:
        leaving = entering + layers * network.growth_rate
        yield Block(batch * side * side, entering, leaving)
        side, entering = side // 2, leaving // 2


def operations(network: Network, batch: int, size: int, itemsize: int) -> list[Operation]:
    """Every primitive that one training step runs in the blocks, equal ones counted, in the order of the forward pass.

    Each backward stands beside its forward. For ``recompute="bottlenecks"`` every 1x1 forward runs twice.
    """
    k = network.growth_rate
    found: dict[tuple[str, int, Shape], int] = {}

    def add(name: str, block: int, m: int, reads: int, writes: int, taps: int) -> None:
        key = (name, block, Shape(m, reads, writes, taps, itemsize))
        found[key] = found.get(key, 0) + 1

    for number, (layers, block) in enumerate(zip(network.layers, blocks(network, batch, size), strict=True), 1):
        m, entering, _ = block
        add(COPY, number, m, entering, entering, 1)
        for reads in range(entering, entering + layers * k, k):
            if network.bn_size is None:
                convolutions: Sequence[tuple[int, int, int]] = [(reads, k, 9)]
            else:
                bottleneck = network.bn_size * k
                convolutions = [(reads, bottleneck, 1), (bottleneck, k, 9)]
            for conv in convolutions:
                for names in (FORWARD, BACKWARD):
                    add(names[conv[2] > 1], number, m, *conv)
    return [Operation(*key, times) for key, times in found.items()]


def outside_blocks(network: Network, batch: int, size: int, itemsize: int) -> Traffic:
    """Stem, transitions, head and the blocks' borders, forward and backward, at their least.

    The stem's convolution runs at half, its pooling at a quarter of the resolution (a stem of stride 1 is one
    convolution); a transition pools before it convolves; the gradient of a block's input is formed once from ``D`` and
    the values. Products outside the blocks, under a tenth of all, count as free: the floor stays a floor.
    """
    pixels, channels = batch * size * size, network.init_features
    if network.stem_stride == 1:
        elements = 2 * pixels * (3 + channels)
    else:
        image, conv, pooled = 3 * pixels, channels * pixels // 4, channels * pixels // network.stem_stride**2
        elements = (image + conv) + (conv + pooled) + (pooled + 2 * conv) + (conv + image)
    sizes = list(blocks(network, batch, size))
    for m, entering, leaving in sizes:
        elements += 3 * m * entering  # D and v in, the gradient out
        elements += 3 * m * leaving  # the reader after the block: X forward, X and D backward
    for before, after in pairwise(sizes):
        elements += 2 * after.m * (before.leaving // 2)  # a transition's output and its gradient
    return Traffic(elements * itemsize, 0)


def _parts(network: Network, batch: int, size: int, itemsize: int) -> Iterator[tuple[int, Traffic]]:
    """How often, and what, for everything that a training step does."""
    yield 1, outside_blocks(network, batch, size, itemsize)
    for name, _, shape, times in operations(network, batch, size, itemsize):
        yield times, primitive(name, shape, bottleneck=network.bn_size is not None)


def network_traffic(network: Network, batch: int, size: int, itemsize: int) -> Traffic:
    """A whole training step with ``recompute="activations"``: all primitives, and what lies outside the blocks."""
    parts = list(_parts(network, batch, size, itemsize))
    return Traffic(*(sum(times * part[i] for times, part in parts) for i in (0, 1)))


def network_floor_seconds(
    network: Network, batch: int, size: int, itemsize: int, copy_rate: float, matmul_rate: float
) -> float:
    """What a training step takes if every primitive runs at its own floor, one after another."""
    parts = _parts(network, batch, size, itemsize)
    return math.fsum(times * floor_seconds(*part, copy_rate, matmul_rate) for times, part in parts)
