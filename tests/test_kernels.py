"""The Triton kernels against a float64 truth, PyTorch and the torch backend: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from common import assert_close, block_pair, random_input, relative_error, results
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import accesses_checked
from torch import Tensor, nn

import fastdense
from fastdense.features import Features, LazyGradient
from fastdense.kernels import launch
from fastdense.philox import keep_mask
from fastdense.primitives import Conv, Dropout, Norm
from fastdense.torch_backend import TorchBackend
from fastdense.triton_backend import TritonBackend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}  # about one rounding of a result
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
INPUTS = 8 if DEVICE == "cuda" else 1  # the interpreter takes a second or more for each

Results = dict[str, Tensor | None]

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan", "_accesses_checked")


@pytest.fixture
def _accesses_checked() -> Iterator[None]:
    with nullcontext() if DEVICE == "cuda" else accesses_checked():
        yield


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """fp32 products in fp32, ours and PyTorch's."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@contextmanager
def tiles(size: int) -> Iterator[None]:
    """Every kernel with tiles of ``size``: several tiles, splits and blocks even for small features."""
    with ExitStack() as stack:
        for op in launch.OPERATIONS:
            changes = {"block_m": size, "block_c": size}
            if op == "bn_relu_conv":
                changes["block_k"] = size
            elif op == "bn_relu_conv_backward":
                changes |= {"weight_block_m": size, "weight_block_c": size}
            elif op == "add_up":
                changes["block_c"] = 1024
            stack.enter_context(launch.override(op, **changes))
        yield


