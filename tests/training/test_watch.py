"""Watching the gradients flow while a network trains, and finding who broke."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import train_runs
from helpers.train_runs import SMALL, command, records, same, steps, words
from matplotlib.image import imread

import fastdense
from fastdense.training.config import TrainConfig
from fastdense.training.events import FlowEvent, NonFiniteLoss

TINY = TrainConfig(depth=16, growth_rate=4, epochs=1, steps=6, batch_size=32, device="cpu", impl="torch")
prepared, trained = partial(train_runs.prepared, TINY), partial(train_runs.trained, TINY)
WATCHED = [*SMALL, "--steps", "4", "--batch-size", "32", "--watch-flow", "2"]


def test_flow_is_that_of_the_network_after_the_step() -> None:
    watched = prepared(watch_flow=3)
    order = torch.randperm(watched.data.train_count, generator=torch.Generator().manual_seed(watched.config.seed))
    flows = []
    for events in watched.rounds():
        for event in events:
            if isinstance(event, FlowEvent):
                numbers = order[(event.step - 1) * 32 : event.step * 32]
                images, labels = next(iter(watched.data.train([numbers], epoch=1)))
                flows.append((event, fastdense.gradient_flow(watched.runs[0].model, images, labels)))
    assert [event.step for event, _ in flows] == [3, 6]
    for event, blocks in flows:
        assert event.run == "fastdense" and event.epoch == 1
        assert list(event.total) == [block.name for block in blocks]
        for block in blocks:
            assert event.total[block.name] == pytest.approx(block.total.tolist(), rel=1e-5)
            got = torch.tensor(event.contributions[block.name]).double()
            assert torch.allclose(got, block.contributions, rtol=1e-5)


def test_watching_both_runs_changes_nothing() -> None:
    options: Any = {"compare": True, "check_steps": 0, "steps": 3, "drop_rate": 0.2}
    (plain, _), (watched, events) = (trained(**options, watch_flow=every) for every in (None, 1))
    flows = [(event.step, event.run) for event in events if isinstance(event, FlowEvent)]
    assert flows == [(step, run) for step in (1, 2, 3) for run in ("reference", "fastdense")]
    for ours, theirs in zip(plain.runs, watched.runs, strict=True):
        assert ours.losses == theirs.losses
        assert same(ours.model.state_dict(), theirs.model.state_dict()) == ""


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_the_layer_that_broke_is_named(impl: str, amp: str) -> None:
    broken = prepared(impl=impl, amp=amp)
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
        trained(lr=1e30)


def test_pictures_and_numbers_are_left_behind(out: Path) -> None:
    result = command(*WATCHED, "--out", out)
    assert result.exit_code == 0, result.output
    pictures = sorted(out.glob("flow-*"))
    assert [path.name for path in pictures] == ["flow-fastdense-00000002.png", "flow-fastdense-00000004.png"]
    assert imread(pictures[-1]).std() > 0.05
    assert steps(out, "flow") == [2, 4]
    total = records(out, "flow")[-1]["total"]["features.denseblock1"]
    assert f"after step 4: denseblock1 {total[1]:.1e} .. {total[-1]:.1e}" in words(result.output)
    (events,) = out.glob("events.out.tfevents.*")
    assert b"gradient_flow/fastdense/features.denseblock1_first" in events.read_bytes()


@pytest.mark.parametrize(("on_error", "code"), [("skip", 0), ("stop", 1)])
def test_a_picture_that_cannot_be_written_is_an_error_unless_skipped(
    out: Path, monkeypatch: pytest.MonkeyPatch, on_error: str, code: int
) -> None:
    def full(curves: object, path: Path, **words: str) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastdense.analysis.plots.flow_picture", full)
    result = command(*WATCHED, "--out", out, "--on-error", on_error)
    assert result.exit_code == code, result.output
    assert "No space left on device" in words(result.output)
    assert not list(out.glob("flow-*"))
