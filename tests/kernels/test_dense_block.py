"""The Triton kernels against a float64 truth, PyTorch and the torch backend: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.blocks import assert_close, block_pair, random_input, results
from helpers.budget import BF16, DEVICE, F16, F32, SHAPES, Guarded, check_budget, check_shape, ordinary_gammas, tiles
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastdense
from fastdense.backends.philox import keep_mask
from fastdense.backends.torch_backend import TorchBackend
from fastdense.backends.triton_backend import TritonBackend
from fastdense.core.features import Features, LazyGradient
from fastdense.core.primitives import Conv, Dropout, Norm
from fastdense.kernels import launch

Results = dict[str, Tensor | None]

pytestmark = pytest.mark.usefixtures("kernels_checked")


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, dtype: torch.dtype) -> None:
    check_shape(name, dtype)


@pytest.mark.parametrize("name", ["plain", "basic"])
def test_bfloat16(name: str) -> None:
    check_shape(name, BF16)


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_relus_that_switch(dtype: torch.dtype) -> None:
    check_budget((2, 8, 4, 4), (2, 8, 6, 6), dtype, decided=False, inputs=15)


@pytest.mark.parametrize(("layout", "dtype"), [("contiguous", F32), ("slice", F16)])
def test_layouts_with_small_tiles(layout: str, dtype: torch.dtype) -> None:
    with tiles(16):
        check_budget((1, 19, 5, 4), (2, 19, 5, 7), dtype, layout=layout)


def test_a_lazy_gradient_written_out_for_many_taps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MATERIALISE_PIXELS", 0)
    with tiles(16):
        check_budget((2, 7, 2, 12), (1, 7, 4, 5), F32)


@pytest.mark.parametrize("dtype", [F32, F16])
def test_weights_as_other_modules_hold_them(dtype: torch.dtype) -> None:
    def contiguous(block: nn.Module) -> None:
        for parameter in block.parameters():
            parameter.data = parameter.data.contiguous()

    check_budget((2, 6, 3, 4), (2, 6, 5, 4), dtype, change=contiguous)


@pytest.mark.parametrize("form", ["taps", "scratch"])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_other_forms_of_the_convolution(form: str, dtype: torch.dtype) -> None:
    """A load for each tap, which checks the shifted products; and PyTorch's convolution of written activations."""
    with launch.override("bn_relu_conv", form=form):
        check_budget((2, 7, 3, 5), (2, 7, 5, 7), dtype)
        check_budget((1, 6, None, 4), (2, 6, 3, 2, 4), dtype)


@pytest.mark.parametrize("mode", ["activations", "bottlenecks"])
def test_means_far_larger_than_the_deviation(mode: str) -> None:
    check_budget((2, 8, 3, 4), (4, 8, 7, 7), F32, shift=1e4, recompute=mode)


def _evaluate(block: nn.Module) -> None:
    block.eval()


