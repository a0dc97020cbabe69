"""Views of images: which part of an image a network sees, and how its pixels become numbers.

Every random decision is a pure function of (seed, epoch, image number): the same in any batch, in any process and after
a resume; and the global random generators stay as they are. A box is ``(left, top, right, bottom)`` in pixels of the
whole image, with fractions, as Pillow has it.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

AUGMENTATIONS = ("auto", "none", "crop-flip", "resized-crop")
PAD = 4  # pixels on each side
TEST_SCALE = 256 / 224  # the short side of the scaled image over the crop's
AREA = (0.08, 1.0)  # of the image
RATIO = (3 / 4, 4 / 3)  # width over height
TRIES = 10

Box = tuple[float, float, float, float]


def standardise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Computes ``(images - mean) / std`` in contiguous float32, with ``mean`` and ``std`` of ``[channels, 1, 1]``."""
    return images.to(torch.float32, memory_format=torch.contiguous_format).sub_(mean).div_(std)


@dataclass(frozen=True)
class Views:
    """The box of each image in one epoch, for a result of ``size x size`` pixels, and whether it is mirrored.

    ``augment`` is ``"none"``: the image is scaled until its short side is 256/224 of ``size``, and its centre cut out;
    or, mirrored half of the time, ``"crop-flip"``: the same scale, a random place; ``"resized-crop"``: a random part.
    """

    augment: str
    size: int
    seed: int = 0
    epoch: int = 0

    def __call__(self, number: int, width: int, height: int) -> tuple[Box, bool]:
        if self.augment == "none":
            return scaled_box(width, height, self.size), False
        # Of the image's own. Python promises the same ``random()`` for a text in every version.
        draw = random.Random(f"{self.seed} {self.epoch} {number}")
        flip = draw.random() < 0.5
        cropped = self.augment == "crop-flip"
        return scaled_box(width, height, self.size, draw) if cropped else part_box(width, height, draw), flip


def scaled_box(width: int, height: int, size: int, draw: random.Random | None = None) -> Box:
    """Returns the centre, or with ``draw`` any place, of an image whose short side is scaled to 256/224 of ``size``.

    Resized to ``size``, it has the pixels of ``torchvision.transforms``' ``Resize(round(size * 256 / 224))`` and
    ``CenterCrop(size)``, without the scaled image, which would be huge where one side is much longer than the other.
    """
    short = round(size * TEST_SCALE)
    scaled_width = max(short, short * width // height)
    scaled_height = max(short, short * height // width)
    left, top = round((scaled_width - size) / 2), round((scaled_height - size) / 2)
    if draw is not None:
        left, top = _corner(draw, scaled_width - size, scaled_height - size)
    x, y = width / scaled_width, height / scaled_height
    return left * x, top * y, (left + size) * x, (top + size) * y


def _corner(draw: random.Random, most_left: int, most_top: int) -> tuple[int, int]:
    return int(draw.random() * (most_left + 1)), int(draw.random() * (most_top + 1))


def part_box(width: int, height: int, draw: random.Random) -> Box:
    """Draws 8 to 100 % of the area with a ratio of the sides between 3/4 and 4/3 (Szegedy et al., arXiv 1409.4842).

    As ``torchvision.transforms.RandomResizedCrop``: ten tries, then the largest centre that has such a ratio.
    """
    for _ in range(TRIES):
        area = width * height * (AREA[0] + (AREA[1] - AREA[0]) * draw.random())
        ratio = RATIO[0] * (RATIO[1] / RATIO[0]) ** draw.random()  # uniform in its logarithm
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = _corner(draw, width - w, height - h)
            break
    else:
        w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
        left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def crop_flip_table(count: int, seed: int, epoch: int) -> Tensor:
    """What :func:`crop_flip` does to each of ``count`` images: int64 ``[3, count]``, ``top``, ``left`` and ``flip``."""
    generator = torch.Generator().manual_seed(random.Random(f"{seed} {epoch}").getrandbits(63))
    corners = torch.randint(2 * PAD + 1, (2, count), generator=generator)
    return torch.cat([corners, torch.randint(2, (1, count), generator=generator)])


def crop_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """Shifts each image by up to four pixels and mirrors some (Huang et al., arXiv 1608.06993, section 4.1).

    ``images`` are standardised, ``[n, channels, height, width]``, so that zeros, the mean colour, come in at the edges.
    """
    n, _, height, width = images.shape
    windows = F.pad(images, (PAD,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view [n, C, 9, 9, H, W]
    crops = windows[torch.arange(n, device=images.device), :, top, left]  # [n, C, H, W]
    return torch.where(flip.view(n, 1, 1, 1) > 0, crops.flip(3), crops)


def resized_crop(images: Tensor, numbers: Tensor, views: Views) -> Tensor:
    """Cuts each number's box out of ``[n, channels, height, width]``, resized bilinearly to ``views.size``."""
    n, channels, height, width = images.shape
    boxes = [views(number, width, height) for number in numbers.tolist()]
    flip = torch.tensor([-1.0 if flip else 1.0 for _, flip in boxes], device=images.device)
    unit = torch.tensor([width, height, width, height], device=images.device)
    left, top, right, bottom = (torch.tensor([box for box, _ in boxes], device=images.device) / unit).unbind(1)
    zero = torch.zeros_like(left)
    # Across and down, with the image's sides from -1 to 1.
    affine = torch.stack([(right - left) * flip, zero, left + right - 1, zero, bottom - top, top + bottom - 1], 1)
    grid = F.affine_grid(affine.view(n, 2, 3), [n, channels, views.size, views.size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
