"""Converted networks traced, scripted, exported and compiled: exporters see plain PyTorch, compilers one graph."""

import contextlib
import io
from typing import Any

import pytest
import torch
from helpers import foreign
from helpers.blocks import assert_close, assert_same, calls_fastdense, random_input, results
from helpers.converted import kinds, pair, twins
from torch import Tensor, nn

import fastdense

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit's own


def saved_and_loaded(module: Any) -> Any:
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.parametrize("style", ["list", "appending", "stem"])
def test_traces_and_exports_hold_the_original_code_and_say_so_once(style: str) -> None:
    theirs, ours, x = pair(style)
    theirs, ours, x = theirs.eval(), ours.eval(), x.detach()
    with pytest.warns(UserWarning, match="exported") as caught:  # noqa: PT031
        program, traced = torch.export.export(ours, (x,), strict=False), torch.jit.trace(ours, (x,))
        with contextlib.suppress(torch.onnx.errors.OnnxExporterError):  # traces, and writes where onnx is installed
            torch.onnx.export(ours, (x,), io.BytesIO(), dynamo=False)
    assert len([w for w in caught if "fastdense" in str(w.message)]) == 1
    assert not calls_fastdense(program.graph) and not calls_fastdense(traced.inlined_graph)
    for model in (program.module(), saved_and_loaded(traced)):
        assert_close("exported", model(x * 2), theirs(x * 2))
    assert_close("itself", ours(x), theirs(x))


@pytest.mark.parametrize("style", ["list", "stem"])
def test_torch_fx(style: str) -> None:
    """As torchvision's ``create_feature_extractor`` does it."""
    theirs, ours, x = pair(style)
    with pytest.warns(UserWarning, match=r"torch\.fx"):
        traced = torch.fx.symbolic_trace(ours)
    assert {"block2.steps.2.grow", "features.pool0"} & {node.target for node in traced.graph.nodes}
    assert_same(results(ours, x), results(theirs, x))
    assert_close("traced", traced.eval()(x), theirs.eval()(x))


class Scriptable(nn.Sequential):
    """A block of one-convolution layers that TorchScript can compile."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = torch.cat([x, layer(x)], 1)
        return x


def test_torch_jit_script_gives_stem_and_block_back() -> None:
    layers = [nn.Sequential(nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n, 4, 3, padding=1, bias=False)) for n in (6, 10)]
    theirs, ours = twins(nn.Sequential(*foreign.stem(nn.Conv2d(3, 6, 3)), Scriptable(*layers)).double())
    found = kinds(ours)
    assert list(found.values()) == ["stem", "block"]
    x = random_input((2, 3, 13, 10)).detach()
    with pytest.warns(UserWarning, match=r"torch\.jit\.script.*convert it again"):
        scripted = torch.jit.script(ours)
    want = theirs(x)
    assert_close("scripted", saved_and_loaded(scripted)(x), want)
    assert_close("itself", ours(x), want)
    parameters = dict(scripted.named_parameters())
    assert all(parameters[name].data_ptr() == value.data_ptr() for name, value in ours.named_parameters())
    assert kinds(fastdense.convert(ours)) == found


@pytest.mark.parametrize("what", ["list", "appending", "stem", "stem, evaluation", "stem, hook"])
def test_torch_compile_in_one_graph(what: str) -> None:
    """The statistics of ``list`` average all batches."""
    theirs, ours, x = pair(what.split(",")[0])
    parts = []
    for net in (theirs, ours):
        if what in ("list", "appending"):
            part, shape = net.block2, (2, 5, 5, 4)
        else:  # the stem and a block
            part, shape = net.features, x.shape
            del part.transition1, part.denseblock2, part.norm5
        for norm in part.modules() if what == "list" else ():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = None
        if "hook" in what:
            part.relu0.register_forward_hook(lambda m, i, output: output + 0.5)
        parts.append(part.train("evaluation" not in what))
    torch._dynamo.reset()
    compiled = torch.compile(parts[1], backend="aot_eager", fullgraph=True)
    x = random_input(shape)
    assert_same(results(parts[1], x, forward=lambda x: compiled(x)), results(parts[0], x))
