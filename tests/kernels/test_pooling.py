"""The kernels of stem, transition and head, and each primitive on slices: on a GPU, or in Triton's interpreter."""

from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from helpers.blocks import assert_close, learning, random_input, results
from helpers.budget import BF16, F16, F32, Guarded, tiles
from helpers.pooled import CASES, DEVICE, KINDS, Case, Stage, check_budget, check_shape, pair, rolled, small
from torch import Tensor, nn

from fastdense.backends.torch_backend import TorchBackend
from fastdense.backends.triton_backend import TritonBackend
from fastdense.core.features import Features, LazyGradient
from fastdense.core.primitives import Conv, Norm, Pool
from fastdense.ops.validate import windows

pytestmark = pytest.mark.usefixtures("kernels_checked")

INPUTS = 3 if DEVICE == "cuda" else 1  # the interpreter takes a second or so for each
NAN, INF = float("nan"), float("inf")


def _input(shape: tuple[int, ...], dtype: torch.dtype = F32) -> Tensor:
    return random_input(shape, dtype=dtype).detach().to(DEVICE).requires_grad_()


@pytest.mark.parametrize("dtype", [F32, F16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", CASES)
def test_stage_equals_the_reference_at_every_shape(name: str, dtype: torch.dtype) -> None:
    check_shape(name, dtype, "triton", INPUTS)


BUDGETS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "bfloat16": (BF16, {}),
    "small tiles, contiguous input": (F32, {"tile": 16, "shape": (3, 19, 5, 7), "layout": "contiguous"}),
    "small tiles, a slice as input": (F16, {"tile": 16, "shape": (3, 19, 5, 7), "layout": "slice"}),
    "large means": (F32, {"shape": (4, 8, 7, 7), "shift": 1e4}),
    "ReLUs and maxima that roundings switch, fp16": (F16, {"decided": False, "inputs": 15}),
    "ReLUs and maxima that roundings switch, bf16": (BF16, {"decided": False, "inputs": 15}),
    "frozen": (F32, {"change": lambda stage: stage.norm.eval()}),
    "eps": (F32, {"change": lambda stage: setattr(stage.norm, "eps", 0.1)}),
    "only x": (F32, {"change": learning()}),
    "only gamma": (F32, {"change": learning("norm.weight"), "needs_x": False}),
    "only beta": (F32, {"change": learning("norm.bias"), "needs_x": False}),
    "all but x": (F32, {"change": learning("norm.weight", "norm.bias", "conv.weight"), "needs_x": False}),
    "only the weight": (F32, {"change": learning("conv.weight"), "needs_x": False}),
    "x and the weight": (F32, {"change": learning("conv.weight")}),
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [case for case in product(KINDS, BUDGETS) if case[0] == "transition" or "the weight" not in case[1]],
)
def test_stage_equals_the_reference_with(name: str, kind: str) -> None:
    dtype, options = BUDGETS[name]
    options = {"inputs": INPUTS, **options}
    shape, tile = options.pop("shape", small(kind).shape), options.pop("tile", None)
    with tiles(tile) if tile else nullcontext():
        check_budget(small(kind)._replace(shape=shape), dtype, "triton", **options)


def _both(case: Case, x: Tensor, change: Callable[[Stage], Any] | None = None) -> list[dict[str, Any]]:
    """Results of the reference and of the kernels."""
    return [results(stage.to(DEVICE), x) for stage in pair(case, "triton", F32, change)]


def _assert_near(want: dict[str, Any], got: dict[str, Any]) -> None:
    for name, value in want.items():
        assert_close(name, got[name], value, 1e-5, 1e6)


@pytest.mark.parametrize("period", [0, 1], ids=["all equal", "three values"])
@pytest.mark.parametrize("name", ["stem 3, 2, 1", "stem with gaps", "stem, rectangular", "stem 1D", "stem 3D"])
def test_the_first_maximum_of_equal_ones_gets_the_gradient(name: str, period: int) -> None:
    stages = pair(CASES[name], "triton", F32)
    for stage in stages:
        stage.norm.bias.data.copy_(torch.linspace(-1.5, 0.5, stage.norm.num_features))
    x = rolled(CASES[name].shape, period, F32).detach().to(DEVICE).requires_grad_()
    _assert_near(*(results(stage.to(DEVICE), x) for stage in stages))


@pytest.mark.parametrize(("dtype", "beta"), [(BF16, 8.0), (F16, 512.0)], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["stem 3, 2, 1", "stem 1D", "stem 3D"])
def test_values_are_rounded_before_they_are_compared(name: str, dtype: torch.dtype, beta: float) -> None:
    """What differs before it is stored and not afterwards ties, and the first gets the gradient."""
    found = []
    for stage in pair(CASES[name], "triton", F32, change=lambda stage: stage.eval()):
        norm = stage.to(DEVICE, dtype).norm.float()  # statistics in float32 and nothing to round but the result
        with torch.no_grad():
            for tensor, value in ((norm.running_mean, 0), (norm.running_var, 1), (norm.weight, 1), (norm.bias, beta)):
                tensor.fill_(value)
        norm.eps = 1e-30  # nothing beside 1, and PyTorch takes no 0
        x = rolled(CASES[name].shape, 40).detach() / 64
        found.append(results(stage, x.to(DEVICE, dtype).requires_grad_())["x.grad"])
    assert found[0].count_nonzero() > 10
    assert_close("x.grad", found[1], found[0], 1e-2)  # PyTorch adds up overlapping windows in 16 bit; a tie is worth 1


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("values", [[NAN], [INF], [-INF], [INF, -INF, NAN, INF, NAN]], ids=str)
@pytest.mark.parametrize("name", ["stem 3, 2, 1", "transition 2", "head"])
def test_nan_and_inf_reach_the_loss_and_the_gradient(name: str, values: list[float], training: bool) -> None:
    x = random_input(CASES[name].shape, dtype=F32).detach().to(DEVICE)
    for i, value in enumerate(values):
        x[0, i, 1, i % 3] = value
        x[-1, (2 * i + 1) % 5, -1, -1] = value
    expected, found = _both(CASES[name], x.requires_grad_(), lambda stage: stage.train(training))
    for key, want in expected.items():
        got = found[key]
        if "running" in key:  # a mean of inf may be NaN
            assert torch.equal(got.isfinite(), want.isfinite()), key
            continue
        assert torch.equal(got.isnan(), want.isnan()), key
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True, msg=key)


