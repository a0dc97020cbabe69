"""One primitive of a backend on random features, as a network would call it: to check it, and to time it.

A layer's earlier features are a slice of the block's wide buffer, its bottleneck is a buffer of its own, and so are
their gradients. :class:`Primitive` is all that this package knows of how a backend is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
METHOD = {  # of the backend, behind each operation
    traffic.COPY: "copy_with_moments", traffic.MOMENTS: "moments", traffic.RESOLVE: "resolve",
    **dict.fromkeys((*traffic.FORWARD, traffic.TRANSITION[0]), "bn_relu_conv"),
    **dict.fromkeys((*traffic.BACKWARD, traffic.TRANSITION[1]), "bn_relu_conv_backward"),
    **dict.fromkeys((traffic.MAX_POOL[0], traffic.MEAN[0]), "bn_relu_pool"),
    **dict.fromkeys((traffic.MAX_POOL[1], traffic.MEAN[1]), "bn_relu_pool_backward"),
}  # fmt: skip


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
        return (round((self.shape.m // self.batch) ** (1 / self.dims)),) * self.dims

    @property
    def pool(self) -> Pool | None:
        none, one, two, three = ((size,) * self.dims for size in range(4))
        if self.operation in traffic.MAX_POOL:
            return Pool("maximum", three, two, one)
        if self.operation in traffic.TRANSITION:
            return Pool("average", two, two, none)
        return Pool("mean") if self.operation in traffic.MEAN else None

    @property
    def sizes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Spatial sizes of what is read and of what is written; a transition's shape is its convolution's."""
        if self.operation in traffic.TRANSITION:
            return tuple(2 * size for size in self.spatial), self.spatial
        return self.spatial, self.spatial if self.pool is None else self.pool.sizes(self.spatial)

    @property
    def floor(self) -> traffic.Traffic:
        return traffic.primitive(self.operation, self.shape, window=2**self.dims)


def _apart(case: Case, uniform: Callable[..., Tensor]) -> Tensor:
    """Rows whose 3 x 3 neighbours differ by 0.2 at least: rounding to 16 bit moves no maximum to another pixel."""
    height, width = case.spatial
    levels = uniform(case.width, 9).argsort(1).float().t() * 0.5 - 1.5  # [9, channels]
    rows = torch.arange(height, device=levels.device) % 3 * 3
    place = (rows[:, None] + torch.arange(width, device=levels.device) % 3).flatten().repeat(case.batch)
    return levels[place] + uniform(len(place), case.width, shift=-0.5) * 0.3


def _with_moments(rows: Tensor) -> Features:
    var, mean = torch.var_mean(rows.float(), dim=0, correction=0)
    return Features(rows, mean, var)


