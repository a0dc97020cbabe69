"""What a block does not know runs the reference path, and says so; what is the user's stays the user's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.blocks import assert_same, block_pair, random_input, results, says_once
from torch import nn
from torch.nn.utils import parametrizations

import fastdense
from fastdense.core import warn


@pytest.fixture(autouse=True)
def _forget_warnings() -> None:
    warn._said.clear()


def new_conv2(**options: Any) -> Callable[[nn.Module], None]:
    def change(block: nn.Module) -> None:
        torch.manual_seed(2)
        block["denselayer1"].conv2 = nn.Conv2d(16, 4, 3, padding=1, dtype=torch.float64, **options)

    return change


def own_forward(block: nn.Module) -> None:
    conv = block["denselayer1"].conv1
    original = conv.forward
    conv.forward = lambda h: original(h) + 1


class Louder(fastdense.DenseLayer):
    def forward(self, features: Any) -> torch.Tensor:
        return super().forward(features) * 2


# What it is, and what the warning says of it.
UNKNOWN: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "hook": (
        "hook", lambda b: b["denselayer2"].conv1.register_forward_hook(lambda module, inputs, output: output * 2)
    ),
    "pre-hook": (
        "hook", lambda b: b["denselayer1"].norm2.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    ),
    "backward hook": (
        "hook", lambda b: b["denselayer2"].conv2.register_full_backward_hook(lambda module, grads, _: (grads[0] * 3,))
    ),
    "layer's hook": ("hook", lambda b: b["denselayer2"].register_forward_hook(lambda module, inputs, output: -output)),
    "parametrization": ("Parametrized", lambda b: parametrizations.weight_norm(b["denselayer2"].conv2)),
    "activation": ("PReLU", lambda b: setattr(b["denselayer1"], "relu2", nn.PReLU(init=0.3, dtype=torch.float64))),
    "norm": ("GroupNorm", lambda b: setattr(b["denselayer1"], "norm1", nn.GroupNorm(2, 6, dtype=torch.float64))),
    "bias": ("bias", new_conv2()),
    "groups": ("groups", new_conv2(groups=2, bias=False)),
    "padding": ("reflect", new_conv2(padding_mode="reflect", bias=False)),
    "own forward": ("forward of its own", own_forward),
    "class of a layer": ("Louder", lambda b: setattr(b["denselayer1"], "__class__", Louder)),
    "dropout of some layers": ("drops whole channels", lambda b: setattr(b["denselayer2"], "drop_channels", True)),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_unknown_runs_the_reference_path_and_says_so_once(name: str) -> None:
    reason, change = UNKNOWN[name]
    reference, fast = block_pair(2, 6, 4, 4)
    for block in (reference, fast):
        change(block)
    x = random_input((2, 6, 4, 4))
    assert_same(says_once(fast, x, lambda: results(fast, x), f"reference path.*{reason}"), results(reference, x))
    fast.impl = "torch"
    with pytest.raises(RuntimeError, match=rf"impl='torch' cannot run this block.*{reason}.*impl='reference'"):
        fast(x)


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
