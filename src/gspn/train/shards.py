"""Shards: tar files in which an image and its class stand together, as webdataset writes them.

    00041.jpg 00041.cls 00042.jpg 00042.cls ...      the class is a number, or a name

Reading the headers once tells where in which file each image lies, so that shards are read like any other images: in an
order that belongs to (seed, epoch), by any number of workers and processes. Images are shuffled over a few whole shards
at a time (Split.keys), so that what is read at a time lies close together.
"""

import io
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from gspn.train.images import SPLIT_NAMES, DataError, Split, decode, listed, read_class_names


def read_shards(root: Path, files: Sequence[Path]) -> dict[str, Split]:
    """Splits of tar files. Which split a file belongs to is in its name, or in that of its folder under `root`, as in
    train-0003.tar or val/0003.tar; if it is in no name, everything is one split, train. classes.txt in `root` names
    the classes line by line.

    Errors: DataError for a file that is no tar file, for images without a class, for names of some files only.
    """
    of_split: dict[str | None, list[Path]] = {}
    for file in files:
        of_split.setdefault(_split_name(file.relative_to(root)), []).append(file)
    if None in of_split and len(of_split) > 1:
        strange = listed([file.name for file in of_split[None]], "tar file", "tar files")
        raise DataError(
            f"{root} holds {strange} of no split, beside others of {', '.join(filter(None, of_split))}: expected "
            f"{', '.join(SPLIT_NAMES)} in each name, or in none"
        )
    read = {name or "train": _Shards.read(root, of_one) for name, of_one in of_split.items()}
    texts = {name: shards.texts for name, shards in read.items()}
    numbered = all(text.isdecimal() for each in texts.values() for text in each)
    class_names = read_class_names(root) if numbered else sorted(set().union(*texts.values()))
    splits = {}
    for name, shards in read.items():
        labels = [int(text) if numbered else class_names.index(text) for text in shards.texts]
        if numbered and class_names and max(labels) >= len(class_names):
            raise DataError(f"{root / 'classes.txt'} names {len(class_names)} classes, but a class is {max(labels)}")
        splits[name] = Split(labels, class_names, read=shards, names=shards.name, shard=shards.shard)
    return splits


def _split_name(path):
    """The split that a relative path names: train-0003.tar, imagenet-val-01.tar, test/0003.tar."""
    words = [word for part in path.with_suffix("").parts for word in re.split(r"[-_.]", part.lower())]
    return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), None)


@dataclass(frozen=True)
class _Shards:
    """Where the images of some tar files lie: for each the number of the file, where it begins and how long it is."""

    root: Path
    files: list[Path]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    keys: list[str]
    texts: list[str]  # what stands for the class

    @classmethod
    def read(cls, root, files):
        rows = []
        for number, file in enumerate(files):
            found = [(number, *row) for row in _members(file)]
            if not found:
                raise DataError(f"{file} holds no images with a class: expected members such as 0001.jpg and 0001.cls")
            rows += found
        shard, keys, texts, offset, size = zip(*rows, strict=True)
        return cls(root, list(files), *map(np.array, (shard, offset, size)), list(keys), list(texts))

    def __call__(self, i):
        with open(self.files[self.shard[i]], "rb") as file:
            file.seek(self.offset[i])
            return decode(io.BytesIO(file.read(self.size[i])))

    def name(self, i):
        return f"{self.files[self.shard[i]]}, {self.keys[i]}"

    def identity(self) -> Iterator[bytes]:
        for file in self.files:
            yield f"{file.relative_to(self.root)} {file.stat().st_size}\n".encode()
        yield self.offset.tobytes()


def _members(path):
    """(key, text of the class, offset, size) of every image in a tar file. Members that belong together have the same
    name up to the first dot and follow each other."""
    images = {extension.removeprefix(".") for extension in Image.registered_extensions()}
    rows, key, image, text = [], None, None, None

    def close():
        if image is not None and text is None:
            raise DataError(f"{path}: the image {key} has no class: expected {key}.cls beside it")
        if image is not None:
            rows.append((key, text, *image))

    try:
        with tarfile.open(path, "r:") as tar, open(path, "rb") as file:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                base, _, extension = name.partition(".")
                if (own := f"{folder}/{base}" if folder else base) != key:
                    close()
                    key, image, text = own, None, None
                if extension == "cls":
                    file.seek(member.offset_data)
                    text = file.read(member.size).decode().strip()
                elif extension.lower() in images:
                    image = member.offset_data, member.size
            close()
    except (OSError, tarfile.TarError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as an uncompressed tar file: {error}") from error
    return rows
