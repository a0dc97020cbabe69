"""Digits, CIFAR's files and augmentation: every image as published, standardised, and varied by its number alone."""

import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import peers
from helpers.pictures import FixedViews, all_of, write_folder

from fastdense.data import augment
from fastdense.data.source import Source, digits, open_data

PER_FILE = 6
Arrays = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def python_2_pickle(value: Any) -> bytes:
    """The bytes that ``cPickle.dump(value, file, 2)`` wrote, as in the published files: bytes were its texts."""

    def encoded(value: Any) -> bytes:
        match value:
            case bytes():
                return b"T" + len(value).to_bytes(4, "little") + value
            case int():
                return b"J" + value.to_bytes(4, "little")
            case list():
                return b"](" + b"".join(map(encoded, value)) + b"e"
            case dict():
                return b"}(" + b"".join(encoded(key) + encoded(item) for key, item in value.items()) + b"u"
        shape = b"".join(map(encoded, value.shape)) + b"\x86"
        dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
        return made + b"(K\x01" + shape + dtype + b"\x89" + encoded(value.tobytes()) + b"tb"

    return b"\x80\x02" + encoded(value) + b"."


def write(root: Path, kind: str, classes: int) -> list[Arrays]:
    """The files of the Python or the binary version of CIFAR, and what is in them; the last one is for testing."""
    name, meta = {
        ("python", 10): ("cifar-10-batches-py", "batches.meta"),
        ("python", 100): ("cifar-100-python", "meta"),
        ("binary", 10): ("cifar-10-batches-bin", "batches.meta.txt"),
        ("binary", 100): ("cifar-100-binary", "fine_label_names.txt"),
    }[kind, classes]
    files = ["train", "test"] if classes == 100 else [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    folder, fine = root / name, b"fine_" if classes == 100 else b""
    folder.mkdir(parents=True)
    written, rng = [], np.random.default_rng(0)
    for file in files:
        images, labels = rng.integers(0, 256, (PER_FILE, 3, 32, 32), dtype=np.uint8), rng.integers(0, classes, PER_FILE)
        written.append((images, labels))
        pixels, coarse = images.reshape(PER_FILE, -1), 99 - labels
        if kind == "python":
            contents = {b"data": pixels, fine + b"labels": labels.tolist(), b"coarse_labels": coarse.tolist()}
            (folder / file).write_bytes(python_2_pickle(contents))
        else:
            columns = [*([coarse[:, None]] if classes == 100 else []), labels[:, None], pixels]
            (folder / f"{file}.bin").write_bytes(np.concatenate(columns, 1).astype(np.uint8).tobytes())
    if kind == "python":
        (folder / meta).write_bytes(python_2_pickle({fine + b"label_names": [b"name%d" % i for i in range(classes)]}))
    else:
        (folder / meta).write_text("".join(f"name{i}\n" for i in range(classes)) + "\n")
    return written


@pytest.mark.parametrize("itself", [False, True], ids=["its parent", "itself"])
@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("kind", ["python", "binary"])
def test_cifar_is_read_as_published(tmp_path: Path, kind: str, classes: int, itself: bool) -> None:
    *train, (test_images, test_labels) = write(tmp_path, kind, classes)
    source = open_data(str(next(tmp_path.iterdir()) if itself else tmp_path), augment="none")
    assert (source.name, source.channels, source.classes, source.image_size) == (f"CIFAR-{classes}", 3, classes, 32)
    assert source.class_names == tuple(f"name{i}" for i in range(classes))
    assert (source.train_count, source.test_count) == (PER_FILE * len(train), PER_FILE)
    assert source.unreadable == []

    pixels = np.concatenate([images for images, _ in train]).astype(np.float64)
    mean, std = (f(pixels, axis=(0, 2, 3)).reshape(3, 1, 1) for f in (np.mean, np.std))
    numbers = torch.randperm(source.train_count)
    ((images, labels),) = source.train([numbers], epoch=1)
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    torch.testing.assert_close(images.double(), torch.from_numpy((pixels - mean) / std)[numbers], atol=1e-6, rtol=1e-6)
    assert torch.equal(labels, torch.from_numpy(np.concatenate([labels for _, labels in train]))[numbers])

    parts = list(source.test(torch.arange(PER_FILE), batch_size=4))
    assert [len(labels) for _, labels in parts] == [4, 2]
    expected = torch.from_numpy((test_images - mean) / std)
    torch.testing.assert_close(torch.cat([part for part, _ in parts]).double(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(torch.cat([labels for _, labels in parts]), torch.from_numpy(test_labels))


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_is_read_as_torchvision_reads_it(tmp_path: Path, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    peers.torchvision()
    from torchvision.datasets import cifar as theirs

    monkeypatch.setattr(theirs, "check_integrity", lambda path, md5: True)  # the published files' checksums
    write(tmp_path, "python", classes)
    source = open_data(str(tmp_path))
    for side in ("train", "test"):
        peer = getattr(theirs, f"CIFAR{classes}")(tmp_path, train=side == "train")
        assert np.array_equal(peer.data, getattr(source, f"{side}_images").permute(0, 2, 3, 1).numpy())
        assert peer.targets == getattr(source, f"{side}_labels").tolist()
        assert tuple(peer.classes) == source.class_names


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.filterwarnings("error")  # of PyTorch, about arrays that may not be written to
def test_cifar_may_be_pickled_again(tmp_path: Path, protocol: int) -> None:
    written = write(tmp_path, "python", 10)
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    images, labels = written[-1]
    path.write_bytes(pickle.dumps({"data": images.reshape(PER_FILE, -1), "labels": labels}, protocol))
    (path.parent / "batches.meta").unlink()
    source: Any = open_data(str(tmp_path))
    assert np.array_equal(source.test_images.numpy(), images)
    assert source.class_names == tuple("0123456789")


class _Calls:
    """What, unpickled, calls something; called, it would be another error."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("/",)


@pytest.mark.parametrize(
    ("kind", "file", "change", "message"),
    [
        (
            "python",
            "data_batch_3",
            lambda old: pickle.dumps({b"data": _Calls()}),
            r"it asks for posix\.mkdir, which",
        ),
        ("python", "data_batch_2", lambda old: old[:-100], "data_batch_2 is damaged.*download it again"),
        ("python", "data_batch_2", lambda old: pickle.dumps([1]), "it holds a list, not a dict"),
        ("python", "data_batch_2", lambda old: pickle.dumps({b"data": 0}), "damaged.*KeyError: b'labels'"),
        ("python", "test_batch", lambda old: None, "lacks test_batch of CIFAR-10: unpack its archive again"),
        ("python", "batches.meta", lambda old: pickle.dumps({b"label_names": [b"a"]}), "meta.*1 names for 10"),
        ("binary", "data_batch_5.bin", lambda old: old[:-1], "18437 bytes are no multiple of 3073"),
        ("binary", "data_batch_5.bin", lambda old: b"", r"data_batch_5.bin is damaged.*for \(0,\) labels"),
        ("binary", "data_batch_5.bin", lambda old: b"\x0a" + old[1:], "labels are . to 10, not within 0 to 9"),
    ],
)
def test_damaged_files_of_cifar_are_named(tmp_path: Path, kind: str, file: str, change: Any, message: str) -> None:
    write(tmp_path, kind, 10)
    path = next(tmp_path.glob(f"*/{file}"))
    contents = change(path.read_bytes())
    path.unlink()
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(ValueError, match=message):
        open_data(str(tmp_path))


def test_several_cifars_in_one_folder_are_told_apart_by_their_names(tmp_path: Path) -> None:
    write(tmp_path, "python", 10)
    write(tmp_path, "binary", 100)
    with pytest.raises(ValueError, match="cifar-10-batches-py and cifar-100-binary: name the folder of one"):
        open_data(str(tmp_path))
    assert open_data(str(tmp_path / "cifar-100-binary")).name == "CIFAR-100"


def test_images_of_one_colour_are_zero(tmp_path: Path) -> None:
    write(tmp_path, "binary", 100)
    record = b"\0\1" + bytes([9]) * 1024 + bytes([255]) * 1024 + bytes(1024)
    (tmp_path / "cifar-100-binary" / "train.bin").write_bytes(record * 3)
    ((images, _),) = open_data(str(tmp_path), augment="none").train([torch.arange(3)], epoch=0)
    assert torch.equal(images, torch.zeros(3, 3, 32, 32))


def _cifar(tmp_path: Path, **options: Any) -> Source:
    if not list(tmp_path.iterdir()):
        write(tmp_path, "binary", 10)
    return open_data(str(tmp_path), **options)


def _folder(tmp_path: Path, **options: Any) -> Source:
    if not list(tmp_path.iterdir()):
        write_folder(tmp_path)
    return open_data(str(tmp_path), **{"image_size": 28, **options})


SOURCES = pytest.mark.parametrize("source_of", [_cifar, _folder], ids=["CIFAR", "folder"])


def test_crop_flip_is_padding_cropping_and_mirroring(tmp_path: Path) -> None:
    plain, augmented = all_of(_cifar(tmp_path, augment="none"), 3), all_of(_cifar(tmp_path, seed=5), 3)
    table = augment.crop_flip_table(len(plain), seed=5, epoch=3)
    for image, crop, top, left, flip in zip(plain, augmented, *table, strict=True):
        expected = F.pad(image, (4, 4, 4, 4))[:, top : top + 32, left : left + 32]
        assert torch.equal(crop, expected.flip(2) if flip else expected)


def test_crop_flip_draws_every_corner_equally_often() -> None:
    top, left, flip = augment.crop_flip_table(81 * 1000, seed=0, epoch=0)
    counts = (top * 9 + left).bincount(minlength=81)
    assert len(counts) == 81
    assert ((counts - 1000).abs() < 5 * 1000**0.5).all()  # five standard deviations
    for corner in (top == 0) & (left == 0), (top == 8) & (left == 3):
        assert abs(flip[corner].double().mean() - 0.5) < 0.08


@SOURCES
@pytest.mark.parametrize("kind", ["crop-flip", "resized-crop"])
def test_augmentation_depends_on_seed_epoch_and_number_alone(tmp_path: Path, kind: str, source_of: Any) -> None:
    source = source_of(tmp_path, augment=kind, seed=1)
    images, labels = all_of(source, 2, labels=True)
    order = torch.randperm(source.train_count)
    workers = (0, 2) if source_of is _folder else (0,)  # which read the files of folders
    for again in (source_of(tmp_path, augment=kind, seed=1, workers=n) for n in workers):
        parts = list(again.train(order.split(4), epoch=2))
        assert torch.equal(torch.cat([part for part, _ in parts]), images[order])
        assert torch.equal(torch.cat([part for _, part in parts]), labels[order])
    ((some, few),) = source.train([torch.tensor([9, 3, 9])], epoch=2)
    assert torch.equal(some, images[[9, 3, 9]]) and torch.equal(few, labels[[9, 3, 9]])
    other = source_of(tmp_path, augment=kind, seed=2)
    for different in (all_of(source, 1), all_of(other, 2), all_of(other, 1)):
        changed = (different != images).flatten(1).any(1).double().mean()
        assert changed > (0.8 if source_of is _folder else 0.9)


def test_resized_crop_is_cropping_and_resizing() -> None:
    images = torch.rand(4, 2, 24, 32)
    found = augment.resized_crop(images, torch.arange(4), FixedViews("resized-crop", 48))
    whole = F.interpolate(images[:2], size=(48, 48), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found[0], whole[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1], whole[1].flip(2), atol=1e-5, rtol=0)
    # Within a part, the pixels next to its edge lean on their neighbours outside, as in Pillow.
    part = F.interpolate(images[2:, :, 8:16, 3:19], size=(48, 48), mode="bilinear", align_corners=False)
    inside = (slice(None), slice(3, -3), slice(2, -2))
    torch.testing.assert_close(found[2][inside], part[0][inside], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[3][inside], part[1].flip(2)[inside], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("size", "antialias"), [(48, False), (12, True)], ids=["enlarged", "reduced"])
def test_cifar_in_another_size_is_resized(tmp_path: Path, size: int, antialias: bool) -> None:
    source = _cifar(tmp_path, image_size=size)
    assert source.image_size == size
    expected = F.interpolate(all_of(_cifar(tmp_path), 1), size=(size, size), mode="bilinear", antialias=antialias)
    assert torch.equal(all_of(source, 1), expected)
    ((images, _),) = source.test(torch.arange(6), 6)
    assert images.shape == (6, 3, size, size)
    assert all_of(_cifar(tmp_path, image_size=size, augment="resized-crop"), 1).shape == expected.shape


def test_digits_are_split_and_standardised_and_come_as_they_are_unless_augmented() -> None:
    data = digits()
    assert data.train_images.mean() == pytest.approx(0, abs=1e-5)
    assert data.train_images.std() == pytest.approx(1, abs=1e-5)
    # The statistics are the training images' own: the test images' differ a little.
    assert 1e-5 < abs(data.test_images.mean().item()) < 0.1
    shares = [labels.bincount() / len(labels) for labels in (data.train_labels, data.test_labels)]
    torch.testing.assert_close(*shares, atol=2e-3, rtol=0)

    source = open_data("digits", seed=3)
    assert (source.name, source.image_size, source.channels) == ("scikit-learn's digits, 8x8", 8, 1)
    assert (source.train_count, source.test_count, source.class_names) == (1437, 360, tuple("0123456789"))
    numbers = torch.randperm(1437)[:64]
    augmented = open_data("digits", augment="crop-flip")
    for same in (source, source.to(torch.device("cpu")), augmented):
        ((images, labels),) = same.train([numbers], epoch=4)
        assert torch.equal(images, data.train_images[numbers]) == (same is not augmented)
        assert torch.equal(labels, data.train_labels[numbers])
    ((images, labels),) = source.test(torch.arange(360), 360)
    assert torch.equal(images, data.test_images) and torch.equal(labels, data.test_labels)
    resized = open_data("digits", image_size=16)
    assert resized.image_size == 16 and resized.train_images.shape == (1437, 1, 16, 16)  # type: ignore[union-attr]


@SOURCES
@pytest.mark.parametrize("options", [{}, {"augment": "none"}, {"augment": "resized-crop"}, {"workers": 1}], ids=str)
def test_random_generators_stay_as_they_are(tmp_path: Path, options: dict[str, Any], source_of: Any) -> None:
    source_of(tmp_path)
    before = torch.get_rng_state(), random.getstate()
    source = source_of(tmp_path, **options)
    all_of(source)
    list(source.test(torch.arange(4), 3))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("nowhere", {}, "--data nowhere does not exist: name a folder of images, .* or digits"),
        (__file__, {}, "--data .*test_data.py is a file: name a folder"),
        ("digits", {"image_size": 7}, "--image-size must be at least 8, the size of the digits, got 7"),
        (".", {"image_size": 0}, "--image-size must be at least 1, got 0"),
        (".", {"augment": "cutout"}, "--augment must be one of auto, none, crop-flip, resized-crop, got 'cutout'"),
    ],
)
def test_bad_options_are_named(data: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_data(data, **options)
