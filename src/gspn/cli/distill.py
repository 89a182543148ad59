"""The command around Stable Diffusion: distill."""

from pathlib import Path
from typing import Annotated

import typer

from gspn.cli.app import (
    ConfigFile,
    Overwrite,
    ResumedRun,
    app,
    arguments_of,
    check_resumed,
    out,
    readable_errors,
    takes_options,
    warn,
)
from gspn.options import OptionError
from gspn.places import check_named
from gspn.tasks.distill_options import DistillOptions


@app.command()
@takes_options(DistillOptions)
def distill(
    base: Annotated[
        str | None,
        typer.Argument(metavar="BASE", help="A Stable Diffusion or SDXL pipeline: a folder, or a name on the hub."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Images with captions: a folder with metadata.jsonl, .csv or .parquet or a .txt beside each image, "
            "tar files (webdataset), or what Hugging Face datasets loads.",
        ),
    ] = None,
    run: Annotated[Path | None, typer.Option("--out", help="The run folder to make. Default: runs/DATA-BASE.")] = None,
    config: ConfigFile = None,
    resume: ResumedRun = None,
    overwrite: Overwrite = False,
    *,
    given: dict,
):
    """Distil a Stable Diffusion or SDXL pipeline into one with GSPN in the place of self-attention.

    What gspn.load_swap(pipe, RUN) reads is in the run folder after every epoch that was the best so far.
    Example: gspn distill models/sd15 --data photos --out runs/sd15 --segment 4
    """
    with readable_errors():
        if base is not None:
            given = given | {"base": base}
        if resume is not None:
            check_resumed(resume, data, out=run, config=config, overwrite=overwrite)
            from gspn.tasks.distill import resume_distillation

            _report(*resume_distillation(resume, given, data=data, console=out))
            return
        data, run, options = arguments_of(DistillOptions, data, run, config, given)
        for name, value in {"argument 'BASE'": options.base, "option '--data'": data}.items():
            if value is None:
                raise OptionError(f"Missing {name}")
        check_named(options.base, "BASE", "the folder of a pipeline, or a name on the hub")
        check_named(data, "data", "images with captions: a folder, files, or a name on the hub")
        run = run or Path("runs") / f"{Path(data).name or 'data'}-{Path(options.base).name or 'base'}"
        from gspn.tasks.distill import distill

        _report(*distill(data, run, options, overwrite=overwrite, console=out))


def _report(run, warnings):
    """Tells, in the main process, what is where, and of what."""
    if run:
        warn(warnings)
        made = "gspn_swap.safetensors (for gspn.load_swap), checkpoints, options.yaml, metrics.jsonl, curves.png"
        out.print(f"in {run.path}: {made}", markup=False, highlight=False)
