"""What the compiler makes of every kernel, for GPUs that need not be there.

    python -m benchmarks.compiled [--arch 80 90] [--all] [--json FILE]

compiles the launches of DenseNet layers with growth rates 12 to 48, each kernel once for every architecture and dtype,
or with ``--all`` every row (of sm_86 those in 16 bit), and lists what :class:`Row` says of each, with two *modelled*
times: the floor on an H100, and the time to issue the inner loops' instructions. ``--all`` records the worst of each
kernel, and a digest of every row. Ends with 1 if a row breaks a rule (:func:`defects`).
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..harness.runner import RESULTS, ROOT
from ..report.tables import console_table
from . import traffic
from .launches import SM_COUNT, Case, Launch, compile_launch, identity, name_of, plan, plan_around, waves_of

RECORD = RESULTS / "compiled" / "kernels.json"
KERNELS = ROOT / "kernels"
WORST = ("registers", "stack_bytes", "shared_bytes", "waves")  # of a kernel: the most

# Channels read, not divisible by 16 where the growth rate allows it: loads must be wide all the same.
READS = {12: 156, 24: 88, 32: 160, 40: 104, 48: 144}
# Channels that transitions read: in ImageNet's networks, and in those of 100 to 250 layers for CIFAR.
TRANSITIONS = {12: (216, 300), 24: (1032,), 32: (256, 512, 1024), 40: (1320,), 48: (384, 2112)}
PRECISIONS = {"fp16": (torch.float16, "ieee"), "bf16": (torch.bfloat16, "ieee"),
              "fp32": (torch.float32, "ieee"), "tf32": (torch.float32, "tf32")}  # fmt: skip

# An H100 SXM, for the modelled times: its clock and issue slots, and rates that copies and products reach.
CLOCK = {80: 1.41e9, 86: 1.695e9, 90: 1.755e9, 100: 1.85e9}
SHARED_LIMIT = {80: 166912, 86: 101376, 90: 232448, 100: 232448}  # bytes a program can have
ISSUE = 4 * 0.7  # warp instructions a cycle and multiprocessor, at 70 % of the schedulers' rate
COPY_RATE = 3.0e12
MATMUL_RATE = {"fp16": 8.0e14, "bf16": 8.0e14, "tf32": 4.0e14, "fp32": 5.0e13}


@dataclass(frozen=True)
class Row:
    """One compiled kernel; ``*_us`` are modelled microseconds, not measured ones."""

    kernel: str
    arch: int
    dtype: str
    growth_rate: int
    shape: dict[str, int]
    config: dict[str, Any]
    registers: int  # of a thread
    stack_bytes: int  # of a thread: what does not fit into registers is spilled there
    shared_bytes: int  # of a program
    tensor_core_instructions: int
    tensor_core: str  # HMMA (sm_80), HGMMA (sm_90), UTCHMMA (sm_100)
    vector128_loads: int  # from global memory, 16 bytes a thread, asynchronous ones among them
    loop_instructions: list[list[int]]  # of each loop with matrix products, its own and those of each loop in it
    bytes: int
    flops: int
    modelled_h100_floor_us: float
    modelled_issue_us: float | None
    waves: float

    @property
    def digest(self) -> str:
        """Changes with anything that the row says."""
        return _digest(json.dumps(asdict(self)))[:8]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sources_digest() -> str:
    """A digest of the kernels' code, comments and docstrings left out: a record with another one is out of date."""
    text = ""
    for path in sorted(KERNELS.glob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
                del node.body[0]
        text += f"{path.name}\0{ast.unparse(tree)}\0"
    return _digest(text)


def cases(precision: str) -> Iterator[tuple[Callable[[Case, int], list[Launch]], Case]]:
    """What is reported, and what plans it.

    Layers of each growth rate at a large and a small size, and one in 3D; what stands round the blocks, each transition
    at the size of a large network's, and one in 3D.
    """

    def case(k: int, reads: int, batch: int, *spatial: int) -> Case:
        dtype, products = PRECISIONS[precision]
        return Case(k, reads, batch, spatial, dtype, precision=products, drop=(k, batch, len(spatial)) == (32, 4, 2))

    growth_rates = sorted(READS, key=lambda k: k != 32)
    for k, (batch, side) in product(growth_rates, ((64, 56), (4, 28))):
        yield plan, case(k, READS[k], batch, side, side)
    yield plan, case(32, READS[32], 4, 16, 28, 28)
    for k in growth_rates:
        yield from ((plan_around, case(k, reads, 64, 28, 28)) for reads in TRANSITIONS[k])
    yield plan_around, case(32, 256, 4, 16, 28, 28)


def launches(arch: int, precision: str, *, every: bool) -> list[tuple[int, Launch]]:
    """``(growth rate, launch)``, each compiled code once; unless ``every``, each kernel once."""
    found: dict[Any, tuple[int, Launch]] = {}
    for planned, case in cases(precision):
        for launch in planned(case, arch):
            if launch.kernel.__name__.startswith(("bn_relu", "copy", "resolve", "reduce")):
                key = identity(launch) if every else name_of(launch).removesuffix(" lazy")
                found.setdefault(key, (case.growth_rate, launch))
    return list(found.values())


_KERNELS = {"bn_relu_mean_kernel": "mean", "bn_relu_conv_kernel": "forward", "resolve_kernel": "resolve"}


def traffic_of(launch: Launch, itemsize: int) -> tuple[traffic.Traffic, dict[str, int]]:
    """What a launch must move and compute at least, and the shape that this is of."""
    a, name = launch.arguments, launch.kernel.__name__
    if name == "reduce_kernel":
        elements, splits = a["elements"], a["splits"]
        return traffic.Traffic(4 * elements * (splits + 1), elements * splits), {"elements": elements, "splits": splits}
    m = a["m"] if "m" in a else launch.programs // -(-a["C"] // a["BLOCK_C"]) * a["pixels"]
    taps, window = (prod(a.get(size, 1) for size in sizes) for sizes in (("KD", "KH", "KW"), ("PD", "PH", "PW")))
    shape = traffic.Shape(m, a["C" if "C" in a else "K"], a["K" if "K" in a else "C"], taps, itemsize)
    described = {"m": m, "reads": shape.reads, "writes": shape.writes, "taps": taps}
    pixels, kernel = m * window, _KERNELS.get(name, "")
    if name == "bn_relu_conv_backward_kernel":
        alone = "backward" if a["ACCUMULATE"] else "backward of the only reader"
        kernel = alone if window == 1 else "pooled backward"
    elif name == "copy_with_moments_kernel":
        kernel = "copy" if a["out_ptr"] is not None else "moments"
    elif name == "bn_relu_max_pool_kernel":
        kernel = "max pool" if a["tap_ptr"] is None else "arg-max"
        pixels = m // (a["D"] * a["H"] * a["W"]) * a["XD"] * a["XH"] * a["XW"]
    elif name == "bn_relu_pool_backward_kernel":
        kernel, windows = ("max pool backward", a["D"] * a["H"] * a["W"]) if a["MAXIMUM"] else ("mean backward", 1)
        shape = shape._replace(m=m // (a["XD"] * a["XH"] * a["XW"]) * windows)
    return traffic.floor(kernel, shape, pixels), described


def issue_seconds(launch: Launch, loops: list[list[int]], arch: int) -> float | None:
    """Modelled: the instructions of the loops with matrix products, as often as they run, at ``ISSUE``.

    What runs once a program is left out, and both sides of a branch count. ``None`` where there are no such loops, or
    the compiler has unrolled one of them.
    """
    a = launch.arguments
    if "KD" not in a or not loops:
        return None
    taps = a["KD"] * a["KH"] * a["KW"]

    def tiles(rows: int, columns: int, channels: int) -> int:
        return -(-a["m"] // rows) * -(-channels // columns)

    own, *inner = loops[0]
    if launch.kernel.__name__ == "bn_relu_conv_kernel":
        steps = taps // a["SHIFTS"] * -(-a["C"] // a["BLOCK_C"])
        count = tiles(a["BLOCK_M"] - a["SHIFTS"] + 1, a["BLOCK_N"], a["K"]) * (own + steps * sum(inner))
    elif a["TOGETHER"]:
        count = tiles(a["BLOCK_M"], a["BLOCK_C"], a["C"]) * own
    elif len(loops) != 2:
        return None
    else:
        units = taps * a["K_BLOCKS"]
        # Where taps are unrolled, the data's gradient comes first.
        (own, *inner), weight = loops if inner or not loops[1][1:] else reversed(loops)
        count = tiles(a["BLOCK_M"], a["BLOCK_C"], a["C"]) * (own + units * sum(inner))
        count += tiles(a["WEIGHT_BLOCK_M"], a["WEIGHT_BLOCK_C"], a["C"]) * -(-units // a["GROUP"]) * weight[0]
    return count * launch.config.num_warps / (SM_COUNT[arch] * ISSUE * CLOCK[arch])


def _row(job: tuple[int, str, bool, int]) -> Row:
    """Launch number ``index`` of an architecture and precision: kernels do not travel between processes."""
    arch, precision, every, index = job
    growth_rate, launch = launches(arch, precision, every=every)[index]
    row: dict[str, Any] = {"kernel": name_of(launch), "arch": arch, "dtype": precision, "growth_rate": growth_rate}
    moved, row["shape"] = traffic_of(launch, PRECISIONS[precision][0].itemsize)
    row |= {"config": asdict(launch.config), **compile_launch(launch, arch), **moved._asdict()}
    floor = traffic.floor_seconds(*moved, COPY_RATE, MATMUL_RATE[precision])
    issue = issue_seconds(launch, row["loop_instructions"], arch)
    row["modelled_h100_floor_us"] = round(floor * 1e6, 1)
    row["modelled_issue_us"] = None if issue is None else round(issue * 1e6, 1)
    return Row(**row, waves=round(waves_of(launch, SM_COUNT[arch]), 2))


def defects(row: Row) -> list[str]:
    """The rules that a row breaks: no spills, shared memory that there is, tensor cores, wide loads."""
    found = []
    if row.stack_bytes:
        found.append(f"{row.stack_bytes} bytes of stack")
    if row.shared_bytes > SHARED_LIMIT[row.arch]:
        found.append(f"{row.shared_bytes} bytes of shared memory, more than {SHARED_LIMIT[row.arch]}")
    if row.kernel.startswith("bn_relu_conv"):
        wanted = {80: "HMMA", 86: "HMMA", 90: "HGMMA"}.get(row.arch, "")
        if row.kernel == "bn_relu_conv_backward 1x1 pooled" and wanted == "HGMMA":
            wanted = ""  # 32 rows a tile, too few for HGMMA: bytes bind, and larger tiles issue no less
        products = row.tensor_core.split("/") if row.tensor_core_instructions else []
        if row.dtype in ("fp16", "bf16") and (not products or wanted not in ("", *products)):
            found.append(f"tensor cores by {row.tensor_core or 'nothing'}, expected {wanted or 'some'}")
        if not row.vector128_loads:
            found.append("no 128-bit load")
    return found


def precisions(arch: int) -> list[str]:
    """What is reported for an architecture: everything, but of sm_86 what differs from sm_80 in use, 16 bit."""
    return [name for name, (dtype, _) in PRECISIONS.items() if arch != 86 or dtype.itemsize == 2]


def summary(rows: list[Row]) -> dict[str, Any]:
    """The record: the worst of each kernel, architecture and dtype, digests of all rows, and those that docs show."""
    import triton

    groups: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.kernel, row.arch, row.dtype), []).append(row)
    worst = []
    for (kernel, arch, dtype), same in groups.items():
        key = {"kernel": kernel, "arch": arch, "dtype": dtype}
        most = {name: max(getattr(row, name) for row in same) for name in WORST}
        growth_rates = sorted({row.growth_rate for row in same})
        worst.append({**key, **most, "growth_rates": growth_rates, "digests": [row.digest for row in same]})
    shown = []
    for row in rows:  # the large 2D convolutions for Hopper in bfloat16
        large = row.arch == 90 and row.dtype == "bf16" and row.shape.get("m", 0) > 10**5
        if large and row.modelled_issue_us is not None and row.kernel.startswith("bn_relu_conv"):
            shown.append(asdict(row))
    head = {"triton": triton.__version__, "sources": sources_digest(), "rows": len(rows)}
    return {**head, "digest": _digest("".join(row.digest for row in rows)), "shown": shown, "kernels": worst}


def write_lines(path: Path, record: dict[str, Any]) -> None:
    """JSON, a row or kernel a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = {
        key: "[\n" + ",\n".join(map(json.dumps, value)) + "\n]" if isinstance(value, list) else json.dumps(value)
        for key, value in record.items()
    }
    path.write_text("{\n" + ",\n".join(f'"{key}": {text}' for key, text in lines.items()) + "\n}\n")


def show(rows: list[Row]) -> Table:
    """The rows as a table; red where a rule is broken."""
    headings = ("kernel", "tensor", "sm", "dtype", "k", "tile", "warps", "regs", "stack", "shared", "128-bit", "waves",
                "floor H100", "issue")  # fmt: skip
    table = console_table("compiled kernels; times in us are modelled, not measured", headings, words=2)
    for row in rows:
        tile = " ".join(str(row.config[name]) for name in ("block_m", "block_c", "block_k"))
        cells = (row.kernel, f"{row.tensor_core} {row.tensor_core_instructions}", row.arch, row.dtype, row.growth_rate,
                 tile, row.config["num_warps"], row.registers, row.stack_bytes, row.shared_bytes, row.vector128_loads,
                 row.waves, round(row.modelled_h100_floor_us), round(row.modelled_issue_us or 0) or "")  # fmt: skip
        table.add_row(*map(str, cells), style="red" if defects(row) else None)
    return table


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(SM_COUNT), help="default: all of them")
    parser.add_argument("--dtype", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS), help="default: all")
    parser.add_argument("--all", action="store_true", help=f"every row, where else each kernel once; sum: {RECORD}")
    parser.add_argument("--json", type=Path, help="where to write the rows (default: nowhere)")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 interprets kernels, this compiles them: unset it")
    console = Console(width=None if sys.stdout.isatty() else 160)
    archs = options.arch or sorted(SM_COUNT)
    todo = [
        (arch, precision, options.all, index)
        for arch in archs
        for precision in precisions(arch)
        if precision in options.dtype
        for index in range(len(launches(arch, precision, every=options.all)))
    ]
    rows: list[Row] = []
    with ProcessPoolExecutor(options.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(_row, todo):
            rows.append(row)
            for defect in defects(row):
                console.print(f"[red]{row.kernel} sm_{row.arch} {row.dtype} k = {row.growth_rate}: {defect}")
    console.print(show(rows))
    if options.json is not None:
        write_lines(options.json, {"rows": [asdict(row) for row in rows]})
        console.print(f"rows: {options.json}")
    if options.all and len(archs) == len(SM_COUNT) and len(options.dtype) == len(PRECISIONS):
        write_lines(RECORD, summary(rows))
        console.print(f"record: {RECORD}")
    sys.exit(1 if any(map(defects, rows)) else 0)
