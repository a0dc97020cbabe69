"""Bytes: what is saved for backward, at the plan; ``peak_bytes`` by hand, and the bound on a training step's peak."""

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.blocks import MODES, assert_close, calls_of, random_input, results
from helpers.pooled import KINDS, PARTS, Case, pair, part
from torch import nn

import fastdense
from benchmarks.micro.host import host_side
from fastdense import DenseBlock, memory, ops
from fastdense.backends.torch_backend import TorchBackend
from fastdense.memory import peak_bytes, saved_bytes
from fastdense.recompute import network_sizes


def saved(block: nn.Module, x: torch.Tensor) -> int:
    with memory.saved_bytes(block) as found:
        output = block(x)
    del output
    return found.bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bn_size", [4, None])
@pytest.mark.parametrize("layers", [6, 50])
def test_a_block_saves_what_is_planned(layers: int, bn_size: int | None, mode: str, dtype: torch.dtype) -> None:
    """The block's buffer, and every bottleneck unless it is recomputed: linear in depth."""
    block = DenseBlock(layers, 24, bn_size, 12, recompute=mode, dtype=dtype)
    bottlenecks = layers * bn_size * 12 if bn_size is not None and mode == "activations" else 0
    want = 1024 * (24 + layers * 12 + bottlenecks) * dtype.itemsize
    assert want <= saved(block, torch.randn(16, 24, 8, 8, dtype=dtype, requires_grad=True)) <= 1.03 * want


def test_what_lies_below_the_first_layer_that_learns_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No bottleneck is saved, no channel of the gradient's scratch allocated, no layer differentiated."""
    block = DenseBlock(8, 16, 4, 8)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name.startswith(("denselayer7", "denselayer8")))
    x = torch.randn(4, 16, 16, 16)
    want = 1024 * (16 + 8 * 8 + 2 * 32) * 4
    assert want <= saved(block, x) <= 1.03 * want
    calls = calls_of(monkeypatch, ops.dense_block.schedule, "backward")
    convolutions = calls_of(monkeypatch, TorchBackend, "bn_relu_conv_backward")
    block(x).square().sum().backward()
    assert [(G.start, G.D.shape[1]) for _, G, *_ in calls] == [(16 + 6 * 8, 16)]  # the last two layers' own output
    visited = [tuple(conv.weight.shape[:2]) for _, _, _, conv, *_ in convolutions]
    assert visited == [(8, 32), (32, 72), (8, 32), (32, 64)]  # 3x3 and 1x1 of the last layer and of the one before


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


def test_a_shared_storage_is_counted_once() -> None:
    x = torch.randn(100, requires_grad=True)
    with memory.saved_bytes() as found:
        y = x.exp().view(10, 10)
        z = y.square() + y.view(20, 5).sin().view(10, 10)
    assert found.bytes == 400 and z.shape == (10, 10)


def test_free_bytes_is_plausible() -> None:
    assert 1 << 20 < memory.free_bytes(torch.device("cpu")) <= 1 << 62


MB = 1 << 20
ALLOWANCE = 32 * MB  # what does not grow with the network


def block(size: int) -> torch.Tensor:
    return torch.empty(size * MB, dtype=torch.uint8)


@torch.library.custom_op("fastdense_tests::with_scratch", mutates_args=())
def with_scratch(x: torch.Tensor) -> torch.Tensor:
    scratch = torch.empty(5 * MB, dtype=torch.uint8)
    return x + scratch.new_zeros(1)


def test_the_peak_is_what_lives_together() -> None:
    with peak_bytes("cpu") as peak:
        held = [block(1), block(2), block(3)]
    assert (peak.bytes, peak.at_peak(), len(held)) == (6 * MB, [3 * MB, 2 * MB, MB], 3)
    before = block(7)
    with peak_bytes("cpu") as peak:
        first = block(4)
        del first
        second = block(3)
        del before  # what was there at the start takes nothing off
        third = block(2)
        del second, third
        last = block(1)
    assert (peak.bytes, peak.at_peak(), last.nbytes) == (5 * MB, [3 * MB, 2 * MB], MB)
    with peak_bytes("cpu") as peak:
        result = with_scratch(last)
    assert 6 * MB <= peak.bytes <= 6 * MB + 1024  # a custom operator's scratch and its result
    assert result.nbytes == MB


