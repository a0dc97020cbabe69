"""A converted Sequential runs BN-ReLU-MaxPool as one, and calls all its other children as they are."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import foreign
from helpers.blocks import assert_same, results
from helpers.converted import FEATURES, kinds, pair
from torch import Tensor, nn

import fastdense
from fastdense import functional

pytestmark = pytest.mark.quick


class Sideways(nn.Sequential):
    """A Sequential that calls its children otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def _child(name: str, module: nn.Module) -> Callable[[Any], Any]:
    return lambda net: setattr(net.features, name, module.double())


OTHERS: dict[str, tuple[Callable[[Any], Any], str | None]] = {
    "over the rim": (_child("pool0", nn.MaxPool2d(3, 2, 1, ceil_mode=True)), "rim"),
    "dilated": (_child("pool0", nn.MaxPool2d(3, 2, 1, dilation=2)), "dilated"),
    "with indices": (_child("pool0", nn.MaxPool2d(3, 2, 1, return_indices=True)), "tuple"),
    "AvgPool": (_child("pool0", nn.AvgPool2d(3, 2, 1)), None),
    "SiLU": (_child("relu0", nn.SiLU()), None),
    "InstanceNorm": (_child("norm0", nn.InstanceNorm2d(6)), None),
    "parametrized norm": (
        lambda net: nn.utils.parametrize.register_parametrization(net.features.norm0, "weight", nn.Softplus()), None
    ),
    "class with a forward of its own": (
        lambda net: setattr(net, "features", Sideways(OrderedDict(net.features._modules))), None
    ),
    "forward of its own": (
        lambda net: setattr(net.features, "forward", lambda x: nn.Sequential.forward(net.features, x) * 2), ""
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_structures_stay(name: str) -> None:
    """With a reason where it looks like a stem."""
    change, reason = OTHERS[name]
    theirs, ours = (foreign.build("stem")[0] for _ in range(2))
    change(theirs), change(ours)
    fastdense.convert(ours)
    assert {"features": "stem", **kinds(ours)} == FEATURES and "features" not in kinds(ours)
    assert type(ours.features) is type(theirs.features)
    found = [entry for entry in fastdense.plan(ours) if entry.kind == "stem"]
    assert [entry.action for entry in found] == ([] if reason is None else ["skip"])
    assert all(entry.reason and reason in entry.reason for entry in found)
    if name != "with indices":
        ours.load_state_dict(theirs.state_dict())
        x = pair("stem")[2]
        assert_same(results(ours, x), results(theirs, x), 1e-9)


@pytest.mark.parametrize("what", ["output", "NaN", "statistics"])
def test_a_wrong_stem_is_seen_by_verify(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = functional.fused_pool

    def wrong(x: Tensor, norm: Any, weight: Any, pool: Any, impl: str) -> Any:
        y, moments = original(x, norm, weight, pool, impl)
        if pool.kind == "maximum" and what != "statistics":
            y = y * (1 + 1e-7 if what == "output" else float("nan"))
        elif pool.kind == "maximum":
            norm.running_mean += 1e-6
        return y, moments

    monkeypatch.setattr(functional, "fused_pool", wrong)
    (entry,) = [entry for entry in fastdense.plan(foreign.Features()) if entry.kind == "stem"]
    assert entry.action == "skip" and "differs in training" in entry.reason


@pytest.mark.parametrize(
    "shape", [(2, 5, 9, 8), (2, 6, 9), (2, 6, 9, 8, 7), (6, 9, 8)], ids=["channels", "1D", "3D", "without batch"]
)
def test_bad_input_raises_as_the_original_does(shape: tuple[int, ...]) -> None:
    theirs, ours, _ = pair("stem")
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    for net in (theirs, ours):
        del net.features.conv0
        with pytest.raises((ValueError, RuntimeError)):
            net(torch.randn(shape, dtype=torch.float64))
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


def test_an_empty_batch() -> None:
    theirs, ours, x = pair("stem")
    assert_same(results(ours.eval(), x[:0]), results(theirs.eval(), x[:0]))
