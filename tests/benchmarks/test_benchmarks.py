"""The benchmarks run, refuse to time what is wrong, and the README says what the records say."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import peers

from benchmarks import memory, speed
from benchmarks.harness import runner, training
from benchmarks.harness.options import DTYPES, Options
from benchmarks.harness.providers import MODELS, PROVIDERS, NetworkSpec
from benchmarks.report import render
from benchmarks.report.record import complaints


@pytest.mark.parametrize("page", render.PAGES, ids=lambda page: page.name)
def test_pages_agree_with_the_records(page: Path) -> None:
    text = page.read_text()
    assert re.search(rf"<!-- ({'|'.join(render.TABLES)}): ", text)
    assert render.render(text) == text


@pytest.mark.parametrize("page", render.PAGES, ids=lambda page: page.name)
def test_a_changed_number_is_noticed(page: Path) -> None:
    text = page.read_text()
    found = re.search(rf"<!-- ({'|'.join(render.TABLES)}): .*?\n\|[^\n]*(\d)[^\d\n]*\|\n", text, re.DOTALL)
    assert found is not None, "there is no number in a table"
    digit = found.start(2)
    changed = f"{text[:digit]}{(int(text[digit]) + 1) % 10}{text[digit + 1 :]}"
    assert render.render(changed) == text


def test_timing_summary() -> None:
    timing = runner.Timing.of([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert (timing.median, timing.p20, timing.p80, timing.repeats) == (3.5, 2.0, 5.0, 6)


def test_rounds_are_interleaved_and_warm_up_is_not_counted() -> None:
    calls: list[str] = []

    def step(name: str) -> dict[str, float]:
        calls.append(name)
        return {"step": float(len(calls))}

    found = runner.interleave({name: lambda name=name: step(name) for name in "ab"}, repeats=3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert found == {"a": {"step": [3.0, 5.0, 7.0]}, "b": {"step": [4.0, 6.0, 8.0]}}


def test_a_fresh_process_tells_as_it_goes() -> None:
    found = list(runner.in_fresh_process(_process, 3))
    assert [number for number, _ in found] == [0, 1, 2]
    assert len({process for _, process in found} | {os.getpid()}) == 2


def _process(count: int) -> Iterator[tuple[int, int]]:
    for number in range(count):
        yield number, os.getpid()


def test_a_process_that_dies_is_no_result() -> None:
    with pytest.raises(RuntimeError, match="status 3"):
        list(runner.in_fresh_process(_dies))


def _dies() -> Iterator[int]:
    yield 1
    os._exit(3)


class Wrong(torch.nn.Module):
    """A network whose forward is right and whose gradient is not."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.inner(x)
        scores.register_hook(lambda gradient: gradient * (1 + 1e-6))
        return scores


