"""What labelled.py (images with classes), captions.py and masks.py have in common: telling the kinds of DATA apart, and
holding out images for evaluation.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gspn.data.images import DataError, Split, listed
from gspn.data.tables import TABLES
from gspn.places import ON_A_HUB, alike, expanded

Read = tuple[dict[str, Split], list[str]]  # splits by name, and notes for the user


def read_source(
    data: str,
    expected: str,
    *,
    folder: Callable[[Path], tuple[str, dict[str, Split], list[str]]],
    shards: Callable[[Path, list[Path]], Read],
    tables: Callable[..., Read],
) -> tuple[str, dict[str, Split], list[str]]:
    """Finds out what `data` names, and reads it with the reader for that kind.

    Args:
        expected: what DATA may be, for messages.
        folder: reads a folder. shards: reads tar files below a root. tables: see tables.load_tables.
    Returns: (kind, splits, notes).
    Errors: DataError where `data` is nothing that can be read, or where a split is empty.
    """
    path = expanded(data)
    if path.is_dir():
        kind, splits, notes = folder(path)
    elif path.is_file() and path.suffix == ".tar":
        kind, (splits, notes) = "shards", shards(path.parent, [path])
    elif path.is_file():
        if path.suffix not in TABLES:
            raise DataError(f"{data} is a file of an unknown kind; expected {expected}")
        kind, (splits, notes) = "datasets", tables(TABLES[path.suffix], path)
    elif path.is_symlink():
        raise DataError(f"{data} is a link to {os.readlink(path)}, which does not exist; expected {expected}")
    elif ON_A_HUB.fullmatch(data):
        around = f"there is no file or folder {data}{alike(path)}, and ", f"; expected {expected}"
        kind, (splits, notes) = "datasets", tables(data, around=around)
    else:
        raise DataError(f"there is no {data}{alike(path)}; expected {expected}")
    for name, split in splits.items():
        if len(split) == 0:
            raise DataError(f"the {name} split of {data} is empty")
    return kind, splits, notes


def check_one_kind(path: Path, kinds: dict[str, object]) -> None:
    """Raises DataError if a folder holds several kinds of DATA: `kinds` has what was found of each, by its name."""
    there = [kind for kind, found in kinds.items() if found]
    if len(there) > 1:
        raise DataError(f"{path} holds {' and '.join(there)}, so it is not clear what is meant: give one of them")


def no_data(path: Path, expected: str) -> DataError:
    """The error for a folder that holds no DATA."""
    there = sorted(file.name for file in path.iterdir())
    what = f"only {listed(there, 'other thing', 'other things')}" if there else "nothing"
    return DataError(f"{path} holds {what}; expected {expected}")


def check_fraction(fraction: float) -> None:
    """Raises DataError unless 0 < fraction < 1."""
    if not 0 < fraction < 1:
        raise DataError(f"val_fraction must be above 0 and below 1, got {fraction}")


def with_held_out(splits: dict[str, Split], fraction: float) -> tuple[dict[str, Split], list[str]]:
    """The splits with an evaluation split, and notes for the user. Where train is the only split, "all" is all of it,
    "val" the held-out part, and "train" the rest. There is no "val" if no class has two images (see `hold_out`)."""
    if list(splits) != ["train"]:
        return splits, []
    everything = splits["train"]
    rest, held_out = hold_out(everything.labels, fraction)
    splits = {"train": everything.subset(rest), "all": everything}
    if not len(held_out):
        return splits, []
    splits["val"] = everything.subset(held_out)
    count = f"{len(held_out)} of {len(everything)} images {'is' if len(held_out) == 1 else 'are'}"
    return splits, [f"no evaluation split: {count} held out for it"]


def hold_out(labels: Sequence[int], fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """(rest, held out): two increasing index arrays. Of each class `fraction` is held out, rounded, at least one
    image where it has two. The same labels always give the same answer."""
    shuffled = np.random.RandomState(0).permutation(len(labels))  # this numpy stream is frozen for ever
    labels, held = np.asarray(labels)[shuffled], []
    for label in np.unique(labels):
        of_class = shuffled[labels == label]
        count = min(max(round(fraction * len(of_class)), 1), len(of_class) - 1)
        held.append(of_class[:count])
    held = np.sort(np.concatenate(held))
    return np.setdiff1d(shuffled, held), held
