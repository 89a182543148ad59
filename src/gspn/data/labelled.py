"""What DATA means: `digits`, a folder of class folders, a folder of idx files, shards, anything that `datasets` loads.

`open_data` turns DATA into named splits of labelled images; loader.py turns those into batches.
"""

import difflib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from gspn.data.class_folders import class_folders
from gspn.data.folders import is_image, walk
from gspn.data.idx import IDX, idx_folder
from gspn.data.images import SPLIT_NAMES, DataError, Numbered, Split, decode, listed
from gspn.data.latent_folder import refuse_latents
from gspn.data.shards import read_shards
from gspn.data.sources import check_fraction, check_one_kind, hold_out, no_data, read_source, with_held_out
from gspn.data.tables import TABLES, load_tables
from gspn.digests import Content, digest, is_earlier
from gspn.files import shown
from gspn.places import expanded, location
from gspn.progress import Progress

KINDS = (
    "`digits`; a folder of class folders with images (or of train/ and val/ or test/ with such folders); a "
    "folder of idx files (train-images-idx3-ubyte[.gz], train-labels-idx1-ubyte[.gz], t10k-...); a folder that "
    "datasets' save_to_disk made; a parquet, arrow, csv or json file or a folder of them; a tar file or a folder of "
    "them (shards, as webdataset writes them); or a name on the Hugging Face hub"
)


@dataclass
class Data:
    """Splits by name ("train", "val", "test") and where they came from.

    Attributes:
        kind: "digits", "idx", "folder", "shards" or "datasets".
        where: DATA's name or absolute path.
        splits: at least one. Where "val" was held out of the only split, "all" is the whole of it ("val" is then
            missing if no class has two images).
        notes: notes for the user. left_out: those about files that are not part of the data.
    """

    kind: str
    where: str
    splits: dict[str, Split]
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def for_training(self) -> tuple[Split, Split, str]:
        """(train split, evaluation split, its name). Errors: DataError if one of them is missing."""
        if "train" not in self.splits:
            raise DataError(f"{self.where} has no train split, only {', '.join(self.splits)}")
        if not {"val", "test"} & set(self.splits):
            raise self._no_evaluation_split()
        name = "val" if "val" in self.splits else "test"
        return self.splits["train"], self.splits[name], name

    def _no_evaluation_split(self):
        return DataError(
            f"{self.where} has no evaluation split, and none can be held out of {len(self.splits['train'])} images "
            "with one image a class: expected two images of some class at least, or a val or test split"
        )

    def fingerprint(self, like: str | None = None, console: Console | None = None) -> str:
        """A digest of the images, labels, captions and class names, wherever the data lie. Every file is read, in
        parallel; `uncompared` says what is not compared.

        Args:
            like: the fingerprint to compare with, whose scheme is used (see gspn.digests).
            console: rich's, for a progress bar; None is silent.
        """
        whole = ["all"] if "all" in self.splits else self.splits
        with Progress("reading the data", sum(len(self.splits[name]) for name in whole), console=console) as bar:
            return digest(self.identity(), like, bar.advance)

    def identity(self) -> Iterator:
        """The parts of the fingerprint. Of held-out splits, "all" and the sizes count."""
        yield self.kind
        for name in sorted(self.splits):
            if "all" in self.splits and name != "all":
                yield f"{name}{len(self.splits[name])}"
                continue
            yield name
            yield from self.splits[name].identity()

    def uncompared(self, stored: str | None) -> str | None:
        """A note on what may have changed although the fingerprint equals the `stored` one; None if nothing can
        have."""
        if any(split.remote for split in self.splits.values()):
            return "of a stream from the hub only the labels or captions and the number of images were compared"
        if is_earlier(stored) and any(split.pixels is None for split in self.splits.values()):
            return (
                "an older gspn stored names and sizes of the data's files, not their contents: an image that was "
                "replaced by another of the same size goes unnoticed"
            )
        return None

    def for_evaluation(self, split: str | None = None, trained_on: str | None = None) -> tuple[Split, str]:
        """(split, its name): the split asked for; else test, else val. A held-out val is only for a run that was
        `trained_on` these data; any other run is evaluated on "all". Errors: DataError if there is no such split."""
        if split is not None:
            split = SPLIT_NAMES.get(split, split)
            if split not in self.splits:
                raise DataError(f"{self.where} has no split {split!r}; it has {', '.join(self.splits)}")
            return self.splits[split], split
        preferred = ["test", "val"]
        if "all" in self.splits and trained_on != self.where:
            preferred = ["all"]
        name = next((name for name in preferred if name in self.splits), None)
        if name is None:
            raise self._no_evaluation_split()
        return self.splits[name], name


