"""``recompute="auto"``: the plan, that the network obeys it, and that it says what it resolved to."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.blocks import MODES
from torch import nn

import fastdense
from fastdense import memory
from fastdense.backends import select
from fastdense.core import warn
from fastdense.memory import peak_bytes, saved_bytes
from fastdense.recompute import WORKSPACE_BYTES, BlockSize, network_sizes, plan_recompute, planned_bytes

A, B = MODES
PLENTY = 1 << 40

pytestmark = pytest.mark.filterwarnings("ignore:fastdense. recompute")

# m, C, C_l, B_l, bytes of an element
EARLY = BlockSize(1000, 20, (10, 15), (8, 8), 4)
LATE = BlockSize(250, 50, (20, 30, 40), (8, 8, 8), 4)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What ``free_bytes`` answers, and how often it was asked."""
    answer = SimpleNamespace(bytes=PLENTY, asked=0)

    def free_bytes(device: torch.device) -> int:
        answer.asked += 1
        return answer.bytes

    monkeypatch.setattr(memory, "free_bytes", free_bytes)
    monkeypatch.setattr(warn, "_said", set())
    return answer


def small(**named: Any) -> fastdense.DenseNet:
    return fastdense.DenseNet(8, (3, 4, 2), 16, num_classes=5, **{"recompute": "auto", **named})


def resolved(network: nn.Module) -> list[str | None]:
    return [block.resolved_recompute for block in network.modules() if isinstance(block, fastdense.DenseBlock)]


def said(network: Any, x: torch.Tensor) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        network(x)
    return [str(warning.message) for warning in caught if "recompute" in str(warning.message)]


def check_saved(network: nn.Module, x: torch.Tensor, modes: list[str | None]) -> None:
    """``recompute="auto"`` resolves to ``modes``, and a step saves what is planned for them."""
    sizes, also_saved = network_sizes(network, x)
    with saved_bytes(network, x) as found:
        network(x)
    assert resolved(network) == modes
    planned = planned_bytes(list(sizes.values()), [mode for mode in modes if mode], also_saved)[0]
    planned -= sum(parameter.nbytes for parameter in network.parameters() if parameter.requires_grad)
    assert planned <= found.bytes <= 1.03 * planned


def test_sizes_by_hand() -> None:
    """Under autocast elements are half as large."""
    assert EARLY.freed == 1000 * 16 * 4
    assert EARLY.work == 1000 * (10 * 8 + 15 * 8)
    assert EARLY.saved(B) == 1000 * 20 * 4
    assert EARLY.saved(A) == 1000 * 36 * 4
    assert EARLY.scratch(A) == 1000 * (2 * 20 + 10) * 4  # the gradient handed on is wider than a bottleneck
    assert EARLY.scratch(B) == 1000 * (2 * 20 + 10 + 8) * 4
    assert BlockSize(10, 20, (10, 15), (), 2).saved(A) == 10 * 20 * 2
    # Backward begins with the last block: 144,000 + 74,000 are saved, 120,000 are scratch; then 200,000 with 144,000.
    assert planned_bytes([EARLY, LATE], [A, A], 1000) == (1000 + 144_000 + 74_000, 1000 + 344_000 + WORKSPACE_BYTES)
    with torch.autocast("cpu", torch.bfloat16):
        sizes, _ = network_sizes(small(), torch.randn(4, 3, 64, 64))
    assert {size.itemsize for size in sizes.values()} == {2}


