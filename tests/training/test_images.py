"""Folders of images: which files count, what part of each is seen, how it is decoded, and what is unreadable."""

import importlib
import multiprocessing
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import peers
from helpers.pictures import FixedViews, all_of, smooth, write_folder
from PIL import Image, ImageOps

from fastdense.data import augment, folders, images
from fastdense.data.images import UnreadableImage, read_image
from fastdense.data.source import Source, open_data

SIZE = 28


def _open(root: Path, **options: Any) -> Source:
    return open_data(str(root), **{"image_size": SIZE, **options})


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
    shown = ["train/cat/0.png", "train/dog/0.png", "val/cat/0.png", "val/dog/0.png", "elsewhere/1.png"]
    shown.append(os.fsdecode(b"train/dog/caf\xe9.png"))  # a name that is no UTF-8
    touch(tmp_path, *shown, "train/.ipynb_checkpoints/0.png", "train/cat/._0.png", "train/cat/.cache/0.png")
    (tmp_path / "train" / "cat" / "up").symlink_to("..")
    (tmp_path / "train" / "dog" / "linked").symlink_to(tmp_path / "elsewhere")
    train, _, names = folders.find(tmp_path)
    assert names == ("cat", "dog") and train.labels.tolist() == [0] * 4 + [1] * 3
    found = [os.fsencode(train.path(i)).removeprefix(os.fsencode(tmp_path / "train")) for i in range(len(train))]
    # A link to a folder above shows its images once more, and no further.
    assert found == [b"/cat/0.png", b"/cat/up/dog/0.png", b"/cat/up/dog/caf\xe9.png", b"/cat/up/dog/linked/1.png",
                     b"/dog/0.png", b"/dog/caf\xe9.png", b"/dog/linked/1.png"]  # fmt: skip


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
        (["cat/0.txt", "dog/0.png"], r"no images \(jpg jpeg png bmp webp tif tiff gif ppm pgm\) in cat: add some"),
        (["train/cat/0.png"], "has train/ and none of val, validation, test"),
        (["train/cat/0.png", "val/0.png"], "val has no subfolders"),
        (["train/cat/0.png", "val/dog/0.png", "val/eel/0.png"], "val/ has classes that train/ lacks: dog, eel: add"),
        (["train/cat/0.png", "train/dog/0.txt", "val/cat/0.png"], "no images .* in train/dog: add some"),
        (["train/cat/0.png", "val/cat/0.png"], "has a single class, cat, and nothing to tell it from: a folder"),
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


def test_a_folder_gives_standardised_images_and_the_classes_of_its_subfolders(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "pets")
    source = _open(root)
    assert (source.name, source.class_names, source.classes) == ("pets (2 classes)", ("cat", "dog"), 2)
    assert (source.train_count, source.test_count, source.channels, source.image_size) == (12, 4, 3, SIZE)
    batch, labels = all_of(source, labels=True)
    assert batch.shape == (12, 3, SIZE, SIZE) and batch.dtype == torch.float32 and batch.is_contiguous()
    assert labels.tolist() == [0] * 6 + [1] * 6 and labels.dtype == torch.int64
    parts = list(source.test(torch.arange(4), batch_size=3))
    assert [part.tolist() for _, part in parts] == [[0, 0, 1], [1]]
    square = smooth(32, 32)
    square.save(root / "val" / "cat" / "0.png")  # 28/32 is 224/256: its centre is not resized
    ((batch, _),) = source.test(torch.tensor([0]), 1)
    # ImageNet's standardisation, as torchvision's ToTensor and Normalize do it.
    pixels = torch.from_numpy(np.array(square.crop((2, 2, 30, 30)))).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(batch[0], (pixels - mean) / std, atol=1e-5, rtol=0)
    assert open_data(str(root)).image_size == 224
    assert source.to(torch.device("cpu")).unreadable is source.unreadable


def _transforms() -> Any:
    peers.torchvision()
    return importlib.import_module("torchvision.transforms")


