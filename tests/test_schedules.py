"""The counts of other schedules against numbers counted by hand, the compile report, and the page that shows them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kernels, schedules, traffic
from benchmarks.schedules import Block, Pass, Tile, elements, loops, seconds, slots

ROOT = Path(__file__).parents[1]

# Reads 16, 24 and 32 channels, leaves 40.
SMALL = Block(pixels=1, entering=16, layers=3, k=8, bottleneck=32)
CONV3X3 = 3 * (32 + 8), 3 * (2 * 32 + 2 * 8)  # forward, backward


def test_elements_of_groups_counted_by_hand() -> None:
    assert elements(schedules.forward(SMALL)) == (16 + 24 + 32) + 3 * 32 + CONV3X3[0]
    # two layers read 16 channels, write a Z and a sum in fp32; 8 channels and the sum in, a Z out; one layer alone
    assert elements(schedules.forward(SMALL, 2)) == (16 + 32 + 64) + (8 + 64 + 32) + (32 + 32) + CONV3X3[0]
    assert elements(schedules.forward(SMALL, 2, on_chip=True)) == (16 + 32) + (8 + 32) + (32 + 32) + CONV3X3[0]

    assert elements(schedules.backward(SMALL)) == 3 * (16 + 24 + 32) + 3 * 2 * 32 + CONV3X3[1]
    # one layer alone; 8 channels with D in and out, dZ lazily in and out; 16 channels for both, a dZ and a lazy one
    assert elements(schedules.backward(SMALL, 2)) == (96 + 64) + (24 + 96) + (48 + 32 + 64) + CONV3X3[1]
    assert elements(schedules.backward(SMALL, 3)) == (24 + 96) + (48 + 96) + (48 + 2 * 32 + 64) + CONV3X3[1]


@pytest.mark.parametrize("g", [2, 4, 8])
@pytest.mark.parametrize("C", [64, 512, 1024])
def test_what_a_group_saves(g: int, C: int) -> None:
    """Forward ``(g - 1)*(C_s - 4B)``, on chip ``(g - 1)*C_s``, backward ``(g - 1)*(3*C_s - 2B)`` elements a pixel."""
    block = Block(1, C, g)
    today = elements(schedules.forward(block))
    assert today - elements(schedules.forward(block, g)) == (g - 1) * (C - 4 * 128)
    assert today - elements(schedules.forward(block, g, on_chip=True)) == (g - 1) * C
    assert elements(schedules.backward(block)) - elements(schedules.backward(block, g)) == (g - 1) * (3 * C - 2 * 128)


@pytest.mark.parametrize("name", schedules.SHOWN)
def test_todays_schedule_is_that_of_the_traffic_model(name: str) -> None:
    found = sum(
        b.pixels * elements(schedules.forward(b) + schedules.backward(b)) for b in schedules.network_blocks(name)
    )
    one, two = (traffic.network_traffic(traffic.NETWORKS[name], batch, 224, 2).bytes for batch in (1, 2))
    assert 2 * (found + schedules.outside(name, training=True)) == two - one


def test_instructions_give_the_times_of_the_compile_report() -> None:
    """The same loops and tiles: 160 to 128 channels, 64 images of 56 x 56 pixels."""
    rows: list[dict[str, Any]] = json.loads(kernels.RECORD.read_text())
    block, m = Block(1, 160, 1), 64 * 56 * 56
    passes = [*schedules.forward(block), *schedules.backward(block)]
    names = ("bn_relu_conv 1x1", "bn_relu_conv 3x3", "bn_relu_conv_backward 1x1", "bn_relu_conv_backward 3x3")
    for part, name in zip(passes, names, strict=True):
        (row,) = (
            row for row in rows
            if (row["kernel"], row["arch"], row["dtype"], row["growth_rate"]) == (name, 90, "bf16", 32)
            and row["shape"]["m"] == m
        )  # fmt: skip
        assert part.issuing * m * 1e6 == pytest.approx(row["modelled_issue_us"], rel=2e-3), name
        assert part.moving * m * 1e6 == pytest.approx(row["modelled_h100_floor_us"], rel=5e-3), name


def test_instructions_of_groups_counted_by_hand() -> None:
    at, block = loops(), Block(1, 128, 2)  # reads 2 and 3 tiles of channels, 32 of them in the group: half a tile
    spatial = sum(part.slots for part in schedules.forward(block) if part.name == "3x3")
    first = (at.forward_tile + 2 * at.forward_step) + (at.bare_tile + 2 * at.forward_step)
    again = at.forward_tile + at.forward_step
    assert slots(schedules.forward(block, 2)) - spatial == pytest.approx((first + again) / 16)
    again -= at.bare_tile
    assert slots(schedules.forward(block, 2, on_chip=True)) - spatial == pytest.approx((first + again) / 16)

    spatial = sum(part.slots for part in schedules.backward(block) if part.name == "3x3")
    assert slots(schedules.backward(block)) - spatial == pytest.approx((2 + 3) * at.backward_tile / 8)
    grouped = at.backward_tile + 2 * (at.backward_tile + at.plain_tile)
    assert slots(schedules.backward(block, 2)) - spatial == pytest.approx(grouped / 8)
    pair = schedules.backward(block, 2, tile=at.pair_tile)
    assert slots(pair) - spatial == pytest.approx((grouped + 2 * (at.pair_tile - at.plain_tile)) / 8)


def test_a_gradient_is_written_out_only_where_that_is_faster() -> None:
    narrow, wide = Block(1, 64, 1), Block(1, 1024, 1)
    assert schedules.backward(narrow, written_out=True) == schedules.backward(narrow)
    today, written = schedules.backward(wide), schedules.backward(wide, written_out=True)
    assert seconds(written) < seconds(today)
    # D_Z and Z in and dZ out by one launch, dZ in by the next
    assert elements(written) - elements(today) == 2 * 128
    pair = Block(1, 1024, 2)
    more = elements(schedules.backward(pair, 2, written_out=True)) - elements(schedules.backward(pair, 2))
    assert more == 2 * 128  # of the group's first layer; the other's is written out anyway


def test_pulled_gradients_counted_by_hand() -> None:
    # H_0, H_1, H_2 have 3, 2 and 1 readers; X, the gradient from outside and D of each; every dZ is written out
    pulls = (3 * 16 + 3 * 32) + (3 * 8 + 2 * 32) + (3 * 8 + 32)
    assert elements(schedules.pulled(SMALL)) == pulls + 3 * 96 + CONV3X3[1]
    weights = (16 + 24 + 32) + 3 * 32
    assert elements(schedules.pulled(SMALL, weights_apart=True)) == pulls + weights + 3 * 96 + CONV3X3[1]
    at = loops()
    spatial = sum(part.slots for part in schedules.backward(SMALL) if part.name == "3x3")
    tiles = 3 * 16 + 2 * 8 + 8  # channels times readers
    assert slots(schedules.pulled(SMALL)) - spatial == pytest.approx(tiles * at.pull_tile / 64 / 8)
    apart = tiles * at.pull_data / 64 + 3 * at.pull_weight
    assert slots(schedules.pulled(SMALL, weights_apart=True)) - spatial == pytest.approx(apart / 8)


def test_tiles_counted_by_hand() -> None:
    square = Tile(14, 14)
    assert square.rows == 16 * 16
    assert square.work(56) == 4 * 4 * 256 / 56**2
    assert square.registers_bytes(128) == 256 * 128 * 4
    assert square.shared_bytes(128, 32) == 256 * 128 * 2 + 9 * 32 * 128 * 2
    assert Tile(8, 8).rows == 128  # 10 x 10
    assert Tile(14, 16).rows == Tile(16, 14).rows == 512  # 16 x 18 are more than 256
    assert Tile(8, 8).work(7) == 128 / 49


def test_fused_inference_counted_by_hand() -> None:
    at, block, tile = loops(), Block(56 * 56, 64, 2), Tile(6, 14)
    assert elements(schedules.separate(block)) == (64 + 96) + 2 * (2 * 128 + 32)
    ones = 2 * at.bare_tile + (1 + 2) * at.forward_step
    spatial = 2 * (at.bare_spatial_tile + 6 * at.spatial_step)
    assert slots(schedules.separate(block)) == pytest.approx(ones * 8 / 128 + spatial * 4 / 62)
    assert elements(schedules.fused(block, tile)) == (64 + 32) + (96 + 32)
    programs = 10 * 4  # rows of 6 and columns of 14 pixels, each 128 rows of the product
    for shifts, rest in ((True, at.fused_tile), (False, at.unshifted_tile)):
        issued = (2 * rest + 3 * at.fused_step) * 8 * programs / 56**2
        assert slots(schedules.fused(block, tile, shifts=shifts)) == pytest.approx(issued)
    assert schedules.fused_flops(block, tile) == programs * 128 / 56**2


def test_outside_of_an_inference_pass_counted_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(traffic.NETWORKS, "small", traffic.Network(32, (1, 1), 64))
    stem = (3 * 1024 + 64 * 256) + (64 * 256 + 64 * 64)
    blocks = (2 * 64 * 64 + 64 * 96) + (16 * 48) + (2 * 16 * 48 + 16 * 80)  # copy, next reader; transition's output
    assert schedules.outside("small", training=False, size=32) == stem + blocks


def test_a_pass_takes_the_slower_of_moving_and_issuing() -> None:
    assert Pass("", 1.5e12, 0).seconds == 1.0
    assert Pass("", 1.5e12, 2 * schedules.ISSUE_RATE).seconds == 2.0
    assert seconds([Pass("", 1.5e12), Pass("", 0, schedules.ISSUE_RATE)]) == 2.0


def test_other_growth_rates_are_refused() -> None:
    with pytest.raises(ValueError, match="densenet161"):
        schedules.network_blocks("densenet161")


def test_what_fits_the_cache() -> None:
    """Block 4 of densenet121 at batch 256: the last layers' X, D, Z and D_Z, ``2*(C_l + 128)`` channels, do not."""
    row = next(line for line in schedules.cache_table().splitlines() if "densenet121, block 4 | 256" in line)
    fitting = sum(2 * 256 * 49 * 2 * (512 + 32 * l + 128) <= 50e6 for l in range(16))
    assert row.split(" | ")[2:] == ["26", "3", "16 of 16", f"{fitting} of 16 |"] and 0 < fitting < 16


