"""Against the real torchvision: weights both ways, initial weights, outputs, gradients, statistics."""

import pytest
import torch
from helpers import peers
from helpers.blocks import assert_close, assert_same, random_input, results

import fastdense


@pytest.mark.parametrize(("name", "mode"), [("densenet121", "activations"), ("densenet201", "bottlenecks")])
def test_named_networks_equal_torchvisions(name: str, mode: str) -> None:
    theirs = getattr(peers.torchvision(), name)(num_classes=10).double()
    ours = getattr(fastdense, name)(num_classes=10, recompute=mode, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = random_input((2, 3, 64, 97))
    for _ in range(2):
        assert_same(results(ours, x), results(theirs, x))
    assert_close("evaluation", ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("name", ["densenet121", "densenet161", "densenet169", "densenet201"])
def test_initial_weights_under_one_seed(name: str) -> None:
    found = []
    for package in (peers.torchvision(), fastdense):
        torch.manual_seed(5)
        found.append(getattr(package, name)().state_dict())
    for (key, want), (our_key, got) in zip(*(state.items() for state in found), strict=True):
        assert key == our_key and torch.equal(got, want), key


def test_positional_arguments_are_torchvisions() -> None:
    theirs = peers.torchvision().DenseNet(8, (2, 3), 16, 3, 0.1, 7, True)
    ours = fastdense.DenseNet(8, (2, 3), 16, 3, 0.1, 7, True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert ours.features.denseblock1["denselayer1"].drop_rate == 0.1


def test_a_dense_block_runs_torchvisions_layers() -> None:
    """The functional form runs torchvision's own layer modules."""
    block = peers.torchvision().densenet._DenseBlock(3, 6, 4, 4, 0.0).double()
    x = random_input((2, 6, 5, 4))
    initial = {key: value.clone() for key, value in block.state_dict().items()}
    want = results(block, x)
    block.load_state_dict(initial)
    got = results(block, x, forward=lambda x: fastdense.dense_block(x, block.values(), impl="torch"))
    assert_same(got, want)
