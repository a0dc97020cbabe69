"""What a converted module becomes: a subclass of its own class that reads its children and does not call them."""

from __future__ import annotations

import types
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import functional
from ..core import checks
from ..core.warn import say_once
from ..ops import support, validate
from ..reference import NORMS, rename_old_keys

_TIMM_NORMS = frozenset(("timm.layers.norm_act.BatchNormAct2d", "timm.layers.norm_act.SyncBatchNormAct"))


class Node(NamedTuple):
    """A module inside a converted one as it was when it was converted.

    Its parent's index, its name, its class, its children's names in their order, and the plain attributes that its
    ``forward`` may read: those of foreign classes, but for what every module has and what is read again at each call.
    """

    parent: int
    name: str
    cls: type[Any]  # NoneType for a child that is None
    children: tuple[str, ...]
    attributes: tuple[tuple[str, Any], ...] = ()


class Stage(NamedTuple):
    """BN-ReLU-Conv, as indices of nodes, and the geometry of the convolution when it was read."""

    norm: int
    conv: int
    geometry: tuple[Any, ...] = ()


class DropoutSource(NamedTuple):
    """Where a dropout rate is read: an attribute of a node, or a constant."""

    owner: int
    attribute: str | None
    constant: float | None


class LayerSpec(NamedTuple):
    """One layer: one or two stages, and its dropout."""

    stages: tuple[Stage, ...]
    dropout: DropoutSource | None
    per_channel: bool


class BlockSpec(NamedTuple):
    """How to run a block: its modules, its layers, and the flags that ask for ``recompute="bottlenecks"``."""

    nodes: tuple[Node, ...]
    layers: tuple[LayerSpec, ...]
    flags: tuple[tuple[int, str], ...]
    recompute: str | None = None
    impl: str = "auto"


class TransitionSpec(NamedTuple):
    """How to run a transition, as indices of nodes; ``relu`` is ``None`` where the norm includes it."""

    nodes: tuple[Node, ...]
    norm: int
    relu: int | None
    conv: int
    pool: int
    recompute: str | None = None
    impl: str = "auto"


class StemSpec(NamedTuple):
    """How to run a Sequential with BN-ReLU-MaxPool somewhere in a row, as indices of nodes.

    The nodes are those of these children alone, and the root's children are their names: all others are called, as
    they are and wherever they are.
    """

    nodes: tuple[Node, ...]
    norm: int
    pool: int
    recompute: str | None = None
    impl: str = "auto"


Spec = BlockSpec | TransitionSpec | StemSpec
KINDS: dict[type[Spec], str] = {BlockSpec: "block", TransitionSpec: "transition", StemSpec: "stem"}


def children_as_module(module: nn.Module, names: tuple[str, ...]) -> nn.Sequential:
    """Some children of ``module``, called one after another."""
    return nn.Sequential(OrderedDict((name, module.get_submodule(name)) for name in names))


def part_of(module: nn.Module, spec: Spec) -> nn.Module:
    """What of ``module`` runs otherwise by ``spec``, which fits it, too: of a Sequential with a stem, the stem."""
    return children_as_module(module, spec.nodes[0].children) if isinstance(spec, StemSpec) else module


def geometry(conv: Any) -> tuple[Any, ...]:
    """What decides whether a convolution can run fused."""
    return conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode, conv.bias is None


class Layer:
    """A layer of a foreign block under the names that ``functional.py`` reads."""

    def __init__(self, stages: list[tuple[nn.Module, nn.Module]], rate: float, per_channel: bool, training: bool):
        self.norm1, self.conv1 = stages[0]
        self._modules = {"norm1": self.norm1, "conv1": self.conv1}
        if len(stages) == 2:
            self.norm2, self.conv2 = stages[1]
            self._modules |= {"norm2": self.norm2, "conv2": self.conv2}
        self.drop_rate, self.drop_channels, self.training = rate, per_channel, training


