"""fastdense's loss curve beside textbook runs that differ by one rounding of the input, and what that can notice."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("rich")
pytest.importorskip("sklearn")
from benchmarks import curves, runner
from benchmarks.curves import RUNS, Options, e_folding, moved, running_maximum, train, verdict
from fastdense.backends.torch_backend import TorchBackend
from fastdense.core.features import Features, LazyGradient
from fastdense.data import digits
from fastdense.train_config import TrainConfig

DIGITS = digits()
MEMBERS = 19  # one correct run in 20 ranks first among them,
SEEDS = 3  # and one in 8,000 in all of three ensembles
NETWORKS: dict[str, dict[str, Any]] = {
    "small": {"block_config": (2, 2), "growth_rate": 8, "batch_size": 32},
    "tiny": {"block_config": (1, 1), "growth_rate": 4, "batch_size": 16},
}
BOTTLENECK = 16  # channels, of the tiny network alone
RECORD = runner.RESULTS / "cpu" / "curves-digits.json"

Change = Callable[[TrainConfig], TrainConfig]


def options(network: str, steps: int, seed: int = 0) -> Options:
    return Options(TrainConfig(**NETWORKS[network], steps=steps, seed=seed), members=MEMBERS)


@lru_cache
def textbook(network: str, steps: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The run in whose distance all others are measured, and the ensemble."""
    asked = options(network, steps, seed)
    return train(asked.config, DIGITS), curves.members(asked, DIGITS)


def outside(
    network: str, of: int, impl: str = "torch", steps: int | None = None, change: Change = lambda config: config
) -> list[dict[str, Any]]:
    """Verdicts of runs that rank first, one a seed; empty if a run of some seed does not."""
    found = []
    for seed in range(SEEDS):
        config = change(options(network, of, seed).config)
        result = verdict(train(config, DIGITS, impl, "bottlenecks", steps=steps), *textbook(network, of, seed))
        if result["inside"]:
            return []
        found.append(result)
    return found


@pytest.mark.slow
def test_the_loss_curve_is_one_that_rounding_explains() -> None:
    assert not (found := outside("small", 200)), found


def test_so_are_the_first_steps() -> None:
    assert not (found := outside("tiny", 50)), found


@pytest.fixture
def sums_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU adds up a tile in a tree; NumPy adds up its rows one after another, and loses digits that no GPU would."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def total(self: Any, input: Any) -> Any:
        data = input.handle.data
        wide = np.float64 if data.dtype == np.float32 else None
        found = np.sum(data, axis=self.axis, keepdims=self.keep_dims, dtype=wide).astype(data.dtype)
        return self.to_tensor(found, input.dtype)

    monkeypatch.setattr(interpreter.ReduceOps, "sum", total)


@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("sums_as_on_a_gpu")
@pytest.mark.parametrize("steps", [10, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.minutes])])
def test_so_is_the_one_of_the_kernels(steps: int) -> None:
    with curves.large_tiles(1024, 16):
        assert not (found := outside("tiny", 50, "triton", steps)), found


