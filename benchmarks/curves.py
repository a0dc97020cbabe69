"""Whether fastdense's loss curve is one that rounding alone explains.

    python -m benchmarks.curves [--steps 200] [--impl torch triton] [--members 19] [--json FILE] [--png FILE]

Two correct implementations round differently, and training amplifies it: a ReLU whose input is zero but for rounding
opens in one of them only, and from there the weights differ. How far the curves may drift apart is therefore measured,
on the textbook network alone: an ensemble of its runs, in each of which every pixel has been moved by one ulp, up or
down at random. Everything else is the same in all runs: initial weights, batches, recipe (that of ``fastdense train``).
``verdict`` says whether fastdense's run is the odd one out, and how often a correct one would be called that.

The textbook network is contiguous, as PyTorch's networks are. In channels last PyTorch's own BatchNorm adds up its
statistics one value after another on the CPU and loses several times as many digits: that run is shown beside it.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from fastdense.data import Dataset, batches, digits
from fastdense.runs import lr_scheduler
from fastdense.train_config import TrainConfig

from .runner import RESULTS, environment, write_record

__all__ = ["RUNS", "Options", "e_folding", "main", "members", "moved", "run", "running_maximum", "train", "verdict"]

RUNS = {
    "torch": {"fastdense torch, activations": "activations", "fastdense torch, bottlenecks": "bottlenecks"},
    "triton": {"fastdense triton": "activations"},
}
ROUNDING = 2.0**-24  # relative, of one operation in float32
LEAST, MOST = 1e-12, 1e12  # deviations are kept in between: a curve may agree by chance, or be NaN
LEAST_SPREAD = 0.1  # of the logarithm: curves that are all within ten per cent of each other are not told apart
APART = 1e-2  # a deviation of the loss from which on it no longer grows by a factor each step

Tick = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What to train, how often.

    Attributes:
        config: network, batch, steps and recipe of all runs.
        impl: keys of ``RUNS``.
        members: textbook runs with moved pixels.
        triton_steps: of Triton, which is interpreted where there is no GPU; the learning rates are those of all steps.
    """

    config: TrainConfig
    impl: tuple[str, ...] = tuple(RUNS)
    members: int = 19
    triton_steps: int = 50

    def __post_init__(self) -> None:
        unknown = [name for name in self.impl if name not in RUNS]
        if unknown:
            raise ValueError(f"impl must be of {', '.join(RUNS)}, got {', '.join(unknown)}")
        if self.members < 3:
            raise ValueError(f"members must be at least 3, for a mean and a deviation without one, got {self.members}")
        if self.config.steps is None or self.config.steps < 1 or self.triton_steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.config.steps} and {self.triton_steps} of Triton")

    @classmethod
    def usual(cls, steps: int = 200, **options: Any) -> Options:
        """Two blocks of three layers on the digits: ten minutes, half of them in Triton's interpreter."""
        return cls(TrainConfig(block_config=(3, 3), growth_rate=8, batch_size=32, steps=steps), **options)

    @property
    def steps(self) -> int:
        """Of all runs but Triton's."""
        assert self.config.steps is not None
        return self.config.steps

    def steps_of(self, impl: str) -> int:
        """How many steps ``impl`` makes."""
        return min(self.steps, self.triton_steps) if impl == "triton" else self.steps


def moved(images: Tensor, seed: int) -> Tensor:
    """``images``, every value one ulp up or down at random."""
    up = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return torch.nextafter(images, torch.where(up, torch.inf, -torch.inf))


def _network(
    config: TrainConfig, data: Dataset, impl: str, recompute: str | None = None, *, channels_last: bool = False
) -> nn.Module:
    """From the seed: the same initial weights for every implementation."""
    torch.manual_seed(config.seed)
    model = config.architecture.build(channels=data.channels, classes=data.classes, impl=impl, recompute=recompute)
    if channels_last:  # images of one channel have no layout: from the first convolution on
        model.get_submodule("features.conv0").register_forward_hook(_channels_last)
    return model


