"""The run folder: what a training writes, in such a way that no crash or full disk damages what is there.

    RUN/config.json                    model, preprocessing, class names, options, versions
    RUN/options.yaml                   the options alone, for `gspn train --config`
    RUN/metrics.jsonl                  one JSON object per epoch
    RUN/checkpoints/last, best, ...    model.safetensors, ema.safetensors, optimizer.safetensors, state.json
    RUN/tensorboard/                   with --tensorboard
    RUN/curves.png, ...                what the task adds (written and drawn of its TaskSpec)

Tensors are safetensors and everything else is JSON: nothing is ever unpickled. A file is written under a temporary
name in the same folder, synced to disk, then renamed; so is the folder of a checkpoint. Reading changes nothing, so a
run may be read while it is being written.

Only one process writes a run at a time (`gspn.files.writing`). A run that is overwritten stays in RUN/.earlier, itself
a run folder, until the new one has its first best checkpoint.
"""

import json
import os
import re
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gspn.files import (
    LOCK,
    TEMPORARY,
    SaveError,
    atomic,
    check_format,
    displaced,
    is_temporary,
    make_folder,
    remove,
    save_tensors,
    write_json,
    write_text,
)
from gspn.names import guess
from gspn.options import TASKS
from gspn.options.base import with_option
from gspn.places import EARLIER, NOTHING, RunError, config_or_none, missing, no_run, run_folder
from gspn.pretrained import FORMAT, WEIGHTS, read_weights

__all__ = ["EARLIER", "Run", "RunError"]

STATE_FORMAT = 2  # of a checkpoint; 1 could not be resumed
EVENTS = "tensorboard/events.out.tfevents.*"  # those of train/board.py end in .gspn, except for old ones


def _find(path):
    """Where the checkpoint `path` is now, and its identity: (folder, inode, time); None if there is none. It is in .old
    between the two renames of its writer, also of one that crashed there."""
    for folder in (path, displaced(path), path):
        try:
            status = (folder / "state.json").stat()
        except FileNotFoundError:
            continue
        return folder, status.st_ino, status.st_mtime_ns
    return None


