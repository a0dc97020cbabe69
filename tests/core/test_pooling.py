"""Stem, transition and head against autograd of the textbook modules, in float64: everything to 1e-9."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.blocks import assert_close, assert_same, random_input, results
from helpers.pooled import CASES, KINDS, LAYOUTS, Case, Stage, pair, rolled, small
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastdense.backends.torch_backend import TorchBackend


def _two_steps(fast: Stage, textbook: Stage, x: Tensor, tolerance: float = 1e-9) -> None:
    """The second step reads the statistics that the first one left."""
    for seed in (1, 2):
        again = (x.detach() * seed + (seed - 1)).requires_grad_(x.requires_grad)
        assert_same(results(fast, again, seed), results(textbook, again, seed), tolerance)
    assert_same(results(fast.eval(), x), results(textbook.eval(), x), tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_shapes_and_layouts(name: str, layout: str, fresh_memory_is_nan: None) -> None:
    textbook, fast = pair(CASES[name])
    _two_steps(fast, textbook, random_input(CASES[name].shape, layout=layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_output_is_channels_last(name: str, layout: str) -> None:
    """With rows of whole 16-byte words, as the block's own output: what reads it need not copy."""
    _, fast = pair(CASES[name])
    y = fast(random_input(CASES[name].shape, layout=layout))
    if y.dim() > 2:
        words = (y.shape[1] + 1) // 2 * 2
        assert y.stride(1) == 1 and y.stride(-1) == words
    else:
        assert y.is_contiguous()


def _evaluate(stage: Stage) -> None:
    stage.eval()


def _frozen(stage: Stage) -> None:
    stage.norm.eval()


def _eps(stage: Stage) -> None:
    stage.norm.eps = 0.3


def _momentum(stage: Stage) -> None:
    stage.norm.momentum = 0.7


def _cumulative(stage: Stage) -> None:
    stage.norm.momentum = None


def _new_norm(**options: Any) -> Callable[[Stage], None]:
    def change(stage: Stage) -> None:
        stage.norm = type(stage.norm)(stage.norm.num_features, dtype=torch.float64, **options)

    return change


def _without_affine(stage: Stage) -> None:
    _new_norm(affine=False)(stage)


def _frozen_without_affine(stage: Stage) -> None:
    _new_norm(affine=False)(stage)
    stage.norm.eval()


def _without_bias(stage: Stage) -> None:
    stage.norm.register_parameter("bias", None)


def _untracked(stage: Stage) -> None:
    _new_norm(track_running_stats=False)(stage)


def _untracked_in_evaluation(stage: Stage) -> None:
    _new_norm(track_running_stats=False)(stage)
    stage.eval()


def _tracked_no_longer(stage: Stage) -> None:
    """Statistics that are there, and are neither read nor written in training."""
    stage.norm.track_running_stats = False


NORMS = {
    change.__name__.strip("_"): change
    for change in (
        _evaluate, _frozen, _eps, _momentum, _cumulative, _without_affine, _frozen_without_affine, _without_bias,
        _untracked, _untracked_in_evaluation, _tracked_no_longer,
    )
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", NORMS)
def test_norms_of_every_kind(change: str, kind: str, fresh_memory_is_nan: None) -> None:
    textbook, fast = pair(small(kind))
    for stage in (textbook, fast):
        NORMS[change](stage)
    for seed in (1, 2, 3):
        x = random_input(small(kind).shape, seed=seed)
        assert_same(results(fast, x, seed), results(textbook, x, seed))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)))
