"""What the operators share: backends, autocast, the random generator, gradients, running statistics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..backends import select
from ..backends.sync_batchnorm import SyncBackend
from ..core.primitives import Backend

NOT_TWICE = (
    "fastdense's fused DenseBlock is differentiable once: for double backward or torch.func transforms build the "
    "model with impl='reference' (or set FASTDENSE_IMPL=reference)"
)


def backend_of(impl: str, x: Tensor, group: str, z_var: Tensor, unread: int = -1) -> Backend:
    """The backend for one call; the last of ``z_var`` is a group's number of values per channel."""
    backend = select.create(impl, x)
    return SyncBackend(backend, group, z_var[-1:], unread) if group else backend


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device."""
    return device != "meta" and torch.is_autocast_enabled(device)  # PyTorch raises for "meta"


def autocast(x: Tensor) -> Tensor:
    """``x`` as autocast has it: in its dtype where it is on, but for float64."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if autocasts(device) and x.dtype != torch.float64 else x


def plain_arithmetic(x: Tensor) -> AbstractContextManager[Any]:
    """Keeps autocast from casting inside an operator: dtypes are settled before it is called."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x.device.type) else nullcontext()


def generator_state(device: torch.device) -> Tensor | None:
    """The state to return to if a call fails; ``None`` where it cannot be read (while a CUDA graph is captured)."""
    if not select.may_query(device):
        return None
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def restore_generator(device: torch.device, state: Tensor | None) -> None:
    """Returns the generator of ``device`` to ``state``, if there is one."""
    if state is None:
        return
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def gradients_like(params: Sequence[Tensor], gradients: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    """Each gradient with the shape, dtype and strides of its parameter: optimizers and DDP want them to agree.

    Empty where there is none or none is needed. In 16 bit all of them are cast, in one call: one for each would be
    more launches than everything else.
    """
    found: list[Tensor] = []
    casts: list[Tensor] = []
    sources: list[Tensor] = []
    for param, gradient, needed in zip(params, gradients, needs, strict=True):
        if gradient is None or not needed:
            found.append(param.new_empty(0))
            continue
        same = gradient.dtype == param.dtype
        if same and gradient.shape == param.shape and gradient.stride() == param.stride():
            found.append(gradient)
            continue
        gradient = gradient.reshape(param.shape)
        strides = zip(param.shape, gradient.stride(), param.stride(), strict=True)
        if same and all(size == 1 or ours == theirs for size, ours, theirs in strides):
            found.append(gradient.as_strided(param.shape, param.stride()))
            continue
        found.append(torch.empty_like(param))
        casts.append(found[-1])
        sources.append(gradient)
    if casts:
        torch._foreach_copy_(casts, sources)
    return found


def empty_like_where(params: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    """What :func:`gradients_like` returns, for compilers: shapes, dtypes and strides."""
    wanted = zip(params, needs, strict=True)
    return [torch.empty_like(param) if needed else param.new_empty(0) for param, needed in wanted]


def raise_not_twice(ctx: Any, *grads: Any) -> Any:
    """The gradient of a gradient."""
    raise RuntimeError(NOT_TWICE)


@torch.no_grad()
def update_running_statistics(batch: Iterable[tuple[Any, Tensor, Tensor]], m: int | Tensor) -> None:
    """Every training norm's running statistics, once a step, after all kernels were queued.

    Args:
        batch: each norm with the mean and the biased variance of what it read.
        m: values per channel that these were taken over.

    As ``nn.BatchNorm``: ``running = (1 - momentum)*running + momentum*batch``, with the unbiased variance; with
    ``momentum=None`` the cumulative average; an empty batch counts but changes nothing.
    """
    groups: dict[float | None, list[tuple[Any, Tensor, Tensor]]] = {}
    for norm, mean, var in batch:
        if norm.training and norm.track_running_stats and norm.running_mean is not None:
            groups.setdefault(norm.momentum, []).append((norm, mean.detach(), var.detach()))
    if not groups or _is_recomputation():
        return
    correction = m / (m - 1).clamp(min=1) if isinstance(m, Tensor) else m / max(m - 1, 1)
    for momentum, members in groups.items():
        counters = [norm.num_batches_tracked for norm, _, _ in members if norm.num_batches_tracked is not None]
        if counters:
            torch._foreach_add_(counters, 1)
        if not isinstance(m, Tensor) and m == 0:
            continue
        variances = torch._foreach_mul([var for _, _, var in members], correction)
        running = [norm.running_mean for norm, _, _ in members] + [norm.running_var for norm, _, _ in members]
        new = [mean for _, mean, _ in members] + list(variances)
        new = [value.to(old.dtype) for value, old in zip(new, running, strict=True)]
        if momentum is not None:
            torch._foreach_lerp_(running, new, momentum)
            continue
        for i, (old, value) in enumerate(zip(running, new, strict=True)):
            old.lerp_(value, members[i % len(members)][0].num_batches_tracked.to(old.dtype).reciprocal())


def _is_recomputation() -> bool:
    """Whether this forward pass runs inside a backward pass, as under ``torch.utils.checkpoint``: the second of two."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() >= 0