def test_the_last_nan_of_a_window_gets_the_gradient() -> None:
    x = random_input((2, 5, 9, 12), dtype=F32).detach()
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) < 0.3] = NAN
    want, got = _both(CASES["stem 3, 2, 1"], x.to(DEVICE).requires_grad_(), lambda stage: stage.eval())
    assert want["x.grad"].isfinite().all()
    assert_close("x.grad", got["x.grad"], want["x.grad"], 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_moments_change_hands_and_cotangents_may_be_expanded(kind: str) -> None:
    """Those of the input as differentiable inputs, and those of the output, of the values as stored."""
    gradients = []
    for impl, dtype in (("triton", F32), ("torch", torch.float64)):
        _, fast = pair(small(kind), impl, dtype)
        fast.load_state_dict(pair(small(kind), impl, F32)[1].state_dict())
        x = _input(small(kind).shape).to(dtype).detach().requires_grad_()
        before = x * 2 + x.square()
        var, mean = torch.var_mean(before, dim=(0, 2, 3), correction=0)
        y, moments = fast.to(DEVICE).with_moments(before, (mean, var), want=kind != "head")
        if moments is not None:
            want_var, want_mean = torch.var_mean(y.detach().double(), dim=(0, 2, 3), correction=0)
            assert_close("mean", moments[0], want_mean, 1e-6)
            assert_close("var", moments[1], want_var, 1e-6)
        cotangent = random_input(y.shape, dtype=F32, seed=5).detach().to(y)[:1].expand(y.shape)
        gradients.append(torch.autograd.grad(y, [x, *fast.parameters()], cotangent))
    got, want = (dict(enumerate(found)) for found in gradients)
    _assert_near(want, got)


@pytest.mark.parametrize("kind", KINDS)
def test_reruns_are_bit_equal(kind: str) -> None:
    case = small(kind, 20)
    with tiles(16):
        found = [results(pair(case, "triton", F16)[1].to(DEVICE), _input(case.shape, F16)) for _ in range(2)]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_gives_what_the_reference_gives(kind: str, training: bool) -> None:
    x = _input((0, *small(kind).shape[1:]))
    _assert_near(*_both(small(kind), x, lambda stage: stage.train(training)))


# The input, channels that come out, the convolution's kernel if there is one, and the windows.
SLICES: dict[str, tuple[tuple[int, ...], int, tuple[int, ...] | None, Pool | None]] = {
    "1x1": ((2, 19, 5, 3), 13, (1, 1), None),
    "3x3": ((2, 13, 5, 3), 5, (3, 3), None),
    "3x3, one image, one column": ((1, 6, 7, 1), 40, (3, 3), None),
    "3x3x3": ((1, 7, 2, 3, 4), 3, (3, 3, 3), None),
    "stem": ((2, 13, 5, 7), 13, None, windows("maximum", nn.MaxPool2d(3, 2, 1))),
    "stem 3D": ((1, 19, 3, 4, 5), 19, None, windows("maximum", nn.MaxPool3d(2, 2))),
    "transition": ((2, 13, 5, 7), 6, (1, 1), windows("average", nn.AvgPool2d(2))),
    "transition 1D": ((2, 19, 7), 21, (1,), windows("average", nn.AvgPool1d(3))),
    "head": ((3, 13, 5, 3), 13, None, Pool("mean")),
}


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [F32, F16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("frozen", [False, True], ids=["batch statistics", "frozen"])
@pytest.mark.parametrize("name", SLICES)
def test_primitives_on_slices_of_wider_tensors_write_nothing_beside_them(
    name: str, frozen: bool, dtype: torch.dtype
) -> None:
    """Against the torch backend in float64; a layer's backward adds to the gradients of all channels but the first."""
    (n, reads, *spatial), writes, kernel, pool = SLICES[name]
    layer = pool is None
    m, first = n * torch.Size(spatial).numel(), 2 * layer
    m_out = m if layer else n * (1 if pool.kind == "mean" else torch.Size(pool.sizes(spatial)).numel())
    generator = torch.Generator().manual_seed(3)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)

    x, y, g, D = random(n, *spatial, reads), random(m_out, writes), random(m_out, writes), random(m, reads - first)
    vectors, running = random(2, reads).float(), (random(reads).float(), random(reads).float().abs() + 0.5)
    weight, shifts = random(writes, reads, *(kernel or ())) / 4, random(2, writes).float() / 10

    def run(make: Any, wide: torch.dtype, acc: torch.dtype) -> dict[str, Tensor]:
        rows = {"x": torch.zeros(m, reads), "y": torch.zeros(m_out, writes), "g": g, "D": D}
        sizes = {"mean": reads, "var": reads, "a": reads - first, "b": reads - first, "y mean": writes, "y var": writes}
        guards = {key: Guarded(value.to(wide)) for key, value in rows.items()}
        guards |= {key: Guarded(torch.ones(1, size, dtype=acc)) for key, size in sizes.items()}

        def of(key: str, *vectors: str, absent: bool) -> Any:
            return guards[key].rows, *(None if absent else guards[vector].rows[0] for vector in vectors)

        images = x.to(wide).movedim(-1, 1)
        backend = make(images)
        source = Features(*of("x", "mean", "var", absent=frozen))
        into = LazyGradient(*of("D", "a", "b", absent=frozen), first)
        out = Features(*of("y", "y mean", "y var", absent=name == "head"))  # nobody normalises what that hands on
        norm = Norm(*vectors.to(acc), 1e-3, tuple(value.to(acc) for value in running) if frozen else None)
        backend.copy_with_moments(images, source)
        if kernel is None:
            backend.bn_relu_pool(source, norm, pool, out)
            gradients = backend.bn_relu_pool_backward(guards["g"].rows, norm, pool, source, into)
            found = {}
        else:
            (conv,) = backend.prepare([Conv(norm, weight.to(wide), pool=pool)])
            backend.bn_relu_conv(source, conv, out)
            found = {"forward": out.rows.clone(), "mean": out.mean.clone(), "var": out.var.clone()}
            if layer:  # backward through given values, so that both backends start from the same ones
                var, mean = torch.var_mean(y.double(), dim=0, correction=0)
                for mine, value in ((out.rows, y), (out.mean, mean), (out.var, var)):
                    mine.copy_(value)
            grad = LazyGradient(guards["g"].rows, *(shifts.to(acc) if layer else (None, None)))
            gradients = backend.bn_relu_conv_backward(grad, out, conv, source, into, accumulate=layer)
            backend.finish()
            if layer and not frozen:
                found["resolved"] = backend.resolve(into, source[first:reads])
        found |= {f"gradient {i}": value for i, value in enumerate(gradients) if value is not None}
        return found | {f"slice {key}": guard.check() for key, guard in guards.items()}

    with tiles(16):
        got = run(TritonBackend, dtype, F32)
    for key, value in run(TorchBackend, torch.float64, torch.float64).items():
        tolerance = 2e-6 if dtype == F32 else 3e-3 if layer else 4e-3
        assert_close(key, got[key], value.reshape(got[key].shape), tolerance, 0 if layer else 1e6)
