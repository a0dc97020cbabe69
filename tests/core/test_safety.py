"""Nothing is silently wrong: failures undo themselves, NaN survives, what is unknown runs the textbook path."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.blocks import assert_same, block_pair, random_input, results
from torch import nn
from torch.nn.utils import parametrizations

import fastdense
from fastdense.backends.torch_backend import TorchBackend
from fastdense.core import warn


@pytest.fixture(autouse=True)
def _forget_warnings() -> None:
    warn._said.clear()


class Failure(RuntimeError):
    pass


@pytest.mark.parametrize("at", [0, 3, 5])
def test_a_failed_call_changes_nothing(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, fast = block_pair(3, 6, 4, 4, drop_rate=0.2)
    x = random_input((2, 6, 4, 4))
    before = {name: value.clone() for name, value in fast.state_dict().items()}
    torch.manual_seed(11)
    rng = torch.get_rng_state()
    original, calls = TorchBackend.bn_relu_conv, iter(range(100))

    def fail(self: TorchBackend, *arguments: Any, **named: Any) -> Any:
        if next(calls) == at:
            raise Failure("out of memory")
        return original(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(TorchBackend, "bn_relu_conv", fail)
        with pytest.raises(Failure):
            fast(x)
    assert torch.equal(torch.get_rng_state(), rng)
    for name, value in fast.state_dict().items():
        assert torch.equal(value, before[name]), name
    first = fast(x)
    torch.manual_seed(11)
    fast.load_state_dict(before)
    assert torch.equal(fast(x), first)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("bn_size", [4, None])
@pytest.mark.parametrize("training", [True, False])
def test_one_bad_value_reaches_the_loss(training: bool, bn_size: int | None, value: float) -> None:
    reference, fast = block_pair(3, 6, bn_size, 4, change=lambda block: block.train(training))
    for position in ((0, 0, 0, 0), (1, 5, 3, 2)):
        x = random_input((2, 6, 4, 4)).detach()
        x[position] = value
        got, want = fast(x), reference(x)
        assert not torch.isfinite(got.sum())
        assert torch.equal(torch.isnan(got), torch.isnan(want))


def test_nan_gradients_survive() -> None:
    reference, fast = block_pair(2, 5, 4, 3)
    found = []
    for block in (reference, fast):
        x = random_input((2, 5, 4, 4))
        out = block(x)
        cotangent = torch.ones_like(out)
        cotangent[0, -1, 1, 1] = float("nan")
        out.backward(cotangent)
        found.append([torch.isnan(t.grad) for t in (x, *block.parameters())])
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


def _hook(block: nn.Module) -> None:
    block["denselayer2"].conv1.register_forward_hook(lambda module, inputs, output: output * 2)


def _pre_hook(block: nn.Module) -> None:
    block["denselayer1"].norm2.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))


def _backward_hook(block: nn.Module) -> None:
    block["denselayer2"].conv2.register_full_backward_hook(lambda module, grads, _: (grads[0] * 3,))


def _layer_hook(block: nn.Module) -> None:
    block["denselayer2"].register_forward_hook(lambda module, inputs, output: output - 1)


def _parametrization(block: nn.Module) -> None:
    parametrizations.weight_norm(block["denselayer2"].conv2)


def _other_activation(block: nn.Module) -> None:
    block["denselayer1"].relu2 = nn.PReLU(init=0.3, dtype=torch.float64)


def _other_norm(block: nn.Module) -> None:
    block["denselayer1"].norm1 = nn.GroupNorm(2, 6, dtype=torch.float64)


def _bias(block: nn.Module) -> None:
    torch.manual_seed(2)
    block["denselayer1"].conv2 = nn.Conv2d(16, 4, 3, padding=1, dtype=torch.float64)


def _groups(block: nn.Module) -> None:
    torch.manual_seed(2)
    block["denselayer1"].conv2 = nn.Conv2d(16, 4, 3, padding=1, groups=2, bias=False, dtype=torch.float64)


def _reflecting(block: nn.Module) -> None:
    block["denselayer1"].conv2.padding_mode = "reflect"


def _own_forward(block: nn.Module) -> None:
    layer = block["denselayer1"]
    original = layer.conv1.forward
    layer.conv1.forward = lambda h: original(h) + 1


def _mixed_dropout(block: nn.Module) -> None:
    block["denselayer2"].drop_channels = True


UNKNOWN: list[Callable[[nn.Module], None]] = [
    _hook, _pre_hook, _backward_hook, _layer_hook, _parametrization, _other_activation, _other_norm, _bias, _groups,
    _reflecting, _own_forward, _mixed_dropout,
]  # fmt: skip


@pytest.mark.parametrize("change", UNKNOWN)
def test_what_is_unknown_runs_the_textbook_path_and_says_so_once(change: Callable[[nn.Module], None]) -> None:
    reference, fast = block_pair(2, 6, 4, 4)
    for block in (reference, fast):
        change(block)
    x = random_input((2, 6, 4, 4))
    with pytest.warns(UserWarning, match="reference path"):
        got = results(fast, x)
    assert_same(got, results(reference, x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(x)


@pytest.mark.parametrize("change", UNKNOWN)
def test_an_explicit_backend_refuses_what_it_cannot_run(change: Callable[[nn.Module], None]) -> None:
    _, fast = block_pair(2, 6, 4, 4, impl="torch")
    change(fast)
    with pytest.raises(RuntimeError, match=r"impl='torch' cannot run this block.*impl='reference'"):
        fast(random_input((2, 6, 4, 4)))


def test_global_hooks_are_respected() -> None:
    _, fast = block_pair(2, 6, 4, 4)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        with pytest.warns(UserWarning, match="global module hook"):
            fast(random_input((2, 6, 4, 4)))
    finally:
        handle.remove()
    assert seen.count("Conv2d") == 4


def test_a_changed_layer_class_is_respected() -> None:
    class Louder(fastdense.DenseLayer):
        def forward(self, features: Any) -> torch.Tensor:
            return super().forward(features) * 2

    reference, fast = block_pair(2, 6, 4, 4)
    for block in (reference, fast):
        block["denselayer1"].__class__ = Louder
    x = random_input((2, 6, 4, 4))
    with pytest.warns(UserWarning, match="Louder"):
        assert_same(results(fast, x), results(reference, x))


def test_in_place_on_the_output_is_refused_by_autograd_or_right() -> None:
    _, fast = block_pair(2, 6, 4, 4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        fast(random_input((2, 6, 4, 4))).relu_().sum().backward()
    with torch.no_grad():
        x = random_input((2, 6, 4, 4))
        assert torch.equal(fast.eval()(x).relu_(), torch.relu(fast(x)))


def test_two_calls_share_no_memory() -> None:
    """The buffer belongs to one call: a second forward before the first backward changes nothing."""
    _, fast = block_pair(2, 6, 4, 4, change=lambda block: block.eval())
    x, other = random_input((2, 6, 4, 4)), random_input((2, 6, 4, 4)).detach() * 3
    (want,) = torch.autograd.grad(fast(x).square().sum(), x)
    first = fast(x)
    fast(other)
    (got,) = torch.autograd.grad(first.square().sum(), x)
    assert torch.equal(got, want)


def test_hooks_on_the_block_see_its_output() -> None:
    _, fast = block_pair(2, 6, 4, 4)
    seen: list[torch.Size] = []
    fast.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    fast.register_full_backward_hook(lambda module, grads, _: seen.append(grads[0].shape))
    fast(random_input((2, 6, 4, 4))).square().sum().backward()
    assert seen == [(2, 14, 4, 4), (2, 6, 4, 4)]
