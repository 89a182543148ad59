"""A training from its command to its end, whatever the task: the run folder is made, or found and read again; what
stopped is gone on with, exactly; what had no checkpoint yet gives way to the run that it was to replace.
"""

import platform
from collections.abc import Callable, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Protocol

import accelerate
import torch
from rich.console import Console

import gspn
from gspn.data.images import Preprocessing, Split
from gspn.data.labelled import Data, DataError, open_data
from gspn.data.latent_folder import refuse_latents
from gspn.data.loader import workers_note
from gspn.files import writing
from gspn.metrics.classification import OPEN_OPTIONS
from gspn.options import LoopOptions, OptionError, file_text
from gspn.places import location
from gspn.progress import Progress
from gspn.train.board import check_tensorboard
from gspn.train.loop import Position, make_accelerator
from gspn.train.optim import frozen_modules, make_optimizer
from gspn.train.run import COMMANDS, STATE_FORMAT, Run, RunError


class Setup(Protocol):
    """What is trained on what: the data, and options that leave nothing open."""

    data: Data
    train_split: Split
    eval_name: str
    options: LoopOptions
    notes: list[str]

    def model(self, device: torch.device) -> torch.nn.Module:
        """A new model. Errors: OptionError."""

    def first_weights(self, model: torch.nn.Module) -> str | None:
        """Copies into a new model the weights that it is to start from; a note on them, or None without any."""

    def describe(self, model: torch.nn.Module) -> str:
        """Model, data and options in a few lines."""

    def config(self, model: torch.nn.Module) -> dict:
        """What config.json is to keep beside options, versions and where the data are."""

    def check_config(self, config: Mapping) -> None:
        """Before going on with the run of that config: takes over what the data said when it began. Errors: RunError
        where what is gone on with would not be the same."""


def start(
    task: str,
    setup_of: Callable[[str | Path, Any], Setup],
    run_training: Callable,
    data: str | Path,
    out: str | Path,
    options: LoopOptions,
    *,
    overwrite: bool = False,
    console: Console | None = None,
):
    """Begins a training.

    Args:
        task: what config.json calls it. setup_of: makes the Setup of `data` and options.
        run_training: called with (setup, model, out, run or None, accelerator, console, checkpoint or None).
        data: what the user calls the data. out: the run folder. options: those of the task.
        overwrite: an earlier run in `out` may be replaced. console: rich's, or None for silence.
    Returns: what `run_training` does. Errors: BusyError, DataError, OptionError, RunError, SaveError, TrainingError.
    """
    accelerator = make_accelerator()
    say = speaker(accelerator, console)
    options = options.located()  # so that the run's options.yaml means the same in whichever folder it is used
    Run.check_free(out, overwrite)
    if options.tensorboard:
        check_tensorboard()
    quiet = None if not accelerator.is_main_process else console
    with Progress(f"opening {data}", console=quiet):
        setup = setup_of(data, options)
    check_processes(setup, accelerator)
    model = new_model(setup, accelerator.device)
    with Progress("preparing the weights", console=quiet):
        started = setup.first_weights(model)
    crowded = workers_note(getattr(setup.options, "workers", 0), setup.train_split)
    for note in [*setup.notes, *filter(None, [crowded, started])]:
        say(f"note: {note}")
    say(setup.describe(model))
    own = setup.config(model)
    config = {
        "task": task,
        **own,
        "data": {
            "where": setup.data.where,
            "kind": setup.data.kind,
            "split": setup.eval_name,
            "fingerprint": setup.data.fingerprint(console=quiet),
            **{name: getattr(options, name) for name in OPEN_OPTIONS if hasattr(options, name)},
            **own.get("data", {}),
        },
        "options": asdict(setup.options),
        "seed": setup.options.seed,
        "versions": versions(),
    }
    accelerator.wait_for_everyone()  # all have found the folder free
    with writing(out) if accelerator.is_main_process else nullcontext():
        run = None
        if accelerator.is_main_process:
            run = Run.create(out, config, overwrite, options=file_text(setup.options, {"data": location(data)}))
        try:
            return run_training(setup, model, out, run, accelerator, console, None)
        except BaseException:
            if run and run.restore_earlier():
                say(f"the run that was in {out} is there again, as this training has no checkpoint")
            elif run and run.has_checkpoint("last"):
                say(f"`{COMMANDS[task]} --resume {out}` goes on from its last checkpoint")
            raise


