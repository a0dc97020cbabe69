"""The operator behind stem, transition and head: schema, gradients, moments from outside, memory, failures."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.blocks import assert_close, assert_same, random_input, results
from helpers.pooled import CASES, KINDS, Case, Stage, pair, small
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastdense
from fastdense import functional
from fastdense.backends.torch_backend import TorchBackend

F32, F64 = torch.float32, torch.float64
OP = torch.ops.fastdense.bn_relu_pool


def _captured(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> list[Any]:
    """The arguments with which ``run`` calls the operator."""
    calls: list[tuple[Any, ...]] = []

    class Recorder:
        def bn_relu_pool(self, *arguments: Any) -> Any:
            calls.append(arguments)
            return OP(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(functional.torch.ops, "fastdense", Recorder(), raising=False)
        run()
    (arguments,) = calls
    return list(arguments)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x, dim=[0, *range(2, x.dim())], correction=0)
    return mean, var


VARIANTS = (
    "plain",
    "frozen",
    "moments",
    "hints",
    "moments of the output",
    "contiguous",
    "frozen, with moments",
    "float32",
)


def _arguments(kind: str, variant: str, monkeypatch: pytest.MonkeyPatch, case: Case | None = None) -> list[Any]:
    dtype = F32 if variant == "float32" else F64
    case = small(kind) if case is None else case
    _, fast = pair(case, dtype=dtype, change=lambda stage: stage.norm.train("frozen" not in variant))
    x = random_input(case.shape, layout="channels_last", dtype=dtype)
    arguments = _captured(monkeypatch, lambda: fast.with_moments(x, None, want=variant == "moments of the output"))
    if variant == "contiguous":
        arguments[0] = random_input(case.shape)
    if "moments" in variant and "output" not in variant:
        arguments[1:3] = (moment.detach().requires_grad_() for moment in _moments(x))
    if variant == "hints":
        arguments[1:3] = (moment.detach() for moment in _moments(x))
    return arguments


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.library.opcheck(OP.default, _arguments(kind, variant, monkeypatch))


@pytest.mark.parametrize("name", ["stem 1D", "stem 3D", "transition 1D", "transition 3D", "head 1D", "head 3D"])
def test_opcheck_in_one_and_three_dimensions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.library.opcheck(OP.default, _arguments(CASES[name].kind, "plain", monkeypatch, CASES[name]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["plain", "frozen", "moments"])
def test_gradcheck(variant: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With moments as inputs of their own, the operator is a function of x, mean and var."""
    arguments = _arguments(kind, variant, monkeypatch, Case(kind, (2, 3, 5, 3), 3 if kind == "stem" else 2, 2, out=2))
    with torch.no_grad():
        arguments[3][arguments[3] == 0] = 0.4  # at 0 everything ties, and a maximum has no derivative
    places = [i for i, value in enumerate(arguments) if isinstance(value, Tensor)]

    def run(*tensors: Tensor) -> Tensor:
        replaced = dict(zip(places, tensors, strict=True))
        return OP(*(replaced.get(i, value) for i, value in enumerate(arguments)))[0]

    assert len(places) == 3 + 2 * (variant == "moments") + (kind == "transition")
    assert torch.autograd.gradcheck(run, [arguments[i].detach().requires_grad_() for i in places])


@pytest.mark.parametrize("how", ["differentiable", "hints"])
@pytest.mark.parametrize("change", ["training", "frozen", "x needs none"])
@pytest.mark.parametrize("kind", ["transition", "head"])
def test_moments_of_the_input_give_the_same(kind: str, change: str, how: str, fresh_memory_is_nan: None) -> None:
    """The gradient goes through the moments, or past them: what reaches the parameters and the features is one."""
    textbook, fast = pair(small(kind), change=lambda stage: stage.norm.train(change != "frozen"))
    scale = torch.linspace(0.5, 2, 5, dtype=F64).view(1, 5, 1, 1)

    def run(stage: Stage) -> dict[str, Tensor | None]:
        before = nn.Parameter(scale.clone())
        x = random_input(small(kind).shape).detach()

        def forward(x: Tensor) -> Tensor:
            features = x * before + x.square() * (0.3 + before.square())  # no mere scale, which BatchNorm takes away
            if stage is textbook:
                return stage(features)
            moments = _moments(features)
            if how == "hints":
                moments = (moments[0].detach(), moments[1].detach())
            return stage.with_moments(features, moments)[0]

        found = results(stage, x.requires_grad_(change != "x needs none"), forward=forward)
        return found | {"before.grad": before.grad}

    got, want = run(fast), run(textbook)
    assert want["before.grad"] is not None and want["before.grad"].norm() > 1e-3
    assert_same(got, want)


