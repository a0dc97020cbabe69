"""A provider's training step: built, checked, its bytes counted, timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastdense.memory import peak_bytes, saved_bytes

from .options import DTYPES, LAYOUTS, Options
from .providers import BASE, PROVIDERS, REFERENCE, NetworkSpec, Provider, Unavailable

SEED = 0
TOLERANCE = 1e-9  # relative 2-norm of output and all gradients together, in float64
CHECKED_PIXELS = 1 << 18  # a check takes the timed shape while its batch has no more, so that nothing compiles twice
SMALL_CHECK = (2, 64)


@contextmanager
def arithmetic(dtype: str, device: torch.device) -> Iterator[None]:
    """``fp32`` and ``tf32`` as they say, ``fp16`` and ``bf16`` under autocast."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = dtype == "tf32"
    low = DTYPES[dtype].itemsize == 2
    try:
        with torch.autocast(device.type, DTYPES[dtype] if low else torch.bfloat16, enabled=low):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def build(provider: Provider, spec: NetworkSpec, options: Options) -> nn.Module:
    """The provider's network on the device, in the layout, with the weights that all have."""
    provider.require(options.torch_device)
    torch.manual_seed(SEED)
    model: Any = provider.build(spec)
    return model.to(options.torch_device, memory_format=LAYOUTS[options.layout])


def images(batch: int, size: int, classes: int, options: Options) -> tuple[Tensor, Tensor]:
    """Random images in the layout, and a random cotangent of the class scores."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(batch, 3, size, size, generator=generator).contiguous(memory_format=LAYOUTS[options.layout])
    cotangent = torch.randn(batch, classes, generator=generator)
    return x.to(options.torch_device), cotangent.to(options.torch_device)


class Step:
    """Forward, backward from a fixed random cotangent, and SGD with momentum, whose learning rate is 0."""

    def __init__(self, model: nn.Module, x: Tensor, cotangent: Tensor, dtype: str) -> None:
        self.model, self.x, self.cotangent, self.dtype = model, x, cotangent, dtype
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, nesterov=True)

    def forward(self) -> Tensor:
        with arithmetic(self.dtype, self.x.device):
            return self.model(self.x)

    def backward(self, scores: Tensor) -> None:
        scores.backward(self.cotangent.to(scores.dtype))

    def __call__(self) -> Mapping[str, float]:
        """Seconds by phase on the device, and of the whole step until the device has finished."""
        wait = partial(torch.cuda.synchronize, self.x.device) if self.x.is_cuda else lambda: None
        wait()
        start = time.perf_counter()
        marks = [self._mark()]
        scores = self.forward()
        marks.append(self._mark())
        self.backward(scores)
        marks.append(self._mark())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        marks.append(self._mark())
        wait()
        total = time.perf_counter() - start
        if self.x.is_cuda:
            marks = [marks[0].elapsed_time(mark) / 1e3 for mark in marks]
        phases = zip(("forward", "backward", "optimizer"), marks, marks[1:], strict=False)
        return {name: second - first for name, first, second in phases} | {"step": total}

    def _mark(self) -> Any:
        if not self.x.is_cuda:
            return time.perf_counter()
        return torch.cuda.current_stream(self.x.device).record_event(torch.cuda.Event(enable_timing=True))


def count_bytes(step: Step) -> dict[str, int]:
    """Bytes of one training step, without parameters, their gradients, the images, and the optimizer.

    ``bytes_kept`` is what the forward pass saves for backward; ``bytes_peak`` the most that there is at one time.
    """
    model, x = step.model, step.x
    model.zero_grad(set_to_none=True)
    with saved_bytes(model, x) as saved:
        scores = step.forward()
    if x.is_cuda:  # its counter cannot leave gradients out: they exist before
        step.backward(scores)
    del scores
    with peak_bytes(x.device) as peak:
        step.backward(step.forward())
    found = {"bytes_kept": saved.bytes, "bytes_peak": peak.bytes if x.is_cuda else peak.without(model)}
    model.zero_grad(set_to_none=True)
    return found


class Check:
    """Whether a provider computes what torchvision does: output and all gradients of one step.

    What is plain PyTorch must agree in float64, where rounding hides nothing. What is compiled, and kernels that know
    no float64, are held against float64 in float32 and in the arithmetic that is timed, and may be off by little more
    than torchvision itself: a value within a rounding of 0 switches a ReLU, and everything after it.
    """

    def __init__(self, spec: NetworkSpec, batch: int, size: int, options: Options) -> None:
        self.spec, self.options = spec, options
        small = batch * size**2 <= CHECKED_PIXELS
        self.batch, self.size = (batch, size) if small else SMALL_CHECK
        self.base = REFERENCE if PROVIDERS[BASE].unsupported_reason(options.torch_device) else PROVIDERS[BASE]
        self.limits = {"float64": TOLERANCE}  # of the relative difference, by arithmetic
        self.truth = self._outcome(self.base, "float64")

    def __call__(self, provider: Provider) -> dict[str, Any]:
        """``checked``, and ``relative_difference`` in the arithmetic of the check."""
        if provider.name == BASE:
            return {"relative_difference": 0.0, "checked": True}
        errors: dict[str, float] = {}
        for dtype in ["float64"] if provider.exact else ["fp32", self.options.dtype]:
            if dtype not in self.limits:
                self.limits[dtype] = (4 if dtype == "fp32" else 1.3) * self._error(self.base, dtype) + 1e-2
            errors[dtype] = self._error(provider, dtype)
        right = all(error <= self.limits[dtype] for dtype, error in errors.items())
        return {"relative_difference": next(iter(errors.values())), "checked": right}

    def _outcome(self, provider: Provider, dtype: str) -> Tensor:
        model = build(provider, self.spec, self.options)
        x, cotangent = images(self.batch, self.size, self.spec.num_classes, self.options)
        if dtype == "float64":
            model, x, dtype = model.double(), x.double(), "fp32"
        step = Step(model, x, cotangent, dtype)
        scores = step.forward()
        step.backward(scores)
        found = [scores.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        return torch.cat([tensor.double().flatten() for tensor in found])

    def _error(self, provider: Provider, dtype: str) -> float:
        outcome = self._outcome(provider, dtype)
        return ((outcome - self.truth).norm() / self.truth.norm()).item()  # NaN, which no tolerance admits, stays


def attempt(device: torch.device, action: Callable[..., Mapping[str, Any]], *arguments: Any) -> dict[str, Any]:
    """``action(*arguments)``, or why a provider could not do it: the others' results stay."""
    try:
        return dict(action(*arguments))
    except Unavailable as reason:
        return {"unavailable": str(reason)}
    except Exception as error:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"}
