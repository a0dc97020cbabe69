"""Other orders of a DenseBlock's work, counted: bytes, instructions, modelled times. No measurement.

    python -m benchmarks.schedules [--write]

prints the tables of docs/schedules.md; ``--write`` puts them there. Counted are *groups* of layers whose 1x1
convolutions read earlier features together (:func:`forward`, :func:`backward`), a backward pass that *pulls* gradients
instead of adding to them (:func:`pulled`), and for inference both convolutions of a layer in one kernel
(:func:`fused`).

A schedule is a list of :class:`Pass`: elements of 16 bit that a launch moves a pixel, and warp instructions that it
issues a pixel. Weights, vectors of a few numbers a channel and partial sums of weight gradients are left out.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from . import traffic
from .compiled import SM_COUNT
from .kernels import CLOCK, COPY_RATE, ISSUE, RECORD
from .traffic import NETWORKS

PAGE = Path(__file__).parents[1] / "docs" / "schedules.md"
SHOWN = ("densenet121", "densenet201")
GROUPS = (1, 2, 4, 8)
COUNTED = ("3.9.0", "17508a901237fbc9")  # Triton and kernels of those instructions that the record does not hold
L2_BYTES = 50e6  # an H100's
ITEMSIZE = 2
PARTIAL = 2  # a sum kept in fp32 takes as much as so many elements
WIDTH = 64  # input channels of a tile
ISSUE_RATE = SM_COUNT[90] * ISSUE * CLOCK[90]  # warp instructions a second, of an H100


class Loops(NamedTuple):
    """Instructions of the loops of a layer with ``k = 32``, by each warp, for one tile (sm_90, bfloat16).

    The first seven are the compile report's. It holds no rows for the others. Those before ``pair_tile`` are the same
    launches compiled with ``LAZY``, ``HAS_INTO``, ``NEEDS_WEIGHT``, ``NEEDS_DY`` or ``HAS_MOMENTS`` off. The rest are
    prototypes that were compiled and not kept: a backward for two layers, which spills 240 bytes, and :func:`fused` for
    8 x 16 pixels with their halo, 8 warps, which spills 104 bytes (8 without shifts).
    """

    forward_tile: int  # 1x1: 64 rows, 4 warps
    forward_step: int  # its 64 input channels
    spatial_tile: int  # 3x3: 62 rows, 4 warps
    spatial_step: int  # its 64 input channels for one row of taps
    backward_tile: int  # 1x1 backward: 64 rows of 64 input channels, 8 warps
    spatial_data: int  # 3x3 backward, data gradient with all its taps: 64 rows of 64 input channels, 4 warps
    spatial_weight: int  # 3x3 backward, weight gradient of three taps: 64 rows of 128 input channels, 4 warps
    plain_tile: int = 772  # backward_tile where the gradient of Z is written out: not LAZY
    pull_tile: int = 679  # and nothing is added to D: nor HAS_INTO
    pull_data: int = 472  # of that the data gradient alone
    pull_weight: int = 387  # of that the weight gradient alone
    bare_tile: int = 543  # forward_tile without moments
    bare_spatial_tile: int = 793  # spatial_tile without moments
    pair_tile: int = 571  # plain_tile, each of two layers that share X and D
    fused_step: int = 322  # 64 input channels of the 1x1
    fused_tile: int = 3561  # everything else, nine products shifted by tl.gather
    unshifted_tile: int = 1604  # everything else, if shifts cost nothing


@lru_cache(maxsize=1)
def loops() -> Loops:
    """The record's rows for ``k = 32``, sm_90, bfloat16, 64 images of 56 x 56 pixels."""
    rows: list[dict[str, Any]] = json.loads(RECORD.read_text())
    wanted = (90, "bf16", 32, 64 * 56 * 56)
    found: dict[str, list[list[int]]] = {
        row["kernel"]: row["loop_instructions"]
        for row in rows
        if (row["arch"], row["dtype"], row["growth_rate"], row["shape"].get("m")) == wanted
    }
    (tile, step), (spatial, row_of_taps) = found["bn_relu_conv 1x1"][0], found["bn_relu_conv 3x3"][0]
    (data,), (weight,) = found["bn_relu_conv_backward 3x3"]
    return Loops(tile, step, spatial, row_of_taps, found["bn_relu_conv_backward 1x1"][0][0], data, weight)


