"""A converted Sequential runs BN-ReLU-MaxPool as one, and calls all its other children as they are."""

from __future__ import annotations

import copy
import io
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import foreign
from helpers.blocks import assert_close, assert_same, calls_fastdense, random_input, randomise, results
from helpers.converted import COPIES, SHAPES
from helpers.converted import stem_pair as pair
from torch import Tensor, nn

import fastdense
from fastdense import functional
from fastdense.conversion.converted import KINDS, Converted

Change = Callable[[Any], None]


def kinds(model: nn.Module) -> list[tuple[str, str]]:
    return [(name, KINDS[type(m._fastdense)]) for name, m in model.named_modules() if isinstance(m, Converted)]


ALL = [
    ("features", "stem"),
    ("features.denseblock1", "block"),
    ("features.transition1", "transition"),
    ("features.denseblock2", "block"),
]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_results(dims: int, layout: str, fused: list[tuple[int, ...]]) -> None:
    theirs, ours, x = pair(dims)
    assert kinds(ours) == ALL
    fused.clear()
    for step in range(2):
        x = random_input(SHAPES[dims], layout=layout, seed=step)
        assert_same(results(ours, x, step), results(theirs, x, step))
    assert_close("evaluation", ours.eval()(x), theirs.eval()(x))
    assert fused == [(SHAPES[dims][0], 6, *SHAPES[dims][2:])] * 3


def test_nothing_else_about_the_model_changes() -> None:
    theirs, _, _ = pair()
    parameters, keys = dict(theirs.named_parameters()), list(theirs.state_dict())
    repeated = repr(theirs)
    ours = fastdense.convert(theirs)
    assert isinstance(ours.features, nn.Sequential) and [*ours.features._modules][:4] == [
        "conv0", "norm0", "relu0", "pool0",
    ]  # fmt: skip
    assert list(ours.state_dict()) == keys
    assert all(value is parameters[name] for name, value in ours.named_parameters())
    assert repr(fastdense.revert(ours)) == repeated and type(ours.features) is nn.Sequential
    assert "_fastdense" not in vars(ours.features)


def test_filter_and_converting_twice() -> None:
    asked: list[tuple[str, type]] = []
    net = foreign.Features()

    def only_the_stem(module: nn.Module, name: str) -> bool:
        asked.append((name, type(module)))
        return name == "features"

    fastdense.convert(net, filter_fn=only_the_stem)
    assert kinds(net) == ALL[:1]
    assert [name for name, _ in asked] == [name for name, _ in ALL] and asked[0][1] is nn.Sequential
    fastdense.convert(net, recompute="bottlenecks")
    assert kinds(net) == ALL
    classes = [type(module) for module in net.modules()]
    fastdense.convert(net, impl="torch")
    assert [type(module) for module in net.modules()] == classes
    assert all(m._fastdense[-2:] == ("bottlenecks", "torch") for m in net.modules() if isinstance(m, Converted))


