"""Training: the same weights, batches and losses as the reference network, and honest words about the rest."""

import copy
import math
import re
from functools import partial

import pytest
import torch
from helpers import train_runs
from helpers.train_runs import DIGITS, FEW, same
from torch import nn

from fastdense.data.source import batches
from fastdense.training.config import TrainConfig, flag, layers_per_block
from fastdense.training.events import CheckEvent, EpochEvent, Event, NonFiniteLoss, StepEvent
from fastdense.training.experiment import Experiment
from fastdense.training.run import Run, saved_for_backward

TINY = TrainConfig(depth=16, growth_rate=8, epochs=2, device="cpu", impl="torch")
prepared, trained = partial(train_runs.prepared, TINY), partial(train_runs.trained, TINY)
few = partial(train_runs.trained, data=FEW, batch_size=50)  # steps that take no time


@pytest.fixture(scope="module")
def compared() -> tuple[Experiment, list[Event]]:
    return trained(compare=True)


def test_both_learn_on_the_same_loss_curve(compared: tuple[Experiment, list[Event]]) -> None:
    experiment, events = compared
    checks = [event for event in events if isinstance(event, CheckEvent)]
    assert [check.step for check in checks] == list(range(1, 11))
    assert checks[-1].reference < 0.9 * checks[0].reference, "nothing was learnt: the comparison says little"
    for check in checks:
        assert check.fastdense == pytest.approx(check.reference, rel=1e-12), check
    reference, fast = experiment.runs
    # Rounding alone separates the first steps in float32; later, ReLUs that open in one of them only.
    assert fast.losses[:2] == pytest.approx(reference.losses[:2], abs=2e-5)
    assert max(abs(a - b) for a, b in zip(reference.losses, fast.losses, strict=True)) < 0.3
    for run in experiment.runs:
        assert run.summary().test_accuracy > 0.9, run.name  # type: ignore[operator]
        assert run.losses[-1] < 0.5 * run.losses[0], run.name


def test_events_tell_every_step_and_epoch(compared: tuple[Experiment, list[Event]]) -> None:
    experiment, events = compared
    assert experiment.steps == 2 * experiment.steps_per_epoch == 2 * (1437 // 64)
    for run in experiment.runs:
        steps = [event for event in events if isinstance(event, StepEvent) and event.run == run.name]
        assert [event.step for event in steps] == list(range(1, experiment.steps + 1))
        assert [event.epoch for event in steps] == [1] * 22 + [2] * 22
        assert [event.loss for event in steps] == run.losses
        assert all(event.images_per_second == 64 / event.seconds > 0 for event in steps)
        epochs = [event for event in events if isinstance(event, EpochEvent) and event.run == run.name]
        assert [(event.epoch, event.step) for event in epochs] == [(1, 22), (2, 44)]
        assert epochs[0].train_loss == pytest.approx(sum(run.losses[:22]) / 22)
        assert epochs[1].train_loss == pytest.approx(sum(run.losses[22:]) / 22) == run.summary().train_loss


def test_summaries_and_the_words_of_a_comparison_are_what_was_measured(
    compared: tuple[Experiment, list[Event]],
) -> None:
    experiment, _ = compared
    reference, fast = (run.summary() for run in experiment.runs)
    assert (reference.run, reference.label, reference.impl) == ("reference", "reference (torch.cat)", "reference")
    assert (fast.run, fast.label, fast.impl) == ("fastdense", "fastdense", "torch")
    assert reference.kept_bytes > 1.5 * fast.kept_bytes > 0
    run = experiment.runs[1]
    model = run.model.eval()
    with torch.no_grad():
        right = (model(DIGITS.test_images).argmax(1) == DIGITS.test_labels).sum().item()
    assert fast.test_accuracy == right / 360
    middle = sorted(run.seconds)[21:23]
    assert fast.step_seconds == pytest.approx(sum(middle) / 2)
    assert fast.steps == 44

    words = str(experiment.comparison())
    number = r"\d\.\de-\d\d"
    assert re.fullmatch(
        rf"same loss curve \(largest difference of the training loss over the first 10 steps in float64: {number}; "
        rf"over all 44 steps in float32, where rounding errors grow: {number}\), "
        r"\d\.\d times fewer bytes saved for backward, step time \d\.\d\d times",
        words,
    ), words
    assert f"{reference.kept_bytes / fast.kept_bytes:.1f} times fewer bytes" in words


def test_a_comparison_hides_neither_another_curve_nor_more_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    build = Experiment._runs

    def disturbed(self: Experiment, dtype: torch.dtype) -> list[Run]:
        runs = build(self, dtype)
        with torch.no_grad():
            next(runs[1].model.parameters()).mul_(1 + 1e-6)
        return runs

    monkeypatch.setattr(Experiment, "_runs", disturbed)
    experiment, _ = few(compare=True)
    assert str(experiment.comparison()).startswith("DIFFERENT loss curves (")

    reference, fast = experiment.runs
    reference.kept_bytes, fast.kept_bytes = fast.kept_bytes, 2 * fast.kept_bytes
    reference.losses, fast.losses = [1.0, math.nan, 1.0], [1.5, 1.0, 1.0]
    words = str(experiment.comparison())
    assert "rounding errors grow: nan" in words
    assert "2.0 times MORE bytes saved" in words


def test_dropout_is_not_called_the_same_curve() -> None:
    experiment, events = few(compare=True, drop_rate=0.2)
    assert not any(isinstance(event, CheckEvent) for event in events)
    words = str(experiment.comparison())
    assert "same loss curve" not in words
    assert "the two draw different dropout masks by construction" in words
    assert experiment.runs[0].losses != experiment.runs[1].losses


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
def test_a_seed_fixes_every_bit(impl: str, drop_rate: float) -> None:
    runs = [few(impl=impl, drop_rate=drop_rate, seed=seed)[0].runs[0] for seed in (0, 0, 1)]
    assert runs[0].losses == runs[1].losses != runs[2].losses
    # The first weights too: those of the convolution hardly move in a few steps.
    first, _, other = (run.model.state_dict()["features.conv0.weight"] for run in runs)
    assert (first - other).abs().mean() > 0.1


def test_a_run_is_the_same_alone_and_compared() -> None:
    # Dropout draws from the generators: a companion that draws too must not be noticed.
    both, _ = few(compare=True, drop_rate=0.3)
    for run, impl in zip(both.runs, ["reference", "torch"], strict=True):
        alone, _ = few(impl=impl, drop_rate=0.3)
        assert alone.runs[0].losses == run.losses, impl


def test_every_step_draws_another_dropout_mask() -> None:
    images, labels = DIGITS.train_images[:64], DIGITS.train_labels[:64]
    for drop_rate in (0.0, 0.5):
        (run,) = prepared(drop_rate=drop_rate, lr=1e-12, weight_decay=0.0).runs
        run.step(images, labels)
        run.step(images, labels)
        # The weights have hardly moved and BatchNorm saw the same images: only the masks may differ.
        assert (abs(run.losses[0] - run.losses[1]) > 1e-3) == (drop_rate > 0), run.losses


def test_options_reach_the_optimizer_and_the_model() -> None:
    plain, frugal = prepared(), prepared(recompute="bottlenecks", momentum=0.0, weight_decay=0.25, lr=0.5, epochs=50)
    assert plain.runs[0].kept_bytes > 1.5 * frugal.runs[0].kept_bytes
    (group,) = frugal.runs[0].optimizer.param_groups
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.0, 0.25, False)
    assert group["lr"] == pytest.approx(0.05), "the warm-up starts at a tenth"
    (group,) = plain.runs[0].optimizer.param_groups
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 1e-4, True)


