"""The depth benchmark: counted bytes beside measured ones, the search, running out of memory, the command."""

import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from benchmarks import depth
from benchmarks.harness import fits
from benchmarks.harness.fits import CudaMemory, Fit, LiveBytes, counted_bytes, search, trained_fit
from benchmarks.harness.options import Options
from benchmarks.harness.providers import MODELS, PROVIDERS, NetworkSpec, cifar
from benchmarks.report import depth_report
from benchmarks.report.record import complaints
from fastdense.recompute import WORKSPACE_BYTES

MB = 1 << 20


@pytest.mark.parametrize("name", depth.COUNTABLE)
def test_counted_bytes_are_those_of_a_real_step(name: str) -> None:
    found = depth.beside_measured(PROVIDERS[name])
    assert found["kept_counted"] == pytest.approx(found["kept_measured"], rel=1e-5)
    if name.startswith("fastdense"):  # an upper bound, never in our favour
        assert found["peak_measured"] <= found["peak_counted"] <= found["peak_measured"] + 2 * WORKSPACE_BYTES
    else:
        assert found["peak_counted"] == pytest.approx(found["peak_measured"], rel=0.02)


def test_parameters_are_counted_with_gradients_and_momentum_and_more_may_be_counted_than_any_machine_has() -> None:
    counted = counted_bytes(lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), (2, 3, 2, 2), 5)
    assert (counted.gradients, counted.parameters) == (4 * 65, 8 * 65)
    assert counted.peak > counted.parameters + counted.gradients
    network = partial(PROVIDERS["memory-efficient"].network, cifar(40))
    small, huge = (counted_bytes(network, (batch, 3, 32, 32), 10).kept for batch in (1, 10**7))
    assert huge == pytest.approx(10**7 * small, rel=0.01)


def test_live_bytes_counted_by_hand() -> None:
    x = torch.empty(MB // 4)
    with LiveBytes([x]) as live:
        y = x + 1
        z = y.view(2, -1)
        assert live.now == MB  # a view takes nothing
        w = torch.cat([y, y])
        del y, z
        assert (live.now, live.peak) == (2 * MB, 3 * MB)
        x.add_(1)
        del w
    assert (live.now, live.peak) == (0, 3 * MB)


def found_by(tried: dict[int, Fit]) -> int:
    return max((size for size, fit in tried.items() if fit.fits), default=0)


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 1e4), st.floats(0.01, 1e3), st.floats(0, 10), st.integers(100, 10**7), st.booleans())
def test_the_search_finds_the_last_that_fits(
    fixed: float, linear: float, square: float, budget: int, known: bool
) -> None:
    def size(n: int) -> int:
        return int(fixed + linear * n + square * n * n)

    def attempt(n: int) -> Fit:
        fits = size(n) <= budget
        return Fit(fits, size(n) if fits or known else None, {})

    tried = search(attempt, budget)
    largest = found_by(tried)
    assert largest + 1 in tried and size(largest + 1) > budget
    assert largest == 0 or size(largest) <= budget
    assert len(tried) <= 90 and all(fit.fits == (n <= largest) for n, fit in tried.items())


def test_the_search_tries_few_sizes_where_bytes_are_known() -> None:
    tried = search(lambda n: Fit(19 * n * n + 11_000 * n <= 12 * 10**6, 19 * n * n + 11_000 * n, {}), 12 * 10**6)
    assert found_by(tried) == 556
    assert len(tried) <= 14


def test_a_search_without_time_tries_nothing_and_says_that_it_is_not_complete() -> None:
    assert search(lambda n: Fit(n <= 100, None, {}), 1, until=time.monotonic() - 1) == {}
    run = depth.run(Options(budget=10**8, seconds=0.0, questions=("cifar",), providers=("fastdense-bottlenecks",)))
    row = run["results"]["cifar"]["providers"]["fastdense-bottlenecks"]
    assert (row["size"], row["complete"], row["trials"]) == (0, False, [])