def test_a_stem_that_is_a_sequential_of_its_own(fused: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    theirs = foreign.Net(foreign.ListBlock, pooled=True).double()
    ours = fastdense.convert(copy.deepcopy(theirs))
    assert kinds(ours)[0] == ("stem", "stem")
    fused.clear()
    x = random_input((2, 3, 13, 10))
    assert_same(results(ours, x), results(theirs, x))
    assert len(fused) == 1


@pytest.mark.parametrize("pool", [
    nn.MaxPool2d(2), nn.MaxPool2d((3, 2), (1, 2), (1, 0)), nn.MaxPool2d(3, 1), nn.MaxPool2d(2, 3),
])  # fmt: skip
def test_other_windows(pool: nn.Module, fused: list[tuple[int, ...]]) -> None:
    theirs, _, x = pair()
    theirs.features.pool0 = pool
    ours = fastdense.convert(copy.deepcopy(theirs))
    assert kinds(ours) == ALL
    fused.clear()
    assert_same(results(ours, x), results(theirs, x))
    assert len(fused) == 1


# --- what is no stem -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "module", "reason"), [
    ("pool0", nn.MaxPool2d(3, 2, 1, ceil_mode=True), "rim"),
    ("pool0", nn.MaxPool2d(3, 2, 1, dilation=2), "dilated"),
    ("pool0", nn.MaxPool2d(3, 2, 1, return_indices=True), "tuple"),
    ("pool0", nn.AvgPool2d(3, 2, 1), None),
    ("relu0", nn.SiLU(), None),
    ("relu0", nn.ReLU6(), None),
    ("norm0", nn.InstanceNorm2d(6), None),
    ("norm0", nn.GroupNorm(2, 6), None),
])  # fmt: skip
def test_other_structures_stay(name: str, module: nn.Module, reason: str | None) -> None:
    theirs, _, x = pair()
    setattr(theirs.features, name, module.double())
    found = [entry for entry in fastdense.plan(theirs) if entry.kind == "stem"]
    assert [entry.action for entry in found] == ([] if reason is None else ["skip"])
    assert all(reason in entry.reason for entry in found)
    ours = fastdense.convert(copy.deepcopy(theirs))
    assert kinds(ours) == ALL[1:] and type(ours.features) is nn.Sequential
    if not getattr(module, "return_indices", False):
        assert_same(results(ours, x), results(theirs, x), 1e-9)


