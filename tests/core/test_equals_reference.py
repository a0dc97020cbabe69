"""Block and stages against the reference, in float64: outputs, gradients, statistics; at once or in pieces."""

import itertools
import math
from typing import Any

import pytest
import torch
from helpers import blocks, pooled
from helpers.blocks import INF, LAYOUTS, MODES, NAN, assert_close, assert_same, block_pair, random_input, results
from helpers.budget import SHAPES
from helpers.pooled import CASES, KINDS, Case, pair, part, rolled, small
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastdense
from fastdense.backends.tiling import of_images, of_rows
from fastdense.backends.torch_backend import TorchBackend
from fastdense.core.primitives import Pool

pytestmark = pytest.mark.quick

# layers, C0, bn_size, k, input shape
BLOCKS: dict[str, tuple[Any, ...]] = {
    **{name: shape[:5] for name, shape in SHAPES.items()},
    "k = 12, five layers": (5, 24, 4, 12, (2, 24, 5, 4)),
    "one row": (3, 6, 4, 4, (2, 6, 1, 9)),
    "basic, one pixel": (3, 3, None, 2, (5, 3, 1, 1)),
}
ALL = [*itertools.product(BLOCKS, MODES), *((name, "") for name in CASES)]


def build(name: str, mode: str, **options: Any) -> Any:
    """The reference, ours and the input's shape of one of ``ALL``."""
    if name in CASES:
        return *pair(CASES[name], **options), CASES[name].shape
    *arguments, shape = BLOCKS[name]
    return *block_pair(*arguments, spatial_dims=len(shape) - 2, recompute=mode, **options), shape


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "mode"), ALL)
def test_equal_at_every_shape_and_layout(name: str, mode: str, layout: str, fresh_memory_is_nan: None) -> None:
    """In two steps, of which the second reads what the first left, and evaluated; the output is channels last.

    With rows of whole 16-byte words: what reads it need not copy.
    """
    reference, fast, shape = build(name, mode)
    x = random_input(shape, layout=layout)
    for seed in (1, 2):
        again = (x.detach() * seed + (seed - 1)).requires_grad_()
        assert_same(results(fast, again, seed), results(reference, again, seed))
    assert_same(results(fast.eval(), x), results(reference.eval(), x))
    y = fast.train()(x)
    if y.dim() > 2:
        assert y.stride(1) == 1 and y.stride(-1) == (y.shape[1] + 1) // 2 * 2
    else:
        assert y.is_contiguous()


@pytest.mark.parametrize(
    ("name", "mode", "training", "size"),
    [(*one, True, size) for one in ALL for size in (300, 4000)] + [(name, "", False, 300) for name in CASES],
)
def test_equal_in_chunks(
    name: str, mode: str, training: bool, size: int, monkeypatch: pytest.MonkeyPatch, fresh_memory_is_nan: None
) -> None:
    """A few images, or lines, at a time, whose moments are merged."""
    monkeypatch.setattr("fastdense.backends.torch_backend.CHUNK_BYTES", size)
    calls = blocks.calls_of(monkeypatch, TorchBackend, "_merge_moments")
    reference, fast, shape = build(name, mode, change=lambda module: module.train(training))
    x = random_input((5, *shape[1:]))
    x = (x.detach() + torch.arange(5.0).view(5, *[1] * (x.dim() - 1)).double() * 20).requires_grad_()
    assert_same(results(fast, x), results(reference, x))
    if name in CASES:
        merged = [len(partial) for _, partial, _ in calls]
        assert (max(merged) > 1) == (x.nbytes > size) if training else not merged


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", [blocks.wider_kernel, blocks.kernel("conv1", 3, 1)], ids=["3x3", "1x1"])
def test_equal_with_kernels_of_another_size(change: Any, mode: str, fresh_memory_is_nan: None) -> None:
    reference, fast = block_pair(4, 6, 3, 4, change=change, recompute=mode)
    x = random_input((2, 6, 5, 4))
    assert_same(results(fast, x), results(reference, x))


