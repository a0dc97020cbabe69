"""Error budgets against a float64 truth: at most twice PyTorch's own error in the same dtype."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from helpers.blocks import block_pair, random_input, relative_error, results
from torch import Tensor, nn

from fastdense.backends.torch_backend import TorchBackend
from fastdense.core.features import Features

LOW = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # about one rounding of a result
INPUTS = 8

Results = dict[str, Tensor | None]


def _within_budget(trials: Iterable[tuple[Results, Results, Results]], tolerance: float) -> None:
    """``error(ours) <= 2*error(PyTorch) + tolerance`` for every tensor, in the 2-norm and element-wise.

    ``trials`` yields (ours, PyTorch's, truth) for several inputs; errors are root mean squares over the inputs. One
    input alone would compare luck: a value within a rounding of 0 switches a ReLU, and one switched ReLU outweighs all
    other errors, whoever computes.
    """
    squares: dict[str, list[tuple[float, float, float, float]]] = {}
    for ours, peer, truth in trials:
        for name, want in truth.items():
            got, other = ours[name], peer[name]
            if want is None or got is None or other is None or "num_batches" in name:
                continue
            largest = want.abs().max().item() or 1.0
            squares.setdefault(name, []).append(
                (
                    relative_error(got, want),
                    relative_error(other, want),
                    (got.double() - want).abs().max().item() / largest,
                    (other.double() - want).abs().max().item() / largest,
                )
            )
    assert len(squares) > 10
    for name, rows in squares.items():
        norm, peer_norm, element, peer_element = (
            (sum(value**2 for value in column) / len(rows)) ** 0.5 for column in zip(*rows, strict=True)
        )
        assert norm <= 2 * peer_norm + tolerance, f"{name}: relative error {norm:.2e}, PyTorch's {peer_norm:.2e}"
        assert element <= 2 * peer_element + 4 * tolerance, (
            f"{name}: element-wise {element:.2e}, PyTorch's {peer_element:.2e}"
        )


@pytest.mark.parametrize("mode", ["activations", "bottlenecks"])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", [(12, 24, 4, 12, (4, 24, 8, 8)), (6, 64, None, 16, (2, 64, 7, 9))])
def test_pure_low_precision(shape: Any, dtype: torch.dtype, mode: str) -> None:
    *arguments, size = shape

    def trials() -> Iterator[tuple[Results, Results, Results]]:
        for seed in range(INPUTS):
            truth, _ = block_pair(*arguments)
            peer, fast = block_pair(*arguments, recompute=mode)
            for block in (truth, peer, fast):
                _ordinary_gammas(block)
                block.to(dtype).to(torch.float64 if block is truth else dtype)  # all start from the rounded values
            x = random_input(size, dtype=dtype, layout="channels_last", seed=seed)
            yield results(fast, x), results(peer, x), results(truth, x.detach().double().requires_grad_())

    _within_budget(trials(), LOW[dtype])


@pytest.mark.parametrize("mode", ["activations", "bottlenecks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, mode: str) -> None:
    def run(block: nn.Module, x: Tensor) -> Results:
        def forward(x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=dtype):
                return block(x)

        return results(block, x, forward=forward)

    def trials() -> Iterator[tuple[Results, Results, Results]]:
        for seed in range(INPUTS):
            truth, _ = block_pair(8, 24, 4, 12)
            peer, fast = block_pair(8, 24, 4, 12, dtype=torch.float32, recompute=mode)
            for block in (truth, peer, fast):
                _ordinary_gammas(block)
            truth.load_state_dict(peer.state_dict())
            x = random_input((4, 24, 8, 8), dtype=dtype, layout="channels_last", seed=seed)
            got = run(fast, x)
            assert got["output"] is not None and got["output"].dtype == dtype
            gradient = got["denselayer3.conv1.weight.grad"]
            assert gradient is not None and gradient.dtype == torch.float32
            yield got, run(peer, x), results(truth, x.detach().double().requires_grad_())

    _within_budget(trials(), LOW[dtype])


def test_autocast_casts_float32_features() -> None:
    _, fast = block_pair(2, 6, 4, 4, dtype=torch.float32)
    x = random_input((2, 6, 4, 4), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fast(x)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()  # backward inside the context: nothing is cast twice
    assert x.grad is not None and x.grad.dtype == torch.float32


@pytest.mark.parametrize("ratio", [1e2, 1e4])
@pytest.mark.parametrize("mode", ["activations", "bottlenecks"])
def test_means_far_larger_than_the_deviation(mode: str, ratio: float) -> None:
    def trials() -> Iterator[tuple[Results, Results, Results]]:
        for seed in range(INPUTS):
            truth, _ = block_pair(3, 8, 4, 4)
            peer, fast = block_pair(3, 8, 4, 4, dtype=torch.float32, recompute=mode)
            for block in (truth, peer, fast):
                _ordinary_gammas(block)
            truth.load_state_dict(peer.state_dict())
            x = random_input((4, 8, 9, 9), layout="channels_last", seed=seed)
            x = (x.detach() + ratio).float().requires_grad_()
            yield results(fast, x), results(peer, x), results(truth, x.detach().double().requires_grad_())

    _within_budget(trials(), 1e-6)


def _ordinary_gammas(block: nn.Module) -> None:
    """gamma near 1: with gamma = 0 or negative a few roundings decide whole channels, for PyTorch as for us."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for norm in block.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
                norm.bias.copy_(torch.rand(norm.num_features, generator=generator) - 0.5)


@pytest.mark.parametrize("rows", [2048, 5000, 25088])
def test_moments_keep_the_digits_of_a_contiguous_tensor(rows: int) -> None:
    # F.batch_norm adds up channels-last values one after another on a CPU, and is ten times farther off.
    x = 2 * torch.randn(rows, 48) + 3
    backend = TorchBackend(x.view(1, rows, 48).transpose(1, 2))
    mean, var = torch.empty(2, 48)
    backend.moments(Features(x, mean, var))
    truth = x.double()
    deviation = truth.std(0, correction=0)
    assert ((mean - truth.mean(0)) / deviation).abs().max() < 1e-6
    assert (var / deviation.square() - 1).abs().max() < 1e-6


@pytest.mark.parametrize("rows", [64, 75])
def test_an_infinite_value_leaves_its_mean_infinite(rows: int) -> None:
    x = torch.randn(rows, 3)
    x[rows // 2, 1] = torch.inf
    mean, var = torch.empty(2, 3)
    TorchBackend(x.view(1, rows, 3).transpose(1, 2)).moments(Features(x, mean, var))
    assert mean[1] == torch.inf and var[1].isnan() and mean[[0, 2]].isfinite().all() and var[[0, 2]].isfinite().all()
