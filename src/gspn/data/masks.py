"""What DATA means where images have masks: a folder with images/ and masks/; shards; anything that `datasets` loads.

`open_masked` gives the same Data as labelled.open_data, whose splits are MaskedSplits; mask_loader.py makes batches of
them. `survey` reads all pairs once: before a training, not in its middle, it becomes known that a mask does not fit.
"""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from gspn.data.folders import by_split, is_image, walk
from gspn.data.images import DataError, MaskedSplit, listed, raise_if_of_machine
from gspn.data.labelled import Data, ImageFiles
from gspn.data.mask_classes import IGNORED, VALUES, Classes, check_number, ignored_values, values_of
from gspn.data.shards import read_masked
from gspn.data.sources import check_fraction, check_one_kind, no_data, read_source, with_held_out
from gspn.data.tables import TABLES, load_masked
from gspn.places import expanded, location

MASKED = (
    "a folder with images/ and, of the same names, masks/ (PNG), below train/ and val/ or test/ or not; a tar file or "
    "a folder of them (shards: 0001.jpg beside 0001.seg.png); a folder that datasets' save_to_disk made; a parquet, "
    "arrow, csv or json file or a folder of them; or a name on the Hugging Face hub"
)
CLASSES = "classes.json"  # beside images/ and masks/, shards or tables
ON_HUB = "id2label.json"  # by convention in data sets of masks on the hub: {"0": "wall", "1": "floor"}
READERS = 8  # threads of the survey
ADVICE = "give these pixels one of these values, name the class (--classes) or ignore the value (--ignore)"


def open_masked(
    data: str | Path,
    *,
    val_fraction: float = 0.1,
    image_column: str | None = None,
    mask_column: str | None = None,
) -> Data:
    """Opens `data`, whatever kind it is.

    Args:
        data: a path, or a name on the Hugging Face hub (see MASKED).
        val_fraction: the part of the images to hold out where there is no evaluation split, always the same.
        image_column, mask_column: for `datasets`. Default: "image", and the other column of images.
    Returns: Data of the kind "masked folder", "masked shards" or "masked datasets", of MaskedSplits.
    Errors: DataError says what was found and what was expected.
    """
    name, columns = str(data), dict(image_column=image_column, mask_column=mask_column)
    check_fraction(val_fraction)
    tables = partial(load_masked, **columns)
    folder = partial(_open_folder, tables=tables)
    kind, splits, notes = read_source(name, MASKED, folder=folder, shards=read_masked, tables=tables)
    for option, given in columns.items():
        if given and kind != "datasets":
            raise DataError(f"{option} is for data that `datasets` loads, but {name} is of the kind {kind}")
    splits, held_out = with_held_out(splits, val_fraction)
    if "all" in splits and "val" not in splits:
        raise DataError(f"{name} holds one image: expected two at least, one of them to evaluate on")
    return Data(f"masked {kind}", location(data), splits, [*notes, *held_out], left_out=notes)


def _open_folder(path, tables):
    """(kind, splits, notes) of a folder, by what lies in it."""
    found = walk(path)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return "datasets", *tables("disk", path)
    shards = [file for file in found.files if file.suffix == ".tar"]
    images = [file for file in found.files if is_image(file)]
    listing = [file for file in found.files if file.suffix in TABLES and file.name != CLASSES]
    kinds = {"images": images, "tar files": shards, "tables": [] if images or shards else listing}
    check_one_kind(path, kinds)
    if images:
        kind, (splits, notes) = "folder", _pairs(found, images)
    elif shards:
        kind, (splits, notes) = "shards", read_masked(path, shards)
    elif listing:
        kind, (splits, notes) = "datasets", tables(str(path), path, found=found)
    else:
        raise no_data(path, MASKED)
    return kind, splits, [*notes, *found.notes()]


def _pairs(found, images):
    """(splits, notes) of images/ and masks/ below a folder, at any depth: train/images/a.jpg and train/masks/a.png, or
    images/train/a.jpg and masks/train/a.png."""
    root, sides, beside = found.root, {"images": {}, "masks": {}}, []
    for file in images:
        parts = file.relative_to(root).parts[:-1]
        side = [part for part in parts if part in sides]
        if len(side) != 1:
            beside.append(file)
            continue
        at = parts.index(side[0])
        key = (*parts[:at], *parts[at + 1 :], file.stem)
        if other := sides[side[0]].get(key):
            raise DataError(f"{other} and {file.name} have the same name but for the ending: expected one of them")
        sides[side[0]][key] = file
    pictures, masks = sides["images"], sides["masks"]
    if not pictures or not masks:
        there = listed(found.names(images), "image", "images")
        missing = " or ".join(f"{side}/" for side, files in sides.items() if not files)
        raise DataError(f"{root} holds {there}, but none in a folder {missing}; expected {MASKED}")
    without = [file for key, file in pictures.items() if key not in masks]
    if without:
        raise DataError(
            f"{root} holds no mask of {listed(found.names(without), 'image', 'images')}; expected "
            f"{_mask_of(root, without[0])}, a PNG of the same name (all of the ignored value if nothing is known)"
        )
    pairs = {pictures[key]: masks[key] for key in sorted(pictures)}
    lossy = [mask for mask in pairs.values() if mask.suffix.lower() != ".png"]
    if lossy:
        raise DataError(
            f"{root} holds {listed(found.names(lossy), 'mask', 'masks')}; expected PNGs, because other formats may "
            "change the values"
        )
    lonely = [file for key, file in masks.items() if key not in pictures]
    told = (
        (lonely, "mask without an image", "masks without an image"),
        (beside, "image outside of images/ and masks/", "images outside of images/ and masks/"),
    )
    notes = [f"ignored {listed(found.names(files), one, many)}" for files, one, many in told if files]
    splits = {}
    for name, mine in by_split(root, pairs, "image", "images", folders=True).items():
        files, truth = ImageFiles(root, mine), ImageFiles(root, [pairs[image] for image in mine])
        splits[name] = MaskedSplit(len(mine), truth, read=files, names=files.name)
    return splits, notes


