"""Shards: tar files that hold each image beside its class, caption or mask, as webdataset writes them.

    00041.jpg 00041.cls 00042.jpg 00042.cls ...      the class is a number, or a name
    00041.jpg 00041.txt 00042.jpg 00042.json ...     the caption is a text, or a member of a JSON object
    00041.jpg 00041.seg.png 00042.jpg ...            the mask

The names say which members make a sample, as in webdataset: the key is the path up to the first dot of its last part,
the extension is what follows that dot, in upper or lower case, and the members of a sample follow each other.

Tar files that were joined (cat 0.tar 1.tar) are read whole. A tar file without its end, a block of zeros, is an error:
it was cut, and nothing says what is missing.

The headers are read once and say where each image lies. Shards are then read like any other images: in an order that is
a function of (seed, epoch), by any number of workers and processes. Images are shuffled over a few whole shards at a
time (Split.keys), so that reading stays local.
"""

import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from gspn.data.folders import by_split, counts, is_image
from gspn.data.images import (
    USUAL_CAPTIONS,
    DataError,
    MaskedSplit,
    Split,
    decode,
    labelled,
    listed,
    read_class_names,
)
from gspn.digests import Content
from gspn.files import shown

MASK = "seg.png"  # the extension of a mask
BLOCK, RECORD = 512, 10240  # bytes: tar files consist of blocks, and are filled up with zeros to whole records
SPECIAL = re.compile(r"__[^/]*__($|/)")  # members that describe the tar file, which webdataset leaves out too


def read_shards(root: Path, files: Sequence[Path]) -> tuple[dict[str, Split], list[str]]:
    """Splits of tar files, and notes for the user. A file's split is in its name, or in that of its folder under `root`
    (folders.by_split). classes.txt in `root` names the classes line by line. A split whose classes are all -1 is left
    out.

    Errors: DataError for a file that is no tar file, for images without a class, for names of some files only.
    """
    read, notes = _read(root, files, ("cls",), "class")
    texts = {name: shards.texts for name, shards in read.items()}
    numbered = all(re.fullmatch(r"-1|\d+", text) for each in texts.values() for text in each)
    class_names = read_class_names(root) if numbered else sorted(set().union(*texts.values()))
    number = None if numbered else {name: i for i, name in enumerate(class_names)}
    splits = {}
    for name, shards in read.items():
        labels = [int(text) if numbered else number[text] for text in shards.texts]
        if numbered and class_names and max(labels) >= len(class_names):
            raise DataError(f"{root / 'classes.txt'} names {len(class_names)} classes, but a class is {max(labels)}")
        splits[name] = Split(labels, class_names, read=shards, names=shards.name, shard=shards.shard)
    kept, unlabelled = labelled(splits, str(root))
    if not kept:
        raise DataError(f"{root} holds no images with a class: all are -1, which stands for none")
    return kept, [*notes, *unlabelled]


def read_captioned(root: Path, files: Sequence[Path], column: str | None = None) -> tuple[dict[str, Split], list[str]]:
    """Splits of tar files with captions instead of classes, and notes for the user. All labels are 0.

    Args:
        column: the member of the JSON objects that holds the caption, a text or a list of texts. None: the caption is
            in a .txt file, or else in the only member of the JSON object that is called text or caption.
        Others: as for `read_shards`.
    Errors: DataError, also for images without a caption.
    """
    splits = {}
    read, notes = _read(root, files, ("json",) if column else ("txt", "json"), "caption")
    for name, shards in read.items():
        captions = [
            (text,) if kind == "txt" else json_caption(text, column, f"{shards.name(i)}.json")
            for i, (kind, text) in enumerate(zip(shards.kinds, shards.texts, strict=True))
        ]
        labels, shards = [0] * len(captions), replace(shards, kinds=[], texts=[])  # JSON may be long
        splits[name] = Split(labels, None, read=shards, names=shards.name, shard=shards.shard, captions=captions)
    return splits, notes


