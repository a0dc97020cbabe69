"""What may happen to a converted stem: while it is what it was it runs fused, else its modules are called."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.blocks import assert_same, random_input, results, says_once
from helpers.converted import stem_pair as pair
from torch import nn

import fastdense
from fastdense.conversion.converted import Converted

Change = Callable[[Any], None]


def _hook_on(name: str) -> Change:
    def change(net: Any) -> None:
        getattr(net.features, name).register_forward_hook(lambda m, i, output: output + 0.5)

    change.__name__ = f"hook on {name}"
    return change


def _pre_hook(net: Any) -> None:
    net.features.norm0.register_forward_pre_hook(lambda m, inputs: (inputs[0] * 2,))


def _backward_hook(net: Any) -> None:
    net.features.pool0.register_full_backward_hook(lambda m, grads, _: (grads[0] * 3,))


def _average(net: Any) -> None:
    net.features.pool0 = nn.AvgPool2d(3, 2, 1)


def _no_pooling(net: Any) -> None:
    net.features.pool0 = nn.Identity()


def _without_pooling(net: Any) -> None:
    del net.features.pool0


def _without_norm(net: Any) -> None:
    del net.features.norm0


def _other_activation(net: Any) -> None:
    net.features.relu0 = nn.SiLU()


def _other_norm(net: Any) -> None:
    net.features.norm0 = nn.GroupNorm(2, 6, dtype=torch.float64)


def _own_forward(net: Any) -> None:
    pool = net.features.pool0
    pool.forward = lambda x, original=pool.forward: original(x) * 2


def _dilated(net: Any) -> None:
    net.features.pool0.dilation = 2


def _over_the_rim(net: Any) -> None:
    net.features.pool0.ceil_mode = True


def _between(net: Any) -> None:
    items = list(net.features._modules.items())
    net.features._modules.clear()
    for name, child in items:
        net.features.add_module(name, child)
        if name == "norm0":
            net.features.add_module("extra", nn.AvgPool2d(3, 1, 1))


def _other_order(net: Any) -> None:
    relu = net.features.relu0
    del net.features.relu0
    first = [("conv0", net.features.conv0), ("relu0", relu)]
    net.features._modules = dict([*first, *net.features._modules.items()])


FALLS = [
    *map(_hook_on, ("norm0", "relu0", "pool0")), _pre_hook, _backward_hook, _average, _no_pooling, _without_pooling,
    _without_norm, _other_activation, _other_norm, _own_forward, _dilated, _over_the_rim, _between, _other_order,
]  # fmt: skip


@pytest.mark.parametrize("change", FALLS, ids=lambda change: change.__name__)
def test_a_changed_stem_is_called_and_said_once(change: Change, fused: list[tuple[int, ...]]) -> None:
    theirs, ours, x = pair()
    change(theirs), change(ours)
    fused.clear()
    got = says_once(ours, x, lambda: results(ours, x), "reference path.*: stem: ")
    want = results(theirs, x)
    assert_same({key: got[key] for key in want}, want)
    assert fused == []


@pytest.mark.parametrize("change", FALLS[:3])
def test_an_explicit_backend_refuses(change: Change) -> None:
    _, ours, x = pair(impl="torch")
    change(ours)
    with pytest.raises(RuntimeError, match=r"impl='torch' cannot run this block: stem: .*impl='reference'"):
        ours(x)


def _longer(net: Any) -> None:
    net.features.add_module("last", nn.AvgPool2d(3, 1, 1))


def _shorter(net: Any) -> None:
    del net.features.norm5
    torch.manual_seed(1)
    net.features.add_module("last", nn.Conv2d(17, 17, 1, dtype=torch.float64))


def _other_convolution(net: Any) -> None:
    torch.manual_seed(1)
    net.features.conv0 = nn.Conv2d(3, 6, 5, stride=2, padding=2, dtype=torch.float64)


def _same_types(net: Any) -> None:
    torch.manual_seed(1)
    net.features.norm0 = nn.BatchNorm2d(6, eps=1e-2, momentum=0.3, dtype=torch.float64)
    net.features.pool0 = nn.MaxPool2d(2)


def _other_attributes(net: Any) -> None:
    net.features.norm0.eps, net.features.norm0.momentum = 0.1, None
    net.features.pool0.kernel_size, net.features.pool0.padding = 5, (2, 1)


def _hooks_elsewhere(net: Any) -> None:
    net.features.register_forward_hook(lambda m, i, output: output * 2)
    net.features.conv0.register_forward_hook(lambda m, i, output: output + 1)
    net.features.transition1.register_forward_pre_hook(lambda m, inputs: (inputs[0] * 2,))
    net.features.norm5.register_full_backward_hook(lambda m, grads, _: (grads[0] * 3,))


def _untracked(net: Any) -> None:
    net.features.norm0 = nn.BatchNorm2d(6, track_running_stats=False, affine=False, dtype=torch.float64)


STAYS = [_longer, _shorter, _other_convolution, _same_types, _other_attributes, _hooks_elsewhere, _untracked]


@pytest.mark.parametrize("change", STAYS)
def test_other_changes_leave_it_fused(change: Change, fused: list[tuple[int, ...]]) -> None:
    theirs, ours, x = pair()
    change(theirs), change(ours)
    fused.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(results(ours, x), results(theirs, x))
    assert len(fused) == 1


def test_fused_again_once_the_hook_is_gone(fused: list[tuple[int, ...]]) -> None:
    _, ours, x = pair()
    handle = ours.features.relu0.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="stem: its child 'relu0' carries a hook"):
        ours(x)
    handle.remove()
    fused.clear()
    ours(x)
    assert len(fused) == 1


@pytest.mark.parametrize("part", [slice(None, 2), slice(None, 4), slice(None, 6), slice(2, None), slice(4, None)])
def test_slices(part: slice) -> None:
    """They have no plan of their own; the blocks in them are converted still."""
    theirs, ours, x = pair()
    ours, theirs = ours.features[part], theirs.features[part]
    x = x if part.start is None else random_input((2, 6, 9, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # A leaf does not let a ReLU work in place.
        assert_same(
            results(ours, x, forward=lambda x: ours(x * 1)), results(theirs, x, forward=lambda x: theirs(x * 1))
        )
    blocks = fastdense.plan(ours)
    assert [entry.action for entry in blocks] == ["done"] * len(blocks)
    assert len(blocks) == sum(isinstance(module, Converted) for module in ours.children())
    original = fastdense.revert(ours)
    assert [type(module) for module in original.modules()] == [type(module) for module in theirs.modules()]
