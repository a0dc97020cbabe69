"""Triton's names for compiled kernels, made the same in every process."""

from __future__ import annotations

from typing import Any

from ..kernels import activation, bn_relu_conv, bn_relu_conv_backward, bn_relu_pool, common, moments, sums

__all__ = ["settle"]

# What is called comes before what calls it, as within each module.
MODULES: tuple[Any, ...] = (common, sums, moments, activation, bn_relu_conv, bn_relu_conv_backward, bn_relu_pool)


def settle() -> None:
    """Have Triton work out every kernel's hash, callees first.

    The hash covers the constants that a kernel and its callees use, but in Triton 3.6 those of a callee only if its own
    hash has been asked for before. So a kernel's name in the cache on disk would depend on which kernels a process
    launched before it, and a kernel that is there would be compiled again.
    """
    for module in MODULES:
        for function in list(vars(module).values()):
            getattr(function, "cache_key", None)  # interpreted functions have none
