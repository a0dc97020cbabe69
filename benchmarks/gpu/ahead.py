"""Compile, without a GPU, every kernel that a run on one launches: ``python -m benchmarks.gpu --ahead DIR``.

Each piece of work goes through the code that runs there, at the sizes that run there, on a GPU that computes nothing:
what is compiled depends on them. First it is only noted what Triton would have to compile; then that is compiled.
"""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastdense import backends, trial

from ..traffic import NETWORKS
from . import cache, fake, right
from .candidates import DTYPE, Change, candidates, run_as
from .machine import name_of, tf32
from .networks import CONVERTED, MODES, OURS, Step, images, models
from .primitives import Case, bind

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGE = 1 << 20  # elements from which on random values cost time
# What takes longest to compile goes first, so that no process is left with it at the end.
SLOW_FIRST = ("bn_relu_conv_backward_kernel", "bn_relu_conv_kernel", "bn_relu_pool_backward_kernel")

Work = Callable[[], None]  # something that launches kernels; a function of this module and its arguments


class Request(NamedTuple):
    """One kernel to compile, as text, so that another process can: everything that its compilation depends on."""

    module: str
    name: str
    data: str  # Triton's own description of one specialisation, as JSON


class Answer(NamedTuple):
    """What became of a request: why the kernel cannot be launched, empty if it can."""

    request: Request
    seconds: float
    error: str


@dataclass(frozen=True)
class Made:
    """What :func:`make` has made."""

    path: Path
    kernels: int
    failed: list[Answer]
    listing: float  # seconds until all kernels were known
    compiling: float  # seconds until they were compiled
    work: float  # seconds of all processes together, compiling

    def __str__(self) -> str:
        size = self.path.stat().st_size / 1e6
        lines = [
            f"{self.path}: {self.kernels} kernels, {size:.1f} MB; found in {self.listing:.0f} s, compiled in "
            f"{self.compiling:.0f} s ({self.work:.0f} s in one process)"
        ]
        return "\n".join(lines + [f"  not compiled: {one.request.name}: {one.error}" for one in self.failed])


def make(
    folder: Path,
    work: dict[str, Work] | None = None,
    *,
    processes: int | None = None,
    say: Callable[[str], None] = print,
) -> Made:
    """Compile what is launched, for an H100 that is not there, and leave ``triton-cache.tar.xz`` in ``folder``.

    Args:
        folder: created if need be.
        work: what launches it; everything that a run does by default.
        processes: that compile; as many as there are processors by default.
        say: takes a line on what is going on.

    Raises:
        RuntimeError: there cannot be a fake GPU here, with the reason.
    """
    if (reason := fake.unsupported_reason()) is not None:
        raise RuntimeError(f"nothing can be compiled ahead here: {reason}")
    processes = processes or len(os.sched_getaffinity(0))
    folder.mkdir(parents=True, exist_ok=True)
    compiled = Path(tempfile.mkdtemp(prefix="fastdense-ahead-"))
    try:
        start = time.perf_counter()
        with ProcessPoolExecutor(processes, get_context("spawn"), _begin, (str(compiled),)) as pool:
            found = _list(pool, everything() if work is None else work, say)
            listed = time.perf_counter()
            say(f"{len(found)} kernels to compile, {processes} at a time")
            answers = list(_compile(pool, found, say))
        done = time.perf_counter()
        cache.pack(compiled, folder / cache.ARCHIVE)
        failed = [answer for answer in answers if answer.error]
        seconds = listed - start, done - listed, sum(answer.seconds for answer in answers)
        return Made(folder / cache.ARCHIVE, len(cache.kernels_in(compiled)), failed, *seconds)
    finally:
        shutil.rmtree(compiled, ignore_errors=True)


def _begin(folder: str) -> None:
    """In each process, before anything else."""
    os.environ["TRITON_CACHE_DIR"] = folder
    torch.set_num_threads(1)
    fake.install()


def _list(pool: Executor, work: dict[str, Work], say: Callable[[str], None]) -> dict[Request, str]:
    """What has to be compiled, and what it is needed for."""
    found: dict[Request, str] = {}
    for label, future in [(label, pool.submit(requests, one)) for label, one in work.items()]:
        asked = future.result()
        new = {request: label for request in asked if request not in found}
        if new:
            say(f"{label}: {len(asked)} kernels, {len(new)} of them new")
        found |= new
    return found


def requests(work: Work) -> list[Request]:
    """What Triton would have to compile for ``work``; nothing is compiled or launched. This process has a fake GPU.

    Kernels that this process has compiled before are launched, and not listed.
    """
    from triton import knobs

    found: list[Request] = []

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        found.append(Request(fn.module, fn.name, compile["specialization_data"]))
        return True  # Triton does without

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = note
    try:
        work()
    finally:
        knobs.runtime.jit_cache_hook = before
    return list(dict.fromkeys(found))