class Run:
    """A run folder. Make one with `Run.create` or open one with `Run.open`.

    Attributes:
        path: the folder.
        config: the content of config.json.
        metrics: the rows of metrics.jsonl, one dict per epoch.
    """

    def __init__(self, path: Path | str, config: dict, metrics: list[dict]):
        self.path, self.config, self.metrics = Path(path), config, metrics

    @staticmethod
    def check_free(path: Path | str, overwrite: bool = False) -> None:
        """Raises RunError unless `path` may become a run folder: it does not exist, or is empty, or is a run and
        `overwrite` is true. The error names the command that resumes a stopped run."""
        path = Path(path)
        why = missing(path)
        if why not in (None, NOTHING):
            raise RunError(f"cannot make the folder {path}: {why}")
        if why is None and not path.is_dir():
            raise RunError(f"{path} is a file; expected a new or empty folder")
        try:
            there = [] if why else list(path.iterdir())
        except OSError as error:
            raise RunError(f"cannot read the folder {path}: {error.strerror or error}") from error
        if any(file.name != LOCK and not is_temporary(file) for file in there):
            if not overwrite:
                begun = _going_on(path)
                choice = f"{begun}; or choose another folder" if begun else "choose another folder"
                raise RunError(f"{path} is not empty: {choice}, or --overwrite to replace the run there")
            if (path / WEIGHTS).exists():
                raise RunError(f"{path} holds a saved model ({WEIGHTS}), not a run, so it is not overwritten")
            if not any((folder / "config.json").exists() for folder in (path, path / EARLIER)):
                raise RunError(f"{path} is not empty and holds no run (no config.json), so it is not overwritten")

    @classmethod
    def create(cls, path: Path | str, config: dict, overwrite: bool = False, options: str | None = None) -> "Run":
        """Makes the folder and writes config.json, and the text `options` to options.yaml. With `overwrite`, the files
        of the earlier run, and no others, are moved to path/.earlier. The first checkpoint "best" removes them,
        `restore_earlier` moves them back.

        Errors: RunError as `check_free`; SaveError where the folder cannot be written, which leaves it as it was."""
        cls.check_free(path, overwrite)
        run = cls(path, json.loads(json.dumps({"format": FORMAT, **config})), [])
        make_folder(run.path)
        try:
            run._set_earlier_aside()
            write_json(run.path / "config.json", run.config)
            if options is not None:
                write_text(run.path / "options.yaml", options)
        except BaseException:
            run.restore_earlier()
            raise
        return run

    def moved(self, name: str, entry: str, where: str) -> None:
        """Notes where something that the run needs is now: as the `entry` of `name` in config.json, and as the option
        `name` in both files, where they have it. Errors: SaveError."""
        if self.config[name][entry] == where:
            return
        self.config[name][entry] = where
        if name in self.config["options"]:
            self.config["options"][name] = where
        write_json(self.path / "config.json", self.config)
        file = self.path / "options.yaml"
        if file.exists():
            write_text(file, with_option(file.read_text(encoding="utf-8"), name, where))

    def _set_earlier_aside(self):
        """The checkpoints move first and config.json last. So after any crash, .earlier with a config.json is complete,
        and the files beside it belong to a training without a best checkpoint."""
        earlier = self.path / EARLIER
        with self._moving("set the earlier run aside in"):
            if self.has_checkpoint("best"):
                remove(earlier)  # outlived: a crash came between the first best checkpoint and its removal
            if not (earlier / "config.json").exists():
                for file in self._files():
                    _move(file, earlier / file.relative_to(self.path), self.path)
            self._remove_files()

    def restore_earlier(self) -> bool:
        """After a training that ended before its first checkpoint "best": moves the earlier run back, in the opposite
        order. Returns whether there was one.

        Errors: SaveError; the earlier run stays in path/.earlier."""
        earlier = Run(self.path / EARLIER, {}, [])
        if self.has_checkpoint("best") or not earlier.path.exists():
            return False
        with self._moving("put the earlier run back from"):
            if (earlier.path / "config.json").exists():
                self._remove_files()
            for file in reversed(earlier._files(of=self.path)):
                _move(file, self.path / file.relative_to(earlier.path), earlier.path)
            earlier.path.rmdir()
        return True

    @contextmanager
    def _moving(self, what):
        try:
            yield
        except OSError as error:
            raise SaveError(
                f"cannot {what} {self.path / EARLIER}: {error}. Nothing of it is lost: it is there or in {self.path}"
            ) from error

    def _remove_files(self):
        """Removes the files of a training that had no best checkpoint, and so did not come to its end."""
        for file in self._files(drawn=False):
            remove(file)
            _tidy(file.parent, self.path)

    def _files(self, of=None, drawn=True):
        """The existing files of the run, checkpoints first and config.json last. config.json tells the task; without
        one, that in the folder `of`."""
        configs = [folder / "config.json" for folder in (self.path, of or self.path)]
        config = next((config_or_none(file) for file in configs if file.exists()), None) or {}
        task, options = TASKS.get(str(config.get("task"))), config.get("options")
        patterns = ["checkpoints", "metrics.jsonl", "options.yaml", *(task.written if task else ())]
        patterns += task.drawn if task and drawn else ()
        logged = isinstance(options, dict) and options.get("tensorboard")
        patterns += [EVENTS if logged and drawn else f"{EVENTS}.gspn", "config.json"]
        return [file for pattern in patterns for file in sorted(self.path.glob(pattern))]

    @classmethod
    def open(cls, path: Path | str) -> "Run":
        """Opens an existing run, or a saved model, which is read as a run without metrics (see pretrained.py). Where
        nothing exists at `path`, it may be the name of weights in the package gspn-weights.

        Errors: RunError if there is none, or it is damaged or written by a newer gspn."""
        path = run_folder(path)
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            lines = (path / "metrics.jsonl").read_text().splitlines() if (path / "metrics.jsonl").exists() else []
            metrics = [json.loads(line) for line in lines]
            if not all(isinstance(row, dict) and isinstance(row.get("epoch"), int) for row in metrics):
                raise ValueError("metrics.jsonl holds something else than rows with an epoch")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise no_run(path) from error
        except (OSError, ValueError) as error:
            raise RunError(f"the run {path} cannot be read: {error}") from error
        if not isinstance(config, dict) or not isinstance(config.get("format"), int):
            keys = ", ".join(list(config)[:5]) if isinstance(config, dict) else type(config).__name__
            raise RunError(f"{path / 'config.json'} is not the config of a gspn run: expected a format, got {keys}")
        check_format(path, config["format"], FORMAT, RunError)
        return cls(path, config, metrics)

    @property
    def saved(self) -> bool:
        """Whether this is a model that save_pretrained wrote, with one set of weights, rather than a run."""
        return "class" in self.config

    def check_task(self, *expected: str) -> str:
        """The run's task, if it is among `expected`. Errors: RunError, which says what takes such a run."""
        task = str(self.config.get("task", ""))
        if task not in expected:
            found, hint = f"a run of {task}" if task else "of no task", ""
            if task in TASKS:
                hint = f"; {TASKS[task].taken_by.format(self.path)}"
            elif not task and self.saved:
                saved = self.config["class"]
                found = f"a saved {saved} without a task"
                hint = f"; {saved}.from_pretrained reads it in Python, and gspn.export_onnx exports it"
            raise RunError(f"{self.path} is {found}, expected {' or '.join(expected)}{hint}")
        return task

    def append_metrics(self, row: dict) -> None:
        """Adds one epoch's dict to metrics.jsonl."""
        self._write_metrics([*self.metrics, row])

    def rewind(self, epoch: int) -> None:
        """Removes the rows of metrics after `epoch`."""
        if any(row["epoch"] > epoch for row in self.metrics):
            self._write_metrics([row for row in self.metrics if row["epoch"] <= epoch])

    def _write_metrics(self, rows):
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        self.metrics = rows

    def save_checkpoint(self, name: str, tensors: dict[str, dict[str, Tensor]], state: dict) -> None:
        """Writes checkpoints/`name`, completely or not at all.

        Args:
            name: "last", "best", "epoch-0010".
            tensors: {"model": {parameter name: tensor}, "ema": ..., "optimizer": ...}, a safetensors file each.
            state: the rest, a JSON-able dict.
        Errors: SaveError with the path and the system's reason; the previous checkpoint stays.
        """
        with atomic(self._checkpoint(name)) as folder:
            folder.mkdir(parents=True)
            text = json.dumps({"format": STATE_FORMAT, "parts": sorted(tensors), **state}, indent=2) + "\n"
            (folder / "state.json").write_text(text, encoding="utf-8")
            for part, named in tensors.items():
                save_tensors(folder / f"{part}.safetensors", named, {"format": "pt"})
        if name == "best":
            remove(self.path / EARLIER, quietly=True)  # what cannot be removed now, the next `create` removes

    def prune(self, keep: int) -> None:
        """Removes the checkpoints "epoch-..." except the newest `keep` (0 keeps all), and what a killed process left
        half written or removed. Each is renamed first, so that no partial checkpoint is seen."""
        folder = self.path / "checkpoints"
        epochs = {path: re.fullmatch(r"epoch-(\d+)", path.name) for path in folder.glob("epoch-*")}
        ours = {path: int(found[1]) for path, found in epochs.items() if found}
        for number, old in enumerate(sorted(ours, key=ours.__getitem__, reverse=True)):
            if keep and number >= keep:
                os.rename(old, old.with_name(f".{old.name}{TEMPORARY}"))
        for left in filter(is_temporary, folder.glob(".*")):
            remove(left, quietly=True)

    def has_checkpoint(self, name: str) -> bool:
        """Whether there is a checkpoint of that name."""
        return _find(self._checkpoint(name)) is not None

    def load_checkpoint(
        self, name: str, parts: Sequence[str] = ("model", "ema", "optimizer")
    ) -> tuple[dict[str, dict[str, Tensor]], dict]:
        """Reads checkpoints/`name` to (tensors, state), as `save_checkpoint` got them; only those of the
        `parts` that exist. The weights of a saved model, which has no checkpoints and no state, are its "best" and its
        "last". Errors: RunError if there is no such checkpoint or one of its files is damaged."""
        if self.saved:
            if name not in ("best", "last"):
                raise RunError(f"{self.path} is a saved model: it has one set of weights and no checkpoint {name!r}")
            return {"model": read_weights(self.path)}, {}
        path = self._checkpoint(name)
        while True:  # once, unless a training replaces the checkpoint while it is being read
            found = _find(path)
            if found is None:
                folders = (self.path / "checkpoints").glob("*/state.json")
                there = sorted(file.parent.name for file in folders if not file.parent.name.startswith("."))
                missing = f": there is no {path / 'state.json'}{_earlier_hint(self.path)}"
                if there:
                    meant = guess(name, there)
                    missing = f"{meant + ' It' if meant else '; it'} has {', '.join(there)}"
                raise RunError(f"the run {self.path} has no checkpoint {name!r}{missing}")
            folder = found[0]
            try:
                state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
                files = [folder / f"{part}.safetensors" for part in parts]
                _check_format(state, folder)
                written = state.get("parts", [file.stem for file in files if file.exists()])
                tensors = {file.stem: load_file(file) for file in files if file.stem in written}
            except RunError:
                raise
            except (OSError, TypeError, ValueError, SafetensorError) as error:
                if _find(path) == found:
                    raise RunError(f"the checkpoint {folder} is damaged: {error}") from error
            else:
                if _find(path) == found:
                    return tensors, state

    def _checkpoint(self, name):
        return self.path / "checkpoints" / name


