"""Which files are data: one rule for all that walks through folders and archives.

- Hidden files and folders (names that begin with a dot) and what systems and archive programs leave behind, such as
  __MACOSX and Thumbs.db, are no data, at any depth.
- Symbolic links are followed, at any depth. Each folder is read once: a link back to where the walk has been, or comes
  from, is not followed, so that no link leads in a circle.
- What is left out is listed, so that it can be told.
"""

import difflib
import os
import re
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from PIL import Image

from gspn.data.images import SPLIT_NAMES, DataError, listed

SYSTEM = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "#recycle", "$recycle.bin"}
SYSTEM |= {"system volume information", "lost+found", "__pycache__"}


def counts(path: str | PurePath) -> bool:
    """Whether a file of that relative path is data, as far as the names on the way to it tell."""
    return not any(_left_out(name) for name in PurePath(path).parts)


def _left_out(name):
    return (name.startswith(".") and name != "..") or name.lower() in SYSTEM


def is_image(path: str | PurePath) -> bool:
    """Whether a file is an image by the end of its name."""
    return os.path.splitext(path)[1].lower() in Image.registered_extensions()


@dataclass
class Found:
    """What there is in a folder.

    Attributes:
        root: the folder; all other paths begin with it.
        files, folders: those that count.
        left_out: hidden files and folders, and those of systems. What lies in these folders is not listed.
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
        """What to tell the user about what is left out."""
        told = (
            (self.left_out, "hidden or system file or folder", "hidden or system files or folders"),
            (self.dangling, "link that leads nowhere", "links that lead nowhere"),
            (self.again, "link to a folder that is read already", "links to folders that are read already"),
        )
        return [f"left out {listed(self.names(paths), one, many)}" for paths, one, many in told if paths]

    def names(self, paths: list[Path]) -> list[str]:
        """The paths as seen from the root."""
        return [str(path.relative_to(self.root)) for path in paths]

    def inside(self, folder: Path) -> list[Path]:
        """The folders that lie directly in `folder`."""
        return [each for each in self.folders if each.parent == folder]


def walk(root: str | Path) -> Found:
    """All that there is in a folder, at any depth, sorted. Errors: DataError for a folder that cannot be read."""
    found, own = Found(Path(root)), Path(os.path.realpath(root))
    seen, links = set(), deque()
    _walk(found, found.root, own, seen, links)
    while links:  # after all that lies in the folder itself, so that this keeps its own names
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
    """Adds what a folder holds, whose real path is `real`; links to folders are put off into `links`."""
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
    """What there is in a folder, sorted, without what lies in its folders. Links to folders are among these.
    Errors: DataError."""
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


def by_split(root: Path, files: list[Path], one: str, many: str) -> dict[str, list[Path]]:
    """{split: files}, as the names of the files and of their folders below `root` say: train-0003.tar,
    imagenet-val-01.tar, test/0003.tar. If none of them says anything, all are train.
    Errors: DataError, where some do and others do not; it calls them `one` or `many`."""
    of_split: dict[str | None, list[Path]] = {}
    for file in files:
        path = file.relative_to(root).with_suffix("")
        words = [word for part in path.parts for word in re.split(r"[-_.]", part.lower())]
        split = next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), None)
        of_split.setdefault(split, []).append(file)
    if None in of_split and len(of_split) > 1:
        strange = listed([file.name for file in of_split[None]], one, many)
        raise DataError(
            f"{root} holds {strange} of no split, beside others of {', '.join(filter(None, of_split))}: expected "
            f"{', '.join(SPLIT_NAMES)} in each name, or in none"
        )
    return {name or "train": of_one for name, of_one in of_split.items()}


def alike(path: Path) -> str:
    """For a path that is not there: " (did you mean ...?)" with what is there of a similar name, or nothing."""
    try:
        names = [each for each in os.listdir(path.parent) if counts(each)]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.75)
    return f" (did you mean {' or '.join(str(path.parent / name) for name in close)}?)" if close else ""
