"""How rows are cut into pieces that fit some scratch: rows, whole images, or lines of one image with their neighbours.

A *line* is everything at one place of the first spatial axis: a row of an image, a plane of a volume. Where an image is
too large, its lines are worked on a few at a time; what reads neighbouring pixels reads a halo of lines beside them,
does its ordinary padding there, and drops what it made of the halo.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..core.primitives import Pool


class Piece(NamedTuple):
    """What is worked on at a time.

    ``read`` and ``outputs`` are counted from the first row; ``inner`` and ``results`` within these two, and hold what
    is wanted and right. Over all pieces they meet every row once.
    """

    read: slice  # rows of the input
    inner: slice  # of these, the ones whose gradients are wanted
    spatial: tuple[int, ...]  # the size of the images, or of the part of one, that is read
    outputs: slice  # rows that are made of it
    results: slice  # of these, the ones that are wanted

    @property
    def wanted(self) -> slice:
        """``inner``, counted from the first row."""
        return slice(self.read.start + self.inner.start, self.read.start + self.inner.stop)

    @property
    def written(self) -> slice:
        """``results``, counted from the first row."""
        return slice(self.outputs.start + self.results.start, self.outputs.start + self.results.stop)


def _whole(read: slice, spatial: tuple[int, ...], outputs: slice) -> Piece:
    return Piece(read, slice(0, read.stop - read.start), spatial, outputs, slice(0, outputs.stop - outputs.start))


def of_rows(m: int, spatial: tuple[int, ...], at_most: int) -> Iterator[Piece]:
    """For what reads no neighbours: any ``at_most`` of ``m`` rows."""
    for start in range(0, m, max(1, at_most)):
        rows = slice(start, min(start + max(1, at_most), m))
        yield _whole(rows, spatial, rows)


def of_images(
    m: int, spatial: tuple[int, ...], at_most: int, *, pool: Pool | None = None, halo: int = 0
) -> Iterator[Piece]:
    """For what reads neighbours: whole images of ``m`` rows, or where one has more than ``at_most``, lines of it.

    Args:
        m: rows in all.
        spatial: the size of an image.
        at_most: rows at a time, the halo included; exceeded only by the fewest lines that can be worked on.
        pool: how outputs lie; without it they lie as the input does, and ``halo`` is how many lines a kernel reaches.
    """
    pixels = max(1, math.prod(spatial))
    made = math.prod(spatial if pool is None else pool.sizes(spatial))
    if pixels <= at_most or spatial[0] == 1:
        step = max(1, at_most // pixels) * pixels
        for start in range(0, m, step):
            stop = min(start + step, m)
            yield _whole(slice(start, stop), spatial, slice(start // pixels * made, stop // pixels * made))
        return
    unit = 1
    if pool is not None and pool.kind != "mean":
        unit = pool.stride[0]
        # From any line, every window that meets it lies inside; whole steps, so that windows stay where they are.
        halo = -(-(pool.kernel[0] - 1) // unit) * unit if pool.kind == "maximum" else 0
    for image in range(m // pixels):
        yield from _lines(image, spatial, at_most, unit, halo, pool)


def _lines(
    image: int, spatial: tuple[int, ...], at_most: int, unit: int, halo: int, pool: Pool | None
) -> Iterator[Piece]:
    height, line = spatial[0], math.prod(spatial[1:])
    step = max(unit, (at_most // line - 2 * halo) // unit * unit)
    top = 0
    while top < height:
        bottom = top + step
        if height - bottom < unit:  # too few lines for a window of their own
            bottom = height
        first, last = max(0, top - halo), min(height, bottom + halo)
        start = image * height * line
        read = slice(start + first * line, start + last * line)
        inner = slice((top - first) * line, (bottom - first) * line)
        part = (last - first, *spatial[1:])
        if pool is None:
            yield Piece(read, inner, part, read, inner)
        elif pool.kind == "mean":
            yield Piece(read, inner, part, slice(image, image + 1), slice(0, 1))
        else:
            lines = slice(top // unit, None if bottom == height else bottom // unit)
            yield Piece(read, inner, part, *_windows(image, pool, spatial, first // unit, part, lines))
        top = bottom


def _windows(
    image: int, pool: Pool, spatial: Sequence[int], first: int, part: Sequence[int], lines: slice
) -> tuple[slice, slice]:
    """``outputs, results`` of a part: its windows begin with line ``first`` of the outputs; ``lines`` are wanted."""
    height, *others = pool.sizes(spatial)
    line = math.prod(others)
    start = (image * height + first) * line
    stop = height if lines.stop is None else lines.stop
    made = pool.sizes(part)[0]
    return slice(start, start + made * line), slice((lines.start - first) * line, (stop - first) * line)