class Primitive:
    """A primitive bound to random values of ordinary size, the same ones each time; calling it runs it.

    Its values are rounded to ``dtype``; ``exact`` holds them, and computes with them, in float32.
    """

    def __init__(
        self, case: Case, dtype: torch.dtype, device: torch.device, impl: str = "triton", *, exact: bool = False
    ) -> None:
        self.case, self.dtype, self.method = case, dtype, METHOD[case.operation]
        operation, (_, reads, writes, taps, _) = case.operation, case.shape
        m_in, m_out = (case.batch * math.prod(size) for size in case.sizes)
        in_3x3, wide_y = operation in CONV_3X3, operation in (*CONV_3X3, traffic.COPY, traffic.RESOLVE)
        generator = torch.Generator(device).manual_seed(0)

        def uniform(*size: int, shift: float = 0.0) -> Tensor:
            return torch.rand(size, generator=generator, device=device).add_(shift)

        def normal(*size: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
            return torch.randn(size, generator=generator, device=device).mul_(scale).add_(shift)

        def rounded(values: Tensor) -> Tensor:
            return values.to(dtype).to(torch.float32 if exact else dtype)

        # What is read and written, or the buffers that it is a slice of; gradients so small that many can be added up.
        pooled = operation in traffic.MAX_POOL
        x = rounded(_apart(case, uniform) if pooled else normal(m_in, reads if in_3x3 else case.width, shift=0.5))
        y = rounded(normal(m_out, case.width if wide_y else writes, shift=-0.5))
        grad_x, grad_y = rounded(normal(*x.shape, scale=1e-2)), rounded(normal(*y.shape, scale=1e-2))
        scale = math.sqrt(2 / (reads * taps))
        weight = rounded(normal(writes, *(math.isqrt(taps),) * case.dims, reads, scale=scale)).movedim(-1, 1)
        norm = Norm(uniform(reads, shift=0.5), uniform(reads, shift=-0.5), 1e-5)
        a, b = normal(2, writes, scale=1e-3)
        of_x = slice(0, reads)
        of_y = slice(case.width - writes, case.width) if in_3x3 else slice(0, writes)

        self.images = as_images(x, case.sizes[0])[:, of_x]
        self.be = select.create(impl, self.images)
        (self.conv,) = self.be.prepare([Conv(norm, weight, pool=case.pool)])
        self.source, self.output = _with_moments(x)[of_x], _with_moments(y)[of_y]
        self.grad = LazyGradient(grad_y[:, of_y], a, b)
        if operation == ACCUMULATING:
            D = self.be.gradient_buffer(self.output).D.copy_(self.grad.D)
            # A bottleneck's gradient sums to 0: that is what comes through a BatchNorm alone.
            self.grad = LazyGradient(D, -D.float().mean(0), b, balanced=True)
            self.into = LazyGradient(grad_x[:, of_x], *torch.zeros(2, reads, device=device))
        else:
            self.into = self.be.gradient_buffer(self.source)
        if operation == traffic.TRANSITION[1]:  # what a transition writes is not lazy
            self.grad = LazyGradient(self.grad.D, None, None)
            self.output = Features(self.grad.D, None, None)
        elif operation in traffic.AROUND:  # written into memory of its own
            outside = case.sizes[1]
            self.written = empty_features((case.batch, writes, *outside), dtype=x.dtype, device=device)
            moments = (None, None) if operation in traffic.MEAN else torch.empty(2, writes, device=device)
            self.output = Features(as_rows(self.written) if outside else self.written, *moments)
        self.gradients: list[Tensor | None] = []
        self._start = self.into.D.clone() if operation == ACCUMULATING else None

    def reset(self) -> None:
        """Writes NaN wherever a call must write, and what it adds to as it was at first."""
        self.gradients = []
        for tensor in self.results().values():
            tensor.fill_(math.nan if self._start is None else 0.0)
        if self._start is not None:
            self.into.D.copy_(self._start)

    def __call__(self) -> None:
        source, conv, output = self.source, self.conv, self.output
        be: Any = self.be
        calls = {
            "copy_with_moments": lambda: be.copy_with_moments(self.images, output),
            "moments": lambda: be.moments(source),
            "resolve": lambda: be.resolve(self.grad, source, out=self.written),
            "bn_relu_conv": lambda: be.bn_relu_conv(source, conv, output),
            "bn_relu_conv_backward": lambda: be.bn_relu_conv_backward(
                self.grad, output, conv, source, self.into, accumulate=self._start is not None
            ),
            "bn_relu_pool": lambda: be.bn_relu_pool(source, conv.norm, conv.pool, output),
            "bn_relu_pool_backward": lambda: be.bn_relu_pool_backward(
                self.grad.D, conv.norm, conv.pool, source, self.into
            ),
        }
        found = calls[self.method]()
        if self.method.endswith("backward"):
            self.gradients = found
            be.finish()

    def results(self) -> dict[str, Tensor]:
        """Returns everything that the primitive writes, by name."""
        found = dict(zip(("dgamma", "dbeta", "dweight"), self.gradients, strict=False))
        of: Features | LazyGradient = self.output
        names: tuple[str, ...] = ("rows", "mean", "var")
        if self.method == "resolve":
            return {"gradient": self.written}
        if self.method.endswith("backward"):
            of, names = self.into, ("D", "a", "b")
        elif self.method == "moments":
            of, names = self.source, names[1:]
        found |= {name: getattr(of, name) for name in names}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def expected(primitive: Primitive) -> dict[str, Tensor]:
    """Computes a primitive's results by the torch backend in float32."""
    case = primitive.case
    exact = case.operation != traffic.MAX_POOL[0]  # a maximum is taken of rounded values
    return _run(Primitive(case, primitive.dtype, primitive.images.device, "torch", exact=exact))


def errors(primitive: Primitive, want: dict[str, Tensor]) -> dict[str, float]:
    """Computes the relative errors of one run, by name."""
    return {name: relative_error(got, want[name]) for name, got in _run(primitive).items()}


def _run(primitive: Primitive) -> dict[str, Tensor]:
    primitive.reset()
    with arithmetic("fp32", primitive.images.device):
        primitive()
    return primitive.results()


def passes(errors: dict[str, float], dtype: torch.dtype) -> bool:
    """Returns whether every error is within a few roundings; NaN is not."""
    return bool(errors) and all(error <= TOLERANCE[dtype] for error in errors.values())
