"""What all commands of `gspn` share: the application, its console, errors, arguments.

User errors are one message on stderr and exit code 2; a training that fails is exit code 1.
"""

import functools
import inspect
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import gspn
from gspn.extras import hint
from gspn.options import OptionError, read_file
from gspn.options import flags as option_flags
from gspn.places import RunError, check_file, check_named, check_run

app = typer.Typer(
    help="Train and use image classifiers and generators built on GSPN, a linear-cost replacement for self-attention.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out, err = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)

DATA_HELP = (
    "`digits` (embedded), a folder of class folders with images, a folder of MNIST-format idx files, or anything that "
    "Hugging Face datasets loads: a folder made by save_to_disk, a parquet, arrow, csv or json file, a name on the hub."
)
Data = Annotated[str, typer.Argument(metavar="DATA", help=DATA_HELP)]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, as `gspn train` makes it.")]
Checkpoint = Annotated[str, typer.Option(help="Which checkpoint: best or last.")]
ImageColumn = Annotated[str | None, typer.Option(help="datasets: the column with the images.")]
LabelColumn = Annotated[str | None, typer.Option(help="datasets: the column with the classes.")]
ClassNames = Annotated[str | None, typer.Option(help="Names for data without any, in order: a,b,c.")]
Channels = Annotated[int | None, typer.Option(help="Convert the images to 1 (grey) or 3 (colour) channels.")]
Strict = Annotated[bool, typer.Option("--strict", help="An unreadable image is an error, not left out and named.")]
Workers = Annotated[int, typer.Option(help="Processes that decode image files.")]
NewRun = Annotated[Path | None, typer.Option("--out", help="The run folder to make. Default: runs/DATA-MODEL.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Options from a .yaml or .toml file, such as a run's; flags override it."),
]
ResumedRun = Annotated[
    Path | None,
    typer.Option(metavar="RUN", help="Go on with a run that was stopped, exactly, from its last checkpoint."),
]
MovedVae = Annotated[
    str | None,
    typer.Option("--vae", metavar="PATH|NAME", help="Where the VAE of a run of latents is now, if it was moved."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the run in the folder once this one has a checkpoint.")
]
Replace = Annotated[bool, typer.Option("--overwrite", help="Replace what is there under that name.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@contextmanager
def readable_errors():
    """Turns what a user can put right into one message and an exit code."""
    try:
        yield
    except (OptionError, RunError) as error:
        fail(str(error), 2)
    except ImportError as error:
        if (said := hint(error)) is None:
            raise
        fail(said, 2)
    except (OSError, RuntimeError, ValueError) as error:
        from gspn.data.labelled import DataError
        from gspn.export import ExportError  # here, as they import torch
        from gspn.files import BusyError, ExistsError, SaveError
        from gspn.train.loop import TrainingError

        if not isinstance(error, BusyError | DataError | ExistsError | ExportError | SaveError | TrainingError):
            raise
        fail(str(error), 1 if isinstance(error, SaveError | TrainingError) else 2)


def fail(message, code):
    err.print("[bold red]error:[/]", end=" ")
    err.print(message, markup=False, highlight=False)
    raise typer.Exit(code)


def warn(messages):
    for message in messages:
        err.print("[bold yellow]warning:[/]", end=" ")
        err.print(message, markup=False, highlight=False)


def _version(wanted: bool):
    if wanted:
        out.print(f"gspn {gspn.__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
):
    pass


def takes_options(options):
    """Gives a command the flags of a set of options, but for those of which it has an argument of the same name. It
    gets those that were used as `given`, texts and numbers by name."""

    def decorate(command):
        own = [p for p in inspect.signature(command).parameters.values() if p.name != "given"]
        flags = [flag for flag in option_flags(options) if flag.name not in {p.name for p in own}]

        @functools.wraps(command)
        def with_flags(**arguments):
            values = {flag.name: arguments.pop(flag.name) for flag in flags}
            return command(**arguments, given={name: value for name, value in values.items() if value is not None})

        with_flags.__signature__ = inspect.Signature(own + flags)
        return with_flags

    return decorate


def check_data(data):
    """Raises OptionError for DATA that is neither there nor may be a name on the hub."""
    if data is not None:
        check_named(data, "DATA", DATA_HELP)


def check_resumed(run, data, **not_given):
    """Raises OptionError or RunError for what --resume cannot go on with: a folder that is no run, DATA that is not
    there, and flags that are not for it."""
    if any(not_given.values()):
        raise OptionError("--resume goes on in its own folder and options: not with --out, --config, --overwrite")
    check_run(run)
    check_data(data)


def training_of(kind, data, run, config, given):
    """(DATA, run folder, options of that kind) from the arguments, the configuration file and the flags given."""
    data, run, options = arguments_of(kind, data, run, config, given)
    if data is None:
        raise OptionError("Missing argument 'DATA'")
    check_data(data)
    if getattr(options, "init_from", None):
        check_file(options.init_from, "init_from", "a run folder, a .safetensors or a .pth file")
    otherwise = kind.__dataclass_fields__["model"].metadata["otherwise"]
    model = options.model or ("finetuned" if getattr(options, "init_from", None) else otherwise)
    return data, run or Path("runs") / f"{Path(data).name or 'data'}-{model.replace('/', '-')}", options


def arguments_of(kind, data, run, config, given):
    """The same, but None for DATA or a run folder that nothing tells."""
    from_file = read_file(config) if config else {}
    data = data or from_file.pop("data", None)
    run = run or from_file.pop("out", None)
    for name, value in {"data": data, "out": run}.items():
        if not isinstance(value, str | Path | None):
            raise OptionError(f"{config}: {name} takes text, got {value!r}")
    from_file = {name: value for name, value in from_file.items() if name not in ("data", "out")}
    kind.read(from_file, f"{config}: ")  # so that a message about the file names it
    return data, Path(run) if run else None, kind.read(from_file | given)


def parsed(name, parse, text):
    """What `parse` makes of the flag --`name`; None stays. OptionError says what it takes."""
    try:
        return None if text is None else parse(text.strip())
    except ValueError as error:
        raise OptionError(f"--{name} takes {error}, got {text!r}") from None


@app.command()
def backends():
    """Which backends are available here, and as what; why the others are not."""
    for name, state in gspn.available_backends().items():
        word = "available" if state.available else "not available"
        out.print(f"{name}: {word}{f', {state.reason}' if state.reason else ''}", markup=False, highlight=False)


def main():
    """The entry point of the `gspn` command."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        app()
    finally:
        _leave_processes()


def _leave_processes():
    """One of several processes takes its leave of the others: what the group runs in the background would else, now and
    then, abort it at its end, after all its work."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
