"""The run folder: what a training run leaves behind, written so that no crash or full disk harms what is there.

    RUN/config.json                    model, preprocessing, class names, options, versions
    RUN/metrics.jsonl                  one JSON object per epoch
    RUN/checkpoints/last, best         model.safetensors, ema.safetensors, optimizer.safetensors, state.json
    RUN/curves.png, predictions.png, context.png

Tensors are safetensors and everything else is JSON: nothing is ever unpickled. A file is written under a temporary
name in the same folder, synced to disk, then renamed; a checkpoint, which is several files, as a folder likewise.
"""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

FORMAT = 1  # of config.json; raised when an older gspn could no longer read it
_OWN = ("config.json", "metrics.jsonl", "curves.png", "predictions.png", "context.png", "checkpoints")


class RunError(ValueError):
    """A run folder that does not exist, is not one, is damaged, or is in the way."""


class SaveError(OSError):
    """Something could not be written. What was there before is untouched."""


@contextmanager
def atomic(path):
    """Gives a temporary path beside `path`; when the block succeeds it is synced and renamed to `path`, a file or a
    folder. When anything fails the temporary is removed, `path` stays as it was, and SaveError says why."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.new")
    try:
        _remove(temporary)
        yield temporary
        for file in temporary.iterdir() if temporary.is_dir() else [temporary]:
            _sync(file)
        if temporary.is_dir():
            _sync(temporary)
            _replace_folder(temporary, path)
        else:
            os.replace(temporary, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        _remove(temporary, quietly=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SaveError(f"cannot write {path}: {reason}. What was saved there before is untouched.") from error
    except BaseException:
        _remove(temporary, quietly=True)
        raise


def _replace_folder(new, path):
    """Renames folder `new` to `path`. A crash between the two renames leaves .old, which `_recover` brings back."""
    old = path.with_name(f".{path.name}.old")
    _remove(old)
    if path.exists():
        os.rename(path, old)
    try:
        os.rename(new, path)
    except OSError:
        _recover(path)
        raise
    _remove(old, quietly=True)


def _recover(path):
    old = path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        os.rename(old, path)


def _remove(path, quietly=False):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=quietly)
    else:
        path.unlink(missing_ok=True)


def _sync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path, value):
    """Writes `value` as indented JSON, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


class Run:
    """A run folder. Make one with `Run.create` or open one with `Run.open`.

    Attributes:
        path: the folder.
        config: the content of config.json.
        metrics: the rows of metrics.jsonl, one dict per epoch.
    """

    def __init__(self, path, config, metrics):
        self.path, self.config, self.metrics = Path(path), config, metrics

    @staticmethod
    def check_free(path, overwrite=False):
        """Raises RunError unless `path` may become a run folder: it does not exist, or is empty, or is a run and
        `overwrite` is true."""
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise RunError(f"{path} is a file; expected a folder that is new or empty")
        if path.exists() and any(path.iterdir()):
            if not overwrite:
                raise RunError(f"{path} is not empty: choose another folder, or --overwrite to replace the run there")
            if not (path / "config.json").exists():
                raise RunError(f"{path} is not empty and holds no run (no config.json), so it is not overwritten")

    @classmethod
    def create(cls, path, config, overwrite=False):
        """Makes the folder and writes its config.json. With `overwrite`, an earlier run's files are removed first,
        and nothing else.

        Errors: RunError as `check_free`; SaveError where the folder cannot be written."""
        cls.check_free(path, overwrite)
        path = Path(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SaveError(f"cannot make the folder {path}: {error.strerror}") from error
        for name in _OWN:
            _remove(path / name)
        run = cls(path, json.loads(json.dumps({"format": FORMAT, **config})), [])
        write_json(path / "config.json", run.config)
        return run

    @classmethod
    def open(cls, path):
        """Opens an existing run. Errors: RunError if it is none, is damaged, or was written by a newer gspn."""
        path = Path(path)
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            lines = (path / "metrics.jsonl").read_text().splitlines() if (path / "metrics.jsonl").exists() else []
            metrics = [json.loads(line) for line in lines]
        except (FileNotFoundError, NotADirectoryError) as error:
            raise RunError(f"{path} is no run: there is no {path / 'config.json'} (gspn train makes runs)") from error
        except (OSError, ValueError) as error:
            raise RunError(f"the run {path} cannot be read: {error}") from error
        if not isinstance(config, dict) or "format" not in config:
            raise RunError(f"{path / 'config.json'} is not the config of a gspn run")
        if config["format"] > FORMAT:
            raise RunError(
                f"{path} was written by a newer gspn (format {config['format']}; this one reads up to {FORMAT}): update"
            )
        return cls(path, config, metrics)

    def append_metrics(self, row):
        """Adds one epoch's dict to metrics.jsonl."""
        with atomic(self.path / "metrics.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in [*self.metrics, row]), encoding="utf-8")
        self.metrics.append(row)

    def save_checkpoint(self, name, tensors, state):
        """Writes checkpoints/`name`, all of it or nothing.

        Args:
            name: "last" or "best".
            tensors: {"model": {parameter name: tensor}, "ema": ..., "optimizer": ...}, a safetensors file each.
            state: the rest, a JSON-able dict.
        Errors: SaveError with the path and the system's reason; the previous checkpoint stays.
        """
        with atomic(self._checkpoint(name)) as folder:
            folder.mkdir(parents=True)
            (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
            for part, named in tensors.items():
                named = {key: tensor.detach().contiguous() for key, tensor in named.items()}
                save_file(named, folder / f"{part}.safetensors", metadata={"format": "pt"})
                shutil.copymode(folder / "state.json", folder / f"{part}.safetensors")  # save_file makes it private

    def load_checkpoint(self, name, parts=("model", "ema", "optimizer")):
        """Reads checkpoints/`name` to (tensors, state), as `save_checkpoint` took them; only the `parts` that are
        there. Errors: RunError if there is no such checkpoint or a file of it is damaged."""
        folder = self._checkpoint(name)
        _recover(folder)
        if not (folder / "state.json").exists():
            raise RunError(f"the run {self.path} has no checkpoint {name!r}: there is no {folder / 'state.json'}")
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            files = [folder / f"{part}.safetensors" for part in parts]
            tensors = {file.stem: load_file(file) for file in files if file.exists()}
        except (OSError, ValueError, SafetensorError) as error:
            raise RunError(f"the checkpoint {folder} is damaged: {error}") from error
        return tensors, state

    def _checkpoint(self, name):
        return self.path / "checkpoints" / name
