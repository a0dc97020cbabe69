"""What a GPU would compile, asked of one that computes nothing, in processes of their own."""

import json
from pathlib import Path

import pytest
import torch
from helpers.processes import compiled

from benchmarks.gpu import fake

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or fake.COMPILER is None, reason="needs a C compiler, and no GPU beside the fake one"
)

STEPS = """
import json, sys
import torch
from triton import knobs
from benchmarks.gpu import ahead, fake
from benchmarks.gpu.steps import OURS

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
AHEAD = """
import sys
from functools import partial
from pathlib import Path
from benchmarks.compiled import traffic
from benchmarks.gpu import ahead, fake
from benchmarks.gpu.primitives import Case
from triton import knobs

case = Case("forward 1x1", traffic.Shape(4096, 64, 32, 1, 2), 4, 96)
folder = Path(sys.argv[1])
assert ahead.make(folder, [partial(ahead.launched, case, [{}])], lambda line: None, processes=1) == []
assert [path.name for path in folder.iterdir()] == ["triton-cache.tar.xz"]
report = ahead.take(folder)  # into another cache, as on another machine; this process has compiled nothing yet
fake.install()
hits = []
knobs.compilation.listener = lambda **event: hits.append(event["cache_hit"])
ahead.launched(case, [{}])
print(report(), hits)
"""


def test_a_step_compiles_few_kernels_and_other_sizes_none() -> None:
    """Neither the last batch of an epoch, nor another size of the images, nor more layers."""
    asked = [("densenet121", *one) for one in ((64, 224), (63, 224), (41, 256))]
    said = compiled(STEPS, json.dumps([*asked, ("densenet201", 64, 224)])).splitlines()
    (first, _), *others = [[int(number) for number in line.split()] for line in said]
    assert 10 < first <= 24, said
    assert [new for _, new in others[:-1]] == [0] * 2 and others[-1][1] <= 1, said  # a wider transition


def test_what_is_compiled_ahead_is_found_on_another_machine(tmp_path: Path) -> None:
    assert compiled(AHEAD, tmp_path) == "cache: 1 kernels brought along, 0 compiled after all [True]\n"