# What parameters' names hold.
OF_A_BLOCK = (
    "", "conv", "norm", "denselayer2.conv1", "denselayer3.norm2", "denselayer3.norm1.weight", "denselayer1.norm1.bias",
    "denselayer1 denselayer3",
)  # fmt: skip
OF_A_STAGE = ("", "norm.weight", "norm.bias", "norm")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("input_needs", [True, False])
@pytest.mark.parametrize(
    ("name", "learning"),
    [
        *itertools.product(pooled.BLOCKS, OF_A_BLOCK), *itertools.product(KINDS, OF_A_STAGE),
        *(("transition", f"{names} conv") for names in OF_A_STAGE),
    ],
)  # fmt: skip
def test_equal_where_only_some_require_gradients(
    name: str, learning: str, input_needs: bool, training: bool, fresh_memory_is_nan: None
) -> None:
    def choose(module: nn.Module) -> None:
        module.train(training)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(any(part in name for part in learning.split()))

    reference, fast, x = part(name, change=choose)
    x = x.detach().requires_grad_(input_needs)
    assert_same(results(fast, x), results(reference, x))


def test_equal_where_growth_differs_between_layers() -> None:
    """As in networks whose growth rate rises with depth."""
    growth = (3, 1, 6)
    layers = nn.ModuleList(
        fastdense.DenseLayer(5 + sum(growth[:i]), k, 2, dtype=torch.float64) for i, k in enumerate(growth)
    )
    x = random_input((2, 5, 4, 3))

    def run(impl: str) -> dict[str, Any]:
        found = results(layers, x, forward=lambda x: fastdense.dense_block(x, layers, impl=impl))
        return {name: value for name, value in found.items() if "running" not in name and "num_batches" not in name}

    assert_same(run("torch"), run("reference"))


