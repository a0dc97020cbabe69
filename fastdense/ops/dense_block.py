"""The DenseBlock as two ``torch.library`` operators, so that autograd, compilers and exporters see one node each.

``fastdense::dense_block`` returns the block's output *and its channels' batch moments*, all three differentiable. A
consumer outside the block (a transition, the head) that normalises with them sends its gradient back as gradients of
``(X, mean, var)``; autograd sums those over consumers, and the block's backward starts from

    D = grad_X,   a = grad_mean/m,   b = 2*grad_var/m,

which is the lazy gradient of ``schedule.py``. The operators mutate nothing and return no views.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import schedule
from ..core.features import Features, LazyGradient, accumulation_dtype, as_images, as_rows, empty_features, row_stride
from ..core.primitives import Backend, Conv, Dropout, Layer, Norm
from . import common

Watcher = Callable[[Backend, LazyGradient, Features, Sequence[Layer]], Backend]
# What watches a block's gradients come about, as analysis does, puts a backend of its own between.
watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


class Settings(NamedTuple):
    """What of a block's call is no tensor; ``SETTINGS`` is the same in an operator's schema.

    Attributes:
        eps, frozen: of each convolution's norm, in the order of execution; a frozen one uses running statistics.
        drop_rates: of each layer.
        drop_channels: whether dropout takes whole channels.
        bottleneck: whether layers have two convolutions.
        tracked: whether anyone uses the batch moments of ``X``; else ``mean`` and ``var`` come back empty.
        first: the first layer whose parameters or inputs need a gradient: no bottleneck below it is saved.
        recompute: save no bottlenecks at all; backward computes them again.
        impl: backend name, ``"torch"`` or ``"triton"``.
        group: the process group that batch statistics are shared with (SyncBatchNorm), or ``""``.
    """

    eps: Sequence[float]
    frozen: Sequence[bool]
    drop_rates: Sequence[float]
    drop_channels: bool
    bottleneck: bool
    tracked: bool
    first: int
    recompute: bool
    impl: str
    group: str


SETTINGS = (
    "float[] eps, bool[] frozen, float[] drop_rates, bool drop_channels, bool bottleneck, bool tracked, SymInt first, "
    "bool recompute, str impl, str group"
)


def build_layers(
    params: Sequence[Tensor],
    frozen_stats: Sequence[Tensor],
    seed: Tensor | None,
    settings: Settings,
    needs: Sequence[bool] | None = None,
) -> list[Layer]:
    """The flat arguments of an operator as layers.

    ``params`` holds ``gamma, beta, weight`` of each convolution in the order of their execution, ``frozen_stats`` the
    running ``mean, var`` of each frozen norm.
    """
    running = iter(frozen_stats)
    needs = [True] * len(params) if needs is None else needs
    convs = []
    for i in range(len(params) // 3):
        gamma, beta, weight = params[3 * i : 3 * i + 3]
        moments = (next(running), next(running)) if settings.frozen[i] else None
        wants = (needs[3 * i], needs[3 * i + 1], needs[3 * i + 2])
        convs.append(Conv(Norm(gamma, beta, settings.eps[i], moments), weight, wants))
    layers, reads, per_layer = [], params[0].numel(), 2 if settings.bottleneck else 1
    for l, p in enumerate(settings.drop_rates):
        conv1x1, conv3x3 = (convs[2 * l], convs[2 * l + 1]) if per_layer == 2 else (None, convs[l])
        dropout = None if seed is None or p == 0 else Dropout(seed, l, p, settings.drop_channels)
        layers.append(Layer(reads, conv3x3.weight.shape[0], conv1x1, conv3x3, dropout))
        reads += conv3x3.weight.shape[0]
    return layers


def _bottlenecks(
    layers: Sequence[Layer], rows: Sequence[Tensor], first: int, x: Tensor, mean: Tensor, var: Tensor
) -> list[Features]:
    """Every ``Z_l``: saved ``rows`` from layer ``first`` on, one shared scratch for those that are not saved."""
    if layers[0].conv1x1 is None:
        return []
    m = x.numel() // x.shape[1]
    widths = [layer.conv1x1.weight.shape[0] for layer in layers if layer.conv1x1 is not None]
    scratch = x.new_empty(m * max(widths)) if len(rows) < len(layers) else x.new_empty(0)
    bottlenecks, offset = [], 0
    for l, width in enumerate(widths):
        saved = l - first if rows else -1
        z = rows[saved] if saved >= 0 else scratch[: m * width].view(m, width)
        tracked = layers[l].conv3x3.norm.frozen is None
        moments = (mean[offset : offset + width], var[offset : offset + width]) if tracked else (None, None)
        bottlenecks.append(Features(z, *moments))
        offset += width
    return bottlenecks


def _outputs(x: Tensor, params: Sequence[Tensor], settings: Settings) -> tuple[Any, ...]:
    """Uninitialised outputs of ``dense_block``."""
    weights = params[2::3]  # in the order of execution
    bottlenecks, last = (weights[::2], weights[1::2]) if settings.bottleneck else ([], weights)
    channels, total = (sum(weight.shape[0] for weight in of) for of in (last, bottlenecks))
    channels += x.shape[1]
    # Not by Size.numel(), which makes numbers of the symbols that compilers put in their place.
    acc, m = accumulation_dtype(x.dtype), x.shape[0] * math.prod(x.shape[2:])
    X = empty_features((x.shape[0], channels, *x.shape[2:]), dtype=x.dtype, device=x.device)
    mean, var = (x.new_empty(channels if settings.tracked else 0, dtype=acc) for _ in range(2))
    saved = [] if settings.recompute else bottlenecks[settings.first :]
    # Frozen norms leave theirs unwritten. With a group, the last of z_var is its number of values per channel.
    z_mean, z_var = x.new_zeros(total, dtype=acc), x.new_zeros(total + bool(settings.group), dtype=acc)
    return X, mean, var, [x.new_empty(m, weight.shape[0]) for weight in saved], z_mean, z_var


def call(
    x: Tensor,
    moments: tuple[Tensor, Tensor] | None,
    params: Sequence[Tensor],
    frozen_stats: Sequence[Tensor],
    settings: Settings,
) -> Any:
    """``dense_block`` with a fresh seed where anything drops; a call that fails leaves the generator as it was."""
    dropping = any(settings.drop_rates)
    state = common.generator_state(x.device) if dropping else None
    try:
        seed = torch.randint(2**63 - 1, (1,), device=x.device) if dropping else None
        return torch.ops.fastdense.dense_block(x, *(moments or (None, None)), params, frozen_stats, seed, *settings)
    except BaseException:
        common.restore_generator(x.device, state)
        raise


@torch.library.custom_op(
    "fastdense::dense_block",
    mutates_args=(),
    schema="(Tensor x, Tensor? x_mean, Tensor? x_var, Tensor[] params, Tensor[] frozen_stats, Tensor? seed, "
    f"{SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor[], Tensor, Tensor)",
)
def dense_block(
    x: Tensor,
    x_mean: Tensor | None,
    x_var: Tensor | None,
    params: Sequence[Tensor],
    frozen_stats: Sequence[Tensor],
    seed: Tensor | None,
    *static: Any,
) -> tuple[Any, ...]:
    """``X, mean, var`` of the block, and what its backward needs: bottleneck rows, their means and variances.

    Args:
        x: ``[N, C0, *spatial]``, any strides.
        x_mean, x_var: batch moments of ``x`` if the caller has them, ``[C0]`` in the accumulation dtype.
        params, frozen_stats, seed: see ``build_layers``.
        static: :class:`Settings`.
    """
    settings = Settings(*static)
    layers = build_layers(params, frozen_stats, seed, settings)
    X, mean, var, rows, z_mean, z_var = _outputs(x, params, settings)
    if x_mean is not None and x_var is not None and settings.tracked:
        mean[: x.shape[1]] = x_mean
        var[: x.shape[1]] = x_var
    features = Features(as_rows(X), *((mean, var) if settings.tracked else (None, None)))
    Z = _bottlenecks(layers, rows, settings.first, x, z_mean, z_var)
    with common.plain_arithmetic(x):
        be = common.backend_of(settings.impl, x, settings.group, z_var, X.shape[1] - layers[-1].writes)
        schedule.forward(be, x, layers, features, Z, given_moments=x_mean is not None)
    return X, mean, var, rows, z_mean, z_var


@dense_block.register_fake
def _(x: Tensor, x_mean: Any, x_var: Any, params: Any, frozen_stats: Any, seed: Any, *static: Any) -> Any:
    return _outputs(x, params, Settings(*static))


@torch.library.custom_op(
    "fastdense::dense_block_backward",
    mutates_args=(),
    schema="(Tensor? grad_X, Tensor? grad_mean, Tensor? grad_var, Tensor X, Tensor mean, Tensor var, Tensor[] rows, "
    f"Tensor z_mean, Tensor z_var, Tensor[] params, Tensor[] frozen_stats, Tensor? seed, {SETTINGS}, bool lazy, "
    "bool needs_x, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor[])",
)
def dense_block_backward(
    grad_X: Tensor | None,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    X: Tensor,
    mean: Tensor,
    var: Tensor,
    rows: Sequence[Tensor],
    z_mean: Tensor,
    z_var: Tensor,
    params: Sequence[Tensor],
    frozen_stats: Sequence[Tensor],
    seed: Tensor | None,
    *static: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of ``x, x_mean, x_var`` and of every parameter; empty tensors where none is needed.

    With ``lazy`` that of ``x`` leaves out what goes through its moments, which get their own; else it is whole.
    """
    settings, (lazy, needs_x, needs) = Settings(*static[:-3]), static[-3:]
    layers = build_layers(params, frozen_stats, seed, settings, needs)
    features = Features(as_rows(X), *((mean, var) if settings.tracked else (None, None)))
    entering, first = layers[0].reads, settings.first
    start = 0 if needs_x else layers[first].reads
    with common.plain_arithmetic(X):
        be = common.backend_of(settings.impl, X, settings.group, z_var)
        Z = _bottlenecks(layers, rows, first, X, z_mean, z_var)
        G = _incoming_gradient(grad_X, grad_mean, grad_var, features, X, start)
        if (watch := watcher.get()) is not None:
            be = watch(be, G, features, layers)
        gradients = schedule.backward(be, G, layers, features, Z, first=first, recompute=settings.recompute)
        grad_x, grad_x_mean, grad_x_var = X.new_empty(0), mean.new_empty(0), var.new_empty(0)
        if needs_x and lazy:
            grad_x = be.resolve(LazyGradient(G.D[:, :entering], None, None), features[:entering])
            if G.a is not None and G.b is not None:
                grad_x_mean, grad_x_var = G.a[:entering] * be.m, G.b[:entering] * (be.m / 2)
        elif needs_x:
            grad_x = be.resolve(G[:entering], features[:entering])
    flat = [gradient for layer in gradients for gradient in layer or [None] * (6 if settings.bottleneck else 3)]
    return grad_x, grad_x_mean, grad_x_var, common.gradients_like(params, flat, needs)


