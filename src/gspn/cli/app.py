"""What all commands of `gspn` share: the application, its console, how flags become options, errors.

An error of the user is one message on stderr and exit code 2; a training that fails is exit code 1.
"""

import functools
import inspect
import sys
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console

import gspn
from gspn import progress
from gspn.extras import hint
from gspn.names import reason_of
from gspn.options import OptionError
from gspn.options import flags as option_flags
from gspn.places import RunError

app = typer.Typer(
    help="Train and use image classifiers, segmenters and generators of GSPN, a linear-cost replacement for attention.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out, err = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)
MAY_BE_EMPTY = {"--ignore"}  # options of which an empty value says: none
QUIET = inspect.Parameter(
    "quiet",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, typer.Option("--quiet", "-q", help="Print results and warnings, but no progress.")],
)


@contextmanager
def readable_errors():
    """Turns an error that the user can correct into one message and an exit code."""
    try:
        yield
    except (OptionError, RunError) as error:
        fail(str(error), 2)
    except ImportError as error:
        if (message := hint(error)) is None:
            raise
        fail(message, 2)
    except (OSError, RuntimeError, ValueError) as error:
        from gspn.data.images import DataError
        from gspn.export import ExportError  # here, as they import torch
        from gspn.files import BusyError, ExistsError, SaveError
        from gspn.train.loop import TrainingError

        if not isinstance(error, BusyError | DataError | ExistsError | ExportError | SaveError | TrainingError):
            raise
        fail(str(error), 1 if isinstance(error, SaveError | TrainingError) else 2)


def fail(message, code):
    _print_error(message)
    raise typer.Exit(code)


def _print_error(message):
    err.print("[bold red]error:[/]", end=" ")
    err.print(message, markup=False, highlight=False)


def warn(messages):
    for message in messages:
        err.print("[bold yellow]warning:[/]", end=" ")
        err.print(message, markup=False, highlight=False)


def decoded(path, problems):
    """The image in a file, or None where it is damaged, with the reason in `problems`, by path."""
    from gspn.data.images import decode, raise_if_of_machine

    try:
        return decode(path)
    except Exception as error:  # Pillow raises anything on damaged files
        raise_if_of_machine(error)
        problems[path] = reason_of(error)
        return None


def told(problems, images, done, known=()):
    """The message about images that could not be `done` ("read"): their reasons by path, except those in `known`."""
    named = "".join(f"\n  {path}: {reason}" for path, reason in problems.items() if path not in known)
    return f"{len(problems)} of {len(set(images))} images could not be {done}{':' * bool(named)}{named}"


def refuse(problems, options, done):
    """Raises OptionError where no image can be `done`, or, with --strict, not every one."""
    if problems and (options.strict or len(problems) == len(set(options.images))):
        raise OptionError(told(problems, options.images, done))


def _version(wanted: bool):
    if wanted:
        out.print(f"gspn {gspn.__version__}", highlight=False)
        import torch

        out.print(f"torch {torch.__version__}", highlight=False)
        backends()
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_version,
            is_eager=True,
            help="The versions, and the backends that are available here.",
        ),
    ] = False,
):
    pass


def progress_on(console: Console) -> Console | None:
    """The console to show progress on; None, which is silent, with --quiet."""
    return None if progress.quiet else console


def takes_options(options):
    """Gives a command the flags of a set of options, and --quiet. It receives those that have a value as
    `overrides`: texts and numbers by name."""

    def decorate(command):
        own = [p for p in inspect.signature(command).parameters.values() if p.name != "overrides"]
        flags = option_flags(options)

        @functools.wraps(command)
        def with_flags(quiet, **arguments):
            progress.quiet = quiet
            values = {flag.name: arguments.pop(flag.name) for flag in flags}
            overrides = {name: value for name, value in values.items() if value is not None}
            return command(**arguments, overrides=overrides)

        with_flags.__signature__ = inspect.Signature([*own, *flags, QUIET])
        return with_flags

    return decorate


def command(name, options):
    """A command with the flags of a set of options. The function gets the set, once it and its paths are checked."""

    def decorate(function):
        @takes_options(options)
        def checked(overrides):
            with readable_errors():
                chosen = options.read(overrides)
                chosen.check_paths()
                function(chosen)

        app.command(name, help=inspect.getdoc(function))(checked)
        return function

    return decorate


@app.command()
def backends():
    """List the backends: which are available here, and why the others are not."""
    for name, state in gspn.available_backends().items():
        word = "available" if state.available else "not available"
        out.print(f"{name}: {word}{f', {state.reason}' if state.reason else ''}", markup=False, highlight=False)


def main():
    """The entry point of the `gspn` command."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    _refuse_empty(sys.argv[1:])
    try:
        app()
    finally:
        _leave_processes()


def _refuse_empty(arguments):
    """Hardly any argument of ours may be empty. An empty path would otherwise mean the current folder."""
    for before, argument in zip(["gspn", *arguments], arguments, strict=False):
        if argument == "--":
            return
        option, equals, value = argument.partition("=")
        empty = not argument or (option.startswith("--") and equals and not value)
        if empty and not {before, option} & MAY_BE_EMPTY:
            what = argument or f"the argument after {before!r}"
            _print_error(f"{what} is empty; give it a value. Is a variable of the shell unset?")
            raise SystemExit(2)


def _leave_processes():
    """Destroys the process group: its background threads could otherwise abort a process that has finished."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
