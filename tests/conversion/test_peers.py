"""The real torchvision, timm, MONAI and torchxrayvision, converted: same results at 1e-9 in float64."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import peers
from helpers.blocks import assert_close, assert_same, random_input, randomise, results
from torch import Tensor, nn

import fastdense
from fastdense.conversion.converted import KINDS, Converted
from fastdense.conversion.verify import ReplayDropoutMasks

Make = Callable[..., nn.Module]


def _torchvision(name: str) -> Make:
    return lambda **options: getattr(peers.torchvision(), name)(**{"num_classes": 5, **options})


def _timm(name: str) -> Make:
    return lambda **options: getattr(peers.timm(), name)(**{"num_classes": 5, **options})


def _monai(name: str, dims: int) -> Make:
    return lambda **options: getattr(peers.monai(), name)(
        **{"spatial_dims": dims, "in_channels": 2, "out_channels": 5, **options}
    )


def _torchxrayvision(**options: Any) -> nn.Module:
    return peers.torchxrayvision().DenseNet(**options)


IMAGE = (2, 3, 65, 40)

# What the package names, and an odd, non-square input that leaves more than one pixel to the last block.
NAMED: dict[str, tuple[Make, tuple[int, ...]]] = {
    **{f"torchvision {n}": (_torchvision(f"densenet{n}"), IMAGE) for n in (121, 161, 169, 201)},
    **{f"timm {n}": (_timm(f"densenet{n}"), IMAGE) for n in ("121", "161", "169", "201", "blur121d", "264d")},
    **{f"MONAI {n}, 2D": (_monai(f"DenseNet{n}", 2), (2, 2, 65, 40)) for n in (121, 169, 201, 264)},
    **{f"MONAI {n}, 1D": (_monai(f"DenseNet{n}", 1), (3, 2, 101)) for n in (121, 169, 201, 264)},
    **{f"MONAI {n}, 3D": (_monai(f"DenseNet{n}", 3), (3, 2, 29, 31, 30)) for n in (121, 169, 201, 264)},
    "torchxrayvision": (_torchxrayvision, (2, 1, 65, 40)),
}

SLOW = ("timm 264d", "MONAI 264, 3D")

# The same classes, a few layers each.
ALL = Counter(block=2, transition=1, stem=1)
SMALL: dict[str, tuple[Make, tuple[int, ...]]] = {
    "torchvision": (
        lambda **options: peers.torchvision().DenseNet(
            8, (2, 3), 16, num_classes=5, **{"drop_rate": options.pop("drop", 0.0), **options}
        ),
        (2, 3, 37, 22),
    ),
    "timm": (
        lambda **options: peers.timm().DenseNet(
            8, (2, 3), num_classes=5, **{"proj_drop_rate": options.pop("drop", 0.0), **options}
        ),
        (2, 3, 37, 22),
    ),
    **{
        f"MONAI {dims}D": (
            lambda dims=dims, **options: peers.monai().DenseNet(
                dims, 2, 5, 16, 8, (2, 3), **{"dropout_prob": options.pop("drop", 0.0), **options}
            ),
            (3, 2, *((45,), (37, 22), (17, 14, 19))[dims - 1]),
        )
        for dims in (1, 2, 3)
    },
    "torchxrayvision": (
        lambda **options: peers.torchxrayvision().DenseNet(
            8, (2, 3), 16, **{"drop_rate": options.pop("drop", 0.0), **options}
        ),
        (2, 1, 37, 22),
    ),
}


def twins(make: Make, *, options: dict[str, Any] | None = None, **how: Any) -> tuple[nn.Module, nn.Module]:
    """The original in float64 and its conversion."""
    torch.manual_seed(3)
    theirs = make(**options or {}).double()
    randomise(theirs)
    return theirs, fastdense.convert(copy.deepcopy(theirs), **how)


def converted(model: nn.Module) -> dict[str, int]:
    """How many of each kind."""
    return Counter(KINDS[type(module._fastdense)] for module in model.modules() if isinstance(module, Converted))


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in NAMED])
def test_named_networks(name: str) -> None:
    """Outputs and all gradients, statistics after two steps, evaluation."""
    make, shape = NAMED[name]
    theirs, ours = twins(make)
    stems = 0 if "blur" in name else 1  # there, pooling is a module of its own that blurs
    assert converted(ours) == Counter(block=4, transition=3, stem=stems)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = random_input(shape)
    for step in range(2):
        got = results(ours, x, step)
        assert_same(got, results(theirs, x, step))
    assert {int(value) for key, value in got.items() if key.endswith("num_batches_tracked")} == {2}
    assert_close("evaluation", ours.eval()(x.detach()), theirs.eval()(x.detach()))


@pytest.mark.parametrize("mode", ["bottlenecks", "activations"])
@pytest.mark.parametrize("name", SMALL)
def test_small_networks_in_both_modes(name: str, mode: str) -> None:
    make, shape = SMALL[name]
    theirs, ours = twins(make, recompute=mode)
    for step in range(2):
        x = random_input(shape, seed=step)
        assert_same(results(ours, x), results(theirs, x))
    assert_close("evaluation", ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("name", SMALL)
def test_dropout_with_the_same_masks(name: str) -> None:
    """Two blocks, each with a seed of its own: the original is fed the masks that fastdense draws."""
    make, shape = SMALL[name]
    theirs, ours = twins(make, options={"drop": 0.3})
    x = random_input(shape)
    torch.manual_seed(11)
    got = results(ours, x)
    torch.manual_seed(11)
    seeds = [torch.randint(2**63 - 1, (1,)) for _ in range(2)]

    def forward(x: Tensor) -> Tensor:
        masks = ReplayDropoutMasks(seeds[0], [0, 1, 0, 1, 2])
        block2 = dict(theirs.named_modules())["features.denseblock2"]
        handle = block2.register_forward_pre_hook(lambda *_: setattr(masks, "seed", seeds[1]))
        with masks:
            output = theirs(x)
        handle.remove()
        return output

    assert_same(got, results(theirs, x, forward=forward))
    plain = results(ours.eval(), x)["output"]
    assert_close("evaluation", plain, results(theirs.eval(), x)["output"])
    assert not torch.equal(plain, got["output"])


@pytest.mark.parametrize("name", SMALL)
def test_pickle_deepcopy_and_back(name: str) -> None:
    make, shape = SMALL[name]
    theirs, ours = twins(make)
    x = random_input(shape).detach()
    want = theirs.eval()(x)
    again = copy.deepcopy(ours).eval()
    assert converted(again) == converted(ours) == ALL
    assert_close("copy", again(x), want)
    original = fastdense.revert(again)
    assert [type(module) for module in original.modules()] == [type(module) for module in theirs.modules()]
    assert torch.equal(original(x), want)


@pytest.mark.parametrize(
    ("name", "flag"), [("torchvision", "memory_efficient"), ("timm", "memory_efficient"), ("timm", "later")]
)
def test_the_flag_updates_statistics_twice_and_fastdense_once(name: str, flag: str) -> None:
    make, shape = SMALL[name]
    theirs, ours = twins(make, options={} if flag == "later" else {flag: True})
    if flag == "later":
        for model in (theirs, ours):
            model.set_grad_checkpointing(True)
    x = random_input(shape)
    with fastdense.memory.saved_bytes(ours, x) as kept:
        ours(x)
    fastdense.convert(ours, recompute="activations")
    with fastdense.memory.saved_bytes(ours, x) as more:
        ours(x)
    assert kept.bytes < 0.8 * more.bytes, "the flag did not mean recompute='bottlenecks'"

    theirs, ours = twins(make, options={} if flag == "later" else {flag: True})
    if flag == "later":
        theirs.set_grad_checkpointing(True)
        ours.set_grad_checkpointing(True)
    counter = "features.denseblock1.denselayer1.norm1.num_batches_tracked"
    statistics = "features.denseblock1.denselayer1.norm1.running_mean"
    before = theirs.state_dict()[statistics].clone()
    for step in (1, 2):
        got, want = results(ours, x), results(theirs, x)
        assert int(want[counter]) == 2 * step
        assert int(got[counter]) == step
    batch = [(value[statistics] - before * decay) / (1 - decay) for value, decay in ((got, 0.9**2), (want, 0.9**4))]
    assert_close("batch mean", batch[0], batch[1], 1e-6)
    for key in want:
        if key.endswith(".grad"):
            assert_close(key, got[key], want[key], scale=1.0)


def test_timms_blur_pool_transitions_stay() -> None:
    make = _timm("densenetblur121d")
    timm = peers.timm()

    def blurred(**options: Any) -> nn.Module:
        return timm.DenseNet(8, (2, 3), num_classes=5, aa_layer=timm.BlurPool2d, aa_stem_only=False, stem_type="deep")

    theirs, ours = twins(blurred)
    assert converted(ours) == Counter(block=2)
    x = random_input((2, 3, 37, 22))
    assert_same(results(ours, x), results(theirs, x))
    entries = [entry for entry in fastdense.plan(blurred()) if entry.kind == "transition"]
    assert [(entry.action, "avg_pool" in entry.reason) for entry in entries] == [("skip", True)]
    assert isinstance(make(), nn.Module)


@pytest.mark.parametrize(
    ("name", "activations", "bottlenecks"), [("densenet121", 4.6, 12.0), ("densenet201", 6.3, 17.0)]
)
def test_bytes_kept_against_torchvision(name: str, activations: float, bottlenecks: float) -> None:
    """The whole network, fp32, 224 x 224, one image."""
    x = torch.randn(1, 3, 224, 224)
    kept = []
    for mode in (None, "activations", "bottlenecks"):
        model = _torchvision(name)(num_classes=1000)
        if mode is not None:
            fastdense.convert(model, recompute=mode, verify=False)
        with fastdense.memory.saved_bytes(model) as saved:
            model(x)
        kept.append(saved.bytes)
    print(name, [f"{bytes_ / 1e6:.1f} MB" for bytes_ in kept])
    assert kept[0] > activations * kept[1]
    assert kept[0] > bottlenecks * kept[2]


@pytest.mark.parametrize("layout", ["channels_last", "slice"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_frozen_norms_partial_gradients_and_layouts(name: str, frozen: bool, layout: str) -> None:
    """Every second norm in evaluation, every second parameter fixed, inputs of other strides."""
    make, shape = SMALL[name]
    theirs, ours = twins(make, recompute="bottlenecks" if frozen else None)
    for net in (theirs, ours):
        for i, norm in enumerate(m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
            norm.train(not frozen or i % 2 == 1)
        for i, parameter in enumerate(net.parameters()):
            parameter.requires_grad_(not frozen or i % 2 == 1)
    for step in range(2):
        x = random_input(shape, layout=layout, seed=step)
        assert_same(results(ours, x, step), results(theirs, x, step))


def test_timms_deep_stem_ends_like_any_other() -> None:
    def deep(**options: Any) -> nn.Module:
        return peers.timm().DenseNet(8, (2, 3), num_classes=5, stem_type="deep", **options)

    theirs, ours = twins(deep)
    assert converted(ours) == ALL
    x = random_input((2, 3, 37, 22))
    assert_same(results(ours, x), results(theirs, x))


def test_timms_other_interfaces() -> None:
    """Intermediate features, a new classifier, and its own dropout, which belongs to the classifier."""
    theirs, ours = twins(SMALL["timm"][0], options={"drop_rate": 0.5})
    x = random_input((2, 3, 37, 22)).detach()
    for model in (theirs, ours):
        model.eval()
    for got, want in zip(
        ours.forward_intermediates(x, intermediates_only=True),
        theirs.forward_intermediates(x, intermediates_only=True),
        strict=True,
    ):
        assert_close("intermediate", got, want)
    ours.reset_classifier(9)
    assert ours.double()(x).shape == (2, 9)


@pytest.mark.parametrize("activation", ["relu", "silu", "prelu", "identity"])
def test_timms_activations(activation: str) -> None:
    def make(**_: Any) -> nn.Module:
        return peers.timm().DenseNet(8, (2, 3), num_classes=5, act_layer=activation)

    if activation == "relu":
        assert converted(twins(make)[1]) == ALL
        return
    with pytest.warns(UserWarning, match="nothing to convert"):
        theirs, ours = twins(make)
    assert not converted(ours)
    x = random_input((2, 3, 37, 22))
    assert_same(results(ours, x), results(theirs, x), 0.0)


@pytest.mark.parametrize(
    "options", [{"norm": "instance"}, {"norm": ("group", {"num_groups": 2})}, {"act": "prelu"}, {"act": "swish"}]
)
def test_monais_other_norms_and_activations_stay(options: dict[str, Any]) -> None:
    make, shape = SMALL["MONAI 2D"]
    with pytest.warns(UserWarning, match="nothing to convert"):
        theirs, ours = twins(make, options=options)
    assert not converted(ours)
    x = random_input(shape)
    assert_same(results(ours, x), results(theirs, x), 0.0)


class Checkpoint:
    """Stands in for a download of weights with the key names of before 2018 and without counters."""

    def __init__(self, model: nn.Module, layers: str = "") -> None:
        import re

        self.state = {
            re.sub(rf"(denselayer\d+){layers}\.(norm|relu|conv)([12])\.", r"\1.\2.\3.", key): value.clone()
            for key, value in model.state_dict().items()
            if "num_batches_tracked" not in key
        }

    def get_state_dict(self, **_: Any) -> dict[str, Tensor]:
        return dict(self.state)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["torchvision", "timm", "MONAI"])
def test_the_packages_own_loaders(name: str, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape = SMALL["MONAI 2D" if name == "MONAI" else name]
    source = make().double()
    randomise(source, 9)
    old = Checkpoint(source, r"\.layers" if name == "MONAI" else "")
    assert any(".norm.1." in key for key in old.state)
    model = make().double()
    if when == "after":
        fastdense.convert(model)
    if name == "torchvision":
        peers.torchvision().densenet._load_state_dict(model, old, False)
    elif name == "timm":
        model.load_state_dict(peers.timm()._filter_torchvision_pretrained(old.get_state_dict()), strict=True)
    else:
        monai = peers.monai()
        monkeypatch.setattr(monai, "load_state_dict_from_url", lambda *_, **__: old.get_state_dict())
        monai._load_state_dict(model, "densenet121", False)
    if when == "before":
        fastdense.convert(model)
    x = random_input(shape).detach()
    assert_close("output", model.eval()(x), source.eval()(x))


def test_torchxrayvisions_thresholds_and_keys() -> None:
    def make(**options: Any) -> nn.Module:
        return peers.torchxrayvision().DenseNet(8, (2, 3), 16, op_threshs=torch.rand(18), **options)

    theirs, ours = twins(make)
    assert "op_threshs" in ours.state_dict() and list(ours.state_dict()) == list(theirs.state_dict())
    x = random_input((2, 1, 37, 22)).detach().float()  # its thresholds are float32
    assert_close("scores", ours.float().eval()(x), theirs.float().eval()(x), 1e-5)


def test_a_small_network_by_hand() -> None:
    """Stem of one 3x3 convolution and the last norm inside ``features``, around torchvision's own blocks."""
    densenet = peers.torchvision().densenet
    net = nn.Sequential()
    net.add_module("conv0", nn.Conv2d(3, 8, 3, padding=1, bias=False))
    net.add_module("denseblock1", densenet._DenseBlock(3, 8, 2, 4, 0.0))
    net.add_module("norm_final", nn.BatchNorm2d(20))
    theirs = net.double()
    ours = fastdense.convert(copy.deepcopy(theirs))
    x = random_input((2, 3, 9, 7))
    assert_same(results(ours, x), results(theirs, x))
