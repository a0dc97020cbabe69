"""Whole networks on the Triton kernels, own and converted, in two and three dimensions, against a float64 truth."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import pytest
import torch
from helpers import networks
from helpers.blocks import random_input, relative_error
from helpers.budget import DEVICE, F16, F32, INPUTS, TOLERANCE, decided_relus, ordinary_gammas
from helpers.interpreter import LaunchCounter
from torch import Tensor, nn

import fastdense
from fastdense.conversion.converted import Converted

DIMS3 = (9, 17, 14)


pytestmark = pytest.mark.usefixtures("kernels_checked")


def _pair(name: str) -> tuple[nn.Module, nn.Module]:
    """The textbook network and fastdense's on the kernels, same numbers."""
    if name.startswith("own"):
        mode = "bottlenecks" if "bottlenecks" in name else "activations"
        return networks.own(recompute=mode, impl="triton")
    peer, _ = networks.NETWORKS[name]()
    fast = fastdense.convert(copy.deepcopy(peer), impl="triton", verify=False)
    assert sum(isinstance(module, Converted) for module in fast.modules()) == 4  # stem, two blocks, transition
    return peer, fast


def _step(net: nn.Module, x: Tensor, cotangent: Tensor) -> dict[str, Any]:
    x = x.detach().requires_grad_()
    net.zero_grad()
    output = net(x)
    output.backward(cotangent.to(output.dtype))
    found: dict[str, Any] = {"output": output.detach(), "x.grad": x.grad}
    found |= {f"{name}.grad": parameter.grad for name, parameter in net.named_parameters()}
    return found | {name: buffer.clone() for name, buffer in net.named_buffers() if buffer.is_floating_point()}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, F32) for name in ("own", "own bottlenecks", "torchvision", "timm", "MONAI")),
        ("own", F16),
    ],
)
def test_error_budget(name: str, dtype: torch.dtype) -> None:
    """Output, every gradient and the statistics: at most twice the error of the textbook network in the same dtype.

    In fp32 one rounding of the largest gradient on top, for gradients that BatchNorm all but takes away: PyTorch on a
    CPU adds up in double there. ReLUs are decided in 16 bit, as in ``check_budget``. That the kernels take part is seen
    from their launches.
    """
    peer, fast = (net.to(DEVICE) for net in _pair(name))
    for net in (peer, fast):
        ordinary_gammas(net)
        if dtype != F32:
            decided_relus(net)
        net.to(dtype)
    truth = copy.deepcopy(peer).double()
    spatial = DIMS3 if name == "MONAI" else (21, 34)
    errors: dict[str, list[tuple[float, float, float]]] = {}
    for seed in range(INPUTS):
        x = random_input((2, 3, *spatial), dtype=F32, seed=seed).detach().to(DEVICE, dtype)
        generator = torch.Generator().manual_seed(seed)
        cotangent = torch.randn(2, networks.CLASSES, generator=generator).to(DEVICE, dtype)
        with LaunchCounter() as counter:
            mine = _step(copy.deepcopy(fast), x, cotangent)
        assert counter.counts["bn_relu_max_pool_kernel"] == 2  # forward, and for backward where each maximum lies
        assert counter.counts["bn_relu_conv_kernel"] >= 2 * 3 + 1
        theirs = _step(copy.deepcopy(peer), x, cotangent)
        want = _step(copy.deepcopy(truth), x.double(), cotangent.double())
        largest = max(value.norm().item() for key, value in want.items() if "grad" in key)
        for key, value in want.items():
            assert (mine[key].dtype, mine[key].shape) == (theirs[key].dtype, theirs[key].shape), key
            if "grad" in key and value.norm().item() < 1e-4 * largest:
                continue  # 0 but for eps, because BatchNorm takes its scale away: all rounding, whoever computes
            floor = 2**-24 * largest / value.norm().item() if dtype == F32 and "grad" in key else 0.0
            found = relative_error(mine[key], value), relative_error(theirs[key], value), floor
            errors.setdefault(key, []).append(found)
    for key, rows in errors.items():
        ours, textbook, floor = (statistics.median(column) for column in zip(*rows, strict=True))
        assert ours <= 2 * textbook + TOLERANCE[dtype] + floor, (
            f"{key}: error {ours:.2e}, the textbook's {textbook:.2e}"
        )


@pytest.mark.parametrize("name", ["own", "MONAI"])
def test_evaluation_equals_the_textbook(name: str) -> None:
    """Running statistics in the load: nothing is kept, no moments are taken, nothing is launched for them."""
    peer, fast = (net.to(DEVICE, F32).eval() for net in _pair(name))
    for net in (peer, fast):
        ordinary_gammas(net)
    x = random_input((2, 3, *(DIMS3 if name == "MONAI" else (21, 34))), dtype=F32).detach().to(DEVICE)
    before = {key: value.clone() for key, value in fast.state_dict().items()}
    with torch.no_grad(), LaunchCounter() as counter:
        output = fast(x)
        with fastdense.memory.saved_bytes(fast) as saved:
            fast(x)
    assert relative_error(output, copy.deepcopy(peer).double()(x.double())) < 1e-6
    assert saved.bytes == 0
    copies = counter.counts["copy_with_moments_kernel"]
    assert copies == 2 * 2, counter.counts  # what enters each of two blocks, in two passes; none for moments alone
    for key, value in fast.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_launches_round_the_blocks() -> None:
    """Two blocks of one layer: what the stem, the transition, the blocks' borders and the head take."""
    net = fastdense.DenseNet(4, (1, 1), 8, num_classes=3, impl="triton", device=DEVICE)
    x = torch.randn(2, 3, 32, 32, device=DEVICE)
    with LaunchCounter() as counter:
        net(x).sum().backward()
    kernels = {name: count for name, count in counter.counts.items() if name.endswith("_kernel")}
    assert kernels.pop("reduce_kernel", 0) <= 3  # the last weight gradient of each operator, where it was split
    assert kernels == {
        "copy_with_moments_kernel": 1 + 2,  # the stem convolution's moments; each block's entering channels
        "bn_relu_max_pool_kernel": 2,
        "bn_relu_conv_kernel": 2 * 2 + 1,
        "bn_relu_mean_kernel": 1,
        "bn_relu_pool_backward_kernel": 2,
        "bn_relu_conv_backward_kernel": 2 * 2 + 1,
        "resolve_kernel": 2 + 1,  # each block's input gradient, and the stem's
    }
