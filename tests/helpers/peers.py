"""The packages whose DenseNets are converted, imported without the dependencies that their networks do not need."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest

from benchmarks.harness.providers import torchvision_densenet

READERS = (
    "imageio", "imageio.v2", "pandas", "requests", "skimage", "skimage.filters", "skimage.io", "skimage.transform",
    "tqdm", "tqdm.auto",
)  # fmt: skip


def _found(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _need(name: str) -> None:
    if not _found(name):
        pytest.skip(f"{name} is not installed")


def torchvision() -> Any:
    """``torchvision.models``."""
    _need("torchvision")
    torchvision_densenet()
    return importlib.import_module("torchvision.models")


def timm() -> Any:
    """``timm.models.densenet``."""
    torchvision()  # which timm imports
    _need("timm")
    return importlib.import_module("timm.models.densenet")


def monai() -> Any:
    """``monai.networks.nets.densenet``."""
    _need("monai")
    return importlib.import_module("monai.networks.nets.densenet")


def torchxrayvision() -> Any:
    """``torchxrayvision.models``: that module, not the package, whose readers of data sets need much more."""
    if "torchxrayvision.models" in sys.modules:
        return sys.modules["torchxrayvision.models"]
    torchvision()
    _need("torchxrayvision")
    package = ModuleType("torchxrayvision")
    package.__path__ = list(importlib.util.find_spec("torchxrayvision").submodule_search_locations)
    sys.modules["torchxrayvision"] = package
    with _stand_ins(READERS):
        return importlib.import_module("torchxrayvision.models")


@contextmanager
def _stand_ins(names: tuple[str, ...]) -> Iterator[None]:
    missing = [name for name in names if not _found(name.partition(".")[0])]
    sys.modules.update({name: MagicMock(name=name) for name in missing})
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]
