"""Run by ``torchrun`` with two processes: ``distributed_blocks.py FILE CASE ...`` writes what each case said."""

import copy
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fastdense
from fastdense.conversion.converted import Converted
from helpers import foreign, interpreter
from helpers.blocks import assert_close, random_input, randomise
from helpers.converted import twins

LAYERS = 3
IMAGES = (3, 2)  # of each process: uneven, as the last batch of an epoch
shared = nn.SyncBatchNorm.convert_sync_batchnorm


def chain(block: nn.Module) -> nn.Module:
    """A convolution before the block and one after it, none of whose norms the outside has."""
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), block, nn.Conv2d(18, 4, 1)).double()


def my_share(x: Tensor) -> Tensor:
    start = sum(IMAGES[: dist.get_rank()])
    return x[start : start + IMAGES[dist.get_rank()]]


def step(net: nn.Module, x: Tensor, cotangent: Tensor) -> dict[str, Tensor | None]:
    output = net(x)
    output.backward(cotangent)
    inner = net.module if isinstance(net, DistributedDataParallel) else net
    found: dict[str, Tensor | None] = {"output": output.detach()}
    found |= {f"{name}.grad": p.grad for name, p in inner.named_parameters()}
    return found | {name: buffer.clone() for name, buffer in inner.named_buffers()}


