"""Batches of images with masks: scaled, cropped, mirrored and recoloured alike for training, whole for evaluation.

Images are resized by Pillow (bicubic, antialiased), masks by choosing the nearest value, and only in training. In an
evaluation a mask stays as it is: predictions are brought to its size.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch.utils.data import Dataset, default_convert

from gspn.data.images import (
    UNREADABLE,
    DataError,
    MaskedSplit,
    Preprocessing,
    generator,
    raise_if_of_machine,
    with_channels,
)
from gspn.data.loader import PROBLEM, EpochSampler, Loader
from gspn.data.mask_classes import IGNORED, Classes

ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


@dataclass(frozen=True)
class MaskAugmentation:
    """What changes an image and its mask in training, beside the random crop.

    Attributes:
        scales: (least, most) factor of the size, uniform on a logarithmic scale.
        flip: mirrors left and right half of the time. jitter: how much brightness, contrast and saturation change.
    """

    scales: tuple[float, float] = (1.0, 1.0)
    flip: bool = False
    jitter: float = 0.0

    def scale(self, number: float) -> float:
        """The factor that a random `number` in [0, 1) chooses."""
        least, most = map(math.log, self.scales)
        return math.exp(least + (most - least) * number)


class MaskedDataset(Dataset):
    """A MaskedSplit as the loader reads it, in batches, by lists of (epoch, *key); see loader.EpochSampler.

    A batch is {"image": uint8 (B,C,h,w), "mask": uint8 (B,H,W) of class numbers and IGNORED, "label": 0 or UNREADABLE
    (B,), "index": (B,), "inner": (B,2), "outer": (B,2)}. In training both have the size of `preprocessing`. Without an
    `augmentation` they are whole, of the height and width in "inner" and "outer"; what lies below and to the right of
    these fills up the batch. A pair that does not fit makes the batch {PROBLEM: what is wrong}.
    """

    def __init__(
        self,
        split: MaskedSplit,
        classes: Classes,
        preprocessing: Preprocessing,
        scale: float = 1.0,
        augmentation: MaskAugmentation | None = None,
        seed: int = 0,
    ):
        self.split, self.classes, self.preprocessing, self.scale = split, classes, preprocessing, scale
        self.augmentation, self.seed = augmentation, seed

    def __len__(self):
        return len(self.split)

    def __getitems__(self, keys):
        images, masks, labels, index = [], [], [], [key[1] for key in keys]
        for epoch, i, *_ in keys:
            try:
                image, mask = self.pair(epoch, i)
                labels.append(0)
            except DataError as error:
                return {PROBLEM: str(error)}
            except Exception as error:  # Pillow raises anything on damaged files; MaskedSplit.problem says what it was
                raise_if_of_machine(error)
                size = self.preprocessing.size if self.augmentation else (1, 1)
                image = np.zeros((*size, self.preprocessing.channels), np.uint8)
                mask = np.full(size, IGNORED, np.uint8)
                labels.append(UNREADABLE)
            images.append(torch.from_numpy(image).permute(2, 0, 1))
            masks.append(torch.from_numpy(mask))
        inner, outer = (torch.tensor([each.shape[-2:] for each in batch]) for batch in (images, masks))
        return {
            "image": together(images, 0),
            "mask": together(masks, IGNORED),
            "label": torch.tensor(labels),
            "index": torch.tensor(index),
            "inner": inner,
            "outer": outer,
        }

    def pair(self, epoch, i):
        """(image uint8 (h,w,C), mask uint8 (H,W)) of the i-th pair. Errors: those of MaskedSplit.pair."""
        image, mask = self.split.pair(i, self.classes.numbers)
        image = with_channels(image, self.preprocessing.channels)
        if self.augmentation is None:
            image = image.resize(scaled(image.size, self.scale), Image.Resampling.BICUBIC)
        else:
            numbers = torch.rand(9, generator=generator(self.seed, epoch, i, 1)).tolist()
            image, mask = self.augmented(image, Image.fromarray(mask), numbers)
        return np.atleast_3d(np.array(image)), mask

    def augmented(self, image, mask, numbers):
        """A random crop of a randomly scaled image, and of its mask. Where the image is smaller than the crop, it lies
        somewhere in it, in the mean colour and IGNORED."""
        size, augmentation = self.preprocessing.size[::-1], self.augmentation
        whole = scaled(image.size, self.scale * augmentation.scale(numbers[0]))
        part = [min(pair) for pair in zip(whole, size, strict=True)]
        corner = [number * (a - b) for number, a, b in zip(numbers[1:3], whole, part, strict=True)]
        ratio = [a / b for a, b in zip(image.size, whole, strict=True)]
        ends = (min((c + p) * r, side) for c, p, r, side in zip(corner, part, ratio, image.size, strict=True))
        box = (*(c * r for c, r in zip(corner, ratio, strict=True)), *ends)
        image = image.resize(part, Image.Resampling.BICUBIC, box)
        mask = mask.resize(part, Image.Resampling.NEAREST, box)
        if augmentation.flip and numbers[3] < 0.5:
            image, mask = (each.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for each in (image, mask))
        if augmentation.jitter:
            for enhance, number in zip(ENHANCERS, numbers[4:7], strict=True):
                image = enhance(image).enhance(1 + augmentation.jitter * (2 * number - 1))
        if part != list(size):
            at = tuple(int(n * (a - b + 1)) for n, a, b in zip(numbers[7:9], size, part, strict=True))
            mean = tuple(round(255 * value) for value in self.preprocessing.mean)
            image = _laid(image, Image.new(image.mode, size, mean if len(mean) > 1 else mean[0]), at)
            mask = _laid(mask, Image.new("L", size, IGNORED), at)
        return image, np.array(mask)


def scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """A size times `scale`, rounded, at least one pixel."""
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _laid(image, canvas, at):
    canvas.paste(image, at)
    return canvas


def together(parts: list[torch.Tensor], fill: int) -> torch.Tensor:
    """Tensors that differ in height and width as one, filled up at the bottom and at the right."""
    height, width = (max(part.shape[side] for part in parts) for side in (-2, -1))
    if all(part.shape[-2:] == (height, width) for part in parts):
        return torch.stack(parts)
    result = parts[0].new_full((len(parts), *parts[0].shape[:-2], height, width), fill)
    for row, part in zip(result, parts, strict=True):
        row[..., : part.shape[-2], : part.shape[-1]] = part
    return result


def make_masked_loader(
    split: MaskedSplit,
    classes: Classes,
    preprocessing: Preprocessing,
    batch_size: int,
    *,
    scale: float = 1.0,
    augmentation: MaskAugmentation | None = None,
    seed: int = 0,
    workers: int = 0,
) -> Loader:
    """A Loader of MaskedDataset's batches: with an `augmentation` for training, shuffled, without the last incomplete
    batch (unless it is the only one); else for evaluation, in order."""
    train = augmentation is not None
    return Loader(
        MaskedDataset(split, classes, preprocessing, scale, augmentation, seed),
        batch_size=batch_size,
        sampler=EpochSampler(split, shuffle=train, seed=seed),
        drop_last=train and len(split) >= batch_size,
        collate_fn=default_convert,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
