"""Importing fastdense is cheap, and needs neither Triton nor a GPU."""

from __future__ import annotations

import subprocess
import sys


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_takes_less_than_a_third_of_a_second_beyond_torch() -> None:
    code = "import time, torch; t = time.perf_counter(); import fastdense; print(time.perf_counter() - t)"
    assert min(float(_python(code)) for _ in range(5)) < 0.3


def test_import_and_training_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch, fastdense, fastdense.kernels
block = fastdense.DenseBlock(2, 4, 4, 4)
block(torch.randn(2, 4, 5, 5)).square().sum().backward()
print(block["denselayer1"].conv1.weight.grad is not None, fastdense.backends.explain("cpu")[0])
"""
    assert _python(code).split() == ["True", "torch"]


def test_import_brings_in_nothing_heavy() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import fastdense
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(new & {"triton", "torchvision", "timm", "rich", "typer", "sklearn", "matplotlib"}))
"""
    assert _python(code).split() == []
