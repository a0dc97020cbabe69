"""Bytes saved for backward: at the plan, linear in depth, nothing hidden from saved-tensor hooks."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers.blocks import MODES, assert_close, random_input, results
from helpers.pooled import KINDS, PARTS, Case, pair, part
from torch import nn

from fastdense import DenseBlock, memory, ops


def saved(block: nn.Module, x: torch.Tensor) -> int:
    with memory.saved_bytes(block) as found:
        output = block(x)
    del output
    return found.bytes


def plan(layers: int, channels: int, bn_size: int | None, k: int, m: int, mode: str, element: int = 4) -> int:
    """The block's buffer, and every bottleneck unless it is recomputed."""
    bottlenecks = layers * bn_size * k if bn_size is not None and mode == "activations" else 0
    return m * (channels + layers * k + bottlenecks) * element


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bn_size", [4, None])
@pytest.mark.parametrize("layers", [6, 24])
def test_a_block_saves_what_is_planned(layers: int, bn_size: int | None, mode: str, dtype: torch.dtype) -> None:
    block = DenseBlock(layers, 64, bn_size, 32, recompute=mode, dtype=dtype)
    x = torch.randn(4, 64, 16, 16, dtype=dtype, requires_grad=True)  # m = 1,024
    want = plan(layers, 64, bn_size, 32, 1024, mode, dtype.itemsize)
    assert want <= saved(block, x) <= 1.03 * want


@pytest.mark.parametrize("mode", MODES)
def test_saved_bytes_are_linear_in_depth(mode: str) -> None:
    x = torch.randn(16, 24, 8, 8, requires_grad=True)
    small, large = (saved(DenseBlock(layers, 24, 4, 12, recompute=mode), x) for layers in (75, 150))
    assert large / small < 2.15
    assert large <= 1.03 * plan(150, 24, 4, 12, 1024, mode)


def test_a_block_saves_no_bottleneck_below_the_first_layer_that_learns() -> None:
    block = DenseBlock(8, 16, 4, 8)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name.startswith(("denselayer7", "denselayer8")))
    want = 1024 * (16 + 8 * 8 + 2 * 32) * 4
    assert want <= saved(block, torch.randn(4, 16, 16, 16)) <= 1.03 * want


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_saves_its_input_and_two_vectors(kind: str, training: bool, dtype: torch.dtype, layout: str) -> None:
    """A contiguous input goes through a channels-last copy, and then that is saved instead."""
    case = Case(kind, (4, 32, 16, 16), 3 if kind == "stem" else 2, 2, 1 if kind == "stem" else 0, out=16)
    _, fast = pair(case, dtype=dtype, change=lambda stage: stage.train(training))
    x = random_input(case.shape, dtype=dtype, layout=layout)
    with memory.saved_bytes(*([fast, x] if layout == "channels_last" else [fast])) as found:
        y = fast(x)
    vectors = 2 * 32 * 4 if training else 0
    assert found.bytes == vectors + (0 if layout == "channels_last" else x.nbytes)
    assert y.requires_grad


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", PARTS)
def test_nothing_is_saved_without_gradients(name: str, context: type) -> None:
    reference, fast, x = part(name)
    x = x.detach()
    with context(), memory.saved_bytes() as found:
        y = fast(x)
        assert_close("output", y, reference(x))
    assert found.bytes == 0 and not y.requires_grad
    for key, buffer in fast.named_buffers():
        assert_close(key, buffer, reference.get_buffer(key))


@pytest.mark.parametrize("name", PARTS)
def test_backward_takes_what_saved_tensor_hooks_return(name: str) -> None:
    _, fast, x = part(name)
    want = results(fast, x)
    with torch.autograd.graph.save_on_cpu():
        got = results(fast, x)
    for key, value in want.items():
        assert torch.equal(got[key], value) or not key.endswith(("output", "grad")), key


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("name", PARTS)
def test_the_graph_does_not_keep_itself_alive(name: str, counted: bool) -> None:
    _, fast, x = part(name)
    fast(x)  # PyTorch's first call of an operator leaves cycles of its own
    gc.disable()
    try:
        x = x.detach().requires_grad_()
        with memory.saved_bytes(fast) if counted else nullcontext():
            output = fast(x)
        alive = [weakref.ref(o) for o in (output, output.untyped_storage(), output.grad_fn, x)]
        del output, x
        assert [reference() for reference in alive] == [None] * 4
    finally:
        gc.enable()


def test_gradient_scratch_covers_only_the_channels_that_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    block = DenseBlock(8, 16, 4, 8)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name.startswith("denselayer8"))
    starts = []
    original = ops.dense_block.schedule.backward

    def spy(be: Any, G: Any, *rest: Any, **named: Any) -> Any:
        starts.append((G.start, G.D.shape[1]))
        return original(be, G, *rest, **named)

    monkeypatch.setattr(ops.dense_block.schedule, "backward", spy)
    block(torch.randn(2, 16, 5, 5)).square().sum().backward()
    assert starts == [(16 + 7 * 8, 8)]  # the last layer's own output


def test_a_shared_storage_is_counted_once() -> None:
    x = torch.randn(100, requires_grad=True)
    with memory.saved_bytes() as found:
        y = x.exp()
        z = y.view(10, 10).square() + y.view(10, 10).sin()
    assert found.bytes == 400
    assert z.shape == (10, 10)


def test_free_bytes_is_plausible() -> None:
    assert 1 << 20 < memory.free_bytes(torch.device("cpu")) <= 1 << 62
