"""Whole networks: nothing is computed twice, and whatever users do to the modules gives what the reference gives."""

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import networks
from helpers.blocks import assert_close, assert_same, freeze_some, learning, random_input, results, unchanged
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastdense
from fastdense.backends.torch_backend import TorchBackend
from fastdense.core import warn
from fastdense.reference import ConcatDenseBlock

F64 = torch.float64
SHAPE = (3, 3, 37, 33)
OPTIONS: dict[str, Any] = {
    "growth_rate": 4, "block_config": (2, 3, 1), "num_init_features": 6, "num_classes": 5, "dtype": F64
}  # fmt: skip


@pytest.fixture(autouse=True)
def _forget_warnings() -> None:
    warn._said.clear()


def network_pair(change: Callable[[Any], Any] | None = None, **options: Any) -> tuple[Any, Any]:
    return networks.own(change, **{**OPTIONS, **options})


def by_hand(net: Any, x: Tensor) -> Tensor:
    return net.classifier(F.relu(net.features(x)).flatten(2).mean(2))


def assert_equal_steps(
    reference: nn.Module, fast: nn.Module, shape: tuple[int, ...] = SHAPE, needs_x: bool = True
) -> None:
    for seed in (1, 2):
        x = random_input(shape, seed=seed).detach().requires_grad_(needs_x)
        assert_same(results(fast, x, seed), results(reference, x, seed))


def assert_equal_networks(reference: nn.Module, fast: nn.Module, shape: tuple[int, ...] = SHAPE) -> None:
    """Two steps in the mode that each has, then evaluation."""
    assert_equal_steps(reference, fast, shape)
    x = random_input(shape)
    assert_same(results(fast.eval(), x), results(reference.eval(), x))


