"""Importing fastdense is cheap, and needs neither Triton nor a GPU."""

from __future__ import annotations

from helpers.processes import compiled

PROGRAM = """
import sys

class Missing:
    asked = []

    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {"triton", "torchvision", "timm", "rich", "typer", "sklearn", "matplotlib"}:
            Missing.asked.append(name)
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing)
import torch
Missing.asked.clear()
import fastdense, fastdense.kernels
print(len(Missing.asked), *Missing.asked)
sys.meta_path.remove(Missing)
sys.modules["triton"] = None
block = fastdense.DenseBlock(2, 4, 4, 4)
block(torch.randn(2, 4, 5, 5)).square().sum().backward()
print(block["denselayer1"].conv1.weight.grad is not None, fastdense.backends.explain("cpu")[0])
"""


def test_import_asks_for_nothing_optional_and_training_works_without_triton() -> None:
    assert compiled(PROGRAM).splitlines() == ["0", "True torch"]