@settings(max_examples=40, deadline=None)
@given(
    layers=st.integers(1, 4),
    channels=st.integers(1, 20),
    bn_size=st.one_of(st.none(), st.integers(1, 4)),
    k=st.sampled_from([1, 2, 3, 8, 12]),
    batch=st.integers(1, 3),
    spatial=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    mode=st.sampled_from(MODES),
)
def test_a_block_of_any_shape_equals_its_reference(
    layers: int, channels: int, bn_size: int | None, k: int, batch: int, spatial: list[int], mode: str
) -> None:
    if batch * torch.Size(spatial).numel() == 1:
        return  # one value per channel: refused, as by F.batch_norm
    reference, fast = block_pair(layers, channels, bn_size, k, spatial_dims=len(spatial), recompute=mode)
    x = random_input((batch, channels, *spatial))
    # Two values per channel normalise to +-1 with a derivative that cancels to about eps: allow for that.
    assert_same(results(fast, x), results(reference, x), 1e-9 if x.numel() // channels > 4 else 1e-5)


STEMS = {
    **{name: case for name, case in CASES.items() if name.startswith("stem")},
    "stem 5, 2, 2": Case("stem", (2, 5, 17, 9), 5, 2, 2),
    "stem 4, 3, 0": Case("stem", (2, 5, 16, 9), 4, 3, 0),
}


@pytest.mark.parametrize("size", [600, 1 << 22], ids=["by lines", "at once"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("period", [0, 1])
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


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("values", [[NAN], [INF], [-INF], [INF, -INF, NAN, INF, NAN]], ids=str)
@pytest.mark.parametrize(
    "name", ["block", "basic block", "stem 3, 2, 1", "stem 3, 1, 1", "stem 1D", "stem 3D", "transition 2", "head"]
)
def test_nan_and_inf_reach_the_loss_and_the_gradient(name: str, values: list[float], training: bool) -> None:
    reference, fast, x = part(name, change=lambda module: module.train(training))  # a gamma of 0 makes NaN of inf
    flat = x.detach().flatten(2)
    for i, value in enumerate(values):  # in some channels, at a corner, beside each other, at the end
        flat[0, i % x.shape[1], [0, 1, -1][i % 3]] = value
        flat[-1, (2 * i + 1) % x.shape[1], flat.shape[2] // 2] = value
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
    reference, fast = pair(Case("stem", (2, 5, 9, 12), 3, 2, 1), change=blocks.evaluate)
    generator = torch.Generator().manual_seed(3)
    x = random_input((2, 5, 9, 12)).detach()
    x[torch.rand(x.shape, generator=generator) < 0.3] = NAN
    got, want = (results(stage, x.clone().requires_grad_())["x.grad"] for stage in (fast, reference))
    assert_close("x.grad", got, want)
    assert want.isfinite().all() and want[x.isnan()].count_nonzero() > 40


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
def test_a_stage_of_any_shape_equals_its_reference(
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


POOLS = {
    "none": None,
    "average": Pool("average", (2, 2), (2, 2), (0, 0)),
    "average of 3": Pool("average", (3, 2), (3, 2), (0, 0)),
    "stem": Pool("maximum", (3, 3), (2, 2), (1, 1)),
    "overlapping": Pool("maximum", (5, 3), (2, 1), (2, 0)),
    "mean": Pool("mean"),
}


@settings(max_examples=200, deadline=None)
@given(
    images=st.integers(0, 3),
    height=st.integers(5, 17),
    width=st.integers(3, 6),
    at_most=st.integers(1, 120),
    halo=st.integers(0, 2),
    pool=st.sampled_from(sorted(POOLS)),
)
def test_every_row_is_wanted_once(images: int, height: int, width: int, at_most: int, halo: int, pool: str) -> None:
    spatial, windows = (height, width), POOLS[pool]
    m = images * height * width
    made = math.prod(spatial if windows is None else windows.sizes(spatial))
    wanted, written = [], []
    for piece in of_images(m, spatial, at_most, pool=windows, halo=halo):
        wanted += range(piece.wanted.start, piece.wanted.stop)
        written += range(piece.written.start, piece.written.stop)
        assert 0 <= piece.read.start <= piece.wanted.start and piece.wanted.stop <= piece.read.stop <= m
        assert (piece.read.stop - piece.read.start) % math.prod(piece.spatial) == 0
        assert piece.outputs.start <= piece.written.start and piece.written.stop <= piece.outputs.stop <= images * made
    assert wanted == list(range(m))
    assert (sorted(set(written)) if pool == "mean" else written) == list(range(images * made))


def test_pieces_fit_into_the_scratch_where_they_can() -> None:
    assert max(p.read.stop - p.read.start for p in of_images(800, (40, 10), 100, halo=1)) == 100  # ten lines
    assert [p.read.stop - p.read.start for p in of_rows(25, (5, 5), 10)] == [10, 10, 5]


@pytest.mark.parametrize("size", [600, 3000])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_network_in_chunks_equals_its_reference(
    dims: int, size: int, monkeypatch: pytest.MonkeyPatch, fresh_memory_is_nan: None
) -> None:
    """Scratch for a line or a few of the images, whose sizes leave a line over at every pooling."""
    monkeypatch.setattr("fastdense.backends.torch_backend.CHUNK_BYTES", size)
    options: dict[str, Any] = {"bn_size": 2, "num_classes": 3, "spatial_dims": dims, "dtype": torch.float64}
    networks = [fastdense.DenseNet(4, (2, 2), 6, impl=impl, **options) for impl in ("torch", "reference")]
    blocks.randomise(networks[1])
    networks[0].load_state_dict(networks[1].state_dict())
    x = random_input((2, 3, *((203,), (53, 31), (29, 22, 23))[dims - 1]))
    got, want = (results(network, x) for network in networks)
    assert_same(got, want)
