"""Stem, transition and head against the reference, in float64: outputs, every gradient, running statistics."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers.blocks import INF, LAYOUTS, NAN, assert_close, assert_same, evaluate, random_input, results
from helpers.pooled import CASES, KINDS, Case, Stage, pair, part, rolled, small
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastdense.backends.torch_backend import TorchBackend

STEMS = {
    **{name: case for name, case in CASES.items() if name.startswith("stem")},
    "stem 5, 2, 2": Case("stem", (2, 5, 17, 9), 5, 2, 2),
    "stem 4, 3, 0": Case("stem", (2, 5, 16, 9), 4, 3, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_equal_at_every_shape_and_layout(name: str, layout: str, fresh_memory_is_nan: None) -> None:
    """In two steps, of which the second reads what the first left, and evaluated; the output is channels last.

    With rows of whole 16-byte words, as the block's own output: what reads it need not copy.
    """
    reference, fast = pair(CASES[name])
    x = random_input(CASES[name].shape, layout=layout)
    for seed in (1, 2):
        again = (x.detach() * seed + (seed - 1)).requires_grad_()
        assert_same(results(fast, again, seed), results(reference, again, seed))
    assert_same(results(fast.eval(), x), results(reference.eval(), x))
    y = fast.train()(x)
    if y.dim() > 2:
        assert y.stride(1) == 1 and y.stride(-1) == (y.shape[1] + 1) // 2 * 2
    else:
        assert y.is_contiguous()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)))
@pytest.mark.parametrize("kind", KINDS)
def test_equal_where_any_subset_requires_gradients(
    kind: str, needs: tuple[bool, ...], training: bool, fresh_memory_is_nan: None
) -> None:
    """Of x, gamma, beta and the weight; the stem and the head have none."""
    if kind != "transition" and needs[3]:
        return

    def choose(stage: Stage) -> None:
        for (_, parameter), need in zip(stage.named_parameters(), needs[1:], strict=False):
            parameter.requires_grad_(need)
        stage.train(training)

    reference, fast = pair(small(kind), change=choose)
    assert [name for name, _ in fast.named_parameters()][:2] == ["norm.weight", "norm.bias"]
    x = random_input(small(kind).shape).detach().requires_grad_(needs[0])
    assert_same(results(fast, x), results(reference, x))


@pytest.mark.parametrize("size", [600, 1 << 22], ids=["by lines", "at once"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("period", [0, 1, 2])
@pytest.mark.parametrize("name", STEMS)
def test_the_first_maximum_of_equal_ones_gets_the_gradient(
    name: str, period: int, training: bool, size: int, monkeypatch: pytest.MonkeyPatch, fresh_memory_is_nan: None
) -> None:
    """Few values, and a ReLU that is off nearly everywhere: nearly every window ties."""
    monkeypatch.setattr("fastdense.backends.torch_backend.CHUNK_BYTES", size)
    reference, fast = pair(STEMS[name])
    with torch.no_grad():
        for stage in (reference, fast):
            stage.train(training).norm.bias.copy_(torch.linspace(-1.5, 0.5, stage.norm.num_features))
    x = rolled(STEMS[name].shape, period)
    assert_same(results(fast, x), results(reference, x))


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


def _not_finite(x: Tensor, values: list[float]) -> Tensor:
    """``values`` in some channels: at a corner, beside each other, at the end."""
    flat = x.flatten(2)
    for i, value in enumerate(values):
        flat[0, i % x.shape[1], [0, 1, -1][i % 3]] = value
        flat[-1, (2 * i + 1) % x.shape[1], flat.shape[2] // 2] = value
    return x.requires_grad_()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("values", [[NAN], [INF], [-INF], [NAN, NAN, INF], [INF, -INF, NAN, INF, NAN]])
@pytest.mark.parametrize(
    "name", ["block", "basic block", "stem 3, 2, 1", "stem 3, 1, 1", "stem 1D", "stem 3D", "transition 2", "head"]
)
def test_nan_and_inf_reach_the_loss_and_the_gradient(name: str, values: list[float], training: bool) -> None:
    reference, fast, x = part(name, change=lambda module: module.train(training))  # a gamma of 0 makes NaN of inf
    x = _not_finite(x.detach(), values)
    got, want = results(fast, x), results(reference, x)
    assert not want["output"].isfinite().all() or (not training and values == [-INF])
    if training and "block" in name:  # of gradients a block's sums make NaN of more than PyTorch's
        want = {"output": want["output"]}
    for key, theirs in want.items():
        ours = got[key]
        assert torch.equal(ours.isnan(), theirs.isnan()), key
        # Where both are finite or infinite they are equal; torch.equal would not see it past a NaN.
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, equal_nan=True, msg=key)


def test_the_last_nan_of_a_window_gets_the_gradient() -> None:
    """As PyTorch's, which takes whatever comes when it meets a NaN; with a frozen norm one sees which."""
    reference, fast = pair(Case("stem", (2, 5, 9, 12), 3, 2, 1), change=evaluate)
    generator = torch.Generator().manual_seed(3)
    x = random_input((2, 5, 9, 12)).detach()
    x[torch.rand(x.shape, generator=generator) < 0.3] = NAN
    got, want = (results(stage, x.clone().requires_grad_())["x.grad"] for stage in (fast, reference))
    assert_close("x.grad", got, want)
    assert want.isfinite().all() and want[x.isnan()].count_nonzero() > 40


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [300, 4000])
def test_equal_in_chunks(
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
    reference, fast = pair(case, change=lambda stage: stage.train(training))
    x = random_input(case.shape)
    x = (x.detach() + torch.arange(5.0).view(5, *[1] * (x.dim() - 1)).double() * 20).requires_grad_()
    assert_same(results(fast, x), results(reference, x))
    assert (max(merged) > 1) == (x[0, 0].numel() * 5 * max(x.shape[1], 1) * 8 > size) if training else not merged


@pytest.mark.parametrize("kind", ["stem", "transition"])
def test_the_moments_of_what_comes_out(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the values as they are stored, from one chunk or many."""
    for size, dtype in itertools.product((1 << 20, 300), (torch.float64, torch.bfloat16)):
        monkeypatch.setattr("fastdense.backends.torch_backend.CHUNK_BYTES", size)
        _, fast = pair(small(kind), dtype=dtype)
        y, moments = fast.with_moments(random_input(small(kind).shape, dtype=dtype), None, want=True)
        var, mean = torch.var_mean(y.double(), dim=(0, 2, 3), correction=0)
        for name, got, want in (("mean", moments[0], mean), ("var", moments[1], var)):
            assert_close(name, got, want, 1e-9 if dtype == torch.float64 else 1e-6)
        assert fast.with_moments(random_input(small(kind).shape, dtype=dtype), None)[1] is None


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    batch=st.integers(1, 3),
    channels=st.integers(1, 9),
    spatial=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    windows=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2)), min_size=3, max_size=3),
)
def test_equal_for_any_shape(
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
    reference, fast = pair(case)
    assert_same(results(fast, random_input(case.shape)), results(reference, random_input(case.shape)))


def test_equal_where_modules_hold_sizes_as_lists_or_single_tuples() -> None:
    for kind, sizes in (("stem", ([3, 2], [2, 2], [1, 0])), ("stem", ((3,), (2,), (1,))), ("transition", ([2, 3],))):
        reference, fast = pair(Case(kind, (2, 5, 7, 9), *sizes))
        assert isinstance(fast.pool, nn.Module) and fast.pool.kernel_size is sizes[0]
        assert_same(results(fast, random_input((2, 5, 7, 9))), results(reference, random_input((2, 5, 7, 9))))
