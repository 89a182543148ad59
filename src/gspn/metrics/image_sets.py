"""The sets of images that are compared: samples and reference, of any origin."""

import math
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from gspn.data.folders import is_image, scan, walk
from gspn.data.images import DataError, Numbered, Split, listed, raise_if_of_machine
from gspn.data.labelled import ImageFiles, open_data
from gspn.digests import Content, digest
from gspn.options import OptionError
from gspn.places import expanded
from gspn.progress import Progress
from gspn.sampling.sample_folder import ABOUT, Samples

NO_CLASS = -1  # the label of an image whose class is not known
ARRAYS = "an npz file as ADM's evaluation takes it: arr_0 uint8 (N, H, W, 3) and, where classes are known, arr_1 (N,)"


@dataclass
class ImageSet:
    """A set of images to compare.

    Attributes:
        split: the images; labels are NO_CLASS where the class is not known.
        where: as the user gave it. part: the split ("train", "test", "all"), or "" where there are no splits.
        parts: gives the parts of a digest of the images (see gspn.digests).
        notes: notes for the user.
        classes: the names of the classes that have images; None where they are not known.
        unused: the options that were given, but say nothing of these images.
    """

    split: Split
    where: str
    part: str
    parts: Callable[[], Iterable]
    notes: list[str] = field(default_factory=list)
    classes: set[str] | None = None
    unused: set[str] = field(default_factory=set)
    _identity: str | None = None

    def identity(self, console: Console | None = None) -> str:
        """A digest of the images. It reads every file. console: rich's, for a progress bar."""
        if self._identity is None:
            with Progress(f"reading {self.where}", len(self.split), console=console) as bar:
                self._identity = digest(self.parts(), advance=bar.advance)
        return self._identity

    def size(self) -> tuple[int, int]:
        """(H, W) of the images. Errors: OptionError where they have several."""
        sizes = sorted({(image.height, image.width) for image in self.split.sample()})
        if len(sizes) > 1:
            some = listed(["{}x{}".format(*size) for size in sizes], "size", "sizes")
            raise OptionError(f"the images of {self.where} have {some}: give the one at which to compare, --size HxW")
        return sizes[0]


def open_images(where: str | Path, part: str | None = None, preferred: str | None = None, **open_options) -> ImageSet:
    """Opens a set of images.

    Args:
        where: a folder that `gspn sample` made, a folder of image files, an npz file (ARRAYS), or DATA as
            labelled.open_data takes it with its `open_options`; class_names are those of arr_1 too.
        part: the split of DATA. None: `preferred` if DATA has it, else the one that evaluation takes; a note says
            which images these are where DATA has no evaluation split.
    Errors: DataError says what was found and what was expected; RunError if samples are missing from their folder.
    """
    path, unused = expanded(where), set()
    found = _without_splits(path, open_options.get("class_names"))
    if found is not None:
        if part is not None:
            raise OptionError(f"{where} has no splits, got {part!r}")
        (split, notes), name = found, ""
        parts = split.identity
        unused = {option for option, value in open_options.items() if value}
        if split.class_names is not None and split.class_names == list(open_options.get("class_names") or ()):
            unused.remove("class_names")
    else:
        data = open_data(where, **open_options)
        wanted = preferred if part is None and preferred in data.splits else part
        split, name = data.for_evaluation(wanted)
        notes = list(data.notes) if part or "all" not in data.splits else [*data.left_out, _taken(data, split, name)]

        def parts():
            yield from data.identity()
            yield name

    present, classes = split.labels.unique().tolist(), None
    if split.class_names is not None and NO_CLASS not in present:
        classes = {split.class_names[i] for i in present}
    return ImageSet(split, str(where), name, parts, notes, classes, unused)


def _taken(data, split, name):
    """A note on which images of data without an evaluation split are compared, where the user chose no split."""
    if name == "all":
        held_out = "; the split val holds those that a training leaves out" if "val" in data.splits else ""
        return f"no evaluation split: all {len(split)} images are compared, also those for training{held_out}"
    return f"no evaluation split: {len(split)} of {len(data.splits['all'])} images, those for training, are compared"


def _without_splits(path, class_names):
    """(split, notes) of images that are not DATA; None for DATA."""
    if path.suffix == ".npz":
        return _open_npz(path, class_names)
    if (path / ABOUT).exists():
        return Samples.open(path).split(), []
    return _open_folder(path) if path.is_dir() and _loose_files(path) else None


