"""The Triton kernels against a float64 truth, PyTorch and the torch backend: on a GPU, or in Triton's interpreter."""

from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from helpers import blocks
from helpers.blocks import assert_close, block_pair, learning, random_input, results
from helpers.budget import BF16, DEVICE, F16, F32, SHAPES, check_budget, check_shape, ordinary_gammas, tiles
from torch import Tensor, nn

import fastdense
from fastdense.backends.philox import keep_mask
from fastdense.backends.torch_backend import TorchBackend
from fastdense.backends.triton_backend import TritonBackend
from fastdense.core.features import Features, LazyGradient
from fastdense.core.primitives import Conv, Dropout, Norm
from fastdense.kernels import launch

pytestmark = pytest.mark.usefixtures("kernels_checked")


def _input(shape: tuple[int, ...], dtype: torch.dtype = F32) -> Tensor:
    return random_input(shape, dtype=dtype).detach().to(DEVICE).requires_grad_()


@pytest.mark.parametrize(("name", "dtype"), [*product(SHAPES, (F32, F16)), ("plain", BF16), ("basic", BF16)], ids=str)
def test_block_equals_the_reference_at_every_shape(name: str, dtype: torch.dtype) -> None:
    check_shape(name, dtype)


def _contiguous(block: nn.Module) -> None:
    for parameter in block.parameters():
        parameter.data = parameter.data.contiguous()


# layers, C0, bn_size and k; shape; dtype; options
BUDGETS: dict[str, tuple[tuple[Any, ...], tuple[int, ...], torch.dtype, dict[str, Any]]] = {
    "ReLUs that roundings switch, fp16": ((1, 6, 3, 4), (2, 6, 4, 4), F16, {"decided": False, "inputs": 15}),
    "ReLUs that roundings switch, bf16": ((1, 6, 3, 4), (2, 6, 4, 4), BF16, {"decided": False, "inputs": 15}),
    "small tiles, contiguous input": ((1, 19, 5, 4), (2, 19, 5, 7), F32, {"tile": 16, "layout": "contiguous"}),
    "small tiles, a slice as input": ((1, 19, 5, 4), (2, 19, 5, 7), F16, {"tile": 16, "layout": "slice"}),
    "weights as other modules hold them": ((2, 6, 3, 4), (2, 6, 5, 4), F32, {"change": _contiguous}),
    "weights as other modules hold them, fp16": ((2, 6, 3, 4), (2, 6, 5, 4), F16, {"change": _contiguous}),
    "large means": ((2, 8, 3, 4), (4, 8, 7, 7), F32, {"shift": 1e4, "recompute": "activations"}),
    "large means, bottlenecks": ((2, 8, 3, 4), (4, 8, 7, 7), F32, {"shift": 1e4, "recompute": "bottlenecks"}),
    "norms in evaluation": ((3, 6, 3, 4), (2, 6, 5, 4), F32, {"change": blocks.evaluate}),
    "some norms frozen": ((3, 6, 3, 4), (2, 6, 5, 4), F32, {"change": blocks.freeze_some}),
    "eps of every size": ((3, 6, 3, 4), (2, 6, 5, 4), F32, {"change": blocks.other_eps}),
    "kernels of 5 x 3": ((2, 6, 3, 4), (2, 6, 5, 4), F32, {"change": blocks.wider_kernel}),
}


@pytest.mark.parametrize("name", BUDGETS)
def test_block_equals_the_reference_with(name: str) -> None:
    arguments, shape, dtype, options = BUDGETS[name]
    options = dict(options)
    tile = options.pop("tile", None)
    with tiles(tile) if tile else nullcontext():
        check_budget(arguments, shape, dtype, **options)


def test_a_lazy_gradient_written_out_for_many_taps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MATERIALISE_PIXELS", 0)
    with tiles(16):
        check_budget((2, 7, 2, 12), (1, 7, 4, 5), F32)


@pytest.mark.parametrize("form", ["taps", "scratch"])
@pytest.mark.parametrize("dtype", [F32, F16], ids=["fp32", "fp16"])
def test_other_forms_of_the_convolution(form: str, dtype: torch.dtype) -> None:
    """A load for each tap, which checks the shifted products; and PyTorch's convolution of written activations."""
    with launch.override("bn_relu_conv", form=form):
        check_budget((2, 7, 3, 5), (2, 7, 5, 7), dtype)
        check_budget((1, 6, None, 4), (2, 6, 3, 2, 4), dtype)


SUBSETS = {
    "only the input": (learning(), True),
    "weights without the input": (learning("conv"), False),
    "norms": (learning("norm"), False),
    "second layer's first conv": (learning("denselayer2.conv1"), False),
    "first layer's beta": (learning("denselayer1.norm1.bias"), False),
    "last layer's gamma": (learning("denselayer3.norm2.weight"), False),
}


