"""The primitives as Triton kernels, on a CUDA GPU or, under ``TRITON_INTERPRET=1``, on the CPU.

This is the host side: it chooses tiles, allocates what programs leave behind for each other, and launches. All
workspaces come from PyTorch's allocator within one call, so that streams, threads and CUDA graphs see nothing shared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .features import Features, LazyGradient, as_rows, empty_features
from .kernels import bn_relu_conv, bn_relu_conv_backward, launch, moments
from .kernels.launch import LaunchConfig, Shape
from .primitives import Conv, Dropout, Norm, Sums

NO_DROPOUT = (0, 0, 0.0)  # layer, threshold, scale


class _Partial(NamedTuple):
    """Mean (as two numbers) and M2 ``[tiles, 3, C]`` of each tile of ``rows`` rows."""

    moments: Tensor
    rows: int


class _Weight(NamedTuple):
    """A convolution's weight ``[out, in, *kernel]`` in the feature dtype, as the kernels address it."""

    values: Tensor
    strides: tuple[int, int, int]  # of output channel, input channel, tap
    kernel: tuple[int, int, int]  # depth, height, width

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @classmethod
    def of(cls, weight: Tensor, dtype: torch.dtype) -> _Weight:
        values = weight.detach().to(dtype)
        tap = _tap_stride(values)
        if tap is None:
            values = values.contiguous()
            tap = 1
        return cls(values, (values.stride(0), values.stride(1), tap), _three(weight.shape[2:]))


def _three(sizes: Sequence[int]) -> tuple[int, int, int]:
    """One to three sizes as depth, height, width."""
    depth, height, width = (1,) * (3 - len(sizes)) + tuple(sizes)
    return depth, height, width


def _tap_stride(weight: Tensor) -> int | None:
    """The distance between neighbouring taps, if all of them lie equally far apart."""
    tap, taps = 0, 1
    for size, stride in zip(reversed(weight.shape[2:]), reversed(weight.stride()[2:]), strict=True):
        if size == 1:
            continue
        if taps == 1:
            tap = stride
        elif stride != tap * taps:
            return None
        taps *= size
    return tap


@lru_cache(maxsize=64)
def _architecture(device: torch.device) -> tuple[int, int]:
    """Compute capability times ten and the number of multiprocessors; 0 and a few for the interpreter."""
    if device.type != "cuda":
        return 0, 2
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def _fp32_precision() -> str:
    """How fp32 products are formed: PyTorch's setting for convolutions."""
    return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"


def _dropout_arguments(dropout: Dropout | None) -> tuple[int, int, float]:
    if dropout is None:
        return NO_DROPOUT
    return dropout.layer, round(dropout.p * 2**32), 1 / (1 - dropout.p) if dropout.p < 1 else 0.0


