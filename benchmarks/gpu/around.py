"""What stands round the blocks, as a network calls it: moments, resolve, the stem's pooling, transition, head."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdense import backends
from fastdense.features import Features, LazyGradient, as_images, as_rows, empty_features
from fastdense.primitives import Conv, Norm, Pool

from ..compiled import traffic
from .case import Case, normal, with_moments

BACKWARD = (traffic.MAX_POOL[1], traffic.TRANSITION[1], traffic.MEAN[1])


def _pool(case: Case) -> Pool | None:
    ones = (1,) * case.dims
    if case.operation in traffic.MAX_POOL:
        return Pool("maximum", (3,) * case.dims, (2,) * case.dims, ones)
    if case.operation in traffic.TRANSITION:
        return Pool("average", (2,) * case.dims, (2,) * case.dims, (0,) * case.dims)
    return Pool("mean") if case.operation in traffic.MEAN else None


def _sizes(case: Case) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Spatial sizes of what is read and of what is written."""
    if case.operation in traffic.TRANSITION:  # whose shape is its convolution's
        return tuple(2 * size for size in case.spatial), case.spatial
    pool = _pool(case)
    return case.spatial, case.spatial if pool is None else pool.sizes(case.spatial)


@dataclass(frozen=True)
class Tensors:
    """Random features and gradients, all as the backends get them."""

    x: Tensor  # [m_in, width]
    grad: Tensor  # [m_out, writes]; of resolve [m, width]
    gamma: Tensor  # [reads], fp32
    beta: Tensor  # [reads], fp32
    a: Tensor  # [reads], fp32
    b: Tensor  # [reads], fp32
    weight: Tensor  # [writes, reads, 1, ...]

    @classmethod
    def random(cls, case: Case, dtype: torch.dtype, device: torch.device) -> Tensors:
        """Values of ordinary size; in each window of the stem's pooling one is clearly the largest."""
        _, reads, writes, _, _ = case.shape
        inside, outside = _sizes(case)
        m, m_out = case.batch * math.prod(inside), case.batch * math.prod(outside)
        x = normal(device, m, case.width, shift=0.5)
        if case.operation in traffic.MAX_POOL:
            x = _apart(case.batch, inside, case.width, device)
        columns = case.width if case.operation == traffic.RESOLVE else writes
        return cls(
            x=x.to(dtype),
            grad=normal(device, m_out, columns, scale=1e-2).to(dtype),
            gamma=torch.rand(reads, device=device) + 0.5,
            beta=torch.rand(reads, device=device) - 0.5,
            a=normal(device, reads, scale=1e-3),
            b=normal(device, reads, scale=1e-3),
            weight=normal(device, writes, reads, *(1,) * case.dims, scale=math.sqrt(2 / reads)).to(dtype),
        )

    def widened(self) -> Tensors:
        """Copies in fp32: the same values for the arithmetic that a result is checked against."""
        return Tensors(*(tensor.float().clone() for tensor in vars(self).values()))


def _apart(batch: int, sizes: tuple[int, ...], channels: int, device: torch.device) -> Tensor:
    """Rows whose 3 x 3 neighbours differ by 0.2 at least: rounding to 16 bit moves no maximum to another pixel."""
    height, width = sizes
    levels = torch.rand(channels, 9, device=device).argsort(1).float().t() * 0.5 - 1.5  # [9, channels]
    rows = torch.arange(height, device=device) % 3 * 3
    place = (rows[:, None] + torch.arange(width, device=device) % 3).flatten().repeat(batch)
    return levels[place] + (torch.rand(len(place), channels, device=device) - 0.5) * 0.3


class Around:
    """A primitive bound to its tensors; calling it runs it, ``results()`` is what it left behind.

    Args:
        case: which primitive.
        tensors: what it reads.
        impl: the backend's name.
    """

    def __init__(self, case: Case, tensors: Tensors, impl: str) -> None:
        self.case = case
        reads, writes, device, dtype = case.shape.reads, case.shape.writes, tensors.x.device, tensors.x.dtype
        inside, outside = _sizes(case)
        self.be = backends.create(impl, as_images(tensors.x, inside))
        self.source = with_moments(tensors.x)[slice(0, reads)]
        norm = Norm(tensors.gamma, tensors.beta, 1e-5)
        self.pool = _pool(case)
        (self.conv,) = self.be.prepare([Conv(norm, tensors.weight, pool=self.pool)])
        self.grad = LazyGradient(tensors.grad[:, :reads] if self.pool is None else tensors.grad, tensors.a, tensors.b)
        D, moments = torch.empty_like(self.source.rows), torch.empty(4, max(reads, writes), device=device)
        self.into = LazyGradient(D, moments[0, :reads], moments[1, :reads])
        rows = empty_features((case.batch, writes, *outside), dtype=dtype, device=device)
        tracked = (None, None) if self.pool is not None and self.pool.kind == "mean" else moments[2:, :writes]
        self.output = Features(as_rows(rows) if outside else rows, *tracked)
        self.images = rows
        self.gradients: list[Tensor | None] = []

    def poison(self) -> None:
        """NaN wherever the primitive must write: what it leaves out is seen."""
        if self.case.operation == traffic.MOMENTS:
            unknown = torch.full((2, self.case.shape.reads), math.nan, device=self.source.rows.device)
            self.source = Features(self.source.rows, *unknown)
        for tensor in (self.into.D, self.into.a, self.into.b, self.output.rows, self.output.mean, self.output.var):
            if tensor is not None:
                tensor.fill_(math.nan)

    def __call__(self) -> None:
        operation, be, norm, pool = self.case.operation, self.be, self.conv.norm, self.pool
        if operation == traffic.MOMENTS:
            be.moments(self.source)
        elif operation == traffic.RESOLVE:
            be.resolve(self.grad, self.source, out=self.images)
        elif operation == traffic.TRANSITION[0]:
            be.bn_relu_conv(self.source, self.conv, self.output)
        elif operation == traffic.TRANSITION[1]:
            arriving = LazyGradient(self.grad.D, None, None)
            output = Features(self.grad.D, None, None)
            self.gradients = be.bn_relu_conv_backward(
                arriving, output, self.conv, self.source, self.into, accumulate=False
            )
            be.finish()
        elif pool is not None and operation in BACKWARD:
            self.gradients = be.bn_relu_pool_backward(self.grad.D, norm, pool, self.source, self.into)
        elif pool is not None:
            be.bn_relu_pool(self.source, norm, pool, self.output)

    def results(self) -> dict[str, Tensor]:
        """Everything that the primitive writes, by name."""
        operation = self.case.operation
        if operation in BACKWARD:
            found = dict(zip(("dgamma", "dbeta", "dweight"), self.gradients, strict=False))
            found |= {"D": self.into.D, "a": self.into.a, "b": self.into.b}
        elif operation == traffic.MOMENTS:
            found = {"mean": self.source.mean, "var": self.source.var}
        elif operation == traffic.RESOLVE:
            found = {"gradient": self.output.rows}
        else:
            found = {"rows": self.output.rows, "mean": self.output.mean, "var": self.output.var}
        return {name: tensor for name, tensor in found.items() if tensor is not None}
