"""How each primitive is done on a device, in plain PyTorch and in Triton, and which of the two serves a tensor."""

from .select import create, explain, resolve

__all__ = ["create", "explain", "resolve"]
