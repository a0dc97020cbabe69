"""How many launches a layer costs: on small features and late blocks they are what a step waits for."""

from collections import Counter
from typing import Any

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
    layers: int, *, recompute: bool = False, bn_size: int | None = 4, weights: torch.dtype = F16, drop: float = 0.0,
    contiguous: bool = False,
) -> Counter[str]:  # fmt: skip
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
    with LaunchCounter(running=False) as counter:
        schedule.forward(TritonBackend(x), x, plan, features, Z, given_moments=False)
        schedule.backward(TritonBackend(x), G, plan, features, Z, first=0, recompute=recompute)
    return counter.counts


def per_layer(**options: Any) -> float:
    two, four = (launches(layers, **options).total() for layers in (2, 4))
    return (four - two) / 2


LAYERS: dict[str, tuple[dict[str, Any], int]] = {
    "forward two, backward two": ({}, 4),
    "the bottleneck again where it was not saved": ({"recompute": True}, 5),
    "fp32 weights, as under autocast": ({"weights": F32}, 4),
    "3x3 weights in torchvision's order, which one copy turns": ({"contiguous": True}, 4),
    "basic": ({"bn_size": None}, 2),
    "dropout": ({"drop": 0.2}, 5),
}


@pytest.mark.parametrize("name", LAYERS)
def test_launches_that_one_more_layer_adds(name: str) -> None:
    options, want = LAYERS[name]
    assert per_layer(**options) == want


def test_a_lazy_gradient_written_out_costs_one_launch_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MATERIALISE_PIXELS", 0)
    assert per_layer() == 5


@pytest.mark.parametrize("weights", [F16, F32], ids=["same dtype", "cast"])
def test_a_blocks_borders_take_few_launches_and_one_cast_each_way(weights: torch.dtype) -> None:
    """The entering channels' copy, counters, and the last weight gradient: their number does not grow."""
    counts = launches(1, weights=weights)
    casts = 2 * (weights is F32)
    assert counts["_foreach_copy_"] == casts
    assert counts.total() - casts - 4 <= 5, counts
