"""What a GPU would compile, asked of one that computes nothing, in processes of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import compiled

from benchmarks.gpu import fake

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or fake.COMPILER is None, reason="needs a C compiler, and no GPU beside the fake one"
)

BEGIN = """
import json, sys
from functools import partial
from pathlib import Path
import torch
from benchmarks.compiled import traffic
from benchmarks.gpu import ahead, fake
from benchmarks.gpu.steps import OURS
from benchmarks.gpu.primitives import Case

CASE = Case("forward 1x1", traffic.Shape(4096, 64, 32, 1, 2), 4, 96)
"""
STEPS = """
from triton import knobs

fake.install()
found, known = set(), set()

def note(*, fn, compile, **_):
    found.add((fn.name, compile["specialization_data"]))
    return True  # Triton does without

knobs.runtime.jit_cache_hook = note
for name, batch, size in json.loads(sys.argv[1]):
    found.clear()
    ahead.network_step(OURS[0], name, batch, size, torch.bfloat16)
    print(len(found), len(found - known))
    known |= found
"""
MAKE = """
if __name__ == "__main__":
    work = [partial(ahead.launched, CASE, [{}])]
    print(len(ahead.make(Path(sys.argv[1]), work, lambda line: None, processes=1)))
"""
TAKE = """
from triton import knobs

report = ahead.take(Path(sys.argv[1]))
fake.install()
hits = []
knobs.compilation.listener = lambda **event: hits.append(event["cache_hit"])
ahead.launched(CASE, [{}])
assert report() == "cache: 1 kernels brought along, 0 compiled after all", report()
print(sum(hits), len(hits))
"""


def run(code: str, *arguments: Any) -> list[list[int]]:
    """The numbers that a program prints, line by line."""
    return [[int(number) for number in line.split()] for line in compiled(BEGIN + code, *arguments).splitlines()]


def test_a_step_compiles_few_kernels_and_other_sizes_none() -> None:
    """Neither the last batch of an epoch, nor another size of the images, nor more layers."""
    first, *others = [
        ("densenet121", 64, 224), ("densenet121", 63, 224), ("densenet121", 64, 192), ("densenet121", 250, 224),
        ("densenet121", 41, 256), ("densenet201", 64, 224),
    ]  # fmt: skip
    counts = run(STEPS, json.dumps([first, *others]))
    assert 10 < counts[0][0] <= 24, counts
    assert [new for _, new in counts[1:-1]] == [0] * (len(others) - 1), counts
    assert counts[-1][1] <= 1, counts  # a wider transition


def test_what_is_compiled_ahead_is_found_on_another_machine(tmp_path: Path) -> None:
    assert run(MAKE, tmp_path) == [[0]]
    assert [path.name for path in tmp_path.iterdir()] == ["triton-cache.tar.xz"]
    assert run(TAKE, tmp_path) == [[1, 1]]
