"""Helpers shared by the tests: a reference block and its fastdense twin, and how far apart their results are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdense
from fastdense.reference import ConcatDenseBlock

TOLERANCE = 1e-9  # relative 2-norm, float64

Pair = tuple[nn.Module, nn.Module]


def relative_error(got: Tensor, want: Tensor) -> float:
    """Relative 2-norm; the absolute one where ``want`` is zero."""
    assert got.shape == want.shape, f"got {tuple(got.shape)}, want {tuple(want.shape)}"
    if want.numel() == 0:
        return 0.0
    scale = want.double().norm().item()
    return (got.double() - want.double()).norm().item() / (scale if scale > 0 else 1.0)


def assert_close(
    name: str, got: Tensor | None, want: Tensor | None, tolerance: float = TOLERANCE, scale: float = 0.0
) -> None:
    """``||got - want|| <= tolerance*||want|| + 1e-12*scale``: where 0 is wanted, a rounding of ``scale`` will do."""
    assert (got is None) == (want is None), f"{name}: got {got is not None}, want {want is not None}"
    if got is None or want is None or want.numel() == 0:
        return
    assert got.shape == want.shape, f"{name}: got {tuple(got.shape)}, want {tuple(want.shape)}"
    difference = (got.double() - want.double()).flatten()
    allowed = tolerance * want.double().norm().item() + 1e-12 * scale
    if not difference.norm().item() <= allowed:
        worst = int(difference.abs().argmax())
        raise AssertionError(
            f"{name}: error {difference.norm().item():.3e} > {allowed:.3e}; worst at flat index {worst}: "
            f"got {got.flatten()[worst].item()!r}, want {want.flatten()[worst].item()!r}"
        )


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Random affine parameters and running statistics, some of gamma negative or zero; weights stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    for child in module.modules():
        if not isinstance(child, nn.modules.batchnorm._BatchNorm):
            continue
        if child.weight is not None:
            with torch.no_grad():
                child.weight.copy_(torch.randn(child.num_features, generator=generator))
                child.weight[::5] = 0.0
                if child.bias is not None:
                    child.bias.copy_(torch.randn(child.num_features, generator=generator))
        if child.running_mean is not None:
            child.running_mean.copy_(torch.randn(child.num_features, generator=generator))
            child.running_var.copy_(torch.rand(child.num_features, generator=generator) + 0.5)


def evaluate(block: nn.Module) -> None:
    block.eval()


def _norms(block: nn.Module) -> list[nn.Module]:
    return [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def freeze_some(block: nn.Module) -> None:
    for i, norm in enumerate(_norms(block)):
        norm.train(i % 3 == 0)


def other_eps(block: nn.Module) -> None:
    for i, norm in enumerate(_norms(block)):
        norm.eps = (1e-5, 1e-1, 1e-3)[i % 3]


def wider_kernel(block: nn.Module) -> None:
    """Convolutions of 5 x 3, or 5 in 1D, or 5 x 3 x 1 in 3D, in place of the layers' last."""
    for layer in block.children():
        old = layer.conv2
        size = (5, 3, 1)[: old.weight.dim() - 2]
        padding, dtype = tuple(s // 2 for s in size), old.weight.dtype
        layer.conv2 = type(old)(old.in_channels, old.out_channels, size, padding=padding, bias=False, dtype=dtype)


def block_pair(
    num_layers: int,
    channels: int,
    bn_size: int | None,
    growth_rate: int,
    *,
    dtype: torch.dtype = torch.float64,
    spatial_dims: int = 2,
    change: Callable[[nn.Module], Any] | None = None,
    **options: Any,
) -> Pair:
    """The textbook block and fastdense's, same parameters and statistics; ``change`` is applied to both."""
    torch.manual_seed(0)
    arguments = (num_layers, channels, bn_size, growth_rate)
    reference = ConcatDenseBlock(*arguments, spatial_dims=spatial_dims, dtype=dtype)
    fast = fastdense.DenseBlock(*arguments, spatial_dims=spatial_dims, dtype=dtype, **options)
    for block in (reference, fast):
        if change is not None:
            change(block)
    randomise(reference)
    fast.load_state_dict(reference.state_dict(), strict=True)
    return reference, fast


def results(
    block: nn.Module, x: Tensor, cotangent_seed: int = 1, *, forward: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor | None]:
    """Output, the gradients of ``x`` and of every parameter for a random cotangent, and all buffers."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.requires_grad)
    for parameter in block.parameters():
        parameter.grad = None
    output = (forward or block)(x)
    found: dict[str, Tensor | None] = {"output": output.detach().clone()}
    if output.requires_grad:
        generator = torch.Generator().manual_seed(cotangent_seed)
        cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
        output.backward(cotangent)
    found["x.grad"] = x.grad
    found |= {f"{name}.grad": parameter.grad for name, parameter in block.named_parameters()}
    return found | {name: buffer.clone() for name, buffer in block.named_buffers()}


def called(graph: Any) -> set[str]:
    """What a traced, scripted or exported graph calls; printed, it names files, too, whose paths may hold any word."""
    if isinstance(graph, torch.fx.Graph):
        return {str(node.target) for node in graph.nodes}
    inner = (block for node in graph.nodes() for block in node.blocks())
    return {node.kind() for node in graph.nodes()}.union(*map(called, inner))


def calls_fastdense(graph: Any) -> bool:
    """Whether one of this package's operators is in it, or a Python function, as which an autograd.Function shows."""
    return any("fastdense" in name or name == "prim::PythonOp" for name in called(graph))


def assert_same(got: dict[str, Tensor | None], want: dict[str, Tensor | None], tolerance: float = TOLERANCE) -> None:
    assert got.keys() == want.keys()
    scale = max(tensor.double().norm().item() for name, tensor in want.items() if tensor is not None)
    for name in want:
        assert_close(name, got[name], want[name], tolerance, scale)


def random_input(
    shape: Sequence[int], *, layout: str = "contiguous", dtype: torch.dtype = torch.float64, seed: int = 7
) -> Tensor:
    """Random features ``shape`` in one of the layouts that a user may hand in."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype)
    if layout == "channels_last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "slice":  # channels 2.. of a wider channels-last tensor, every second pixel of the last axis
        wide = torch.zeros(shape[0], *shape[2:-1], 2 * shape[-1], shape[1] + 5, dtype=dtype)
        x = wide[..., ::2, 2 : 2 + shape[1]].movedim(-1, 1).copy_(x)
    return x.requires_grad_()


def says_once(ours: nn.Module, x: Tensor, run: Callable[[], Any], match: str = "reference path") -> Any:
    with pytest.warns(UserWarning, match=match) as caught:
        found = run()
    assert len([w for w in caught if "fastdense" in str(w.message)]) == 1, [str(w.message) for w in caught]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(x)
    return found
