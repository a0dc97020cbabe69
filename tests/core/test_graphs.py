"""What a CUDA graph asks of a step: nothing waits for a value, no size depends on one, the seed is drawn in the graph.

Without a GPU: on tensors without memory, with the Triton host side; on the CPU, with an eye on every operator.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import blocks, networks
from helpers.blocks import block_pair, random_input
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastdense
from benchmarks.micro.host import host_side
from fastdense import functional
from fastdense.backends import select, sync_batchnorm
from fastdense.backends.torch_backend import TorchBackend

WAITING = (
    "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique_dim", "_unique2",
    "unique_consecutive", "bincount",
)  # fmt: skip


class NothingWaits(TorchDispatchMode):
    """Fails on operators whose result the host must wait for, or whose size depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        self.seen.add(name)
        indexed = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert name not in WAITING and not indexed, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def training_step(net: nn.Module, x: Tensor) -> None:
    F.cross_entropy(net(x), networks.labels(x.shape[0]).to(x.device)).backward()


def drop(net: nn.Module, patch: pytest.MonkeyPatch) -> None:
    for module in net.modules():
        if hasattr(module, "drop_rate"):
            module.drop_rate = 0.2


def cumulative(net: nn.Module, patch: pytest.MonkeyPatch) -> None:
    """Inside the blocks: a ``nn.BatchNorm`` that is called reads its counter as a number."""
    for name, module in net.named_modules():
        if "denseblock" in name:
            blocks.setting("momentum", None)(module)


def share(net: nn.Module, patch: pytest.MonkeyPatch) -> None:
    """Two processes, of which the other one sends zeros."""
    patch.setattr(sync_batchnorm, "_group_name", lambda norm: "both" if norm.training else "")
    patch.setattr(sync_batchnorm, "_resolve", lambda group: group)
    for name, answer in (("get_world_size", 2), ("get_rank", 0), ("all_reduce", None)):
        patch.setattr(sync_batchnorm.dist, name, lambda *arguments, answer=answer, **named: answer)


CHANGES: dict[str, Callable[[nn.Module, pytest.MonkeyPatch], None]] = {
    "plain": lambda net, patch: None, "dropout": drop, "momentum=None": cumulative, "SyncBatchNorm": share,
}  # fmt: skip


@pytest.mark.parametrize(("change", "amp"), [*((change, False) for change in CHANGES), ("plain", True)])
@pytest.mark.parametrize("name", ["own", "torchvision"])
def test_no_operator_of_a_step_waits(name: str, change: str, amp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators' own bodies included, which run below the mode unless it is set again inside."""
    _, fast = networks.network(name, torch.float32)
    CHANGES[change](fast, monkeypatch)
    x = networks.images(name, dtype=torch.float32)
    with NothingWaits() as outside, torch.autocast("cpu", torch.bfloat16, enabled=amp):
        training_step(fast, x)
    assert {"dense_block", "dense_block_backward"} <= outside.seen
    with pytest.MonkeyPatch.context() as patch:
        inside = NothingWaits()
        for primitive in ("bn_relu_conv", "bn_relu_conv_backward", "copy_with_moments", "prepare", "resolve", "finish"):
            patch.setattr(TorchBackend, primitive, _under(inside, getattr(TorchBackend, primitive)))
        training_step(fast, x)
    assert len(inside.seen) > 10


def _under(mode: TorchDispatchMode, function: Any) -> Any:
    def run(*arguments: Any, **named: Any) -> Any:
        with mode:
            return function(*arguments, **named)

    return run


@pytest.mark.parametrize("change", [*CHANGES, "converted"])
def test_a_step_on_the_triton_host_side_without_memory(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no values, nobody can ask for one: ``.item()``, ``bool(tensor)``, ``.cpu()`` would raise.

    Through the operators' own bodies and everything that prepares a launch, forward and backward.
    """
    if change == "converted":
        net = networks.torchvision(block_config=(6, 12), growth_rate=32, num_init_features=64)[1]
    else:
        net = fastdense.densenet121(num_classes=networks.CLASSES)
        CHANGES[change](net, monkeypatch)
    net = net.to("meta", torch.bfloat16)
    x = torch.empty(2, 3, 64, 96, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with host_side() as launches:
        training_step(net, x)
    assert all(parameter.grad is not None for parameter in net.parameters())
    layers = sum(isinstance(module, nn.Conv2d) for module in net.modules())
    assert launches["bn_relu_conv_kernel"] >= layers - 8
    assert launches["bn_relu_conv_backward_kernel"] >= layers - 8


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_value_that_is_asked_for_is_seen(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By both: a body that reads one number."""
    original = functional.update_running_statistics

    def curious(batch: Any, m: Any) -> None:
        batch = list(batch)
        assert batch[0][1].detach().sum().item() is not None
        original(batch, m)

    monkeypatch.setattr(functional, "update_running_statistics", curious)
    block = fastdense.DenseBlock(1, 6, 4, 4, device=device)
    x = torch.zeros(2, 6, 4, 4, device=device)
    if device == "cpu":
        with pytest.raises(AssertionError, match="waits for the device"), NothingWaits():
            block(x)
    else:
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"), host_side():
            block(x)


def test_nothing_of_the_generator_is_read_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seed is drawn on the device by ``torch.randint``, which a captured generator replays."""
    _, block = block_pair(2, 6, 4, 4, drop_rate=0.3)
    x = random_input((2, 6, 4, 4))
    torch.manual_seed(5)
    want = block(x)

    def forbidden(*arguments: Any) -> None:
        raise AssertionError("not while a graph is captured")

    monkeypatch.setattr(select, "_is_capturing", lambda device: True)
    for module, name in ((torch, "get_rng_state"), (torch, "set_rng_state"), (select, "self_test_failure")):
        monkeypatch.setattr(module, name, forbidden)
    monkeypatch.setattr(select, "explain", lambda device, dtype=None: ("triton", "a GPU would"))
    monkeypatch.setattr(select, "create", lambda name, x: TorchBackend(x))
    drawn: list[Any] = []
    randint = torch.randint
    monkeypatch.setattr(torch, "randint", lambda *a, **k: drawn.append(k["device"]) or randint(*a, **k))
    torch.manual_seed(5)
    assert torch.equal(block(x), want)
    assert drawn == [x.device]
