"""One convolution's backward pass as a launch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from ..core.features import Features, LazyGradient
from ..core.primitives import Conv, Gradients
from ..kernels import bn_relu_conv_backward, launch
from ..kernels.launch import LaunchConfig, Split, Work
from .triton_launcher import Launcher, Pending
from .triton_operands import Weight, dense_like, norm_vectors, readable, tap_stride, unit_of, weight_unit


class ConvBackward(NamedTuple):
    """One convolution's backward."""

    be: Launcher
    config: LaunchConfig
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
        be, config, conv, x = self.be, self.config, self.conv, self.source.rows
        needs_gamma, needs_beta, needs_weight = conv.needs
        weight = Weight.of(conv)
        reads, writes, m = x.shape[1], conv.weight.shape[0], self.grad.D.shape[0]
        sizes, window = be.output_sizes(conv.pool)
        if self.into is not None and m * math.prod(window) < be.m:  # pixels that are in no window
            self.into.D.zero_()
        blocks = -(-writes // config.block_k)
        together = weight.taps == 1 and config.group >= blocks
        # The first column tile whose dy is needed.
        first = 0 if needs_gamma or needs_beta or (needs_weight and together) else self.start // config.block_c
        columns = -(-reads // config.block_c) - first
        data, weights = self._share(config, columns, weight.taps * blocks, together)
        splits = data.programs
        data_programs = splits * columns if self.needs_dy or together else 0
        weight_splits, weight_programs = splits, 0
        if needs_weight and not together:
            weight_splits = weights.programs
            weight_programs = (
                weight_splits * -(-reads // config.weight_block_c) * -(-weight.taps * blocks // config.group)
            )
        dw = dense_like(conv.weight) if needs_weight else None
        partial = dw
        if dw is not None and weight_splits > 1:
            partial = be.empty(weight_splits, dw.numel())
        dgamma, dbeta = (be.empty(reads), be.empty(reads)) if self.needs_dy else (None, None)
        pending, be.pending = be.pending, None
        be.launch(
            bn_relu_conv_backward.bn_relu_conv_backward_kernel, data_programs + weight_programs,
            *self._pointers(weight, partial, dgamma, dbeta, splits, columns, pending),
            m, be.m, reads, writes, *sizes, *be.depth_height_width, self.start, first,
            data.each, weights.each, data_programs,
            0 if dw is None else dw.numel(), *((pending.out.numel(), pending.partial.shape[0]) if pending else (0, 0)),
            *self._strides(weight, dw),
            conv.norm.eps,
            *weight.kernel, blocks, config.group, *window,
            **self._flags(weight, together, dw), HAS_PENDING=pending is not None,
            BLOCK_M=config.block_m, BLOCK_C=config.block_c, BLOCK_K=config.block_k,
            WEIGHT_BLOCK_M=config.weight_block_m, WEIGHT_BLOCK_C=config.weight_block_c,
            BLOCK_E=be.choose("reduce", 1, 1).block_c, config=config,
        )  # fmt: skip
        if dw is not None and partial is not None and partial is not dw:
            be.pending = Pending(dw, partial)
        return [dgamma, dbeta, dw]

    def _share(self, config: LaunchConfig, columns: int, units: int, together: bool) -> tuple[Split, Split]:
        """How programs that form the data gradient, or both, share the rows, and those that form weight gradients."""
        m, needs_weight = self.grad.D.shape[0], self.conv.needs[2]
        least = launch.MIN_TILES_PER_SPLIT
        tile, weight_tile = config.block_m * config.block_c, config.weight_block_m * config.weight_block_c
        data = Work(-(-m // config.block_m), columns, tile * units, least if together and needs_weight else 1)
        groups = -(-units // config.group)
        weight_columns = -(-self.source.rows.shape[1] // config.weight_block_c) * groups
        weights = Work(-(-m // config.weight_block_m), weight_columns, weight_tile * config.group, least)
        places = self.be.sm_count * config.resident
        if together or not needs_weight:
            (split,) = launch.share(places, data)
            return split, split
        if not self.needs_dy:
            (split,) = launch.share(places, weights)
            return split, split
        first, second = launch.share(places, data, weights)
        return first, second

    def _pointers(
        self,
        weight: Weight,
        dw: Tensor | None,
        dgamma: Tensor | None,
        dbeta: Tensor | None,
        splits: int,
        columns: int,
        pending: Pending | None,
    ) -> tuple[Tensor | None, ...]:
        be, grad, into = self.be, self.grad, self.into
        sums = be.empty(splits, 2, self.source.rows.shape[1]) if self.needs_dy else None
        D, da, db = (None, None, None) if into is None else (into.D, into.a, into.b)
        return (
            D, dw, dgamma, dbeta, da, db, pending.out if pending else None, sums, be.counter(columns),
            pending.partial if pending else None,
            grad.D, self.output.rows, grad.a, grad.b, self.output.mean,
            self.source.rows, *norm_vectors(self.conv.norm, self.source), weight.values,
        )  # fmt: skip

    def _strides(self, weight: Weight, dw: Tensor | None) -> tuple[int, ...]:
        d_strides = (0, 0, 0) if dw is None else (dw.stride(0), dw.stride(1), tap_stride(dw) or 0)
        return (
            0 if self.into is None else self.into.D.stride(0), self.grad.D.stride(0), self.output.rows.stride(0),
            self.source.rows.stride(0), *weight.strides, *d_strides,
        )  # fmt: skip

    def _flags(self, weight: Weight, together: bool, dw: Tensor | None) -> dict[str, Any]:
        be, grad, into, itemsize = self.be, self.grad, self.into, self.be.dtype.itemsize
        lazy = self.lazy
        reads, writes = self.source.rows.shape[1], weight.values.shape[0]
        D, v = grad.D, self.output.rows
        g_unit = unit_of(itemsize, D.stride(0), v.stride(0) if lazy else 0, 0 if self.padded else writes)
        return {
            "LAZY": lazy, "HAS_INTO": into is not None, "ACCUMULATE": self.accumulate,
            "HAS_BATCH": into is not None and into.a is not None and self.conv.norm.frozen is None,
            "NEEDS_DY": self.needs_dy, "NEEDS_WEIGHT": self.conv.needs[2], "TOGETHER": together,
            "BALANCED": grad.balanced and itemsize == 2, "INPUT_PRECISION": be.precision,
            "X_UNIT": readable(self.source.rows),
            "D_UNIT": 1 if into is None else unit_of(itemsize, into.D.stride(0), reads, self.start),
            "G_UNIT": g_unit, "W_UNIT": weight_unit(weight.values),
            "DW_UNIT": 1 if dw is None else weight_unit(dw),
        }  # fmt: skip
