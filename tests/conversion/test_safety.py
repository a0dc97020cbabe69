"""Inside a converted block: what fastdense cannot run fused runs the original code, said once, never differently."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import foreign
from helpers.blocks import assert_close, assert_same, calls_fastdense, random_input, randomise, results, says_once
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastdense
from fastdense.conversion.converted import Converted
from fastdense.core import warn

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit's own


def pair(block: Any = foreign.ListBlock, **options: Any) -> tuple[Any, Any, Tensor]:
    """A network, its converted copy, and an input."""
    torch.manual_seed(0)
    net = foreign.Net(block, **options).double()
    randomise(net)
    return net, fastdense.convert(copy.deepcopy(net)), random_input((2, 3, 9, 6))


def _hook(net: Any) -> None:
    net.block2.steps[1].grow.register_forward_hook(lambda module, inputs, output: output * 2)


def _pre_hook(net: Any) -> None:
    net.block2.steps[0].bn_a.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))


def _backward_hook(net: Any) -> None:
    net.block2.steps[1].squeeze.register_full_backward_hook(lambda module, grads, _: (grads[0] * 3,))


def _backward_pre_hook(net: Any) -> None:
    net.block2.steps[1].squeeze.register_full_backward_pre_hook(lambda module, grads: (grads[0] * 3,))


def _layer_hook(net: Any) -> None:
    net.block2.steps[1].register_forward_hook(lambda module, inputs, output: output - 1)


def _parametrization(net: Any) -> None:
    parametrizations.weight_norm(net.block2.steps[1].grow)


def _other_activation(net: Any) -> None:
    class Loud(type(net.block2.steps[1])):
        def forward(self, features: Any) -> Tensor:
            return super().forward(features) * 2

    net.block2.steps[1].__class__ = Loud


def _other_norm(net: Any) -> None:
    layer = net.block2.steps[1]
    layer.bn_a = nn.GroupNorm(1, layer.bn_a.num_features, dtype=torch.float64)


def _bias(net: Any) -> None:
    torch.manual_seed(2)
    net.block2.steps[2].grow = nn.Conv2d(12, 4, 3, padding=1, dtype=torch.float64)


def _dilated(net: Any) -> None:
    net.block2.steps[2].grow.dilation = net.block2.steps[2].grow.padding = (2, 2)


def _own_forward(net: Any) -> None:
    conv = net.block2.steps[0].grow
    conv.forward = lambda h, original=conv.forward: original(h) + 1


CHANGES = [
    _hook, _pre_hook, _backward_hook, _backward_pre_hook, _layer_hook, _parametrization, _other_activation, _other_norm,
    _bias, _dilated, _own_forward,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_later_change_runs_the_original_code_and_says_so_once(change: Callable[[Any], None]) -> None:
    theirs, ours, x = pair()
    before = results(ours, x)
    ours.load_state_dict(theirs.state_dict())
    change(theirs), change(ours)
    got = says_once(ours, x, lambda: results(ours, x))
    want = results(theirs, x)
    assert_same({key: got[key] for key in want}, want)
    assert not torch.equal(got["output"], before["output"]) or "backward" in change.__name__


@pytest.mark.parametrize("change", CHANGES)
def test_an_explicit_backend_refuses(change: Callable[[Any], None]) -> None:
    _, ours, x = pair()
    fastdense.convert(ours, impl="torch")
    change(ours)
    with pytest.raises(RuntimeError, match=r"impl='torch' cannot run this block.*impl='reference'"):
        ours(x)


@pytest.mark.parametrize("change", [_hook, _pre_hook, _layer_hook])
def test_hooks_from_before_the_conversion(change: Callable[[Any], None]) -> None:
    theirs, _, x = pair()
    change(theirs)
    ours = fastdense.convert(copy.deepcopy(theirs))
    assert isinstance(ours.block2, Converted)
    assert_same(says_once(ours, x, lambda: results(ours, x)), results(theirs, x))


def test_fused_again_once_the_hook_is_gone() -> None:
    _, ours, x = pair()
    calls: list[str] = []
    handle = ours.block2.steps[0].grow.register_forward_hook(lambda *_: calls.append("hook"))
    with pytest.warns(UserWarning, match="reference path"):
        ours(x)
    handle.remove()
    with fastdense.memory.saved_bytes(ours, x) as kept:
        ours(x)
    _, other, _ = pair()
    with fastdense.memory.saved_bytes(other, x) as want:
        other(x)
    assert calls == ["hook"] and kept.bytes == want.bytes


def test_a_module_added_to_a_sequential_layer() -> None:
    theirs, ours, x = pair(foreign.AppendingBlock)
    for net in (theirs, ours):
        net.block2[1].add_module("extra", nn.Tanh())
    assert_same(says_once(ours, x, lambda: results(ours, x), "other children"), results(theirs, x))


def test_the_order_of_a_sequential_layer_changed() -> None:
    theirs, ours, x = pair(foreign.AppendingBlock)
    for net in (theirs, ours):
        layer = net.block2[1]
        relu = layer.relu1
        del layer.relu1
        layer.relu1 = relu  # at the end now
    assert_same(says_once(ours, x, lambda: results(ours, x), "other children"), results(theirs, x))


def test_a_child_that_was_none() -> None:
    class Layer(foreign.ListLayer):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.extra = None

        def forward(self, features: Any) -> Tensor:
            h = super().forward(features)
            return h if self.extra is None else self.extra(h)

    class Block(foreign.ListBlock):
        layer = Layer

    theirs, ours, x = pair(Block)
    for net in (theirs, ours):
        net.block2.steps[1].extra = nn.Tanh()
    assert_same(says_once(ours, x, lambda: results(ours, x), "other children|gain|extra"), results(theirs, x))


def test_a_layer_more_and_a_layer_less() -> None:
    theirs, ours, x = pair()
    for net in (theirs, ours):
        net.block2.steps.append(copy.deepcopy(net.block2.steps[0]))
        net.block2.steps[3] = foreign.ListLayer(17, 4).double()
        net.last, net.classifier = nn.BatchNorm2d(21).double(), nn.Linear(21, 7).double()
    ours.load_state_dict(theirs.state_dict())
    assert_same(says_once(ours, x, lambda: results(ours, x), "other children"), results(theirs, x))
    for net in (theirs, ours):
        del net.block2.steps[2:]
        net.last, net.classifier = nn.BatchNorm2d(13).double(), nn.Linear(13, 7).double()
    ours.load_state_dict(theirs.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(results(ours, x), results(theirs, x))


def test_a_layer_added_to_the_block_itself() -> None:
    theirs = foreign.StarBlock(2, 6, 4).double()
    ours = fastdense.convert(copy.deepcopy(theirs))
    for block in (theirs, ours):
        block.add_module("denselayer3", foreign.StarLayer(14, 4).double())
    ours.load_state_dict(theirs.state_dict())
    x = random_input((2, 6, 5, 4))
    assert_same(says_once(ours, x, lambda: results(ours, x), "other children"), results(theirs, x))


class Switchable(foreign.ListLayer):
    """Something in its ``forward`` that is off when the model is converted."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.gain = 1

    def forward(self, features: Any) -> Tensor:
        return super().forward(features) if self.gain == 1 else super().forward(features) * self.gain


