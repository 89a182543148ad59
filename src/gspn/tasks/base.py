"""A training from the command to its end, for any task: `start` begins a run, `resume` continues one exactly.

A task is a subclass of `Setup`, which `start` and `resume` make, ask and run:

    setup = Setup.of(data, options)       opens the data, fills in the options
    model = setup.model(device)           and setup.first_weights(model)
    setup.config(model)                   written to config.json; when resuming, setup.check_config(config)
    setup.train(training)                 makes a Task for the loop, and runs it
"""

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from shlex import quote
from typing import Any, ClassVar, Self

import accelerate
import numpy as np
import torch
from rich.console import Console

import gspn
from gspn.data.images import DataError, Preprocessing, Split
from gspn.data.labelled import Data, open_data
from gspn.data.loader import Loader, workers_note
from gspn.data.tables import Stream
from gspn.files import writing
from gspn.memory import is_out_of_memory
from gspn.metrics.classification import OPEN_OPTIONS
from gspn.names import reason_of
from gspn.options import LoopOptions, OptionError, TaskSpec, file_text
from gspn.places import check_outside, expanded, location
from gspn.progress import Progress
from gspn.train.board import check_tensorboard
from gspn.train.loop import Position, Task, make_accelerator, train
from gspn.train.optim import check_trainable
from gspn.train.run import STATE_FORMAT, Run, RunError

UNUSED = 100_000  # numbers of classes without a training image; more are no numbers that count from 0


@dataclass(kw_only=True)
class Setup:
    """What is trained on what: the data, and options of which none is left open.

    Attributes:
        spec: the TaskSpec. data: the Data. train_split, eval_split: two of its splits. eval_name: "val" or "test".
        options: of spec.options. notes: what the user should know before the training starts.
    """

    spec: ClassVar[TaskSpec]

    data: Data
    train_split: Split
    eval_split: Split
    eval_name: str
    options: LoopOptions
    notes: list[str]

    def note_moved(self, run: Run) -> None:
        """Notes in a run that goes on where what it needs beside the data is now. Errors: SaveError."""

    @classmethod
    def of(cls, where: str | Path, options: LoopOptions, *, resuming: bool = False) -> Self:
        """Opens the data and fills in the options. `resuming`: the run's checkpoint holds the weights.
        Errors: DataError, OptionError."""
        raise NotImplementedError

    def model(self, device: torch.device) -> torch.nn.Module:
        """A new model. Errors: OptionError."""
        raise NotImplementedError

    def first_weights(self, model: torch.nn.Module) -> str | None:
        """Gives a new model the weights that it is to start from. Returns a note on them, or None without any."""
        return None

    def reads_without_workers(self) -> bool:
        """Whether the training images are decoded once and kept, so that no worker reads them."""
        return False

    def crowded(self) -> str | None:
        """A note where more workers read the training images than there are processors."""
        workers = 0 if self.reads_without_workers() else getattr(self.options, "workers", 0)
        return workers_note(workers, self.train_split)

    def config(self, model: torch.nn.Module) -> dict:
        """What config.json keeps, beside options, versions and where the data are."""
        raise NotImplementedError

    def for_file(self) -> LoopOptions:
        """The options for options.yaml, which make another training like this one."""
        return self.options

    def check_config(self, config: Mapping) -> None:
        """Takes over from the config of a run what was fixed when it began. Errors: RunError where the training could
        not be resumed exactly."""

    def about(self, model: torch.nn.Module) -> tuple[str, str, tuple[str, ...]]:
        """For `describe`: the model, what the images are, and options of the task."""
        raise NotImplementedError

    def train(self, training: "Training") -> Any:
        """Runs the training. Returns what `start` and `resume` return."""
        raise NotImplementedError

    def describe(self, model: torch.nn.Module) -> str:
        """Model, data and options in two lines."""
        options, (what, images, more) = self.options, self.about(model)
        told = [
            f"{options.epochs} epoch{'s' * (options.epochs > 1)}",
            f"batch size {options.batch_size}",
            f"{'Muon, ' * (options.optimizer == 'muon')}learning rate {options.lr:g}",
            f"EMA {options.ema:g}",
            options.precision,
            *more,
            f"seed {options.seed}",
        ]
        counts = f"{len(self.train_split):,} training and {len(self.eval_split):,} {self.eval_name} images"
        return f"{what}; {counts} {images}\n{', '.join(told)}"

    def held_out(self) -> Split:
        """The images of the validation loss: at most `eval_images` of the evaluation split, evenly spaced."""
        split, most = self.eval_split, self.options.eval_images
        return split.subset(np.linspace(0, len(split) - 1, most).astype(int)) if len(split) > most else split


