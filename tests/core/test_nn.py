"""The modules: constructors, keys, initial weights, checkpoints, copies, dtypes, environment."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from helpers.blocks import assert_close, assert_same, block_pair, random_input, results
from torch import nn

import fastdense

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "ImageNet stem": {"growth_rate": 4, "block_config": (2, 3), "num_init_features": 8},
    "CIFAR stem": {"growth_rate": 4, "block_config": (2, 2, 2), "num_init_features": 8, "small_inputs": True},
    "basic": {"growth_rate": 3, "block_config": (2, 2), "num_init_features": 6, "small_inputs": True, "bn_size": None},
    "1D": {"growth_rate": 4, "block_config": (2, 2), "num_init_features": 8, "spatial_dims": 1, "in_channels": 2},
    "3D": {"growth_rate": 4, "block_config": (2, 2), "num_init_features": 8, "spatial_dims": 3, "in_channels": 1},
}


@pytest.mark.parametrize("mode", ["activations", "bottlenecks", "auto"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_network_equals_its_reference(name: str, mode: str) -> None:
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


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("121", 7978856), ("161", 28681000), ("169", 14149480), ("201", 20013928), ("264", 33337704)],
)
def test_named_networks(name: str, parameters: int) -> None:
    """Parameter counts: torchvision's for its four; DenseNet-264 (k = 32) counted from the paper's table 1."""
    model = getattr(fastdense, f"densenet{name}")(device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert "features.denseblock4.denselayer16.conv2.weight" in model.state_dict()


def test_options_reach_the_blocks() -> None:
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
    x = torch.randn(2, 6, 4, 4).double()
    block(x).square().sum().backward()
    weight = block["denselayer1"].conv2.weight
    assert weight.grad is not None and weight.grad.stride() == weight.stride()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_users_may_lay_weights_out_as_they_like(layout: torch.memory_format) -> None:
    reference, fast = block_pair(2, 6, 4, 4)
    fast.to(memory_format=layout)
    x = random_input((2, 6, 4, 4))
    assert_same(results(fast, x), results(reference, x))
    for parameter in fast.parameters():
        assert parameter.grad is not None and parameter.grad.stride() == parameter.stride()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_work_and_are_independent(how: str) -> None:
    _, fast = block_pair(2, 6, 4, 4)
    if how == "deepcopy":
        twin = copy.deepcopy(fast)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(fast))
    else:
        buffer = io.BytesIO()
        torch.save(fast, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    x = random_input((2, 6, 4, 4))
    with torch.no_grad():
        before = fast["denselayer1"].norm1.running_mean.clone()
        twin(x)
    assert torch.equal(fast["denselayer1"].norm1.running_mean, before)
    fast(x.detach())
    assert_same(results(twin.eval(), x), results(fast.eval(), x))


def test_checkpoints_of_before_2018_load() -> None:
    """Keys norm.1.weight for norm1.weight, and no num_batches_tracked."""
    _, fast = block_pair(2, 6, 4, 4)
    old = {}
    for key, value in fast.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            for kind in ("norm", "conv"):
                key = key.replace(f".{kind}1.", f".{kind}.1.").replace(f".{kind}2.", f".{kind}.2.")
            old[key] = value.clone()
    assert "denselayer1.norm.1.weight" in old
    _, fresh = block_pair(2, 6, 4, 4)
    nn.init.zeros_(fresh["denselayer1"].conv1.weight)
    fresh.load_state_dict(old, strict=True)
    for key, value in fresh.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, fast.state_dict()[key])
    assert "denselayer1.norm.1.weight" in old, "the caller's dictionary must stay as it was"


def test_the_network_loads_old_checkpoints_too() -> None:
    options: dict[str, Any] = {"growth_rate": 4, "block_config": (2, 2), "num_init_features": 8}
    model = fastdense.DenseNet(**options)
    old = {key.replace("norm1", "norm.1").replace("conv2", "conv.2"): v for key, v in model.state_dict().items()}
    fastdense.DenseNet(**options).load_state_dict(old, strict=True)


def test_a_layer_by_itself_is_the_textbook_layer() -> None:
    layer = fastdense.DenseLayer(6, 4, 2)
    features = [torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)]
    got = layer(features)
    assert got.shape == (2, 4, 4, 4)
    assert torch.equal(layer.eval()(torch.cat(features, 1)), layer(features))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transition_pools_first_and_gives_the_same(dims: int) -> None:
    torch.manual_seed(0)
    fast = fastdense.Transition(6, 3, spatial_dims=dims, dtype=torch.float64)
    reference = fastdense.reference.ConcatTransition(6, 3, spatial_dims=dims, dtype=torch.float64)
    reference.load_state_dict(fast.state_dict(), strict=True)
    x = random_input((2, 6, *(7, 5, 4)[:dims]))
    assert_same(results(fast, x), results(reference, x))
    assert_same(results(fast.eval(), x), results(reference.eval(), x))


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


def test_environment_chooses_the_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fast = block_pair(2, 6, 4, 4)
    x = random_input((2, 6, 4, 4))
    with fastdense.memory.saved_bytes(fast) as kept:
        fast(x)
    monkeypatch.setenv("FASTDENSE_IMPL", "reference")
    with fastdense.memory.saved_bytes(fast) as kept_by_reference:
        fast(x)
    assert kept_by_reference.bytes > kept.bytes
    monkeypatch.setenv("FASTDENSE_IMPL", "cudnn")
    with pytest.raises(ValueError, match=r"FASTDENSE_IMPL.*'cudnn'"):
        fast(x)


def test_the_environment_does_not_override_an_explicit_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDENSE_IMPL", "triton")
    _, fast = block_pair(2, 6, 4, 4, impl="torch")
    fast(random_input((2, 6, 4, 4)))


def test_functional_takes_foreign_layers() -> None:
    """Anything with norm1, conv1, norm2, conv2, drop_rate will do."""

    class Layer(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 8, 1, bias=False)
            self.norm2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1, bias=False)
            self.drop_rate = 0.0

    layers = nn.ModuleList([Layer(6), Layer(10)])
    assert fastdense.dense_block(torch.randn(2, 6, 3, 3), layers).shape == (2, 14, 3, 3)


def test_growth_may_differ_between_layers() -> None:
    """Layers of different width, as in networks whose growth rate rises with depth."""
    torch.manual_seed(0)
    layers = nn.ModuleList()
    channels = 5
    for k in (3, 1, 6):
        layers.append(fastdense.DenseLayer(channels, k, 2, dtype=torch.float64))
        channels += k
    x = random_input((2, 5, 4, 3))

    def run(impl: str) -> dict[str, Any]:
        return results(layers, x, forward=lambda x: fastdense.dense_block(x, layers, impl=impl))

    want, got = run("reference"), run("torch")
    for name in want:
        if "running" not in name and "num_batches" not in name:
            assert_close(name, got[name], want[name])
