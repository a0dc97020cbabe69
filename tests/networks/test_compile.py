"""``torch.compile(fullgraph=True)``: whole networks in one graph, for any batch size, with eager's results."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import networks
from helpers.blocks import assert_same, block_pair, random_input, results, setting
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from fastdense.backends import select
from fastdense.core import warn


@pytest.fixture(autouse=True)
def _nothing_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    warn._said.clear()
    yield
    torch._dynamo.reset()


def cross_entropy(net: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(net(x), target)


def compiled(function: Callable[..., Any], backend: str = "aot_eager", **options: Any) -> Any:
    """The function in one graph or not at all."""
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def compilations() -> int:
    """Graphs compiled in this test."""
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_a_training_step_for_any_batch_size(name: str) -> None:
    """One compilation serves two batch sizes, and the running statistics go on from step to step."""
    reference, fast = networks.network(name)
    loss = compiled(cross_entropy)

    def marked(net: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(target, 0)
        return loss(net, x, target)

    for batch in (2, 3):
        x = networks.images(name, batch, seed=batch)
        assert_same(networks.step(fast, x, marked), networks.step(reference, x, cross_entropy))
    assert compilations() == 1


def test_a_training_step_of_any_size_with_dropout() -> None:
    """``dynamic=True``: batch, height and width, dropout whose masks torch's generator decides, both ways to save."""

    def save_less(net: Any) -> None:
        net.features.denseblock2.recompute = "bottlenecks"

    options = {"change": save_less, "drop_rate": 0.3, "dtype": torch.float64}
    (_, eager), (_, fast) = networks.own(**options), networks.own(**options)
    loss = compiled(cross_entropy, dynamic=True)
    losses = []
    for seed, shape in enumerate([(2, 3, 37, 44), (3, 3, 40, 35), (3, 3, 40, 35)]):
        x = random_input(shape)
        got, want = (networks.step(net, x, run, seed) for net, run in ((fast, loss), (eager, cross_entropy)))
        assert_same(got, want)
        losses.append(got["loss"])
    assert not torch.equal(losses[1], losses[2])  # another seed, another mask
    assert compilations() == 1


def test_training_and_evaluation_compile_once_each() -> None:
    reference, fast = networks.network("own")
    run = compiled(fast)
    x = networks.images("own")
    for training in (True, False, True, False):
        for net in (reference, fast):
            net.train(training)
        assert_same(results(fast, x, forward=lambda x: run(x)), results(reference, x))
    assert compilations() == 2


@pytest.mark.parametrize("part", ["denseblock1", "transition1"])
def test_a_block_or_a_transition_alone(part: str) -> None:
    """With the cumulative average (``momentum=None``), whose weight is a tensor: no number leaves the graph."""
    nets = networks.own(setting("momentum", 0.1, None), dtype=torch.float64)
    reference, fast = (net.features.get_submodule(part) for net in nets)
    run = compiled(fast, dynamic=True)
    for batch in (2, 3, 4):
        x = random_input((batch, 8 if part == "denseblock1" else 16, 8, 7), seed=batch)
        assert_same(results(fast, x, forward=lambda x: run(x)), results(reference, x))
    assert compilations() == 1


def test_parts_compiled_where_they_stand() -> None:
    """``module.compile()`` on blocks and transitions: the network calls them instead of reading them."""
    reference, fast = networks.network("own")
    for name in ("denseblock1", "transition1", "denseblock2"):
        fast.features.get_submodule(name).compile(backend="aot_eager", fullgraph=True)
    x = networks.images("own")
    assert_same(results(fast, x), results(reference, x))
    assert compilations() == 3


def test_checkpoint_in_a_compiled_function() -> None:
    """Statistics are updated once, not once more in the recomputation."""
    reference, fast = (net.features.denseblock1 for net in networks.network("own"))
    run = compiled(lambda x: checkpoint(fast, x, use_reentrant=False))
    x = random_input((2, 8, 5, 6))
    assert_same(results(fast, x, forward=lambda x: run(x)), results(reference, x))


def test_autocast_in_a_compiled_function() -> None:
    """The same roundings as in eager."""
    (_, eager), (_, fast) = (networks.network("own", torch.float32) for _ in range(2))
    x = networks.images("own", dtype=torch.float32)

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net(x)

    run = compiled(forward)
    got, want = results(fast, x, forward=partial(run, fast)), results(eager, x, forward=partial(forward, eager))
    assert got["output"].dtype == torch.bfloat16
    assert_same(got, want)


@pytest.mark.parametrize("name", ["own", "torchvision"])
def test_what_falls_back_says_so_while_it_is_traced(name: str) -> None:
    """A hook on a child sends its block to the reference path: still one graph, and not in silence."""
    _, fast = networks.network(name)
    block = fast.features.denseblock1
    block.denselayer1.conv1.register_forward_hook(lambda module, inputs, output: output * 2)
    x = random_input((2, 8, 5, 6)).detach()
    run = compiled(block.eval())
    with networks.heard() as said:
        got = run(x)
    assert len(said) == 1 and "'conv1' carries a hook" in said[0]
    assert torch.equal(got, block(x))


@pytest.mark.parametrize("failure", [None, "all wrong"])
def test_kernels_are_tried_while_they_are_traced(monkeypatch: pytest.MonkeyPatch, failure: str | None) -> None:
    """On a GPU, ``impl="auto"`` relies on the kernels in a compiled model, too, only after their self-test."""
    monkeypatch.setattr(select, "explain", lambda device, dtype=None: ("triton", "so that it can be tested"))
    tried: list[tuple[Any, ...]] = []
    monkeypatch.setattr(select, "self_test_failure", lambda *arguments: tried.append(arguments) or failure)
    _, fast = block_pair(1, 6, 4, 4, dtype=torch.float32)
    x = random_input((2, 6, 5, 4), dtype=torch.float32)
    names: list[str] = []
    create = select.create
    monkeypatch.setattr(select, "create", lambda name, x: names.append(name) or create(name, x))
    run = compiled(fast)
    with networks.heard() as said:
        got = results(fast, x, forward=lambda x: run(x))
    assert tried == [("triton", torch.device("cpu"), torch.float32)]
    assert names == ["torch" if failure else "triton"] * 2  # forward and backward
    assert len(said) == bool(failure)
    _, eager = block_pair(1, 6, 4, 4, dtype=torch.float32, impl="torch")
    assert_same(got, results(eager, x), tolerance=1e-4)


def test_inductor_trains_in_one_graph_of_any_batch_size() -> None:
    """A training step, all sizes dynamic: what inductor makes of the rest of a network fits the operators.

    Of a new height or width it compiles another graph: its own backward pass of the stem's convolution fixes them.
    """
    reference, fast = networks.own(dtype=torch.float64, block_config=(1,))
    loss = compiled(cross_entropy, "inductor", dynamic=True)
    for batch in (2, 3):
        x = networks.images("own", batch)
        assert_same(networks.step(fast, x, loss), networks.step(reference, x, cross_entropy))
    assert compilations() == 1