@dataclass
class Training:
    """A training that is ready to run.

    Attributes:
        model: the model. path: the run folder. run: its Run, in the main process; None in the others.
        accelerator: see make_accelerator. console: rich's, or None for silence.
        checkpoint: (tensors, state) to continue from, or None.
    """

    model: torch.nn.Module
    path: str | Path
    run: Run | None
    accelerator: accelerate.Accelerator
    console: Console | None
    checkpoint: tuple | None = None

    def loop(self, task: Task, loader: Loader, options: LoopOptions) -> None:
        """Runs the training loop, see gspn.train.loop.train."""
        if getattr(options, "compile", False):
            self.model.compile()
        train(task, self.model, loader, options, self.run, self.accelerator, self.console, self.checkpoint)


def start(
    setup_class: type[Setup],
    data: str | Path,
    out: str | Path,
    options: LoopOptions,
    *,
    overwrite: bool = False,
    console: Console | None = None,
):
    """Begins a training.

    Args:
        setup_class: the task. data: what the user calls the data. out: the run folder. options: those of the task.
        overwrite: an earlier run in `out` may be replaced. console: rich's, or None for silence.
    Returns: what Setup.train returns. Errors: BusyError, DataError, OptionError, RunError, SaveError, TrainingError.
    """
    accelerator, spec, out = make_accelerator(), setup_class.spec, expanded(out)
    say = speaker(accelerator, console)
    options = options.located()  # so that the run's options.yaml means the same in every working directory
    Run.check_free(out, overwrite)
    check_outside(out, data)
    if options.tensorboard:
        check_tensorboard()
    quiet = None if not accelerator.is_main_process else console
    with Progress(f"opening {data}", console=quiet):
        setup = setup_class.of(data, options)
    check_processes(setup, accelerator)
    model = new_model(setup, accelerator.device)
    with Progress("preparing the weights", console=quiet):
        weights_note = setup.first_weights(model)
    for note in [*setup.notes, *setup.options.idle(), *filter(None, [setup.crowded(), weights_note])]:
        say(f"note: {note}")
    say(setup.describe(model))
    own = setup.config(model)
    config = {
        "task": spec.name,
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
    accelerator.wait_for_everyone()  # every process has found the folder free
    with writing(out) if accelerator.is_main_process else nullcontext():
        run = None
        if accelerator.is_main_process:
            run = Run.create(out, config, overwrite, options=file_text(setup.for_file(), {"data": location(data)}))
        try:
            return setup.train(Training(model, out, run, accelerator, console))
        except BaseException:
            if run and run.restore_earlier():
                say(f"this training has no checkpoint; the earlier run is back in {out}")
            elif run and run.has_checkpoint("last"):
                say(f"`gspn {spec.command} --resume {quote(str(out))}` continues from its last checkpoint")
            raise


def resume(
    setup_class: type[Setup],
    path: str | Path,
    changes: Mapping[str, Any] | None = None,
    *,
    data: str | Path | None = None,
    console: Console | None = None,
):
    """Continues a training that was stopped, from its last checkpoint, exactly as if it had not been stopped.

    Args:
        path: the run folder. changes: new values, by name, for options that do not change the result, such as workers.
        data: where the data are now, if they were moved. Others: as for `start`.
    Returns and errors: as for `start`; OptionError also for options that change the result, RunError also where data,
    checkpoint and run do not belong together.
    """
    spec, path = setup_class.spec, expanded(path)
    begun = Run.open(path)
    begun.check_task(spec.name)
    if begun.saved:
        hint = "; --init-from starts from its weights" if spec.takes_own_runs else ""
        raise RunError(f"{path} is a saved model, not a run that could go on{hint}")
    options = changed(begun.config, changes or {}, spec)
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
                setup = setup_class.of(where, options, resuming=True)
            recorded = config["data"].get("fingerprint")
            if setup.data.fingerprint(recorded, quiet) != recorded:
                hint = ""
                if spec.takes_own_runs:
                    command = f"gspn {spec.command} {quote(str(where))} --init-from {quote(str(path))}"
                    hint = f"; `{command}` starts a new training from its weights"
                raise RunError(
                    f"{setup.data.where} is not what {path} was trained on: images, labels, captions or class names "
                    f"have changed{hint}"
                )
            setup.check_config(config)
            other_versions = config["versions"] != versions() and config["versions"]
        check_processes(setup, accelerator)
        model = new_model(setup, accelerator.device)
        if run.has_checkpoint("last"):
            checkpoint = complete(path, *run.load_checkpoint("last"))
            state = checkpoint[1]
            done, at = state["position"]["epoch"], f"step {state['step']}"
            begin = f"{at} (epoch {done + 1})" if done < options.epochs else f"its end, {at}: nothing is left to do"
            if state["processes"] != accelerator.num_processes:
                say(
                    f"note: {accelerator.num_processes} processes instead of {state['processes']}: random numbers in "
                    "the model will differ"
                )
        else:
            begin = "the start, as there is no checkpoint yet"
            with Progress("preparing the weights", console=quiet):
                note = setup.first_weights(model)
            if note:
                say(f"note: {note}")
        if note := setup.data.uncompared(recorded):
            say(f"note: {note}")
        if crowded := setup.crowded():
            say(f"note: {crowded}")
        if other_versions:
            say(f"note: the run began with other versions, so the last bits may differ: {other_versions}")
        say(f"{setup.describe(model)}\ngoing on from {begin}")
        accelerator.wait_for_everyone()  # every process has read the run
        if accelerator.is_main_process:
            if data is not None:
                run.moved("data", "where", setup.data.where)
            setup.note_moved(run)
            run.rewind(checkpoint[1]["epoch"] if checkpoint else 0)
            run.prune(options.keep)
        own = run if accelerator.is_main_process else None
        return setup.train(Training(model, path, own, accelerator, console, checkpoint))


@contextmanager
def readable(path):
    """Turns what is missing or wrong in a run's files into a RunError."""
    try:
        yield
    except (RunError, DataError, OptionError):
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"the run {path} is damaged or foreign: {type(error).__name__}: {error}") from error


