"""The providers of the benchmarks: equal weights, equal results, and a reason where one cannot run."""

from __future__ import annotations

import pytest
import torch
from helpers import peers

from benchmarks.harness import providers
from benchmarks.harness.providers import PROVIDERS, NetworkSpec, Unavailable

CPU = torch.device("cpu")
SMALL = NetworkSpec(4, (2, 3), 8, 5)
RUN_HERE = [name for name, provider in PROVIDERS.items() if provider.compile_mode is None and "triton" not in name]


def _step(name: str, spec: NetworkSpec, size: int) -> list[torch.Tensor]:
    torch.manual_seed(3)
    model = PROVIDERS[name].build(spec).double()
    generator = torch.Generator().manual_seed(1)
    scores = model(torch.randn(2, 3, size, size, generator=generator).double())
    scores.backward(torch.randn(scores.shape, generator=generator).double())
    return [scores.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("small_inputs", [False, True], ids=["ImageNet's stem", "CIFAR's stem"])
@pytest.mark.parametrize("name", RUN_HERE)
def test_providers_agree(name: str, small_inputs: bool) -> None:
    peers.torchvision()
    spec = NetworkSpec(4, (2, 3), 8, 5, small_inputs=small_inputs)
    size = 12 if small_inputs else 40
    for got, want in zip(_step(name, spec, size), _step("torchvision", spec, size), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


def test_weights_come_from_the_seed() -> None:
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(PROVIDERS["fastdense-activations"].build(SMALL).state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not torch.equal(weights[0]["features.conv0.weight"], weights[2]["features.conv0.weight"])


def test_the_schemes_save_less() -> None:
    peers.torchvision()
    from fastdense.memory import saved_bytes

    spec, x = providers.cifar(40), torch.randn(2, 3, 32, 32)
    saved = {}
    for name in ("torchvision", "efficient-densenet", "fastdense-activations", "fastdense-bottlenecks"):
        model = PROVIDERS[name].build(spec)
        with saved_bytes(model, x) as found:
            model(x)
        saved[name] = found.bytes
    assert list(saved.values()) == sorted(saved.values(), reverse=True)
    assert len(set(saved.values())) == len(saved)


def test_depth_is_counted_as_the_papers_do() -> None:
    assert [providers.MODELS[f"densenet{n}"].depth for n in (121, 161, 169, 201)] == [121, 161, 169, 201]
    assert [providers.cifar(depth).depth for depth in (40, 100, 190)] == [40, 100, 190]
    with pytest.raises(ValueError, match="6\\*n \\+ 4"):
        providers.cifar(41)


def _fails() -> None:
    raise RuntimeError("no compiler")


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", _fails)
    with pytest.raises(Unavailable, match="needs a C"):
        PROVIDERS["compile"].require(CPU)
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: None)
    for name in ("torchvision", "memory-efficient", "convert"):
        with pytest.raises(Unavailable, match="torchvision is not installed"):
            PROVIDERS[name].require(CPU)
        with pytest.raises(Unavailable, match="torchvision is not installed"):
            PROVIDERS[name].build(SMALL)
    PROVIDERS["efficient-densenet"].require(CPU)