class Rest(Split):
    """The images of a split from `start` on, decoded and resized one by one. A loader would resize images in memory all
    at once, which takes too much memory at large sizes."""

    def __init__(self, split: Split, start: int = 0):
        super().__init__(split.labels[start:], split.class_names)
        self.split, self.start = split, start

    def image(self, i, *cell):
        return self.split.image(self.start + i, *cell)

    def keys(self, source=None):
        """In order; those of a stream have the undecoded images, which it can only read one after the other."""
        return ((i - self.start, *cell) for i, *cell in islice(self.split.keys(), self.start, None))


# -- a folder of image files --


def _loose_files(folder):
    return [file for file in scan(folder).files if is_image(file)]


def _open_folder(folder):
    found = walk(folder)
    inside = sorted({file.parts[len(folder.parts)] for file in found.files if is_image(file) and file.parent != folder})
    if inside:
        raise DataError(
            f"{folder} holds images and folders with images ({', '.join(inside[:5])}), so it is not clear what is "
            "meant: give one of them"
        )
    files = [file for file in found.files if is_image(file)]
    others = found.names([file for file in found.files if not is_image(file)])
    what = "file that is no image by its name", "files that are no images by their names"
    notes = [f"ignored {listed(others, *what)}"] if others else []
    images = ImageFiles(folder, files)
    return Split([NO_CLASS] * len(files), None, read=images, names=images.name), [*notes, *found.notes()]


# -- npz files --


def _open_npz(path, class_names):
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if "arr_0" not in members:
                held = listed(sorted(members), "array", "arrays")
                raise DataError(f"{path} holds {held}; expected {ARRAYS}")
            pixels = _Pixels.open(path, members["arr_0"])
        labels = [NO_CLASS] * pixels.shape[0]
        if "arr_1" in members:
            with np.load(path) as arrays:
                labels = arrays["arr_1"]
    except FileNotFoundError as error:
        raise DataError(f"there is no {path}") from error
    except DataError:
        raise
    except Exception as error:  # zipfile's, zlib's, tokenize's, of a damaged file
        raise_if_of_machine(error)
        raise DataError(f"{path} cannot be read, it is damaged or no npz file: {error}") from error
    labels = np.asarray(labels)
    if labels.shape != (pixels.shape[0],) or labels.dtype.kind not in "iu":
        raise DataError(f"arr_1 of {path} is {labels.dtype} {labels.shape}; expected {ARRAYS}")
    names, notes = None, []
    if "arr_1" in members and class_names:
        names = list(class_names)
        if labels.min() < 0 or labels.max() >= len(names):
            raise DataError(
                f"arr_1 of {path} numbers classes from {labels.min()} to {labels.max()}, but {len(names)} class names "
                "were given: expected a name for each number from 0 on"
            )
    elif "arr_1" in members:
        notes = ["the file gives numbers of classes, but no names"]
    return Split(labels.astype(np.int64), names, read=pixels, names=Numbered(f"{path}, image")), notes


@dataclass(frozen=True)
class _Pixels:
    """arr_0 of an npz file, read image by image from the file, so that 50,000 images need not be in memory."""

    path: Path
    offset: int | None  # None: compressed, and then `array` holds them
    shape: tuple
    array: np.ndarray | None = None

    @classmethod
    def open(cls, path, member):
        with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
            shape, fortran, dtype = _array_header(stream)
            if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or fortran or min(shape) < 1:
                raise DataError(f"arr_0 of {path} is {dtype} {shape}; expected {ARRAYS}")
            header = stream.tell()
            size, expected = member.file_size - header, math.prod(shape)
            if size != expected:  # beyond it are other arrays
                raise DataError(f"{path} is damaged: arr_0 {shape} has {size} bytes, expected {expected}")
            if member.compress_type != zipfile.ZIP_STORED:
                array = np.frombuffer(stream.read(), np.uint8).reshape(shape)
                return cls(path, None, shape, array)
        with open(path, "rb") as file:
            file.seek(member.header_offset + 26)  # of the local header: lengths of name and extra field, then these
            name, extra = np.frombuffer(file.read(4), "<u2").tolist()
        return cls(path, member.header_offset + 30 + name + extra + header, shape)

    def __call__(self, i):
        array = self.array
        if array is None:
            array = np.memmap(self.path, np.uint8, "r", self.offset, self.shape)
        pixels = np.array(array[i])
        return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)

    def identity(self) -> Iterator[Content]:
        yield Content(self.path, images=self.shape[0])


def _array_header(stream):
    """(shape, whether in Fortran's order, dtype) of a stream that begins as a .npy file."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream)
