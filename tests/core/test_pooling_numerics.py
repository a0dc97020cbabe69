"""Error budgets of stem, transition and head: at most twice PyTorch's own error in the same dtype."""

from __future__ import annotations

import pytest
import torch
from helpers.blocks import random_input, results
from helpers.pooled import CASES, KINDS, TOLERANCE, check_budget, check_shape, pair, small
from torch import Tensor

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
LOW = [F16, BF16]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CASES)
def test_shapes(name: str, dtype: torch.dtype, fresh_memory_is_nan: None) -> None:
    check_shape(name, dtype, "torch")


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("kind", KINDS)
def test_relus_and_maxima_that_switch(kind: str, dtype: torch.dtype) -> None:
    check_budget(small(kind), dtype, "torch", decided=False, inputs=25)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_norms(kind: str, dtype: torch.dtype) -> None:
    check_budget(small(kind), dtype, "torch", change=lambda stage: stage.norm.eval())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", KINDS)
def test_mean_far_larger_than_the_deviation(kind: str, layout: str) -> None:
    """Against the contiguous textbook too, which loses fewer digits on the CPU than the channels-last one."""
    case = small(kind, 8)._replace(shape=(8, 8, 9, 9))
    check_budget(case, F32, "torch", shift=1e4, layout=layout, inputs=8)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_in_low_precision(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdense.backends.torch_backend.CHUNK_BYTES", 700)
    check_budget(small(kind), dtype, "torch", layout="contiguous")


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str, dtype: torch.dtype) -> None:
    """Parameters in float32; the transition casts its input as its convolution does, the others leave it as it is."""
    textbook, fast = pair(small(kind), dtype=F32)
    x = random_input(small(kind).shape, dtype=F32)

    def run(stage: torch.nn.Module, x: Tensor) -> dict[str, Tensor | None]:
        def forward(x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=dtype):
                return stage(x)

        return results(stage, x, forward=forward)

    got, want = run(fast, x), run(textbook, x)
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        off = (got[name].double() - value.double()).norm().item() / (value.double().norm().item() or 1)
        # The textbook normalises the float32 input and rounds afterwards: a rounded input's difference, not ours.
        assert off <= (20 if kind == "transition" else 1) * TOLERANCE[dtype], f"{name}: {off:.2e}"
    low = x.detach().to(dtype).requires_grad_()
    assert run(fast, low)["output"].dtype == dtype
    with torch.autocast("cpu", dtype=dtype):
        fast(x).float().square().sum().backward()  # backward inside the context: nothing is cast twice
    assert x.grad is not None and x.grad.dtype == F32
