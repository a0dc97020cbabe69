"""Stem, transition and head as modules, the reference and fastdense's, for tests on whatever backend."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdense import functional
from fastdense.reference import AVG_POOL, BATCH_NORM, CONV
from helpers.blocks import block_pair, random_input, randomise
from helpers.budget import DEVICE as DEVICE
from helpers.budget import within_budget

MAX_POOL: dict[int, type[nn.Module]] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
KINDS = ("stem", "transition", "head")
BLOCKS = ("block", "recomputing block", "basic block")
PARTS = (*BLOCKS, *KINDS)


class Case(NamedTuple):
    """One call: what runs, on which input, with which windows; ``out`` channels leave a transition."""

    kind: str
    shape: tuple[int, ...]
    kernel: int | tuple[int, ...] = 2
    stride: int | tuple[int, ...] | None = None
    padding: int | tuple[int, ...] = 0
    out: int = 3


class Stage(nn.Module):
    """One of the three; ``impl="textbook"`` calls the modules, and they alone decide what comes out."""

    def __init__(self, case: Case, impl: str, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        dims, channels = len(case.shape) - 2, case.shape[1]
        self.kind, self.impl = case.kind, impl
        self.norm = BATCH_NORM[dims](channels, dtype=dtype)
        self.relu = nn.ReLU()
        if case.kind == "stem":
            self.pool = MAX_POOL[dims](case.kernel, case.stride, case.padding)
        elif case.kind == "transition":
            self.conv = CONV[dims](channels, case.out, 1, bias=False, dtype=dtype)
            self.pool = AVG_POOL[dims](case.kernel, case.stride, case.padding)

    def forward(self, x: Tensor) -> Tensor:
        """The result, whoever computes it."""
        if self.impl == "textbook":
            y = self.relu(self.norm(x))
            if self.kind == "head":
                return y.flatten(2).mean(2)
            if self.kind == "stem":
                return self.pool(y)
            y = self.conv(y)
            if y.dim() == 5 and y.dtype.itemsize == 2:  # which PyTorch's average has no code for on the CPU
                return self.pool(y.float()).to(y.dtype)
            return self.pool(y)
        if self.kind == "head":
            return functional.bn_relu_mean_pool(x, self.norm, impl=self.impl)
        if self.kind == "stem":
            return functional.bn_relu_max_pool(x, self.norm, self.relu, self.pool, impl=self.impl)
        return functional.transition(x, self.norm, self.relu, self.conv, self.pool, impl=self.impl)

    def with_moments(self, x: Tensor, moments: Any, want: bool = False) -> tuple[Tensor, Any]:
        """As ``fastdense.DenseNet`` calls it: with its input's moments, for its output's if they are wanted."""
        if self.kind == "head":
            return functional.run_head(x, self.norm, self.impl, moments), None
        if self.kind == "transition":
            parts = self.norm, self.relu, self.conv, self.pool
            return functional.run_transition(x, *parts, self.impl, moments, want)
        # The stem reads a convolution's output, whose moments nobody has.
        return functional.run_stem(x, self.norm, self.relu, self.pool, self.impl, want)


def pair(
    case: Case,
    impl: str = "torch",
    dtype: torch.dtype = torch.float64,
    change: Callable[[Stage], Any] | None = None,
) -> tuple[Stage, Stage]:
    """The textbook stage and fastdense's with the same parameters and statistics; ``change`` is applied to both."""
    torch.manual_seed(0)
    textbook, fast = Stage(case, "textbook", dtype), Stage(case, impl, dtype)
    for stage in (textbook, fast):
        if change is not None:
            change(stage)
    randomise(textbook)
    if case.shape[1] == 1 and textbook.norm.weight is not None:  # the only gamma: 0 would prove nothing
        nn.init.constant_(textbook.norm.weight, -0.7)
    fast.load_state_dict(copy.deepcopy(textbook.state_dict()), strict=True)
    return textbook, fast


def check_budget(
    case: Case,
    dtype: torch.dtype,
    impl: str,
    *,
    layout: str = "channels_last",
    change: Callable[[Stage], Any] | None = None,
    shift: float = 0.0,
    decided: bool = True,
    needs_x: bool = True,
    inputs: int = 3,
) -> None:
    """One of the three ``budget.within_budget``.

    ``decided``: inputs on a grid and ReLUs on or off, so that no rounding decides which value is a window's maximum or
    which ReLU is on: that is luck, whoever computes.
    """

    def feed(seed: int) -> Tensor:
        x = random_input(case.shape, layout=layout, seed=seed).detach()
        return ((x * 4).round() / 4 if decided else x) + shift

    within_budget(
        lambda: (pair(case, change=change)[0], *pair(case, impl, torch.float32, change)),
        feed,
        dtype,
        needs_x=needs_x,
        inputs=inputs,
        decided=decided,
        floor=1e-3,
    )