def _check_format(state, folder):
    if not isinstance(state, dict) or not isinstance(state.get("format", 1), int):
        raise RunError(f"{folder / 'state.json'} is not the state of a gspn checkpoint")
    check_format(f"the checkpoint {folder}", state.get("format", 1), STATE_FORMAT, RunError)


def _move(file, target, root):
    """Renames a file of the run in the folder `root`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(file, target)
    _tidy(file.parent, root)


def _tidy(folder, root):
    """Removes an empty folder within `root`."""
    if folder != root:
        with suppress(OSError):
            folder.rmdir()


def _going_on(path):
    """How to resume the run in the folder, if it was stopped before its end; None if it cannot be resumed."""
    config, found = config_or_none(path / "config.json"), _find(path / "checkpoints" / "last")
    if not config or config.get("format") != FORMAT or config.get("task") not in TASKS:
        return None
    at = "before its first checkpoint"
    if found:
        state = config_or_none(found[0] / "state.json") or {}
        try:
            done, epochs, step = state["position"]["epoch"], config["options"]["epochs"], state["position"]["step"]
        except (KeyError, TypeError):
            return None
        if state.get("format") != STATE_FORMAT or done >= epochs:
            return None
        at = f"after step {step}, in epoch {done + 1} of {epochs}"
    command = f"gspn {TASKS[config['task']].command} --resume {quote(str(path))}"
    return f"`{command}` resumes the run there, which was stopped {at}"


def _earlier_hint(path):
    earlier = path / EARLIER
    return f"; the run that it was to replace is {earlier}" if (earlier / "config.json").exists() else ""
