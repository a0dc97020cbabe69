"""A converted network that is changed later: what cannot run fused runs the original code, said once, never wrongly."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import foreign
from helpers.blocks import assert_close, assert_same, random_input, results, says_once
from helpers.converted import kinds, pair, twins, types
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastdense

pytestmark = pytest.mark.quick

Change = Callable[[Any], Any]


def together(*changes: Change) -> Change:
    return lambda net: [change(net) for change in changes]


HOOKS: dict[str, Change] = {
    "forward_hook": lambda module, inputs, output: output * 2 + 0.5,
    "forward_pre_hook": lambda module, inputs: (inputs[0] * 2 + 1,),
    "full_backward_hook": lambda module, grads, _: (grads[0] * 3,),
    "full_backward_pre_hook": lambda module, grads: (grads[0] * 3,),
}


def hook(path: str, kind: str = "forward_hook") -> Change:
    return lambda net: getattr(net.get_submodule(path), f"register_{kind}")(HOOKS[kind])


def replaced(path: str, make: Callable[[], nn.Module]) -> Change:
    parent, _, name = path.rpartition(".")

    def change(net: Any) -> None:
        torch.manual_seed(1)
        setattr(net.get_submodule(parent), name, make().double())

    return change


def removed(path: str) -> Change:
    parent, _, name = path.rpartition(".")
    return lambda net: delattr(net.get_submodule(parent), name)


def attributes(path: str, **values: Any) -> Change:
    return lambda net: [setattr(net.get_submodule(path), name, value) for name, value in values.items()]


def own_forward(path: str) -> Change:
    def change(net: Any) -> None:
        module = net.get_submodule(path)
        module.forward = lambda x, original=module.forward: original(x) * 2

    return change


def ordered(path: str, *names: str) -> Change:
    """These children first, then the others."""

    def change(net: Any) -> None:
        module = net.get_submodule(path)
        module._modules = {name: module._modules[name] for name in [*names, *module._modules]}

    return change


def ends_with(channels: int) -> Change:
    last = replaced("last", lambda: nn.BatchNorm2d(channels))
    return together(last, replaced("classifier", lambda: nn.Linear(channels, 7)))


ANY = "reference path"
STEM = "reference path.*: stem: "
CHILDREN = "other children"
CHANGES: dict[str, tuple[str, Change, str]] = {
    "hook": ("list", hook("block2.steps.1.grow"), ANY),
    "pre-hook": ("list", hook("block2.steps.0.bn_a", "forward_pre_hook"), ANY),
    "backward hook": ("list", hook("block2.steps.1.squeeze", "full_backward_hook"), ANY),
    "backward pre-hook": ("list", hook("block2.steps.1.squeeze", "full_backward_pre_hook"), ANY),
    "parametrization": ("list", lambda net: parametrizations.weight_norm(net.block2.steps[1].grow), ANY),
    "class of a layer": ("list", attributes("block2.steps.1", __class__=foreign.ScaledLayer), ANY),
    "GroupNorm": ("list", replaced("block2.steps.1.bn_a", lambda: nn.GroupNorm(1, 9)), ANY),
    "bias": ("list", replaced("block2.steps.2.grow", lambda: nn.Conv2d(12, 4, 3, padding=1)), ANY),
    "dilation": ("list", attributes("block2.steps.2.grow", dilation=(2, 2), padding=(2, 2)), ANY),
    "forward of its own": ("list", own_forward("block2.steps.0.grow"), ANY),
    "layer less": ("list", together(removed("block2.steps.2"), ends_with(13)), CHILDREN),
    "hook in a transition": ("list", hook("between.2"), ANY),
    "pooling of a transition": ("list", attributes("between.3", divisor_override=3), "change places"),
    "layer more": (
        "star", together(replaced("block2.more", lambda: foreign.StarLayer(17, 4)), ends_with(21)), CHILDREN
    ),
    "order in a Sequential layer": ("appending", ordered("block2.1", "norm1", "conv1"), CHILDREN),
    "child that was None": ("list, switchable", replaced("block2.steps.1.extra", nn.Tanh), "other children|gain|extra"),
    "switch": ("list, switchable", attributes("block2.steps.1", gain=2), "gain=1 when it was converted and has 2"),
    "hook on the stem's ReLU": ("stem", hook("features.relu0"), STEM),
    "backward hook on the stem's pooling": ("stem", hook("features.pool0", "full_backward_hook"), STEM),
    "AvgPool in the stem": ("stem", replaced("features.pool0", lambda: nn.AvgPool2d(3, 2, 1)), STEM),
    "stem without pooling": ("stem", removed("features.pool0"), STEM),
    "stem without norm": ("stem", removed("features.norm0"), STEM),
    "SiLU in the stem": ("stem", replaced("features.relu0", nn.SiLU), STEM),
    "dilated pooling": ("stem", attributes("features.pool0", dilation=2), STEM),
    "pooling over the rim": ("stem", attributes("features.pool0", ceil_mode=True), STEM),
    "child in the middle of the stem": ("stem", together(
        replaced("features.extra", lambda: nn.AvgPool2d(3, 1, 1)), ordered("features", "conv0", "norm0", "extra")
    ), STEM),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_later_change_runs_the_original_code_and_says_so_once(name: str, fused: list[tuple[int, ...]]) -> None:
    """Where a backend was asked for by name, it is refused instead."""
    style, change, message = CHANGES[name]
    theirs, ours, x = pair(style)
    strict = fastdense.convert(copy.deepcopy(ours), impl="torch")
    before = ours(x).detach()
    ours.load_state_dict(theirs.state_dict())
    for net in (theirs, ours, strict):
        change(net)
    fused.clear()
    got = says_once(ours, x, lambda: results(ours, x), message)
    want = results(theirs, x)
    assert_same({key: got[key] for key in want}, want)
    assert not torch.equal(want["output"], before) or "backward" in name
    assert fused == []
    with pytest.raises(RuntimeError, match=r"impl='torch' cannot run this block: .*impl='reference'"):
        strict(x)


@pytest.mark.parametrize("name", ["hook", "pre-hook"])
def test_hooks_from_before_the_conversion_are_called(name: str) -> None:
    theirs, _, x = pair("list")
    CHANGES[name][1](theirs)
    ours = fastdense.convert(copy.deepcopy(theirs))
    assert "block2" in kinds(ours)
    assert_same(says_once(ours, x, lambda: results(ours, x)), results(theirs, x))


STAYS: dict[str, tuple[str, Change]] = {
    "convolution of the same type": (
        "list", replaced("block2.steps.0.squeeze", lambda: nn.Conv2d(5, 12, 1, bias=False))
    ),
    "child behind the stem": ("stem", replaced("features.last", lambda: nn.AvgPool2d(3, 1, 1))),
    "first convolution": ("stem", replaced("features.conv0", lambda: nn.Conv2d(3, 6, 5, stride=2, padding=2))),
    "norm and pooling of the same types": ("stem", together(
        replaced("features.norm0", lambda: nn.BatchNorm2d(6, eps=1e-2, momentum=0.3)),
        replaced("features.pool0", lambda: nn.MaxPool2d(2, 3)),
    )),
    "rectangular window": ("stem", replaced("features.pool0", lambda: nn.MaxPool2d((3, 2), (1, 2), (1, 0)))),
    "other attributes": ("stem", together(
        attributes("features.norm0", eps=0.1, momentum=None),
        attributes("features.pool0", kernel_size=5, padding=(2, 1)),
    )),
    "hooks elsewhere": ("stem", together(
        hook("features"), hook("features.conv0"), hook("features.transition1", "forward_pre_hook"),
        hook("features.norm5", "full_backward_hook"),
    )),
    "untracked norm": (
        "stem", replaced("features.norm0", lambda: nn.BatchNorm2d(6, track_running_stats=False, affine=False))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYS)
def test_other_changes_before_or_after_the_conversion_leave_it_fused(name: str, fused: list[tuple[int, ...]]) -> None:
    style, change = STAYS[name]
    theirs, later, x = pair(style)
    change(theirs), change(later)
    before = fastdense.convert(copy.deepcopy(theirs))
    want = results(theirs, x)
    for ours in (later, before):
        fused.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = results(ours, x)
        assert_same(got, want)
        assert kinds(ours) == kinds(later) and len(fused) == (style == "stem")


@pytest.mark.parametrize("name", ["hook", "hook on the stem's ReLU", "switch"])
def test_fused_again_once_the_change_is_undone(name: str) -> None:
    style, change, message = CHANGES[name]
    _, ours, x = pair(style)

    def saved() -> int:
        with fastdense.memory.saved_bytes(ours, x) as counted:
            ours(x)
        return counted.bytes

    before = saved()
    handle = change(ours)
    with pytest.warns(UserWarning, match=message):
        assert saved() > before
    attributes("block2.steps.1", gain=1)(ours) if name == "switch" else handle.remove()
    assert saved() == before


@pytest.mark.parametrize("part", ["0:2", "0:4", "0:6", "2:", "4:"])
def test_slices_of_a_converted_stem(part: str) -> None:
    """They have no plan of their own; the blocks in them are converted still."""
    start, stop = (int(number) if number else None for number in part.split(":"))
    theirs, ours, x = pair("stem")
    theirs, ours = theirs.features[start:stop], ours.features[start:stop]
    x = random_input((2, 6, 9, 8)) if start else x
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # A leaf does not let a ReLU work in place.
        got = results(ours, x, forward=lambda x: ours(x * 1))
    assert_same(got, results(theirs, x, forward=lambda x: theirs(x * 1)))
    assert [entry.action for entry in fastdense.plan(ours)] == ["done"] * len(kinds(ours))
    assert len(kinds(ours)) == {"0:2": 0, "0:4": 0, "0:6": 2, "2:": 3, "4:": 3}[part]
    assert types(fastdense.revert(ours)) == types(theirs)


def test_dropout_raised_later() -> None:
    """The rate and the layer's own mode are read at every call, whatever they were when the block was converted."""
    _, ours, x = pair()
    plain = ours(x)
    for step in ours.block2.steps:
        step.drop_rate = 0.5
    first, second = ours(x), ours(x)
    assert not torch.equal(first, plain) and not torch.equal(first, second)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(ours.eval()(x), ours(x))
        ours.train().block2.steps.eval()
        assert torch.equal(ours(x), ours(x))


