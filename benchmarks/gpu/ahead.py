"""Compile, without a GPU, every kernel that a run on one launches; and use what was compiled there.

ahead.make(folder, processes, candidates)   on any machine with the GPU machine's PyTorch and Triton
taken = ahead.take(folder)                  on the GPU machine, before anything is launched
print(taken.report())                       at the end: what had to be compiled after all
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import archive, fake
from .requests import Answer, Request, compile_request

if TYPE_CHECKING:
    from .launched import Candidate, Work

ARCHIVE = "triton-cache.tar.xz"
# What takes longest to compile goes first, so that no process is left with it at the end.
SLOW_FIRST = ("bn_relu_conv_backward_kernel", "bn_relu_conv_kernel", "bn_relu_pool_backward_kernel")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Made:
    """What :func:`make` has made.

    Attributes:
        path: the archive.
        kernels: in it.
        failed: those that could not be compiled or launched, and why.
        listing, compiling: seconds until all kernels were known, and until they were compiled.
        work: seconds of all processes together, compiling.
    """

    path: Path
    kernels: int
    failed: list[Answer]
    listing: float
    compiling: float
    work: float

    def __str__(self) -> str:
        size = self.path.stat().st_size / 1e6
        lines = [
            f"{self.path}: {self.kernels} kernels, {size:.1f} MB; found in {self.listing:.0f} s, compiled in "
            f"{self.compiling:.0f} s ({self.work:.0f} s in one process)"
        ]
        lines += [f"  not compiled: {answer.request.name}: {answer.error}" for answer in self.failed]
        return "\n".join(lines)


def make(
    folder: Path,
    processes: int | None = None,
    candidates: Sequence[Candidate] = (),
    *,
    groups: Sequence[str] = ("networks", "smoke", "trials"),
    sm_count: int = 132,
    capability: tuple[int, int] = (9, 0),
    say: Say = print,
) -> Made:
    """Compile what a run launches for a GPU that is not there, and leave ``triton-cache.tar.xz`` in ``folder``.

    Args:
        folder: created if need be.
        processes: that compile; as many as there are processors by default.
        candidates: launch configurations to be tried, beside the table's own.
        groups: functions of :mod:`benchmarks.gpu.launched` that say what the run does.
        sm_count, capability: the GPU, by default an H100.
        say: takes a line on what is going on.

    Raises:
        RuntimeError: there cannot be a fake GPU here, with the reason.
    """
    if (reason := fake.obstacle()) is not None:
        raise RuntimeError(f"nothing can be compiled ahead here: {reason}")
    processes = processes or len(os.sched_getaffinity(0))
    folder.mkdir(parents=True, exist_ok=True)
    cache = Path(tempfile.mkdtemp(prefix="fastdense-ahead-"))
    try:
        start = time.perf_counter()
        arguments = str(cache), sm_count, capability
        with ProcessPoolExecutor(processes, get_context("spawn"), _begin, arguments) as pool:
            found = _list(pool, groups, candidates, say)
            listed = time.perf_counter()
            say(f"{len(found)} kernels to compile, {processes} at a time")
            answers = list(_compile(pool, found, say))
        done = time.perf_counter()
        archive.pack(cache, folder / ARCHIVE)
        failed = [answer for answer in answers if answer.error]
        kernels = len(archive.kernels_in(cache))
        work = sum(answer.seconds for answer in answers)
        return Made(folder / ARCHIVE, kernels, failed, listed - start, done - listed, work)
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def _begin(cache: str, sm_count: int, capability: tuple[int, int]) -> None:
    """In each process, before anything else."""
    os.environ["TRITON_CACHE_DIR"] = cache
    import torch

    torch.set_num_threads(1)
    fake.install(sm_count, capability)


def _work(groups: Sequence[str], candidates: Sequence[Candidate]) -> list[Work]:
    from . import launched

    everything = chain.from_iterable(getattr(launched, group)() for group in groups)
    return [*everything, *launched.candidates(candidates)]


def _labels(groups: Sequence[str], candidates: Sequence[Candidate]) -> list[str]:
    return [work.label for work in _work(groups, candidates)]


def _list_one(groups: Sequence[str], candidates: Sequence[Candidate], number: int) -> list[Request]:
    from . import launched

    return list(launched.requests_of(_work(groups, candidates)[number : number + 1]))


def _list(pool: Executor, groups: Sequence[str], candidates: Sequence[Candidate], say: Say) -> dict[Request, str]:
    """What has to be compiled, and what it is needed for."""
    labels = pool.submit(_labels, groups, candidates).result()
    futures = [pool.submit(_list_one, groups, candidates, number) for number in range(len(labels))]
    found: dict[Request, str] = {}
    for label, future in zip(labels, futures, strict=True):
        requests = future.result()
        new = {request: label for request in requests if request not in found}
        if new:
            say(f"{label}: {len(requests)} kernels, {len(new)} of them new")
        found |= new
    return found


def _compile(pool: Executor, found: dict[Request, str], say: Say) -> Iterator[Answer]:
    def place(request: Request) -> int:
        return SLOW_FIRST.index(request.name) if request.name in SLOW_FIRST else len(SLOW_FIRST)

    futures = [pool.submit(compile_request, request) for request in sorted(found, key=place)]
    for number, future in enumerate(as_completed(futures), start=1):
        answer = future.result()
        if answer.error:
            say(f"{answer.request.name}, for {found[answer.request]}: {answer.error}")
        if number % 50 == 0:
            say(f"{number} of {len(futures)} compiled")
        yield answer


@dataclass(frozen=True)
class Taken:
    """A cache in use.

    Attributes:
        cache: its folder.
        had: the kernels that were in it, name by entry.
        stale: why Triton will not find them; empty if it will.
    """

    cache: Path
    had: dict[str, str]
    stale: dict[str, str]

    def compiled(self) -> list[str]:
        """Names of the kernels that any process has had to compile since, torch.compile's among them."""
        return [name for entry, name in archive.kernels_in(self.cache).items() if entry not in self.had]

    def report(self) -> str:
        """What was there, and what had to be compiled after all."""
        names = ["of torch.compile's" if name.startswith("triton_") else name for name in self.compiled()]
        counts = {name: names.count(name) for name in dict.fromkeys(names)}
        listed = ", ".join(f"{count} {name}" for name, count in counts.items())
        lines = [f"cache: {len(self.had)} kernels brought along, {len(names)} compiled after all"]
        lines[0] += f": {listed}" if listed else ""
        lines += [f"cache: of no use, other {key}: {difference}" for key, difference in self.stale.items()]
        return "\n".join(lines)


def take(folder: Path, cache: Path | None = None, environment: dict[str, Any] | None = None) -> Taken:
    """Unpack ``folder``'s archive and let Triton use it, in this process and in those that it starts.

    Args:
        folder: that :func:`make` has written to.
        cache: where to; a fresh temporary folder by default.
        environment: where ``TRITON_CACHE_DIR`` is set; the process's own by default.

    Raises:
        FileNotFoundError: there is no archive.
    """
    cache = Path(tempfile.mkdtemp(prefix="fastdense-triton-")) if cache is None else cache
    stale = archive.unpack(folder / ARCHIVE, cache.resolve())
    target: Any = os.environ if environment is None else environment
    target["TRITON_CACHE_DIR"] = str(cache.resolve())
    return Taken(cache, archive.kernels_in(cache), stale)