@pytest.mark.parametrize("kind", ["transition", "head"])
def test_only_the_moments_learn(kind: str) -> None:
    """Features without a gradient, moments with one: a function of theirs all the same."""
    _, fast = pair(small(kind))
    x = random_input(small(kind).shape).detach()
    mean, var = (moment.requires_grad_() for moment in _moments(x))
    y = fast.with_moments(x, (mean, var))[0]
    cotangent = torch.randn(y.shape, dtype=F64)
    got = torch.autograd.grad(y, (mean, var), cotangent)
    norm, shape = fast.norm, (1, -1, 1, 1)
    h = (x - mean.view(shape)) * (var + norm.eps).rsqrt().view(shape) * norm.weight.view(shape) + norm.bias.view(shape)
    h = h.relu()
    want = torch.autograd.grad(h.mean((2, 3)) if kind == "head" else fast.conv(fast.pool(h)), (mean, var), cotangent)
    for name, ours, theirs in zip(("mean", "var"), got, want, strict=True):
        assert_close(name, ours, theirs)


class _Cut(torch.autograd.Function):
    """Hands no gradient on: autograd then calls what comes before it without one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> None:
        return None


def test_no_gradient_at_all_is_one_of_zeros() -> None:
    for kind in KINDS:
        for stage in pair(small(kind)):
            x = random_input(small(kind).shape)
            _Cut.apply(stage(x)).sum().backward()
            for tensor in (x, *stage.parameters()):
                assert tensor.grad is None or tensor.grad.abs().max() == 0


def _functional_gradient(stage: Stage, x: Tensor) -> None:
    torch.func.grad(lambda x: stage(x).square().sum())(x.detach())


def _vmap(stage: Stage, x: Tensor) -> None:
    torch.func.vmap(stage)(x.detach()[None])


def _jvp(stage: Stage, x: Tensor) -> None:
    torch.func.jvp(stage, (x.detach(),), (x.detach(),))


def _dual(stage: Stage, x: Tensor) -> None:
    with torch.autograd.forward_ad.dual_level():
        stage(torch.autograd.forward_ad.make_dual(x.detach(), x.detach()))


def _twice(stage: Stage, x: Tensor) -> None:
    (gradient,) = torch.autograd.grad(stage(x).square().sum(), x, create_graph=True)
    gradient.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attempt", [_functional_gradient, _vmap, _jvp, _dual, _twice])
def test_what_is_not_differentiable_says_so(attempt: Callable[[Stage, Tensor], None], kind: str) -> None:
    _, fast = pair(small(kind))
    before = {name: value.clone() for name, value in fast.state_dict().items()}
    with pytest.raises(RuntimeError, match="impl='reference'"):
        attempt(fast, random_input(small(kind).shape))
    if attempt is not _twice:
        for name, value in fast.state_dict().items():
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attempt", [_functional_gradient, _twice])
def test_the_remedy_works(attempt: Callable[[Stage, Tensor], None], kind: str) -> None:
    _, fast = pair(small(kind), impl="reference", change=lambda stage: stage.eval())
    attempt(fast, random_input(small(kind).shape))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_input_is_kept_and_nothing_else(kind: str, training: bool, dtype: torch.dtype, layout: str) -> None:
    """And two vectors; a contiguous input goes through a channels-last copy, and then that is kept instead."""
    case = Case(kind, (4, 32, 16, 16), 3 if kind == "stem" else 2, 2, 1 if kind == "stem" else 0, out=16)
    _, fast = pair(case, dtype=dtype, change=lambda stage: stage.train(training))
    x = random_input(case.shape, dtype=dtype, layout=layout)
    owners = [fast, x] if layout == "channels_last" else [fast]
    with fastdense.memory.saved_bytes(*owners) as kept:
        y = fast(x)
    vectors = 0 if not training else 2 * 32 * 4
    assert kept.bytes == vectors + (0 if layout == "channels_last" else x.numel() * x.element_size())
    y.float().square().sum().backward()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_kept_without_gradients(kind: str, context: type) -> None:
    textbook, fast = pair(small(kind))
    x = random_input(small(kind).shape).detach()
    with context(), fastdense.memory.saved_bytes() as kept:
        y = fast(x)
        assert_close("output", y, textbook(x))
    assert kept.bytes == 0 and not y.requires_grad
    for name, buffer in fast.named_buffers():
        assert_close(name, buffer, textbook.get_buffer(name))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_tensor_hooks_see_everything(kind: str) -> None:
    _, fast = pair(small(kind))
    want = results(fast, random_input(small(kind).shape))
    with torch.autograd.graph.save_on_cpu():
        got = results(fast, random_input(small(kind).shape))
    for name in ("output", "x.grad", "norm.weight.grad", "norm.bias.grad"):
        assert torch.equal(got[name], want[name])


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_does_not_keep_itself_alive(kind: str) -> None:
    _, fast = pair(small(kind))
    fast(random_input(small(kind).shape))  # PyTorch's first call of an operator leaves cycles of its own
    gc.disable()
    try:
        x = random_input(small(kind).shape)
        output = fast(x)
        alive = weakref.ref(output), weakref.ref(x)
        del output, x
        assert [reference() for reference in alive] == [None, None]
    finally:
        gc.enable()


class Failure(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("kind", "primitive"),
    [
        ("stem", "moments"), ("stem", "bn_relu_pool"), ("transition", "moments"), ("transition", "prepare"),
        ("transition", "bn_relu_conv"), ("head", "moments"), ("head", "bn_relu_pool"),
    ],
)  # fmt: skip
def test_a_failed_call_changes_nothing(kind: str, primitive: str, monkeypatch: pytest.MonkeyPatch) -> None:
    textbook, fast = pair(small(kind))
    before = {name: value.clone() for name, value in fast.state_dict().items()}
    original = getattr(TorchBackend, primitive)

    def fail(self: TorchBackend, *arguments: Any, **named: Any) -> Any:
        original(self, *arguments, **named)  # all of its work is done, and lost
        raise Failure("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(TorchBackend, primitive, fail)
        with pytest.raises(Failure):
            fast(random_input(small(kind).shape))
    for name, value in fast.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert_same(results(fast, random_input(small(kind).shape)), results(textbook, random_input(small(kind).shape)))


@pytest.mark.parametrize("dtype", [F32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_reruns_are_bit_equal(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, fresh_memory_is_nan: None
) -> None:
    monkeypatch.setattr("fastdense.backends.torch_backend.CHUNK_BYTES", 5000)
    case = small(kind, 24)
    (_, fast), (_, again) = pair(case, dtype=dtype), pair(case, dtype=dtype)
    first, second = (results(stage, random_input(case.shape, dtype=dtype)) for stage in (fast, again))
    for name, value in first.items():
        assert value is not None and value.double().isfinite().all(), name
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_running_statistics_move_once_under_checkpointing(kind: str) -> None:
    textbook, fast = pair(small(kind))
    x = random_input(small(kind).shape)
    got = results(fast, x, forward=lambda x: checkpoint(fast, x, use_reentrant=False))
    assert_same(got, results(textbook, x))


@pytest.mark.parametrize("kind", KINDS)
def test_retained_graphs_accumulation_and_in_place(kind: str) -> None:
    found = []
    for stage in pair(small(kind)):
        x = random_input(small(kind).shape)
        y = stage(x)
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
        y.backward(cotangent, retain_graph=True)
        y.backward(cotangent.square())
        stage(x * 2).mul_(cotangent).sum().backward()  # the output is the user's, in place too
        found.append([x.grad, *(parameter.grad for parameter in stage.parameters())])
    for i, (want, got) in enumerate(zip(*found, strict=True)):
        assert_close(f"gradient {i}", got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_graph_break_and_equals_eager(kind: str) -> None:
    textbook, fast = pair(small(kind))
    x = random_input(small(kind).shape)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert_same(results(fast, x, forward=lambda x: compiled(x)), results(textbook, x))
