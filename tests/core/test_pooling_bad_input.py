"""Bad input to stem, transition and head: an error names the value and what is allowed, and nothing has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.blocks import assert_same, random_input, results
from helpers.pooled import KINDS, Case, Stage, pair, small
from torch import nn

import fastdense
from fastdense.ops import validate

x = torch.zeros(3, 5, 5, 7, dtype=torch.float64)


def _set(stage: Stage, path: str, value: Any) -> Any:
    parent, _, name = path.rpartition(".")
    setattr(stage.get_submodule(parent), name, value)
    return stage(x)


def _on_meta(stage: Stage, name: str) -> Any:
    stage.get_submodule(name).to("meta")
    return stage(x)


def _statistics_on_meta(stage: Stage) -> Any:
    stage.norm.running_mean = stage.norm.running_mean.to("meta")
    return stage(x)


def _moments(channels: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Any:
    return torch.zeros(channels, dtype=dtype, device=device), torch.ones(channels, dtype=dtype, device=device)


Call = Callable[[Any], Any]

ANY: dict[str, tuple[type[Exception], str, Call]] = {
    "too few channels": (ValueError, r"5 channels.*\(3, 4, 5, 7\)", lambda s: s(x[:, :4])),
    "too many channels": (ValueError, r"5 channels.*\(3, 6, 5, 7\)", lambda s: s(torch.zeros(3, 6, 5, 7).double())),
    "rank 2": (ValueError, r"1 to 3 spatial dimensions.*\(3, 5\)", lambda s: s(x[..., 0, 0])),
    "rank 3": (ValueError, r"4 dimensions, as the norm.*\(3, 5, 7\)", lambda s: s(x[:, :, 0])),
    "one image without a batch": (ValueError, r"4 dimensions.*\(5, 5, 7\)", lambda s: s(x[0])),
    "rank 5": (ValueError, r"4 dimensions.*\(3, 5, 5, 7, 1\)", lambda s: s(x[..., None])),
    "rank 6": (ValueError, r"1 to 3 spatial.*\(3, 5, 5, 7, 1, 1\)", lambda s: s(x[..., None, None])),
    "rank 0": (ValueError, r"1 to 3 spatial dimensions.*\(\)", lambda s: s(torch.tensor(1.0))),
    "integers": (ValueError, r"floating-point.*torch.int64", lambda s: s(x.long())),
    "booleans": (ValueError, r"floating-point.*torch.bool", lambda s: s(x.bool())),
    "complex": (ValueError, r"floating-point.*torch.complex128", lambda s: s(x + 0j)),
    "a list": (TypeError, r"torch.Tensor, got list", lambda s: s([x])),
    "None": (TypeError, r"torch.Tensor, got NoneType", lambda s: s(None)),
    "no pixels": (ValueError, r"at least one pixel.*\(3, 5, 0, 7\)", lambda s: s(x[:, :, :0])),
    "norm elsewhere": (ValueError, r"'cpu'.*norm's weight is on 'meta'.*\.to\(\)", lambda s: _on_meta(s, "norm")),
    "statistics elsewhere": (ValueError, r"'cpu'.*norm's statistics is on 'meta'", _statistics_on_meta),
    "x elsewhere": (ValueError, r"'meta'.*'s weight is on 'cpu'", lambda s: s(x.to("meta"))),
    "unknown impl": (ValueError, r"impl.*'reference'.*'cuda'", lambda s: _set(s, "impl", "cuda")),
    "impl of another type": (ValueError, r"impl.*got 3", lambda s: _set(s, "impl", 3)),
    "triton without kernels": (RuntimeError, r"impl='triton' cannot run.*'torch'", lambda s: _set(s, "impl", "triton")),
    "another norm": (RuntimeError, r"norm is a GroupNorm.*'reference'", lambda s: _set(s, "norm", nn.GroupNorm(1, 5))),
}  # fmt: skip

WINDOWED: dict[str, tuple[type[Exception], str, Call]] = {
    "too small": (ValueError, r"at least \(.*\) pixels.*\(3, 5, 1, 1\)", lambda s: s(x[:, :, :1, :1])),
    "too small in one dimension": (ValueError, r"at least \(.*\) pixels.*\(3, 5, 5, 1\)", lambda s: s(x[..., :1])),
    "sizes for three dimensions": (
        ValueError, r"each of 2 dimensions.*\(2, 2, 2\)", lambda s: _set(s, "pool.kernel_size", (2, 2, 2))
    ),
}  # fmt: skip

STEM: dict[str, tuple[type[Exception], str, Call]] = {
    "no window": (ValueError, r"positive sizes.*kernel_size=0", lambda s: _set(s, "pool.kernel_size", 0)),
    "a stride backwards": (ValueError, r"positive sizes.*stride=-1", lambda s: _set(s, "pool.stride", -1)),
    "no stride": (ValueError, r"positive sizes.*stride=0", lambda s: _set(s, "pool.stride", 0)),
    "padding of more than half": (ValueError, r"at most half.*padding=2", lambda s: _set(s, "pool.padding", 2)),
    "negative padding": (ValueError, r"at most half.*padding=-1", lambda s: _set(s, "pool.padding", -1)),
    "pooling for another rank": (
        ValueError, r"3 dimensions, as the pooling reads", lambda s: _set(s, "pool", nn.MaxPool1d(2))
    ),
    "indices too": (RuntimeError, r"returns indices", lambda s: _set(s, "pool.return_indices", True)),
}  # fmt: skip

TRANSITION: dict[str, tuple[type[Exception], str, Call]] = {
    "no window": (ValueError, r"positive sizes.*kernel_size=0", lambda s: _set(s, "pool", nn.AvgPool2d(0))),
    "conv elsewhere": (ValueError, r"'cpu'.*conv's weight is on 'meta'", lambda s: _on_meta(s, "conv")),
    "conv of another dtype": (ValueError, r"float64.*conv's weight is torch.float32", lambda s: _set(
        s, "conv", nn.Conv2d(5, 4, 1, bias=False))),
    "half features": (ValueError, r"float16.*torch.float64.*autocast", lambda s: s(x.half())),
    "conv of other channels": (ValueError, r"norm's 5 channels.*\(4, 6, 1, 1\)", lambda s: _set(
        s, "conv", nn.Conv2d(6, 4, 1, bias=False, dtype=torch.float64))),
    "conv for another rank": (ValueError, r"3 dimensions, as the conv reads", lambda s: _set(
        s, "conv", nn.Conv1d(5, 4, 1, bias=False, dtype=torch.float64))),
    "pooling for another rank": (ValueError, r"5 dimensions, as the pooling reads", lambda s: _set(
        s, "pool", nn.AvgPool3d(2))),
}  # fmt: skip

MOMENTS: dict[str, tuple[type[Exception], str, Call]] = {
    "of another size": (ValueError, r"\[5\] .*\[4\]", lambda s: s.with_moments(x, _moments(4))),
    "of another dtype": (ValueError, r"float64.*float32", lambda s: s.with_moments(x, _moments(5, torch.float32))),
    "elsewhere": (ValueError, r"'cpu'.*'meta'", lambda s: s.with_moments(x, _moments(5, device="meta"))),
    "no pair": (ValueError, r"pair.*\(mean, var\)", lambda s: s.with_moments(x, (torch.zeros(5),))),
    "no tensors": (ValueError, r"pair.*\(mean, var\)", lambda s: s.with_moments(x, (None, None))),
}

CALLS = [
    *((kind, name, *call) for kind in KINDS for name, call in ANY.items()),
    *((kind, name, *call) for kind in ("stem", "transition") for name, call in WINDOWED.items()),
    *(("stem", name, *call) for name, call in STEM.items()),
    *(("transition", name, *call) for name, call in TRANSITION.items()),
    *((kind, f"moments {name}", *call) for kind in ("transition", "head") for name, call in MOMENTS.items()),
]


@pytest.mark.parametrize(
    ("kind", "name", "error", "message", "call"), [pytest.param(*c, id=f"{c[0]}: {c[1]}") for c in CALLS]
)
def test_calls(kind: str, name: str, error: type[Exception], message: str, call: Call, monkeypatch: Any) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    _, fast = pair(small(kind))
    before = {name: buffer.clone() for name, buffer in fast.named_buffers()}
    with pytest.raises(error, match=message):
        call(fast)
    for key, value in fast.named_buffers():
        assert value.device.type == "meta" or torch.equal(value, before[key]), key


@pytest.mark.parametrize(
    "case", [Case("stem", (1, 5, 1, 1), 3, 2, 1), Case("transition", (1, 5, 1), 1), Case("head", (1, 5, 1, 1, 1))]
)
def test_one_value_per_channel_in_training(case: Case) -> None:
    """As F.batch_norm; evaluation takes it."""
    textbook, fast = pair(case)
    for stage in (textbook, fast):
        with pytest.raises(ValueError, match=r"more than 1 value per channel.*[(\[]1, 5, 1"):
            stage(random_input(case.shape))
    assert int(fast.norm.num_batches_tracked) == 0
    textbook.norm.num_batches_tracked.zero_()  # PyTorch has counted the batch that it refused
    assert_same(results(fast.eval(), random_input(case.shape)), results(textbook.eval(), random_input(case.shape)))


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_of_other_dimensions(kind: str, dims: int) -> None:
    _, fast = pair(Case(kind, (3, 5, *(4, 4, 4)[:dims])))
    for other in {1, 2, 3} - {dims}:
        with pytest.raises(ValueError, match=rf"{dims + 2} dimensions, as the norm reads.*\(3, 5, 4"):
            fast(random_input((3, 5, *(4, 4, 4)[:other])))


@pytest.mark.parametrize("kind", KINDS)
def test_everything_on_meta_has_the_shape(kind: str) -> None:
    textbook, fast = pair(small(kind))
    assert fast.to("meta")(x.to("meta")).shape == textbook(x).shape


def test_the_environment_names_an_unknown_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in KINDS:
        _, fast = pair(small(kind), impl="auto")
        monkeypatch.setenv("FASTDENSE_IMPL", "cudnn")
        with pytest.raises(ValueError, match=r"FASTDENSE_IMPL.*'cudnn'"):
            fast(x)
        monkeypatch.delenv("FASTDENSE_IMPL")
        fast(x)


def test_modules_of_its_own_raise_as_well() -> None:
    """fastdense.Transition, and the network, whose stages carry the names."""
    transition = fastdense.Transition(5, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"5 channels.*\(3, 4, 5, 7\)"):
        transition(x[:, :4])
    with pytest.raises(TypeError, match="got str"):
        transition("x")
    net = fastdense.DenseNet(4, (1,), 6, num_classes=2)
    with pytest.raises(ValueError, match=r"more than 1 value.*\(1, 6, 1, 1\)"):
        net(torch.zeros(1, 3, 1, 1))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(RuntimeError, match="expected input"):
        net(torch.zeros(2, 4, 32, 32))
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])


def test_the_windows_of_a_module() -> None:
    assert validate.windows("maximum", nn.MaxPool2d(3, 2, 1)) == ("maximum", (3, 3), (2, 2), (1, 1))
    assert validate.windows("average", nn.AvgPool3d((1, 2, 3))) == ("average", (1, 2, 3), (1, 2, 3), (0, 0, 0))
    assert validate.windows("average", nn.AvgPool1d(2)) == ("average", (2,), (2,), (0,))
