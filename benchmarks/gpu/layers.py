"""Where a step's time goes on the device, by kernel and layer, from the profiler; and whether it waits for the host."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdense.kernels.launch import LaunchConfig
from fastdense.triton_backend import TritonBackend

from ..compiled.launches import Launch, name_of
from ..compiled.report import traffic_of
from ..compiled.traffic import floor_seconds
from .machine import measured_rates
from .measure import synchronize
from .networks import BASE, DTYPE, OURS, REHEARSED_SIZE, SIZE, images, models, network
from .stage import Job
from .steps import Step

BATCHES = (64, 256)
OTHERS = 12  # kernels that are not ours, listed by name
NAME_CHARACTERS = 80


def measure(job: Job) -> None:
    """One traced step of torchvision's network and of ours, at each batch size."""
    for batch in BATCHES[: 1 if job.rehearsal else None]:
        for label in OURS[1:] if job.rehearsal else (BASE, *OURS):
            of = network(job, "densenet121")
            (model,) = models(of, [label], job).values()
            size = 2 if job.rehearsal else batch
            step = Step(model, *images(size, REHEARSED_SIZE if job.rehearsal else SIZE, job.device))
            name = f"{label}, batch {batch}"
            job.result[name] = _profile(step, job) | {"network": "densenet121", "batch": batch}
            step_seconds = job.earlier.get(f"batch{batch}", {}).get("rows", {}).get(f"{label}, eager", {}).get("step")
            if step_seconds is not None:
                job.result[name]["busy"] = job.result[name]["device_seconds"] / step_seconds["median"]
            job.save()


def _profile(step: Step, job: Job) -> dict[str, Any]:
    for _ in range(1 if job.rehearsal else 3):
        step()
    with noted() as launches:
        kernels = traced(step, job.device) if job.device.type == "cuda" else []
        if not kernels:  # a rehearsal: the launches stand for what would have been traced
            step()
            kernels = [{"name": launch.kernel.__name__, "seconds": 1e-6} for launch in launches]
    ours = {launch.kernel.__name__ for launch in launches}
    mine = [kernel for kernel in kernels if kernel["name"] in ours]
    others: Counter[str] = Counter()
    for kernel in kernels:
        if kernel["name"] not in ours:
            others[kernel["name"][:NAME_CHARACTERS]] += kernel["seconds"]
    return {
        "kernels": len(kernels),
        "device_seconds": sum(kernel["seconds"] for kernel in kernels),
        "ours_seconds": sum(kernel["seconds"] for kernel in mine),
        "matched": len(mine) == len(launches),
        "rows": list(_rows(launches, mine, job)) if len(mine) == len(launches) else [],
        "others": dict(others.most_common(OTHERS)),
    }


@contextmanager
def noted() -> Iterator[list[Launch]]:
    """The launches that are made within the ``with``, in order, without their tensors."""
    found: list[Launch] = []
    make = TritonBackend.launch

    def launch(self: TritonBackend, kernel: Any, programs: int, *arguments: Any, config: Any, **constants: Any) -> None:
        make(self, kernel, programs, *arguments, config=config, **constants)
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        plain = {name: "tensor" if isinstance(value, Tensor) else value for name, value in named.items()}
        found.append(Launch(kernel, programs, plain, config))

    TritonBackend.launch = launch  # type: ignore[method-assign]
    try:
        yield found
    finally:
        TritonBackend.launch = make  # type: ignore[method-assign]


def traced(step: Step, device: torch.device) -> list[dict[str, Any]]:
    """The kernels of one step in the order in which the device ran them, with their seconds."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step.launch()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kernels = sorted((event for event in events if event.get("cat") == "kernel"), key=lambda event: event["ts"])
    return [{"name": event["name"], "seconds": event["dur"] / 1e6} for event in kernels]


def _short(config: LaunchConfig) -> str:
    """Tile, warps and stages: ``128x64x128 w8 s3``."""
    return f"{config.block_m}x{config.block_c}x{config.block_k} w{config.num_warps} s{config.num_stages}"


def _rows(launches: list[Launch], kernels: list[dict[str, Any]], job: Job) -> Iterator[dict[str, Any]]:
    """Launches of one kernel and shape together: how often, seconds of one, floor of one."""
    rates = measured_rates(job, DTYPE)
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for launch, kernel in zip(launches, kernels, strict=True):
        moved, shape = traffic_of(launch, DTYPE.itemsize)
        row = rows.setdefault(
            (name_of(launch), *shape.items(), launch.programs),
            {"operation": name_of(launch), **shape, "programs": launch.programs, "times": 0, "seconds": 0.0,
             "config": _short(launch.config), "bytes": moved.bytes, "flops": moved.flops},
        )  # fmt: skip
        row["times"] += 1
        row["seconds"] += kernel["seconds"]
        if rates is not None:
            row["floor_seconds"] = floor_seconds(*moved, *rates)
    for row in rows.values():
        row["seconds"] /= row["times"]
        yield row
