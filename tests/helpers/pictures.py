"""Small image folders that tests write, and all that comes of them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastdense.data.augment import Box, Views
from fastdense.data.source import Source


def smooth(width: int, height: int, seed: int = 0, detail: int = 6) -> Image.Image:
    """A colourful image without sharp edges, different in each of its corners."""
    colours = np.random.default_rng(seed).integers(0, 256, (detail, detail, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


def write_folder(root: Path, train: int = 6, test: int = 2, extension: str = "png") -> Path:
    """``root/train/{cat,dog}`` and ``root/val/{cat,dog}``, with so many images a class."""
    for side, count in (("train", train), ("val", test)):
        for label, name in enumerate(("cat", "dog")):
            (root / side / name).mkdir(parents=True)
            for i in range(count):
                smooth(40 + i, 36, seed=10 * i + label).save(root / side / name / f"{i}.{extension}")
    return root


class FixedViews(Views):
    """The whole image and a part of it, each as it is and mirrored."""

    def __call__(self, number: int, width: int, height: int) -> tuple[Box, bool]:
        return [(0, 0, width, height), (3, 8, 19, 16)][number // 2], bool(number % 2)


def all_of(source: Source, epoch: int = 1, batch_size: int = 5, *, labels: bool = False) -> Any:
    """Every image to train on, and the ``labels``, in order and in batches."""
    batches = list(source.train(torch.arange(source.train_count).split(batch_size), epoch=epoch))
    images = torch.cat([part for part, _ in batches])
    return (images, torch.cat([part for _, part in batches])) if labels else images
