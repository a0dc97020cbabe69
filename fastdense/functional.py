"""The door to the operators: argument checks, the choice of implementation, running statistics, dropout's seed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import memory, reference
from .backends import select, self_test
from .backends.sync_batchnorm import group_of
from .core import checks
from .core.features import accumulation_dtype
from .ops.dense_block import NOT_TWICE, autocasts
from .ops.running_stats import update_running_statistics
from .ops.support import why_reference

__all__ = ["dense_block"]

Moments = tuple[Tensor, Tensor]
_F = TypeVar("_F", bound=Callable[..., Any])


def dense_block(
    x: Tensor,
    layers: Iterable[nn.Module],
    *,
    recompute: str = "activations",
    impl: str = "auto",
    moments: Moments | None = None,
    return_moments: bool = False,
) -> Any:
    """All layers of a DenseBlock on one shared buffer.

    Args:
        x: features ``[N, C0, *spatial]``, one to three spatial dimensions, float16, bfloat16, float32 or float64, any
            strides (channels last saves a transposition). Under autocast it is cast to autocast's dtype.
        layers: modules with children ``norm1, conv1, norm2, conv2`` (or ``norm1, conv1`` alone for the basic layer) and
            the attributes ``drop_rate`` and ``training``, such as :class:`fastdense.nn.DenseLayer` or torchvision's.
        recompute: what backward computes again: ``"activations"`` keeps the features and the bottlenecks;
            ``"bottlenecks"`` keeps the features alone; ``"auto"`` takes the first while the bottlenecks fit into a
            quarter of the device's free memory (under ``torch.compile`` and in CUDA graphs the second), and says so.
        impl: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.
        moments: mean and biased variance ``[C0]`` of ``x`` over batch and space, if they are known already, in
            float32 (float64 for float64 features). Where they require gradients, what the block does with them flows
            back through them; else it is part of the gradient of ``x``, whose moments they are.
        return_moments: return ``(features, mean, var)``, the moments of all output channels, all differentiable.

    Returns:
        ``[N, C0 + sum(k), *spatial]``, channels last: ``x`` followed by what each layer adds.

    Raises:
        ValueError: an argument's shape, dtype, device or value is wrong; the message names it and what is allowed.
        RuntimeError: ``impl`` asks for what cannot run here, or a ``torch.func`` transform is active.

    Equivalent to::

        features = [x]
        for layer in layers:
            h = torch.cat(features, 1)
            h = layer.conv1(F.relu(layer.norm1(h)))
            h = layer.conv2(F.relu(layer.norm2(h)))
            features.append(F.dropout(h, layer.drop_rate, layer.training))
        return torch.cat(features, 1)

    Source: arXiv 1608.06993, equation 2 and section 3.
    """
    strict = moments is not None or return_moments
    output, known = run_block(x, list(layers), recompute, impl, moments, return_moments, strict=strict)
    if not return_moments:
        return output
    return output, *(known or _moments(output))


def run_block(
    x: Tensor,
    layers: Sequence[Any],
    recompute: str,
    impl: str,
    moments: Moments | None = None,
    want_moments: bool = False,
    *,
    strict: bool = False,
    picked: Callable[[str], None] | None = None,
) -> tuple[Tensor, Moments | None]:
    """The block's output, and its moments if they are wanted and known; ``moments`` are those of ``x``.

    Where moments cannot be handed in or out (SyncBatchNorm) they are computed where they are needed, or if ``strict``
    the reference path runs. ``picked`` is told what ``recompute="auto"`` came to.
    """
    checks.choice("recompute", recompute, checks.RECOMPUTE)
    impl = checks.impl_name(impl)
    check_input(x, layers)
    if impl != "reference" and (reason := why_reference(layers, moments=strict)):
        say_once(refusal(impl, reason))
        impl = "reference"
    if impl == "reference":
        return reference.dense_block(x, layers), None
    return fused_block(x, layers, recompute, impl, moments, want_moments, picked)


def _moments(features: Tensor) -> Moments:
    axes = [0, *range(2, features.dim())]
    var, mean = torch.var_mean(features.to(accumulation_dtype(features.dtype)), dim=axes, correction=0)
    return mean, var


def refusal(impl: str, reason: str) -> str:
    """The warning with which a block goes to the reference path; raises where ``impl`` leaves no choice."""
    if impl != "auto":
        raise RuntimeError(f"impl={impl!r} cannot run this block: {reason}; use impl='auto' or impl='reference'")
    return f"fastdense runs the reference path (slower, more memory): {reason}"


def fused_block(
    x: Tensor,
    layers: Sequence[Any],
    recompute: str,
    impl: str,
    moments: Moments | None = None,
    want_moments: bool = False,
    picked: Callable[[str], None] | None = None,
) -> tuple[Tensor, Moments | None]:
    """``run_block`` for layers that are known to run fused, with ``x`` checked already."""
    refuse_transforms(x)
    if moments is not None and autocast(x) is not x:
        moments = None  # they were those of other values
    x = autocast(x)
    _check_layers(x, layers)
    check_moments(x, moments)
    if recompute == "auto":
        recompute = _pick_alone(x, layers, moments, picked)
    return _fused(x, layers, recompute, backend_name(impl, x), moments, want_moments)


def _while_tracing(function: _F) -> _F:
    """torch.compile calls ``function`` while it traces, and takes its result for a constant.

    That is ``torch.compiler.assume_constant_result`` without an import that takes seconds.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


