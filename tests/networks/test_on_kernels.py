"""Whole networks on the Triton kernels, own and converted, in two and three dimensions, against a float64 truth."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from helpers import networks
from helpers.blocks import random_input, relative_error, unchanged
from helpers.budget import DEVICE, F16, F32, INPUTS, decided_relus, ordinary_gammas
from helpers.interpreter import LaunchCounter
from torch import nn

import fastdense
from fastdense.conversion.converted import Converted

pytestmark = pytest.mark.usefixtures("kernels_checked")


def _shape(name: str) -> tuple[int, ...]:
    return (2, 3, 9, 17, 14) if name == "MONAI" else (2, 3, 21, 34)


def _pair(name: str) -> tuple[nn.Module, nn.Module]:
    """The reference network and fastdense's on the kernels, same numbers."""
    if name.startswith("own"):
        mode = "bottlenecks" if "bottlenecks" in name else "activations"
        return networks.own(recompute=mode, impl="triton")
    peer, _ = networks.NETWORKS[name]()
    fast = fastdense.convert(copy.deepcopy(peer), impl="triton", verify=False)
    assert sum(isinstance(module, Converted) for module in fast.modules()) == 4  # stem, two blocks, transition
    return peer, fast


@contextmanager
def _kernels_counted() -> Iterator[None]:
    with LaunchCounter() as counter:
        yield
    assert counter.counts["bn_relu_max_pool_kernel"] == 2  # forward, and for backward where each maximum lies
    assert counter.counts["bn_relu_conv_kernel"] >= 2 * 3 + 1


@pytest.mark.parametrize("name", ["own", "own bottlenecks", "torchvision", "timm", "MONAI", "own fp16"])
def test_error_is_at_most_twice_the_references(name: str) -> None:
    """ReLUs are decided in 16 bit, as in ``check_budget`` for blocks."""
    dtype = F16 if "fp16" in name else F32
    nets = _pair(name)
    for net in nets:
        ordinary_gammas(net)
        if dtype != F32:
            decided_relus(net)
        net.to(DEVICE, dtype)
    networks.check_budget(nets, _shape(name), dtype, INPUTS, around=_kernels_counted)


@pytest.mark.parametrize("name", ["own", "MONAI"])
def test_evaluation_equals_the_reference(name: str) -> None:
    """Running statistics in the load: nothing is saved, no moments are taken, nothing is launched for them."""
    peer, fast = (net.to(DEVICE, F32).eval() for net in _pair(name))
    for net in (peer, fast):
        ordinary_gammas(net)
    x = random_input(_shape(name), dtype=F32).detach().to(DEVICE)
    with unchanged(fast), torch.no_grad(), LaunchCounter() as counter:
        output = fast(x)
        with fastdense.memory.saved_bytes(fast) as saved:
            fast(x)
    assert relative_error(output, copy.deepcopy(peer).double()(x.double())) < 1e-6
    assert saved.bytes == 0
    copies = counter.counts["copy_with_moments_kernel"]
    assert copies == 2 * 2, counter.counts  # what enters each of two blocks, in two passes; none for moments alone


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
