"""torchvision on a CPU build of PyTorch: define the two operators that its import registers fakes for."""

from __future__ import annotations

import pytest
import torch

_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")


def pytest_configure() -> None:
    pass


if not hasattr(torch.ops.torchvision, "nms"):
    for _name in ("nms", "qnms"):
        _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(scope="session")
def torchvision_models() -> object:
    return pytest.importorskip("torchvision.models", exc_type=ImportError)
