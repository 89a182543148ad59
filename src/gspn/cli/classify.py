"""The commands around classifiers: eval, predict, show, export; and what `gspn train` prints at its end."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

import gspn
from gspn.cli.app import (
    AsJson,
    Channels,
    Checkpoint,
    ClassNames,
    Data,
    ImageColumn,
    LabelColumn,
    MovedVae,
    Replace,
    RunFolder,
    Strict,
    Workers,
    app,
    check_data,
    err,
    fail,
    out,
    parsed,
    readable_errors,
    warn,
)
from gspn.options import OptionError, far_from, parse_names, parse_size
from gspn.places import check_run, missing
from gspn.progress import Progress


def report(spec, path, trained, metrics, warnings):
    """Prints, in the main process, the result of `gspn train`."""
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    metrics["split"] = trained.config["data"]["split"]
    _print_metrics(metrics, f"the best checkpoint of {path}, chosen on these images")
    if trained.metrics:
        rows = trained.metrics
        waited, took = (sum(row.get(name, 0) for row in rows) for name in ("data_seconds", "seconds"))
        rate = sum(row["images_per_second"] for row in rows) / len(rows)
        out.print(f"{rate:.0f} images/s; waiting for data {waited / max(took, 1e-9):.0%} of the time", highlight=False)
    made = "checkpoints, options.yaml, metrics.jsonl, curves.png, predictions.png, context.png"
    out.print(f"in {path}: {made}", markup=False, highlight=False)
    warn(warnings)


@app.command("eval")
def evaluate(
    run: RunFolder,
    data: Data,
    split: Annotated[str | None, typer.Option(help="train, val, test or all. Default: test, else val.")] = None,
    checkpoint: Checkpoint = "best",
    batch_size: Annotated[int, typer.Option(help="Images per batch.")] = 256,
    sizes: Annotated[
        str | None, typer.Option(metavar="N|HxW,...", help="Input sizes, evaluated in turn. Default: that of the run.")
    ] = None,
    channels: Channels = None,
    class_names: ClassNames = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    streaming: Annotated[bool | None, typer.Option("--streaming", help="datasets: rows as they come.")] = None,
    workers: Workers = 2,
    strict: Strict = False,
    folder: Annotated[
        Path | None, typer.Option("--out", help="A folder for evaluation-HxW.json and confusion-HxW.png.")
    ] = None,
    overwrite: Replace = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one line per size.")] = False,
):
    """Evaluate a run on DATA: top-1, top-5, loss, calibration, confusion, images per second."""
    with readable_errors():
        check_run(run)
        check_data(data)
        from gspn.files import check_absent
        from gspn.metrics.classification import evaluate, evaluation_files
        from gspn.train.loop import make_accelerator

        main_process = make_accelerator().is_main_process
        names = parsed("class-names", parse_names, class_names)
        wanted = [None] if sizes is None else [parsed("sizes", parse_size, each) for each in sizes.split(",")]
        for size in wanted if folder and sizes else ():  # before any work; evaluate checks each size only in its turn
            check_absent(*evaluation_files(folder, size), overwrite=overwrite)
        written = []
        for size in wanted:
            metrics, warnings = evaluate(
                run,
                data,
                split=split,
                checkpoint=checkpoint,
                batch_size=batch_size,
                channels=channels,
                size=size,
                workers=workers,
                strict=strict,
                out=folder,
                overwrite=overwrite,
                console=err,
                class_names=names,
                image_column=image_column,
                label_column=label_column,
                streaming=streaming,
            )
            if not main_process:
                continue
            written += [name.format(*metrics["size"]) for name in ("evaluation-{}x{}.json", "confusion-{}x{}.png")]
            if as_json:
                print(json.dumps(metrics), flush=True)
            else:
                _print_metrics(metrics, f"{run} on {data}")
            warn(warnings)
        if folder and main_process and not as_json:
            out.print(f"in {folder}: {', '.join(written)}", markup=False, highlight=False)


@app.command()
def predict(
    run: RunFolder,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files of any kind.")],
    top: Annotated[int, typer.Option(min=1, help="Number of classes to print.")] = 5,
    checkpoint: Checkpoint = "best",
    strict: Strict = False,
    as_json: AsJson = False,
):
    """Classify image files: the most probable classes with their probabilities.

    A missing or unreadable file is named on stderr with the reason, the others are classified, and the exit code is 1.
    With --json such a file has "error", the reason, instead of "classes".
    """
    with readable_errors():
        check_run(run)
        absent = {path: reason for path in images if (reason := missing(path))}
        _refuse(absent, images, strict)
        warn(f"{path}: {reason}" for path, reason in absent.items())  # now, because the rest takes time
        from gspn.data.images import decode
        from gspn.runs import load_classifier

        classifier = load_classifier(run, checkpoint)
        answers, problems = [], dict(absent)
        with Progress("predicting", len(images), console=err) as bar:
            for number, path in enumerate(images):
                bar.update(number)
                if path not in absent:
                    try:
                        pixels = classifier.preprocessing(decode(path))
                    except Exception as error:  # Pillow raises anything on damaged files
                        problems[path] = getattr(error, "strerror", None) or str(error)
                if path in problems:
                    answers.append({"image": str(path), "error": problems[path]})
                    continue
                (classes,) = classifier.rank(pixels[None], top)
                answers.append({"image": str(path), "classes": [{"name": n, "probability": p} for n, p in classes]})
        _refuse(problems, images, strict)
        if as_json:
            print(json.dumps(answers))
        else:
            for answer in answers:
                classes = "  ".join(f"{c['name']} {c['probability']:.1%}" for c in answer.get("classes", []))
                out.print(f"{answer['image']}: {classes or 'unreadable'}", markup=False, highlight=False)
        if problems:
            fail(_told(problems, images, known=absent), 1)


def _told(problems, images, known=()):
    """What `predict` says of images that it cannot read, reasons by path; but for those that are `known`."""
    named = "".join(f"\n  {path}: {reason}" for path, reason in problems.items() if path not in known)
    return f"{len(problems)} of {len(set(images))} images could not be read{':' * bool(named)}{named}"


def _refuse(problems, images, strict):
    """Raises OptionError where nothing can be classified, or, strictly, not everything."""
    if problems and (strict or len(problems) == len(set(images))):
        raise OptionError(_told(problems, images))


@app.command()
def show(
    run: RunFolder,
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="An image file.")],
    place: Annotated[
        str | None, typer.Option(metavar="ROW,COL", help="The pixel, in the model's input. Default: the center.")
    ] = None,
    block: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER|NAME",
            help="The block: its index, negative from the end, or its name. Default: the last on a fine map.",
        ),
    ] = None,
    checkpoint: Checkpoint = "best",
    picture: Annotated[
        Path | None, typer.Option("--out", help="The PNG to write. Default: RUN/context-IMAGE.png.")
    ] = None,
    overwrite: Replace = False,
):
    """Draw where the context of one pixel of IMAGE comes from, in each direction and merged."""
    with readable_errors():
        check_run(run)
        if reason := missing(image):
            raise OptionError(f"{image} cannot be read as an image: {reason}")
        picture = picture or run / f"context-{image.stem}.png"
        from gspn.files import check_absent

        check_absent(picture, overwrite=overwrite)
        from gspn import plots as pictures
        from gspn.data.images import decode
        from gspn.data.labelled import DataError
        from gspn.runs import load_classifier

        classifier = load_classifier(run, checkpoint)
        try:
            opened = decode(image)
        except Exception as error:  # Pillow raises anything on damaged files
            raise DataError(f"{image} cannot be read as an image: {error}") from error
        try:
            pictures.context(picture, classifier, opened, parse_place(place), parse_block(block))
        except ValueError as error:  # no such pixel or block
            raise OptionError(str(error)) from error
        out.print(f"wrote {picture}", markup=False, highlight=False)


@app.command("export")
def export_run(
    run: RunFolder,
    onnx: Annotated[bool, typer.Option("--onnx", help="An ONNX file of standard operators, for any runtime.")] = False,
    aoti: Annotated[
        bool, typer.Option("--aoti", help="A package compiled for this CPU; needs torch and gspn.")
    ] = False,
    diffusers: Annotated[
        bool, typer.Option("--diffusers", help="A generator as a folder for GSPNPipeline.from_pretrained.")
    ] = False,
    file: Annotated[
        Path | None,
        typer.Option("--out", help="The file to write. Default: RUN/model.onnx, RUN/model.pt2 or RUN/pipeline."),
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Which checkpoint: best or last. Default: best; of a generator last.")
    ] = None,
    vae: MovedVae = None,
    size: Annotated[
        str | None, typer.Option(help="N or HxW: fix the input size of the file. Default: any size.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Fix the batch size of the file. Default: any.")] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX: opset version. Default: 20.")] = None,
    precision: Annotated[str | None, typer.Option(help="ONNX: fp32 (default) or fp16.")] = None,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Do not compare the file's outputs with the model's.")
    ] = False,
    overwrite: Replace = False,
):
    """Export a run for use without gspn (--onnx), compiled ahead of time (--aoti), or as a pipeline (--diffusers).

    Classes, preprocessing and the model's configuration are kept in the file. Example: gspn export runs/first --onnx
    """
    with readable_errors():
        if onnx + aoti + diffusers != 1:
            raise OptionError("choose one of --onnx and --aoti, or --diffusers for a generator")
        check_run(run)
        special = {name: value for name, value in (("opset", opset), ("precision", precision)) if value is not None}
        if diffusers:
            given = [*special, *(name for name, value in (("size", size), ("batch", batch)) if value is not None)]
            if given or no_check:
                raise OptionError(f"--{given[0] if given else 'no-check'} is for --onnx and --aoti")
            from gspn.sampling.generators import export_pipeline

            checkpoint = checkpoint or "last"  # as gspn sample
            export_pipeline(run, file or run / "pipeline", checkpoint, vae, overwrite=overwrite)
            out.print(f"wrote {file or run / 'pipeline'}, checkpoint {checkpoint}", markup=False, highlight=False)
            return
        if vae is not None:
            raise OptionError("--vae is for --diffusers")
        if aoti and special:
            raise OptionError(f"--{next(iter(special))} is for --onnx")
        from gspn.files import check_absent
        from gspn.runs import load_classifier

        file = file or run / ("model.onnx" if onnx else "model.pt2")
        check_absent(file, overwrite=overwrite)
        classifier = load_classifier(run, checkpoint or "best")
        metadata = {"class_names": classifier.classes, "preprocessing": classifier.preprocessing.to_json()}
        write = gspn.export_onnx if onnx else gspn.export_aoti
        shape = {"size": parsed("size", parse_size, size), "batch": batch}
        if shape["size"] and (far := far_from(shape["size"], classifier.preprocessing.size, "the run was trained at")):
            warn([far])
        options = {**shape, "metadata": metadata, "check": not no_check, **special}
        try:
            with Progress("exporting", console=err):  # compiling takes minutes
                written = write(classifier.model, file, **options)
        except ImportError as error:
            fail(str(error), 2)
        sizes = ", ".join("x".join(map(str, shape)) for shape in written.checked)
        checked = "not checked" if no_check else f"differs by {written.difference:.0e} of the largest output at {sizes}"
        out.print(f"wrote {written.path}, {written.size_bytes / 1e6:.1f} MB, {checked}", markup=False, highlight=False)


def parse_place(text):
    """(row, column) from "ROW,COL"."""
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise typer.BadParameter(f"--place takes ROW,COL in pixels of the model's input, got {text!r}")
    return int(parts[0]), int(parts[1])


def parse_block(text):
    """A number as such; else the text, which is a name."""
    return int(text) if text is not None and text.removeprefix("-").isdecimal() else text


def _print_metrics(metrics, title):
    table = Table(title=escape(title), show_header=False, title_justify="left")
    at = " at {}x{}".format(*metrics["size"]) if "size" in metrics else ""
    table.add_row("images", f"{metrics['images']:,} ({metrics['split']}){at}")
    table.add_row("top-1", f"{metrics['top1']:.2%}")
    if metrics["top5"] is not None:
        table.add_row("top-5", f"{metrics['top5']:.2%}")
    table.add_row("loss", f"{metrics['loss']:.4f}")
    table.add_row("calibration error", f"{metrics['ece']:.2%}")
    if "images_per_second" in metrics:
        both = f"{metrics['images_per_second']:.0f} with reading, {metrics['model_images_per_second']:.0f} without"
        table.add_row("images/s", both)
    out.print(table)
