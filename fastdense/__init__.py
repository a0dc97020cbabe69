"""fastdense: DenseNets that are cheap to train."""

from importlib.metadata import PackageNotFoundError, version

from . import functional, memory, recompute, reference
from .analysis.gradient_flow import feature_reuse, gradient_flow
from .conversion.api import convert, revert
from .conversion.plan import plan
from .functional import dense_block
from .nn import (
    DenseBlock,
    DenseLayer,
    DenseNet,
    Transition,
    densenet121,
    densenet161,
    densenet169,
    densenet201,
    densenet264,
)

try:
    __version__ = version("fastdense")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "DenseBlock",
    "DenseLayer",
    "DenseNet",
    "Transition",
    "convert",
    "dense_block",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet264",
    "feature_reuse",
    "functional",
    "gradient_flow",
    "memory",
    "plan",
    "recompute",
    "reference",
    "revert",
]
