"""What a module computes, found by running a copy of it once on tensors without data.

The copy's parameters live on the ``meta`` device, so nothing is computed and nothing of the original is touched.
Every operation on features is recorded with the module that ran it, and every tensor carries a *label*: the tuple of
values that were concatenated to make it. A label says in which order a layer reads earlier features, which neither the
modules' names nor the parameters' shapes do.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

Label = tuple[int, ...]  # values concatenated along the channels; a single value for anything else
INPUT = 0  # the value that enters the module

_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
_COPIES = (Tensor.contiguous, Tensor.clone, torch.clone)
_KINDS: dict[Any, str] = {
    F.batch_norm: "batch_norm",
    torch.batch_norm: "batch_norm",
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), "relu"),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), "conv"),
    **dict.fromkeys((F.avg_pool1d, F.avg_pool2d, F.avg_pool3d), "avg_pool"),
    **dict.fromkeys((F.max_pool1d, F.max_pool2d, F.max_pool3d), "max_pool"),
    **dict.fromkeys((F.dropout, torch.dropout, torch.dropout_), "dropout"),
    **dict.fromkeys(
        (F.dropout1d, F.dropout2d, F.dropout3d, torch.feature_dropout, torch.feature_dropout_), "channel dropout"
    ),
}


class Unsupported(Exception):
    """A module that fastdense does not fully understand; the message is the reason that ``plan`` reports."""


@dataclass(frozen=True)
class Operation:
    """One call on features: what, in which module, and the labels of its feature arguments."""

    kind: str
    module: str
    inputs: tuple[Label, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Trace:
    """Operations by the value that they made, and the label of what the module returned."""

    copy: nn.Module
    operations: dict[int, Operation] = field(default_factory=dict)
    output: Label = ()


def kind_of(function: Any) -> str:
    """``"conv"``, ``"relu"`` and so on for what a DenseNet is made of; any other function's own name."""
    return _KINDS.get(function) or str(getattr(function, "__name__", function))


def clone_with(module: nn.Module, make: Callable[[Tensor], Tensor]) -> nn.Module:
    """A deep copy without hooks whose parameters and buffers are ``make(original)``; sharing is kept."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return copy.deepcopy(module, _memo(module, make))
    except Unsupported:
        raise
    except Exception as error:  # whatever a foreign class does when it is copied
        raise Unsupported(f"it cannot be copied ({summary(error)})") from error


def _memo(module: nn.Module, make: Callable[[Tensor], Tensor]) -> dict[int, Any]:
    """What ``deepcopy`` shall take instead of copying."""
    memo: dict[int, Any] = {}
    for child in module.modules():
        for name, value in vars(child).items():
            if "_hooks" in name and isinstance(value, dict):
                memo[id(value)] = OrderedDict()
            elif type(value).__name__ == "ProcessGroup":  # cannot be copied, and need not be
                memo[id(value)] = value
        for parameter in child._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                if isinstance(parameter, nn.parameter.UninitializedParameter):
                    raise Unsupported("it has a lazy parameter: run the model once first")
                memo[id(parameter)] = nn.Parameter(make(parameter), requires_grad=parameter.requires_grad)
        for buffer in child._buffers.values():
            if buffer is not None:
                memo.setdefault(id(buffer), make(buffer))
    return memo


def on_meta(tensor: Tensor) -> Tensor:
    """``tensor`` without its data; counters stay real, because ``momentum=None`` reads them."""
    if tensor.dim() == 0 and not tensor.is_floating_point():
        return torch.zeros((), dtype=tensor.dtype, device="cpu")
    # Python numbers only: a DTensor's or a quantised tensor's own factory would not give a plain tensor.
    return torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device="meta")


class _Recorder(TorchFunctionMode):
    def __init__(self, result: Trace, x: Tensor) -> None:
        super().__init__()
        self.result, self.path = result, [""]
        self.labels: dict[int, Label] = {id(x): (INPUT,)}
        self.alive: list[Any] = [x]  # an id is only a name while its object lives

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        arguments = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        inputs = tuple(self.labels[id(leaf)] for leaf in arguments if id(leaf) in self.labels)
        result = func(*args, **kwargs)
        if inputs:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._name(leaf, func, inputs, len(arguments), args, kwargs)
        return result

    def _name(
        self, leaf: Tensor, func: Any, inputs: tuple[Label, ...], given: int, args: tuple[Any, ...], kwargs: Any
    ) -> None:
        self.alive.append(leaf)
        if func in _COPIES:
            self.labels[id(leaf)] = inputs[0]
            return
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        if func in _CONCATENATIONS and len(inputs) == given and dim in (1, 1 - leaf.dim()):
            self.labels[id(leaf)] = sum(inputs, ())
            return
        value = len(self.result.operations) + 1
        self.result.operations[value] = Operation(kind_of(func), self.path[-1], inputs, args, kwargs)
        self.labels[id(leaf)] = (value,)


def trace(module: nn.Module, shape: Sequence[int], prepare: Callable[[nn.Module], None]) -> Trace:
    """Run a copy of ``module`` in training mode on an input of ``shape``; ``prepare`` may change the copy first.

    Raises:
        Unsupported: the copy cannot be made or run, or returns anything but one tensor.
    """
    with isolated(), torch.no_grad():
        result = Trace(clone_with(module, on_meta))
        prepare(result.copy)
        dtype = next((p.dtype for p in result.copy.parameters()), torch.float32)
        x = torch.empty(tuple(shape), dtype=dtype, device="meta")
        recorder = _Recorder(result, x)
        handles = []
        for path, child in result.copy.train().named_modules():
            handles.append(child.register_forward_pre_hook(lambda *_, path=path: recorder.path.append(path)))
            handles.append(child.register_forward_hook(lambda *_: _pop(recorder.path)))
        eval_sync_batchnorm(result.copy)
        try:
            with recorder:
                output = result.copy(x)
        except Exception as error:  # foreign code may raise anything
            raise Unsupported(f"it cannot be run on an input of shape {tuple(shape)} ({summary(error)})") from error
    if not isinstance(output, Tensor) or id(output) not in recorder.labels:
        raise Unsupported(f"it returns {type(output).__name__}, not one tensor made of its input")
    result.output = recorder.labels[id(output)]
    for handle in handles:
        handle.remove()
    return result


def eval_sync_batchnorm(copy: nn.Module) -> None:
    """SyncBatchNorm in evaluation mode: a look in one process must not wait for the others."""
    for child in copy.modules():
        if isinstance(child, nn.SyncBatchNorm):
            child.eval()


@contextmanager
def isolated() -> Iterator[None]:
    """What surrounds the caller (autocast, inference mode, warnings as errors) does not reach a copy that is run."""
    with (
        warnings.catch_warnings(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        warnings.simplefilter("ignore")
        yield


def _pop(path: list[str]) -> None:
    path.pop()


def summary(error: Exception) -> str:
    """The kind of ``error`` and the first line of what it says."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"