@pytest.mark.parametrize("bn_size", [3, None], ids=["bottleneck", "basic"])
@pytest.mark.parametrize("subset", SUBSETS)
def test_gradients_where_only_some_are_asked_for(subset: str, bn_size: int | None) -> None:
    change, needs_x = SUBSETS[subset]
    check_budget((3, 5, bn_size, 4), (2, 5, 4, 3), F32, change=change, needs_x=needs_x)


@pytest.mark.parametrize("given", [True, False], ids=["given", "computed"])
def test_moments_are_differentiable_outputs_and_inputs(given: bool) -> None:
    gradients = []
    for impl, dtype in (("triton", F32), ("torch", torch.float64)):
        fast = block_pair(2, 5, 3, 4, dtype=F32)[1].to(DEVICE, dtype)
        x = _input((2, 5, 4, 3)).to(dtype).detach().requires_grad_()
        var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        moments = (mean, var) if given else None
        X, mean, var = fastdense.dense_block(x, fast.values(), impl=impl, moments=moments, return_moments=True)
        loss = (X * mean.view(1, -1, 1, 1)).square().sum() + (mean.sin() + var.log()).sum()
        gradients.append(torch.autograd.grad(loss, [x, *fast.parameters()]))
    for i, (got, want) in enumerate(zip(*gradients, strict=True)):
        assert_close(f"gradient {i}", got, want, 1e-4, 1e6)


@pytest.mark.parametrize("per_channel", [False, True], ids=["elements", "channels"])
@pytest.mark.parametrize("seed", [0, 2**62 + 12345, -5], ids=["zero", "large", "negative"])
def test_dropout_masks_equal_the_torch_backends(seed: int, per_channel: bool) -> None:
    n, channels, height, width = 3, 7, 5, 3
    seeds = torch.tensor([seed], device=DEVICE)
    for layer, p in ((0, 0.2), (1, 0.5), (17, 1e-9), (2, 1.0)):
        x = torch.ones(n, channels, height, width, device=DEVICE)
        backend = TritonBackend(x)
        ones = torch.ones(backend.m, channels, device=DEVICE)
        grad, features = LazyGradient(ones, None, None), Features(ones, None, None)
        dropout = Dropout(seeds, layer, p, per_channel)
        got = backend.resolve_rows(grad, features, torch.empty_like(ones), channels, dropout)
        count = n * channels if per_channel else ones.numel()
        keep = keep_mask(seeds, layer, 0, count, p)
        if per_channel:
            keep = keep.view(n, 1, channels).expand(n, height * width, channels)
        want = keep.reshape(ones.shape).float() * (1 / (1 - p) if p < 1 else 0.0)
        assert torch.equal(got != 0, want != 0)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("per_channel", [False, True], ids=["elements", "channels"])
def test_a_block_with_dropout_equals_the_torch_backends(per_channel: bool) -> None:
    def choose(block: nn.Module) -> None:
        for layer in block.children():
            layer.drop_rate, layer.drop_channels = 0.4, per_channel

    found = []
    for impl in ("triton", "torch"):
        _, fast = block_pair(2, 6, 4, 5, dtype=F32, impl=impl, change=choose)
        torch.manual_seed(21)
        found.append(results(fast.to(DEVICE), _input((3, 6, 5, 3))))
    assert (found[0]["output"] == 0).float().mean() > 0.1
    for name, want in found[1].items():
        assert_close(name, found[0][name], want, 1e-4, 1e6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "denselayer1.conv1.weight", "denselayer1.norm2.bias"])
def test_nan_and_inf_propagate(where: str, value: float) -> None:
    """What is not finite in PyTorch's output is not finite in ours, and the other way round."""
    reference, fast = block_pair(2, 6, 3, 4, dtype=F32, impl="triton")
    found = []
    for block in (reference, fast):
        x = random_input((2, 6, 5, 4), dtype=F32).detach()
        tensor = x if where == "x" else block.get_parameter(where).detach()
        tensor.view(-1)[2] = value
        found.append(results(block.to(DEVICE), x.to(DEVICE).requires_grad_()))
    assert not found[0]["output"].isfinite().all()
    for name in ("output", "x.grad", "denselayer2.conv2.weight.grad"):
        ours, theirs = found[1][name], found[0][name]
        assert torch.equal(ours.isfinite(), theirs.isfinite()), name


