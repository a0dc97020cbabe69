"""Argument checks shared by the public entry points: each error names the value and what is allowed."""

from __future__ import annotations

import os
from collections.abc import Sequence

RECOMPUTE = ("activations", "bottlenecks", "auto")
IMPL = ("auto", "triton", "torch", "reference")


def positive_int(name: str, value: object) -> int:
    """``value`` if it is an integer of at least 1; raises ``ValueError`` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def probability(name: str, value: object) -> float:
    """``value`` if it lies in [0, 1]; raises ``ValueError`` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a probability between 0 and 1, got {value!r}")
    return float(value)


def choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raises ``ValueError`` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def block_arguments(
    num_layers: object,
    num_input_features: object,
    bn_size: object,
    growth_rate: object,
    drop_rate: object,
    spatial_dims: object,
) -> None:
    """Checks what every dense block is constructed with."""
    positive_int("num_layers", num_layers)
    positive_int("num_input_features", num_input_features)
    if bn_size is not None:
        positive_int("bn_size", bn_size)
    positive_int("growth_rate", growth_rate)
    probability("drop_rate", drop_rate)
    choice("spatial_dims", spatial_dims, (1, 2, 3))


def recompute_mode(recompute: str | None, memory_efficient: bool) -> str:
    """The mode that ``recompute`` and torchvision's flag ask for together.

    ``None`` means what the flag says: ``"bottlenecks"`` if it is set, else ``"activations"``. Raises ``ValueError`` for
    an unknown mode and for a flag that asks for less memory than an explicit ``recompute="activations"`` gives.
    """
    if recompute is None:
        return "bottlenecks" if memory_efficient else "activations"
    choice("recompute", recompute, (*RECOMPUTE, None))
    if memory_efficient and recompute == "activations":
        raise ValueError(
            "memory_efficient=True asks for recompute='bottlenecks', but recompute='activations' was given: "
            "leave one of them out"
        )
    return recompute


def impl_name(impl: str) -> str:
    """``impl``, or what the environment variable ``FASTDENSE_IMPL`` says where ``impl`` is ``"auto"``."""
    choice("impl", impl, IMPL)
    if impl == "auto" and (from_environment := os.environ.get("FASTDENSE_IMPL")):
        choice("the environment variable FASTDENSE_IMPL", from_environment, IMPL)
        return from_environment
    return impl
