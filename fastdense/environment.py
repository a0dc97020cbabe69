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

    Raises:
        RuntimeError: it cannot run there.
        ValueError: the environment variable ``FASTDENSE_IMPL`` names no implementation.
    """
    wanted = checks.impl_name(impl)
    if wanted == "auto":
        return select.explain(device)
    name = wanted if wanted == "reference" else select.resolve(wanted, device)
    return name, f"FASTDENSE_IMPL is {wanted}" if impl == "auto" else "as asked for"


def _automatic(device: str) -> dict[str, str | None]:
    try:
        impl, reason = choose_impl("auto", torch.device(device))
    except (RuntimeError, ValueError) as error:
        return {"impl": None, "reason": str(error)}
    return {"impl": impl, "reason": reason}


def environment() -> dict[str, Any]:
    """Everything that ``fastdense env`` shows, ready for JSON.

    Returns:
        ``versions``: package to version, or ``None``. ``os``, ``cpu_threads``, and ``cuda``: the version that
        torch was built for, or ``None``. ``variables``: ``FASTDENSE_IMPL`` and ``TRITON_INTERPRET``, ``None``
        where not set. ``devices``: a list of ``{"device", "name", "impl", "reason"}`` (``impl`` is ``None``
        where nothing can run), for CUDA with ``"capability"`` and ``"memory_bytes"``.
    """
    cpu = {"device": "cpu", "name": platform.processor() or platform.machine(), **_automatic("cpu")}
    devices: list[dict[str, Any]] = [cpu]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
                **_automatic(f"cuda:{index}"),
            }
        )
    return {
        "versions": versions(),
        "os": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "variables": {name: os.environ.get(name) for name in ("FASTDENSE_IMPL", "TRITON_INTERPRET")},
        "devices": devices,
    }
