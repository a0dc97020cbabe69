"""One primitive of a backend on random features, as a network would call it: to check it, and to time it.

A layer's earlier features are a slice of the block's wide buffer, its bottleneck is a buffer of its own, and so are
their gradients. :class:`Primitive` is all that this package knows of how a backend is called.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastdense.backends import select
from fastdense.core.features import Features, LazyGradient, as_images, as_rows, empty_features
from fastdense.core.primitives import Conv, Norm, Pool

from ..compiled import traffic
from ..harness.training import arithmetic
from .machine import relative_error

# Relative 2-norm against the same arithmetic in fp32: a few roundings of operands and results.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
CONV_3X3 = (traffic.FORWARD[1], traffic.BACKWARD[1])
ACCUMULATING = traffic.BACKWARD[0]  # adds to the gradient of what it read
POOLED_BACKWARD = (traffic.MAX_POOL[1], traffic.MEAN[1])


@dataclass(frozen=True)
class Case:
    """Which primitive on which shape."""

    operation: str  # a name of benchmarks.compiled.traffic
    shape: traffic.Shape
    batch: int  # images; the space is a square, or a cube
    width: int  # channels of the buffer that its features are a slice of
    dims: int = 2

    @property
    def spatial(self) -> tuple[int, ...]:
        """The size of the images of ``shape.m`` pixels together."""
        return (round((self.shape.m // self.batch) ** (1 / self.dims)),) * self.dims

    @property
    def pool(self) -> Pool | None:
        """The pooling that is part of it."""
        none, one, two, three = ((size,) * self.dims for size in range(4))
        if self.operation in traffic.MAX_POOL:
            return Pool("maximum", three, two, one)
        if self.operation in traffic.TRANSITION:
            return Pool("average", two, two, none)
        return Pool("mean") if self.operation in traffic.MEAN else None

    @property
    def sizes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Spatial sizes of what is read and of what is written."""
        if self.operation in traffic.TRANSITION:  # whose shape is its convolution's
            return tuple(2 * size for size in self.spatial), self.spatial
        return self.spatial, self.spatial if self.pool is None else self.pool.sizes(self.spatial)

    @property
    def floor(self) -> traffic.Traffic:
        """What it must move and compute at least."""
        return traffic.primitive(self.operation, self.shape, window=2**self.dims)


class Tensors(NamedTuple):
    """What one primitive reads and writes, as the backends get it; those of a 3x3 write into the wide buffer."""

    x: Tensor  # [m_in, width or reads]: what is read, or the buffer that it is a slice of
    y: Tensor  # [m_out, width or writes]: what is written, or was
    grad_x: Tensor  # like x
    grad_y: Tensor  # like y
    gamma: Tensor  # [reads], fp32
    beta: Tensor  # [reads], fp32
    a: Tensor  # [writes], fp32: the lazy coefficients that arrive
    b: Tensor  # [writes], fp32
    weight: Tensor  # [writes, reads, *kernel]


