"""Compiles, without a GPU, every kernel that a run on one launches; and uses there what was compiled.

Each piece of work goes through the code that runs there, at the sizes that run there, on a GPU that computes nothing:
what is compiled depends on them. First it is only noted what Triton would have to compile; then that is compiled.

The archive holds machine code, its metadata, and the compiled launchers. Nothing in the names depends on where the
cache, Triton or this project lies: they are hashes of the kernels' sources, of what they were compiled for, and of
Triton itself. Only the lists of each kernel's files hold absolute paths, and are written again when unpacked.
"""

from __future__ import annotations

import importlib
import json
import os
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

from fastdense.backends import select

from ..compiled.traffic import NETWORKS
from ..harness.training import arithmetic
from . import checks, fake
from .kernels import DTYPE, DTYPES, Change, run_as, tried
from .machine import name_of
from .primitives import Case, bind
from .steps import COMPARISONS, CONVERTED, MODES, OURS, SIZE, Step, images, models

ARCHIVE = "triton-cache.tar.xz"
NEEDED = (".cubin", ".json", ".so")
CPU = torch.device("cpu")
LARGE = 1 << 20  # elements from which on random values cost time
# What takes longest to compile goes first, so that no process is left with it at the end.
SLOW = ("bn_relu_conv_backward_kernel", "bn_relu_conv_kernel", "bn_relu_pool_backward_kernel")

Work = Callable[[], None]  # something that launches kernels; a function of this module and its arguments


class Request(NamedTuple):
    """One kernel to compile, as text, so that another process can: everything that its compilation depends on."""

    module: str
    name: str
    data: str  # Triton's own description of one specialisation, as JSON


def make(folder: Path, work: dict[str, Work], say: Callable[[str], None], processes: int | None = None) -> list[str]:
    """Compiles what is launched, for an H100 that is not there, into ``triton-cache.tar.xz`` in ``folder``.

    Args:
        folder: created if need be.
        work: what launches it, by what it is.
        say: takes a line on what is going on, and at the end on what was made.
        processes: that compile; as many as there are processors by default.

    Returns:
        What could not be compiled, and why.

    Raises:
        RuntimeError: there cannot be a fake GPU here, with the reason.
    """
    if (reason := fake.unsupported_reason()) is not None:
        raise RuntimeError(f"nothing can be compiled ahead here: {reason}")
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with (
        tempfile.TemporaryDirectory(prefix="fastdense-ahead-", ignore_cleanup_errors=True) as cache,
        ProcessPoolExecutor(processes, get_context("spawn"), _begin, (cache,)) as pool,
    ):
        wanted: dict[Request, str] = {}
        for label, found in zip(work, pool.map(requests, work.values()), strict=True):
            new = dict.fromkeys(request for request in found if request not in wanted)
            wanted |= dict.fromkeys(new, label)
            say(f"{label}: {len(found)} kernels, {len(new)} of them new")
        say(f"{len(wanted)} kernels to compile, found in {time.perf_counter() - start:.0f} s")
        order = sorted(wanted, key=lambda request: request.name not in SLOW)
        failed = []
        for request, error in zip(order, pool.map(_compile, order), strict=True):
            if error:
                failed.append(f"{request.name}, for {wanted[request]}: {error}")
                say(f"not compiled: {failed[-1]}")
        path = folder / ARCHIVE
        pack(Path(cache), path)
        count, size = len(kernels_in(Path(cache))), path.stat().st_size / 1e6
        say(f"{path}: {count} kernels, {size:.1f} MB, after {time.perf_counter() - start:.0f} s")
    return failed


def _begin(folder: str) -> None:
    """In each process, before anything else."""
    os.environ["TRITON_CACHE_DIR"] = folder
    torch.set_num_threads(1)
    fake.install()


def requests(work: Work) -> list[Request]:
    """Returns what Triton would have to compile for ``work``, on the fake GPU; nothing is compiled or launched.

    Kernels that this process has compiled before are launched, and not listed.
    """
    from triton import knobs

    found: list[Request] = []

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        found.append(Request(fn.module, fn.name, compile["specialization_data"]))
        return True  # Triton does without

    with patch.object(knobs.runtime, "jit_cache_hook", note):
        work()
    return list(dict.fromkeys(found))


def _compile(request: Request) -> str:
    """Compiles a kernel for this process's GPU, with its launcher; returns why it cannot be launched, if so."""
    kernel = getattr(importlib.import_module(request.module), request.name)
    try:
        kernel.preload(request.data)._init_handles()
    except Exception as failure:  # whatever the compiler raises; the others are to be compiled all the same
        return f"{type(failure).__name__}: {failure}"[:500]
    return ""


def kernels_in(cache: Path) -> dict[str, str]:
    """Returns the cache's compiled kernels: name by entry."""
    return {path.parent.name: path.stem for path in sorted(cache.glob("*/*.cubin"))}


def pack(cache: Path, archive: Path) -> None:
    """Writes what another machine needs of ``cache`` to ``archive``, a ``.tar.xz``."""
    with tarfile.open(archive, "w:xz") as opened:
        for path in sorted(cache.glob("*/*")):
            if path.suffix in NEEDED:
                opened.add(path, path.relative_to(cache))