def ordinary_gammas(block: nn.Module) -> None:
    """gamma near 1: with gamma = 0 or negative a few roundings decide whole channels, for PyTorch as for us."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for norm in block.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                norm.weight.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
                norm.bias.copy_(torch.rand(norm.num_features, generator=generator) - 0.5)


def decided_relus(block: nn.Module) -> None:
    """beta far from 0, so that every channel's ReLU is on or off whatever the roundings.

    In 16 bit one value within a rounding of 0 switches a ReLU and outweighs everything else, whoever computes: that is
    luck, which takes many inputs to average (test_relus_that_switch).
    """
    with torch.no_grad():
        for norm in block.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                norm.bias.copy_(torch.where(torch.arange(norm.num_features) % 3 == 1, -8.0, 8.0))


def _errors(got: Tensor | None, want: Tensor) -> tuple[float, float]:
    """Relative error in the 2-norm, and the largest one relative to the largest element."""
    assert got is not None
    return relative_error(got, want), (got.double() - want).abs().max().item() / (want.abs().max().item() or 1.0)


def check_budget(
    arguments: tuple[Any, ...],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    layout: str = "channels_last",
    change: Callable[[nn.Module], Any] | None = None,
    shift: float = 0.0,
    needs_x: bool = True,
    inputs: int = INPUTS,
    decided: bool | None = None,
    **options: Any,
) -> None:
    """``error <= 2*(PyTorch's error in the same dtype) + tolerance`` for outputs, gradients and statistics.

    In the 2-norm and element-wise, root mean squares over ``inputs``, where PyTorch's error is the textbook block's in
    the same dtype. ``decided``, by default in 16 bit: see ``decided_relus``.
    """
    decided = dtype != F32 if decided is None else decided
    squares: dict[str, list[tuple[float, float, float, float]]] = {}
    for seed in range(inputs):
        truth, _ = block_pair(*arguments, spatial_dims=len(shape) - 2, change=change)
        peer, fast = block_pair(
            *arguments, spatial_dims=len(shape) - 2, change=change, dtype=F32, impl="triton", **options
        )
        truth.load_state_dict(peer.state_dict())
        for block in (truth, peer, fast):
            ordinary_gammas(block)
            if decided:
                decided_relus(block)
            block.to(DEVICE, dtype).to(torch.float64 if block is truth else dtype)  # all start from the rounded values
        x = (random_input(shape, dtype=torch.float64, layout=layout, seed=seed).detach() + shift).to(DEVICE, dtype)
        x.requires_grad_(needs_x)
        got, textbook = results(fast, x), results(peer, x)
        for name, want in results(truth, x.detach().double().requires_grad_(needs_x)).items():
            assert (got[name] is None) == (want is None), name
            if want is None or "num_batches" in name:
                continue
            mine, theirs = (_errors(found[name], want) for found in (got, textbook))
            squares.setdefault(name, []).append((mine[0], theirs[0], mine[1], theirs[1]))
    tolerance = TOLERANCE[dtype]
    for name, rows in squares.items():
        norm, peer_norm, element, peer_element = (
            (sum(value**2 for value in column) / len(rows)) ** 0.5 for column in zip(*rows, strict=True)
        )
        assert norm <= 2 * peer_norm + tolerance, f"{name}: relative error {norm:.2e}, PyTorch's {peer_norm:.2e}"
        assert element <= 2 * peer_element + 4 * tolerance, f"{name}: element {element:.2e}, {peer_element:.2e}"


# layers, C0, bn_size, k, input shape, mode
SHAPES = {
    "plain": (2, 8, 4, 4, (2, 8, 6, 6), "bottlenecks"),
    "one pixel": (2, 5, 4, 3, (20, 5, 1, 1), "activations"),
    "primes, not square": (2, 7, 3, 5, (3, 7, 11, 13), "activations"),
    "batch of one": (2, 3, 4, 12, (1, 3, 5, 7), "bottlenecks"),
    "k = 1": (3, 1, 2, 1, (2, 1, 4, 3), "activations"),
    "k = 24": (1, 20, 4, 24, (1, 20, 5, 4), "activations"),
    "k = 32": (2, 64, 4, 32, (2, 64, 4, 4), "bottlenecks"),
    "k = 48": (1, 17, 4, 48, (1, 17, 3, 9), "bottlenecks"),
    "a bottleneck too wide for one pass": (1, 12, 9, 32, (1, 12, 3, 5), "activations"),
    "basic": (3, 6, None, 4, (2, 6, 5, 3), "activations"),
    "1D": (2, 6, 4, 4, (3, 6, 17), "bottlenecks"),
    "1D, basic": (2, 6, None, 5, (3, 6, 9), "activations"),
    "3D": (1, 6, 4, 4, (2, 6, 3, 5, 4), "bottlenecks"),
}


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, dtype: torch.dtype) -> None:
    *arguments, shape, mode = SHAPES[name]
    # Where almost nothing but BatchNorm is left, always-on ReLUs make a linear network: gradients vanish in its scale.
    linear = dtype != F32 and name in ("one pixel", "k = 1")
    check_budget(tuple(arguments), shape, dtype, recompute=mode, **{"decided": False, "inputs": 8} if linear else {})


@pytest.mark.parametrize("name", ["plain", "basic"])
def test_bfloat16(name: str) -> None:
    *arguments, shape, _ = SHAPES[name]
    check_budget(tuple(arguments), shape, BF16)


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_relus_that_switch(dtype: torch.dtype) -> None:
    check_budget((2, 8, 4, 4), (2, 8, 6, 6), dtype, decided=False, inputs=16)


@pytest.mark.parametrize(("layout", "dtype"), [("contiguous", F32), ("slice", F16)])
def test_layouts_with_small_tiles(layout: str, dtype: torch.dtype) -> None:
    with tiles(16):
        check_budget((1, 19, 5, 4), (2, 19, 5, 7), dtype, layout=layout)


def test_a_lazy_gradient_written_out_for_many_taps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MATERIALISE_ELEMENTS", 0)
    with tiles(16):
        check_budget((2, 7, 2, 12), (1, 7, 4, 5), F32)


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
        got = backend._resolve(
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


def test_reruns_are_bit_equal() -> None:
    for arguments, shape in (((2, 20, 2, 8), (2, 20, 4, 5)), ((2, 9, None, 5), (2, 9, 4, 5))):
        with tiles(16):
            _, fast = block_pair(*arguments, dtype=F16, impl="triton")
            x = random_input(shape, dtype=F16).detach().to(DEVICE).requires_grad_()
            first, second = (results(fast.to(DEVICE), x) for _ in range(2))
        for name, value in first.items():
            if value is not None and (name.endswith("grad") or name == "output"):
                assert torch.equal(value, second[name]), name


class Guarded:
    """A tensor that is a channel slice of a wider one, with canaries on both sides of every row."""

    CANARY = 777.0

    def __init__(self, values: Tensor, before: int = 3, after: int = 5) -> None:
        rows, channels = values.shape
        self.wide = torch.full((rows + 2, before + channels + after), self.CANARY, dtype=values.dtype, device=DEVICE)
        self.rows = self.wide[1:-1, before : before + channels]
        self.rows.copy_(values)

    def check(self) -> Tensor:
        rows = self.rows.clone()
        self.rows.fill_(self.CANARY)
        assert (self.wide == self.CANARY).all(), "written outside of the slice"
        return rows


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


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA GPU")
def test_more_than_two_to_the_31_elements() -> None:
    m, channels, k = 2**19 + 3, 4104, 12
    wide = torch.empty(m, channels, dtype=F16, device=DEVICE)
    assert wide.numel() > 2**31
    source, out = (
        Features(wide[:, -40:-k], *torch.tensor([[0.0], [1.0]], device=DEVICE).expand(2, 28).contiguous()),
        None,
    )
    wide[:, -40:-k] = torch.randn(m, 28, device=DEVICE, dtype=F16)
    mean, var = torch.empty(2, k, device=DEVICE)
    out = Features(wide[:, -k:], mean, var)
    be = TritonBackend(torch.empty(m, 1, 1, 1, dtype=F16, device=DEVICE))
    norm = Norm(torch.ones(28, device=DEVICE), torch.zeros(28, device=DEVICE), 0.0)
    weight = torch.randn(k, 28, 1, 1, device=DEVICE, dtype=F16)
    be.bn_relu_conv(source, Conv(norm, weight), out)
    last = slice(m - 1000, m)
    want = source.rows[last].double().relu() @ weight.double()[:, :, 0, 0].t()
    assert_close("last rows", out.rows[last], want, 1e-3)
    assert_close("mean", mean, out.rows.double().mean(0), 1e-4)
