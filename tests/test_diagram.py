"""The diagram's counts are what autograd keeps, and it can be drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastdense
from benchmarks import diagram
from fastdense.reference import ConcatDenseBlock

LAYERS, SIZE = 7, 24


@pytest.mark.parametrize(
    ("block", "count"),
    [
        (ConcatDenseBlock(LAYERS, diagram.ENTERING, 4, diagram.GROWTH), diagram.textbook),
        (fastdense.DenseBlock(LAYERS, diagram.ENTERING, 4, diagram.GROWTH), diagram.activations),
        (
            fastdense.DenseBlock(LAYERS, diagram.ENTERING, 4, diagram.GROWTH, recompute="bottlenecks"),
            diagram.bottlenecks,
        ),
    ],
    ids=["torch.cat", "activations", "bottlenecks"],
)
def test_counts_are_what_is_kept(block: torch.nn.Module, count: Callable[[int], int]) -> None:
    x = torch.randn(2, diagram.ENTERING, SIZE, SIZE)
    with fastdense.memory.saved_bytes(block, x) as kept:
        output = block(x)
    assert output.requires_grad
    assert kept.bytes / x.nbytes * diagram.ENTERING == pytest.approx(count(LAYERS), rel=0.01)


def test_it_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    diagram.draw(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert diagram.PICTURE.is_file(), "run python -m benchmarks.diagram"
