"""``gradient_flow`` and ``feature_reuse``: each term is autograd's, and looking changes nothing."""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import networks
from helpers.blocks import assert_close, block_pair, random_input
from torch import Tensor, nn

import fastdense
from fastdense.analysis import gradient_flow as flows
from fastdense.analysis.gradient_flow import feature_reuse, first_not_finite, gradient_flow
from fastdense.analysis.plain import PlainBlock, without_dense_connections
from fastdense.cli.subject import Subject, batch, subject
from fastdense.conversion.api import dense_blocks
from fastdense.core.features import as_rows


def terms(model: nn.Module, x: Tensor, target: Tensor | None = None, loss_fn: Any = None) -> list[Any]:
    """The runs of ``gradient_flow``, whose ``vectors`` are what each consumer sends back, as rows ``[m, C_j]``."""
    record = flows._Run._record

    def keep(run: Any, consumer: int, rows: Tensor) -> None:
        vars(run).setdefault("vectors", {})[consumer] = rows
        record(run, consumer, rows)

    with mock.patch.object(flows._Run, "_record", keep):
        return flows._run(model, x, target, loss_fn, torch.float64)  # type: ignore[return-value]


def reference_gradients(model: nn.Module, x: Tensor, target: Tensor) -> dict[str, list[Tensor]]:
    """autograd's gradients of ``H_0 .. H_L`` in every block of a reference, as rows, by hooks."""
    features: dict[str, list[Tensor]] = {}
    for name, block in model.named_modules():
        layers = [layer for child, layer in block.named_children() if child.startswith("denselayer")]
        if not layers:
            continue
        kept = features[name] = []

        def keep(h: Tensor, kept: list[Tensor] = kept) -> None:
            kept.append(h)
            h.retain_grad()

        block.register_forward_pre_hook(lambda module, args, keep=keep: keep(args[0]))
        for layer in layers:
            layer = getattr(layer, "layers", layer)  # MONAI's layer returns [x, new]
            layer.register_forward_hook(lambda module, args, output, keep=keep: keep(output))
    F.cross_entropy(model(x.detach().requires_grad_()), target).backward()
    return {name: [rows(h.grad) for h in kept] for name, kept in features.items()}


def rows(images: Tensor | None) -> Tensor:
    assert images is not None
    return as_rows(images.movedim(1, -1).contiguous().movedim(-1, 1))


def norms(gradients: list[Tensor]) -> Tensor:
    return torch.stack([gradient.norm() for gradient in gradients])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_the_terms_add_up_to_autograds_gradient(name: str, training: bool) -> None:
    reference, fast = (model.train(training) for model in networks.network(name))
    x, target = networks.images(name), networks.labels(2)
    truth = reference_gradients(reference, x, target)
    runs = terms(fast, x, target)
    assert [run.name for run in runs] == list(truth)
    for run in runs:
        total = torch.cat(truth[run.name], 1)
        assert_close(f"{run.name}: the schedule's", run._rows(run.G), total)
        added = torch.zeros_like(total)
        for sent in run.vectors.values():
            added[:, : sent.shape[1]] += sent
        assert_close(f"{run.name}: the sum of the terms", added, total)
        assert_close(f"{run.name}: the norms", run.flow().total, norms(truth[run.name]))


def aliased(block: nn.Module, x: Tensor, cotangent: Tensor) -> dict[int, Tensor]:
    """autograd's gradient through each reader of a reference block by itself, as rows ``[m, C_j]``."""
    features, sent = [x], {}
    for j, layer in enumerate(block.values()):  # type: ignore[operator]
        sent[j] = [h * 1 for h in features]
        features.append(layer(sent[j]))
    sent[len(block)] = [h * 1 for h in features]  # type: ignore[arg-type]
    for alias in (alias for aliases in sent.values() for alias in aliases):
        alias.retain_grad()
    torch.cat(sent[len(block)], 1).backward(cotangent)  # type: ignore[arg-type]
    return {j: torch.cat([rows(alias.grad) for alias in aliases], 1) for j, aliases in sent.items()}


@pytest.mark.parametrize("recompute", ["activations", "bottlenecks"])
@pytest.mark.parametrize("frozen", [False, True], ids=["training", "one norm frozen"])
@pytest.mark.parametrize(("bn_size", "spatial_dims"), [(2, 2), (None, 2), (2, 1), (2, 3)],
                         ids=["bottlenecks", "no bottlenecks", "1D", "3D"])  # fmt: skip
