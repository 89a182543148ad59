"""Which files are data, and of which split: one rule wherever folders and archives are walked.

- Hidden files and folders (names that begin with a dot) and those of operating systems and archive programs, such as
  __MACOSX and Thumbs.db, are not data, at any depth.
- Symbolic links are followed, at any depth. Each folder is read once: a link to a folder that was read already, or that
  holds the link, is not followed.
- What is left out is listed, for a note to the user.
"""

import os
import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePath

from PIL import Image

from gspn.data.images import SPLIT_NAMES, DataError, listed

SYSTEM = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "#recycle", "$recycle.bin"}
SYSTEM |= {"system volume information", "lost+found", "__pycache__"}
STUBS = {"BUFR", "GRIB", "HDF5", "MPEG"}  # Pillow recognises these formats, but cannot decode them
# Names of parts of a data set, such as Training, test_images or val-set.
PART = re.compile(
    r"(train(ing)?|val(id(ation)?)?|test(ing)?|dev(elopment)?|eval(uation)?)[-_ ]?"
    r"(sets?|data|datasets?|split|images?|imgs?|pictures|photos)?[-_ ]?\d*",
    re.IGNORECASE,
)


def counts(path: str | PurePath) -> bool:
    """Whether a file is data, by the names in its relative path."""
    return not any(_left_out(name) for name in PurePath(path).parts)


def _left_out(name):
    return (name.startswith(".") and name != "..") or name.lower() in SYSTEM


def is_image(path: str | PurePath) -> bool:
    """Whether a file is an image, by its extension."""
    return os.path.splitext(path)[1].lower() in _extensions()


@cache
def _extensions():
    """Those of formats that Pillow reads; it also names some that it only writes, or only recognises."""
    return {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind not in STUBS}


@dataclass
class Found:
    """The content of a folder.

    Attributes:
        root: the folder; all other paths begin with it.
        files, folders: those that count.
        left_out: hidden files and folders, and those of systems. The content of these folders is not listed.
        dangling: symbolic links that lead nowhere.
        again: links, and folders under links, that lead to a folder which is read already or which holds the link.
    """

    root: Path
    files: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    left_out: list[Path] = field(default_factory=list)
    dangling: list[Path] = field(default_factory=list)
    again: list[Path] = field(default_factory=list)

    def notes(self) -> list[str]:
        """Notes for the user on what is left out."""
        told = (
            (self.left_out, "hidden or system file or folder", "hidden or system files or folders"),
            (self.dangling, "link that leads nowhere", "links that lead nowhere"),
            (self.again, "link to a folder that is read already", "links to folders that are read already"),
        )
        return [f"left out {listed(self.names(paths), one, many)}" for paths, one, many in told if paths]

    def names(self, paths: list[Path]) -> list[str]:
        """The paths relative to the root."""
        return [str(path.relative_to(self.root)) for path in paths]

    def inside(self, folder: Path) -> list[Path]:
        """The folders that lie directly in `folder`."""
        return [each for each in self.folders if each.parent == folder]


def walk(root: str | Path) -> Found:
    """The content of a folder, at any depth, sorted. Errors: DataError for a folder that cannot be read."""
    found, own = Found(Path(root)), Path(os.path.realpath(root))
    seen, links = set(), deque()
    _walk(found, found.root, own, seen, links)
    while links:  # after the folder's own content, which thus keeps its own names
        link = links.popleft()
        real, holder = (Path(os.path.realpath(path)) for path in (link, link.parent))
        if real in seen or holder.is_relative_to(real) or own.is_relative_to(real):
            found.again.append(link)
        else:
            found.folders.append(link)
            _walk(found, link, real, seen, links)
    for paths in (found.files, found.folders, found.left_out, found.dangling, found.again):
        paths.sort()
    return found


def _walk(found, folder, real, seen, links):
    """Adds the content of a folder, whose real path is `real`; links to folders are collected in `links`."""
    waiting = [(folder, real)]
    while waiting:
        folder, real = waiting.pop()
        seen.add(real)
        here = scan(folder)
        found.files += here.files
        found.left_out += here.left_out
        found.dangling += here.dangling
        for path in here.folders:
            if path.is_symlink():
                links.append(path)
            elif real / path.name in seen:  # another link has led here
                found.again.append(path)
            else:
                found.folders.append(path)
                waiting.append((path, real / path.name))


def scan(folder: str | Path) -> Found:
    """The content of a folder itself, sorted. Links to folders count as folders. Errors: DataError."""
    found = Found(Path(folder))
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = found.root / entry.name
                if _left_out(entry.name):
                    found.left_out.append(path)
                elif entry.is_symlink() and not os.path.exists(entry.path):  # also one that leads to itself
                    found.dangling.append(path)
                elif entry.is_dir():
                    found.folders.append(path)
                elif entry.is_file():
                    found.files.append(path)
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be read: {error.strerror or error}") from error
    return found


def by_split(root: Path, files: Iterable[Path], one: str, many: str, *, folders: bool = False) -> dict[str, list[Path]]:
    """{split: files}, by the words in the names of the files and of their folders below `root`, in upper or lower case:
    train-0003.tar, imagenet-val-01.tar, Test/0003.tar. With `folders`, by the names of folders alone: Train/a/1.png.
    Words that all files share do not tell them apart, so they count only where they are one split. If no name has a
    split, all files are train.
    Errors: DataError where files differ in a name such as val2017, which only sounds like a split, or where one differs
    in two splits, and where only some files are of one; it calls them `one` or `many`."""
    words: dict[Path, set[str]] = {}
    for file in files:
        parts = file.relative_to(root).with_suffix("").parts
        names = parts[:-1] if folders else [word for part in parts for word in re.split(r"[-_.]", part)]
        words[file] = {name.lower() for name in names if name.lower() in SPLIT_NAMES or PART.fullmatch(name)}
    shared = set.intersection(*words.values()) if words else set()
    common = {SPLIT_NAMES.get(word) for word in shared}  # None: a word that only sounds like a split
    usual = common.pop() if len(common) == 1 else None
    of_split: dict[str | None, list[Path]] = {}
    for file, own in words.items():
        split = _split_of(file, own - shared) if own - shared else usual
        of_split.setdefault(split, []).append(file)
    if None in of_split and len(of_split) > 1:
        strange = listed([file.relative_to(root) for file in of_split[None]], one, many)
        raise DataError(
            f"{root} holds {strange} of no split, beside others of {', '.join(filter(None, of_split))}: expected "
            f"{', '.join(SPLIT_NAMES)} {'as a folder around' if folders else 'in the name of'} each, or none"
        )
    return {name or "train": of_one for name, of_one in of_split.items()}


def _split_of(file: Path, words: set[str]) -> str:
    """The split that words in the path of a file stand for. Errors: DataError."""
    if unclear := sorted(words - set(SPLIT_NAMES)):  # or images for evaluation could be trained on
        raise DataError(
            f"{file}: the name {unclear[0]} sounds like a part of a data set, but is none of {', '.join(SPLIT_NAMES)}: "
            "rename it"
        )
    found = {SPLIT_NAMES[word] for word in words}
    if len(found) > 1:
        raise DataError(
            f"{file} has the names of two splits: {', '.join(sorted(found))}; expected one. Move the file, or rename "
            "it or a folder"
        )
    return found.pop()
