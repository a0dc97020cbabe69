"""Compile, without a GPU, every kernel that a run on one launches; and use there what was compiled.

Each piece of work goes through the code that runs there, at the sizes that run there, on a GPU that computes nothing:
what is compiled depends on them. First it is only noted what Triton would have to compile; then that is compiled.

The archive holds machine code, its metadata, and the compiled launchers. Nothing in the names depends on where the
cache, Triton or this project lies: they are hashes of the kernels' sources, of what they were compiled for, and of
Triton itself. Only the lists of each kernel's files hold absolute paths, and are written again when unpacked.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sysconfig
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
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
from ..harness.runner import ROOT
from . import fake, right
from .candidates import DTYPE, Change, candidates, run_as
from .machine import name_of, tf32
from .primitives import Case, bind
from .steps import CONVERTED, MODES, OURS, Step, images, models

ARCHIVE, STAMP = "triton-cache.tar.xz", "stamp.json"
KEPT = (".cubin", ".json", ".so")
CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
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
    """Compile what is launched, for an H100 that is not there, and leave ``triton-cache.tar.xz`` in ``folder``.

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
    processes = processes or len(os.sched_getaffinity(0))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fastdense-ahead-", ignore_cleanup_errors=True) as compiled:
        start = time.perf_counter()
        with ProcessPoolExecutor(processes, get_context("spawn"), _begin, (compiled,)) as pool:
            found = _list(pool, work, say)
            listed = time.perf_counter()
            say(f"{len(found)} kernels to compile, {processes} at a time")
            seconds, failed = _compile(pool, found, say)
        done, path = time.perf_counter(), folder / ARCHIVE
        pack(Path(compiled), path)
        say(
            f"{path}: {len(kernels_in(Path(compiled)))} kernels, {path.stat().st_size / 1e6:.1f} MB; found in "
            f"{listed - start:.0f} s, compiled in {done - listed:.0f} s ({seconds:.0f} s in one process)"
        )
    for line in failed:
        say(f"  not compiled: {line}")
    return failed


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

    with patch.object(knobs.runtime, "jit_cache_hook", note):
        work()
    return list(dict.fromkeys(found))


def _compile(pool: Executor, found: dict[Request, str], say: Callable[[str], None]) -> tuple[float, list[str]]:
    """Seconds of all processes together, and what could not be compiled, and why."""
    futures = {
        pool.submit(_compile_one, request): request for request in sorted(found, key=lambda one: one.name not in SLOW)
    }
    seconds, failed = 0.0, []
    for number, future in enumerate(as_completed(futures), start=1):
        took, error = future.result()
        seconds += took
        if error:
            failed.append(f"{futures[future].name}, for {found[futures[future]]}: {error}")
            say(failed[-1])
        if number % 50 == 0:
            say(f"{number} of {len(futures)} compiled")
    return seconds, failed


def _compile_one(request: Request) -> tuple[float, str]:
    """Compile a kernel for this process's GPU, with its launcher: seconds, and why it cannot be launched, if so."""
    start = time.perf_counter()
    kernel = getattr(importlib.import_module(request.module), request.name)
    error = ""
    try:
        kernel.preload(request.data)._init_handles()
    except Exception as failure:  # whatever the compiler raises; the others are to be compiled all the same
        error = f"{type(failure).__name__}: {failure}"[:500]
    return time.perf_counter() - start, error


def stamp() -> dict[str, str]:
    """What a cache is good for: with another Triton or other kernels nothing in it is found."""
    import triton

    sources = hashlib.sha256()
    for path in sorted((ROOT / "kernels").glob("*.py")):
        sources.update(path.read_bytes())
    launchers = sysconfig.get_config_var("EXT_SUFFIX")  # of what is compiled for one version of Python
    return {"triton": triton.__version__, "kernels": sources.hexdigest()[:16], "launchers": launchers}


def kernels_in(cache: Path) -> dict[str, str]:
    """The cache's compiled kernels: name by entry."""
    return {path.parent.name: path.stem for path in sorted(cache.glob("*/*.cubin"))}


