"""Mixed and half precision for whole networks: autocast, GradScaler, ``.half()``, ``.bfloat16()``."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers import networks
from helpers.blocks import random_input, relative_error
from helpers.budget import TOLERANCE, decided_relus, ordinary_gammas
from torch import Tensor, nn

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
INPUTS = 81


def _norms_in_float32(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.float()
    return net


MODES: dict[str, tuple[torch.dtype, Callable[[nn.Module], nn.Module], bool]] = {
    "autocast bfloat16": (BF16, nn.Module.float, True),
    "autocast float16": (F16, nn.Module.float, True),
    "pure bfloat16": (BF16, nn.Module.bfloat16, False),
    "pure float16": (F16, nn.Module.half, False),
    "bfloat16, norms float32": (BF16, lambda net: _norms_in_float32(net.bfloat16()), False),
    "float16, norms float32": (F16, lambda net: _norms_in_float32(net.half()), False),
}


def _step(net: nn.Module, x: Tensor, cotangent: Tensor, autocast: torch.dtype | None) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    net.zero_grad()
    with torch.autocast("cpu", autocast) if autocast else nullcontext():
        output = net(x)
    output.backward(cotangent.to(output.dtype))
    found: dict[str, Any] = {"output": output.detach(), "x.grad": x.grad}
    found |= {f"{name}.grad": parameter.grad for name, parameter in net.named_parameters()}
    return found | {name: buffer.clone() for name, buffer in net.named_buffers() if buffer.is_floating_point()}


@pytest.mark.parametrize(
    ("name", "mode"), [*(("own", mode) for mode in MODES), *(("torchvision", mode) for mode in list(MODES)[1:2])]
)
def test_error_budget(name: str, mode: str) -> None:
    """Outputs, every gradient and the statistics: at most twice the error of the textbook network in the same mode.

    In the 2-norm against float64 results from the same rounded numbers; medians over some inputs. A ReLU that a
    rounding switches outweighs all other errors, and is luck: hence many inputs, and a last norm (whose few pixels
    would be switched once or not at all) far from 0.
    """
    dtype, cast, autocast = MODES[mode]
    peer, fast = networks.network(name, F32)
    errors: dict[str, list[tuple[float, float]]] = {}
    for net in (peer, fast):
        ordinary_gammas(net)
        decided_relus(net.features.norm5)
        cast(net)
    truth = copy.deepcopy(peer)
    for seed in range(INPUTS):
        x = random_input((6, 3, 37, 44), dtype=F32, seed=seed).detach()
        x = x if autocast else x.to(dtype)
        cotangent = torch.randn(6, networks.CLASSES, generator=torch.Generator().manual_seed(seed)).to(dtype)
        nets = [copy.deepcopy(net) for net in (peer, fast)]
        theirs, mine = (_step(net, x, cotangent, dtype if autocast else None) for net in nets)
        want = _step(copy.deepcopy(truth).double(), x.double(), cotangent.double(), None)
        largest = max(value.norm().item() for key, value in want.items() if "grad" in key)
        for key, value in want.items():
            assert (mine[key].dtype, mine[key].shape) == (theirs[key].dtype, theirs[key].shape), key
            if "grad" in key and value.norm().item() < 1e-4 * largest:
                continue  # 0 but for eps, because BatchNorm takes its scale away: all rounding, whoever computes
            errors.setdefault(key, []).append((relative_error(mine[key], value), relative_error(theirs[key], value)))
    assert errors["output"] and errors["x.grad"]
    for key, rows in errors.items():
        error, peers = (statistics.median(column) for column in zip(*rows, strict=True))
        assert error <= 2 * peers + TOLERANCE[dtype], f"{key}: {error:.2e}, the textbook network's {peers:.2e}"


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("name", ["own", "torchvision", "timm"])
def test_dtypes_that_users_expect(name: str, dtype: torch.dtype) -> None:
    """Outputs under autocast in its dtype, gradients and statistics in their tensors'; as the textbook network's."""
    peer, fast = networks.network(name, F32)
    x = networks.images(name, dtype=F32)
    found = []
    for net in (peer, fast):
        seen = {key: value.dtype for key, value in _step(net, x, torch.ones(2, networks.CLASSES), dtype).items()}
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
    """A block in a region that switches autocast off runs in its input's dtype, as its textbook twin."""
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
