"""The fused block against the reference, in float64: outputs, every gradient, running statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.blocks import LAYOUTS, MODES, assert_same, block_pair, kernel, random_input, results, wider_kernel
from helpers.budget import SHAPES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastdense

# layers, C0, bn_size, k, input shape
ALL_SHAPES: dict[str, tuple[Any, ...]] = {
    **{name: shape[:5] for name, shape in SHAPES.items()},
    "k = 12, five layers": (5, 24, 4, 12, (2, 24, 5, 4)),
    "one row": (3, 6, 4, 4, (2, 6, 1, 9)),
    "basic, one pixel": (3, 3, None, 2, (5, 3, 1, 1)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ALL_SHAPES)
def test_equal_at_every_shape_and_layout(name: str, layout: str, mode: str, fresh_memory_is_nan: None) -> None:
    *arguments, shape = ALL_SHAPES[name]
    reference, fast = block_pair(*arguments, spatial_dims=len(shape) - 2, recompute=mode)
    x = random_input(shape, layout=layout)
    assert_same(results(fast, x), results(reference, x))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", [wider_kernel, kernel("conv1", 3, 1)], ids=["3x3", "1x1"])
def test_equal_with_kernels_of_another_size(change: Any, mode: str, fresh_memory_is_nan: None) -> None:
    reference, fast = block_pair(4, 6, 3, 4, change=change, recompute=mode)
    x = random_input((2, 6, 5, 4))
    assert_same(results(fast, x), results(reference, x))


SUBSETS: dict[str, Any] = {
    "only the input": lambda name: False,
    "all weights": lambda name: "conv" in name,
    "all norms": lambda name: "norm" in name,
    "second layer's first conv": lambda name: name == "denselayer2.conv1.weight",
    "third layer's second norm": lambda name: name.startswith("denselayer3.norm2"),
    "last layer's gamma": lambda name: name == "denselayer4.norm1.weight",
    "first layer's beta": lambda name: name == "denselayer1.norm1.bias",
    "layers 2 and 4": lambda name: name.startswith(("denselayer2", "denselayer4")),
}


@pytest.mark.parametrize(("bn_size", "mode"), [(3, "activations"), (3, "bottlenecks"), (None, "activations")])
@pytest.mark.parametrize("input_needs", [True, False])
@pytest.mark.parametrize("subset", SUBSETS)
def test_equal_where_only_some_require_gradients(
    subset: str, input_needs: bool, mode: str, bn_size: int | None, fresh_memory_is_nan: None
) -> None:
    def choose(block: nn.Module) -> None:
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(SUBSETS[subset](name))

    reference, fast = block_pair(4, 5, bn_size, 4, change=choose, recompute=mode)
    x = random_input((2, 5, 4, 3)).detach().requires_grad_(input_needs)
    assert_same(results(fast, x), results(reference, x))


@pytest.mark.parametrize("size", [600, 3000, 4096])
@pytest.mark.parametrize(("bn_size", "mode"), [(4, "activations"), (4, "bottlenecks"), (None, "activations")])
@pytest.mark.parametrize("shape", [(2, 9, 41), (2, 9, 11, 6), (5, 9, 7, 6), (1, 9, 8, 3, 5)])
def test_equal_in_chunks(
    shape: tuple[int, ...], bn_size: int, mode: str, size: int, monkeypatch: Any, fresh_memory_is_nan: None
) -> None:
    """Scratch for a line or a few, or for a few images, of features far larger than it."""
    monkeypatch.setattr("fastdense.backends.torch_backend.CHUNK_BYTES", size)
    reference, fast = block_pair(3, 9, bn_size, 4, spatial_dims=len(shape) - 2, recompute=mode)
    x = random_input(shape)
    assert_same(results(fast, x), results(reference, x))


def test_equal_where_growth_differs_between_layers() -> None:
    """As in networks whose growth rate rises with depth."""
    growth = (3, 1, 6)
    layers = nn.ModuleList(
        fastdense.DenseLayer(5 + sum(growth[:i]), k, 2, dtype=torch.float64) for i, k in enumerate(growth)
    )
    x = random_input((2, 5, 4, 3))

    def run(impl: str) -> dict[str, Any]:
        found = results(layers, x, forward=lambda x: fastdense.dense_block(x, layers, impl=impl))
        return {name: value for name, value in found.items() if "running" not in name and "num_batches" not in name}

    assert_same(run("torch"), run("reference"))


@settings(max_examples=40, deadline=None)
@given(
    layers=st.integers(1, 4),
    channels=st.integers(1, 20),
    bn_size=st.one_of(st.none(), st.integers(1, 4)),
    k=st.sampled_from([1, 2, 3, 8, 12]),
    batch=st.integers(1, 3),
    spatial=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    mode=st.sampled_from(MODES),
)
def test_equal_for_any_shape(
    layers: int, channels: int, bn_size: int | None, k: int, batch: int, spatial: list[int], mode: str
) -> None:
    if batch * torch.Size(spatial).numel() == 1:
        return  # one value per channel: refused, as by F.batch_norm
    reference, fast = block_pair(layers, channels, bn_size, k, spatial_dims=len(spatial), recompute=mode)
    x = random_input((batch, channels, *spatial))
    # Two values per channel normalise to +-1 with a derivative that cancels to about eps: allow for that.
    assert_same(results(fast, x), results(reference, x), 1e-9 if x.numel() // channels > 4 else 1e-5)