def small(kind: str, channels: int = 5) -> Case:
    """An input with a prime size and pixels that no window covers."""
    return Case(kind, (3, channels, 5, 7), kernel=3 if kind == "stem" else 2, stride=2, out=4)


def part(name: str, channels: int = 5, *, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """The reference, fastdense's and an input of one of ``PARTS`` or ``CASES``; ``options`` as of their pairs."""
    if name not in BLOCKS:
        case = small(name, channels) if name in KINDS else CASES[name]
        return *pair(case, dtype=dtype, **options), random_input(case.shape, dtype=dtype)
    mode = "bottlenecks" if name == "recomputing block" else "activations"
    options = {"impl": "torch", "recompute": mode, **options}
    blocks = block_pair(3, channels, None if name == "basic block" else 4, 3, dtype=dtype, **options)
    return *blocks, random_input(small("head", channels).shape, dtype=dtype)


def rolled(shape: Sequence[int], period: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Values from a few only: ties wherever a window looks."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(-period, period + 1, tuple(shape), generator=generator).to(dtype).requires_grad_()


# Every kernel of the max pool, odd and prime sizes, pixels in no window, one pixel, one image, few and many channels.
CASES = {
    "stem 3, 2, 1": Case("stem", (2, 5, 9, 12), 3, 2, 1),
    "stem 3, 2, 1, even": Case("stem", (2, 64, 8, 6), 3, 2, 1),
    "stem 2, 2, 0": Case("stem", (2, 3, 7, 5), 2, 2, 0),
    "stem 3, 1, 1": Case("stem", (1, 5, 5, 4), 3, 1, 1),
    "stem 3, 3, 0": Case("stem", (2, 3, 8, 11), 3, 3, 0),
    "stem with gaps": Case("stem", (2, 3, 11, 7), 2, 3, 1),
    "stem, rectangular": Case("stem", (2, 5, 7, 13), (3, 2), (2, 3), (1, 0)),
    "stem, one channel": Case("stem", (3, 1, 5, 5), 3, 2, 1),
    "stem, 130 channels": Case("stem", (2, 130, 5, 3), 3, 2, 1),
    "stem, one pixel": Case("stem", (5, 5, 1, 1), 3, 2, 1),
    "stem, one row": Case("stem", (2, 5, 1, 9), 3, 2, 1),
    "stem, a window of one": Case("stem", (2, 5, 3, 4), 1, 2, 0),
    "stem 1D": Case("stem", (3, 5, 17), 3, 2, 1),
    "stem 1D, one image": Case("stem", (1, 3, 11), 2, 2, 0),
    "stem 3D": Case("stem", (2, 5, 5, 4, 7), 3, 2, 1),
    "stem 3D, rectangular": Case("stem", (1, 3, 4, 7, 5), (1, 2, 3), (1, 2, 2), (0, 1, 1)),
    "transition 2": Case("transition", (2, 64, 6, 4), 2, out=32),
    "transition 2, odd": Case("transition", (3, 5, 7, 5), 2),
    "transition 3": Case("transition", (2, 3, 11, 7), 3, out=1),
    "transition, rectangular": Case("transition", (2, 5, 7, 13), (3, 2), (3, 2), out=7),
    "transition, one channel": Case("transition", (3, 1, 5, 4), 2, out=5),
    "transition, 130 channels": Case("transition", (1, 130, 5, 5), 2, out=65),
    "transition, one pixel": Case("transition", (5, 5, 1, 1), 1),
    "transition, one pixel comes out": Case("transition", (2, 5, 3, 3), 2),
    "transition 1D": Case("transition", (3, 5, 17), 2),
    "transition 3D": Case("transition", (2, 5, 5, 4, 3), 2),
    "transition 3D, rectangular": Case("transition", (1, 3, 3, 4, 7), (1, 2, 3), (1, 2, 3)),
    "head": Case("head", (3, 5, 7, 7)),
    "head, one image": Case("head", (1, 64, 3, 5)),
    "head, one pixel": Case("head", (5, 3, 1, 1)),
    "head, one channel": Case("head", (2, 1, 4, 3)),
    "head, 130 channels": Case("head", (2, 130, 3, 2)),
    "head 1D": Case("head", (3, 5, 13)),
    "head 3D": Case("head", (2, 5, 3, 2, 5)),
}


def check_shape(name: str, dtype: torch.dtype, impl: str, inputs: int = 3) -> None:
    """``check_budget`` for one of ``CASES``."""
    # One image's mean sends back one number a channel: without a ReLU that switches, BatchNorm takes all of it away.
    constant = name == "head, one image"
    check_budget(CASES[name], dtype, impl, decided=not constant, inputs=15 if constant else inputs)
