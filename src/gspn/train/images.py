"""Labelled images of any kind, and what turns one of them into the model's input. loader.py makes batches of them."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

UNREADABLE = -100  # the label of an image that could not be decoded: cross_entropy's ignore_index


# -- labelled images --


class DataError(ValueError):
    """DATA cannot be used as asked: what was found and what was expected."""


class Split:
    """Labelled images, such as data.open_data finds.

    Attributes:
        labels: int64 (N,), numbers into `class_names`.
        class_names: list of names, or None where the data carry none.
        pixels: uint8 (N, C, H, W) where all images are in memory, else None.
        read: index -> PIL image, where they are not.
        names: index -> what to call an image in a message.

    `read` and `names` have to be picklable, for the loader's workers are not everywhere forked.
    """

    def __init__(self, labels, class_names, *, pixels=None, read=None, names=None):
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.class_names, self.pixels, self.read = class_names, pixels, read
        self.names = names or Numbered("image")

    def __len__(self):
        return len(self.labels)

    def image(self, i: int) -> Image.Image:
        """The i-th image as PIL image. Errors: any, if the file is damaged."""
        if self.pixels is None:
            return self.read(i)
        pixels = self.pixels[i].permute(1, 2, 0).numpy()
        return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)

    def problem(self, i: int) -> str:
        """What is wrong with the i-th image, in words, beginning with its name."""
        try:
            self.image(i)
        except Exception as error:
            return f"{self.names(i)}: {str(error) or type(error).__name__}"
        return f"{self.names(i)}: could not be turned into the model's input"

    def subset(self, index) -> "Split":
        """The split of the images `index` only."""
        index = torch.as_tensor(index, dtype=torch.int64)
        pixels = None if self.pixels is None else self.pixels[index]
        return Split(
            self.labels[index],
            self.class_names,
            pixels=pixels,
            read=Chosen(self.read, index),
            names=Chosen(self.names, index),
        )

    def relabelled(self, class_names: list[str]) -> "Split":
        """The same images with labels that number `class_names`. Errors: DataError names the classes that are not
        among them. Data without names of their own are taken to be numbered alike."""
        own = self.class_names or class_names
        present = self.labels.unique().tolist()
        beyond = [i for i in present if i >= len(own)]
        unknown = [str(i) for i in beyond] or [own[i] for i in present if own[i] not in class_names]
        if unknown:
            raise DataError(
                f"the data hold {listed(unknown, 'class', 'classes')} that the model does not know; "
                f"it knows {', '.join(class_names)}"
            )
        number = torch.tensor([class_names.index(name) if name in class_names else 0 for name in own])
        return Split(number[self.labels], class_names, pixels=self.pixels, read=self.read, names=self.names)

    def channels(self) -> int:
        """1 or 3, from the pixels or from what up to 32 of the images are."""
        if self.pixels is not None:
            return self.pixels.shape[1]
        grey = ("1", "L", "LA", "La", "I")
        return 1 if all(i.mode in grey or i.mode.startswith("I;") for i in self.sample()) else 3

    def sample(self, count: int = 32) -> list[Image.Image]:
        """Up to `count` readable images, evenly spaced. Errors: DataError if none of them is readable."""
        images, at = [], np.unique(np.linspace(0, len(self) - 1, count).astype(int))
        for i in at.tolist():
            try:
                images.append(self.image(i))
            except Exception:
                continue
        if not images:
            raise DataError(f"none of {len(at)} images looked at can be read; the first: {self.problem(0)}")
        return images


@dataclass(frozen=True)
class Numbered:
    """Names by number: "image 3"."""

    what: str

    def __call__(self, i):
        return f"{self.what} {i}"


@dataclass(frozen=True)
class Chosen:
    """`function` of the i-th of the numbers `index`."""

    function: Callable
    index: torch.Tensor

    def __call__(self, i):
        return self.function(int(self.index[i]))


def listed(things, one, many):
    """'3 files: a, b, c', at most five of them by name."""
    names = [str(thing) for thing in things[:5]] + (["..."] if len(things) > 5 else [])
    return f"{len(things)} {one if len(things) == 1 else many}: {', '.join(names)}"


# -- randomness that can be repeated --


def generator(*numbers):
    """A torch.Generator seeded by non-negative integers, such as (seed, epoch)."""
    return torch.Generator().manual_seed(mixed_seed(*numbers))


def mixed_seed(*numbers):
    """One 63-bit seed from several non-negative integers; (1, 2) and (2, 1) give unrelated ones."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


