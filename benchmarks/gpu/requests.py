"""What Triton is asked to compile: noted without compiling it, compiled elsewhere, and counted.

A :class:`Request` is one kernel with everything that its compilation depends on: dtypes, which numbers are 1 or
divisible by 16, constants, warps and stages. It is text, so that another process can compile it.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Request:
    """One kernel to compile.

    Attributes:
        module, name: where the kernel is.
        data: Triton's own description of one specialisation, as JSON.
    """

    module: str
    name: str
    data: str


@contextmanager
def collecting() -> Iterator[dict[Request, int]]:
    """Within the ``with``, what would have to be compiled is noted, with how often; nothing is compiled or launched.

    Kernels that this process has compiled before are launched, and not noted.
    """
    from triton import knobs

    found: dict[Request, int] = {}

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        request = Request(fn.module, fn.name, compile["specialization_data"])
        found[request] = found.get(request, 0) + 1
        return True  # Triton does without

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = note
    try:
        yield found
    finally:
        knobs.runtime.jit_cache_hook = before


@dataclass
class Count:
    """What was compiled in this process.

    Attributes:
        compiled: name and seconds of each kernel that was not in the cache on disk.
        loaded: how many were.
        seconds: of compiling them and of reading those that were there.
    """

    compiled: list[tuple[str, float]] = field(default_factory=list)
    loaded: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        seconds = sum(seconds for _, seconds in self.compiled)
        return f"compiled {len(self.compiled)} kernels in {seconds:.1f} s, {self.loaded} were in the cache"


@contextmanager
def counting() -> Iterator[Count]:
    """Counts what Triton compiles, or finds compiled on disk, within the ``with``."""
    from triton import knobs

    found = Count()
    before = knobs.compilation.listener

    def note(**event: Any) -> None:
        seconds = event["times"].total / 1e6
        found.seconds += seconds
        if event["cache_hit"]:
            found.loaded += 1
        else:
            found.compiled.append((event["src"].name, seconds))
        if before is not None:
            before(**event)

    knobs.compilation.listener = note
    try:
        yield found
    finally:
        knobs.compilation.listener = before


@dataclass(frozen=True)
class Answer:
    """What became of a request.

    Attributes:
        request: what was to be compiled.
        seconds: that it took, with its launcher.
        error: why it cannot be launched; empty if it can.
    """

    request: Request
    seconds: float
    error: str = ""


def compile_request(request: Request) -> Answer:
    """Compile one kernel for this process's GPU, fake or not, with the launcher that belongs to it."""
    start = time.perf_counter()
    kernel = getattr(importlib.import_module(request.module), request.name)
    error = ""
    try:
        kernel.preload(request.data)._init_handles()
    except Exception as failure:  # whatever the compiler raises; the others are to be compiled all the same
        error = f"{type(failure).__name__}: {failure}"[:500]
    return Answer(request, time.perf_counter() - start, error)
