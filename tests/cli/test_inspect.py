"""``fastdense inspect``: pictures and numbers of the network that was asked for, and errors that say what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import networks
from matplotlib.image import imread
from typer.testing import CliRunner

import fastdense
from fastdense.analysis.gradient_flow import BlockFlow, BlockReuse
from fastdense.analysis.plain import without_dense_connections
from fastdense.analysis.plots import flow_picture, reuse_picture
from fastdense.cli.app import app
from fastdense.data.source import digits

SMALL = ["--block-config", "3,2", "--growth-rate", "4", "--images", "16"]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["inspect", *arguments], env={"COLUMNS": "200", "TERM": "dumb"})


def looked(*arguments: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """What the command prints, and its numbers; its picture must be one."""
    kind = arguments[0]
    picture, numbers = folder / f"new/{kind}.png", folder / f"{kind}.json"
    result = run(*arguments, "--out", str(picture), "--json", str(numbers))
    assert result.exit_code == 0, result.output
    image = imread(picture)
    assert min(image.shape[:2]) > 400 and image.std() > 0.05
    return result.output, json.loads(numbers.read_text())


def own(seed: int = 0) -> fastdense.DenseNet:
    torch.manual_seed(seed)
    options: dict[str, Any] = {"growth_rate": 4, "block_config": (3, 2), "num_init_features": 8}
    return fastdense.DenseNet(**options, in_channels=1, num_classes=10, small_inputs=True)


def test_flow_is_that_of_the_network(tmp_path: Path) -> None:
    output, numbers = looked("flow", *SMALL, folder=tmp_path)
    data = digits()
    x, target = data.train_images[:16], data.train_labels[:16]
    model = own()
    torch.manual_seed(0)
    plain = without_dense_connections(model)
    dense_label, plain_label = numbers["flows"]
    assert dense_label == "DenseNet, freshly initialised"
    assert plain_label == "the same layers without dense connections, freshly initialised"
    for label, network in ((dense_label, model), (plain_label, plain)):
        for found, want in zip(numbers["flows"][label], fastdense.gradient_flow(network, x, target), strict=True):
            assert found["name"] == want.name
            assert found["total"] == pytest.approx(want.total.tolist(), rel=1e-9)
            assert torch.allclose(torch.tensor(found["contributions"]).double(), want.contributions)
    assert "blocks of 3, 2 layers, k = 4, freshly initialised" in numbers["title"]
    assert "16 images of scikit-learn's digits, 8x8" in numbers["caption"] and "float64" in numbers["caption"]
    assert "denseblock2" in output and "Picture: " in output
    assert numbers["command"].startswith("fastdense") and numbers["versions"]["torch"] == torch.__version__
    assert numbers["network"] == "DenseNet-BC, blocks of 3, 2 layers, k = 4" and numbers["loss"] == "cross-entropy"
    assert numbers["channels"] == {"features.denseblock1": [8, 12, 16, 20], "features.denseblock2": [10, 14, 18]}


def test_evaluation_mode_differs(tmp_path: Path) -> None:
    _, training = looked("flow", *SMALL, "--no-plain", folder=tmp_path)
    _, evaluation = looked("flow", *SMALL, "--no-plain", "--eval", folder=tmp_path)
    assert "running statistics" in evaluation["caption"] and "batch statistics" in training["caption"]
    (first,), (second,) = training["flows"].values(), evaluation["flows"].values()
    assert first[0]["total"] != pytest.approx(second[0]["total"], rel=1e-3)


def test_reuse_is_that_of_the_network(tmp_path: Path) -> None:
    output, numbers = looked("reuse", *SMALL[:4], folder=tmp_path)
    for found, want in zip(numbers["blocks"], fastdense.feature_reuse(own()), strict=True):
        assert found["name"] == want.name and torch.allclose(torch.tensor(found["weights"]).double(), want.weights)
    assert "denseblock1" in output
    assert numbers["channels"]["features.denseblock2"] == [10, 14, 18] and numbers["seed"] == 0


def test_a_state_dict_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(own(seed=5).state_dict(), path)
    _, numbers = looked("reuse", *SMALL[:4], "--weights", str(path), folder=tmp_path)
    for found, want in zip(numbers["blocks"], fastdense.feature_reuse(own(seed=5)), strict=True):
        assert torch.allclose(torch.tensor(found["weights"]).double(), want.weights)
    assert "weights of weights.pth" in numbers["title"]


MODELS = """
from helpers import networks