@pytest.mark.parametrize("kind", KINDS)
def test_any_subset_requires_gradients(
    kind: str, needs: tuple[bool, ...], training: bool, fresh_memory_is_nan: None
) -> None:
    """Of x, gamma, beta and the weight; the stem and the head have none."""
    if kind != "transition" and needs[3]:
        return

    def choose(stage: Stage) -> None:
        for (_, parameter), need in zip(stage.named_parameters(), needs[1:], strict=False):
            parameter.requires_grad_(need)
        stage.train(training)

    textbook, fast = pair(small(kind), change=choose)
    assert [name for name, _ in fast.named_parameters()][:2] == ["norm.weight", "norm.bias"]
    x = random_input(small(kind).shape).detach().requires_grad_(needs[0])
    assert_same(results(fast, x), results(textbook, x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("period", [0, 1, 2])
@pytest.mark.parametrize(
    "name",
    ["stem 3, 2, 1", "stem 2, 2, 0", "stem 3, 1, 1", "stem with gaps", "stem, rectangular", "stem 1D", "stem 3D"],
)
def test_the_first_maximum_of_equal_ones_gets_the_gradient(name: str, period: int, training: bool) -> None:
    """Few values, and a ReLU that is off nearly everywhere: nearly every window ties."""
    textbook, fast = pair(CASES[name])
    with torch.no_grad():
        for stage in (textbook, fast):
            stage.train(training).norm.bias.copy_(torch.linspace(-1.5, 0.5, stage.norm.num_features))
    x = rolled(CASES[name].shape, period)
    assert_same(results(fast, x), results(textbook, x))


@pytest.mark.parametrize(("dtype", "beta"), [(torch.bfloat16, 8.0), (torch.float16, 512.0)])
@pytest.mark.parametrize("name", ["stem 3, 2, 1", "stem 1D", "stem 3D"])
def test_values_are_rounded_before_they_are_compared(name: str, dtype: torch.dtype, beta: float) -> None:
    """What differs before it is stored and not afterwards ties, and the first gets the gradient."""
    found = []
    for stage in pair(CASES[name], dtype=torch.float32, change=lambda stage: stage.eval()):
        norm = stage.to(dtype).norm.float()  # statistics in float32 and nothing to round but the result
        with torch.no_grad():
            for tensor, value in ((norm.running_mean, 0), (norm.weight, 1), (norm.bias, beta)):
                tensor.fill_(value)
            norm.running_var.fill_(1.0)
            norm.eps = 0.0
        x = rolled(CASES[name].shape, 40).detach() / 64
        found.append(results(stage, x.to(dtype).requires_grad_())["x.grad"])
    assert torch.equal(found[0], found[1]) and found[0].count_nonzero() > 10


def _not_finite(case: Case, values: list[float]) -> Tensor:
    """Random features with ``values`` in some channels: at a corner, beside each other, at the end."""
    x = random_input(case.shape).detach()
    flat = x.flatten(2)
    for i, value in enumerate(values):
        flat[0, i % x.shape[1], [0, 1, -1][i % 3]] = value
        flat[-1, (2 * i + 1) % x.shape[1], flat.shape[2] // 2] = value
    return x.requires_grad_()


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("values", [[NAN], [INF], [-INF], [NAN, NAN, INF], [INF, -INF, NAN, INF, NAN]])
@pytest.mark.parametrize("name", ["stem 3, 2, 1", "stem 3, 1, 1", "stem 1D", "stem 3D", "transition 2", "head"])
def test_nan_and_inf_reach_the_loss_and_the_gradient(name: str, values: list[float], training: bool) -> None:
    textbook, fast = pair(CASES[name])
    for stage in (textbook, fast):  # a gamma of 0 makes NaN of inf
        stage.train(training)
    x = _not_finite(CASES[name], values)
    got, want = results(fast, x), results(textbook, x)
    assert not want["output"].isfinite().all() or (not training and values == [-INF])
    for key, theirs in want.items():
        ours = got[key]
        assert torch.equal(ours.isnan(), theirs.isnan()), key
        # Where both are finite or infinite they are equal; torch.equal would not see it past a NaN.
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, equal_nan=True, msg=key)


def test_the_last_nan_of_a_window_gets_the_gradient() -> None:
    """As PyTorch's, which takes whatever comes when it meets a NaN; with a frozen norm one sees which."""
    textbook, fast = pair(Case("stem", (2, 5, 9, 12), 3, 2, 1), change=_evaluate)
    generator = torch.Generator().manual_seed(3)
    x = random_input((2, 5, 9, 12)).detach()
    x[torch.rand(x.shape, generator=generator) < 0.3] = NAN
    got, want = (results(stage, x.clone().requires_grad_())["x.grad"] for stage in (fast, textbook))
    assert_close("x.grad", got, want)
    assert want.isfinite().all() and want[x.isnan()].count_nonzero() > 40


@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_the_gradient_survives(kind: str) -> None:
    found = []
    for stage in pair(small(kind)):
        x = random_input(small(kind).shape)
        y = stage(x)
        cotangent = torch.ones_like(y)
        cotangent[(0, 2, 1, 1)[: y.dim()]] = NAN
        y.backward(cotangent)
        found.append([tensor.grad.isnan() for tensor in (x, *stage.parameters())])
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want) and want.any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [300, 4000])
def test_chunks_do_not_change_the_result(
    name: str, size: int, training: bool, monkeypatch: pytest.MonkeyPatch, fresh_memory_is_nan: None
) -> None:
    """A few images, or rows, at a time, whose moments are merged."""
    monkeypatch.setattr("fastdense.backends.torch_backend.CHUNK_BYTES", size)
    case = CASES[name]
    case = case._replace(shape=(5, *case.shape[1:]))
    merged: list[int] = []
    original = TorchBackend._merge_moments

    def spy(self: Any, partial: Any, out: Any) -> None:
        merged.append(len(partial))
        original(self, partial, out)

    monkeypatch.setattr(TorchBackend, "_merge_moments", spy)
    textbook, fast = pair(case, change=lambda stage: stage.train(training))
    x = random_input(case.shape)
    x = (x.detach() + torch.arange(5.0).view(5, *[1] * (x.dim() - 1)).double() * 20).requires_grad_()
    assert_same(results(fast, x), results(textbook, x))
    assert (max(merged) > 1) == (x[0, 0].numel() * 5 * max(x.shape[1], 1) * 8 > size) if training else not merged


