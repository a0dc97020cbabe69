"""The functions behind the modules: a DenseBlock, and the stem's pooling, the transition and the head around it.

Each call is resolved once (its input, what runs it, whose moments are known) and handed to one operator of
``fastdense.ops``. Batch moments go from hand to hand: what writes a channel computes them, so no channel's are computed
twice. ``run_*`` take and return them, and fall back on the reference path; ``fused_*`` are for what is known to run
fused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import recompute as planner
from . import reference
from .backends.select import backend_for
from .backends.sync_batchnorm import group_of
from .core import checks
from .core.features import accumulation_dtype
from .core.primitives import Pool
from .ops import support, validate
from .ops.bn_relu_pool import channels_last
from .ops.common import autocast, update_running_statistics
from .ops.dense_block import Settings, call
from .reference import stages

__all__ = ["bn_relu_max_pool", "bn_relu_mean_pool", "dense_block", "transition"]

Moments = tuple[Tensor, Tensor]


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
        recompute: what backward computes again: ``"activations"`` saves the features and the bottlenecks;
            ``"bottlenecks"`` saves the features alone; ``"auto"`` takes the first while the bottlenecks fit into a
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


def transition(
    x: Tensor, norm: nn.Module, relu: nn.Module, conv: nn.Module, pool: nn.Module, *, impl: str = "auto"
) -> Tensor:
    """DenseNet's transition, BN-ReLU-Conv1x1-AvgPool, with the pooling done first where that changes nothing.

    An average without padding and a 1x1 convolution commute, so pooling first gives the same result for a quarter of
    the convolution's work (an eighth in 3D). Any other pooling or convolution keeps its place.

    Args:
        x: ``[N, C, *spatial]``, one to three spatial dimensions, any floating dtype. Under autocast it is cast to
            autocast's dtype. It alone is saved for backward.
        norm, relu, conv, pool: the transition's modules. Where one is no plain ``nn.BatchNorm``, ``nn.ReLU``,
            ``nn.Conv`` or ``nn.AvgPool`` (or carries a hook) each is called, once.
        impl: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        ``[N, C_out, *(spatial // 2)]``, channels last.

    Raises:
        ValueError: ``x`` does not fit the modules; the message names the value and what is allowed.
        RuntimeError: ``impl`` asks for what cannot run here.

    Equivalent to ``pool(conv(relu(norm(x))))``. Source: arXiv 1608.06993, section 3, "Pooling layers".
    """
    return run_transition(x, norm, relu, conv, pool, impl)[0]


def bn_relu_max_pool(x: Tensor, norm: nn.Module, relu: nn.Module, pool: nn.Module, *, impl: str = "auto") -> Tensor:
    """What follows the stem's convolution: BN-ReLU-MaxPool.

    Args:
        x: ``[N, C, *spatial]``. It alone is saved for backward: mask and arg-max are computed again.
        norm, relu, pool: plain ``nn.BatchNorm``, ``nn.ReLU`` and ``nn.MaxPool``; others are called one after another.
        impl: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        ``[N, C, *pooled]``, channels last. The first maximum of a window gets its gradient, as in ``F.max_pool2d``.

    Raises:
        ValueError, RuntimeError: as :func:`transition`.

    Equivalent to ``pool(relu(norm(x)))``. Source: arXiv 1608.06993, table 1, "Pooling".
    """
    return run_stem(x, norm, relu, pool, impl)[0]


def bn_relu_mean_pool(x: Tensor, norm: nn.Module, *, impl: str = "auto") -> Tensor:
    """The head up to the classifier: BN-ReLU and the mean over all pixels.

    Args:
        x: ``[N, C, *spatial]``. It alone is saved for backward.
        norm: a plain ``nn.BatchNorm``; another is called.
        impl: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        ``[N, C]``.

    Raises:
        ValueError, RuntimeError: as :func:`transition`.

    Equivalent to ``F.relu(norm(x)).flatten(2).mean(2)``. Source: arXiv 1608.06993, table 1, "Classification Layer".
    """
    return run_head(x, norm, impl)


def run_block(
    x: Tensor,
    layers: Sequence[Any],
    recompute: str,
    impl: str,
    moments: Moments | None = None,
    want_moments: bool = False,
    *,
    strict: bool = False,
    on_resolved: Callable[[str], None] | None = None,
) -> tuple[Tensor, Moments | None]:
    """The block's output, and its moments if they are wanted and known; ``moments`` are those of ``x``.

    Where moments cannot be handed in or out (SyncBatchNorm) they are computed where they are needed, or if ``strict``
    the reference path runs. ``on_resolved`` is told what ``recompute="auto"`` resolved to.
    """
    checks.choice("recompute", recompute, checks.RECOMPUTE)
    impl = checks.impl_name(impl)
    validate.block_input(x, layers)
    if impl == "reference" or support.falls_back(impl, support.unsupported_reason(layers, moments=strict)):
        return reference.dense_block(x, layers), None
    return fused_block(x, layers, recompute, impl, moments, want_moments, on_resolved)


def run_transition(
    x: Tensor,
    norm: Any,
    relu: Any,
    conv: Any,
    pool: Any,
    impl: str,
    moments: Moments | None = None,
    want_moments: bool = False,
) -> tuple[Tensor, Moments | None]:
    """:func:`transition`, and its output's moments if they are wanted and known; ``moments`` are those of ``x``."""
    reason = support.norm_unsupported_reason(norm, relu) or support.average_unsupported_reason(conv, pool)
    if support.runs_by_modules(impl, "transition", reason):
        x = norm(x) if relu is None else relu(norm(x))
        return (conv(pool(x)) if support.pools_first(conv, pool) else pool(conv(x))), None
    return fused_pool(x, norm, conv.weight, validate.windows("average", pool), impl, moments, want_moments)


def run_stem(
    x: Tensor, norm: Any, relu: Any, pool: Any, impl: str, want_moments: bool = False
) -> tuple[Tensor, Moments | None]:
    """:func:`bn_relu_max_pool`, and the moments of its output if they are wanted and known."""
    if support.runs_by_modules(
        impl, "stem", support.norm_unsupported_reason(norm, relu) or support.maximum_unsupported_reason(pool)
    ):
        return pool(norm(x) if relu is None else relu(norm(x))), None
    return fused_pool(x, norm, None, validate.windows("maximum", pool), impl, None, want_moments)


def run_head(x: Tensor, norm: Any, impl: str, moments: Moments | None = None) -> Tensor:
    """:func:`bn_relu_mean_pool`; ``moments`` are those of ``x``."""
    if support.runs_by_modules(impl, "head", support.norm_unsupported_reason(norm, None)):
        return F.relu(norm(x)).flatten(2).mean(2)
    return fused_pool(x, norm, None, Pool("mean"), impl, moments)[0]


class _Call(NamedTuple):
    """What a call resolved to."""

    x: Tensor  # as it is computed with
    moments: Moments | None  # of x, if they are known and asked for
    frozen: list[bool]  # which of the norms use their running statistics
    group: str  # the process group that batch statistics are shared with, or ""
    m: int  # values per channel
    backend: str

    @classmethod
    def of(cls, x: Tensor, moments: Moments | None, norms: Sequence[Any], impl: str, *, casts: bool) -> _Call:
        """``casts``: whether a convolution is part of it, whose input autocast casts."""
        validate.differentiable_once(x)
        if casts and (cast := autocast(x)) is not x:
            x, moments = cast, None  # they were those of other values
        validate.moments(x, moments)
        frozen = [not (norm.training or norm.running_mean is None) for norm in norms]
        group = group_of(norms) or ""
        if group:
            moments = None  # they would be this process's alone
        m = x.shape[0] * x.shape[2:].numel() if group or all(frozen) else validate.values_per_channel(x)
        return cls(x, moments, frozen, group, m, backend_for(checks.impl_name(impl), x.device, x.dtype))


def fused_block(
    x: Tensor,
    layers: Sequence[Any],
    recompute: str,
    impl: str,
    moments: Moments | None = None,
    want_moments: bool = False,
    on_resolved: Callable[[str], None] | None = None,
) -> tuple[Tensor, Moments | None]:
    """``run_block`` for layers that are known to run fused, with ``x`` checked already."""
    validate.block_layers(x, layers)
    convs = [pair for layer in layers for pair in stages(layer)]
    norms = [norm for norm, _ in convs]
    x, moments, frozen, group, m, backend = _Call.of(x, moments, norms, impl, casts=True)
    params = [tensor for norm, conv in convs for tensor in (*_affine(norm, x), conv.weight)]
    per_layer = len(convs) // len(layers)
    first = _first_gradient(x, moments, [(norm.weight, norm.bias, conv.weight) for norm, conv in convs], per_layer)
    if recompute == "auto":
        recompute = planner.for_block(x, layers[first:], on_resolved)
    want_moments = want_moments and not group
    fixed = [norm for norm, is_frozen in zip(norms, frozen, strict=True) if is_frozen]
    settings = Settings(
        eps=[norm.eps for norm in norms],
        frozen=frozen,
        drop_rates=[float(layer.drop_rate) if layer.training else 0.0 for layer in layers],
        drop_channels=bool(getattr(layers[0], "drop_channels", False)),
        bottleneck=per_layer == 2,
        tracked=want_moments or not all(frozen[::per_layer]),
        first=first,
        recompute=recompute == "bottlenecks",
        impl=backend,
        group=group,
    )
    statistics = [stat for norm in fixed for stat in (norm.running_mean, norm.running_var)]
    X, mean, var, _, z_mean, z_var = call(x, moments, params, statistics, settings)
    update_running_statistics(_batch_moments(norms, per_layer, (mean, var), (z_mean, z_var)), z_var[-1] if group else m)
    return X, (mean, var) if want_moments else None


def fused_pool(
    x: Tensor,
    norm: Any,
    weight: Tensor | None,
    pool: Pool,
    impl: str,
    moments: Moments | None = None,
    want_moments: bool = False,
) -> tuple[Tensor, Moments | None]:
    """What stands round the blocks, of modules known to run fused; a ReLU follows ``norm`` or is part of it."""
    validate.pool_input(x, norm, weight, pool)
    x, moments, (frozen,), group, m, backend = _Call.of(x, moments, [norm], impl, casts=weight is not None)
    moments = None if frozen else moments
    want_moments = want_moments and not group
    y, y_mean, y_var, mean, var = torch.ops.fastdense.bn_relu_pool(
        channels_last(x),
        *(moments or (None, None)),
        *_affine(norm, x),
        weight,
        [norm.running_mean, norm.running_var] if frozen else [],
        norm.eps,
        *pool,
        want_moments,
        backend,
        group,
    )
    if not frozen:
        batch = moments or (mean, var[: mean.shape[0]])
        update_running_statistics([(norm, *batch)], var[-1] if group else m)
    return y, (y_mean, y_var) if want_moments else None


def _affine(norm: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    def filled(value: float) -> Tensor:
        return torch.full((norm.num_features,), value, dtype=accumulation_dtype(x.dtype), device=x.device)

    return filled(1.0) if norm.weight is None else norm.weight, filled(0.0) if norm.bias is None else norm.bias


def _first_gradient(
    x: Tensor, moments: Moments | None, params: Sequence[tuple[Tensor | None, ...]], per_layer: int
) -> int:
    """The first layer whose parameters or inputs need a gradient; the number of layers if none does."""
    if torch.is_grad_enabled():
        if x.requires_grad or any(moment.requires_grad for moment in moments or ()):
            return 0
        for i, group in enumerate(params):
            if any(param is not None and param.requires_grad for param in group):
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


def _moments(features: Tensor) -> Moments:
    axes = [0, *range(2, features.dim())]
    var, mean = torch.var_mean(features.to(accumulation_dtype(features.dtype)), dim=axes, correction=0)
    return mean, var