def read_masked(root: Path, files: Sequence[Path]) -> tuple[dict[str, Split], list[str]]:
    """Splits of tar files with masks instead of classes, and notes for the user; otherwise as `read_shards`.

    Errors: DataError, also for images without a mask."""
    read, notes = _read(root, files, (MASK,), "mask")
    splits = {
        name: MaskedSplit(len(shards.keys), shards.mask, read=shards, names=shards.name, shard=shards.shard)
        for name, shards in read.items()
    }
    return splits, notes


def json_caption(text: str, column: str | None, where: str) -> tuple[str, ...]:
    """The captions in a JSON object: a text or a list of texts in its member `column`. None: in its only member that is
    called text or caption. Errors: DataError, which calls the object `where`."""
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


def _read(root, files, wanted, what):
    """({split: _Shards} of tar files, notes for the user)."""
    unused = _Unused()
    of_split = by_split(root, files, "tar file", "tar files")
    return {name: _Shards.read(root, of_one, wanted, what, unused) for name, of_one in of_split.items()}, unused.notes()


@dataclass(frozen=True)
class _Shards:
    """The positions of the images in some tar files: for each image the number of the file, offset and size in
    bytes."""

    root: Path
    files: list[Path]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    keys: list[str]
    kinds: list[str]  # the extension of the member with the class, the caption or the mask
    texts: list  # its content; offset and size of a mask

    @classmethod
    def read(cls, root, files, wanted, what, unused):
        """wanted: extensions of the class, caption or mask, in order of preference. what: "class", "caption" or "mask",
        for messages."""
        rows = []
        for number, file in enumerate(files):
            own = _Unused()
            found = [(number, *row) for row in _members(file, wanted, what, own)]
            if not found:
                example = f"expected members such as 0001.jpg and 0001.{wanted[0]}"
                raise DataError("; ".join([f"{file} holds no images with a {what}: {example}", *own.notes()]))
            rows += found
            unused.add(own)
        shard, keys, kinds, texts, offset, size = zip(*rows, strict=True)
        return cls(root, list(files), *map(np.array, (shard, offset, size)), list(keys), list(kinds), list(texts))

    def __call__(self, i):
        return self._decoded(i, self.offset[i], self.size[i])

    def mask(self, i):
        return self._decoded(i, *self.texts[i])

    def _decoded(self, i, offset, size):
        with open(self.files[self.shard[i]], "rb") as file:
            file.seek(offset)
            return decode(io.BytesIO(file.read(size)))

    def name(self, i):
        return shown(f"{self.files[self.shard[i]]}, {self.keys[i]}")

    def identity(self) -> Iterator:
        for file, images in zip(self.files, np.bincount(self.shard, minlength=len(self.files)).tolist(), strict=True):
            yield Content(file, file.relative_to(self.root), images)
        yield self.offset.tobytes()


@dataclass
class _Unused:
    """The unused members of tar files: hidden ones and those of systems; samples without an image, by their keys; all
    others by extension, with their number and the first of them."""

    left_out: list[str] = field(default_factory=list)
    no_image: list[str] = field(default_factory=list)
    others: dict[str, tuple[int, str]] = field(default_factory=dict)

    def other(self, kind, name, count=1):
        before, first = self.others.get(kind, (0, name))
        self.others[kind] = before + count, first

    def add(self, more):
        self.left_out += more.left_out
        self.no_image += more.no_image
        for kind, (count, first) in more.others.items():
            self.other(kind, first, count)

    def notes(self):
        told = [f"{count} {kind} (such as {first})" for kind, (count, first) in self.others.items()]
        rows = (
            (self.left_out, "left out", "hidden or system member", "hidden or system members"),
            (self.no_image, "left out", "sample without an image", "samples without an image"),
        )
        notes = [f"{verb} {listed(names, one, many)}" for names, verb, one, many in rows if names]
        return [*notes, f"ignored members of tar files: {', '.join(told)}"] if told else notes


