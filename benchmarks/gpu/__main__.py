"""Everything that only a GPU can tell, most important first, in two runs of five minutes.

    python -m benchmarks.gpu --ahead DIR                              on any machine: compile every kernel that is run
    python -m benchmarks.gpu --out DIR [--cache DIR] [--minutes 5]    right? how fast? which kernel to work on?
    python -m benchmarks.gpu --out DIR [--cache DIR] --again          what takes minutes: torch.compile, depth, ...

Stages run one after another, each within its own time limit; results are in DIR/gpu.json after each. One that fails,
crashes or hangs takes no other down. Nothing needs to be installed but PyTorch, Triton, torchvision, rich and, for the
tests, pytest and hypothesis. With ``--rehearse`` the same stages run on the CPU, and measure nothing.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

import torch

from ..roofline import bars_of_record, plot
from . import ahead
from .candidates import candidates
from .run import MINUTES, PICTURE, Run
from .stage import Stage
from .summary import summary

_HERE = "benchmarks.gpu"

STAGES = (
    Stage("environment", f"{_HERE}.machine:describe", 20, runs="both"),
    Stage("compile-batch8", f"{_HERE}.steps:compile_batch8", 200, runs="again", background=True),
    Stage("compile-batch64", f"{_HERE}.steps:compile_batch64", 200, runs="again", background=True),
    Stage("compile-batch256", f"{_HERE}.steps:compile_batch256", 200, runs="again", background=True),
    Stage("tests-again", f"{_HERE}.correct:gpu_tests", 110, runs="again", apart=True),
    Stage("rates", f"{_HERE}.machine:rates", 20, runs="both", timed=True),
    Stage("smoke", f"{_HERE}.correct:smoke", 45),
    Stage("check", f"{_HERE}.networks:check", 45, runs="both"),
    Stage("batch64", f"{_HERE}.steps:batch64", 40, timed=True),
    Stage("batch256", f"{_HERE}.steps:batch256", 45, timed=True),
    Stage("layers", f"{_HERE}.layers:measure", 30, timed=True),
    Stage("candidates", f"{_HERE}.candidates:measure", 75, timed=True),
    Stage("counters", f"{_HERE}.counters:measure", 45, timed=True, apart=True),
    Stage("tests", f"{_HERE}.correct:gpu_tests", 150, apart=True),
    Stage("compiled-batch64", f"{_HERE}.steps:compiled_batch64", 60, runs="again", timed=True),
    Stage("compiled-batch256", f"{_HERE}.steps:compiled_batch256", 60, runs="again", timed=True),
    Stage("compiled-batch8", f"{_HERE}.steps:compiled_batch8", 60, runs="again", timed=True),
    Stage("densenet201", f"{_HERE}.steps:densenet201", 45, runs="again", timed=True),
    Stage("batch1", f"{_HERE}.steps:batch1", 30, runs="again", timed=True),
    Stage("depth", f"{_HERE}.deepest:measure", 60, runs="again", timed=True, apart=True),
    Stage("sanitizer", f"{_HERE}.sanitize:check", 90, runs="again", timed=True, apart=True),
)


def main() -> None:
    """Command line; exits with 1 if a stage did not finish."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="folder for gpu.json, gpu.log and kernels.png")
    where.add_argument("--ahead", type=Path, metavar="DIR", help="compile all kernels, here and now, into a file there")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="of --ahead: what was compiled there")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="the longest that all stages may take together")
    parser.add_argument("--again", action="store_true", help="the second run: what takes minutes")
    parser.add_argument(
        "--stages", nargs="+", metavar="NAME", choices=[stage.name for stage in STAGES], help="only these, of both runs"
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="the same stages at tiny shapes on the CPU, in Triton's interpreter: they run, and measure nothing",
    )
    options = parser.parse_args()
    if options.ahead is not None:
        print(ahead.make(options.ahead, candidates=list(candidates())), flush=True)
        return
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA GPU here; --rehearse runs the same stages on the CPU and measures nothing")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that stopping the run stops its stages
    taken = None if options.cache is None else ahead.take(options.cache)
    run = Run(
        options.out,
        minutes=options.minutes,
        rehearsal=options.rehearse,
        say=lambda line: print(line, flush=True),
    )
    complete = run.run(chosen(options.stages, again=options.again))
    _picture(run)
    print(summary(run.stages), flush=True)
    if taken is not None:
        print(taken.report(), flush=True)
    sys.exit(not complete)


def chosen(names: list[str] | None, *, again: bool) -> list[Stage]:
    """The stages of one of the two runs, or those that are named."""
    if names is not None:
        return [stage for stage in STAGES if stage.name in names]
    return [stage for stage in STAGES if stage.runs in ("both", "again" if again else "first")]


def _picture(run: Run) -> None:
    """The kernels' times against their floors, where there are any and matplotlib is installed."""
    groups = bars_of_record({"stages": run.stages})
    if groups:
        try:
            plot(groups, run.out / PICTURE)
        except Exception as error:  # whatever a picture needs, the results are kept
            print(f"no picture: {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main()
