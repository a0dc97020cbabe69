"""The primitives as Triton kernels, on a CUDA GPU or, under ``TRITON_INTERPRET=1``, on the CPU.

This is the host side: it chooses tiles, allocates what programs leave behind for each other, and launches. All
workspaces come from PyTorch's allocator within one call, so that streams, threads and CUDA graphs see nothing shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import Features, LazyGradient, as_images, as_rows, empty_features, row_stride
from .kernels import activation, bn_relu_conv, bn_relu_conv_backward, launch, moments
from .kernels.launch import LaunchConfig, Shape
from .primitives import Conv, Dropout, Gradients, Norm

NO_DROPOUT = (0, 0, 0.0)  # layer, threshold, scale
COUNTERS = 1024


class _Weight(NamedTuple):
    """A convolution's weight ``[out, in, *kernel]`` in the feature dtype, as the kernels address it."""

    values: Tensor
    strides: tuple[int, int, int]  # of output channel, input channel, tap
    kernel: tuple[int, int, int]  # depth, height, width

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @classmethod
    def of(cls, conv: Conv) -> _Weight:
        weight = conv.weight if conv.operand is None else conv.operand
        tap = _tap_stride(weight)
        if tap is None:
            weight, tap = weight.contiguous(), 1
        return cls(weight, (weight.stride(0), weight.stride(1), tap), _three(weight.shape[2:]))

    def unit(self, itemsize: int) -> int:
        """What divides the number of input channels and every stride but theirs, for wide loads."""
        wk, wc, wt = self.strides
        return _unit(itemsize, self.values.shape[1], wk, wt if self.taps > 1 else 0) if wc == 1 else 1


class _Pending(NamedTuple):
    """Partial weight gradients ``[splits, elements]`` that the next backward kernel adds up into ``out``."""

    out: Tensor
    partial: Tensor


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


def _is_channels_last(weight: Tensor) -> bool:
    """Whether neighbouring input channels lie side by side, with all taps equally far apart."""
    return (weight.stride(1) == 1 or weight.shape[1] == 1) and _tap_stride(weight) is not None