def _channels_last(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.contiguous(memory_format=torch.channels_last)


def train(
    config: TrainConfig,
    data: Dataset,
    impl: str = "reference",
    recompute: str | None = None,
    *,
    channels_last: bool = False,
    steps: int | None = None,
    tick: Tick = lambda run: None,
) -> Tensor:
    """The training losses ``[steps]``, float64, of a run as ``fastdense train`` makes it.

    The loss is computed again in float64 from the float32 class scores: one in float32 has no digits for what the first
    steps differ by.

    Args:
        config: network and recipe; its ``steps`` are the learning rate's, too.
        data: what to train on.
        impl, recompute: see :class:`fastdense.DenseNet`.
        channels_last: the layout of the textbook network's features.
        steps: stop after so many.
        tick: is called after every step.
    """
    model = _network(config, data, impl, recompute, channels_last=channels_last)
    rates: dict[str, Any] = {"lr": config.lr, "momentum": config.momentum, "weight_decay": config.weight_decay}
    optimizer = torch.optim.SGD(model.parameters(), **rates, nesterov=config.momentum > 0)
    assert config.steps is not None
    scheduler = lr_scheduler(optimizer, config.steps)
    losses: list[float] = []
    for batch in _batches(config, data, steps or config.steps):
        labels = data.train_labels[batch]
        optimizer.zero_grad(set_to_none=True)
        scores = model(data.train_images[batch])
        F.cross_entropy(scores, labels).backward()
        optimizer.step()
        scheduler.step()
        losses.append(F.cross_entropy(scores.detach().double(), labels).item())
        tick(impl)
    return torch.tensor(losses, dtype=torch.float64)


def _batches(config: TrainConfig, data: Dataset, steps: int) -> Iterator[Tensor]:
    order = torch.Generator().manual_seed(config.seed)
    left = steps
    while left > 0:
        for batch in batches(len(data.train_labels), config.batch_size, order):
            if left > 0:
                yield batch
            left -= 1


def members(options: Options, data: Dataset, tick: Tick = lambda run: None) -> Tensor:
    """Losses ``[members, steps]`` of textbook runs with moved pixels; the seeds are 1, 2, ..."""
    runs = []
    for seed in range(1, options.members + 1):
        mine = replace(data, train_images=moved(data.train_images, seed))
        runs.append(train(options.config, mine, tick=tick))
    return torch.stack(runs)


def running_maximum(losses: Tensor, reference: Tensor) -> Tensor:
    """The largest ``|loss - reference|`` so far, ``[..., steps]``.

    Monotone, so that a curve which crosses the other one is not called close.
    """
    steps = losses.shape[-1]
    deviation = (losses - reference[:steps]).abs().nan_to_num(nan=MOST, posinf=MOST)
    return deviation.clamp(LEAST, MOST).cummax(-1).values


def _scores(curves: Tensor) -> tuple[Tensor, Tensor]:
    """For each of ``curves [n, steps]``: how far it lies above the others where it does most, and the step.

    In logarithms, minus the mean of the others, over their standard deviation. All curves are treated alike.
    """
    logs, n = curves.log(), len(curves)
    others = n - 1
    mean = (logs.sum(0) - logs) / others
    square = ((logs - logs.mean(0)).square().sum(0) - (logs - logs.mean(0)).square() * n / others) / (others - 1)
    spread = square.clamp_min(0).sqrt().clamp_min(LEAST_SPREAD)
    found = ((logs - mean) / spread).max(1)
    return found.values, found.indices + 1


def verdict(losses: Tensor, reference: Tensor, ensemble: Tensor) -> dict[str, Any]:
    """Whether a run drifts away from ``reference`` further than runs with moved pixels do.

    Each run, the ensemble's and this one, is compared with all the others in the same way and gets a score: by how many
    standard deviations the logarithm of its ``running_maximum`` exceeds theirs, at the step where that is most. Were
    this run one of them, each of the ``members + 1`` would be equally likely to have the largest score. A run that
    ranks first is called *outside*: with 19 members, one correct run in 20 would be. No distribution is assumed.

    Args:
        losses: ``[steps]`` of the run in question.
        reference: at least as many, of the textbook run.
        ensemble: ``[members, at least steps]``.

    Returns:
        ``score``, ``step`` (of the score), ``largest_member_score``, ``rank`` (1: the largest score), ``of`` (how many
        runs were ranked) and ``inside`` (whether the rank is not 1).
    """
    steps = len(losses)
    curves = running_maximum(torch.cat([losses[None], ensemble[:, :steps]]), reference)
    scores, at = _scores(curves)
    rank = 1 + int((scores[1:] >= scores[0]).sum())
    return {
        "score": scores[0].item(),
        "step": int(at[0]),
        "largest_member_score": scores[1:].max().item(),
        "rank": rank,
        "of": len(scores),
        "inside": rank > 1,
    }


def e_folding(curve: Tensor) -> float:
    """Steps in which a ``running_maximum`` grows by ``e``: a line through its logarithm, until it reaches ``APART``.

    It is an average: the deviation stays of the order of a rounding, jumps when a first ReLU switches, then grows.
    """
    reached = (curve >= APART).nonzero()
    last = int(reached[0]) + 1 if len(reached) else len(curve)
    if last < 2:
        return math.nan
    at = torch.arange(last, dtype=torch.float64)
    at -= at.mean()
    slope = (at @ curve[:last].log() / (at @ at)).item()
    return 1 / slope if slope > 0 else math.inf


def first_step(options: Options, data: Dataset, few: int = 9) -> dict[str, dict[str, float]]:
    """Gradients of the first step, all parameters together, in roundings (2-norm over 2-norm, over 2**-24).

    For each network its distance to the textbook network in float64, and to the textbook network in float32. Nothing
    has been amplified there. Of moved pixels the median of a ``few`` runs.
    """
    config, (first,) = options.config, _batches(options.config, data, 1)
    images, labels = data.train_images[first], data.train_labels[first]

    def gradient(impl: str, recompute: str | None = None, x: Tensor = images, *, last: bool = False) -> Tensor:
        model = _network(config, data, impl, recompute, channels_last=last).to(x.dtype)
        F.cross_entropy(model(x), labels).backward()
        return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])

    exact, textbook = gradient("reference", x=images.double()), gradient("reference")
    found = {"textbook": [textbook], "textbook, channels last": [gradient("reference", last=True)]}
    for impl in options.impl:
        with large_tiles() if impl == "triton" else nullcontext():
            found |= {label: [gradient(impl, recompute)] for label, recompute in RUNS[impl].items()}
    found["textbook, pixels moved"] = [gradient("reference", x=moved(images, seed)) for seed in range(1, few + 1)]
    return {
        label: {name: _roundings(gradients, to) for name, to in (("to_float64", exact), ("to_textbook", textbook))}
        for label, gradients in found.items()
    }


