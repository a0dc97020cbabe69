"""One block's way from ``forward`` to its operators and back, on images so small that the work itself hardly counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import fastdense

LAYERS, CHANNELS, GROWTH = 12, 64, 32  # DenseNet-121's second block, but for its channels


@pytest.fixture(params=["torch", "triton without launches"])
def side(request: pytest.FixtureRequest) -> Iterator[str]:
    """Plain PyTorch, or the Triton host side with everything but the launches."""
    if request.param == "torch":
        yield "torch"
        return
    pytest.importorskip("triton")
    from benchmarks.micro.host import host_side

    with host_side() as launches:
        yield "auto"
        assert sum(launches.values()) > 0, "the Triton host side did not run"


@pytest.fixture
def step(side: str) -> Callable[[], tuple[Tensor, Tensor]]:
    """One forward pass of the block; returns its output and a cotangent for it."""
    block = fastdense.DenseBlock(LAYERS, CHANNELS, 4, GROWTH, impl=side)
    x = torch.randn(1, CHANNELS, 2, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    cotangent = torch.randn(1, CHANNELS + LAYERS * GROWTH, 2, 2).contiguous(memory_format=torch.channels_last)
    parameters = list(block.parameters())

    def forward() -> tuple[Tensor, Tensor]:
        for parameter in parameters:
            parameter.grad = None
        return block(x), cotangent

    return forward


@pytest.mark.benchmark(group="block of 12 layers")
def test_forward(benchmark: BenchmarkFixture, step: Callable[[], tuple[Tensor, Tensor]]) -> None:
    """Checks, dispatch, the operator's body, running statistics."""
    output, cotangent = benchmark.pedantic(step, rounds=300, warmup_rounds=10)
    assert output.shape == cotangent.shape and output.requires_grad


@pytest.mark.benchmark(group="block of 12 layers")
def test_backward(benchmark: BenchmarkFixture, step: Callable[[], tuple[Tensor, Tensor]]) -> None:
    """Autograd, dispatch, the backward operator's body."""
    seen: list[Tensor] = []

    def setup() -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
        output, cotangent = step()
        seen[:] = [output]
        return (output, cotangent), {}

    benchmark.pedantic(lambda output, cotangent: output.backward(cotangent), setup=setup, rounds=300, warmup_rounds=10)
    assert seen[0].grad_fn is not None


@pytest.mark.benchmark(group="block of 12 layers")
def test_evaluation(benchmark: BenchmarkFixture, side: str) -> None:
    """The same block with running statistics and without gradients: nothing is kept."""
    block = fastdense.DenseBlock(LAYERS, CHANNELS, 4, GROWTH, impl=side).eval()
    x = torch.randn(1, CHANNELS, 2, 2).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        output = benchmark.pedantic(block, (x,), rounds=300, warmup_rounds=10)
    assert not output.requires_grad and output.shape[1] == CHANNELS + LAYERS * GROWTH
