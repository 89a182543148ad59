"""What DATA means: `digits`, a folder of class folders, a folder of idx files, or anything that `datasets` loads.

`open_data` turns DATA into named splits of labelled images; images.py turns those into batches.
"""

import gzip
import io
import re
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gspn.train.images import DataError, Numbered, Split, decode, listed

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
TABLES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json", ".jsonl": "json"}
KINDS = (
    "`digits`; a folder of class folders with images (or of train/ and val/ or test/ with such folders); a "
    "folder of idx files (train-images-idx3-ubyte[.gz], train-labels-idx1-ubyte[.gz], t10k-...); a folder that "
    "datasets' save_to_disk made; a parquet, arrow, csv or json file or a folder of them; or a name on the Hugging "
    "Face hub"
)


@dataclass
class Data:
    """Splits by name ("train", "val", "test") and where they came from.

    Attributes:
        kind: "digits", "idx", "folder" or "datasets".
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
) -> Data:
    """Finds out what `data` is and opens it.

    Args:
        data: "digits", a path, or a name on the Hugging Face hub (see KINDS).
        val_fraction: the part of the training images to hold out where there is no other evaluation split; the
            choice is by class and always the same.
        class_names: names for data that carry none, such as idx files.
        image_column, label_column: for `datasets`, where the columns' types do not tell.
    Returns: Data.
    Errors: DataError says what was found and what was expected.
    """
    data = str(data)
    path = Path(data).expanduser()
    if not 0 < val_fraction < 1:
        raise DataError(f"the part to hold out must lie between 0 and 1, got {val_fraction}")
    if data == "digits":
        if path.exists():
            raise DataError("`digits` is the embedded data set, but ./digits exists too: for that, write ./digits")
        kind, splits, notes = "digits", digits(), []
    elif path.is_dir():
        kind, splits, notes = _open_folder(path, image_column, label_column)
    elif path.is_file():
        if path.suffix not in TABLES:
            raise DataError(f"{data} is a file of an unknown kind; expected {KINDS}")
        kind, splits, notes = "datasets", _load_dataset(TABLES[path.suffix], image_column, label_column, path), []
    elif re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", data):
        kind, splits, notes = "datasets", _load_dataset(data, image_column, label_column), []
    else:
        raise DataError(f"there is no {data}; expected {KINDS}")
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


def location(data: str | Path) -> str:
    """What to know DATA again by: the absolute path, or the name if it is none."""
    path = Path(data).expanduser()
    return str(path.resolve()) if path.exists() else str(data)


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


def _open_folder(path, image_column, label_column):
    """(kind, splits, notes) of a folder, by what lies in it."""
    idx = [f for f in sorted(path.iterdir()) if _IDX.fullmatch(f.name)]
    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    tables = [] if saved else sorted(f for f in path.rglob("*") if f.suffix in TABLES)
    classes = [] if saved else [d for d in _subfolders(path) if any(_is_image(f) for f in d.rglob("*"))]
    found = {
        "idx files": idx,
        "a data set saved to disk": saved,
        "class folders": classes,
        "tables": [] if classes else tables,
    }
    kinds = [kind for kind, there in found.items() if there]
    if len(kinds) > 1:
        raise DataError(f"{path} holds {' and '.join(kinds)}, so it is not clear what is meant: give one of them")
    if idx:
        return "idx", _idx_folder(path, idx), []
    if classes:
        return "folder", *_class_folder(path)
    if saved or tables:
        return "datasets", _load_dataset("disk" if saved else str(path), image_column, label_column, path), []
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
        images = _Files(files)
        result[name] = Split(labels, class_names, read=images.read, names=images.name)
    notes = [f"ignored {listed(ignored, 'file that is', 'files that are')} no image by name"] if ignored else []
    return result, notes


@dataclass(frozen=True)
class _Files:
    """What a Split needs of a list of image files."""

    paths: list

    def read(self, i):
        return decode(self.paths[i])

    def name(self, i):
        return str(self.paths[i])


# -- idx files, the format of MNIST --

_IDX = re.compile(r"(.*)(train|t10k|test)-(images|labels)([-.])idx([13])-ubyte(\.gz)?")


def _idx_folder(path, files):
    """Splits of a folder with idx files; classes.txt beside them, if there is one, names the classes line by line."""
    found = {}
    for file in files:
        split, what = _IDX.fullmatch(file.name).group(2, 3)
        of_split = found.setdefault("train" if split == "train" else "test", {})
        other = of_split.get(what)
        if other and other.name.removesuffix(".gz") != file.name.removesuffix(".gz"):
            raise DataError(f"{path} holds both {other.name} and {file.name}: expected one file of {what} a split")
        of_split[what] = min(other, file, key=lambda f: len(f.name)) if other else file
    class_names = None
    if (path / "classes.txt").exists():
        class_names = [line.strip() for line in (path / "classes.txt").read_text().splitlines() if line.strip()]
    splits = {}
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
    except (OSError, EOFError) as error:
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


# -- Hugging Face datasets --


def _load_dataset(source, image_column, label_column, path=None):
    """Splits of what `datasets` loads: "disk" (saved at path), a table format (a file at path), a folder, a name."""
    import datasets

    name = str(path or source)
    try:
        if source == "disk":
            loaded = datasets.load_from_disk(name)
        elif path is not None and path.is_file():
            loaded = datasets.load_dataset(source, data_files=name)
        else:
            loaded = datasets.load_dataset(source)
    except Exception as error:  # `datasets` raises its own, its file systems', the hub's and arrow's exceptions
        reason = f"Hugging Face datasets cannot load it: {type(error).__name__}: {error}"
        here = "" if path else f"; and there is no such file or folder; expected {KINDS}"
        raise DataError(f"DATA {name}: {reason}{here}") from error
    tables = loaded if isinstance(loaded, dict) else {"train": loaded}
    splits, unlabelled = {}, []
    for split, table in tables.items():
        if split not in SPLIT_NAMES:
            continue
        read = _table(table, name, image_column, label_column)
        if len(read) and bool((read.labels < 0).all()):
            unlabelled.append(split)
        elif bool((read.labels < 0).any()):
            raise DataError(f"the {split} split of {name} has labels below 0")
        else:
            splits[SPLIT_NAMES[split]] = read
    if not splits:
        raise DataError(
            f"{name} has the splits {', '.join(tables)}{' (without labels)' if unlabelled else ''}; expected train and "
            f"validation, valid or test"
        )
    return splits


def _table(table, name, image_column, label_column):
    import datasets

    image_column = _column(table, image_column, datasets.Image, "image", name)
    label_column = _column(table, label_column, datasets.ClassLabel, "label", name)
    feature = table.features[label_column]
    labels = list(table[label_column])
    if any(label is None for label in labels):
        raise DataError(f"{name}: {sum(v is None for v in labels)} rows have no value in the column {label_column!r}")
    if isinstance(feature, datasets.ClassLabel):
        class_names = list(feature.names)
    else:
        class_names = [str(value) for value in sorted(set(labels))]
        number = {value: i for i, value in enumerate(class_names)}
        labels = [number[str(value)] for value in labels]
    try:
        table = table.cast_column(image_column, datasets.Image(decode=False))
    except Exception as error:
        raise DataError(f"{name}: the column {image_column!r} holds no images: {error}") from error
    return Split(labels, class_names, read=_Rows(table, image_column).read, names=Numbered(f"{name}, row"))


@dataclass(frozen=True)
class _Rows:
    """What a Split needs of a table of `datasets`."""

    table: object
    column: str

    def read(self, i):
        cell = self.table[i][self.column]
        return decode(io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"])


def _column(table, wanted, feature, what, name):
    """The column to use: the one asked for, or the only one of that feature type."""
    if wanted is not None:
        if wanted not in table.features:
            raise DataError(f"{name} has no column {wanted!r}; it has {', '.join(table.features)}")
        return wanted
    columns = [column for column, type_ in table.features.items() if isinstance(type_, feature)]
    if len(columns) == 1:
        return columns[0]
    types = ", ".join(f"{column} ({type(type_).__name__})" for column, type_ in table.features.items())
    found = "none" if not columns else " and ".join(columns)
    raise DataError(
        f"{name}: expected one column of type {feature.__name__}, found {found}; say which with --{what}-column. "
        f"Its columns: {types}"
    )
