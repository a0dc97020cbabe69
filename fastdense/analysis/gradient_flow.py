"""Where a block's gradients come from, and which features its layers read.

A DenseNet's layer ``l`` reads all of ``[H_0, ..., H_l]``, so that

    dLoss/dH_i = E_i + sum over the layers j >= i of what layer j sends back

with ``E_i`` from the block's output. The schedule adds these terms to ``(D, a, b)`` of the lazy gradient;
:func:`gradient_flow` keeps them apart. docs/gradient-flow.md derives the sum.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..conversion.api import check_model, dense_blocks, with_dense_blocks
from ..conversion.converted import Converted
from ..core import checks
from ..core.features import Features, LazyGradient, as_rows, row_stride
from ..core.primitives import Backend, Conv, Dropout, Gradients, Layer
from ..ops import dense_block
from ..reference import widths
from .plain import PlainBlock

__all__ = ["BlockFlow", "BlockReuse", "feature_reuse", "first_not_finite", "gradient_flow"]

LossFn = Callable[..., Tensor]


@dataclass(frozen=True)
class BlockFlow:
    """The gradient of one block's feature maps, and where it comes from, in Frobenius norms over the batch.

    Attributes:
        name: the block's name in the model.
        total: ``[L + 1]``: ``||dLoss/dH_i||``, as autograd gives it. ``H_0`` enters the block.
        contributions: ``[L + 1, L + 1]``: row ``i`` is ``H_i``, column ``j < L`` what layer ``j`` sends back to it,
            column ``L`` what comes from the block's output; zero where ``j < i``. The contributions of a row add up to
            its gradient as tensors: their norms do not add up, unless they all point the same way.
    """

    name: str
    total: Tensor
    contributions: Tensor


@dataclass(frozen=True)
class BlockReuse:
    """How strongly each layer of a block reads each feature map.

    Attributes:
        name: the block's name in the model.
        weights: ``[L + 1, L]``: row ``i`` is ``H_i``, column ``j`` layer ``j``: the mean absolute weight with which its
            first convolution reads ``H_i``; zero where ``j < i``.
    """

    name: str
    weights: Tensor


def gradient_flow(
    model: nn.Module,
    x: Tensor,
    target: Tensor | None = None,
    loss_fn: LossFn | None = None,
    *,
    dtype: torch.dtype | None = torch.float64,
) -> list[BlockFlow]:
    """Computes the gradient of every feature map of every dense block, term by term, for one batch.

    It works on a copy of ``model``, in the modes (training, evaluation) that its modules are in; neither the model nor
    a random generator changes.

    Args:
        model: a network with dense blocks: own, converted, or one that ``convert`` understands.
        x: its input, usually ``[N, C, *spatial]``.
        target: what ``loss_fn`` takes beside the output; for the default loss classes ``[N]``, int64. Left out, it is
            the model's own arg-max over the output's second axis.
        loss_fn: ``loss_fn(output, target)``, or ``loss_fn(output)`` where it takes no more, a scalar. Default:
            ``torch.nn.functional.cross_entropy``.
        dtype: what the copy computes in; ``None`` for the model's own, under the caller's autocast.

    Returns:
        One :class:`BlockFlow` for each run of a block, in the order of their execution; float64, on the CPU.

    Raises:
        TypeError: ``model`` is no module, ``x`` or ``target`` no tensor.
        ValueError: the model has no dense block or one that cannot run fused; ``x`` is empty, not floating-point or
            without data; the loss is no scalar, or does not depend on the model.
        RuntimeError: a block took no part in the loss or could not run fused; the message names it.

    Equivalent, for the totals, to ``retain_grad()`` on every element of the list that the reference block concatenates.
    """
    return [run.flow() for run in _run(model, x, target, loss_fn, dtype)]


def feature_reuse(model: nn.Module) -> list[BlockReuse]:
    """Computes the mean absolute weight with which each layer reads each earlier feature map.

    Args:
        model: as in :func:`gradient_flow`; it is not changed.

    Returns:
        One :class:`BlockReuse` for each dense block, in the order of ``model.named_modules()``; float64, on the CPU.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: the model has no dense block.

    Equivalent to ``layer.conv1.weight[:, channels_of_H_i].abs().mean()``. Source: arXiv 1608.06993, figure 5.
    """
    check_model(model)
    found = []
    for name, _, layers in dense_blocks(with_dense_blocks(_unwrapped(model))):
        edges = _edges(widths(layers))
        weights = torch.zeros(len(layers) + 1, len(layers), dtype=torch.float64)
        for j, layer in enumerate(layers):
            channels = layer.conv1.weight.detach().double().abs().transpose(0, 1).flatten(1).mean(1)  # [C_j]
            weights[: j + 1, j] = torch.stack([channels[of].mean() for of in edges[: j + 1]]).cpu()
        found.append(BlockReuse(name, weights))
    return found


def first_not_finite(
    model: nn.Module, x: Tensor, target: Tensor | None = None, loss_fn: LossFn | None = None
) -> str | None:
    """Says which feature map is the first to hold infinity or NaN in a training step; ``None`` if all are finite.

    Values come first, from the input to the loss; then gradients, from the loss to the input. It computes in the
    model's own dtype, under the caller's autocast; see :func:`gradient_flow`.
    """
    broken = [name for name, value in model.state_dict().items() if not _finite(value)]
    runs = _run(model, x, target, loss_fn, None)
    for run in runs:
        if (i := run.first_value_not_finite) is not None:
            # What a broken parameter computes is broken: that parameter is the cause.
            also = f"; {broken[0]} is not finite itself" if broken else ""
            return f"The values of {_feature(run.name, i)} are the first that are not finite{also}"
    for run in reversed(runs):
        flow = run.flow()
        if bad := (~flow.total.isfinite()).nonzero().flatten().tolist():
            by = (~flow.contributions[bad[-1]].isfinite()).nonzero().flatten().tolist()
            sender = "the block's output" if not by or by[-1] == len(flow.total) - 1 else f"layer {by[-1] + 1}"
            return f"The gradient of {_feature(run.name, bad[-1])} went first, in what {sender} sends back"
    return f"{broken[0]} is not finite" if broken else None


def _feature(block: str, i: int) -> str:
    return f"what enters {block} (H_0)" if i == 0 else f"the output of layer {i} of {block} (H_{i})"


def _finite(value: Any) -> bool:
    return not (isinstance(value, Tensor) and value.is_floating_point()) or bool(torch.isfinite(value).all())


class _Run:
    """One run of one block, backward: the norms of what its layers send back.

    A backend round another one: each layer adds to an empty ``(D, a, b)`` of its own, which is measured and then added
    to the gradient of the block's buffer.
    """

    def __init__(self, name: str, inner: Backend, G: LazyGradient, X: Features, layers: Sequence[Layer]) -> None:
        self.name, self.inner, self.G, self.X = name, inner, G, X
        self.edges = _edges([*(layer.reads for layer in layers), layers[-1].reads + layers[-1].writes])
        self.consumers = {layer.reads: j for j, layer in enumerate(layers)}  # no two read equally many channels
        self.norms = torch.zeros(len(layers) + 1, len(layers) + 1, dtype=torch.float64)
        self.totals = torch.zeros(len(layers) + 1, dtype=torch.float64)
        finite = torch.isfinite(X.rows).all(0)
        self.first_value_not_finite = next((i for i, of in enumerate(self.edges) if not finite[of].all()), None)
        self._record(len(layers), self._rows(G))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def bn_relu_conv_backward(
        self,
        grad: LazyGradient,
        output: Features,
        conv: Conv,
        source: Features,
        into: LazyGradient | None,
        *dropout: Dropout | None,
        accumulate: bool,
    ) -> Gradients:
        if into is None or not accumulate:  # a bottleneck's gradient: it has one consumer
            return self.inner.bn_relu_conv_backward(grad, output, conv, source, into, *dropout, accumulate=accumulate)
        own = _zeros_like(into)
        gradients = self.inner.bn_relu_conv_backward(grad, output, conv, source, own, *dropout, accumulate=True)
        self._record(self.consumers[source.rows.shape[1]], self._rows(own))
        for whole, part in ((into.D, own.D), (into.a, own.a), (into.b, own.b)):
            if whole is not None and part is not None:
                whole.add_(part)
        return gradients

    def finish(self) -> None:
        self.inner.finish()
        self.totals = self._norms(self._rows(self.G))

    def _record(self, consumer: int, rows: Tensor) -> None:
        norms = self._norms(rows)
        self.norms[: len(norms), consumer] = norms

    @torch.no_grad()
    def _rows(self, gradient: LazyGradient) -> Tensor:
        """``D + a + b*(v - mu)``, rows ``[m, C]`` from channel ``G.start`` on."""
        start = gradient.start
        return as_rows(self.inner.resolve(gradient, self.X[start : start + gradient.D.shape[1]])).clone()

    def _norms(self, rows: Tensor) -> Tensor:
        """The norm of each feature map that there is a gradient of."""
        squares = rows.double().square().sum(0).cpu()  # [C]
        stop = self.G.start + len(squares)
        padded = F.pad(squares, (self.G.start, 0))
        return torch.stack([padded[of].sum().sqrt() for of in self.edges if of.stop <= stop])

    def flow(self) -> BlockFlow:
        return BlockFlow(self.name, self.totals, self.norms)


class _PlainRun:
    """The same of a block without dense connections: each feature map has one consumer."""

    def __init__(self, name: str, features: Sequence[Tensor]) -> None:
        self.name = name
        self.totals = torch.zeros(len(features), dtype=torch.float64)
        self.first_value_not_finite = next((i for i, of in enumerate(features) if not _finite(of)), None)
        for i, feature in enumerate(features):
            feature.register_hook(lambda gradient, i=i: self._set(i, gradient))

    def _set(self, i: int, gradient: Tensor) -> None:
        self.totals[i] = gradient.double().norm()

    def flow(self) -> BlockFlow:
        return BlockFlow(self.name, self.totals, torch.diag(self.totals))


class _Watch(TorchDispatchMode):
    """Puts a :class:`_Run` between schedule and backend; a mode, because autograd takes it along to a GPU's thread."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names  # by the address of the block's first convolution's weight
        self.runs: list[_Run] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = None
        if func is torch.ops.fastdense.dense_block_backward.default:
            params = args[[argument.name for argument in func._schema.arguments].index("params")]
            name = self.names.get(params[2].data_ptr())
        if name is None:  # another operator, or a block outside the model
            return func(*args, **(kwargs or {}))

        def watch(inner: Backend, G: LazyGradient, X: Features, layers: Sequence[Layer]) -> Backend:
            self.runs.append(_Run(name, inner, G, X, layers))
            return self.runs[-1]

        token = dense_block.watcher.set(watch)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            dense_block.watcher.reset(token)


