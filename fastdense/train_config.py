"""What to train, and how: the options of ``fastdense train``, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fastdense

from . import checks
from .environment import choose_impl

__all__ = ["NAMED", "Architecture", "TrainConfig", "architecture", "layers_per_block"]

NAMED = ("densenet121", "densenet161", "densenet169", "densenet201", "densenet264")
NAMED_BLOCKS = 4
DEFAULT_DEPTH = 100
DEFAULT_GROWTH_RATE = 12
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

    def build(self, *, channels: int, classes: int, **keywords: Any) -> nn.Module:
        """A fresh network; ``keywords`` are those of :class:`fastdense.DenseNet`."""
        construct = getattr(fastdense, self.constructor)
        model: nn.Module = construct(in_channels=channels, num_classes=classes, **self.arguments, **keywords)
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
        model, depth, block_config, growth_rate, bn_size, image_size: the network, see :func:`architecture`.
        drop_rate: dropout after each layer's last convolution, in [0, 1).
        epochs: passes over the training images.
        steps: stop after so many steps, even within an epoch; the learning rate's schedule ends there too.
        batch_size: images a step; what is left over at an epoch's end is dropped.
        lr: highest learning rate, reached after the warm-up.
        seed: of the initial weights, the order of the images and dropout.
        device: ``None`` takes CUDA where there is one, else the CPU.
        impl, recompute: as in :class:`fastdense.DenseNet`.
        compare: train the textbook ``torch.cat`` network as well, step by step beside the other.
        check_steps: with ``compare``, steps that both make in float64 beforehand; 0 for none.
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
    drop_rate: float = 0.0
    epochs: int = 6
    steps: int | None = None
    batch_size: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    seed: int = 0
    device: str | None = None
    impl: str = "auto"
    recompute: str | None = None
    compare: bool = False
    check_steps: int = 10
    image_size: int = 8
    threads: int | None = None

    def __post_init__(self) -> None:
        at_least_one: dict[str, int | None] = {
            "--epochs": self.epochs,
            "--batch-size": self.batch_size,
            "--steps": self.steps,
            "--threads": self.threads,
        }
        for option, count in at_least_one.items():
            if count is not None and count < 1:
                raise ValueError(f"{option} must be at least 1, got {count}")
        if self.check_steps < 0:
            raise ValueError(f"--check-steps must be at least 0, got {self.check_steps}")
        if not 0 <= self.drop_rate < 1:
            raise ValueError(f"--drop-rate must be at least 0 and less than 1, got {self.drop_rate}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"--momentum must be at least 0 and less than 1, got {self.momentum}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"--lr must be a positive number, got {self.lr}")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ValueError(f"--weight-decay must be 0 or a positive number, got {self.weight_decay}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must be at least 0 and less than 2**63, got {self.seed}")
        if self.image_size < 8:
            raise ValueError(f"--image-size must be at least 8, the size of the digits, got {self.image_size}")
        checks.choice("--impl", self.impl, checks.IMPL)
        checks.choice("--recompute", self.recompute, (*checks.RECOMPUTE, None))
        if self.compare and checks.impl_name(self.impl) == "reference":
            raise ValueError(
                "--compare trains the textbook block (reference) beside another one: --impl and "
                "FASTDENSE_IMPL must be auto, triton or torch, not reference"
            )
        net = self.architecture
        if self.batch_size * net.last_resolution(self.image_size) ** 2 == 1:
            raise ValueError(
                "--batch-size 1 leaves BatchNorm a single value per channel in the last block: use at least "
                "2, fewer blocks or a larger --image-size"
            )

    @property
    def architecture(self) -> Architecture:
        """The network that the options describe; raises ``ValueError`` where they describe none."""
        return architecture(
            model=self.model,
            depth=self.depth,
            block_config=self.block_config,
            growth_rate=self.growth_rate,
            bn_size=self.bn_size,
            image_size=self.image_size,
        )

    @property
    def cpu_threads(self) -> int:
        """How many threads to run on the CPU."""
        return self.threads or (1 if self.image_size < SMALL_IMAGES else torch.get_num_threads())

    def resolve_device(self) -> torch.device:
        """The device to train on; raises ``ValueError`` if it is not there."""
        name = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
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
            raise ValueError(str(error)) from error
