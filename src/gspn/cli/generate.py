"""The commands around generators: train-diffusion, encode, sample, fid."""

from pathlib import Path
from typing import Annotated

import typer

from gspn.cli.app import app, out, readable_errors, takes_options
from gspn.train.diffusion.options import GeneratorOptions
from gspn.train.options import OptionError, read_file


@app.command("train-diffusion")
@takes_options(GeneratorOptions)
def train_diffusion(
    data: Annotated[
        str | None,
        typer.Argument(metavar="DATA", help="As for `gspn train`, or a folder of latents that `gspn encode` made."),
    ] = None,
    run: Annotated[Path | None, typer.Option("--out", help="The run folder to make. Default: runs/DATA-MODEL.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Options from a .yaml or .toml file, such as a run's; flags override it."),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Go on with a run that was stopped, exactly, from its last checkpoint."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in the folder once this one has a checkpoint.")
    ] = False,
    *,
    given: dict,
):
    """Train a class-conditional generator on DATA by denoising diffusion; draw samples and loss curves.

    What is not given is chosen from the kind of data and told. Example: gspn train-diffusion digits --out runs/digits
    """
    with readable_errors():
        from gspn.train.diffusion.task import resume_generator, train_generator

        if resume is not None:
            if run or config or overwrite:
                raise OptionError(
                    "--resume goes on in its own folder and options: not with --out, --config, --overwrite"
                )
            resume_generator(resume, given, data=data, console=out)
            return
        from_file = read_file(config) if config else {}
        data = data or from_file.pop("data", None)
        from_file = {name: value for name, value in from_file.items() if name not in ("data", "out")}
        GeneratorOptions.read(from_file, f"{config}: ")
        options = GeneratorOptions.read(from_file | given)
        if data is None:
            raise OptionError("Missing argument 'DATA'")
        run = run or Path("runs") / f"{Path(data).name or 'data'}-{(options.model or 'GSPN-micro/2').replace('/', '-')}"
        train_generator(data, run, options, overwrite=overwrite, console=out)