def test_runs_take_turns_at_going_first(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    step = Run.step
    monkeypatch.setattr(Run, "step", lambda run, *batch: order.append(run.name[0]) or step(run, *batch))
    few(compare=True, steps=4, check_steps=0)
    assert "".join(order) == "rffrrffr"


def test_measuring_the_bytes_changes_nothing() -> None:
    experiment = prepared(drop_rate=0.2)
    model = experiment.runs[0].model
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    kept = saved_for_backward(model, DIGITS.train_images[:64].clone(), DIGITS.train_labels[:64].clone())
    assert kept == experiment.runs[0].kept_bytes > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert same(model.state_dict(), before) == ""


@pytest.mark.parametrize(("which", "name"), [(0, "reference"), (1, "fastdense")])
def test_non_finite_loss_names_the_run_that_has_it(which: int, name: str) -> None:
    experiment = prepared(compare=True, check_steps=0)
    with torch.no_grad():
        next(experiment.runs[which].model.parameters()).fill_(math.nan)
    with pytest.raises(NonFiniteLoss, match=rf"training loss of run {name} .*{name} nan") as stopped:
        list(experiment.rounds())
    assert (stopped.value.run, stopped.value.epoch, stopped.value.step) == (name, 1, 1)
    other = experiment.runs[1 - which]
    assert f"{other.name} {other.losses[0]:g}" in str(stopped.value)


def test_non_finite_test_loss_stops_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "evaluate", lambda *_: (math.inf, 0.1))
    with pytest.raises(NonFiniteLoss, match="the test loss of run fastdense is not finite at epoch 1, step 3"):
        few(steps=3)


def test_batches_are_full_and_show_no_image_twice() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.stack(list(batches(1437, 64, generator))) for _ in range(2))
    for epoch in (first, second):
        assert epoch.shape == (22, 64)
        assert len(epoch.unique()) == 22 * 64
        assert epoch.min() >= 0 and epoch.max() < 1437
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("depth", "bottleneck", "n"), [(10, True, 1), (40, True, 6), (100, True, 16), (7, False, 1), (40, False, 12)]
)
def test_depth_gives_layers_per_block(depth: int, bottleneck: bool, n: int) -> None:
    assert layers_per_block(depth, bottleneck=bottleneck) == n
    config = TrainConfig(depth=depth, bn_size=4 if bottleneck else None)
    assert config.architecture.arguments["block_config"] == (n, n, n)
    assert config.architecture.arguments["num_init_features"] == (24 if bottleneck else 16), "as in the paper"
    with torch.device("meta"):
        model = config.architecture.build(channels=1, classes=10)
    # The depth counts convolutions on the longest path, and the classifier.
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) + 1 == depth


