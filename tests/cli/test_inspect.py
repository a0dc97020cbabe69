"""``fastdense inspect``: pictures and numbers of the network that was asked for, and errors that say what to do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import networks
from helpers.train_runs import DIGITS, SMALL, command, words
from matplotlib.image import imread

import fastdense
from fastdense.analysis import plots
from fastdense.analysis.gradient_flow import BlockFlow, BlockReuse
from fastdense.analysis.plain import without_dense_connections
from fastdense.data.source import digits

NETWORK = ["--block-config", "3,2", "--growth-rate", "4"]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the numbers: no picture, because drawing takes longer than all the rest."""
    for name in ("flow_picture", "reuse_picture"):
        monkeypatch.setattr(plots, name, lambda found, path, **words: path.write_bytes(b"undrawn"))


def looked(*arguments: object, folder: Path) -> tuple[str, dict[str, Any], Path]:
    """What the command prints, its numbers and its picture."""
    picture, numbers = folder / f"new/{arguments[0]}.png", folder / f"{arguments[0]}.json"
    result = command("inspect", *arguments, "--out", picture, "--json", numbers)
    assert result.exit_code == 0, result.output
    return words(result.output), json.loads(numbers.read_text()), picture


def is_drawn(picture: Path) -> bool:
    image = imread(picture)
    return bool(min(image.shape[:2]) > 400 / 150 * plots.DPI and image.std() > 0.05)


def own(seed: int = 0) -> fastdense.DenseNet:
    torch.manual_seed(seed)
    options: dict[str, Any] = {"growth_rate": 4, "block_config": (3, 2), "num_init_features": 8}
    return fastdense.DenseNet(**options, in_channels=1, num_classes=10, small_inputs=True)


def assert_flow(blocks: list[dict[str, Any]], wanted: list[BlockFlow]) -> None:
    for found, want in zip(blocks, wanted, strict=True):
        assert found["name"] == want.name and found["total"] == pytest.approx(want.total.tolist(), rel=1e-9)
        assert torch.allclose(torch.tensor(found["contributions"]).double(), want.contributions)


def assert_reuse(numbers: dict[str, Any], model: torch.nn.Module) -> None:
    for found, want in zip(numbers["blocks"], fastdense.feature_reuse(model), strict=True):
        assert found["name"] == want.name and torch.allclose(torch.tensor(found["weights"]).double(), want.weights)


def test_flow_is_that_of_the_network(tmp_path: Path) -> None:
    output, numbers, picture = looked("flow", *NETWORK, "--images", 16, folder=tmp_path)
    assert is_drawn(picture)
    x, target = DIGITS.train_images[:16], DIGITS.train_labels[:16]
    model = own()
    torch.manual_seed(0)
    plain = without_dense_connections(model)
    dense_label, plain_label = numbers["flows"]
    assert dense_label == "DenseNet, freshly initialised"
    assert plain_label == "the same layers without dense connections, freshly initialised"
    for label, network in ((dense_label, model), (plain_label, plain)):
        assert_flow(numbers["flows"][label], fastdense.gradient_flow(network, x, target))
    assert "blocks of 3, 2 layers, k = 4, freshly initialised" in numbers["title"]
    assert "16 images of scikit-learn's digits, 8x8" in numbers["caption"] and "float64" in numbers["caption"]
    assert "denseblock2" in output and "Picture: " in output
    assert numbers["command"].startswith("fastdense") and numbers["versions"]["torch"] == torch.__version__
    assert numbers["network"] == "DenseNet-BC, blocks of 3, 2 layers, k = 4" and numbers["loss"] == "cross-entropy"
    assert numbers["channels"] == {"features.denseblock1": [8, 12, 16, 20], "features.denseblock2": [10, 14, 18]}


def test_evaluation_mode_differs(undrawn: None, tmp_path: Path) -> None:
    few = ["flow", *NETWORK, "--images", 16, "--no-plain"]
    (_, training, _), (_, evaluation, _) = (looked(*few, *mode, folder=tmp_path) for mode in ([], ["--eval"]))
    assert "running statistics" in evaluation["caption"] and "batch statistics" in training["caption"]
    (first,), (second,) = training["flows"].values(), evaluation["flows"].values()
    assert first[0]["total"] != pytest.approx(second[0]["total"], rel=1e-3)