@pytest.fixture
def candidates(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """One right provider, one whose gradients are wrong, one that is not to be had and one that fails."""
    peers.torchvision()

    def fails(spec: NetworkSpec) -> torch.nn.Module:
        raise torch.OutOfMemoryError("out of memory")

    right = PROVIDERS["fastdense-activations"]
    made = {
        "right": replace(right, name="right", label="right"),
        "wrong": replace(right, name="wrong", label="wrong", network=lambda spec: Wrong(right.network(spec))),
        "absent": replace(right, name="absent", label="absent", unsupported_reason=lambda device: "not here"),
        "fails": replace(right, name="fails", label="fails", network=fails),
    }
    for name, provider in made.items():
        monkeypatch.setitem(PROVIDERS, name, provider)
    for module in (speed, memory):  # in this process, which knows them
        monkeypatch.setattr(module, "in_fresh_process", lambda measure, *arguments: measure(*arguments))
    monkeypatch.setitem(MODELS, "tiny", NetworkSpec(4, (2, 1), 8, 5))
    return tuple(made)


def assert_only_the_right_was_measured(rows: dict[str, Any], key: str) -> None:
    assert rows["torchvision"]["checked"] and rows["right"]["checked"] and key in rows["right"]
    assert rows["wrong"]["checked"] is False and rows["wrong"]["relative_difference"] > 1e-7
    assert rows["absent"] == {"unavailable": "not here"}
    assert rows["fails"] == {"error": "OutOfMemoryError: out of memory"}
    assert not any(key in rows[name] for name in ("wrong", "absent", "fails"))


def test_speed_times_what_is_right_and_nothing_else(candidates: tuple[str, ...], tmp_path: Path) -> None:
    options = Options(
        model="tiny", batch=2, size=32, providers=candidates, batches=(3,), repeats=2, processes=2, threads=1
    )
    seen: list[int] = []
    record = speed.run(options, lambda record: seen.append(len(record["results"])))
    rows = record["results"]
    assert_only_the_right_was_measured(rows, "step")
    assert record["complete"] and seen[0] == 1 and seen[-1] == 5
    right = rows["right"]
    assert [right[phase].repeats for phase in ("step", "forward", "backward", "optimizer")] == [4] * 4
    parts = sum(right[phase].median for phase in ("forward", "backward", "optimizer"))
    assert 0.5 * right["step"].median < parts < 1.5 * right["step"].median
    assert right["images_per_second"] == 2 / right["step"].median
    assert right["batches"]["3"]["step"].repeats == speed.SWEEP_REPEATS
    runner.write_record(tmp_path / "record.json", record)
    written = json.loads((tmp_path / "record.json").read_text())
    assert not complaints(written)
    assert written["schema"] == runner.SCHEMA
    assert {"date", "command", "commit", "processor", "threads", "torch"} <= written.keys()


def test_a_checkout_without_history_is_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it lies in another repository."""
    monkeypatch.setenv("FASTDENSE_COMMIT", "abc")
    assert runner.environment()["commit"] == "abc"


def test_a_gpus_tables_are_of_its_record() -> None:
    record = json.loads((runner.RESULTS / "h100" / "gpu.json").read_text())
    table = render.gpu_table(record, "h100/gpu.json")
    row = record["stages"]["batch64"]["result"]["rows"]["fastdense activations, graph"]
    row["step"]["median"], row["images_per_second"] = 0.0123, 5203.0
    assert "12.3 ms" not in table and "memory_efficient, graph" not in table
    changed = render.gpu_table(record, "h100/gpu.json")
    (line,) = set(changed.splitlines()) - set(table.splitlines())
    assert line.startswith("| fastdense activations, graph | 12.3 ms | ") and "x | 5,203 |" in line
    kernels = render.gpu_kernels_table(record, "h100/gpu.json")
    record["stages"]["layers"]["result"]["fastdense activations, batch 64"]["rows"][0]["seconds"] = 1.0
    (line,) = [line for line in render.gpu_kernels_table(record, "").splitlines() if "1000.00 ms" in line]
    assert line not in kernels


def test_an_interrupted_run_keeps_what_was_measured(candidates: tuple[str, ...]) -> None:
    def watch(record: dict[str, Any]) -> None:
        if "step" in record["results"].get("right", {}):
            raise KeyboardInterrupt

    options = Options(model="tiny", batch=2, size=32, providers=("right",), repeats=3, processes=1)
    record = speed.run(options, watch)
    assert record["complete"] is False and record["results"]["right"]["step"].repeats == 1
    assert not complaints(runner.plain(record))


def test_memory_measures_what_is_right_and_nothing_else(candidates: tuple[str, ...]) -> None:
    options = Options(models=("tiny",), depths=(10,), batch=2, size=32, providers=candidates)
    record = memory.run(options)
    assert list(record["results"]) == ["tiny", "densenet-bc-10"] and record["complete"]
    for rows in record["results"].values():
        assert_only_the_right_was_measured(rows, "bytes_peak")
        assert rows["right"]["bytes_kept"] < rows["torchvision"]["bytes_kept"] <= rows["torchvision"]["bytes_peak"]
    assert not complaints(runner.plain(record))


def test_bytes_are_those_of_the_step() -> None:
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 1000))
    x, cotangent = training.images(2, 64, 1000, Options())
    found = training.count_bytes(training.Step(flat, x, cotangent, "fp32"))
    saved = 2 * 3 * 64 * 64 * 4  # the images in the order that Flatten wants
    assert found == {"bytes_kept": saved, "bytes_peak": saved + 2 * 1000 * 4}


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_sixteen_bit_steps_run_under_autocast(dtype: str) -> None:
    spec, options = NetworkSpec(4, (2, 1), 8, 5), Options(dtype=dtype)
    seen: list[torch.dtype] = []
    model = training.build(PROVIDERS["fastdense-activations"], spec, options)
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    phases = training.Step(model, *training.images(2, 32, 5, options), dtype)()
    assert set(phases) == {"forward", "backward", "optimizer", "step"}
    assert seen == [DTYPES[dtype]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"dtype": "fp8"}, "dtype"), ({"dtype": "tf32"}, "arithmetic of GPUs"), ({"providers": ("x",)}, "torchvision,"),
     ({"batch": 0}, "at least 1"), ({"device": "meta"}, "cpu or cuda"), ({"device": "?"}, "cpu or cuda")],
)  # fmt: skip
def test_options_say_what_is_wrong(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**wrong)