def _freeze_some(block: nn.Module) -> None:
    for i, norm in enumerate(m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.train(i % 3 == 0)


def _other_eps(block: nn.Module) -> None:
    for i, norm in enumerate(m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eps = (1e-5, 1e-1, 1e-3)[i % 3]


def _wider_kernel(block: nn.Module) -> None:
    for layer in block.children():
        layer.conv2 = nn.Conv2d(layer.conv2.in_channels, layer.conv2.out_channels, (5, 3), padding=(2, 1), bias=False)


def _only(*parts: str) -> Callable[[nn.Module], None]:
    def change(block: nn.Module) -> None:
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(any(part in name for part in parts))

    return change


@pytest.mark.parametrize("change", [_evaluate, _freeze_some, _other_eps])
def test_norms_of_every_kind(change: Callable[[nn.Module], None]) -> None:
    check_budget((3, 6, 3, 4), (2, 6, 5, 4), F32, change=change)


def test_kernels_of_another_size() -> None:
    reference, fast = block_pair(2, 6, 3, 4, change=_wider_kernel, dtype=F32, impl="triton")
    ordinary_gammas(reference)
    fast.load_state_dict(reference.state_dict())
    x = random_input((2, 6, 5, 4), dtype=F32).to(DEVICE)
    want = results(reference.to(DEVICE), x.detach().requires_grad_())
    got = results(fast.to(DEVICE), x.detach().requires_grad_())
    for name, value in want.items():
        assert_close(name, got[name], value, 1e-5)


SUBSETS = {
    "only the input": (_only(), True),
    "weights without the input": (_only("conv"), False),
    "norms": (_only("norm"), False),
    "second layer's first conv": (_only("denselayer2.conv1"), False),
    "first layer's beta": (_only("denselayer1.norm1.bias"), False),
    "last layer's gamma": (_only("denselayer3.norm2.weight"), False),
}


@pytest.mark.parametrize("bn_size", [3, None])
@pytest.mark.parametrize("subset", SUBSETS)
def test_partial_requires_grad(subset: str, bn_size: int | None) -> None:
    change, needs_x = SUBSETS[subset]
    check_budget((3, 5, bn_size, 4), (2, 5, 4, 3), F32, change=change, needs_x=needs_x)


@pytest.mark.parametrize("given", [True, False])
def test_moments_are_differentiable_outputs_and_inputs(given: bool) -> None:
    gradients = []
    for impl in ("triton", "torch"):
        _, fast = block_pair(2, 5, 3, 4, dtype=F32 if impl == "triton" else torch.float64)
        fast.load_state_dict(block_pair(2, 5, 3, 4, dtype=F32)[0].state_dict())
        fast.to(DEVICE)
        x = random_input((2, 5, 4, 3), dtype=F32).detach().to(DEVICE, next(fast.parameters()).dtype).requires_grad_()
        moments = None
        if given:
            var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
            moments = (mean, var)
        X, mean, var = fastdense.dense_block(x, fast.values(), impl=impl, moments=moments, return_moments=True)
        loss = (X * mean.view(1, -1, 1, 1)).square().sum() + (mean.sin() + var.log()).sum()
        gradients.append(torch.autograd.grad(loss, [x, *fast.parameters()]))
    for i, (got, want) in enumerate(zip(*gradients, strict=True)):
        assert_close(f"gradient {i}", got, want, 1e-4, 1e6)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("seed", [0, 2**62 + 12345, -5])
def test_dropout_masks_equal_the_torch_backends(seed: int, per_channel: bool) -> None:
    n, channels, height, width = 3, 7, 5, 3
    seeds = torch.tensor([seed], device=DEVICE)
    for layer, p in ((0, 0.2), (1, 0.5), (17, 1e-9), (2, 1.0)):
        x = torch.ones(n, channels, height, width, device=DEVICE)
        backend = TritonBackend(x)
        ones = torch.ones(backend.m, channels, device=DEVICE)
        got = backend.resolve_rows(
            LazyGradient(ones, None, None),
            Features(ones, None, None),
            torch.empty_like(ones),
            channels,
            Dropout(seeds, layer, p, per_channel),
        )
        count = n * channels if per_channel else ones.numel()
        keep = keep_mask(seeds, layer, 0, count, p)
        if per_channel:
            keep = keep.view(n, 1, channels).expand(n, height * width, channels)
        want = keep.reshape(ones.shape).float() * (1 / (1 - p) if p < 1 else 0.0)
        assert torch.equal(got != 0, want != 0)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("per_channel", [False, True])
def test_dropout_in_a_block(per_channel: bool) -> None:
    def choose(block: nn.Module) -> None:
        for layer in block.children():
            layer.drop_rate, layer.drop_channels = 0.4, per_channel

    found = []
    for impl in ("triton", "torch"):
        _, fast = block_pair(2, 6, 4, 5, dtype=F32, impl=impl, change=choose)
        torch.manual_seed(21)
        found.append(
            results(fast.to(DEVICE), random_input((3, 6, 5, 3), dtype=F32).detach().to(DEVICE).requires_grad_())
        )
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


def test_a_nan_passes_the_gradient_on() -> None:
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


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("size", [1, 3])
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
        source, output = (
            Features(rows.to(DEVICE, wide), *torch.empty(2, rows.shape[1], dtype=acc, device=DEVICE)) for rows in (x, v)
        )
        for features in (source, output):
            backend.moments(features)
        norm = Norm(torch.ones(reads, dtype=acc, device=DEVICE), torch.full((reads,), 8.0, dtype=acc, device=DEVICE), 0)
        conv = Conv(norm, weight.to(DEVICE, wide), (False, False, True))
        a_and_b = torch.stack((a, torch.zeros_like(a))).to(DEVICE, acc)
        grad = LazyGradient(D.to(DEVICE, wide), *a_and_b, balanced=balanced)
        found = backend.bn_relu_conv_backward(grad, output, conv, source, None, accumulate=False)[2]
        backend.finish()
        assert found is not None
        return found.reshape(weight.shape)

    want = d_weight(TorchBackend, torch.float64, torch.float64)
    assert_close("weight", d_weight(make, dtype, F32), want, 5 * spacing)


def test_moments_of_many_programs() -> None:
    """More groups of programs than one step merges, which only a large GPU has otherwise."""
    generator = torch.Generator().manual_seed(5)
    drift = torch.linspace(0, 3, 16 * 330).view(-1, 1, 1, 1)  # so that programs' means differ
    x = (torch.randn(16 * 330, 3, 1, 1, generator=generator) + drift + 1e3).to(DEVICE)
    be = TritonBackend(x)
    be.sm_count = 200  # 330 programs, 21 groups
    out = Features(torch.empty(be.m, 3, device=DEVICE), *torch.empty(2, 3, device=DEVICE))
    with launch.override("copy", block_m=16):
        be.copy_with_moments(x.contiguous(memory_format=torch.channels_last), out)
    mean, var = _moments(out.rows)
    assert out.mean is not None and out.var is not None
    assert_close("mean", out.mean, mean, 1e-6)
    assert_close("var", out.var, var, 1e-5)


def test_reruns_are_bit_equal() -> None:
    for arguments, shape in (((2, 20, 2, 8), (2, 20, 4, 5)), ((2, 9, None, 5), (2, 9, 4, 5))):
        with tiles(16):
            _, fast = block_pair(*arguments, dtype=F16, impl="triton")
            x = random_input(shape, dtype=F16).detach().to(DEVICE).requires_grad_()
            first, second = (results(fast.to(DEVICE), x) for _ in range(2))
        for name, value in first.items():
            if value is not None and (name.endswith("grad") or name == "output"):
                assert torch.equal(value, second[name]), name


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(rows.double(), dim=0, correction=0)
    return mean, var


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize(
    ("reads", "writes", "kernel", "shape"),
    [
        (19, 13, (1, 1), (2, 5, 3)),
        (13, 5, (3, 3), (2, 5, 3)),
        (6, 40, (3, 3), (1, 7, 1)),
        (7, 3, (3, 3, 3), (1, 2, 3, 4)),
    ],
)
def test_primitives_on_slices_with_canaries(
    reads: int, writes: int, kernel: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Every primitive on slices of wider tensors, against the torch backend in float64."""
    generator = torch.Generator().manual_seed(3)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)

    n, *spatial = shape
    x, v = random(n, reads, *spatial), random(n, writes, *spatial)
    be, truth = TritonBackend(x), TorchBackend(x.double())
    norm = (random(reads).float(), random(reads).float(), 1e-3)
    weight = random(writes, reads, *kernel) * (0.3 if dtype == F32 else 0.25)
    tolerance = 2e-6 if dtype == F32 else 3e-3

    def run(backend: Any, wide: torch.dtype | None) -> dict[str, Tensor]:
        def cast(t: Tensor) -> Tensor:
            return t if wide is None else t.to(wide)

        acc = torch.float64 if wide else F32
        conv = Conv(Norm(cast(norm[0]), cast(norm[1]), norm[2]), cast(weight))
        guards = {
            "copy": Guarded(cast(torch.zeros(be.m, reads, dtype=dtype))),
            "out": Guarded(cast(torch.zeros(be.m, writes, dtype=dtype))),
            "D": Guarded(cast(random_rows)),
            "grad": Guarded(cast(grad_rows)),
            "mean": Guarded(torch.zeros(1, reads, dtype=acc)),
            "var": Guarded(torch.zeros(1, reads, dtype=acc)),
            "a": Guarded(torch.ones(1, reads - 2, dtype=acc)),
            "b": Guarded(torch.ones(1, reads - 2, dtype=acc)),
        }
        source = Features(guards["copy"].rows, guards["mean"].rows[0], guards["var"].rows[0])
        backend.copy_with_moments(cast(x), source)
        out_mean, out_var = torch.empty(2, writes, dtype=acc, device=DEVICE)
        out = Features(guards["out"].rows, out_mean, out_var)
        backend.bn_relu_conv(source, conv, out)
        found = {"out mean": out_mean.clone(), "out var": out_var.clone(), "out": out.rows.clone()}
        # Backward through given values, so that both backends start from the same ones.
        out.rows.copy_(v.movedim(1, -1).reshape(be.m, writes))
        mean, var = (t.to(acc) for t in _moments(out.rows))
        out = Features(out.rows, mean, var)
        a, b = coefficients[0].to(acc), coefficients[1].to(acc)
        into = LazyGradient(guards["D"].rows, guards["a"].rows[0], guards["b"].rows[0], 2)
        dgamma, dbeta, dw = backend.bn_relu_conv_backward(
            LazyGradient(guards["grad"].rows, a, b), out, conv, source, into, accumulate=True
        )
        backend.finish()
        resolved = backend.resolve(into, source[2:reads])
        found |= {"dw": dw, "dgamma": dgamma, "dbeta": dbeta, "resolved": resolved}
        return found | {name: guard.check() for name, guard in guards.items()}

    m = n * torch.Size(spatial).numel()
    random_rows, grad_rows, coefficients = random(m, reads - 2), random(m, writes), random(2, writes).float() * 0.1
    with tiles(16):
        got = run(be, None)
    want = run(truth, torch.float64)
    for name, value in want.items():
        assert_close(name, got[name], value.reshape(got[name].shape), tolerance)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    channels=st.integers(1, 20),
    bn_size=st.one_of(st.none(), st.integers(1, 4)),
    k=st.sampled_from([1, 2, 3, 8, 12]),
    batch=st.integers(2, 3),
    spatial=st.lists(st.integers(2, 6), min_size=1, max_size=3),
    mode=st.sampled_from(["activations", "bottlenecks"]),
)
def test_any_shape(channels: int, bn_size: int | None, k: int, batch: int, spatial: list[int], mode: str) -> None:
    check_budget((1, channels, bn_size, k), (batch, channels, *spatial), F32, recompute=mode)


def test_an_empty_batch() -> None:
    reference, fast = block_pair(2, 6, 4, 4, dtype=F32, impl="triton")
    x = torch.empty(0, 6, 5, 5, device=DEVICE)
    got = results(fast.to(DEVICE), x.clone().requires_grad_())
    want = results(reference.to(DEVICE), x.clone().requires_grad_())
    for name, value in want.items():
        assert_close(name, got[name], value)
