"""Shards: tar files in which an image and its class, or its caption, stand together, as webdataset writes them.

    00041.jpg 00041.cls 00042.jpg 00042.cls ...      the class is a number, or a name
    00041.jpg 00041.txt 00042.jpg 00042.json ...     the caption is a text, or a member of a JSON object

Reading the headers once tells where in which file each image lies, so that shards are read like any other images: in an
order that belongs to (seed, epoch), by any number of workers and processes. Images are shuffled over a few whole shards
at a time (Split.keys), so that what is read at a time lies close together.
"""

import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from gspn.digests import Content
from gspn.train.images import SPLIT_NAMES, USUAL_CAPTIONS, DataError, Split, decode, listed, read_class_names


def read_shards(root: Path, files: Sequence[Path]) -> dict[str, Split]:
    """Splits of tar files. Which split a file belongs to is in its name, or in that of its folder under `root`, as in
    train-0003.tar or val/0003.tar; if it is in no name, everything is one split, train. classes.txt in `root` names
    the classes line by line.

    Errors: DataError for a file that is no tar file, for images without a class, for names of some files only.
    """
    read = _by_split(root, files, ("cls",), "class")
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


def read_captioned(root: Path, files: Sequence[Path], column: str | None = None) -> dict[str, Split]:
    """Splits of tar files with captions instead of classes; all labels are 0.

    Args:
        column: the member of the JSON objects that holds the caption, a text or a list of texts. None: the caption is
            in .txt files, and where there is none in the JSON's only member that is called text or caption.
        Others: as for `read_shards`.
    Errors: DataError, also for images without a caption.
    """
    splits = {}
    for name, shards in _by_split(root, files, ("json",) if column else ("txt", "json"), "caption").items():
        captions = [
            (text,) if kind == "txt" else json_caption(text, column, f"{shards.name(i)}.json")
            for i, (kind, text) in enumerate(zip(shards.kinds, shards.texts, strict=True))
        ]
        labels, shards = [0] * len(captions), replace(shards, kinds=[], texts=[])  # JSON may be long
        splits[name] = Split(labels, None, read=shards, names=shards.name, shard=shards.shard, captions=captions)
    return splits


def json_caption(text: str, column: str | None, where: str) -> tuple[str, ...]:
    """The captions in a JSON object: what its member `column` holds, a text or a list of texts; None is its only member
    that is called text or caption. Errors: DataError, which calls the object `where`."""
    try:
        members = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where} is no JSON: {error}") from error
    if not isinstance(members, dict):
        raise DataError(f"{where} holds {str(members)[:40]!r}, expected a JSON object")
    names = [column] if column else [name for name in USUAL_CAPTIONS if name in members]
    if len(names) != 1 or names[0] not in members:
        wanted = repr(column) if column else f"one of {' and '.join(USUAL_CAPTIONS)}, or --caption-column"
        raise DataError(f"{where} has the members {', '.join(members) or 'none'}: expected {wanted}")
    value = members[names[0]]
    captions = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else ()
    if not captions or not all(isinstance(each, str) for each in captions):
        raise DataError(f"{where} has no caption: {names[0]!r} is {str(value)[:40]!r}, expected a text, or texts")
    return captions


def _by_split(root, files, wanted, what):
    """{split: _Shards} of tar files, as their names say."""
    of_split: dict[str | None, list[Path]] = {}
    for file in files:
        of_split.setdefault(_split_name(file.relative_to(root)), []).append(file)
    if None in of_split and len(of_split) > 1:
        strange = listed([file.name for file in of_split[None]], "tar file", "tar files")
        raise DataError(
            f"{root} holds {strange} of no split, beside others of {', '.join(filter(None, of_split))}: expected "
            f"{', '.join(SPLIT_NAMES)} in each name, or in none"
        )
    return {name or "train": _Shards.read(root, of_one, wanted, what) for name, of_one in of_split.items()}


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
    kinds: list[str]  # the extension of what stands for the class or the caption
    texts: list[str]  # what it holds

    @classmethod
    def read(cls, root, files, wanted, what):
        """wanted: extensions, the first of which counts where an image has several. what: they hold."""
        rows = []
        for number, file in enumerate(files):
            found = [(number, *row) for row in _members(file, wanted, what)]
            if not found:
                example = f"expected members such as 0001.jpg and 0001.{wanted[0]}"
                raise DataError(f"{file} holds no images with a {what}: {example}")
            rows += found
        shard, keys, kinds, texts, offset, size = zip(*rows, strict=True)
        return cls(root, list(files), *map(np.array, (shard, offset, size)), list(keys), list(kinds), list(texts))

    def __call__(self, i):
        with open(self.files[self.shard[i]], "rb") as file:
            file.seek(self.offset[i])
            return decode(io.BytesIO(file.read(self.size[i])))

    def name(self, i):
        return f"{self.files[self.shard[i]]}, {self.keys[i]}"

    def identity(self) -> Iterator:
        for file, images in zip(self.files, np.bincount(self.shard, minlength=len(self.files)).tolist(), strict=True):
            yield Content(file, file.relative_to(self.root), images)
        yield self.offset.tobytes()


def _members(path, wanted, what):
    """(key, extension of the text, text, offset, size) of every image in a tar file. Members that belong together have
    the same name up to the first dot and follow each other."""
    images = {extension.removeprefix(".") for extension in Image.registered_extensions()}
    rows, key, image, texts = [], None, None, {}

    def close():
        if image is not None and not texts:
            beside = " or ".join(f"{key}.{extension}" for extension in wanted)
            raise DataError(f"{path}: the image {key} has no {what}: expected {beside} beside it")
        if image is not None:
            kind = next(extension for extension in wanted if extension in texts)
            rows.append((key, kind, texts[kind], *image))

    try:
        with tarfile.open(path, "r:") as tar, open(path, "rb") as file:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                base, _, extension = name.partition(".")
                if (own := f"{folder}/{base}" if folder else base) != key:
                    close()
                    key, image, texts = own, None, {}
                if extension in wanted:
                    file.seek(member.offset_data)
                    texts[extension] = file.read(member.size).decode().strip()
                elif extension.lower() in images:
                    image = member.offset_data, member.size
            close()
    except (OSError, tarfile.TarError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as an uncompressed tar file: {error}") from error
    return rows
