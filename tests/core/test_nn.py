"""The modules: equal to their reference as a network, keys, layouts of weights, old checkpoints, copies."""

import copy
import itertools
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.blocks import MODES, assert_close, assert_same, block_pair, random_input, results, unchanged
from torch import nn

import fastdense

pytestmark = pytest.mark.quick

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "ImageNet stem": {"growth_rate": 4, "block_config": (2, 3), "num_init_features": 8},
    "CIFAR stem": {"growth_rate": 4, "block_config": (2, 2, 2), "num_init_features": 8, "small_inputs": True},
    "basic": {"growth_rate": 3, "block_config": (2, 2), "num_init_features": 6, "small_inputs": True, "bn_size": None},
    "1D": {"growth_rate": 4, "block_config": (2, 2), "num_init_features": 8, "spatial_dims": 1, "in_channels": 2},
    "3D": {"growth_rate": 4, "block_config": (2, 2), "num_init_features": 8, "spatial_dims": 3, "in_channels": 1},
}


@pytest.mark.parametrize(("name", "mode"), [*itertools.product(CONFIGURATIONS, MODES), ("ImageNet stem", "auto")])
def test_a_network_equals_its_reference(name: str, mode: str) -> None:
    options = {**CONFIGURATIONS[name], "num_classes": 5, "dtype": torch.float64}
    torch.manual_seed(0)
    fast = fastdense.DenseNet(**options, recompute=mode)
    torch.manual_seed(0)
    reference = fastdense.DenseNet(**options, impl="reference")
    for got, want in zip(fast.parameters(), reference.parameters(), strict=True):
        assert torch.equal(got, want)
    dims, channels = options.get("spatial_dims", 2), options.get("in_channels", 3)
    x = random_input((2, channels, *(33, 38, 29)[:dims]))
    for _ in range(2):
        assert_same(results(fast, x), results(reference, x))
    assert_same(results(fast.eval(), x), results(reference.eval(), x))


def test_a_network_has_the_size_of_its_name_and_the_options_reach_its_blocks() -> None:
    """The paper's table 1, counted with k = 32; the others' are torchvision's (networks/test_torchvision.py)."""
    assert sum(p.numel() for p in fastdense.densenet264(device="meta").parameters()) == 33337704
    model = fastdense.densenet121(
        growth_rate=8, drop_rate=0.1, memory_efficient=True, impl="torch", num_classes=3, device="meta"
    )
    block = model.features.denseblock3
    assert (block.recompute, block.memory_efficient, block.impl) == (None, True, "torch")
    assert "recompute='bottlenecks'" in repr(block)
    assert block["denselayer1"].drop_rate == 0.1
    assert block["denselayer1"].conv2.out_channels == 8
    assert model.classifier.out_features == 3


def test_3x3_weights_lie_channels_last_and_stay_so() -> None:
    block = fastdense.DenseBlock(2, 6, 4, 4)
    for copied in (block, copy.deepcopy(block), pickle.loads(pickle.dumps(block)), block.double(), block.to("cpu")):
        assert copied["denselayer1"].conv2.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_weights_in_any_layout_give_the_result_and_gradients_laid_out_alike(layout: torch.memory_format) -> None:
    reference, fast = block_pair(2, 6, 4, 4)
    fast.to(memory_format=layout)
    x = random_input((2, 6, 4, 4))
    assert_same(results(fast, x), results(reference, x))
    parameters = [*fast.parameters()]
    for parameter, gradient in zip(parameters, torch.autograd.grad(fast(x).sum(), parameters), strict=True):
        assert gradient.stride() == parameter.stride()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
def test_a_copy_works_and_is_independent(copied: Callable[[nn.Module], nn.Module]) -> None:
    """As does what ``torch.save`` wrote, which pickles too."""
    _, fast = block_pair(2, 6, 4, 4)
    twin = copied(fast)
    x = random_input((2, 6, 4, 4))
    with unchanged(fast), torch.no_grad():
        twin(x)
    fast(x.detach())
    assert_same(results(twin.eval(), x), results(fast.eval(), x))


@pytest.mark.parametrize(
    "build",
    [lambda: fastdense.DenseBlock(2, 6, 4, 4), lambda: fastdense.DenseNet(4, (2, 2), 8)],
    ids=["block", "network"],
)
def test_checkpoints_of_before_2018_load(build: Callable[[], nn.Module]) -> None:
    """Keys norm.1.weight for norm1.weight, and no num_batches_tracked."""
    state = build().state_dict()
    kept = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    old = {re.sub(r"\.(norm|conv)([12])\.", r".\1.\2.", key): value for key, value in kept.items()}
    keys = list(old)
    assert any("denselayer1.norm.1.weight" in key for key in keys)
    fresh = build()
    fresh.load_state_dict(old, strict=True)
    for key, value in fresh.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert list(old) == keys, "the caller's dictionary must stay as it was"


POOLS = {
    "maximum": nn.MaxPool2d(2, 2),
    "padded": nn.AvgPool2d(2, 2, padding=1),
    "padded, not counted": nn.AvgPool2d(2, 2, padding=1, count_include_pad=False),
    "ceiling": nn.AvgPool2d(2, 2, ceil_mode=True),
    "own divisor": nn.AvgPool2d(2, 2, divisor_override=3),
    "power": nn.LPPool2d(2, 2),
}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_transition_with_other_modules_gives_their_result(pool: str, kernel: int) -> None:
    """Pooling moves before the convolution only where the two commute; the bias shows a padded pool that does not."""
    torch.manual_seed(0)
    module = fastdense.Transition(6, 3, dtype=torch.float64).eval()
    module.pool = POOLS[pool]
    module.conv = nn.Conv2d(6, 3, kernel, dtype=torch.float64)
    x = random_input((2, 6, 7, 5))
    want = module.pool(module.conv(module.relu(module.norm(x))))
    assert_close("transition", module(x), want)


def test_a_layer_may_be_anything_with_the_same_children() -> None:
    class Layer(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 8, 1, bias=False)
            self.norm2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1, bias=False)
            self.drop_rate = 0.0

    layers = nn.ModuleDict({"denselayer1": Layer(6), "denselayer2": Layer(10)})
    block = fastdense.DenseBlock(2, 6, 2, 4)
    block.load_state_dict(layers.state_dict(), strict=True)
    x = torch.randn(2, 6, 3, 3)
    assert torch.equal(fastdense.dense_block(x, layers.values()), block(x))
    layer = block["denselayer1"].eval()  # takes its features in one tensor or several
    assert torch.equal(layer(x), layer([x[:, :3], x[:, 3:]]))
