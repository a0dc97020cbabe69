"""How many bytes of tensors a training step has alive, without computing anything.

The network runs forward and backward on PyTorch's ``meta`` device, where tensors have shapes and no data: autograd and
checkpoints make, keep and free the tensors that they would elsewhere, and a network that needs a terabyte takes
seconds. What an operator uses inside is not seen; of fastdense's block operators it is added, from docs/memory.md.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdense.memory import WORKSPACE_BYTES


class Counted(NamedTuple):
    """Bytes of a training step with SGD and momentum.

    Attributes:
        parameters: parameters, their momentum and the buffers: there all the time.
        gradients: of the parameters, when all of them exist.
        kept: what there is after the forward pass, beside parameters and the batch.
        peak: the most at one time, of everything.
    """

    parameters: int
    gradients: int
    kept: int
    peak: int


def counted_bytes(network: Callable[[], nn.Module], shape: tuple[int, ...], classes: int) -> Counted:
    """Count one training step of ``network()`` on a batch of ``shape``.

    Counted alike for every network: parameters, buffers, momentum, the batch, and each tensor that forward and backward
    make, gradients included, for as long as it lives. Not counted: what a convolution takes for itself, and what an
    allocator loses to rounding and gaps.
    """
    with torch.device("meta"):
        model, x = network().train(), torch.empty(shape)
        labels = torch.empty(shape[0], dtype=torch.int64)
        there = [x, labels, *model.parameters(), *model.buffers()]
        with LiveBytes(there) as live:
            loss = F.cross_entropy(model(x), labels)
            kept = live.now
            loss.backward()
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    parameters = 2 * gradients + buffers  # each of them, and its momentum
    return Counted(parameters, gradients, kept, parameters + _size(x) + _size(labels) + live.peak)


def _size(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make while it is on, until they are freed.

    Args:
        there: tensors that exist before, and are not counted.

    Attributes:
        now, peak: bytes alive, and the most there were.
    """

    def __init__(self, there: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._there = {tensor.untyped_storage()._cdata for tensor in there}
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = torch.empty_like(args[0]) if _adds_alike(func, args) else func(*args, **(kwargs or {}))
        self._note(found)
        inside = _inside(str(func), args) if func.namespace == "fastdense" else 0
        self.peak = max(self.peak, self.now + inside)
        return found

    def _note(self, found: Any) -> None:
        if isinstance(found, tuple | list):
            for each in found:
                self._note(each)
        elif isinstance(found, Tensor):
            storage = found.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._there or key in self._alive:
                return
            self._alive[key] = weakref.ref(storage, lambda _: self._freed(key, size))
            self.now += size

    def _freed(self, key: int, size: int) -> None:
        del self._alive[key]
        self.now -= size


def _adds_alike(func: Any, args: Any) -> bool:
    """Whether this adds two tensors without data whose dimensions lie in one order: the sum's do, too.

    These are gradients, one sum for every pair of layers, and PyTorch takes long to come to the same conclusion.
    """
    if func is not torch.ops.aten.add.Tensor or not all(isinstance(arg, Tensor) and arg.is_meta for arg in args):
        return False
    a, b = args
    return a.shape == b.shape and a.dtype == b.dtype and _order(a) == _order(b)


def _order(tensor: Tensor) -> list[int]:
    strides = tensor.stride()
    return sorted(range(len(strides)), key=lambda dim: -strides[dim])


def _inside(operator: str, args: Any) -> int:
    """Bytes that fastdense's operator uses while it runs, beside its inputs and outputs.

    In the letters of docs/memory.md: backward makes ``D`` of the block and of a bottleneck, and a bottleneck that is
    computed again; forward, a bottleneck that nobody keeps. Of ``recompute="activations"`` that is ``m*B`` too much.
    """
    bytes_ = WORKSPACE_BYTES
    if operator.startswith("fastdense.dense_block"):
        backward = "backward" in operator
        features, params = (args[3], args[9]) if backward else (args[0], args[3])
        pixels = features.numel() // features.shape[1]
        bottleneck = params[2].shape[0]  # the first convolution's outputs
        channels = features.shape[1] + 2 * bottleneck if backward else bottleneck
        bytes_ += pixels * channels * features.element_size()
    return int(bytes_)