def test_the_page_shows_what_is_counted() -> None:
    text = schedules.PAGE.read_text()
    assert all(f"<!-- counted: {name} -->" in text for name in schedules.TABLES)
    assert schedules.render(text) == text
    changed = text.replace("| densenet201, 8 |", "| densenet201, 9 |")
    assert changed != text and schedules.render(changed) == text


@pytest.mark.slow
def test_variants_compile_to_the_instructions_that_are_counted() -> None:
    """In a process of its own: here the kernels are interpreted."""
    triton = pytest.importorskip("triton")
    if (triton.__version__, kernels.sources_digest()) != schedules.COUNTED:
        pytest.skip("other kernels, or another compiler, than those that were counted")
    code = """
import torch
from benchmarks.compiled import Case, compile_launch, plan
launches = [l for l in plan(Case(32, 160, 64, (56, 56), torch.bfloat16), 90) if "KH" in l.arguments]
ones, spatial, _, backward = launches
plain = {"LAZY": False}
alone = plain | {"HAS_INTO": False}
for launch, changes in ((backward, plain), (backward, alone), (backward, alone | {"NEEDS_WEIGHT": False}),
                        (backward, alone | {"NEEDS_DY": False}), (ones, {"HAS_MOMENTS": False}),
                        (spatial, {"HAS_MOMENTS": False})):
    print(compile_launch(launch._replace(arguments=launch.arguments | changes), 90).loops[0][0])
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    at = loops()
    want = [at.plain_tile, at.pull_tile, at.pull_data, at.pull_weight, at.bare_tile, at.bare_spatial_tile]
    assert [int(word) for word in done.stdout.split()] == want, done.stderr
