"""The fused block against the textbook one, in float64: outputs, every gradient, running statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.blocks import assert_close, assert_same, block_pair, random_input, results
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastdense

MODES = ("activations", "bottlenecks")

# layers, C0, bn_size, k, input shape
SHAPES = {
    "plain": (3, 8, 4, 4, (2, 8, 6, 6)),
    "one pixel": (3, 5, 4, 3, (4, 5, 1, 1)),
    "primes, not square": (4, 7, 3, 5, (3, 7, 11, 13)),
    "batch of one": (2, 3, 4, 12, (1, 3, 5, 7)),
    "k = 1": (5, 1, 2, 1, (2, 1, 4, 3)),
    "k = 12": (3, 24, 4, 12, (2, 24, 5, 4)),
    "k = 32": (2, 64, 4, 32, (2, 64, 4, 4)),
    "k = 48": (2, 17, 4, 48, (1, 17, 3, 9)),
    "one row": (3, 6, 4, 4, (2, 6, 1, 9)),
    "one layer": (1, 6, 4, 4, (2, 6, 3, 3)),
    "basic": (4, 6, None, 4, (2, 6, 5, 3)),
    "basic, one pixel": (3, 3, None, 2, (5, 3, 1, 1)),
    "1D": (3, 6, 4, 4, (3, 6, 17)),
    "1D, basic": (3, 6, None, 5, (3, 6, 9)),
    "3D": (3, 6, 4, 4, (2, 6, 3, 5, 4)),
    "3D, basic": (2, 4, None, 3, (2, 4, 3, 2, 3)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice"])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_and_layouts(name: str, layout: str, mode: str, fresh_memory_is_nan: None) -> None:
    layers, channels, bn_size, k, shape = SHAPES[name]
    reference, fast = block_pair(layers, channels, bn_size, k, spatial_dims=len(shape) - 2, recompute=mode)
    x = random_input(shape, layout=layout)
    assert_same(results(fast, x), results(reference, x))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bn_size", [4, None])
def test_running_statistics_after_three_steps(bn_size: int | None, mode: str) -> None:
    reference, fast = block_pair(3, 6, bn_size, 4, recompute=mode)
    for step in range(3):
        x = random_input((2, 6, 5, 5)).detach() * (step + 1) + step
        results(reference, x), results(fast, x)
    for (name, got), want in zip(fast.named_buffers(), reference.buffers(), strict=True):
        assert_close(name, got, want)
    assert int(fast["denselayer1"].norm1.num_batches_tracked) == 3


def _evaluate(block: nn.Module) -> None:
    block.eval()


def _freeze_some(block: nn.Module) -> None:
    for i, norm in enumerate(m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.train(i % 3 == 0)


def _freeze_first_of_each(block: nn.Module) -> None:
    for layer in block.children():
        layer.norm1.eval()


def _other_eps(block: nn.Module) -> None:
    for i, norm in enumerate(m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eps = (1e-5, 1e-1, 1e-3)[i % 3]


def _momenta(block: nn.Module) -> None:
    for i, norm in enumerate(m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = (0.1, 0.5, None)[i % 3]


def _untracked(block: nn.Module) -> None:
    for name, norm in [(n, m) for n, m in block.named_modules() if isinstance(m, nn.BatchNorm2d)]:
        layer, leaf = name.rsplit(".", 1)
        new = nn.BatchNorm2d(norm.num_features, track_running_stats=False, dtype=torch.float64)
        setattr(block.get_submodule(layer), leaf, new)


def _untracked_in_evaluation(block: nn.Module) -> None:
    _untracked(block)
    block.eval()


def _without_affine(block: nn.Module) -> None:
    for name, norm in [(n, m) for n, m in block.named_modules() if isinstance(m, nn.BatchNorm2d)]:
        layer, leaf = name.rsplit(".", 1)
        setattr(block.get_submodule(layer), leaf, nn.BatchNorm2d(norm.num_features, affine=False, dtype=torch.float64))


def _without_bias(block: nn.Module) -> None:
    for norm in [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]:
        norm.register_parameter("bias", None)


def _wide_first_kernel(block: nn.Module) -> None:
    for layer in block.children():
        weight = torch.empty(layer.conv1.out_channels, layer.conv1.in_channels, 3, 1).double()
        weight.uniform_(-1, 1, generator=torch.Generator().manual_seed(3))
        layer.conv1 = nn.Conv2d(layer.conv1.in_channels, layer.conv1.out_channels, (3, 1), padding=(1, 0), bias=False)
        layer.conv1.weight.data = weight


def _wider_kernel(block: nn.Module) -> None:
    for layer in block.children():
        layer.conv2 = nn.Conv2d(layer.conv2.in_channels, layer.conv2.out_channels, (5, 3), padding=(2, 1), bias=False)
        layer.conv2.weight.data = (
            torch.ones(layer.conv2.weight.shape).double().uniform_(-1, 1, generator=torch.Generator().manual_seed(3))
        )


CHANGES = {
    change.__name__.strip("_"): change
    for change in (
        _evaluate,
        _freeze_some,
        _freeze_first_of_each,
        _other_eps,
        _momenta,
        _untracked,
        _untracked_in_evaluation,
        _without_affine,
        _without_bias,
        _wider_kernel,
        _wide_first_kernel,
    )
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", CHANGES)
def test_norms_of_every_kind(change: str, mode: str, fresh_memory_is_nan: None) -> None:
    reference, fast = block_pair(4, 6, 3, 4, change=CHANGES[change], recompute=mode)
    for seed in (1, 2):  # twice: the second step sees updated statistics
        x = random_input((2, 6, 5, 4))
        assert_same(results(fast, x, seed), results(reference, x, seed))


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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("input_needs", [True, False])
@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("bn_size", [3, None])
def test_partial_requires_grad(
    subset: str, input_needs: bool, mode: str, bn_size: int | None, fresh_memory_is_nan: None
) -> None:
    def choose(block: nn.Module) -> None:
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(SUBSETS[subset](name))

    reference, fast = block_pair(4, 5, bn_size, 4, change=choose, recompute=mode)
    x = random_input((2, 5, 4, 3)).detach().requires_grad_(input_needs)
    assert_same(results(fast, x), results(reference, x))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("bn_size", [3, None])
def test_moments_are_differentiable_outputs_and_inputs(given: bool, mode: str, bn_size: int | None) -> None:
    """Two consumers of the block's moments, and moments of the input handed in: gradients flow through all of them."""
    reference, fast = block_pair(3, 5, bn_size, 4, recompute=mode)
    generator = torch.Generator().manual_seed(5)
    cotangents = [
        torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, 17, 4, 3), (17,), (17,), (17,))
    ]

    def run(block: nn.Module, impl: str) -> list[torch.Tensor]:
        x = random_input((2, 5, 4, 3))
        shifted = x * 2 + 1
        moments = None
        if given and impl != "reference":
            var, mean = torch.var_mean(shifted, dim=(0, 2, 3), correction=0)
            moments = (mean, var)
        X, mean, var = fastdense.dense_block(
            shifted, block.values(), impl=impl, recompute=mode, moments=moments, return_moments=True
        )
        first = ((X - mean.view(1, -1, 1, 1)) * cotangents[0]).sum() + (mean * cotangents[1]).sum()
        second = (var.sqrt() * cotangents[2]).sum() + (var * mean * cotangents[3]).sum()
        return list(torch.autograd.grad(first + second, [x, *block.parameters()]))

    for i, (got, want) in enumerate(zip(run(fast, "torch"), run(reference, "reference"), strict=True)):
        assert_close(f"gradient {i}", got, want)


