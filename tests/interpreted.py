"""Watching Triton's interpreter: what a launch reads and writes, and how often a backend launches anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdense.triton_backend import TritonBackend


@contextmanager
def accesses_checked() -> Iterator[None]:
    """Every load and store of a launch lies in the memory of one of its arguments; a GPU would read or write on."""
    from triton.runtime.interpreter import InterpreterBuilder

    ranges: list[tuple[int, int]] = []
    launch = TritonBackend.launch

    def noted(self: TritonBackend, kernel: Any, programs: int, *arguments: Any, **keywords: Any) -> None:
        storages = [a.untyped_storage() for a in arguments if isinstance(a, Tensor)]
        ranges[:] = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages]
        launch(self, kernel, programs, *arguments, **keywords)

    def checked(name: str) -> Any:
        original = getattr(InterpreterBuilder, name)

        def access(self: Any, pointers: Any, *arguments: Any, **keywords: Any) -> Any:
            mask = arguments[0] if name == "create_masked_load" else arguments[1]
            addresses = np.asarray(pointers.data)[np.broadcast_to(np.asarray(mask.data, bool), pointers.data.shape)]
            inside = np.zeros(addresses.shape, bool)
            for begin, end in ranges:
                inside |= (begin <= addresses) & (addresses < end)
            assert inside.all(), f"{name}: {(~inside).sum()} of {inside.size} addresses belong to no argument"
            return original(self, pointers, *arguments, **keywords)

        return access

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TritonBackend, "launch", noted)
        for name in ("create_masked_load", "create_masked_store"):
            patch.setattr(InterpreterBuilder, name, checked(name))
        yield


class LaunchCounter(TorchDispatchMode):
    """Counts what would be launched on a GPU: our kernels, and every operator of PyTorch that is not a view."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __enter__(self) -> LaunchCounter:
        launch = self.original = TritonBackend.launch

        def counted(backend: TritonBackend, kernel: Any, *arguments: Any, **keywords: Any) -> None:
            self.counts[kernel.__name__] += 1
            with torch.utils._python_dispatch._disable_current_modes():
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
