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
import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch

from ..roofline import bars_of_record, plot
from . import ahead, checks, kernels, machine, steps
from .run import MINUTES, PICTURE, Run, Stage, brief
from .summary import summary

STAGES = (
    Stage("environment", machine.describe, 20, runs="both"),
    *(Stage(name, steps.compile_ahead, 200, runs="again", background=True) for name in steps.COMPILATIONS),
    Stage("tests-again", checks.gpu_tests, 110, runs="again", apart=True),
    Stage("rates", machine.rates, 20, runs="both", timed=True),
    Stage("smoke", checks.smoke, 45),
    Stage("check", checks.networks, 45, runs="both"),
    Stage("batch64", steps.compare, 40, timed=True),
    Stage("batch256", steps.compare, 45, timed=True),
    Stage("layers", steps.profile_layers, 30, timed=True),
    Stage("candidates", kernels.candidates, 75, timed=True),
    Stage("counters", kernels.counters, 45, timed=True, apart=True),
    Stage("tests", checks.gpu_tests, 150, apart=True),
    Stage("compiled-batch64", steps.compare, 60, runs="again", timed=True),
    Stage("compiled-batch256", steps.compare, 60, runs="again", timed=True),
    Stage("compiled-batch8", steps.compare, 60, runs="again", timed=True),
    Stage("densenet201", steps.compare, 45, runs="again", timed=True),
    Stage("batch1", steps.compare, 30, runs="again", timed=True),
    Stage("depth", steps.deepest, 60, runs="again", timed=True, apart=True),
    Stage("sanitizer", kernels.sanitizer, 90, runs="again", timed=True, apart=True),
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
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stages", nargs="+", metavar="NAME", choices=names, help="only these, of both runs")
    rehearse = "the same stages at tiny shapes on the CPU, in Triton's interpreter: they run, and measure nothing"
    parser.add_argument("--rehearse", action="store_true", help=rehearse)
    options = parser.parse_args()
    say = partial(print, flush=True)
    if options.ahead is not None:
        ahead.make(options.ahead, ahead.everything(), say)
        return
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA GPU here; --rehearse runs the same stages on the CPU and measures nothing")
    os.environ.pop("TRITON_INTERPRET", None)
    if options.rehearse:  # in the processes that stages run in
        os.environ["TRITON_INTERPRET"] = "1"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that stopping the run stops its stages
    report = None if options.cache is None else ahead.take(options.cache)
    run = Run(options.out, minutes=options.minutes, rehearsal=options.rehearse, say=say)
    complete = run.run(chosen(options.stages, again=options.again))
    try:
        if groups := bars_of_record({"stages": run.stages}):
            plot(groups, run.out / PICTURE)
    except Exception as error:  # whatever a picture needs, the results are there without it
        say(f"no picture: {brief(error)}")
    say(summary(run.stages))
    if report is not None:
        say(report())
    sys.exit(not complete)


def chosen(names: list[str] | None, *, again: bool) -> list[Stage]:
    """The stages of one of the two runs, or those that are named."""
    runs = ("both", "again" if again else "first")
    return [stage for stage in STAGES if (stage.runs in runs if names is None else stage.name in names)]


if __name__ == "__main__":
    main()
