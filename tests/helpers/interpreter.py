"""Triton's interpreter, faster, and watched: what a launch reads and writes, how often a backend launches anything."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdense.backends.triton_backend import TritonBackend


def speed_up() -> None:
    """Triton's interpreter several times as fast, with the same results.

    It patches the language at every call of a function, where once a launch will do; checks every sum of integers for
    an overflow, which no small tensor reaches; and builds a table at every look at a dtype. Where Triton has changed,
    the interpreter stays as slow as it is.
    """
    from triton import language as tl
    from triton.runtime import interpreter

    needed = ("_patch_lang", "_LangPatchScope", "_get_np_dtype", "GridExecutor", "interpreter_builder")
    if not all(hasattr(interpreter, name) for name in needed):
        return
    patch, launch, numpy_type = interpreter._patch_lang, interpreter.GridExecutor.__call__, interpreter._get_np_dtype
    patched: set[str] = set()
    dtypes: dict[str, Any] = {}

    @functools.cache
    def languages(function: Any) -> set[str]:
        return {value.__name__ for value in function.__globals__.values() if value is tl or value is tl.core}

    def patch_once(function: Any) -> Any:
        if languages(function) <= patched:
            return interpreter._LangPatchScope()
        patched.update(languages(function))
        return patch(function)

    def launch_afresh(self: Any, *arguments: Any, **keywords: Any) -> None:
        patched.clear()
        launch(self, *arguments, **keywords)

    def known_dtype(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = numpy_type(dtype)
        return dtypes[name]

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, known_dtype
    interpreter.GridExecutor.__call__ = launch_afresh
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)


@contextmanager
def _watched(
    starts: Callable[[Any, tuple[Any, ...]], None],
    accesses: Callable[[str, np.ndarray[Any, Any], Any], None],
    ends: Callable[[Any], None] = id,
) -> Iterator[None]:
    """Calls ``starts(kernel, arguments)`` and ``ends(kernel)`` round every launch within the ``with``.

    And at each load and store of the interpreter ``accesses("load" or "store", addresses, pointers)``.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    launch = TritonBackend.launch

    def watched(self: TritonBackend, kernel: Any, programs: int, *arguments: Any, **keywords: Any) -> None:
        starts(kernel, arguments)
        launch(self, kernel, programs, *arguments, **keywords)
        ends(kernel)

    def noted(kind: str) -> Any:
        original = getattr(InterpreterBuilder, f"create_masked_{kind}")

        def access(self: Any, pointers: Any, *arguments: Any, **keywords: Any) -> Any:
            mask = arguments[0] if kind == "load" else arguments[1]
            where = np.asarray(pointers.data)[np.broadcast_to(np.asarray(mask.data, bool), pointers.data.shape)]
            accesses(kind, where.ravel(), pointers)
            return original(self, pointers, *arguments, **keywords)

        return access

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TritonBackend, "launch", watched)
        for kind in ("load", "store"):
            patch.setattr(InterpreterBuilder, f"create_masked_{kind}", noted(kind))
        yield


@contextmanager
def accesses_checked() -> Iterator[None]:
    """Every load and store of a launch lies in the memory of one of its arguments; a GPU would read or write on."""
    ranges: list[tuple[int, int]] = []

    def note(kernel: Any, arguments: tuple[Any, ...]) -> None:
        storages = [a.untyped_storage() for a in arguments if isinstance(a, Tensor)]
        ranges[:] = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages]

    def check(kind: str, addresses: np.ndarray[Any, Any], pointers: Any) -> None:
        inside = np.zeros(addresses.shape, bool)
        for begin, end in ranges:
            inside |= (begin <= addresses) & (addresses < end)
        assert inside.all(), f"{kind}: {(~inside).sum()} of {inside.size} addresses belong to no argument"

    with _watched(note, check):
        yield


class LaunchCounter(TorchDispatchMode):
    """Counts what would be launched on a GPU: our kernels, and every operator of PyTorch that is not a view.

    Without ``running`` no kernel runs, which the interpreter would take long for.
    """

    def __init__(self, running: bool = True) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.running = running

    def __enter__(self) -> LaunchCounter:
        launch = self.original = TritonBackend.launch

        def counted(backend: TritonBackend, kernel: Any, *arguments: Any, **keywords: Any) -> None:
            self.counts[kernel.__name__] += 1
            with torch.utils._python_dispatch._disable_current_modes():
                if self.running:
                    launch(backend, kernel, *arguments, **keywords)

        TritonBackend.launch = counted  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        TritonBackend.launch = self.original  # type: ignore[method-assign]
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if not (func.is_view or "empty" in name or name in ("detach", "_unsafe_view")):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class Accesses(NamedTuple):
    """What one launch loads and stores, in bytes; the counters of arrivals are left out.

    Attributes:
        kernel: its name.
        loaded, stored: of each argument that is a tensor, by name: every address once; a load of what the launch has
            stored itself, which is in a cache, does not count.
        accessed: of all accesses, as often as they are made.
    """

    kernel: str
    loaded: Mapping[str, int]
    stored: Mapping[str, int]
    accessed: int

    @property
    def moved(self) -> int:
        """What a cache that forgets nothing lets through."""
        return sum(self.loaded.values()) + sum(self.stored.values())


def _span(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size() if tensor.numel() else 0


@contextmanager
def accesses_counted() -> Iterator[list[Accesses]]:
    """What every launch within the ``with`` loads and stores, as the interpreter does it."""
    found: list[Accesses] = []
    tensors: dict[str, tuple[int, int]] = {}
    seen: list[tuple[bool, np.ndarray[Any, Any], int]] = []  # in their order: whether stored, addresses, bytes of each

    def start(kernel: Any, arguments: tuple[Any, ...]) -> None:
        seen.clear()
        tensors.clear()
        for name, a in zip(inspect.signature(kernel.fn).parameters, arguments, strict=False):
            if isinstance(a, Tensor):
                tensors[name] = a.data_ptr(), a.data_ptr() + _span(a)

    def note(kind: str, addresses: np.ndarray[Any, Any], pointers: Any) -> None:
        seen.append((kind == "store", addresses, pointers.get_element_ty().primitive_bitwidth // 8))

    def share(counts: Counter[str], addresses: np.ndarray[Any, Any], size: int) -> None:
        for name, (begin, end) in tensors.items():
            mine = (begin <= addresses) & (addresses < end)
            if mine.any():
                counts[name] += size * int(mine.sum())
            addresses = addresses[~mine]
        if len(addresses):
            counts["beyond"] += size * len(addresses)  # of rows that are read in whole words

    def end(kernel: Any) -> None:
        loaded: Counter[str] = Counter()
        stored: Counter[str] = Counter()
        for size in {size for _, _, size in seen}:
            mine = [(is_store, addresses) for is_store, addresses, bytes_ in seen if bytes_ == size]
            addresses = np.concatenate([addresses for _, addresses in mine])
            stores = np.concatenate([np.full(addresses.shape, is_store) for is_store, addresses in mine])
            distinct, first = np.unique(addresses, return_index=True)
            share(loaded, distinct[~stores[first]], size)
            share(stored, np.unique(addresses[stores]), size)
        accessed = sum(len(addresses) * size for _, addresses, size in seen)
        found.append(Accesses(kernel.__name__, loaded, stored, accessed))

    with _watched(start, note, end):
        yield found