def resume(
    task: str,
    setup_of: Callable[[str | Path, Any], Setup],
    run_training: Callable,
    path: str | Path,
    changes: Mapping[str, Any] | None,
    kind: type[LoopOptions],
    *,
    data: str | Path | None = None,
    console: Console | None = None,
):
    """Goes on with a training that was stopped, from its last checkpoint, exactly as if it had not been.

    Args:
        path: the run folder. data: where the data are now, if they were moved. Others: as for `start`.
        changes: options by name that change nothing of the result, such as the number of workers. kind: their class.
    Returns and errors: as `start`; OptionError also for changes of the result, RunError also where data, checkpoint and
    run do not belong together.
    """
    options = changed(Run.open(path).config, changes or {}, task, kind)
    if options.tensorboard:
        check_tensorboard()
    accelerator = make_accelerator()
    say = speaker(accelerator, console)
    with writing(path) if accelerator.is_main_process else nullcontext():
        run, checkpoint = Run.open(path), None
        with readable(path):
            config = run.config
            where = data or config["data"]["where"]
            quiet = console if accelerator.is_main_process else None
            with Progress(f"opening {where}", console=quiet):
                setup = setup_of(where, options)
            told = config["data"].get("fingerprint")
            if setup.data.fingerprint(told, quiet) != told:
                again = f"; `gspn train --init-from {path}` starts a new training from its weights"
                raise RunError(
                    f"{setup.data.where} is not what {path} was trained on: images, labels, captions or class names "
                    "have changed"
                    f"{again if task == 'classification' else ''}"
                )
            setup.check_config(config)
            other_versions = config["versions"] != versions() and config["versions"]
        check_processes(setup, accelerator)
        model = new_model(setup, accelerator.device)
        if run.has_checkpoint("last"):
            checkpoint = complete(path, *run.load_checkpoint("last"))
            state = checkpoint[1]
            done, at = state["position"]["epoch"], f"step {state['step']}"
            place = f"{at} (epoch {done + 1})" if done < options.epochs else f"its end, {at}: nothing is left to do"
            if state["processes"] != accelerator.num_processes:
                say(
                    f"note: {accelerator.num_processes} processes instead of {state['processes']}: what is random in "
                    "the model will differ"
                )
        else:
            place = "the start, as there is no checkpoint yet"
            if note := setup.first_weights(model):
                say(f"note: {note}")
        if note := setup.data.uncompared(told):
            say(f"note: {note}")
        if crowded := workers_note(getattr(options, "workers", 0), setup.train_split):
            say(f"note: {crowded}")
        if other_versions:
            say(f"note: other versions than before, so not the same to the last bit: {other_versions}")
        say(f"{setup.describe(model)}\ngoing on from {place}")
        accelerator.wait_for_everyone()  # all have read
        if accelerator.is_main_process:
            run.rewind(checkpoint[1]["epoch"] if checkpoint else 0)
            run.prune(options.keep)
        own = run if accelerator.is_main_process else None
        return run_training(setup, model, path, own, accelerator, console, checkpoint)


@contextmanager
def readable(path):
    """What a run's files do not hold, or hold as something else, is a RunError."""
    try:
        yield
    except (RunError, DataError, OptionError):
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"the run {path} is damaged or foreign: {type(error).__name__}: {error}") from error


def changed(config, changes, task, kind):
    """The options of a run of that task, with `changes`."""
    if config.get("task") != task:
        raise RunError(f"this is a run of {config.get('task')}, expected {task}")
    if not isinstance(config.get("options"), dict):
        raise RunError("the run's config.json is damaged or foreign: it holds no options")
    saved = kind.read(config["options"], "the run's config.json: ")
    options = kind.read({**config["options"], **changes})
    for one in fields(kind):
        if getattr(saved, one.name) != getattr(options, one.name) and not one.metadata["same_result"]:
            free = ", ".join(one.name for one in fields(kind) if one.metadata["same_result"])
            other = " --init-from starts a new training from its weights" if hasattr(options, "init_from") else ""
            raise OptionError(
                f"{one.name} was {getattr(saved, one.name)} and cannot be {getattr(options, one.name)} in a training "
                f"that goes on exactly; what can be changed: {free}.{other}"
            )
    return options


def complete(path, tensors, state):
    """A checkpoint, if a training can go on from it."""
    if state.get("format", 1) < STATE_FORMAT:
        raise RunError(f"{path} was written by an older gspn, which could not resume: nothing to go on from")
    with readable(f"{path}, checkpoint `last`,"):
        position = Position(**state["position"])
        counts = [position.epoch, position.batch, position.step, position.images, state["epoch"], state["processes"]]
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError(f"counts are {counts}")
        if not {"model", "optimizer"} <= set(tensors) or not isinstance(state["task"], dict):
            raise KeyError("model, optimizer or task")
    return tensors, state


def new_model(setup, device) -> torch.nn.Module:
    """The setup's model; what the options cannot do with it is found before the run's folder is made."""
    model, options = setup.model(device), setup.options
    frozen_modules(model, options.freeze or ())
    make_optimizer(model, options)
    try:
        torch.zeros(1, device=options.ema_device or device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError(f"ema_device {options.ema_device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return model


def open_with(data, options):
    """data.open_data with what the options say about it."""
    refuse_latents(data)
    return open_data(data, **{name: getattr(options, name) for name in OPEN_OPTIONS})


def check_processes(setup, accelerator):
    """Raises OptionError unless the processes can share a batch."""
    count, size = accelerator.num_processes, setup.options.batch_size
    if size % count:
        raise OptionError(f"batch_size is of all {count} processes together: expected a multiple, got {size}")
    share = min(size, len(setup.train_split)) // count
    if getattr(setup, "mixing", None) is not None and share % 2:
        raise OptionError(f"mixup and cutmix pair images: expected an even number for each process, got {share}")


def speaker(accelerator, console):
    """A function that prints a text, in the main process."""

    def say(text):
        if console and accelerator.is_main_process:
            console.print(text, markup=False, highlight=False)

    return say


def versions():
    """Of what a result depends on."""
    return {
        "gspn": gspn.__version__,
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "python": platform.python_version(),
    }


def describe_size(preprocessing: Preprocessing) -> str:
    """'28x28, grey'."""
    return f"{preprocessing.size[0]}x{preprocessing.size[1]}, {'grey' if preprocessing.channels == 1 else 'colour'}"
