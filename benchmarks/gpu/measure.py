"""Timing on the device, and what a check compares."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..harness.runner import Timing, query_gpu

STATE = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
SLOWED_BY = "clocks_event_reasons.active"  # older drivers do not know it, and a query with an unknown field fails

# Relative 2-norm against the same arithmetic in fp32: a few roundings of operands and results.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def device_timing(function: Callable[[], Any], device: torch.device, *, warmup: int = 10, repeat: int = 50) -> Timing:
    """Seconds that ``function`` takes on the device, its inputs not in the cache.

    Gaps between launches count where the host cannot keep ahead of the device: compare with ``host_seconds``.

    Args:
        function: queues work, without waiting for it.
        device: where to. On the CPU, a single run stands in for a measurement.
        warmup, repeat: milliseconds to spend.
    """
    if device.type != "cuda":
        return Timing.of([host_seconds(function, device)])
    from triton.testing import do_bench  # needs a GPU's driver

    milliseconds = do_bench(function, warmup=warmup, rep=repeat, return_mode="all")
    return Timing.of([value / 1e3 for value in milliseconds])


def host_seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the host's time for one call, if the device does not make it wait."""
    repeats = 20 if device.type == "cuda" else 1
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    seconds = (time.perf_counter() - start) / repeats
    synchronize(device)
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def state(device: torch.device) -> dict[str, str]:
    """Clocks, temperature and power as they are; read, never set. A slow card shows here."""
    return query_gpu(*STATE) | query_gpu(SLOWED_BY) if device.type == "cuda" else {}


def relative_error(got: Tensor, want: Tensor) -> float:
    """``||got - want|| / ||want||`` in float64; NaN anywhere is NaN, and no tolerance admits it."""
    difference = (got.double() - want.double().view(got.shape)).norm()
    scale = want.double().norm()
    return (difference / scale if scale > 0 else difference).item()