# -- from an image file to pixels --


def decode(file) -> Image.Image:
    """Opens and fully decodes an image file (path or binary file object), turned upright by its EXIF orientation.
    Errors: whatever Pillow raises on a damaged file, which may be any exception."""
    with Image.open(file) as image:
        image.load()
        return ImageOps.exif_transpose(image)


def with_channels(image: Image.Image, channels: int) -> Image.Image:
    """A PIL image with 1 (grey) or 3 (RGB) channels; transparency is laid on white; 16-bit grey is scaled to 8."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.clip(values / 257 if values.max() > 255 else values, 0, 255).round().astype("uint8"))
    elif image.mode == "F":
        raise ValueError("pixels are 32-bit floating point, which have no fixed range; expected 8- or 16-bit pixels")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert({1: "L", 3: "RGB"}[channels])


@dataclass(frozen=True)
class Preprocessing:
    """How a run turns images into its model's input; stored in the run's config.json.

    Attributes:
        channels: 1 or 3.
        size: (H, W) in pixels.
        mean, std: per channel, in units of the full range (0 is black, 1 is white).
        crop: evaluation takes the largest centred box of the input's proportions, shrunk by this factor, and resizes
            it (bicubic, antialiased) to `size`. An image that has that size already passes unchanged with crop 1.
    """

    channels: int
    size: tuple
    mean: tuple
    std: tuple
    crop: float = 1.0

    def __post_init__(self):
        for name in ("size", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def __call__(self, image: Image.Image, numbers=None) -> torch.Tensor:
        """PIL image to uint8 (C, H, W): the centre box, or the box that four random `numbers` in [0, 1) choose."""
        image = with_channels(image, self.channels)
        box = centre_box(image.size, self.size, self.crop) if numbers is None else random_box(image.size, numbers)
        image = image.resize((self.size[1], self.size[0]), Image.Resampling.BICUBIC, box=box)
        pixels = torch.from_numpy(np.array(image))
        return pixels[None] if self.channels == 1 else pixels.permute(2, 0, 1)

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (B, C, H, W) to float32 on the same device: (pixels / 255 - mean) / std."""
        mean, std = (torch.tensor(v, device=pixels.device).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std

    def to_json(self):
        return asdict(self)


def centre_box(image_size, size, crop):
    """(left, top, right, bottom) of the centre crop, in an image of (W, H) `image_size`, for a result of (H, W)."""
    scale = min(image_size[0] / size[1], image_size[1] / size[0]) * crop
    w, h = size[1] * scale, size[0] * scale
    left, top = (image_size[0] - w) / 2, (image_size[1] - h) / 2
    return left, top, left + w, top + h


def random_box(image_size, numbers):
    """A box of 25 to 100% of the area and proportions from 3:4 to 4:3, as four `numbers` in [0, 1) choose."""
    area = image_size[0] * image_size[1] * (0.25 + 0.75 * float(numbers[0]))
    ratio = math.exp((2 * float(numbers[1]) - 1) * math.log(4 / 3))
    w, h = min(math.sqrt(area * ratio), image_size[0]), min(math.sqrt(area / ratio), image_size[1])
    left, top = (image_size[0] - w) * float(numbers[2]), (image_size[1] - h) * float(numbers[3])
    return left, top, left + w, top + h