class Pass(NamedTuple):
    """One launch: what it does, the elements it moves and the warp instructions it issues, a pixel."""

    name: str
    elements: float
    slots: float = 0.0

    @property
    def moving(self) -> float:
        """Seconds a pixel to move the elements at the rate at which an H100 copies."""
        return self.elements * ITEMSIZE / COPY_RATE

    @property
    def issuing(self) -> float:
        """Seconds a pixel to issue the instructions at 70 % of an H100's rate."""
        return self.slots / ISSUE_RATE

    @property
    def seconds(self) -> float:
        """The larger of both; products on tensor cores take at most two thirds of that here and never bind."""
        return max(self.moving, self.issuing)


class Block(NamedTuple):
    """A DenseBlock: pixels of an image, channels entering, layers, growth rate, bottleneck."""

    pixels: int
    entering: int
    layers: int
    k: int = 32
    bottleneck: int = 128

    @property
    def reads(self) -> list[int]:
        """``C_l`` of every layer."""
        return [self.entering + l * self.k for l in range(self.layers)]

    @property
    def leaving(self) -> int:
        """``C``."""
        return self.entering + self.layers * self.k

    def groups(self, g: int) -> Iterator[tuple[int, int]]:
        """``(C_s, layers)`` of each group of at most ``g`` layers."""
        for first in range(0, self.layers, g):
            yield self.entering + first * self.k, min(g, self.layers - first)


def network_blocks(name: str, size: int = 224) -> list[Block]:
    """The blocks of a network with ``k = 32``, which is what the instructions were counted for."""
    network = NETWORKS[name]
    if network.growth_rate != 32 or network.bn_size != 4:
        raise ValueError(f"instructions are known for k = 32 and a bottleneck of 128, not for {name}")
    sizes = traffic.blocks(network, 1, size)
    return [Block(m, entering, layers) for layers, (m, entering, _) in zip(network.layers, sizes, strict=True)]


