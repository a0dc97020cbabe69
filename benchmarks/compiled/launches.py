"""What the compiler makes of a launch for a GPU that need not be there: registers, spills, instructions.

A :class:`Planned` backend runs the schedule on tensors without memory and notes every launch; :func:`compile_launch`
compiles one of them for an architecture as Triton would at that launch, and reads the machine code. So the report is
of the launches that a block makes, not of a list beside them.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdense.backends.triton_backend import TritonBackend
from fastdense.core import schedule
from fastdense.core.features import Features, LazyGradient, as_rows, empty_features, row_stride
from fastdense.core.primitives import Conv, Dropout, Layer, Norm, Pool
from fastdense.kernels.launch import LaunchConfig
from fastdense.ops import bn_relu_pool

SM_COUNT = {80: 108, 86: 84, 90: 132, 100: 148}  # A100, RTX 3090, H100, B200
TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA")

_TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
    torch.uint8: "u8",
}  # fmt: skip


class Launch(NamedTuple):
    """One launch: the kernel, how many programs, its arguments by name, and how it is compiled."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    config: LaunchConfig


class Planned(TritonBackend):
    """A backend that notes launches instead of making them.

    ``x`` are features without memory (device ``meta``), ``precision`` is how fp32 products are formed.
    """

    def __init__(self, x: Tensor, arch: int, sm_count: int, precision: str = "ieee") -> None:
        super().__init__(x)
        self.arch, self.sm_count, self.precision = arch, sm_count, precision
        self.launches: list[Launch] = []

    def launch(self, kernel: Any, programs: int, *arguments: Any, config: LaunchConfig, **constants: Any) -> None:
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        self.launches.append(Launch(kernel, programs, named, config))


@dataclass(frozen=True)
class Case:
    """A layer to plan: growth rate, channels it reads, images and their size, dtype, fp32 products, dropout."""

    growth_rate: int
    reads: int
    batch: int
    spatial: tuple[int, ...]
    dtype: torch.dtype
    bn_size: int = 4
    precision: str = "ieee"
    drop: bool = False


def _empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def _vectors(channels: int) -> tuple[Tensor, Tensor]:
    return _empty(channels), _empty(channels)