def _incoming_gradient(
    grad_X: Tensor | None, grad_mean: Tensor | None, grad_var: Tensor | None, X: Features, images: Tensor, start: int
) -> LazyGradient:
    """``(D, a, b)`` of the block's output, from channel ``start`` on; ``D`` is a copy: autograd owns ``grad_X``."""
    m, channels = X.rows.shape
    stride = row_stride(channels - start, X.rows.dtype)
    D = X.rows.new_empty_strided((m, channels - start), (stride, 1))
    if grad_X is None:
        D.zero_()
    else:
        as_images(D, images.shape[2:]).copy_(grad_X[:, start:])
    if X.mean is None:
        return LazyGradient(D, None, None, start)
    a, b = torch.zeros(2, channels - start, dtype=X.mean.dtype, device=D.device)
    if grad_mean is not None:
        a.add_(grad_mean[start:], alpha=1 / max(m, 1))
    if grad_var is not None:
        b.add_(grad_var[start:], alpha=2 / max(m, 1))
    return LazyGradient(D, a, b, start)


@dense_block_backward.register_fake
def _(
    grad_X: Any, grad_mean: Any, grad_var: Any, X: Tensor, mean: Tensor, var: Tensor, rows: Any, z_mean: Any,
    z_var: Any, params: Any, frozen_stats: Any, seed: Any, *static: Any,
) -> Any:  # fmt: skip
    settings, (lazy, needs_x, needs) = Settings(*static[:-3]), static[-3:]
    entering = params[0].shape[0]
    x_moments = (entering if needs_x and lazy and settings.tracked else 0,)
    grad_x = X.new_empty(0)
    if needs_x:
        grad_x = empty_features((X.shape[0], entering, *X.shape[2:]), dtype=X.dtype, device=X.device)
    return grad_x, mean.new_empty(x_moments), var.new_empty(x_moments), common.empty_like_where(params, needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, _, _, params, frozen_stats, seed, *static = inputs
    X, mean, var, rows, z_mean, z_var = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*rows, z_mean, z_var)
    ctx.save_for_backward(X, mean, var, z_mean, z_var, seed, *rows, *params, *frozen_stats)
    ctx.counts = (len(rows), len(params), len(frozen_stats))
    ctx.static = static


