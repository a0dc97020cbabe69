"""Dropout: reproducible masks that nobody stores."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.blocks import MODES, Results, assert_same, block_pair, random_input, results
from torch import Tensor, nn

from fastdense import reference
from fastdense.backends import philox

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("seed", [0, 2**62 + 12345, -5], ids=["zero", "large", "negative"])
def test_philox_gives_the_published_vector_and_equals_plain_integers(seed: int) -> None:
    """The known answer of Random123's Philox-4x32-10."""
    zeros = philox.philox_4x32(torch.tensor([0]), torch.tensor([0]), 0)[0]
    assert [hex(v) for v in zeros.tolist()] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]
    counters = [0, 1, 2**31 + 7, 2**40 + 3]
    got = philox.philox_4x32(torch.tensor([seed]), torch.tensor(counters), 9)
    for row, counter in zip(got.tolist(), counters, strict=True):
        c, key = [counter & 0xFFFFFFFF, counter >> 32, 9, 0], [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
        for _ in range(10):
            p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(p1 >> 32) ^ c[1] ^ key[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ key[1], p0 & 0xFFFFFFFF]
            key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
        assert row == c


def test_masks_have_the_right_rate_and_differ_between_layers_and_seeds() -> None:
    masks = [philox.keep_mask(torch.tensor([s]), layer, 0, 100_000, 0.2) for s, layer in ((1, 0), (1, 1), (2, 0))]
    for mask in masks:
        assert abs(mask.double().mean().item() - 0.8) < 0.005
    for start in (1, 2, 3, 4, 1001):  # wherever it is cut
        cut = philox.keep_mask(torch.tensor([1]), 0, start, 997, 0.2)
        assert torch.equal(cut, masks[0][start : start + 997])
    for i, j in ((0, 1), (0, 2), (1, 2)):
        agreement = (masks[i] == masks[j]).double().mean().item()
        assert abs(agreement - (0.8**2 + 0.2**2)) < 0.01


def given_masks(seed: Tensor, per_channel: bool) -> Callable[..., Tensor]:
    """Stands in for F.dropout and feeds the reference block fastdense's masks, layer by layer."""
    layers = itertools.count()

    def dropout(h: Tensor, p: float, training: bool) -> Tensor:
        n, k, *spatial = h.shape
        keep = philox.keep_mask(seed, next(layers), 0, n * k if per_channel else h.numel(), p)
        mask = keep.view(n, k, *[1] * len(spatial)) if per_channel else keep.view(n, *spatial, k).movedim(-1, 1)
        return h * mask / (1 - p) if p < 1 else h * 0

    return dropout


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("p", [0.2, 1.0])
@pytest.mark.parametrize("shape", [(3, 6, 5, 4), (2, 6, 7), (2, 6, 3, 2, 4)], ids=["2D", "1D", "3D"])
def test_equal_to_the_reference_with_the_same_mask(
    shape: tuple[int, ...], p: float, per_channel: bool, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(block: nn.Module) -> None:
        for layer in block.children():
            layer.drop_rate, layer.drop_channels = p, per_channel

    ref, fast = block_pair(3, 6, 4, 4, spatial_dims=len(shape) - 2, change=choose, recompute=mode)
    x = random_input(shape)
    torch.manual_seed(21)
    got = results(fast, x)
    torch.manual_seed(21)
    masks = given_masks(torch.randint(2**63 - 1, (1,)), per_channel)
    monkeypatch.setattr(F, "dropout", masks)
    monkeypatch.setattr(reference, "_CHANNEL_DROPOUT", dict.fromkeys((3, 4, 5), masks))
    assert_same(got, results(ref, x))


@pytest.mark.parametrize("size", [600, 3000])
@pytest.mark.parametrize("per_channel", [False, True])
def test_chunks_see_the_same_mask(per_channel: bool, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> Results:
        _, fast = block_pair(2, 6, 4, 5, drop_rate=0.4)
        for layer in fast.children():
            layer.drop_channels = per_channel
        torch.manual_seed(2)
        return results(fast, random_input((2, 6, 13, 5)))

    want = run()
    monkeypatch.setattr("fastdense.backends.torch_backend.CHUNK_BYTES", size)
    assert_same(run(), want)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("dropping", [0, 1], ids=["first", "second"])
def test_only_a_layer_in_training_drops(dropping: int, impl: str) -> None:
    _, block = block_pair(2, 6, 4, 4, drop_rate=1.0, impl=impl)
    for i, layer in enumerate(block.children()):
        layer.training = i == dropping
    new = block(random_input((2, 6, 4, 4)))[:, 6:].split(4, 1)
    assert [not part.any() for part in new] == [dropping == 0, dropping == 1]


def test_pytorchs_seed_governs_the_mask_and_evaluation_draws_none() -> None:
    def after(seed: int, block: nn.Module) -> tuple[Tensor, bool]:
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        return block(x), not torch.equal(before, torch.get_rng_state())

    x = random_input((2, 6, 4, 4)).detach()
    _, dropping = block_pair(2, 6, 4, 4, drop_rate=0.5)
    (first, drawn), (again, _), (other, _) = (after(seed, dropping) for seed in (1, 1, 2))
    assert drawn and torch.equal(first, again) and not torch.equal(first, other)
    (first, drawn), (other, _) = (after(seed, dropping.eval()) for seed in (1, 2))
    assert not drawn and torch.equal(first, other)
    assert not after(1, block_pair(2, 6, 4, 4)[1])[1]