def test_a_nan_passes_the_gradient_on_through_relu() -> None:
    """As PyTorch's ReLU does; with frozen norms one NaN stays one, and what its mask does can be seen."""
    found = []
    for block in block_pair(2, 6, 3, 4, dtype=F32, impl="triton"):
        ordinary_gammas(block)
        x = random_input((2, 6, 5, 4), dtype=F32).detach()
        x[1, 2, 3, 1] = float("nan")
        found.append(results(block.to(DEVICE).eval(), x.to(DEVICE).requires_grad_())["x.grad"])
    want, got = found
    assert want is not None and got is not None
    assert want.isfinite().all() and want[1, 2, 3, 1] != 0
    assert_close("x.grad", got, want, 1e-5)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("size", [1, 3], ids=["1x1", "3x3"])
@pytest.mark.parametrize("make", [TritonBackend, TorchBackend])
def test_shifts_below_a_rounding_add_up_over_the_pixels(
    make: Any, size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``a``, a third of the spacing of ``D``, is far more than a rounding of the weight's gradient if it gets there."""
    monkeypatch.setattr(launch, "MATERIALISE_PIXELS", 0)
    n, side, reads, writes = 4, 32, 16, 8
    m, spacing = n * side**2, torch.finfo(dtype).eps
    generator = torch.Generator().manual_seed(3)
    x, v = (torch.randn(m, c, generator=generator).to(dtype) for c in (reads, writes))
    half = 1 + torch.rand(m // 2, writes, generator=generator)
    D = torch.cat((half, -half))[torch.randperm(m, generator=generator)].to(dtype)
    a = torch.full((writes,), spacing / 3)
    balanced = size == 1
    if balanced:  # as behind a bottleneck
        D[::3] += spacing
        a = -D.double().mean(0).float()
    weight = torch.randn(writes, size, size, reads, generator=generator).movedim(-1, 1) / 4 / size

    def d_weight(make: Any, wide: torch.dtype, acc: torch.dtype) -> Tensor:
        backend = make(torch.empty(n, reads, side, side, dtype=wide, device=DEVICE))
        options: dict[str, Any] = {"dtype": acc, "device": DEVICE}
        source, output = (Features(rows.to(DEVICE, wide), *torch.empty(2, rows.shape[1], **options)) for rows in (x, v))
        for features in (source, output):
            backend.moments(features)
        norm = Norm(torch.ones(reads, **options), torch.full((reads,), 8.0, **options), 0)
        conv = Conv(norm, weight.to(DEVICE, wide), (False, False, True))
        a_and_b = torch.stack((a, torch.zeros_like(a))).to(DEVICE, acc)
        grad = LazyGradient(D.to(DEVICE, wide), *a_and_b, balanced=balanced)
        found = backend.bn_relu_conv_backward(grad, output, conv, source, None, accumulate=False)[2]
        backend.finish()
        assert found is not None
        return found.reshape(weight.shape)

    want = d_weight(TorchBackend, torch.float64, torch.float64)
    assert_close("weight", d_weight(make, dtype, F32), want, 5 * spacing)


def test_moments_of_more_programs_than_one_step_merges() -> None:
    """More groups of programs than one step merges, which only a large GPU has otherwise."""
    generator = torch.Generator().manual_seed(5)
    drift = torch.linspace(0, 3, 16 * 330).view(-1, 1, 1, 1)  # so that programs' means differ
    x = (torch.randn(16 * 330, 3, 1, 1, generator=generator) + drift + 1e3).to(DEVICE)
    be = TritonBackend(x)
    be.sm_count = 200  # 330 programs, 21 groups
    out = Features(torch.empty(be.m, 3, device=DEVICE), *torch.empty(2, 3, device=DEVICE))
    with launch.override("copy", block_m=16):
        be.copy_with_moments(x.contiguous(memory_format=torch.channels_last), out)
    var, mean = torch.var_mean(out.rows.double(), dim=0, correction=0)
    assert out.mean is not None and out.var is not None
    assert_close("mean", out.mean, mean, 1e-6)
    assert_close("var", out.var, var, 1e-5)


@pytest.mark.parametrize("bn_size", [2, None], ids=["bottleneck", "basic"])
def test_reruns_are_bit_equal(bn_size: int | None) -> None:
    _, fast = block_pair(2, 9, bn_size, 4, dtype=F16, impl="triton")
    with tiles(16):
        first, second = (results(fast.to(DEVICE), _input((2, 9, 3, 4), F16)) for _ in range(2))
    for name, value in first.items():
        assert "running" in name or "num_batches" in name or torch.equal(value, second[name]), name


def test_an_empty_batch_gives_what_the_reference_gives() -> None:
    reference, fast = block_pair(2, 6, 4, 4, dtype=F32, impl="triton")
    want, got = (results(block.to(DEVICE), _input((0, 6, 5, 5))) for block in (reference, fast))
    for name, value in want.items():
        assert_close(name, got[name], value)
