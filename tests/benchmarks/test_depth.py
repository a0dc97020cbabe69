"""Counted bytes beside measured ones, the search, recovery from a device without memory, and the command as a whole."""

from __future__ import annotations

import json
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

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


def test_counted_parameters() -> None:
    counted = counted_bytes(lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), (2, 3, 2, 2), 5)
    assert (counted.gradients, counted.parameters) == (4 * 65, 8 * 65)
    assert counted.peak > counted.parameters + counted.gradients


def test_a_copy_that_is_never_allocated_can_be_larger_than_any_machine() -> None:
    spec = cifar(40)
    small, huge = (
        counted_bytes(lambda: PROVIDERS["memory-efficient"].network(spec), (batch, 3, 32, 32), 10).kept
        for batch in (1, 10**7)
    )
    assert huge == pytest.approx(10**7 * small, rel=0.01)


def test_live_bytes_by_hand() -> None:
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
    assert largest + 1 in tried
    assert size(largest + 1) > budget
    assert largest == 0 or size(largest) <= budget
    assert len(tried) <= 90
    assert all(fit.fits == (n <= largest) for n, fit in tried.items())


def test_the_search_tries_few_sizes_where_bytes_are_known() -> None:
    tried = search(lambda n: Fit(19 * n * n + 11_000 * n <= 12 * 10**6, 19 * n * n + 11_000 * n, {}), 12 * 10**6)
    assert found_by(tried) == 556
    assert len(tried) <= 14


def test_a_search_without_time_tries_nothing() -> None:
    assert search(lambda n: Fit(n <= 100, None, {}), 1, until=time.monotonic() - 1) == {}
    run = depth.run(Options(budget=10**8, seconds=0.0, questions=("cifar",), providers=("fastdense-bottlenecks",)))
    row = run["results"]["cifar"]["providers"]["fastdense-bottlenecks"]
    assert (row["size"], row["complete"], row["trials"]) == (0, False, [])


class FakeMemory:
    """A device whose memory is what the networks of this file say that they hold."""

    def __init__(self, budget: int) -> None:
        self.device, self.budget = torch.device("cpu"), budget
        self.held: list[weakref.ref[Tensor]] = []
        self.errors: list[BaseException] = []
        self.most = 0

    def start(self) -> None:
        self.most = 0

    def peak(self) -> int:
        return self.most

    def release(self) -> int:
        return self.now()

    def now(self) -> int:
        return sum(tensor.nbytes for ref in self.held if (tensor := ref()) is not None)

    def take(self, size: int, message: str) -> Tensor:
        """``size`` bytes, or no memory; the error is stored, as a debugger or a log would."""
        if self.now() + size > self.budget:
            self.errors.append(torch.OutOfMemoryError(message))
            raise self.errors[-1]
        tensor = torch.zeros(size // 4)
        self.held.append(weakref.ref(tensor))
        self.most = max(self.most, self.now())
        return tensor


class Holding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, memory: FakeMemory, size: int) -> Tensor:
        ctx.memory, ctx.size, ctx.held = memory, size, memory.take(size, "CUDA out of memory. Tried")
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.memory.take(ctx.size, "CUDA out of memory. Tried in backward")
        return grads[0], None, None


class Deep(nn.Module):
    """Each layer holds a thousand bytes, and takes as much again in its backward."""

    def __init__(self, memory: FakeMemory, layers: int) -> None:
        super().__init__()
        self.memory, self.layers, self.linear = memory, layers, nn.Linear(3 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x.flatten(1))
        for _ in range(self.layers):
            x = Holding.apply(x, self.memory, 1000)
        return x


