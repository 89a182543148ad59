"""Random sizes of the images that a model learns from: a batch has one size, the next one another."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gspn.data.images import Split


class RandomSizes:
    """Resizes batches of images (B,C,H,W) in [-1, 1] to random sizes, by bicubic interpolation.

    Height and width are H and W times a factor between `low` and `high`, each with its own, rounded to multiples of
    `unit`; with `square`, both with the same. The logarithm of a factor is uniform: half and twice the size are alike.
    """

    def __init__(self, low: float, high: float, unit: int, square: bool = False):
        self.range, self.unit, self.square = torch.tensor([low, high]).log(), unit, square

    def __call__(self, images: Tensor) -> Tensor:
        low, high = self.range
        factors = torch.empty(2).uniform_(float(low), float(high)).exp()
        factors = factors[:1].expand(2) if self.square else factors
        return resized(images, times(images.shape[2:], factors.tolist(), self.unit))


class ChosenSizes:
    """Cuts batches of images (B,C,H,W) in [-1, 1] to a random shape, about their centre, and resizes them.

    Height and width are those of `size` times one of `factors`, each with its own, rounded to multiples of `unit`.
    Nothing is stretched: a wide image shows the middle of the picture.

    Attributes:
        largest: (H, W) of the largest size.
    """

    def __init__(self, size: tuple[int, int], factors: Sequence[float], unit: int):
        self.size, self.factors, self.unit = tuple(size), tuple(factors), unit
        self.largest = times(size, (max(factors),) * 2, unit)

    def __call__(self, images: Tensor) -> Tensor:
        chosen = torch.randint(len(self.factors), (2,)).tolist()
        size = times(self.size, [self.factors[i] for i in chosen], self.unit)
        scale = min(have / wanted for have, wanted in zip(images.shape[2:], size, strict=True))
        for axis, wanted in zip((2, 3), size, strict=True):
            have, kept = images.shape[axis], round(wanted * scale)
            images = images.narrow(axis, (have - kept) // 2, kept)
        return resized(images, size)


def enlarged_note(split: Split, size: tuple[int, int]) -> str | None:
    """A note where the first image of a split is smaller than (H, W) `size`; else None, also of a stream."""
    if not len(split) or (split.pixels is None and split.read is None):
        return None
    try:
        width, height = split.image(0).size
    except Exception:  # Pillow raises anything on damaged files, which are told elsewhere
        return None
    if height >= size[0] and width >= size[1]:
        return None
    return (
        f"sizes: the first image is {height}x{width}, smaller than the largest size in training, {size[0]}x{size[1]}: "
        "such images are enlarged there and look smooth"
    )


def times(size: Sequence[int], factors: Sequence[float], unit: int) -> tuple[int, int]:
    """(H, W) times their factors, rounded to multiples of `unit`."""
    height, width = (max(1, round(side * factor / unit)) * unit for side, factor in zip(size, factors, strict=True))
    return height, width


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """The images (B,C,H,W) in [-1, 1] at `size`, by bicubic interpolation; as they are if they have it."""
    if tuple(images.shape[2:]) == size:
        return images
    return F.interpolate(images, size, mode="bicubic", antialias=True).clamp(-1, 1)