def test_gradients_are_left_aside_where_asked() -> None:
    """Those that are alive, not what lay at their addresses before."""
    x = torch.zeros(MB // 4, requires_grad=True)
    with peak_bytes("cpu") as peak:
        x.exp().backward(torch.ones(MB // 4))  # y, the cotangent, x.grad
    assert (peak.bytes, peak.without(x), x.grad is None) == (3 * MB, 2 * MB, False)
    weight = torch.nn.Linear(512, 512, bias=False)  # 1 MB
    with peak_bytes("cpu") as peak:
        for _ in range(3):  # memory that the gradient may get later
            del (scratch := [block(1), block(1)])[:]
        weight(torch.ones(1, 512)).sum().backward()
    assert scratch == []
    assert 2 * MB <= peak.without(weight) < 2.1 * MB
    assert peak.bytes >= peak.without(weight)


def test_cuda_takes_the_allocators_counter_and_other_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"CUDA device or the CPU, got 'meta'"), peak_bytes("meta"):
        pass
    counter = {"allocated": 100, "peak": 5000}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: counter.update(peak=counter["allocated"]))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: counter["allocated"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: counter["peak"])
    with peak_bytes("cuda:0") as peak:
        counter["peak"] = 350
    assert (peak.bytes, peak.at_peak()) == (250, [])
    with pytest.raises(RuntimeError, match="allocate them before"):
        peak.without(torch.ones(1))


def dense_net(dims: int, *arguments: Any, **named: Any) -> Callable[[str], nn.Module]:
    options = {"num_classes": 3, "spatial_dims": dims, "in_channels": 3 if dims == 2 else 1, **named}
    return lambda mode: fastdense.DenseNet(*arguments, recompute=mode, impl="torch", **options)


NETWORKS: dict[str, tuple[Callable[[str], nn.Module], tuple[int, ...]]] = {
    "three blocks": (dense_net(2, 12, (4, 8, 4), 24), (24, 3, 224, 224)),
    "one large image": (dense_net(2, 16, (3, 3), 32), (1, 3, 1024, 1024)),
    "CIFAR": (dense_net(2, 12, (8, 8, 8), 24, small_inputs=True), (16, 3, 32, 32)),
    "basic": (dense_net(2, 8, (4, 4), 16, small_inputs=True, bn_size=None), (8, 3, 112, 112)),
    "3D": (dense_net(3, 16, (3, 4), 32), (4, 1, 32, 48, 48)),
    "one large volume": (dense_net(3, 16, (3, 4), 32), (1, 1, 96, 96, 96)),
    "DenseNet-121": (dense_net(2), (8, 3, 224, 224)),
    "DenseNet-201": (dense_net(2, 32, (6, 12, 48, 32), 64), (2, 3, 224, 224)),
}
DOMINATED = ("three blocks", "one large image", "DenseNet-121")  # by what grows with the network, not by the 32 MB


def largest_backward(network: nn.Module, x: torch.Tensor) -> int:
    """Bytes of ``2*m*C + 3*m*B`` of the block where that is most; ``B`` is 0 without bottleneck."""
    sizes = network_sizes(network, x)[0].values()
    return max(b.pixels * (2 * b.channels + 3 * max(b.bottlenecks, default=0)) * b.itemsize for b in sizes)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.minutes if "-" in name else ()) for name in NETWORKS]
)
def test_the_peak_of_a_training_step_is_bounded(name: str, mode: str) -> None:
    """At most what is saved, ``2*m*C + 3*m*B`` elements for the block where that is most, and 32 MB, on both backends.

    Saved: ``saved_bytes`` of the forward pass. Peak: ``peak_bytes`` of forward and backward, ``without`` the
    parameters' gradients; parameters, buffers and the input exist before. ``2*m*C``: the gradient that arrives at the
    block, and ``D``. ``3*m*B``: ``D`` of a bottleneck, a bottleneck that is computed again, the gradient handed on.
    32 MB: what is worked on in chunks, and moments, sums and weights' gradients. Of the Triton backend everything runs
    but its launches, which allocate nothing: memory comes from PyTorch, as much as for an H100.
    """
    build, shape = NETWORKS[name]
    network = build(mode)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    labels = torch.zeros(shape[0], dtype=torch.int64)
    allowed, saved = largest_backward(network, x) + ALLOWANCE, 0
    for impl in ("torch", "triton"):
        network.zero_grad()
        with host_side() if impl == "triton" else nullcontext(), peak_bytes("cpu") as peak:
            with saved_bytes(network, x, labels) if impl == "torch" else nullcontext() as found:
                loss = F.cross_entropy(network(x), labels)
            loss.backward()
        del loss
        if found is not None:
            saved = found.bytes
        needed = peak.without(network)
        figures = f"saved {saved / 1e6:.1f} MB, peak {needed / 1e6:.1f} MB, allowed {(saved + allowed) / 1e6:.1f} MB"
        print(name, mode, impl, figures)
        live = [f"{size / 1e6:.1f}" for size in peak.at_peak()[:40]]
        assert needed <= saved + allowed, f"{impl}: {figures}; alive at the peak [MB]: {live}"
        assert needed >= saved, "everything that is saved was there at the end of the forward pass"
    if name in DOMINATED:
        assert saved + allowed > 5 * ALLOWANCE
