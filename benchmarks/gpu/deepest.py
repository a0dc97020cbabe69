"""The deepest network and the largest batch that train within 12 GB, by ``benchmarks.depth``."""

from __future__ import annotations

from dataclasses import replace

from .. import depth
from .stage import Job

BUDGET = 12 * 10**9
SPARE_SECONDS = 8.0  # for the trial that runs when time is up


def measure(job: Job) -> None:
    """``benchmarks.depth.run`` within the stage's time; what it has not settled by then is a lower bound."""
    seconds = max(1.0, job.seconds_left() - SPARE_SECONDS)
    if job.rehearsal:
        quick = depth.Options.quick("cpu")
        options = replace(quick, budget=10**8, seconds=min(seconds, 5.0), providers=("fastdense-activations",))
    else:
        options = depth.Options(budget=BUDGET, device="cuda", seconds=seconds)

    job.result["said"] = []

    def say(line: str) -> None:
        job.result["said"].append(line)
        job.save()

    job.result |= depth.run(options, say)
