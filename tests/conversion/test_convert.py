"""``convert`` and ``revert``: same parameters, same keys, same results, whatever the block's style."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from helpers import foreign
from helpers.blocks import assert_close, assert_same, random_input, randomise, results
from helpers.converted import COPIES
from torch import nn

import fastdense
from fastdense.conversion.converted import Converted


def pair(style: str, **options: Any) -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
    """A network with random statistics, its converted copy, and an input's shape."""
    net, shape = foreign.build(style)
    randomise(net)
    ours = fastdense.convert(copy.deepcopy(net), **options)
    return net, ours, shape


def converted(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Converted)]


def set_flags(model: nn.Module, value: bool) -> None:
    for module in model.modules():
        if hasattr(module, "efficient"):
            module.efficient = value


@pytest.mark.parametrize("mode", ["activations", "bottlenecks", "auto", None])
@pytest.mark.parametrize("style", foreign.STYLES)
def test_results_of_every_style(style: str, mode: str | None) -> None:
    theirs, ours, shape = pair(style, recompute=mode)
    set_flags(theirs, False)  # checkpointing would update its statistics twice
    assert converted(ours) == ["block1", "between", "block2"]
    for step in range(2):
        x = random_input(shape, seed=step)
        assert_same(results(ours, x), results(theirs, x))
    assert_close("evaluation", ours.eval()(x), theirs.eval()(x))


def test_efficient_updates_statistics_twice_where_fastdense_does_it_once() -> None:
    theirs, ours, shape = pair("star, efficient")
    x = random_input(shape)
    got, want = results(ours, x), results(theirs, x)
    assert int(want["block1.denselayer1.norm1.num_batches_tracked"]) == 2
    assert int(got["block1.denselayer1.norm1.num_batches_tracked"]) == 1


@pytest.mark.parametrize("style", ["list", "appending, 3D"])
def test_nothing_about_the_model_changes(style: str) -> None:
    net, _ = foreign.build(style)
    net.block2.eval()
    before = dict(net.named_parameters()), dict(net.named_buffers()), list(net.state_dict())
    training = {name: module.training for name, module in net.named_modules()}
    assert fastdense.convert(net) is net
    assert list(net.state_dict()) == before[2]
    for now, then in zip((dict(net.named_parameters()), dict(net.named_buffers())), before, strict=False):
        assert now.keys() == then.keys() and all(now[name] is then[name] for name in now)
    assert {name: module.training for name, module in net.named_modules()} == training
    assert isinstance(net.block1, foreign.ListBlock | foreign.AppendingBlock)