def test_the_cheapest_blocks_recompute_first() -> None:
    blocks = [LATE, EARLY]  # the cheap one is the second here: it is no matter of the order
    needs = [planned_bytes(blocks, modes)[1] for modes in ([A, A], [A, B], [B, B])]
    assert needs == sorted(needs, reverse=True) and len(set(needs)) == 3
    assert plan_recompute(blocks, needs[0]) == [A, A]
    assert plan_recompute(blocks, needs[0] - 1) == [A, B]
    assert plan_recompute(blocks, needs[1]) == [A, B]
    assert plan_recompute(blocks, needs[1] - 1) == [B, B]
    assert plan_recompute(blocks, 0) == [B, B]
    assert plan_recompute(blocks, needs[0] + 999, also_saved=1000) == [A, B]
    assert plan_recompute([], 0) == []
    assert plan_recompute([BlockSize(10, 20, (10, 15), (), 4)], 0) == [A], "without bottleneck nothing is recomputed"
    # Taken back where it was unnecessary: the cheap block frees too little; the dear one enough for both.
    cheap, dear = BlockSize(10, 4, (4,), (2,), 4), BlockSize(1000, 50, (40, 45), (20, 20), 4)
    enough = planned_bytes([cheap, dear], [A, B])[1]
    assert planned_bytes([cheap, dear], [B, A])[1] > enough
    assert plan_recompute([cheap, dear], enough) == [A, B]
    # Of two that free the same, the dearer one is taken back.
    dearer, cheaper = (BlockSize(100, 50, (reads,), (20,), 4) for reads in (10, 5))
    largest = BlockSize(1000, 50, (40, 40, 40), (20, 20, 20), 4)
    enough = planned_bytes([dearer, cheaper, largest], [B, A, B])[1]
    assert plan_recompute([dearer, cheaper, largest], enough) == [A, B, B]


def test_the_network_obeys_the_plan(free: Any) -> None:
    network, x = small(), torch.randn(4, 3, 64, 64)
    sizes, also_saved = network_sizes(network, x)
    enough = int(planned_bytes(list(sizes.values()), [B, A, A], also_saved)[1] / 0.9) + 1  # nine tenths are used
    for free.bytes, modes in ((PLENTY, [A, A, A]), (enough, [B, A, A]), (0, [B, B, B]), (PLENTY, [A, A, A])):
        check_saved(network, x, modes)
    network = small()  # of which only the end learns
    learning = ("features.denseblock2.denselayer3", "features.denseblock2.denselayer4", "features.denseblock3")
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith((*learning, "features.transition2", "features.norm5", "classifier")))
    sizes, _ = network_sizes(network, x)
    assert {name: len(size.reads) for name, size in sizes.items()} == {"denseblock2": 2, "denseblock3": 2}
    check_saved(network, x, [None, A, A])


SIZES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "2D": ({}, (3, 3, 75, 53)),
    "small inputs": ({"small_inputs": True}, (4, 3, 17, 18)),
    "3D": ({"spatial_dims": 3}, (2, 3, 41, 38, 35)),
    "1D": ({"spatial_dims": 1}, (4, 3, 999)),
}


@pytest.mark.parametrize("name", SIZES)
def test_planned_is_what_is_saved(name: str, free: Any) -> None:
    options, shape = SIZES[name]
    for free.bytes, mode in ((0, B), (PLENTY, A)):
        check_saved(small(**options), torch.randn(shape), [mode] * 3)


@pytest.mark.parametrize("modes", [[A, A, A, A], [B, A, A, A], [B, B, B, B]], ids=["none", "first", "all"])
def test_planned_is_what_is_measured(modes: list[str], free: Any) -> None:
    """The saved bytes to 1 %; the peak to 3 % and the scratch that no size decides."""
    network, x = fastdense.DenseNet(16, (6, 12, 24, 16), 32, recompute="auto"), torch.randn(8, 3, 224, 224)
    x = x.contiguous(memory_format=torch.channels_last)
    sizes, also_saved = network_sizes(network, x)
    saved, peak = planned_bytes(list(sizes.values()), modes, also_saved)
    free.bytes = 0 if modes == [B] * 4 else int(peak / 0.9) + 1
    with peak_bytes("cpu") as measured:
        with saved_bytes(network, x) as found:
            loss = network(x).square().mean()
        loss.backward()
    assert resolved(network) == modes
    saved -= sum(parameter.nbytes for parameter in network.parameters())
    print(f"saved {found.bytes}, planned {saved}; peak {measured.bytes}, planned {peak}")
    assert abs(saved - found.bytes) <= 0.01 * found.bytes
    assert 0.97 * measured.bytes <= peak <= 1.03 * measured.bytes + WORKSPACE_BYTES


