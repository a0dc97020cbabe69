"""How kernels are launched: on which architecture, with which tiles, in how many programs, with which workspaces.

All workspaces come from PyTorch's allocator within one call, so that streams, threads and CUDA graphs see nothing
shared.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.features import Features, row_stride
from ..core.primitives import Pool
from ..kernels import bn_relu_conv, bn_relu_conv_backward, bn_relu_pool, common, launch, reductions
from ..kernels.launch import LaunchConfig, Shape, Split, Work
from .triton_operands import three

COUNTERS = 1024
# What is called comes before what calls it, as within each module.
MODULES: tuple[Any, ...] = (common, reductions, bn_relu_conv, bn_relu_conv_backward, bn_relu_pool)


def _settle_keys() -> None:
    """Have Triton work out every kernel's hash, callees first.

    The hash covers the constants that a kernel and its callees use, but in Triton 3.6 those of a callee only if its own
    hash has been asked for before. So a kernel's name in the cache on disk would depend on which kernels a process
    launched before it, and a kernel that is there would be compiled again.
    """
    for module in MODULES:
        for function in list(vars(module).values()):
            getattr(function, "cache_key", None)  # interpreted functions have none


_settle_keys()


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


class Pending(NamedTuple):
    """Partial weight gradients ``[splits, elements]`` that the next backward kernel reduces into ``out``."""

    out: Tensor
    partial: Tensor


class Launcher:
    """What the launches of one call of one block share.

    Args:
        x: features of the block's shape ``[N, *, *spatial]``, float16, bfloat16 or float32; gives batch, space, dtype
            and device.
    """

    def __init__(self, x: Tensor) -> None:
        self.spatial = tuple(x.shape[2:])
        self.depth_height_width = three(self.spatial)
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
        self.pending: Pending | None = None

    def launch(self, kernel: Any, programs: int, *arguments: Any, config: LaunchConfig, **constants: Any) -> None:
        """Every kernel goes through here: ``programs`` programs of ``kernel`` on this backend's device."""
        guard: AbstractContextManager[Any] = nullcontext()
        if self.device.type == "cuda":  # Triton launches on the current device
            guard = torch.cuda.device(self.device)
        with guard:
            kernel[(programs,)](
                *arguments, **constants, num_warps=config.num_warps, num_stages=config.num_stages
            )  # fmt: skip

    def choose(self, op: str, reads: int, writes: int, taps: int = 1, **flags: int) -> LaunchConfig:
        shape = Shape(self.m, reads, writes, taps, **flags)
        return launch.configuration(op, shape, self.dtype, self.arch, self.sm_count)

    def share(self, config: LaunchConfig, work: Work) -> Split:
        """How many programs share the rows, and how many tiles each of them has."""
        (split,) = launch.share(self.sm_count * config.resident, work)
        return split

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def counter(self, count: int) -> Tensor:
        """Zeros to count arrivals with: who arrives last leaves them at 0 for the next launch."""
        if self._counters.numel() < count:
            self._counters = torch.zeros(max(count, COUNTERS), dtype=torch.int32, device=self.device)
        return self._counters

    def buffer(self, name: str, channels: int) -> Tensor:
        """Uninitialised scratch ``[m, channels]`` that the next request under the same name overwrites.

        Its rows are aligned to 16 bytes.
        """
        stride = row_stride(channels, self.dtype)
        flat = self._scratch.get(name)
        if flat is None or flat.numel() < self.m * stride:
            flat = self._scratch[name] = torch.empty(self.m * stride, dtype=self.dtype, device=self.device)
        return flat.as_strided((self.m, channels), (stride, 1))

    def moments_workspace(self, out: Features, programs: int, columns: int) -> tuple[Any, Any, Any, Any]:
        """``mean, var, partial, counter`` for kernels that end in finish_moments."""
        if out.mean is None:
            return None, None, None, None
        groups = -(-programs // reductions.GROUP.value)
        partial = self.empty(programs + groups, 3, out.rows.shape[1])
        return out.mean, out.var, partial, self.counter(columns * (1 + groups))

    def output_sizes(self, pool: Pool | None) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Depth, height and width of what pooling makes of this backend's images, and of its windows."""
        if pool is None:
            return self.depth_height_width, (1, 1, 1)
        return three(pool.sizes(self.spatial)), three(pool.kernel)