def _compile(pool: Executor, found: dict[Request, str], say: Callable[[str], None]) -> Iterator[Answer]:
    def place(request: Request) -> int:
        return SLOW_FIRST.index(request.name) if request.name in SLOW_FIRST else len(SLOW_FIRST)

    futures = [pool.submit(_compile_one, request) for request in sorted(found, key=place)]
    for number, future in enumerate(as_completed(futures), start=1):
        answer = future.result()
        if answer.error:
            say(f"{answer.request.name}, for {found[answer.request]}: {answer.error}")
        if number % 50 == 0:
            say(f"{number} of {len(futures)} compiled")
        yield answer


def _compile_one(request: Request) -> Answer:
    """Compile one kernel for this process's GPU, with the launcher that belongs to it."""
    start = time.perf_counter()
    kernel = getattr(importlib.import_module(request.module), request.name)
    error = ""
    try:
        kernel.preload(request.data)._init_handles()
    except Exception as failure:  # whatever the compiler raises; the others are to be compiled all the same
        error = f"{type(failure).__name__}: {failure}"[:500]
    return Answer(request, time.perf_counter() - start, error)


def everything() -> dict[str, Work]:
    """What a run on a GPU launches, by what it is."""
    work: dict[str, Work] = {}
    timed = [("densenet121", batch, 224, torch.bfloat16) for batch in (64, 256, 1, 8)]
    timed += [("densenet201", 64, 224, torch.bfloat16), ("densenet121", 64, 224, torch.float16)]
    checked = [(name, 16, 64, dtype) for name in ("densenet121", "densenet201") for dtype in DTYPES]
    for name, batch, size, dtype in timed + checked:
        for provider in OURS if batch == 256 else (*OURS, CONVERTED):
            for allowed in _products(dtype):
                label = f"{name} {provider}, {batch} x {size}^2, {name_of(dtype)}{_named(allowed)}"
                work[label] = partial(network_step, name, provider, batch, size, dtype, allowed)
    for dtype in DTYPES:
        for form, changes in {"": {}, **right.SIMPLER}.items():
            for shape in (right.SHAPE, right.LARGER):
                for mode in MODES:
                    for allowed in _products(dtype):
                        label = f"smoke {name_of(dtype)} {mode} {shape[2]} {form}{_named(allowed)}"
                        work[label] = partial(smoke_step, shape, dtype, mode, changes, allowed)
        work[f"self-test {name_of(dtype)}"] = partial(self_test, dtype)
    tried: dict[Case, list[Change]] = {}
    for case, change in candidates():
        tried.setdefault(case, []).append(change)
    for case, listed in tried.items():
        work[f"{len(listed)} candidates for {case.operation}, {case.shape.m} rows"] = partial(launched, case, listed)
    return work


def _products(dtype: torch.dtype) -> Sequence[bool]:
    """Of float32 exact products, and in TF32 as PyTorch's convolutions are by default; of 16 bit there is one kind."""
    return (False, True) if dtype == torch.float32 else (True,)


def _named(allowed: bool) -> str:
    return "" if allowed else ", exact"


def network_step(name: str, provider: str, batch: int, size: int, dtype: torch.dtype, allow_tf32: bool) -> None:
    """A network's training step."""
    (model,) = models(NETWORKS[name], [provider], CPU).values()
    with tf32(allow_tf32), Unwritten():
        Step(model, *images(batch, size, CPU), dtype).launch()


def smoke_step(shape: tuple[int, ...], dtype: torch.dtype, mode: str, changes: right.Changes, allow_tf32: bool) -> None:
    """The first look's block and transition."""
    fast = right.pair(right.BLOCK, "triton", mode).to(dtype)
    x = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
    with tf32(allow_tf32), right.changed(changes):
        right.step(fast, x, 0)


def self_test(dtype: torch.dtype) -> None:
    """What the backend does before its first use."""
    before = dict(trial.SIZES)
    trial.SIZES["cpu"] = trial.SIZES["cuda"]
    try:
        with torch.no_grad():
            trial._results(lambda x: backends.create("triton", x), CPU, dtype)
    finally:
        trial.SIZES.update(before)


def launched(case: Case, changes: Iterable[Change]) -> None:
    """One primitive in several launch configurations."""
    with Unwritten():
        primitive = bind(case, DTYPE, CPU)
        for change in changes:
            with run_as(case, change):
                primitive()


class _Skipped(torch.autograd.Function):
    """A convolution of PyTorch whose results nothing computes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        ctx.shapes = x.shape, x.dtype, weight.shape, weight.dtype
        return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_shape, x_dtype, weight_shape, weight_dtype = ctx.shapes
        return torch.empty(x_shape, dtype=x_dtype), torch.empty(weight_shape, dtype=weight_dtype), None, None


class Unwritten(TorchFunctionMode):
    """Within the ``with``, large random tensors and PyTorch's convolutions are memory that nothing has written."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.randn, torch.rand) and not kwargs.get("requires_grad"):
            meta = func(*args, **{**kwargs, "device": "meta", "generator": None})
            if meta.numel() >= LARGE:
                return torch.empty(meta.shape, dtype=meta.dtype)
        if func is torch.conv2d:
            x, weight = args[:2]
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
            with torch.autocast("cpu", enabled=False):
                shape = func(x.detach().to("meta", dtype), weight.detach().to("meta", dtype), *args[2:], **kwargs).shape
            return _Skipped.apply(x, weight, shape, dtype)
        return func(*args, **kwargs)
