"""idx files, the format of MNIST."""

import gzip
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from gspn.data.images import DataError, Numbered, Split, read_class_names

IDX = re.compile(r"(.*)(train|t10k|test)-(images|labels)([-.])idx([13])-ubyte(\.gz)?")


def idx_folder(path, files):
    """Splits of a folder with idx files. classes.txt beside them names the classes line by line; it is optional."""
    found = {}
    for file in files:
        split, what = IDX.fullmatch(file.name).group(2, 3)
        of_split = found.setdefault("train" if split == "train" else "test", {})
        other = of_split.get(what)
        if other and other.name.removesuffix(".gz") != file.name.removesuffix(".gz"):
            raise DataError(f"{path} holds both {other.name} and {file.name}: expected one file of {what} a split")
        of_split[what] = min(other, file, key=lambda f: len(f.name)) if other else file
    class_names, splits = read_class_names(path), {}
    for name, of_split in found.items():
        for what in ("images", "labels"):
            if what not in of_split:
                there = next(iter(of_split.values())).name
                raise DataError(f"{path} holds {there} but not the {name} {what} that belong to it")
        images, labels = read_idx(of_split["images"], 3), read_idx(of_split["labels"], 1)
        if len(images) != len(labels):
            raise DataError(
                f"{of_split['images'].name} holds {len(images)} images but {of_split['labels'].name} "
                f"{len(labels)} labels (in {path})"
            )
        if class_names and labels.max() >= len(class_names):
            raise DataError(f"{path / 'classes.txt'} names {len(class_names)} classes, but a label is {labels.max()}")
        splits[name] = Split(
            labels.astype(np.int64),
            class_names,
            pixels=torch.from_numpy(images)[:, None],
            names=Numbered(f"{of_split['images'].name}, image"),
        )
    return splits


def read_idx(file: Path, dimensions: int) -> np.ndarray:
    """The uint8 array in an idx file, gzipped or not.

    Errors: DataError if it is no idx file of bytes with that many dimensions, is empty, too short or too long.
    """
    try:
        content = gzip.open(file).read() if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    magic = content[:4]
    expected = bytes([0, 0, 8, dimensions])
    if magic != expected:
        raise DataError(f"{file} begins with bytes {magic.hex(' ')}, expected {expected.hex(' ')} (idx{dimensions})")
    if len(content) < 4 + 4 * dimensions:
        raise DataError(f"{file} is truncated: its header is incomplete")
    shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
    got, wanted = len(content) - 4 - 4 * dimensions, int(np.prod(shape, dtype=np.int64))
    if got != wanted or wanted == 0:
        state = "empty" if wanted == 0 else "truncated" if got < wanted else "too long"
        raise DataError(f"{file} is {state}: it announces {' x '.join(map(str, shape))} bytes and holds {got}")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()
