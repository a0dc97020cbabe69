"""Checkpoints, compared bit for bit."""

from __future__ import annotations

from typing import Any

import torch

UNLIKE = ("time", "seconds", "metrics_bytes")  # what two runs of the same training do not have in common


def same(found: Any, wanted: Any, name: str = "state") -> str:
    """Empty if both are the same, otherwise the name of what differs."""
    if isinstance(wanted, dict):
        if found.keys() != wanted.keys():
            return f"{name}: {found.keys()} and {wanted.keys()}"
        parts = [same(found[key], wanted[key], f"{name}.{key}") for key in wanted if key not in UNLIKE]
    elif isinstance(wanted, list | tuple):
        if len(found) != len(wanted):
            return f"{name}: {len(found)} and {len(wanted)} of them"
        parts = [same(f, w, f"{name}.{i}") for i, (f, w) in enumerate(zip(found, wanted, strict=True))]
    elif isinstance(wanted, torch.Tensor):
        return "" if found.dtype == wanted.dtype and torch.equal(found, wanted) else name
    else:
        return "" if found == wanted else f"{name}: {found!r} and {wanted!r}"
    return next(filter(None, parts), "")
