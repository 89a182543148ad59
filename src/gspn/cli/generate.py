"""The commands around generators: sample, encode, fid."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from gspn.cli.app import (
    AsJson,
    ClassNames,
    Data,
    ImageColumn,
    LabelColumn,
    MovedVae,
    Replace,
    Strict,
    Workers,
    app,
    check_data,
    err,
    out,
    parsed,
    readable_errors,
    takes_options,
    warn,
)
from gspn.options import OptionError, parse_names, parse_size
from gspn.options.training import DATA_HELP
from gspn.places import check_file, check_named, check_run
from gspn.sampling.options import SampleOptions


@app.command()
@takes_options(SampleOptions)
def sample(
    source: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run of `gspn train-diffusion`, or a saved GSPNPipeline.")
    ],
    folder: Annotated[Path, typer.Option("--out", help="The folder to make or to continue.")],
    checkpoint: Annotated[str, typer.Option(help="Which checkpoint of the run: last or best.")] = "last",
    vae: MovedVae = None,
    *,
    overrides: dict,
):
    """Draw samples of classes: PNG files, a grid with the classes' names, an npz file. A stopped call continues.

    Over several processes with torchrun. Example: gspn sample runs/digits --out samples --classes 3,7 --guidance 2
    """
    with readable_errors():
        if not (source.expanduser() / "model_index.json").exists():  # a saved pipeline has one
            check_run(source.expanduser())
        _check_vae(vae)
        options = SampleOptions.read(overrides)
        from gspn.sampling.sample import sample
        from gspn.train.loop import make_accelerator

        main_process = make_accelerator().is_main_process
        made = sample(source, folder, options, checkpoint=checkpoint, vae=vae, console=out)
        if main_process:
            rate = f", {made['made'] / made['seconds']:.2g} images/s" if made["made"] else ""
            out.print(f"{made['images']} samples, {made['made']} of them made now{rate}", highlight=False)
            out.print(f"in {folder}: {', '.join(made['files'])}", markup=False, highlight=False)


@app.command("encode")
def encode_images(
    data: Data,
    vae: Annotated[
        str, typer.Option(metavar="PATH|NAME", help="An AutoencoderKL of diffusers: a folder, or a name on the hub.")
    ],
    size: Annotated[str, typer.Option(metavar="N|HxW", help="Size to which images are resized before encoding.")],
    folder: Annotated[Path, typer.Option("--out", help="The folder to make or to continue.")],
    flip: Annotated[bool, typer.Option("--flip", help="Encode the mirrored images too.")] = False,
    dtype: Annotated[str, typer.Option(help="Dtype of the stored latents: fp32, bf16 or fp16.")] = "fp32",
    precision: Annotated[str, typer.Option(help="Precision of the VAE: fp32, or bf16 for autocast.")] = "fp32",
    shard_size: Annotated[int, typer.Option(help="Images per file.")] = 4096,
    batch_size: Annotated[int, typer.Option(help="Images per batch.")] = 32,
    split: Annotated[list[str] | None, typer.Option(help="train, val or test; repeatable. Default: all.")] = None,
    val_fraction: Annotated[float, typer.Option(help="Fraction to hold out where DATA has no evaluation split.")] = 0.1,
    class_names: ClassNames = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="datasets: rows as they come.")] = False,
    workers: Workers = 2,
    strict: Strict = False,
    as_json: AsJson = False,
):
    """Encode the images of DATA into files of latents, on which `gspn train-diffusion` trains.

    The same call continues after a stop. Several processes (torchrun) share the work.
    Example: gspn encode photos --vae models/vae --size 256 --out latents/photos
    """
    with readable_errors():
        check_data(data)
        _check_vae(vae)
        from gspn.data.unreadable import warning_of
        from gspn.sampling.encode import encode
        from gspn.train.loop import make_accelerator

        main_process = make_accelerator().is_main_process
        latents = encode(
            data,
            vae,
            folder,
            size=parsed("size", parse_size, size),
            flip=flip,
            dtype=dtype,
            precision=precision,
            shard_size=shard_size,
            batch_size=batch_size,
            splits=split or None,
            workers=workers,
            strict=strict,
            console=err if as_json else out,
            val_fraction=val_fraction,
            class_names=parsed("class-names", parse_names, class_names),
            image_column=image_column,
            label_column=label_column,
            streaming=streaming,
        )
        if not main_process:
            return
        images = {name: len(split) for name, split in latents.splits.items() if name != "all"}
        shape = [latents.channels, *latents.size]
        if as_json:
            print(json.dumps({"out": str(folder), "images": images, "shape": shape, "unreadable": latents.unreadable}))
        else:
            counts = ", ".join(f"{count:,} ({name})" for name, count in images.items())
            out.print(f"in {folder}: {counts} latents of {'x'.join(map(str, shape))}", markup=False, highlight=False)
        if latents.unreadable:
            warn([warning_of(latents.unreadable)])


@app.command()
def fid(
    samples: Annotated[
        str,
        typer.Argument(
            metavar="SAMPLES",
            help="What `gspn sample` made, a folder of image files, an npz file as ADM's evaluation takes it, or DATA.",
        ),
    ],
    reference: Annotated[
        str,
        typer.Option(
            metavar="DATA", help="The reference: as SAMPLES, or a file of statistics (of --save, or with mu and sigma)."
        ),
    ],
    features: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="inception[,FILE], classifier:RUN or timm:MODEL[,FILE]. Only with inception is it called FID.",
        ),
    ] = "inception",
    size: Annotated[
        str | None, typer.Option(metavar="N|HxW", help="Size at which to compare. Default: that of the reference.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of the reference. Default: train.")] = None,
    samples_split: Annotated[
        str | None, typer.Option(help="Split of samples that are DATA. Default: test, else val.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images per batch.")] = 64,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Cache of statistics, by a digest of the images. Default: ~/.cache/gspn/fid.", metavar="FOLDER"
        ),
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Use no cache.")] = False,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save the reference's statistics, for --reference.")
    ] = None,
    file: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the result as JSON.")] = None,
    overwrite: Replace = False,
    class_names: ClassNames = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    workers: Workers = 2,
    strict: Strict = False,
    as_json: AsJson = False,
):
    """Compare samples with images: FID (or a named Frechet distance), KID, precision, recall, score.

    The same call continues after a stop; torchrun runs it over several processes.
    Example: gspn fid samples --reference digits --features classifier:runs/digits
    """
    with readable_errors():
        if no_cache and cache:
            raise OptionError("choose one of --cache and --no-cache")
        for images, what in ((samples, "SAMPLES"), (reference, "reference")):
            a_file = Path(images).suffix in (".npz", ".safetensors")
            (check_file if a_file else check_named)(images, what, f"samples, images, an npz file, or DATA: {DATA_HELP}")
        kind, _, rest = features.partition(":")
        if kind == "classifier" and rest:
            check_run(rest)
        elif "," in features:
            check_file(features.partition(",")[2], "features", "a file of weights after the comma")
        from gspn.files import check_absent, write_json

        if file is not None:
            check_absent(file, overwrite=overwrite)
        from gspn.metrics.fid import default_cache, evaluate_samples
        from gspn.train.loop import make_accelerator

        main_process = make_accelerator().is_main_process
        result = evaluate_samples(
            samples,
            reference,
            features,
            samples_split=samples_split,
            split=split,
            size=parsed("size", parse_size, size),
            batch_size=batch_size,
            workers=workers,
            strict=strict,
            cache=None if no_cache else cache or default_cache(),
            save=save,
            overwrite=overwrite,
            console=err if as_json else out,
            class_names=parsed("class-names", parse_names, class_names),
            image_column=image_column,
            label_column=label_column,
        )
        if not main_process:
            return
        if file is not None:
            write_json(file, result)
        if as_json:
            print(json.dumps(result))
        else:
            _print_comparison(result)
        warn(result["notes"])


def _check_vae(vae):
    if vae is not None:
        check_named(vae, "vae", "the folder of an AutoencoderKL, or a name on the hub")


def _print_comparison(result):
    """The table of `gspn fid`."""
    sets = [result["samples"], result["reference"]]
    told = [f"{each['where']}{' (' + each['split'] + ')' if each['split'] else ''}" for each in sets]
    table = Table(title=escape(f"{told[0]} against {told[1]}"), show_header=False, title_justify="left")
    counts = ["?" if each["images"] is None else f"{each['images'] - each['unreadable']:,}" for each in sets]
    table.add_row("images", f"{counts[0]} against {counts[1]}, at {'x'.join(map(str, result['size']))}")
    for key, name in result["names"].items():
        value, other = result[key], result.get(f"reference_{key}")
        percent = key in ("precision", "recall", "accuracy")
        shown, beside = (_figure(each, percent) for each in (value, other))
        if value is not None:
            table.add_row(escape(name), f"{shown} (reference {beside})" if other is not None else shown)
    out.print(table)
    out.print(f"resized {result['resized']}", markup=False, highlight=False)


def _figure(value, percent):
    if isinstance(value, dict):
        return f"{value['mean']:.5g} ± {value['std']:.2g}"
    return None if value is None else f"{value:.2%}" if percent else f"{value:.5g}"
