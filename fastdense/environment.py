"""What is installed, which devices there are, and what would run on them."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import fastdense

from .backends import select
from .core import checks

__all__ = ["choose_impl", "environment", "versions"]


def _version(package: str) -> str | None:
    # By metadata: importing takes seconds, and torchvision cannot be imported beside every build of torch.
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Versions of fastdense, Python and what fastdense runs on; ``None`` for what is not installed."""
    return {
        "fastdense": fastdense.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "torchvision": _version("torchvision"),
    }


def choose_impl(impl: str, device: torch.device) -> tuple[str, str]:
    """What ``impl`` means on ``device``, and why: an option, a variable, or what the device can do.

    ``RuntimeError`` if it cannot run there, ``ValueError`` if the variable ``FASTDENSE_IMPL`` names no implementation.
    """
    wanted = checks.impl_name(impl)
    if wanted == "auto":
        return select.explain(device)
    name = wanted if wanted == "reference" else select.resolve(wanted, device)
    return name, f"FASTDENSE_IMPL is {wanted}" if impl == "auto" else "as asked for"


def _device(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {"device": device, "name": platform.processor() or platform.machine()}
    if device != "cpu":
        properties = torch.cuda.get_device_properties(device)
        found["name"] = properties.name
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["memory_bytes"] = properties.total_memory
    try:
        found["impl"], found["reason"] = choose_impl("auto", torch.device(device))
    except (RuntimeError, ValueError) as error:
        found |= {"impl": None, "reason": str(error)}
    return found


def environment() -> dict[str, Any]:
    """Everything that ``fastdense env`` shows, ready for JSON.

    Returns:
        ``versions``: package to version, or ``None``. ``os``, ``cpu_threads``, and ``cuda``: the version that
        torch was built for, or ``None``. ``variables``: ``FASTDENSE_IMPL`` and ``TRITON_INTERPRET``, ``None``
        where not set. ``devices``: a list of ``{"device", "name", "impl", "reason"}`` (``impl`` is ``None``
        where nothing can run), for CUDA with ``"capability"`` and ``"memory_bytes"``.
    """
    return {
        "versions": versions(),
        "os": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "variables": {name: os.environ.get(name) for name in ("FASTDENSE_IMPL", "TRITON_INTERPRET")},
        "devices": [_device(name) for name in ("cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())))],
    }
