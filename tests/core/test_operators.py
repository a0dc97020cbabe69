"""What autograd, torch.func, torch.library and torch.compile ask of block, stem, transition and head."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import blocks
from helpers.blocks import NAN, assert_close, assert_each_close, assert_same, block_pair, random_input, results
from helpers.pooled import BLOCKS, CASES, KINDS, PARTS, Case, Stage, pair, part, small
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import fastdense
from fastdense import functional
from fastdense.backends.torch_backend import TorchBackend

pytestmark = pytest.mark.quick

F32, F64 = torch.float32, torch.float64
POOL = torch.ops.fastdense.bn_relu_pool


def _captured(name: str, run: Callable[[], Any]) -> list[Any]:
    """The arguments with which ``run`` calls the operator ``name``, once."""
    operator = SimpleNamespace(**{name: getattr(torch.ops.fastdense, name)})
    with pytest.MonkeyPatch.context() as patch:
        calls = blocks.calls_of(patch, operator, name)
        patch.setattr(functional.torch.ops, "fastdense", operator, raising=False)
        run()
    (arguments,) = calls
    return list(arguments)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x, dim=[0, *range(2, x.dim())], correction=0)
    return mean, var


@pytest.mark.parametrize(
    ("variant", "mode"),
    [
        *((variant, "activations") for variant in ("plain", "basic", "dropout", "frozen", "moments", "padded rows")),
        *((variant, "bottlenecks") for variant in ("plain", "dropout", "padded rows")),
    ],
)
def test_opcheck_of_the_block(variant: str, mode: str) -> None:
    dtype = F32 if variant == "padded rows" else F64
    arguments = (2, 4, None if variant == "basic" else 2, 3 if variant == "padded rows" else 4)
    options: dict[str, Any] = {"drop_rate": 0.3} if variant == "dropout" else {}
    _, fast = block_pair(*arguments, dtype=dtype, change=blocks.evaluate if variant == "frozen" else None, **options)
    x = random_input((2, 4, 3, 5), dtype=dtype)
    moments = None
    if variant == "moments":
        moments = (torch.randn(4).double().requires_grad_(), torch.rand(4).double().requires_grad_())
    call = _captured("dense_block", lambda: fastdense.dense_block(x, fast.values(), recompute=mode, moments=moments))
    torch.library.opcheck(torch.ops.fastdense.dense_block.default, call)


def _pool_call(kind: str, variant: str, case: Case | None = None) -> list[Any]:
    dtype = F32 if variant == "float32" else F64
    case = small(kind) if case is None else case
    _, fast = pair(case, dtype=dtype, change=lambda stage: stage.norm.train("frozen" not in variant))
    x = random_input(case.shape, layout="channels_last", dtype=dtype)
    arguments = _captured("bn_relu_pool", lambda: fast.with_moments(x, None, want=variant == "moments of the output"))
    if variant == "contiguous":
        arguments[0] = random_input(case.shape)
    if variant in ("moments", "frozen, with moments"):
        arguments[1:3] = (moment.detach().requires_grad_() for moment in _moments(x))
    if variant == "hints":
        arguments[1:3] = (moment.detach() for moment in _moments(x))
    return arguments


VARIANTS = (
    "plain", "frozen", "moments", "hints", "moments of the output", "contiguous", "frozen, with moments", "float32",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        *(("transition", variant) for variant in VARIANTS),
        *((kind, variant) for kind in ("stem", "head") for variant in VARIANTS[:5]),
        *((name, "plain") for name in ("stem 1D", "stem 3D", "transition 3D", "head 1D")),
    ],
)
def test_opcheck_of_the_pooling(name: str, variant: str) -> None:
    case = small(name) if name in KINDS else CASES[name]
    torch.library.opcheck(POOL.default, _pool_call(case.kind, variant, case))


@pytest.mark.parametrize("variant", ["plain", "basic", "dropout", "frozen"])
@pytest.mark.parametrize("mode", blocks.MODES)
def test_gradcheck_of_the_block(variant: str, mode: str) -> None:
    options: dict[str, Any] = {"drop_rate": 0.4} if variant == "dropout" else {}
    _, fast = block_pair(2, 3, None if variant == "basic" else 2, 2, **options)
    fast.train(variant != "frozen")
    for norm in blocks.norms(fast):
        norm.momentum = 0.0  # running statistics must not move between the evaluations

    def run(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(3)  # the same dropout mask in every evaluation
        return fastdense.dense_block(x, fast.values(), recompute=mode, return_moments=True)

    assert torch.autograd.gradcheck(run, (random_input((3, 3, 3, 2)), *fast.parameters()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["plain", "frozen", "moments"])
def test_gradcheck_of_the_pooling(variant: str, kind: str) -> None:
    """With moments as inputs of their own, the operator is a function of x, mean and var."""
    arguments = _pool_call(kind, variant, Case(kind, (2, 3, 5, 3), 3 if kind == "stem" else 2, 2, out=2))
    with torch.no_grad():
        arguments[3][arguments[3] == 0] = 0.4  # at 0 everything ties, and a maximum has no derivative
    places = [i for i, value in enumerate(arguments) if isinstance(value, Tensor)]

    def run(*tensors: Tensor) -> Tensor:
        replaced = dict(zip(places, tensors, strict=True))
        return POOL(*(replaced.get(i, value) for i, value in enumerate(arguments)))[0]

    assert len(places) == 3 + 2 * (variant == "moments") + (kind == "transition")
    assert torch.autograd.gradcheck(run, [arguments[i].detach().requires_grad_() for i in places])


@pytest.mark.parametrize("case", ["computed", "given", "alone"])
@pytest.mark.parametrize("name", BLOCKS)
def test_moments_of_a_block_are_differentiable_outputs_and_inputs(name: str, case: str) -> None:
    """Two consumers of moments, computed or handed in: gradients flow through all of them, and alone as well."""
    reference, fast, x = part(name)
    cotangents = [torch.randn(size, dtype=F64) for size in ((3, 14, 5, 7), (14,), (14,), (14,))]

    def run(block: nn.Module, impl: str, **options: Any) -> tuple[Tensor, ...]:
        shifted = x * 2 + 1
        if case == "given" and impl == "torch":
            options["moments"] = _moments(shifted)
        X, mean, var = fastdense.dense_block(shifted, block.values(), impl=impl, return_moments=True, **options)
        loss = (var.sqrt() * cotangents[2]).sum() + (var * mean * cotangents[3]).sum()
        if case != "alone":
            loss = loss + ((X - mean.view(1, -1, 1, 1)) * cotangents[0]).sum() + (mean * cotangents[1]).sum()
        return torch.autograd.grad(loss, [x, *block.parameters()])

    assert_each_close(run(fast, "torch", recompute=fast.recompute), run(reference, "reference"))


def test_moments_alone_may_require_gradients() -> None:
    _, fast, x = part("block")
    mean, var = (moment.detach().requires_grad_() for moment in _moments(x))
    found = []
    for needed in (True, False):
        fast.requires_grad_(needed)
        y = fastdense.dense_block(x.detach().requires_grad_(needed), fast.values(), moments=(mean, var))
        found.append(torch.autograd.grad(y.square().sum(), (mean, var)))
    assert_each_close(*found)


@pytest.mark.parametrize("how", ["differentiable", "hints"])
@pytest.mark.parametrize("change", ["training", "frozen", "x needs none"])
@pytest.mark.parametrize("kind", ["transition", "head"])
def test_given_moments_lead_to_the_same_gradients(kind: str, change: str, how: str, fresh_memory_is_nan: None) -> None:
    """The gradient goes through the moments, or past them: what reaches the parameters and the features is one."""
    reference, fast, _ = part(kind, change=lambda stage: stage.norm.train(change != "frozen"))
    scale = torch.linspace(0.5, 2, 5, dtype=F64).view(1, 5, 1, 1)

    def run(stage: Stage) -> blocks.Results:
        before = nn.Parameter(scale.clone())
        x = random_input(small(kind).shape).detach()

        def forward(x: Tensor) -> Tensor:
            features = x * before + x.square() * (0.3 + before.square())  # no mere scale, which BatchNorm takes away
            if stage is reference:
                return stage(features)
            moments = _moments(features)
            if how == "hints":
                moments = (moments[0].detach(), moments[1].detach())
            return stage.with_moments(features, moments)[0]

        found = results(stage, x.requires_grad_(change != "x needs none"), forward=forward)
        return found | {"before.grad": before.grad}

    got, want = run(fast), run(reference)
    assert want["before.grad"] is not None and want["before.grad"].norm() > 1e-3
    assert_same(got, want)


@pytest.mark.parametrize("kind", ["transition", "head"])
def test_features_without_a_gradient_and_moments_with_one(kind: str) -> None:
    _, fast, x = part(kind)
    x = x.detach()
    mean, var = (moment.requires_grad_() for moment in _moments(x))
    y = fast.with_moments(x, (mean, var))[0]
    cotangent = torch.randn(y.shape, dtype=F64)
    got = torch.autograd.grad(y, (mean, var), cotangent)
    norm, shape = fast.norm, (1, -1, 1, 1)
    h = (x - mean.view(shape)) * (var + norm.eps).rsqrt().view(shape) * norm.weight.view(shape) + norm.bias.view(shape)
    h = h.relu()
    want = torch.autograd.grad(h.mean((2, 3)) if kind == "head" else fast.conv(fast.pool(h)), (mean, var), cotangent)
    assert_each_close(got, want)


class _Cut(torch.autograd.Function):
    """Hands no gradient on: autograd then calls what comes before it without one."""

    forward = staticmethod(lambda ctx, x: x.clone())
    backward = staticmethod(lambda ctx, grad: None)


@pytest.mark.parametrize("name", PARTS)
def test_no_gradient_at_all_is_one_of_zeros(name: str) -> None:
    reference, fast, x = part(name)
    for module in (reference, fast):
        _Cut.apply(module(x)).sum().backward()
        for tensor in (x, *module.parameters()):
            assert tensor.grad is None or tensor.grad.abs().max() == 0


def _dual(module: nn.Module, x: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        y = module(torch.autograd.forward_ad.make_dual(x.detach(), x.detach()))
        return torch.autograd.forward_ad.unpack_dual(y).tangent


def _twice(module: nn.Module, x: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), x)[0]


ATTEMPTS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "func.grad": lambda module, x: torch.func.grad(lambda x: module(x).square().sum())(x.detach()),
    "func.vmap": lambda module, x: torch.func.vmap(module)(x.detach()[None]),
    "func.jvp": lambda module, x: torch.func.jvp(module, (x.detach(),), (x.detach(),))[1],
    "dual numbers": _dual,
    "twice": _twice,
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("how", ATTEMPTS)
def test_what_is_differentiated_once_only_says_so_and_the_remedy_works(how: str, name: str) -> None:
    attempt = ATTEMPTS[how]
    reference, fast, x = part(name)
    state = nn.Module() if attempt is _twice else fast  # whose first backward pass is an ordinary one
    with blocks.unchanged(state), pytest.raises(RuntimeError, match="impl='reference'"):
        attempt(fast, x)
    fast.impl = "reference"
    fast.load_state_dict(reference.state_dict())
    assert_close("remedy", attempt(fast.eval(), x), attempt(reference.eval(), x))


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("change", blocks.NORMS)
def test_norms_of_every_kind_in_three_steps(change: str, name: str, fresh_memory_is_nan: None) -> None:
    """The last one under checkpointing, where running statistics move once."""
    reference, fast, _ = part(name, change=blocks.NORMS[change])
    for seed in (1, 2, 3):  # each sees the statistics that the one before it left
        x = random_input(small("head").shape, seed=seed).detach() * seed + seed
        forward = fast if seed < 3 else lambda x: checkpoint(fast, x, use_reentrant=False)
        with set_checkpoint_early_stop(False):  # the forward pass runs again as a whole
            got = results(fast, x.requires_grad_(), seed, forward=forward)
        assert_same(got, results(reference, x, seed))


@pytest.mark.parametrize("name", PARTS)
def test_retained_graphs_and_accumulated_gradients(name: str) -> None:
    found = []
    reference, fast, _ = part(name)
    for module in (reference, fast):
        x = random_input(small("head").shape)
        y = module(x)
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
        y.backward(cotangent, retain_graph=True)
        y.backward(cotangent.square())
        again = module(x * 2)  # the output is the user's, in place too, unless it is saved itself
        (again * cotangent if name in BLOCKS else again.mul_(cotangent)).sum().backward()
        found.append([x.grad, *(parameter.grad for parameter in module.parameters())])
    assert_each_close(*reversed(found))


@pytest.mark.parametrize("name", PARTS)
def test_cotangents_of_any_strides_are_read_and_left_alone(name: str) -> None:
    reference, fast, x = part(name)
    shape = reference(x).shape
    random = torch.randn(shape, dtype=F64)
    cotangents = [torch.ones((), dtype=F64).expand(shape), random[:1].expand(shape), random, random.mT.contiguous().mT]
    if len(shape) == 4:
        cotangents.append(random.contiguous(memory_format=torch.channels_last))
    for cotangent in cotangents:
        before = cotangent.clone()
        got, want = (torch.autograd.grad(m(x), [x, *m.parameters()], cotangent) for m in (fast, reference))
        assert_each_close(got, want, scale=1e3)
        assert torch.equal(cotangent, before), "autograd owns it"
    random[(0, -1, 1, 1)[: len(shape)]] = NAN  # reaches what it reaches in the reference
    got, want = (torch.autograd.grad(m(x), [x, *m.parameters()], random) for m in (fast, reference))
    assert any(gradient.isnan().any() for gradient in want)
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())


@pytest.mark.parametrize("dtype", [F32, torch.float16])
@pytest.mark.parametrize("name", PARTS)
def test_reruns_are_bit_equal(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, fresh_memory_is_nan: None
) -> None:
    monkeypatch.setattr("fastdense.backends.torch_backend.CHUNK_BYTES", 5000)
    _, fast, x = part(name, 24, dtype=dtype)
    state = copy.deepcopy(fast.state_dict())
    first = results(fast, x)
    results(fast, x.detach()[1:, ..., 1:] * 3)  # a step of another size between them
    fast.load_state_dict(state)
    second = results(fast, x)
    for key, value in first.items():
        assert value is not None and value.double().isfinite().all(), key
        assert torch.equal(value, second[key]), key


FAILURES = [
    *(("block", "bn_relu_conv", at) for at in (0, 3, 5)), ("stem", "moments", 0), ("stem", "bn_relu_pool", 0),
    ("transition", "moments", 0), ("transition", "prepare", 0), ("transition", "bn_relu_conv", 0),
    ("head", "moments", 0), ("head", "bn_relu_pool", 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "primitive", "at"), FAILURES)
def test_a_failed_call_changes_nothing(name: str, primitive: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"drop_rate": 0.2} if name == "block" else {}
    (_, fast, x), (_, other, _) = part(name, **options), part(name, **options)
    torch.manual_seed(11)
    rng = torch.get_rng_state()
    original, calls = getattr(TorchBackend, primitive), iter(range(100))

    def fail(self: TorchBackend, *arguments: Any, **named: Any) -> Any:
        done = original(self, *arguments, **named)
        if next(calls) == at:  # all of its work is done, and lost
            raise MemoryError
        return done

    with monkeypatch.context() as patch:
        patch.setattr(TorchBackend, primitive, fail)
        with blocks.unchanged(fast), pytest.raises(MemoryError):
            fast(x)
    assert torch.equal(torch.get_rng_state(), rng)
    got = results(fast, x)
    torch.manual_seed(11)
    assert_same(got, results(other, x))


def test_all_gradients_are_cast_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where parameters are in 16 bit: one cast for each would be more launches than everything else."""
    calls = blocks.calls_of(monkeypatch, torch, "_foreach_copy_")
    _, fast, x = part("block", dtype=torch.bfloat16)
    fast(x).square().sum().backward()
    assert [len(into) for into, *_ in calls] == [len([*fast.parameters()])]
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in fast.parameters())


def test_two_calls_share_no_memory() -> None:
    """Neither a second forward before the first backward nor work in place on the output changes anything."""
    _, fast = block_pair(2, 6, 4, 4, change=lambda block: block.eval())
    x, other = random_input((2, 6, 4, 4)), random_input((2, 6, 4, 4)).detach() * 3
    (want,) = torch.autograd.grad(fast(x).square().sum(), x)
    first = fast(x)
    with torch.no_grad():
        assert torch.equal(fast(other).relu_(), torch.relu(fast(other)))
    (got,) = torch.autograd.grad(first.square().sum(), x)
    assert torch.equal(got, want)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        fast.train()(x).relu_().sum().backward()
