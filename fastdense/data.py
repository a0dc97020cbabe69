"""Real images that need no download: scikit-learn's handwritten digits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Dataset", "Source", "UnreadableImage", "batches", "digits", "open_data"]

TEST_FRACTION = 0.2
SPLIT_SEED = 0  # fixed, so that accuracies of different --seed values are about the same test images


class UnreadableImage(RuntimeError):
    """An image cannot be read."""


@dataclass(frozen=True)
class Dataset:
    """Labelled images, all of them in memory.

    Attributes:
        name: what to call it in a report.
        train_images, test_images: ``[n, channels, height, width]``, standardised.
        train_labels, test_labels: int64 ``[n]``, each in ``[0, classes)``.
        classes: how many.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int

    unreadable = ()

    @property
    def channels(self) -> int:
        return self.train_images.shape[1]

    @property
    def class_names(self) -> list[str]:
        """What each class is called."""
        return [str(number) for number in range(self.classes)]

    @property
    def image_size(self) -> int:
        """Height and width, pixels."""
        return self.train_images.shape[-1]

    @property
    def train_count(self) -> int:
        """Images to train on."""
        return len(self.train_labels)

    @property
    def test_count(self) -> int:
        """Images to test on."""
        return len(self.test_labels)

    def train(self, batches: Iterable[Tensor], *, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of each batch of image numbers."""
        for batch in batches:
            numbers = batch.to(self.train_labels.device)
            yield self.train_images[numbers], self.train_labels[numbers]

    def test(self, numbers: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of the test images ``numbers``, in order, ``batch_size`` at a time."""
        for part in numbers.to(self.test_labels.device).split(batch_size):
            yield self.test_images[part], self.test_labels[part]

    def to(self, device: torch.device) -> Dataset:
        """The same images on ``device``."""
        return replace(
            self,
            train_images=self.train_images.to(device),
            train_labels=self.train_labels.to(device),
            test_images=self.test_images.to(device),
            test_labels=self.test_labels.to(device),
        )


def digits(image_size: int = 8) -> Dataset:
    """The 1,797 grey 8x8 digits that ship with scikit-learn: 1,437 to train on and 360 to test on.

    The split is the same every time and holds equally many of each digit. Images are enlarged bilinearly to
    ``image_size``, then standardised with the mean and standard deviation of the training pixels.

    Args:
        image_size: height and width, at least 8.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()
    images = torch.from_numpy(source.images).float().unsqueeze(1)  # [1797, 1, 8, 8]
    labels = torch.from_numpy(source.target).long()
    if image_size != images.shape[-1]:
        images = F.interpolate(images, size=(image_size, image_size), mode="bilinear", align_corners=False)
    train, test = train_test_split(
        range(len(labels)), test_size=TEST_FRACTION, stratify=source.target, random_state=SPLIT_SEED
    )
    mean, std = images[train].mean(), images[train].std()
    images = (images - mean) / std
    name = f"scikit-learn's digits, {image_size}x{image_size}"
    return Dataset(name, images[train], labels[train], images[test], labels[test], classes=10)


def batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """One epoch: the numbers ``0 .. count-1`` shuffled, in batches of exactly ``batch_size``.

    What is left over is dropped, so that every step does the same work; the next shuffle drops others.
    """
    order = torch.randperm(count, generator=generator)
    return iter(order[: count // batch_size * batch_size].split(batch_size))


Source = Dataset


def open_data(
    data: str,
    *,
    image_size: int | None,
    augment: str = "auto",
    seed: int = 0,
    workers: int = 0,
    on_error: str = "stop",
) -> Source:
    """What ``--data`` names."""
    if data != "digits":
        raise ValueError(f"--data must be digits, got {data!r}")
    return digits(image_size or 8)
