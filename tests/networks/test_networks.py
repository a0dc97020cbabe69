"""Whole networks: nothing is computed twice, and whatever users do to the modules gives what the textbook gives."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.blocks import assert_close, assert_same, random_input, randomise, results
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
    """The network that runs its modules one by one, and the one that hands moments on; ``change`` is for both."""
    found = []
    for impl in ("reference", options.pop("impl", "auto")):
        torch.manual_seed(0)
        net = fastdense.DenseNet(**{**OPTIONS, **options, "impl": impl})
        if change is not None:
            change(net)
        found.append(net)
    randomise(found[0])
    found[1].load_state_dict(found[0].state_dict())
    return found[0], found[1]


def assert_equal_networks(reference: nn.Module, fast: nn.Module, shape: tuple[int, ...] = SHAPE) -> None:
    """Two steps in the mode that each has, then evaluation."""
    for seed in (1, 2):
        x = random_input(shape, seed=seed)
        assert_same(results(fast, x, seed), results(reference, x, seed))
    x = random_input(shape)
    assert_same(results(fast.eval(), x), results(reference.eval(), x))


class Moments:
    """Counts the channels whose batch moments the backend computes, by primitive."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.channels: list[tuple[str, int]] = []
        for name in ("moments", "bn_relu_conv", "bn_relu_pool"):  # copy_with_moments calls the first
            monkeypatch.setattr(TorchBackend, name, self._counted(name, getattr(TorchBackend, name)))

    def _counted(self, name: str, original: Any) -> Any:
        def primitive(be: Any, *arguments: Any, **named: Any) -> None:
            place = {"moments": 0, "bn_relu_conv": 2, "bn_relu_pool": 3}[name]
            out = named.get("out", arguments[place] if place < len(arguments) else None)
            if out.mean is not None:
                self.channels.append((name, out.rows.shape[1]))
            original(be, *arguments, **named)

        return primitive

    @property
    def total(self) -> int:
        return sum(channels for _, channels in self.channels)


