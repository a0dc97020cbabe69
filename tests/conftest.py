from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

if torch.cuda.is_available():
    # Deterministic algorithms, which the tests ask for, need it of cuBLAS before its first product.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    # The kernels run in Triton's interpreter, which must be chosen before anything imports Triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from helpers import interpreter

    interpreter.speed_up()


@pytest.fixture
def fresh_memory_is_nan() -> Iterator[None]:
    """Fill newly allocated memory with NaN, so that an element that nobody wrote is seen."""
    # On a GPU PyTorch's own 3D pooling has no deterministic algorithm.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def kernels_checked(fresh_memory_is_nan: None) -> Iterator[None]:
    """For tests of the kernels: accesses within their tensors, and fp32 products in fp32, ours and PyTorch's."""
    from helpers.interpreter import accesses_checked

    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    with nullcontext() if torch.cuda.is_available() else accesses_checked():
        yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    # The tensors are tiny: a second thread would only wait at barriers, for long where the machine is busy.
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that entered the fused stem."""
    from fastdense import functional

    seen: list[tuple[int, ...]] = []
    original = functional.fused_pool

    def spy(x: torch.Tensor, norm: Any, weight: Any, pool: Any, *rest: Any) -> Any:
        if pool.kind == "maximum":
            seen.append(tuple(x.shape))
        return original(x, norm, weight, pool, *rest)

    monkeypatch.setattr(functional, "fused_pool", spy)
    return seen
