"""Converted blocks in the ways that people train: frozen norms, partial gradients, accumulation, checkpoints."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import foreign
from helpers.blocks import assert_close, assert_same, random_input, randomise, relative_error, results
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastdense
from fastdense.conversion.converted import Converted

MODES = ("activations", "bottlenecks")


def pair(change: Callable[[Any], None] | None = None, *, first: bool = True, **options: Any) -> tuple[Any, Any, Tensor]:
    """A network and its converted copy; ``change`` comes before the conversion, or after it."""
    torch.manual_seed(0)
    theirs = foreign.Net(foreign.StarBlock, pooled=True).double()
    randomise(theirs)
    if change is not None and first:
        change(theirs)
    ours = fastdense.convert(copy.deepcopy(theirs), **options)
    if change is not None and not first:
        change(theirs), change(ours)
    assert sum(isinstance(module, Converted) for module in ours.modules()) == 4
    return theirs, ours, random_input((2, 3, 9, 6))


def _norms(net: nn.Module) -> list[Any]:
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


def _all_frozen(net: nn.Module) -> None:
    for norm in _norms(net):
        norm.eval()


def _some_frozen(net: nn.Module) -> None:
    for i, norm in enumerate(_norms(net)):
        norm.train(i % 3 == 0)


def _frozen_without_gradients(net: nn.Module) -> None:
    for norm in _norms(net):
        norm.eval().requires_grad_(False)


def _cumulative(net: nn.Module) -> None:
    for norm in _norms(net):
        norm.momentum = None


def _other_momenta_and_eps(net: nn.Module) -> None:
    for i, norm in enumerate(_norms(net)):
        norm.momentum, norm.eps = (0.1, 0.7, None)[i % 3], (1e-5, 1e-2, 1e-3)[i % 3]


def _replace_norms(net: nn.Module, **options: Any) -> None:
    for parent in list(net.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, nn.BatchNorm2d(child.num_features, dtype=torch.float64, **options))


def _untracked(net: nn.Module) -> None:
    _replace_norms(net, track_running_stats=False)


def _not_affine(net: nn.Module) -> None:
    _replace_norms(net, affine=False)


def _evaluation(net: nn.Module) -> None:
    net.eval()


def _untracked_evaluation(net: nn.Module) -> None:
    _untracked(net)
    net.eval()


def _only_the_classifier(net: nn.Module) -> None:
    net.requires_grad_(False)
    net.classifier.requires_grad_(True)


def _the_second_block(net: nn.Module) -> None:
    net.requires_grad_(False)
    net.block2.requires_grad_(True)


def _one_convolution(net: nn.Module) -> None:
    net.requires_grad_(False)
    net.block1.denselayer2.conv1.weight.requires_grad_(True)


def _the_stems_norm(net: nn.Module) -> None:
    net.requires_grad_(False)
    net.stem[1].requires_grad_(True)


def _every_second_parameter(net: nn.Module) -> None:
    for i, parameter in enumerate(net.parameters()):
        parameter.requires_grad_(i % 2 == 0)


CHANGES = [
    _all_frozen, _some_frozen, _frozen_without_gradients, _cumulative, _other_momenta_and_eps, _untracked, _not_affine,
    _evaluation, _untracked_evaluation, _only_the_classifier, _the_second_block, _one_convolution, _the_stems_norm,
    _every_second_parameter,
]  # fmt: skip


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_training_modes(change: Callable[[Any], None], first: bool) -> None:
    theirs, ours, x = pair(change, first=first, recompute=MODES[int(first)])
    for step in range(2):
        assert_same(results(ours, x, step), results(theirs, x, step))


def test_gradients_accumulate() -> None:
    theirs, ours, x = pair()
    for net in (theirs, ours):
        for step in range(3):
            output = net(x.detach() * (step + 1))
            output.backward(random_input(output.shape, seed=step).detach())
    for (name, got), want in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_close(name, got.grad, want.grad, scale=1.0)


def test_two_forward_passes_before_a_backward() -> None:
    """The buffer belongs to one call: nothing that backward needs is overwritten by the next."""
    theirs, ours, x = pair()
    found = []
    for net in (theirs, ours):
        first, second = net(x), net(x * 2 + 1)
        found.append(torch.autograd.grad(first.square().sum() + second.sum(), [x, *net.parameters()]))
    for i, (got, want) in enumerate(zip(found[1], found[0], strict=True)):
        assert_close(f"gradient {i}", got, want, scale=1.0)


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.block, self.use_reentrant = block, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("drop", [0.0, 0.4])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_round_a_block(use_reentrant: bool, drop: float, mode: str) -> None:
    """Same gradients as without it, with dropout, too; and statistics updated once, not once more in backward."""
    _, plain, x = pair(lambda net: [setattr(layer, "drop_rate", drop) for layer in net.block2.children()])
    wrapped = copy.deepcopy(plain)
    wrapped.block2 = Checkpointed(wrapped.block2, use_reentrant)
    torch.manual_seed(5)
    want = results(plain, x)
    torch.manual_seed(5)
    got = results(wrapped, x)
    assert_same({key.replace("block2.block", "block2"): value for key, value in got.items()}, want)
    assert int(want["block2.denselayer1.norm1.num_batches_tracked"]) == 1


def test_two_threads() -> None:
    """Two models in two threads, and one model in evaluation in two threads."""
    expected, found = [], {}
    nets = [pair(recompute=mode) for mode in MODES]
    for i, (theirs, _, x) in enumerate(nets):
        expected.append(results(theirs, x, i))

    def train(i: int) -> None:
        _, ours, x = nets[i]
        found[i] = results(ours, x, i)

    def evaluate(net: nn.Module, x: Tensor, i: int) -> None:
        found[i] = net(x).detach()

    threads = [threading.Thread(target=train, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert_same(found[i], expected[i])

    theirs, ours, _ = pair(_evaluation)
    inputs = [random_input((2, 3, 9, 6), seed=i).detach() for i in range(2)]
    threads = [threading.Thread(target=evaluate, args=(ours, inputs[i], i)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert_close(f"thread {i}", found[i], theirs(inputs[i]))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context: Callable[[], Any], training: bool) -> None:
    theirs, ours, x = pair(lambda net: net.train(training))
    with context():
        got, want = ours(x), theirs(x)
    assert_close("output", got, want)
    assert not got.requires_grad
    for (name, ours_now), theirs_now in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        assert_close(name, ours_now, theirs_now)


def test_converted_under_inference_mode_and_autocast() -> None:
    """What surrounds ``convert`` does not reach its checks."""
    theirs, _, x = pair()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        ours = fastdense.convert(copy.deepcopy(theirs))
    assert isinstance(ours.block1, Converted)
    assert_same(results(ours, x), results(theirs, x))
    with torch.inference_mode():
        assert isinstance(fastdense.convert(copy.deepcopy(theirs)).block1, Converted)


def _block() -> nn.Module:
    return foreign.StarBlock(3, 6, 4)


def _transition() -> nn.Module:
    return foreign.Transition(6, 4)


def _stem() -> nn.Module:
    stem = foreign.stem(nn.Conv2d(6, 6, 3, padding=1, bias=False))
    return nn.Sequential(*stem, foreign.StarBlock(1, 6, 4), foreign.StarBlock(1, 10, 4))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [_block, _transition, _stem])
def test_autocast_on_the_cpu(make: Callable[[], nn.Module], dtype: torch.dtype, mode: str) -> None:
    """At most twice the error of the original under autocast, against its float64 results."""
    torch.manual_seed(0)
    truth = make().double()
    randomise(truth)
    theirs = copy.deepcopy(truth).float()
    ours = fastdense.convert(copy.deepcopy(theirs), recompute=mode)
    assert isinstance(ours, Converted)
    x = random_input((6, 6, 11, 9)).detach().to(dtype)  # as a convolution before it would hand over

    def cast(block: nn.Module) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype):
                return block(x)

        return forward

    want = results(truth, x.double().requires_grad_())
    got = results(ours, x.clone().requires_grad_(), forward=cast(ours))
    peer = results(theirs, x.clone().requires_grad_(), forward=cast(theirs))
    for name, value in want.items():
        assert got[name].dtype == peer[name].dtype, name
        if value.is_floating_point():
            allowed = 2 * relative_error(peer[name], value) + 4 * torch.finfo(dtype).eps
            assert relative_error(got[name], value) <= allowed, name


def test_memory_is_saved() -> None:
    """The conversion that silently saves nothing would be seen here."""
    torch.manual_seed(0)
    theirs = foreign.StarBlock(12, 24, 12)
    kept = []
    x = torch.randn(4, 24, 16, 16)
    for block in (
        theirs,
        fastdense.convert(copy.deepcopy(theirs)),
        fastdense.convert(copy.deepcopy(theirs), recompute="bottlenecks"),
    ):
        with fastdense.memory.saved_bytes(block, x) as saved:
            block(x)
        kept.append(saved.bytes)
    assert kept[0] > 3 * kept[1] and kept[1] > 3 * kept[2], kept


def test_double_backward_and_transforms_raise() -> None:
    _, ours, x = pair()
    (gradient,) = torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="impl='reference'"):
        gradient.sum().backward()
    with pytest.raises(RuntimeError, match="impl='reference'"):
        torch.func.grad(lambda x: ours(x).sum())(x.detach())
    fastdense.convert(ours, impl="reference")
    (gradient,) = torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)
    gradient.sum().backward()