def _their_part(width: int, height: int) -> augment.Box:
    """A random part of an image, as torchvision draws it."""
    image = torch.empty(3, height, width)
    top, left, h, w = _transforms().RandomResizedCrop.get_params(image, augment.AREA, augment.RATIO)
    return left, top, left + w, top + h


@pytest.mark.parametrize(("width", "height"), [(40, 30), (30, 47), (33, 33), (300, 31), (9, 13), (1, 1), (35, 32)])
@pytest.mark.parametrize("size", [28, 33])
def test_images_to_test_on_are_cut_out_as_torchvision_does(tmp_path: Path, width: int, height: int, size: int) -> None:
    image, transforms = smooth(width, height, detail=9), _transforms()
    image.save(tmp_path / "x.png")
    whole, middle = transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)
    expected = np.array(middle(whole(image))).astype(int)
    found = read_image(tmp_path / "x.png", 0, augment.Views("none", size))
    assert found.dtype == np.uint8 and found.shape == (size, size, 3)
    # Pillow keeps a box in single precision, and rounds after each of its two passes.
    assert abs(found - expected).max() <= 1


def test_random_places_are_places_of_the_scaled_image() -> None:
    boxes = {augment.scaled_box(64, 32, 28, random.Random(i)) for i in range(2000)}
    assert {left for left, *_ in boxes} == set(range(37)) and {top for _, top, *_ in boxes} == set(range(5))
    assert all((right - left, bottom - top) == (28, 28) for left, top, right, bottom in boxes)


@pytest.mark.parametrize(("width", "height"), [(1000, 10), (7, 900), (1, 1)])
def test_images_without_a_part_of_the_ratio(width: int, height: int) -> None:
    wanted = _their_part(width, height)
    assert {augment.part_box(width, height, random.Random(i)) for i in range(5)} == {wanted}


def test_random_parts_are_distributed_as_torchvisions() -> None:
    width, height, count = 100, 60, 2000
    wanted = torch.tensor([_their_part(width, height) for _ in range(count)]).double()
    ours = torch.tensor([augment.part_box(width, height, random.Random(i)) for i in range(count)]).double()
    for boxes in (wanted, ours):
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
    error = (wanted.var(0) / count + ours.var(0) / count).sqrt()
    assert ((wanted.mean(0) - ours.mean(0)).abs() < 5 * error).all()
    sides = ours[:, 2:] - ours[:, :2]
    assert 0.07 < sides.prod(1).min() / (width * height) < 0.1
    assert ((sides[:, 0] / sides[:, 1]).log().abs() < np.log(4 / 3) + 0.07).all()
    torch.testing.assert_close(sides.prod(1).std(), (wanted[:, 2:] - wanted[:, :2]).prod(1).std(), rtol=0.08, atol=0)


@pytest.mark.parametrize("kind", ["crop-flip", "resized-crop"])
def test_half_of_the_images_are_mirrored(tmp_path: Path, kind: str) -> None:
    smooth(40, 40).save(tmp_path / "x.png")
    views = augment.Views(kind, SIZE)
    flips = [views(number, 40, 40)[1] for number in range(1000)]
    assert 420 < sum(flips) < 580
    number = flips.index(True)
    box, _ = views(number, 40, 40)
    expected = smooth(40, 40).resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)
    assert np.array_equal(read_image(tmp_path / "x.png", number, views), np.asarray(ImageOps.mirror(expected)))


def _whole(path: Path, side: int) -> np.ndarray[Any, Any]:
    return read_image(path, 0, FixedViews("none", side)).astype(int)


COLOUR, GREY = smooth(16, 16), smooth(16, 16).convert("L")
HOLE = Image.linear_gradient("L").resize((16, 16)).point(lambda value: 255 * (value > 120))
ON_WHITE = Image.composite(COLOUR, Image.new("RGB", (16, 16), "white"), HOLE)
PALETTE = COLOUR.quantize(200)
GREY16 = Image.fromarray(np.asarray(GREY).astype(np.uint16) * 256 + 77)
RGBA = Image.merge("RGBA", (*COLOUR.split(), HOLE))
FINE = {"quality": 100, "subsampling": 0}


