"""``plan``: what it lists, what it prints, and that its bytes are those that a step really saves."""

import copy
import sys
import warnings
from typing import Any

import pytest
import torch
from helpers import foreign
from helpers.blocks import assert_same, random_input, results
from helpers.converted import kinds, twins, types
from torch import nn

import fastdense

pytestmark = pytest.mark.quick


def make(**options: Any) -> Any:
    return foreign.Net(foreign.StarBlock, k=8, **options)


def test_entries_before_and_after_the_conversion_and_where_the_stem_lost_a_child() -> None:
    net = make()
    classes = types(net)
    entries = fastdense.plan(net)
    assert types(net) == classes
    assert [(e.name, e.kind, e.type, e.action, e.reason, e.layers) for e in entries] == [
        ("block1", "block", "StarBlock", "convert", "", 2),
        ("between", "transition", "Transition", "convert", "", 0),
        ("block2", "block", "StarBlock", "convert", "", 3),
    ]
    assert all(e.bytes_before is e.bytes_after is e.bytes_saved is None for e in entries)

    fastdense.convert(net, filter_fn=lambda module, name: name != "block1")
    entries = fastdense.plan(net, (2, 3, 9, 6))
    assert [(e.type, e.action) for e in entries] == [
        ("StarBlock", "convert"), ("Transition", "done"), ("StarBlock", "done")
    ]  # fmt: skip
    assert all(e.bytes_saved > 0 for e in entries)
    net = fastdense.convert(foreign.Features())
    del net.features.norm0
    assert [e.bytes_saved is None for e in fastdense.plan(net, (2, 3, 16, 12))] == [True, False, False, False]


@pytest.mark.parametrize("efficient", [False, True], ids=["plain", "efficient"])
def test_bytes_are_those_that_a_step_saves(efficient: bool) -> None:
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
            with fastdense.memory.saved_bytes(module, x) as saved:
                output = module(x)
            storages = dict(saved.storages)
            if entry.kind == "block":
                storages[output.untyped_storage().data_ptr()] = output.untyped_storage().nbytes()
            assert planned == pytest.approx(sum(storages.values()), rel=0.01), name
        if entry.kind == "block" and not efficient:
            assert entry.bytes_before > 1.8 * entry.bytes_after


@pytest.mark.parametrize("done", [False, True], ids=["to convert", "done"])
def test_bytes_of_a_stem_are_those_that_a_step_saves(done: bool) -> None:
    theirs, ours = twins(foreign.Features(), impl="torch")
    shape = (2, 3, 32, 24)
    entry = fastdense.plan(ours if done else theirs, shape)[0]
    assert (entry.name, entry.kind, entry.type) == ("features", "stem", "Sequential")
    assert (entry.action, entry.layers) == ("done" if done else "convert", 0)
    x = theirs.features.conv0(torch.randn(shape)).detach().requires_grad_()
    found = []
    for model in (theirs, ours):
        for name in [name for name in model.features._modules if name not in ("norm0", "relu0", "pool0")]:
            delattr(model.features, name)
        with fastdense.memory.saved_bytes(model.features) as saved:
            model.features(x)
        found.append(saved.bytes)
    assert [entry.bytes_before, entry.bytes_after] == pytest.approx(found, rel=0.01)
    assert entry.bytes_before > 2.2 * entry.bytes_after  # three maps (a quarter of the indices' size) against one
    map_ = 4 * 2 * 6 * 32 * 24
    assert map_ < entry.bytes_after < 1.02 * map_


@pytest.mark.parametrize("change", ["none", "bias", "groups", "overlap", "rim"])
def test_what_a_transition_saves(change: str) -> None:
    """Its input alone, which is the block's output; where the operator cannot take it, the pooled map as well."""
    net = foreign.Transition(12, 6)
    if change in ("bias", "groups"):
        net[2] = nn.Conv2d(12, 6, 1, bias=change == "bias", groups=3 if change == "groups" else 1)
    elif change != "none":
        net[3] = nn.AvgPool2d(3, 2) if change == "overlap" else nn.AvgPool2d(2, ceil_mode=True)
    theirs, ours = twins(net.double())
    assert kinds(ours) == {"": "transition"}
    for layout in ("contiguous", "slice", "channels_last"):
        x = random_input((3, 12, 9, 7), layout=layout)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_same(results(ours, x), results(theirs, x))
    with fastdense.memory.saved_bytes(ours, x) as saved:
        ours(x)
    assert (saved.bytes < 8 * 3 * 12) == (change == "none"), saved.bytes


def test_a_model_that_needs_data_has_no_bytes() -> None:
    class Picky(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if float(x.sum()) > 0 else x

    entries = fastdense.plan(Picky(make()), (2, 3, 9, 6))
    assert [(e.action, e.bytes_saved) for e in entries] == [("convert", None)] * 3


@pytest.mark.parametrize("rich", [True, False], ids=["rich", "plain"])
def test_the_table(rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
        monkeypatch.setitem(sys.modules, "rich.table", None)
    net = nn.Sequential(make(), foreign.UNSUPPORTED["output newest first"][0](3, 6, 4))
    fastdense.plan(net[0], (2, 3, 16, 12))
    fastdense.plan(net)
    assert fastdense.plan(nn.Sequential(nn.Linear(2, 2))) == []
    printed = capsys.readouterr().out
    parts = ("Net", "(2, 3, 16, 12)", "0.block1", "StarBlock", "convert", "skip", "order", "MB", "together")
    for part in (*parts, "no dense blocks"):
        assert part in printed, part
    assert ("│" in printed) == rich
