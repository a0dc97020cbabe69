"""The real torchvision, timm, MONAI and torchxrayvision, converted: same results at 1e-9 in float64."""

import contextlib
import copy
import functools
import inspect
import re
from collections import Counter
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import peers
from helpers.blocks import assert_close, assert_same, random_input, randomise, results
from helpers.converted import kinds, twins, types
from torch import Tensor, nn

import fastdense
from fastdense.conversion.verify import ReplayDropoutMasks

LAYERS = {"161": (6, 12, 36, 24), "169": (6, 12, 32, 32), "201": (6, 12, 48, 32), "264": (6, 12, 64, 48)}
MONAI = ("MONAI 1D", "MONAI 2D", "MONAI 3D")
# What a package calls the smallest of its networks, and the larger ones.
SMALLEST = [
    ("torchvision", "densenet121"), ("timm", "densenet121"), ("timm", "densenetblur121d"),
    ("torchxrayvision", "DenseNet"), *((family, "DenseNet121") for family in MONAI),
]  # fmt: skip
LARGER = [
    *(("torchvision", f"densenet{n}") for n in (161, 169, 201)),
    *(("timm", f"densenet{n}") for n in ("161", "169", "201", "264d")),
    *((family, f"DenseNet{n}") for n in (169, 201, 264) for family in MONAI),
]
WITH_FEW_LAYERS = [
    ("torchvision", "densenet161"), ("timm", "densenet161"), ("timm", "densenet264d"), ("timm", "densenetblur121d"),
    ("torchxrayvision", "DenseNet"), *((family, "DenseNet121") for family in MONAI),
]  # fmt: skip
# Odd, not square, and the smallest that leave the last block two pixels: of fewer values derivatives cancel.
SHAPES = {
    "torchxrayvision": (2, 1, 61, 29),
    "MONAI 1D": (3, 2, 101), "MONAI 2D": (2, 2, 61, 29), "MONAI 3D": (3, 2, 29, 31, 65),
}  # fmt: skip
SMALL_SHAPES = {
    "torchvision": (2, 3, 37, 22), "timm": (2, 3, 37, 22), "torchxrayvision": (2, 1, 37, 22),
    "MONAI 1D": (3, 2, 45), "MONAI 2D": (3, 2, 37, 22), "MONAI 3D": (3, 2, 17, 14, 19),
}  # fmt: skip
SMALL = tuple(SMALL_SHAPES)
FIRST_WIDTH = {"torchvision": "num_init_features", "torchxrayvision": "num_init_features", "MONAI": "init_features"}
DROPOUT = {"timm": "proj_drop_rate", "MONAI": "dropout_prob"}
ALL = Counter(block=2, transition=1, stem=1)


def package(family: str) -> Any:
    return getattr(peers, family.split()[0].lower())()


def make(family: str, name: str = "DenseNet", **options: Any) -> Any:
    if "MONAI" in family:
        options = {"spatial_dims": int(family[-2]), "in_channels": 2, "out_channels": 5, **options}
    elif family != "torchxrayvision":
        options = {"num_classes": 5, **options}
    return getattr(package(family), name)(**options)


def small(family: str, **options: Any) -> Any:
    """The class of the named networks, a few layers each, in float64."""
    width = FIRST_WIDTH.get(family.split()[0])
    options = {"growth_rate": 8, "block_config": (2, 3), **({width: 16} if width else {}), **options}
    return make(family, **options).double()


def image(family: str, **options: Any) -> Tensor:
    return random_input(SMALL_SHAPES[family], **options)


@functools.cache
def _made(family: str) -> tuple[Any, Any]:
    return twins(small(family))


def pair(family: str) -> tuple[Any, Any]:
    """A small network and its converted copy."""
    return copy.deepcopy(_made(family))


def converted(model: nn.Module) -> Counter[str]:
    return Counter(kinds(model).values())


@contextlib.contextmanager
def few_layers(network: type) -> Any:
    """Whatever is asked for, blocks of one and two layers."""
    original = network.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(original).bind(self, *args, **kwargs)
        bound.arguments["block_config"] = (2, 1, 1, 2)
        original(*bound.args, **bound.kwargs)

    with mock.patch.object(network, "__init__", init):
        yield


def whole(name: str) -> Counter[str]:
    stems = {} if "blur" in name else {"stem": 1}  # there, pooling is a module of its own that blurs
    return Counter(block=4, transition=3, **stems)


def same_as_the_original(family: str, name: str, net: nn.Module, verify: bool = True) -> None:
    """Outputs and all gradients, statistics after two steps, evaluation."""
    theirs, ours = twins(net.double(), verify=verify)
    assert converted(ours) == whole(name)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = random_input(SHAPES.get(family, (2, 3, 61, 29)))
    for step in range(2):
        got = results(ours, x, step)
        assert_same(got, results(theirs, x, step))
    assert {int(value) for key, value in got.items() if key.endswith("num_batches_tracked")} == {2}
    assert_close("evaluation", ours.eval()(x.detach()), theirs.eval()(x.detach()))


