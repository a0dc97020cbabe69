"""Where a step's time goes on the device, by kernel and layer, from the profiler; and whether it waits for the host."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from fastdense.backends.triton_backend import TritonBackend

from ..compiled.launches import Launch, name_of
from ..compiled.report import traffic_of
from ..compiled.traffic import floor_seconds
from .machine import measured_rates, synchronize
from .stage import Job
from .steps import BASE, DTYPE, OURS, Step, images, models, rehearsed

BATCHES = (64, 256)
OTHERS = 12  # kernels that are not ours, listed by name
NAME_CHARACTERS = 80


def measure(job: Job) -> None:
    """One traced step of torchvision's network and of ours, at each batch size."""
    for batch in BATCHES[: 1 if job.rehearsal else None]:
        for label in OURS[1:] if job.rehearsal else (BASE, *OURS):
            of, count, size = rehearsed(job, "densenet121", batch)
            (model,) = models(of, [label], job.device, rehearsal=job.rehearsal).values()
            found = _profile(Step(model, *images(count, size, job.device)), job)
            job.result[f"{label}, batch {batch}"] = found | {"network": "densenet121", "batch": batch}
            eager = job.earlier.get(f"batch{batch}", {}).get("rows", {}).get(f"{label}, eager", {}).get("step")
            if eager is not None:
                job.result[f"{label}, batch {batch}"]["busy"] = found["device_seconds"] / eager["median"]
            job.save()


def _profile(step: Step, job: Job) -> dict[str, Any]:
    for _ in range(1 if job.rehearsal else 3):
        step()
    with launches_noted() as launches:
        kernels = traced(step, job.device) if job.device.type == "cuda" else []
        if not kernels:  # a rehearsal: the launches stand for what would have been traced
            step()
            kernels = [(launch.kernel.__name__, 1e-6) for launch in launches]
    ours = {launch.kernel.__name__ for launch in launches}
    mine = [seconds for name, seconds in kernels if name in ours]
    others: dict[str, float] = {}
    for name, seconds in kernels:
        if name not in ours:
            others[name[:NAME_CHARACTERS]] = others.get(name[:NAME_CHARACTERS], 0.0) + seconds
    return {
        "kernels": len(kernels),
        "device_seconds": sum(seconds for _, seconds in kernels),
        "ours_seconds": sum(mine),
        "matched": len(mine) == len(launches),
        "rows": _rows(launches, mine, job) if len(mine) == len(launches) else [],
        "others": dict(sorted(others.items(), key=lambda pair: -pair[1])[:OTHERS]),
    }


@contextmanager
def launches_noted() -> Iterator[list[Launch]]:
    """The launches that are made within the ``with``, in order, without their tensors."""
    found: list[Launch] = []
    make = TritonBackend.launch

    def launch(self: TritonBackend, kernel: Any, programs: int, *arguments: Any, config: Any, **constants: Any) -> None:
        make(self, kernel, programs, *arguments, config=config, **constants)
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        plain = {name: "tensor" if isinstance(value, Tensor) else value for name, value in named.items()}
        found.append(Launch(kernel, programs, plain, config))

    with patch.object(TritonBackend, "launch", launch):
        yield found


def traced(step: Step, device: torch.device) -> list[tuple[str, float]]:
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
    return [(event["name"], event["dur"] / 1e6) for event in kernels]


def _rows(launches: list[Launch], kernels: list[float], job: Job) -> list[dict[str, Any]]:
    """Launches of one kernel and shape together: how often, seconds of one, floor of one."""
    rates = measured_rates(job)
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for launch, seconds in zip(launches, kernels, strict=True):
        moved, shape = traffic_of(launch, DTYPE.itemsize)
        tile = launch.config
        config = f"{tile.block_m}x{tile.block_c}x{tile.block_k} w{tile.num_warps} s{tile.num_stages}"
        row = rows.setdefault(
            (name_of(launch), *shape.items(), launch.programs),
            {"operation": name_of(launch), **shape, "programs": launch.programs, "times": 0, "seconds": 0.0,
             "config": config, "bytes": moved.bytes, "flops": moved.flops},
        )  # fmt: skip
        row["times"] += 1
        row["seconds"] += seconds
        if rates is not None:
            row["floor_seconds"] = floor_seconds(*moved, *rates)
    return [row | {"seconds": row["seconds"] / row["times"]} for row in rows.values()]