@pytest.mark.parametrize("layers", [10, 11, 40], ids=["in backward", "in forward", "early in forward"])
def test_running_out_of_memory_leaves_nothing_behind(layers: int) -> None:
    memory = FakeMemory(10_000)
    models: list[weakref.ref[nn.Module]] = []

    def build() -> nn.Module:
        model = Deep(memory, layers)
        models.append(weakref.ref(model))
        return model

    fit = trained_fit(build, (2, 3, 2, 2), 5, memory)
    assert (fit.fits, fit.bytes) == (False, None)
    assert fit.details["bytes_left"] == 0
    assert "CUDA out of memory" in fit.details["error"]
    assert memory.errors and models[0]() is None


def test_a_size_does_not_depend_on_earlier_ones() -> None:
    memory = FakeMemory(10_500)

    def attempt(layers: int) -> Fit:
        return trained_fit(lambda: Deep(memory, layers), (2, 3, 2, 2), 5, memory)

    first, failed, second = attempt(8), attempt(80), attempt(8)
    assert first.fits and not failed.fits and second == first
    assert found_by(search(attempt, memory.budget)) == 9  # of each ten thousand bytes, one layer's is for backward


def test_other_errors_are_not_taken_for_missing_memory() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        trained_fit(lambda: nn.Sequential(Broken(), nn.Linear(1, 1)), (2, 3, 2, 2), 5, FakeMemory(10))


def test_a_peak_over_the_budget_does_not_fit() -> None:
    memory = FakeMemory(10**6)
    memory.peak = lambda: 10**6 + 1  # type: ignore[method-assign]
    fit = trained_fit(lambda: Deep(memory, 1), (2, 3, 2, 2), 5, memory)
    assert (fit.fits, fit.bytes) == (False, 10**6 + 1)


