"""Compiles, without a GPU, every kernel that a run on one launches; and uses there what was compiled.

Each piece of work goes through the code that runs there, at the sizes that run there, on a GPU that computes nothing:
what is compiled depends on them. The archive holds machine code, its metadata, and the compiled launchers. Nothing in
the names depends on where the cache, Triton or this project lies: they are hashes of what goes in. Only the lists of
each kernel's files hold absolute paths, and are written again when unpacked.
"""

from __future__ import annotations

import json
import os
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import torch

from fastdense.backends import select
from fastdense.kernels import launch

from ..compiled.traffic import NETWORKS
from ..harness.training import arithmetic
from . import checks, fake
from .kernels import DTYPE, DTYPES, OPERATION, Change, tried
from .primitives import Case, Primitive
from .run import brief
from .steps import COMPARISONS, CONVERTED, MODES, OURS, SIZE, Step, images, models

ARCHIVE = "triton-cache.tar.xz"
NEEDED = (".cubin", ".json", ".so")
CPU = torch.device("cpu")
TOGETHER = 8  # pieces of work that one process takes at a time: neighbours share kernels


Work = partial[None]  # launches kernels; of a function of this module


def make(folder: Path, work: Sequence[Work], say: Callable[[str], None], processes: int | None = None) -> list[str]:
    """Compiles what ``work`` launches, for an H100 that is not there, into ``triton-cache.tar.xz`` in ``folder``.

    Returns what could not be compiled, and why; raises ``RuntimeError`` where there cannot be a fake GPU.
    """
    if (reason := fake.unsupported_reason()) is not None:
        raise RuntimeError(f"nothing can be compiled ahead here: {reason}")
    folder.mkdir(parents=True, exist_ok=True)
    start, failed = time.perf_counter(), []
    with (
        tempfile.TemporaryDirectory(prefix="fastdense-ahead-", ignore_cleanup_errors=True) as cache,
        ProcessPoolExecutor(processes, get_context("spawn"), _begin, (cache,)) as pool,
    ):
        found = pool.map(_failure, work, chunksize=TOGETHER)
        for one, error in zip(work, found, strict=True):
            failed += [f"{one}: {error}"] * bool(error)
            say(f"{one.func.__name__} {', '.join(map(str, one.args))[:80]}: {error or 'compiled'}")
        path = folder / ARCHIVE
        with tarfile.open(path, "w:xz") as archive:  # of what another machine needs
            for file in sorted(file for suffix in NEEDED for file in Path(cache).glob(f"*/*{suffix}")):
                archive.add(file, file.relative_to(cache))
        count, size = len(kernels_in(Path(cache))), path.stat().st_size / 1e6
    say(f"{path}: {count} kernels, {size:.1f} MB, after {time.perf_counter() - start:.0f} s")
    return failed


def _begin(folder: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = folder
    torch.set_num_threads(1)
    fake.install()


def _failure(work: Work) -> str:
    """Does the work, and with it compiles what is in no process's cache yet; returns why it cannot be done, if so."""
    try:
        work()
    except Exception as failure:  # whatever the compiler raises; the others are to be compiled all the same
        return brief(failure)
    return ""


def kernels_in(cache: Path) -> dict[str, str]:
    """Returns the cache's compiled kernels: name by entry."""
    return {path.parent.name: path.stem for path in sorted(cache.glob("*/*.cubin"))}


def take(folder: Path) -> Callable[[], str]:
    """Unpacks ``folder``'s archive and lets Triton use it, in this process and in those that it starts.

    Returns a function that says what was there, and what any process has had to compile after all.
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
        names = (name for entry, name in kernels_in(cache).items() if entry not in had)
        new = Counter("of torch.compile's" if name.startswith("triton_") else name for name in names)
        listed = ", ".join(f"{count} {name}" for name, count in new.items())
        return f"cache: {len(had)} kernels brought along, {new.total()} compiled after all" + f": {listed}" * bool(new)

    return report


def everything() -> list[Work]:
    """Returns what launches all that a run on a GPU does."""
    timed = {(name, batch, SIZE, DTYPE): None for name, batch, *_ in COMPARISONS.values()}
    checked = [("densenet121", *checks.CHECKED, dtype) for dtype in (torch.float32, DTYPE)]
    networks = [*product(OURS, timed), *product((*OURS, CONVERTED), checked)]
    # Of float32 exact products, and in TF32 as PyTorch's convolutions are by default; of 16 bit there is one kind.
    kinds = [*((dtype, "tf32") for dtype in DTYPES), (torch.float32, "fp32")]
    looks = product(kinds, MODES, (checks.SHAPE, checks.LARGER), ({}, *checks.SIMPLER.values()))
    return [
        *(partial(network_step, provider, *settings) for provider, settings in networks),
        *(partial(smoke_step, *kind, *settings) for kind, *settings in looks),
        *(partial(self_test, dtype) for dtype in DTYPES),
        *(partial(launched, case, changes) for case, changes in tried().items()),
    ]


def network_step(provider: str, name: str, batch: int, size: int, dtype: torch.dtype) -> None:
    """Launches a network's training step."""
    (model,) = models(NETWORKS[name], [provider], CPU).values()
    with arithmetic("fp32", CPU):
        Step(model, *images(batch, size, CPU), dtype).launch()


def smoke_step(dtype: torch.dtype, products: str, mode: str, shape: tuple[int, ...], changes: Change) -> None:
    """Launches what the stage ``smoke`` looks at."""
    fast = checks.pair(checks.BLOCK, "triton", mode).to(dtype)
    with arithmetic(products, CPU), checks.changed(**changes):
        checks.step(fast, checks.features(shape, dtype, CPU), 0)


def self_test(dtype: torch.dtype) -> None:
    """Launches what the backend tries before its first use."""
    with patch.dict(select.SIZES, cpu=select.SIZES["cuda"]), torch.no_grad():
        select.layer_results(lambda x: select.create("triton", x), CPU, dtype)


def launched(case: Case, changes: Sequence[Change]) -> None:
    """Launches one primitive in several configurations."""
    from triton.runtime.errors import OutOfResources

    primitive = Primitive(case, DTYPE, CPU)
    for change in changes:
        with launch.override(OPERATION[case.operation], **change), suppress(OutOfResources):  # on a GPU it says so, too
            primitive()