@pytest.mark.parametrize(
    ("image", "format", "options", "expected", "tolerance"),
    [
        (GREY, "PNG", {}, GREY, 0),
        (GREY16, "PNG", {}, GREY, 0),
        (PALETTE, "PNG", {"transparency": bytes(200)}, Image.new("RGB", (16, 16), "white"), 0),
        (PALETTE, "GIF", {"save_all": True, "append_images": [GREY]}, PALETTE, 0),  # the first of two
        (RGBA, "WEBP", {"lossless": True}, ON_WHITE, 0),
        (COLOUR.convert("CMYK"), "JPEG", {"quality": 100}, COLOUR, 8),
        (GREY.convert("1"), "TIFF", {}, GREY.convert("1"), 0),
        (COLOUR, "MPO", {**FINE, "save_all": True, "append_images": [GREY]}, COLOUR, 4),
        (COLOUR, "PPM", {}, COLOUR, 0),
        (COLOUR, "BMP", {}, COLOUR, 0),
        (COLOUR, "JPEG", {**FINE, "exif": b"Exif\0\0rubbish"}, COLOUR, 4),
    ],
    ids=lambda value: getattr(value, "mode", None) or (" ".join(value) if isinstance(value, dict) else str(value)),
)
@pytest.mark.filterwarnings("error")
def test_every_kind_of_image_becomes_rgb(
    tmp_path: Path, image: Any, format: str, options: Any, expected: Any, tolerance: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)  # Pillow warns above it, and refuses twice as many
    image.save(tmp_path / "x.png", format, **options)
    assert abs(_whole(tmp_path / "x.png", 16) - np.asarray(expected.convert("RGB"))).max() <= tolerance


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_images_are_upright(tmp_path: Path, format: str, orientation: int) -> None:
    upright, exif = smooth(500, 300), Image.Exif()
    upright.save(tmp_path / "upright", format)
    # Turn it that way first: what undoes it is stored with it.
    upright.getexif()[0x0112] = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)
    exif[0x0112] = orientation
    ImageOps.exif_transpose(upright).save(tmp_path / "turned", format, exif=exif)
    # Small enough that JPEG is decoded at a quarter; an off-centre part, so that a wrong corner is seen.
    views = augment.Views("crop-flip", 14, seed=3)
    found, expected = (read_image(tmp_path / name, 0, views).astype(int) for name in ("turned", "upright"))
    assert abs(found - expected).max() <= (8 if format == "JPEG" else 1)


def test_large_jpegs_are_decoded_at_a_fraction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = smooth(1600, 1201, detail=12)
    image.save(tmp_path / "x.jpg", quality=95)
    decoded: list[tuple[int, int]] = []
    original = images._rgb
    monkeypatch.setattr(images, "_rgb", lambda image: decoded.append(image.size) or original(image))
    for size, expected in ((28, (200, 151)), (100, (400, 301)), (200, (800, 601)), (400, (1600, 1201))):
        views = augment.Views("none", size)
        found = read_image(tmp_path / "x.jpg", 0, views)
        assert decoded[-1] == expected
        box, _ = views(0, 1600, 1201)
        exact = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box)).astype(int)
        assert abs(found - exact).max() <= 6
    smooth(1600, 600).save(tmp_path / "flat.jpg")
    _whole(tmp_path / "flat.jpg", 150)
    assert decoded[-1] == (800, 300)  # a quarter would do for the width alone


BREAKINGS: dict[str, tuple[Any, str]] = {
    "missing png": (Path.unlink, "No such file or directory"),
    "iconic png": (lambda path: smooth(8, 8).save(path, "ICO"), "cannot identify image file"),
    "textual jpg": (lambda path: path.write_bytes(b"<html>404</html>"), "cannot identify image file"),
    "cut jpg": (lambda path: path.write_bytes(path.read_bytes()[:400]), "Truncated File Read"),
    "short jpg": (lambda path: path.write_bytes(path.read_bytes()[:-40]), "image file is truncated"),
    "wrong png": (lambda path: path.write_bytes(path.read_bytes().replace(b"IDAT", b"IDAT0")), "broken"),
    "huge png": (lambda path: Image.new("1", (3000, 3000)).save(path), "exceeds limit"),
    "floating png": (lambda path: Image.new("F", (8, 8)).save(path, "TIFF"), "floating-point numbers, whose range"),
}