def _same_arithmetic(cls: type[Any], expected: type[Any]) -> bool:
    """Whether a child of class ``cls`` computes what one of class ``expected`` did: BatchNorm and SyncBatchNorm do."""
    if cls is expected:
        return True
    if expected in NORMS:
        return cls in NORMS
    return {f"{c.__module__}.{c.__qualname__}" for c in (cls, expected)} == _TIMM_NORMS


def _same_children(module: nn.Module, names: tuple[str, ...]) -> bool:
    """In the same order, in which a Sequential calls them; not for a norm, which calls its activation by name."""
    now = (*module._modules,)
    return now == names or (isinstance(module, _BatchNorm) and sorted(now) == sorted(names))


def resolve(root: Any, nodes: tuple[Node, ...]) -> tuple[list[Any], str | None]:
    """The modules that ``nodes`` stand for today, or the reason why they are not what they were.

    It runs before every call: one flat pass over names that are known.
    """
    if not _same_children(root, nodes[0].children):
        return [root], "it has other children than when it was converted"
    if reason := _changed_attribute(root, nodes[0].attributes):
        return [root], f"it {reason}"
    return _resolve_children(root, nodes)


def _resolve_children(root: Any, nodes: tuple[Node, ...]) -> tuple[list[Any], str | None]:
    found: list[Any] = [root]
    for parent, name, cls, children, attributes in nodes[1:]:
        child = found[parent]._modules.get(name)
        if type(child) is not cls and not _same_arithmetic(type(child), cls):
            now = "gone" if child is None else f"a {type(child).__name__}"
            return found, f"its child {name!r} was a {cls.__name__} when it was converted and is {now}"
        if child is None:
            found.append(None)
            continue
        if (children or child._modules) and not _same_children(child, children):
            return found, f"its child {name!r} has other children than when it was converted"
        if reason := support.changed(child) or (_changed_attribute(child, attributes) if attributes else None):
            return found, f"its child {name!r} {reason}"
        found.append(child)
    return found, None


def _changed_attribute(module: nn.Module, attributes: tuple[tuple[str, Any], ...]) -> str | None:
    for name, value in attributes:
        now = getattr(module, name, None)
        if now != value:
            return f"had {name}={value!r} when it was converted and has {now!r}"
    return None


def _layers(found: list[Any], spec: BlockSpec) -> tuple[list[Layer], str | None]:
    layers: list[Layer] = []
    for i, layer in enumerate(spec.layers):
        stages = []
        for stage in layer.stages:
            conv = found[stage.conv]
            if geometry(conv) != stage.geometry and (
                reason := support.convolution_unsupported_reason(conv, "a convolution")
            ):
                return layers, f"layer {i}: {reason}"
            stages.append((found[stage.norm], conv))
        rate: Any = 0.0
        training = False
        if layer.dropout is not None:
            owner, attribute, constant = layer.dropout
            rate = constant if attribute is None else getattr(found[owner], attribute)
            training = found[owner].training
        layers.append(Layer(stages, rate, layer.per_channel, training))
    return layers, None


def block_layers(module: Any) -> tuple[list[Layer], str | None]:
    """The layers of a converted block as it is now, or the reason why it cannot run fused any more."""
    spec = module._fastdense
    found, reason = resolve(module, spec.nodes)
    return ([], reason) if reason is not None else _layers(found, spec)