@pytest.fixture
def moments(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The channels whose batch moments the torch backend computes, by primitive."""
    channels: list[tuple[str, int]] = []

    def counted(name: str, place: int, original: Any) -> Any:
        def primitive(be: Any, *arguments: Any, **named: Any) -> None:
            out = named.get("out", arguments[place] if place < len(arguments) else None)
            if out.mean is not None:
                channels.append((name, out.rows.shape[1]))
            original(be, *arguments, **named)

        return primitive

    for name, place in (("moments", 0), ("bn_relu_conv", 2), ("bn_relu_pool", 3)):  # copy_with_moments calls the first
        monkeypatch.setattr(TorchBackend, name, counted(name, place, getattr(TorchBackend, name)))
    return channels


class NoBatchNorm(TorchDispatchMode):
    """Fails where PyTorch's own BatchNorm runs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "batch_norm" not in func._schema.name or "update_stats" in func._schema.name, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("small_inputs", "mode"), [(False, "activations"), (True, "bottlenecks")])
def test_each_channels_moments_are_computed_once(small_inputs: bool, mode: str, moments: list[tuple[str, int]]) -> None:
    _, fast = network_pair(small_inputs=small_inputs, recompute=mode)
    with NoBatchNorm():
        fast(random_input(SHAPE)).square().sum().backward()
    stem = [("moments", 6)] + [("bn_relu_pool", 6)] * (not small_inputs)
    layer = [("bn_relu_conv", 16), ("bn_relu_conv", 4)]
    transitions = [("bn_relu_conv", 7)], [("bn_relu_conv", 9)]  # 6 + 2*4 channels to 7, 7 + 3*4 to 9
    want = stem + 2 * layer + transitions[0] + 3 * layer + transitions[1] + layer
    assert moments == want
    fast.eval()(random_input(SHAPE))
    assert moments == want, "evaluation needs none"


def test_frozen_readers_ask_for_no_moments(moments: list[tuple[str, int]]) -> None:
    _, fast = network_pair(_frozen("norm0", "norm5", "transition", "denseblock1", "denseblock3"))
    fast(random_input(SHAPE)).square().sum().backward()
    layer = [("bn_relu_conv", 16), ("bn_relu_conv", 4)]
    assert moments == [("bn_relu_conv", 7), *3 * layer]  # transition1's output, and block 2


def test_the_inputs_of_stages_are_saved_once() -> None:
    """Each block's output serves the next stage; the rest is bottlenecks, the input, the stem convolution's output."""
    fast = fastdense.DenseNet(growth_rate=8, block_config=(2, 3), num_init_features=16, num_classes=5)
    x = torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with fastdense.memory.saved_bytes(fast, x) as saved:
        fast(x)
    pixels, pixels_2 = 4 * 16 * 16, 4 * 8 * 8
    first, second = pixels * (16 + 2 * 8 + 2 * 32), pixels_2 * (16 + 3 * 8 + 3 * 32)
    want = 4 * (4 * 32 * 32 * 16 + first + second)
    assert want <= saved.bytes <= 1.02 * want


PLACES = (
    "features", "features.conv0", "features.norm0", "features.relu0", "features.pool0", "features.denseblock1",
    "features.denseblock2.denselayer2", "features.denseblock3.denselayer1.norm1", "features.transition1",
    "features.transition2.norm", "features.transition2.pool", "features.norm5", "classifier",
)  # fmt: skip


@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
@pytest.mark.parametrize("place", PLACES)
def test_hooks_fire_and_what_they_change_counts(place: str, kind: str) -> None:
    fired: list[str] = []

    def hook(net: Any) -> None:
        module = net.get_submodule(place)

        def forward(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            fired.append(net.impl)
            return output * 1.25 + 0.1

        def pre(module: nn.Module, inputs: Any) -> Any:
            fired.append(net.impl)
            (features,) = inputs  # a layer's are a list of tensors
            return ([f * 0.75 for f in features] if isinstance(features, list) else features * 0.75,)

        def backward(module: nn.Module, grads: Any, _: Any) -> Any:
            fired.append(net.impl)
            return tuple(grad if grad is None else grad * 1.5 for grad in grads)

        if kind == "forward":
            module.register_forward_hook(forward)
        elif kind == "pre":
            module.register_forward_pre_hook(pre)
        else:
            module.register_full_backward_hook(backward)

    reference, fast = network_pair(hook)
    for net in (reference, fast):  # PyTorch forbids a full backward hook round what works in place
        for module in net.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        if kind == "backward" and place in ("features", "features.norm5"):  # the reference's ReLU overwrites the output
            for net in (reference, fast):
                net.forward = partial(by_hand, net)
        assert_equal_steps(reference, fast)
    assert fired.count("auto") == fired.count("reference") >= 2


class Louder(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Shifted(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5


def _inserted(net: Any) -> None:
    children = dict(net.features.named_children())
    net.features = nn.Sequential()
    for name, child in children.items():
        net.features.add_module(name, child)
        if name in ("denseblock1", "transition2", "pool0", "norm0"):
            net.features.add_module(f"after_{name}", nn.Hardtanh(-2, 2))


def _a_block_for_norm5(net: Any) -> None:
    net.features.norm5, net.classifier = ConcatDenseBlock(1, 13, 2, 4, dtype=F64), nn.Linear(17, 5, dtype=F64)


# What stands in a module's place, made of sizes in float64; and what else users do to a network.
REPLACED: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "norm5: identity": ("norm5", nn.Identity),
    "norm5: a subclass": ("norm5", lambda: Louder(13)),
    "norm5: no affine": ("norm5", lambda: nn.BatchNorm2d(13, affine=False)),
    "norm5: untracked": ("norm5", lambda: nn.BatchNorm2d(13, track_running_stats=False)),
    "norm0: identity": ("norm0", nn.Identity),
    "norm0: no bias": ("norm0", lambda: nn.BatchNorm2d(6, bias=False)),
    "relu0: leaky": ("relu0", lambda: nn.LeakyReLU(0.2)),
    "pool0: dilated": ("pool0", lambda: nn.MaxPool2d(2, 2, dilation=2)),
    "pool0: ceiling": ("pool0", lambda: nn.MaxPool2d(2, 2, ceil_mode=True)),
    "pool0: other windows": ("pool0", lambda: nn.MaxPool2d([2, 3], [1, 2], [1, 0])),
    "pool0: identity": ("pool0", nn.Identity),
    "transition's pool: maximum": ("transition1.pool", lambda: nn.MaxPool2d(2)),
    "transition's pool: overlapping": ("transition1.pool", lambda: nn.AvgPool2d(3, 2)),
    "transition's pool: padded": ("transition1.pool", lambda: nn.AvgPool2d(2, padding=1)),
    "transition's pool: ceiling": ("transition1.pool", lambda: nn.AvgPool2d(2, ceil_mode=True)),
    "transition's pool: thirds": ("transition1.pool", lambda: nn.AvgPool2d([3, 2])),
    "transition's conv: bias": ("transition1.conv", lambda: nn.Conv2d(14, 7, 1)),
    "transition's conv: 3x3": ("transition1.conv", lambda: nn.Conv2d(14, 7, 3, padding=1, bias=False)),
    "transition's conv: groups": ("transition1.conv", lambda: nn.Conv2d(14, 7, 1, groups=7, bias=False)),
    "transition's norm: instance": ("transition2.norm", lambda: nn.InstanceNorm2d(19)),
    "transition: reference": ("transition1", lambda: fastdense.reference.ConcatTransition(14, 7)),
    "block: reference": ("denseblock2", lambda: ConcatDenseBlock(3, 7, 4, 4)),
}
CHANGED: dict[str, Callable[[Any], Any]] = {
    "norm5: none": lambda net: delattr(net.features, "norm5"),
    "norm5: a block": _a_block_for_norm5,
    "pool0: none": lambda net: delattr(net.features, "pool0"),
    "features: another class": lambda net: setattr(
        net, "features", Shifted(OrderedDict(net.features.named_children()))
    ),
    "features: something behind": lambda net: net.features.add_module("extra", nn.Conv2d(13, 13, 1, dtype=F64)),
    "features: things between": _inserted,
    "features: other names": lambda net: setattr(net, "features", nn.Sequential(*net.features.children())),
}


def replaced(name: str) -> Callable[[Any], None]:
    def change(net: Any) -> None:
        torch.manual_seed(1)
        place, make = REPLACED[name]
        parent, _, leaf = f"features.{place}".rpartition(".")
        setattr(net.get_submodule(parent), leaf, make().double())

    return change


@pytest.mark.parametrize("name", [*REPLACED, *CHANGED])
def test_users_may_replace_modules(name: str) -> None:
    reference, fast = network_pair(CHANGED.get(name) or replaced(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert_equal_networks(reference, fast)


def test_what_runs_by_modules_says_so_and_an_explicit_backend_refuses() -> None:
    _, fast = network_pair(replaced("pool0: dilated"))
    with pytest.warns(UserWarning, match="reference path.*stem: its pooling is dilated"):
        fast(random_input(SHAPE))
    for name, message in (
        ("pool0: dilated", "stem: its pooling"),
        ("norm5: identity", "head: its norm is a Identity"),
        ("transition's conv: bias", "transition: its convolution has a bias"),
    ):
        _, fast = network_pair(replaced(name), impl="torch")
        with pytest.raises(RuntimeError, match=rf"impl='torch' cannot run this block: {message}.*impl='reference'"):
            fast(random_input(SHAPE))


def _frozen(*parts: str) -> Callable[[Any], None]:
    def change(net: Any) -> None:
        for name, module in net.named_modules():
            if isinstance(module, nn.BatchNorm2d) and any(part in name for part in parts):
                module.eval()

    return change


MIXTURES: dict[str, Callable[[Any], None]] = {
    "everything frozen": _frozen("norm"),
    "stem frozen": _frozen("norm0"),
    "head frozen": _frozen("norm5"),
    "transitions frozen": _frozen("transition"),
    "blocks frozen": _frozen("denseblock"),
    "all but blocks frozen": _frozen("norm0", "norm5", "transition"),
    "first block's first norms frozen": _frozen("denseblock1.denselayer1.norm1", "denseblock1.denselayer2.norm1"),
    "every third": freeze_some,
    "features in evaluation": lambda net: net.features.eval(),
    "one block in evaluation": lambda net: net.features.denseblock2.eval(),
    "one transition in evaluation": lambda net: net.features.transition1.eval(),
    "only the classifier learns": learning("classifier"),
    "only the head learns": learning("classifier", "norm5"),
    "only the stem learns": learning("conv0", "norm0"),
    "only a transition's conv learns": learning("transition1.conv"),
    "only a transition's norm learns": learning("transition2.norm"),
    "only the last block learns": learning("denseblock3"),
    "only norms learn": learning("norm"),
}


@pytest.mark.parametrize("needs_x", [True, False], ids=["x", "no x"])
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_of_modes_and_of_what_learns(name: str, needs_x: bool) -> None:
    assert_equal_steps(*network_pair(MIXTURES[name]), needs_x=needs_x)


def test_no_pixels_left_over_is_the_references_error() -> None:
    _, fast = network_pair()
    with pytest.raises(ValueError, match=r"at least \(2, 2\) pixels.*\(3, 14, 1, 1\)"):
        fast(random_input((3, 3, 4, 4)))


def test_features_by_themselves_and_together() -> None:
    """``features(x)`` is the plain module: what timm's, MONAI's and users' own heads call."""
    reference, fast = network_pair()
    x = random_input(SHAPE)
    want = results(reference, x)
    for name, got in results(fast, x, forward=partial(by_hand, fast)).items():
        assert_close(name, got, want[name], scale=1e3)
    assert_close("features", fast.eval().features(x), reference.eval().features(x))


def test_a_copy_of_a_trained_network_runs_by_itself() -> None:
    reference, fast = network_pair()
    results(fast, random_input(SHAPE)), results(reference, random_input(SHAPE))
    with unchanged(fast):
        assert_equal_networks(reference, copy.deepcopy(fast))
