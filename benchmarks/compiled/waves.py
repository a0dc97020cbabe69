"""How well a network's launches fill a GPU: rounds of programs, and what of their places does work. Counted, not timed.

    python -m benchmarks.compiled.waves [--arch 80 90 100] [--json FILE]

A GPU runs as many programs at once as its multiprocessors hold, by registers, warps and shared memory; when one ends,
the next begins. *Waves* are a launch's programs over these places: just above a whole number, the last wave is nearly
empty and costs as much as a full one. *Filled* is the work of all tiles over what the places could do until the longest
programs have ended, wave by wave: modelled, with tiles that take as long as they have products.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ..report.tables import console_table
from . import traffic
from .launches import SM_COUNT, Case, Launch, name_of, plan, waves_of
from .report import write_lines

NETWORKS, BATCHES, SIZE = ("densenet121", "densenet201"), (64, 256), 224
ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Fit:
    """How one launch fills a device."""

    arch: int
    network: str
    batch: int
    side: int
    kernel: str
    programs: int
    places: int
    waves: float
    filled: float


def filled(launch: Launch, sm_count: int) -> float:
    """Work over places times time, modelled: 1 where every place is busy until the end."""
    places, kinds = sm_count * launch.config.resident, list(_kinds(launch))
    work = sum(tiles * columns * cost for tiles, columns, _, cost in kinds)
    longest = max(each * cost for _, _, each, cost in kinds)
    return work / (math.ceil(launch.programs / places) * places * longest)


def _kinds(launch: Launch) -> Iterator[tuple[int, int, int, int]]:
    """``(row tiles, columns, tiles a program, products a tile)`` of each kind of program of a convolution's launch."""
    a = launch.arguments
    if launch.kernel.__name__ == "bn_relu_conv_kernel":
        yield -(-a["m"] // (a["BLOCK_M"] - a["SHIFTS"] + 1)), -(-a["K"] // a["BLOCK_N"]), a["tiles_per_program"], 1
        return
    units = a["KD"] * a["KH"] * a["KW"] * a["K_BLOCKS"]
    columns = -(-a["C"] // a["BLOCK_C"]) - a["first_column"]
    yield -(-a["m"] // a["BLOCK_M"]), columns, a["tiles_per_split"], a["BLOCK_M"] * a["BLOCK_C"] * units
    if not a["TOGETHER"] and a["NEEDS_WEIGHT"]:
        columns = -(-a["C"] // a["WEIGHT_BLOCK_C"]) * -(-units // a["GROUP"])
        tile = a["WEIGHT_BLOCK_M"] * a["WEIGHT_BLOCK_C"] * a["GROUP"]
        yield -(-a["m"] // a["WEIGHT_BLOCK_M"]), columns, a["weight_tiles_per_split"], tile


def fits(arch: int, name: str, batch: int) -> list[Fit]:
    """Every launch of the layers of one network's blocks in bfloat16, layer by layer."""
    network, found, sm_count = traffic.NETWORKS[name], [], SM_COUNT[arch]
    for block in traffic.blocks(network, batch, SIZE):
        side = math.isqrt(block.m // batch)
        for reads in range(block.entering, block.leaving, network.growth_rate):
            for launch in plan(Case(network.growth_rate, reads, batch, (side, side), torch.bfloat16), arch):
                if launch.kernel.__name__.startswith("bn_relu_conv"):
                    waves, share = (round(measure(launch, sm_count), 2) for measure in (waves_of, filled))
                    of, places = (arch, name, batch, side), sm_count * launch.config.resident
                    found.append(Fit(*of, name_of(launch).removesuffix(" lazy"), launch.programs, places, waves, share))
    return found


def show(found: list[Fit]) -> Table:
    """A row for each kernel and block: that of the layer that fills the device least."""
    headings = ("network", "kernel", "sm", "batch", "map", "layers", "programs", "places", "waves", "filled")
    of_launch = attrgetter("arch", "network", "batch", "kernel")
    table = console_table("each block's worst layer; counted and modelled, not measured", headings, words=2)
    for key, layers in groupby(sorted(found, key=of_launch), lambda fit: (*of_launch(fit), fit.side)):
        same = list(layers)
        row = min(same, key=attrgetter("filled"))
        arch, network, batch, kernel, side = key
        cells = (network, kernel, arch, batch, f"{side} x {side}", len(same), row.programs, row.places)
        table.add_row(*map(str, cells), f"{row.waves:.2f}", f"{row.filled:.0%}")
    return table


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled.waves", description="how launches fill a GPU")
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(SM_COUNT), default=list(ARCHITECTURES))
    parser.add_argument("--json", type=Path, help="where to write every layer, like ones together (default: nowhere)")
    options = parser.parse_args()
    found = [fit for arch in options.arch for name in NETWORKS for batch in BATCHES for fit in fits(arch, name, batch)]
    Console(width=140).print(show(found))
    if options.json is not None:
        rows = [asdict(fit) | {"layers": layers} for fit, layers in Counter(found).items()]
        write_lines(options.json, {"rows": rows})


if __name__ == "__main__":
    main()
