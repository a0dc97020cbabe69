"""What the compiler makes of a launch for a GPU that need not be there: registers, spills, instructions.

A :class:`Planned` backend runs the schedule on tensors without memory and notes every launch; :func:`compile_launch`
compiles one of them for an architecture as Triton would at that launch, and reads the machine code. So the report is
of the launches that a block makes, not of a list beside them.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
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
SHARED_LIMIT = {80: 166912, 86: 101376, 90: 232448, 100: 232448}  # bytes a program can have
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

    Args:
        x: features without memory (device ``meta``).
        arch, sm_count: the GPU to plan for.
        precision: how fp32 products are formed, ``"tf32"`` or ``"ieee"``.
    """

    def __init__(self, x: Tensor, arch: int, sm_count: int, precision: str = "ieee") -> None:
        super().__init__(x)
        self.arch, self.sm_count, self.precision = arch, sm_count, precision
        self.launches: list[Launch] = []

    def launch(self, kernel: Any, programs: int, *arguments: Any, config: LaunchConfig, **constants: Any) -> None:
        """Note it."""
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


def plan(case: Case, arch: int) -> list[Launch]:
    """Every launch of one layer's forward and backward pass, in order."""
    k, reads, dtype = case.growth_rate, case.reads, case.dtype
    meta: dict[str, Any] = {"device": "meta", "dtype": torch.float32}
    x = empty_features((case.batch, reads, *case.spatial), dtype=dtype, device=torch.device("meta"))
    X = empty_features((case.batch, reads + k, *case.spatial), dtype=dtype, device=torch.device("meta"))
    m, wide = x.numel() // reads, case.bn_size * k
    ones, three = (1,) * len(case.spatial), (3,) * len(case.spatial)

    def conv(inputs: int, outputs: int, kernel: tuple[int, ...]) -> Conv:
        weight = torch.empty(outputs, *kernel, inputs, device="meta", dtype=dtype).movedim(-1, 1)
        return Conv(Norm(torch.empty(inputs, **meta), torch.empty(inputs, **meta), 1e-5), weight)

    dropout = Dropout(torch.empty(1, dtype=torch.int64, device="meta"), 0, 0.1, False) if case.drop else None
    layer = Layer(reads, k, conv(reads, wide, ones), conv(wide, k, three), dropout)
    features = Features(as_rows(X), torch.empty(reads + k, **meta), torch.empty(reads + k, **meta))
    Z = [Features(x.new_empty(m, wide), torch.empty(wide, **meta), torch.empty(wide, **meta))]
    backend = Planned(x, arch, SM_COUNT[arch], case.precision)
    schedule.forward(backend, x, [layer], features, Z, given_moments=False)
    D = x.new_empty_strided((m, reads + k), (row_stride(reads + k, dtype), 1))
    gradient = LazyGradient(D, torch.empty(reads + k, **meta), torch.empty(reads + k, **meta))
    schedule.backward(backend, gradient, [layer], features, Z, first=0, recompute=False)
    return backend.launches