@pytest.mark.parametrize("broken", BREAKINGS)
def test_an_unreadable_image_is_named_or_replaced(tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extension = broken.split()[1]
    root = write_folder(tmp_path, train=3, extension=extension)
    whole = all_of(_open(root, augment="none"))
    stop, skip = _open(root), _open(root, augment="none", on_error="skip")
    path = root / "train" / "cat" / f"2.{extension}"
    spoil, reason = BREAKINGS[broken]
    spoil(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
    with pytest.raises(UnreadableImage, match=f"{path}: .*({reason}).*--on-error skip"):
        all_of(stop)
    for _ in range(2):
        batch, labels = all_of(skip, labels=True)
        assert labels.tolist() == [0, 0, 1, 1, 1, 1]  # the dog after the cat
        torch.testing.assert_close(batch[2], batch[3])
        assert torch.equal(batch[[0, 1, 3, 4, 5]], whole[[0, 1, 3, 4, 5]])
    (line,) = skip.unreadable
    assert line.startswith(f"{path}: ") and "\n" not in line


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_noted_once_in_the_order_found(tmp_path: Path, workers: int) -> None:
    root = write_folder(tmp_path, train=4, test=3)
    bad = [root / name for name in ("train/cat/0.png", "train/dog/2.png", "train/dog/3.png", "val/dog/1.png")]
    for path in bad:
        path.write_bytes(b"")
    source = _open(root, on_error="skip", workers=workers)
    for epoch in (1, 2):
        batch, labels = all_of(source, epoch, 2, labels=True)
        assert labels.tolist() == [0, 0, 0, 0, 1, 1, 0, 0]  # after the last one comes the first, and it is bad too
        assert not torch.equal(batch[0], batch[1]), "the same image in its own view and as a replacement"
    parts = list(source.test(torch.arange(6), batch_size=2))
    assert [labels.tolist() for _, labels in parts] == [[0, 0], [0, 1], [1]]  # left out: a test repeats no image
    assert [len(part) for part, _ in parts] == [2, 2, 1]
    assert [line.partition(": ")[0] for line in source.unreadable] == [str(path) for path in bad]
    assert [labels.tolist() for _, labels in source.test(torch.arange(6), 1)] == [[0], [0], [0], [1], [1]]
    with pytest.raises(UnreadableImage, match=r"val/dog/1.png: .*Repair or remove it, or pass --on-error skip"):
        list(_open(root, workers=workers).test(torch.arange(6), 2))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_without_a_readable_image_is_an_error(tmp_path: Path, workers: int) -> None:
    root = write_folder(tmp_path)
    source = _open(root, on_error="skip", workers=workers)
    for path in root.glob("*/*/*.png"):
        path.unlink()
    with pytest.raises(UnreadableImage, match=r"none of 12 images can be read, the first: .*0\.png: No such file"):
        all_of(source)
    assert len(source.unreadable) == 1
    with pytest.raises(UnreadableImage, match="none of 4 images can be read"):
        list(source.test(torch.arange(4), 2))
    assert list(source.test(torch.arange(0), 2)) == []


@pytest.mark.skipif(torch.multiprocessing.get_start_method() != "fork", reason="other processes see no patch")
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError, r"--workers 2 processes failed: DataLoader .*(kill|exit).*try fewer.*--workers 0"),
        (MemoryError, "for want of memory"),  # which is not the image's fault
    ],
    ids=["dies", "raises"],
)
def test_a_worker_that_fails_is_an_error_and_no_process_is_left(
    tmp_path: Path, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        if error is RuntimeError:
            os.kill(os.getpid(), signal.SIGKILL)
        raise MemoryError("for want of memory")

    source = _open(write_folder(tmp_path), workers=2, on_error="skip")
    monkeypatch.setattr(images, "_view", fail)
    with pytest.raises(error, match=message):
        all_of(source)
    assert multiprocessing.active_children() == []  # nothing is left to wait for
