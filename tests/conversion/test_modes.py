"""Converted networks in the ways that people train: frozen norms, partial gradients, accumulation, checkpoints."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers import foreign
from helpers.blocks import assert_close, assert_same, random_input, randomise, relative_error, results
from helpers.converted import BLOCKS, kinds, pair, twins
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastdense

pytestmark = pytest.mark.quick

Change = Callable[[Any], Any]
MODES = ("activations", "bottlenecks")


def norms(change: Callable[[int, Any], Any]) -> Change:
    return lambda net: [change(i, m) for i, m in enumerate(m for m in net.modules() if isinstance(m, nn.BatchNorm2d))]


def other_norms(**options: Any) -> Change:
    def change(net: nn.Module) -> None:
        for parent in list(net.modules()):
            for name, child in list(parent._modules.items()):
                if isinstance(child, nn.BatchNorm2d):
                    setattr(parent, name, nn.BatchNorm2d(child.num_features, dtype=torch.float64, **options))

    return change


def only(path: str) -> Change:
    return lambda net: (net.requires_grad_(False), net.get_submodule(path).requires_grad_(True))


def _other_momenta_and_eps(i: int, norm: Any) -> None:
    norm.momentum, norm.eps = (0.1, 0.7, None)[i % 3], (1e-5, 1e-2, 1e-3)[i % 3]


CHANGES: dict[str, Change] = {
    "all norms frozen": norms(lambda i, norm: norm.eval()),
    "some norms frozen": norms(lambda i, norm: norm.train(i % 3 == 0)),
    "norms frozen, without gradients": norms(lambda i, norm: norm.eval().requires_grad_(False)),
    "cumulative statistics": norms(lambda i, norm: setattr(norm, "momentum", None)),
    "other momenta and eps": norms(_other_momenta_and_eps),
    "no statistics": other_norms(track_running_stats=False),
    "not affine": other_norms(affine=False),
    "evaluation": lambda net: net.eval(),
    "no statistics, evaluation": lambda net: (other_norms(track_running_stats=False)(net), net.eval()),
    "only the classifier learns": only("classifier"),
    "only the second block learns": only("block2"),
    "only one convolution learns": only("block1.denselayer2.conv1"),
    "only the stem's norm learns": only("stem.1"),
    "every second parameter learns": lambda net: [p.requires_grad_(i % 2 == 0) for i, p in enumerate(net.parameters())],
}


@pytest.mark.parametrize("name", CHANGES)
def test_training_modes_from_before_the_conversion_and_after_it(name: str) -> None:
    for mode in MODES:
        theirs, ours, x = pair("pooled", recompute=mode)
        CHANGES[name](theirs), CHANGES[name](ours)
        if mode == "activations":
            ours = fastdense.convert(copy.deepcopy(theirs), recompute=mode)
        assert kinds(ours) == {"stem": "stem", **BLOCKS}
        for step in range(2):
            x = random_input(x.shape, seed=step)
            assert_same(results(ours, x, step), results(theirs, x, step))


def test_gradients_accumulate_over_forward_passes_before_a_backward() -> None:
    """The buffer belongs to one call: nothing that backward needs is overwritten by the next."""
    theirs, ours, x = pair("pooled")
    for net in (theirs, ours):
        first, second = net(x.detach()), net(x.detach() * 2 + 1)
        (first.square().sum() + second.sum()).backward()
        net(x.detach() * 3).square().sum().backward()
    for (name, got), want in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_close(name, got.grad, want.grad, scale=1.0)


class Checkpointed(nn.Module):
    def __init__(self, part: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.part, self.use_reentrant = part, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.part, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize(("style", "part", "drop"), [
    ("pooled", "block2", 0.0), ("pooled", "block2", 0.4), ("stem", "features", 0.0)
], ids=["block", "dropout", "stem"])  # fmt: skip
def test_checkpoint_round_a_part(style: str, part: str, drop: float, use_reentrant: bool, mode: str) -> None:
    """Same gradients as without it, with dropout, too; and statistics updated once, not once more in backward."""
    _, plain, x = pair(style, recompute=mode)
    if style == "stem":
        plain.features.norm5 = nn.BatchNorm2d(17, track_running_stats=False).double()  # PyTorch's would count each call
    for module in plain.get_submodule(part).modules():
        if hasattr(module, "drop_rate"):
            module.drop_rate = drop
    wrapped = copy.deepcopy(plain)
    setattr(wrapped, part, Checkpointed(wrapped.get_submodule(part), use_reentrant))
    torch.manual_seed(5)
    want = results(plain, x)
    torch.manual_seed(5)
    got = results(wrapped, x)
    assert_same({key.replace(f"{part}.part", part): value for key, value in got.items()}, want)
    assert {int(value) for key, value in want.items() if key.endswith("num_batches_tracked")} == {1}


def test_two_threads_do_not_disturb_each_other() -> None:
    """Two models that learn, and one in evaluation."""
    nets = [pair("pooled", recompute=mode) for mode in MODES]
    theirs, ours, x = pair("pooled")
    theirs.eval(), ours.eval()
    inputs = [random_input(x.shape, seed=i).detach() for i in range(2)]
    with ThreadPoolExecutor(2) as pool:
        trained = list(pool.map(lambda i: results(nets[i][1], nets[i][2], i), range(2)))
        evaluated = list(pool.map(lambda x: ours(x).detach(), inputs))
    for i, (original, _, x) in enumerate(nets):
        assert_same(trained[i], results(original, x, i))
        assert_close(f"thread {i}", evaluated[i], theirs(inputs[i]))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context: Callable[[], Any], training: bool) -> None:
    theirs, ours, x = pair("pooled")
    theirs.train(training), ours.train(training)
    with context():
        got, want = ours(x), theirs(x)
    assert_close("output", got, want)
    assert not got.requires_grad
    for (name, ours_now), theirs_now in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        assert_close(name, ours_now, theirs_now)


def test_converted_under_inference_mode_and_autocast() -> None:
    """What surrounds ``convert`` does not reach its checks."""
    theirs, _, x = pair("pooled")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        ours = fastdense.convert(copy.deepcopy(theirs))
    with torch.inference_mode():
        assert kinds(fastdense.convert(copy.deepcopy(theirs))) == kinds(ours) == {"stem": "stem", **BLOCKS}
    assert_same(results(ours, x), results(theirs, x))


def _stem() -> nn.Module:
    stem = foreign.stem(nn.Conv2d(6, 6, 3, padding=1, bias=False))
    return nn.Sequential(*stem, foreign.StarBlock(1, 6, 4), foreign.StarBlock(1, 10, 4))


PARTS = {"block": lambda: foreign.StarBlock(3, 6, 4), "transition": lambda: foreign.Transition(6, 4), "stem": _stem}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("part", PARTS)
def test_autocast_on_the_cpu(part: str, dtype: torch.dtype, mode: str) -> None:
    """At most twice the error of the original under autocast, against its float64 results."""
    truth = PARTS[part]().double()
    randomise(truth)
    theirs = copy.deepcopy(truth).float()
    ours = fastdense.convert(copy.deepcopy(theirs), recompute=mode)
    assert kinds(ours)[""] == part
    x = random_input((6, 6, 11, 9)).detach().to(dtype)  # as a convolution before it would hand over
    found = []
    for net in (ours, theirs):

        def forward(x: Tensor, net: nn.Module = net) -> Tensor:
            with torch.autocast("cpu", dtype):
                return net(x)

        found.append(results(net, x.clone().requires_grad_(), forward=forward))
    got, peer = found
    for name, value in results(truth, x.double().requires_grad_()).items():
        assert got[name].dtype == peer[name].dtype, name
        if value.is_floating_point():
            allowed = 2 * relative_error(peer[name], value) + 4 * torch.finfo(dtype).eps
            assert relative_error(got[name], value) <= allowed, name


@pytest.mark.parametrize("style", ["pooled", "stem alone"])
def test_double_backward_and_transforms_raise_and_the_reference_takes_them(style: str) -> None:
    if style == "pooled":
        _, ours, x = pair(style)
    else:
        ours, x = fastdense.convert(_stem().double()), random_input((2, 6, 9, 6))
        del ours[4:]
        assert kinds(ours) == {"": "stem"}
    (gradient,) = torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="impl='reference'"):
        gradient.sum().backward()
    with pytest.raises(RuntimeError, match="impl='reference'"):
        torch.func.grad(lambda x: ours(x).sum())(x.detach())
    fastdense.convert(ours, impl="reference")
    (gradient,) = torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)
    gradient.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_relu_in_place_after_a_block_is_refused() -> None:
    """The block needs its output in backward: never a wrong gradient."""
    theirs, ours = twins(nn.Sequential(foreign.ListBlock(2, 6, 4), nn.ReLU(inplace=True), nn.Conv2d(14, 3, 1)).double())
    assert kinds(ours) == {"0": "block"}
    x = random_input((2, 6, 5, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        results(ours, x)
    with torch.no_grad():
        ours.load_state_dict(theirs.state_dict())
        assert_close("evaluation", ours.eval()(x), theirs.eval()(x))
