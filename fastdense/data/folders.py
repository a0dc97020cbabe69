"""Which images a folder holds: a subfolder for each class, as torchvision's ``ImageFolder`` has it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
TRAIN, TESTS = "train", ("val", "validation", "test")
TEST_SHARE = 5  # one in five

LAYOUT = "a folder needs train/ and val/ with a subfolder of images for each class, or those subfolders alone"


@dataclass(frozen=True)
class Files:
    """Paths of images and their labels."""

    root: Path
    # [n], relative to root. Not a list: a worker process that reads one changes its elements' reference counts, and so
    # copies, page by page, the memory that it shares.
    paths: np.ndarray[Any, np.dtype[np.bytes_]]
    labels: Tensor  # int64 [n]

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, number: int) -> Path:
        return self.root / os.fsdecode(self.paths[number])


def find(root: Path) -> tuple[Files, Files, tuple[str, ...]]:
    """Lists the images to train on, those to test on, and the names of the classes.

    Classes are the sorted names of the subfolders, and their images are sorted too, those in deeper folders included.
    ``root`` holds ``train`` and the first there is of ``val``, ``validation`` and ``test``. If it holds the classes
    themselves, about a fifth of each class's images are for testing: a hash of the image's path decides, so that no
    image ever changes sides when others come or go. Hidden files and folders are passed over. Raises ``ValueError`` if
    there are no such folders, a class is empty or the only one, or testing has one that training lacks.
    """
    tests = [name for name in TESTS if (root / name).is_dir()]
    divided = (root / TRAIN).is_dir() and bool(tests or _subfolders(root / TRAIN))  # a class may be called "train"
    if divided and not tests:
        raise ValueError(f"--data {root} has train/ and none of {', '.join(TESTS)}: {LAYOUT}")
    places = (root / TRAIN, root / tests[0]) if divided else (root, root)
    names, test_names = map(_subfolders, places)
    if not (names and test_names):
        raise ValueError(f"--data: {places[1 if names else 0]} has no subfolders: {LAYOUT}")
    if unknown := sorted(set(test_names) - set(names)):
        remedy = f"add their images to train/, or take them out of {tests[0]}/"
        raise ValueError(f"--data {root}: {tests[0]}/ has classes that train/ lacks: {_list(unknown)}: {remedy}")
    train = _files(root, {f"{TRAIN}/{name}" if divided else name: label for label, name in enumerate(names)})
    test = _files(root, {f"{tests[0]}/{name}": names.index(name) for name in test_names}) if divided else None
    if len(names) < 2:  # anything would learn it to 100 %
        raise ValueError(f"--data {root} has a single class, {names[0]}, and nothing to tell it from: {LAYOUT}")
    return (*_split(train, names), names) if test is None else (train, test, names)


def _split(files: Files, names: tuple[str, ...]) -> tuple[Files, Files]:
    """Four fifths to train on and a fifth to test on, about and in each class, by the paths' SHA-256."""
    first = (hashlib.sha256(path).digest()[:8] for path in files.paths.tolist())
    tested = np.array([int.from_bytes(digest, "big") % TEST_SHARE == 0 for digest in first])
    train, test = (
        Files(files.root, files.paths[chosen], files.labels[torch.from_numpy(chosen)]) for chosen in (~tested, tested)
    )
    remedy = "add images, or make train/ and val/ yourself"
    counts = train.labels.bincount(minlength=len(names)).tolist()
    if lacking := [name for name, count in zip(names, counts, strict=True) if not count]:
        raise ValueError(f"--data {files.root}: the split leaves no image to train on of {_list(lacking)}: {remedy}")
    if not len(test):
        raise ValueError(f"--data {files.root}: the split leaves none of {len(files)} images to test on: {remedy}")
    return train, test


def _subfolders(folder: Path) -> tuple[str, ...]:
    try:
        with os.scandir(folder) as entries:
            return tuple(sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")))
    except OSError as error:
        _refuse(error)


def _files(root: Path, labels: dict[str, int]) -> Files:
    """The images in each folder of ``labels``."""
    found = {folder: list(_images(root, folder)) for folder in labels}
    if empty := [folder for folder, paths in found.items() if not paths]:
        kinds = " ".join(extension[1:] for extension in EXTENSIONS)
        raise ValueError(f"--data {root}: no images ({kinds}) in {_list(empty)}: add some, or remove the folders")
    paths = [os.fsencode(path) for folder in found.values() for path in folder]
    counts = torch.tensor([len(folder) for folder in found.values()])
    return Files(root, np.array(paths), torch.tensor(list(labels.values())).repeat_interleave(counts))


def _images(root: Path, folder: str) -> Iterator[str]:
    """Paths relative to ``root``, with slashes, sorted within each folder."""
    seen = set()  # links may lead in circles
    for place, folders, names in os.walk(root / folder, onerror=_refuse, followlinks=True):
        seen.add(os.path.realpath(place))
        shown = [name for name in sorted(folders) if not name.startswith(".")]
        folders[:] = [name for name in shown if os.path.realpath(os.path.join(place, name)) not in seen]
        within = Path(place).relative_to(root).as_posix()
        for name in sorted(names):
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                yield f"{within}/{name}"


def _refuse(error: OSError) -> NoReturn:
    raise ValueError(f"--data: cannot list {error.filename}: {error.strerror}") from error


def _list(names: Iterable[str]) -> str:
    first, *rest = names
    shown = ", ".join([first, *rest[:9]])
    return f"{shown} and {len(rest) - 9} more" if len(rest) > 9 else shown
