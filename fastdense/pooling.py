"""The door to the stem's pooling, the transition and the head: what ``functional.py`` is to the block.

Each is BatchNorm, ReLU and a pooling (the transition's with a 1x1 convolution behind it) in one operator that keeps its
input alone, the block's output or the stem convolution's, which exists anyway. Batch moments go from hand to hand: who
writes a channel computes them, so no channel's are computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backends.sync_batchnorm import group_of
from .core import checks
from .core.primitives import Pool
from .functional import Moments, affine, autocast, backend_name, check_moments, refusal, refuse_transforms, say_once
from .ops.bn_relu_pool import channels_last
from .ops.dense_block import autocasts
from .ops.running_stats import update_running_statistics
from .ops.support import average_obstacle, maximum_obstacle, norm_obstacle, pools_first, process_obstacle

__all__ = ["bn_relu_max_pool", "bn_relu_mean_pool", "transition"]

_RANKS = {nn.BatchNorm1d: 3, nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}  # nn.SyncBatchNorm takes any
_POOLED_DIMS: dict[type[nn.Module], int] = {
    nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3, nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3
}  # fmt: skip


def transition(
    x: Tensor, norm: nn.Module, relu: nn.Module, conv: nn.Module, pool: nn.Module, *, impl: str = "auto"
) -> Tensor:
    """DenseNet's transition, BN-ReLU-Conv1x1-AvgPool, with the pooling done first where that changes nothing.

    An average without padding and a 1x1 convolution commute, so pooling first gives the same result for a quarter of
    the convolution's work (an eighth in 3D). Any other pooling or convolution keeps its place.

    Args:
        x: ``[N, C, *spatial]``, one to three spatial dimensions, any floating dtype. Under autocast it is cast to
            autocast's dtype. For backward it is kept, and nothing else.
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
        x: ``[N, C, *spatial]``. For backward it is kept, and nothing else: mask and arg-max are computed again.
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
        x: ``[N, C, *spatial]``. For backward it is kept, and nothing else.
        norm: a plain ``nn.BatchNorm``; another is called.
        impl: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        ``[N, C]``.

    Raises:
        ValueError, RuntimeError: as :func:`transition`.

    Equivalent to ``F.relu(norm(x)).flatten(2).mean(2)``. Source: arXiv 1608.06993, table 1, "Classification Layer".
    """
    return run_head(x, norm, impl)


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
    reason = norm_obstacle(norm, relu) or average_obstacle(conv, pool)
    if _by_modules(impl, "transition", reason):
        x = norm(x) if relu is None else relu(norm(x))
        return (conv(pool(x)) if pools_first(conv, pool) else pool(conv(x))), None
    return fused_transition(x, norm, conv, pool, impl, moments, want_moments)


def fused_transition(
    x: Tensor,
    norm: Any,
    conv: Any,
    pool: Any,
    impl: str,
    moments: Moments | None = None,
    want_moments: bool = False,
) -> tuple[Tensor, Moments | None]:
    """:func:`run_transition` of modules that are known to run fused; a ReLU follows ``norm`` or is part of it."""
    return _run(x, norm, conv.weight, windows("average", pool), impl, moments, want_moments)


def run_stem(
    x: Tensor, norm: Any, relu: Any, pool: Any, impl: str, want_moments: bool = False
) -> tuple[Tensor, Moments | None]:
    """:func:`bn_relu_max_pool`, and the moments of its output if they are wanted and known."""
    if _by_modules(impl, "stem", norm_obstacle(norm, relu) or maximum_obstacle(pool)):
        return pool(norm(x) if relu is None else relu(norm(x))), None
    return fused_stem(x, norm, pool, impl, want_moments)


def fused_stem(x: Tensor, norm: Any, pool: Any, impl: str, want_moments: bool = False) -> tuple[Tensor, Moments | None]:
    """:func:`run_stem` of modules that are known to run fused; a ReLU follows ``norm`` or is part of it."""
    return _run(x, norm, None, windows("maximum", pool), impl, None, want_moments)


def run_head(x: Tensor, norm: Any, impl: str, moments: Moments | None = None) -> Tensor:
    """:func:`bn_relu_mean_pool`; ``moments`` are those of ``x``."""
    if _by_modules(impl, "head", norm_obstacle(norm, None)):
        return F.relu(norm(x)).flatten(2).mean(2)
    return _run(x, norm, None, Pool("mean"), impl, moments, False)[0]


def _by_modules(impl: str, what: str, reason: str | None) -> bool:
    """Whether the modules are to be called one by one; says so once if that is not what ``impl`` asks for."""
    impl = checks.impl_name(impl)
    if impl == "reference":
        return True
    reason = process_obstacle() or (reason and f"{what}: {reason}")
    if reason is None:
        return False
    say_once(refusal(impl, reason))
    return True


def windows(kind: str, pool: Any) -> Pool:
    """The windows of a pooling module, one size for each dimension."""
    dims = _POOLED_DIMS[type(pool)]

    def sizes(value: Any) -> tuple[int, ...]:
        values = tuple(value) if isinstance(value, tuple | list) else (value,)
        return values * dims if len(values) == 1 else values

    found = Pool(kind, sizes(pool.kernel_size), sizes(pool.stride), sizes(pool.padding))
    if {len(found.kernel), len(found.stride), len(found.padding)} != {dims}:
        raise ValueError(f"the pooling must have one size, or one for each of {dims} dimensions, got {pool}")
    if min(*found.kernel, *found.stride) < 1 or any(
        not 0 <= 2 * padding <= size for size, padding in zip(found.kernel, found.padding, strict=True)
    ):
        raise ValueError(f"the pooling must have positive sizes, and at most half of one as padding, got {pool}")
    return found


def _run(
    x: Tensor, norm: Any, weight: Tensor | None, pool: Pool, impl: str, moments: Moments | None, want_moments: bool
) -> tuple[Tensor, Moments | None]:
    _check(x, norm, weight, pool)
    refuse_transforms(x)
    if weight is not None and autocast(x) is not x:
        x, moments = autocast(x), None  # they were those of other values
    frozen = not (norm.training or norm.running_mean is None)
    group = group_of([norm]) or ""
    m = x.shape[0] * x.shape[2:].numel()
    if m == 1 and not frozen and not group:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
    if frozen or group:
        moments = None
    check_moments(x, moments)
    y, y_mean, y_var, mean, var = torch.ops.fastdense.bn_relu_pool(
        channels_last(x),
        *(moments or (None, None)),
        *affine(norm, x),
        weight,
        [norm.running_mean, norm.running_var] if frozen else [],
        norm.eps,
        *pool,
        want_moments and not group,
        backend_name(checks.impl_name(impl), x),
        group,
    )
    if not frozen:
        count = var[-1] if group else m
        update_running_statistics([(norm, *(moments or (mean, var[: mean.shape[0]])))], count)
    return y, (y_mean, y_var) if want_moments and not group else None


def _check(x: Any, norm: Any, weight: Tensor | None, pool: Pool) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor (float16, bfloat16, float32 or float64), got {x.dtype}")
    if not 3 <= x.dim() <= 5:
        raise ValueError(f"x must be [N, C, *spatial] with 1 to 3 spatial dimensions, got shape {tuple(x.shape)}")
    ranks = {
        "norm": _RANKS.get(type(norm)),
        "pooling": len(pool.kernel) + 2 if pool.kernel else None,
        "conv": None if weight is None else weight.dim(),
    }
    for name, rank in ranks.items():
        if rank not in (None, x.dim()):
            raise ValueError(f"x must have {rank} dimensions, as the {name} reads, got shape {tuple(x.shape)}")
    if x.shape[1] != norm.num_features:
        raise ValueError(f"x must have {norm.num_features} channels, as the norm reads, got shape {tuple(x.shape)}")
    if weight is not None and weight.shape[1] != x.shape[1]:
        raise ValueError(f"the conv must read the norm's {x.shape[1]} channels, got a weight of {tuple(weight.shape)}")
    if 0 in x.shape[2:]:
        raise ValueError(f"x must have at least one pixel, got shape {tuple(x.shape)}")
    if any(size < 1 for size in pool.sizes(x.shape[2:])):
        raise ValueError(f"x must have at least {pool.kernel} pixels, as the pooling takes, got shape {tuple(x.shape)}")
    checked = (("conv's weight", weight), ("norm's weight", norm.weight), ("norm's statistics", norm.running_mean))
    for name, tensor in checked:
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"x is on device {str(x.device)!r}, but the {name} on {str(tensor.device)!r}: move one of them with "
                ".to()"
            )
    if weight is not None and weight.dtype != x.dtype and not autocasts(x.device.type):
        raise ValueError(
            f"x is {x.dtype}, but the conv's weight is {weight.dtype}: convert one of them with .to(), or use "
            "torch.autocast"
        )
