from __future__ import annotations

import importlib
from types import ModuleType

import pytest

from benchmarks.harness.providers import torchvision_densenet


@pytest.fixture(scope="session")
def torchvision_models() -> ModuleType:
    """``torchvision.models``, also on a CPU build of PyTorch."""
    try:
        torchvision_densenet()
    except ImportError:
        pytest.skip("torchvision is not installed")
    return importlib.import_module("torchvision.models")
