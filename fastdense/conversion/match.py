"""Which modules of a model are a DenseNet's block, transition or stem, read from its structure.

A candidate is found by its shapes: a layer whose first convolution reads what the layer before read and wrote. Whether
it *is* a block is then read from a trace (``trace.py``): its output must be ``[x, H_1, ..., H_L]`` in that order, and
each ``H_l`` one or two BatchNorm-ReLU-Conv of ``[x, H_1, ..., H_{l-1}]`` with nothing in between. Names of classes and
modules play no role, so a network of one's own is read like torchvision's. A stem's BN-ReLU-MaxPool is looked for where
a plain ``nn.Sequential`` calls them one after another, in a model that has blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from torch import nn
from torch.jit import ScriptModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..nn import DenseBlock, DenseNet, Transition
from ..ops.support import convolution_unsupported_reason, maximum_unsupported_reason, pools_first
from ..reference import CONVOLUTIONS
from .converted import (
    KINDS,
    BlockSpec,
    Converted,
    DropoutSource,
    LayerSpec,
    Node,
    Spec,
    Stage,
    StemSpec,
    TransitionSpec,
    children_as_module,
    converted_class,
    geometry,
)
from .trace import INPUT, Label, Operation, Trace, Unsupported, trace

FLAGS = ("memory_efficient", "grad_checkpointing", "efficient")  # of torchvision, timm, efficient_densenet_pytorch

_MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def candidates(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """``(name, module, kind)`` of what looks like a block, a transition or a stem, or is fastdense's already.

    ``kind`` is ``"block"``, ``"transition"`` or ``"stem"``: the Sequential that calls it, in a model with blocks. What
    lies inside a block or a transition is no candidate.
    """
    seen: set[int] = set()

    def walk(module: nn.Module, name: str, own: bool = False) -> Iterator[tuple[str, nn.Module, str]]:
        if id(module) in seen or isinstance(module, ScriptModule):
            return
        seen.add(id(module))
        kind = _kind(module)
        if kind is not None and not (kind == "stem" and own):  # fastdense's own network runs its stem itself
            yield name, module, kind
        if kind in (None, "stem"):
            for child_name, child in module.named_children():
                yield from walk(child, f"{name}.{child_name}" if name else child_name, isinstance(module, DenseNet))

    found = list(walk(model, ""))
    blocks = any(kind == "block" for _, _, kind in found)
    return [one for one in found if blocks or one[2] != "stem" or isinstance(one[1], Converted)]


def _kind(module: nn.Module) -> str | None:
    if isinstance(module, Converted):  # a slice of one has no spec, and is none any more
        return KINDS[type(module._fastdense)] if "_fastdense" in vars(module) else None
    if isinstance(module, DenseBlock) or _looks_like_block(module):
        return "block"
    if isinstance(module, Transition) or _looks_like_transition(module):
        return "transition"
    return "stem" if stem_names(module) else None


def _convolutions(module: nn.Module) -> list[Any]:
    return [child for child in module.modules() if isinstance(child, _ConvNd)]


def _is_list(module: nn.Module) -> bool:
    """Whether ``module`` only holds others and cannot be called."""
    return isinstance(module, nn.ModuleList | nn.ModuleDict) and type(module).forward is nn.Module.forward


def _looks_like_block(module: nn.Module) -> bool:
    """Whether each child's first convolution reads what the child before it read, and what it wrote."""
    if _is_list(module):
        return False
    children = [child for child in module.children() if _convolutions(child)]
    if len(children) == 1 and _is_list(children[0]):
        children = [child for child in children[0].children() if _convolutions(child)]
    layers = [_convolutions(child) for child in children]
    if not layers or any(isinstance(child, _ConvNd) for child in children):
        return False
    if len(layers) == 1:
        return "block" in type(module).__name__.lower() and len(layers[0]) <= 2
    return all(
        after[0].in_channels == before[0].in_channels + before[-1].out_channels for before, after in pairwise(layers)
    )


def _looks_like_transition(module: nn.Module) -> bool:
    inside = [child for child in module.modules() if child is not module]
    convs = _convolutions(module)
    return (
        1 < len(inside) <= 12
        and len(convs) == 1
        and convs[0] is not module
        and set(convs[0].kernel_size) == {1}
        and sum(hasattr(child, "num_features") or hasattr(child, "num_channels") for child in inside) == 1
        and any("Pool" in type(child).__name__ for child in inside)
    )


