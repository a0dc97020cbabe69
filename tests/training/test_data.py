from __future__ import annotations

import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import peers

from fastdense.data import augment, cifar
from fastdense.data.source import Dataset, Source, digits, open_data

PER_FILE = 6
Arrays = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def _arrays(classes: int, seed: int, count: int = PER_FILE) -> Arrays:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8), rng.integers(0, classes, count)


def _names(classes: int) -> list[str]:
    return [f"name{i}" for i in range(classes)]


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


def write_python(root: Path, classes: int) -> list[Arrays]:
    """The files of the Python version, and what is in them; the last one is for testing."""
    batches = [f"data_batch_{i}" for i in range(1, 6)]
    folder, files, key, meta, names = {
        10: ("cifar-10-batches-py", [*batches, "test_batch"], b"labels", "batches.meta", b"label_names"),
        100: ("cifar-100-python", ["train", "test"], b"fine_labels", "meta", b"fine_label_names"),
    }[classes]  # fmt: skip
    (root / folder).mkdir(parents=True)
    written = [_arrays(classes, seed) for seed in range(len(files))]
    for file, (images, labels) in zip(files, written, strict=True):
        contents = {b"data": images.reshape(PER_FILE, -1), key: labels.tolist(), b"coarse_labels": [0] * PER_FILE}
        (root / folder / file).write_bytes(python_2_pickle(contents))
    (root / folder / meta).write_bytes(python_2_pickle({names: [name.encode() for name in _names(classes)]}))
    return written


def write_binary(root: Path, classes: int) -> list[Arrays]:
    batches = [f"data_batch_{i}.bin" for i in range(1, 6)]
    folder, files, meta = {
        10: ("cifar-10-batches-bin", [*batches, "test_batch.bin"], "batches.meta.txt"),
        100: ("cifar-100-binary", ["train.bin", "test.bin"], "fine_label_names.txt"),
    }[classes]  # fmt: skip
    (root / folder).mkdir(parents=True)
    written = [_arrays(classes, seed) for seed in range(len(files))]
    for file, (images, labels) in zip(files, written, strict=True):
        columns = [labels[:, None], images.reshape(PER_FILE, -1)]
        if classes == 100:
            columns.insert(0, 99 - labels[:, None])  # the coarse labels
        (root / folder / file).write_bytes(np.concatenate(columns, 1).astype(np.uint8).tobytes())
    (root / folder / meta).write_text("\n".join(_names(classes)) + "\n\n")
    return written


WRITERS = [(write_python, 10), (write_python, 100), (write_binary, 10), (write_binary, 100)]


