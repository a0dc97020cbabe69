"""One block's way from ``forward`` to its operators and back, on images so small that the work itself hardly counts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import fastdense

LAYERS, CHANNELS, GROWTH = 12, 64, 32  # DenseNet-121's second block, but for its channels
pytestmark = pytest.mark.benchmark(group="block of 12 layers")


@pytest.fixture(params=["torch", "triton without launches"])
def block(request: pytest.FixtureRequest) -> Iterator[fastdense.DenseBlock]:
    """A block of plain PyTorch, or of the Triton host side with everything but the launches."""
    if request.param == "torch":
        yield fastdense.DenseBlock(LAYERS, CHANNELS, 4, GROWTH, impl="torch")
        return
    pytest.importorskip("triton")
    from benchmarks.micro.host import host_side

    with host_side() as launches:
        yield fastdense.DenseBlock(LAYERS, CHANNELS, 4, GROWTH, impl="auto")
        assert sum(launches.values()) > 0, "the Triton host side did not run"


def _images(channels: int) -> Tensor:
    return torch.randn(1, channels, 2, 2).contiguous(memory_format=torch.channels_last)


def test_forward(benchmark: BenchmarkFixture, block: fastdense.DenseBlock) -> None:
    """Checks, dispatch, the operator's body, running statistics."""
    output = benchmark.pedantic(block, (_images(CHANNELS).requires_grad_(),), rounds=300, warmup_rounds=10)
    assert output.shape[1] == CHANNELS + LAYERS * GROWTH and output.requires_grad


def test_backward(benchmark: BenchmarkFixture, block: fastdense.DenseBlock) -> None:
    """Autograd, dispatch, the backward operator's body."""
    x, cotangent = _images(CHANNELS).requires_grad_(), _images(CHANNELS + LAYERS * GROWTH)

    def setup() -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
        block.zero_grad()
        return (block(x), cotangent), {}

    benchmark.pedantic(torch.autograd.backward, setup=setup, rounds=300, warmup_rounds=10)
    assert x.grad is not None


def test_evaluation(benchmark: BenchmarkFixture, block: fastdense.DenseBlock) -> None:
    """The same block with running statistics and without gradients: nothing is saved."""
    with torch.no_grad():
        output = benchmark.pedantic(block.eval(), (_images(CHANNELS),), rounds=300, warmup_rounds=10)
    assert not output.requires_grad and output.shape[1] == CHANNELS + LAYERS * GROWTH
