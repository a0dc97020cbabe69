"""Which primitive on which shape, and the random values that it is given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdense.features import Features

from ..compiled.traffic import Shape


@dataclass(frozen=True)
class Case:
    """One primitive on one shape.

    Attributes:
        operation: a name of :mod:`benchmarks.compiled.traffic`.
        shape: of the primitive.
        batch: images; the space is a square, or a cube.
        width: channels of the buffer that its features are a slice of.
        dims: spatial dimensions.
    """

    operation: str
    shape: Shape
    batch: int
    width: int
    dims: int = 2

    @property
    def spatial(self) -> tuple[int, ...]:
        """The size of the images of ``shape.m`` pixels together."""
        return (round((self.shape.m // self.batch) ** (1 / self.dims)),) * self.dims


def normal(device: torch.device, *size: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Normal values in fp32."""
    return torch.randn(size, device=device).mul_(scale).add_(shift)


def with_moments(rows: Tensor) -> Features:
    """``rows`` with the moments that they have."""
    var, mean = torch.var_mean(rows.float(), dim=0, correction=0)
    return Features(rows, mean, var)
