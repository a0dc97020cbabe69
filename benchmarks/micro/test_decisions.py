"""What is decided before anything is computed: tiles, running statistics, which blocks recompute."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from fastdense import recompute
from fastdense.kernels import launch
from fastdense.ops.common import update_running_statistics

LAYERS = 24  # DenseNet-121's third block
CHANNELS, GROWTH, PIXELS = 256, 32, 64 * 14 * 14
SHAPES = [launch.Shape(PIXELS, CHANNELS + layer * GROWTH, 4 * GROWTH, 1) for layer in range(LAYERS)]
SHAPES += [launch.Shape(PIXELS, 4 * GROWTH, GROWTH, 9)] * LAYERS


@pytest.mark.benchmark(group="launch.choose, 24 layers forward and backward")
@pytest.mark.parametrize("cached", [False, True], ids=["cold", "warm"])
def test_choose(benchmark: BenchmarkFixture, cached: bool) -> None:
    """Tile sizes of every convolution of a block: computed, or looked up as in every step but the first."""
    choose: Callable[..., launch.LaunchConfig] = launch.choose if cached else launch.choose.__wrapped__

    def block() -> list[launch.LaunchConfig]:
        operations = ("bn_relu_conv", "bn_relu_conv_backward")
        return [choose(op, shape, torch.bfloat16, 90, 132) for shape in SHAPES for op in operations]

    found = benchmark(block)
    assert len(found) == 4 * LAYERS and all(isinstance(config, launch.LaunchConfig) for config in found)


@pytest.mark.benchmark(group="running statistics")
@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
def test_update_running_statistics(benchmark: BenchmarkFixture, momentum: float | None) -> None:
    """All norms of a block of 24 layers in one call, as once a step."""
    widths = [width for layer in range(LAYERS) for width in (CHANNELS + layer * GROWTH, 4 * GROWTH)]
    batch = [(nn.BatchNorm2d(width, momentum=momentum), torch.ones(width), torch.ones(width)) for width in widths]
    benchmark(update_running_statistics, batch, PIXELS)
    norm = batch[0][0]
    assert norm.running_mean is not None and norm.running_mean.min() > 0
    assert norm.num_batches_tracked is not None and norm.num_batches_tracked > 0


@pytest.mark.benchmark(group="recompute='auto'")
def test_plan_recompute(benchmark: BenchmarkFixture) -> None:
    """The plan for DenseNet-201 where two blocks of four must recompute."""
    blocks, channels, size = [], 64, 56
    for layers in (6, 12, 48, 32):
        reads = tuple(channels + layer * GROWTH for layer in range(layers))
        channels += layers * GROWTH
        blocks.append(recompute.BlockSize(64 * size * size, channels, reads, (4 * GROWTH,) * layers, 4))
        channels, size = channels // 2, size // 2
    free = recompute.planned_bytes(blocks, ["bottlenecks", "bottlenecks", "activations", "activations"])[1]
    modes = benchmark(recompute.plan_recompute, blocks, free)
    assert modes[:2] == ["bottlenecks"] * 2 and "activations" in modes