def _check(model: nn.Module, x: Tensor, target: Tensor | None) -> None:
    check_model(model)
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor, got {x.dtype}: standardise the images first")
    if x.numel() == 0 or x.is_meta:
        raise ValueError(f"x must hold at least one image, got shape {tuple(x.shape)} on {str(x.device)!r}")
    if not isinstance(target, Tensor | None):
        raise TypeError(f"target must be a torch.Tensor or None, got {type(target).__name__}")


def _run(
    model: nn.Module, x: Tensor, target: Tensor | None, loss_fn: LossFn | None, dtype: torch.dtype | None
) -> list[_Run | _PlainRun]:
    """One forward and backward pass of a copy."""
    _check(model, x, target)
    plain: list[_PlainRun] = []
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
        device = torch.device("cpu") if x.device.type == "mps" else x.device
        probe = _probe(model, dtype, device)
        x = x.detach().to(device=device, dtype=dtype, copy=True).requires_grad_()
        blocks = list(dense_blocks(probe))
        for name, block in probe.named_modules():
            if isinstance(block, PlainBlock):
                block.watch = lambda features, name=name: plain.append(_PlainRun(name, features))
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        if dtype is not None:
            stack.enter_context(torch.autocast(device.type, enabled=False))
        loss = _loss(probe(x), target if target is None else target.to(device), loss_fn)
        if not loss.requires_grad:
            raise ValueError("the loss does not depend on the model: loss_fn must not detach its output")
        with _Watch({layers[0].conv1.weight.data_ptr(): name for name, _, layers in blocks}) as watch:
            loss.backward()
    runs: list[_Run | _PlainRun] = [*plain, *reversed(watch.runs)]
    if missing := [name for name, _, _ in blocks if name not in {run.name for run in runs}]:
        raise RuntimeError(
            f"the dense block {missing[0] or 'that the model is'} took no part in the gradient of the loss, or could "
            "not run fused (a warning says why): remove what stands in its way, or leave it out of the model"
        )
    order = [name for name, _ in probe.named_modules()]
    return sorted(runs, key=lambda run: order.index(run.name)) if plain else runs