def take(folder: Path) -> Callable[[], str]:
    """Unpacks ``folder``'s archive and lets Triton use it, in this process and in those that it starts.

    Returns:
        A function that says what was there, and what any process has had to compile after all.

    Raises:
        FileNotFoundError: there is no archive.
    """
    cache = Path(tempfile.mkdtemp(prefix="fastdense-triton-")).resolve()
    with tarfile.open(folder / ARCHIVE) as opened:
        opened.extractall(cache, filter="data")
    for group in cache.glob("*/__grp__*.json"):
        files = (group.parent / name for name in json.loads(group.read_text())["child_paths"])
        group.write_text(json.dumps({"child_paths": {file.name: str(file) for file in files if file.exists()}}))
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    had = kernels_in(cache)

    def report() -> str:
        new = [name for entry, name in kernels_in(cache).items() if entry not in had]
        counts = Counter("of torch.compile's" if name.startswith("triton_") else name for name in new)
        listed = ", ".join(f"{count} {name}" for name, count in counts.items())
        line = f"cache: {len(had)} kernels brought along, {len(new)} compiled after all"
        return f"{line}: {listed}" if listed else line

    return report


def everything() -> dict[str, Work]:
    """Returns what a run on a GPU launches, by what it is."""
    work: dict[str, Work] = {}
    # Of float32 exact products, and in TF32 as PyTorch's convolutions are by default; of 16 bit there is one kind.
    kinds = [(torch.bfloat16, "tf32"), (torch.float16, "tf32"), (torch.float32, "tf32"), (torch.float32, "fp32")]
    steps = {(name, batch, SIZE, *kinds[0]) for name, batch, *_ in COMPARISONS.values()}
    steps |= {("densenet121", 64, SIZE, *kinds[1])}
    steps |= {(name, 16, 64, *kind) for name in ("densenet121", "densenet201") for kind in kinds}
    for (name, batch, size, dtype, products), provider in product(sorted(steps, key=str), (*OURS, CONVERTED)):
        label = f"{name} {provider}, {batch} x {size}^2, {name_of(dtype)} {products}"
        work[label] = partial(network_step, name, provider, batch, size, dtype, products)
    looks = product(kinds, MODES, (checks.SHAPE, checks.LARGER), {"plain": {}, **checks.SIMPLER}.items())
    for (dtype, products), mode, shape, (form, changes) in looks:
        label = f"smoke {name_of(dtype)} {products} {mode} {shape[2]} {form}"
        work[label] = partial(smoke_step, shape, dtype, products, mode, changes)
    for dtype in DTYPES:
        work[f"self-test {name_of(dtype)}"] = partial(self_test, dtype)
    changes_of: dict[Case, list[Change]] = {}
    for case, change in tried():
        changes_of.setdefault(case, []).append(change)
    for case, listed in changes_of.items():
        work[f"{len(listed)} candidates for {case.operation}, {case.shape.m} rows"] = partial(launched, case, listed)
    return work


def network_step(name: str, provider: str, batch: int, size: int, dtype: torch.dtype, products: str) -> None:
    """Launches a network's training step."""
    (model,) = models(NETWORKS[name], [provider], CPU).values()
    with arithmetic(products, CPU), Unwritten():
        Step(model, *images(batch, size, CPU), dtype).launch()


def smoke_step(shape: tuple[int, ...], dtype: torch.dtype, products: str, mode: str, changes: checks.Changes) -> None:
    """Launches what the stage ``smoke`` looks at."""
    fast = checks.pair(checks.BLOCK, "triton", mode).to(dtype)
    x = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
    with arithmetic(products, CPU), checks.changed(changes):
        checks.step(fast, x, 0)


def self_test(dtype: torch.dtype) -> None:
    """Launches what the backend tries before its first use."""
    with patch.dict(select.SIZES, cpu=select.SIZES["cuda"]), torch.no_grad():
        select.layer_results(lambda x: select.create("triton", x), CPU, dtype)


def launched(case: Case, changes: list[Change]) -> None:
    """Launches one primitive in several configurations."""
    with Unwritten():
        primitive = bind(case, DTYPE, CPU)
        for change in changes:
            with run_as(case, change):
                primitive()


class Unwritten(TorchFunctionMode):
    """Within the ``with``, large random tensors and PyTorch's convolutions are memory that nothing has written."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.randn, torch.rand):
            meta = func(*args, **{**kwargs, "device": "meta", "generator": None})
            if meta.numel() >= LARGE:
                return torch.empty(meta.shape, dtype=meta.dtype)
        if func is torch.conv2d:  # the stem's: what stands before it needs no gradient
            x, weight = args[:2]
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
            with torch.autocast("cpu", enabled=False):
                shape = func(x.detach().to("meta", dtype), weight.detach().to("meta", dtype), *args[2:], **kwargs).shape
            return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last).requires_grad_()
        return func(*args, **kwargs)
