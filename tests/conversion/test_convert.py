"""``convert`` and ``revert``: same parameters, same keys, same results, whatever the block's style."""

import copy
import re
from typing import Any

import pytest
import torch
from helpers import foreign
from helpers.blocks import assert_close, assert_same, random_input, randomise, results
from helpers.converted import BLOCKS, COPIES, FEATURES, kinds, pair, twins, types
from torch import nn

import fastdense

pytestmark = pytest.mark.quick

MODES = ("activations", "bottlenecks", "auto", None)
WITH_STEM = ("pooled", "stem", "stem, 1D", "stem, 3D")


@pytest.mark.parametrize("style", foreign.STYLES)
def test_every_style_has_the_same_results_in_every_mode(style: str, fused: list[tuple[int, ...]]) -> None:
    theirs, ours, x = pair(style)
    for module in theirs.modules():
        if hasattr(module, "efficient"):
            module.efficient = False  # checkpointing would update its statistics twice
    expected = FEATURES if "stem" in style else {"stem": "stem", **BLOCKS} if style == "pooled" else BLOCKS
    assert kinds(ours) == expected
    for step, mode in enumerate(MODES):
        fastdense.convert(ours, recompute=mode)
        fused.clear()
        x = random_input(x.shape, layout=("contiguous", "channels_last")[step % 2], seed=step)
        assert_same(results(ours, x, step), results(theirs, x, step))
        assert fused == [(x.shape[0], 6, *x.shape[2:])] * (style in WITH_STEM)
    assert_close("evaluation", ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize(("style", "mode"), [("list", "activations"), ("star, efficient", "bottlenecks")])
def test_one_flag_of_several_asks_for_bottlenecks_and_no_flag_for_none(style: str, mode: str) -> None:
    _, ours, x = pair(style)
    if style != "list":
        ours.block1.denselayer1.efficient = False
    saved = []
    for recompute in (None, mode):
        fastdense.convert(ours, recompute=recompute)
        with fastdense.memory.saved_bytes(ours, x) as counted:
            ours(x)
        saved.append(counted.bytes)
    assert saved[0] == saved[1]


@pytest.mark.parametrize("style", ["list", "appending, 3D", "stem"])
def test_nothing_about_the_model_changes(style: str) -> None:
    """Memory that is shared stays shared, views stay views, and FSDP2 takes contiguous parameters only."""
    net, _ = foreign.build(style)
    net.share_memory()
    next(net.children()).eval()
    tensors, printed, classes = net.state_dict(keep_vars=True), repr(net), types(net)
    values = {name: value.clone() for name, value in tensors.items()}
    memory = [(value.data_ptr(), value.stride()) for value in tensors.values()]
    training = {name: module.training for name, module in net.named_modules()}
    random = torch.get_rng_state()
    assert fastdense.convert(net) is net and kinds(net)
    assert torch.equal(torch.get_rng_state(), random)
    after = net.state_dict(keep_vars=True)
    assert list(after) == list(tensors) and all(after[name] is value for name, value in tensors.items())
    assert all(torch.equal(value, values[name]) for name, value in after.items())
    assert [(value.data_ptr(), value.stride()) for value in after.values()] == memory
    assert all(parameter.grad is None and parameter.is_shared() for parameter in net.parameters())
    assert {name: module.training for name, module in net.named_modules()} == training
    assert all(isinstance(module, before) for module, before in zip(net.modules(), classes, strict=True))
    assert repr(fastdense.revert(net)) == printed


@pytest.mark.parametrize("style", ["list", "stem"])
def test_converting_twice_changes_the_options_and_converts_the_rest(style: str) -> None:
    net, _ = foreign.build(style)
    everything = FEATURES if style == "stem" else BLOCKS
    first, *_ = everything
    candidates = [(name, type(net.get_submodule(name)).__name__) for name in everything]
    asked: list[tuple[str, str]] = []

    def only_the_first(module: nn.Module, name: str) -> bool:
        asked.append((name, type(module).__name__))
        return name == first

    fastdense.convert(net, filter_fn=only_the_first)
    assert list(kinds(net)) == [first]
    assert asked == candidates
    fastdense.convert(net, recompute="bottlenecks")
    assert kinds(net) == everything
    classes = types(net)
    assert fastdense.convert(net) is net and types(net) == classes
    assert net.get_submodule(first)._fastdense.recompute == "bottlenecks"
    fastdense.convert(net, recompute="activations", impl="reference")
    assert types(net) == classes
    plans = [net.get_submodule(name)._fastdense for name in everything]
    assert {(plan.recompute, plan.impl) for plan in plans} == {("activations", "reference")}


@pytest.mark.parametrize("style", ["star", "stem"])
def test_revert_gives_the_original_classes_back(style: str) -> None:
    theirs, ours, x = pair(style)
    parameters = list(ours.parameters())
    assert fastdense.revert(ours) is ours
    assert types(ours) == types(theirs)
    assert all(now is then for now, then in zip(ours.parameters(), parameters, strict=True))
    assert [vars(module).keys() for module in ours.modules()] == [vars(module).keys() for module in theirs.modules()]
    assert_same(results(ours, x), results(theirs, x), 0.0)
    assert kinds(fastdense.convert(ours))
    assert types(fastdense.revert(nn.Linear(2, 2))) == [nn.Linear]


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_block_as_the_model_itself(impl: str) -> None:
    """On the kernels, too, with weights that are contiguous, not channels last as in fastdense's own blocks."""
    dtype, tolerance = (torch.float64, 1e-9) if impl == "torch" else (torch.float32, 1e-5)
    if impl == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("written for the interpreter, which is not chosen where there is a GPU")
    theirs = foreign.StarBlock(2, 6, 4).to(dtype)
    ours = fastdense.convert(copy.deepcopy(theirs), impl=impl)
    assert kinds(ours) == {"": "block"}
    x = random_input((2, 6, 5, 4), dtype=dtype)
    assert_same(results(ours, x), results(theirs, x), tolerance)


def test_fastdense_own_modules_stay_what_they_are() -> None:
    net = fastdense.DenseNet(4, (2, 2), 8, num_classes=3)
    classes = types(net)
    assert {entry.kind for entry in fastdense.plan(net)} <= {"block", "transition"}
    assert types(fastdense.convert(net)) == classes


def test_one_block_used_twice_in_a_model() -> None:
    block = foreign.ListBlock(2, 6, 4)
    theirs, ours = twins(nn.Sequential(block, nn.Conv2d(14, 6, 1), block).double())
    x = random_input((2, 6, 5, 3))
    assert_same(results(ours, x), results(theirs, x))


@pytest.mark.parametrize("name", foreign.UNSUPPORTED)
def test_what_is_not_understood_is_left_alone_and_plan_says_why(name: str) -> None:
    block, reason = foreign.UNSUPPORTED[name]
    theirs = block(3, 5, 4).double()
    (entry,) = fastdense.plan(theirs)
    assert (entry.name, entry.kind, entry.action) == ("", "block", "skip") and re.search(reason, entry.reason)
    for verify in (True, False):
        if name.endswith("in evaluation") and not verify:
            continue  # only a run in evaluation sees it
        ours = block(3, 5, 4).double()
        ours.load_state_dict(theirs.state_dict())
        with pytest.warns(UserWarning, match=rf"nothing to convert.*({reason}).*fastdense\.plan"):
            fastdense.convert(ours, verify=verify)
        assert not kinds(ours)
        x = random_input((2, 5, 9, 6)).detach()
        for training in (True, False):
            assert torch.equal(ours.train(training)(x), theirs.train(training)(x))


def test_what_is_not_understood_does_not_keep_the_rest_from_being_converted() -> None:
    net = fastdense.convert(foreign.Net(foreign.UNSUPPORTED["groups"][0]))
    assert kinds(net) == {"between": "transition"}
    assert [entry.action for entry in fastdense.plan(net)] == ["skip", "done", "skip"]


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("style", ["list", "appending", "stem"])
def test_copies_are_converted_too(style: str, how: str) -> None:
    theirs, ours, x = pair(style, recompute="bottlenecks")
    other = COPIES[how](ours)
    assert kinds(other) == kinds(ours) and types(other) == types(ours)
    for name in kinds(ours):
        assert other.get_submodule(name)._fastdense == ours.get_submodule(name)._fastdense
    assert_close("output", other(x), theirs(x))
    if how != "replica":
        inner = next(name for name, module in other.named_modules() if isinstance(module, nn.BatchNorm2d))
        handle = other.get_submodule(inner).register_forward_hook(lambda *_: None)
        with pytest.warns(UserWarning, match="carries a hook"):
            other(x)
        handle.remove()
        assert all(a is not b for a, b in zip(other.parameters(), ours.parameters(), strict=True))
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert float(ours(x).detach().norm()) > 0.1
        assert not kinds(fastdense.revert(other)) and kinds(ours)


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


@pytest.mark.parametrize("what", ["the model is", "by default"])
def test_converted_on_meta(what: str) -> None:
    """A model on meta loads its values later; a default device does not reach the checks."""
    theirs, shape = foreign.build("appending")
    with torch.device("meta"):
        ours = foreign.Net(foreign.AppendingBlock).double() if what == "the model is" else copy.deepcopy(theirs)
        fastdense.convert(ours)
    assert kinds(ours) == BLOCKS
    if what == "the model is":
        ours.to_empty(device="cpu").load_state_dict(theirs.state_dict())
    x = random_input(shape)
    assert_same(results(ours, x), results(theirs, x))


def test_state_dicts_go_both_ways_and_old_key_names_and_missing_counters_load() -> None:
    theirs, ours, x = pair("star")
    randomise(ours, 3)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same(results(ours, x), results(theirs, x))
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
    assert_same(results(ours, x), results(theirs, x))
    with pytest.raises(RuntimeError, match=r"norm\.7"):
        ours.load_state_dict({**old, "block1.denselayer1.norm.7.weight": torch.zeros(1)}, strict=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit.script's
@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda net: fastdense.convert(3), TypeError, "torch.nn.Module, got int"),
    (lambda net: fastdense.convert(net, recompute="all"), ValueError, "recompute.*'activations'.*'all'"),
    (lambda net: fastdense.convert(net, impl="gpu"), ValueError, "impl.*'triton'.*'gpu'"),
    (lambda net: fastdense.convert(net, filter_fn=3), TypeError, "filter_fn.*got 3"),
    (lambda net: fastdense.convert(torch.jit.script(nn.Linear(2, 2))), TypeError, "ScriptModule"),
    (lambda net: fastdense.revert("net"), TypeError, "torch.nn.Module, got str"),
    (lambda net: fastdense.plan([net]), TypeError, "torch.nn.Module, got list"),
    (lambda net: fastdense.plan(net, 224), ValueError, "input_shape.*224"),
    (lambda net: fastdense.plan(net, (2, 3, 0, 4)), ValueError, "input_shape.*0"),
], ids=["no module", "recompute", "impl", "filter", "scripted", "revert", "plan", "no shape", "no pixels"])  # fmt: skip
def test_bad_arguments_are_named(call: Any, error: type[Exception], message: str) -> None:
    net, _ = foreign.build("list")
    with pytest.raises(error, match=message):
        call(net)
    assert not kinds(net)


def test_nothing_to_convert_is_said() -> None:
    without_blocks = nn.Sequential(nn.Linear(3, 3), *foreign.stem(nn.Conv2d(3, 6, 3)))
    assert fastdense.plan(without_blocks) == []
    with pytest.warns(UserWarning, match="nothing to convert in this Sequential.*no dense blocks"):
        assert not kinds(fastdense.convert(without_blocks))