def _mask_of(root, image):
    parts = ["masks" if part == "images" else part for part in image.relative_to(root).parts]
    return str(Path(*parts).with_suffix(".png"))


# -- all masks, before the training --


@dataclass
class Survey:
    """What the masks of a training hold.

    Attributes:
        classes: Classes. pixels: by split, how many pixels each class has, int64 (K,).
        sizes: the (height, width) of the training images, with how many have it.
    """

    classes: Classes
    pixels: dict[str, np.ndarray] = field(default_factory=dict)
    sizes: Counter = field(default_factory=Counter)

    def notes(self) -> list[str]:
        """Notes on classes that no pixel has."""
        notes = []
        for name, counts in self.pixels.items():
            absent = [self.classes.names[i] for i in np.flatnonzero(counts == 0).tolist()]
            if absent:
                of = "its IoU is not a number, and does" if len(absent) == 1 else "their IoU is not a number, and does"
                effect = "cannot be learned" if name == "train" else f"{of} not count in the mean"
                notes.append(f"no pixel of the {name} images is of {listed(absent, 'class', 'classes')} ({effect})")
        return notes


def find_classes(data: Data, file: str | Path | None) -> Path | None:
    """The JSON file with the classes: `file`, else classes.json in the folder of the data, or beside the file that they
    are, or id2label.json of a data set on the hub; None if there is none."""
    if file is not None:
        return expanded(file)
    where = Path(data.where)
    if not where.exists():
        from gspn.data.hub import file_of  # imports huggingface_hub

        try:
            return file_of(data.where, ON_HUB)
        except DataError as error:
            raise DataError(f"{error}; with a file of the classes (--classes) it is not needed") from error
    beside = (where if where.is_dir() else where.parent) / CLASSES
    return beside if beside.is_file() else None


def survey(
    splits: dict[str, MaskedSplit], file: Path | None, ignore: tuple[str, ...] | None, strict: bool = False
) -> Survey:
    """Reads all pairs of the splits, "train" first, checks that they fit, and counts. Pairs that cannot be read are
    left out here; the loader counts and names them.

    Args: file: the classes' JSON, or None: then the values that occur are the classes. ignore: values, or names of
        the file, of pixels without a class; None: IGNORED, which is an error if it may be a class.
        strict: an unreadable pair is an error.
    Errors: DataError.
    """
    counts, sizes = {}, Counter()
    known = Classes.read(file, ignore) if file else None
    for name, split in splits.items():
        total = np.zeros(VALUES, np.int64)
        with ThreadPoolExecutor(READERS) as pool:
            for i, found in enumerate(pool.map(partial(_counted, split, known), range(len(split)))):
                if found is None and strict:
                    raise DataError(f"unreadable image (--strict): {split.problem(i)}")
                if found is None:
                    continue
                size, values, count = found
                total[values] += count
                sizes[size] += name == "train"
        counts[name] = total
    if not any(sizes.values()):
        raise DataError(f"none of {len(splits['train'])} pairs can be read; the first: {splits['train'].problem(0)}")
    first = _first_mask(splits["train"])
    if known:
        classes = Classes.read(file, ignore, first)
        return Survey(classes, {name: total[: len(classes)] for name, total in counts.items()}, sizes)
    classes = Classes.of_values(np.flatnonzero(sum(counts.values())).tolist(), ignored_values(ignore, {}), first)
    if ignore is None and len(classes) == 1 and any(total[IGNORED] for total in counts.values()):
        raise DataError(
            f"the masks hold the values {classes.values[0]} and {IGNORED} only, and {IGNORED} is ignored by default: "
            f'expected two classes. If {IGNORED} is one of them, ignore nothing (--ignore "")'
        )
    check_number(classes.names, "each value in the masks is a class: they hold")
    return Survey(classes, {name: total[list(classes.values)] for name, total in counts.items()}, sizes)


def _counted(split, classes, i):
    """((height, width), the values or classes of the mask, how often each occurs) of a pair; None if it cannot be
    read."""
    try:
        image, values = split.pair(i, partial(classes.numbers, advice=ADVICE) if classes else values_of)
    except DataError:
        raise
    except Exception as error:  # Pillow raises anything on damaged files
        raise_if_of_machine(error)
        return None
    return (image.height, image.width), *np.unique(values, return_counts=True)


def _first_mask(split):
    for i in range(len(split)):
        try:
            return split.mask(i)
        except Exception as error:
            raise_if_of_machine(error)
            continue
    return None
