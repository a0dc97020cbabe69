"""Running statistics of BatchNorm, from the batch moments that the operators return."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


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