def plan_around(case: Case, arch: int) -> list[Launch]:
    """Every launch, in order, of a stem's pooling, a transition that halves ``case.reads`` channels, and a head."""
    batch, spatial, reads, dims = case.batch, case.spatial, case.reads, len(case.spatial)
    meta: dict[str, Any] = {"device": "meta", "dtype": torch.float32}
    found: list[Launch] = []
    ones, twos, threes = ((size,) * dims for size in (1, 2, 3))
    weight = torch.empty(reads // 2, reads, *ones, device="meta", dtype=case.dtype)
    for channels, size, pool, conv in (
        (2 * case.growth_rate, spatial, Pool("maximum", threes, twos, ones), None),
        (reads, spatial, Pool("average", twos, twos, (0,) * dims), weight),
        (reads, (7,) * dims, Pool("mean"), None),
    ):
        x = empty_features((batch, channels, *size), dtype=case.dtype, device=torch.device("meta"))
        writes, windows = channels if conv is None else conv.shape[0], batch * prod(pool.sizes(size))
        norm = Norm(torch.empty(channels, **meta), torch.empty(channels, **meta), 1e-5)
        source = Features(as_rows(x), torch.empty(channels, **meta), torch.empty(channels, **meta))
        y = x.new_empty_strided((windows, writes), (row_stride(writes, case.dtype), 1))
        moments = (None, None) if pool.kind == "mean" else (torch.empty(writes, **meta), torch.empty(writes, **meta))
        backend = Planned(x, arch, SM_COUNT[arch], case.precision)
        backend.moments(source)
        bn_relu_pool.forward(backend, source, norm, conv, pool, Features(y, *moments))
        into = LazyGradient(torch.empty_like(source.rows), torch.empty(channels, **meta), torch.empty(channels, **meta))
        bn_relu_pool.backward(backend, y, source, norm, conv, pool, (True, True, True), into)
        backend.resolve(into, source, out=torch.empty_like(x))
        found += backend.launches
    return found


class Compiled(NamedTuple):
    """What the compiler says of one launch.

    Attributes:
        registers: a thread.
        stack_bytes: a thread's; what does not fit into registers is spilled there.
        shared_bytes: a program's shared memory.
        tensor_core_instructions: HMMA (sm_80), HGMMA (sm_90), UTCHMMA (sm_100) in the code.
        vector128_loads: global loads of 16 bytes a thread in the code, asynchronous ones among them.
        loops: for each loop with matrix products, in the order of the code, its instructions and those of the loops in
            it: ``(own, [inner, ...])``.
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    tensor_core_instructions: int
    vector128_loads: int
    loops: tuple[tuple[int, tuple[int, ...]], ...]
    tensor_core: str


def specialise(launch: Launch) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """Signature, constants and attributes as Triton derives them from a launch's arguments."""
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for index, param in enumerate(launch.kernel.params):
        value = launch.arguments[param.name]
        if param.is_constexpr or value is None or (_specialised(param, value) and value == 1):
            signature[param.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[param.name] = "*" + _TYPES[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        else:
            signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and _specialised(param, value) and not param.do_not_specialize_on_alignment:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _specialised(param: Any, value: Any) -> bool:
    return type(value) is int and not param.do_not_specialize


def identity(launch: Launch) -> tuple[Any, ...]:
    """Launches of one identity run the same compiled code."""
    return (launch.kernel.__name__, launch.config, *(str(sorted(part.items(), key=str)) for part in specialise(launch)))


def name_of(launch: Launch) -> str:
    """``kernel``, with the taps of a convolution and what it is lazy in."""
    a, name = launch.arguments, launch.kernel.__name__.removesuffix("_kernel")
    if "KD" in a:
        name += f" {'x'.join(str(size) for size in (a['KD'], a['KH'], a['KW']) if size > 1) or '1x1'}"
    if a.get("TOGETHER") is False and a["LAZY"]:
        name += " lazy"
    if a.get("PD", 1) * a.get("PH", 1) * a.get("PW", 1) > 1:
        name += " pooled"
    if a.get("tap_ptr") is not None and "MAXIMUM" not in a:
        name += " arg-max"
    if a.get("MAXIMUM") is False:
        name = name.removesuffix(" 1x1") + " mean"
    if a.get("HAS_DROPOUT"):
        name += " dropout"
    return name


def waves_of(launch: Launch, sm_count: int) -> float:
    """A launch's programs over the places that a device has for them."""
    return launch.programs / (sm_count * launch.config.resident)


@lru_cache(maxsize=1)
def _tools() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _compile(launch: Launch, arch: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    config = launch.config
    return triton.compile(
        ASTSource(launch.kernel, *specialise(launch)),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True},
    )


def products_in_flight(launch: Launch, arch: int) -> int:
    """How many of Hopper's asynchronous products may still run when the code continues, at most.

    With operands in registers, which the next step of a loop overwrites, it has to be none.
    """
    waits = re.findall(r"warp_group_dot_wait.*?pendings = (\d+)", _compile(launch, arch).asm["ttgir"])
    return max(map(int, waits), default=0)


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """Compile for ``arch`` (compute capability times ten) and read the result; the kernels must not be interpreted."""
    result = _compile(launch, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    opcodes = [opcode for _, opcode, _ in _instructions(code)]
    return Compiled(
        registers=int(_group(r"REG:(\d+)", usage)),
        stack_bytes=int(_group(r"STACK:(\d+)", usage)),
        shared_bytes=int(result.metadata.shared),
        tensor_core_instructions=sum(opcode.split(".")[0] in TENSOR_CORES for opcode in opcodes),
        vector128_loads=sum(opcode.startswith("LDG") and ".128" in opcode for opcode in opcodes),
        loops=_loops(code),
        tensor_core="/".join(sorted({opcode.split(".")[0] for opcode in opcodes} & set(TENSOR_CORES))),
    )


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([str(_tools() / tool), *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _group(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, pattern
    return match[1]


_LINE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")
_LABEL = re.compile(r"^\s*(\.L_x_\d+):")


def _instructions(code: str) -> Iterator[tuple[int, str, str]]:
    """``(line, opcode, operands)`` of a disassembly."""
    for number, line in enumerate(code.splitlines()):
        if match := _LINE.match(line):
            yield number, match[1], match[2]


def _loops(code: str) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Instructions of each outermost loop with matrix products (less those of loops in it), and of loops in it."""
    labels = {match[1]: number for number, line in enumerate(code.splitlines()) if (match := _LABEL.match(line))}
    lines = list(_instructions(code))
    spans = set()
    for number, opcode, operands in lines:
        target = re.search(r"\(?(\.L_x_\d+)", operands) if opcode.startswith("BRA") else None
        if target and labels[target[1]] < number:
            spans.add((labels[target[1]], number))
    merged: dict[int, int] = {}
    for begin, end in spans:  # several branches back to one label are one loop
        merged[begin] = max(end, merged.get(begin, 0))
    products = [number for number, opcode, _ in lines if opcode.split(".")[0] in TENSOR_CORES]
    loops = [span for span in merged.items() if any(span[0] <= number <= span[1] for number in products)]

    def count(span: tuple[int, int]) -> int:
        return sum(span[0] <= number <= span[1] for number, _, _ in lines)

    def inside(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
        return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]

    found = []
    for outer in sorted(loop for loop in loops if not any(inside(loop, other) for other in loops)):
        inner = [count(loop) for loop in sorted(loops) if inside(loop, outer)]
        found.append((count(outer) - sum(inner), tuple(inner)))
    return tuple(found)
