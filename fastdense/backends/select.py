"""Which backend serves a tensor, and why; and the self-test that the kernels pass before ``impl="auto"`` takes them."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..core import schedule
from ..core.features import Features, LazyGradient, accumulation_dtype, as_rows, empty_features
from ..core.primitives import Backend, Conv, Layer, Norm
from ..core.warn import say_once, while_tracing
from .torch_backend import TorchBackend

MIN_CAPABILITY = (8, 0)
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Relative 2-norm, some roundings (float32 may multiply in TF32): a right kernel is off by one, a wrong one by far more.
TOLERANCE = {torch.float32: 1e-2, torch.float16: 1e-2, torch.bfloat16: 8e-2}
# Images: on a GPU several tiles a program, and as many programs as it takes.
SIZES = {"cpu": (2, 13, 11), "cuda": (2, 199, 193)}


@lru_cache(maxsize=1)
def _broken_triton() -> str | None:
    """Why the kernels cannot be imported; ``None`` if they can."""
    try:
        importlib.import_module("fastdense.backends.triton_backend")
    except Exception as error:  # a broken installation may raise anything
        return (
            f"Triton cannot be used ({type(error).__name__}: {error}): install it with `pip install 'triton>=3.6'`, "
            "or use impl='torch'"
        )
    return None


def triton_unsupported_reason(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why the Triton kernels cannot run on ``device`` (on features of ``dtype``), with the remedy.

    ``None`` if they can: on a CUDA GPU of compute capability 8.0 or newer, and on the CPU under ``TRITON_INTERPRET=1``.
    """
    if dtype is not None and dtype not in TRITON_DTYPES:
        return f"the Triton kernels take float16, bfloat16 and float32, not {dtype}: use impl='auto' or impl='torch'"
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "the Triton kernels are written for NVIDIA GPUs: use impl='auto' or impl='torch'"
        capability = torch.cuda.get_device_capability(device)
        if capability < MIN_CAPABILITY:
            return (
                f"the GPU has compute capability {capability[0]}.{capability[1]} and the Triton kernels need "
                f"{MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}: use impl='auto' or impl='torch'"
            )
    elif device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        return (
            "the Triton kernels need a CUDA GPU of compute capability 8.0 or newer: use impl='auto' or impl='torch' "
            "(or, to check kernels on the CPU, set TRITON_INTERPRET=1 before Triton is imported)"
        )
    return _broken_triton()


def explain(device: torch.device | str, dtype: torch.dtype | None = None) -> tuple[str, str]:
    """What ``impl="auto"`` takes on ``device`` (for features of ``dtype``), and the reason.

    Returns:
        ``(name, reason)``, for instance ``("torch", "the Triton kernels need a CUDA GPU ...")``.
    """
    device = torch.device(device)
    unsupported = triton_unsupported_reason(device, dtype)
    if unsupported is not None:
        return "torch", unsupported
    if device.type != "cuda":
        return "torch", "Triton's interpreter is for checking kernels: ask for it with impl='triton'"
    major, minor = torch.cuda.get_device_capability(device)
    return (
        "triton",
        f"a CUDA GPU of compute capability {major}.{minor}; the kernels are tried on it before their first use",
    )


def resolve(impl: str, device: torch.device, dtype: torch.dtype | None = None) -> str:
    """The backend's name for ``impl`` (``"auto"``, ``"triton"`` or ``"torch"``) on ``device``.

    Warns once, under ``"auto"``, if only a missing or broken Triton keeps a GPU from running the kernels. Whether they
    do what they should on this very device is for the self-test to say, see :func:`backend_for`.

    Raises:
        RuntimeError: for ``impl="triton"`` where the kernels cannot run, with the reason and the remedy.
    """
    if impl == "auto":
        name, reason = explain(device, dtype)
        if name == "torch" and device.type == "cuda" and reason == _broken_triton():
            say_once(f"fastdense runs in plain PyTorch on this GPU: {reason}")
        return name
    if impl == "triton" and (unsupported := triton_unsupported_reason(device, dtype)) is not None:
        raise RuntimeError(f"impl='triton' cannot run on device {str(device)!r}: {unsupported}")
    return impl


@while_tracing
def backend_for(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """As :func:`resolve`; ``"auto"`` takes the kernels only where a self-test on this very device has passed."""
    name = resolve(impl, device, dtype)
    if impl != "auto" or name != "triton" or is_in_torch_dispatch_mode() or _is_capturing(device):
        return name  # under a mode (fake tensors, a counter) the self-test would run something else
    if (reason := self_test_failure(name, device, dtype)) is not None:
        say_once(f"fastdense runs in plain PyTorch (slower): {reason}; please report it")
        return "torch"
    return name


def may_query(device: torch.device) -> bool:
    """Whether the device may be asked something: not while a compiler traces or a CUDA graph is captured."""
    return not (torch.compiler.is_compiling() or _is_capturing(device))


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def create(name: str, x: Tensor) -> Backend:
    """The backend ``name`` for one call on a block whose features have ``x``'s batch, space, dtype and device."""
    if name == "triton":
        from .triton_backend import TritonBackend  # importing it needs Triton

        return TritonBackend(x)
    assert name == "torch", name
    return TorchBackend(x)


@lru_cache(maxsize=64)
def self_test_failure(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the backend ``name`` should not be used on ``device`` for ``dtype``; ``None`` if it does what it should.

    One small layer, forward and backward, against float64: a compiler, a driver or a GPU that the kernels have not met
    may make something else of them. It runs once for each device and dtype, takes a few compilations (which are kept on
    disk), and asks nothing of the random generator.
    """
    try:
        with torch.no_grad():
            got = layer_results(lambda x: create(name, x), device, dtype)
            want = layer_results(lambda x: create("torch", x), device, torch.float64)
    except torch.OutOfMemoryError:  # says nothing of the kernels, and is not remembered
        raise
    except Exception as error:  # whatever a compiler or a driver raises
        return f"a self-test of its kernels on {device} in {dtype} failed with {type(error).__name__}: {error}"
    for what, truth in want.items():
        off = (got[what].double().reshape(truth.shape) - truth).norm().item() / truth.norm().item()
        if not off <= TOLERANCE[dtype]:  # nor if it is NaN
            return f"in a self-test of its kernels on {device} in {dtype}, {what} was off by {off:.1e}"
    return None


def layer_results(create: Callable[[Tensor], Backend], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
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
