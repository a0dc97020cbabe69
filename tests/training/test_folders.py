"""Which files of a folder are images, of which class, and to train or to test on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import peers
from helpers.pictures import smooth, write_folder

from fastdense.data import folders
from fastdense.data.source import open_data


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_classes_and_order_are_torchvisions(tmp_path: Path) -> None:
    peers.torchvision()
    from torchvision.datasets import ImageFolder

    for name in ("b/2.png", "b/10.JPG", "B/a.png", "10/x.jpeg", "9/x.bmp", "9/deep/er/0.png", "9/deep.png"):
        touch(tmp_path, *(f"{side}/{name}{extra}" for side in ("train", "test") for extra in ("", ".txt")))
    train, test, names = folders.find(tmp_path)
    for files, side in ((train, "train"), (test, "test")):
        peer = ImageFolder(tmp_path / side)
        assert list(names) == peer.classes == ["10", "9", "B", "b"]
        assert [(str(files.path(i)), int(files.labels[i])) for i in range(len(files))] == peer.samples


def test_labels_are_those_of_training_where_testing_lacks_a_class(tmp_path: Path) -> None:
    touch(tmp_path, "train/cat/0.png", "train/dog/0.png", "validation/dog/0.png", "test/cat/0.png")
    _, test, names = folders.find(tmp_path)
    assert names == ("cat", "dog")
    assert test.labels.tolist() == [1] and test.path(0) == tmp_path / "validation" / "dog" / "0.png"


def test_hidden_files_are_left_out_and_links_are_followed_once(tmp_path: Path) -> None:
    root = write_folder(tmp_path, train=1, test=1)
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "cat" / "._0.png").write_bytes(b"resource fork")
    (root / "train" / "cat" / ".cache").mkdir()
    smooth(8, 8).save(root / "train" / "cat" / ".cache" / "0.png")
    (root / "train" / "cat" / "up").symlink_to("..")
    (root / "elsewhere").mkdir()
    smooth(8, 8).save(root / "elsewhere" / "1.png")
    (root / "train" / "dog" / "linked").symlink_to(root / "elsewhere")
    smooth(8, 8).save(os.fsencode(root / "train" / "dog") + b"/caf\xe9.png")  # a name that is no UTF-8
    train, _, names = folders.find(root)
    assert names == ("cat", "dog")
    found = [os.fsencode(train.path(i)).removeprefix(os.fsencode(root / "train")) for i in range(len(train))]
    # A link to a folder above shows its images once more, and no further.
    assert found == [b"/cat/0.png", b"/cat/up/dog/0.png", b"/cat/up/dog/caf\xe9.png", b"/cat/up/dog/linked/1.png",
                     b"/dog/0.png", b"/dog/caf\xe9.png", b"/dog/linked/1.png"]  # fmt: skip
    batches = open_data(str(root), image_size=8).train([torch.arange(7)], epoch=1)
    assert [labels.tolist() for _, labels in batches] == [[0] * 4 + [1] * 3]


def test_a_folder_without_sides_is_split_by_the_paths(tmp_path: Path) -> None:
    # Two classes, one of that name.
    touch(tmp_path, *(f"{name}/{i}.png" for name in ("b", "train") for i in range(500)))
    train, test, names = folders.find(tmp_path)
    assert names == ("b", "train")
    assert train.labels.bincount().tolist() == [412, 403]  # fixed for ever: the paths alone decide
    assert test.labels.bincount().tolist() == [88, 97]
    touch(tmp_path, *(f"a/{i}.png" for i in range(50)))
    (tmp_path / "b" / "0.png").unlink()
    more_train, more_test, names = folders.find(tmp_path)
    assert names == ("a", "b", "train")
    assert not set(more_train.paths.tolist()) & set(test.paths.tolist())
    assert not set(more_test.paths.tolist()) & set(train.paths.tolist())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has no subfolders: a folder needs train/ and val/ with a subfolder of images for each class"),
        (["a.png"], "has no subfolders: a folder needs"),
        (["cat/0.txt", "dog/0.png"], r"no images \(jpg jpeg png bmp webp tif tiff gif ppm pgm\) in cat: add some"),
        (["train/cat/0.png"], "has train/ and none of val, validation, test"),
        (["train/cat/0.png", "val/0.png"], "val has no subfolders"),
        (["train/0.png", "val/0.png"], "train has no subfolders"),
        (["train/cat/0.png", "val/dog/0.png", "val/eel/0.png"], "val/ has classes that train/ lacks: dog, eel: add"),
        (["train/cat/0.png", "train/dog/0.txt", "val/cat/0.png"], "no images .* in train/dog: add some"),
        (["train/cat/0.png", "test/cat/0.txt"], "no images .* in test/cat"),
        (["train/cat/0.png", "val/cat/0.png"], "has a single class, cat, and nothing to tell it from: a folder"),
        (["cat/0.png", "cat/1.png"], "has a single class, cat, and"),
        (["train/0.png"], "has a single class, train, and nothing to tell it from: a folder needs train/"),
        (["a/0.png", "b/1.png"], "leaves none of 2 images to test on: add images, or make train/ and val/ yourself"),
        (["a/0.png", "a/1.png", "b/2.png"], "leaves no image to train on of b: add images"),
        ([f"{i:02}/0.txt" for i in range(20)], "in 00, 01, 02, 03, 04, 05, 06, 07, 08, 09 and 10 more: add"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_used_is_an_error_that_says_why(tmp_path: Path, files: list[str], message: str) -> None:
    touch(tmp_path, *files)
    with pytest.raises(ValueError, match=message):
        open_data(str(tmp_path))


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folder(tmp_path)
    original = os.scandir

    def refuse(path: Any) -> Any:
        if os.fspath(path).endswith("cat"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"--data: cannot list .*train/cat: Permission denied"):
        open_data(str(root))