def columns(channels: int) -> int:
    """Tiles of input channels."""
    return -(-channels // WIDTH)


def forward_slots(tile: int, channels: int) -> float:
    """The 1x1 forward: a tile of 64 rows, its steps over the input channels, 4 warps."""
    return (tile + loops().forward_step * columns(channels)) * 4 / 64


def backward_slots(tile: int, channels: float) -> float:
    """The 1x1 backward: tiles of 64 rows and 64 input channels, 8 warps."""
    return tile * channels / WIDTH * 8 / 64


def spatial_forward(block: Block, *, moments: bool = True) -> Pass:
    """A 3x3: ``B + k`` elements."""
    at = loops()
    tile = at.spatial_tile if moments else at.bare_spatial_tile
    slots = (tile + 3 * at.spatial_step * columns(block.bottleneck)) * 4 / 62
    return Pass("3x3", block.bottleneck + block.k, slots)


def spatial_backward(block: Block) -> Pass:
    """A 3x3's backward: ``2B + 2k`` elements."""
    at, B = loops(), block.bottleneck
    slots = columns(B) * at.spatial_data + -(-B // 128) * 3 * at.spatial_weight
    return Pass("3x3", 2 * B + 2 * block.k, slots * 4 / 64)


def forward(block: Block, g: int = 1, *, on_chip: bool = False) -> list[Pass]:
    """The 1x1 convolutions of ``g`` layers read the ``C_s`` features before the group together.

    Layer ``j`` of the group reads the ``j*k`` features that are new in it when they are there, and its sums meanwhile
    lie in memory in fp32, or on the chip. Elements of a group:

        C_s + g*B + sum_j j*k + (g - 1)*2*2B        the last term in memory only
    """
    at, B, k = loops(), block.bottleneck, block.k
    found: list[Pass] = []
    for C, layers in block.groups(g):
        slots = forward_slots(at.forward_tile, C) + (layers - 1) * forward_slots(at.bare_tile, C)
        written = B if on_chip else B + (layers - 1) * PARTIAL * B
        found.append(Pass("1x1", C + written, slots))
        for j in range(1, layers):
            if on_chip:  # the tile is finished once, in the group's pass or here
                found.append(Pass("1x1", j * k + B, forward_slots(at.forward_tile - at.bare_tile, j * k)))
            else:
                found.append(Pass("1x1", j * k + PARTIAL * B + B, forward_slots(at.forward_tile, j * k)))
    return found + [spatial_forward(block)] * block.layers


def _earlier(block: Block, C: int, layers: int, *, written_out: bool, tile: int) -> list[Pass]:
    """Backward of ``layers`` 1x1 convolutions together: the first layer's gradient lazy, or written out if faster."""
    B, padded = block.bottleneck, columns(C) * WIDTH
    others = backward_slots((layers - 1) * tile, padded)
    lazy = backward_slots(loops().backward_tile, padded)
    plain = backward_slots(tile if layers > 1 else loops().plain_tile, padded)
    ways = [[Pass("1x1", 3 * C + (layers + 1) * B, others + lazy)]]
    if written_out:
        ways.append([Pass("write out", 3 * B), Pass("1x1", 3 * C + layers * B, others + plain)])
    return min(ways, key=seconds)


def backward(block: Block, g: int = 1, *, written_out: bool = False, tile: int | None = None) -> list[Pass]:
    """Backward, the ``g`` layers of a group add to ``D`` of the ``C_s`` features before it together.

    Within the group they add one by one, because the next 3x3 needs it, and write ``dZ`` out; the first layer has no
    feature of the group to add to. Elements of a group, where ``g = 1`` is today's schedule:

        3*C_s + (g + 1)*B + sum_{0 < j < g} (3*j*k + 3B)

    Args:
        written_out: the first layer's ``dZ`` is also written out, by a launch of its own, where that is faster.
        tile: instructions for a layer of a group, ``plain_tile`` unless given.
    """
    tile = tile or loops().plain_tile
    found: list[Pass] = []
    for C, layers in block.groups(g):
        for j in range(1, layers):
            slots = backward_slots(loops().backward_tile, columns(j * block.k) * WIDTH)
            found.append(Pass("1x1", 3 * j * block.k + 3 * block.bottleneck, slots))
        found += _earlier(block, C, layers, written_out=written_out, tile=tile)
    return found + [spatial_backward(block)] * block.layers


def pulled(block: Block, *, weights_apart: bool = False) -> list[Pass]:
    """Left-looking backward: ``grad(H_i)`` is pulled from the ``dZ`` of its readers; ``D`` is never added to.

    ``H_i`` of ``w`` channels (``w = C0`` for ``i = 0``, else ``k``) has ``L - i`` readers. Its pass reads ``X``, the
    gradient from outside and every reader's ``dZ``, and writes ``D``; each ``dZ`` is written out once, 3B:

        sum_i (3*w_i + (L - i)*B) + 3*L*B        = 3*(C - k) + B*L*(L + 1)/2 + 3*L*B   elements

    The last ``H`` has no reader in the block. Column tiles of ``H_0`` share ``dZ`` through the L2 cache; a tile of
    ``k`` columns counts as the half of one of 64.

    Args:
        weights_apart: the weight gradients, one for each reader and channel, do not fit beside the rest: they are
            formed by a pass for each layer, which reads ``C_l + B`` more.
    """
    at, B = loops(), block.bottleneck
    tile = at.pull_data if weights_apart else at.pull_tile
    found = []
    for i in range(block.layers):
        width, readers = block.entering if i == 0 else block.k, block.layers - i
        found.append(Pass("pull", 3 * width + readers * B, backward_slots(readers * tile, width)))
    found += [Pass("write out", 3 * B)] * block.layers
    if weights_apart:
        found += [Pass("weights", C + B, backward_slots(at.pull_weight, columns(C) * WIDTH)) for C in block.reads]
    return found + [spatial_backward(block)] * block.layers


class Tile(NamedTuple):
    """Output pixels of one program of :func:`fused`."""

    height: int
    width: int

    @property
    def rows(self) -> int:
        """Rows of the 1x1's product: the tile with a pixel more on each side, and up to a power of two."""
        return 1 << ((self.height + 2) * (self.width + 2) - 1).bit_length()

    def work(self, side: int) -> float:
        """Rows computed for each pixel of an image of ``side`` x ``side``."""
        return -(-side // self.height) * -(-side // self.width) * self.rows / side**2

    def registers_bytes(self, bottleneck: int) -> int:
        """Of the 1x1's sums in fp32; a multiprocessor has 256 KB."""
        return self.rows * bottleneck * 4

    def shared_bytes(self, bottleneck: int, k: int) -> int:
        """Of ``relu(bn(Z))`` and the weights of nine taps in 16 bit; a program can have 227 KB."""
        return (self.rows + 9 * k) * bottleneck * ITEMSIZE


def separate(block: Block) -> list[Pass]:
    """Inference as it is, a kernel for each convolution: ``C_l + 2B + k`` elements a layer."""
    tile = loops().bare_tile
    ones = [Pass("1x1", C + block.bottleneck, forward_slots(tile, C)) for C in block.reads]
    return ones + [spatial_forward(block, moments=False)] * block.layers


def fused(block: Block, tile: Tile, *, shifts: bool = True) -> list[Pass]:
    """Inference, both convolutions in one kernel: ``C_l + k`` elements a layer; the halo is read from the L2 cache.

    Args:
        shifts: whether shifting nine narrow products costs what ``tl.gather`` costs, or nothing.
    """
    at = loops()
    rest = at.fused_tile if shifts else at.unshifted_tile
    work = tile.work(round(block.pixels**0.5)) * 8 / 128
    return [Pass("both", C + block.k, (rest + at.fused_step * columns(C)) * work) for C in block.reads]


def fused_flops(block: Block, tile: Tile) -> float:
    """How many times the operations of :func:`separate`; the 3x3's products are formed on the halo, too."""
    return tile.work(round(block.pixels**0.5))


def elements(passes: Sequence[Pass]) -> float:
    """Of all passes, a pixel."""
    return sum(part.elements for part in passes)


def slots(passes: Sequence[Pass]) -> float:
    """Of all passes, a pixel."""
    return sum(part.slots for part in passes)


def seconds(passes: Sequence[Pass]) -> float:
    """Of all passes one after another, a pixel."""
    return sum(part.seconds for part in passes)


def outside(name: str, *, training: bool, size: int = 224) -> float:
    """Elements an image outside of the layers: for training as in ``traffic``, for inference the forward part."""
    network, sizes = NETWORKS[name], network_blocks(name, size)
    copies = sum(2 * block.pixels * block.entering for block in sizes)
    if training:
        one, two = (traffic.outside_blocks(network, batch, size, ITEMSIZE).bytes for batch in (1, 2))
        return (two - one) / ITEMSIZE + copies  # without weights, which are read once for the whole batch
    conv, pooled = network.init_features * size**2 // 4, network.init_features * size**2 // 16
    transitions = sum(block.pixels * block.entering for block in sizes[1:])
    return 3 * size**2 + 2 * conv + pooled + copies + transitions + sum(b.pixels * b.leaving for b in sizes)


def _of_layer(passes: Sequence[Pass], block: Block) -> str:
    return f"{elements(passes) * ITEMSIZE / block.layers:,.0f}"


def _markdown(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [headings, ["---", *["--:"] * (len(headings) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def _all_blocks() -> Iterator[tuple[str, Block]]:
    for name in SHOWN:
        for number, block in enumerate(network_blocks(name), 1):
            yield f"{name}, block {number}", block


def bytes_table() -> str:
    """Bytes a pixel and layer, the mean over a block."""
    headings = ["", *(f"forward {g}" for g in GROUPS), *(f"on chip {g}" for g in GROUPS[1:]),
                *(f"backward {g}" for g in GROUPS)]  # fmt: skip
    rows = []
    for label, block in _all_blocks():
        ways = [forward(block, g) for g in GROUPS] + [forward(block, g, on_chip=True) for g in GROUPS[1:]]
        ways += [backward(block, g) for g in GROUPS]
        rows.append([label, *(_of_layer(way, block) for way in ways)])
    return _markdown(headings, rows)


def _microseconds(parts: Sequence[tuple[int, Sequence[Pass]]]) -> list[str]:
    """Moving, issuing, and the larger of both pass by pass, of ``(pixels, passes)``, us an image."""
    moving = sum(m * elements(passes) for m, passes in parts) * ITEMSIZE / COPY_RATE
    issuing = sum(m * slots(passes) for m, passes in parts) / ISSUE_RATE
    return [f"{time * 1e6:.1f}" for time in (moving, issuing, sum(m * seconds(passes) for m, passes in parts))]


def _steps(blocks: Sequence[Block]) -> Iterator[tuple[str, list[list[Pass]], list[list[Pass]]]]:
    """What the rows of the table of times are, and forward and backward of every block."""
    for g in GROUPS:
        yield f"{g}", [forward(b, g) for b in blocks], [backward(b, g) for b in blocks]
    for g, tile in (*((g, None) for g in GROUPS), (2, loops().pair_tile)):
        yield (
            f"{g}, best" + (", spills free" if tile else ""),
            [min(forward(b), forward(b, g), key=seconds) for b in blocks],
            [min((backward(b, n, written_out=True, tile=tile) for n in (1, g)), key=seconds) for b in blocks],
        )


def times_table() -> str:
    """Whole steps: bytes, instructions and time of the 1x1 passes (us an image), and the step's bytes and time."""
    headings = ["", *(f"{way}: {what}" for way in ("forward", "backward") for what in ("bytes", "issue", "time")),
                "step: MB", "us", "us if nothing overlaps"]  # fmt: skip
    rows = []
    for name in SHOWN:
        sizes, rest = network_blocks(name), outside(name, training=True)
        pixels = [block.pixels for block in sizes]
        for label, there, back in _steps(sizes):
            both = list(zip(pixels * 2, there + back, strict=True))
            moved = (sum(m * elements(passes) for m, passes in both) + rest) * ITEMSIZE
            time = sum(m * seconds(passes) for m, passes in both) + rest * ITEMSIZE / COPY_RATE
            apart = moved / COPY_RATE + sum(m * slots(passes) for m, passes in both) / ISSUE_RATE
            ones = [[[part for part in passes if part.name != "3x3"] for passes in way] for way in (there, back)]
            cells = [_microseconds(list(zip(pixels, way, strict=True))) for way in ones]
            rows.append([f"{name}, {label}", *cells[0], *cells[1], f"{moved / 1e6:.0f}",
                         f"{time * 1e6:.1f}", f"{apart * 1e6:.1f}"])  # fmt: skip
    return _markdown(headings, rows)


def cache_table() -> str:
    """Against an L2 cache of 50 MB: MB of a block, and of how many layers all that a 1x1 pass touches fits."""
    headings = ["", "batch", "`X`", "one `Z`", "1x1 forward fits", "1x1 backward fits"]
    rows = []
    for label, block in _all_blocks():
        for batch in (64, 256):
            row = batch * block.pixels * ITEMSIZE
            fits = [sum(row * (times * C + over * block.bottleneck) <= L2_BYTES for C in block.reads)
                    for times, over in ((1, 1), (2, 2))]  # fmt: skip
            rows.append([label, batch, *(f"{row * c / 1e6:.0f}" for c in (block.leaving, block.bottleneck)),
                         *(f"{fit} of {block.layers}" for fit in fits)])  # fmt: skip
    return _markdown(headings, rows)


def pulled_table() -> str:
    """Backward of a block, 3x3 and all: bytes a pixel and layer, us an image, scratch at batch 256."""
    headings = ["", "bytes: today", "pulled", "weights apart", "groups of 4", "us: pushed, best", "pulled",
                "weights apart", "scratch: today", "pulled"]  # fmt: skip
    rows = []
    for label, block in _all_blocks():
        ways = [backward(block, written_out=True), pulled(block), pulled(block, weights_apart=True)]
        scratch = [block.leaving + block.bottleneck, block.layers * block.bottleneck + block.entering]
        rows.append([
            label, *(_of_layer(way, block) for way in (backward(block), *ways[1:], backward(block, 4))),
            *(f"{seconds(way) * block.pixels * 1e6:.1f}" for way in ways),
            *(f"{256 * block.pixels * ITEMSIZE * c / 1e6:.0f} MB" for c in scratch),
        ])  # fmt: skip
    return _markdown(headings, rows)


TILES = (Tile(8, 8), Tile(8, 16), Tile(16, 16), Tile(6, 14), Tile(14, 14))


def tiles_table() -> str:
    """What a tile needs, and how many rows it computes for a pixel of the four blocks."""
    headings = ["output pixels", "rows", "sums in registers", "shared memory", *(f"{s} x {s}" for s in (56, 28, 14, 7))]
    return _markdown(headings, [
        [f"{t.height} x {t.width}", t.rows, f"{t.registers_bytes(128) // 1024} KB",
         f"{t.shared_bytes(128, 32) // 1024} KB", *(f"{t.work(side):.2f}" for side in (56, 28, 14, 7))]
        for t in TILES
    ])  # fmt: skip


def _best(block: Block, *, shifts: bool) -> Tile:
    fitting = [tile for tile in TILES if tile.rows <= 256]  # more would leave no register for anything else
    return min(fitting, key=lambda tile: seconds(fused(block, tile, shifts=shifts)))


def fused_table() -> str:
    """Inference: bytes a pixel and layer, us an image; the last row of a network: MB and us an image, everything."""
    headings = ["", "bytes: separate", "fused", "tile", "operations", "us: separate", "fused", "fused, free shifts",
                "separate, 3x3 by bytes"]  # fmt: skip
    rows: list[Sequence[object]] = []
    for name in SHOWN:
        rest = outside(name, training=False) * ITEMSIZE
        totals, moved = [rest / COPY_RATE] * 4, [rest] * 2
        for number, block in enumerate(network_blocks(name), 1):
            tile = _best(block, shifts=True)
            ways = [separate(block), fused(block, tile), fused(block, _best(block, shifts=False), shifts=False)]
            ways.append([part._replace(slots=0) if part.name == "3x3" else part for part in ways[0]])
            times = [seconds(way) * block.pixels for way in ways]
            totals = [a + b for a, b in zip(totals, times, strict=True)]
            moved = [a + elements(way) * block.pixels * ITEMSIZE for a, way in zip(moved, ways, strict=False)]
            rows.append([f"{name}, block {number}", *(_of_layer(way, block) for way in ways[:2]),
                         f"{tile.height} x {tile.width}", f"{fused_flops(block, tile):.2f}",
                         *(f"{time * 1e6:.2f}" for time in times)])  # fmt: skip
        rows.append([f"{name}, all", *(f"{b / 1e6:.0f} MB" for b in moved), "", "",
                     *(f"{time * 1e6:.2f}" for time in totals)])  # fmt: skip
    return _markdown(headings, rows)


TABLES = {"bytes": bytes_table, "times": times_table, "cache": cache_table, "pulled": pulled_table,
          "tiles": tiles_table, "fused": fused_table}  # fmt: skip
_MARKED = re.compile(r"(<!-- counted: (?P<name>\w+) -->\n).*?(<!-- end of counted -->)", re.DOTALL)


def render(text: str) -> str:
    """``text`` with every marked table counted again."""
    return _MARKED.sub(lambda match: f"{match[1]}\n{TABLES[match['name']]()}\n{match[3]}", text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.schedules", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"put the tables into docs/{PAGE.name}")
    if parser.parse_args().write:
        PAGE.write_text(render(PAGE.read_text()))
        return
    for table in TABLES.values():
        print(f"{table.__doc__} Modelled, not measured.\n\n{table()}")


if __name__ == "__main__":
    main()