def changed(config: Mapping, changes: Mapping[str, Any], spec: TaskSpec) -> LoopOptions:
    """The options of a run of the task `spec`, with `changes`. Errors: OptionError, RunError."""
    if not isinstance(config.get("options"), dict):
        raise RunError("the run's config.json is damaged or foreign: it holds no options")
    known = {"optimizer": "adamw"} | config["options"]  # runs from before there was a choice had AdamW
    saved = spec.options.read(known, "the run's config.json: ")
    options = saved.updated(changes)
    for one in fields(spec.options):
        if getattr(saved, one.name) != getattr(options, one.name) and not one.metadata["resumable"]:
            resumable = ", ".join(one.name for one in fields(spec.options) if one.metadata["resumable"])
            hint = " --init-from starts a new training from its weights" if spec.takes_own_runs else ""
            raise OptionError(
                f"{one.name} was {getattr(saved, one.name)} and cannot be {getattr(options, one.name)} in a resumed "
                f"training; what can be changed: {resumable}.{hint}"
            )
    return options


def complete(path, tensors, state):
    """The checkpoint (tensors, state), if a training can be resumed from it. Errors: RunError."""
    if state.get("format", 1) < STATE_FORMAT:
        raise RunError(f"{path} was written by an older gspn, whose trainings cannot be resumed")
    with readable(f"{path}, checkpoint `last`,"):
        position = Position(**state["position"])
        counts = [position.epoch, position.batch, position.step, position.images, state["epoch"], state["processes"]]
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError(f"counts are {counts}")
        if not {"model", "optimizer"} <= set(tensors) or not isinstance(state["task"], dict):
            raise KeyError("model, optimizer or task")
    return tensors, state


