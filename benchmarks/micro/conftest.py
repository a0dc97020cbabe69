"""Options of the suite, and what its record holds beside pytest-benchmark's own statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.harness.runner import environment


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    """Tiny tensors, one thread: what is timed is Python's and PyTorch's way to the work."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Without the machine's name, and of the processor what does not change from run to run."""
    for name in ("node", "python_build", "python_compiler", "release"):
        del machine_info[name]
    machine_info["cpu"] = {name: machine_info["cpu"].get(name) for name in ("arch", "brand_raw", "count")}
    machine_info["torch"] = torch.__version__


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Without every round's time and the branch, and with the fields that each record of this project carries."""
    for name in ("project", "branch", "author_time"):
        output_json["commit_info"].pop(name, None)
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
    output_json |= {**environment(), "threads": 1}
