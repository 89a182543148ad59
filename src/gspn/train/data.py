"""What DATA means: `digits`, a folder of class folders, a folder of idx files, shards, anything that `datasets` loads.

`open_data` turns DATA into named splits of labelled images; loader.py turns those into batches.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gspn.train.idx import IDX, idx_folder
from gspn.train.images import SPLIT_NAMES, DataError, Numbered, Split, decode, listed
from gspn.train.places import location
from gspn.train.shards import read_shards
from gspn.train.tables import TABLES, load_tables

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
        where: the name or absolute path of DATA.
        splits: at least one. "all" where "train" and "val" were made by holding out a part of one list ("val" is
            missing then if no class has two images).
        notes: things to tell the user.
    """

    kind: str
    where: str
    splits: dict[str, Split]
    notes: list[str] = field(default_factory=list)

    def for_training(self) -> tuple[Split, Split, str]:
        """(train, evaluation split, its name). Errors: DataError if there are not both."""
        if "train" not in self.splits:
            raise DataError(f"{self.where} has no train split, only {', '.join(self.splits)}")
        if not {"val", "test"} & set(self.splits):
            raise DataError(
                f"{self.where} has no evaluation split, and none can be held out of {len(self.splits['train'])} images "
                "with one image a class: expected two images of some class at least, or a val or test split"
            )
        name = "val" if "val" in self.splits else "test"
        return self.splits["train"], self.splits[name], name

    def fingerprint(self) -> str:
        """A digest of what the images are: 64 hexadecimal digits, the same wherever the data lie. Pixels in memory
        count as they are, files by name, size and class, tables by their labels, columns and number of bytes."""
        digest = hashlib.sha256(self.kind.encode())
        for name in sorted(self.splits):
            if "all" in self.splits and name != "all":
                digest.update(f"{name}{len(self.splits[name])}".encode())
                continue
            digest.update(name.encode())
            for part in self.splits[name].identity():
                digest.update(part)
        return digest.hexdigest()

    def for_evaluation(self, split: str | None = None, trained_on: str | None = None) -> tuple[Split, str]:
        """(split, its name): the one asked for; else test, else val. Where val is a part held out here, it is meant
        only for a run `trained_on` these data; any other run is evaluated on all of them."""
        if split is not None:
            split = SPLIT_NAMES.get(split, split)
            if split not in self.splits:
                raise DataError(f"{self.where} has no split {split!r}; it has {', '.join(self.splits)}")
            return self.splits[split], split
        preferred = ["test", "val", "train"]
        if "all" in self.splits and trained_on != self.where:
            preferred = ["test", "all"]
        name = next(name for name in preferred if name in self.splits)
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
    """Finds out what `data` is and opens it.

    Args:
        data: "digits", a path, or a name on the Hugging Face hub (see KINDS).
        val_fraction: the part of the training images to hold out where there is no other evaluation split; the
            choice is by class and always the same.
        class_names: names for data that carry none, such as idx files.
        image_column, label_column: for `datasets`, where the columns' types do not tell.
        streaming: `datasets` is to give rows as they come, without a copy of the table in its cache.
    Returns: Data.
    Errors: DataError says what was found and what was expected.
    """
    data = str(data)
    path = Path(data).expanduser()
    columns = dict(image_column=image_column, label_column=label_column, streaming=streaming)
    if not 0 < val_fraction < 1:
        raise DataError(f"the part to hold out must lie between 0 and 1, got {val_fraction}")
    if data == "digits":
        if path.exists():
            raise DataError("`digits` is the embedded data set, but ./digits exists too: for that, write ./digits")
        kind, splits, notes = "digits", digits(), []
    elif path.is_dir():
        kind, splits, notes = _open_folder(path, columns)
    elif path.is_file() and path.suffix == ".tar":
        kind, splits, notes = "shards", read_shards(path.parent, [path]), []
    elif path.is_file():
        if path.suffix not in TABLES:
            raise DataError(f"{data} is a file of an unknown kind; expected {KINDS}")
        kind, splits, notes = "datasets", load_tables(TABLES[path.suffix], path, **columns), []
    elif re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", data):
        hint = f"; and there is no such file or folder; expected {KINDS}"
        kind, splits, notes = "datasets", load_tables(data, **columns, hint=hint), []
    else:
        raise DataError(f"there is no {data}; expected {KINDS}")
    if streaming and kind != "datasets":
        raise DataError(f"streaming is for what `datasets` loads, but {data} is of another kind ({kind})")
    for name, split in splits.items():
        if len(split) == 0:
            raise DataError(f"the {name} split of {data} is empty")
        if class_names is not None:
            if split.class_names is not None and len(split.class_names) != len(class_names):
                raise DataError(f"{len(class_names)} class names were given for {len(split.class_names)} classes")
            split.class_names = list(class_names)
        twice = sorted(name for name, count in Counter(split.class_names or []).items() if count > 1)
        if twice:
            raise DataError(f"two classes of {data} have the same name: {', '.join(twice)}; expected distinct names")
    if list(splits) == ["train"]:
        everything = splits["train"]
        train, held_out = hold_out(everything.labels, val_fraction)
        splits = {"train": everything.subset(train), "all": everything}
        if len(held_out):
            splits["val"] = everything.subset(held_out)
            notes = [*notes, f"no evaluation split: {len(held_out)} of {len(everything)} images are held out for it"]
    return Data(kind, location(data), splits, notes)


