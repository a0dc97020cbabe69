"""What machine this is, and how fast it copies and multiplies: the two rates behind every floor."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdense.environment import environment

from ..harness.runner import Timing, query_gpu
from ..harness.training import arithmetic
from .run import Job

FIELDS = ("power.limit", "clocks.max.sm", "clocks.max.mem", "clocks.current.sm", "clocks.current.memory")
VARIABLES = ("CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "FASTDENSE_IMPL", "TRITON_INTERPRET", "OMP_NUM_THREADS")

COPY_BYTES = 1 << 31  # half of them read and half written: twenty times the largest cache there is
MATMUL_SIZE = 8192


def describe(job: Job) -> None:
    """Records the environment: device, versions, clocks, variables."""
    variables = {name: os.environ.get(name) for name in VARIABLES}
    job.result |= {"fastdense": environment(), "variables": variables, "cpus": len(os.sched_getaffinity(0))}
    job.result |= {"torch": torch.__config__.show(), "gpu": {} if job.rehearsal else query_gpu(*FIELDS)}


def rates(job: Job) -> None:
    """Measures bytes a second of a copy (read and written), operations a second of a matrix product, on random data."""
    moved, size = (1 << 21, 32) if job.rehearsal else (COPY_BYTES, MATMUL_SIZE)

    def measure(name: str, function: Callable[[], Any], amount: int, **of: int) -> None:
        timing = device_timing(function, job.device)
        job.result[name] = {"per_second": amount / timing.median, **of, "timing": timing}
        job.save()

    values = torch.randn(moved // 4, device=job.device).to(torch.bfloat16)
    measure("copy", partial(torch.empty_like(values).copy_, values), moved, bytes=moved)
    for label, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16), ("tf32", torch.float32)):
        a, b, out = torch.randn(3, size, size, device=job.device).to(dtype)
        with arithmetic("tf32", job.device):
            measure(label, partial(torch.mm, a, b, out=out), 2 * size**3, size=size)


def measured_rates(job: Job) -> tuple[float, float] | None:
    """Returns the rates of a copy and of bfloat16's matrix product, if the stage that measures them has finished."""
    found = job.earlier.get("rates")
    return None if found is None else (found["copy"]["per_second"], found["bfloat16"]["per_second"])


def name_of(dtype: torch.dtype) -> str:
    """Returns ``"bfloat16"`` and the like."""
    return str(dtype).removeprefix("torch.")


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_timing(function: Callable[[], Any], device: torch.device) -> Timing:
    """Measures ``function`` on the device, its inputs not in the cache; on the CPU, for a rehearsal, once."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return Timing.of([time.perf_counter() - start])
    from triton.testing import do_bench  # needs a GPU's driver

    return Timing.of([ms / 1e3 for ms in do_bench(function, warmup=10, rep=100, return_mode="all")])


def relative_error(got: Tensor, want: Tensor) -> float:
    """Returns ``||got - want|| / ||want||`` in float64; NaN anywhere is NaN, and no tolerance admits it."""
    difference = (got.double() - want.double().view(got.shape)).norm()
    scale = want.double().norm()
    return (difference / scale if scale > 0 else difference).item()
