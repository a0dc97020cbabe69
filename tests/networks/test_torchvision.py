"""Against the real torchvision: weights both ways, initial weights, outputs, gradients, statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import peers
from helpers.blocks import assert_close, assert_same, random_input, results

import fastdense

SMALL: dict[str, Any] = {"growth_rate": 8, "num_init_features": 16, "num_classes": 7, "bn_size": 3}


@pytest.mark.parametrize("name", ["densenet121", "densenet201"])
@pytest.mark.parametrize("mode", ["activations", "bottlenecks"])
def test_named_networks(name: str, mode: str) -> None:
    theirs = getattr(peers.torchvision(), name)(num_classes=10).double()
    ours = getattr(fastdense, name)(num_classes=10, recompute=mode, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = random_input((2, 3, 64, 97))
    for _ in range(2):
        got, want = results(ours, x), results(theirs, x)
        assert_same(got, want)
    assert_close("evaluation", ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("name", ["densenet121", "densenet161", "densenet169", "densenet201"])
def test_initial_weights_under_one_seed(name: str) -> None:
    torch.manual_seed(5)
    theirs = getattr(peers.torchvision(), name)()
    torch.manual_seed(5)
    ours = getattr(fastdense, name)()
    for (key, want), (our_key, got) in zip(theirs.state_dict().items(), ours.state_dict().items(), strict=True):
        assert key == our_key
        assert torch.equal(got, want), key


def test_arguments_are_torchvisions() -> None:
    torch.manual_seed(5)
    theirs = peers.torchvision().DenseNet(8, (2, 3), 16, 3, 0.1, 7, True)
    torch.manual_seed(5)
    ours = fastdense.DenseNet(8, (2, 3), 16, 3, 0.1, 7, True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert ours.features.denseblock1["denselayer1"].drop_rate == 0.1


def test_block_takes_torchvisions_layers() -> None:
    """The functional form runs torchvision's own layer modules."""
    block = peers.torchvision().densenet._DenseBlock(3, 6, 4, 4, 0.0).double()
    x = random_input((2, 6, 5, 4))
    initial = {key: value.clone() for key, value in block.state_dict().items()}
    want = results(block, x)
    block.load_state_dict(initial)
    got = results(block, x, forward=lambda x: fastdense.dense_block(x, block.values(), impl="torch"))
    assert_same(got, want)


@pytest.mark.parametrize(
    ("name", "activations", "bottlenecks"), [("densenet121", 4.6, 12.0), ("densenet201", 6.3, 17.0)]
)
def test_bytes_kept_against_torchvision(name: str, activations: float, bottlenecks: float) -> None:
    """The whole network, fp32, 224 x 224."""
    x = torch.randn(1, 3, 224, 224)
    kept = []
    for model in (
        getattr(peers.torchvision(), name)(),
        getattr(fastdense, name)(),
        getattr(fastdense, name)(recompute="bottlenecks"),
    ):
        with fastdense.memory.saved_bytes(model) as saved:
            model(x)
        kept.append(saved.bytes)
    print(name, [f"{bytes_ / 1e6:.1f} MB" for bytes_ in kept])
    assert kept[0] > activations * kept[1]
    assert kept[0] > bottlenecks * kept[2]
