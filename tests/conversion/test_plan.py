"""``plan``: what it lists, what it prints, and that its bytes are those that a step really keeps."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from helpers import foreign
from torch import nn

import fastdense


def make(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return foreign.Net(foreign.StarBlock, k=8, **options)


def test_entries() -> None:
    net = make()
    classes = [type(module) for module in net.modules()]
    entries = fastdense.plan(net)
    assert [type(module) for module in net.modules()] == classes
    assert [(e.name, e.kind, e.type, e.action, e.reason, e.layers) for e in entries] == [
        ("block1", "block", "StarBlock", "convert", "", 2),
        ("between", "transition", "Transition", "convert", "", 0),
        ("block2", "block", "StarBlock", "convert", "", 3),
    ]
    assert all(e.bytes_before is e.bytes_after is e.bytes_saved is None for e in entries)


def test_after_the_conversion() -> None:
    net = fastdense.convert(make(), filter_fn=lambda module, name: name != "block1")
    entries = fastdense.plan(net, (2, 3, 9, 6))
    assert [e.action for e in entries] == ["convert", "done", "done"]
    assert [e.type for e in entries] == ["StarBlock", "Transition", "StarBlock"]
    assert all(e.bytes_saved is not None and e.bytes_saved > 0 for e in entries)


def test_nothing_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert fastdense.plan(nn.Sequential(nn.Linear(2, 2))) == []
    assert "no dense blocks" in capsys.readouterr().out


@pytest.mark.parametrize("efficient", [False, True])
def test_bytes_are_those_that_a_step_keeps(efficient: bool) -> None:
    """Against ``saved_bytes`` of a real step of each block alone, before and after the conversion."""
    net = make(efficient=efficient)
    shape = (2, 3, 32, 24)
    entries = {e.name: e for e in fastdense.plan(net, shape)}
    inputs: dict[str, torch.Tensor] = {}
    for name in entries:
        net.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: inputs.update({name: args[0].detach().requires_grad_()})
        )
    net(torch.randn(shape))
    ours = fastdense.convert(copy.deepcopy(net))
    for name, entry in entries.items():
        x = inputs[name]
        if entry.kind == "transition":  # as a converted block hands it over
            x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        for model, planned in ((net, entry.bytes_before), (ours, entry.bytes_after)):
            module = model.get_submodule(name)
            with fastdense.memory.saved_bytes(module, x) as kept:
                output = module(x)
            storages = dict(kept.storages)
            if entry.kind == "block":
                storages[output.untyped_storage().data_ptr()] = output.untyped_storage().nbytes()
            assert planned == pytest.approx(sum(storages.values()), rel=0.01), name
        if entry.kind == "block" and not efficient:
            assert entry.bytes_before > 1.8 * entry.bytes_after


def test_a_model_that_needs_data_has_no_bytes() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x) if float(x.sum()) > 0 else x

    entries = fastdense.plan(Picky(), (2, 3, 9, 6))
    assert [(e.action, e.bytes_saved) for e in entries] == [("convert", None)] * 3


@pytest.mark.parametrize("rich", [True, False])
def test_the_table(rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
        monkeypatch.setitem(sys.modules, "rich.table", None)
    net = nn.Sequential(make(), foreign.NewestFirstBlock(3, 6, 4))
    fastdense.plan(net[0], (2, 3, 16, 12))
    fastdense.plan(net)
    printed = capsys.readouterr().out
    for part in ("Net", "(2, 3, 16, 12)", "0.block1", "StarBlock", "convert", "skip", "order", "MB", "together"):
        assert part in printed, part
    assert ("│" in printed) == rich
