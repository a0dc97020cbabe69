"""Watching the gradients flow while a network trains, and finding who broke."""

from __future__ import annotations

import dataclasses
import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from typer.testing import CliRunner

import fastdense
from fastdense.cli.app import app
from fastdense.data.source import digits
from fastdense.training.config import TrainConfig
from fastdense.training.events import FlowEvent, NonFiniteLoss, StepEvent
from fastdense.training.experiment import Experiment

TINY = TrainConfig(depth=16, growth_rate=4, epochs=1, steps=6, batch_size=32, device="cpu", impl="torch")


def experiment(**changes: Any) -> Experiment:
    return Experiment(dataclasses.replace(TINY, **changes), digits())


def test_flow_is_that_of_the_network_after_the_step() -> None:
    watched = experiment(watch_flow=3)
    flows = []
    for events in watched.rounds():
        for event in events:
            if isinstance(event, FlowEvent):
                run = watched.runs[0]
                images, labels = next(iter(watched.data.train([_numbers(watched, event.step)], epoch=1)))
                flows.append((event, fastdense.gradient_flow(run.model, images, labels)))
    assert [event.step for event, _ in flows] == [3, 6]
    for event, blocks in flows:
        assert event.run == "fastdense" and event.epoch == 1
        assert list(event.total) == [block.name for block in blocks]
        for block in blocks:
            assert event.total[block.name] == pytest.approx(block.total.tolist(), rel=1e-5)
            got = torch.tensor(event.contributions[block.name]).double()
            assert torch.allclose(got, block.contributions, rtol=1e-5)


def _numbers(watched: Experiment, step: int) -> torch.Tensor:
    order = torch.Generator().manual_seed(watched.config.seed)
    return torch.randperm(watched.data.train_count, generator=order)[(step - 1) * 32 : step * 32]


@pytest.mark.parametrize("drop_rate", [0.0, 0.2])
def test_watching_changes_nothing(drop_rate: float) -> None:
    plain, watched = experiment(drop_rate=drop_rate), experiment(drop_rate=drop_rate, watch_flow=1)
    losses = [[e.loss for e in chain.from_iterable(e.rounds()) if isinstance(e, StepEvent)] for e in (plain, watched)]
    assert losses[0] == losses[1]
    for name, value in plain.runs[0].model.state_dict().items():
        assert torch.equal(value, watched.runs[0].model.state_dict()[name]), name


def test_both_runs_are_watched() -> None:
    events = list(chain.from_iterable(experiment(compare=True, check_steps=0, steps=2, watch_flow=1).rounds()))
    flows = [(event.run, event.step) for event in events if isinstance(event, FlowEvent)]
    assert flows == [("reference", 1), ("fastdense", 1), ("reference", 2), ("fastdense", 2)]


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_the_layer_that_broke_is_named(impl: str, amp: str) -> None:
    broken = experiment(impl=impl, amp=amp)
    block: Any = broken.runs[0].model.features.denseblock2  # type: ignore[union-attr]
    with torch.no_grad():
        block.denselayer1.conv2.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(NonFiniteLoss) as caught:
        list(broken.rounds())
    name = "features.denseblock2"
    assert caught.value.step == 1
    assert str(caught.value).endswith(
        f"The values of the output of layer 1 of {name} (H_1) are the first that are not finite; "
        f"{name}.denselayer1.conv2.weight is not finite itself"
    )


def test_what_cannot_be_diagnosed_does_not_hide_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> str:
        raise torch.OutOfMemoryError("no memory for a copy")

    monkeypatch.setattr("fastdense.training.experiment.first_not_finite", fail)
    with pytest.raises(NonFiniteLoss, match=r"the training loss of run fastdense is not finite"):
        list(experiment(lr=1e30).rounds())


def test_pictures_and_numbers_are_left_behind(tmp_path: Path) -> None:
    out = tmp_path / "run"
    small = ["--depth", "16", "--growth-rate", "4", "--steps", "4", "--batch-size", "32", "--watch-flow", "2"]
    result = CliRunner().invoke(app, ["train", *small, "--out", str(out)], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.glob("flow-*")) == [
        "flow-fastdense-00000002.png", "flow-fastdense-00000004.png"
    ]  # fmt: skip
    assert imread(out / "flow-fastdense-00000004.png").std() > 0.05
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    flows = [record for record in records if record["event"] == "flow"]
    assert [record["step"] for record in flows] == [2, 4]
    first, last = flows[-1]["total"]["features.denseblock1"][1], flows[-1]["total"]["features.denseblock1"][-1]
    assert f"after step 4: denseblock1 {first:.1e} .. {last:.1e}" in result.output
    (events,) = out.glob("events.out.tfevents.*")
    assert b"gradient_flow/fastdense/features.denseblock1_first" in events.read_bytes()


def test_a_picture_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(curves: object, path: Path, **words: str) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastdense.analysis.plots.flow_picture", full)
    small = ["--depth", "16", "--growth-rate", "4", "--steps", "4", "--batch-size", "32", "--watch-flow", "2"]
    for on_error, code in (("skip", 0), ("stop", 1)):
        out = tmp_path / on_error
        result = CliRunner().invoke(app, ["train", *small, "--out", str(out), "--on-error", on_error])
        assert result.exit_code == code, result.output
        assert "No space left on device" in " ".join(result.output.split())
        assert not list(out.glob("flow-*"))
