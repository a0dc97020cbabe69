"""What a DenseNet's training step must move and compute at least: modelled floors, no measurement.

A primitive's floor counts every feature map that it cannot do without once for each reading and once for each
writing, and its weight. Vectors of a few numbers a channel are left out. For a layer that reads ``C_l`` channels, has a
bottleneck of ``B`` and adds ``k``, that is, in elements a pixel,

    forward     C_l + B  (1x1)     + B + k   (3x3)
    backward  3*C_l + 2B (1x1)    + 2B + 2k  (3x3)

Backward, a convolution reads the gradient that arrives as ``(D, a, b)`` together with the values ``v`` that it is lazy
in, and the features that it was computed from; it writes their ``D``, or reads it and adds to it.

Round the blocks (two dimensions, as everywhere here) stand the stem, the transitions and the head, each as the kernels
that it runs, with moments handed from one to the next: only the stem convolution's output has its moments taken by a
pass of their own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import NamedTuple

from ..harness.providers import MODELS

GRADIENT_BYTES = 4  # weight gradients leave a kernel in fp32

FORWARD = ("forward 1x1", "forward 3x3")
BACKWARD = ("backward 1x1", "backward 3x3")
COPY = "copy"
MOMENTS, RESOLVE = "moments", "resolve"
MAX_POOL = ("max pool", "max pool backward")
MEAN = ("mean", "mean backward")
TRANSITION = ("transition", "transition backward")
AROUND = (MOMENTS, RESOLVE, *MAX_POOL, *TRANSITION, *MEAN)
STEM = ("stem convolution", "stem convolution backward")  # PyTorch's own: part of a network's floor, no kernel of ours

WINDOW = 4  # pixels that a transition averages, and pixels for each window of the stem's pooling
STEM_TAPS, STEM_READS = {4: 49, 1: 9}, 3  # by how much the stem divides height and width


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


def floor(kernel: str, shape: Shape, pixels: int | None = None) -> Traffic:
    """The floor of one kernel, a row of the table below.

    ``"backward of the only reader"`` writes the gradient of what it read, where ``"backward"`` adds to it. ``m`` counts
    what is written, a pooling kernel's windows or images; ``pixels`` what is read where that is more.
    """
    m, reads, writes, taps, itemsize = shape
    x, y, weight = (m if pixels is None else pixels) * reads, m * writes, taps * reads * writes
    products, weight_gradient = 2 * m * weight, GRADIENT_BYTES * weight
    # Features and weights moved, other bytes moved (a maximum's place takes one), operations.
    moved, other_bytes, flops = {
        "copy": (x + y, 0, 0),
        "moments": (x, 0, 0),
        "resolve": (3 * x, 0, 3 * x),
        "forward": (x + y + weight, 0, products),
        "backward": (3 * x + 2 * y + weight, weight_gradient, 2 * products),
        "backward of the only reader": (2 * x + 2 * y + weight, weight_gradient, 2 * products),
        "pooled backward": (2 * x + y + weight, weight_gradient, 2 * products),
        "max pool": (x + y, 0, 0),
        "arg-max": (x, y, 0),
        "max pool backward": (2 * x + y, y, 0),
        "mean": (x, 0, 0),
        "mean backward": (2 * x + y, 0, 0),
        "stem convolution": (x + y + weight, 0, products),
        "stem convolution backward": (x + y, weight_gradient, products),  # images need no gradient
    }[kernel]
    return Traffic(moved * itemsize + other_bytes, flops)


def primitive(operation: str, shape: Shape, *, bottleneck: bool = True, window: int = WINDOW) -> Traffic:
    """The floor of an operation of :func:`operations` or :func:`around`.

    Behind a bottleneck a 3x3 convolution is the only reader of its input, so it writes ``D`` where every other
    backward adds to it. ``window``: pixels that a transition averages, 8 in 3D.
    """
    kernel, pixels = operation, shape.m
    if operation in FORWARD:
        kernel = "forward"
    elif operation in BACKWARD:
        kernel = "backward of the only reader" if bottleneck and operation == "backward 3x3" else "backward"
    elif operation in TRANSITION:
        kernel, pixels = "forward" if operation == TRANSITION[0] else "pooled backward", shape.m * window
    elif operation in STEM:
        pixels = shape.m * (1 if shape.taps == STEM_TAPS[1] else 4)
    elif operation in MAX_POOL:
        shape = shape._replace(m=shape.m // window)
    elif operation in MEAN:  # one value an image and channel is left out
        shape = shape._replace(m=0)
    found = floor(kernel, shape, pixels)
    if operation == MAX_POOL[1]:
        found = Traffic(*map(sum, zip(found, floor("arg-max", shape, pixels), strict=True)))
    return found


def floor_seconds(bytes_: float, flops: float, copy_rate: float, matmul_rate: float) -> float:
    """The larger of what moving and what computing takes, at measured rates (bytes and operations a second)."""
    return max(bytes_ / copy_rate, flops / matmul_rate)


@dataclass(frozen=True)
class Network:
    """What decides a DenseNet's shapes."""

    growth_rate: int  # k
    layers: tuple[int, ...]  # of each block
    init_features: int  # channels that the stem hands on
    bn_size: int | None = 4  # B/k; None for the basic layer without bottleneck
    stem_stride: int = 4  # by how much the stem divides height and width