def test_it_says_what_it_resolved_to_once_for_each_choice(free: Any) -> None:
    network, x = small(), torch.randn(2, 3, 32, 32)
    first = said(network, x)
    assert len(first) == 1 and first[0].startswith(
        "fastdense: recompute='auto' resolved to 'activations' for denseblock1, denseblock2, denseblock3: saves "
    )
    assert "1099511.6 MB are free" in first[0]
    assert "recompute='auto' (resolved to 'activations')" in repr(network.features.denseblock2)
    free.bytes -= 1
    assert said(network, torch.randn(3, 3, 32, 32)) == []  # other figures, the same choice
    free.bytes = 0
    (second,) = said(network, x)
    assert "resolved to 'bottlenecks' for denseblock1, denseblock2, denseblock3: " in second
    assert "recompute='auto' (resolved to 'bottlenecks')" in repr(network.features.denseblock2)
    free.bytes = PLENTY
    assert said(network, x) == []


def test_nothing_is_decided_without_gradients(free: Any) -> None:
    network, x = small(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert said(network, x) == []
        assert said(network.features.denseblock1, torch.randn(2, 16, 4, 4)) == []
    assert said(network.requires_grad_(False), x) == []
    assert (free.asked, resolved(network)) == (0, [None] * 3)
    assert "resolved to" not in repr(network)


def test_nothing_is_asked_where_the_device_cannot_answer(free: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a compiler traces or a CUDA graph is captured: bottlenecks, and no word."""
    for capturing in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        assert select.may_query(torch.device("cuda")) is not capturing
    assert select.may_query(torch.device("cpu"))
    monkeypatch.setattr("fastdense.recompute.may_query", lambda device: False)
    network, x = small(), torch.randn(4, 3, 64, 64)
    with saved_bytes(network, x) as found:
        assert said(network, x) == []
    assert (free.asked, resolved(network)) == (0, [None] * 3)
    with saved_bytes(network := small(recompute=B), x) as recomputed:
        network(x)
    assert found.bytes == recomputed.bytes


def test_a_compiled_network_asks_nothing(free: Any) -> None:
    network = fastdense.DenseNet(4, (1, 1), 8, num_classes=5, recompute="auto", impl="torch")
    x = torch.randn(2, 3, 32, 32)
    want = network(x)
    asked, free.bytes = free.asked, 0
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    found: list[torch.Tensor] = []
    assert said(lambda x: found.append(compiled(x)), x) == []
    torch.testing.assert_close(found[0], want)
    assert (free.asked, resolved(network)) == (asked, [A] * 2)


def test_a_block_by_itself_takes_a_quarter(free: Any) -> None:
    block, x = fastdense.DenseBlock(4, 16, 4, 8, recompute="auto"), torch.randn(4, 16, 16, 16, requires_grad=True)
    bottlenecks = 1024 * 4 * 32 * 4
    for free.bytes, mode in ((4 * bottlenecks, A), (4 * bottlenecks - 1, B)):
        with saved_bytes(block, x) as found:
            (message,) = said(block, x)
        assert found.bytes // (1024 * 4) == 16 + 4 * 8 + (128 if mode == A else 0)
        assert message.startswith(f"fastdense: recompute='auto' resolved to {mode!r} for a block by itself: ")
        assert f"{bottlenecks / 1e6:.1f} MB" in message
        assert block.resolved_recompute == mode and f"resolved to {mode!r}" in repr(block)
        assert said(block, x) == []


def test_without_a_plan_blocks_decide_by_themselves(free: Any) -> None:
    """One has a mode of its own; a module is of unknown size; they were converted. The reference decides nothing."""
    network, x = small(), torch.randn(2, 3, 32, 32)
    network.features.denseblock2.recompute = "activations"
    free.bytes = 0
    assert len(said(network, x)) == 1  # the others' common choice, each by itself
    assert resolved(network) == [B, None, B]
    network = small()
    network.features.transition1 = nn.Sequential(network.features.transition1, nn.Upsample(scale_factor=2))
    assert network_sizes(network, x)[0] == {}
    free.bytes = PLENTY
    assert "for a block by itself" in said(network, x)[0]
    blocks = nn.Sequential(fastdense.reference.ConcatDenseBlock(3, 6, 2, 4), nn.Conv2d(18, 6, 1))
    converted = fastdense.convert(blocks, recompute="auto")
    warn._said.clear()
    assert "for a block by itself" in said(converted, torch.randn(2, 6, 8, 8))[0]
    assert said(small(impl="reference"), x) == []
