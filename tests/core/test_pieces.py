"""Rows, images and lines: every row is wanted once, and the result is the same however they are cut."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.blocks import assert_same, block_pair, random_input, randomise, results
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastdense
from fastdense.backends.tiling import of_images, of_rows
from fastdense.core.primitives import Pool

POOLS = {
    "none": None,
    "average": Pool("average", (2, 2), (2, 2), (0, 0)),
    "average of 3": Pool("average", (3, 2), (3, 2), (0, 0)),
    "stem": Pool("maximum", (3, 3), (2, 2), (1, 1)),
    "overlapping": Pool("maximum", (5, 3), (2, 1), (2, 0)),
    "mean": Pool("mean"),
}


@settings(max_examples=200, deadline=None)
@given(
    images=st.integers(0, 3),
    height=st.integers(5, 17),
    width=st.integers(3, 6),
    at_most=st.integers(1, 120),
    halo=st.integers(0, 2),
    pool=st.sampled_from(sorted(POOLS)),
)
def test_every_row_is_wanted_once(images: int, height: int, width: int, at_most: int, halo: int, pool: str) -> None:
    spatial, windows = (height, width), POOLS[pool]
    m = images * height * width
    made = math.prod(spatial if windows is None else windows.sizes(spatial))
    wanted, written = [], []
    for piece in of_images(m, spatial, at_most, pool=windows, halo=halo):
        wanted += range(piece.wanted.start, piece.wanted.stop)
        written += range(piece.written.start, piece.written.stop)
        assert 0 <= piece.read.start <= piece.wanted.start and piece.wanted.stop <= piece.read.stop <= m
        assert (piece.read.stop - piece.read.start) % math.prod(piece.spatial) == 0
        assert piece.outputs.start <= piece.written.start and piece.written.stop <= piece.outputs.stop <= images * made
    assert wanted == list(range(m))
    assert (sorted(set(written)) if pool == "mean" else written) == list(range(images * made))


def test_pieces_fit_into_the_scratch_where_they_can() -> None:
    sizes = [p.read.stop - p.read.start for p in of_images(2 * 40 * 10, (40, 10), 100, halo=1)]
    assert max(sizes) == 100  # eight lines and their neighbours
    assert [p.read.stop - p.read.start for p in of_rows(25, (5, 5), 10)] == [10, 10, 5]


@pytest.fixture(params=[600, 3000])
def small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch for a line or a few of the images below, and never for a whole one."""
    monkeypatch.setattr("fastdense.backends.torch_backend.CHUNK_BYTES", request.param)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("per_channel", [False, True])
def test_dropout_by_lines_equals_dropout_at_once(per_channel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(block: nn.Module) -> None:
        for layer in block.children():
            layer.drop_channels = per_channel

    def run() -> dict[str, Any]:
        _, fast = block_pair(2, 6, 4, 5, drop_rate=0.4, change=choose)
        torch.manual_seed(2)
        return results(fast, random_input((2, 6, 13, 5)))

    got = run()
    monkeypatch.setattr("fastdense.backends.torch_backend.CHUNK_BYTES", 1 << 22)
    assert_same(got, run())


@pytest.mark.usefixtures("small_chunks", "fresh_memory_is_nan")
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_network_by_lines_equals_its_reference(dims: int) -> None:
    """Stem, transitions and head too, with sizes that leave a line over at every pooling."""
    options: dict[str, Any] = {"bn_size": 2, "num_classes": 3, "spatial_dims": dims, "dtype": torch.float64}
    networks = [fastdense.DenseNet(4, (2, 2), 6, impl=impl, **options) for impl in ("torch", "reference")]
    randomise(networks[1])
    networks[0].load_state_dict(networks[1].state_dict())
    x = random_input((2, 3, *((203,), (53, 31), (29, 22, 23))[dims - 1]))
    got, want = (results(network, x) for network in networks)
    assert_same(got, want)
