"""Augmentation of training images, and the presets: the published ImageNet recipe and recipes for small images.

Everything random can be repeated: the augmentation of an image is a function of (seed, epoch, index), the mixing of a
batch one of torch's random state, which the loop sets by (seed, step, process).

Shift, flip, crop and erasing are a few lines of torch. RandAugment, colour jitter, mixup and cutmix are timm's (extra
`imagenet`), which draws from the global generators of Python, numpy and torch; `seeded` sets and restores them.
"""

import math
import random
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image

from gspn.data.images import UNREADABLE, Preprocessing, generator, mixed_seed
from gspn.names import unknown
from gspn.options import OptionError

SMALL = 96  # images of at most this many pixels a side keep their size and are not cropped
MANY = 100_000  # with at least so many photos the published schedule is the default
TIMM = dict(rand_augment="m9-mstd0.5-inc1", color_jitter=0.4, mixup=0.8, cutmix=1.0)  # what needs timm
OWN = dict(rand_augment="none", color_jitter=0.0, mixup=0.0, cutmix=0.0)
_PHOTOS = dict(TIMM, erase=0.25, augment="crop", flip=True)
# Options by name; the learning rate belongs to the batch size beside it, or with scale_lr to a batch of that size.
PRESETS = {
    "digits": dict(epochs=12, lr=4e-3, batch_size=128, warmup=2.0, ema=0.98, flip=False, augment="shift"),
    "idx": dict(epochs=8, lr=3e-3, batch_size=128, warmup=0.5, ema=0.998, flip=False, augment="shift"),
    "fashion": dict(epochs=20, lr=2e-3, batch_size=64, warmup=0.5, ema=0.998, flip=True, augment="none", erase=0.5),
    "small": dict(epochs=30, lr=2e-3, batch_size=128, warmup=2.0, ema=0.998, flip=True, augment="shift", erase=0.25),
    "photos": _PHOTOS | dict(epochs=100, lr=1e-3, batch_size=128, warmup=5.0, ema=0.9995),
    "imagenet": _PHOTOS
    | dict(epochs=300, lr=5e-4, min_lr=5e-6, warmup_lr=5e-7, scale_lr=512, batch_size=1024, warmup=20.0, ema=0.9999)
    | dict(crop_area=0.08, clip=5.0, precision="bf16"),
}
OF_MODELS = {  # what differs in a preset for a model
    ("imagenet", "gspn_small"): dict(lr=3e-4, min_lr=3e-6),
    ("small", "gspn_mobile"): dict(lr=5e-3, warmup=1.0, optimizer="muon"),
}


def preset_for(
    kind: str, size: tuple[int, int], images: int, model: str, wanted: str | None = None
) -> tuple[str, dict, list[str]]:
    """The preset for data of a kind (see labelled.Data), an input of (H, W) `size`, a number of training images, a
    model.

    Returns: (its name, options by name, notes). Where none is `wanted` and timm cannot be imported, the options are
    those without timm, and a note says so.
    Errors: OptionError if there is no preset `wanted`.
    """
    if wanted is not None and wanted not in PRESETS:
        raise OptionError(unknown("preset", wanted, PRESETS))
    large = "photos" if images < MANY else "imagenet"
    name = wanted or (kind if kind in PRESETS else "small" if max(size) <= SMALL else large)
    values, notes = PRESETS[name] | OF_MODELS.get((name, model), {}), []
    if wanted is None and TIMM.items() <= values.items() and timm_problem():
        values, notes = values | OWN, [f"no RandAugment, mixup and cutmix: {timm_problem()}"]
    return name, values, notes


@cache
def timm_problem() -> str | None:
    """Why timm cannot be used here, and how to get it; None if it can."""
    try:
        import timm.data  # noqa: F401
    except ImportError as error:
        return f'timm is not there ({error}): install it with pip install "gspn[imagenet]"'
    except Exception as error:  # a torchvision built for another torch raises RuntimeError
        return f"timm is installed, but cannot be imported: {type(error).__name__}: {error}"
    return None


def need_timm(what):
    if timm_problem():
        raise OptionError(f"{what} comes from timm, but {timm_problem()}")


