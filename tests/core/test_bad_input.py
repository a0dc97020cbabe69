"""Bad input: every case gets an error that names the value and what is allowed, and nothing has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.blocks import block_pair
from torch import nn

import fastdense
from fastdense import DenseBlock, DenseNet, Transition, dense_block

x = torch.zeros(2, 6, 4, 4, dtype=torch.float64)
F32, F64 = torch.float32, torch.float64


def _mixed_layers() -> list[nn.Module]:
    return [fastdense.DenseLayer(6, 4, 2).double(), fastdense.DenseLayer(10, 4, None).double()]


def _wrong_chain() -> list[nn.Module]:
    return [fastdense.DenseLayer(6, 4, 2).double(), fastdense.DenseLayer(11, 4, 2).double()]


def _on_meta(block: Any) -> Any:
    block["denselayer2"].conv1.to("meta")
    return block(x)


def _norm_on_meta(block: Any) -> Any:
    block["denselayer2"].norm2.to("meta")
    return block(x)


def _wrong_drop_rate(block: Any) -> Any:
    block["denselayer2"].drop_rate = 1.5
    return block(x)


def _half_layer(block: Any) -> Any:
    block["denselayer2"].conv1.half()
    return block(x)


def _moments(*shape_dtype: Any) -> tuple[torch.Tensor, torch.Tensor]:
    shape, dtype = shape_dtype
    return torch.zeros(shape, dtype=dtype), torch.ones(shape, dtype=dtype)


def _with_moments(block: Any, moments: Any) -> Any:
    return dense_block(x, block.values(), moments=moments)


def _set(block: Any, name: str, value: object) -> Any:
    setattr(block, name, value)
    return block(x)


CALLS: dict[str, tuple[type[Exception], str, Callable[[Any], Any]]] = {
    "too few channels": (ValueError, r"6 channels.*\(2, 5, 4, 4\)", lambda b: b(x[:, :5])),
    "too many channels": (ValueError, r"6 channels.*\(2, 7, 4, 4\)", lambda b: b(torch.zeros(2, 7, 4, 4).double())),
    "rank 3": (ValueError, r"4 dimensions.*\(6, 4, 4\)", lambda b: b(x[0])),
    "rank 5": (ValueError, r"4 dimensions.*\(2, 6, 4, 4, 1\)", lambda b: b(x[..., None])),
    "rank 0": (ValueError, r"4 dimensions", lambda b: b(torch.tensor(1.0))),
    "integers": (ValueError, r"floating-point.*torch.int64", lambda b: b(x.long())),
    "booleans": (ValueError, r"floating-point.*torch.bool", lambda b: b(x.bool())),
    "complex": (ValueError, r"floating-point.*torch.complex128", lambda b: b(x + 0j)),
    "a list": (TypeError, r"torch.Tensor, got list", lambda b: b([x])),
    "None": (TypeError, r"torch.Tensor, got NoneType", lambda b: b(None)),
    "float32 features": (ValueError, r"float32.*conv1 of layer 0 is torch.float64.*\.to\(\)", lambda b: b(x.float())),
    "half features": (ValueError, r"torch.float16.*torch.float64", lambda b: b(x.half())),
    "one layer half": (ValueError, r"conv1 of layer 1 is torch.float16", _half_layer),
    "one layer elsewhere": (ValueError, r"'cpu'.*conv1 of layer 1 is on 'meta'", _on_meta),
    "one norm elsewhere": (ValueError, r"'cpu'.*norm2 of layer 1 is on 'meta'", _norm_on_meta),
    "drop rate set later": (ValueError, r"drop_rate of layer 1.*got 1.5", _wrong_drop_rate),
    "no pixels": (ValueError, r"at least one pixel.*\(2, 6, 0, 4\)", lambda b: b(x[:, :, :0])),
    "one value per channel": (ValueError, r"more than 1 value.*\(1, 6, 1, 1\)", lambda b: b(x[:1, :, :1, :1])),
    "unknown recompute": (ValueError, r"recompute.*'activations'.*'all'", lambda b: _set(b, "recompute", "all")),
    "unknown impl": (ValueError, r"impl.*'reference'.*'cuda'", lambda b: _set(b, "impl", "cuda")),
    "impl of another type": (ValueError, r"impl.*got 3", lambda b: _set(b, "impl", 3)),
    "triton without kernels": (RuntimeError, r"impl='triton' cannot run.*'torch'", lambda b: _set(b, "impl", "triton")),
    "recompute None": (ValueError, r"recompute.*None", lambda b: dense_block(x, b.values(), recompute=None)),
    "no layers": (ValueError, r"at least one layer", lambda b: dense_block(x, [])),
    "layers with and without bottleneck": (ValueError, r"layer 1 differs", lambda b: dense_block(x, _mixed_layers())),
    "layers that do not chain": (ValueError, r"layer 1 .*10 channels.*11", lambda b: dense_block(x, _wrong_chain())),
    "moments of another size": (ValueError, r"\[6\] .*\[5\]", lambda b: _with_moments(b, _moments(5, F64))),
    "moments of another dtype": (ValueError, r"float64.*float32", lambda b: _with_moments(b, _moments(6, F32))),
    "moments that are no pair": (ValueError, r"pair.*\(mean, var\)", lambda b: _with_moments(b, (torch.zeros(6),))),
    "moments that are no tensors": (ValueError, r"pair.*\(mean, var\)", lambda b: _with_moments(b, (None, None))),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str) -> None:
    error, message, call = CALLS[name]
    _, block = block_pair(3, 6, 2, 4, drop_rate=0.1)
    before = {key: value.clone() for key, value in block.state_dict().items()}
    rng = torch.get_rng_state()
    with pytest.raises(error, match=message):
        call(block)
    assert torch.equal(rng, torch.get_rng_state()) or "layers" in name  # building new layers draws their weights
    for key, value in block.state_dict().items():
        if value.device == before[key].device and value.dtype == before[key].dtype:
            assert torch.equal(value, before[key]), key


CONSTRUCTORS: dict[str, tuple[str, Callable[[], Any]]] = {
    "no layers": (r"num_layers.*positive integer, got 0", lambda: DenseBlock(0, 6, 4, 4)),
    "negative layers": (r"num_layers.*got -1", lambda: DenseBlock(-1, 6, 4, 4)),
    "fractional layers": (r"num_layers.*got 2.0", lambda: DenseBlock(2.0, 6, 4, 4)),
    "no input channels": (r"num_input_features.*got 0", lambda: DenseBlock(2, 0, 4, 4)),
    "bn_size 0": (r"bn_size.*got 0", lambda: DenseBlock(2, 6, 0, 4)),
    "growth rate 0": (r"growth_rate.*got 0", lambda: DenseBlock(2, 6, 4, 0)),
    "growth rate None": (r"growth_rate.*got None", lambda: DenseBlock(2, 6, 4, None)),
    "drop rate 1.5": (r"drop_rate.*between 0 and 1, got 1.5", lambda: DenseBlock(2, 6, 4, 4, 1.5)),
    "drop rate -0.1": (r"drop_rate.*got -0.1", lambda: DenseBlock(2, 6, 4, 4, -0.1)),
    "drop rate NaN": (r"drop_rate.*got nan", lambda: DenseBlock(2, 6, 4, 4, float("nan"))),
    "recompute": (r"recompute.*got 'all'", lambda: DenseBlock(2, 6, 4, 4, recompute="all")),
    "impl": (r"impl.*got 'Triton'", lambda: DenseBlock(2, 6, 4, 4, impl="Triton")),
    "flag against recompute": (
        r"memory_efficient=True.*recompute='activations'",
        lambda: DenseBlock(2, 6, 4, 4, memory_efficient=True, recompute="activations"),
    ),
    "four dimensions": (r"spatial_dims must be one of 1, 2, 3, got 4", lambda: DenseBlock(2, 6, 4, 4, spatial_dims=4)),
    "reference, too": (r"growth_rate.*got 0", lambda: fastdense.reference.ConcatDenseBlock(2, 6, 4, 0)),
    "transition to nothing": (r"num_output_features.*got 0", lambda: Transition(6, 0)),
    "transition of nothing": (r"num_input_features.*got -2", lambda: Transition(-2, 3)),
    "transition impl": (r"impl.*got 'fast'", lambda: Transition(6, 3, impl="fast")),
    "no blocks": (r"block_config.*got \(\)", lambda: DenseNet(block_config=())),
    "empty block": (r"num_layers.*got 0", lambda: DenseNet(block_config=(2, 0))),
    "no classes": (r"num_classes.*got 0", lambda: DenseNet(num_classes=0)),
    "no input channels of a network": (r"in_channels.*got 0", lambda: DenseNet(in_channels=0)),
    "network dimensions": (r"spatial_dims.*got 0", lambda: DenseNet(spatial_dims=0)),
    "named network": (r"impl.*got 'gpu'", lambda: fastdense.densenet121(impl="gpu")),
}


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_constructors(name: str) -> None:
    message, call = CONSTRUCTORS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_unknown_keyword() -> None:
    with pytest.raises(TypeError, match="growth"):
        fastdense.densenet121(growth=3)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["activations", "bottlenecks"])
def test_an_empty_batch_does_what_the_textbook_does(mode: str, training: bool) -> None:
    from helpers.blocks import assert_same, results

    reference, fast = block_pair(2, 6, 4, 4, recompute=mode, change=lambda block: block.train(training))
    empty = torch.zeros(0, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    assert_same(results(fast, empty), results(reference, empty))
