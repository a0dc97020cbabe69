"""How long Python and PyTorch take to prepare a training step's launches: what a GPU waits for at batch 1.

    python -m benchmarks.host [--model densenet121] [--json FILE]

Everything of a step runs, forward and backward, the operators' own bodies and the Triton host side included; only the
launches themselves are left out, and what Triton's launcher and the driver take for each comes on top. On tiny images
in the CPU's memory, so that PyTorch's own operators take little but the time to reach them, and in this thread's own
processor time, whatever else the machine does. It is the host's share of a step without CUDA graphs; with them it is
paid once.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fastdense
from fastdense import functional
from fastdense.backends import select
from fastdense.backends.triton_backend import TritonBackend
from fastdense.ops import bn_relu_pool, dense_block

from .compiled import SM_COUNT
from .runner import RESULTS, Timing, environment, interleave, write_record

FORWARD = (dense_block.dense_block, bn_relu_pool.bn_relu_pool)
BACKWARD = (dense_block.dense_block_backward, bn_relu_pool.bn_relu_pool_backward)
ARCH = 90
SIZE = 64  # pixels; the last block of a DenseNet needs two


class Spent:
    """Seconds inside some functions, and how many launches were prepared."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.launches: Counter[str] = Counter()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, whose time counts under ``name``."""

        def run(*arguments: Any, **named: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[name] += time.thread_time() - start

        return run


def silent(spent: Spent) -> type[TritonBackend]:
    """The Triton backend without its launches, which are counted."""

    class Silent(TritonBackend):
        """Prepares everything and launches nothing."""

        def __init__(self, x: Tensor) -> None:
            super().__init__(x)
            self.arch, self.sm_count = ARCH, SM_COUNT[ARCH]

        def launch(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
            """Count it."""
            spent.launches[kernel.__name__] += 1

    return Silent


@contextmanager
def host_side(spent: Spent | None = None) -> Iterator[Spent]:
    """The operators' own bodies on the Triton host side, without launches; for tensors without memory, too.

    Those (device ``meta``) let nothing through that waits for a value: they have none.
    """
    spent = Spent() if spent is None else spent
    backend = silent(spent)
    before: list[tuple[Any, str, Any]] = [(select, "create", select.create)]
    for name, operators in (("forward operators", FORWARD), ("backward operators", BACKWARD)):
        for operator in operators:
            before.append((operator, "_abstract_fn", operator._abstract_fn))
            before.append((operator, "_backend_fns", operator._backend_fns))
            body = spent.timed(name, operator._init_fn)
            vars(operator).update(_abstract_fn=body, _backend_fns=dict.fromkeys(operator._backend_fns, body))
    for module in (functional,):
        update: Any = vars(module)["update_running_statistics"]
        before.append((module, "update_running_statistics", update))
        vars(module)["update_running_statistics"] = spent.timed("running statistics", update)
    vars(select)["create"] = lambda name, x: backend(x)
    try:
        yield spent
    finally:
        for owner, attribute, value in before:
            vars(owner)[attribute] = value


def training_step(name: str) -> Callable[[Spent], Mapping[str, float]]:
    """One step of a float32 network (nothing is cast) on one image, forward and backward, channels last."""
    model = getattr(fastdense, name)().to(memory_format=torch.channels_last)
    x = torch.zeros(1, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    cotangent = torch.zeros(1, 1000)

    def step(spent: Spent) -> Mapping[str, float]:
        model.zero_grad(set_to_none=True)
        spent.seconds.clear()
        spent.launches.clear()
        start = time.thread_time()
        output = model(x)
        middle = time.thread_time()
        output.backward(cotangent)
        end = time.thread_time()
        inside = dict(spent.seconds)
        rest = end - start - sum(inside.values())
        return {"step": end - start, "forward": middle - start, "backward": end - middle, **inside, "the rest": rest}

    return step


def run(name: str, repeats: int) -> dict[str, Any]:
    """Time it; returns the record."""
    torch.set_num_threads(1)
    step = training_step(name)
    with host_side() as spent:
        seconds = interleave({name: lambda: step(spent)}, repeats=repeats, warmup=5)[name]
        launches = dict(spent.launches)
    settings = {"model": name, "batch": 1, "size": SIZE, "dtype": "float32", "layout": "channels_last"}
    total = sum(launches.values())
    timings = {phase: Timing.of(values) for phase, values in seconds.items()}
    each = (timings["forward operators"].median + timings["backward operators"].median) / total
    results = {"launches": launches, "seconds_per_launch": each, **timings}
    return {**environment(), "settings": {**settings, "arch": ARCH}, "results": results}


def profile(name: str, lines: int) -> None:
    """Where the time goes, by cProfile; its own cost makes small functions look larger than they are."""
    step = training_step(name)
    with host_side() as spent:
        step(spent)
        profiler = cProfile.Profile()
        profiler.enable()
        step(spent)
        profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(lines)


def show(record: dict[str, Any], console: Console) -> None:
    """The record as a table."""
    settings, results = record["settings"], record["results"]
    total = sum(results["launches"].values())
    title = f"{settings['model']}, one image: {total} launches"
    table = Table("", "ms", "p20 - p80", title=title)
    for phase, timing in results.items():
        if isinstance(timing, Timing):
            table.add_row(phase, f"{timing.median * 1e3:.2f}", f"{timing.p20 * 1e3:.2f} - {timing.p80 * 1e3:.2f}")
    table.add_row("in operators, a launch", f"{results['seconds_per_launch'] * 1e3:.4f}", "")
    console.print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="densenet121", choices=[f"densenet{n}" for n in (121, 161, 169, 201)])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--profile", type=int, metavar="LINES", help="print a profile of one step instead")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/cpu/host-MODEL.json")
    options = parser.parse_args()
    if options.profile:
        profile(options.model, options.profile)
        return
    console = Console()
    record = run(options.model, options.repeats)
    show(record, console)
    path = options.json or RESULTS / "cpu" / f"host-{options.model}.json"
    write_record(path, record)
    console.print(f"record: {path}")


if __name__ == "__main__":
    main()