def open_data(
    data: str | Path,
    *,
    val_fraction: float = 0.1,
    class_names: Sequence[str] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
) -> Data:
    """Opens `data`, whatever kind it is.

    Args:
        data: "digits", a path, or a name on the Hugging Face hub (see KINDS).
        val_fraction: the part of the training images to hold out where there is no evaluation split, by class and
            always the same.
        class_names: for data without names, such as idx files.
        image_column, label_column: for `datasets`, where the types of the columns leave it open.
        streaming: let `datasets` stream the rows, without a copy of the table in its cache.
    Returns: Data.
    Errors: DataError says what was found and what was expected.
    """
    data = str(data)
    path = expanded(data)
    columns = dict(image_column=image_column, label_column=label_column, streaming=streaming)
    check_fraction(val_fraction)
    refuse_latents(data)
    if data == "digits":
        if path.exists():
            raise DataError("`digits` is the embedded data set, but ./digits exists too: for that, write ./digits")
        kind, splits, notes = "digits", digits(), []
    elif not os.path.lexists(path) and difflib.get_close_matches(data.lower(), ["digits"], cutoff=0.8):
        raise DataError(f"there is no {data}: did you mean digits? A name on the hub is OWNER/NAME; expected {KINDS}")
    else:
        kind, splits, notes = read_source(
            data,
            KINDS,
            folder=partial(_open_folder, columns=columns),
            shards=read_shards,
            tables=partial(load_tables, **columns),
        )
    for option, given in (("streaming", streaming), ("image_column", image_column), ("label_column", label_column)):
        if given and kind != "datasets":
            raise DataError(f"{option} is for data that `datasets` loads, but {data} is of the kind {kind}")
    if class_names is not None:
        splits = _alike(splits)  # a split may lack a class
    for split in splits.values():
        if class_names is not None:
            if split.class_names is not None and len(split.class_names) != len(class_names):
                raise DataError(f"{len(class_names)} class names were given for {len(split.class_names)} classes")
            split.class_names = list(class_names)
        twice = sorted(name for name, count in Counter(split.class_names or []).items() if count > 1)
        if twice:
            raise DataError(f"two classes of {data} have the same name: {', '.join(twice)}; expected distinct names")
    splits, held_out = with_held_out(splits, val_fraction)
    return Data(kind, location(data), splits, [*notes, *held_out], left_out=notes)


def _alike(splits):
    """The splits with the classes of all of them, where each has its own: in order, numbers by value."""
    own = [split.class_names for split in splits.values() if split.class_names is not None]
    if all(names == own[0] for names in own):
        return splits
    names = {name for each in own for name in each}
    number = all(re.fullmatch(r"-?\d+", name) for name in names)
    classes = sorted(names, key=int) if number else sorted(names)
    return {name: split if split.class_names is None else split.relabelled(classes) for name, split in splits.items()}


# -- the embedded digits --


def digits() -> dict[str, Split]:
    """scikit-learn's 1,797 8x8 digits (UCI, test part): values 0 to 16, here scaled to 0 to 255."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy((bunch.images * (255 / 16)).round().astype(np.uint8))[:, None]
    names = [str(i) for i in range(10)]
    everything = Split(bunch.target, names, pixels=pixels, names=Numbered("digit"))
    train, test = hold_out(everything.labels, 0.2)
    return {"train": everything.subset(train), "test": everything.subset(test)}


# -- folders --


def _open_folder(path, columns):
    """(kind, splits, notes) of a folder, by what lies in it."""
    found = walk(path)
    idx = [f for f in found.files if f.parent == path and IDX.fullmatch(f.name)]
    shards = [f for f in found.files if f.suffix == ".tar"]
    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    tables = [] if saved else [f for f in found.files if f.suffix in TABLES]
    images = [] if saved else [f for f in found.files if is_image(f)]
    classes = any(f.parent != path for f in images)
    kinds = {
        "idx files": idx,
        "a data set saved to disk": saved,
        "class folders": classes,
        "tar files": [] if classes else shards,
        "tables": [] if classes else tables,
    }
    check_one_kind(path, kinds)
    if idx:
        return "idx", idx_folder(path, idx), found.notes()
    if classes:
        folders, notes = class_folders(found)
        kind, splits = "folder", {name: _of_files(each) for name, each in folders.items()}
    elif shards:
        kind, (splits, notes) = "shards", read_shards(path, shards)
    elif saved or tables:
        kind, (splits, notes) = "datasets", load_tables("disk" if saved else str(path), path, found=found, **columns)
    elif images:
        there = listed(found.names(images), "image", "images")
        raise DataError(f"{path} holds {there}, but no class folders: give the folder that has them; expected {KINDS}")
    else:
        raise no_data(path, KINDS)
    return kind, splits, [*notes, *found.notes()]


def _of_files(folders):
    images = ImageFiles(folders.root, folders.files)
    return Split(folders.labels, folders.class_names, read=images, names=images.name)


@dataclass(frozen=True)
class ImageFiles:
    """A list of image files, as a Split reads it."""

    root: Path
    paths: list

    def __call__(self, i):
        return decode(self.paths[i])

    def name(self, i):
        return shown(self.paths[i])

    def identity(self) -> Iterator[Content]:
        for path in self.paths:
            yield Content(path, path.relative_to(self.root))