class Converted:
    """Mixed into the class of a converted module, in front of it; ``_fastdense`` holds what was read from it."""

    _fastdense: Spec
    _fastdense_original: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original class computes: fused where possible, else by the original ``forward``."""
        spec = vars(self).get("_fastdense")
        impl = "reference" if spec is None else checks.impl_name(spec.impl)  # None: a slice of a converted Sequential
        if spec is not None and impl != "reference":
            if (reason := support.process_unsupported_reason()) is None:
                if kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
                    reason = "it was called with something else than one tensor (or torch.fx traces the model)"
                else:
                    reason, output = _run(self, spec, impl, args[0])
                    if reason is None:
                        return output
            _say_once(self, support.refusal(impl, reason))
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def __reduce__(self) -> Any:
        getstate = getattr(self, "__getstate__", None)  # every object has one from Python 3.11 on
        return _rebuild, (self._fastdense_original,), self.__dict__ if getstate is None else getstate()

    def __prepare_scriptable__(self) -> nn.Module:
        """``torch.jit.script`` compiles the original class, on the same parameters."""
        reason = "torch.jit.script compiles the model and puts its original modules back: convert it again afterwards"
        _say_once(self, support.refusal("auto", reason))
        original = self._fastdense_original
        module = original.__new__(original)
        module.__dict__.update((name, value) for name, value in self.__dict__.items() if name not in OWN)
        return module

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        rename_old_keys(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]


OWN = ("_fastdense", "_fastdense_said")  # what a conversion adds to an instance


def _run(module: Any, spec: Spec, impl: str, x: Tensor) -> tuple[str | None, Any]:
    """``(None, output)``, or the reason why ``module`` cannot run so and nothing."""
    if isinstance(spec, StemSpec):
        return _run_stem(module, spec, impl, x)
    found, reason = resolve(module, spec.nodes)
    if reason is not None:
        return reason, None
    if isinstance(spec, TransitionSpec):
        return _run_transition(found, spec, impl, x)
    layers, reason = _layers(found, spec)
    reason = reason or support.sync_unsupported_reason(
        [found[stage.norm] for layer in spec.layers for stage in layer.stages]
    )
    if reason is not None:
        return reason, None
    validate.block_input(x, layers)
    recompute = spec.recompute
    if recompute is None:
        asked = any(getattr(found[node], flag, False) for node, flag in spec.flags)
        recompute = "bottlenecks" if asked else "activations"
    return None, functional.fused_block(x, layers, recompute, impl)[0]


def _run_transition(found: list[Any], spec: TransitionSpec, impl: str, x: Tensor) -> tuple[str | None, Any]:
    norm, conv, pool = found[spec.norm], found[spec.conv], found[spec.pool]
    if not support.pools_first(conv, pool):
        return "its pooling and its convolution cannot change places any more", None
    if support.average_unsupported_reason(conv, pool) is None:
        return None, functional.fused_pool(x, norm, conv.weight, validate.windows("average", pool), impl)[0]
    x = norm(x)
    return None, conv(pool(x if spec.relu is None else found[spec.relu](x)))


def _run_stem(module: Any, spec: StemSpec, impl: str, x: Any) -> tuple[str | None, Any]:
    run, names = spec.nodes[0].children, (*module._modules,)
    start = names.index(run[0]) if run[0] in names else 0
    if names[start : start + len(run)] != run:
        return f"stem: the children {', '.join(map(repr, run))} do not follow one another any more", None
    found, reason = _resolve_children(module, spec.nodes)
    reason = reason or support.maximum_unsupported_reason(found[spec.pool])
    if reason is not None:
        return f"stem: {reason}", None
    for name, child in module._modules.items():
        if name == run[0]:
            x = functional.fused_pool(x, found[spec.norm], None, validate.windows("maximum", found[spec.pool]), impl)[0]
        elif name not in run:
            x = child(x)
    return None, x


def _say_once(module: Any, message: str) -> None:
    """Warn once for each message and ``convert``: the modules that it converted share what was said."""
    if torch.compiler.is_dynamo_compiling():
        say_once(message)  # what else happens here would break the graph
    else:
        say_once(message, said=module.__dict__.setdefault("_fastdense_said", set()))


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def converted_class(original: type[nn.Module]) -> Any:
    """The subclass of ``original`` that its converted instances get; the same one every time."""
    if original not in _CLASSES:

        def body(namespace: dict[str, Any]) -> None:
            namespace.update(__module__=original.__module__, __doc__=original.__doc__, _fastdense_original=original)

        name = f"Fast{original.__name__.lstrip('_')}"
        _CLASSES.setdefault(original, types.new_class(name, (Converted, original), exec_body=body))
    return _CLASSES[original]


def _rebuild(original: type[nn.Module]) -> nn.Module:
    cls = converted_class(original)
    return cls.__new__(cls)