def _random(case: Case, dtype: torch.dtype, device: torch.device) -> Tensors:
    """Values of ordinary size; moderate gradients, to which a timed run can add many times."""
    _, reads, writes, taps, _ = case.shape
    m_in, m_out = (case.batch * math.prod(size) for size in case.sizes)
    spatial, wide_y = case.operation in CONV_3X3, case.operation in (*CONV_3X3, traffic.COPY, traffic.RESOLVE)
    x = m_in, reads if spatial else case.width
    y = m_out, case.width if wide_y else writes

    def normal(*size: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return torch.randn(size, device=device).mul_(scale).add_(shift)

    grad_y = normal(*y, scale=1e-2).to(dtype)
    kernel = (math.isqrt(taps),) * case.dims
    values = _apart(case, device) if case.operation in traffic.MAX_POOL else normal(*x, shift=0.5)
    return Tensors(
        x=values.to(dtype),
        y=normal(*y, shift=-0.5).to(dtype),
        grad_x=normal(*x, scale=1e-2).to(dtype),
        grad_y=grad_y,
        gamma=torch.rand(reads, device=device) + 0.5,
        beta=torch.rand(reads, device=device) - 0.5,
        # A bottleneck's gradient sums to 0: that is what comes through a BatchNorm alone.
        a=-grad_y.float().mean(0) if case.operation == ACCUMULATING else normal(writes, scale=1e-3),
        b=normal(writes, scale=1e-3),
        weight=normal(writes, *kernel, reads, scale=math.sqrt(2 / (reads * taps))).to(dtype).movedim(-1, 1),
    )


def _apart(case: Case, device: torch.device) -> Tensor:
    """Rows whose 3 x 3 neighbours differ by 0.2 at least: rounding to 16 bit moves no maximum to another pixel."""
    height, width = case.spatial
    levels = torch.rand(case.width, 9, device=device).argsort(1).float().t() * 0.5 - 1.5  # [9, channels]
    rows = torch.arange(height, device=device) % 3 * 3
    place = (rows[:, None] + torch.arange(width, device=device) % 3).flatten().repeat(case.batch)
    return levels[place] + (torch.rand(len(place), case.width, device=device) - 0.5) * 0.3


def _with_moments(rows: Tensor) -> Features:
    var, mean = torch.var_mean(rows.float(), dim=0, correction=0)
    return Features(rows, mean, var)


class Primitive:
    """A primitive of backend ``impl`` bound to its tensors: calling it runs it and changes them."""

    def __init__(self, case: Case, tensors: Tensors, impl: str) -> None:
        self.case, self.tensors, self.dtype, device = case, tensors, tensors.x.dtype, tensors.x.device
        _, reads, writes, _, _ = case.shape
        inside, outside = case.sizes
        of_x = slice(0, reads)
        of_y = slice(case.width - writes, case.width) if case.operation in CONV_3X3 else slice(0, writes)
        self.images = as_images(tensors.x, inside)[:, of_x]
        self.be = select.create(impl, self.images)
        norm = Norm(tensors.gamma, tensors.beta, 1e-5)
        (self.conv,) = self.be.prepare([Conv(norm, tensors.weight, pool=case.pool)])
        self.source, self.output = _with_moments(tensors.x)[of_x], _with_moments(tensors.y)[of_y]
        self.grad = LazyGradient(tensors.grad_y[:, of_y], tensors.a, tensors.b)
        if case.operation == ACCUMULATING:
            D = self.be.gradient_buffer(self.output).D.copy_(self.grad.D)
            self.grad = LazyGradient(D, tensors.a, tensors.b, balanced=True)
            self.into = LazyGradient(tensors.grad_x[:, of_x], *torch.zeros(2, reads, device=device))
        else:
            self.into = self.be.gradient_buffer(self.source)
        if case.operation == traffic.TRANSITION[1]:  # what a transition writes is not lazy
            self.grad = LazyGradient(self.grad.D, None, None)
            self.output = Features(self.grad.D, None, None)
        elif case.operation in traffic.AROUND:  # written into memory of its own
            self.written = empty_features((case.batch, writes, *outside), dtype=self.dtype, device=device)
            moments = (None, None) if case.operation in traffic.MEAN else torch.empty(2, writes, device=device)
            self.output = Features(as_rows(self.written) if outside else self.written, *moments)
        self.gradients: list[Tensor | None] = []
        self._start = self.into.D.clone() if case.operation == ACCUMULATING else None

    def reset(self) -> None:
        """Writes NaN wherever a call must write, and what it adds to as it was at first."""
        self.gradients = []
        for tensor in self.results().values():
            tensor.fill_(math.nan if self._start is None else 0.0)
        if self._start is not None:
            self.into.D.copy_(self._start)

    def __call__(self) -> None:
        operation, be, source, conv, pool = self.case.operation, self.be, self.source, self.conv, self.case.pool
        if operation == traffic.COPY:
            be.copy_with_moments(self.images, self.output)
        elif operation == traffic.MOMENTS:
            be.moments(source)
        elif operation == traffic.RESOLVE:
            be.resolve(self.grad, source, out=self.written)
        elif operation in (*traffic.FORWARD, traffic.TRANSITION[0]):
            be.bn_relu_conv(source, conv, self.output)
        elif operation in (*traffic.BACKWARD, traffic.TRANSITION[1]):
            self.gradients = be.bn_relu_conv_backward(
                self.grad, self.output, conv, source, self.into, accumulate=operation == ACCUMULATING
            )
            be.finish()
        elif pool is not None and operation in POOLED_BACKWARD:
            self.gradients = be.bn_relu_pool_backward(self.grad.D, conv.norm, pool, source, self.into)
        elif pool is not None:
            be.bn_relu_pool(source, conv.norm, pool, self.output)

    def results(self) -> dict[str, Tensor]:
        """Returns everything that the primitive writes, by name."""
        found: dict[str, Tensor | None] = dict(zip(("dgamma", "dbeta", "dweight"), self.gradients, strict=False))
        if self.case.operation in (*traffic.BACKWARD, traffic.TRANSITION[1], *POOLED_BACKWARD):
            found |= {"D": self.into.D, "a": self.into.a, "b": self.into.b}
        elif self.case.operation == traffic.MOMENTS:
            found = {"mean": self.source.mean, "var": self.source.var}
        elif self.case.operation == traffic.RESOLVE:
            found = {"gradient": self.written}
        else:
            found = {"rows": self.output.rows, "mean": self.output.mean, "var": self.output.var}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def bind(case: Case, dtype: torch.dtype, device: torch.device, impl: str = "triton") -> Primitive:
    """Returns the primitive on fresh random values."""
    return Primitive(case, _random(case, dtype, device), impl)


def expected(primitive: Primitive) -> dict[str, Tensor]:
    """Computes in fp32, by the torch backend, the results of a primitive that has not run yet."""
    case, tensors = primitive.case, primitive.tensors
    if case.operation != traffic.MAX_POOL[0]:  # a maximum is taken of rounded values
        tensors = Tensors(*(tensor.float().clone() for tensor in tensors))
    truth = Primitive(case, tensors, "torch")
    return _run(truth)


def errors(primitive: Primitive, want: dict[str, Tensor]) -> dict[str, float]:
    """Computes the relative errors of one run, by name."""
    return {name: relative_error(got, want[name]) for name, got in _run(primitive).items()}


def _run(primitive: Primitive) -> dict[str, Tensor]:
    primitive.reset()
    with arithmetic("fp32", primitive.tensors.x.device):
        primitive()
    return primitive.results()


def passes(errors: dict[str, float], dtype: torch.dtype) -> bool:
    """Returns whether every error is within a few roundings; NaN is not."""
    return bool(errors) and all(error <= TOLERANCE[dtype] for error in errors.values())
