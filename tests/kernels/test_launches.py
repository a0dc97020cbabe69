"""How many launches a layer costs: on small features and late blocks they are what a step waits for."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from helpers.blocks import randomise
from helpers.interpreter import LaunchCounter

from fastdense import DenseBlock
from fastdense.backends.triton_backend import TritonBackend
from fastdense.core import schedule
from fastdense.core.features import Features, LazyGradient, as_rows, empty_features
from fastdense.kernels import launch
from fastdense.ops import dense_block

F16, F32 = torch.float16, torch.float32
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def launches(
    layers: int,
    *,
    recompute: bool,
    bn_size: int | None,
    weights: torch.dtype,
    drop: float,
    contiguous: bool = False,
) -> Counter[str]:
    """What one forward and backward pass of a block launches."""
    block = DenseBlock(layers, 8, bn_size, 4, dtype=weights, device=DEVICE)
    if contiguous:
        for parameter in block.parameters():
            parameter.data = parameter.data.contiguous()
    randomise(block)
    x = torch.randn(2, 8, 5, 4, device=DEVICE).to(F16)
    params = [p.detach() for layer in block.values() for p in layer.parameters()]
    stages = 1 if bn_size is None else 2
    count = layers * stages
    seed = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    settings = dense_block.Settings(
        [1e-5] * count, [False] * count, [drop] * layers, False, stages == 2, True, 0, recompute, "triton", ""
    )
    plan = dense_block.build_layers(params, [], seed if drop else None, settings)
    channels, m = 8 + 4 * layers, 2 * 5 * 4
    X = empty_features((2, channels, 5, 4), dtype=F16, device=DEVICE)
    features = Features(as_rows(X), *torch.empty(2, channels, device=DEVICE))
    wide = 4 * (bn_size or 0)
    Z = [Features(x.new_empty(m, wide), *torch.empty(2, wide, device=DEVICE)) for _ in range(layers)]
    G = LazyGradient(torch.randn(m, channels, device=DEVICE).to(F16), *torch.zeros(2, channels, device=DEVICE))
    with LaunchCounter() as counter:
        schedule.forward(TritonBackend(x), x, plan, features, Z, given_moments=False)
        schedule.backward(TritonBackend(x), G, plan, features, Z, first=0, recompute=recompute)
    return counter.counts


def per_layer(**options: object) -> float:
    """Launches that one more layer adds."""
    two, four = (launches(layers, **options).total() for layers in (2, 4))  # type: ignore[arg-type]
    return (four - two) / 2


@pytest.mark.parametrize("weights", [F16, F32])  # fp32 weights of 16-bit features, as under autocast
@pytest.mark.parametrize("recompute", [False, True])
def test_a_layer_and_step(recompute: bool, weights: torch.dtype) -> None:
    """Forward two, backward two; the bottleneck again where it was not saved."""
    cast = 1 if weights is F32 else 0  # on a CPU each cast is an operator of its own; on a GPU one call takes them all
    counts = launches(3, recompute=recompute, bn_size=4, weights=weights, drop=0.0)
    assert counts["_foreach_copy_"] == 2 * cast
    assert per_layer(recompute=recompute, bn_size=4, weights=weights, drop=0.0) == (5 if recompute else 4)


def test_weights_in_another_order_are_copied_together() -> None:
    """As torchvision's modules hold them: a block's 3x3 weights take one copy, however many layers there are."""
    one, two = (launches(n, recompute=False, bn_size=4, weights=F16, drop=0.0, contiguous=True).total() for n in (2, 4))
    assert (two - one) / 2 == 4


def test_a_basic_layer() -> None:
    assert per_layer(recompute=False, bn_size=None, weights=F16, drop=0.0) == 2


def test_a_lazy_gradient_written_out_costs_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MATERIALISE_PIXELS", 0)
    assert per_layer(recompute=False, bn_size=4, weights=F16, drop=0.0) == 5


def test_dropout_costs_one_more() -> None:
    assert per_layer(recompute=False, bn_size=4, weights=F16, drop=0.2) == 5


def test_a_block_begins_and_ends_with_a_few() -> None:
    """The entering channels' copy, counters, and the last weight gradient: their number does not grow."""
    counts = launches(1, recompute=False, bn_size=4, weights=F16, drop=0.0)
    assert counts.total() - 4 <= 5, counts