class TritonBackend:
    """The backend for one call of one block.

    Args:
        x: features of the block's shape ``[N, *, *spatial]``, float16, bfloat16 or float32; gives batch, space, dtype
            and device.
    """

    def __init__(self, x: Tensor) -> None:
        self.spatial = tuple(x.shape[2:])
        self.depth_height_width = _three(self.spatial)
        self.pixels = math.prod(self.spatial)
        self.images = x.shape[0]
        self.m = self.images * self.pixels
        if self.m >= 2**31:
            raise ValueError(f"batch times space must stay below 2**31 pixels, got {self.m}: split the batch")
        self.dtype, self.device = x.dtype, x.device
        self.arch, self.sm_count = _architecture(x.device)
        self.precision = _fp32_precision() if x.dtype == torch.float32 else "ieee"
        self._scratch: dict[str, Tensor] = {}

    def _guard(self) -> AbstractContextManager[Any]:
        """Triton launches on the current device."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _choose(self, op: str, reads: int, writes: int, taps: int = 1) -> LaunchConfig:
        return launch.configuration(op, Shape(self.m, reads, writes, taps), self.dtype, self.arch, self.sm_count)

    def _empty(self, *shape: int) -> Tensor:
        """Uninitialised fp32."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def _buffer(self, name: str, channels: int) -> Tensor:
        """Uninitialised scratch ``[m, channels]`` that the next request under the same name overwrites."""
        flat = self._scratch.get(name)
        if flat is None or flat.numel() < self.m * channels:
            flat = self._scratch[name] = torch.empty(self.m * channels, dtype=self.dtype, device=self.device)
        return flat[: self.m * channels].view(self.m, channels)

    def gradient_buffer(self, of: Features) -> LazyGradient:
        """``(D, a, b)`` for a bottleneck. One ``D`` serves all layers: each overwrites what the last has consumed."""
        channels = of.rows.shape[1]
        D = self._buffer("D", channels)
        if of.mean is None:
            return LazyGradient(D, None, None)
        a, b = torch.zeros(2, channels, dtype=torch.float32, device=self.device)
        return LazyGradient(D, a, b)

    def copy_with_moments(self, x: Tensor, out: Features) -> _Partial | None:
        """``out.rows = x``, with partial moments if ``out`` is tracked."""
        channels, tracked = x.shape[1], out.mean is not None
        config = self._choose("copy", channels, channels)
        tiles, column_tiles = -(-self.m // config.block_m), -(-channels // config.block_c)
        partial = self._empty(tiles if tracked else 0, 3, channels)
        if self.m:
            spatial_strides = (0,) * (3 - len(self.spatial)) + x.stride()[2:]
            with self._guard():
                moments.copy_with_moments_kernel[(tiles * column_tiles,)](
                    out.rows, partial, x,
                    self.m, channels, *self.depth_height_width,
                    out.rows.stride(0), x.stride(0), x.stride(1), *spatial_strides,
                    HAS_MOMENTS=tracked,
                    BLOCK_M=config.block_m, BLOCK_C=config.block_c,
                    num_warps=config.num_warps, num_stages=config.num_stages,
                )  # fmt: skip
        return _Partial(partial, config.block_m) if tracked else None

    def merge_moments(self, partial: _Partial, out: Features) -> None:
        """Partial moments into ``out.mean, out.var``; zeros for an empty batch."""
        assert out.mean is not None and out.var is not None
        if not self.m:
            out.mean.zero_()
            out.var.zero_()
            return
        channels = out.rows.shape[1]
        config = self._choose("merge", channels, channels)
        with self._guard():
            moments.merge_moments_kernel[(-(-channels // config.block_c),)](
                out.mean, out.var, partial.moments,
                self.m, channels, partial.moments.shape[0], partial.rows,
                BLOCK_T=config.block_m, BLOCK_C=config.block_c,
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip

    def bn_relu_conv(
        self, source: Features, conv: Conv, out: Features, dropout: Dropout | None = None
    ) -> _Partial | None:
        """``out.rows = dropout(conv(relu(bn(source))))`` with partial moments of the stored values."""
        weight = _Weight.of(conv.weight, self.dtype)
        writes, reads = conv.weight.shape[:2]
        tracked = out.mean is not None
        op = "bn_relu_conv" if dropout is None else "bn_relu_conv_dropout"
        config = self._choose(op, reads, writes, weight.taps)
        tiles = -(-self.m // config.block_m)
        partial = self._empty(tiles if tracked else 0, 3, writes)
        if self.m:
            with self._guard():
                bn_relu_conv.bn_relu_conv_kernel[(tiles * -(-writes // config.block_k),)](
                    out.rows, partial, source.rows, *_reader(conv.norm, source), weight.values,
                    dropout.seed if dropout else None,
                    self.m, reads, writes, *self.depth_height_width,
                    out.rows.stride(0), source.rows.stride(0), *weight.strides,
                    conv.norm.eps, *_dropout_arguments(dropout),
                    *weight.kernel,
                    HAS_MOMENTS=tracked, HAS_DROPOUT=dropout is not None,
                    PER_CHANNEL=dropout is not None and dropout.per_channel, INPUT_PRECISION=self.precision,
                    BLOCK_M=config.block_m, BLOCK_N=config.block_k, BLOCK_C=config.block_c,
                    num_warps=config.num_warps, num_stages=config.num_stages,
                )  # fmt: skip
        return _Partial(partial, config.block_m) if tracked else None

    def _resolve(self, grad: LazyGradient, of: Features, out: Tensor, dropout: Dropout | None = None) -> Tensor:
        """``out = (D + a + b*(v - mu)) * dropout's mask``; ``out`` may be ``D``."""
        channels = of.rows.shape[1]
        config = self._choose("resolve", channels, channels)
        lazy = grad.a is not None and of.mean is not None
        tiles = -(-self.m // config.block_m) * -(-channels // config.block_c)
        if tiles:
            with self._guard():
                bn_relu_conv_backward.resolve_kernel[(tiles,)](
                    out, grad.D, of.rows, grad.a, grad.b, of.mean, dropout.seed if dropout else None,
                    self.m, channels, self.pixels,
                    out.stride(0), grad.D.stride(0), of.rows.stride(0),
                    *_dropout_arguments(dropout),
                    LAZY=lazy, HAS_DROPOUT=dropout is not None,
                    PER_CHANNEL=dropout is not None and dropout.per_channel,
                    BLOCK_M=config.block_m, BLOCK_C=config.block_c,
                    num_warps=config.num_warps, num_stages=config.num_stages,
                )  # fmt: skip
        return out

    def resolve(self, grad: LazyGradient, of: Features) -> Tensor:
        """``D + a + b*(v - mu)`` as images ``[N, C, *spatial]`` in the feature dtype."""
        shape = (self.images, of.rows.shape[1], *self.spatial)
        out = empty_features(shape, dtype=self.dtype, device=self.device)
        self._resolve(grad, of, as_rows(out))
        return out

    def bn_relu_conv_backward(
        self,
        grad: LazyGradient,
        output: Features,
        conv: Conv,
        source: Features,
        into: LazyGradient | None,
        dropout: Dropout | None = None,
        *,
        accumulate: bool,
    ) -> tuple[Tensor | None, Sums | None]:
        """With ``dy = conv^T(grad) * (relu's mask)``: ``into.D (+)= gamma*r*dy``, and what ``Backend`` documents."""
        task = _Backward(self, grad, output, conv, source, into, accumulate)
        needs_weight = conv.needs[2]
        reads = source.rows.shape[1]
        if not self.m:
            dw = torch.zeros_like(conv.weight, dtype=torch.float32) if needs_weight else None
            zeros = torch.zeros(2, reads, dtype=torch.float32, device=self.device)
            return dw, (zeros[0], zeros[1]) if task.needs_dy else None
        if not (needs_weight or task.needs_dy):
            return None, None

        pointwise = task.weight.taps == 1 and task.writes <= launch.MAX_POINTWISE_OUTPUT
        config = self._choose("pointwise_backward", reads, task.writes)
        column_tiles = -(-reads // config.block_c)
        if dropout is not None or not pointwise or column_tiles > launch.MAX_LAZY_COLUMN_TILES:
            # Several programs would form the same values: form them once, in place where the buffer is our own.
            own = self._scratch.get("D")
            mine = own is not None and own.data_ptr() == grad.D.data_ptr()
            g = self._resolve(grad, output, grad.D if mine else self._buffer("gradient", task.writes), dropout)
            task = task._replace(grad=LazyGradient(g, None, None))
        with self._guard():
            if pointwise:
                dw_partial, sums_partial = task.pointwise(config)
            else:
                sums_partial = task.data_gradient() if task.needs_dy else None
                dw_partial = task.weight_gradient() if needs_weight else None
            return task.reduce(dw_partial, sums_partial)

    def merge_gradients(
        self, sums: Sums, norm: Norm, source: Features, into: LazyGradient | None
    ) -> tuple[Tensor, Tensor]:
        """``dgamma = r*sum(dy*(v-mu))``, ``dbeta = sum(dy)``; ``a -= gamma*r*dbeta/m``, ``b -= gamma*r^2*dgamma/m``."""
        dbeta, centred = sums
        channels = source.rows.shape[1]
        dgamma = torch.empty_like(dbeta)
        a, b = (None, None) if into is None else (into.a, into.b)
        mean, var, gamma, _ = _reader(norm, source)
        config = self._choose("merge", channels, channels)
        with self._guard():
            moments.merge_gradients_kernel[(-(-channels // config.block_c),)](
                dgamma, a, b, dbeta, centred, mean, var, gamma,
                channels, 0 if into is None else into.start, -1 / max(self.m, 1), norm.eps,
                HAS_BATCH=a is not None and norm.frozen is None,
                BLOCK_C=config.block_c, num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
        return dgamma, dbeta


def _reader(norm: Norm, source: Features) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``mean, var, gamma, beta`` as one BatchNorm uses them."""
    mean, var = norm.frozen or (source.mean, source.var)
    assert mean is not None and var is not None
    return mean, var, norm.gamma, norm.beta


class _Backward(NamedTuple):
    """One convolution's backward: what its kernels have in common."""

    be: TritonBackend
    grad: LazyGradient
    output: Features
    conv: Conv
    source: Features
    into: LazyGradient | None
    accumulate: bool

    @property
    def weight(self) -> _Weight:
        return _Weight.of(self.conv.weight, self.be.dtype)

    @property
    def writes(self) -> int:
        return self.conv.weight.shape[0]

    @property
    def needs_dy(self) -> bool:
        return self.into is not None or any(self.conv.needs[:2])

    @property
    def start(self) -> int:
        return 0 if self.into is None else self.into.start

    @property
    def first(self) -> int:
        """The first channel whose ``dy`` anybody wants."""
        return 0 if any(self.conv.needs[:2]) else self.start

    def _split(self, config: LaunchConfig, programs: int) -> tuple[int, int]:
        return launch.splits(self.be.m, config.block_m, programs, self.be.sm_count)

    def pointwise(self, config: LaunchConfig) -> tuple[Tensor | None, Tensor | None]:
        """Partial weight gradients ``[splits, K, C]`` and sums ``[splits, 2, C]``, in one pass."""
        be, x, weight, grad = self.be, self.source.rows, self.weight, self.grad
        reads, needs_weight = x.shape[1], self.conv.needs[2]
        first = 0 if needs_weight else self.first
        column_tiles = -(-(reads - first) // config.block_c)
        splits, each = self._split(config, column_tiles)
        dw = be._empty(splits, self.writes, reads) if needs_weight else None
        sums = be._empty(splits, 2, reads) if self.needs_dy else None
        D = None if self.into is None else self.into.D
        bn_relu_conv_backward.pointwise_backward_kernel[(splits * column_tiles,)](
            D, dw, sums, grad.D, self.output.rows, grad.a, grad.b, self.output.mean,
            x, *_reader(self.conv.norm, self.source), weight.values,
            be.m, reads, self.writes, first, self.start, each,
            0 if D is None else D.stride(0), grad.D.stride(0), self.output.rows.stride(0), x.stride(0),
            *weight.strides[:2],
            self.conv.norm.eps,
            LAZY=grad.a is not None and self.output.mean is not None, HAS_INTO=D is not None,
            ACCUMULATE=self.accumulate, NEEDS_DY=self.needs_dy, NEEDS_WEIGHT=needs_weight,
            INPUT_PRECISION=be.precision,
            BLOCK_M=config.block_m, BLOCK_C=config.block_c, BLOCK_K=config.block_k,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        return dw, sums

    def data_gradient(self) -> Tensor:
        """Adds to ``into.D``, or writes it; partial sums ``[splits, 2, C]``."""
        be, x, g, weight = self.be, self.source.rows, self.grad.D, self.weight
        reads = x.shape[1]
        config = be._choose("data_gradient", reads, self.writes, weight.taps)
        column_tiles = -(-(reads - self.first) // config.block_c)
        splits, each = self._split(config, column_tiles)
        sums = be._empty(splits, 2, reads)
        D = None if self.into is None else self.into.D
        bn_relu_conv_backward.data_gradient_kernel[(splits * column_tiles,)](
            D, sums, g, x, *_reader(self.conv.norm, self.source), weight.values,
            be.m, reads, self.writes, *be.depth_height_width, self.first, self.start, each,
            0 if D is None else D.stride(0), g.stride(0), x.stride(0), *weight.strides,
            self.conv.norm.eps,
            *weight.kernel,
            HAS_INTO=D is not None, ACCUMULATE=self.accumulate, INPUT_PRECISION=be.precision,
            BLOCK_M=config.block_m, BLOCK_C=config.block_c, BLOCK_K=config.block_k,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        return sums

    def weight_gradient(self) -> Tensor:
        """Partial weight gradients ``[splits, K, taps, C]``."""
        be, x, g, weight = self.be, self.source.rows, self.grad.D, self.weight
        reads = x.shape[1]
        config = be._choose("weight_gradient", reads, self.writes, weight.taps)
        programs = -(-reads // config.block_c) * -(-self.writes // config.block_k) * weight.taps
        splits, each = self._split(config, programs)
        dw = be._empty(splits, self.writes, weight.taps, reads)
        bn_relu_conv_backward.weight_gradient_kernel[(splits * programs,)](
            dw, g, x, *_reader(self.conv.norm, self.source),
            be.m, reads, self.writes, *be.depth_height_width, each,
            g.stride(0), x.stride(0),
            self.conv.norm.eps,
            *weight.kernel, INPUT_PRECISION=be.precision,
            BLOCK_M=config.block_m, BLOCK_C=config.block_c, BLOCK_K=config.block_k,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        return dw

    def reduce(self, dw_partial: Tensor | None, sums_partial: Tensor | None) -> tuple[Tensor | None, Sums | None]:
        """Both kinds of partial results added up, in one launch."""
        be, weight, reads = self.be, self.conv.weight, self.source.rows.shape[1]
        dw, strides, weights, weight_splits = None, (0, 0, 0), 0, 0
        if dw_partial is not None:
            dw = torch.empty_like(weight, dtype=torch.float32)
            if (tap := _tap_stride(dw)) is None:
                dw, tap = torch.empty(weight.shape, dtype=torch.float32, device=be.device), 1
            strides = (dw.stride(0), dw.stride(1), tap)
            weights, weight_splits = dw.numel(), dw_partial.shape[0]
        sums = None
        if sums_partial is not None:
            allocate = torch.zeros if self.first else torch.empty  # below ``first`` nobody writes
            sums = allocate(2, reads, dtype=torch.float32, device=be.device)
        config = be._choose("reduce", reads, self.writes)
        blocks = -(-weights // config.block_c) + (0 if sums is None else -(-2 * reads // config.block_c))
        bn_relu_conv_backward.reduce_partials_kernel[(blocks,)](
            dw, sums, dw_partial, sums_partial,
            reads, self.weight.taps, self.first, weights, 0 if sums is None else 2 * reads,
            weight_splits, 0 if sums_partial is None else sums_partial.shape[0],
            *strides,
            BLOCK_S=config.block_m, BLOCK_E=config.block_c,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        return dw, None if sums is None else (sums[0], sums[1])