@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize(("write", "classes"), WRITERS)
def test_cifar_as_published(
    tmp_path: Path, write: Callable[[Path, int], list[Arrays]], classes: int, itself: bool
) -> None:
    *train, (test_images, test_labels) = write(tmp_path, classes)
    source = open_data(str(next(tmp_path.iterdir()) if itself else tmp_path), augment="none")
    assert (source.name, source.channels, source.classes, source.image_size) == (f"CIFAR-{classes}", 3, classes, 32)
    assert source.class_names == tuple(_names(classes))
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
def test_cifar_as_torchvision_reads_it(tmp_path: Path, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    peers.torchvision()
    from torchvision.datasets import CIFAR10, CIFAR100
    from torchvision.datasets import cifar as theirs

    monkeypatch.setattr(theirs, "check_integrity", lambda path, md5: True)  # the published files' checksums
    write_python(tmp_path, classes)
    source = open_data(str(tmp_path))
    assert isinstance(source, Dataset)
    for train, images, labels in (
        (True, source.train_images, source.train_labels),
        (False, source.test_images, source.test_labels),
    ):
        peer = {10: CIFAR10, 100: CIFAR100}[classes](tmp_path, train=train)
        assert np.array_equal(peer.data, images.permute(0, 2, 3, 1).numpy())
        assert peer.targets == labels.tolist()
        assert tuple(peer.classes) == source.class_names


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.filterwarnings("error")  # of PyTorch, about arrays that may not be written to
def test_cifar_pickled_again(tmp_path: Path, protocol: int) -> None:
    written = write_python(tmp_path, 10)
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    images, labels = written[-1]
    path.write_bytes(pickle.dumps({"data": images.reshape(PER_FILE, -1), "labels": labels}, protocol))
    (path.parent / "batches.meta").unlink()
    source = open_data(str(tmp_path))
    assert isinstance(source, Dataset)
    assert np.array_equal(source.test_images.numpy(), images)
    assert source.class_names == tuple("0123456789")


class _Calls:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def test_a_pickle_calls_nothing(tmp_path: Path) -> None:
    write_python(tmp_path / "data", 10)
    victim = tmp_path / "victim"
    for function, *arguments in (
        (os.mkdir, victim),
        (eval, f"__import__('os').mkdir({str(victim)!r})"),
        (getattr, 1, "real"),
    ):
        attack = pickle.dumps({b"data": _Calls(function, *arguments), b"labels": []})
        (tmp_path / "data" / "cifar-10-batches-py" / "data_batch_3").write_bytes(attack)
        with pytest.raises(ValueError, match=r"data_batch_3 is damaged.*it asks for \w+\.\w+, which no file of CIFAR"):
            open_data(str(tmp_path / "data"))
        assert not victim.exists()


@pytest.mark.parametrize(
    ("write", "file", "change", "message"),
    [
        (write_python, "data_batch_2", lambda old: old[:-100], "data_batch_2 is damaged.*download it again"),
        (write_python, "data_batch_2", lambda old: b"", "data_batch_2 is damaged.*EOFError"),
        (write_python, "data_batch_2", lambda old: pickle.dumps([1]), "it holds a list, not a dict"),
        (write_python, "data_batch_2", lambda old: pickle.dumps({b"data": 0}), "damaged.*KeyError: b'labels'"),
        (write_python, "test_batch", lambda old: None, "lacks test_batch of CIFAR-10: unpack its archive again"),
        (write_python, "batches.meta", lambda old: pickle.dumps({b"label_names": [b"a"]}), "meta.*1 names for 10"),
        (write_binary, "data_batch_5.bin", lambda old: old[:-1], "18437 bytes are no multiple of 3073"),
        (write_binary, "data_batch_5.bin", lambda old: b"", r"data_batch_5.bin is damaged.*for \(0,\) labels"),
        (write_binary, "data_batch_5.bin", lambda old: b"\x0a" + old[1:], "labels are . to 10, not within 0 to 9"),
    ],
)
def test_damaged_cifar(
    tmp_path: Path,
    write: Callable[[Path, int], list[Arrays]],
    file: str,
    change: Callable[[bytes], bytes | None],
    message: str,
) -> None:
    write(tmp_path, 10)
    path = next(tmp_path.glob(f"*/{file}"))
    contents = change(path.read_bytes())
    path.unlink()
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(ValueError, match=message):
        open_data(str(tmp_path))


def test_several_cifars_in_one_folder(tmp_path: Path) -> None:
    write_python(tmp_path, 10)
    write_binary(tmp_path, 100)
    with pytest.raises(ValueError, match="cifar-10-batches-py and cifar-100-binary: name the folder of one"):
        open_data(str(tmp_path))
    assert open_data(str(tmp_path / "cifar-100-binary")).name == "CIFAR-100"


def test_mean_and_deviation_of_one_colour(tmp_path: Path) -> None:
    write_binary(tmp_path, 100)
    record = b"\0\1" + bytes([9]) * 1024 + bytes([255]) * 1024 + bytes(1024)
    (tmp_path / "cifar-100-binary" / "train.bin").write_bytes(record * 3)
    ((images, _),) = open_data(str(tmp_path), augment="none").train([torch.arange(3)], epoch=0)
    assert torch.equal(images, torch.zeros(3, 3, 32, 32))


def _cifar(tmp_path: Path, **options: Any) -> Source:
    if not list(tmp_path.iterdir()):
        write_binary(tmp_path, 10)
    return open_data(str(tmp_path), **options)


def _all(source: Source, epoch: int, batch_size: int = 7) -> torch.Tensor:
    return torch.cat(
        [images for images, _ in source.train(torch.arange(source.train_count).split(batch_size), epoch=epoch)]
    )


def test_crop_flip_is_padding_cropping_and_mirroring(tmp_path: Path) -> None:
    plain, augmented = _all(_cifar(tmp_path, augment="none"), 3), _all(_cifar(tmp_path, seed=5), 3)
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


@pytest.mark.parametrize("kind", ["crop-flip", "resized-crop"])
def test_augmentation_depends_on_seed_epoch_and_number_alone(tmp_path: Path, kind: str) -> None:
    source = _cifar(tmp_path, augment=kind, seed=1)
    first = _all(source, 2)
    order = torch.randperm(source.train_count)
    shuffled = torch.cat([images for images, _ in source.train(order.split(4), epoch=2)])
    assert torch.equal(shuffled, first[order])
    ((some, labels),) = source.train([torch.tensor([9, 3, 9])], epoch=2)
    assert torch.equal(some, first[[9, 3, 9]])
    assert isinstance(source, Dataset) and torch.equal(labels, source.train_labels[[9, 3, 9]])
    assert torch.equal(_all(_cifar(tmp_path, augment=kind, seed=1), 2), first)
    for other in (
        _all(source, 1),
        _all(_cifar(tmp_path, augment=kind, seed=2), 2),
        _all(_cifar(tmp_path, augment=kind, seed=2), 1),
    ):
        assert (other != first).flatten(1).any(1).double().mean() > 0.9


class _FixedViews(augment.Views):
    def __call__(self, number: int, width: int, height: int) -> tuple[augment.Box, bool]:
        return [(0, 0, width, height), (3, 8, 19, 16)][number // 2], bool(number % 2)


def test_resized_crop_is_cropping_and_resizing() -> None:
    images = torch.rand(4, 2, 24, 32)
    found = augment.resized_crop(images, torch.arange(4), _FixedViews("resized-crop", 48))
    whole = F.interpolate(images[:2], size=(48, 48), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found[0], whole[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1], whole[1].flip(2), atol=1e-5, rtol=0)
    # Within a part, the pixels next to its edge lean on their neighbours outside, as in Pillow.
    part = F.interpolate(images[2:, :, 8:16, 3:19], size=(48, 48), mode="bilinear", align_corners=False)
    inside = (slice(None), slice(3, -3), slice(2, -2))
    torch.testing.assert_close(found[2][inside], part[0][inside], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[3][inside], part[1].flip(2)[inside], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("size", "antialias"), [(48, False), (12, True)])
def test_cifar_in_another_size(tmp_path: Path, size: int, antialias: bool) -> None:
    source = _cifar(tmp_path, image_size=size)
    assert source.image_size == size
    expected = F.interpolate(_all(_cifar(tmp_path), 1), size=(size, size), mode="bilinear", antialias=antialias)
    assert torch.equal(_all(source, 1), expected)
    ((images, _),) = source.test(torch.arange(6), 6)
    assert images.shape == (6, 3, size, size)
    assert _all(_cifar(tmp_path, image_size=size, augment="resized-crop"), 1).shape == expected.shape


def test_digits_are_what_they_were() -> None:
    old, source = digits(), open_data("digits", seed=3)
    assert (source.name, source.image_size, source.channels) == ("scikit-learn's digits, 8x8", 8, 1)
    assert (source.train_count, source.test_count, source.class_names) == (1437, 360, tuple("0123456789"))
    numbers = torch.randperm(1437)[:64]
    ((images, labels),) = source.train([numbers], epoch=4)
    assert torch.equal(images, old.train_images[numbers]) and torch.equal(labels, old.train_labels[numbers])
    ((images, labels),) = source.test(torch.arange(360), 360)
    assert torch.equal(images, old.test_images) and torch.equal(labels, old.test_labels)
    assert open_data("digits", image_size=16).image_size == 16
    moved = source.to(torch.device("cpu"))
    assert torch.equal(next(moved.train([numbers], epoch=4))[0], old.train_images[numbers])
    shifted = open_data("digits", augment="crop-flip")
    ((images, labels),) = shifted.train([numbers], epoch=4)
    assert not torch.equal(images, old.train_images[numbers]) and torch.equal(labels, old.train_labels[numbers])


@pytest.mark.parametrize("kind", ["auto", "none", "resized-crop"])
def test_global_random_generators_stay_as_they_are(tmp_path: Path, kind: str) -> None:
    _cifar(tmp_path)
    before = torch.get_rng_state(), random.getstate()
    source = _cifar(tmp_path, augment=kind)
    _all(source, 1)
    list(source.test(torch.arange(6), 3))
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
def test_bad_options(data: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_data(data, **options)


def test_every_version_of_cifar_has_its_own_files() -> None:
    names = [name for version in cifar.CIFARS for name in (*version.train, version.test)]
    assert len(names) == len(set(names))