def stem_names(module: nn.Module) -> tuple[str, ...]:
    """The children that look like BN-ReLU-MaxPool, the ReLU maybe inside the norm; empty if there are none."""
    if type(module) is not nn.Sequential:
        return ()
    children = list(module._modules.items())
    for i, (_, norm) in enumerate(children):
        if isinstance(norm, _BatchNorm):
            after = i + 1 if norm._modules else i + 2
            relu = all(type(child) is nn.ReLU for _, child in children[i + 1 : after])
            if relu and after < len(children) and isinstance(children[after][1], _MAX_POOLS):
                return tuple(name for name, _ in children[i : after + 1])
    return ()


def probe_shape(module: nn.Module) -> tuple[int, ...]:
    """A small odd input for ``module``: its channels, and different sizes along each spatial dimension."""
    convs = _convolutions(module)
    if not convs:  # a stem: BN-ReLU-MaxPool
        norm: Any = next(child for child in module.children() if isinstance(child, _BatchNorm))
        dims = next(n for n, pool in enumerate(_MAX_POOLS, 1) if any(isinstance(c, pool) for c in module.children()))
        return (3, norm.num_features, *{1: (19,), 2: (9, 8), 3: (7, 5, 6)}[dims])
    conv = convs[0]
    spatial = {1: (11,), 2: (5, 4), 3: (4, 2, 3)}[len(conv.kernel_size)]
    return (3, conv.in_channels, *spatial)


def read(module: nn.Module, kind: str) -> Spec:
    """How to run ``module`` with fastdense.

    Raises:
        Unsupported: with the reason, if anything about it is not fully understood.
    """
    if "forward" in vars(module):
        raise Unsupported("it has a forward of its own, set on the instance")
    if kind == "stem":
        module = children_as_module(module, stem_names(module))
    for path, child in module.named_modules():
        if path:
            _check_child(path, child)
    sources: dict[float, DropoutSource] = {}
    nodes, index = _nodes(module)

    def prepare(copy: nn.Module) -> None:
        without_flags(copy)
        sources.update(_mark_dropout(copy, index))

    found = trace(module, probe_shape(module), prepare)
    try:
        found.copy.__class__ = converted_class(type(module))
    except TypeError as error:  # a metaclass or slots that do not allow it
        raise Unsupported(f"a {type(module).__name__} cannot become another class ({error})") from error
    if kind == "transition":
        return _transition(found, nodes, index)
    if kind == "stem":
        return _stem(found, nodes, index)
    return _block(found, nodes, index, sources)


def without_flags(copy: nn.Module) -> None:
    """Checkpointing off: it changes no value, but hides operations and updates running statistics a second time."""
    for child in copy.modules():
        for flag in FLAGS:
            if isinstance(getattr(child, flag, None), bool):
                setattr(child, flag, False)


def _check_child(path: str, child: nn.Module) -> None:
    if "forward" in vars(child):
        raise Unsupported(f"its child {path!r} has a forward of its own, set on the instance")
    if hasattr(child, "parametrizations"):
        raise Unsupported(f"its child {path!r} has a parametrization")
    if isinstance(child, _ConvNd) and type(child) not in CONVOLUTIONS:
        raise Unsupported(f"its child {path!r} is a {type(child).__name__}, which fastdense does not know")
    if isinstance(child, _ConvNd | _BatchNorm) and not {"weight", "bias"} >= set(child._parameters):
        raise Unsupported(f"its child {path!r} has a weight that is computed from other parameters")


def _nodes(module: nn.Module) -> tuple[tuple[Node, ...], dict[str, int]]:
    """Every module inside, parents first, and the index of each path; index 0 is ``module`` itself."""
    nodes = [Node(-1, "", type(module), (*module._modules,), _attributes(module))]
    index = {"": 0}
    pending = [("", module)]
    seen = {id(module)}
    while pending:
        path, parent = pending.pop(0)
        for name, child in parent._modules.items():
            if child is None:
                nodes.append(Node(index[path], name, type(None), ()))
                continue
            if id(child) in seen and _convolutions(child):
                raise Unsupported(f"its module {name!r} occurs more than once in it")
            seen.add(id(child))
            inner = f"{path}.{name}" if path else name
            index[inner] = len(nodes)
            nodes.append(Node(index[path], name, type(child), (*child._modules,), _attributes(child)))
            pending.append((inner, child))
    return tuple(nodes), index