def test_reuse_is_that_of_the_network_and_of_its_weights(tmp_path: Path) -> None:
    output, numbers, picture = looked("reuse", *NETWORK, folder=tmp_path)
    assert_reuse(numbers, own())
    assert "denseblock1" in output and is_drawn(picture)
    assert numbers["channels"]["features.denseblock2"] == [10, 14, 18] and numbers["seed"] == 0
    torch.save(own(seed=5).state_dict(), tmp_path / "weights.pth")
    _, numbers, _ = looked("reuse", *NETWORK, "--weights", tmp_path / "weights.pth", folder=tmp_path)
    assert_reuse(numbers, own(seed=5))
    assert "weights of weights.pth" in numbers["title"]


MODELS = """
from helpers import networks
torchvision, monai = (lambda: networks.torchvision()[0]), (lambda: networks.monai()[0])
"""


def test_models_from_elsewhere(undrawn: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models_of_somebody.py").write_text(MODELS)
    monkeypatch.syspath_prepend(tmp_path)
    torchvision, monai = (["--model", f"models_of_somebody:{name}"] for name in ("torchvision", "monai"))
    _, numbers, _ = looked("flow", *torchvision, "--images", 4, folder=tmp_path)
    assert "digits, 64x64" in numbers["caption"] and "arg-max" in numbers["caption"]  # it has five classes
    theirs, _ = networks.torchvision()
    images = digits(64).train_images[:4].expand(-1, 3, -1, -1)
    (blocks, *_) = numbers["flows"].values()
    assert_flow(blocks, fastdense.gradient_flow(theirs, images))
    _, numbers, _ = looked("reuse", *torchvision, folder=tmp_path)
    assert_reuse(numbers, theirs)
    noise = ["--data", "random", "--image-size", 24, "--images", 2]
    _, numbers, _ = looked("flow", *monai, *noise, folder=tmp_path)
    assert "noise, 24x24x24" in numbers["caption"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("flow --model densenet120", "--model must be one of densenet121"),
        ("flow --model nowhere:densenet", "densenet cannot be built (ModuleNotFoundError: No module named 'nowhere')"),
        ("flow --model builtins:dict", "--model builtins:dict returned a dict, not a torch.nn.Module"),
        ("flow --model torch.nn:Identity", "has no dense block that fastdense understands"),
        ("flow --model torch.nn:Identity --depth 22", "--depth is for fastdense's own networks"),
        ("flow --weights nothing.pt", "--weights nothing.pt cannot be read: No such file"),
        (f"reuse --weights {__file__}", "): save a state_dict with torch.save"),
        ("flow --depth 22 --images 2000", "--images must be at most 1437, the training images, got 2000"),
        ("flow --depth 22 --data nowhere", "(or --data random)"),
        ("flow --depth 22 --images 4 --out /proc/none/x.png", "cannot be written"),
        ("flow --out x.txt", "--out must name a PNG file, as flow.png, got x.txt"),
        ("reuse --ema", "--ema is for --weights with a checkpoint"),
    ],
)
def test_errors_say_what_to_do(arguments: str, message: str) -> None:
    result = command("inspect", *arguments.split())
    assert result.exit_code == 2
    assert message in words(result.output), result.output


