"""Conversion of a small torchvision DenseNet, the look at a converted module before each call, and ``plan``."""

from __future__ import annotations

from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import fastdense
from benchmarks.harness.providers import torchvision_densenet
from fastdense.conversion.converted import Converted, resolve

PARTS = 4  # two blocks, one transition, the stem


def _network(*layers: int) -> Any:
    try:
        return torchvision_densenet().DenseNet(8, layers, 16, num_classes=10)
    except ImportError:
        pytest.skip("torchvision is not installed")


@pytest.mark.benchmark(group="conversion")
@pytest.mark.parametrize("verify", [False, True], ids=["unverified", "verified"])
def test_convert(benchmark: BenchmarkFixture, verify: bool) -> None:
    """A trace of each candidate; with ``verify`` both versions of each run in float64, too."""

    def setup() -> tuple[tuple[Any], dict[str, bool]]:
        return (_network(3, 3),), {"verify": verify}

    model = benchmark.pedantic(fastdense.convert, setup=setup, rounds=7, warmup_rounds=1)
    assert sum(isinstance(module, Converted) for module in model.modules()) == PARTS


@pytest.mark.benchmark(group="conversion")
def test_plan(benchmark: BenchmarkFixture) -> None:
    """The list of what would be converted, with the bytes that each part saves for backward."""
    entries = benchmark.pedantic(fastdense.plan, (_network(3, 3), (2, 3, 64, 64)), rounds=7, warmup_rounds=1)
    assert [entry.action for entry in entries] == ["convert"] * PARTS
    assert all((entry.bytes_saved or 0) > 0 for entry in entries)


@pytest.mark.benchmark(group="a converted block")
def test_resolve(benchmark: BenchmarkFixture) -> None:
    """Whether a block of 24 layers is still what it was when it was converted: before every call."""
    converted: Any = fastdense.convert(_network(24), verify=False)
    block = converted.features.denseblock1
    found, reason = benchmark(resolve, block, block._fastdense.nodes)
    assert reason is None and len(found) == len(block._fastdense.nodes) > 24