def hold_out(labels: Sequence[int], fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """(rest, held out): two increasing index arrays. Of each class `fraction` is held out, rounded, at least one
    image where it has two. The same labels always give the same answer."""
    shuffled = np.random.RandomState(0).permutation(len(labels))  # the one numpy stream that is frozen for ever
    labels, held = np.asarray(labels)[shuffled], []
    for label in np.unique(labels):
        of_class = shuffled[labels == label]
        count = min(max(round(fraction * len(of_class)), 1), len(of_class) - 1)
        held.append(of_class[:count])
    held = np.sort(np.concatenate(held))
    return np.setdiff1d(shuffled, held), held


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
    idx = [f for f in sorted(path.iterdir()) if IDX.fullmatch(f.name)]
    shards = sorted(path.rglob("*.tar"))
    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    tables = [] if saved else sorted(f for f in path.rglob("*") if f.suffix in TABLES)
    classes = [] if saved else [d for d in _subfolders(path) if any(_is_image(f) for f in d.rglob("*"))]
    found = {
        "idx files": idx,
        "a data set saved to disk": saved,
        "class folders": classes,
        "tar files": [] if classes else shards,
        "tables": [] if classes else tables,
    }
    kinds = [kind for kind, there in found.items() if there]
    if len(kinds) > 1:
        raise DataError(f"{path} holds {' and '.join(kinds)}, so it is not clear what is meant: give one of them")
    if idx:
        return "idx", idx_folder(path, idx), []
    if classes:
        return "folder", *_class_folder(path)
    if shards:
        return "shards", read_shards(path, shards), []
    if saved or tables:
        return "datasets", load_tables("disk" if saved else str(path), path, **columns), []
    there = sorted(f.name for f in path.iterdir())
    what = f"only {listed(there, 'other thing', 'other things')}" if there else "nothing"
    raise DataError(f"{path} holds {what}; expected {KINDS}")


def _subfolders(path):
    return sorted(d for d in path.iterdir() if d.is_dir() and not d.name.startswith("."))


def _is_image(file):
    return file.suffix.lower() in Image.registered_extensions() and not file.name.startswith(".")


def _class_folder(path):
    """(splits, notes) of root/class/image or root/split/class/image."""
    folders = {d.name: d for d in _subfolders(path)}
    if "train" not in folders and not set(folders) <= set(SPLIT_NAMES):
        splits, ignored = {"train": path}, []
    else:
        strange = [name for name in folders if name not in SPLIT_NAMES]
        if strange:
            raise DataError(
                f"{path} has a train folder beside {listed(strange, 'folder', 'folders')}: expected either class "
                f"folders only, or only {', '.join(SPLIT_NAMES)}"
            )
        if len({SPLIT_NAMES[name] for name in folders}) < len(folders):
            raise DataError(f"{path} has two folders for one split: {', '.join(folders)}")
        splits, ignored = {SPLIT_NAMES[name]: folder for name, folder in folders.items()}, []
    result = {}
    for name, root in splits.items():
        class_names = [d.name for d in _subfolders(root)]
        if not class_names:
            raise DataError(f"{root} has no class folders: expected {root}/CLASS/IMAGE")
        files, labels = [], []
        for label, class_name in enumerate(class_names):
            inside = sorted(f for f in (root / class_name).rglob("*") if f.is_file() and not f.name.startswith("."))
            images = [f for f in inside if _is_image(f)]
            if not images and name == "train":
                raise DataError(f"the class folder {root / class_name} holds no images")
            ignored += [f for f in inside if not _is_image(f)]
            files += images
            labels += [label] * len(images)
        images = ImageFiles(root, files)
        result[name] = Split(labels, class_names, read=images, names=images.name)
    notes = [f"ignored {listed(ignored, 'file that is', 'files that are')} no image by name"] if ignored else []
    return result, notes


@dataclass(frozen=True)
class ImageFiles:
    """What a Split needs of a list of image files."""

    root: Path
    paths: list

    def __call__(self, i):
        return decode(self.paths[i])

    def name(self, i):
        return str(self.paths[i])

    def identity(self) -> Iterator[bytes]:
        for path in self.paths:
            yield f"{path.relative_to(self.root)} {path.stat().st_size}\n".encode()