def torchvision():
    return networks.torchvision()[0]

def monai():
    return networks.monai()[0]

def nothing():
    return 3
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "models_of_somebody.py").write_text(MODELS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "models_of_somebody"


def test_models_from_elsewhere(models: str, tmp_path: Path) -> None:
    _, numbers = looked("flow", "--model", f"{models}:torchvision", "--images", "4", folder=tmp_path)
    assert "digits, 64x64" in numbers["caption"] and "arg-max" in numbers["caption"]  # it has five classes
    theirs, _ = networks.torchvision()
    images = digits(64).train_images[:4].expand(-1, 3, -1, -1)
    want = fastdense.gradient_flow(theirs, images)
    for found, block in zip(next(iter(numbers["flows"].values())), want, strict=True):
        assert found["total"] == pytest.approx(block.total.tolist(), rel=1e-9)
    _, numbers = looked("flow", "--model", f"{models}:monai", "--data", "random", "--image-size", "24", "--images", "2",
                        folder=tmp_path)  # fmt: skip
    assert "noise, 24x24x24" in numbers["caption"]
    looked("reuse", "--model", f"{models}:torchvision", folder=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flow", "--model", "densenet120"], "--model must be one of densenet121"),
        (
            ["flow", "--model", "nowhere:densenet"],
            "--model nowhere:densenet cannot be built (ModuleNotFoundError: No module named 'nowhere')",
        ),
        (["flow", "--model", "math:floor"], "--model math:floor cannot be built"),
        (["flow", "--model", "builtins:dict"], "--model builtins:dict returned a dict, not a torch.nn.Module"),
        (["flow", "--model", "torch.nn:Identity"], "has no dense block that fastdense understands"),
        (["flow", "--model", "torch.nn:Identity", "--depth", "22"], "--depth is for fastdense's own networks"),
        (["flow", "--depth", "23"], "--depth 23 does not fit"),
        (["flow", "--block-config", "3,x"], "--block-config must be whole numbers, as in 6,12,24, got '3,x'"),
        (["flow", "--weights", "nothing.pt"], "--weights nothing.pt cannot be read: No such file"),
        (["reuse", "--weights", __file__], "): save a state_dict with torch.save"),
        (["flow", "--depth", "22", "--images", "2000"], "--images must be at most 1437, the training images, got 2000"),
        (["flow", "--depth", "22", "--data", "nowhere"], "--data nowhere"),
        (["flow", "--depth", "22", "--data", "nowhere"], "(or --data random)"),
        (["flow", "--depth", "22", "--images", "4", "--out", "/proc/none/x.png"], "cannot be written"),
        (["flow", "--out", "x.txt"], "--out must name a PNG file, as flow.png, got x.txt"),
        (["reuse", "--out", "x"], "--out must name a PNG file"),
        (["flow", "--depth", "22", "--images", "4", "--device", "foo"], "--device foo cannot be used"),
        (["reuse", "--ema"], "--ema is for --weights with a checkpoint"),
    ],
)
def test_errors_say_what_to_do(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split()), result.output


def test_weights_of_another_network_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(own().state_dict(), path)
    result = run("reuse", "--depth", "22", "--weights", str(path))
    assert result.exit_code == 2 and "does not fit the network" in " ".join(result.output.split())
    torch.save([1, 2], path)
    result = run("reuse", "--weights", str(path))
    assert result.exit_code == 2 and "holds a list, not a state_dict" in " ".join(result.output.split())


def trained(folder: Path, *options: str) -> str:
    """The checkpoint of a few steps."""
    small = ["--depth", "16", "--growth-rate", "4", "--steps", "2", "--batch-size", "32", "--no-tensorboard"]
    result = CliRunner().invoke(app, ["train", *small, "--out", str(folder), *options])
    assert result.exit_code == 0, result.output
    return str(folder / "last.pt")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("runs")
    return {"dense": trained(folder / "dense", "--ema", "0.5"), "plain": trained(folder / "plain", "--plain")}