RECIPES: dict[str, Change] = {
    "momentum": lambda config: replace(config, momentum=0.9001),
    "learning rate": lambda config: replace(config, lr=1.0001 * config.lr),
    "weight decay": lambda config: replace(config, weight_decay=1.1e-4),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_slightly_different_recipe_is_noticed(name: str) -> None:
    assert len(outside("tiny", 50, change=RECIPES[name])) == SEEDS


def test_a_lazy_gradient_without_b_in_one_layer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = TorchBackend._resolve

    def without_b(self: TorchBackend, grad: LazyGradient, of: Features, chunk: slice) -> Tensor:
        if grad.b is not None and of.rows.shape[1] == BOTTLENECK:
            grad = LazyGradient(grad.D, grad.a, torch.zeros_like(grad.b))
        return resolve(self, grad, of, chunk)

    monkeypatch.setattr(TorchBackend, "_resolve", without_b)
    assert len(outside("tiny", 50)) == SEEDS


def first_step_ratio() -> float:
    """fastdense's distance to float64 in the first step, over that of the textbook network."""
    ratios = []
    for seed in range(SEEDS):
        asked = replace(options("small", 50, seed), impl=("torch",))
        found = curves.first_step(asked, DIGITS, few=1)
        ratios += [found[label]["to_float64"] / found["textbook"]["to_float64"] for label in RUNS["torch"]]
    return max(ratios)


def test_the_first_gradient_is_as_good_as_pytorchs_and_another_eps_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_step_ratio() < 1.5
    build = curves._network

    def another_eps(config: TrainConfig, data: Any, impl: str, *arguments: Any, **keywords: Any) -> nn.Module:
        model = build(config, data, impl, *arguments, **keywords)
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.eps = norm.eps if impl == "reference" else 1.1e-5
        return model

    monkeypatch.setattr(curves, "_network", another_eps)
    assert first_step_ratio() > 1.5
    assert len(outside("tiny", 50)) == SEEDS


def to_float64(asked: Options) -> dict[str, float]:
    found = curves.first_step(asked, DIGITS, few=1)
    return {label: row["to_float64"] for label, row in found.items()}


def test_kernels_with_the_tiles_of_a_gpu_are_as_close_as_the_contiguous_textbook(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual = curves.large_tiles
    monkeypatch.setattr(curves, "large_tiles", lambda: usual(64, 16))
    config = replace(options("tiny", 50).config, batch_size=8)  # 512 rows
    found = to_float64(Options(config, impl=("triton",)))
    assert found["fastdense triton"] < 1.5 * found["textbook"] < found["textbook, channels last"]


def test_pixels_move_by_one_rounding_up_and_down() -> None:
    images = DIGITS.train_images
    once, other = moved(images, 1), moved(images, 2)
    for changed in (once, other):
        up = torch.nextafter(images, torch.tensor(torch.inf))
        down = torch.nextafter(images, torch.tensor(-torch.inf))
        assert ((changed == up) | (changed == down)).all()
        assert 0.49 < (changed == up).float().mean() < 0.51
    assert not torch.equal(once, other) and torch.equal(once, moved(images, 1))


def test_every_run_of_the_ranked_is_first_equally_often() -> None:
    """Exchangeable runs: what the verdict promises, on random walks with jumps as training makes them."""
    generator = torch.Generator().manual_seed(0)
    reference, first, trials = torch.zeros(60, dtype=torch.float64), 0, 400
    for _ in range(trials):
        growth = torch.rand(10, 60, generator=generator, dtype=torch.float64).pow(20).mul(8).cumsum(1)
        runs = 1e-7 * growth.exp() * torch.randn(10, 60, generator=generator, dtype=torch.float64)
        first += not verdict(runs[0], reference, runs[1:])["inside"]
    assert 0.05 < first / trials < 0.15  # one in ten; three standard deviations to each side


def test_scores_leave_the_run_itself_out() -> None:
    runs = torch.rand(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.01
    got, at = curves._scores(runs)
    for i in range(len(runs)):
        others = torch.cat([runs[:i], runs[i + 1 :]]).log()
        want, step = ((runs[i].log() - others.mean(0)) / others.std(0)).max(0)
        assert got[i].item() == pytest.approx(want.item()) and at[i] == step + 1


def test_a_run_that_is_not_a_number_is_outside() -> None:
    ensemble = 1e-7 * torch.rand(9, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    losses = torch.zeros(20, dtype=torch.float64)
    assert not verdict(losses.index_fill(0, torch.tensor([5]), math.nan), losses, ensemble)["inside"]
    assert verdict(losses, losses, ensemble)["inside"]


def test_the_running_maximum_and_its_growth() -> None:
    grown = torch.exp(torch.arange(12.0, dtype=torch.float64) / 3) * 1e-7
    assert e_folding(grown) == pytest.approx(3.0)
    assert e_folding(torch.cat([grown, torch.ones(50, dtype=torch.float64)])) < 3.0  # what follows does not count
    assert e_folding(torch.full((9,), 1e-7, dtype=torch.float64)) == math.inf and math.isnan(e_folding(grown[:1]))
    losses = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
    assert running_maximum(losses, torch.ones(9, dtype=torch.float64)).tolist() == [curves.LEAST, 1.0, 1.0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"impl": ("cuda",)}, "impl must be of torch, triton, got cuda"),
        ({"members": 2}, "members must be at least 3.*got 2"),
        ({"triton_steps": 0}, "steps must be at least 1, got 200 and 0 of Triton"),
    ],
)
def test_bad_options_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options.usual(**wrong)


def test_a_record_and_its_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "curves.json", tmp_path / "curves.png"
    curves.main(["--steps", "3", "--members", "3", "--json", str(path), "--png", str(picture)])
    record = json.loads(path.read_text())
    assert set(record["results"]["runs"]) == {"textbook, channels last", *RUNS["torch"]}
    assert len(record["results"]["textbook"]) == 3 and picture.read_bytes().startswith(b"\x89PNG")
    assert "inside" in capsys.readouterr().out or "OUTSIDE" in capsys.readouterr().out


def test_the_committed_record_is_whole() -> None:
    record = json.loads(RECORD.read_text())
    settings, runs = record["settings"], record["results"]["runs"]
    assert settings["steps"] >= 200 and settings["members"] >= MEMBERS
    assert set(runs) == {"textbook, channels last", *RUNS["torch"], *RUNS["triton"]}
    for row in runs.values():
        found = row["verdict"]
        assert len(row["losses"]) == len(row["running_maximum"]) >= 50
        assert found["inside"] == (found["rank"] > 1) and found["of"] == settings["members"] + 1
