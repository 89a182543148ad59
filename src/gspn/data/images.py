"""Splits of images of any kind, and preprocessing: from an image file to the model's input."""

import copy
import errno
import json
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image

from gspn.files import shown
from gspn.models.latents import is_real, is_whole

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
USUAL_CAPTIONS = ("text", "caption")  # what a column of captions is called
UNREADABLE = -100  # the label of an image that could not be decoded: cross_entropy's ignore_index
OF_MACHINE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE}  # see raise_if_of_machine
TOGETHER = 8  # shards whose images are shuffled together


# -- labelled images --


class DataError(ValueError):
    """DATA cannot be used; the message says what was found and what was expected."""


class Split:
    """Labelled images, as labelled.open_data opens them.

    Attributes:
        labels: int64 (N,), numbers into `class_names`.
        class_names: list of names, or None where the data carry none.
        pixels: uint8 (N, C, H, W) where all images are in memory, else None.
        read: index -> PIL image, where they are not.
        names: index -> an image's name in messages.
        shard: int64 (N,), the number of the file that holds an image, where a file holds many images; else None.
        captions: for each image a tuple of one or more captions; None where the data have none.
        remote: whether the images are downloaded as they are needed, so that they are not part of digests.

    `read` and `names` have to be picklable, as workers are not forked on every system. The method identity() of `read`,
    if it has one, gives the parts of a digest of the images (see gspn.digests).
    """

    remote = False

    def __init__(self, labels, class_names, *, pixels=None, read=None, names=None, shard=None, captions=None):
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.class_names, self.pixels, self.read, self.captions = class_names, pixels, read, captions
        self.names = names or Numbered("image")
        self.shard = None if shard is None else torch.as_tensor(shard, dtype=torch.int64)

    def __len__(self):
        return len(self.labels)

    def image(self, i: int) -> Image.Image:
        """The i-th image as PIL image. Errors: any, if the file is damaged."""
        if self.pixels is None:
            return self.read(i)
        pixels = self.pixels[i].permute(1, 2, 0).numpy()
        return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)

    def keys(self, source: torch.Generator | None = None) -> Iterable[tuple]:
        """A key for each image, a tuple that begins with its index, by which workers read it: in order, or shuffled by
        `source`. Shards come in random order, and their images are shuffled over TOGETHER shards at a time."""
        if source is None:
            return ((i,) for i in range(len(self)))
        order = torch.randperm(len(self), generator=source)
        if self.shard is not None:
            position = torch.randperm(int(self.shard.max()) + 1, generator=source)
            order = order[(position[self.shard] // TOGETHER)[order].argsort(stable=True)]
        return ((i,) for i in order.tolist())

    def problem(self, i: int) -> str:
        """What is wrong with the i-th image: its name and the reason."""
        try:
            with_channels(self.image(i), 3)
        except Exception as error:
            return f"{self.names(i)}: {str(error) or type(error).__name__}"
        return f"{self.names(i)}: could not be turned into the model's input"

    def identity(self) -> Iterator:
        """The parts of a digest of these images: class names, labels, captions, pixels or undecoded contents."""
        yield repr(self.class_names).encode()
        yield self.labels.numpy().tobytes()
        for captions in self.captions or ():
            yield json.dumps(captions).encode()
        if self.pixels is not None:
            yield repr(tuple(self.pixels.shape)).encode()
            yield self.pixels.contiguous().numpy().tobytes()
        elif hasattr(self.read, "identity"):
            yield from self.read.identity()

    def subset(self, index) -> "Split":
        """The split of the images `index` only."""
        index = torch.as_tensor(index, dtype=torch.int64)
        pixels, shard = (None if each is None else each[index] for each in (self.pixels, self.shard))
        read, names = Chosen(self.read, index), Chosen(self.names, index)
        captions = None if self.captions is None else [self.captions[i] for i in index.tolist()]
        more = dict(pixels=pixels, read=read, names=names, shard=shard, captions=captions)
        return Split(self.labels[index], self.class_names, **more)

    def relabelled(self, class_names: list[str]) -> "Split":
        """The same images with labels into `class_names`. Data without class names are assumed to number them alike.
        Errors: DataError names the classes that are not among `class_names`."""
        own, number = self.class_names or class_names, {name: i for i, name in enumerate(class_names)}
        present = self.labels.unique().tolist()
        beyond = [str(i) for i in present if not 0 <= i < len(own)]
        unknown = beyond or [own[i] for i in present if own[i] not in number]
        if unknown:
            raise DataError(
                f"the data hold {listed(unknown, 'class', 'classes')} that the model does not know; "
                f"it knows {', '.join(class_names)}"
            )
        same = copy.copy(self)
        same.labels, same.class_names = torch.tensor([number.get(name, 0) for name in own])[self.labels], class_names
        return same

    def channels(self) -> int:
        """1 or 3, from the pixels or from up to 32 of the images."""
        if self.pixels is not None:
            return self.pixels.shape[1]
        grey = ("1", "L", "LA", "La", "I")
        return 1 if all(i.mode in grey or i.mode.startswith("I;") for i in self.sample()) else 3

    def sample(self, count: int = 32) -> Iterable[Image.Image]:
        """Up to `count` readable images, evenly spaced, one after the other, as they may be large. Errors: DataError at
        the end if none of them is readable; those of the machine."""
        at, found = np.unique(np.linspace(0, len(self) - 1, count).astype(int)), False
        for i in at.tolist():
            try:
                image = self.image(i)
            except Exception as error:
                raise_if_of_machine(error)
                continue
            found = True
            yield image
        if not found:
            raise DataError(f"none of {len(at)} images looked at can be read; the first: {self.problem(0)}")


class MaskedSplit(Split):
    """Images with masks. Beside what a Split has, `masks` reads the i-th mask as a PIL image; labels are all 0.

    `masks` may have the method identity() as `read` has."""

    def __init__(self, count: int, masks: Callable, **more):
        super().__init__([0] * count, None, **more)
        self.masks = masks

    def pair(self, i: int, read: Callable[[Image.Image], np.ndarray]) -> tuple[Image.Image, np.ndarray]:
        """The i-th image, and what `read` makes of its mask (mask_classes.values_of, Classes.numbers).
        Errors: DataError where image, mask and classes do not fit each other; anything else for a damaged file."""
        image, mask = self.image(i), self.mask(i)
        if image.size != mask.size:
            raise DataError(
                f"{self.names(i)} is {image.width}x{image.height} pixels, but its mask {mask.width}x{mask.height}; "
                "expected the same size (nothing is resized, as that would invent the truth)"
            )
        try:
            return image, read(mask)
        except DataError as error:
            raise DataError(f"the mask of {self.names(i)} {error}") from error

    def mask(self, i: int) -> Image.Image:
        """The i-th mask as a PIL image. Errors: any, if the file is damaged."""
        return self.masks(i)

    def problem(self, i):
        try:
            with_channels(self.image(i), 3)
        except Exception:
            return super().problem(i)
        try:
            self.mask(i)
        except Exception as error:
            return f"the mask of {self.names(i)}: {str(error) or type(error).__name__}"
        return super().problem(i)

    def identity(self) -> Iterator:
        yield from super().identity()
        if hasattr(self.masks, "identity"):
            yield from self.masks.identity()

    def subset(self, index):
        part = super().subset(index)
        more = dict(pixels=part.pixels, read=part.read, names=part.names, shard=part.shard)
        return MaskedSplit(len(part), Chosen(self.masks, part.read.index), **more)


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


def raise_if_of_machine(error: Exception) -> None:
    """Raises an error of reading an image again if it is the machine's (no memory, too many open files, a disk that
    fails), so that it does not count as one of the image."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in OF_MACHINE):
        raise error


def listed(things, one, many):
    """'3 files: a, b, c', at most five of them by name."""
    names = [shown(str(thing)) for thing in things[:5]] + (["..."] if len(things) > 5 else [])
    return f"{len(things)} {one if len(things) == 1 else many}: {', '.join(names)}"


def read_class_names(folder: Path) -> list[str] | None:
    """The lines of classes.txt in a folder, if there is one: the names of classes that the data number. Blank lines at
    its end do not count. Errors: DataError for other blank lines, which would shift the numbers, and for what is not
    UTF-8."""
    file = folder / "classes.txt"
    if not file.exists():
        return None
    names = [line.strip() for line in text_of(file).rstrip().splitlines()]
    if "" in names:
        raise DataError(
            f"line {names.index('') + 1} of {file} is blank: expected the name of a class in each line, as the classes "
            "are numbered by them. Remove the line, or write a name there"
        )
    return names


def text_of(file: Path) -> str:
    """The content of a text file. Errors: DataError."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as a text in UTF-8: {error}") from error


def labelled(splits: dict[str, Split], where: str) -> tuple[dict[str, Split], list[str]]:
    """(the splits with labels, notes on those without, whose labels are all -1).
    Errors: DataError where only some of a split's labels are -1."""
    kept, notes = {}, []
    for name, split in splits.items():
        without = int((split.labels < 0).sum())
        if 0 < without < len(split):
            raise DataError(
                f"{without} of {len(split)} images in the {name} split of {where} have a label below 0, which stands "
                "for none: expected a class for every image of a split, or for none of them"
            )
        if without:
            notes.append(f"left out the {name} split, whose {without} images have no labels")
        else:
            kept[name] = split
    return kept, notes


# -- randomness that can be repeated --


def generator(*numbers):
    """A torch.Generator seeded by non-negative integers, such as (seed, epoch)."""
    return torch.Generator().manual_seed(mixed_seed(*numbers))


def mixed_seed(*numbers):
    """One 63-bit seed from several non-negative integers; (1, 2) and (2, 1) give unrelated ones."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


# -- from an image file to pixels --


# How each EXIF orientation is turned upright. 1 needs no turning; unknown values are ignored.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
WHITE_IS_ZERO, UNSIGNED = 0, 1  # values of PHOTOMETRIC and SAMPLE_FORMAT
WHITE = 65535  # in a 16-bit image
SPREAD = "spread"  # in the info of an image: the factor by which Pillow spreads grey PNGs of 2 and 4 bits over 8


def decode(file) -> Image.Image:
    """Opens and fully decodes an image file (path or binary file object), turned upright by its EXIF orientation. Grey
    of more than 8 bits comes as 16 bits, from 0 (black) to 65535 (white), in a mode that begins with "I;16".

    Metadata that cannot be parsed are ignored, and so are Pillow's warnings. Errors: ValueError for an image of more
    than twice PIL.Image.MAX_IMAGE_PIXELS, or whose values have no fixed range; whatever Pillow raises on a damaged
    file, which may be any exception.
    """
    with _silent:  # warnings are about metadata, and about images of more than half the limit
        try:
            with Image.open(file) as image:
                return upright(image).copy()
        except Image.DecompressionBombError as error:
            found = str(error).split(",")[0]
            raise ValueError(
                f"the image is too large: {found}. Make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS in Python"
            ) from error


class _Silent:
    """Like warnings.catch_warnings with everything ignored, for several threads at once: the first that enters takes
    the filters away, the last that leaves brings them back. With catch_warnings itself, a thread that leaves late
    would bring back what another one had set."""

    def __init__(self):
        self.lock, self.inside, self.caught = threading.Lock(), 0, None

    def __enter__(self):
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.caught = warnings.catch_warnings()
                self.caught.__enter__()
                warnings.simplefilter("ignore")

    def __exit__(self, *error):
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.caught.__exit__(*error)


_silent = _Silent()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_silent.__init__)  # a thread that held the lock is not there


def upright(image: Image.Image) -> Image.Image:
    """A PIL image turned upright by its EXIF orientation. One that was opened from a file comes as `decode` gives the
    file. It is the same image where nothing has to change. Errors: as for `decode`."""
    with _silent:
        info = _info_of_spread(image)
        image.load()  # before its orientation is read, as Pillow turns TIFF while it loads
        image = _turned(_sixteen_bits(image), _turn(image))
        image.info |= info
        return image


def _turned(image, turn):
    if turn is None:
        return image
    image = image.transpose(turn)
    # Drop the orientation, or the image would be turned again.
    image.info = {name: value for name, value in image.info.items() if name in ("transparency", "icc_profile")}
    return image


def _turn(image):
    """The Transpose that turns an opened image upright; None if it is upright."""
    # Not ImageOps.exif_transpose: it fails where any other tag cannot be parsed or written again.
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # Pillow raises anything on EXIF that it cannot parse
        return None


def _info_of_spread(image):
    """What belongs into the info of an opened image, not loaded, whose 2 or 4 bits Pillow will spread over 8."""
    factor = {"L;2": 85, "L;4": 17}.get(image.tile[0][3]) if image.format == "PNG" and image.tile else None
    info = {SPREAD: factor} if factor else {}
    if factor and "transparency" in image.info:  # a level, which Pillow leaves as the file has it
        info["transparency"] = factor * image.info["transparency"]
    return info


def _sixteen_bits(image):
    """An image from a file, its grey levels of 9 to 16 bits spread over 16. Other images are returned as they are."""
    if image.format == "PPM" and image.mode == "I":  # Pillow spreads PGM's levels over 16 bits, in an image of 32
        return Image.fromarray(np.asarray(image).astype(np.uint16))
    tags = image.tag_v2 if image.format == "TIFF" else {}
    signed = set(tags.get(SAMPLE_FORMAT, ())) - {UNSIGNED}
    if signed or image.mode in ("I", "F"):
        raise _no_range(image)
    if image.mode.startswith("I;16") and tags:
        most = 2 ** tags.get(BITS, (16,))[0] - 1
        inverted = tags.get(PHOTOMETRIC, WHITE_IS_ZERO) == WHITE_IS_ZERO  # which Pillow minds in 8 bits only
        if most != WHITE or inverted:
            values = np.asarray(image).astype(np.int64)
            values = ((most - values if inverted else values) * WHITE + most // 2) // most
            return Image.fromarray(values.astype(np.uint16))
    return image


def _no_range(image):
    kind = {"F": "floating-point", "I": "32-bit or signed"}.get(image.mode, "signed")
    return ValueError(
        f"the image has {kind} values (Pillow's mode {image.mode}), which have no fixed range from black to white; "
        "expected unsigned values of up to 16 bits: convert the image"
    )


def with_channels(image: Image.Image, channels: int) -> Image.Image:
    """A PIL image with 1 (grey) or 3 (RGB) channels of 8 bits. Transparency is laid on white; 16-bit grey is divided by
    257, whatever values the image holds. Errors: ValueError for 32-bit and floating-point values."""
    if image.mode in ("I", "F"):
        raise _no_range(image)
    if image.mode.startswith("I;16"):
        values, clear = np.asarray(image).astype(np.uint32), image.info.get("transparency")
        grey = (values + 128) // 257
        if clear is not None:  # a level, which Pillow minds in 8 bits only
            grey[values == clear] = 255
        image = Image.fromarray(grey.astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode == "LAB":
        image = image.convert("RGB")  # Pillow has no way from it to grey
    return image.convert({1: "L", 3: "RGB"}[channels])


@dataclass(frozen=True)
class Preprocessing:
    """How images become the model's input; stored in the run's config.json. Errors: ValueError.

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
        try:
            size, mean, std = map(tuple, (self.size, self.mean, self.std))
            whole = all(map(is_whole, (self.channels, *size))) and len(size) == 2 and min(size) > 0
            finite = all(is_real(x) and math.isfinite(x) for x in (self.crop, *mean, *std)) and len(mean) == len(std)
            if not (whole and finite and self.channels in (1, 3) and min(std) > 0 and 0 < self.crop <= 1):
                raise ValueError
        except (TypeError, ValueError):
            needs = "1 or 3 channels, a size (H, W), a mean and a std above 0 of each channel, and 0 < crop <= 1"
            raise ValueError(f"preprocessing needs {needs}; got {self}") from None
        vars(self).update(size=tuple(map(int, size)), mean=tuple(map(float, mean)), std=tuple(map(float, std)))
        vars(self).update(channels=int(self.channels), crop=float(self.crop))  # nothing of numpy's: it becomes JSON

    def __call__(self, image: Image.Image, numbers=None, least: float = 0.25) -> torch.Tensor:
        """PIL image to uint8 (C, H, W): the centre box, or a random box of at least the part `least` of the area,
        chosen by four `numbers` in [0, 1)."""
        size = image.size
        box = centre_box(size, self.size, self.crop) if numbers is None else random_box(size, numbers, least)
        image = with_channels(image, self.channels).resize(self.size[::-1], Image.Resampling.BICUBIC, box=box)
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
    # Rounding may give a box larger than the image by one part in 10^16, which Pillow refuses.
    w, h = (min(side * scale, whole) for side, whole in zip(reversed(size), image_size, strict=True))
    left, top = (image_size[0] - w) / 2, (image_size[1] - h) / 2
    return left, top, min(left + w, image_size[0]), min(top + h, image_size[1])


def random_box(image_size, numbers, least):
    """A box of `least` to all of the area and proportions from 3:4 to 4:3, as four `numbers` in [0, 1) choose."""
    area = image_size[0] * image_size[1] * (least + (1 - least) * float(numbers[0]))
    ratio = math.exp((2 * float(numbers[1]) - 1) * math.log(4 / 3))
    w, h = min(math.sqrt(area * ratio), image_size[0]), min(math.sqrt(area / ratio), image_size[1])
    left, top = (image_size[0] - w) * float(numbers[2]), (image_size[1] - h) * float(numbers[3])
    return left, top, left + w, top + h