@pytest.mark.parametrize("kind", KINDS)
def test_the_moments_of_what_comes_out(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the values as they are stored, from one chunk or many."""
    if kind == "head":
        return
    for size, dtype in itertools.product((1 << 20, 300), (torch.float64, torch.bfloat16)):
        monkeypatch.setattr("fastdense.backends.torch_backend.CHUNK_BYTES", size)
        _, fast = pair(small(kind), dtype=dtype)
        y, moments = fast.with_moments(random_input(small(kind).shape, dtype=dtype), None, want=True)
        var, mean = torch.var_mean(y.double(), dim=(0, 2, 3), correction=0)
        for name, got, want in (("mean", moments[0], mean), ("var", moments[1], var)):
            assert_close(name, got, want, 1e-9 if dtype == torch.float64 else 1e-6)
        assert fast.with_moments(random_input(small(kind).shape, dtype=dtype), None)[1] is None


@pytest.mark.parametrize("kind", KINDS)
def test_expanded_and_contiguous_cotangents(kind: str) -> None:
    textbook, fast = pair(small(kind))
    x = random_input(small(kind).shape)
    y = textbook(x)
    ones = torch.ones((), dtype=torch.float64)
    rows = torch.randn(y.shape[1:], dtype=torch.float64)
    for cotangent in (
        ones.expand(y.shape),
        rows.expand(y.shape),
        torch.randn(y.shape).double() @ torch.eye(y.shape[-1]).double(),
    ):
        before = cotangent.clone()
        got, want = (torch.autograd.grad(stage(x), [x, *stage.parameters()], cotangent) for stage in (fast, textbook))
        for i, (ours, theirs) in enumerate(zip(got, want, strict=True)):
            assert_close(f"gradient {i}", ours, theirs, scale=1e3)
        assert torch.equal(cotangent, before), "autograd owns it"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["stem 3, 2, 1", "stem 1D", "stem 3D", "transition 2, odd", "transition 1D", "head"])
def test_an_empty_batch_does_what_the_textbook_does(name: str, training: bool) -> None:
    textbook, fast = pair(CASES[name], change=lambda stage: stage.train(training))
    x = torch.zeros(0, *CASES[name].shape[1:], dtype=torch.float64, requires_grad=True)
    assert_same(results(fast, x), results(textbook, x))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    batch=st.integers(1, 3),
    channels=st.integers(1, 9),
    spatial=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    windows=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2)), min_size=3, max_size=3),
)
def test_any_shape(
    kind: str, batch: int, channels: int, spatial: list[int], windows: list[tuple[int, int, int]]
) -> None:
    kernel, stride, padding = (tuple(w[i] for w in windows[: len(spatial)]) for i in range(3))
    padding = tuple(min(p, k // 2) for p, k in zip(padding, kernel, strict=True))
    if kind != "stem":
        kernel = tuple(min(k, size) for k, size in zip(kernel, spatial, strict=True))
        stride, padding = kernel, (0,) * len(kernel)
    reach = [size + 2 * p - k for size, p, k in zip(spatial, padding, kernel, strict=True)]
    if min(reach) < 0 or batch * torch.Size(spatial).numel() <= 4:
        return  # no window, or so few values that their normalised ones cancel
    case = Case(kind, (batch, channels, *spatial), kernel, stride, padding)
    textbook, fast = pair(case)
    assert_same(results(fast, random_input(case.shape)), results(textbook, random_input(case.shape)))


def test_modules_hold_sizes_as_lists_or_single_tuples() -> None:
    for kind, sizes in (("stem", ([3, 2], [2, 2], [1, 0])), ("stem", ((3,), (2,), (1,))), ("transition", ([2, 3],))):
        textbook, fast = pair(Case(kind, (2, 5, 7, 9), *sizes))
        assert isinstance(fast.pool, nn.Module) and fast.pool.kernel_size is sizes[0]
        assert_same(results(fast, random_input((2, 5, 7, 9))), results(textbook, random_input((2, 5, 7, 9))))