def test_only_the_moments_are_used() -> None:
    """No gradient reaches the features themselves."""
    _, fast = block_pair(2, 5, 3, 4)
    reference, _ = block_pair(2, 5, 3, 4)
    gradients = []
    for block, impl in ((fast, "torch"), (reference, "reference")):
        x = random_input((2, 5, 4, 3))
        _, mean, var = fastdense.dense_block(x, block.values(), impl=impl, return_moments=True)
        gradients.append(
            torch.autograd.grad((mean.sin() + var.log()).sum(), [x, *block.parameters()], allow_unused=True)
        )
    for i, (got, want) in enumerate(zip(*gradients, strict=True)):
        if want is None:  # the last layer's parameters after the moments... all are used
            assert got is None or got.norm() == 0
        else:
            assert_close(f"gradient {i}", got, want)


@pytest.mark.parametrize("mode", MODES)
def test_chunks_do_not_change_the_result(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features far larger than the scratch: many chunks of rows, a few images at a time."""
    monkeypatch.setattr("fastdense.backends.torch_backend.CHUNK_BYTES", 4096)
    reference, fast = block_pair(3, 9, 4, 5, recompute=mode)
    x = random_input((5, 9, 7, 6))
    assert_same(results(fast, x), results(reference, x))


@pytest.mark.parametrize("mode", MODES)
def test_gradient_accumulation_and_retained_graph(mode: str) -> None:
    reference, fast = block_pair(3, 6, 4, 4, recompute=mode)
    for block in (reference, fast):
        x = random_input((2, 6, 4, 4))
        out = block(x)
        out.backward(torch.ones_like(out).cumsum(2), retain_graph=True)
        out.backward(torch.ones_like(out).cumsum(3))
        block(x * 2).square().sum().backward()
    for (name, got), want in zip(fast.named_parameters(), reference.parameters(), strict=True):
        assert_close(name, got.grad, want.grad)


def test_grad_output_is_left_alone() -> None:
    _, fast = block_pair(3, 6, 4, 4)
    for layout in (torch.contiguous_format, torch.channels_last):
        out = fast(random_input((2, 6, 4, 4)))
        cotangent = torch.randn(out.shape, dtype=torch.float64).contiguous(memory_format=layout)
        before = cotangent.clone()
        out.backward(cotangent)
        assert torch.equal(cotangent, before)


def test_reruns_are_bit_equal() -> None:
    _, fast = block_pair(4, 24, 4, 12, dtype=torch.float32)
    first, second = (results(fast.train(), random_input((4, 24, 9, 9), dtype=torch.float32)) for _ in range(2))
    for name, value in first.items():
        if value is not None and (name.endswith("grad") or name == "output"):
            assert torch.equal(value, second[name]), name


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
def test_any_shape(
    layers: int, channels: int, bn_size: int | None, k: int, batch: int, spatial: list[int], mode: str
) -> None:
    shape = (batch, channels, *spatial)
    if batch * torch.Size(spatial).numel() == 1:
        return  # one value per channel: refused, as by F.batch_norm
    reference, fast = block_pair(layers, channels, bn_size, k, spatial_dims=len(spatial), recompute=mode)
    x = random_input(shape)
    # Two values per channel normalise to +-1 with a derivative that cancels to about eps: allow for that.
    assert_same(results(fast, x), results(reference, x), 1e-9 if x.numel() // channels > 4 else 1e-5)
