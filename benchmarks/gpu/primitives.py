"""One primitive of a backend on random features, as a network would call it: to check it, and to time it.

The features lie as in a network: a layer's earlier features are a slice of the block's wide buffer, the bottleneck is
a buffer of its own, and so are their gradients. The three functions at the top, and for what stands round the blocks
``around``, are all that this package knows of how a backend is called.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdense import backends
from fastdense.features import Features, LazyGradient, as_images
from fastdense.primitives import Backend, Conv, Norm

from ..compiled import traffic
from .around import Around
from .around import Tensors as AroundTensors
from .case import Case, normal, with_moments
from .machine import tf32
from .measure import TOLERANCE, relative_error


def copy_with_moments(be: Backend, x: Tensor, out: Features) -> None:
    """``out = x``, with its moments."""
    be.copy_with_moments(x, out)


def forward(be: Backend, source: Features, conv: Conv, out: Features) -> None:
    """``out = conv(relu(bn(source)))``, with its moments."""
    be.bn_relu_conv(source, conv, out)


def backward(
    be: Backend,
    grad: LazyGradient,
    output: Features,
    conv: Conv,
    source: Features,
    into: LazyGradient,
    *,
    accumulate: bool,
) -> list[Tensor | None]:
    """``[dgamma, dbeta, dweight]``; the gradient of ``source`` goes into ``into``."""
    gradients = be.bn_relu_conv_backward(grad, output, conv, source, into, accumulate=accumulate)
    be.finish()
    return gradients


@dataclass(frozen=True)
class Tensors:
    """Random features and gradients of one layer, all as the backends get them."""

    X: Tensor  # [m, width]: the block's buffer
    Z: Tensor  # [m, B]: the bottleneck
    grad_X: Tensor  # [m, width]
    grad_Z: Tensor  # [m, B]
    gamma: Tensor  # [reads], fp32
    beta: Tensor  # [reads], fp32
    a: Tensor  # [writes], fp32: the lazy coefficients that arrive
    b: Tensor  # [writes], fp32
    weight: Tensor  # [writes, reads, *kernel]

    @classmethod
    def random(cls, case: Case, dtype: torch.dtype, device: torch.device) -> Tensors:
        """Values of ordinary size; moderate gradients, to which a timed run can add many times."""
        m, reads, writes, taps, _ = case.shape
        bottleneck = writes if taps == 1 else reads

        size = math.isqrt(taps)
        grad_Z = normal(device, m, bottleneck, scale=1e-2).to(dtype)
        weight = normal(device, writes, reads, size, size, scale=math.sqrt(2 / (reads * taps)))
        return cls(
            X=normal(device, m, case.width, shift=0.5).to(dtype),
            Z=normal(device, m, bottleneck, shift=-0.5).to(dtype),
            grad_X=normal(device, m, case.width, scale=1e-2).to(dtype),
            grad_Z=grad_Z,
            gamma=torch.rand(reads, device=device) + 0.5,
            beta=torch.rand(reads, device=device) - 0.5,
            # A bottleneck's gradient sums to 0: that is what comes through a BatchNorm alone.
            a=-grad_Z.float().mean(0) if taps == 1 else normal(device, writes, scale=1e-3),
            b=normal(device, writes, scale=1e-3),
            weight=weight.to(dtype).contiguous(memory_format=torch.channels_last),
        )

    def widened(self) -> Tensors:
        """Copies in fp32: the same values for the arithmetic that a result is checked against."""
        return Tensors(*(tensor.float().clone() for tensor in vars(self).values()))


class Primitive:
    """A primitive bound to its tensors; calling it runs it, ``results()`` is what it left behind.

    Args:
        case: which primitive.
        tensors: what it reads and writes: a call changes them.
        impl: the backend's name.
    """

    def __init__(self, case: Case, tensors: Tensors, impl: str) -> None:
        self.case, self.tensors = case, tensors
        reads, writes, pointwise = case.shape.reads, case.shape.writes, case.shape.taps == 1
        self.images = as_images(tensors.X, case.spatial)
        self.be = backends.create(impl, self.images)
        channels = slice(0, reads) if pointwise else slice(case.width - writes, case.width)
        features, bottleneck = with_moments(tensors.X)[channels], with_moments(tensors.Z)
        self.source, self.output = (features, bottleneck) if pointwise else (bottleneck, features)
        self.conv = Conv(Norm(tensors.gamma, tensors.beta, 1e-5), tensors.weight)
        of_features = tensors.grad_X[:, channels]
        of_bottleneck = self.be.gradient_buffer(bottleneck).D
        of_bottleneck.copy_(tensors.grad_Z)
        arriving, into = (of_bottleneck, of_features) if pointwise else (of_features, of_bottleneck)
        self.grad = LazyGradient(arriving, tensors.a, tensors.b, balanced=pointwise)
        self.into = LazyGradient(into, *torch.zeros(2, reads, device=into.device))
        self._start: Tensor | None = None
        self.gradients: list[Tensor | None] = []
        if case.operation == traffic.COPY:
            self.output = Features(torch.empty_like(tensors.X)[:, :reads], *torch.empty(2, reads, device=into.device))

    def restore(self) -> None:
        """What a backward pass adds to, as it was when this was first called."""
        if self._start is None:
            self._start = self.into.D.clone()
        self.into.D.copy_(self._start)
        for sums in (self.into.a, self.into.b):
            assert sums is not None
            sums.zero_()

    def poison(self) -> None:
        """NaN wherever the primitive must write: what it leaves out is seen."""
        if self.case.operation == "backward 3x3":
            self.into.D.fill_(math.nan)
        if self.case.operation not in traffic.BACKWARD:
            for tensor in self.results().values():
                tensor.fill_(math.nan)

    def __call__(self) -> None:
        operation = self.case.operation
        if operation == traffic.COPY:
            copy_with_moments(self.be, self.images[:, : self.case.shape.reads], self.output)
        elif operation in traffic.FORWARD:
            forward(self.be, self.source, self.conv, self.output)
        else:
            self.gradients = backward(
                self.be, self.grad, self.output, self.conv, self.source, self.into,
                accumulate=operation == "backward 1x1",
            )  # fmt: skip

    def results(self) -> dict[str, Tensor]:
        """Everything that the primitive writes, by name."""
        if self.case.operation in traffic.BACKWARD:
            found = dict(zip(("dgamma", "dbeta", "dweight"), self.gradients, strict=True))
            found |= {"D": self.into.D, "a": self.into.a, "b": self.into.b}
        else:
            found = {"rows": self.output.rows, "mean": self.output.mean, "var": self.output.var}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


Bound = Primitive | Around


def bind(case: Case, dtype: torch.dtype, device: torch.device, impl: str) -> tuple[Bound, Bound]:
    """The primitive on fresh random values, and the torch backend's in fp32 on the same ones."""
    if case.operation in traffic.AROUND:
        around = AroundTensors.random(case, dtype, device)
        # A maximum is taken of rounded values.
        exact = around if case.operation == traffic.MAX_POOL[0] else around.widened()
        return Around(case, around, impl), Around(case, exact, "torch")
    tensors = Tensors.random(case, dtype, device)
    truth = Primitive(case, tensors.widened(), "torch")  # first: a run changes what is not widened
    return Primitive(case, tensors, impl), truth


def check(case: Case, dtype: torch.dtype, device: torch.device, impl: str) -> tuple[Bound, dict[str, float]]:
    """The primitive, run once on fresh random values, and its errors against the torch backend in fp32, by name."""
    primitive, truth = bind(case, dtype, device, impl)
    for one in (truth, primitive):
        one.poison()
    with tf32(False):
        truth()
        primitive()
    want = truth.results()
    return primitive, {name: relative_error(got, want[name]) for name, got in primitive.results().items()}


def passes(errors: dict[str, float], dtype: torch.dtype) -> bool:
    """Whether every error is within a few roundings; NaN is not."""
    return bool(errors) and all(error <= TOLERANCE[dtype] for error in errors.values())
