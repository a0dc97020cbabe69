"""docs/gradient-flow.md's formula, with the one number taken from the chain, says what a DenseNet's gradients do."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("sklearn")
from fastdense.analysis.gradient_flow import BlockFlow, gradient_flow
from fastdense.analysis.plain import without_dense_connections
from fastdense.cli.subject import Subject, batch, subject
from fastdense.conversion.api import dense_blocks


def flows(of: Subject) -> list[BlockFlow]:
    seen = batch(of, "digits", count=64, image_size=None, seed=0)
    return gradient_flow(of.model.train(), seen.images, seen.labels)


def test_the_formula_says_what_is_measured() -> None:
    """The first layer's gradient over the last one's: within a factor of 2, where the chain's is far above."""
    looked_at = subject(None, None, seed=0, depth=100)
    torch.manual_seed(0)
    chain = Subject(without_dense_connections(looked_at.model), looked_at.description, looked_at.state)
    read = [[layer.norm1.num_features for layer in layers] for _, _, layers in dense_blocks(looked_at.model)]
    for dense, plain, channels in zip(flows(looked_at), flows(chain), read, strict=True):
        L, k = len(channels), channels[1] - channels[0]
        chained = (plain.total[1] / plain.total[L]).item()
        s = chained ** (2 / (L - 1))  # what a layer does to the squared norm
        predicted = math.prod(1 + s * k / width for width in channels[1:]) ** 0.5
        measured = (dense.total[1] / dense.total[L]).item()
        assert measured / 2 < predicted < 2 * measured < chained, dense.name