def pack(cache: Path, archive: Path) -> None:
    """Write what another machine needs of ``cache`` to ``archive``, a ``.tar.xz``."""
    (cache / STAMP).write_text(json.dumps(stamp()))
    with tarfile.open(archive, "w:xz") as opened:
        for path in sorted([cache / STAMP, *cache.glob("*/*")]):
            if path.suffix in KEPT:
                opened.add(path, path.relative_to(cache))


def unpack(archive: Path, cache: Path) -> dict[str, str]:
    """Add what ``archive`` holds to the folder ``cache``; returns why Triton will not find it, empty if it will."""
    with tarfile.open(archive) as opened:
        opened.extractall(cache, filter="data")
    for group in cache.glob("*/__grp__*.json"):
        files = (group.parent / name for name in json.loads(group.read_text())["child_paths"])
        group.write_text(json.dumps({"child_paths": {file.name: str(file) for file in files if file.exists()}}))
    there = json.loads((cache / STAMP).read_text())
    return {key: f"{there.get(key)} there, {value} here" for key, value in stamp().items() if there.get(key) != value}


def take(folder: Path) -> Callable[[], str]:
    """Unpack ``folder``'s archive and let Triton use it, in this process and in those that it starts.

    Returns:
        A function that says what was there, and what any process has had to compile after all.

    Raises:
        FileNotFoundError: there is no archive.
    """
    cache = Path(tempfile.mkdtemp(prefix="fastdense-triton-")).resolve()
    stale = unpack(folder / ARCHIVE, cache)
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    had = kernels_in(cache)

    def report() -> str:
        new = [name for entry, name in kernels_in(cache).items() if entry not in had]
        counts = Counter("of torch.compile's" if name.startswith("triton_") else name for name in new)
        listed = ", ".join(f"{count} {name}" for name, count in counts.items())
        line = f"cache: {len(had)} kernels brought along, {len(new)} compiled after all"
        lines = [f"{line}: {listed}" if listed else line]
        return "\n".join(lines + [f"cache: of no use, other {key}: {difference}" for key, difference in stale.items()])

    return report


def everything() -> dict[str, Work]:
    """What a run on a GPU launches, by what it is."""
    work: dict[str, Work] = {}
    # Of float32 exact products, and in TF32 as PyTorch's convolutions are by default; of 16 bit there is one kind.
    kinds = [(dtype, allowed) for dtype in DTYPES for allowed in (True, False) if allowed or dtype == torch.float32]
    timed = [("densenet121", batch, 224, torch.bfloat16, True) for batch in (64, 256, 1, 8)]
    timed += [("densenet201", 64, 224, torch.bfloat16, True), ("densenet121", 64, 224, torch.float16, True)]
    checked = [(name, 16, 64, *kind) for name in ("densenet121", "densenet201") for kind in kinds]
    for name, batch, size, dtype, allowed in timed + checked:
        for provider in OURS if batch == 256 else (*OURS, CONVERTED):
            label = f"{name} {provider}, {batch} x {size}^2, {name_of(dtype)}{'' if allowed else ', exact'}"
            work[label] = partial(network_step, name, provider, batch, size, dtype, allowed)
    looks = product(kinds, MODES, (right.SHAPE, right.LARGER), {"plain": {}, **right.SIMPLER}.items())
    for (dtype, allowed), mode, shape, (form, changes) in looks:
        label = f"smoke {name_of(dtype)} {mode} {shape[2]} {form}{'' if allowed else ', exact'}"
        work[label] = partial(smoke_step, shape, dtype, mode, changes, allowed)
    for dtype in DTYPES:
        work[f"self-test {name_of(dtype)}"] = partial(self_test, dtype)
    tried: dict[Case, list[Change]] = {}
    for case, change in candidates():
        tried.setdefault(case, []).append(change)
    for case, listed in tried.items():
        work[f"{len(listed)} candidates for {case.operation}, {case.shape.m} rows"] = partial(launched, case, listed)
    return work


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
    with patch.dict(select.SIZES, cpu=select.SIZES["cuda"]), torch.no_grad():
        select.layer_results(lambda x: select.create("triton", x), CPU, dtype)


def launched(case: Case, changes: Iterable[Change]) -> None:
    """One primitive in several launch configurations."""
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
