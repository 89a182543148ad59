"""The commands that train, one for each task: made from its TaskSpec."""

from dataclasses import fields
from importlib import import_module
from inspect import cleandoc
from pathlib import Path
from typing import Annotated

import typer

from gspn.cli.app import app, out, progress_on, readable_errors, takes_options, warn
from gspn.extras import need
from gspn.options import OptionError, TaskSpec, read_file
from gspn.places import check_named, check_out, check_run, expanded, runs_like

ConfigFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Options from a .yaml or .toml file, such as a run's; flags override it."),
]
ResumedRun = Annotated[
    Path | None,
    typer.Option(
        metavar="RUN", help="Resume a stopped run from its last checkpoint, exactly.", autocompletion=runs_like
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the run in the folder once this one has a checkpoint.")
]


def report_files(spec, path, run, warnings):
    """Prints warnings and what is in the run folder; `run` is None in other processes than the main one."""
    if run:
        warn(warnings)
        files = ["checkpoints", "options.yaml", "metrics.jsonl", *spec.written, *spec.drawn]
        there = [name.partition("/")[0] for name in files if any(run.path.glob(name))]
        out.print(f"in {run.path}: {', '.join(there)}; {spec.taken_by.format(run.path)}", markup=False, highlight=False)


def add_command(spec: TaskSpec, report=report_files):
    """Adds the command of a task. `report` prints the result: it gets the spec, the run folder, and what Setup.train
    returned."""
    argument = next((one for one in fields(spec.options) if one.metadata["argument"]), None)
    if argument is None:
        data_argument, default = typer.Argument(metavar="DATA", help=spec.data_help), "runs/DATA-MODEL"
    else:
        data_argument = typer.Option(metavar="DATA", help=spec.data_help)
        default = f"runs/DATA-{argument.metadata['metavar']}"
    run_option = typer.Option("--out", help=f"The run folder to make. Default: {default}.")

    @takes_options(spec.options)
    def command(
        data: Annotated[str | None, data_argument] = None,
        run: Annotated[Path | None, run_option] = None,
        config: ConfigFile = None,
        resume: ResumedRun = None,
        overwrite: Overwrite = False,
        *,
        overrides: dict,
    ):
        with readable_errors():
            config, resume = (path and expanded(path) for path in (config, resume))
            if resume is None:
                data, run, options = arguments_of(spec, argument, data, run, config, overrides)
            else:
                if run or config or overwrite:
                    raise OptionError(
                        "--resume keeps the run's folder and options: leave out --out, --config and --overwrite"
                    )
                check_run(resume)
                if data is not None:
                    check_named(data, "DATA", spec.data_help)
            need(spec.extra)
            from gspn.tasks import base  # imports torch, so not before the arguments are checked

            setup = import_module(spec.module).Setup
            if resume is None:
                result = base.start(setup, data, run, options, overwrite=overwrite, console=progress_on(out))
            else:
                result = base.resume(setup, resume, overrides, data=data, console=progress_on(out))
            report(spec, resume or run, *result)

    app.command(spec.command, help=cleandoc(spec.help))(command)


def arguments_of(spec, argument, data, run, config, overrides):
    """(DATA, run folder, options) from the arguments, the configuration file and the flags. `argument`: the option that
    is the command's positional argument, if any. Errors: OptionError."""
    from_file = read_file(config) if config else {}
    in_file = {name: from_file.pop(name, None) for name in ("data", "out")}
    data, run = data or in_file["data"], run or in_file["out"]
    for name, value in {"data": data, "out": run}.items():
        if not isinstance(value, str | Path | None):
            raise OptionError(f"{config}: {name} takes text, got {value!r}")
    options = spec.options.read(from_file, f"{config}: ")
    options = options.updated(overrides)
    if argument is not None and getattr(options, argument.name) is None:
        raise OptionError(f"Missing argument '{argument.metadata['metavar']}'")
    if data is None:
        raise OptionError("Missing argument 'DATA'" if argument is None else "Missing option '--data'")
    options.check_paths()
    check_named(data, "DATA" if argument is None else "data", spec.data_help)
    run = run or Path("runs") / f"{Path(data).name or 'data'}-{spec.label(options)}"
    check_out(run)
    return data, expanded(run), options