@contextmanager
def seeded(seed: int):
    """Seeds the global generators of Python, numpy and torch (CPU) for the block, and restores them after it."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds GPUs too
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


# -- one image --


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of single training images.

    Attributes:
        shift: moves by up to this many pixels in each direction: (rows, columns), or one number for both.
        fill: what a shift uncovers: "zero" or "reflect".
        flip: mirrors left and right half of the time.
        crop: takes a random box, of `crop_area` to all of the image, instead of the centre box.
        erase: how often a box of 2 to 33% of the image is replaced by noise with the mean and deviation of the data.
        rand_augment: timm's settings such as "m9-mstd0.5-inc1", or "none".
        color_jitter: how much brightness, contrast and saturation change; as in timm, only without RandAugment.
    Errors: OptionError for settings that timm does not know, or without timm.
    """

    shift: int | tuple[int, int] = 0
    fill: str = "reflect"
    flip: bool = False
    crop: bool = False
    crop_area: float = 0.25
    erase: float = 0.0
    rand_augment: str = "none"
    color_jitter: float = 0.0
    _painters: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self):
        if isinstance(self.shift, int):
            object.__setattr__(self, "shift", (self.shift, self.shift))
        if self.rand_augment != "none":
            if not re.fullmatch(r"m\d+(-(n\d+|p[\d.]+|mstd[\d.]+|mmax\d+|inc[01]))*", self.rand_augment):
                raise OptionError(
                    f"RandAugment's settings are M or more joined by -: mMAGNITUDE, nLAYERS, pPROBABILITY, "
                    f"mstdDEVIATION, mmaxLIMIT, inc1; or none. Got {self.rand_augment!r}"
                )
            need_timm("RandAugment")
        if self.color_jitter:
            need_timm("colour jitter")

    @classmethod
    def of(cls, options: Any, kind: str, size: tuple[int, int]) -> "Augmentation":
        """The augmentation that resolved options ask for, of data of a kind at (H, W) `size`."""
        names = ("flip", "crop_area", "erase", "rand_augment", "color_jitter")
        return cls(
            shift=tuple(_eighth(side) if options.augment == "shift" else 0 for side in size),
            fill="zero" if kind in ("digits", "idx") else "reflect",
            crop=options.augment == "crop",
            **{name: getattr(options, name) for name in names},
        )

    @property
    def slow(self) -> bool:
        """Whether images are augmented one by one, which needs workers."""
        return self.crop or self.rand_augment != "none" or self.color_jitter > 0

    def __call__(self, images, numbers, keys, preprocessing: Preprocessing):
        """Augments a batch, without the crop, which is part of decoding.

        Args:
            images: uint8 (B, C, H, W). numbers: (B, 3) random ones in [0, 1). keys: a tuple (seed, epoch, index) each.
        Returns: uint8 (B, C, H, W).
        """
        if self.rand_augment != "none" or self.color_jitter:
            images = torch.stack([self.paint(*each, preprocessing) for each in zip(images, keys, strict=True)])
        images = self.move(images, numbers)
        if self.erase:
            images = torch.stack([self.erased(*each, preprocessing) for each in zip(images, keys, strict=True)])
        return images

    def paint(self, image, key, preprocessing):
        """timm's RandAugment, or colour jitter, on one image, uint8 (C, H, W). Grey images are converted to colour for
        it."""
        painter = self._painter(preprocessing)
        array = image.permute(1, 2, 0).numpy()
        colour = Image.fromarray(array[:, :, 0]).convert("RGB") if len(image) == 1 else Image.fromarray(array)
        with seeded(mixed_seed(*key, 2)):
            painted = painter(colour)
        if len(image) == 1:
            return torch.from_numpy(np.array(painted.convert("L")))[None]
        return torch.from_numpy(np.array(painted)).permute(2, 0, 1)

    def _painter(self, preprocessing):
        """timm's transform between crop and normalisation, made once in each process."""
        if preprocessing not in self._painters:
            from timm.data import create_transform

            _, self._painters[preprocessing], _ = create_transform(
                input_size=(3, *preprocessing.size),
                is_training=True,
                color_jitter=self.color_jitter or None,
                auto_augment=None if self.rand_augment == "none" else f"rand-{self.rand_augment}",
                interpolation="bicubic",
                mean=preprocessing.mean if preprocessing.channels == 3 else preprocessing.mean * 3,
                separate=True,
            )
        return self._painters[preprocessing]

    def move(self, images, numbers):
        """Shifts and flips a batch, uint8 (B, C, H, W), by random `numbers` (B, 3) in [0, 1)."""
        if not (any(self.shift) or self.flip):
            return images
        B, C, H, W = images.shape
        shift = torch.tensor(self.shift)
        offset = (numbers[:, :2] * (2 * shift + 1)).long() - shift
        y = torch.arange(H) + offset[:, :1]
        x = torch.arange(W) + offset[:, 1:]
        if self.flip:
            x = torch.where(numbers[:, 2:] < 0.5, x, W - 1 - x)
        inside = ((y >= 0) & (y < H))[:, None, :, None] & ((x >= 0) & (x < W))[:, None, None, :]
        source = _reflect(y, H)[:, :, None] * W + _reflect(x, W)[:, None, :]
        moved = images.reshape(B, C, H * W).gather(2, source.view(B, 1, H * W).expand(B, C, H * W)).view(B, C, H, W)
        return moved * inside if self.fill == "zero" else moved

    def erased(self, image, key, preprocessing):
        """Random erasing (Zhong et al.) of one image, uint8 (C, H, W), with a noise value for every pixel. Proportions
        are from 3:10 to 10:3, and a box that does not fit is drawn again, ten times at most."""
        source = generator(*key, 3)
        if torch.rand((), generator=source) >= self.erase:
            return image
        C, H, W = image.shape
        for area, ratio, top, left in torch.rand(10, 4, generator=source).tolist():
            area, ratio = (0.02 + (1 / 3 - 0.02) * area) * H * W, math.exp((2 * ratio - 1) * math.log(10 / 3))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < h < H and 0 < w < W:
                mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (preprocessing.mean, preprocessing.std))
                noise = torch.randn(C, h, w, generator=source) * std + mean
                y, x = int(top * (H - h + 1)), int(left * (W - w + 1))
                image = image.clone()
                image[:, y : y + h, x : x + w] = (noise * 255).round().clamp(0, 255).byte()
                break
        return image


