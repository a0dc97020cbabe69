"""torchvision's DenseNets, also where torchvision's own operators cannot be loaded (a CPU build of PyTorch)."""

from __future__ import annotations

from types import ModuleType

import torch

_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")


def torchvision_densenet() -> ModuleType:
    """The module ``torchvision.models.densenet``; raises ``ImportError`` if torchvision is not installed."""
    try:
        import torchvision.models.densenet as densenet
    except RuntimeError:  # "operator torchvision::nms does not exist": its compiled part does not fit this PyTorch
        for name in ("nms", "qnms"):
            _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision.models.densenet as densenet
    return densenet
