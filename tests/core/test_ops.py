"""The operators as PyTorch sees them: schema, fakes, gradients, what cannot be differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.blocks import assert_same, block_pair, random_input, results
from torch import Tensor, nn

import fastdense
from fastdense import functional


def _captured(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> tuple[Any, ...]:
    """The arguments with which ``run`` calls the forward operator."""
    calls: list[tuple[Any, ...]] = []
    operator = torch.ops.fastdense.dense_block

    class Recorder:
        def dense_block(self, *arguments: Any) -> Any:
            calls.append(arguments)
            return operator(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(functional.torch.ops, "fastdense", Recorder(), raising=False)
        run()
    return calls[0]


def _evaluate(block: nn.Module) -> None:
    block.eval()


@pytest.mark.parametrize("mode", ["activations", "bottlenecks"])
@pytest.mark.parametrize("kind", ["plain", "basic", "dropout", "frozen", "moments", "padded rows", "float32"])
def test_opcheck(kind: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.float32 if kind in ("float32", "padded rows") else torch.float64
    _, fast = block_pair(
        2,
        4,
        None if kind == "basic" else 2,
        3 if kind == "padded rows" else 4,
        dtype=dtype,
        recompute=mode,
        drop_rate=0.3 if kind == "dropout" else 0.0,
        change=_evaluate if kind == "frozen" else None,
    )
    x = random_input((2, 4, 3, 5), dtype=dtype)
    moments = None
    if kind == "moments":
        moments = (torch.randn(4).double().requires_grad_(), torch.rand(4).double().requires_grad_())
    arguments = _captured(monkeypatch, lambda: fastdense.dense_block(x, fast.values(), recompute=mode, moments=moments))
    torch.library.opcheck(torch.ops.fastdense.dense_block.default, arguments)


@pytest.mark.parametrize("mode", ["activations", "bottlenecks"])
@pytest.mark.parametrize("kind", ["plain", "basic", "dropout", "frozen"])
def test_gradcheck(kind: str, mode: str) -> None:
    _, fast = block_pair(
        2,
        3,
        None if kind == "basic" else 2,
        2,
        recompute=mode,
        drop_rate=0.4 if kind == "dropout" else 0.0,
        change=_evaluate if kind == "frozen" else None,
    )
    for norm in fast.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.0  # running statistics must not move between the evaluations

    parameters = list(fast.parameters())

    def run(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(3)  # the same dropout mask in every evaluation
        return fastdense.dense_block(x, fast.values(), recompute=mode, return_moments=True)

    assert torch.autograd.gradcheck(run, (random_input((3, 3, 3, 2)), *parameters))


def _functional_gradient(block: nn.Module, x: Tensor) -> None:
    torch.func.grad(lambda x: block(x).square().sum())(x.detach())


def _vmap(block: nn.Module, x: Tensor) -> None:
    torch.func.vmap(block)(x.detach()[None])


def _jvp(block: nn.Module, x: Tensor) -> None:
    torch.func.jvp(block, (x.detach(),), (x.detach(),))


def _dual(block: nn.Module, x: Tensor) -> None:
    with torch.autograd.forward_ad.dual_level():
        block(torch.autograd.forward_ad.make_dual(x.detach(), x.detach()))


def _twice(block: nn.Module, x: Tensor) -> None:
    (gradient,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    gradient.sum().backward()


@pytest.mark.parametrize("attempt", [_functional_gradient, _vmap, _jvp, _dual, _twice])
def test_what_is_not_differentiable_says_so(attempt: Callable[[nn.Module, Tensor], None]) -> None:
    _, fast = block_pair(2, 4, 2, 3)
    with pytest.raises(RuntimeError, match="impl='reference'"):
        attempt(fast, random_input((2, 4, 3, 3)))


@pytest.mark.parametrize("attempt", [_functional_gradient, _twice])
def test_the_remedy_works(attempt: Callable[[nn.Module, Tensor], None]) -> None:
    _, fast = block_pair(2, 4, 2, 3, impl="reference", change=_evaluate)
    attempt(fast, random_input((2, 4, 3, 3)))


def test_compiles_without_graph_break_and_equals_eager() -> None:
    reference, fast = block_pair(3, 6, 4, 4)
    x = random_input((2, 6, 5, 5))
    want = results(reference, x)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert_same(results(fast, x, forward=compiled), want)


def test_nothing_runs_below_the_first_layer_that_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fast = block_pair(5, 6, 4, 4)
    for name, parameter in fast.named_parameters():
        parameter.requires_grad_(name.startswith("denselayer4"))
    visited: list[tuple[int, int]] = []
    original = fastdense.backends.torch_backend.TorchBackend.bn_relu_conv_backward

    def spy(self: Any, grad: Any, output: Any, conv: Any, *rest: Any, **flags: Any) -> Any:
        visited.append(tuple(conv.weight.shape[:2]))
        return original(self, grad, output, conv, *rest, **flags)

    monkeypatch.setattr(fastdense.backends.torch_backend.TorchBackend, "bn_relu_conv_backward", spy)
    fast(random_input((2, 6, 3, 3)).detach()).square().sum().backward()
    assert visited == [(4, 16), (16, 22), (4, 16), (16, 18)]  # layer 5: 3x3, 1x1; layer 4: 3x3, 1x1


def test_all_gradients_are_cast_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where parameters are in 16 bit: one cast for each would be more launches than everything else."""
    casts: list[int] = []
    original = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda into, *rest: casts.append(len(into)) or original(into, *rest))
    _, fast = block_pair(3, 6, 4, 4, dtype=torch.bfloat16)
    fast(random_input((2, 6, 5, 4), dtype=torch.bfloat16)).square().sum().backward()
    assert casts == [len([*fast.parameters()])]
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in fast.parameters())
