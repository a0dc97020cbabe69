"""Whole small networks, own and converted, each beside the one that it must equal."""

import copy
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastdense
from fastdense.conversion.converted import Converted
from helpers import peers
from helpers.blocks import random_input, randomise, relative_error
from helpers.budget import TOLERANCE

CLASSES = 5
PACKAGE = Path(fastdense.__file__).parent
SMALL: dict[str, Any] = {"growth_rate": 4, "block_config": (2, 1), "num_init_features": 8, "num_classes": CLASSES}


def own(change: Callable[[Any], Any] | None = None, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The reference network and fastdense's, by default a small one with ImageNet's stem; ``change`` is for both."""
    nets = []
    for chosen in ({"impl": "reference"}, {}):
        torch.manual_seed(0)
        nets.append(fastdense.DenseNet(**{**SMALL, **options, **chosen}))
        if change is not None:
            change(nets[-1])
    reference, fast = nets
    randomise(reference)
    fast.load_state_dict(reference.state_dict())
    return reference, fast


def _converted(make: Callable[..., nn.Module], **options: Any) -> tuple[nn.Module, nn.Module]:
    """Another package's network, and converted."""
    torch.manual_seed(0)
    theirs = make(**options)
    randomise(theirs)
    ours = fastdense.convert(copy.deepcopy(theirs))
    assert sum(isinstance(module, Converted) for module in ours.modules()) == 4  # stem, two blocks, transition
    return theirs, ours


def torchvision(**options: Any) -> tuple[nn.Module, nn.Module]:
    return _converted(peers.torchvision().DenseNet, **{**SMALL, **options})


def timm() -> tuple[nn.Module, nn.Module]:
    options = {name: value for name, value in SMALL.items() if name != "num_init_features"}
    return _converted(peers.timm().DenseNet, **options)


def monai() -> tuple[nn.Module, nn.Module]:
    """In three dimensions."""
    options = {"growth_rate": 4, "block_config": (2, 1), "init_features": 8}
    return _converted(peers.monai().DenseNet, spatial_dims=3, in_channels=3, out_channels=CLASSES, **options)


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


def outcome(net: nn.Module, x: Tensor, cotangent: Tensor, autocast: torch.dtype | None = None) -> dict[str, Any]:
    """Output, gradients and running statistics of one step; under autocast where a dtype is given."""
    x = x.detach().requires_grad_()
    net.zero_grad()
    with torch.autocast(x.device.type, autocast) if autocast else nullcontext():
        output = net(x)
    output.backward(cotangent.to(output.dtype))
    found: dict[str, Any] = {"output": output.detach(), "x.grad": x.grad}
    found |= {f"{name}.grad": parameter.grad for name, parameter in net.named_parameters()}
    return found | {name: buffer.clone() for name, buffer in net.named_buffers() if buffer.is_floating_point()}


def check_budget(
    nets: tuple[nn.Module, nn.Module],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    inputs: int,
    *,
    autocast: bool = False,
    around: Callable[[], Any] = nullcontext,
) -> None:
    """Output, every gradient and the statistics: at most twice the reference network's error in the same mode.

    In the 2-norm against float64 results from the same rounded numbers; medians over ``inputs``. In fp32 one rounding
    of the largest gradient on top, for gradients that BatchNorm all but takes away: PyTorch on a CPU adds up in double
    there. fastdense's step runs within ``around()``.
    """
    peer, fast = nets
    device, mode = next(peer.parameters()).device, dtype if autocast else None
    errors: dict[str, list[tuple[float, float, float]]] = {}
    for seed in range(inputs):
        x = random_input(shape, dtype=torch.float32, seed=seed).detach().to(device)
        x = x if autocast else x.to(dtype)
        generator = torch.Generator().manual_seed(seed)
        cotangent = torch.randn(shape[0], CLASSES, generator=generator).to(device, dtype)
        with around():
            mine = outcome(copy.deepcopy(fast), x, cotangent, mode)
        theirs = outcome(copy.deepcopy(peer), x, cotangent, mode)
        want = outcome(copy.deepcopy(peer).double(), x.double(), cotangent.double())
        largest = max(value.norm().item() for key, value in want.items() if "grad" in key)
        for key, value in want.items():
            assert (mine[key].dtype, mine[key].shape) == (theirs[key].dtype, theirs[key].shape), key
            norm = value.norm().item()
            if "grad" in key and norm < 1e-4 * largest:
                continue  # 0 but for eps, because BatchNorm takes its scale away: all rounding, whoever computes
            floor = 2**-24 * largest / norm if dtype == torch.float32 and "grad" in key else 0.0
            found = relative_error(mine[key], value), relative_error(theirs[key], value), floor
            errors.setdefault(key, []).append(found)
    assert errors["output"] and errors["x.grad"]
    for key, rows in errors.items():
        ours, theirs, floor = (statistics.median(column) for column in zip(*rows, strict=True))
        assert ours <= 2 * theirs + TOLERANCE[dtype] + floor, f"{key}: error {ours:.2e}, the reference's {theirs:.2e}"


@contextmanager
def heard() -> Iterator[list[str]]:
    """What fastdense warns of, and what is said of its code."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    said += [str(w.message) for w in caught if "fastdense" in str(w.message) or Path(w.filename).parent == PACKAGE]
