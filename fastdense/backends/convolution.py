"""PyTorch's convolution and maximum pooling, forward and backward, on rows of pixels, channels last."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.features import CHANNELS_LAST, as_images, as_rows
from ..core.primitives import Pool
from .tiling import Piece


class Convolution:
    """A convolution over rows: stride 1, odd kernel, "same" zero padding.

    A 1x1 kernel is one matrix product; one spatial dimension is run as two of which the first has one pixel.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.out_channels, self.in_channels = weight.shape[:2]
        self.pointwise = weight.shape[2:].numel() == 1
        self.one_d = weight.dim() == 3
        weight = weight if weight.dtype is dtype else weight.to(dtype)
        self.weight = weight.unsqueeze(2) if self.one_d else weight
        self.padding = [size // 2 for size in self.weight.shape[2:]]

    @property
    def matrix(self) -> Tensor:
        return self.weight.view(self.out_channels, self.in_channels)

    def _images(self, rows: Tensor, spatial: tuple[int, ...]) -> Tensor:
        return as_images(rows, (1, *spatial) if self.one_d else spatial)

    def forward(self, operand: Tensor, out: Tensor, spatial: tuple[int, ...]) -> Tensor:
        """``conv(operand)`` as rows: written to ``out`` by a 1x1 kernel, in memory of its own by any other."""
        if self.pointwise:
            return torch.mm(operand, self.matrix.t(), out=out)
        convolve = F.conv2d if self.weight.dim() == 4 else F.conv3d
        return self._rows(convolve(self._images(operand, spatial), self.weight, padding=self.padding))

    @staticmethod
    def _rows(images: Tensor) -> Tensor:
        """A convolution's result as rows; a copy only if it did not come out channels last."""
        return as_rows(images.contiguous(memory_format=CHANNELS_LAST[images.dim()]))

    def d_weight(self, g: Tensor, operand: Tensor, so_far: Tensor | None, acc: torch.dtype) -> Tensor:
        """The gradient of a 1x1 weight, added to that of the chunks before."""
        if so_far is None:
            d_weight = torch.mm(g.t(), operand)
            return d_weight if d_weight.dtype is acc else d_weight.to(acc)
        return so_far.addmm_(g.t(), operand) if g.dtype == acc else so_far.add_(torch.mm(g.t(), operand))

    def backward(self, g: Tensor, operand: Tensor, piece: Piece, *, dx: bool, dw: bool) -> tuple[Tensor, Tensor]:
        """Gradients of the operand, as rows, and of the weight; meaningless where not asked for.

        ``g`` and ``operand`` are all rows that the piece reads. Its halo's gradients belong to the weight in other
        pieces, but to the operand in this one.
        """
        if dw and piece.inner.stop - piece.inner.start < g.shape[0]:
            own = torch.zeros_like(g)
            own[piece.inner] = g[piece.inner]
            _, d_weight = self._backward(own, operand, piece.spatial, dx=False, dw=True)
            return self._backward(g, operand, piece.spatial, dx=True, dw=False)[0] if dx else operand, d_weight
        return self._backward(g, operand, piece.spatial, dx=dx, dw=dw)

    def _backward(
        self, g: Tensor, operand: Tensor, spatial: tuple[int, ...], *, dx: bool, dw: bool
    ) -> tuple[Tensor, Tensor]:
        ones = [1] * len(self.padding)
        image_dx, image_dw, _ = torch.ops.aten.convolution_backward(
            self._images(g, spatial),
            self._images(operand, spatial),
            self.weight,
            None,
            ones,
            self.padding,
            ones,
            False,
            [0] * len(ones),
            1,
            [dx, dw, False],
        )
        rows = self._rows(image_dx) if dx else operand
        return rows, image_dw


class MaxPool:
    """Maximum pooling and its gradient on channels-last images; the first maximum of a window wins, the last NaN."""

    def __init__(self, pool: Pool) -> None:
        self.one_d = len(pool.kernel) == 1
        kernel, stride, padding = pool.kernel, pool.stride, pool.padding
        if self.one_d:
            kernel, stride, padding = (1, *kernel), (1, *stride), (0, *padding)
        self.arguments = [list(kernel), list(stride), list(padding), [1] * len(kernel), False]
        three = len(kernel) == 3
        self.forward = torch.ops.aten.max_pool3d_with_indices if three else torch.ops.aten.max_pool2d_with_indices
        backward = torch.ops.aten.max_pool3d_with_indices_backward, torch.ops.aten.max_pool2d_with_indices_backward
        self._backward = backward[0] if three else backward[1]

    def _result(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=CHANNELS_LAST[images.dim()])
        return images.squeeze(2) if self.one_d else images

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The pooled images and the indices that ``backward`` wants."""
        out, indices = self.forward(images.unsqueeze(2) if self.one_d else images, *self.arguments)
        return self._result(out), indices

    def backward(self, grad: Tensor, images: Tensor, indices: Tensor) -> Tensor:
        """The gradient of ``images``."""
        if self.one_d:
            grad, images = grad.unsqueeze(2), images.unsqueeze(2)
        return self._result(self._backward(grad, images, *self.arguments, indices))