def test_each_term_is_autograds(bn_size: int | None, spatial_dims: int, frozen: bool, recompute: str) -> None:
    def freeze(block: nn.Module) -> None:
        if frozen:
            block.denselayer2.norm1.eval()  # type: ignore[union-attr, operator]

    reference, fast = block_pair(4, 5, bn_size, 3, spatial_dims=spatial_dims, recompute=recompute, change=freeze)
    size = (7, 6, 4)[:spatial_dims]
    x, cotangent = random_input((3, 5, *size)), random_input((3, 17, *size), seed=1).detach()
    truth = aliased(reference, x.detach().requires_grad_(), cotangent)
    (run,) = terms(fast, x, loss_fn=lambda output: (output * cotangent).sum())
    assert run.vectors.keys() == truth.keys()
    scale = max(sent.norm().item() for sent in truth.values())
    for j, sent in truth.items():
        assert_close(f"what reader {j} sends back", run.vectors[j], sent, scale=scale)
    flow = run.flow()
    assert flow.contributions.shape == (5, 5) and flow.total.shape == (5,)
    for j in range(5):
        want = norms(list(truth[j].split([5, *[3] * j], dim=1)))
        assert_close(f"the norms of reader {j}", flow.contributions[: j + 1, j], want, scale=scale)
        assert flow.contributions[j + 1 :, j].eq(0).all()


def test_dropout_is_that_of_the_step() -> None:
    _, fast = networks.own(drop_rate=0.4)
    x, target = networks.images("own"), networks.labels(2)
    flows = gradient_flow(fast, x, target)  # draws the mask that comes next, and does not use it up
    seen: list[Tensor] = []
    fast = fast.double()
    fast.features.denseblock2.register_forward_pre_hook(  # type: ignore[union-attr, operator]
        lambda module, args: (args[0].retain_grad(), seen.append(args[0]))[1]
    )
    F.cross_entropy(fast(x), target).backward()
    assert seen[0].grad is not None
    assert flows[1].total[0].item() == pytest.approx(seen[0].grad.norm().item(), rel=1e-9)


def test_looking_changes_nothing() -> None:
    for name in ("own", "torchvision"):
        reference, fast = networks.network(name, torch.float32)
        for model in (reference, fast):
            before, mode = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
            x = networks.images(name, dtype=torch.float32)
            state = torch.get_rng_state()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                gradient_flow(model, x)
                feature_reuse(model)
            assert torch.equal(state, torch.get_rng_state())
            assert [module.training for module in model.modules()] == mode
            assert all(parameter.grad is None for parameter in model.parameters()) and x.grad is None
            for key, value in model.state_dict().items():
                assert torch.equal(value, before[key]), key
            assert model.training and next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("wrap", [None, nn.DataParallel, torch.compile], ids=["not converted", "parallel", "compiled"])
def test_other_forms_of_a_converted_model_are_read_alike(wrap: Any) -> None:
    theirs, ours = networks.network("torchvision")
    other, x = theirs if wrap is None else wrap(ours), networks.images("torchvision")
    for got, want in zip(gradient_flow(other, x), gradient_flow(ours, x), strict=True):
        assert got.name == want.name
        assert torch.equal(got.total, want.total) and torch.equal(got.contributions, want.contributions)
    for reuse, same in zip(feature_reuse(other), feature_reuse(ours), strict=True):
        assert reuse.name == same.name and torch.equal(reuse.weights, same.weights)


