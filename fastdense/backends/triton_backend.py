"""The primitives as Triton kernels, on a CUDA GPU or, under ``TRITON_INTERPRET=1``, on the CPU.

This is the host side: the arguments of each launch. What each primitive computes, ``Backend`` says; how one is
launched is ``triton_launcher.py``'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.features import Features, LazyGradient, as_images, as_rows, empty_features
from ..core.primitives import Conv, Dropout, Gradients, Norm, Pool
from ..kernels import bn_relu_conv, bn_relu_conv_backward, launch, reductions
from ..kernels.launch import Work
from .triton_backward import ConvBackward
from .triton_launcher import Launcher
from .triton_operands import Weight, dropout_arguments, is_channels_last, norm_vectors, readable, unit_of, weight_unit
from .triton_pool import pool_backward, pool_forward


class TritonBackend(Launcher):
    """The backend for one call of one block."""

    def prepare(self, convs: Sequence[Conv]) -> list[Conv]:
        """The convolutions with their weights in the feature dtype and in the order in which kernels read them.

        What it takes does not grow with the number of layers: one call casts all weights, and those that lie in another
        order are copied shape by shape (in a block all 3x3 weights have one).
        """
        operands: dict[int, Tensor] = {}
        casts: list[tuple[Conv, Tensor]] = []
        reordered: dict[torch.Size, list[Conv]] = {}
        for conv in convs:
            if not is_channels_last(conv.weight):
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
        D = self.buffer("D", channels)
        if of.mean is None:
            return LazyGradient(D, None, None)
        a, b = self.empty(2, channels)
        return LazyGradient(D, a, b, balanced=True)

    def no_pixels(self, out: Features) -> bool:
        """Whether there is nothing to launch; the moments are zeros then."""
        if out.rows.shape[0]:
            return False
        if out.mean is not None and out.var is not None:
            out.mean.zero_()
            out.var.zero_()
        return True

    def moments(self, of: Features) -> None:
        if not self.no_pixels(of):
            rows = of.rows
            self._copy(None, rows, of, (1, 1, 1), (rows.stride(0), 1, 0, 0, 0))

    def copy_with_moments(self, x: Tensor, out: Features) -> None:
        if self.no_pixels(out):
            return
        if x.stride(1) != 1:  # PyTorch transposes fast
            as_images(out.rows, self.spatial).copy_(x)
            if out.mean is not None:
                self.moments(out)
            return
        strides = (x.stride(0), 1, *(0,) * (3 - len(self.spatial)), *x.stride()[2:])
        self._copy(out.rows, x, out, self.depth_height_width, strides)

    def _copy(
        self, target: Tensor | None, x: Tensor, out: Features, sizes: tuple[int, int, int], strides: tuple[int, ...]
    ) -> None:
        """``x``, images of ``sizes``, to ``target``, and the moments of ``out``."""
        m, channels = out.rows.shape
        config = self.choose("copy", channels, channels)
        columns = -(-channels // config.block_c)
        programs, each = self.share(config, Work(-(-m // config.block_m), columns))
        stride = 0 if target is None else target.stride(0)
        self.launch(
            reductions.copy_with_moments_kernel, programs * columns,
            target, *self.moments_workspace(out, programs, columns), x,
            m, channels, *sizes, each,
            stride, *strides,
            HAS_MOMENTS=out.mean is not None,
            UNIT=unit_of(self.dtype.itemsize, channels, stride, strides[0], *strides[2:]),
            BLOCK_M=config.block_m, BLOCK_C=config.block_c, config=config,
        )  # fmt: skip

    def bn_relu_conv(self, source: Features, conv: Conv, out: Features, dropout: Dropout | None = None) -> None:
        if self.no_pixels(out):
            return
        weight = Weight.of(conv)
        writes, reads = conv.weight.shape[:2]
        sizes, window = self.output_sizes(conv.pool)
        config = self.choose(
            "bn_relu_conv", reads, writes, weight.taps, dropout=dropout is not None, window=math.prod(window)
        )
        if config.form == "scratch" and weight.taps > 1 and dropout is None:
            self._through_scratch(source, conv, out)
            return
        shifts = weight.kernel[2] if config.form == "rows" else 1
        columns, m = -(-writes // config.block_k), out.rows.shape[0]
        programs, each = self.share(config, Work(-(-m // (config.block_m - shifts + 1)), columns))
        x = source.rows
        self.launch(
            bn_relu_conv.bn_relu_conv_kernel, programs * columns,
            out.rows, *self.moments_workspace(out, programs, columns),
            x, *norm_vectors(conv.norm, source), weight.values, dropout.seed if dropout else None,
            m, reads, writes, *sizes, *self.depth_height_width, each,
            out.rows.stride(0), x.stride(0), *weight.strides,
            conv.norm.eps, *dropout_arguments(dropout),
            *weight.kernel, shifts, *window,
            HAS_MOMENTS=out.mean is not None, HAS_DROPOUT=dropout is not None,
            PER_CHANNEL=dropout is not None and dropout.per_channel, INPUT_PRECISION=self.precision,
            X_UNIT=readable(x), W_UNIT=weight_unit(weight.values),
            OUT_UNIT=unit_of(self.dtype.itemsize, writes, out.rows.stride(0)),
            BLOCK_M=config.block_m, BLOCK_N=config.block_k, BLOCK_C=config.block_c, config=config,
        )  # fmt: skip

    def bn_relu_pool(self, source: Features, norm: Norm, pool: Pool, out: Features) -> None:
        if not self.no_pixels(out):
            pool_forward(self, source, norm, pool, out)

    def bn_relu_pool_backward(
        self, grad: Tensor, norm: Norm, pool: Pool, source: Features, into: LazyGradient | None
    ) -> Gradients:
        if not self.m:
            return [torch.zeros(source.rows.shape[1], dtype=torch.float32, device=self.device) for _ in range(2)]
        return pool_backward(self, grad, norm, pool, source, into)

    def _through_scratch(self, source: Features, conv: Conv, out: Features) -> None:
        """``relu(bn(source))`` written once, and PyTorch's convolution: what the fused kernel is measured against."""
        channels = source.rows.shape[1]
        scratch = self.buffer("activation", channels)
        config = self.choose("activation", channels, channels)
        self.launch(
            bn_relu_conv.activation_kernel, -(-self.m // config.block_m) * -(-channels // config.block_c),
            scratch, source.rows, *norm_vectors(conv.norm, source),
            self.m, channels, scratch.stride(0), source.rows.stride(0), conv.norm.eps,
            UNIT=unit_of(self.dtype.itemsize, channels, scratch.stride(0), source.rows.stride(0)),
            BLOCK_M=config.block_m, BLOCK_C=config.block_c, config=config,
        )  # fmt: skip
        images = scratch.unflatten(0, (self.images, *self.spatial)).movedim(-1, 1)
        convolve: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[len(self.spatial) - 1]
        padding = [size // 2 for size in conv.weight.shape[2:]]
        self.copy_with_moments(convolve(images, Weight.of(conv).values, padding=padding), out)

    def resolve_rows(
        self,
        grad: LazyGradient,
        of: Features,
        out: Tensor,
        width: int,
        dropout: Dropout | None = None,
        *,
        unbiased: bool = False,
    ) -> Tensor:
        """``out = (D + a + b*(v - mu)) * dropout's mask``, and zeros up to column ``width``."""
        channels = of.rows.shape[1]
        config = self.choose("resolve", channels, channels)
        tiles = -(-self.m // config.block_m) * -(-width // config.block_c)
        strides = out.stride(0), grad.D.stride(0), of.rows.stride(0)
        if tiles:
            self.launch(
                bn_relu_conv_backward.resolve_kernel, tiles,
                out, grad.D, of.rows, grad.a, grad.b, of.mean, dropout.seed if dropout else None,
                self.m, channels, width, self.pixels,
                *strides,
                *dropout_arguments(dropout),
                LAZY=grad.a is not None and of.mean is not None, HAS_DROPOUT=dropout is not None,
                PER_CHANNEL=dropout is not None and dropout.per_channel, UNBIASED=unbiased,
                UNIT=unit_of(self.dtype.itemsize, channels, width, *strides),
                BLOCK_M=config.block_m, BLOCK_C=config.block_c, config=config,
            )  # fmt: skip
        return out

    def resolve(self, grad: LazyGradient, of: Features, out: Tensor | None = None) -> Tensor:
        shape = (self.images, of.rows.shape[1], *self.spatial)
        if out is None:
            out = empty_features(shape, dtype=self.dtype, device=self.device)
        self.resolve_rows(grad, of, as_rows(out), shape[1])
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
        reads, writes = source.rows.shape[1], conv.weight.shape[0]
        needs_dy = into is not None or any(conv.needs[:2])
        if not (conv.needs[2] or needs_dy):
            return [None, None, None]
        if not self.m:
            dgamma, dbeta = (torch.zeros(reads, dtype=torch.float32, device=self.device) for _ in range(2))
            return [dgamma, dbeta, torch.zeros_like(conv.weight, dtype=torch.float32)]
        lazy = grad.a is not None and output.mean is not None
        taps, window = conv.weight.shape[2:].numel(), math.prod(self.output_sizes(conv.pool)[1])
        config = self.choose("bn_relu_conv_backward", reads, writes, taps, lazy=lazy, window=window)
        written_out = lazy and (config.resolved or (taps > 1 and self.m >= launch.MATERIALISE_PIXELS))
        padded = dropout is not None or written_out
        if padded:
            config = self.choose("bn_relu_conv_backward", reads, writes, taps, window=window)
            g = self.buffer("gradient", writes)
            self.resolve_rows(grad, output, g, g.stride(0), dropout, unbiased=lazy and self.dtype.itemsize == 2)
            grad = LazyGradient(g, None, None, balanced=grad.balanced and dropout is None)
        return ConvBackward(self, config, grad, output, conv, source, into, accumulate, needs_dy, padded).run()

    def finish(self) -> None:
        """Add up the last weight's gradient."""
        if self.pending is not None:
            out, partial = self.pending
            config = self.choose("reduce", 1, 1)
            self.launch(
                bn_relu_conv_backward.reduce_kernel, -(-out.numel() // config.block_c),
                out, partial, out.numel(), partial.shape[0], BLOCK_E=config.block_c, config=config,
            )  # fmt: skip
            self.pending = None
