"""SyncBatchNorm: a backend whose batch moments and BatchNorm sums are those of all processes together.

Forward, each convolution's moments are merged over the processes by one all-reduce; backward, the batch statistics'
share of ``(a, b)``, linear in the two sums, by another. ``dgamma`` and ``dbeta`` stay local, as PyTorch's do:
``DistributedDataParallel`` adds them up. Nothing is communicated in a recomputation, which needs no moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core.features import Features, LazyGradient
from ..core.primitives import Backend, Conv, Dropout, Gradients, Norm, Pool


def group_of(norms: Iterable[Any]) -> str | None:
    """The name of the process group that ``norms`` share their batch statistics with: ``""`` if they do not.

    ``None`` if some share and others do not, or with other processes. As in ``nn.SyncBatchNorm``, only a norm in
    training mode shares.
    """
    names = {_group_name(norm) for norm in norms if norm.training or norm.running_mean is None}
    if not names:
        return ""
    return names.pop() if len(names) == 1 else None


def _group_name(norm: Any) -> str:
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training:
        return ""
    if not (dist.is_available() and dist.is_initialized()):
        return ""
    group: Any = norm.process_group or dist.group.WORLD
    return str(group.group_name) if dist.get_world_size(group) > 1 else ""


def _resolve(group: str) -> Any:
    from torch.distributed import distributed_c10d  # exists only where PyTorch was built with it

    resolve: Any = vars(distributed_c10d)["_resolve_process_group"]
    return resolve(group)


class SyncBackend:
    """``inner`` with moments and sums of all processes in the group called ``group``.

    Args:
        inner: the backend that computes this process's share.
        group: the process group's name.
        total: values per channel in all processes together, ``[1]``; written in forward, read in backward.
        unread: the first channel of the block's buffer that no norm of the block reads: what its last layer writes.
    """

    def __init__(self, inner: Backend, group: str, total: Tensor, unread: int = -1) -> None:
        self.inner, self.total, self.unread = inner, total, unread
        self.group = _resolve(group)

    def __getattr__(self, name: str) -> Any:
        """As ``inner``, in all that no other process has a part in."""
        return getattr(self.inner, name)

    def moments(self, of: Features) -> None:
        self.inner.moments(of)
        self._share_moments(of)

    def copy_with_moments(self, x: Tensor, out: Features) -> None:
        self.inner.copy_with_moments(x, out)
        self._share_moments(out)

    def bn_relu_conv(self, source: Features, conv: Conv, out: Features, dropout: Dropout | None = None) -> None:
        self.inner.bn_relu_conv(source, conv, out, dropout)
        self._share_moments(out)

    def bn_relu_pool(self, source: Features, norm: Norm, pool: Pool, out: Features) -> None:
        self.inner.bn_relu_pool(source, norm, pool, out)
        self._share_moments(out)

    def _share_moments(self, out: Features) -> None:
        """The moments of all ranks from this one's, by Chan's formula; ``E[x^2] - E[x]^2`` would cancel."""
        if out.mean is None or out.var is None or out.rows.storage_offset() == self.unread:
            return
        size, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        channels = out.mean.numel()
        # The moments of all ranks side by side: each fills its own row, and the sum puts them together.
        table = out.mean.new_zeros(size, 2 * channels + 1)  # [processes, mean | var | count]
        torch.cat((out.mean, out.var, out.mean.new_full((1,), out.rows.shape[0])), out=table[rank])
        dist.all_reduce(table, group=self.group)
        means, variances, counts = table.split((channels, channels, 1), dim=1)
        total = counts.sum()
        shares = counts / total.clamp(min=1)
        shifted = means - means[:1]  # so that a large common mean does not cancel
        mean = (shifted * shares).sum(0)
        torch.add(means[0], mean, out=out.mean)
        torch.sum((variances + (shifted - mean).square()) * shares, 0, out=out.var)
        self.total.copy_(total)

    def bn_relu_conv_backward(
        self,
        grad: LazyGradient,
        output: Features,
        conv: Conv,
        source: Features,
        into: LazyGradient | None,
        dropout: Dropout | None = None,
        *,
        accumulate: bool,
    ) -> Gradients:
        gradients: Gradients = []

        def inner(mine: LazyGradient | None) -> None:
            gradients[:] = self.inner.bn_relu_conv_backward(
                grad, output, conv, source, mine, dropout, accumulate=accumulate
            )

        self._share_sums(inner, conv.norm, into, accumulate)
        return gradients

    def bn_relu_pool_backward(
        self, grad: Tensor, norm: Norm, pool: Pool, source: Features, into: LazyGradient | None
    ) -> Gradients:
        gradients: Gradients = []

        def inner(mine: LazyGradient | None) -> None:
            gradients[:] = self.inner.bn_relu_pool_backward(grad, norm, pool, source, mine)

        self._share_sums(inner, norm, into, accumulate=False)
        return gradients

    def _share_sums(
        self, inner: Callable[[LazyGradient | None], None], norm: Norm, into: LazyGradient | None, accumulate: bool
    ) -> None:
        """``inner`` on coefficients of its own, whose sum over all processes goes to ``into``."""
        if into is None or into.a is None or into.b is None or norm.frozen is not None:
            inner(into)
            return
        shares = torch.zeros(2, into.a.numel(), dtype=into.a.dtype, device=into.a.device)
        inner(LazyGradient(into.D, shares[0], shares[1], into.start))
        shares.mul_(max(self.m, 1) / self.total.clamp(min=1))  # inner divided by its own count
        dist.all_reduce(shares, group=self.group)
        for vector, share in zip((into.a, into.b), shares, strict=True):
            vector.add_(share) if accumulate else vector.copy_(share)

    def gradient_buffer(self, of: Features) -> LazyGradient:
        """As ``inner``; what sums to 0 does so over all processes."""
        return replace(self.inner.gradient_buffer(of), balanced=False)