class Collectives:
    """How many all-reduces a forward and a backward pass make, by the size of what they reduce."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __enter__(self) -> "Collectives":
        self.original = dist.all_reduce

        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.sizes.append(tensor.numel())
            return self.original(tensor, *args, **kwargs)

        dist.all_reduce = counted
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self.original


def compare_with_full_batch(
    whole: nn.Module, ours: nn.Module, shapes: tuple[tuple[int, ...], ...] = ((3, 5, 4), (4, 5, 4)), others: int = 0
) -> None:
    """Two processes against one that sees the whole batch, two steps; ``others`` than a block are converted, too.

    DDP refuses SyncBatchNorm on the CPU, so here gradients are added up. ``ddp_and_sync_batch_norm`` goes round that.
    """
    assert sum(isinstance(m, Converted) for m in ours.modules()) == 1 + others, [type(m) for m in ours.modules()]
    for n in range(2):
        for net in (whole, ours):
            net.zero_grad(set_to_none=True)
        x = random_input((sum(IMAGES), *shapes[0]), seed=n).detach() * (n + 1) + n
        cotangent = random_input((sum(IMAGES), *shapes[1]), seed=n + 9).detach()
        want = step(whole, x, cotangent)
        with Collectives() as counted, warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            got = step(ours, my_share(x), my_share(cotangent))
        # One a convolution, forward and backward.
        assert len(counted.sizes) == 2 * (2 * LAYERS + others), counted.sizes
        assert_close("output", got.pop("output"), my_share(want.pop("output")))
        for name, value in want.items():
            if name.endswith(".grad"):
                dist.all_reduce(got[name])
            assert_close(name, got[name], value, scale=1.0)
    assert_close("evaluation", ours.eval()(x), whole.eval()(x))


def compare_block(block: nn.Module, synchronise: Callable[[nn.Module], nn.Module] = shared, **options: Any) -> None:
    whole = chain(block)
    randomise(whole)
    compare_with_full_batch(whole, fastdense.convert(synchronise(copy.deepcopy(whole)), **options))


def sync_batch_norm() -> None:
    """Before the conversion, and after it: the children of a converted block change type, and it stays fused."""
    for recompute in ("activations", "bottlenecks"):
        compare_block(foreign.StarBlock(LAYERS, 6, 4), recompute=recompute)
    compare_block(foreign.AppendingBlock(LAYERS, 6, 4), lambda net: shared(fastdense.convert(net)))


def timm_sync_batch_norm() -> None:
    from helpers import peers

    timm = peers.timm()
    from timm.layers import convert_sync_batchnorm

    compare_block(timm.DenseBlock(LAYERS, 6, 4, 4), convert_sync_batchnorm)
    compare_block(timm.DenseBlock(LAYERS, 6, 4, 4), lambda net: convert_sync_batchnorm(fastdense.convert(net)))
    # PyTorch's own conversion drops timm's activations: then the block is no DenseNet block any more.
    (entry,) = fastdense.plan(shared(timm.DenseBlock(LAYERS, 6, 4, 4)))
    assert entry.action == "skip" and "relu" in entry.reason, entry


def momentum_none_and_no_affine() -> None:
    block = foreign.StarBlock(LAYERS, 6, 4)
    for layer in block.children():
        layer.norm1 = nn.BatchNorm2d(layer.norm1.num_features, momentum=None, affine=False)
        layer.norm2 = nn.BatchNorm2d(layer.norm2.num_features, momentum=None)
    compare_block(block)


def sync_batch_norm_in_stem_and_transition() -> None:
    """One all-reduce each, forward and backward; before the conversion and after it."""
    stem = foreign.stem(nn.Conv2d(3, 6, 3, padding=1))
    whole = nn.Sequential(*stem, foreign.StarBlock(LAYERS, 6, 4), foreign.Transition(18, 5)).double()
    randomise(whole)
    for ours in (fastdense.convert(shared(copy.deepcopy(whole))), shared(fastdense.convert(copy.deepcopy(whole)))):
        compare_with_full_batch(copy.deepcopy(whole), ours, ((3, 9, 10), (5, 2, 2)), others=2)


def some_shared_and_some_not() -> None:
    """The original code runs, and PyTorch's SyncBatchNorm refuses CPU tensors: an error, no hang, nothing silent."""
    block = fastdense.convert(foreign.StarBlock(LAYERS, 6, 4))
    block.denselayer2 = shared(block.denselayer2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
            block(torch.randn(2, 6, 5, 4))
    assert any("share batch statistics" in str(w.message) for w in caught)


def ddp() -> None:
    """Batch statistics of each process alone: converted and original under DDP are the same."""
    theirs, ours = twins(foreign.Net(foreign.ListBlock).double())
    steps(DistributedDataParallel(theirs), DistributedDataParallel(ours))


def steps(theirs: nn.Module, ours: nn.Module) -> None:
    """Three steps of the same two images each, compared one by one."""
    nets = (theirs, ours)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
    for n in range(3):
        x = random_input((2, 3, 9, 6), seed=10 * n + dist.get_rank()).detach()
        found = []
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                found.append(step(net, x, random_input((2, 7), seed=n).detach()))
            optimizer.step()
        for name, value in found[0].items():
            got = found[1][name]
            assert_close(name, got.full_tensor() if isinstance(got, DTensor) else got, value, scale=1.0)


def ddp_and_sync_batch_norm() -> None:
    """DDP round the converted model, then SyncBatchNorm in it: DDP only looks for it when it wraps."""
    whole, ours = twins(chain(foreign.StarBlock(LAYERS, 6, 4)))
    ours = DistributedDataParallel(ours, broadcast_buffers=False)
    shared(ours.module)
    x, cotangent = random_input((5, 3, 5, 4)).detach(), random_input((5, 4, 5, 4), seed=9).detach()
    want, got = step(whole, x, cotangent), step(ours, my_share(x), my_share(cotangent))
    for name, value in want.items():
        if name.endswith(".grad"):
            assert_close(name, got[name] * 2, value, scale=1.0)  # DDP averages
        elif name != "output":
            assert_close(name, got[name], value)


def fsdp2() -> None:
    """``fully_shard`` with the block as unit against DDP."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    theirs, ours = twins(foreign.Net(foreign.StarBlock).double(), recompute="bottlenecks")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for unit in (ours.block1, ours.block2, ours):
        fully_shard(unit, mesh=mesh)
    assert isinstance(ours.block1, Converted) and type(ours.block1).__name__.startswith("FSDP")
    steps(DistributedDataParallel(theirs, broadcast_buffers=False), ours)
    with pytest.raises(RuntimeError, match="revert it before wrapping it"):
        fastdense.revert(ours)


CASES = (
    ddp, ddp_and_sync_batch_norm, sync_batch_norm, timm_sync_batch_norm, momentum_none_and_no_affine,
    sync_batch_norm_in_stem_and_transition, some_shared_and_some_not, fsdp2,
)  # fmt: skip


def main(file: str, names: list[str], cases: Sequence[Callable[[], None]] = CASES) -> None:
    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1":
        interpreter.speed_up()
    dist.init_process_group("gloo")
    said = {}
    for case in cases:
        if case.__name__ in names:
            torch.manual_seed(0)  # the same networks in both processes
            try:
                case()
                said[case.__name__] = "ok"
            except BaseException:
                said[case.__name__] = traceback.format_exc()
                break  # the processes may be out of step
    with open(f"{file}.{dist.get_rank()}", "w") as stream:
        json.dump(said, stream)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
