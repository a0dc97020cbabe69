"""Whole small networks, own and converted, each beside the one that it must equal."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastdense
from fastdense.conversion.converted import Converted
from helpers import peers
from helpers.blocks import random_input, randomise

CLASSES = 5
PACKAGE = Path(fastdense.__file__).parent
SMALL: dict[str, Any] = {"growth_rate": 4, "block_config": (2, 1), "num_init_features": 8, "num_classes": CLASSES}


def own(**options: Any) -> tuple[nn.Module, nn.Module]:
    """fastdense's network and its textbook twin: ImageNet's stem, two blocks with a transition between them, head."""
    torch.manual_seed(0)
    fast = fastdense.DenseNet(**{**SMALL, **options})
    reference = fastdense.DenseNet(**{**SMALL, **options, "impl": "reference"})
    randomise(fast)
    reference.load_state_dict(fast.state_dict())
    return reference, fast


def _converted(theirs: nn.Module) -> tuple[nn.Module, nn.Module]:
    randomise(theirs)
    ours = fastdense.convert(copy.deepcopy(theirs))
    assert sum(isinstance(module, Converted) for module in ours.modules()) == 4  # stem, two blocks, transition
    return theirs, ours


def torchvision(**options: Any) -> tuple[nn.Module, nn.Module]:
    """torchvision's network, and converted."""
    torch.manual_seed(0)
    return _converted(peers.torchvision().DenseNet(**{**SMALL, **options}))


def timm() -> tuple[nn.Module, nn.Module]:
    """timm's network, and converted."""
    torch.manual_seed(0)
    options = {name: value for name, value in SMALL.items() if name != "num_init_features"}
    return _converted(peers.timm().DenseNet(**options))


def monai() -> tuple[nn.Module, nn.Module]:
    """MONAI's three-dimensional network, and converted."""
    torch.manual_seed(0)
    options = {"growth_rate": 4, "block_config": (2, 1), "init_features": 8}
    network = peers.monai().DenseNet
    return _converted(network(spatial_dims=3, in_channels=3, out_channels=CLASSES, **options))


NETWORKS: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    "own": own, "torchvision": torchvision, "timm": timm, "MONAI": monai,
}  # fmt: skip


def network(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """One of ``NETWORKS``: the one to equal, and fastdense's."""
    reference, fast = NETWORKS[name]()
    return reference.to(dtype), fast.to(dtype)


def images(name: str, batch: int = 2, *, seed: int = 7, dtype: torch.dtype = torch.float64) -> Tensor:
    """An odd, non-square input for one of ``NETWORKS``."""
    return random_input((batch, 3, *((17, 18, 23) if name == "MONAI" else (37, 44))), seed=seed, dtype=dtype)


def labels(batch: int) -> Tensor:
    """A class for each image."""
    return torch.arange(batch) % CLASSES


def step(
    net: nn.Module, x: Tensor, loss: Callable[[nn.Module, Tensor, Tensor], Tensor], seed: int = 3
) -> dict[str, Tensor | None]:
    """Loss, the gradients of input and parameters, and the buffers, of one training step."""
    torch.manual_seed(seed)
    x = x.detach().requires_grad_()
    net.zero_grad()
    value = loss(net, x, labels(x.shape[0]))
    value.backward()
    found: dict[str, Tensor | None] = {"loss": value.detach(), "x.grad": x.grad}
    found |= {f"{name}.grad": parameter.grad for name, parameter in net.named_parameters()}
    return found | {name: buffer.clone() for name, buffer in net.named_buffers()}


@contextmanager
def heard() -> Iterator[list[str]]:
    """What fastdense warns of, and what is said of its code."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    said += [str(w.message) for w in caught if "fastdense" in str(w.message) or Path(w.filename).parent == PACKAGE]
