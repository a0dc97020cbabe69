"""Importing fastdense is cheap, and needs neither Triton nor a GPU."""

from __future__ import annotations

from helpers.processes import compiled


def test_import_and_training_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch, fastdense, fastdense.kernels
block = fastdense.DenseBlock(2, 4, 4, 4)
block(torch.randn(2, 4, 5, 5)).square().sum().backward()
print(block["denselayer1"].conv1.weight.grad is not None, fastdense.backends.explain("cpu")[0])
"""
    assert compiled(code).split() == ["True", "torch"]


def test_import_brings_in_nothing_heavy() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import fastdense
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(new & {"triton", "torchvision", "timm", "rich", "typer", "sklearn", "matplotlib"}))
"""
    assert compiled(code).split() == []