def test_a_switch_of_a_foreign_layer_thrown_later() -> None:
    class Block(foreign.ListBlock):
        layer = Switchable

    theirs, ours, x = pair(Block)
    for net in (theirs, ours):
        net.block2.steps[1].gain = 2
    assert_same(
        says_once(ours, x, lambda: results(ours, x), "gain=1 when it was converted and has 2"), results(theirs, x)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.block2.steps[1].gain = 1
        ours(x)


def test_a_slice_of_a_converted_sequential() -> None:
    block = foreign.AppendingBlock(3, 6, 4).double()
    theirs = nn.Sequential(*block)
    ours = fastdense.convert(copy.deepcopy(theirs))
    assert isinstance(ours, Converted)
    x = random_input((2, 6, 5, 4))
    assert_same(results(ours[:2], x), results(theirs[:2], x))
    assert fastdense.plan(ours[:2]) == []
    assert type(fastdense.revert(ours[:2])) is nn.Sequential


def test_replaced_by_the_same_type_stays_fused() -> None:
    theirs, ours, x = pair()
    for net in (theirs, ours):
        torch.manual_seed(4)
        net.block2.steps[0].squeeze = nn.Conv2d(5, 12, 1, bias=False, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(results(ours, x), results(theirs, x))


def test_a_hook_in_a_transition() -> None:
    theirs, ours, x = pair()
    for net in (theirs, ours):
        net.between[2].register_forward_hook(lambda module, inputs, output: output.clamp(max=0.5))
    assert_same(says_once(ours, x, lambda: results(ours, x)), results(theirs, x))


def test_a_changed_pooling_in_a_transition() -> None:
    theirs, ours, x = pair()
    for net in (theirs, ours):
        net.between[3].divisor_override = 3
    assert_same(says_once(ours, x, lambda: results(ours, x), "change places"), results(theirs, x))


def test_dropout_raised_later() -> None:
    """The rate is read at every call, whatever it was when the block was converted."""
    _, ours, x = pair()
    plain = ours(x)
    for step in ours.block2.steps:
        step.drop_rate = 0.5
    first, second = ours(x), ours(x)
    assert not torch.equal(first, plain) and not torch.equal(first, second)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(ours.eval()(x), ours(x))


def test_global_hooks() -> None:
    theirs, ours, x = pair()
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        with pytest.warns(UserWarning, match="global module hook"):
            got = ours(x)
    finally:
        handle.remove()
    assert seen.count("Conv2d") == 1 + 4 + 1 + 6
    assert_close("output", got, theirs(x))


def test_hooks_on_blocks_work_as_before() -> None:
    """Grad-CAM: a feature map and its gradient, from hooks on a block."""
    found = []
    theirs, ours, x = pair()
    for net in (theirs, ours):
        seen: dict[str, Tensor] = {}
        net.block2.register_forward_hook(lambda m, i, o, seen=seen: seen.update(output=o.detach()))
        net.block2.register_forward_pre_hook(lambda m, i, seen=seen: seen.update(input=i[0].detach()))
        net.block2.register_full_backward_hook(
            lambda m, gi, go, seen=seen: seen.update(grad_input=gi[0], grad_output=go[0])
        )
        net.between.register_forward_hook(lambda m, i, o: o * 1.5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            net(x).square().sum().backward()
        found.append(seen)
    assert_same(found[1], found[0])
    assert set(found[0]) == {"output", "input", "grad_input", "grad_output"}


def test_relu_after_a_block() -> None:
    """In place, autograd refuses: the block keeps its output for backward. Never a wrong gradient."""
    x = random_input((2, 6, 5, 4))
    for inplace in (False, True):
        theirs = nn.Sequential(foreign.ListBlock(2, 6, 4), nn.ReLU(inplace=inplace), nn.Conv2d(14, 3, 1)).double()
        ours = fastdense.convert(copy.deepcopy(theirs))
        assert isinstance(ours[0], Converted)
        if inplace:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                results(ours, x)
        else:
            assert_same(results(ours, x), results(theirs, x))
        with torch.no_grad():
            ours.load_state_dict(theirs.state_dict())
            assert_close("evaluation", ours.eval()(x), theirs.eval()(x))


def test_called_with_something_else_than_one_tensor() -> None:
    block = foreign.ListBlock(2, 6, 4).double()
    ours = fastdense.convert(copy.deepcopy(block))
    x = random_input((2, 6, 5, 4))
    with pytest.warns(UserWarning, match="something else than one tensor"):
        got = ours(x=x)
    assert_close("output", got, block(x))


@pytest.mark.parametrize("block", [foreign.AppendingBlock, foreign.ListBlock])
def test_torch_jit_trace(block: Any) -> None:
    theirs, ours, x = pair(block)
    x = x.detach()
    ours.eval(), theirs.eval()
    with pytest.warns(UserWarning, match="exported") as caught:
        traced = torch.jit.trace(ours, (x,))
    assert len([w for w in caught if "fastdense" in str(w.message)]) == 1
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert_close("traced", loaded(x * 2), theirs(x * 2))
    assert not calls_fastdense(traced.inlined_graph)
    assert_close("itself", ours(x), theirs(x))


class Scriptable(nn.Sequential):
    """A block of one layer that TorchScript can compile."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = torch.cat([x, layer(x)], 1)
        return x


def _scriptable_layer(reads: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(reads), nn.ReLU(), nn.Conv2d(reads, 4, 3, padding=1, bias=False))


def test_torch_jit_script() -> None:
    theirs = nn.Sequential(Scriptable(_scriptable_layer(6), _scriptable_layer(10)), nn.Conv2d(14, 2, 1)).double()
    ours = fastdense.convert(copy.deepcopy(theirs))
    assert isinstance(ours[0], Converted)
    x = random_input((2, 6, 5, 4)).detach()
    with pytest.warns(UserWarning, match=r"torch\.jit\.script.*convert it again"):
        scripted = torch.jit.script(ours)
    assert_close("scripted", scripted(x), theirs(x))
    assert_close("itself", ours(x), theirs(x))
    assert isinstance(fastdense.convert(ours)[0], Converted)
    parameters = dict(scripted.named_parameters())
    assert all(parameters[name].data_ptr() == value.data_ptr() for name, value in ours.named_parameters())


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export(strict: bool) -> None:
    theirs, ours, x = pair()
    ours.eval(), theirs.eval()
    x = x.detach()
    if strict:
        program = torch.export.export(ours, (x,), strict=True)
    else:
        with pytest.warns(UserWarning, match="exported") as caught:
            program = torch.export.export(ours, (x,), strict=False)
        assert len([w for w in caught if "fastdense" in str(w.message)]) == 1
    assert not calls_fastdense(program.graph)
    assert_close("exported", program.module()(x * 2), theirs(x * 2))


def test_torch_fx() -> None:
    """As torchvision's ``create_feature_extractor`` does it."""
    theirs, ours, x = pair()
    with pytest.warns(UserWarning, match=r"torch\.fx"):
        traced = torch.fx.symbolic_trace(ours)
    assert_same(results(ours, x), results(theirs, x))
    assert_close("traced", traced.eval()(x), theirs.eval()(x))


def test_onnx() -> None:
    """The exporter sees plain PyTorch: it records by ``torch.jit.trace``, and writes only where onnx is installed."""
    _, ours, x = pair()
    with pytest.warns(UserWarning, match="exported"), contextlib.suppress(torch.onnx.errors.OnnxExporterError):
        torch.onnx.export(ours.eval(), (x.detach(),), io.BytesIO(), dynamo=False)


def test_fastdense_own_block_exports_too() -> None:
    warn._said.clear()
    block = fastdense.DenseBlock(2, 6, 4, 4, dtype=torch.float64).eval()
    x = random_input((2, 6, 5, 4)).detach()
    with pytest.warns(UserWarning, match="exported"):
        program = torch.export.export(block, (x,), strict=False)
    assert not calls_fastdense(program.graph)
    assert_close("exported", program.module()(x), block(x))


@pytest.mark.parametrize(("block", "training", "momentum"), [
    (foreign.ListBlock, True, 0.1), (foreign.ListBlock, True, None), (foreign.AppendingBlock, True, 0.1),
    (foreign.AppendingBlock, False, 0.1),
])  # fmt: skip
def test_torch_compile_in_one_graph(block: Any, training: bool, momentum: float | None) -> None:
    theirs, ours, x = pair(block)
    for net in (theirs, ours):
        for norm in net.block2.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = momentum
    torch._dynamo.reset()
    compiled = torch.compile(ours.train(training), backend="aot_eager", fullgraph=True)
    assert_same(results(ours, x, forward=lambda x: compiled(x)), results(theirs.train(training), x))