def trained(folder: Path, *options: str) -> Path:
    """The checkpoint of two steps."""
    result = command(*SMALL, "--steps", 2, "--batch-size", 32, "--no-tensorboard", "--out", folder, *options)
    assert result.exit_code == 0, result.output
    return folder / "last.pt"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of a dense network and its average, and of a plain one."""
    folder = tmp_path_factory.mktemp("runs")
    return trained(folder / "dense", "--ema", "0.5"), trained(folder / "plain", "--plain")


def test_checkpoints_say_which_network_they_are_of(undrawn: None, checkpoints: Any, tmp_path: Path) -> None:
    dense, plain = checkpoints
    _, numbers, _ = looked("flow", "--weights", dense, "--plain-weights", plain, "--images", 8, folder=tmp_path)
    labels = ["DenseNet, after 2 steps", "the same layers without dense connections, after 2 steps"]
    assert list(numbers["flows"]) == labels
    stored = torch.load(dense, weights_only=True)["runs"]["fastdense"]
    model = fastdense.DenseNet(4, (1, 1, 1), 8, in_channels=1, num_classes=10, small_inputs=True)
    for ema, weights in (([], stored["model"]), (["--ema"], stored["ema"]["model"])):
        _, numbers, _ = looked("reuse", "--weights", dense, *ema, folder=tmp_path)
        model.load_state_dict(weights)
        assert_reuse(numbers, model)
        assert ("averaged" in numbers["title"]) == bool(ema)
    _, numbers, _ = looked("flow", "--weights", plain, "--images", 8, folder=tmp_path)
    assert list(numbers["flows"]) == ["without dense connections, after 2 steps"]
    assert "k = 4, without dense connections, after 2 steps" in numbers["title"]


def test_of_a_comparison_fastdenses_run_is_looked_at(undrawn: None, checkpoints: Any, tmp_path: Path) -> None:
    state = torch.load(checkpoints[0], weights_only=True)
    run = state["runs"]["fastdense"]
    other = {name: value + 1 if value.is_floating_point() else value for name, value in run["model"].items()}
    state["runs"] = {"reference": {**run, "model": other}, "fastdense": run}
    path = tmp_path / "compared.pt"
    torch.save(state, path)
    compared, alone = (looked("reuse", "--weights", w, folder=tmp_path)[1] for w in (path, checkpoints[0]))
    assert compared["blocks"] == alone["blocks"]


def test_weights_that_do_not_fit_are_refused(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    dense, plain = checkpoints
    torch.save(own().state_dict(), tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    content = bytearray(dense.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "broken.pt").write_bytes(content)
    for arguments, message in (
        (["reuse", "--weights", plain], "is of a network without dense connections: it uses no feature again"),
        (["reuse", "--weights", plain, "--ema"], "has no averaged weights: leave --ema out"),
        (["reuse", "--weights", dense, "--depth", 10], "--depth is not needed"),
        (["flow", "--weights", dense, "--plain-weights", dense], "is of a network with dense connections"),
        (["flow", "--model", "densenet121", "--plain-weights", plain], "1 channels, the other network of 3"),
        (["reuse", "--weights", tmp_path / "broken.pt"], "is damaged or no checkpoint ("),
        (["reuse", "--weights", tmp_path / "other.pt", "--depth", 22], "does not fit the network"),
        (["reuse", "--weights", tmp_path / "list.pt"], "holds a list, not a state_dict"),
    ):
        result = command("inspect", *arguments)
        assert result.exit_code == 2 and message in words(result.output), result.output


def test_a_full_disk_leaves_the_picture_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(found: object, path: Path, **words: str) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastdense.analysis.plots.reuse_picture", full)
    picture = tmp_path / "reuse.png"
    picture.write_bytes(b"before")
    result = command("inspect", "reuse", *NETWORK, "--out", picture)
    assert result.exit_code == 2 and "No space left on device" in words(result.output)
    assert picture.read_bytes() == b"before" and [path.name for path in tmp_path.iterdir()] == ["reuse.png"]


@pytest.mark.parametrize("layers", [(1,), (2, 1, 60)], ids=["one layer", "three blocks"])
def test_pictures_of_any_shape_are_drawn(
    layers: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "DPI", 50)  # a ninth of the pixels
    flows, reuses = [], []
    for i, L in enumerate(layers):
        matrix = torch.rand(L + 1, L + 1, dtype=torch.float64).triu() * 10.0 ** -torch.arange(L + 1).double()
        flows.append(BlockFlow(f"features.denseblock{i + 1}", matrix.sum(1), matrix))
        reuses.append(BlockReuse(f"features.denseblock{i + 1}", torch.rand(L + 1, L, dtype=torch.float64).triu()))
    plots.flow_picture({"a": flows, "b": flows}, tmp_path / "flow.png", title="t", caption="c")
    plots.reuse_picture(reuses, tmp_path / "reuse.png", title="t", caption="c")
    assert is_drawn(tmp_path / "flow.png") and is_drawn(tmp_path / "reuse.png")


@pytest.mark.parametrize(("total", "terms"), [(0.0, 0.0), (torch.nan, torch.inf)], ids=["nothing", "not finite"])
def test_a_picture_of_nothing_is_drawn(total: float, terms: float, tmp_path: Path) -> None:
    flows = [BlockFlow("", torch.full((3,), total), torch.full((3, 3), terms))]
    plots.flow_picture({"a": flows}, tmp_path / "flow.png", title="t", caption="c")
    assert imread(tmp_path / "flow.png").std() > 0.02
