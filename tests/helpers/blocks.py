"""A reference block and its fastdense twin, what may be changed about both, and how far apart their results are."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import fastdense
from fastdense.reference import ConcatDenseBlock

TOLERANCE = 1e-9  # relative 2-norm, float64
MODES = ("activations", "bottlenecks")
LAYOUTS = ("contiguous", "channels_last", "slice")
NAN, INF = float("nan"), float("inf")

Results = dict[str, Tensor | None]


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


def norms(module: nn.Module) -> list[_BatchNorm]:
    return [child for child in module.modules() if isinstance(child, _BatchNorm)]


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Random affine parameters and running statistics, some of gamma negative or zero; weights stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    for child in norms(module):
        if child.weight is not None:
            with torch.no_grad():
                child.weight.copy_(torch.randn(child.num_features, generator=generator))
                child.weight[::5] = 0.0
                if child.bias is not None:
                    child.bias.copy_(torch.randn(child.num_features, generator=generator))
        if child.running_mean is not None:
            child.running_mean.copy_(torch.randn(child.num_features, generator=generator))
            child.running_var.copy_(torch.rand(child.num_features, generator=generator) + 0.5)


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
) -> tuple[nn.Module, nn.Module]:
    """The reference block and fastdense's, same parameters and statistics; ``change`` is applied to both."""
    torch.manual_seed(0)
    arguments = (num_layers, channels, bn_size, growth_rate)
    named: dict[str, Any] = {"spatial_dims": spatial_dims, "dtype": dtype}
    reference, fast = ConcatDenseBlock(*arguments, **named), fastdense.DenseBlock(*arguments, **named, **options)
    for block in (reference, fast):
        if change is not None:
            change(block)
    randomise(reference)
    fast.load_state_dict(reference.state_dict(), strict=True)
    return reference, fast


def results(
    block: nn.Module, x: Tensor, cotangent_seed: int = 1, *, forward: Callable[[Tensor], Tensor] | None = None
) -> Results:
    """Output, the gradients of ``x`` and of every parameter for a random cotangent, and all buffers."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.requires_grad)
    for parameter in block.parameters():
        parameter.grad = None
    output = (forward or block)(x)
    found: Results = {"output": output.detach().clone()}
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


def assert_same(got: Results, want: Results, tolerance: float = TOLERANCE) -> None:
    assert got.keys() == want.keys()
    scale = max(tensor.double().norm().item() for name, tensor in want.items() if tensor is not None)
    for name in want:
        assert_close(name, got[name], want[name], tolerance, scale)


def assert_each_close(got: Sequence[Tensor | None], want: Sequence[Tensor | None], scale: float = 0.0) -> None:
    for i, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        assert_close(f"tensor {i}", ours, theirs, scale=scale)


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


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Parameters and buffers are the same afterwards, bit for bit, unless the ``with`` itself exchanges them."""
    before = {key: value.clone() for key, value in module.state_dict().items()}
    yield
    for key, value in module.state_dict().items():
        old = before.get(key)
        if old is not None and (old.shape, old.dtype, old.device) == (value.shape, value.dtype, value.device):
            assert torch.equal(value, old), key


def calls_of(patch: pytest.MonkeyPatch, owner: Any, name: str) -> list[tuple[Any, ...]]:
    """The arguments of every call of ``owner.name`` from now on."""
    calls: list[tuple[Any, ...]] = []
    original = getattr(owner, name)

    def noted(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments)
        return original(*arguments, **named)

    patch.setattr(owner, name, noted)
    return calls


# What may be changed about a block or a stage, whatever its dimensions.


def setting(name: str, *values: Any) -> Callable[[nn.Module], None]:
    """``name`` of one norm after the other is one of ``values`` after the other."""

    def change(module: nn.Module) -> None:
        for i, norm in enumerate(norms(module)):
            setattr(norm, name, values[i % len(values)])

    return change


def learning(*parts: str) -> Callable[[nn.Module], None]:
    """Only parameters in whose name one of ``parts`` is."""

    def change(module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(any(part in name for part in parts))

    return change


evaluate = nn.Module.eval
freeze_some = setting("training", False, True, False)
other_eps = setting("eps", 0.3, 1e-5, 1e-3)


def freeze_first_of_each(module: nn.Module) -> None:
    """Of each layer of a block."""
    for name, norm in module.named_modules():
        norm.train(not name.endswith("norm1"))


def new_norms(*, training: bool = True, **options: Any) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        dtype = next(module.parameters()).dtype
        for parent in list(module.modules()):
            for name, norm in list(parent.named_children()):
                if isinstance(norm, _BatchNorm):
                    setattr(parent, name, type(norm)(norm.num_features, dtype=dtype, **options))
        module.train(training)

    return change


def kernel(convolution: str, *size: int) -> Callable[[nn.Module], None]:
    """``convolution`` of every layer with a kernel of ``size``, as far as there are dimensions."""

    def change(block: nn.Module) -> None:
        for layer in block.children():
            old = getattr(layer, convolution)
            sizes = size[: old.weight.dim() - 2]
            padding = tuple(n // 2 for n in sizes)
            options: dict[str, Any] = {"padding": padding, "bias": False, "dtype": old.weight.dtype}
            setattr(layer, convolution, type(old)(old.in_channels, old.out_channels, sizes, **options))

    return change


wider_kernel = kernel("conv2", 5, 3, 1)

NORMS: dict[str, Callable[[nn.Module], None]] = {
    "plain": lambda module: None,
    "evaluated": evaluate,
    "some frozen": freeze_some,
    "first of each layer frozen": freeze_first_of_each,
    "other eps": other_eps,
    "other momenta": setting("momentum", 0.7, 0.1, None),
    "cumulative": setting("momentum", None),
    "without affine": new_norms(affine=False),
    "evaluated without affine": new_norms(affine=False, training=False),
    "without bias": setting("bias", None),
    "untracked": new_norms(track_running_stats=False),
    "untracked, evaluated": new_norms(track_running_stats=False, training=False),
    "statistics neither read nor written in training": setting("track_running_stats", False),
}