class Limited(LiveBytes):
    """Within the ``with``, what operators make must fit into so many bytes, as in a device's memory."""

    def __init__(self, budget: int) -> None:
        super().__init__([])
        self.errors: list[BaseException] = []  # stored, as a debugger or a log would
        self.in_backward = False
        self.memory: Any = SimpleNamespace(device=torch.device("cpu"), budget=budget, start=self.start)
        self.memory.peak, self.memory.release = lambda: self.peak, lambda: self.now

    def start(self) -> None:
        self.peak = self.now

    def __torch_dispatch__(self, *given: Any, **keywords: Any) -> Any:
        found = super().__torch_dispatch__(*given, **keywords)
        if self.now > self.memory.budget:
            self.errors.append(torch.OutOfMemoryError("CUDA out of memory. Tried"))
            self.in_backward = torch._C._current_graph_task_id() != -1
            raise self.errors[-1]
        return found


def deep(layers: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), *(nn.Softplus() for _ in range(layers)))


def fit(live: Limited, layers: int) -> Fit:
    """Of 50 images, each layer of which saves a thousand bytes."""
    with live:
        return trained_fit(lambda: deep(layers), (50, 3, 2, 2), 5, live.memory)


@pytest.mark.parametrize("in_backward", [False, True], ids=["in forward", "in backward"])
def test_running_out_of_memory_leaves_nothing_behind_and_the_next_size_alone(in_backward: bool) -> None:
    live = Limited(20_000)
    first = fit(live, 8)
    sizes = [layers for layers in range(9, 40) if not fit(live, layers).fits and live.in_backward == in_backward]
    failed = fit(live, sizes[0])
    assert (failed.fits, failed.bytes) == (False, None)
    assert failed.details["bytes_left"] == 0 and "CUDA out of memory" in failed.details["error"]
    assert live.errors and first.fits and fit(live, 8) == first
    largest = max(layers for layers in range(1, 40) if fit(Limited(20_000), layers).fits)
    assert found_by(search(partial(fit, live), 20_000)) == largest


def test_a_peak_over_the_budget_does_not_fit() -> None:
    memory = Limited(10**6).memory
    memory.peak = lambda: 10**6 + 1
    assert trained_fit(lambda: deep(1), (2, 3, 2, 2), 5, memory)[:2] == (False, 10**6 + 1)


