"""Mixed and half precision for whole networks: autocast, GradScaler, ``.half()``, ``.bfloat16()``."""

from collections.abc import Callable

import pytest
import torch
from helpers import networks
from helpers.blocks import norms, random_input, relative_error
from helpers.budget import TOLERANCE, decided_relus, ordinary_gammas
from torch import nn

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def _norms_in_float32(net: nn.Module) -> nn.Module:
    for norm in norms(net):
        norm.float()
    return net


MODES: dict[str, tuple[torch.dtype, Callable[[nn.Module], nn.Module], bool]] = {
    "autocast bfloat16": (BF16, nn.Module.float, True),
    "autocast float16": (F16, nn.Module.float, True),
    "pure bfloat16": (BF16, nn.Module.bfloat16, False),
    "pure float16": (F16, nn.Module.half, False),
    "bfloat16, norms float32": (BF16, lambda net: _norms_in_float32(net.bfloat16()), False),
    "float16, norms float32": (F16, lambda net: _norms_in_float32(net.half()), False),
}

SLOW = ("pure float16", "float16, norms float32")  # which take the most inputs
NAMES = [pytest.param("own", mode, marks=pytest.mark.minutes if mode in SLOW else ()) for mode in MODES]


@pytest.mark.parametrize(("name", "mode"), [*NAMES, ("torchvision", "autocast bfloat16")])
def test_error_is_at_most_twice_the_references(name: str, mode: str) -> None:
    """A ReLU that a rounding switches outweighs all other errors, and is luck.

    Hence many inputs, and a last norm (whose few pixels would be switched once or not at all) far from 0.
    """
    dtype, cast, autocast = MODES[mode]
    nets = networks.network(name, F32)
    for net in nets:
        ordinary_gammas(net)
        decided_relus(net.features.norm5)
        cast(net)
    networks.check_budget(nets, (6, 3, 37, 44), dtype, 81 if dtype is F16 else 31, autocast=autocast)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", ["own", "torchvision", "timm"])
def test_autocasts_dtypes_are_the_references(name: str, dtype: torch.dtype) -> None:
    """Outputs under autocast in its dtype, gradients and statistics in their tensors'; as the reference network's."""
    peer, fast = networks.network(name, F32)
    x = networks.images(name, dtype=F32)
    found = []
    for net in (peer, fast):
        outcome = networks.outcome(net, x, torch.ones(2, networks.CLASSES), dtype)
        seen = {key: value.dtype for key, value in outcome.items()}
        with torch.no_grad(), torch.autocast("cpu", dtype):
            seen["evaluation"] = net.eval()(x).dtype
        found.append(seen)
    assert found[0] == found[1]
    assert found[1]["output"] == found[1]["evaluation"] == dtype
    assert len(found[1]) > 40


def test_a_step_with_an_infinite_gradient_is_skipped() -> None:
    """GradScaler sees the overflow in fastdense's gradients, leaves the parameters alone and halves the scale."""
    _, fast = networks.network("own", F32)
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, growth_interval=1)
    x, target = networks.images("own", dtype=F32).detach(), networks.labels(2)

    def train() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", F16):
            loss = nn.functional.cross_entropy(fast(x), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    before = [parameter.detach().clone() for parameter in fast.parameters()]
    train()
    assert scaler.get_scale() == 2.0**59
    assert not all(torch.isfinite(parameter.grad).all() for parameter in fast.features.denseblock1.parameters())
    assert all(torch.equal(*pair) for pair in zip(fast.parameters(), before, strict=True))
    scaler.update(2.0**10)
    train()
    assert scaler.get_scale() == 2.0**11
    assert not any(torch.equal(*pair) for pair in zip(fast.features.parameters(), before, strict=False))
    assert all(torch.isfinite(parameter).all() for parameter in fast.parameters())


@pytest.mark.parametrize("inner", ["enabled", "disabled"])
def test_autocast_inside_autocast(inner: str) -> None:
    """A block in a region that switches autocast off runs in its input's dtype, as its reference twin."""
    reference, fast = (net.features for net in networks.network("own", F32))
    x = random_input((2, 8, 9, 6), dtype=F32)
    with torch.autocast("cpu", BF16), torch.autocast("cpu", F16, enabled=inner == "enabled"):
        outputs = [features.transition1(features.denseblock1(x)) for features in (reference, fast)]
    assert outputs[0].dtype == outputs[1].dtype == (F16 if inner == "enabled" else F32)
    tolerance = 4 * TOLERANCE[outputs[0].dtype]
    assert relative_error(outputs[1], outputs[0]) < tolerance


def test_moments_of_other_values_are_not_taken() -> None:
    """Where autocast begins between two parts of a network, the float32 features' moments are not the block's."""
    _, fast = networks.network("own", F32)
    x = random_input((2, 8, 9, 6), dtype=F32).detach()
    block, transition = fast.features.denseblock1, fast.features.transition1
    h, moments = block._run(x, None, True)
    with torch.autocast("cpu", BF16):
        got, _ = transition._run(h, moments, False)
        want = transition(h)
    assert torch.equal(got, want)