def _eighth(side):
    """How far a side of so many pixels is shifted: an eighth, at least one pixel; not at all if it has only one."""
    return max(side // 8, min(side - 1, 1))


def _reflect(index, length):
    """Mirrors indices beyond 0..length-1 at the borders."""
    last = max(length - 1, 1)
    return (last - (last - index.abs() % (2 * last)).abs()).clamp(max=length - 1)


# -- a batch --


class Mixing:
    """Mixup and cutmix of a whole batch, image i with image B - 1 - i, by timm.

    Args:
        num_classes: K. mixup, cutmix: the parameters of the beta distributions, 0 for none.
        switch: how often cutmix is chosen where both are on. smoothing: label smoothing, which is in the targets then.
    Errors: OptionError without timm.
    """

    def __init__(self, num_classes: int, mixup: float, cutmix: float, switch: float = 0.5, smoothing: float = 0.0):
        need_timm("mixup or cutmix")
        from timm.data import Mixup

        self.mixup = Mixup(mixup, cutmix, switch_prob=switch, label_smoothing=smoothing, num_classes=num_classes)

    @classmethod
    def of(cls, options: Any, num_classes: int) -> "Mixing | None":
        """The mixing that resolved options ask for, or None. Errors: OptionError, also for an odd batch size."""
        if not (options.mixup or options.cutmix):
            return None
        if options.batch_size % 2:
            raise OptionError(f"mixup and cutmix pair images: expected an even batch size, got {options.batch_size}")
        return cls(num_classes, options.mixup, options.cutmix, options.mix_switch, options.label_smoothing)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixes images (B, C, H, W), normalised, in place. Draws one number from torch's generator.

        Returns: (images, targets (B, K) that sum to 1; to 0 where one of the two images was UNREADABLE).
        Errors: OptionError if B is odd.
        """
        if len(labels) % 2:
            raise OptionError(f"mixup and cutmix pair images: expected a batch of even size, got {len(labels)}")
        readable = labels != UNREADABLE
        with seeded(int(torch.randint(2**62, ()))):
            images, targets = self.mixup(images, labels.clamp(min=0))
        return images, targets * (readable & readable.flip(0))[:, None]