def test_libraries_say_in_words_that_memory_is_out_and_other_errors_are_raised() -> None:
    missing = ("CUDA error: out of memory", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
    assert all(fits.out_of_memory(RuntimeError(words)) for words in missing)
    network = Mock(side_effect=RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        trained_fit(network, (2, 3, 2, 2), 5, Limited(10**6).memory)


def test_cuda_is_limited_measured_and_handed_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = MagicMock()
    calls.mem_get_info.return_value = (1, 24 * 10**9)
    calls.max_memory_reserved.return_value, calls.memory_allocated.return_value = 77, 3
    monkeypatch.setattr(fits.torch, "cuda", calls)
    device = torch.device("cuda")
    memory = CudaMemory(12 * 10**9, device)
    memory.start()
    assert (memory.peak(), memory.release()) == (77, 3)
    memory.close()
    limits = [call.args for call in calls.set_per_process_memory_fraction.mock_calls]
    assert limits == [(0.5, device), (1.0, device)]
    for name in ("reset_peak_memory_stats", "synchronize", "empty_cache"):
        assert getattr(calls, name).called, name
    with pytest.raises(ValueError, match=r"has 24\.0 GB, less than the budget of 25\.0 GB"):
        CudaMemory(25 * 10**9, device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_fastdense_trains_the_deepest_network_on_a_gpu_and_nothing_stays_allocated() -> None:
    options = Options(budget=10**9, device="cuda", questions=("cifar",), providers=depth.COUNTABLE)
    found = depth.run(options)["results"]["cifar"]["providers"]
    assert found["fastdense-bottlenecks"]["depth"] > 3 * found["torchvision"]["depth"] > 0
    assert all(trial["bytes_left"] < 64 * MB for row in found.values() for trial in row["trials"])


def test_a_questions_size_gives_its_network_its_images_and_its_answer() -> None:
    questions = depth.QUESTIONS
    assert [MODELS[f"densenet{name}"].depth for name in (121, 161, 169, 201)] == [121, 161, 169, 201]
    assert [questions["cifar"].answer(size) for size in (6, 16, 31)] == [40, 100, 190]  # the tech report's
    assert questions["densenet264"].network(16) == MODELS["densenet264"]
    assert questions["densenet264"].network(17).block_config == (6, 12, 68, 51)
    batch = questions["batch-densenet201"]
    assert (batch.answer(7), batch.shape(7)) == (7, (7, 3, 224, 224))


def test_a_budget_is_a_number_and_a_unit_and_a_quick_runs_is_small_unless_another_than_the_usual_is_named() -> None:
    assert [depth.parse_bytes(text) for text in ("1.5 gib", "500MB", "7")] == [3 << 29, 5 * 10**8, 7]
    for wrong in ("GB", "-1GB", "0GB", "12 parsecs"):
        with pytest.raises(ValueError, match="a budget is a number"):
            depth.parse_bytes(wrong)
    quick = partial(Options, quick=True)
    asked = (Options(), Options(budget="12GB"), Options(budget="24GiB"), quick(budget="12GB"), quick(budget="2GB"))
    assert [depth.budget_bytes(options) for options in asked] == [12 * 10**9] * 2 + [24 << 30, 5 * 10**8, 2 * 10**9]


def test_other_arithmetic_is_refused() -> None:
    with pytest.raises(ValueError, match="fp32, got dtype 'bf16'"):
        depth.run(Options(dtype="bf16"))


def test_the_command_searches_shows_and_records_what_it_found_of_what_is_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(spec: NetworkSpec) -> nn.Module:
        model = PROVIDERS["torchvision"].network(spec)
        model.features.norm5.eps = 0.1  # type: ignore[union-attr]
        return model

    monkeypatch.setitem(PROVIDERS, "efficient-densenet", replace(PROVIDERS["efficient-densenet"], network=wrong))
    small = replace(depth.QUESTIONS["batch-densenet121"], network=lambda size: cifar(22), pixels=64)
    monkeypatch.setitem(depth.QUESTIONS, "batch-densenet121", small)
    file, picture = tmp_path / "depth.json", tmp_path / "depth.png"
    providers = ("torchvision", "memory-efficient", "fastdense-bottlenecks", "compile", "efficient-densenet")
    asked = ["--device", "cpu", "--processes", "1", "--questions", "cifar", "batch-densenet121", "--budget", "200MB"]
    depth.main([*asked, "--providers", *providers, "--json", str(file), "--plot", str(picture)])
    record = json.loads(file.read_text())
    assert complaints(record) == [] and record["settings"]["budget"] == 2 * 10**8
    assert record["settings"]["method"] == depth.COUNTED == "by bytes counted, not by steps on a GPU"
    assert record["checks"]["compile"]["unavailable"] == "its bytes cannot be counted without a device"
    assert not record["checks"]["efficient-densenet"]["checked"]
    found = record["results"]["cifar"]["providers"]
    assert tuple(found) == providers[:3]
    for row in found.values():
        fitting, over = ([trial for trial in row["trials"] if trial["fits"] is fits] for fits in (True, False))
        assert row["complete"] and fitting[-1]["size"] == row["size"] == over[0]["size"] - 1
        assert fitting[-1]["bytes"] <= 2 * 10**8 < over[0]["bytes"]
    ours = found["fastdense-bottlenecks"]
    assert ours["depth"] > found["memory-efficient"]["depth"] > found["torchvision"]["depth"]
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    table = depth_report.depth_table(record, "cpu/depth.json")
    assert f"| {ours['label']} | {ours['depth']} |" in table and depth.COUNTED in table
    assert len(list(depth_report.rows(record))) == 2
    shown = " ".join(capsys.readouterr().out.split())
    assert ours["label"] in shown and "takes no part: differs by" in shown
