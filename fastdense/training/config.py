"""What to train, and how: the options of ``fastdense train``, each a field declared once."""

from __future__ import annotations

import importlib
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields, replace
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

import fastdense

from ..core import checks
from ..environment import choose_impl

NAMED = ("densenet121", "densenet161", "densenet169", "densenet201", "densenet264")
DIGITS_SIZE = 8  # pixels
WARM_UP = 0.05  # of all steps, with a cosine
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# What may change between the start of a run and its resumption: where it runs, and what it tells.
MACHINE_OPTIONS = frozenset({"data", "device", "threads", "workers", "on_error", "watch_flow"})
SMALL_IMAGES = 32  # pixels from which on ImageNet's stem, which divides by 4, and three transitions leave one
PANELS = ("Network", "Data", "Training", "Machine", "Output")  # of --help, in this order


class Rule(NamedTuple):
    """What an option must be, in words, and a function: true of allowed values, or from a text to its value."""

    words: str
    function: Callable[[Any], Any]


def one_of(*allowed: str) -> Rule:
    """The rule that a value is one of ``allowed``."""
    return Rule(f"one of {', '.join(map(repr, allowed))}", lambda value: value in allowed)


AT_LEAST_0 = Rule("at least 0", lambda value: value >= 0)
AT_LEAST_1 = Rule("at least 1", lambda value: value >= 1)
BELOW_1 = Rule("at least 0 and less than 1", lambda value: 0 <= value < 1)
POSITIVE = Rule("a positive number", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Rule("0 or a positive number", lambda value: 0 <= value < math.inf)


def option(panel: str, default: Any, help: str, must: Rule | None = None, **more: Any) -> Any:
    """Returns a field of a dataclass that is an option of ``fastdense train``, too.

    ``must`` is the rule of its values besides ``None``. ``more``: ``parser``, the rule for values that are more than
    text, a number or a flag, and ``shown``, what ``--help`` says of the default.
    """
    told = {"panel": panel, "help": help, "must": must, "parser": None, "shown": None, **more}
    return field(default=default, metadata=told)


def flag(name: str) -> str:
    """The option called ``name``, as on the command line."""
    return f"--{name.replace('_', '-')}"


def shown(value: Any) -> str:
    """``value`` as on the command line."""
    if value is None:
        return "none"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def parse(option: Field[Any], text: Any) -> Any:
    """The value that ``text`` stands for; raises ``ValueError`` where it stands for none."""
    parser: Rule | None = option.metadata["parser"]
    if parser is None or text is None:
        return text
    try:
        return parser.function(text)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{flag(option.name)} must be {parser.words}, got {text!r}") from error


def check_options(options: Any) -> None:
    """Raises ``ValueError`` for a field of the dataclass ``options`` whose value its rule does not allow."""
    for each in fields(options):
        value, rule = getattr(options, each.name), each.metadata["must"]
        if value is not None and rule is not None and not rule.function(value):
            got = shown(value) if isinstance(value, tuple) else value
            raise ValueError(f"{flag(each.name)} must be {rule.words}, got {got!r}")


@dataclass(frozen=True)
class Architecture:
    """A network, ready to be built as often as needed."""

    description: str  # in words
    constructor: str  # name of the function or class in ``fastdense``
    arguments: dict[str, Any]
    blocks: int
    plain: bool = False  # without dense connections

    def last_resolution(self, image_size: int) -> int:
        stem = 1 if self.arguments["small_inputs"] else 4
        return image_size // (stem * 2 ** (self.blocks - 1))

    def build(self, *, channels: int, classes: int, **keywords: Any) -> nn.Module:
        """Builds a fresh network; ``keywords`` are those of :class:`fastdense.DenseNet`."""
        construct = getattr(fastdense, self.constructor)
        model: nn.Module = construct(in_channels=channels, num_classes=classes, **self.arguments, **keywords)
        if self.plain:
            model = importlib.import_module("fastdense.analysis.plain").without_dense_connections(model)
        return model


def layers_per_block(depth: int, *, bottleneck: bool) -> int:
    """``n`` where ``depth = 6n + 4`` with bottlenecks, ``3n + 4`` without; ``ValueError`` with the nearest depths."""
    per_layer = 6 if bottleneck else 3
    n, rest = divmod(depth - 4, per_layer)
    if rest == 0 and n >= 1:
        return n
    nearest = " and ".join(str(4 + i * per_layer) for i in sorted({max(1, n), max(1, n + 1)}))
    kind = f"{'DenseNet-BC' if bottleneck else 'DenseNet without bottlenecks'} of three equal blocks"
    raise ValueError(f"--depth {depth} does not fit a {kind}, whose depth is {per_layer}*n + 4: nearest {nearest}")


_INTEGERS = Rule("whole numbers, as in 6,12,24", lambda text: tuple(map(int, text.split(","))))
_FRACTIONS = Rule(
    "fractions of all steps, as in 1/3,2/3", lambda text: tuple(float(Fraction(x)) for x in text.split(","))
)
_BN_SIZE = Rule("a whole number, 0 or none", lambda text: None if text.lower() in ("0", "none") else int(text))
_A_MODEL = Rule(f"one of {', '.join(NAMED)}", lambda model: model in NAMED)
_LAYERS = Rule("layers per block, each at least 1, as in 6,12,24", lambda layers: min(layers, default=0) >= 1)
_BOTTLENECK = Rule("at least 1, or 0 or none for layers without bottleneck", lambda size: size >= 1)
_GAMMA = Rule("more than 0 and at most 1", lambda gamma: 0 < gamma <= 1)
_DECAY = Rule("more than 0 and less than 1, as 0.999", lambda decay: 0 < decay < 1)
_WARM_UP = Rule(f"{BELOW_1.words}, a fraction of all steps", BELOW_1.function)
_SEED = Rule("at least 0 and less than 2**63", lambda seed: 0 <= seed < 2**63)
_net, _data, _train, _machine, _output = (partial(option, panel) for panel in PANELS)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what a training run computes; each field says what it is in its help.

    The network is given by at most one of ``model``, ``depth`` and ``block_config``. Without ``image_size``, images
    have the data's own. Raises ``ValueError``, which names the option and what is allowed, for a wrong value.
    """

    model: str | None = _net(None, "densenet121, 161, 169, 201, 264; from 32 pixels on with ImageNet's stem.", _A_MODEL)
    depth: int | None = _net(None, "Three equal blocks: 6*n + 4; 3*n + 4 without bottlenecks.", shown="100")
    block_config: tuple[int, ...] | None = _net(None, "Layers of each block, as 6,12,24.", _LAYERS, parser=_INTEGERS)
    growth_rate: int | None = _net(None, "Channels that each layer adds.", AT_LEAST_1, shown="12, or the model's own")
    bn_size: int | None = _net(4, "Bottleneck channels over the growth rate; 0: none.", _BOTTLENECK, parser=_BN_SIZE)
    plain: bool = _net(False, "The same layers without dense connections.")
    drop_rate: float = _net(0.0, "Dropout after each layer.", BELOW_1)

    data: str = _data("digits", "digits, or a folder: CIFAR's files, or a folder of images a class.")
    image_size: int | None = _data(None, "Height and width.", AT_LEAST_1, shown="digits 8, CIFAR 32, a folder 224")
    augment: str = _data("auto", "How training images are varied; auto: as suits the data.")
    workers: int = _data(0, "Processes that read images.", AT_LEAST_0)
    on_error: str = _data(
        "stop", "On unreadable images or a full disk: stop, or skip and warn.", one_of("stop", "skip")
    )

    compare: bool = _train(False, "Train the reference torch.cat network beside it, on the same weights and batches.")
    check_steps: int = _train(10, "With --compare: steps that both make in float64 beforehand; 0: none.", AT_LEAST_0)
    epochs: int = _train(6, "Passes over the training images.", AT_LEAST_1)
    steps: int | None = _train(None, "Stop after so many steps; the rate's schedule ends there too.", AT_LEAST_1)
    batch_size: int = _train(64, "Images a step, over all processes.", AT_LEAST_1)
    lr: float = _train(0.1, "Highest learning rate, reached after the warm-up.", POSITIVE)
    schedule: str = _train("cosine", "cosine to 0, or step: times --gamma at --milestones.", one_of("cosine", "step"))
    milestones: tuple[float, ...] = _train((0.5, 0.75), "Fractions of all steps, as 1/3,2/3.", parser=_FRACTIONS)
    gamma: float = _train(0.1, "What a milestone multiplies the rate by.", _GAMMA)
    warm_up: float | None = _train(
        None, "Fraction of all steps in which the rate rises.", _WARM_UP, shown=f"{WARM_UP} for cosine, 0 for step"
    )
    momentum: float = _train(0.9, "Momentum of SGD.", BELOW_1)
    nesterov: bool = _train(True, "Nesterov's momentum.")
    weight_decay: float = _train(1e-4, "Weight decay of SGD.", NOT_NEGATIVE)
    amp: str = _train("off", "Mixed precision: bf16, fp16 (with a scaled loss), or off.", one_of(*AMP))
    ema: float | None = _train(None, "Decay a step of averaged weights, as 0.999: evaluated and saved too.", _DECAY)
    sync_bn: bool = _train(False, "BatchNorm over the images of all processes.")
    seed: int = _train(0, "Of weights, order of images and dropout.", _SEED)

    device: str | None = _machine(None, "cpu, cuda, cuda:1.", shown="cuda where there is one, else cpu")
    impl: str = _machine("auto", "auto, triton, torch, or reference: the plain torch.cat.", one_of(*checks.IMPL))
    recompute: str | None = _machine(
        None, "activations; bottlenecks, for fewer bytes; or auto.", one_of(*checks.RECOMPUTE), shown="activations"
    )
    threads: int | None = _machine(None, "CPU threads.", AT_LEAST_1, shown="1 below 32 pixels, else PyTorch's")

    watch_flow: int | None = _output(None, "Look at what flows through the layers every so many steps.", AT_LEAST_1)

    def __post_init__(self) -> None:
        check_options(self)
        marks = (self.warm_up_fraction, *self.milestones, 1.0)
        rising = self.milestones and all(a < b for a, b in itertools.pairwise(marks))
        if self.schedule == "step" and not rising:
            rule = "increasing fractions of all steps, after the warm-up and less than 1, as in 0.5,0.75"
            raise ValueError(f"--milestones must be {rule}; got {shown(self.milestones)!r}")
        if self.compare and checks.impl_name(self.impl) == "reference":
            rule = "--impl and FASTDENSE_IMPL must be auto, triton or torch, not reference"
            raise ValueError(f"--compare trains the reference block beside another one: {rule}")
        if self.compare and self.plain:
            raise ValueError("--plain leaves no dense block for --compare to compare: leave one of them out")
        if self._pixels is not None:
            self.check_batch(self.batch_size)

    def check_batch(self, images: int) -> None:
        """Raises ``ValueError`` if BatchNorm cannot train on so many ``images`` in one process."""
        assert self._pixels is not None
        if images * self.architecture.last_resolution(self._pixels) ** 2 == 1:
            remedy = "use at least 2, fewer blocks or a larger --image-size"
            raise ValueError(f"--batch-size 1 leaves BatchNorm a single value per channel in the last block: {remedy}")

    @property
    def _pixels(self) -> int | None:
        """Height and width; ``None`` while only the data know it."""
        return self.image_size or (DIGITS_SIZE if self.data == "digits" else None)

    @property
    def warm_up_fraction(self) -> float:
        usual = WARM_UP if self.schedule == "cosine" else 0.0
        return usual if self.warm_up is None else self.warm_up

    @property
    def architecture(self) -> Architecture:
        """The network; raises ``ValueError`` where options contradict each other or the images are too small for it."""
        named = [flag(name) for name in ("model", "depth", "block_config") if getattr(self, name) is not None]
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)} contradict each other: give one of them")
        size = self._pixels
        assert size is not None  # filled in by the experiment where only the data know it
        if self.model is None:
            found = self._for_small_images()
        else:  # its first convolution, which is for ImageNet, is its own from 32 pixels on
            arguments: dict[str, Any] = {"bn_size": self.bn_size, "small_inputs": size < SMALL_IMAGES}
            if self.growth_rate is not None:
                arguments["growth_rate"] = self.growth_rate
            found = Architecture(self.model, self.model, arguments, blocks=4)
        if found.last_resolution(size) < 1:
            blocks = f"{found.blocks} dense blocks, between which the resolution is halved"
            raise ValueError(f"--image-size {size} is too small for {blocks}: use at least {2 ** (found.blocks - 1)}")
        if self.plain:
            return replace(found, description=f"{found.description}, without dense connections", plain=True)
        return found

    def _for_small_images(self) -> Architecture:
        """The paper's networks, which start with a 3x3 convolution."""
        k, bottleneck, layers = self.growth_rate or 12, self.bn_size is not None, self.block_config
        size = f"blocks of {shown(layers).replace(',', ', ')} layers"
        if layers is None:
            depth = 100 if self.depth is None else self.depth
            layers, size = (layers_per_block(depth, bottleneck=bottleneck),) * 3, f"depth {depth}"
        arguments = {"bn_size": self.bn_size, "small_inputs": True, "growth_rate": k, "block_config": tuple(layers)}
        arguments["num_init_features"] = 2 * k if bottleneck else 16  # as in the paper
        kind = "DenseNet-BC" if bottleneck else "DenseNet-C, basic layers"
        return Architecture(f"{kind}, {size}, k = {k}", "DenseNet", arguments, len(layers))

    @property
    def cpu_threads(self) -> int:
        return self.threads or (1 if (self._pixels or SMALL_IMAGES) < SMALL_IMAGES else torch.get_num_threads())

    def resolve_device(self, process: int | None = None) -> torch.device:
        """Returns the device of the ``process`` of that number on its machine; ``ValueError`` if it is not there."""
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
        """Returns ``triton``, ``torch`` or ``reference``; raises ``ValueError`` where ``impl`` cannot run."""
        try:
            return choose_impl(self.impl, device)[0]
        except RuntimeError as error:
            raise ValueError(re.sub(r"impl='(\w+)'", r"--impl \1", str(error))) from error