def _members(path, wanted, what, unused):
    """(key, extension of the text, text, offset, size) of every image in a tar file."""
    rows, seen, sample = [], set(), None
    try:
        with open(path, "rb") as file:
            for member in _headers(path, file):
                if member.isdir():
                    continue
                if not counts(member.name) or SPECIAL.match(member.name):
                    unused.left_out.append(member.name)
                    continue
                key, extension = _key(member.name)
                if not member.isfile() or extension is None:
                    unused.other("links or the like" if extension is not None else "without a dot", member.name)
                    continue
                if sample is None or sample.key != key:
                    rows += sample.row(wanted, what, unused) if sample else []
                    sample = _Sample(path, key)
                    if key in seen:
                        raise DataError(
                            f"{path}: {member.name} does not follow the other members of {key}: expected the members "
                            "of a sample one after the other, and none twice"
                        )
                    seen.add(key)
                sample.take(member, extension, wanted, file, unused)
            rows += sample.row(wanted, what, unused) if sample else []
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{path} cannot be read as an uncompressed tar file: {error}") from error
    return rows


def _headers(path, file):
    """The headers of an open tar file, also of several tar files one after the other. Errors: tarfile's, and DataError
    where the file does not end as a tar file does."""
    start, size = 0, path.stat().st_size
    while start < size:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            yield from tar
            end = tar.offset  # tarfile also stops where there is no header
        zeros = _zeros(file, end)
        if zeros < BLOCK:
            found = "the file ends" if end + zeros == size else "there is something else"
            raise DataError(
                f"{path}: expected a header or the end of the tar file, a block of {BLOCK} zeros, at byte {end}, but "
                f"{found}: the file is cut or damaged, and samples may be missing. Download it or pack it again"
            )
        after = end + zeros // BLOCK * BLOCK if end + zeros < size else size
        # a record has 20 blocks; in files of larger records their number is a power of two as a rule
        record = max(RECORD, (after - start) & (start - after))
        if zeros >= 2 * BLOCK + record:
            raise DataError(
                f"{path}: {zeros} zeros follow byte {end}, expected fewer than {2 * BLOCK + record} at the end of a "
                "tar file: the download was probably not finished, and samples may be missing. Download it or pack it "
                "again"
            )
        start = after


def _zeros(file, start):
    """The number of zeros in a file from byte `start` on, up to the first other byte."""
    file.seek(start)
    count = 0
    while part := file.read(2**20):
        rest = len(part.lstrip(b"\0"))
        count += len(part) - rest
        if rest:
            break
    return count


def _key(name):
    """(key, extension in lower case or None) of a member, as webdataset has them."""
    folder, slash, last = name.rpartition("/")
    base, dot, extension = last.partition(".")
    return folder + slash + base, extension.lower() if dot else None


class _Sample:
    """The members of one sample."""

    def __init__(self, path, key):
        self.path, self.key, self.names, self.image, self.texts = path, key, {}, None, {}

    def take(self, member, extension, wanted, file, unused):
        """Adds a member; one without a use is noted as unused. Errors: DataError."""
        name = member.name
        if extension in self.names:
            both = f"{name} twice" if self.names[extension] == name else f"{self.names[extension]} and {name}"
            raise DataError(f"{self.path} holds {both}, in one sample: expected one of them")
        self.names[extension] = name
        if extension in wanted and extension == MASK:
            self.texts[extension] = member.offset_data, member.size
        elif extension in wanted:
            file.seek(member.offset_data)
            try:
                self.texts[extension] = file.read(member.size).decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                raise DataError(f"{self.path}: {name} is no text in UTF-8: {error}") from error
        elif is_image(f"image.{extension}") and "." not in extension:
            if self.image is not None:
                raise DataError(f"{self.path} holds {self.image[0]} and {name}, two images in one sample: expected one")
            self.image = name, member.offset_data, member.size
        else:
            unused.other(f".{extension}", name)

    def row(self, wanted, what, unused):
        """[(key, extension of the text, text, offset, size)] of the sample; empty if it has no image. Errors: DataError
        for an image without a class or caption, or with an empty class."""
        if self.image is None:
            if self.texts:
                unused.no_image.append(self.key)
            return []
        kind = next((extension for extension in wanted if extension in self.texts), None)
        if kind is None:
            beside = " or ".join(f"{self.key}.{extension}" for extension in wanted)
            raise DataError(f"{self.path}: the image {self.key} has no {what}: expected {beside} beside it")
        if not self.texts[kind] and kind == "cls":
            raise DataError(f"{self.path}: {self.names[kind]} is empty: expected the class, a number or a name")
        return [(self.key, kind, self.texts[kind], *self.image[1:])]
