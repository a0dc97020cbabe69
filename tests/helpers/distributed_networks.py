"""Run by ``torchrun`` with two processes, as ``distributed_blocks.py``: whole networks, and their stages."""

import copy
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastdense
from helpers import distributed_blocks, pooled
from helpers.blocks import assert_close, random_input, randomise
from helpers.distributed_blocks import Collectives

# What each implementation computes in.
IMPLS = {"torch": torch.float64, "triton": torch.float32}
# float32: relative to the largest gradient of the step, beside twice what the reference is off by itself. A gradient
# that nearly cancels is a sum of many that do not, and each processor rounds those in its own way.
ROUNDINGS = 1e-5

BLOCKS = (2, 1)
NORMS = 2 * sum(BLOCKS) + len(BLOCKS) - 1 + 2  # two a layer, the transitions', the stem's and the head's
IMAGE = (3, 21, 18)
# Images of each process: uneven, one alone, none; with the kernels the first and the last.
SHARES = {"torch": ((3, 2), (4, 1), (5, 0)), "triton": ((3, 2), (5, 0))}


def networks(impl: str, synchronise: bool) -> tuple[nn.Module, nn.Module]:
    """The reference on the whole batch in float64, and fastdense's for a share."""
    nets: list[nn.Module] = []
    for name, dtype in (("reference", torch.float64), (impl, IMPLS[impl])):
        torch.manual_seed(0)
        nets.append(fastdense.DenseNet(3, BLOCKS, 6, 2, num_classes=4, impl=name, dtype=dtype))
    whole, ours = nets
    randomise(whole)
    ours.load_state_dict(whole.state_dict())
    if synchronise:
        ours = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
        assert sum(isinstance(module, nn.SyncBatchNorm) for module in ours.modules()) == NORMS
    return whole, ours


def step(net: nn.Module, x: Tensor, cotangent: Tensor) -> dict[str, Tensor | None]:
    x = x.clone().requires_grad_()
    return {**distributed_blocks.step(net, x, cotangent), "x.grad": x.grad}


def largest(found: dict[str, Tensor | None]) -> float:
    """The norm of the largest gradient of a step."""
    return max(value.norm().item() for name, value in found.items() if name.endswith(".grad") and value is not None)


def near(name: str, got: Tensor | None, want: Tensor | None, peer: Tensor | None, scale: float) -> None:
    """In float64 all but equal; in float32 off by at most twice what ``peer``, the reference in float32, is off by."""
    if got is None or want is None or peer is None or got.dtype != torch.float32:
        assert_close(name, got, want, 1e-9, scale)
        return
    error, theirs = ((found.double() - want.double()).norm().item() for found in (got, peer))
    allowed = 2 * theirs + ROUNDINGS * max(want.double().norm().item(), scale if "grad" in name else 0.0)
    assert error <= allowed, f"{name}: error {error:.3e} > {allowed:.3e}, the reference's {theirs:.3e}"


def share(x: Tensor, images: tuple[int, ...], impl: str) -> Tensor:
    start = sum(images[: dist.get_rank()])
    return x[start : start + images[dist.get_rank()]].to(IMPLS[impl])


def compare(whole: nn.Module, ours: nn.Module, images: tuple[int, ...], impl: str, shape: tuple[int, ...]) -> None:
    """Two steps on the whole batch against two on its shares: output, gradients added up, statistics, evaluation."""
    peer = copy.deepcopy(whole).to(IMPLS[impl])
    for seed in range(2):
        for net in (whole, ours, peer):
            net.zero_grad(set_to_none=True)
        x = random_input((sum(images), *shape), seed=seed).detach() * (seed + 1) + seed
        shape_out = copy.deepcopy(whole)(x).shape
        cotangent = random_input(shape_out, seed=seed + 9).detach()
        want, theirs = step(whole, x, cotangent), step(peer, x.to(IMPLS[impl]), cotangent.to(IMPLS[impl]))
        with Collectives() as counted, warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            got = step(ours, share(x, images, impl), share(cotangent, images, impl))
        norms = sum(isinstance(module, nn.SyncBatchNorm) for module in ours.modules())
        assert len(counted.sizes) == 2 * norms, counted.sizes  # one a norm, forward and backward
        scale = largest(want)
        for name in ("output", "x.grad"):
            wanted, peers = share(want.pop(name), images, "torch"), share(theirs.pop(name), images, impl)
            near(name, got.pop(name), wanted, peers, scale)
        for name, value in want.items():
            if name.endswith(".grad"):
                dist.all_reduce(got[name])
            near(f"{name}, step {seed}, shares {images}", got[name], value, theirs[name], scale)
    x32 = x.to(IMPLS[impl])
    near("evaluation", ours.eval()(x32), whole.eval()(x), peer.eval()(x32), scale=1.0)