def new_model(setup: Setup, device: torch.device) -> torch.nn.Module:
    """The setup's model. Errors: OptionError, also where the loop's options do not fit the model or this machine: here,
    because the run folder does not exist yet."""
    model, options = setup.model(device), setup.options
    check_trainable(model, options)
    try:
        torch.zeros(1, device=options.ema_device or device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError(f"ema_device {options.ema_device!r} cannot be used: {reason_of(error)}") from error
    return model


def open_with(data, options):
    """labelled.open_data with the options that are for it."""
    return open_data(data, **{name: getattr(options, name) for name in OPEN_OPTIONS})


@contextmanager
def tried(model: str, what: str) -> Iterator[None]:
    """Raises OptionError where a new `model` fails in the block, in which it is tried with `what`."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, MemoryError) as error:
        reason = "memory does not suffice; use a smaller --size" if is_out_of_memory(error) else error
        raise OptionError(f"{model} fails when tried with {what}: {reason}") from error


def labelled_splits(data: Data) -> tuple[Split, Split, str, list[str]]:
    """(training split, evaluation split, its name, class names) of data with classes. Both splits have these classes,
    which are numbers where the data name none. Errors: DataError where almost no number has an image."""
    train_split, eval_split, eval_name = data.for_training()
    class_names = train_split.class_names
    if not class_names:
        most, present = int(train_split.labels.max()), len(train_split.labels.unique())
        if most - present > UNUSED:
            raise DataError(
                f"{data.where} numbers classes up to {most:,}, but only {present:,} of these have training images: "
                "expected numbers that count from 0, as each of them becomes a class. Number the classes anew, or give "
                "their names instead"
            )
        class_names = [str(i) for i in range(most + 1)]
    return train_split.relabelled(class_names), eval_split.relabelled(class_names), eval_name, class_names


def check_stream(eval_split: Split, eval_name: str, eval_images: int) -> None:
    """Raises OptionError for an evaluation split of which only a part would be taken, but which is a stream."""
    if isinstance(eval_split, Stream) and len(eval_split) > eval_images:
        raise OptionError(
            f"eval_images: a stream is evaluated as a whole; its {eval_name} split has {len(eval_split)} images: "
            f"expected at least as many, got {eval_images}"
        )


def parameters_of(model: torch.nn.Module) -> str:
    """'1,234 parameters'."""
    return f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters"


def check_processes(setup, accelerator):
    """Raises OptionError unless the batch size can be divided by the number of processes."""
    count, size = accelerator.num_processes, setup.options.batch_size
    if size % count:
        raise OptionError(f"batch_size counts the images of all {count} processes: expected a multiple, got {size}")
    share = min(size, len(setup.train_split)) // count
    if getattr(setup, "mixing", None) is not None and share % 2:
        raise OptionError(f"mixup and cutmix pair images: expected an even number for each process, got {share}")


def speaker(accelerator, console):
    """A function that prints a text, in the main process only."""

    def say(text):
        if console and accelerator.is_main_process:
            console.print(text, markup=False, highlight=False)

    return say


def versions():
    """The versions on which a result depends."""
    return {
        "gspn": gspn.__version__,
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "python": platform.python_version(),
    }


def describe_size(preprocessing: Preprocessing) -> str:
    """'28x28, grey'."""
    return f"{preprocessing.size[0]}x{preprocessing.size[1]}, {'grey' if preprocessing.channels == 1 else 'colour'}"