def _unit(itemsize: int, *numbers: int) -> int:
    """The largest power of two, up to 16 bytes of elements, that divides all ``numbers``."""
    return math.gcd(16 // itemsize, *numbers)


def _dense_like(weight: Tensor) -> Tensor:
    """Uninitialised fp32 with the layout of ``weight``, without gaps."""
    out = torch.empty_like(weight, dtype=torch.float32)
    return out if _tap_stride(out) is not None else torch.empty(weight.shape, dtype=torch.float32, device=weight.device)


@lru_cache(maxsize=64)
def _architecture(device: torch.device) -> tuple[int, int]:
    """Compute capability times ten and the number of multiprocessors; 0 and a few for the interpreter."""
    if device.type != "cuda":
        return 0, 2
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def _fp32_precision() -> str:
    """How fp32 products are formed, ``"tf32"`` or ``"ieee"``: PyTorch's setting for convolutions."""
    setting = getattr(getattr(torch.backends.cudnn, "conv", None), "fp32_precision", None)
    if setting is None:  # before PyTorch 2.9; where both exist, the older one may not be read once the newer is set
        return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"
    return "tf32" if setting == "tf32" else "ieee"


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
        self._counters = torch.empty(0, dtype=torch.int32)
        self._pending: _Pending | None = None

    def launch(self, kernel: Any, programs: int, *arguments: Any, config: LaunchConfig, **constants: Any) -> None:
        """Every kernel goes through here: ``programs`` programs of ``kernel`` on this backend's device."""
        guard: AbstractContextManager[Any] = nullcontext()
        if self.device.type == "cuda":  # Triton launches on the current device
            guard = torch.cuda.device(self.device)
        with guard:
            kernel[(programs,)](
                *arguments, **constants, num_warps=config.num_warps, num_stages=config.num_stages
            )  # fmt: skip

    def _choose(self, op: str, reads: int, writes: int, taps: int = 1, **flags: bool) -> LaunchConfig:
        shape = Shape(self.m, reads, writes, taps, **flags)
        return launch.configuration(op, shape, self.dtype, self.arch, self.sm_count)

    def _empty(self, *shape: int) -> Tensor:
        """Uninitialised fp32."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def _counter(self, count: int) -> Tensor:
        """Zeros to count arrivals with: who arrives last leaves them at 0 for the next launch."""
        if self._counters.numel() < count:
            self._counters = torch.zeros(max(count, COUNTERS), dtype=torch.int32, device=self.device)
        return self._counters

    def _buffer(self, name: str, channels: int) -> Tensor:
        """Uninitialised scratch ``[m, channels]`` that the next request under the same name overwrites.

        Its rows are aligned to 16 bytes.
        """
        stride = row_stride(channels, self.dtype)
        flat = self._scratch.get(name)
        if flat is None or flat.numel() < self.m * stride:
            flat = self._scratch[name] = torch.empty(self.m * stride, dtype=self.dtype, device=self.device)
        return flat.as_strided((self.m, channels), (stride, 1))

    def prepare(self, convs: Sequence[Conv]) -> list[Conv]:
        """The convolutions with their weights in the feature dtype and in the order in which kernels read them.

        What it takes does not grow with the number of layers: one call casts all weights, and those that lie in another
        order are copied shape by shape (in a block all 3x3 weights have one).
        """
        operands: dict[int, Tensor] = {}
        casts: list[tuple[Conv, Tensor]] = []
        reordered: dict[torch.Size, list[Conv]] = {}
        for conv in convs:
            if not _is_channels_last(conv.weight):
                reordered.setdefault(conv.weight.shape, []).append(conv)
            elif conv.weight.dtype != self.dtype:
                casts.append((conv, torch.empty_like(conv.weight, dtype=self.dtype)))
        for shape, same in reordered.items():
            buffer = torch.empty((len(same), *shape), dtype=self.dtype, device=self.device)
            torch._foreach_copy_(list(buffer.unbind()), [conv.weight.detach() for conv in same])
            copies = buffer.movedim(2, -1).contiguous().movedim(-1, 2).unbind()
            operands |= {id(conv): copy for conv, copy in zip(same, copies, strict=True)}
        if casts:
            torch._foreach_copy_([cast for _, cast in casts], [conv.weight.detach() for conv, _ in casts])
            operands |= {id(conv): cast for conv, cast in casts}
        return [conv._replace(operand=operands.get(id(conv))) for conv in convs]

    def gradient_buffer(self, of: Features) -> LazyGradient:
        """``(D, a, b)`` of a bottleneck. One ``D`` serves all layers: each overwrites what the last has consumed."""
        channels = of.rows.shape[1]
        D = self._buffer("D", channels)
        if of.mean is None:
            return LazyGradient(D, None, None)
        a, b = self._empty(2, channels)
        return LazyGradient(D, a, b)

    def _moments_workspace(self, out: Features, programs: int, columns: int) -> tuple[Any, Any, Any, Any]:
        """``mean, var, partial, counter`` for kernels that end in finish_moments."""
        if out.mean is None:
            return None, None, None, None
        groups = -(-programs // moments.GROUP.value)
        partial = self._empty(programs + groups, 3, out.rows.shape[1])
        return out.mean, out.var, partial, self._counter(columns * (1 + groups))

    def _no_pixels(self, out: Features) -> bool:
        """Whether the batch is empty: then nothing is launched, and the moments are zeros."""
        if self.m:
            return False
        if out.mean is not None and out.var is not None:
            out.mean.zero_()
            out.var.zero_()
        return True

    def copy_with_moments(self, x: Tensor, out: Features) -> None:
        """``out.rows = x``, with moments if ``out`` is tracked."""
        if self._no_pixels(out):
            return
        if x.stride(1) != 1:  # PyTorch transposes fast
            images = as_images(out.rows, self.spatial)
            x = images.copy_(x)
            if out.mean is None:
                return
        channels, itemsize = x.shape[1], self.dtype.itemsize
        config = self._choose("copy", channels, channels)
        columns = -(-channels // config.block_c)
        programs, each = launch.share(-(-self.m // config.block_m), columns, self.sm_count)
        strides = (x.stride(0), 1, *(0,) * (3 - len(self.spatial)), *x.stride()[2:])
        self.launch(
            moments.copy_with_moments_kernel, programs * columns,
            out.rows, *self._moments_workspace(out, programs, columns), x,
            self.m, channels, *self.depth_height_width, each,
            out.rows.stride(0), *strides,
            HAS_MOMENTS=out.mean is not None,
            UNIT=_unit(itemsize, channels, out.rows.stride(0), strides[0], *strides[2:]),
            BLOCK_M=config.block_m, BLOCK_C=config.block_c, config=config,
        )  # fmt: skip

    def bn_relu_conv(self, source: Features, conv: Conv, out: Features, dropout: Dropout | None = None) -> None:
        """``out.rows = dropout(conv(relu(bn(source))))`` with the moments of the stored values."""
        if self._no_pixels(out):
            return
        weight = _Weight.of(conv)
        writes, reads = conv.weight.shape[:2]
        config = self._choose("bn_relu_conv", reads, writes, weight.taps, dropout=dropout is not None)
        if config.form == "scratch" and weight.taps > 1 and dropout is None:
            self._through_scratch(source, conv, out)
            return
        shifts = weight.kernel[2] if config.form == "rows" else 1
        columns = -(-writes // config.block_k)
        programs, each = launch.share(-(-self.m // (config.block_m - shifts + 1)), columns, self.sm_count)
        x = source.rows
        self.launch(
            bn_relu_conv.bn_relu_conv_kernel, programs * columns,
            out.rows, *self._moments_workspace(out, programs, columns),
            x, *_reader(conv.norm, source), weight.values, dropout.seed if dropout else None,
            self.m, reads, writes, *self.depth_height_width, each,
            out.rows.stride(0), x.stride(0), *weight.strides,
            conv.norm.eps, *_dropout_arguments(dropout),
            *weight.kernel, shifts,
            HAS_MOMENTS=out.mean is not None, HAS_DROPOUT=dropout is not None,
            PER_CHANNEL=dropout is not None and dropout.per_channel, INPUT_PRECISION=self.precision,
            X_UNIT=_readable(x), W_UNIT=weight.unit(self.dtype.itemsize),
            OUT_UNIT=_unit(self.dtype.itemsize, writes, out.rows.stride(0)),
            BLOCK_M=config.block_m, BLOCK_N=config.block_k, BLOCK_C=config.block_c, config=config,
        )  # fmt: skip

    def _through_scratch(self, source: Features, conv: Conv, out: Features) -> None:
        """``relu(bn(source))`` written once, and PyTorch's convolution: what the fused kernel is measured against."""
        channels = source.rows.shape[1]
        scratch = self._buffer("activation", channels)
        config = self._choose("activation", channels, channels)
        self.launch(
            activation.activation_kernel, -(-self.m // config.block_m) * -(-channels // config.block_c),
            scratch, source.rows, *_reader(conv.norm, source),
            self.m, channels, scratch.stride(0), source.rows.stride(0), conv.norm.eps,
            UNIT=_unit(self.dtype.itemsize, channels, scratch.stride(0), source.rows.stride(0)),
            BLOCK_M=config.block_m, BLOCK_C=config.block_c, config=config,
        )  # fmt: skip
        images = scratch.unflatten(0, (self.images, *self.spatial)).movedim(-1, 1)
        convolve: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[len(self.spatial) - 1]
        padding = [size // 2 for size in conv.weight.shape[2:]]
        self.copy_with_moments(convolve(images, _Weight.of(conv).values, padding=padding), out)

    def _resolve(
        self, grad: LazyGradient, of: Features, out: Tensor, width: int, dropout: Dropout | None = None
    ) -> Tensor:
        """``out = (D + a + b*(v - mu)) * dropout's mask``, and zeros up to column ``width``."""
        channels = of.rows.shape[1]
        config = self._choose("resolve", channels, channels)
        tiles = -(-self.m // config.block_m) * -(-width // config.block_c)
        if tiles:
            self.launch(
                bn_relu_conv_backward.resolve_kernel, tiles,
                out, grad.D, of.rows, grad.a, grad.b, of.mean, dropout.seed if dropout else None,
                self.m, channels, width, self.pixels,
                out.stride(0), grad.D.stride(0), of.rows.stride(0),
                *_dropout_arguments(dropout),
                LAZY=grad.a is not None and of.mean is not None, HAS_DROPOUT=dropout is not None,
                PER_CHANNEL=dropout is not None and dropout.per_channel,
                BLOCK_M=config.block_m, BLOCK_C=config.block_c, config=config,
            )  # fmt: skip
        return out

    def resolve(self, grad: LazyGradient, of: Features) -> Tensor:
        """``D + a + b*(v - mu)`` as images ``[N, C, *spatial]`` in the feature dtype."""
        shape = (self.images, of.rows.shape[1], *self.spatial)
        out = empty_features(shape, dtype=self.dtype, device=self.device)
        self._resolve(grad, of, as_rows(out), shape[1])
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
    ) -> Gradients:
        """With ``dy = conv^T(grad) * (relu's mask)``: ``into.D (+)= gamma*r*dy``, and what ``Backend`` documents."""
        reads, writes = source.rows.shape[1], conv.weight.shape[0]
        needs_dy = into is not None or any(conv.needs[:2])
        if not (conv.needs[2] or needs_dy):
            return [None, None, None]
        if not self.m:
            dgamma, dbeta = (torch.zeros(reads, dtype=torch.float32, device=self.device) for _ in range(2))
            return [dgamma, dbeta, torch.zeros_like(conv.weight, dtype=torch.float32)]
        lazy = grad.a is not None and output.mean is not None
        many_taps = conv.weight.shape[2:].numel() > 1 and self.m * writes >= launch.MATERIALISE_ELEMENTS
        padded = dropout is not None or (lazy and many_taps)
        if padded:
            g = self._buffer("gradient", writes)
            self._resolve(grad, output, g, g.stride(0), dropout)
            grad = LazyGradient(g, None, None)
        return _Backward(self, grad, output, conv, source, into, accumulate, needs_dy, padded).run()

    def finish(self) -> None:
        """Add up the last weight's gradient."""
        if self._pending is not None:
            out, partial = self._pending
            config = self._choose("add_up", 1, 1)
            self.launch(
                bn_relu_conv_backward.add_up_kernel, -(-out.numel() // config.block_c),
                out, partial, out.numel(), partial.shape[0], BLOCK_E=config.block_c, config=config,
            )  # fmt: skip
            self._pending = None


def _reader(norm: Norm, source: Features) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``mean, var, gamma, beta`` as one BatchNorm uses them."""
    mean, var = norm.frozen or (source.mean, source.var)
    assert mean is not None and var is not None
    return mean, var, norm.gamma, norm.beta


def _readable(rows: Tensor) -> int:
    """In units of how many channels rows may be read beyond their last one: there is memory, of whatever content."""
    (m, channels), stride, itemsize = rows.shape, rows.stride(0), rows.element_size()
    first = int(rows.storage_offset())
    unit = _unit(itemsize, stride, first % stride)
    end = first + (m - 1) * stride + -(-channels // unit) * unit
    return unit if end * itemsize <= rows.untyped_storage().nbytes() else _unit(itemsize, stride, channels)


class _Backward(NamedTuple):
    """One convolution's backward."""

    be: TritonBackend
    grad: LazyGradient
    output: Features
    conv: Conv
    source: Features
    into: LazyGradient | None
    accumulate: bool
    needs_dy: bool
    padded: bool  # rows of the gradient are filled up with zeros to their stride

    @property
    def start(self) -> int:
        return 0 if self.into is None else self.into.start

    @property
    def lazy(self) -> bool:
        """Whether the output gradient is formed while it is loaded."""
        return self.grad.a is not None and self.output.mean is not None

    def run(self) -> Gradients:
        """Launch the kernel; its weight gradient is whole after the next launch, or after ``finish``."""
        be, conv, x, (needs_gamma, needs_beta, needs_weight) = self.be, self.conv, self.source.rows, self.conv.needs
        weight = _Weight.of(conv)
        reads, writes = x.shape[1], conv.weight.shape[0]
        config = be._choose("bn_relu_conv_backward", reads, writes, weight.taps, lazy=self.lazy)
        blocks = -(-writes // config.block_k)
        together = weight.taps == 1 and config.group >= blocks
        groups = -(-weight.taps * blocks // config.group)
        # The first column tile whose dy anybody wants.
        first = 0 if needs_gamma or needs_beta or (needs_weight and together) else self.start // config.block_c
        columns = -(-reads // config.block_c) - first
        at_least = launch.MIN_TILES_PER_SPLIT if together and needs_weight else 1
        splits, each = launch.share(-(-be.m // config.block_m), columns, be.sm_count, at_least)
        data_programs = splits * columns if self.needs_dy or together else 0
        weight_splits, weight_each, weight_programs = splits, each, 0
        if needs_weight and not together:
            weight_columns = -(-reads // config.weight_block_c)
            tiles = -(-be.m // config.weight_block_m)
            weight_splits, weight_each = launch.share(
                tiles, weight_columns * groups, be.sm_count, launch.MIN_TILES_PER_SPLIT
            )
            weight_programs = weight_splits * weight_columns * groups
        dw = _dense_like(conv.weight) if needs_weight else None
        partial = dw
        if dw is not None and weight_splits > 1:
            partial = be._empty(weight_splits, dw.numel())
        dgamma, dbeta = (be._empty(reads), be._empty(reads)) if self.needs_dy else (None, None)
        pending, be._pending = be._pending, None
        be.launch(
            bn_relu_conv_backward.bn_relu_conv_backward_kernel, data_programs + weight_programs,
            *self._pointers(weight, partial, dgamma, dbeta, splits, columns, pending),
            be.m, reads, writes, *be.depth_height_width, self.start, first, each, weight_each, data_programs,
            0 if dw is None else dw.numel(), *((pending.out.numel(), pending.partial.shape[0]) if pending else (0, 0)),
            *self._strides(weight, dw),
            conv.norm.eps,
            *weight.kernel, blocks, config.group,
            **self._flags(weight, together), HAS_PENDING=pending is not None,
            BLOCK_M=config.block_m, BLOCK_C=config.block_c, BLOCK_K=config.block_k,
            WEIGHT_BLOCK_M=config.weight_block_m, WEIGHT_BLOCK_C=config.weight_block_c,
            BLOCK_E=be._choose("add_up", 1, 1).block_c, config=config,
        )  # fmt: skip
        if dw is not None and partial is not None and partial is not dw:
            be._pending = _Pending(dw, partial)
        return [dgamma, dbeta, dw]

    def _pointers(
        self,
        weight: _Weight,
        dw: Tensor | None,
        dgamma: Tensor | None,
        dbeta: Tensor | None,
        splits: int,
        columns: int,
        pending: _Pending | None,
    ) -> tuple[Tensor | None, ...]:
        be, grad, into = self.be, self.grad, self.into
        sums = be._empty(splits, 2, self.source.rows.shape[1]) if self.needs_dy else None
        D, da, db = (None, None, None) if into is None else (into.D, into.a, into.b)
        return (
            D, dw, dgamma, dbeta, da, db, pending.out if pending else None, sums, be._counter(columns),
            pending.partial if pending else None,
            grad.D, self.output.rows, grad.a, grad.b, self.output.mean,
            self.source.rows, *_reader(self.conv.norm, self.source), weight.values,
        )  # fmt: skip

    def _strides(self, weight: _Weight, dw: Tensor | None) -> tuple[int, ...]:
        d_strides = (0, 0, 0) if dw is None else (dw.stride(0), dw.stride(1), _tap_stride(dw) or 0)
        return (
            0 if self.into is None else self.into.D.stride(0), self.grad.D.stride(0), self.output.rows.stride(0),
            self.source.rows.stride(0), *weight.strides, *d_strides,
        )  # fmt: skip

    def _flags(self, weight: _Weight, together: bool) -> dict[str, Any]:
        be, grad, into, itemsize = self.be, self.grad, self.into, self.be.dtype.itemsize
        lazy = self.lazy
        reads, writes = self.source.rows.shape[1], weight.values.shape[0]
        D, v = grad.D, self.output.rows
        g_unit = _unit(itemsize, D.stride(0), v.stride(0) if lazy else 0, 0 if self.padded else writes)
        return {
            "LAZY": lazy, "HAS_INTO": into is not None, "ACCUMULATE": self.accumulate,
            "HAS_BATCH": into is not None and into.a is not None and self.conv.norm.frozen is None,
            "NEEDS_DY": self.needs_dy, "NEEDS_WEIGHT": self.conv.needs[2], "TOGETHER": together,
            "INPUT_PRECISION": be.precision,
            "X_UNIT": _readable(self.source.rows),
            "D_UNIT": 1 if into is None else _unit(itemsize, into.D.stride(0), reads, self.start),
            "G_UNIT": g_unit, "W_UNIT": weight.unit(itemsize),
        }  # fmt: skip