def plan(case: Case, arch: int) -> list[Launch]:
    """Every launch of one layer's forward and backward pass, in order."""
    k, reads, wide = case.growth_rate, case.reads, case.bn_size * case.growth_rate
    x, X, D = (
        empty_features((case.batch, channels, *case.spatial), dtype=case.dtype, device=torch.device("meta"))
        for channels in (reads, reads + k, reads + k)
    )

    def conv(inputs: int, outputs: int, size: int) -> Conv:
        weight = _empty(outputs, *(size,) * len(case.spatial), inputs, dtype=case.dtype)
        return Conv(Norm(*_vectors(inputs), 1e-5), weight.movedim(-1, 1))

    dropout = Dropout(_empty(1, dtype=torch.int64), 0, 0.1, False) if case.drop else None
    layers = [Layer(reads, k, conv(reads, wide, 1), conv(wide, k, 3), dropout)]
    features = Features(as_rows(X), *_vectors(reads + k))
    Z = [Features(x.new_empty(x.numel() // reads, wide), *_vectors(wide))]
    backend = Planned(x, arch, SM_COUNT[arch], case.precision)
    schedule.forward(backend, x, layers, features, Z, given_moments=False)
    schedule.backward(
        backend, LazyGradient(as_rows(D), *_vectors(reads + k)), layers, features, Z, first=0, recompute=False
    )
    return backend.launches


def plan_around(case: Case, arch: int) -> list[Launch]:
    """Every launch, in order, of a stem's pooling, a transition that halves ``case.reads`` channels, and a head."""
    reads, dims = case.reads, len(case.spatial)
    found: list[Launch] = []
    none, ones, twos, threes = ((size,) * dims for size in range(4))
    weight = _empty(reads // 2, reads, *ones, dtype=case.dtype)
    for channels, size, pool, conv in (
        (2 * case.growth_rate, case.spatial, Pool("maximum", threes, twos, ones), None),
        (reads, case.spatial, Pool("average", twos, twos, none), weight),
        (reads, (7,) * dims, Pool("mean"), None),
    ):
        x = empty_features((case.batch, channels, *size), dtype=case.dtype, device=torch.device("meta"))
        writes, windows = channels if conv is None else conv.shape[0], case.batch * prod(pool.sizes(size))
        norm, source = Norm(*_vectors(channels), 1e-5), Features(as_rows(x), *_vectors(channels))
        y = x.new_empty_strided((windows, writes), (row_stride(writes, case.dtype), 1))
        backend = Planned(x, arch, SM_COUNT[arch], case.precision)
        backend.moments(source)
        moments = (None, None) if pool.kind == "mean" else _vectors(writes)
        bn_relu_pool.forward(backend, source, norm, conv, pool, Features(y, *moments))
        into = LazyGradient(torch.empty_like(source.rows), *_vectors(channels))
        bn_relu_pool.backward(backend, y, source, norm, conv, pool, (True, True, True), into)
        backend.resolve(into, source, out=torch.empty_like(x))
        found += backend.launches
    return found


def specialise(launch: Launch) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """Signature, constants and attributes as Triton derives them from a launch's arguments."""
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for index, param in enumerate(launch.kernel.params):
        value = launch.arguments[param.name]
        special, aligned = type(value) is int and not param.do_not_specialize, False
        if param.is_constexpr or value is None or (special and value == 1):
            signature[param.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[param.name] = "*" + _TYPES[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        else:
            signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = special and value % 16 == 0 and not param.do_not_specialize_on_alignment
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def identity(launch: Launch) -> tuple[Any, ...]:
    """Launches of one identity run the same compiled code."""
    return (launch.kernel.__name__, launch.config, *(str(sorted(part.items(), key=str)) for part in specialise(launch)))


def name_of(launch: Launch) -> str:
    """``kernel``, with the taps of a convolution and what it is lazy in."""
    a = launch.arguments
    mean, taps = a.get("MAXIMUM") is False, "x".join(str(a[size]) for size in ("KD", "KH", "KW") if a.get(size, 1) > 1)
    suffixes = {
        taps or "1x1": "KD" in a and not (mean and not taps),
        "lazy": a.get("TOGETHER") is False and a["LAZY"],
        "pooled": prod(a.get(size, 1) for size in ("PD", "PH", "PW")) > 1,
        "arg-max": a.get("tap_ptr") is not None and "MAXIMUM" not in a,
        "mean": mean,
        "dropout": a.get("HAS_DROPOUT"),
    }
    return " ".join([launch.kernel.__name__.removesuffix("_kernel"), *(name for name, so in suffixes.items() if so)])


def waves_of(launch: Launch, sm_count: int) -> float:
    """A launch's programs over the places that a device has for them."""
    return launch.programs / (sm_count * launch.config.resident)


def _compile(launch: Launch, arch: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source, config = ASTSource(launch.kernel, *specialise(launch)), launch.config
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def products_in_flight(launch: Launch, arch: int) -> int:
    """How many of Hopper's asynchronous products may still run when the code continues, at most.

    With operands in registers, which the next step of a loop overwrites, it has to be none.
    """
    waits = re.findall(r"warp_group_dot_wait.*?pendings = (\d+)", _compile(launch, arch).asm["ttgir"])
    return max(map(int, waits), default=0)


def compile_launch(launch: Launch, arch: int) -> dict[str, Any]:
    """Compile for ``arch`` (compute capability times ten); the kernels must not be interpreted.

    Returns:
        What the compiler says of it, as :class:`~benchmarks.compiled.report.Row` names it.
    """
    from triton import knobs

    result = _compile(launch, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        commands = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name], [knobs.nvidia.nvdisasm.path, "-c", file.name]
        usage, code = (subprocess.run(one, capture_output=True, text=True, check=True).stdout for one in commands)
    used = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    opcodes = [opcode for _, opcode, _ in _instructions(code)]
    products = [name for opcode in opcodes if (name := opcode.split(".")[0]) in TENSOR_CORES]
    return {
        "registers": int(used["REG"]),
        "stack_bytes": int(used["STACK"]),
        "shared_bytes": int(result.metadata.shared),
        "tensor_core_instructions": len(products),
        "tensor_core": "/".join(sorted(set(products))),
        "vector128_loads": sum(opcode.startswith("LDG") and ".128" in opcode for opcode in opcodes),
        "loop_instructions": _loops(code),
    }


_LINE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")
_LABEL = re.compile(r"^\s*(\.L_x_\d+):")


def _instructions(code: str) -> list[tuple[int, str, str]]:
    """``(line, opcode, operands)`` of a disassembly."""
    return [(i, found[1], found[2]) for i, line in enumerate(code.splitlines()) if (found := _LINE.match(line))]


def _loops(code: str) -> list[list[int]]:
    """Instructions of each outermost loop with matrix products, less those of loops in it, then of each of these."""
    labels = {found[1]: i for i, line in enumerate(code.splitlines()) if (found := _LABEL.match(line))}
    lines = _instructions(code)
    ends: dict[int, int] = {}  # of a loop by its beginning; several branches back to one label are one loop
    for i, opcode, operands in lines:
        target = re.search(r"\.L_x_\d+", operands) if opcode.startswith("BRA") else None
        if target and labels[target[0]] < i:
            ends[labels[target[0]]] = i
    products = [i for i, opcode, _ in lines if opcode.split(".")[0] in TENSOR_CORES]
    loops = sorted(loop for loop in ends.items() if any(loop[0] <= i <= loop[1] for i in products))
    counts = {loop: sum(loop[0] <= i <= loop[1] for i, _, _ in lines) for loop in loops}
    inside = {a: [b for b in loops if a != b and a[0] <= b[0] and b[1] <= a[1]] for a in loops}
    outermost = set(loops).difference(*inside.values())
    inner = {loop: [counts[one] for one in inside[loop]] for loop in loops}
    return [[counts[loop] - sum(inner[loop]), *inner[loop]] for loop in loops if loop in outermost]
