"""Stages that end in every way a stage can end."""

import math
import os
import signal
import subprocess
import sys
import time

import torch

from benchmarks.gpu import run
from benchmarks.gpu.run import Job, Skip


def finish(job: Job) -> None:
    job.result |= {"earlier": sorted(job.earlier), "process": os.getpid(), "not finite": [math.nan, math.inf]}
    print("printed by a stage")


def fail(job: Job) -> None:
    job.result["saved"] = 1
    raise ValueError("this stage fails")


def run_out_of_memory(job: Job) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 TiB.")


def crash(job: Job) -> None:
    job.result["saved"] = 2
    job.save()
    print("the last thing that it said", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


def break_the_device(job: Job) -> None:
    def release(device: torch.device) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    run.release = release


def exit_early(job: Job) -> None:
    os._exit(0)


def hang(job: Job) -> None:
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    job.result["helper"] = helper.pid
    job.save()
    time.sleep(600)


def cannot_run_here(job: Job) -> None:
    raise Skip("no such tool")