def test_global_hooks_see_every_module() -> None:
    theirs, ours, x = pair()
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        with pytest.warns(UserWarning, match="global module hook"):
            got = ours(x)
    finally:
        handle.remove()
    assert seen.count("Conv2d") == 1 + 4 + 1 + 6
    assert_close("output", got, theirs(x))


def test_hooks_on_blocks_work_as_before() -> None:
    """Grad-CAM: a feature map and its gradient, from hooks on a block."""
    found = []
    theirs, ours, x = pair()
    for net in (theirs, ours):
        seen: dict[str, Tensor] = {}
        net.block2.register_forward_hook(lambda m, i, o, seen=seen: seen.update(output=o.detach()))
        net.block2.register_forward_pre_hook(lambda m, i, seen=seen: seen.update(input=i[0].detach()))
        net.block2.register_full_backward_hook(
            lambda m, gi, go, seen=seen: seen.update(grad_input=gi[0], grad_output=go[0])
        )
        hook("between")(net)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            net(x).square().sum().backward()
        found.append(seen)
    assert_same(found[1], found[0])
    assert set(found[0]) == {"output", "input", "grad_input", "grad_output"}


def test_called_with_something_else_than_one_tensor() -> None:
    theirs, ours = twins(foreign.ListBlock(2, 6, 4).double())
    x = random_input((2, 6, 5, 4))
    with pytest.warns(UserWarning, match="something else than one tensor"):
        got = ours(x=x)
    assert_close("output", got, theirs(x))