@pytest.mark.parametrize(
    ("error", "want"),
    [
        (torch.OutOfMemoryError("anything"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: RuntimeError, want: bool) -> None:
    assert fits.out_of_memory(error) is want


def test_cuda_is_limited_measured_and_handed_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    for name, value in {
        "mem_get_info": (1, 24 * 10**9),
        "set_per_process_memory_fraction": None,
        "reset_peak_memory_stats": None,
        "synchronize": None,
        "max_memory_reserved": 77,
        "empty_cache": None,
        "memory_allocated": 3,
    }.items():
        monkeypatch.setattr(
            torch.cuda, name, lambda *args, name=name, value=value: (calls.append((name, *args)), value)[1]
        )
    device = torch.device("cuda")
    memory = CudaMemory(12 * 10**9, device)
    memory.start()
    assert (memory.peak(), memory.release()) == (77, 3)
    memory.close()
    assert [call for call in calls if call[0].startswith("set")] == [
        ("set_per_process_memory_fraction", 0.5, device),
        ("set_per_process_memory_fraction", 1.0, device),
    ]
    assert ("empty_cache",) in calls
    with pytest.raises(ValueError, match=r"has 24\.0 GB, less than the budget of 25\.0 GB"):
        CudaMemory(25 * 10**9, device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu() -> None:
    options = Options(budget=10**9, device="cuda", questions=("cifar",), providers=depth.COUNTABLE)
    found = depth.run(options)["results"]["cifar"]["providers"]
    assert found["fastdense-bottlenecks"]["depth"] > 3 * found["torchvision"]["depth"] > 0
    assert all(trial["bytes_left"] < 64 * MB for row in found.values() for trial in row["trials"])


def test_questions() -> None:
    questions = depth.QUESTIONS
    assert questions["cifar"].answer(16) == 100  # the tech report's DenseNet-BC-100
    assert questions["densenet264"].network(16) == MODELS["densenet264"]
    assert questions["densenet264"].network(17).block_config == (6, 12, 68, 51)
    assert questions["batch-densenet201"].answer(7) == 7
    assert questions["batch-densenet201"].shape(7) == (7, 3, 224, 224)


@pytest.mark.parametrize(("text", "want"), [("12GB", 12 * 10**9), ("1.5 gib", 3 << 29), ("500MB", 5 * 10**8), ("7", 7)])
def test_budgets(text: str, want: int) -> None:
    assert depth.parse_bytes(text) == want


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0GB", "12 parsecs"])
def test_bad_budgets(text: str) -> None:
    with pytest.raises(ValueError, match="a budget is a number"):
        depth.parse_bytes(text)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    providers = ("torchvision", "memory-efficient", "fastdense-bottlenecks", "compile")
    questions = ("cifar", "batch-densenet121")
    return depth.run(Options(budget=2 * 10**8, processes=1, questions=questions, providers=providers))


def test_a_small_run(record: dict[str, Any]) -> None:
    assert record["settings"]["method"] == "by bytes counted, not by steps on a GPU"
    assert complaints(json.loads(json.dumps(record))) == []
    assert record["checks"]["compile"]["unavailable"] == "its bytes cannot be counted without a device"
    found = record["results"]["cifar"]["providers"]
    assert list(found) == ["torchvision", "memory-efficient", "fastdense-bottlenecks"]
    for row in found.values():
        assert row["complete"]
        fitting = [trial for trial in row["trials"] if trial["fits"]]
        over = [trial for trial in row["trials"] if not trial["fits"]]
        assert fitting[-1]["size"] == row["size"] == over[0]["size"] - 1
        assert fitting[-1]["bytes"] <= 2 * 10**8 < over[0]["bytes"]
    assert found["fastdense-bottlenecks"]["depth"] > found["memory-efficient"]["depth"] > found["torchvision"]["depth"]


def test_its_table_and_picture(record: dict[str, Any], tmp_path: Path) -> None:
    row = record["results"]["cifar"]["providers"]["fastdense-bottlenecks"]
    text = depth_report.depth_table(json.loads(json.dumps(record)), "cpu/depth.json")
    assert f"| {row['label']} | {row['depth']} |" in text
    assert "by bytes counted, not by steps on a GPU" in text
    assert len(list(depth_report.rows(record))) == 2
    depth.plot(record, tmp_path / "depth.png")
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_provider_takes_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(spec: NetworkSpec) -> nn.Module:
        model = PROVIDERS["torchvision"].network(spec)
        model.features.norm5.eps = 0.1  # type: ignore[union-attr]
        return model

    wrong = depth.replace(PROVIDERS["memory-efficient"], network=other)
    monkeypatch.setitem(depth.PROVIDERS, "memory-efficient", wrong)
    lines: list[str] = []
    options = Options(budget=10**8, processes=1, questions=("cifar",), providers=("torchvision", "memory-efficient"))
    found = depth.run(options, lines.append)
    assert list(found["results"]["cifar"]["providers"]) == ["torchvision"]
    assert not found["checks"]["memory-efficient"]["checked"]
    assert any("takes no part: differs by" in line for line in lines)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = ["--processes", "1", "--json", str(tmp_path / "depth.json"), "--plot", str(tmp_path / "depth.png")]
    depth.main(
        ["--budget", "100MB", "--device", "cpu", "--questions", "cifar", "--providers", "fastdense-bottlenecks", *paths]
    )
    written = json.loads((tmp_path / "depth.json").read_text())
    assert written["settings"]["budget"] == 10**8
    assert (tmp_path / "depth.png").stat().st_size > 10_000
    assert "fastdense bottlenecks" in capsys.readouterr().out


def test_budgets_of_options() -> None:
    assert depth.budget_bytes(Options()) == depth.budget_bytes(Options(budget="12GB")) == 12 * 10**9
    assert depth.budget_bytes(Options(budget="24GiB")) == 24 << 30
    assert depth.budget_bytes(Options(quick=True, budget="12GB")) == 5 * 10**8
    assert depth.budget_bytes(Options(quick=True, budget="2GB")) == 2 * 10**9
    with pytest.raises(ValueError, match="fp32, got dtype 'bf16'"):
        depth.run(Options(dtype="bf16"))


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA GPU"):
        Options(device="cuda")