NETWORKS = {
    name: Network(spec.growth_rate, spec.block_config, spec.num_init_features)
    for name, spec in MODELS.items()
    if not spec.small_inputs
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
    k, wide = network.growth_rate, network.growth_rate * (network.bn_size or 0)
    found: Counter[tuple[str, int, Shape]] = Counter()
    for number, block in enumerate(blocks(network, batch, size), 1):
        found[COPY, number, Shape(block.m, block.entering, block.entering, 1, itemsize)] += 1
        for reads in range(block.entering, block.leaving, k):
            convolutions = [(reads, wide, 1), (wide, k, 9)] if wide else [(reads, k, 9)]
            for conv, names in product(convolutions, (FORWARD, BACKWARD)):
                found[names[conv[2] > 1], number, Shape(block.m, *conv, itemsize)] += 1
    return [Operation(*key, times) for key, times in found.items()]


def around(network: Network, batch: int, size: int, itemsize: int) -> list[Operation]:
    """Every primitive that one training step runs outside the blocks' layers: stem, blocks' inputs, transitions, head.

    Block 0 is the stem (one of stride 1 is a convolution alone). The gradient of a block's input, and of the stem
    convolution's output, is formed once from ``D`` and the values. The copy of an arriving gradient into ``D`` is left
    out, as is the classifier.
    """
    sizes = list(blocks(network, batch, size))
    channels, taps = network.init_features, STEM_TAPS[network.stem_stride]
    pixels = batch * (size // (2 if network.stem_stride == 4 else 1)) ** 2
    found = [Operation(name, 0, Shape(pixels, STEM_READS, channels, taps, itemsize), 1) for name in STEM]

    def add(names: Sequence[str], block: int, m: int, reads: int, writes: int) -> None:
        found.extend(Operation(name, block, Shape(m, reads, writes, 1, itemsize), 1) for name in names)

    if network.stem_stride == 4:
        add((MOMENTS, *MAX_POOL, RESOLVE), 0, pixels, channels, channels)
    for number, (m, entering, _) in enumerate(sizes, 1):
        add([RESOLVE], number, m, entering, entering)
    for number, (before, after) in enumerate(pairwise(sizes), 1):
        add(TRANSITION, number, after.m, before.leaving, after.entering)
    add(MEAN, len(sizes), sizes[-1].m, sizes[-1].leaving, sizes[-1].leaving)
    return found


def _parts(network: Network, batch: int, size: int, itemsize: int) -> Iterator[tuple[int, Traffic]]:
    """How often, and what, for everything that a training step does."""
    every = around(network, batch, size, itemsize) + operations(network, batch, size, itemsize)
    for name, _, shape, times in every:
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
