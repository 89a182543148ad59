"""The package gspn-weights: which weights it brings, and where they are. It holds a folder for each name, in the form
that `save_pretrained` writes (see pretrained.py). This module imports nothing slow.
"""

import os
from importlib.util import find_spec
from pathlib import Path

from gspn.names import unknown

PACKAGE = "gspn_weights"
INSTALL = "`pip install ./weights` in the source folder of gspn"  # not on PyPI, where the name is anybody's
HOW = f"trained weights with a name come with the package gspn-weights, which is not installed: {INSTALL}"


def root() -> Path | None:
    """The folder of the package; None where it is not installed."""
    spec = find_spec(PACKAGE)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def names() -> list[str]:
    """The names of the weights that are installed."""
    found = root()
    return sorted(file.parent.name for file in found.glob("*/README.md")) if found else []


def folder(name: str) -> Path:
    """The folder of the weights called `name`.

    Raises ImportError, with the command that installs them, where gspn-weights is not installed; ValueError for an
    unknown name."""
    found = root()
    if found is None:
        raise ImportError(f"the weights {name!r} are in the package gspn-weights, which is not installed: {INSTALL}")
    if name not in names():
        raise ValueError(unknown("set of weights", name, names()))
    return found / name


def named(path: str | os.PathLike) -> Path | None:
    """The folder of the weights that `path` names. None where something exists at that path, or no installed weights
    have that name."""
    name = os.fspath(path)
    return folder(name) if name in names() and not os.path.lexists(name) else None
