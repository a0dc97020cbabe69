"""Make ``fastdense.kernels`` importable from a checkout that is not installed.

The kernels lie in the folder ``kernels/`` and become ``fastdense.kernels`` when the package is installed. Where nothing
may be installed, :func:`enable` lets the ``fastdense`` of this checkout find them all the same. For tests:

    python -m pytest -p benchmarks.harness.checkout -m gpu
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


class _Kernels:
    """Finds ``fastdense.kernels`` for this checkout's ``fastdense``: an installed one has kernels of its version."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "fastdense.kernels" or str(ROOT / "fastdense") not in map(str, path or ()):
            return None
        folder = ROOT / "kernels"
        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


def enable() -> None:
    """From now on ``import fastdense.kernels`` works in this process."""
    if _Kernels not in sys.meta_path:
        sys.meta_path.insert(0, _Kernels)


pytest_configure = enable  # what `-p benchmarks.harness.checkout` does