def test_checkpoints_say_which_network_they_are_of(checkpoints: dict[str, str], tmp_path: Path) -> None:
    dense, plain = checkpoints["dense"], checkpoints["plain"]
    _, numbers = looked("flow", "--weights", dense, "--plain-weights", plain, "--images", "8", folder=tmp_path)
    assert list(numbers["flows"]) == [
        "DenseNet, after 2 steps", "the same layers without dense connections, after 2 steps"
    ]  # fmt: skip
    stored = torch.load(dense, weights_only=True)["runs"]["fastdense"]
    model = fastdense.DenseNet(4, (2, 2, 2), 8, in_channels=1, num_classes=10, small_inputs=True)
    for ema, weights in (([], stored["model"]), (["--ema"], stored["ema"]["model"])):
        _, numbers = looked("reuse", "--weights", dense, *ema, folder=tmp_path)
        model.load_state_dict(weights)
        for found, want in zip(numbers["blocks"], fastdense.feature_reuse(model), strict=True):
            assert torch.allclose(torch.tensor(found["weights"]).double(), want.weights)
        assert ("averaged" in numbers["title"]) == bool(ema)
    _, numbers = looked("flow", "--weights", plain, "--images", "8", folder=tmp_path)
    assert list(numbers["flows"]) == ["without dense connections, after 2 steps"]
    assert "k = 4, without dense connections, after 2 steps" in numbers["title"]


def test_checkpoints_that_do_not_fit_are_refused(checkpoints: dict[str, str], tmp_path: Path) -> None:
    dense, plain = checkpoints["dense"], checkpoints["plain"]
    broken = bytearray(Path(dense).read_bytes())
    broken[len(broken) // 2] ^= 1
    (tmp_path / "broken.pt").write_bytes(bytes(broken))
    for arguments, message in (
        (["reuse", "--weights", plain], "is of a network without dense connections: it uses no feature again"),
        (["reuse", "--weights", plain, "--ema"], "has no averaged weights: leave --ema out"),
        (["reuse", "--weights", dense, "--depth", "16"], "--depth is not needed"),
        (["flow", "--weights", dense, "--plain-weights", dense], "is of a network with dense connections"),
        (
            ["flow", "--model", "densenet121", "--plain-weights", plain],
            "reads images of 1 channels, the other network of 3",
        ),
        (["reuse", "--weights", str(tmp_path / "broken.pt")], "is damaged or no checkpoint ("),
    ):
        result = run(*arguments)
        assert result.exit_code == 2 and message in " ".join(result.output.replace("│", " ").split()), result.output


def test_a_full_disk_leaves_the_picture_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(found: object, path: Path, **words: str) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastdense.analysis.plots.reuse_picture", full)
    picture = tmp_path / "reuse.png"
    picture.write_bytes(b"before")
    result = run("reuse", "--depth", "16", "--out", str(picture))
    assert result.exit_code == 2 and "No space left on device" in " ".join(result.output.split())
    assert picture.read_bytes() == b"before" and [path.name for path in tmp_path.iterdir()] == ["reuse.png"]


@pytest.mark.parametrize("layers", [(1,), (2, 1, 3, 2), (60,)])
def test_pictures_of_any_shape(layers: tuple[int, ...], tmp_path: Path) -> None:
    flows, reuses = [], []
    for i, L in enumerate(layers):
        matrix = torch.rand(L + 1, L + 1, dtype=torch.float64).triu() * 10.0 ** -torch.arange(L + 1).double()
        flows.append(BlockFlow(f"features.denseblock{i + 1}", matrix.sum(1), matrix))
        reuses.append(BlockReuse(f"features.denseblock{i + 1}", torch.rand(L + 1, L, dtype=torch.float64).triu()))
    flow_picture({"a": flows, "b": flows}, tmp_path / "flow.png", title="t", caption="c")
    reuse_picture(reuses, tmp_path / "reuse.png", title="t", caption="c")
    zero = [BlockFlow("", torch.zeros(3), torch.zeros(3, 3))]
    flow_picture({"a": zero}, tmp_path / "zero.png", title="nothing flows", caption="c")
    bad = [BlockFlow("", torch.full((3,), torch.nan), torch.full((3, 3), torch.inf))]
    flow_picture({"a": bad}, tmp_path / "bad.png", title="broken", caption="c")
    for name in ("flow", "reuse", "zero", "bad"):
        assert imread(tmp_path / f"{name}.png").std() > 0.02