_EVERY_MODULE = frozenset(vars(nn.Module()))


def _attributes(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Numbers, strings and switches that a foreign ``forward`` may depend on, sorted by name."""
    if type(module).__module__.startswith("torch.nn.") or isinstance(module, _BatchNorm | _ConvNd):
        return ()
    again = {*_EVERY_MODULE, *FLAGS, *_dropout_rates(module)}
    plain = bool | int | float | str | None
    return tuple(
        (name, value) for name, value in sorted(vars(module).items()) if name not in again and isinstance(value, plain)
    )


def _dropout_rates(module: nn.Module) -> list[str]:
    names = ["p"] if isinstance(module, _DROPOUTS) else [name for name in vars(module) if "drop" in name]
    values = {name: getattr(module, name) for name in names}
    return [
        name
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
    ]


def _mark_dropout(copy: nn.Module, index: dict[str, int]) -> dict[float, DropoutSource]:
    """Gives every dropout rate in ``copy``, also 0, a value of its own, so that the trace shows where it is used."""
    sources: dict[float, DropoutSource] = {}
    for path, child in copy.named_modules():
        for name in _dropout_rates(child):
            rate = 0.25 + len(sources) / 2**20
            setattr(child, name, rate)
            sources[rate] = DropoutSource(index[path], name, None)
    return sources


class _Walk:
    """Walks back through a trace, and remembers which operations it understood."""

    def __init__(self, found: Trace) -> None:
        self.found, self.used = found, set[int]()

    def take(self, label: Label, *kinds: str) -> Operation:
        """The operation that made ``label``, which must be one of ``kinds``."""
        if len(label) != 1 or label[0] == INPUT:
            raise Unsupported(f"{kinds[0]} does not come where a DenseNet has it")
        operation = self.found.operations[label[0]]
        if operation.kind not in kinds:
            raise Unsupported(
                f"it runs {operation.kind!r} in {operation.module or 'its own forward'} where a DenseNet has {kinds[0]}"
            )
        self.used.add(label[0])
        return operation

    def convolution(self, operation: Operation) -> str:
        conv: Any = self.found.copy.get_submodule(operation.module)
        if type(conv) not in CONVOLUTIONS or conv.weight is not _argument(operation, 1, "weight"):
            raise Unsupported(f"it convolves in {operation.module or 'its own forward'} without an nn.Conv module")
        return operation.module

    def norm(self, operation: Operation) -> str:
        """The BatchNorm module behind a ``batch_norm``, which must have been called as ``nn.BatchNorm`` calls it."""
        norm: Any = self.found.copy.get_submodule(operation.module)
        if (
            not isinstance(norm, _BatchNorm)
            or norm.weight is not _argument(operation, 3, "weight")
            or norm.bias is not _argument(operation, 4, "bias")
            or norm.eps != _argument(operation, 7, "eps", 1e-5)
        ):
            raise Unsupported(f"it normalises in {operation.module or 'its own forward'} not as nn.BatchNorm does")
        return operation.module

    def finish(self) -> None:
        """Raises if the module computed anything that was not read."""
        for value, operation in self.found.operations.items():
            if value not in self.used:
                place = operation.module or "its own forward"
                raise Unsupported(f"it runs {operation.kind!r} in {place}, which fastdense does not know")


def _argument(operation: Operation, position: int, name: str, default: Any = None) -> Any:
    if len(operation.args) > position:
        return operation.args[position]
    return operation.kwargs.get(name, default)


def _block(
    found: Trace, nodes: tuple[Node, ...], index: dict[str, int], sources: dict[float, DropoutSource]
) -> BlockSpec:
    walk = _Walk(found)
    _check_output(found.output)
    layers = [_layer(walk, value, found.output[: i + 1], index, sources) for i, value in enumerate(found.output[1:])]
    walk.finish()
    names = [part for layer in layers for stage in layer.stages for part in (stage.norm, stage.conv)]
    if len(set(names)) != len(names):
        raise Unsupported("its layers share modules")
    if len({len(layer.stages) for layer in layers}) > 1:
        raise Unsupported("some of its layers have a bottleneck and others have none")
    if len({layer.per_channel for layer in layers if layer.dropout is not None}) > 1:
        raise Unsupported("some of its layers drop whole channels and others drop elements")
    flags = tuple(
        (i, flag)
        for path, i in index.items()
        for flag in FLAGS
        if isinstance(getattr(found.copy.get_submodule(path), flag, None), bool)
    )
    return BlockSpec(nodes, tuple(layers), flags)


def _check_output(output: Label) -> None:
    if INPUT not in output:
        raise Unsupported("its output leaves out its input")
    if len(output) == 1:
        raise Unsupported("its output is its input")
    if output[0] != INPUT or list(output) != sorted(output):
        raise Unsupported("it concatenates in another order than [input, first layer, ..., last layer]")
    if len(set(output)) != len(output):
        raise Unsupported("it concatenates a feature map twice")


def _layer(
    walk: _Walk, value: int, earlier: Label, index: dict[str, int], sources: dict[float, DropoutSource]
) -> LayerSpec:
    """The layer that made ``value``; it must read exactly ``earlier``, in that order."""
    operation = walk.take((value,), "conv", "dropout", "channel dropout")
    dropout, per_channel = None, operation.kind == "channel dropout"
    if operation.kind != "conv":
        rate = float(_argument(operation, 1, "p", 0.5))
        dropout = sources.get(rate, DropoutSource(index[operation.module], None, rate))
        operation = walk.take(operation.inputs[0], "conv")
    stages: list[Stage] = []
    while True:
        path = walk.convolution(operation)
        conv = walk.found.copy.get_submodule(path)
        if reason := convolution_unsupported_reason(conv, repr(path)):
            raise Unsupported(reason)
        relu = walk.take(operation.inputs[0], "relu")
        norm = walk.take(relu.inputs[0], "batch_norm")
        stages.insert(0, Stage(index[walk.norm(norm)], index[path], geometry(conv)))
        label = norm.inputs[0]
        if label == earlier:
            return LayerSpec(tuple(stages), dropout, per_channel)
        if sorted(label) == sorted(earlier):
            raise Unsupported(f"{path!r} reads earlier features in another order than [input, first layer, ...]")
        if len(label) > 1 or label[0] == INPUT:
            raise Unsupported(f"{path!r} does not read all earlier features")
        if len(stages) == 2:
            raise Unsupported("a layer has more than two convolutions")
        operation = walk.take(label, "conv")


def _transition(found: Trace, nodes: tuple[Node, ...], index: dict[str, int]) -> TransitionSpec:
    walk = _Walk(found)
    pooling = walk.take(found.output, "avg_pool")
    convolution = walk.take(pooling.inputs[0], "conv")
    conv_path = walk.convolution(convolution)
    norm, relu = _norm_and_relu(walk, convolution, index, "convolution and average pooling")
    conv, pool = (found.copy.get_submodule(path) for path in (conv_path, pooling.module))
    if not pools_first(conv, pool):
        raise Unsupported("its pooling and its convolution cannot change places")
    return TransitionSpec(nodes, norm, relu, index[conv_path], index[pooling.module])


def _stem(found: Trace, nodes: tuple[Node, ...], index: dict[str, int]) -> StemSpec:
    walk = _Walk(found)
    pooling = walk.take(found.output, "max_pool")
    norm, _ = _norm_and_relu(walk, pooling, index, "maximum pooling")
    if reason := maximum_unsupported_reason(found.copy.get_submodule(pooling.module)):
        raise Unsupported(reason)
    return StemSpec(nodes, norm, index[pooling.module])


def _norm_and_relu(walk: _Walk, operation: Operation, index: dict[str, int], what: str) -> tuple[int, int | None]:
    """The modules of BatchNorm and ReLU before ``operation``, and nothing before those; no ReLU if the norm has it."""
    relu = walk.take(operation.inputs[0], "relu")
    normed = walk.take(relu.inputs[0], "batch_norm")
    if normed.inputs[0] != (INPUT,):
        raise Unsupported(f"it does more than BatchNorm, ReLU, {what}")
    walk.finish()
    norm_path = walk.norm(normed)
    inside = relu.module == norm_path or relu.module.startswith(f"{norm_path}.")
    if not inside and type(walk.found.copy.get_submodule(relu.module)) is not nn.ReLU:
        raise Unsupported("its ReLU is no module")
    return index[norm_path], None if inside else index[relu.module]