def _roundings(gradients: Sequence[Tensor], to: Tensor) -> float:
    return torch.stack([(gradient - to).norm() / to.norm() / ROUNDING for gradient in gradients]).median().item()


@contextmanager
def large_tiles(rows: int = 2048, channels: int = 64) -> Iterator[None]:
    """Kernels with tiles that are too large for a GPU: the interpreter's time goes with the number of tiles."""
    if torch.cuda.is_available():
        yield
        return
    from fastdense.kernels import launch

    with ExitStack() as stack:
        for op in launch.OPERATIONS:
            changes = {"block_m": 64, "block_c": 1024} if op == "add_up" else {"block_m": rows, "block_c": channels}
            if op == "bn_relu_conv_backward":
                changes |= {"weight_block_m": rows, "weight_block_c": channels}
            stack.enter_context(launch.override(op, **changes))
        yield


def run(options: Options, tick: Tick = lambda run: None) -> dict[str, Any]:
    """Train them all; returns the record."""
    torch.set_num_threads(1)  # the layers are too small to share
    data, config = digits(), options.config
    reference = train(config, data, tick=tick)
    ensemble = members(options, data, tick)
    found = {"textbook, channels last": train(config, data, channels_last=True, tick=tick)}
    for impl in options.impl:
        for label, recompute in RUNS[impl].items():
            with large_tiles() if impl == "triton" else nullcontext():
                found[label] = train(config, data, impl, recompute, steps=options.steps_of(impl), tick=tick)
    runs: dict[str, Any] = {}
    for label, losses in found.items():
        apart = running_maximum(losses, reference)
        runs[label] = {"verdict": verdict(losses, reference, ensemble), "e_folding": e_folding(apart)}
        runs[label] |= {"losses": _rounded(losses), "running_maximum": _rounded(apart)}
    settings = {"network": config.architecture.description, "batch": config.batch_size, "size": config.image_size}
    settings |= {"dtype": "float32", "steps": options.steps, "members": options.members, "seed": config.seed}
    settings |= {"optimizer": f"SGD, Nesterov momentum {config.momentum}, weight decay {config.weight_decay}"}
    settings |= {"lr": config.lr, "interpreted": "triton" in options.impl and not torch.cuda.is_available()}
    results = {
        "textbook": _rounded(reference),
        "ensemble": _summary(ensemble, reference),
        "runs": runs,
        "first_step": first_step(options, data),
    }
    return {**environment(), "kind": "curves", "complete": True, "settings": settings, "results": results}