class NoBatchNorm(TorchDispatchMode):
    """Fails where PyTorch's own BatchNorm runs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "batch_norm" not in func._schema.name or "update_stats" in func._schema.name, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["activations", "bottlenecks"])
@pytest.mark.parametrize("small_inputs", [False, True])
def test_each_channels_moments_are_computed_once(
    small_inputs: bool, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Moments(monkeypatch)
    _, fast = network_pair(small_inputs=small_inputs, recompute=mode)
    with NoBatchNorm():
        fast(random_input(SHAPE)).square().sum().backward()
    stem = [("moments", 6)] + [("bn_relu_pool", 6)] * (not small_inputs)
    layer = [("bn_relu_conv", 16), ("bn_relu_conv", 4)]
    transitions = [("bn_relu_conv", 7)], [("bn_relu_conv", 9)]  # 6 + 2*4 channels to 7, 7 + 3*4 to 9
    assert counted.channels == stem + 2 * layer + transitions[0] + 3 * layer + transitions[1] + layer
    before = counted.total
    fast.eval()(random_input(SHAPE))
    assert counted.total == before, "evaluation needs none"


def test_frozen_readers_ask_for_no_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    def freeze(net: Any) -> None:
        for name, module in net.named_modules():
            if isinstance(module, nn.BatchNorm2d) and "denseblock2" not in name:
                module.eval()

    counted = Moments(monkeypatch)
    _, fast = network_pair(freeze)
    fast(random_input(SHAPE)).square().sum().backward()
    layer = [("bn_relu_conv", 16), ("bn_relu_conv", 4)]
    assert counted.channels == [("bn_relu_conv", 7), *3 * layer]  # transition1's output, and block 2


def test_the_inputs_of_stages_are_kept_once() -> None:
    """Each block's output serves the next stage; the rest is bottlenecks, the input, the stem convolution's output."""
    torch.manual_seed(0)
    options = {"growth_rate": 8, "block_config": (2, 3), "num_init_features": 16, "num_classes": 5}
    fast = fastdense.DenseNet(**options)
    x = torch.randn(4, 3, 64, 64)
    x = x.contiguous(memory_format=torch.channels_last)
    with fastdense.memory.saved_bytes(fast, x) as kept:
        fast(x)
    pixels, pixels_2 = 4 * 16 * 16, 4 * 8 * 8
    first, second = pixels * (16 + 2 * 8 + 2 * 32), pixels_2 * (16 + 3 * 8 + 3 * 32)
    want = 4 * (4 * 32 * 32 * 16 + first + second)
    assert want <= kept.bytes <= 1.02 * want


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
        if kind == "backward" and place in (
            "features",
            "features.norm5",
        ):  # whose output the textbook's ReLU overwrites
            for net in (reference, fast):
                net.forward = lambda x, net=net: net.classifier(F.relu(net.features(x)).flatten(2).mean(2))
        for seed in (1, 2):
            x = random_input(SHAPE, seed=seed)
            assert_same(results(fast, x, seed), results(reference, x, seed))
    assert fired.count("auto") == fired.count("reference") >= 2


def _set(place: str, make: Callable[[], nn.Module]) -> Callable[[Any], None]:
    def change(net: Any) -> None:
        torch.manual_seed(1)
        parent, _, name = place.rpartition(".")
        setattr(net.get_submodule(parent), name, make())

    return change


class Louder(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Shifted(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5


def _another_sequential(net: Any) -> None:
    net.features = Shifted(OrderedDict(net.features.named_children()))


def _appended(net: Any) -> None:
    net.features.add_module("extra", nn.Conv2d(13, 13, 1, dtype=F64))


def _inserted(net: Any) -> None:
    children = dict(net.features.named_children())
    net.features = nn.Sequential()
    for name, child in children.items():
        net.features.add_module(name, child)
        if name in ("denseblock1", "transition2", "pool0", "norm0"):
            net.features.add_module(f"after_{name}", nn.Hardtanh(-2, 2))


def _without_norm5(net: Any) -> None:
    del net.features.norm5


def _without_pool0(net: Any) -> None:
    del net.features.pool0


def _renamed(net: Any) -> None:
    net.features = nn.Sequential(*net.features.children())


REPLACED: dict[str, Callable[[Any], None]] = {
    "norm5: group norm": _set("features.norm5", lambda: nn.GroupNorm(1, 13, dtype=F64)),
    "norm5: identity": _set("features.norm5", nn.Identity),
    "norm5: a subclass": _set("features.norm5", lambda: Louder(13, dtype=F64)),
    "norm5: no affine": _set("features.norm5", lambda: nn.BatchNorm2d(13, affine=False, dtype=F64)),
    "norm5: untracked": _set("features.norm5", lambda: nn.BatchNorm2d(13, track_running_stats=False, dtype=F64)),
    "norm5: none": _without_norm5,
    "norm5: a block": _set("features.norm5", lambda: ConcatDenseBlock(1, 13, 2, 4, dtype=F64)),
    "norm0: identity": _set("features.norm0", nn.Identity),
    "norm0: no bias": _set("features.norm0", lambda: nn.BatchNorm2d(6, bias=False, dtype=F64)),
    "relu0: leaky": _set("features.relu0", lambda: nn.LeakyReLU(0.2)),
    "pool0: average": _set("features.pool0", lambda: nn.AvgPool2d(3, 2, 1)),
    "pool0: dilated": _set("features.pool0", lambda: nn.MaxPool2d(2, 2, dilation=2)),
    "pool0: ceiling": _set("features.pool0", lambda: nn.MaxPool2d(2, 2, ceil_mode=True)),
    "pool0: other windows": _set("features.pool0", lambda: nn.MaxPool2d([2, 3], [1, 2], [1, 0])),
    "pool0: identity": _set("features.pool0", nn.Identity),
    "pool0: none": _without_pool0,
    "transition's pool: maximum": _set("features.transition1.pool", lambda: nn.MaxPool2d(2)),
    "transition's pool: overlapping": _set("features.transition1.pool", lambda: nn.AvgPool2d(3, 2)),
    "transition's pool: padded": _set("features.transition1.pool", lambda: nn.AvgPool2d(2, padding=1)),
    "transition's pool: ceiling": _set("features.transition1.pool", lambda: nn.AvgPool2d(2, ceil_mode=True)),
    "transition's pool: thirds": _set("features.transition1.pool", lambda: nn.AvgPool2d([3, 2])),
    "transition's conv: bias": _set("features.transition1.conv", lambda: nn.Conv2d(14, 7, 1, dtype=F64)),
    "transition's conv: 3x3": _set(
        "features.transition1.conv", lambda: nn.Conv2d(14, 7, 3, padding=1, bias=False, dtype=F64)
    ),
    "transition's conv: groups": _set(
        "features.transition1.conv", lambda: nn.Conv2d(14, 7, 1, groups=7, bias=False, dtype=F64)
    ),
    "transition's norm: instance": _set("features.transition2.norm", lambda: nn.InstanceNorm2d(19, dtype=F64)),
    "transition: a convolution": _set("features.transition1", lambda: nn.Conv2d(14, 7, 3, stride=2, dtype=F64)),
    "transition: textbook": _set(
        "features.transition1", lambda: fastdense.reference.ConcatTransition(14, 7, dtype=F64)
    ),
    "block: textbook": _set("features.denseblock2", lambda: ConcatDenseBlock(3, 7, 4, 4, dtype=F64)),
    "block: a convolution": _set("features.denseblock2", lambda: nn.Conv2d(7, 19, 1, dtype=F64)),
    "features: another class": _another_sequential,
    "features: something behind": _appended,
    "features: things between": _inserted,
    "features: other names": _renamed,
}


@pytest.mark.parametrize("name", REPLACED)
def test_users_may_replace_modules(name: str) -> None:
    if name == "norm5: a block":

        def change(net: Any) -> None:
            REPLACED[name](net)
            net.classifier = nn.Linear(17, 5, dtype=F64)
    else:
        change = REPLACED[name]
    reference, fast = network_pair(change)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert_equal_networks(reference, fast)


def test_what_runs_by_modules_says_so_and_an_explicit_backend_refuses() -> None:
    _, fast = network_pair(REPLACED["pool0: dilated"])
    with pytest.warns(UserWarning, match="reference path.*stem: its pooling is dilated"):
        fast(random_input(SHAPE))
    for name, message in (
        ("pool0: dilated", "stem: its pooling"),
        ("norm5: identity", "head: its norm is a Identity"),
        ("transition's conv: bias", "transition: its convolution has a bias"),
    ):
        _, fast = network_pair(REPLACED[name], impl="torch")
        with pytest.raises(RuntimeError, match=rf"impl='torch' cannot run this block: {message}.*impl='reference'"):
            fast(random_input(SHAPE))


def _frozen(*parts: str) -> Callable[[Any], None]:
    def change(net: Any) -> None:
        for name, module in net.named_modules():
            if isinstance(module, nn.BatchNorm2d) and any(part in name for part in parts):
                module.eval()

    return change


def _every(n: int, remainder: int) -> Callable[[Any], None]:
    def change(net: Any) -> None:
        norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
        for i, norm in enumerate(norms):
            norm.train(i % n == remainder)

    return change


def _learning(*parts: str) -> Callable[[Any], None]:
    def change(net: Any) -> None:
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(any(part in name for part in parts))

    return change


MIXTURES: dict[str, Callable[[Any], None]] = {
    "everything frozen": _frozen("norm"),
    "stem frozen": _frozen("norm0"),
    "head frozen": _frozen("norm5"),
    "transitions frozen": _frozen("transition"),
    "blocks frozen": _frozen("denseblock"),
    "all but blocks frozen": _frozen("norm0", "norm5", "transition"),
    "first block's first norms frozen": _frozen("denseblock1.denselayer1.norm1", "denseblock1.denselayer2.norm1"),
    "every second": _every(2, 0),
    "every third": _every(3, 1),
    "features in evaluation": lambda net: net.features.eval(),
    "one block in evaluation": lambda net: net.features.denseblock2.eval(),
    "one transition in evaluation": lambda net: net.features.transition1.eval(),
    "only the classifier learns": _learning("classifier"),
    "only the head learns": _learning("classifier", "norm5"),
    "only the stem learns": _learning("conv0", "norm0"),
    "only a transition's conv learns": _learning("transition1.conv"),
    "only a transition's norm learns": _learning("transition2.norm"),
    "only the last block learns": _learning("denseblock3"),
    "only norms learn": _learning("norm"),
}


@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_of_modes_and_of_what_learns(name: str, needs_x: bool) -> None:
    reference, fast = network_pair(MIXTURES[name])
    for seed in (1, 2):
        x = random_input(SHAPE, seed=seed).detach().requires_grad_(needs_x)
        assert_same(results(fast, x, seed), results(reference, x, seed))


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("bn_size", [2, None])
def test_other_dimensions(dims: int, bn_size: int | None) -> None:
    reference, fast = network_pair(spatial_dims=dims, bn_size=bn_size, block_config=(1, 2))
    assert_equal_networks(reference, fast, (2, 3, *(37, 33, 35)[:dims]))


def test_no_pixels_left_over_is_the_textbooks_error() -> None:
    _, fast = network_pair()
    with pytest.raises(ValueError, match=r"at least \(2, 2\) pixels.*\(3, 14, 1, 1\)"):
        fast(random_input((3, 3, 4, 4)))


def test_features_by_themselves_and_together() -> None:
    """``features(x)`` is the plain module: what timm's, MONAI's and users' own heads call."""
    reference, fast = network_pair()
    x = random_input(SHAPE)

    def by_hand(net: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: net.classifier(F.relu(net.features(x)).flatten(2).mean(2))

    want = results(reference, x)
    for name, got in results(fast, x, forward=by_hand(fast)).items():
        assert_close(name, got, want[name], scale=1e3)
    assert_close("features", fast.eval().features(x), reference.eval().features(x))


@pytest.mark.parametrize("trained", [False, True])
def test_copies_run_by_themselves(trained: bool) -> None:
    reference, fast = network_pair()
    if trained:
        results(fast, random_input(SHAPE)), results(reference, random_input(SHAPE))
    twin, before = copy.deepcopy(fast), {name: value.clone() for name, value in fast.state_dict().items()}
    assert_equal_networks(reference, twin)
    for name, value in fast.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_autocast_and_low_precision_stay_near_the_truth() -> None:
    """Dtypes change hands with the moments: features in bfloat16, moments in float32."""
    truth, _ = network_pair(growth_rate=8)
    for dtype in (torch.bfloat16, torch.float16):
        errors = {}
        for impl in ("reference", "auto"):
            _, net = network_pair(growth_rate=8, impl=impl)
            net.float()
            x = random_input((8, 3, 37, 33), dtype=torch.float32)
            with torch.autocast("cpu", dtype=dtype):
                scores = net(x)
            assert scores.dtype == dtype
            want = copy.deepcopy(truth)(x.double())
            errors[impl] = ((scores.double() - want).norm() / want.norm()).item()
            scores.float().square().sum().backward()
            assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())
        assert errors["auto"] <= 2 * errors["reference"] + 5e-3, errors
