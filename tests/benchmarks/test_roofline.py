"""The traffic model against the kernels' own loads and stores, and the report that compares floors with times."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.interpreter import Accesses, accesses_counted
from rich.console import Console

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
    reads, writes, taps, width = {"1x1": (24, 32, 1, 40), "3x3": (32, 8, 9, 40)}.get(operation[-3:], (24, 24, 1, 24))
    if operation in traffic.TRANSITION:
        writes = 16
    elif operation in (traffic.COPY, traffic.RESOLVE):
        width = 40
    m = 2 * (8**3 if dims == 3 else 16**2)
    return Case(operation, traffic.Shape(m, reads, writes, taps, 2), 2, width, dims)


def counted(case: Case) -> list[Accesses]:
    primitive = Primitive(case, torch.float16, CPU)
    with accesses_counted() as found:
        primitive()
    return found


CASES = [case(o) for o in (traffic.COPY, *traffic.FORWARD, *traffic.BACKWARD, *traffic.AROUND)]
CASES += [case(o, dims=3) for o in traffic.TRANSITION]


@needs_interpreter
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operation} {case.dims}D")
def test_a_floor_is_what_the_kernels_move_at_least_and_nearly_that(case: Case) -> None:
    found, floor = counted(case), case.floor.bytes
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
    pixels = backward.shape.m
    windows = backward.shape._replace(m=pixels // traffic.WINDOW)
    floors = (traffic.floor(kernel, windows, pixels) for kernel in ("arg-max", "max pool backward"))
    for one, floor in zip(counted(backward), floors, strict=True):
        assert floor.bytes <= one.moved <= floor.bytes * MOVED, one


@needs_interpreter
def test_what_a_launch_has_stored_is_loaded_for_nothing_and_what_it_adds_to_is_loaded_and_stored() -> None:
    (forward,) = counted(case(traffic.FORWARD[0]))
    assert "out_ptr" not in forward.loaded  # the moments are those of the stored values
    assert forward.stored["out_ptr"] == 512 * 32 * 2
    assert forward.accessed >= forward.moved + forward.stored["out_ptr"]
    backward, *_ = counted(case(traffic.BACKWARD[0]))
    assert backward.loaded["D_ptr"] == backward.stored["D_ptr"] == 512 * 24 * 2


def stage_record(rehearsal: bool = False) -> dict[str, Any]:
    """As ``benchmarks.gpu`` writes it, with made-up times: each kernel takes twice its floor, a copy four times."""
    rows = roofline.floors((3e12, 8e14), traffic.NETWORKS["densenet121"], 64, 224, 2)
    for row in rows:
        row["seconds"] = (4 if row["operation"] == traffic.COPY else 2) * row["floor_seconds"]
    environment = {"device": "Imaginary GPU", "rehearsal": rehearsal}
    rows.append({"operation": "reduce", "elements": 64, "times": 3, "seconds": 2e-9, "floor_seconds": 1e-9})
    profiles = {f"fastdense, batch {batch}": {"network": "densenet121", "rows": rows} for batch in (64, 256)}
    profiles["torchvision, batch 64"] = {"network": "densenet121", "rows": []}
    return {"stages": {"layers": {"status": "ok", "environment": environment, "result": profiles}}}


def test_the_command_shows_a_steps_sums_and_fractions_of_the_floor_and_a_rehearsals_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = roofline.bars_of_record(stage_record())
    assert len(groups) == 2 and all("Imaginary GPU" in title and "modelled floor" in title for title in groups)
    assert all("REHEARSAL" in title for title in roofline.bars_of_record(stage_record(rehearsal=True)))
    group = next(iter(groups.values()))
    assert [bar.measured for bar in group] == sorted((bar.measured for bar in group), reverse=True)
    assert all(bar.fraction == pytest.approx(0.25 if bar.operation == traffic.COPY else 0.5) for bar in group)
    network = traffic.NETWORKS["densenet121"]
    total = traffic.network_floor_seconds(network, 64, 224, 2, 3e12, 8e14)
    assert sum(bar.floor for bar in group) == pytest.approx(total + 3e-9)
    of_layers = sum(bar.times for bar in group if bar.operation in (*traffic.FORWARD, *traffic.BACKWARD))
    assert of_layers == 4 * sum(network.layers)

    record, picture = tmp_path / "gpu.json", tmp_path / "kernels.png"
    record.write_text(json.dumps(stage_record()))
    roofline.main(["--record", str(record), "--plot", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    assert "50%" in capsys.readouterr().out
    record.write_text(json.dumps({"stages": {}}))
    with pytest.raises(SystemExit):
        roofline.main(["--record", str(record)])


def test_on_the_cpu_kernels_have_floors_and_a_step_is_timed_only_if_it_is_right(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(traffic.NETWORKS, "densenet121", traffic.Network(8, (1, 1), 16))
    monkeypatch.setitem(MODELS, "densenet121", NetworkSpec(8, (1, 1), 16, 1000))
    monkeypatch.setattr(roofline, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(roofline, "MATMUL_SIZE", 64)
    monkeypatch.setattr(roofline.Timer, "blocked_autorange", lambda timer, min_run_time: timer.timeit(2))
    options = Options(batch=2, size=32, repeats=2, threads=2)
    record = roofline.run(options)
    assert record["step"]["checked"] and record["step"]["fraction_of_floor"] > 0
    modelled = record["modelled"]
    assert modelled["images_per_second"] == pytest.approx(2 / modelled["floor_seconds"])
    assert all("seconds" not in row and row["floor_seconds"] > 0 for row in modelled["kernels"])
    roofline.show(record, Console(width=140))
    shown = capsys.readouterr().out
    assert "not measured" in shown and "floor, modelled" in shown
    assert json.loads(json.dumps(runner.plain(record)))["settings"]["batch"] == 2

    right = PROVIDERS["fastdense-activations"]

    def wrong(spec: NetworkSpec) -> torch.nn.Module:
        model = right.network(spec)
        model.register_forward_pre_hook(lambda module, arguments: (arguments[0].flip(0),))
        return model

    monkeypatch.setitem(PROVIDERS, right.name, replace(right, network=wrong))
    monkeypatch.setattr(roofline, "cpu_rates", lambda threads: record["rates"])
    other = roofline.run(options)
    assert not other["step"]["checked"] and "step" not in other["step"]
    roofline.show(other, Console(width=140))
    assert "not timed" in capsys.readouterr().out
