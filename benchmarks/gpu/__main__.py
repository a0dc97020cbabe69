"""Everything that only a GPU can tell, most important first.

    python -m benchmarks.gpu --out DIR [--minutes 9] [--stages NAME ...] [--again] [--rehearse]

Stages run one after another, each in its own process with its own time limit; results are in DIR/gpu.json after each.
What has finished is not run again into the same folder, on the same machine and code, unless ``--again`` asks for it.
Nothing needs to be installed but PyTorch, Triton, torchvision, rich and, for the tests, pytest and hypothesis.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

import torch

from ..roofline import bars_of_record, plot
from .run import MINUTES, PICTURE, Run
from .stage import Stage
from .summary import summary

_HERE = "benchmarks.gpu"

# Seconds of a run of nine minutes. Each is what a stage may take at the most; most take less, which later ones get.
STAGES = (
    Stage("environment", f"{_HERE}.machine:describe", 40),
    Stage("compile-ahead", f"{_HERE}.steps:compile_ahead", 200, background=True),
    Stage("kernels-ahead", f"{_HERE}.steps:kernels_ahead", 200, background=True),
    Stage("smoke", f"{_HERE}.correct:smoke", 80, deterministic=True),
    Stage("gpu-tests", f"{_HERE}.correct:gpu_tests", 60, deterministic=True),
    Stage("kernel-tests", f"{_HERE}.correct:kernel_tests", 120, deterministic=True),
    Stage("rates", f"{_HERE}.machine:rates", 40, timed=True),
    Stage("kernels", f"{_HERE}.kernels:measure", 90, timed=True),
    Stage("densenet121-batch64", f"{_HERE}.steps:densenet121_batch64", 90, timed=True),
    Stage("densenet121-batch256", f"{_HERE}.steps:densenet121_batch256", 90, timed=True),
    Stage("host", f"{_HERE}.steps:host", 60, timed=True),
    Stage("depth", f"{_HERE}.deepest:measure", 75, timed=True),
    Stage("graphs", f"{_HERE}.graphs:measure", 75, timed=True),
    Stage("densenet201-batch64", f"{_HERE}.steps:densenet201_batch64", 90, timed=True),
    Stage("candidates", f"{_HERE}.kernels:candidates", 60, timed=True),
    Stage("sanitizer", f"{_HERE}.sanitize:check", 90, timed=True),  # slow, and alone on the GPU
)


def main() -> None:
    """Command line; exits with 1 if a stage did not finish."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for gpu.json, gpu.log and kernels.png; continued if there"
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="the longest that all stages may take together")
    parser.add_argument(
        "--stages", nargs="+", metavar="NAME", choices=[stage.name for stage in STAGES], help="only these"
    )
    parser.add_argument("--again", action="store_true", help="run finished stages again, too")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="the same stages at tiny shapes on the CPU, in Triton's interpreter: they run, and measure nothing",
    )
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA GPU here; --rehearse runs the same stages on the CPU and measures nothing")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that stopping the run stops its stages
    run = Run(
        options.out,
        minutes=options.minutes,
        rehearsal=options.rehearse,
        again=options.again,
        say=lambda line: print(line, flush=True),
    )
    complete = run.run([stage for stage in STAGES if options.stages is None or stage.name in options.stages])
    _picture(run)
    print(summary(run.stages), flush=True)
    sys.exit(not complete)


def _picture(run: Run) -> None:
    """The kernels' times against their floors, where there are any and matplotlib is installed."""
    groups = bars_of_record({"stages": run.stages})
    if groups:
        try:
            plot(groups, run.out / PICTURE)
        except Exception as error:  # whatever a picture needs, the figures are kept
            print(f"no picture: {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main()
