"""Images in a folder, read from the disk when they are needed."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as MapDataset

from .augment import Views, standardise
from .folders import Files

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of red, green and blue within 0 to 1: what published networks were trained with
IMAGENET_STD = (0.229, 0.224, 0.225)
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")  # Pillow knows more, and starts programs for some
JPEG = ("JPEG", "MPO")  # the formats that are decoded at a fraction of their size; MPO is what some cameras write
TURNED = (5, 6, 7, 8)  # the EXIF orientations that exchange width and height
ENDS_LEFT, ENDS_ABOVE = (2, 3, 6, 7), (3, 4, 7, 8)  # those where the stored image's right or lower end comes there
GAP = 2.0  # a fast decoder leaves this many pixels for each one of the result, as Image.thumbnail does

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class UnreadableImage(RuntimeError):
    """An image that cannot be read; the message names its file and the reason."""


def read_image(path: Path, number: int, views: Views) -> Pixels:
    """Reads the box of an image that ``views`` chooses, resized: uint8 ``[size, size, 3]``, upright and in RGB.

    Pillow resizes bilinearly over all pixels that fall on one. JPEG files are decoded at a half, a quarter or an eighth
    of their size where that leaves twice as many pixels as are needed. Raises ``UnreadableImage``.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of images that are large, or whose metadata are odd
            with Image.open(path, formats=FORMATS) as image:
                return _view(image, number, views)
    except MemoryError:
        raise  # no fault of the image
    except Exception as error:  # Pillow's decoders raise SyntaxError, EOFError, struct.error and more on damaged files
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UnreadableImage(f"{path}: {' '.join(reason.split()) or type(error).__name__}") from error


def _view(image: Image.Image, number: int, views: Views) -> Pixels:
    if image.format not in JPEG:
        _turn_upright(image)
    orientation = _orientation(image)
    width, height = image.size[::-1] if orientation in TURNED else image.size
    (left, top, right, bottom), flip = views(number, width, height)
    scale = 1.0
    if image.format in JPEG:
        fraction = min(1.0, views.size * GAP / min(right - left, bottom - top))
        stored_width = image.width
        drafted = image.draft(None, (int(image.width * fraction), int(image.height * fraction)))  # at least so large
        scale = drafted[1][2] / stored_width if drafted else 1.0
        _turn_upright(image)
    # A side that the fraction does not divide is rounded up. The rest of a pixel lies where the stored side ended.
    x = image.width - width * scale if orientation in ENDS_LEFT else 0
    y = image.height - height * scale if orientation in ENDS_ABOVE else 0
    right, bottom = min(right * scale + x, image.width), min(bottom * scale + y, image.height)
    box = max(left * scale + x, 0), max(top * scale + y, 0), right, bottom
    shown = _rgb(image).resize((views.size, views.size), Image.Resampling.BILINEAR, box=box, reducing_gap=GAP)
    return np.asarray(shown)[:, :: -1 if flip else 1]


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata of an image that may be whole
        return 1


def _turn_upright(image: Image.Image) -> None:
    image.load()
    if _orientation(image) != 1:
        ImageOps.exif_transpose(image, in_place=True)


def _rgb(image: Image.Image) -> Image.Image:
    """The image as a page shows it: on white where it is transparent, 16 bits a pixel rounded down to 8."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is unknown: store it with 8 bits")
    if image.mode.startswith("I"):  # which convert() would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class _Batch(NamedTuple):
    images: Tensor  # uint8 [n, size, size, 3]
    labels: Tensor  # int64 [n]
    unreadable: list[str]  # "PATH: reason"


@dataclass(frozen=True)
class _Reader(MapDataset[_Batch]):
    """Reads batches; ``replace`` puts the next readable image in an unreadable one's place, or empties the batch."""

    files: Files
    views: Views
    replace: bool

    def __getitem__(self, numbers: list[int]) -> _Batch:
        images: list[Pixels] = []
        chosen: list[int] = []
        unreadable: list[str] = []
        for number in numbers:
            for candidate in range(number, number + (len(self.files) if self.replace else 1)):
                candidate %= len(self.files)
                try:
                    # Seen as `number` would be: the replacement's own view may be in this epoch already.
                    images.append(read_image(self.files.path(candidate), number, self.views))
                    chosen.append(candidate)
                    break
                except UnreadableImage as error:
                    unreadable.append(str(error))
            else:
                if self.replace:
                    images, chosen, unreadable = [], [], unreadable[:1]  # one of perhaps a million tells why
                    break
        stacked = np.stack(images) if images else np.empty((0, self.views.size, self.views.size, 3), np.uint8)
        return _Batch(torch.from_numpy(stacked), self.files.labels[chosen], unreadable)


