"""DenseNets in the ways that people write them, and in ways that fastdense must leave alone."""

import operator
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
MAX_POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
Block: TypeAlias = Callable[..., nn.Module]


class ListLayer(nn.Module):
    """Takes the list of all earlier features and has names of its own."""

    def __init__(self, reads: int, k: int, bottleneck: int | None = 3, dims: int = 2, drop_rate: float = 0.0) -> None:
        super().__init__()
        width = reads
        if bottleneck is not None:
            width = bottleneck * k
            self.bn_a, self.squeeze = NORM[dims](reads), CONV[dims](reads, width, 1, bias=False)
        self.bn_b, self.grow = NORM[dims](width), CONV[dims](width, k, 3, padding=1, bias=False)
        self.drop_rate = drop_rate

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        h = torch.cat(list(features), 1)
        if hasattr(self, "squeeze"):
            h = self.squeeze(F.relu(self.bn_a(h)))
        h = self.grow(torch.relu(self.bn_b(h)))
        return F.dropout(h, self.drop_rate, self.training) if self.drop_rate else h


class ListBlock(nn.Module):
    """``read`` and ``give`` say which of the features a layer reads and the block returns: all, in order."""

    layer: Block = ListLayer
    read = give = staticmethod(lambda features: features)

    def __init__(self, layers: int, channels: int, k: int, **options: Any) -> None:
        super().__init__()
        self.steps = nn.ModuleList(self.layer(channels + i * k, k, **options) for i in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for step in self.steps:
            features.append(step(self.read(features)))
        return torch.cat(self.give(features), 1)


class Switchable(ListLayer):
    """Something in its ``forward`` that is off when the model is converted, and a child that is missing then."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.gain, self.extra = 1, None

    def forward(self, features: Any) -> Tensor:
        h = super().forward(features)
        h = h if self.gain == 1 else h * self.gain
        return h if self.extra is None else self.extra(h)


class StarLayer(nn.Module):
    """Called with the features as separate arguments; ``efficient`` recomputes the first half in backward."""

    def __init__(self, reads: int, k: int, efficient: bool = False, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(reads), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(reads, 4 * k, kernel_size=1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(4 * k), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4 * k, k, kernel_size=3, padding=1, bias=False)
        self.drop_rate, self.efficient = drop_rate, efficient

    def forward(self, *features: Tensor) -> Tensor:
        def squeeze(*parts: Tensor) -> Tensor:
            return self.conv1(self.relu1(self.norm1(torch.cat(parts, 1))))

        if self.efficient and any(part.requires_grad for part in features):
            h = checkpoint(squeeze, *features, use_reentrant=False)
        else:
            h = squeeze(*features)
        h = self.conv2(self.relu2(self.norm2(h)))
        return F.dropout(h, p=self.drop_rate, training=self.training) if self.drop_rate > 0 else h


class StarBlock(nn.Module):
    def __init__(self, layers: int, channels: int, k: int, **options: Any) -> None:
        super().__init__()
        for i in range(layers):
            self.add_module(f"denselayer{i + 1}", StarLayer(channels + i * k, k, **options))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.children():
            features.append(layer(*features))
        return torch.cat(features, -3)


class AppendingLayer(nn.Sequential):
    """Returns its input with the new features behind it."""

    def __init__(self, reads: int, k: int, dims: int = 2, dropout: nn.Module | None = None) -> None:
        super().__init__()
        self.norm1, self.relu1 = NORM[dims](reads), nn.ReLU(inplace=True)
        self.conv1 = CONV[dims](reads, 3 * k, 1, bias=False)
        self.norm2, self.relu2 = NORM[dims](3 * k), nn.ReLU(inplace=True)
        self.conv2 = CONV[dims](3 * k, k, 3, padding=1, bias=False)
        if dropout is not None:
            self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, super().forward(x)], 1)


class AppendingBlock(nn.Sequential):
    def __init__(self, layers: int, channels: int, k: int, **options: Any) -> None:
        super().__init__(*(AppendingLayer(channels + i * k, k, **options) for i in range(layers)))


class Transition(nn.Sequential):
    def __init__(self, channels: int, out: int, dims: int = 2) -> None:
        super().__init__(NORM[dims](channels), nn.ReLU(), CONV[dims](channels, out, 1, bias=False), POOL[dims](2))


class Net(nn.Module):
    """Stem (with BatchNorm, ReLU and pooling, or without), block, transition, block, classifier."""

    def __init__(self, block: Block, k: int = 4, dims: int = 2, pooled: bool = False, **options: Any) -> None:
        super().__init__()
        if dims != 2:
            options["dims"] = dims
        conv = CONV[dims](3, 6, 3, padding=1, bias=False)
        self.stem = stem(conv, dims) if pooled else conv
        self.block1 = block(2, 6, k, **options)
        self.between = Transition(6 + 2 * k, 5, dims)
        self.block2 = block(3, 5, k, **options)
        self.last = NORM[dims](5 + 3 * k)
        self.classifier = nn.Linear(5 + 3 * k, 7)

    def forward(self, x: Tensor) -> Tensor:
        h = self.block2(self.between(self.block1(self.stem(x))))
        return self.classifier(F.relu(self.last(h), inplace=True).flatten(2).mean(2))


def stem(conv: nn.Module, dims: int = 2) -> nn.Sequential:
    return nn.Sequential(conv, NORM[dims](6), nn.ReLU(inplace=True), MAX_POOL[dims](3, stride=2, padding=1))


class Features(nn.Module):
    """Everything but the head in one Sequential, under the names of torchvision, timm and MONAI."""

    def __init__(self, block: Block = StarBlock, dims: int = 2) -> None:
        super().__init__()
        options = {} if dims == 2 else {"dims": dims}
        names = ("conv0", "norm0", "relu0", "pool0")
        children = stem(CONV[dims](3, 6, 3, padding=1, bias=False), dims)
        self.features = nn.Sequential(OrderedDict(zip(names, children, strict=True)))
        self.features.add_module("denseblock1", block(2, 6, 4, **options))
        self.features.add_module("transition1", Transition(14, 5, dims))
        self.features.add_module("denseblock2", block(3, 5, 4, **options))
        self.features.add_module("norm5", NORM[dims](17))
        self.classifier = nn.Linear(17, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.relu(self.features(x), inplace=True).flatten(2).mean(2))


STYLES: dict[str, Callable[[], nn.Module]] = {
    "list": lambda: Net(ListBlock),
    "list, no bottleneck": lambda: Net(ListBlock, bottleneck=None),
    "list, switchable": lambda: Net(variant(layer=Switchable)),
    "list, 1D": lambda: Net(ListBlock, dims=1),
    "star": lambda: Net(StarBlock),
    "star, efficient": lambda: Net(StarBlock, efficient=True),
    "appending": lambda: Net(AppendingBlock),
    "appending, 3D": lambda: Net(AppendingBlock, dims=3),
    "pooled": lambda: Net(StarBlock, pooled=True),
    "stem": lambda: Features(),
    "stem, 1D": lambda: Features(AppendingBlock, 1),
    "stem, 3D": lambda: Features(AppendingBlock, 3),
}
SHAPES = {
    "list, 1D": (3, 3, 17), "appending, 3D": (2, 3, 5, 4, 7),
    "stem": (2, 3, 13, 10), "stem, 1D": (3, 3, 23), "stem, 3D": (2, 3, 9, 10, 11),
}  # fmt: skip


def build(style: str) -> tuple[Any, tuple[int, ...]]:
    """A float64 network of one of ``STYLES``, and the shape of an odd, non-square input for it."""
    torch.manual_seed(0)
    return STYLES[style]().double(), SHAPES.get(style, (2, 3, 9, 6))


# --- what fastdense must not convert -----------------------------------------------------------------------------


def variant(**attributes: Any) -> type[ListBlock]:
    """``ListBlock`` with other layers, or with other connections."""
    return type("ListBlock", (ListBlock,), {n: a if n == "layer" else staticmethod(a) for n, a in attributes.items()})


class CannotBeEvaluated(ListBlock):
    """Foreign code may raise anything, anywhere."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and x.requires_grad:
            raise AssertionError("no evaluation, please")
        return super().forward(x)


class CannotBeCopied(ListBlock):
    def __deepcopy__(self, memo: Any) -> Any:
        raise LookupError("one of a kind")


class CannotBeExtended(ListBlock):
    def __init_subclass__(cls) -> None:
        raise TypeError("nobody inherits from this")


class OnTheSide(ListBlock):
    """Returns what a block returns, and keeps something for later."""

    def forward(self, x: Tensor) -> Tensor:
        features = super().forward(x)
        self.energy = features.square().mean()
        return features


class SilentlyScaled(ListBlock):
    """In evaluation alone, where a trace of the training pass does not look."""

    def forward(self, x: Tensor) -> Tensor:
        features = super().forward(x)
        return features if self.training else features * 1.0001


class ScaledLayer(ListLayer):
    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return super().forward(features) * 1.0001


class PostActivationLayer(ListLayer):
    """Conv-BN-ReLU instead of BN-ReLU-Conv; the widths agree."""

    def __init__(self, reads: int, k: int) -> None:
        super().__init__(reads, k)
        self.bn_a, self.bn_b = nn.BatchNorm2d(3 * k), nn.BatchNorm2d(k)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        h = F.relu(self.bn_a(self.squeeze(torch.cat(list(features), 1))))
        return F.relu(self.bn_b(self.grow(h)))


class SharedBlock(ListBlock):
    """The same second norm and second convolution in every layer."""

    def __init__(self, layers: int, channels: int, k: int) -> None:
        super().__init__(layers, channels, k)
        for step in self.steps[1:]:
            step.bn_b, step.grow = self.steps[0].bn_b, self.steps[0].grow


def changed(change: Callable[[Any], Any], **options: Any) -> Block:
    """``ListBlock`` whose last layer is changed."""

    def block(layers: int, channels: int, k: int) -> nn.Module:
        made = ListBlock(layers, channels, k, **options)
        change(made.steps[-1])
        return made

    return block


def _other_convolution(bottleneck: int | None = 3, **options: Any) -> Block:
    def change(layer: Any) -> None:
        shape = layer.grow.in_channels, layer.grow.out_channels
        layer.grow = nn.Conv2d(*shape, 3, **{"padding": 1, "bias": False, **options})

    return changed(change, bottleneck=bottleneck)


def _own_forward(layer: Any) -> None:
    original = layer.squeeze.forward
    layer.squeeze.forward = lambda h: original(h) * 2


BACKWARDS = operator.itemgetter(slice(None, None, -1))

UNSUPPORTED: dict[str, tuple[Block, str]] = {
    "cannot be extended": (CannotBeExtended, "cannot become another class.*nobody"),
    "cannot be copied": (CannotBeCopied, "cannot be copied.*one of a kind"),
    "layers read newest first": (variant(read=BACKWARDS), "order"),
    "something on the side": (OnTheSide, "'square'"),
    "output newest first": (variant(give=BACKWARDS), "order"),
    "output in another order": (variant(give=lambda f: [f[0], *f[:0:-1]]), "concatenates in another order"),
    "only new features": (variant(give=lambda features: features[1:]), "leaves out its input"),  # FC-DenseNet's
    # The first and the last feature map, that one several times: the widths of a DenseNet, not its wires.
    "local": (variant(read=lambda f: [f[0], *[f[-1]] * (len(f) - 1)]), "does not read all earlier features|order"),
    "scaled": (variant(layer=ScaledLayer), "'mul'"),
    "scaled in evaluation": (SilentlyScaled, "output differs in evaluation"),
    "raises in evaluation": (CannotBeEvaluated, "cannot be checked.*no evaluation"),
    "bias": (_other_convolution(None, bias=True), "bias"),  # FC-DenseNet's
    "GroupNorm": (
        changed(lambda layer: setattr(layer, "bn_a", nn.GroupNorm(1, layer.squeeze.in_channels))), "group_norm"
    ),
    "groups": (_other_convolution(groups=4), "4 groups"),
    "dilation": (_other_convolution(padding=2, dilation=2), "dilation"),
    "reflecting": (_other_convolution(padding_mode="reflect"), "reflect"),
    "weight norm": (changed(lambda layer: parametrizations.weight_norm(layer.grow)), "parametrization"),
    "pruned": (
        changed(lambda layer: prune.random_unstructured(layer.grow, "weight", 0.3)), "computed from other parameters"
    ),
    "own forward": (changed(_own_forward), "forward of its own"),
    "post-activation": (variant(layer=PostActivationLayer), "relu"),
    "shared layers": (SharedBlock, "more than once"),
}  # fmt: skip
