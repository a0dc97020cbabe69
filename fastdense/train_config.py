"""What to train, and how: the options of ``fastdense train``, checked."""

from __future__ import annotations

import importlib
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fastdense

from .core import checks
from .environment import choose_impl

__all__ = ["AMP", "MACHINE", "NAMED", "Architecture", "TrainConfig", "architecture", "layers_per_block"]

NAMED = ("densenet121", "densenet161", "densenet169", "densenet201", "densenet264")
NAMED_BLOCKS = 4
DEFAULT_DEPTH = 100
DEFAULT_GROWTH_RATE = 12
DIGITS_SIZE = 8  # pixels
WARM_UP = 0.05  # of all steps, with a cosine
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# What may change between the start of a run and its resumption: where it runs, and what it tells.
MACHINE = frozenset({"data", "device", "threads", "workers", "on_error", "watch_flow"})
SMALL_IMAGES = 32  # pixels from which on ImageNet's stem, which divides by 4, and three transitions leave one


@dataclass(frozen=True)
class Architecture:
    """A network, ready to be built as often as needed.

    Attributes:
        description: for a human.
        constructor: name of the function or class in ``fastdense``.
        arguments: its keywords.
        blocks: how many dense blocks.
    """

    description: str
    constructor: str
    arguments: dict[str, Any]
    blocks: int

    def last_resolution(self, image_size: int) -> int:
        """Height and width in the last dense block."""
        stem = 1 if self.arguments["small_inputs"] else 4
        return image_size // (stem * 2 ** (self.blocks - 1))

    def build(self, *, channels: int, classes: int, plain: bool = False, **keywords: Any) -> nn.Module:
        """A fresh network; ``keywords`` are those of :class:`fastdense.DenseNet`, ``plain`` takes its connections."""
        construct = getattr(fastdense, self.constructor)
        model: nn.Module = construct(in_channels=channels, num_classes=classes, **self.arguments, **keywords)
        if plain:
            model = importlib.import_module("fastdense.plain").without_dense_connections(model)
        return model


def layers_per_block(depth: int, *, bottleneck: bool) -> int:
    """``n`` of a DenseNet of three equal blocks: ``depth = 6n + 4`` with bottlenecks, ``3n + 4`` without.

    Raises:
        ValueError: no ``n`` fits; the message names the nearest depths that do.
    """
    per_layer = 6 if bottleneck else 3
    n, rest = divmod(depth - 4, per_layer)
    if rest == 0 and n >= 1:
        return n
    nearest = [4 + i * per_layer for i in sorted({max(1, n), max(1, n + 1)})]
    kind = "DenseNet-BC" if bottleneck else "DenseNet without bottlenecks"
    raise ValueError(
        f"--depth {depth} does not fit a {kind} of three equal blocks, whose depth is {per_layer}*n + 4: "
        f"nearest {' and '.join(map(str, nearest))}"
    )


def _check(block_config: Sequence[int], growth_rate: int | None, bn_size: int | None) -> None:
    if not block_config or min(block_config) < 1:
        shown = ",".join(map(str, block_config))
        raise ValueError(f"--block-config must be layers per block, each at least 1, as in 6,12,24; got {shown!r}")
    if growth_rate is not None and growth_rate < 1:
        raise ValueError(f"--growth-rate must be at least 1, got {growth_rate}")
    if bn_size is not None and bn_size < 1:
        raise ValueError(f"--bn-size must be at least 1, or 0 or none for layers without bottleneck, got {bn_size}")