class Sideways(nn.Sequential):
    """A Sequential that calls its children otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_a_sequential_with_a_forward_of_its_own_stays() -> None:
    theirs, _, _ = pair()
    theirs.features = Sideways(OrderedDict(theirs.features._modules))
    assert kinds(fastdense.convert(copy.deepcopy(theirs))) == ALL[1:]
    theirs, _, _ = pair()
    theirs.features.forward = lambda x: x
    assert kinds(fastdense.convert(theirs)) == ALL[1:]


def test_a_network_without_blocks_stays() -> None:
    net = nn.Sequential(*foreign.stem(nn.Conv2d(3, 6, 3)), nn.Conv2d(6, 2, 1))
    assert fastdense.plan(net) == []
    with pytest.warns(UserWarning, match="no dense blocks"):
        assert kinds(fastdense.convert(net)) == []


def test_fastdense_own_network_stays() -> None:
    net = fastdense.densenet121(num_classes=3)
    assert "stem" not in [entry.kind for entry in fastdense.plan(net)]
    assert type(fastdense.convert(net).features) is nn.Sequential


def test_a_parametrized_norm_stays() -> None:
    theirs, _, x = pair()
    nn.utils.parametrize.register_parametrization(theirs.features.norm0, "weight", nn.Softplus())
    ours = fastdense.convert(copy.deepcopy(theirs))
    assert kinds(ours) == ALL[1:]
    assert_same(results(ours, x), results(theirs, x))


@pytest.mark.parametrize("what", ["output", "statistics"])
def test_a_wrong_stem_is_seen_by_verify(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = functional.fused_pool

    def wrong(x: Tensor, norm: Any, weight: Any, pool: Any, impl: str) -> Any:
        y, moments = original(x, norm, weight, pool, impl)
        if pool.kind != "maximum":
            return y, moments
        if what == "output":
            return y * (1 + 1e-7), moments
        norm.running_mean += 1e-6
        return y, moments

    monkeypatch.setattr(functional, "fused_pool", wrong)
    (entry,) = [entry for entry in fastdense.plan(foreign.Features()) if entry.kind == "stem"]
    assert entry.action == "skip" and "differs in training" in entry.reason


# --- copies, graphs, errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", COPIES)
def test_copies(how: str, fused: list[tuple[int, ...]]) -> None:
    theirs, ours, x = pair(recompute="bottlenecks")
    other = COPIES[how](ours)
    assert kinds(other) == ALL and other.features._fastdense == ours.features._fastdense
    fused.clear()
    assert_close("output", other(x), theirs(x))
    assert len(fused) == 1
    if how != "replica":
        hook = other.features.norm0.register_forward_hook(lambda *_: None)
        with pytest.warns(UserWarning, match="carries a hook"):
            other(x)
        hook.remove()
        assert type(fastdense.revert(other).features) is nn.Sequential and kinds(ours) == ALL


def test_torch_compile_in_one_graph() -> None:
    for training in (True, False):
        theirs, ours, x = pair()
        torch._dynamo.reset()
        compiled = torch.compile(ours.train(training), backend="aot_eager", fullgraph=True)
        got = results(ours, x, forward=lambda x, compiled=compiled: compiled(x))
        assert_same(got, results(theirs.train(training), x))


def test_a_compiled_stem_with_a_hook() -> None:
    theirs, ours, x = pair()
    for net in (theirs, ours):
        net.features.relu0.register_forward_hook(lambda m, i, output: output + 0.5)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert_same(results(ours, x, forward=lambda x: compiled(x)), results(theirs, x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_exports() -> None:
    theirs, ours, x = pair()
    ours.eval(), theirs.eval()
    x = x.detach()
    with pytest.warns(UserWarning, match="exported") as caught:
        program, traced = torch.export.export(ours, (x,), strict=False), torch.jit.trace(ours, (x,))
    assert len([w for w in caught if "fastdense" in str(w.message)]) == 1
    assert not calls_fastdense(program.graph) and not calls_fastdense(traced.inlined_graph)
    with pytest.warns(UserWarning, match=r"torch\.fx"):
        symbolic = torch.fx.symbolic_trace(ours)
    assert "features.pool0" in [node.target for node in symbolic.graph.nodes]
    for model in (program.module(), traced, symbolic):
        assert_close("exported", model(x * 2), theirs(x * 2))
    assert_close("itself", ours(x), theirs(x))


class Scriptable(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = torch.cat([x, layer(x)], 1)
        return x


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_jit_script() -> None:
    layers = [nn.Sequential(nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n, 4, 3, padding=1, bias=False)) for n in (6, 10)]
    theirs = nn.Sequential(*foreign.stem(nn.Conv2d(3, 6, 3)), Scriptable(*layers)).double()
    ours = fastdense.convert(copy.deepcopy(theirs))
    assert [kind for _, kind in kinds(ours)] == ["stem", "block"]
    x = random_input((2, 3, 13, 10)).detach()
    with pytest.warns(UserWarning, match=r"torch\.jit\.script.*convert it again"):
        scripted = torch.jit.script(ours)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    want = theirs(x)
    assert_close("scripted", torch.jit.load(file)(x), want)
    assert_close("itself", ours(x), want)


def test_double_backward_raises_and_reference_does_not() -> None:
    _, ours, x = pair()
    part = ours.features[:4]
    fastdense.revert(ours.features)
    head = fastdense.convert(nn.Sequential(*part, foreign.StarBlock(1, 6, 4).double(), nn.Identity()))
    del head[4]
    (gradient,) = torch.autograd.grad(head(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="impl='reference'"):
        gradient.sum().backward()
    fastdense.convert(head, impl="reference")
    (gradient,) = torch.autograd.grad(head(x).square().sum(), x, create_graph=True)
    gradient.sum().backward()


@pytest.mark.parametrize(("shape", "error"), [((2, 5, 9, 8), ValueError), ((2, 6, 9), ValueError),
                                              ((2, 6, 9, 8, 7), ValueError), ((6, 9, 8), ValueError)])  # fmt: skip
def test_bad_input_raises_as_the_original_does(shape: tuple[int, ...], error: type[Exception]) -> None:
    theirs, ours, _ = pair()
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    for net in (theirs, ours):
        del net.features.conv0
        with pytest.raises((error, RuntimeError)):
            net(torch.randn(shape, dtype=torch.float64))
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


def test_an_empty_batch() -> None:
    theirs, ours, _ = pair()
    x = torch.randn(0, 3, 13, 10, dtype=torch.float64)
    assert_same(results(ours.eval(), x), results(theirs.eval(), x))


def test_checkpoint_round_the_features_updates_statistics_once() -> None:
    from torch.utils.checkpoint import checkpoint

    _, ours, x = pair()
    want = results(copy.deepcopy(ours), x)

    def forward(x: Tensor) -> Tensor:
        features = checkpoint(ours.features, x, use_reentrant=False)
        return ours.classifier(F.relu(features).flatten(2).mean(2))

    got = results(ours, x, forward=forward)
    assert int(got["features.norm0.num_batches_tracked"]) == 1
    assert int(got["features.transition1.0.num_batches_tracked"]) == 1
    del want["features.norm5.num_batches_tracked"], want["features.norm5.running_mean"]
    del want["features.norm5.running_var"]
    assert_same({key: got[key] for key in want}, want)


# --- what it saves -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("done", [False, True])
def test_the_plan_tells_the_bytes_that_a_step_keeps(done: bool) -> None:
    theirs = foreign.Features()
    shape = (2, 3, 32, 24)
    net = fastdense.convert(copy.deepcopy(theirs), impl="torch") if done else theirs
    entry = fastdense.plan(net, shape)[0]
    assert (entry.name, entry.kind, entry.type) == ("features", "stem", "Sequential")
    assert (entry.action, entry.layers) == ("done" if done else "convert", 0)
    x = theirs.features.conv0(torch.randn(shape)).detach().requires_grad_()
    found = []
    for model in (theirs, fastdense.convert(copy.deepcopy(theirs))):
        for name in [name for name in model.features._modules if name not in ("norm0", "relu0", "pool0")]:
            delattr(model.features, name)
        with fastdense.memory.saved_bytes(model.features) as kept:
            model.features(x)
        found.append(kept.bytes)
    assert [entry.bytes_before, entry.bytes_after] == pytest.approx(found, rel=0.01)
    assert entry.bytes_before > 2.2 * entry.bytes_after  # three maps (a quarter of the indices' size) against one
    map_ = 4 * 2 * 6 * 32 * 24
    assert map_ < entry.bytes_after < 1.02 * map_


def test_a_plan_after_the_stem_lost_a_child() -> None:
    net = fastdense.convert(foreign.Features())
    del net.features.norm0
    entries = fastdense.plan(net, (2, 3, 16, 12))
    assert [entry.bytes_saved is None for entry in entries] == [True, False, False, False]


@pytest.mark.parametrize("change", [None, "bias", "groups", "overlap", "rim"])
def test_what_a_transition_keeps(change: str | None) -> None:
    """Its input alone, which is the block's output; where the operator cannot take it, the pooled map as well."""
    torch.manual_seed(0)
    theirs = foreign.Transition(12, 6).double()
    if change in ("bias", "groups"):
        groups = 3 if change == "groups" else 1
        theirs[2] = nn.Conv2d(12, 6, 1, bias=change == "bias", groups=groups, dtype=torch.float64)
    elif change is not None:
        theirs[3] = nn.AvgPool2d(3, 2) if change == "overlap" else nn.AvgPool2d(2, ceil_mode=True)
    randomise(theirs)
    ours = fastdense.convert(copy.deepcopy(theirs))
    assert isinstance(ours, Converted)
    for layout in ("channels_last", "contiguous", "slice"):
        x = random_input((3, 12, 9, 7), layout=layout)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_same(results(ours, x), results(theirs, x))
    x = random_input((3, 12, 9, 7), layout="channels_last")
    with fastdense.memory.saved_bytes(ours, x) as kept:
        ours(x)
    assert (kept.bytes < 8 * 3 * 12) == (change is None), kept.bytes
