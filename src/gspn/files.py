"""Atomic writing: a file or a folder is written under a temporary name beside its target, synced to disk, then renamed,
so that no crash or full disk harms what was there. A lock lets one process at a time write to a folder.
"""

import json
import os
import platform
import re
import secrets
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

TEMPORARY = ".new"  # suffix of what is being written
LOCK = ".lock"  # in a folder that one process at a time writes
PATIENCE = 8  # seconds for the lock: processes that read images outlive a killed training by up to 5


class SaveError(OSError):
    """Something could not be written. What was there before is untouched."""


class BusyError(ValueError):
    """Another process is writing to the folder."""


class ExistsError(ValueError):
    """A file is to be written where there is one already."""


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path beside `path`, for a file or a folder. If the block succeeds, it is synced and renamed to
    `path`. If anything fails, it is removed, `path` stays as it was, and SaveError says why."""
    path = Path(path)
    temporary = _temporary(path)
    try:
        yield temporary
        for file in temporary.rglob("*") if temporary.is_dir() else [temporary]:
            _sync(file)
        if temporary.is_dir():
            _sync(temporary)
            _replace_folder(temporary, path)
        else:
            os.replace(temporary, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        remove(temporary, quietly=True)
        raise _cannot_write(path, error) from error
    except BaseException:
        remove(temporary, quietly=True)
        raise


def check_writable(path: Path | str) -> None:
    """Raises SaveError if no file can be written to the folder of `path`; for work that takes long before it writes."""
    temporary = _temporary(Path(path))
    remove_left(temporary.parent)
    try:
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise _cannot_write(path, error) from error


def _temporary(path):
    """A name of its own each time, as several processes may write to the same path without a lock:
    .NAME.MACHINE-PROCESS-RANDOM.new. NAME is cut, for most disks take 255 bytes."""
    name = path.name.encode(errors="ignore")[:200].decode(errors="ignore")
    return path.with_name(f".{name}.{_machine()}-{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY}")


def _machine():
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _cannot_write(path, error):
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return SaveError(f"cannot write {path}: {reason}. What was saved there before is untouched.")


def check_absent(*paths: Path | str, overwrite: bool = False) -> None:
    """Raises ExistsError if one of the paths exists, unless `overwrite`."""
    for path in paths:
        if os.path.lexists(path) and not overwrite:
            raise ExistsError(f"{path} is there already: choose another name, or --overwrite to replace it")


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Makes the folder, and locks it for the block. The operating system holds the lock: when a process is killed, the
    lock is released, though its file stays. What killed processes left half written is removed.

    Errors: BusyError if another process still holds the lock after PATIENCE seconds; SaveError if the folder cannot be
    made or written to."""
    path = Path(path)
    if shown(path) != str(path):  # safetensors cannot open it
        raise SaveError(f"cannot write to {shown(path)}, whose name is not UTF-8: choose another folder")
    make_folder(path)
    lock = FileLock(path / LOCK, timeout=PATIENCE)
    try:
        lock.acquire()
    except Timeout:
        holder = "process unknown"
        with suppress(OSError):  # Windows lets nobody read a locked file
            holder = (path / LOCK).read_text().strip()
        raise BusyError(
            f"another gspn ({holder}) is writing to {path}: wait for it, or choose another folder"
        ) from None
    except OSError as error:
        raise SaveError(f"cannot write {path / LOCK}: {error.strerror or error}") from error
    try:
        with suppress(OSError):  # a full disk: the text is for people, the lock holds without it
            (path / LOCK).write_text(f"process {os.getpid()} on {platform.node()}\n")
        remove_left(path)
        yield
    finally:
        lock.release()


def make_folder(path: Path) -> None:
    """Makes the folder and its parents if they do not exist. Errors: SaveError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"cannot make the folder {path}: {error.strerror}") from error


def check_format(what: Path | str, found: object, known: int, error: type[Exception]) -> None:
    """Raises `error` unless the format `found` is a number up to `known`, the newest one that this gspn reads."""
    if not isinstance(found, int):
        raise error(f"{what} is damaged or foreign: its format is {found!r}, expected a number up to {known}")
    if found > known:
        raise error(f"{what} was written by a newer gspn (format {found}; this one reads up to {known}): update gspn")


def shown(path: Path | str) -> str:
    r"""A path as text that can be printed, drawn and stored anywhere: bytes that are not UTF-8 become escapes
    (\xe9)."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _replace_folder(new, path):
    """Renames folder `new` to `path`. A crash between the two renames leaves .old: readers take it for `path`, until
    the next writer renames it back."""
    old = displaced(path)
    recover(path)
    remove(old)
    if path.exists():
        os.rename(path, old)
    try:
        os.rename(new, path)
    except OSError:
        recover(path)
        raise
    remove(old, quietly=True)


def is_temporary(path: Path) -> bool:
    """Whether a killed process left it behind half written."""
    return path.name.startswith(".") and path.name.endswith(TEMPORARY)


def remove_left(folder: Path) -> None:
    """Removes what processes of this machine that are gone left half written in a folder, or one folder below. The
    whole name counts: other files that end in TEMPORARY may be the user's."""
    ours = re.compile(rf"\..+\.{_machine()}-(\d{{1,9}})-[0-9a-f]{{8}}{re.escape(TEMPORARY)}", re.DOTALL)
    with suppress(OSError):
        for left in [*folder.glob(f".*{TEMPORARY}"), *folder.glob(f"*/.*{TEMPORARY}")]:
            if (found := ours.fullmatch(left.name)) and not _alive(int(found[1])):
                remove(left, quietly=True)


def _alive(process):
    if os.name == "nt":  # there os.kill ends it, and nothing in Python's library tells
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def displaced(path: Path) -> Path:
    """Where the folder `path` is kept while it is being replaced."""
    return path.with_name(f".{path.name}.old")


def recover(path: Path) -> None:
    """Renames the old folder back to `path` if a crash interrupted its replacement."""
    if displaced(path).exists() and not path.exists():
        os.rename(displaced(path), path)


def remove(path: Path, quietly: bool = False) -> None:
    """Removes a file or a folder if it exists; `quietly` ignores what cannot be removed."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=quietly)
        else:
            path.unlink(missing_ok=True)
    except OSError:  # on a read-only disk also for what is not there
        if not quietly:
            raise


def _sync(path):
    """Syncs a file, or a folder where the system can: Windows opens none, some network disks sync none. A file is
    opened to write, as Windows syncs no other."""
    folder = path.is_dir()
    with suppress(OSError) if folder else nullcontext():
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file with the permissions of other new files (safetensors makes it private). Tensors that
    share memory, as tied weights do, are stored under each of their names. Not atomic: use it inside `atomic`."""
    path.touch()
    mode = path.stat().st_mode
    save_file(_separate(tensors), path, metadata=metadata)
    path.chmod(mode)


def _separate(tensors):
    """The tensors as safetensors needs them: contiguous, and without shared memory."""
    separate, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return separate


def write_json(path: Path | str, value) -> None:
    """Writes `value` as indented JSON, atomically. Infinity becomes what Python's json reads back as such: schedulers
    have it in their settings, which are compared with those that a file holds."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path | str, text: str) -> None:
    """Writes text as UTF-8, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
