"""Which backend serves a tensor, and why."""

from __future__ import annotations

import torch
from torch import Tensor

from .primitives import Backend
from .torch_backend import TorchBackend


def triton_obstacle(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on ``device``; ``None`` if they can."""
    del device  # the kernels' needs (a CUDA GPU of capability 8.0, or the interpreter) come with the kernels
    return "this version of fastdense has no Triton kernels yet"


def explain(device: torch.device | str) -> tuple[str, str]:
    """What ``impl="auto"`` takes on ``device``, and the reason.

    Returns:
        ``(name, reason)``, for instance ``("torch", "this version of fastdense has no Triton kernels yet")``.
    """
    obstacle = triton_obstacle(torch.device(device))
    return ("triton", "a GPU that the Triton kernels support") if obstacle is None else ("torch", obstacle)


def resolve(impl: str, device: torch.device) -> str:
    """The backend's name for ``impl`` (``"auto"``, ``"triton"`` or ``"torch"``) on ``device``.

    Raises:
        RuntimeError: for ``impl="triton"`` where the kernels cannot run, with the reason and the remedy.
    """
    if impl == "auto":
        return explain(device)[0]
    if impl == "triton" and (obstacle := triton_obstacle(device)) is not None:
        raise RuntimeError(
            f"impl='triton' cannot run on device {str(device)!r}: {obstacle}; use impl='auto' or impl='torch'"
        )
    return impl


def create(name: str, x: Tensor) -> Backend:
    """The backend ``name`` for one call on a block whose features have ``x``'s batch, space, dtype and device."""
    assert name == "torch", name
    return TorchBackend(x)