def test_the_random_state_and_the_inputs_are_left_alone() -> None:
    net, _ = foreign.build("list")
    values = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    fastdense.convert(net)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, values[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_state_dicts_go_both_ways() -> None:
    theirs, ours, shape = pair("appending")
    randomise(ours, 3)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = random_input(shape)
    assert_same(results(ours, x), results(theirs, x))


def test_converting_twice_is_converting_once() -> None:
    _, ours, shape = pair("list", recompute="bottlenecks")
    classes = [type(module) for module in ours.modules()]
    assert fastdense.convert(ours) is ours
    assert [type(module) for module in ours.modules()] == classes
    assert ours.block1._fastdense.recompute == "bottlenecks"
    fastdense.convert(ours, recompute="activations", impl="reference")
    assert (ours.block1._fastdense.recompute, ours.block1._fastdense.impl) == ("activations", "reference")
    ours(random_input(shape))


def test_revert_gives_the_original_classes_back() -> None:
    theirs, ours, shape = pair("star")
    parameters = list(ours.parameters())
    assert fastdense.revert(ours) is ours
    assert [type(module) for module in ours.modules()] == [type(module) for module in theirs.modules()]
    assert all(now is then for now, then in zip(ours.parameters(), parameters, strict=True))
    assert [vars(module).keys() for module in ours.modules()] == [vars(module).keys() for module in theirs.modules()]
    x = random_input(shape)
    assert_same(results(ours, x), results(theirs, x), 0.0)
    assert converted(fastdense.convert(ours))
    assert fastdense.revert(nn.Linear(2, 2)) is not None


def test_filter() -> None:
    net, _ = foreign.build("list")
    asked: list[tuple[str, str]] = []

    def only_the_second(module: nn.Module, name: str) -> bool:
        asked.append((name, type(module).__name__))
        return name == "block2"

    fastdense.convert(net, filter_fn=only_the_second)
    assert converted(net) == ["block2"]
    assert asked == [("block1", "ListBlock"), ("between", "Transition"), ("block2", "ListBlock")]


def test_on_the_triton_kernels() -> None:
    """Weights that are contiguous, not channels last as in fastdense's own blocks."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("written for the interpreter, which is not chosen where there is a GPU")
    torch.manual_seed(0)
    theirs = foreign.StarBlock(2, 6, 4)
    ours = fastdense.convert(copy.deepcopy(theirs), impl="triton")
    x = random_input((2, 6, 5, 4), dtype=torch.float32)
    assert_same(results(ours, x), results(theirs, x), 1e-5)


def test_a_block_as_the_model_itself() -> None:
    theirs = foreign.ListBlock(3, 6, 4).double()
    ours = fastdense.convert(copy.deepcopy(theirs))
    assert converted(ours) == [""]
    x = random_input((2, 6, 5, 3))
    assert_same(results(ours, x), results(theirs, x))


def test_fastdense_own_modules_stay_what_they_are() -> None:
    net = fastdense.DenseNet(4, (2, 2), 8, num_classes=3)
    classes = [type(module) for module in net.modules()]
    fastdense.convert(net)
    assert [type(module) for module in net.modules()] == classes


def test_one_block_used_twice_in_a_model() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = foreign.ListBlock(2, 6, 4)
            self.back = nn.Conv2d(14, 6, 1)
            self.again = self.block

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.again(self.back(self.block(x)))

    theirs = Twice().double()
    ours = fastdense.convert(copy.deepcopy(theirs))
    x = random_input((2, 6, 5, 3))
    assert_same(results(ours, x), results(theirs, x))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the old weight_norm's
@pytest.mark.parametrize("name", foreign.UNSUPPORTED)
@pytest.mark.parametrize("verify", [True, False])
def test_what_is_not_understood_is_left_alone(name: str, verify: bool) -> None:
    if name == "scaled in evaluation" and not verify:
        pytest.skip("only a run in evaluation sees it")
    theirs, ours = (foreign.Net(foreign.UNSUPPORTED[name][0], k=4).double() for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    fastdense.convert(ours, verify=verify)
    assert "block2" not in converted(ours)
    x = random_input((2, 5, 9, 6)).detach()
    for training in (True, False):
        torch.manual_seed(1)  # for the one that draws random numbers
        want = theirs.block2.train(training)(x)
        torch.manual_seed(1)
        assert torch.equal(ours.block2.train(training)(x), want)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", foreign.UNSUPPORTED)
def test_plan_says_why(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    block, reason = foreign.UNSUPPORTED[name]
    entries = fastdense.plan(foreign.Net(block, k=4))
    assert [(entry.name, entry.action) for entry in entries if entry.kind == "transition"] == [("between", "convert")]
    skipped = [entry for entry in entries if entry.action == "skip"]
    assert {entry.name for entry in skipped} <= {"block1", "block2"} and "block2" in [e.name for e in skipped]
    assert all(re.search(reason, entry.reason) for entry in skipped), [entry.reason for entry in skipped]


def test_code_that_raises_when_it_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    block = foreign.CannotBeEvaluated(2, 6, 4)
    (entry,) = fastdense.plan(block)
    assert entry.action == "skip" and "cannot be checked" in entry.reason and "no evaluation" in entry.reason
    with pytest.warns(UserWarning, match="no evaluation"):
        fastdense.convert(block)
    assert type(block) is foreign.CannotBeEvaluated


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("style", ["list", "appending"])
def test_copies_are_converted_too(style: str, how: str) -> None:
    theirs, ours, shape = pair(style, recompute="bottlenecks")
    other = COPIES[how](ours)
    assert converted(other) == converted(ours)
    assert other.block1._fastdense == ours.block1._fastdense
    assert type(other.block1) is type(ours.block1)
    x = random_input(shape)
    assert_close("output", other(x), theirs(x))
    if how != "replica":
        assert all(a is not b for a, b in zip(other.parameters(), ours.parameters(), strict=True))
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert float(ours(x).detach().norm()) > 0.1
        assert not converted(fastdense.revert(other)) and converted(ours)


def test_to_double_half_and_memory_format() -> None:
    net, shape = foreign.build("list")
    net = fastdense.convert(net.float())
    x = random_input(shape)
    first = net.double().eval()(x)
    assert first.dtype == torch.float64
    assert_close("channels_last", net.to(memory_format=torch.channels_last)(x), first)
    assert net.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    meta = copy.deepcopy(net).to("meta")
    assert meta(torch.empty(shape, device="meta", dtype=torch.bfloat16)).shape == (2, 7)


def test_a_model_on_meta_converts_and_loads_later() -> None:
    theirs, shape = foreign.build("appending")
    with torch.device("meta"):
        ours = foreign.Net(foreign.AppendingBlock).double()
    fastdense.convert(ours)
    ours.to_empty(device="cpu").load_state_dict(theirs.state_dict())
    x = random_input(shape)
    assert_same(results(ours, x), results(theirs, x))


def test_a_default_device_does_not_reach_the_checks() -> None:
    theirs, shape = foreign.build("list")
    with torch.device("meta"):
        ours = fastdense.convert(copy.deepcopy(theirs))
    assert converted(ours)
    x = random_input(shape)
    assert_same(results(ours, x), results(theirs, x))


def test_an_optimizer_from_before_goes_on() -> None:
    theirs, ours, shape = pair("list")
    fastdense.revert(ours)
    optimizers = [torch.optim.Adam(net.parameters(), lr=0.01) for net in (theirs, ours)]
    for step in range(4):
        if step == 2:
            fastdense.convert(ours)
        for net, optimizer in zip((theirs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            net(random_input(shape, seed=step).detach()).square().sum().backward()
            optimizer.step()
    for (name, got), want in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert_close(name, got, want, 1e-7)  # Adam divides by gradients that are almost 0


def test_weights_stay_where_they_are() -> None:
    """Shared memory stays shared, views stay views, and FSDP2 takes contiguous parameters only."""
    net, _ = foreign.build("list")
    net.share_memory()
    pointers = [(parameter.data_ptr(), parameter.stride()) for parameter in net.parameters()]
    fastdense.convert(net)
    assert [(parameter.data_ptr(), parameter.stride()) for parameter in net.parameters()] == pointers
    assert all(parameter.is_shared() for parameter in net.parameters())


def test_old_key_names_and_missing_counters_load() -> None:
    theirs, ours, shape = pair("star")
    old = {
        key.replace("norm1", "norm.1").replace("conv2", "conv.2"): value
        for key, value in theirs.state_dict().items()
        if "num_batches_tracked" not in key
    }
    assert "block1.denselayer1.norm.1.weight" in old
    keys = list(old)
    randomise(ours, 5)
    ours.load_state_dict(old, strict=True)
    assert list(old) == keys
    x = random_input(shape)
    assert_same(results(ours, x), results(theirs, x))
    with pytest.raises(RuntimeError, match=r"norm\.7"):
        ours.load_state_dict({**old, "block1.denselayer1.norm.7.weight": torch.zeros(1)}, strict=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit.script's
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda net: fastdense.convert(3), TypeError, "torch.nn.Module, got int"),
        (lambda net: fastdense.convert(net, recompute="all"), ValueError, "recompute.*'activations'.*'all'"),
        (lambda net: fastdense.convert(net, impl="gpu"), ValueError, "impl.*'triton'.*'gpu'"),
        (lambda net: fastdense.convert(net, filter_fn=3), TypeError, "filter_fn.*got 3"),
        (lambda net: fastdense.convert(torch.jit.script(nn.Linear(2, 2))), TypeError, "ScriptModule"),
        (lambda net: fastdense.revert("net"), TypeError, "torch.nn.Module, got str"),
        (lambda net: fastdense.plan([net]), TypeError, "torch.nn.Module, got list"),
        (lambda net: fastdense.plan(net, 224), ValueError, "input_shape.*224"),
        (lambda net: fastdense.plan(net, (2, 3, 0, 4)), ValueError, "input_shape.*0"),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    net, _ = foreign.build("list")
    with pytest.raises(error, match=message):
        call(net)
    assert not converted(net)


def test_nothing_to_convert_is_said() -> None:
    with pytest.warns(UserWarning, match="nothing to convert in this Sequential.*no dense blocks"):
        fastdense.convert(nn.Sequential(nn.Linear(3, 3), nn.Conv2d(3, 3, 3)))
    with pytest.warns(UserWarning, match=r"nothing to convert.*order.*fastdense\.plan"):
        fastdense.convert(nn.Sequential(foreign.NewestFirstBlock(3, 6, 4)))
