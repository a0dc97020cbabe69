"""The traffic model against the kernels' own loads and stores, and the report that compares floors with times."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.interpreter import accesses_counted

from benchmarks import roofline
from benchmarks.compiled import traffic
from benchmarks.gpu.primitives import Case, Primitive
from benchmarks.harness import runner
from benchmarks.harness.options import Options
from benchmarks.harness.providers import MODELS, PROVIDERS, NetworkSpec

CPU = torch.device("cpu")
needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="counts what Triton's interpreter does")

# Beside feature maps and weights, a launch moves some vectors of a number a channel: at 2 x 16^2 pixels a share that
# counts, at a network's size none. A 3x3's weight gradient is as large here as its features, and is left behind by each
# of two programs, to be added up.
MOVED, MOVED_3X3_BACKWARD = 1.15, 1.45
# All accesses, those that a cache answers with them: a tap reads its neighbours' pixels, a window its neighbours'.
ACCESSED, ACCESSED_3X3 = 2.3, 5.0


def case(operation: str, dims: int = 2) -> Case:
    m = 2 * (8**3 if dims == 3 else 16**2)
    reads, writes, taps, width = 24, 24, 1, 24
    if operation.endswith("3x3"):
        reads, writes, taps, width = 32, 8, 9, 40
    elif operation.endswith("1x1"):
        writes, width = 32, 40
    elif operation in traffic.TRANSITION:
        writes = 16
    elif operation in (traffic.COPY, traffic.RESOLVE):
        width = 40
    return Case(operation, traffic.Shape(m, reads, writes, taps, 2), 2, width, dims)


CASES = [case(o) for o in (traffic.COPY, *traffic.FORWARD, *traffic.BACKWARD, *traffic.AROUND)]
CASES += [case(o, dims=3) for o in traffic.TRANSITION]


@needs_interpreter
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operation} {case.dims}D")
def test_a_floor_is_what_the_kernels_move_at_least_and_nearly_that(case: Case) -> None:
    torch.manual_seed(0)
    primitive = Primitive(case, torch.float16, CPU)
    with accesses_counted() as found:
        primitive()
    floor = case.floor.bytes
    moved, accessed = sum(one.moved for one in found), sum(one.accessed for one in found)
    spatial, backward = case.shape.taps > 1, case.operation == traffic.BACKWARD[1]
    assert floor <= moved <= floor * (MOVED_3X3_BACKWARD if backward else MOVED), (moved / floor, found)
    assert moved <= accessed <= floor * (ACCESSED_3X3 if spatial else ACCESSED), (accessed / floor, found)
    # The features are read whole, and no channel of the buffer beside them.
    shape = case.shape
    pixels = shape.m * (2**case.dims if case.operation in traffic.TRANSITION else 1)
    for one in found:
        name = "v_ptr" if case.operation == traffic.RESOLVE else "x_ptr"
        assert one.kernel == "reduce_kernel" or one.loaded[name] == pixels * shape.reads * shape.itemsize, one


@needs_interpreter
def test_of_the_stems_pooling_each_kernel_has_its_floor() -> None:
    backward = case(traffic.MAX_POOL[1])
    primitive = Primitive(backward, torch.float16, CPU)
    with accesses_counted() as found:
        primitive()
    pixels = backward.shape.m
    windows = backward.shape._replace(m=pixels // traffic.WINDOW)
    floors = (traffic.floor(kernel, windows, pixels) for kernel in ("arg-max", "max pool backward"))
    for one, floor in zip(found, floors, strict=True):
        assert floor.bytes <= one.moved <= floor.bytes * MOVED, one


@needs_interpreter
def test_a_load_of_what_a_launch_has_stored_is_no_traffic() -> None:
    primitive = Primitive(case(traffic.FORWARD[0]), torch.float16, CPU)
    with accesses_counted() as found:
        primitive()
    (one,) = found
    assert "out_ptr" not in one.loaded  # the moments are those of the stored values
    assert one.stored["out_ptr"] == 512 * 32 * 2
    assert one.accessed >= one.moved + one.stored["out_ptr"]


@needs_interpreter
def test_the_gradient_that_is_added_to_is_read_and_written() -> None:
    primitive = Primitive(case(traffic.BACKWARD[0]), torch.float16, CPU)
    with accesses_counted() as found:
        primitive()
    assert found[0].loaded["D_ptr"] == found[0].stored["D_ptr"] == 512 * 24 * 2


def stage_record(rehearsal: bool = False) -> dict[str, Any]:
    """As ``benchmarks.gpu`` writes it, with made-up times: each kernel takes twice its floor, a copy four times."""
    rows = []
    for row in roofline.floors((3e12, 8e14), traffic.NETWORKS["densenet121"], 64, 224, 2):
        slower = 4 if row["operation"] == traffic.COPY else 2
        rows.append({**row, "seconds": slower * row["floor_seconds"]})
    environment = {"device": "Imaginary GPU", "rehearsal": rehearsal}
    rows.append({"operation": "reduce", "elements": 64, "times": 3, "seconds": 2e-9, "floor_seconds": 1e-9})
    profiles = {f"fastdense, batch {batch}": {"network": "densenet121", "rows": rows} for batch in (64, 256)}
    profiles["torchvision, batch 64"] = {"network": "densenet121", "rows": []}
    return {"stages": {"layers": {"status": "ok", "environment": environment, "result": profiles}}}


def test_bars_are_a_steps_sums_and_fractions() -> None:
    groups = roofline.bars_of_record(stage_record())
    assert len(groups) == 2 and all("Imaginary GPU" in title and "modelled floor" in title for title in groups)
    group = next(iter(groups.values()))
    assert [bar.measured for bar in group] == sorted((bar.measured for bar in group), reverse=True)
    assert all(bar.fraction == pytest.approx(0.25 if bar.operation == traffic.COPY else 0.5) for bar in group)
    network = traffic.NETWORKS["densenet121"]
    total = traffic.network_floor_seconds(network, 64, 224, 2, 3e12, 8e14)
    assert sum(bar.floor for bar in group) == pytest.approx(total + 3e-9)
    of_layers = sum(bar.times for bar in group if bar.operation in (*traffic.FORWARD, *traffic.BACKWARD))
    assert of_layers == 4 * sum(network.layers)


def test_a_rehearsals_picture_says_so() -> None:
    assert all("REHEARSAL" in title for title in roofline.bars_of_record(stage_record(rehearsal=True)))


def test_the_picture_of_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, picture = tmp_path / "gpu.json", tmp_path / "kernels.png"
    record.write_text(json.dumps(stage_record()))
    roofline.main(["--record", str(record), "--plot", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    assert "50%" in capsys.readouterr().out
    record.write_text(json.dumps({"stages": {}}))
    with pytest.raises(SystemExit):
        roofline.main(["--record", str(record)])


def test_on_the_cpu_kernels_have_floors_and_a_step_that_is_right_a_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(traffic.NETWORKS, "densenet121", traffic.Network(8, (1, 1), 16))
    monkeypatch.setitem(MODELS, "densenet121", NetworkSpec(8, (1, 1), 16, 1000))
    monkeypatch.setattr(roofline, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(roofline, "MATMUL_SIZE", 64)
    options = Options(batch=2, size=32, repeats=2, threads=2)
    record = roofline.run(options)
    assert record["step"]["checked"] and record["step"]["fraction_of_floor"] > 0
    assert record["modelled"]["images_per_second"] == pytest.approx(2 / record["modelled"]["floor_seconds"])
    assert all("seconds" not in row and row["floor_seconds"] > 0 for row in record["modelled"]["kernels"])
    from rich.console import Console

    roofline.show(record, Console(width=140))
    shown = capsys.readouterr().out
    assert "not measured" in shown and "floor, modelled" in shown
    json.dumps(runner.plain(record))

    right = PROVIDERS["fastdense-activations"]

    def wrong(spec: NetworkSpec) -> torch.nn.Module:
        model = right.network(spec)
        model.register_forward_pre_hook(lambda module, arguments: (arguments[0].flip(0),))
        return model

    monkeypatch.setitem(PROVIDERS, right.name, replace(right, network=wrong))
    record = roofline.run(options)
    assert not record["step"]["checked"] and "step" not in record["step"]
    roofline.show(record, Console(width=140))
    assert "not timed" in capsys.readouterr().out
