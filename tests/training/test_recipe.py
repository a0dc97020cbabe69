"""Learning rates, mixed precision, averaged weights, and steps that cannot be made."""

import copy
import math
import warnings
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import train_runs
from helpers.train_runs import DIGITS, TINY, same
from torch import nn

from fastdense.training import experiment as experiments
from fastdense.training.events import NonFiniteLoss, StepEvent
from fastdense.training.run import lr_scheduler

prepared = partial(train_runs.prepared, epochs=1, batch_size=64)


def rates(steps: int, **changes: Any) -> list[float]:
    config = replace(TINY, **changes)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr)
    scheduler, found = lr_scheduler(optimizer, steps, config), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_steps_of_the_schedule_are_the_papers() -> None:
    """CIFAR: a tenth at 50 % and 75 %; ImageNet: at a third and two thirds."""
    assert rates(8, schedule="step") == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)
    thirds = rates(9, schedule="step", milestones=(1 / 3, 2 / 3), lr=1.0)
    assert thirds == pytest.approx([1.0] * 3 + [0.1] * 3 + [0.01] * 3)
    assert rates(4, schedule="step", milestones=(0.5,), gamma=0.5, lr=8.0) == [8.0, 8.0, 4.0, 4.0]
    # After a warm-up.
    assert rates(8, schedule="step", warm_up=0.25, lr=1.0) == pytest.approx([0.1, 0.55, 1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize(("steps", "warm_up"), [(1, 0), (2, 1), (10, 1), (100, 5), (101, 6)])
def test_half_a_cosine_follows_a_linear_warm_up_over_a_twentieth_of_the_steps(steps: int, warm_up: int) -> None:
    rest = steps - warm_up
    wanted = [0.1 + 0.9 * i / warm_up for i in range(warm_up)]
    wanted += [(1 + math.cos(math.pi * i / rest)) / 2 for i in range(rest)]
    assert rates(steps, lr=1.0) == rates(steps, lr=1.0, warm_up=0.05) == pytest.approx(wanted)
    assert rates(rest, lr=1.0, warm_up=0.0) == pytest.approx(wanted[warm_up:])


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_autocast_reaches_the_layers_and_training_follows_float32(amp: str) -> None:
    mixed, full = prepared(amp=amp, steps=4), prepared(steps=4)
    dtypes = set()
    mixed.runs[0].model.get_submodule("features.conv0").register_forward_hook(lambda *seen: dtypes.add(seen[-1].dtype))
    events = list(chain.from_iterable(mixed.rounds()))
    assert dtypes == {torch.bfloat16 if amp == "bf16" else torch.float16}, "in training and in evaluation"
    list(full.rounds())
    assert mixed.runs[0].losses == pytest.approx(full.runs[0].losses, rel=0.05)
    assert mixed.runs[0].losses != full.runs[0].losses
    norms = [event.grad_norm for event in events if isinstance(event, StepEvent)]
    assert all(0.01 < norm < 100 for norm in norms), "gradients are unscaled before anyone looks at them"


def test_a_step_that_overflows_float16_is_skipped_and_reported() -> None:
    experiment = prepared(amp="fp16", steps=3)
    run = experiment.runs[0]
    run.scaler.load_state_dict(run.scaler.state_dict() | {"scale": 2.0**40})
    before = copy.deepcopy(run.model.state_dict())
    rounds = experiment.rounds()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch's, about a scheduler that steps before its optimizer
        (event,) = next(rounds)
        assert isinstance(event, StepEvent) and event.skipped and not math.isfinite(event.grad_norm)
        assert run.scaler.get_scale() == 2.0**39
        assert all(torch.equal(parameter, before[name]) for name, parameter in run.model.named_parameters())
        assert event.lr == run.optimizer.param_groups[0]["lr"], "the schedule waits too"
        run.scaler.load_state_dict(run.scaler.state_dict() | {"scale": 2.0**10})
        events = [event for events in rounds for event in events if isinstance(event, StepEvent)]
    assert [event.skipped for event in events] == [False, False]


def test_float16_that_overflows_with_any_scale_stops() -> None:
    experiment = prepared(amp="fp16", steps=3)
    run = experiment.runs[0]
    run.scaler.load_state_dict(run.scaler.state_dict() | {"scale": 1.5})
    next(run.model.parameters()).register_hook(lambda grad: grad * math.inf)
    with pytest.raises(NonFiniteLoss, match=r"overflows float16 with any scale at epoch 1, step 1 .*--amp bf16 or off"):
        list(experiment.rounds())


def test_the_average_is_that_of_the_steps_and_the_norm_that_of_the_gradients() -> None:
    decay = 0.75
    averaged, plain = prepared(ema=decay, steps=4), prepared(steps=4)
    expected: dict[str, torch.Tensor] = {}
    for events in plain.rounds():
        if isinstance(events[0], StepEvent):
            squares = [p.grad.double().square().sum() for p in plain.runs[0].model.parameters()]
            assert events[0].grad_norm == pytest.approx(torch.stack(squares).sum().sqrt().item(), rel=1e-5)
            state = {k: v.double() for k, v in plain.runs[0].model.state_dict().items() if v.is_floating_point()}
            expected = {k: decay * expected.get(k, v) + (1 - decay) * v for k, v in state.items()}
    events = list(chain.from_iterable(averaged.rounds()))
    assert averaged.runs[0].losses == plain.runs[0].losses, "the average must not be noticed"
    ema = averaged.runs[0].ema
    assert ema is not None
    found = {name: value.double() for name, value in ema.module.state_dict().items() if name in expected}
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # weights and running statistics
    ema.module.eval()
    with torch.no_grad():
        logits = ema.module(DIGITS.test_images)
    assert events[-1].ema_test_loss == pytest.approx(F.cross_entropy(logits, DIGITS.test_labels).item(), rel=1e-5)
    assert events[-1].ema_test_loss != events[-1].test_loss


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "diagnose", lambda run, _, labels: f"{len(labels)} images went into {run.name}")
    experiment = prepared(steps=4, drop_rate=0.2, ema=0.9)
    (run,) = experiment.runs
    rounds = experiment.rounds()
    assert len([next(rounds), next(rounds)]) == len(run.losses) == 2
    good = copy.deepcopy(run.state_dict())
    if bad == "loss":
        run.network.register_forward_pre_hook(lambda module, inputs: (inputs[0] * math.inf,))
    else:
        next(run.model.parameters()).register_hook(lambda grad: grad * math.nan)
    what = "training loss" if bad == "loss" else "gradient"
    message = f"the {what} of run fastdense is not finite at epoch 1, step 3 "
    with pytest.raises(NonFiniteLoss, match=message) as stopped:
        next(rounds)
    assert "try a smaller --lr than 0.1. 64 images went into fastdense" in str(stopped.value)
    assert (stopped.value.run, stopped.value.epoch, stopped.value.step) == ("fastdense", 1, 3)
    left = run.state_dict()
    for name in ("model", "optimizer", "scheduler", "ema", "rng"):
        assert same(left[name], good[name], name) == ""
