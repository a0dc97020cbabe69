"""Bytes saved for backward: at the plan, linear in depth, nothing hidden from saved-tensor hooks."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import fastdense


def kept(block: nn.Module, x: torch.Tensor) -> int:
    with fastdense.memory.saved_bytes(block) as saved:
        output = block(x)
    del output
    return saved.bytes


def plan(layers: int, channels: int, bn_size: int | None, k: int, m: int, mode: str, element: int = 4) -> int:
    """The block's buffer, and every bottleneck unless it is recomputed."""
    bottlenecks = layers * bn_size * k if bn_size is not None and mode == "activations" else 0
    return m * (channels + layers * k + bottlenecks) * element


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["activations", "bottlenecks"])
@pytest.mark.parametrize("bn_size", [4, None])
@pytest.mark.parametrize("layers", [6, 24])
def test_at_the_plan(layers: int, bn_size: int | None, mode: str, dtype: torch.dtype) -> None:
    block = fastdense.DenseBlock(layers, 64, bn_size, 32, recompute=mode, dtype=dtype)
    x = torch.randn(4, 64, 16, 16, dtype=dtype, requires_grad=True)  # m = 1,024
    want = plan(layers, 64, bn_size, 32, 1024, mode, dtype.itemsize)
    assert want <= kept(block, x) <= 1.03 * want


@pytest.mark.parametrize("mode", ["activations", "bottlenecks"])
def test_linear_in_depth(mode: str) -> None:
    x = torch.randn(16, 24, 8, 8, requires_grad=True)
    small, large = (kept(fastdense.DenseBlock(layers, 24, 4, 12, recompute=mode), x) for layers in (250, 500))
    assert large / small < 2.15
    assert large <= 1.03 * plan(500, 24, 4, 12, 1024, mode)


def test_several_times_less_than_the_textbook() -> None:
    x = torch.randn(4, 64, 16, 16, requires_grad=True)
    textbook, activations, bottlenecks = (
        kept(block, x)
        for block in (
            fastdense.reference.ConcatDenseBlock(24, 64, 4, 32),
            fastdense.DenseBlock(24, 64, 4, 32),
            fastdense.DenseBlock(24, 64, 4, 32, memory_efficient=True),
        )
    )
    assert textbook > 6 * activations
    assert textbook > 25 * bottlenecks


def test_nothing_is_kept_below_the_first_layer_that_learns() -> None:
    block = fastdense.DenseBlock(8, 16, 4, 8)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name.startswith(("denselayer7", "denselayer8")))
    x = torch.randn(4, 16, 16, 16)
    want = 1024 * (16 + 8 * 8 + 2 * 32) * 4
    assert want <= kept(block, x) <= 1.03 * want


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_without_gradients(context: type) -> None:
    block = fastdense.DenseBlock(4, 16, 4, 8)
    with context():
        assert kept(block, torch.randn(4, 16, 16, 16)) == 0


def test_saved_tensor_hooks_see_everything() -> None:
    """What hooks offload is all that backward needs: corrupting what they return corrupts the gradient."""
    block = fastdense.DenseBlock(3, 8, 4, 4, dtype=torch.float64)
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.save_on_cpu():
        block(x).square().sum().backward()
    want = x.grad.clone()
    x.grad = None
    block(x).square().sum().backward()
    assert torch.equal(x.grad, want)


def test_the_graph_does_not_keep_itself_alive() -> None:
    block = fastdense.DenseBlock(3, 8, 4, 4)
    block(torch.randn(2, 8, 5, 5, requires_grad=True))  # PyTorch's first call of an operator leaves cycles of its own
    gc.disable()
    try:
        output = block(torch.randn(2, 8, 5, 5, requires_grad=True))
        alive = weakref.ref(output)
        del output
        assert alive() is None
    finally:
        gc.enable()


def test_counting_does_not_keep_the_graph_alive() -> None:
    block = fastdense.DenseBlock(3, 8, 4, 4)
    block(torch.randn(2, 8, 5, 5, requires_grad=True))  # PyTorch's first call of an operator leaves cycles of its own
    gc.disable()
    try:
        with fastdense.memory.saved_bytes(block):
            output = block(torch.randn(2, 8, 5, 5, requires_grad=True))
        alive = weakref.ref(output.untyped_storage())
        node = weakref.ref(output.grad_fn)
        del output
        assert node() is None and alive() is None
    finally:
        gc.enable()


def test_gradient_scratch_covers_only_the_channels_that_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    block = fastdense.DenseBlock(8, 16, 4, 8)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name.startswith("denselayer8"))
    starts = []
    original = fastdense.ops.dense_block.schedule.backward

    def spy(be: Any, G: Any, *rest: Any, **named: Any) -> Any:
        starts.append((G.start, G.D.shape[1]))
        return original(be, G, *rest, **named)

    monkeypatch.setattr(fastdense.ops.dense_block.schedule, "backward", spy)
    block(torch.randn(2, 16, 5, 5)).square().sum().backward()
    assert starts == [(16 + 7 * 8, 8)]  # the last layer's own output


def test_saved_bytes_counts_a_shared_storage_once() -> None:
    x = torch.randn(100, requires_grad=True)
    with fastdense.memory.saved_bytes() as saved:
        y = x.exp()
        z = y.view(10, 10).square() + y.view(10, 10).sin()
    assert saved.bytes == 400
    assert z.shape == (10, 10)


def test_automatic_mode_follows_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    block = fastdense.DenseBlock(4, 16, 4, 8, recompute="auto")
    x = torch.randn(4, 16, 16, 16, requires_grad=True)
    for free, mode in ((1 << 40, "activations"), (1 << 10, "bottlenecks")):
        monkeypatch.setattr(fastdense.memory, "free_bytes", lambda device, free=free: free)
        assert kept(block, x) <= 1.03 * plan(4, 16, 4, 8, 1024, mode)
        assert kept(block, x) >= plan(4, 16, 4, 8, 1024, mode)


def test_free_bytes_is_plausible() -> None:
    assert 1 << 20 < fastdense.memory.free_bytes(torch.device("cpu")) <= 1 << 62