@dataclass(frozen=True)
class ImageFolder:
    """Images in a folder, with the methods of :class:`~.source.Dataset`, standardised with ImageNet's statistics."""

    train_files: Files
    test_files: Files
    class_names: tuple[str, ...]
    image_size: int
    workers: int
    on_error: str
    augment: str = "none"
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    unreadable: list[str] = field(default_factory=list)  # "PATH: reason" of what was skipped, in the order found
    channels: int = 3

    @property
    def name(self) -> str:
        return f"{self.train_files.root.resolve().name} ({self.classes} classes)"

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def train_count(self) -> int:
        return len(self.train_files)

    @property
    def test_count(self) -> int:
        return len(self.test_files)

    def to(self, device: torch.device | str) -> ImageFolder:
        """Returns the same images, with batches on ``device`` and the same list of what is unreadable."""
        return replace(self, device=torch.device(device))

    def train(self, batches: Iterable[Tensor], *, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields batches to train on, as :meth:`.source.Dataset.train`; with workers, ``batches`` is read ahead.

        With ``on_error="skip"``, the next readable image takes an unreadable one's place, label and all.
        """
        views = Views(self.augment, self.image_size, self.seed, epoch)
        reader = _Reader(self.train_files, views, replace=self.on_error == "skip")
        for images, labels in self._load(reader, batches):
            if not len(labels):
                raise self._nothing_readable(self.train_count)
            yield images, labels

    def test(self, numbers: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields batches to test on; with ``"skip"``, unreadable images are left out."""
        reader = _Reader(self.test_files, Views("none", self.image_size), replace=False)
        count = 0
        for images, labels in self._load(reader, numbers.split(batch_size)):
            count += len(labels)
            if len(labels):
                yield images, labels
        if len(numbers) and not count:
            raise self._nothing_readable(len(numbers))

    def _load(self, reader: _Reader, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            reader,
            sampler=(batch.tolist() for batch in batches),
            batch_size=None,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # otherwise it draws a number from the global one
        )
        mean, std = 255 * torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=self.device).view(2, 3, 1, 1)
        for images, labels, unreadable in self._named(loader):
            for line in unreadable:
                if self.on_error == "stop":
                    raise UnreadableImage(f"{line}. Repair or remove it, or pass --on-error skip")
                if line not in self.unreadable:
                    self.unreadable.append(line)
            images = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
            yield standardise(images, mean, std), labels.to(self.device, non_blocking=True)

    def _named(self, loader: DataLoader[_Batch]) -> Iterator[_Batch]:
        try:
            yield from loader
        except Exception as error:
            if not self.workers:
                raise
            # PyTorch's own frame refers to the error and the error to its frame. Left to the garbage collector, the
            # workers would not be told to stop, and each be waited for in vain, five seconds long.
            traceback.clear_frames(error.__traceback__)
            if type(error) is not RuntimeError:
                raise
            failed = f"reading images in --workers {self.workers} processes failed: {error}: try fewer, which take less"
            raise RuntimeError(f"{failed} memory, or --workers 0 to see its error") from error

    def _nothing_readable(self, count: int) -> UnreadableImage:
        return UnreadableImage(f"none of {count} images can be read, the first: {self.unreadable[0]}. Check --data")