def _summary(ensemble: Tensor, reference: Tensor) -> dict[str, Any]:
    """Step by step what its members come to."""
    levels = {"lowest": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "highest": 1.0}
    at = torch.tensor(list(levels.values()), dtype=torch.float64)
    curves = running_maximum(ensemble, reference)
    folds = torch.tensor([e_folding(curve) for curve in curves], dtype=torch.float64)
    return {
        "running_maximum": dict(zip(levels, map(_rounded, curves.quantile(at, 0)), strict=True)),
        "losses": {"lowest": _rounded(ensemble.amin(0)), "highest": _rounded(ensemble.amax(0))},
        "e_folding": dict(zip(levels, folds.quantile(at).tolist(), strict=True)),
    }


def _rounded(values: Tensor) -> list[float]:
    """As many digits as a picture needs."""
    return [float(f"{value:.5g}") for value in values.tolist()]


def show(record: dict[str, Any]) -> Table:
    """The verdicts."""
    table = Table("", "steps", "apart at most", "e-folding", "rank", "")
    for label, row in record["results"]["runs"].items():
        found = row["verdict"]
        apart, folding = f"{row['running_maximum'][-1]:.2g}", f"{row['e_folding']:.1f} steps"
        words = "inside" if found["inside"] else "OUTSIDE"
        table.add_row(label, str(len(row["losses"])), apart, folding, f"{found['rank']} of {found['of']}", words)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--impl", nargs="+", choices=list(RUNS), default=["torch"])
    parser.add_argument("--members", type=int, default=19, help="textbook runs with moved pixels")
    parser.add_argument("--triton-steps", type=int, default=50, help="of Triton, in its interpreter")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/cpu/curves-digits.json")
    parser.add_argument("--png", type=Path, help="default: beside the record")
    given = parser.parse_args(arguments)
    options = Options.usual(given.steps, impl=tuple(given.impl), members=given.members, triton_steps=given.triton_steps)
    if "triton" in options.impl and not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console()
    runs = sum(options.steps_of(impl) * len(RUNS[impl]) for impl in options.impl)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("steps", total=options.steps * (2 + options.members) + runs)
        record = run(options, tick=lambda impl: progress.update(task, advance=1, description=f"steps, {impl}"))
    console.print(show(record))
    path = given.json or RESULTS / "cpu" / "curves-digits.json"
    write_record(path, record)
    picture = given.png or path.with_suffix(".png")
    from .plots import loss_curves

    loss_curves(record, picture)
    console.print(f"record: {path}\npicture: {picture}")


if __name__ == "__main__":
    main()