def backend_name(impl: str, x: Tensor) -> str:
    """The backend's name; ``"auto"`` takes the kernels where they have shown that they are right."""
    return _backend_name(impl, x.device, x.dtype)


@_while_tracing
def _backend_name(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    name = select.resolve(impl, device, dtype)
    if impl != "auto" or name != "triton" or is_in_torch_dispatch_mode() or _is_capturing(device):
        return name  # under a mode (fake tensors, a counter) the trial would try something else
    if (reason := self_test.failure(name, device, dtype)) is not None:
        say_once(f"fastdense runs in plain PyTorch (slower): {reason}; please report it")
        return "torch"
    return name


def may_ask(device: torch.device) -> bool:
    """Whether the device may be asked something: not while a compiler traces or a CUDA graph is captured."""
    return not (torch.compiler.is_compiling() or _is_capturing(device))


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _pick_alone(x: Tensor, layers: Sequence[Any], moments: Moments | None, picked: Callable[[str], None] | None) -> str:
    """What ``recompute="auto"`` comes to for a block that does not know the others; ``"bottlenecks"`` unasked."""
    convs = [pair for layer in layers for pair in _convolutions(layer)]
    per_layer = len(convs) // len(layers)
    params = [tensor for norm, conv in convs for tensor in (norm.weight, norm.bias, conv.weight)]
    first = _first_gradient(x, moments, params, 3 * per_layer)
    if first == len(layers) or not may_ask(x.device):
        return "bottlenecks"  # without a gradient nothing is kept in any case
    channels = sum(layer.conv1.out_channels for layer in layers[first:]) if per_layer == 2 else 0
    size = x.numel() // x.shape[1] * channels * x.element_size()
    free = memory.free_bytes(x.device)
    mode = memory.choose_recompute(size, free)
    say_choice(
        f"{mode!r} for a block by itself", f"its bottlenecks have {size / 1e6:.1f} MB, {free / 1e6:.1f} MB are free"
    )
    if picked is not None:
        picked(mode)
    return mode


def _fused(
    x: Tensor, layers: Sequence[Any], recompute: str, impl: str, moments: Moments | None, want_moments: bool
) -> tuple[Tensor, Moments | None]:
    convs = [pair for layer in layers for pair in _convolutions(layer)]
    norms = [norm for norm, _ in convs]
    params = [tensor for norm, conv in convs for tensor in (*affine(norm, x), conv.weight)]
    frozen = [not (norm.training or norm.running_mean is None) for norm in norms]
    per_layer = len(convs) // len(layers)
    group = group_of(norms) or ""
    if group:
        moments, want_moments = None, False  # they would be this process's alone
    tracked = want_moments or not all(frozen[::per_layer])
    m = x.shape[0] * x.shape[2:].numel()
    if m == 1 and not all(frozen) and not group:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
    drop_rates = [float(layer.drop_rate) if layer.training else 0.0 for layer in layers]

    rng = _rng_state(x.device) if any(drop_rates) else None
    try:
        X, mean, var, _, z_mean, z_var = torch.ops.fastdense.dense_block(
            x,
            *(moments or (None, None)),
            params,
            [
                stat
                for norm, fixed in zip(norms, frozen, strict=True)
                if fixed
                for stat in (norm.running_mean, norm.running_var)
            ],
            torch.randint(2**63 - 1, (1,), device=x.device) if any(drop_rates) else None,
            [norm.eps for norm in norms],
            frozen,
            drop_rates,
            bool(getattr(layers[0], "drop_channels", False)),
            per_layer == 2,
            tracked,
            _first_gradient(x, moments, params, 3 * per_layer),
            recompute == "bottlenecks",
            impl,
            group,
        )
    except BaseException:
        _restore_rng(x.device, rng)
        raise
    count = z_var[-1] if group else m
    update_running_statistics(_batch_moments(norms, per_layer, (mean, var), (z_mean, z_var)), count)
    return X, (mean, var) if want_moments else None


def _convolutions(layer: Any) -> list[tuple[Any, Any]]:
    pairs = [(layer.norm1, layer.conv1)]
    if "conv2" in layer._modules:
        pairs.append((layer.norm2, layer.conv2))
    return pairs


def affine(norm: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    def filled(value: float) -> Tensor:
        return torch.full((norm.num_features,), value, dtype=accumulation_dtype(x.dtype), device=x.device)

    return filled(1.0) if norm.weight is None else norm.weight, filled(0.0) if norm.bias is None else norm.bias


def _first_gradient(x: Tensor, moments: Moments | None, params: Sequence[Tensor | None], per_layer: int) -> int:
    """The first layer whose parameters or inputs need a gradient; the number of layers if none does."""
    if torch.is_grad_enabled():
        if x.requires_grad or any(moment.requires_grad for moment in moments or ()):
            return 0
        for i, param in enumerate(params):
            if param is not None and param.requires_grad:
                return i // per_layer
    return len(params) // per_layer


def _batch_moments(
    norms: Sequence[Any], per_layer: int, x: Moments, z: Moments
) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Each norm that takes batch statistics, with those of the channels that it reads."""
    bottleneck = 0
    for i, norm in enumerate(norms):
        reads_x = per_layer == 1 or i % 2 == 0
        start = 0 if reads_x else bottleneck
        bottleneck += 0 if reads_x else norm.num_features
        if norm.training:
            mean, var = x if reads_x else z
            yield norm, mean[start : start + norm.num_features], var[start : start + norm.num_features]


def check_input(x: Tensor, layers: Sequence[Any]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if not layers:
        raise ValueError("layers must hold at least one layer, got none")
    if not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor (float16, bfloat16, float32 or float64), got {x.dtype}")
    weight = getattr(getattr(layers[0], "conv1", None), "weight", None)
    if isinstance(weight, Tensor) and x.dim() != weight.dim():
        raise ValueError(
            f"x must have {weight.dim()} dimensions [N, C, {weight.dim() - 2} spatial], as the layers' convolutions, "
            f"got shape {tuple(x.shape)}"
        )
    expected = getattr(getattr(layers[0], "norm1", None), "num_features", None)
    if expected is not None and x.shape[1] != expected:
        raise ValueError(f"x must have {expected} channels, as the first layer reads, got shape {tuple(x.shape)}")
    if 0 in x.shape[2:]:
        raise ValueError(f"x must have at least one pixel, got shape {tuple(x.shape)}")


def _check_layers(x: Tensor, layers: Sequence[Any]) -> None:
    autocast = autocasts(x.device.type)
    channels = x.shape[1]
    stages = len(_convolutions(layers[0]))
    for i, layer in enumerate(layers):
        checks.probability(f"drop_rate of layer {i}", layer.drop_rate)
        reads = channels
        pairs = _convolutions(layer)
        if len(pairs) != stages:
            raise ValueError(f"layers must all have a bottleneck or all have none; layer {i} differs from layer 0")
        for number, (norm, conv) in enumerate(pairs, 1):
            if norm.num_features != reads or conv.in_channels != reads:
                raise ValueError(
                    f"layer {i} (counted from 0) must read {reads} channels in norm{number} and conv{number}, got "
                    f"{norm.num_features} and {conv.in_channels}"
                )
            reads = conv.out_channels
            weight = conv.weight
            for name, tensor in (("conv", weight), ("norm", norm.weight), ("norm", norm.running_mean)):
                if tensor is not None and tensor.device != x.device:
                    raise ValueError(
                        f"x is on device {str(x.device)!r}, but {name}{number} of layer {i} is on "
                        f"{str(tensor.device)!r}: move one of them with .to()"
                    )
            if weight.dtype != x.dtype and not autocast:
                raise ValueError(
                    f"x is {x.dtype}, but conv{number} of layer {i} is {weight.dtype}: convert one of them with .to(), "
                    "or use torch.autocast"
                )
        channels += reads


def check_moments(x: Tensor, moments: Any) -> None:
    if moments is None:
        return
    if not (isinstance(moments, tuple) and len(moments) == 2 and all(map(torch.is_tensor, moments))):
        raise ValueError(f"moments must be a pair of tensors (mean, var) or None, got {moments!r}")
    expected = accumulation_dtype(x.dtype)
    for name, moment in zip(("mean", "var"), moments, strict=True):
        if moment.shape != x.shape[1:2] or moment.dtype != expected or moment.device != x.device:
            raise ValueError(
                f"moments must be (mean, var), each [{x.shape[1]}] {expected} on {str(x.device)!r}; {name} is "
                f"{list(moment.shape)} {moment.dtype} on {str(moment.device)!r}"
            )


def autocast(x: Tensor) -> Tensor:
    device = x.device.type
    if autocasts(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def refuse_transforms(x: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    transforms = getattr(torch._C, "_are_functorch_transforms_active", None)
    dual = forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None
    if dual or (transforms is not None and transforms()):
        raise RuntimeError(NOT_TWICE)


@_while_tracing
def say_once(message: str) -> None:
    """Warn, the first time that there is this to say."""
    _warn(message)


@lru_cache(maxsize=256)
def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=5)


_choices: set[str] = set()


def say_choice(choice: str, figures: str) -> None:
    """Say what ``recompute="auto"`` picked, once for each choice: the figures vary from step to step."""
    if choice not in _choices:
        _choices.add(choice)
        warnings.warn(f"fastdense: recompute='auto' picked {choice}: {figures}", UserWarning, stacklevel=4)


def _rng_state(device: torch.device) -> Tensor | None:
    """The state to return to if the call fails; ``None`` where it cannot be read (while a CUDA graph is captured)."""
    if not may_ask(device):
        return None
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _restore_rng(device: torch.device, state: Tensor | None) -> None:
    if state is None:
        return
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
