"""Programs fill the device, wave by wave, and share all rows; what a launch is compiled for stays as batches shrink."""

from itertools import product

import pytest
import torch
from helpers.processes import compiled
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.compiled import waves
from benchmarks.compiled.launches import SM_COUNT
from benchmarks.compiled.traffic import NETWORKS, blocks
from fastdense.kernels import launch
from fastdense.kernels.launch import LaunchConfig, Shape, Work

BF16 = torch.bfloat16
WORK = st.builds(
    Work,
    tiles=st.integers(1, 2**24),
    columns=st.sampled_from([1, 2, 3, 5, 30, 90, 500]),
    cost=st.sampled_from([1, 3, 4096]),
    at_least=st.sampled_from([1, 4]),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(places=st.sampled_from([2, 108, 132, 264, 1056]), kinds=st.lists(WORK, min_size=1, max_size=2))
def test_programs_share_every_tile_and_stay_bounded(places: int, kinds: list[Work]) -> None:
    splits = launch.share(places, *kinds)
    for kind, (programs, each) in zip(kinds, splits, strict=True):
        assert (programs - 1) * each < kind.tiles <= programs * each  # all tiles, and no program is idle
        assert each >= min(kind.at_least, kind.tiles)
    columns = sum(kind.columns for kind in kinds)
    assert sum(k.columns * split.programs for k, split in zip(kinds, splits, strict=True)) <= max(2 * places, columns)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(tiles=st.integers(1, 10**5), columns=st.integers(1, 40), places=st.sampled_from([108, 132, 264]))
def test_no_other_split_is_modelled_faster_in_one_wave(tiles: int, columns: int, places: int) -> None:
    """Against every number of tiles a program with which all programs fit at once."""
    work = Work(tiles, columns)
    best = min(each for each in range(1, tiles + 1) if -(-tiles // each) * columns <= places)
    ((programs, each),) = launch.share(places, work)
    assert -(-programs * columns // places) * (each + 1) <= best + 1


def test_two_kinds_of_programs_share_a_wave_by_their_work() -> None:
    heavy, light = Work(1000, 1, cost=9), Work(1000, 1, cost=3)
    (some, long), (few, short) = launch.share(132, heavy, light)
    assert some + few <= 132 and abs(long * 9 - short * 3) <= 9
    assert launch.share(132, Work(90, 80)) == ((3, 30),), "two waves of 240 programs are sooner through than one of 80"


@pytest.mark.parametrize("arch", [80, 90, 100], ids="sm_{}".format)
@pytest.mark.parametrize("network", ["densenet121", "densenet201"])
@pytest.mark.parametrize("batch", [64, 256], ids="batch {}".format)
def test_the_last_wave_is_never_nearly_empty(network: str, batch: int, arch: int) -> None:
    for fit in waves.fits(arch, network, batch):
        last = fit.waves % 1 or 1.0
        assert fit.waves <= 1 or last >= 0.65, fit
        assert fit.waves <= 2, fit
        if fit.side * fit.side * batch > 64 * 7 * 7:  # one image row of tiles and less: there are not enough
            assert fit.filled >= 0.65, fit


COMPILED_FOR = """
import torch
from benchmarks.compiled.launches import Case, identity, plan, plan_around

def code(k, reads, batch, side, planned=plan):
    return {identity(one) for one in planned(Case(k, reads, batch, (side, side), torch.bfloat16), 90)}

for k, batch, side in [(k, *size) for k in (12, 32) for size in %s]:
    for planned in (plan, plan_around):
        assert code(k, 160, batch - 1, side, planned) <= code(k, 160, batch, side, planned), (k, batch, side)
layers = [{one for one in code(32, reads, 64, 56) if one[0].startswith("bn_relu_conv")} for reads in (64, 96, 160)]
assert layers[0] == layers[1] == layers[2]
assert code(32, 160, 64, 56) != code(32, 160, 64, 7)
print("same code")
"""


def test_the_last_batch_of_an_epoch_and_the_next_layer_compile_nothing() -> None:
    """In a process of its own: here the kernels are interpreted, and nothing is specialised."""
    sizes = [(64, 56), (64, 28), (64, 14), (64, 7), (256, 7), (128, 8), (64, 32)]
    assert compiled(COMPILED_FOR % sizes).split() == ["same", "code"]


def test_tiles_stay_the_same_as_a_batch_shrinks_by_an_image_and_small_maps_fill_the_device() -> None:
    for name, batch in product(("densenet121", "densenet161"), (32, 64, 256)):
        network = NETWORKS[name]
        for both in zip(blocks(network, batch, 224), blocks(network, batch - 1, 224), strict=True):
            for writes, taps in ((4 * network.growth_rate, 1), (network.growth_rate, 9)):
                shapes = (Shape(block.m, block.entering, writes, taps) for block in both)
                assert len({launch.choose("bn_relu_conv", shape, BF16, 90, SM_COUNT[90]) for shape in shapes}) == 1
    for side, block_k in ((56, 128), (7, 32)):
        chosen = launch.choose("bn_relu_conv", Shape(64 * side**2, 512, 128, 1), BF16, 90, 132)
        assert (chosen.block_m, chosen.block_k) == (64, block_k)


def test_a_changed_tile_is_not_believed_to_fit_as_often() -> None:
    shape = Shape(64, 64, 64, 1)
    with launch.override("copy", num_warps=8):
        assert launch.configuration("copy", shape, BF16, 90, 132).resident == 1
    assert LaunchConfig(64, 64, 64, num_warps=2).resident == 4