def test_under_no_grad_autocast_and_inference_mode() -> None:
    _, fast = networks.network("own", torch.float32)
    x = networks.images("own", dtype=torch.float32).detach()
    want = gradient_flow(fast, x)
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            got = gradient_flow(fast, x)
        assert all(torch.equal(a.total, b.total) for a, b in zip(got, want, strict=True))
    want = gradient_flow(fast, x, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, cast = gradient_flow(fast, x, dtype=torch.float32), gradient_flow(fast, x, dtype=None)
    assert all(torch.equal(a.total, b.total) for a, b in zip(got, want, strict=True))
    assert not any(torch.equal(a.total, b.total) for a, b in zip(cast, want, strict=True))


def test_losses() -> None:
    _, fast = networks.network("own")
    x, target = networks.images("own"), networks.labels(2)

    def totals(*args: Any, **kwargs: Any) -> Tensor:
        return torch.cat([flow.total for flow in gradient_flow(fast, x, *args, **kwargs)])

    own = copy.deepcopy(fast)(x).argmax(1)
    assert torch.equal(totals(), totals(own)) and torch.equal(totals(loss_fn=nn.CrossEntropyLoss()), totals(own))
    assert not torch.allclose(totals(target), totals(own))
    halved = totals(target, lambda output, target: F.cross_entropy(output, target) / 2)
    assert torch.allclose(2 * halved, totals(target), rtol=1e-12)
    assert torch.allclose(totals(loss_fn=lambda output: output[:, 1].sum()), totals(loss_fn=lambda o: o.sum(0)[1]))


def test_a_block_that_is_used_twice_is_told_twice() -> None:
    block = fastdense.DenseBlock(2, 6, 2, 3, dtype=torch.float64)
    back = nn.Conv2d(12, 6, 1, dtype=torch.float64)
    model = nn.Sequential(block, back, block)
    x = random_input((2, 6, 5, 5))
    first, second = gradient_flow(model, x, loss_fn=lambda output: output.square().sum())
    assert first.name == second.name == "0"
    (alone,) = gradient_flow(block, back(block(x)), loss_fn=lambda output: output.square().sum())
    assert torch.allclose(second.total, alone.total) and not torch.allclose(first.total, alone.total)


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_reuse_is_the_mean_absolute_weight(name: str) -> None:
    _reference, fast = networks.network(name)
    for found, (block_name, _, layers) in zip(feature_reuse(fast), dense_blocks(fast), strict=True):
        assert found.name == block_name and found.weights.shape == (len(layers) + 1, len(layers))
        entering = layers[0].conv1.in_channels
        for j, layer in enumerate(layers):
            parts = layer.conv1.weight.split([entering, *[4] * j], dim=1)
            want = torch.stack([part.abs().mean() for part in parts])
            assert torch.allclose(found.weights[: j + 1, j], want, rtol=1e-12)
            assert found.weights[j + 1 :, j].eq(0).all()


def test_plain_blocks_have_no_dense_connections() -> None:
    model = fastdense.DenseNet(**{**networks.SMALL, "block_config": (3, 2)})
    plain = without_dense_connections(model)
    assert not [module for module in plain.modules() if isinstance(module, fastdense.DenseBlock)]
    block = plain.features.denseblock1  # type: ignore[union-attr]
    assert isinstance(block, PlainBlock)
    assert [layer.conv1.in_channels for layer in block.values()] == [8, 4, 4]  # type: ignore[union-attr]
    assert [layer.conv2.out_channels for layer in block.values()] == [4, 4, 4]  # type: ignore[union-attr]
    x = torch.randn(2, 8, 5, 5)
    output = block(x)
    assert output.shape == (2, 20, 5, 5) and output[:, :16].eq(0).all() and not output[:, 16:].eq(0).any()
    assert plain(networks.images("own", dtype=torch.float32)).shape == (2, networks.CLASSES)
    assert sum(p.numel() for p in plain.parameters()) < sum(p.numel() for p in model.parameters())
    for key in ("features.conv0.weight", "features.transition1.conv.weight", "classifier.weight"):
        assert torch.equal(plain.state_dict()[key], model.state_dict()[key])


@pytest.mark.parametrize("name", ["torchvision", "MONAI"])
def test_plain_gradients_are_autograds(name: str) -> None:
    theirs, ours = networks.network(name)
    torch.manual_seed(1)
    plain = without_dense_connections(ours)
    torch.manual_seed(1)
    same = without_dense_connections(theirs)
    x, target = networks.images(name), networks.labels(2)
    truth = reference_gradients(same, x, target)
    flows = gradient_flow(plain, x, target)
    assert [flow.name for flow in flows] == list(truth)
    for flow in flows:
        assert_close(flow.name, flow.total, norms(truth[flow.name]))
        assert torch.equal(flow.contributions, torch.diag(flow.total))


@pytest.mark.parametrize(("name", "value", "said"), [
    ("features.denseblock1.denselayer2.conv2", "inf",
     "The values of the output of layer 2 of features.denseblock1 (H_2) are the first that are not finite; "
     "features.denseblock1.denselayer2.conv2.weight is not finite itself"),
    ("features.denseblock2.denselayer1.norm1", "nan",
     "The values of the output of layer 1 of features.denseblock2 (H_1)"),
    ("classifier", "nan", "The gradient of the output of layer 1 of features.denseblock2 (H_1)"),
], ids=["a convolution", "a norm", "the classifier"])  # fmt: skip
def test_what_is_not_finite_first(name: str, value: str, said: str) -> None:
    model = fastdense.DenseNet(**networks.SMALL)
    with torch.no_grad():
        model.get_submodule(name).weight[:1].fill_(float(value))  # type: ignore[index, operator]
    found = first_not_finite(model, networks.images("own", dtype=torch.float32), networks.labels(2))
    assert found is not None and found.startswith(said)


def test_a_gradient_that_overflows_names_the_layer() -> None:
    model = fastdense.DenseNet(**{**networks.SMALL, "block_config": (3, 2)})
    block: Any = model.features.denseblock1
    with torch.no_grad():
        block.denselayer2.conv2.weight *= 1e-12  # H_2 is tiny, and layer 3 makes it as large as the others:
        block.denselayer3.norm1.eps = 1e-30  # what it sends back is 1e12 times larger

    x, target = networks.images("own", dtype=torch.float32), networks.labels(2)
    assert first_not_finite(model, x, target, F.cross_entropy) is None
    assert first_not_finite(model, x, target, lambda output, target: 1e30 * F.cross_entropy(output, target)) == (
        "The gradient of the output of layer 2 of features.denseblock1 (H_2) went first, in what layer 3 sends back"
    )


NO_BLOCK = "has no dense block that fastdense understands"


class Wrapped(nn.Module):
    """Returns what no loss takes, or has a block that it does not call."""

    def __init__(self, inner: nn.Module, unused: bool) -> None:
        super().__init__()
        self.inner, self.unused = inner, fastdense.DenseBlock(1, 3, 2, 2) if unused else None

    def forward(self, x: Tensor) -> Any:
        return {"out": self.inner(x)} if self.unused is None else self.inner(x)


@pytest.mark.parametrize(("look", "error", "message"), [
    (lambda net, x: gradient_flow("model", x), TypeError, "model must be"),
    (lambda net, x: gradient_flow(net, [x]), TypeError, "x must be a torch.Tensor, got list"),
    (lambda net, x: gradient_flow(net, x.long()), ValueError, "x must be a floating-point tensor, got torch.int64"),
    (lambda net, x: gradient_flow(net, x[:0]), ValueError,
     r"x must hold at least one image, got shape \(0, 3, 37, 44\)"),
    (lambda net, x: gradient_flow(net, x, [1, 2]), TypeError, "target must be a torch.Tensor or None, got list"),
    (lambda net, x: gradient_flow(net, x, loss_fn=lambda output: output), ValueError,
     r"the loss must be one number, got shape \(2, 5\)"),
    (lambda net, x: gradient_flow(net, x, loss_fn=lambda output: output.detach().sum()), ValueError,
     "the loss does not depend on the model"),
    (lambda net, x: gradient_flow(nn.Conv2d(3, 4, 1), x), ValueError, NO_BLOCK),
    (lambda net, x: feature_reuse(without_dense_connections(net)), ValueError, NO_BLOCK),
    (lambda net, x: gradient_flow(Wrapped(net, unused=False), x), ValueError,
     r"without loss_fn the model must return class scores \[N, classes\], got dict"),
    (lambda net, x: gradient_flow(Wrapped(net, unused=True), x), RuntimeError,
     "the dense block unused took no part"),
])  # fmt: skip
def test_bad_input_is_named(look: Callable[[Any, Tensor], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        look(networks.network("own")[1], networks.images("own"))


def test_a_block_that_cannot_run_fused_is_named() -> None:
    _, hooked = networks.network("torchvision")
    hooked.features.denseblock2.denselayer1.norm1.register_forward_hook(print)  # type: ignore[union-attr, operator]
    for look in (lambda: feature_reuse(hooked), lambda: gradient_flow(hooked, networks.images("torchvision"))):
        with pytest.raises(ValueError, match=r"the block features.denseblock2 cannot run fused: .*hook"):
            look()


@pytest.mark.usefixtures("kernels_checked")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run in Triton's interpreter here")
def test_the_kernels_terms_are_the_same() -> None:
    _, fast = block_pair(3, 5, 2, 3, dtype=torch.float32, impl="triton")
    x = random_input((2, 5, 4, 5), dtype=torch.float32)
    cotangent = random_input((2, 14, 4, 5), seed=1).detach()

    def loss_fn(output: Tensor) -> Tensor:
        return (output * cotangent.to(output)).sum()

    (want,) = gradient_flow(fast, x, loss_fn=loss_fn)
    (got,) = gradient_flow(fast, x, loss_fn=loss_fn, dtype=None)
    assert torch.allclose(got.total, want.total, rtol=1e-5)
    assert torch.allclose(got.contributions, want.contributions, rtol=1e-5)
    assert not torch.equal(got.total, want.total)


def test_the_formula_of_the_documentation_says_what_is_measured() -> None:
    """docs/gradient-flow.md, with the one number taken from the chain: the first layer's gradient over the last one's.

    Within a factor of 2, where the chain's is far above.
    """
    pytest.importorskip("sklearn")
    dense = subject(None, None, seed=0, depth=100)
    torch.manual_seed(0)
    chain = Subject(without_dense_connections(dense.model), dense.description, dense.state)
    read = [[layer.norm1.num_features for layer in layers] for _, _, layers in dense_blocks(dense.model)]
    found = []
    for looked_at in (dense, chain):
        seen = batch(looked_at, "digits", count=64, image_size=None, seed=0)
        flow = gradient_flow(looked_at.model.train(), seen.images, seen.labels)
        found.append([(block.total[1] / block.total[-1]).item() for block in flow])
    for measured, chained, channels in zip(*found, read, strict=True):
        layers, k = len(channels), channels[1] - channels[0]
        s = chained ** (2 / (layers - 1))  # what a layer does to the squared norm
        predicted = math.prod(1 + s * k / width for width in channels[1:]) ** 0.5
        assert measured / 2 < predicted < 2 * measured < chained
