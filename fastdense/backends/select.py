"""Which backend serves a tensor, and why."""

from __future__ import annotations

import importlib
import os
import warnings
from functools import lru_cache

import torch
from torch import Tensor

from ..core.primitives import Backend
from .torch_backend import TorchBackend

MIN_CAPABILITY = (8, 0)
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_obstacle(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
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
    elif device.type != "cpu" or not _interpreted():
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
    obstacle = triton_obstacle(device, dtype)
    if obstacle is not None:
        return "torch", obstacle
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
    do what they should on this very device is for :mod:`fastdense.backends.self_test` to say.

    Raises:
        RuntimeError: for ``impl="triton"`` where the kernels cannot run, with the reason and the remedy.
    """
    if impl == "auto":
        name, reason = explain(device, dtype)
        if name == "torch" and device.type == "cuda" and reason == _broken_triton():
            _warn_once(reason)
        return name
    if impl == "triton" and (obstacle := triton_obstacle(device, dtype)) is not None:
        raise RuntimeError(f"impl='triton' cannot run on device {str(device)!r}: {obstacle}")
    return impl


@lru_cache(maxsize=1)
def _warn_once(reason: str) -> None:
    warnings.warn(f"fastdense runs in plain PyTorch on this GPU: {reason}", UserWarning, stacklevel=4)


def create(name: str, x: Tensor) -> Backend:
    """The backend ``name`` for one call on a block whose features have ``x``'s batch, space, dtype and device."""
    if name == "triton":
        from .triton_backend import TritonBackend  # importing it needs Triton

        return TritonBackend(x)
    assert name == "torch", name
    return TorchBackend(x)