def test_named_models_keep_their_stem_where_images_are_large_enough() -> None:
    small, large = (TrainConfig(model="densenet161", image_size=size).architecture for size in (31, 32))
    assert (small.last_resolution(31), large.last_resolution(32)) == (3, 1)
    kernels = []
    for net in (small, large):
        with torch.device("meta"):
            model = net.build(channels=1, classes=10)
        (conv,) = (module for name, module in model.named_modules() if name == "features.conv0")
        assert isinstance(conv, nn.Conv2d) and conv.out_channels == 96
        kernels.append(conv.kernel_size)
    assert kernels == [(3, 3), (7, 7)]
    assert TrainConfig(model="densenet121", growth_rate=8).architecture.arguments["growth_rate"] == 8


AT_LEAST_1 = ("epochs", "steps", "batch_size", "growth_rate", "threads", "watch_flow")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[({name: 0}, f"{flag(name)} must be at least 1, got 0") for name in AT_LEAST_1],
        *[({name: -1}, f"{flag(name)} must be at least 0, got -1") for name in ("workers", "check_steps")],
        ({"schedule": "linear"}, "--schedule must be one of 'cosine', 'step', got 'linear'"),
        ({"schedule": "step", "milestones": (0.5, 1.0)}, "--milestones must be increasing .* got '0.5,1.0'"),
        ({"schedule": "step", "milestones": (0.1,), "warm_up": 0.2}, "--milestones must be .* after the warm-up"),
        ({"schedule": "step", "milestones": ()}, "--milestones must be"),
        ({"schedule": "step", "milestones": (math.nan,)}, "--milestones must be"),
        ({"warm_up": 1.0}, r"--warm-up must be at least 0 and less than 1, .* got 1\.0"),
        ({"gamma": 0.0}, r"--gamma must be more than 0 .* got 0\.0"),
        ({"amp": "fp8"}, "--amp must be one of 'off', 'bf16', 'fp16', got 'fp8'"),
        ({"ema": 1.0}, r"--ema must be more than 0 and less than 1, as 0.999, got 1\.0"),
        ({"on_error": "ignore"}, "--on-error must be one of 'stop', 'skip', got 'ignore'"),
        ({"depth": 101}, "--depth 101 .*nearest 100 and 106$"),
        ({"depth": 4}, "--depth 4 .*nearest 10$"),
        ({"depth": 41, "bn_size": None}, "--depth 41 .*nearest 40 and 43$"),
        ({"model": "resnet18"}, "--model must be one of densenet121, .* got 'resnet18'"),
        ({"model": "densenet121", "depth": 40}, "--model and --depth contradict"),
        ({"depth": 40, "block_config": (2, 2)}, "--depth and --block-config contradict"),
        ({"block_config": (6, 0)}, r"--block-config .*at least 1.*'6,0'"),
        ({"block_config": (1,) * 5}, "--image-size 8 is too small for 5 dense blocks.*at least 16"),
        ({"bn_size": -1}, "--bn-size must be at least 1.*got -1"),
        ({"drop_rate": 1.0}, r"--drop-rate .*less than 1, got 1\.0"),
        ({"momentum": -0.1}, r"--momentum .*got -0\.1"),
        ({"lr": math.nan}, "--lr must be a positive number, got nan"),
        ({"weight_decay": -1.0}, "--weight-decay .*got -1"),
        ({"seed": -1}, "--seed .*got -1"),
        ({"image_size": 0, "data": "a folder"}, "--image-size must be at least 1, got 0"),
        ({"plain": True, "compare": True}, "--plain leaves no dense block for --compare"),
        ({"impl": "cuda"}, "--impl must be one of .*got 'cuda'"),
        ({"recompute": "all"}, "--recompute must be one of 'activations', 'bottlenecks', 'auto', got 'all'"),
        ({"compare": True, "impl": "reference"}, "--compare .*not reference"),
        ({"model": "densenet121", "batch_size": 1}, "--batch-size 1 leaves BatchNorm a single value"),
        ({"batch_size": 1438}, "--batch-size must be at most 1437, the training images, got 1438"),
        ({"device": "nowhere"}, "--device nowhere cannot be used: .*Use cpu, cuda or cuda:N"),
        ({"device": "cuda:99"}, "--device cuda:99 cannot be used"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Experiment(TrainConfig(**options), DIGITS)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_loss_curves_agree_on_a_gpu() -> None:
    experiment, _ = trained(compare=True, steps=5, check_steps=5, device="cuda", impl="auto")
    comparison = experiment.comparison()
    assert comparison is not None and comparison.same_curve, comparison
