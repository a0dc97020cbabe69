"""What machine this is, and how fast it copies and multiplies: the two rates that every floor is computed from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..harness.runner import query_gpu
from .measure import device_timing, state
from .stage import Job

FIELDS = ("name", "driver_version", "pcie.link.gen.current", "memory.total", "power.limit", "persistence_mode")
CLOCKS = ("clocks.max.sm", "clocks.max.mem", "clocks.current.sm", "clocks.current.memory")
VARIABLES = ("CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "FASTDENSE_IMPL", "TRITON_INTERPRET", "OMP_NUM_THREADS")

COPY_BYTES = 1 << 30  # read once and written once: twenty times the largest cache there is
MATMUL_SIZE = 8192


def describe(job: Job) -> None:
    """The environment: device, versions, clocks."""
    from fastdense.environment import environment

    job.result |= {"fastdense": environment(), "variables": {name: os.environ.get(name) for name in VARIABLES}}
    job.result["cpus"] = len(os.sched_getaffinity(0))
    if job.rehearsal:
        return
    job.result["gpu"] = query_gpu(*FIELDS, *CLOCKS)
    properties = torch.cuda.get_device_properties(job.device)
    free, total = torch.cuda.mem_get_info(job.device)
    job.result["properties"] = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cache_bytes": properties.L2_cache_size,
        "memory_bytes": total,
        "free_bytes": free,
    }
    job.result["torch"] = torch.__config__.show()


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """fp32 products in TF32, or exact."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def rates(job: Job) -> None:
    """Bytes a second of a copy (read and written), operations a second of a matrix product, on random data."""
    job.result["before"] = state(job.device)
    job.result["copy"] = _copy_rate(1 << 20 if job.rehearsal else COPY_BYTES, job.device)
    job.save()
    size = 32 if job.rehearsal else MATMUL_SIZE
    for label, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16), ("tf32", torch.float32)):
        with tf32(label == "tf32"):
            job.result[label] = _matmul_rate(size, dtype, job.device)
        job.save()
    job.result["after"] = state(job.device)


def _copy_rate(size: int, device: torch.device) -> dict[str, Any]:
    values = torch.randn(size // 2, device=device).to(torch.bfloat16)
    target = torch.empty_like(values)
    timing = device_timing(lambda: target.copy_(values), device, repeat=100)
    return {"per_second": 2 * size / timing.median, "bytes": 2 * size, "timing": timing}


def _matmul_rate(size: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    timing = device_timing(lambda: torch.mm(a, b, out=out), device, repeat=100)
    return {"per_second": 2 * size**3 / timing.median, "size": size, "timing": timing}


def measured_rates(job: Job, dtype: torch.dtype) -> tuple[float, float] | None:
    """Copy and matmul rate for floors, if the stage that measures them has finished."""
    found = job.earlier.get("rates")
    if found is None:
        return None
    label = "tf32" if dtype == torch.float32 else str(dtype).removeprefix("torch.")
    return found["copy"]["per_second"], found[label]["per_second"]