@pytest.mark.parametrize(("family", "name"), SMALLEST[:2])
def test_the_smallest_named_networks_are_the_same(family: str, name: str) -> None:
    """``verify`` compares each block once more, which takes longer than all the rest: here with one package's alone."""
    same_as_the_original(family, name, make(family, name), verify=family == "torchvision")


@pytest.mark.minutes
@pytest.mark.parametrize(("family", "name"), [*SMALLEST[1:], *LARGER])
def test_all_named_networks_are_the_same(family: str, name: str) -> None:
    same_as_the_original(family, name, make(family, name))


@pytest.mark.parametrize(("family", "name"), [*LARGER[:3], ("timm", "densenet264d"), ("MONAI 3D", "DenseNet264")])
def test_larger_named_networks_are_converted_as_a_whole(family: str, name: str) -> None:
    with torch.device("meta"):
        net = fastdense.convert(make(family, name), verify=False)
    assert converted(net) == whole(name)
    layers = tuple(entry.layers for entry in fastdense.plan(net) if entry.kind == "block")
    assert layers == LAYERS[re.sub(r"\D", "", name)]


@pytest.mark.parametrize(("family", "name"), WITH_FEW_LAYERS)
def test_other_named_networks_are_the_same_with_few_layers(family: str, name: str) -> None:
    with few_layers(package(family).DenseNet):
        net = make(family, name)
    same_as_the_original(family, name, net, verify=False)


@pytest.mark.parametrize("family", SMALL)
def test_small_networks_in_both_modes_and_back(family: str) -> None:
    theirs, ours = pair(family)
    for mode in ("bottlenecks", "activations"):
        fastdense.convert(ours, recompute=mode)
        for step in range(2):
            x = image(family, seed=step)
            assert_same(results(ours, x), results(theirs, x))
    want = theirs.eval()(x)
    again = copy.deepcopy(ours).eval()
    assert converted(again) == converted(ours) == ALL
    assert_close("evaluation", again(x), want)
    original = fastdense.revert(again)
    original.load_state_dict(theirs.state_dict())
    assert types(original) == types(theirs)
    assert torch.equal(original(x), want)


@pytest.mark.parametrize("family", SMALL)
def test_dropout_with_the_same_masks(family: str) -> None:
    """Two blocks, each with a seed of its own: the original is fed the masks that fastdense draws."""
    theirs, ours = twins(small(family, **{DROPOUT.get(family.split()[0], "drop_rate"): 0.3}))
    x = image(family)
    torch.manual_seed(11)
    got = results(ours, x)
    torch.manual_seed(11)
    seeds = [torch.randint(2**63 - 1, (1,)) for _ in range(2)]

    def forward(x: Tensor) -> Tensor:
        masks = ReplayDropoutMasks(seeds[0], [0, 1, 0, 1, 2])
        block2 = theirs.get_submodule("features.denseblock2")
        handle = block2.register_forward_pre_hook(lambda *_: setattr(masks, "seed", seeds[1]))
        with masks:
            output = theirs(x)
        handle.remove()
        return output

    assert_same(got, results(theirs, x, forward=forward))
    plain = results(ours.eval(), x)["output"]
    assert_close("evaluation", plain, results(theirs.eval(), x)["output"])
    assert not torch.equal(plain, got["output"])


