"""Error budgets of block, stem, transition and head: at most twice PyTorch's own error in the same dtype."""

import itertools
from typing import Any

import pytest
import torch
from helpers import budget, pooled
from helpers.blocks import MODES, Results, block_pair, evaluate, random_input, results
from helpers.budget import BF16, F16, F32, TOLERANCE
from helpers.pooled import CASES, KINDS, PARTS, part, small
from torch import Tensor, nn

from fastdense.backends.torch_backend import TorchBackend
from fastdense.core.features import Features

LOW = (F16, BF16)


def autocast(dtype: torch.dtype) -> Any:
    def run(module: nn.Module, x: Tensor) -> Results:
        def forward(x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=dtype):
                return module(x)

        return results(module, x, forward=forward)

    return run


# layers, C0, bn_size, k; shape; how far the mean is away from 0 in deviations
BLOCKS: dict[str, tuple[Any, tuple[int, ...], float]] = {
    "bottleneck": ((12, 24, 4, 12), (4, 24, 8, 8), 0),
    "basic": ((6, 64, None, 16), (2, 64, 7, 9), 0),
    "autocast": ((8, 24, 4, 12), (4, 24, 8, 8), 0),
    "mean of 100": ((3, 8, 4, 4), (4, 8, 9, 9), 1e2),
    "mean of 10,000": ((3, 8, 4, 4), (4, 8, 9, 9), 1e4),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *itertools.product(("bottleneck", "basic"), TOLERANCE), *itertools.product(("autocast",), LOW),
        ("mean of 100", F32), ("mean of 10,000", F32),
    ],
    ids=str,
)  # fmt: skip
def test_a_block_keeps_the_budget(name: str, dtype: torch.dtype, mode: str) -> None:
    """Root mean squares over inputs: of one alone, a ReLU that roundings switch outweighs all other errors."""
    arguments, shape, shift = BLOCKS[name]
    weights = torch.float64 if name in ("bottleneck", "basic") else F32
    budget.within_budget(
        lambda: (block_pair(*arguments)[0], *block_pair(*arguments, dtype=weights, recompute=mode)),
        lambda seed: random_input(shape, layout="channels_last", seed=seed).detach() + shift,
        dtype,
        average=budget.root_mean_square,
        inputs=8,
        **({"parameters": F32, "run": autocast(dtype)} if name == "autocast" else {}),
    )


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", PARTS)
def test_autocast_gives_the_dtypes_of_the_reference_and_casts_nothing_twice(name: str, dtype: torch.dtype) -> None:
    """Parameters in float32; a convolution's input is cast as by PyTorch, the stem's and the head's left as it is."""
    reference, fast, x = part(name, dtype=F32)
    got, want = autocast(dtype)(fast, x), autocast(dtype)(reference, x)
    for key, value in want.items():
        assert got[key].dtype == (dtype if key == "output" and name not in KINDS else value.dtype), key
        if name in KINDS:
            off = (got[key].double() - value.double()).norm().item() / (value.double().norm().item() or 1)
            # The reference normalises the float32 input and rounds afterwards: a rounded input's difference, not ours.
            assert off <= (20 if name == "transition" else 1) * TOLERANCE[dtype], f"{key}: {off:.2e}"
    assert autocast(dtype)(fast, x.detach().to(dtype).requires_grad_())["output"].dtype == dtype
    with torch.autocast("cpu", dtype=dtype):
        fast(x).float().square().sum().backward()  # backward inside the context
    assert x.grad is not None and x.grad.dtype == F32


@pytest.mark.parametrize("dtype", [F32, F16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", CASES)
def test_a_stage_keeps_the_budget_at_every_shape(name: str, dtype: torch.dtype, fresh_memory_is_nan: None) -> None:
    pooled.check_shape(name, dtype, "torch")


STAGES: dict[str, dict[str, Any]] = {
    "frozen norm": {"change": evaluate},
    "relus and maxima that switch": {"decided": False, "inputs": 25},
    "in chunks": {"layout": "contiguous"},
    # Against the contiguous reference too, which loses fewer digits on the CPU than the channels-last one.
    "large means, contiguous": {"shift": 1e4, "layout": "contiguous", "inputs": 8},
    "large means, channels last": {"shift": 1e4, "inputs": 8},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "dtype"), [(n, dtype) for n in STAGES for dtype in TOLERANCE if dtype == F32 or "large" not in n], ids=str
)
def test_a_stage_keeps_the_budget(name: str, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "in chunks":
        monkeypatch.setattr("fastdense.backends.torch_backend.CHUNK_BYTES", 700)
    case = small(kind)._replace(shape=(8, 8, 9, 9)) if "large" in name else small(kind)
    pooled.check_budget(case, dtype, "torch", **STAGES[name])


@pytest.mark.parametrize("rows", [64, 75, 2048, 25088])
def test_moments_keep_the_digits_of_a_contiguous_tensor_and_an_infinite_mean(rows: int) -> None:
    """F.batch_norm adds up channels-last values one after another on a CPU, and is ten times farther off."""
    x = 2 * torch.randn(rows, 48) + 3
    x[rows // 2, 47] = torch.inf
    mean, var = torch.empty(2, 48)
    TorchBackend(x.view(1, *x.shape).transpose(1, 2)).moments(Features(x, mean, var))
    assert mean[47] == torch.inf and var[47].isnan()
    truth = x[:, :47].double()
    deviation = truth.std(0, correction=0)
    assert ((mean[:47] - truth.mean(0)) / deviation).abs().max() < 1e-6
    assert (var[:47] / deviation.square() - 1).abs().max() < 1e-6
