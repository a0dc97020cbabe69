"""What is refused, by an error that names the value and what is allowed, and what runs the reference path."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.blocks import assert_same, block_pair, random_input, results, says_once, unchanged
from helpers.pooled import KINDS, PARTS, Case, pair, part
from torch import nn
from torch.nn.utils import parametrizations

import fastdense
from fastdense import DenseBlock, DenseLayer, DenseNet, Transition, dense_block
from fastdense.core import warn

pytestmark = pytest.mark.quick

x = torch.zeros(3, 5, 5, 7, dtype=torch.float64)
MEAN = torch.zeros(5, device="meta")
Call = Callable[[Any], Any]
Refusal = tuple[str, Call]


def set_to(path: str, value: Any) -> Call:
    """A call of the module whose attribute ``path`` is another."""
    parent, _, name = path.rpartition(".")
    return lambda module: (setattr(module.get_submodule(parent), name, value), module(x))


def moved(path: str, to: Any) -> Call:
    """A call of the module of which one part is elsewhere, or of another dtype."""
    return lambda module: (module.get_submodule(path).to(to), module(x))


def with_moments(*moments: Any) -> Call:
    def call(module: Any) -> Any:
        if isinstance(module, DenseBlock):
            return dense_block(x, module.values(), moments=moments)
        return module.with_moments(x, moments)

    return call


def moments_of(channels: int, **options: Any) -> Call:
    options = {"dtype": torch.float64, **options}
    return with_moments(torch.zeros(channels, **options), torch.ones(channels, **options))


def layers(*channels_and_bn_size: Any) -> list[nn.Module]:
    return [DenseLayer(channels, 3, bn_size).double() for channels, bn_size in channels_and_bn_size]


# Of everything that takes features. The part in question: the error's message and the call.
ALL: dict[str, Refusal] = {
    "too few channels": (r"5 channels.*\(3, 4, 5, 7\)", lambda m: m(x[:, :4])),
    "one image without a batch": (r"4 dimensions.*\(5, 5, 7\)", lambda m: m(x[0])),
    "rank 5": (r"4 dimensions.*\(3, 5, 5, 7, 1\)", lambda m: m(x[..., None])),
    "rank 0": (r"dimensions.*\(\)", lambda m: m(torch.tensor(1.0))),
    "integers": (r"floating-point.*torch.int64", lambda m: m(x.long())),
    "complex": (r"floating-point.*torch.complex128", lambda m: m(x + 0j)),
    "a list": (r"torch.Tensor, got list", lambda m: m([x])),
    "no pixels": (r"at least one pixel.*\(3, 5, 0, 7\)", lambda m: m(x[:, :, :0])),
    "one value per channel": (r"more than 1 value per channel.*\(1, 5, 1, 1\)", lambda m: m(x[:1, :, :1, :1])),
    "unknown impl": (r"impl.*'reference'.*'cuda'", set_to("impl", "cuda")),
    "triton without kernels": (r"impl='triton' cannot run.*'torch'", set_to("impl", "triton")),
}
MOMENTS: dict[str, Refusal] = {
    "moments of another size": (r"\[5\] .*\[4\]", moments_of(4)),
    "moments of another dtype": (r"float64.*float32", moments_of(5, dtype=torch.float32)),
    "moments elsewhere": (r"'cpu'.*'meta'", moments_of(5, device="meta")),
    "moments that are no pair": (r"pair.*\(mean, var\)", with_moments(torch.zeros(5))),
    "moments that are no tensors": (r"pair.*\(mean, var\)", with_moments(None, None)),
}
BLOCK: dict[str, Refusal] = {
    **MOMENTS,
    "float32 features": (r"float32.*conv1 of layer 0 is torch.float64.*\.to\(\)", lambda b: b(x.float())),
    "one layer half": (r"conv1 of layer 1 is torch.float16", moved("denselayer2.conv1", torch.float16)),
    "one layer elsewhere": (r"'cpu'.*conv1 of layer 1 is on 'meta'", moved("denselayer2.conv1", "meta")),
    "one norm elsewhere": (r"'cpu'.*norm2 of layer 1 is on 'meta'", moved("denselayer2.norm2", "meta")),
    "drop rate set later": (r"drop_rate of layer 1.*got 1.5", set_to("denselayer2.drop_rate", 1.5)),
    "unknown recompute": (r"recompute.*'activations'.*'all'", set_to("recompute", "all")),
    "no layers": (r"at least one layer", lambda b: dense_block(x, [])),
    "layers with and without bottleneck": (r"layer 1 differs", lambda b: dense_block(x, layers((5, 2), (8, None)))),
    "layers that do not chain": (r"layer 1 .*8 channels.*9", lambda b: dense_block(x, layers((5, 2), (9, 2)))),
    "other convolutions": (
        r"layer 1 .*conv1.*and 7",
        set_to("denselayer2.conv1", nn.Conv2d(7, 6, 1, bias=False).double()),
    ),
}
STAGE: dict[str, Refusal] = {
    "rank 2": (r"1 to 3 spatial dimensions.*\(3, 5\)", lambda s: s(x[..., 0, 0])),
    "rank 6": (r"1 to 3 spatial.*\(3, 5, 5, 7, 1, 1\)", lambda s: s(x[..., None, None])),
    "norm elsewhere": (r"'cpu'.*norm's weight is on 'meta'.*\.to\(\)", moved("norm", "meta")),
    "statistics elsewhere": (r"norm's statistics is on 'meta'", set_to("norm.running_mean", MEAN)),
    "x elsewhere": (r"'meta'.*'s weight is on 'cpu'", lambda s: s(x.to("meta"))),
    "another norm": (r"norm is a GroupNorm.*'reference'", set_to("norm", nn.GroupNorm(1, 5))),
}
WINDOWED: dict[str, Refusal] = {
    "too small in one dimension": (r"at least \(.*\) pixels.*\(3, 5, 5, 1\)", lambda s: s(x[..., :1])),
    "sizes for three dimensions": (r"each of 2 dimensions.*\(2, 2, 2\)", set_to("pool.kernel_size", (2, 2, 2))),
}
STEM: dict[str, Refusal] = {
    "no window": (r"positive sizes.*kernel_size=0", set_to("pool.kernel_size", 0)),
    "a stride backwards": (r"positive sizes.*stride=-1", set_to("pool.stride", -1)),
    "padding of more than half": (r"at most half.*padding=2", set_to("pool.padding", 2)),
    "negative padding": (r"at most half.*padding=-1", set_to("pool.padding", -1)),
    "pooling for another rank": (r"3 dimensions, as the pooling reads", set_to("pool", nn.MaxPool1d(2))),
    "indices too": (r"returns indices", set_to("pool.return_indices", True)),
}
OTHER = nn.Conv2d(6, 4, 1, bias=False, dtype=torch.float64), nn.Conv1d(5, 4, 1, bias=False, dtype=torch.float64)
TRANSITION: dict[str, Refusal] = {
    **MOMENTS,
    "conv elsewhere": (r"'cpu'.*conv's weight is on 'meta'", moved("conv", "meta")),
    "half features": (r"float16.*torch.float64.*autocast", lambda s: s(x.half())),
    "conv of other channels": (r"norm's 5 channels.*\(4, 6, 1, 1\)", set_to("conv", OTHER[0])),
    "conv for another rank": (r"3 dimensions, as the conv reads", set_to("conv", OTHER[1])),
    "pooling for another rank": (r"5 dimensions, as the pooling reads", set_to("pool", nn.AvgPool3d(2))),
}
REFUSED = {
    "block": ALL | BLOCK, "basic block": ALL, "stem": ALL | STAGE | WINDOWED | STEM,
    "transition": ALL | STAGE | WINDOWED | TRANSITION, "head": ALL | STAGE | MOMENTS,
}  # fmt: skip
KIND_OF_ERROR = {"a list": TypeError}
KIND_OF_ERROR |= dict.fromkeys(("triton without kernels", "another norm", "indices too"), RuntimeError)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, calls in REFUSED.items() for name in calls])
def test_a_bad_call_is_refused_and_changes_nothing(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    message, call = REFUSED[kind][name]
    if kind in ("stem", "transition") and name == "one value per channel":
        message = "at least .* pixels"  # windows of several do not fit
    _, module, _ = part(kind, **({"drop_rate": 0.1} if "block" in kind else {}))
    rng = torch.get_rng_state()
    with unchanged(module), pytest.raises(KIND_OF_ERROR.get(name, ValueError), match=message):
        call(module)
    assert torch.equal(rng, torch.get_rng_state()) or "layers" in name  # building new layers draws their weights


BLOCK_ARGUMENTS = {"num_layers": 2, "num_input_features": 6, "bn_size": 4, "growth_rate": 4}
CONSTRUCTORS: list[tuple[Callable[..., Any], dict[str, Any], list[tuple[str, Any]]]] = [
    (DenseBlock, BLOCK_ARGUMENTS, [
        ("num_layers", 0), ("num_layers", 2.0), ("num_input_features", -1), ("bn_size", 0), ("growth_rate", None),
        ("drop_rate", 1.5), ("drop_rate", float("nan")), ("recompute", "all"), ("impl", "Triton"), ("spatial_dims", 4),
    ]),
    (fastdense.reference.ConcatDenseBlock, BLOCK_ARGUMENTS, [("growth_rate", 0)]),
    (Transition, {"num_input_features": 6, "num_output_features": 3}, [("num_output_features", 0), ("impl", "fast")]),
    (DenseNet, {}, [("block_config", ()), ("num_classes", 0), ("in_channels", 0), ("spatial_dims", 0)]),
]  # fmt: skip
ALLOWED = {
    "drop_rate": "between 0 and 1", "recompute": "'activations'", "impl": "'triton'", "spatial_dims": "one of 1, 2, 3",
    "block_config": "",
}  # fmt: skip


@pytest.mark.parametrize(
    ("build", "arguments", "name", "value"), [(b, known, *wrong) for b, known, pairs in CONSTRUCTORS for wrong in pairs]
)
def test_a_constructor_refuses(build: Callable[..., Any], arguments: dict[str, Any], name: str, value: Any) -> None:
    allowed = ALLOWED.get(name, "positive integer")
    with pytest.raises(ValueError, match=f"{name}.*{allowed}.*got {re.escape(repr(value))}"):
        build(**{**arguments, name: value})


def test_constructors_refuse_what_contradicts_itself_or_is_empty() -> None:
    with pytest.raises(ValueError, match=r"memory_efficient=True.*recompute='activations'"):
        DenseBlock(2, 6, 4, 4, memory_efficient=True, recompute="activations")
    with pytest.raises(ValueError, match=r"num_layers.*got 0"):
        DenseNet(block_config=(2, 0))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [*PARTS, "stem 1D", "stem 3D", "transition 1D", "transition 3D", "head 1D", "head 3D"])
def test_an_empty_batch_does_what_the_reference_does(name: str, training: bool) -> None:
    reference, fast, x = part(name, change=lambda module: module.train(training))
    empty = x.detach()[:0].requires_grad_()
    assert_same(results(fast, empty), results(reference, empty))


@pytest.mark.parametrize("kind", KINDS)
def test_one_value_per_channel_is_refused_in_training_only(kind: str) -> None:
    """As by F.batch_norm."""
    reference, fast = pair(Case(kind, (1, 5, 1), 3, 2, 1) if kind == "stem" else Case(kind, (1, 5, 1, 1), 1))
    x = random_input((1, 5, 1) if kind == "stem" else (1, 5, 1, 1))
    for stage in (reference, fast):
        with pytest.raises(ValueError, match=r"more than 1 value per channel.*[(\[]1, 5, 1"):
            stage(x)
    assert int(fast.norm.num_batches_tracked) == 0
    reference.norm.num_batches_tracked.zero_()  # PyTorch has counted the batch that it refused
    assert_same(results(fast.eval(), x), results(reference.eval(), x))


@pytest.mark.parametrize("name", PARTS)
def test_everything_on_meta_has_the_shape(name: str) -> None:
    reference, fast, _ = part(name)
    assert fast.to("meta")(x.to("meta")).shape == reference(x).shape


@pytest.mark.parametrize("name", PARTS)
def test_the_environment_chooses_the_implementation_unless_the_module_does(name: str, monkeypatch: Any) -> None:
    _, fast, x = part(name, impl="auto")
    monkeypatch.setenv("FASTDENSE_IMPL", "cudnn")
    with pytest.raises(ValueError, match=r"FASTDENSE_IMPL.*'cudnn'"):
        fast(x)

    def saved(chosen: str, environment: str) -> int:
        monkeypatch.setenv("FASTDENSE_IMPL", environment)
        fast.impl = chosen
        with fastdense.memory.saved_bytes(fast) as found:
            fast(x)
        return found.bytes

    assert saved("auto", "reference") == saved("reference", "torch")
    assert saved("auto", "torch") == saved("torch", "reference") < saved("auto", "reference")


def test_modules_of_a_network_refuse_as_well() -> None:
    with pytest.raises(ValueError, match=r"5 channels.*\(3, 4, 5, 7\)"):
        fastdense.Transition(5, 4, dtype=torch.float64)(x[:, :4])
    net = fastdense.DenseNet(4, (1,), 6, num_classes=2)
    with pytest.raises(ValueError, match=r"more than 1 value.*\(1, 6, 1, 1\)"):
        net(torch.zeros(1, 3, 1, 1))
    with unchanged(net), pytest.raises(RuntimeError, match="expected input"):
        net(torch.zeros(2, 4, 32, 32))


def new_conv2(**options: Any) -> Callable[[nn.Module], None]:
    def change(block: nn.Module) -> None:
        torch.manual_seed(2)
        block["denselayer1"].conv2 = nn.Conv2d(16, 4, 3, padding=1, dtype=torch.float64, **options)

    return change


class Louder(fastdense.DenseLayer):
    def forward(self, features: Any) -> torch.Tensor:
        return super().forward(features) * 2


# What it is, and what the warning says of it.
UNKNOWN: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "hook": (
        "hook", lambda b: b["denselayer2"].conv1.register_forward_hook(lambda module, inputs, output: output * 2)
    ),
    "pre-hook": (
        "hook", lambda b: b["denselayer1"].norm2.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    ),
    "backward hook": (
        "hook", lambda b: b["denselayer2"].conv2.register_full_backward_hook(lambda module, grads, _: (grads[0] * 3,))
    ),
    "layer's hook": ("hook", lambda b: b["denselayer2"].register_forward_hook(lambda module, inputs, output: -output)),
    "parametrization": ("Parametrized", lambda b: parametrizations.weight_norm(b["denselayer2"].conv2)),
    "activation": ("PReLU", lambda b: setattr(b["denselayer1"], "relu2", nn.PReLU(init=0.3, dtype=torch.float64))),
    "norm": ("GroupNorm", lambda b: setattr(b["denselayer1"], "norm1", nn.GroupNorm(2, 6, dtype=torch.float64))),
    "bias": ("bias", new_conv2()),
    "groups": ("groups", new_conv2(groups=2, bias=False)),
    "padding": ("reflect", new_conv2(padding_mode="reflect", bias=False)),
    "own forward": ("forward of its own", lambda b: setattr(b["denselayer1"].relu1, "forward", torch.sigmoid)),
    "class of a layer": ("Louder", lambda b: setattr(b["denselayer1"], "__class__", Louder)),
    "dropout of some layers": ("drops whole channels", lambda b: setattr(b["denselayer2"], "drop_channels", True)),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_unknown_runs_the_reference_path_and_says_so_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warn, "_said", set())
    reason, change = UNKNOWN[name]
    reference, fast = block_pair(2, 6, 4, 4)
    for block in (reference, fast):
        change(block)
    x = random_input((2, 6, 4, 4))
    assert_same(says_once(fast, x, lambda: results(fast, x), f"reference path.*{reason}"), results(reference, x))
    fast.impl = "torch"
    with pytest.raises(RuntimeError, match=rf"impl='torch' cannot run this block.*{reason}.*impl='reference'"):
        fast(x)


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook"])
def test_global_hooks_are_respected(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warn, "_said", set())
    _, fast = block_pair(2, 6, 4, 4)
    seen = []
    register = getattr(nn.modules.module, f"register_module_{kind}")
    hook = register(lambda module, *_: seen.append(type(module).__name__))
    with hook, pytest.warns(UserWarning, match="global module hook"):
        fast(random_input((2, 6, 4, 4)))
    assert seen.count("Conv2d") == 4