def _backward(ctx: Any, grad_X: Tensor | None, grad_mean: Tensor | None, grad_var: Tensor | None, *_: Any) -> Any:
    X, mean, var, z_mean, z_var, seed, *lists = ctx.saved_tensors
    saved, parameters, _ = ctx.counts
    rows, params, frozen_stats = lists[:saved], lists[saved : saved + parameters], lists[saved + parameters :]
    needs_x, needs = any(ctx.needs_input_grad[:3]), list(ctx.needs_input_grad[3])
    lazy = any(ctx.needs_input_grad[1:3])
    grad_x, grad_x_mean, grad_x_var, gradients = torch.ops.fastdense.dense_block_backward(
        grad_X, grad_mean, grad_var, X, mean, var, rows, z_mean, z_var, params, frozen_stats, seed, *ctx.static,
        lazy, needs_x, needs,
    )  # fmt: skip
    given = lazy and grad_x_mean.numel() > 0
    return (
        grad_x if needs_x else None,
        grad_x_mean if given else None,
        grad_x_var if given else None,
        [gradient if wanted else None for gradient, wanted in zip(gradients, needs, strict=True)],
        [None] * len(frozen_stats),
        *(None for _ in range(len(ctx.static) + 1)),
    )


dense_block.register_autograd(_backward, setup_context=_setup_context)
dense_block_backward.register_autograd(common.raise_not_twice)
