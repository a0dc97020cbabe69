"""CIFAR-10 and CIFAR-100 as published, in Python or binary files: https://www.cs.toronto.edu/~kriz/cifar.html."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Cifar:
    """One version of one of the data sets, and the names of its files."""

    name: str
    classes: int
    folder: str
    train: tuple[str, ...]
    test: str
    # The key of a pickle's labels; in a binary record, how many label bytes precede the pixels, of which the last one
    # counts (CIFAR-100 has a coarse label before the fine one).
    labels: bytes | int
    names: str  # the file with the names of the classes


_FIVE = tuple(f"data_batch_{i}" for i in range(1, 6))
_FIVE_BINARY = tuple(f"{name}.bin" for name in _FIVE)
CIFARS = (
    Cifar("CIFAR-10", 10, "cifar-10-batches-py", _FIVE, "test_batch", b"labels", "batches.meta"),
    Cifar("CIFAR-100", 100, "cifar-100-python", ("train",), "test", b"fine_labels", "meta"),
    Cifar("CIFAR-10", 10, "cifar-10-batches-bin", _FIVE_BINARY, "test_batch.bin", 1, "batches.meta.txt"),
    Cifar("CIFAR-100", 100, "cifar-100-binary", ("train.bin",), "test.bin", 2, "fine_label_names.txt"),
)


def find(root: Path) -> tuple[Path, Cifar] | None:
    """Returns the folder of CIFAR files that ``root`` is or contains, if any; raises ``ValueError`` if several."""
    found = [(root / cifar.folder, cifar) for cifar in CIFARS if (root / cifar.folder).is_dir()]
    found = found or [
        (root, cifar) for cifar in CIFARS if any((root / f).is_file() for f in (*cifar.train, cifar.test))
    ]
    if len(found) > 1:
        both = " and ".join(cifar.folder if folder != root else cifar.name for folder, cifar in found)
        raise ValueError(f"--data {root} holds {both}: name the folder of one of them")
    return found[0] if found else None


def read(folder: Path, cifar: Cifar) -> tuple[list[Tensor], tuple[str, ...]]:
    """Returns training images, uint8 ``[n, 3, 32, 32]``, their labels, int64 ``[n]``, the same for testing, and names.

    Classes without a file of names are numbered. Raises ``ValueError`` where another is missing, or one is damaged.
    """
    if missing := [name for name in (*cifar.train, cifar.test) if not (folder / name).is_file()]:
        raise ValueError(f"--data {folder} lacks {', '.join(missing)} of {cifar.name}: unpack its archive again")
    tensors = []
    for files in (cifar.train, (cifar.test,)):
        for arrays in zip(*(_checked(folder / file, cifar, _labelled) for file in files), strict=True):
            tensors.append(torch.from_numpy(np.concatenate(arrays)))
    names = folder / cifar.names
    return tensors, _checked(names, cifar, _names) if names.is_file() else tuple(map(str, range(cifar.classes)))


def _checked(path: Path, cifar: Cifar, reader: Callable[[Path, Cifar], Any]) -> Any:
    try:
        return reader(path, cifar)
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to call for
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        remedy = f"unpack the archive of {cifar.name} again, or download it again"
        raise ValueError(f"{path} is damaged or not a file of {cifar.name} ({reason}): {remedy}") from error


def _labelled(path: Path, cifar: Cifar) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    if isinstance(cifar.labels, bytes):
        contents = _unpickle(path)
        pixels, labels = contents[b"data"], np.array(contents[cifar.labels], dtype=np.int64)
    else:
        record = cifar.labels + PIXELS
        data = np.fromfile(path, dtype=np.uint8)
        if len(data) % record:
            raise ValueError(f"{len(data)} bytes are no multiple of {record}, the bytes of an image")
        data = data.reshape(-1, record)
        pixels, labels = data[:, cifar.labels :], data[:, cifar.labels - 1].astype(np.int64)
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), PIXELS) or labels.ndim != 1 or not len(labels):
        raise ValueError(f"pixels are {pixels.dtype} {list(pixels.shape)} for {labels.shape} labels")
    if labels.min() < 0 or labels.max() >= cifar.classes:
        raise ValueError(f"labels are {labels.min()} to {labels.max()}, not within 0 to {cifar.classes - 1}")
    return pixels.reshape(-1, 3, 32, 32), labels


def _names(path: Path, cifar: Cifar) -> tuple[str, ...]:
    pickled = isinstance(cifar.labels, bytes) and _unpickle(path)[cifar.labels[:-1] + b"_names"]  # fine_label_names
    names = [name if isinstance(name, str) else name.decode() for name in pickled or path.read_bytes().split()]
    if len(names) != cifar.classes:
        raise ValueError(f"{len(names)} names for {cifar.classes} classes")
    return tuple(names)


class _Unpickler(pickle.Unpickler):
    """Builds arrays, texts, numbers, lists and dictionaries, and calls nothing else: a pickle may call any function."""

    _ALLOWED: ClassVar[dict[str, Any]] = {
        "numpy.core.multiarray._reconstruct": np.empty(0).__reduce__()[0],
        "numpy.core.numeric._frombuffer": np.empty(0).__reduce_ex__(5)[0],  # protocol 5
        "numpy.ndarray": np.ndarray,
        "numpy.dtype": np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        known = f"{module}.{name}".replace("numpy._core.", "numpy.core.")  # NumPy moved it
        if known not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no file of CIFAR needs")
        return self._ALLOWED[known]


def _unpickle(path: Path) -> dict[bytes, Any]:
    with path.open("rb") as file:
        contents = _Unpickler(file, encoding="bytes").load()
    if not isinstance(contents, dict):
        raise ValueError(f"it holds a {type(contents).__name__}, not a dict")
    return {key.encode() if isinstance(key, str) else key: value for key, value in contents.items()}