def _loss(output: Any, target: Tensor | None, loss_fn: LossFn | None) -> Tensor:
    if loss_fn is None or (target is None and not _takes_one(loss_fn)):
        if not isinstance(output, Tensor) or output.dim() < 2:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"without loss_fn the model must return class scores [N, classes], got {got}: give loss_fn"
            )
        target = output.argmax(1) if target is None else target
    loss: Any = (loss_fn or F.cross_entropy)(*([output] if target is None else [output, target]))
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"the loss must be one number, got {got}: let loss_fn take a mean or a sum")
    return loss


def _takes_one(loss_fn: LossFn) -> bool:
    try:
        inspect.signature(loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn).bind(None)
    except TypeError:
        return False
    return True


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel and ``torch.compile``."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    inner: Any = model
    while isinstance(inner, wrappers) or hasattr(inner, "_orig_mod"):
        inner = inner.module if isinstance(inner, wrappers) else inner._orig_mod
    return inner


def _probe(model: nn.Module, dtype: torch.dtype | None, device: torch.device) -> nn.Module:
    """A copy of ``model`` with gradients of its own, on the backend that knows ``dtype``."""
    model = _unwrapped(model)
    plain = any(isinstance(module, PlainBlock) for module in model.modules())
    converted = model if plain else with_dense_blocks(model)
    probe = copy.deepcopy(model) if converted is model else converted
    probe.zero_grad()
    module: Any
    for module in probe.modules():
        spec: Any = module._fastdense if isinstance(module, Converted) else module
        impl = getattr(spec, "impl", None)
        if impl is None or (dtype is None and checks.impl_name(impl) != "reference"):
            continue
        if spec is module:
            module.impl = "torch"
        else:
            module._fastdense = spec._replace(impl="torch")
    return probe if dtype is None else probe.to(device=device, dtype=dtype)


def _edges(widths: Sequence[int]) -> list[slice]:
    """The channels of ``H_0 .. H_L`` in the block's buffer."""
    return [slice(start, stop) for start, stop in itertools.pairwise([0, *widths])]


def _zeros_like(gradient: LazyGradient) -> LazyGradient:
    m, channels = gradient.D.shape
    D = gradient.D.new_empty_strided((m, channels), (row_stride(channels, gradient.D.dtype), 1)).zero_()
    a, b = (None if v is None else torch.zeros_like(v) for v in (gradient.a, gradient.b))
    return LazyGradient(D, a, b, gradient.start)
