"""Images to train on: scikit-learn's handwritten digits, which need no download, CIFAR, or a folder of images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cifar, folders
from .augment import AUGMENTATIONS, Views, crop_flip, crop_flip_table, resized_crop, standardise
from .images import ImageFolder

TEST_FRACTION = 0.2
SPLIT_SEED = 0  # fixed, so that accuracies of different --seed values are about the same test images
FOLDER_IMAGE_SIZE = 224


@dataclass(frozen=True)
class Dataset:
    """Labelled images to train and to test on, all in memory. They have numbers, counted from 0 on each side."""

    name: str
    train_images: Tensor  # [n, channels, height, width], standardised float32, or uint8 as stored
    train_labels: Tensor  # int64 [n], each in [0, classes)
    test_images: Tensor
    test_labels: Tensor
    _: KW_ONLY
    class_names: tuple[str, ...]
    mean: Tensor | None = None  # [channels, 1, 1], from 0 to 255: what uint8 images are standardised with
    std: Tensor | None = None
    augment: str = "none"  # or crop-flip, resized-crop
    seed: int = 0  # of the augmentation
    size: int | None = None  # batches are resized to it bilinearly
    unreadable: list[str] = field(default_factory=list)  # as an ImageFolder has it: always empty

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def channels(self) -> int:
        return self.train_images.shape[1]

    @property
    def image_size(self) -> int:
        return self.train_images.shape[-1] if self.size is None else self.size

    @property
    def train_count(self) -> int:
        return len(self.train_labels)

    @property
    def test_count(self) -> int:
        return len(self.test_labels)

    def to(self, device: torch.device) -> Dataset:
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)  # type: ignore[arg-type]

    def train(self, batches: Iterable[Tensor], *, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images and labels for each batch of numbers, standardised and augmented.

        ``batches`` are vectors of int64 in ``[0, train_count)``. Images are float32 ``[n, channels, image_size,
        image_size]``, labels int64 ``[n]``.
        """
        device = self.train_images.device
        views = Views(self.augment, self.image_size, self.seed, epoch)
        table = crop_flip_table(self.train_count, self.seed, epoch).to(device)
        for numbers in batches:
            on_device = numbers.to(device)
            images = self._standardised(self.train_images[on_device])
            if self.augment == "crop-flip":
                images = crop_flip(images, *table[:, on_device])
            elif self.augment == "resized-crop":
                images = resized_crop(images, numbers, views)
            yield self._resized(images), self.train_labels[on_device]

    def test(self, numbers: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images and labels for a vector of int64 in ``[0, test_count)``, ``batch_size`` at a time."""
        for part in numbers.to(self.test_images.device).split(batch_size):
            yield self._resized(self._standardised(self.test_images[part])), self.test_labels[part]

    def _standardised(self, images: Tensor) -> Tensor:
        return images if self.mean is None or self.std is None else standardise(images, self.mean, self.std)

    def _resized(self, images: Tensor) -> Tensor:
        size = (self.image_size, self.image_size)
        if images.shape[2:] == size:
            return images
        smaller = self.image_size < images.shape[-1]  # where every pixel shall count
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=smaller)


Source = Dataset | ImageFolder


def open_data(
    data: str,
    *,
    image_size: int | None = None,
    augment: str = "auto",
    seed: int = 0,
    workers: int = 0,
    on_error: str = "stop",
) -> Source:
    """Opens the images that ``--data`` names.

    Args:
        data: ``"digits"`` (a folder of that name is ``"./digits"``); a folder that is or holds CIFAR-10 or CIFAR-100 as
            published, in the Python or the binary version; or one of images laid out as :func:`.folders.find` says.
        image_size: height and width in a batch; ``None`` is 8 for digits, 32 for CIFAR and 224 for a folder.
        augment: how images to train on are varied, see :class:`.augment.Views`; ``"auto"`` is ``"none"`` for digits,
            ``"crop-flip"`` for CIFAR, as in the DenseNet paper, and ``"resized-crop"`` for a folder.
        seed: of the augmentation.
        workers: processes that read a folder's images; 0 reads them in this one.
        on_error: what to do about an image that cannot be read: ``"stop"`` raises :class:`UnreadableImage`,
            ``"skip"`` trains on the next one in its place, leaves it out of tests, and notes it in ``unreadable``.

    Raises ``ValueError`` if ``image_size`` or ``augment`` is wrong, or there are no images where ``data`` points.
    """
    least, reason = (8, ", the size of the digits") if data == "digits" else (1, "")
    if image_size is not None and image_size < least:
        raise ValueError(f"--image-size must be at least {least}{reason}, got {image_size}")
    if augment not in AUGMENTATIONS:
        raise ValueError(f"--augment must be one of {', '.join(AUGMENTATIONS)}, got {augment!r}")
    found: Source
    root = Path(data).expanduser()
    if data == "digits":
        found, usual = digits(image_size or 8), "none"
    elif not root.is_dir():
        remedy = "name a folder of images, the folder of CIFAR's unpacked files, or digits"
        raise ValueError(f"--data {data} {'is a file' if root.exists() else 'does not exist'}: {remedy}")
    elif version := cifar.find(root):
        tensors, names = cifar.read(*version)
        mean, std = _mean_and_std(tensors[0])
        found = Dataset(version[1].name, *tensors, class_names=names, mean=mean, std=std, size=image_size)
        usual = "crop-flip"
    else:
        found = ImageFolder(*folders.find(root), image_size or FOLDER_IMAGE_SIZE, workers, on_error)
        usual = "resized-crop"
    return replace(found, augment=usual if augment == "auto" else augment, seed=seed)


def _mean_and_std(images: Tensor) -> tuple[Tensor, Tensor]:
    """Of each channel of uint8 images, ``[channels, 1, 1]``; the deviation is 1 where all are equal."""
    found = [torch.stack(torch.std_mean(channel.float(), correction=0)) for channel in images.unbind(1)]
    std, mean = torch.stack(found, 1).view(2, -1, 1, 1)
    return mean, std.where(std > 0, 1.0)


def digits(image_size: int = 8) -> Dataset:
    """Loads the 1,797 grey 8x8 digits of scikit-learn, enlarged to ``image_size``: 1,437 to train on, 360 to test on.

    The split is the same every time and holds equally many of each digit. All are standardised by the training pixels.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()
    images = torch.from_numpy(source.images).float().unsqueeze(1)  # [1797, 1, 8, 8]
    labels = torch.from_numpy(source.target).long()
    if image_size != images.shape[-1]:
        images = F.interpolate(images, size=(image_size, image_size), mode="bilinear", align_corners=False)
    split = {"test_size": TEST_FRACTION, "stratify": source.target, "random_state": SPLIT_SEED}
    train, test = train_test_split(range(len(labels)), **split)
    mean, std = images[train].mean(), images[train].std()
    images = (images - mean) / std
    name = f"scikit-learn's digits, {image_size}x{image_size}"
    tensors = (images[train], labels[train], images[test], labels[test])
    return Dataset(name, *tensors, class_names=tuple("0123456789"))


def batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Shuffles ``0 .. count-1`` for an epoch, in batches of exactly ``batch_size``; the rest is dropped."""
    order = torch.randperm(count, generator=generator)
    return iter(order[: count // batch_size * batch_size].split(batch_size))
