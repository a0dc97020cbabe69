"""The primitives in plain PyTorch: any device, any floating dtype, one, two or three spatial dimensions.

Everything works on rows ``[m, C]`` in pieces of at most ``CHUNK_BYTES`` of scratch, allocated once for a whole block
and reused by all its layers: rows, images, or lines of an image that is larger than that (``tiling.py``). What grows
with the depth or with ``m`` is only what the schedule asks for. Vectors are in the accumulation dtype; a matrix product
takes operands in the feature dtype.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.features import Features, LazyGradient, accumulation_dtype, as_images, as_rows, empty_features
from ..core.primitives import Conv, Dropout, Gradients, Norm, Pool
from .convolution import Convolution, MaxPool
from .philox import keep_mask, rounded, rounding_noise
from .tiling import Piece, of_images, of_rows

CHUNK_BYTES = 4 << 20
MOST_GROUPS = 32  # of rows whose moments are taken apart, then together
MOST_COLUMNS = 1 << 13  # of their vectors, which must stay in the cache

Sums = tuple[Tensor, Tensor]  # sum(dy) and sum(dy*(v - mu)), each [C] in the accumulation dtype
Partial = list[tuple[int, Tensor, Tensor]]  # (count, mean, biased variance) of each chunk


class _NormVectors(NamedTuple):
    """What one BatchNorm makes of the features that it reads: vectors ``[C]`` in the accumulation dtype."""

    mean: Tensor
    r: Tensor  # 1/sqrt(var + eps)
    scale: Tensor  # gamma*r
    beta: Tensor

    @classmethod
    def of(cls, norm: Norm, source: Features) -> _NormVectors:
        dtype = accumulation_dtype(source.rows.dtype)
        mean, var = norm.frozen or (source.mean, source.var)
        assert mean is not None and var is not None
        # Tensor.to costs a microsecond even where nothing is to be done, and this runs for every convolution.
        mean, var, gamma, beta = (v if v.dtype is dtype else v.to(dtype) for v in (mean, var, norm.gamma, norm.beta))
        r = torch.rsqrt(var + norm.eps)
        return cls(mean, r, gamma * r, beta)


# Views cost a microsecond or two each, some ten times for every convolution: these two make none where all is wanted.
def _cut(rows: Tensor, chunk: slice) -> Tensor:
    return rows if chunk.stop - chunk.start == rows.shape[0] else rows[chunk]


def _from(tensor: Tensor, channel: int) -> Tensor:
    return tensor if channel == 0 else tensor[..., channel:]


class TorchBackend:
    """The backend for one call of one block.

    Args:
        x: features of the block's shape ``[N, *, *spatial]``; gives batch, space, dtype and device.
    """

    def __init__(self, x: Tensor) -> None:
        self.spatial = tuple(x.shape[2:])
        self.pixels = math.prod(self.spatial)
        self.m = x.shape[0] * self.pixels
        self.dtype, self.device = x.dtype, x.device
        self.acc = accumulation_dtype(x.dtype)
        # float64 has digits to spare, and other devices add up in pieces themselves.
        self.groups = MOST_GROUPS if x.device.type == "cpu" and self.acc is torch.float32 else 1
        self._scratch: dict[str, Tensor] = {}
        self._latest: tuple[Norm, _NormVectors] | None = None

    def prepare(self, convs: Sequence[Conv]) -> Sequence[Conv]:
        """The convolutions as they are: weights are cast one by one, when they are used."""
        return convs

    def finish(self) -> None:
        pass

    def gradient_buffer(self, of: Features) -> LazyGradient:
        """``(D, a, b)`` of a bottleneck. One ``D`` serves all layers: each overwrites what the last has consumed."""
        channels = of.rows.shape[1]
        D = self._buffer("D", self.m, channels, self.dtype)
        if of.mean is None:
            return LazyGradient(D, None, None)
        a, b = torch.empty(2, channels, dtype=self.acc, device=self.device)
        return LazyGradient(D, a, b, balanced=True)

    def _buffer(self, name: str, rows: int, channels: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised scratch ``[rows, channels]`` that the next request under the same name overwrites."""
        dtype = self.acc if dtype is None else dtype
        flat = self._scratch.get(name)
        if flat is None or flat.numel() < rows * channels:
            flat = self._scratch[name] = torch.empty(rows * channels, dtype=dtype, device=self.device)
        return flat.as_strided((rows, channels), (channels, 1))

    def _bn(self, norm: Norm, source: Features) -> _NormVectors:
        """The vectors of ``norm``; a backward convolution and the merge that follows it share them."""
        if self._latest is None or self._latest[0] is not norm:
            self._latest = norm, _NormVectors.of(norm, source)
        return self._latest[1]

    def _rows_at_once(self, channels: int) -> int:
        """Rows whose ``channels`` fit into ``CHUNK_BYTES``, in the accumulation dtype."""
        rows = max(1, CHUNK_BYTES // (channels * self.acc.itemsize))
        return rows if rows < self.groups else rows // self.groups * self.groups

    def _chunks(self, channels: int) -> Iterator[slice]:
        step = self._rows_at_once(channels)
        return (slice(start, min(start + step, self.m)) for start in range(0, self.m, step))

    def _pieces(self, conv: Conv) -> Iterator[Piece]:
        at_most = self._rows_at_once(max(conv.weight.shape[:2]))
        kernel = conv.weight.shape[2:]
        if conv.pool is None and kernel.numel() == 1:
            return of_rows(self.m, self.spatial, at_most)
        return of_images(self.m, self.spatial, at_most, pool=conv.pool, halo=kernel[0] // 2)

    def _partial_moments(self, rows: Tensor) -> Partial:
        """The moments of ``rows``, in one or two parts."""
        count, channels = rows.shape
        if rows.is_contiguous() and rows.device.type in ("cpu", "cuda"):
            if count < self.groups or self.groups == 1:
                return [self._update_stats(rows, 1)]
            # On a CPU it adds up channels-last values one after another, and a sum of thousands loses digits that a
            # contiguous tensor's keeps. So it gets several groups of rows, as if they were other channels.
            groups = max(1, min(self.groups, MOST_COLUMNS // channels))
            groups = next((n for n in (32, 16, 8) if n <= groups and count % n == 0), groups)
            whole = count // groups * groups
            first = self._update_stats(_cut(rows, slice(0, whole)), groups)
            return [first] if whole == count else [first, self._update_stats(rows[whole:], 1)]
        mean = rows.sum(0, dtype=self.acc).div_(count)
        centred = torch.sub(rows, mean, out=self._buffer("activation", *rows.shape))
        # What the first pass lost to rounding: matters where |mean| is thousands of standard deviations.
        shift = centred.sum(0).div_(count)
        var = centred.square_().sum(0).div_(count).addcmul_(shift, shift, value=-1)
        return [(count, mean.add_(shift), var)]

    def _update_stats(self, rows: Tensor, groups: int) -> tuple[int, Tensor, Tensor]:
        """By what F.batch_norm computes its statistics with: one call instead of five passes."""
        count, channels = rows.shape
        shift = None
        if rows.dtype is torch.float32 and rows.device.type == "cpu":
            # Relative to the first row: a mean may be thousands of standard deviations.
            shift = rows[0].nan_to_num(0.0, 0.0, 0.0)
            rows = torch.sub(rows, shift, out=self._buffer("activation", *rows.shape))
        columns = groups * channels
        images = rows.as_strided((1, columns, count // groups, 1), (count * channels, 1, columns, columns))
        running: Sequence[Tensor | None] = (None, None)
        if rows.dtype is not self.acc:  # their dtype is that of the result
            running = torch.zeros(2, columns, dtype=self.acc, device=self.device).unbind()
        mean, var = torch.batch_norm_update_stats(images, running[0], running[1], 0.0)
        if groups > 1:
            means = mean.view(groups, channels)
            mean = means.mean(0)
            var = var.view(groups, channels).add_((means - mean).square_()).mean(0)
        return count, mean if shift is None else mean.add_(shift), var

    def _merge_moments(self, partial: Partial, out: Features) -> None:
        """Chan, Golub, LeVeque (1979): ``m*var = sum_i n_i*var_i + sum_i n_i*(mean_i - mean)**2``."""
        assert out.mean is not None and out.var is not None
        if len(partial) == 1:
            _, mean, var = partial[0]
            out.mean.copy_(mean)
            out.var.copy_(var)
            return
        if not partial:  # an empty batch: nothing will be normalised, and the gradients of gamma and beta must be 0
            out.mean.zero_()
            out.var.zero_()
            return
        m = sum(count for count, _, _ in partial)
        shares = torch.tensor([[count / m] for count, _, _ in partial], dtype=self.acc, device=self.device)
        means = torch.stack([mean for _, mean, _ in partial])
        # Relative to the first chunk, so that a large common mean does not cancel.
        shifted = means - means[0]
        mean = (shifted * shares).sum(0)
        variances = torch.stack([var for _, _, var in partial])
        mean_of_all = means[0] + mean
        # Where a part is infinite, shifted is NaN and PyTorch's mean is not.
        torch.where(mean_of_all.isnan(), (means * shares).sum(0), mean_of_all, out=out.mean)
        torch.sum(variances.add_((shifted - mean).square_()).mul_(shares), 0, out=out.var)

    def moments(self, of: Features) -> None:
        channels = of.rows.shape[1]
        self._merge_moments(
            [part for chunk in self._chunks(channels) for part in self._partial_moments(_cut(of.rows, chunk))], of
        )

    def copy_with_moments(self, x: Tensor, out: Features) -> None:
        as_images(out.rows, self.spatial).copy_(x)
        if out.mean is not None:
            self.moments(out)

    def _normalise(self, rows: Tensor, bn: _NormVectors, *, centred: str) -> tuple[Tensor, Tensor]:
        """``v - mu`` and ``relu((v - mu)*scale + beta)`` of a chunk; the first lies in the buffer named ``centred``.

        Centre first, scale then: a shift that has ``mu*scale`` folded in would cancel digits wherever ``|mu|`` is
        much larger than the standard deviation.
        """
        v = torch.sub(rows, bn.mean, out=self._buffer(centred, *rows.shape))
        activation = self._buffer("activation", *rows.shape)
        torch.addcmul(bn.beta, v, bn.scale, out=activation).relu_()
        return v, activation

    def _operand(self, name: str, rows: Tensor) -> Tensor:
        """``rows`` in the feature dtype, as an operand of a convolution."""
        if rows.dtype == self.dtype:
            return rows
        return self._buffer(name, rows.shape[0], rows.shape[1], self.dtype).copy_(rows)

    def _drop(self, rows: Tensor, chunk: slice, dropout: Dropout) -> None:
        """Multiply a chunk by its mask over ``1 - p``, in place."""
        seed, layer, p, per_channel = dropout
        channels = rows.shape[1]
        start, count = chunk.start, rows.shape[0]
        if per_channel:
            start, count = start // self.pixels, max(1, count // self.pixels)  # 1: some lines of one image
        keep = keep_mask(seed, layer, start * channels, count * channels, p)
        scale = keep.to(self.acc).mul_(1 / (1 - p) if p < 1 else 0.0)
        if per_channel:
            rows.view(count, -1, channels).mul_(scale.view(count, 1, channels))
        else:
            rows.mul_(scale.view(count, channels))

    def bn_relu_conv(self, source: Features, conv: Conv, out: Features, dropout: Dropout | None = None) -> None:
        bn = self._bn(conv.norm, source)
        kernel = Convolution(conv.weight, self.dtype)
        partial: Partial = []
        for piece in self._pieces(conv):
            _, activation = self._normalise(_cut(source.rows, piece.read), bn, centred="activation")
            if conv.pool is not None:
                activation = self._average(activation, conv.pool, piece.spatial)
            target = _cut(out.rows, piece.written)
            result = kernel.forward(self._operand("operand", activation), target, piece.spatial)
            result = _cut(result, piece.results)
            if dropout is not None:
                self._drop(result, piece.written, dropout)
            if out.mean is not None:
                partial += self._partial_moments(result)
            if result is not target:
                target.copy_(result)
        if out.mean is not None:
            self._merge_moments(partial, out)

    def bn_relu_pool(self, source: Features, norm: Norm, pool: Pool, out: Features) -> None:
        bn, partial, at_most = self._bn(norm, source), [], self._rows_at_once(source.rows.shape[1])
        so_far: Tensor | None = None
        for piece in of_images(self.m, self.spatial, at_most, pool=pool):
            _, activation = self._normalise(_cut(source.rows, piece.read), bn, centred="activation")
            target = _cut(out.rows, piece.written)
            if pool.kind == "mean":
                sums = activation.view(target.shape[0], -1, activation.shape[1]).sum(1)
                so_far = sums if so_far is None or piece.read.start % self.pixels == 0 else so_far.add_(sums)
                target.copy_(so_far / self.pixels)
            else:
                images = as_images(self._operand("operand", activation), piece.spatial)
                target.copy_(_cut(as_rows(MaxPool(pool)(images)[0]), piece.results))
            if out.mean is not None:
                partial += self._partial_moments(target)
        if out.mean is not None:
            self._merge_moments(partial, out)

    @staticmethod
    def _windows(rows: Tensor, pool: Pool, spatial: tuple[int, ...]) -> list[Tensor]:
        """For each place in a window, the pixels there, ``[images, *windows, C]``: views of the rows of images."""
        images = rows.view(-1, *spatial, rows.shape[1])
        axes = [
            [slice(at, at + count * step, step) for at in range(size)]
            for size, count, step in zip(pool.kernel, pool.sizes(spatial), pool.stride, strict=True)
        ]
        return [images[place] for place in itertools.product([slice(None)], *axes)]

    def _average(self, rows: Tensor, pool: Pool, spatial: tuple[int, ...]) -> Tensor:
        """The average over each window, as rows."""
        first, *others = self._windows(rows, pool, spatial)
        count = first.numel() // rows.shape[1]
        out = self._buffer("average", count, rows.shape[1])
        images = out.view(first.shape).copy_(first)
        for pixels in others:
            images.add_(pixels)
        return out.div_(pool.taps)

    def _spread(self, rows: Tensor, pool: Pool, spatial: tuple[int, ...], pixels: int) -> Tensor:
        """The transpose of ``_average``: to ``pixels`` rows."""
        out = self._buffer("spread", pixels, rows.shape[1])
        windows = self._windows(out, pool, spatial)
        if windows[0].numel() * pool.taps < out.numel():  # pixels that are in no window
            out.zero_()
        for window in windows:
            torch.div(rows.view(window.shape), pool.taps, out=window)
        return out

    def _resolve(self, grad: LazyGradient, of: Features, chunk: slice) -> Tensor:
        """``D + a + b*(v - mu)`` of a chunk."""
        D = _cut(grad.D, chunk)
        if grad.a is None or grad.b is None or of.mean is None:
            return D
        g = torch.sub(_cut(of.rows, chunk), of.mean, out=self._buffer("gradient", *D.shape))
        return torch.addcmul(grad.a, g, grad.b, out=g).add_(D)

    def _unbiased(self, g: Tensor) -> Tensor:
        """``g`` rounded to the feature dtype without bias: see ``philox.rounded``."""
        if self._scratch.get("noise", g[:0]).numel() < g.numel():
            self._scratch["noise"] = rounding_noise(g.numel(), self.dtype, self.device)
        return rounded(g, self.dtype, self._scratch["noise"][: g.numel()])

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
        """With ``dy = pool^T(conv^T(grad)) * (relu's mask)``: ``into.D (+)= gamma*r*dy``, and what ``Backend`` says."""
        needs_weight, needs_norm = conv.needs[2], conv.needs[0] or conv.needs[1]
        bn = self._bn(conv.norm, source)
        kernel = Convolution(conv.weight, self.dtype)
        # The first channel whose dy is needed.
        lo = 0 if needs_norm or into is None else into.start
        wanted = needs_norm or into is not None
        d_weight: Tensor | None = None
        sums = self._zero_sums(source) if wanted else None

        for piece in self._pieces(conv):
            g = self._resolve(grad, output, piece.outputs)
            if dropout is not None:
                g = self._buffer("gradient", *g.shape).copy_(g)
                self._drop(g, piece.outputs, dropout)
            v, activation = self._normalise(_cut(source.rows, piece.read), bn, centred="centred")
            read = activation if conv.pool is None else self._average(activation, conv.pool, piece.spatial)
            if self.dtype.itemsize == 2 and grad.balanced:
                operand = self._buffer("operand", read.shape[0], read.shape[1], self.dtype)
                read = torch.sub(read, bn.beta.relu(), out=operand)
            elif self.dtype.itemsize == 2 and g.dtype is self.acc:
                g = self._unbiased(g)
            g, operand = self._operand("output gradient", g), self._operand("operand", read)
            if kernel.pointwise:
                if needs_weight:
                    d_weight = kernel.d_weight(g, operand, d_weight, self.acc)
                dy = self._buffer("dy operand", g.shape[0], kernel.in_channels - lo, dtype=self.dtype)
                if wanted:
                    torch.mm(g, _from(kernel.matrix, lo), out=dy)
            else:
                dy, dw = kernel.backward(g, operand, piece, dx=wanted, dw=needs_weight)
                dy, v, activation = (_cut(rows, piece.inner) for rows in (dy, v, activation))
                dy = _from(dy, lo)
                if needs_weight:
                    d_weight = dw.to(self.acc) if d_weight is None else d_weight.add_(dw)
            if sums is None:
                continue
            if dy.dtype != self.acc:
                dy = self._buffer("dy", *dy.shape).copy_(dy)
            if conv.pool is not None:
                dy = self._spread(dy, conv.pool, piece.spatial, v.shape[0])
            self._through_norm(dy, v, activation, bn, piece.wanted, into, sums, lo, accumulate)
        if needs_weight and d_weight is None:  # an empty batch
            d_weight = torch.zeros_like(conv.weight, dtype=self.acc)
        merged = (None, None) if sums is None else self._merge_gradients(sums, conv.norm, source, into, accumulate)
        return [*merged, d_weight]

    def bn_relu_pool_backward(
        self, grad: Tensor, norm: Norm, pool: Pool, source: Features, into: LazyGradient | None
    ) -> Gradients:
        """With ``dy = pool^T(grad) * (relu's mask)``: ``into.D = gamma*r*dy``, and what ``Backend`` says."""
        bn, sums = self._bn(norm, source), self._zero_sums(source)
        channels = source.rows.shape[1]
        for piece in of_images(self.m, self.spatial, self._rows_at_once(channels), pool=pool):
            v, activation = self._normalise(_cut(source.rows, piece.read), bn, centred="centred")
            g = _cut(grad, piece.outputs)
            if pool.kind == "mean":
                dy = self._buffer("dy", *v.shape)
                dy.view(g.shape[0], -1, channels).copy_(g.to(self.acc).div(self.pixels).unsqueeze(1))
            else:
                images = as_images(self._operand("operand", activation), piece.spatial)
                max_pool = MaxPool(pool)
                _, indices = max_pool(images)
                through = as_rows(max_pool.backward(as_images(g, pool.sizes(piece.spatial)), images, indices))
                through, v, activation = (_cut(rows, piece.inner) for rows in (through, v, activation))
                dy = self._buffer("dy", *v.shape).copy_(through)
            self._through_norm(dy, v, activation, bn, piece.wanted, into, sums, 0, accumulate=False)
        return [*self._merge_gradients(sums, norm, source, into, accumulate=False)]

    def _zero_sums(self, source: Features) -> Sums:
        zeros = torch.zeros(2, source.rows.shape[1], dtype=self.acc, device=self.device)
        return zeros[0], zeros[1]

    def _through_norm(
        self,
        dy: Tensor,
        v: Tensor,
        activation: Tensor,
        bn: _NormVectors,
        chunk: slice,
        into: LazyGradient | None,
        sums: Sums,
        lo: int,
        accumulate: bool,
    ) -> None:
        """A chunk's ``dy``, from channel ``lo`` on: ReLU's mask, ``D`` and the sums; ``dy`` is used up."""
        torch.ops.aten.threshold_backward.grad_input(dy, _from(activation, lo), 0, grad_input=dy)
        if into is not None:
            D, mine, scale = _cut(into.D, chunk), _from(dy, into.start - lo), _from(bn.scale, into.start)
            if accumulate:
                D.addcmul_(mine, scale)
            else:
                torch.mul(mine, scale, out=D)
        _from(sums[0], lo).add_(dy.sum(0))
        _from(sums[1], lo).add_(dy.mul_(_from(v, lo)).sum(0))

    def _merge_gradients(
        self, sums: Sums, norm: Norm, source: Features, into: LazyGradient | None, accumulate: bool
    ) -> tuple[Tensor, Tensor]:
        """``dgamma = r*sum(dy*(v-mu))``, ``dbeta = sum(dy)``; ``a -= gamma*r*dbeta/m``, ``b -= gamma*r^2*dgamma/m``."""
        dbeta, centred = sums
        bn = self._bn(norm, source)
        dgamma = centred * bn.r
        if into is not None and into.a is not None and into.b is not None:
            if not accumulate:
                into.a.zero_()
                into.b.zero_()
            if norm.frozen is None:
                weight = -1 / max(self.m, 1)
                into.a.addcmul_(_from(bn.scale, into.start), _from(dbeta, into.start), value=weight)
                into.b.addcmul_(_from(bn.scale * bn.r, into.start), _from(dgamma, into.start), value=weight)
        return dgamma, dbeta

    def resolve(self, grad: LazyGradient, of: Features, out: Tensor | None = None) -> Tensor:
        channels = of.rows.shape[1]
        images = self.m // max(1, self.pixels)
        if out is None:
            out = empty_features((images, channels, *self.spatial), dtype=self.dtype, device=self.device)
        rows = as_rows(out)
        for chunk in self._chunks(channels):
            rows[chunk].copy_(self._resolve(grad, of, chunk))
        return out