def sync_batch_norm(impl: str) -> None:
    """Stem, transition and head share too; PyTorch's own SyncBatchNorm would refuse tensors on the CPU."""
    for images in SHARES[impl]:
        compare(*networks(impl, synchronise=True), images, impl, IMAGE)


def stages_share(impl: str) -> None:
    """Each by itself, with norms of every kind, down to one value per channel in each process."""

    def check(case: pooled.Case, images: tuple[int, int], options: dict[str, Any]) -> None:
        def change(stage: Any) -> None:
            stage.norm = nn.BatchNorm2d(5, dtype=torch.float64, **options)

        whole, ours = pooled.pair(case, impl, torch.float64, change)
        compare(whole, nn.SyncBatchNorm.convert_sync_batchnorm(ours.to(IMPLS[impl])), images, impl, case.shape[1:])

    norms: tuple[dict[str, Any], ...] = (
        {}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.1},
    )  # fmt: skip
    for kind in pooled.KINDS:
        for options in norms:
            check(pooled.small(kind)._replace(shape=(2, 5, 5, 7)), (3, 2), options)
    check(pooled.Case("head", (2, 5, 1, 1)), (1, 1), {"eps": 0.5})


def frozen_norms_talk_to_nobody(impl: str) -> None:
    _, ours = networks(impl, synchronise=True)
    with Collectives() as counted:
        ours.eval()(random_input((2, *IMAGE), dtype=IMPLS[impl])).sum().backward()
    assert counted.sizes == []


def some_shared_and_some_not() -> None:
    """Between stages that is nothing odd: each is by itself, or shares."""
    (_, ours), (_, alone) = (networks("torch", synchronise=False) for _ in range(2))
    for name in ("norm0", "norm5"):
        setattr(ours.features, name, nn.SyncBatchNorm.convert_sync_batchnorm(getattr(ours.features, name)))
    x = random_input((2, *IMAGE)).detach()  # the same in both processes: sharing changes nothing
    cotangent = random_input((2, 4), seed=3).detach()
    got, want = step(ours, x, cotangent), step(alone, x, cotangent)
    for name, value in want.items():
        if name.endswith("running_var") and ("norm0" in name or "norm5" in name):
            continue  # unbiased by another count
        assert_close(name, got[name], value, scale=largest(want))


def ddp() -> None:
    """Batch statistics of each process alone: the reference and fastdense under DDP are the same."""
    nets = [DistributedDataParallel(net) for net in networks("torch", synchronise=False)]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01) for net in nets]
    for n in range(2):
        x = random_input((2 + dist.get_rank(), *IMAGE), seed=10 * n + dist.get_rank()).detach()
        cotangent = random_input((len(x), 4), seed=n).detach()
        want, got = (step(net, x, cotangent) for net in nets)
        for name, value in want.items():
            assert_close(name, got[name], value, scale=largest(want))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def ddp_and_sync_batch_norm() -> None:
    """DDP round the network, then SyncBatchNorm in it: DDP only looks for it when it wraps."""
    whole, ours = networks("torch", synchronise=False)
    wrapped = DistributedDataParallel(ours, broadcast_buffers=False)
    nn.SyncBatchNorm.convert_sync_batchnorm(wrapped.module)
    x, cotangent = random_input((5, *IMAGE)).detach(), random_input((5, 4), seed=9).detach()
    got = step(wrapped, share(x, (3, 2), "torch"), share(cotangent, (3, 2), "torch"))
    want = step(whole, x, cotangent)
    for name, value in want.items():
        if name in ("output", "x.grad"):
            value = share(value, (3, 2), "torch")
        elif name.endswith(".grad"):
            value = value / 2  # DDP averages
        assert_close(name, got[name], value, scale=largest(want))


def _named(case: Callable[[str], None], impl: str) -> Callable[[], None]:
    run = partial(case, impl)
    run.__name__ = f"{case.__name__}_{impl}"  # type: ignore[attr-defined]
    return run


# DDP is the same round both backends, as is which norms share.
SHARING = (sync_batch_norm, stages_share, frozen_norms_talk_to_nobody)
CASES = [_named(case, impl) for impl in IMPLS for case in SHARING]
CASES += [some_shared_and_some_not, ddp, ddp_and_sync_batch_norm]

if __name__ == "__main__":
    distributed_blocks.main(sys.argv[1], sys.argv[2:], CASES)