@pytest.mark.parametrize("frozen", [False, True], ids=["free", "frozen"])
@pytest.mark.parametrize("family", SMALL)
def test_frozen_norms_partial_gradients_and_layouts(family: str, frozen: bool) -> None:
    """Every second norm in evaluation, every second parameter fixed, inputs of other strides."""
    theirs, ours = pair(family)
    fastdense.convert(ours, recompute="bottlenecks" if frozen else None)
    for net in (theirs, ours):
        for i, norm in enumerate(m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
            norm.train(not frozen or i % 2 == 1)
        for i, parameter in enumerate(net.parameters()):
            parameter.requires_grad_(not frozen or i % 2 == 1)
    for step, layout in enumerate(("channels_last", "slice")):
        x = image(family, layout=layout, seed=step)
        assert_same(results(ours, x, step), results(theirs, x, step))


@pytest.mark.parametrize(("family", "when"), [("torchvision", "built"), ("timm", "built"), ("timm", "later")])
def test_memory_efficient_updates_statistics_twice_and_fastdense_once(family: str, when: str) -> None:
    theirs, ours = twins(small(family, **({"memory_efficient": True} if when == "built" else {})))
    x = image(family)
    if when == "later":
        theirs.set_grad_checkpointing(True)
        ours.set_grad_checkpointing(True)
    saved = []
    for mode in (None, "activations"):
        model = fastdense.convert(copy.deepcopy(ours), recompute=mode)
        with fastdense.memory.saved_bytes(model, x) as counted:
            model(x)
        saved.append(counted.bytes)
    assert saved[0] < 0.8 * saved[1], "the flag did not mean recompute='bottlenecks'"

    counter = "features.denseblock1.denselayer1.norm1.num_batches_tracked"
    for step in (1, 2):
        got, want = results(ours, x), results(theirs, x)
        assert (int(got[counter]), int(want[counter])) == (step, 2 * step)
    for key in want:
        if key.endswith(".grad"):
            assert_close(key, got[key], want[key], scale=1.0)


@pytest.mark.parametrize(
    ("name", "activations", "bottlenecks"), [("densenet121", 4.6, 12.0), ("densenet201", 6.3, 17.0)]
)
def test_bytes_saved_against_torchvision(name: str, activations: float, bottlenecks: float) -> None:
    """The whole network, fp32, 224 x 224, one image."""
    x = torch.randn(1, 3, 224, 224)
    saved = []
    for mode in (None, "activations", "bottlenecks"):
        model = make("torchvision", name, num_classes=1000)
        if mode is not None:
            fastdense.convert(model, recompute=mode, verify=False)
        with fastdense.memory.saved_bytes(model) as counted:
            model(x)
        saved.append(counted.bytes)
    assert saved[0] > activations * saved[1]
    assert saved[0] > bottlenecks * saved[2]


BLUR = {"aa_layer": "BlurPool2d", "aa_stem_only": False, "stem_type": "deep"}
OPTIONS: dict[str, tuple[str, dict[str, Any], Counter[str]]] = {
    "deep stem": ("timm", {"stem_type": "deep"}, ALL),
    "blurring transitions": ("timm", BLUR, Counter(block=2)),
    **{f"timm {name}": ("timm", {"act_layer": name}, Counter()) for name in ("silu", "prelu", "identity")},
    "instance norm": ("MONAI 2D", {"norm": "instance"}, Counter()),
    "group norm": ("MONAI 2D", {"norm": ("group", {"num_groups": 2})}, Counter()),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_what_options_leave_of_a_densenet_is_converted(name: str) -> None:
    family, options, left = OPTIONS[name]
    if "aa_layer" in options:
        options = {**options, "aa_layer": getattr(package(family), options["aa_layer"])}
    x = image(family)
    with contextlib.nullcontext() if left else pytest.warns(UserWarning, match="nothing to convert"):
        theirs, ours = twins(small(family, **options))
    assert converted(ours) == left
    assert_same(results(ours, x), results(theirs, x), 1e-9 if left else 0.0)
    if name == "blurring transitions":
        entries = [entry for entry in fastdense.plan(ours) if entry.kind == "transition"]
        assert [(entry.action, "avg_pool" in entry.reason) for entry in entries] == [("skip", True)]


def test_timms_other_interfaces() -> None:
    """Intermediate features, a new classifier, and its own dropout, which belongs to the classifier."""
    theirs, ours = twins(small("timm", drop_rate=0.5).eval())
    x = image("timm").detach()
    found = [model.forward_intermediates(x, intermediates_only=True) for model in (ours, theirs)]
    for got, want in zip(*found, strict=True):
        assert_close("intermediate", got, want)
    ours.reset_classifier(9)
    assert ours.double()(x).shape == (2, 9)


def test_torchxrayvisions_thresholds_and_keys() -> None:
    theirs, ours = twins(small("torchxrayvision", op_threshs=torch.rand(18)))
    assert "op_threshs" in ours.state_dict() and list(ours.state_dict()) == list(theirs.state_dict())
    x = image("torchxrayvision").detach().float()  # its thresholds are float32
    assert_close("scores", ours.float().eval()(x), theirs.float().eval()(x), 1e-5)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("family", ["torchvision", "timm", "MONAI 2D"])
def test_the_packages_own_loaders(family: str, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights with the key names of before 2018 and without counters."""
    source, x = small(family), image(family).detach()
    randomise(source, 9)
    layers = r"\.layers" if "MONAI" in family else ""
    old = {
        re.sub(rf"(denselayer\d+){layers}\.(norm|relu|conv)([12])\.", r"\1.\2.\3.", key): value.clone()
        for key, value in source.state_dict().items()
        if "num_batches_tracked" not in key
    }
    assert any(".norm.1." in key for key in old)
    model = small(family)
    if when == "after":
        fastdense.convert(model)
    module = package(family)
    if family == "torchvision":
        module.densenet._load_state_dict(model, SimpleNamespace(get_state_dict=lambda **_: dict(old)), False)
    elif family == "timm":
        model.load_state_dict(module._filter_torchvision_pretrained(dict(old)), strict=True)
    else:
        monkeypatch.setattr(module, "load_state_dict_from_url", lambda *_, **__: dict(old))
        module._load_state_dict(model, "densenet121", False)
    if when == "before":
        fastdense.convert(model)
    assert_close("output", model.eval()(x), source.eval()(x))
