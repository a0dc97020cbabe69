"""Speed and memory: providers compute the same, and only what is right is measured."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import peers

from benchmarks import memory, speed
from benchmarks.harness import providers, runner, training
from benchmarks.harness.options import DTYPES, Options
from benchmarks.harness.providers import MODELS, PROVIDERS, NetworkSpec, Unavailable
from benchmarks.report.record import complaints
from fastdense.memory import saved_bytes

SMALL = NetworkSpec(4, (2, 1), 8, 5)
RUN_HERE = [name for name, provider in PROVIDERS.items() if provider.compile_mode is None and "triton" not in name]


def step(name: str, spec: NetworkSpec, size: int) -> list[torch.Tensor]:
    torch.manual_seed(3)
    model = PROVIDERS[name].build(spec).double()
    generator = torch.Generator().manual_seed(1)
    scores = model(torch.randn(2, 3, size, size, generator=generator).double())
    scores.backward(torch.randn(scores.shape, generator=generator).double())
    return [scores.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("small_inputs", [False, True], ids=["ImageNet's stem", "CIFAR's stem"])
@pytest.mark.parametrize("name", RUN_HERE)
def test_each_provider_computes_what_torchvision_does(name: str, small_inputs: bool) -> None:
    peers.torchvision()
    spec = NetworkSpec(4, (2, 3), 8, 5, small_inputs=small_inputs)
    size = 12 if small_inputs else 40
    for got, want in zip(step(name, spec, size), step("torchvision", spec, size), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


def test_each_scheme_saves_less_than_the_one_before() -> None:
    peers.torchvision()
    saved = []
    for name in ("torchvision", "efficient-densenet", "fastdense-activations", "fastdense-bottlenecks"):
        model, x = PROVIDERS[name].build(providers.cifar(40)), torch.randn(2, 3, 32, 32)
        with saved_bytes(model, x) as found:
            model(x)
        saved.append(found.bytes)
    assert saved == sorted(set(saved), reverse=True)


def test_a_provider_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("no compiler")

    cpu = torch.device("cpu")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", fails)
    with pytest.raises(Unavailable, match="needs a C"):
        PROVIDERS["compile"].require(cpu)
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: None)
    for name in ("torchvision", "memory-efficient", "convert"):
        for use, argument in ((PROVIDERS[name].require, cpu), (PROVIDERS[name].build, SMALL)):
            with pytest.raises(Unavailable, match="torchvision is not installed"):
                use(argument)
    PROVIDERS["efficient-densenet"].require(cpu)


def test_rounds_are_interleaved_and_warm_up_is_not_counted() -> None:
    calls: list[str] = []

    def step(name: str) -> dict[str, float]:
        calls.append(name)
        return {"step": float(len(calls))}

    found = runner.interleave({name: lambda name=name: step(name) for name in "ab"}, repeats=3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert found == {"a": {"step": [3.0, 5.0, 7.0]}, "b": {"step": [4.0, 6.0, 8.0]}}
    timing = runner.Timing.of([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert (timing.median, timing.p20, timing.p80, timing.repeats) == (3.5, 2.0, 5.0, 6)


def dying_process() -> Iterator[int]:
    yield from (os.getpid(), os.getpid())
    os._exit(3)


def test_a_fresh_process_yields_as_it_goes_and_one_that_dies_is_no_result() -> None:
    found: list[int] = []
    with pytest.raises(RuntimeError, match="status 3"):
        found.extend(runner.in_fresh_process(dying_process))
    assert len(found) == 2 and len({*found, os.getpid()}) == 2


@pytest.fixture
def candidates(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """One right provider, one whose gradients are wrong, one that is not to be had and one that fails."""
    peers.torchvision()
    right = PROVIDERS["fastdense-activations"]

    def fails(spec: NetworkSpec) -> torch.nn.Module:
        raise torch.OutOfMemoryError("out of memory")

    def scaled(module: torch.nn.Module, given: Any, scores: torch.Tensor) -> None:
        scores.register_hook(lambda gradient: gradient * (1 + 1e-6))

    def wrong(spec: NetworkSpec) -> torch.nn.Module:
        model = right.network(spec)
        model.register_forward_hook(scaled)
        return model

    changes: dict[str, Any] = {"right": {}, "wrong": {"network": wrong}, "fails": {"network": fails}}
    changes["absent"] = {"unsupported_reason": lambda device: "not here"}
    for name, changed in changes.items():
        monkeypatch.setitem(PROVIDERS, name, replace(right, name=name, label=name, **changed))
    for module in (speed, memory):  # in this process, which knows them
        monkeypatch.setattr(module, "in_fresh_process", lambda measure, *arguments: measure(*arguments))
    monkeypatch.setitem(MODELS, "tiny", SMALL)
    return tuple(changes)


def check_only_the_right_was_measured(rows: dict[str, Any], key: str) -> None:
    assert rows["torchvision"]["checked"] and rows["right"]["checked"] and key in rows["right"]
    assert rows["wrong"]["checked"] is False and rows["wrong"]["relative_difference"] > 1e-7
    assert rows["absent"] == {"unavailable": "not here"}
    assert rows["fails"] == {"error": "OutOfMemoryError: out of memory"}
    assert not any(key in rows[name] for name in ("wrong", "absent", "fails"))


def test_speed_times_what_is_right_and_nothing_else(candidates: tuple[str, ...], tmp_path: Path) -> None:
    options = Options(model="tiny", batch=2, size=32, providers=candidates, batches=(3,), repeats=2, processes=2)
    seen: list[int] = []
    record = speed.run(options, lambda record: seen.append(len(record["results"])))
    rows = record["results"]
    check_only_the_right_was_measured(rows, "step")
    assert record["complete"] and seen[0] == 1 and seen[-1] == 5
    right = rows["right"]
    assert [right[phase].repeats for phase in ("step", "forward", "backward", "optimizer")] == [4] * 4
    assert right["images_per_second"] == 2 / right["step"].median
    assert right["batches"]["3"]["step"].repeats == speed.SWEEP_REPEATS
    runner.write_record(tmp_path / "record.json", record)
    assert not complaints(json.loads((tmp_path / "record.json").read_text()))


def test_memory_measures_what_is_right_and_nothing_else(candidates: tuple[str, ...]) -> None:
    record = memory.run(Options(models=("tiny",), depths=(10,), batch=2, size=32, providers=candidates))
    assert list(record["results"]) == ["tiny", "densenet-bc-10"] and record["complete"]
    for rows in record["results"].values():
        check_only_the_right_was_measured(rows, "bytes_peak")
        assert rows["right"]["bytes_kept"] < rows["torchvision"]["bytes_kept"] <= rows["torchvision"]["bytes_peak"]
    assert not complaints(runner.plain(record))


def test_bytes_are_those_of_the_step() -> None:
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 1000))
    x, cotangent = training.images(2, 64, 1000, Options())
    found = training.count_bytes(training.Step(flat, x, cotangent, "fp32"))
    saved = 2 * 3 * 64 * 64 * 4  # the images in the order that Flatten wants
    assert found == {"bytes_kept": saved, "bytes_peak": saved + 2 * 1000 * 4}


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_steps_of_16_bit_run_under_autocast(dtype: str) -> None:
    options, seen = Options(dtype=dtype), []
    model = training.build(PROVIDERS["fastdense-activations"], SMALL, options)
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    phases = training.Step(model, *training.images(2, 32, 5, options), dtype)()
    assert phases.pop("step") >= sum(phases.values()) > 0
    assert set(phases) == {"forward", "backward", "optimizer"}
    assert seen == [DTYPES[dtype]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"dtype": "tf32"}, "arithmetic of GPUs"), ({"batch": 0}, "at least 1"), ({"device": "meta"}, "cpu or cuda"),
     ({"device": "cuda"}, "no CUDA GPU"), ({"layout": "rows"}, "channels_last, contiguous")],
)  # fmt: skip
def test_options_say_what_is_wrong(wrong: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        Options(**wrong)