def architecture(
    *,
    model: str | None,
    depth: int | None,
    block_config: Sequence[int] | None,
    growth_rate: int | None,
    bn_size: int | None,
    image_size: int,
) -> Architecture:
    """The network that at most one of ``model``, ``depth`` and ``block_config`` describes.

    A named model keeps its own first convolution, which is for ImageNet, from 32 pixels on; everything else
    starts with the paper's 3x3 convolution for small images.

    Args:
        model: one of :data:`NAMED`.
        depth: of a network of three equal blocks; the default, with depth 100, where nothing else is given.
        block_config: layers of each block.
        growth_rate: ``k``; default 12, or the named model's own.
        bn_size: bottleneck channels over ``k``; ``None`` for the paper's basic layer.
        image_size: pixels.

    Raises:
        ValueError: the options contradict each other, or the images are too small for so many blocks.
    """
    given = {"--model": model, "--depth": depth, "--block-config": block_config}
    named = [option for option, value in given.items() if value is not None]
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} contradict each other: give one of them")
    k = growth_rate or DEFAULT_GROWTH_RATE
    kind = "DenseNet-C, basic layers" if bn_size is None else "DenseNet-BC"
    arguments: dict[str, Any] = {"bn_size": bn_size, "small_inputs": True}
    if model is not None:
        if model not in NAMED:
            raise ValueError(f"--model must be one of {', '.join(NAMED)}, got {model!r}")
        _check([1], growth_rate, bn_size)
        arguments["small_inputs"] = image_size < SMALL_IMAGES
        if growth_rate is not None:
            arguments["growth_rate"] = growth_rate
        found = Architecture(model, model, arguments, NAMED_BLOCKS)
    else:
        if block_config is None:
            depth = DEFAULT_DEPTH if depth is None else depth
            block_config = (layers_per_block(depth, bottleneck=bn_size is not None),) * 3
            size = f"depth {depth}"
        else:
            size = f"blocks of {', '.join(map(str, block_config))} layers"
        _check(block_config, growth_rate, bn_size)
        # The paper's: 16 channels, or twice the growth rate for DenseNet-BC.
        initial = 16 if bn_size is None else 2 * k
        arguments |= {"growth_rate": k, "block_config": tuple(block_config), "num_init_features": initial}
        found = Architecture(f"{kind}, {size}, k = {k}", "DenseNet", arguments, len(block_config))
    if found.last_resolution(image_size) < 1:
        least = 2 ** (found.blocks - 1)
        raise ValueError(
            f"--image-size {image_size} is too small for {found.blocks} dense blocks, between which the "
            f"resolution is halved: use at least {least}"
        )
    return found


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what a training run computes. The defaults are the demonstration's.

    Attributes:
        model, depth, block_config, growth_rate, bn_size, image_size: the network, see :func:`architecture`. Without
            ``image_size`` it is the data's own: 8 for the digits.
        plain: the same layers without dense connections, each reading the one before it alone.
        data: ``"digits"`` or a folder of images.
        augment: ``"auto"`` for what suits the data; see :func:`fastdense.data.open_data`.
        workers: processes that read images; 0 for none beside this one.
        on_error: at an image that cannot be read or a file that cannot be written, ``"stop"`` or ``"skip"`` it.
        drop_rate: dropout after each layer's last convolution, in [0, 1).
        epochs: passes over the training images.
        steps: stop after so many steps, even within an epoch; the learning rate's schedule ends there too.
        batch_size: images a step, over all processes; what is left over at an epoch's end is dropped.
        lr: highest learning rate, reached after the warm-up.
        schedule: ``"cosine"``, down to zero, or ``"step"``, which multiplies the rate by ``gamma`` at ``milestones``.
        milestones: fractions of all steps, in (0, 1), increasing.
        warm_up: fraction of all steps, in [0, 1), in which the learning rate rises from a tenth; ``None`` for 0.05
            with ``"cosine"`` and 0 with ``"step"``.
        momentum, nesterov, weight_decay: of SGD.
        amp: autocast to ``"bf16"`` or ``"fp16"``, the latter with a scaled loss; or ``"off"``.
        ema: decay a step of a moving average of the weights, in (0, 1), evaluated beside them; ``None`` for none.
        sync_bn: BatchNorm over the images of all processes.
        seed: of the initial weights, the order of the images and dropout.
        device: ``None`` takes CUDA where there is one, else the CPU.
        impl, recompute: as in :class:`fastdense.DenseNet`.
        compare: train the textbook ``torch.cat`` network as well, step by step beside the other.
        check_steps: with ``compare``, steps that both make in float64 beforehand; 0 for none.
        watch_flow: look at what flows through the layers after every so many steps.
        threads: of the CPU; ``None`` for one below 32 pixels, where more of them mostly wait for each other,
            and as many as PyTorch takes from there on.

    Raises:
        ValueError: a value is not allowed; the message names it, its command-line option and what is allowed.
    """

    model: str | None = None
    depth: int | None = None
    block_config: tuple[int, ...] | None = None
    growth_rate: int | None = None
    bn_size: int | None = 4
    plain: bool = False
    data: str = "digits"
    augment: str = "auto"
    workers: int = 0
    on_error: str = "stop"
    drop_rate: float = 0.0
    epochs: int = 6
    steps: int | None = None
    batch_size: int = 64
    lr: float = 0.1
    schedule: str = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    warm_up: float | None = None
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 1e-4
    amp: str = "off"
    ema: float | None = None
    sync_bn: bool = False
    seed: int = 0
    device: str | None = None
    impl: str = "auto"
    recompute: str | None = None
    compare: bool = False
    check_steps: int = 10
    watch_flow: int | None = None
    image_size: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        self._check_counts()
        self._check_rates()
        checks.choice("--schedule", self.schedule, ("cosine", "step"))
        checks.choice("--amp", self.amp, tuple(AMP))
        checks.choice("--on-error", self.on_error, ("stop", "skip"))
        checks.choice("--impl", self.impl, checks.IMPL)
        if self.recompute is not None:
            checks.choice("--recompute", self.recompute, checks.RECOMPUTE)
        if self.compare and checks.impl_name(self.impl) == "reference":
            raise ValueError(
                "--compare trains the textbook block (reference) beside another one: --impl and "
                "FASTDENSE_IMPL must be auto, triton or torch, not reference"
            )
        if self.compare and self.plain:
            raise ValueError("--plain leaves no dense block for --compare to compare: leave one of them out")
        if self._pixels is not None:
            self.check_batch(self.batch_size)

    def _check_counts(self) -> None:
        at_least_one: dict[str, int | None] = {
            "--epochs": self.epochs,
            "--batch-size": self.batch_size,
            "--steps": self.steps,
            "--threads": self.threads,
            "--watch-flow": self.watch_flow,
        }
        for option, count in at_least_one.items():
            if count is not None and count < 1:
                raise ValueError(f"{option} must be at least 1, got {count}")
        for option, count in {"--check-steps": self.check_steps, "--workers": self.workers}.items():
            if count < 0:
                raise ValueError(f"{option} must be at least 0, got {count}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must be at least 0 and less than 2**63, got {self.seed}")
        least, reason = (DIGITS_SIZE, ", the size of the digits") if self.data == "digits" else (1, "")
        if self.image_size is not None and self.image_size < least:
            raise ValueError(f"--image-size must be at least {least}{reason}, got {self.image_size}")

    def _check_rates(self) -> None:
        if not 0 <= self.drop_rate < 1:
            raise ValueError(f"--drop-rate must be at least 0 and less than 1, got {self.drop_rate}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"--momentum must be at least 0 and less than 1, got {self.momentum}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"--lr must be a positive number, got {self.lr}")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ValueError(f"--weight-decay must be 0 or a positive number, got {self.weight_decay}")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"--gamma must be more than 0 and at most 1, got {self.gamma}")
        if not 0 <= self.warm_up_fraction < 1:
            raise ValueError(
                f"--warm-up must be at least 0 and less than 1, a fraction of all steps, got {self.warm_up}"
            )
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"--ema must be more than 0 and less than 1, as 0.999, got {self.ema}")
        marks = (self.warm_up_fraction, *self.milestones, 1.0)
        rising = all(a < b for a, b in itertools.pairwise(marks))
        if self.schedule == "step" and not (self.milestones and rising):
            raise ValueError(
                "--milestones must be increasing fractions of all steps, after the warm-up and less than 1, as in "
                f"0.5,0.75; got {','.join(map(str, self.milestones))!r}"
            )

    def check_batch(self, images: int) -> None:
        """Raise ``ValueError`` if BatchNorm cannot train on so many ``images`` in one process."""
        size = self._pixels
        assert size is not None
        if images * self.architecture.last_resolution(size) ** 2 == 1:
            raise ValueError(
                "--batch-size 1 leaves BatchNorm a single value per channel in the last block: use at least "
                "2, fewer blocks or a larger --image-size"
            )

    @property
    def _pixels(self) -> int | None:
        """Height and width; ``None`` while only the data know it."""
        return self.image_size or (DIGITS_SIZE if self.data == "digits" else None)

    @property
    def warm_up_fraction(self) -> float:
        """Of all steps."""
        if self.warm_up is None:
            return WARM_UP if self.schedule == "cosine" else 0.0
        return self.warm_up

    @property
    def architecture(self) -> Architecture:
        """The network that the options describe; raises ``ValueError`` where they describe none.

        For images in a folder, ``image_size`` must be given: :class:`fastdense.train.Experiment` fills it in.
        """
        assert self._pixels is not None
        return architecture(
            model=self.model,
            depth=self.depth,
            block_config=self.block_config,
            growth_rate=self.growth_rate,
            bn_size=self.bn_size,
            image_size=self._pixels,
        )

    @property
    def cpu_threads(self) -> int:
        """How many threads to run on the CPU."""
        return self.threads or (1 if (self._pixels or SMALL_IMAGES) < SMALL_IMAGES else torch.get_num_threads())

    def resolve_device(self, process: int | None = None) -> torch.device:
        """The device to train on; raises ``ValueError`` if it is not there.

        Args:
            process: which one on this machine, where there are several: each takes a GPU of its own.
        """
        name = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if name == "cuda" and process is not None:
            name = f"cuda:{process}"
        try:
            device = torch.device(name)
            torch.zeros(1, device=device).item()  # a device may parse and still not be there
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"--device {name} cannot be used: {reason}. Use cpu, cuda or cuda:N") from error
        return device

    def resolve_impl(self, device: torch.device) -> str:
        """What runs on ``device``; raises ``ValueError`` where ``impl`` cannot.

        Returns:
            ``"triton"``, ``"torch"`` or ``"reference"``.
        """
        try:
            return choose_impl(self.impl, device)[0]
        except RuntimeError as error:
            raise ValueError(re.sub(r"impl='(\w+)'", r"--impl \1", str(error))) from error
