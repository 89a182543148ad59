"""Whether what a user names exists: runs, data, files. A command checks this before slow imports, so this module has
none.
"""

import difflib
import glob
import json
import os
import re
import tempfile
from pathlib import Path

from gspn import weights

EARLIER = ".earlier"  # the folder in a run in which the run that is being overwritten waits
NOTHING = "there is no such file"
ON_A_HUB = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")  # what may be a name on the Hugging Face hub


class OptionError(ValueError):
    """An option, or an argument of a model, whose value cannot be used."""


class RunError(ValueError):
    """A run folder that does not exist, is damaged, is something else, or would be overwritten."""


def expanded(path: str | os.PathLike) -> Path:
    """The path with its ~ replaced by the home. The ~ of an unknown user stays; `missing` says why."""
    return Path(os.path.expanduser(path))


def run_folder(run: str | os.PathLike) -> Path:
    """The folder of RUN: a path, or where nothing exists there, the name of weights in the package gspn-weights."""
    path = expanded(run)
    return weights.named(path) or path


def location(data: str | Path) -> str:
    """What identifies DATA: the absolute path, or the name if no such path exists."""
    path = expanded(data)
    return str(path.resolve()) if path.exists() else str(data)


def check_outside(out: str | Path, data: str | Path) -> None:
    """Raises OptionError for a folder to write that lies in DATA, where it would count as data the next time."""
    folder = expanded(data)
    if folder.is_dir() and expanded(out).resolve().is_relative_to(folder.resolve()):
        raise OptionError(f"out: {out} lies in the folder of the data, {data}, and would count as data: choose another")


def check_out(folder: str | Path, option: str = "--out") -> None:
    """Raises OptionError unless files can be written to the folder, which may have to be made: before any work, and
    without making it. `option` is the flag that chooses another one."""
    folder = nearest = expanded(folder)
    while (reason := missing(nearest)) == NOTHING and nearest != nearest.parent:
        nearest = nearest.parent
    if reason is None and not nearest.is_dir():
        reason = "it is a file" if nearest == folder else f"{nearest} is a file"
    elif reason is None:
        try:
            tempfile.TemporaryFile(dir=nearest).close()  # permissions alone do not tell, as for root and in /proc
        except OSError as error:
            reason = f"no file can be made in {nearest} ({error.strerror})"
    if reason:
        what = "write to" if nearest == folder else "make"
        raise OptionError(f"cannot {what} the folder {folder}: {reason}; choose another one with {option}")


def is_generator(path: Path) -> bool:
    """Whether it is the folder of a saved GSPNPipeline, or of diffusers' DiTPipeline, which `gspn sample` takes too."""
    return (config_or_none(path / "model_index.json") or {}).get("_class_name") in ("GSPNPipeline", "DiTPipeline")


def called(run: Path) -> str:
    """What a user calls a run: weights of the package by their name."""
    return run.name if run.parent == weights.root() else str(run)


def no_run(path: Path) -> RunError:
    """The error for a folder that is no run."""
    if is_generator(path):
        return RunError(f"{called(path)} generates images; use `gspn sample`")
    earlier = path / EARLIER
    hint = f"; the run that it was to replace is {earlier}" if (earlier / "config.json").exists() else ""
    if path.name == str(path) and not path.exists():
        known = weights.names()
        hint += f"; the trained weights here are called {', '.join(known)}" if known else f"; {weights.HOW}"
    expected = "expected a folder that a training of gspn made"
    return RunError(f"{path} is no run: there is no {path / 'config.json'}; {expected}{hint}; {_found(path)}")


def _found(path):
    """What is at a path where a run was expected, and what takes that."""
    if not path.exists():
        return f"nothing is there{alike(path)}"
    if not path.is_dir():
        return "it is a file"
    if (path / "model_index.json").exists():
        return "it is a saved pipeline, which gspn.GSPNPipeline.from_pretrained loads"
    if (path / "gspn_swap.safetensors").exists():
        return "it holds swapped layers, which gspn.load_swap puts into a pipeline"
    for folder in path.absolute().parents[:2]:
        if "format" in (config_or_none(folder / "config.json") or ()):
            return f"it is a part of the run {folder}"
    runs = [each.parent for each in sorted(path.glob("*/config.json")) if "format" in (config_or_none(each) or ())]
    if runs:
        return f"in it are the runs {_listed(runs)}"
    return f"it holds {_listed(sorted(each.name for each in path.iterdir())) or 'nothing'}"


def _listed(names, most=5):
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)


def config_or_none(file: Path) -> dict | None:
    """The object in a JSON file; None where it is missing or holds none."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def runs_like(incomplete: str) -> list[str]:
    """The runs whose path begins with `incomplete`, up to one folder further down: what a shell offers."""
    folder, slash, start = incomplete.rpartition("/")
    base, start = expanded(folder + slash), glob.escape(start)
    files = [file for below in ("", "/*") for file in base.glob(f"{start}*{below}/config.json")]
    runs = [file.parent for file in files if "format" in (config_or_none(file) or ())]
    return sorted(folder + slash + run.relative_to(base).as_posix() for run in runs)


def check_run(path: str | Path) -> None:
    """Raises RunError unless there is a config.json in the folder."""
    path = run_folder(path)
    reason = missing(path / "config.json")
    if reason == NOTHING:
        raise no_run(path)
    if reason:
        raise RunError(f"the run {path} cannot be opened: {reason}")


def check_file(path: str | Path, what: str, expected: str) -> None:
    """Raises OptionError unless `path` exists; `what` is the option that named it."""
    if reason := missing(path):
        reason = f"there is no {path}{alike(Path(path))}" if reason == NOTHING else f"{path} cannot be opened: {reason}"
        raise OptionError(f"{what}: {reason}; expected {expected}")


def no_image(path: str | Path) -> str | None:
    """Why there is no image file at `path`; None where there may be one."""
    folder = expanded(path)
    if not os.path.isdir(folder):
        return missing(path)
    files = "*/*.png" if any(folder.glob("*/")) else "*.png"
    return f"a folder; expected image files, such as {folder / files}"


def check_named(where: str | Path, what: str, expected: str) -> None:
    """Raises OptionError for what does not exist and cannot be a name on the hub, and for an empty text."""
    if not str(where):  # as of a shell's variable that is not set; a path would be the current folder
        raise OptionError(f"{what} is empty: expected {expected}")
    if not ON_A_HUB.fullmatch(str(where)) or missing(where) not in (None, NOTHING):
        check_file(where, what, expected)


def alike(path: Path) -> str:
    """For a path that does not exist: " (did you mean ...?)" with those of similar names beside it, or ""."""
    try:
        names = [name for name in os.listdir(expanded(path.parent)) if not name.startswith(".")]
    except (OSError, ValueError):
        return ""
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.75)
    return f" (did you mean {' or '.join(str(path.parent / name) for name in close)}?)" if close else ""


def missing(path: str | Path) -> str | None:
    """Why there is nothing at `path`: NOTHING, or why the system does not look there, such as a name that is too long,
    a folder without permission, the home of an unknown user. None where there is something."""
    try:
        os.stat(Path(path).expanduser())
    except (FileNotFoundError, NotADirectoryError):
        return NOTHING
    except (OSError, RuntimeError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None
