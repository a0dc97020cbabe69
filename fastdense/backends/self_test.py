"""A backend's trial: one small layer, forward and backward, against float64, before ``impl="auto"`` relies on it.

A compiler, a driver or a GPU that the kernels have not met yet may make something else of them. The trial runs once for
each device and dtype, takes a few compilations (which are kept on disk), and asks nothing of the random generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ..core import schedule
from ..core.features import Features, LazyGradient, accumulation_dtype, as_rows, empty_features
from ..core.primitives import Backend, Conv, Layer, Norm
from . import select

# Relative 2-norm, some roundings (float32 may multiply in TF32): a right kernel is off by one, a wrong one by far more.
TOLERANCE = {torch.float32: 1e-2, torch.float16: 1e-2, torch.bfloat16: 8e-2}
# Images: on a GPU several tiles a program, and as many programs as it takes.
SIZES = {"cpu": (2, 13, 11), "cuda": (2, 199, 193)}


@lru_cache(maxsize=64)
def failure(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the backend ``name`` should not be used on ``device`` for ``dtype``; ``None`` if it does what it should."""
    try:
        with torch.no_grad():
            got = _results(lambda x: select.create(name, x), device, dtype)
            want = _results(lambda x: select.create("torch", x), device, torch.float64)
    except torch.OutOfMemoryError:  # says nothing of the kernels, and is not remembered
        raise
    except Exception as error:  # whatever a compiler or a driver raises
        return f"a trial of its kernels on {device} in {dtype} failed with {type(error).__name__}: {error}"
    for what, truth in want.items():
        off = (got[what].double().reshape(truth.shape) - truth).norm().item() / truth.norm().item()
        if not off <= TOLERANCE[dtype]:  # nor if it is NaN
            return f"in a trial of its kernels on {device} in {dtype}, {what} was off by {off:.1e}"
    return None


def _results(create: Callable[[Tensor], Backend], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Everything that one layer's forward and backward pass compute, from the same numbers whatever the dtype."""
    generator = torch.Generator().manual_seed(0)
    reads, k, wide, (n, height, width) = 200, 24, 96, SIZES[device.type]  # several steps over the channels
    acc = accumulation_dtype(dtype)

    def random(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        # Numbers that bfloat16 holds exactly: both runs start from the same ones.
        return (torch.randn(shape, generator=generator) * scale).bfloat16().to(device, dtype)

    def conv(inputs: int, outputs: int, *kernel: int) -> Conv:
        gamma = 1 + random(inputs, dtype=acc, scale=0.1)
        # Every other channel well above its ReLU's threshold, the others well below: no rounding switches one.
        beta = torch.where(torch.arange(inputs, device=device) % 3 == 1, -8.0, 8.0).to(acc)
        weight = random(outputs, *kernel, inputs, scale=math.prod((inputs, *kernel)) ** -0.5).movedim(-1, 1)
        return Conv(Norm(gamma, beta, 1e-5), weight)

    def features(images: Tensor) -> Features:
        return Features(as_rows(images), *torch.zeros(2, images.shape[1], dtype=acc, device=device))

    x = random(n, height, width, reads).movedim(-1, 1)
    X = empty_features((n, reads + k, height, width), dtype=dtype, device=device)
    Z = empty_features((n, wide, height, width), dtype=dtype, device=device)
    block, bottleneck = features(X), features(Z)
    layers = [Layer(reads, k, conv(reads, wide, 1, 1), conv(wide, k, 3, 3))]
    schedule.forward(create(x), x, layers, block, [bottleneck], given_moments=False)
    D = random(n * height * width, reads + k)
    gradient = LazyGradient(D, *torch.zeros(2, reads + k, dtype=acc, device=device))
    backend = create(X)
    gradients = schedule.backward(backend, gradient, layers, block, [bottleneck], first=0, recompute=True)
    resolved = backend.resolve(gradient[:reads], block[:reads])
    found = {"the output": X, "its mean": block.mean, "its variance": block.var, "the input's gradient": resolved}
    # But for the first beta: the second norm takes every shift of its input away, and there is nothing to compare.
    names = ("gamma1", "", "weight1", "gamma2", "beta2", "weight2")
    found |= {f"the gradient of {name}": tensor for name, tensor in zip(names, gradients[0], strict=True) if name}
    return {what: tensor for what, tensor in found.items() if tensor is not None}
