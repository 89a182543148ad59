"""The commands around classifiers: eval, predict, show, export (of any run); what `gspn train` prints at its end."""

import json

from rich.markup import escape
from rich.table import Table

import gspn
from gspn.cli import segment
from gspn.cli.app import command, decoded, err, fail, out, progress_on, refuse, told, warn
from gspn.options import OptionError, far_from
from gspn.options.classifiers import EvalOptions, ExportOptions, PredictOptions, ShowOptions
from gspn.places import check_out, config_or_none, no_image
from gspn.progress import Progress

# The figures of evaluations that model cards show.
ON_CARDS = {"top1": "top-1 accuracy", "top5": "top-5 accuracy", "loss": "loss", "ece": "calibration error"}
ON_CARDS |= {"miou": "mean IoU", "pixel_accuracy": "pixel accuracy", "boundary_f1": "boundary F1"}
MAIN = {"classification": "top1", "segmentation": "miou"}  # the figure that each evaluation has


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


@command("eval", EvalOptions)
def evaluate(options):
    """Evaluate a run on DATA: top-1, top-5, loss, calibration, confusion, images per second.

    Of a run of segmentation: mean IoU, the IoU of each class, pixel accuracy, boundary F1, confusion.
    """
    task = _task_of(options.run)
    values = options.of_task(task)
    if options.out:
        check_out(options.out)
    if task == "segmentation":
        segment.evaluate(options, values)
        return
    from gspn.files import check_absent
    from gspn.memory import enough_memory
    from gspn.metrics.classification import evaluate, evaluation_files
    from gspn.train.loop import make_accelerator

    main_process = make_accelerator().is_main_process
    if options.out:  # before any work; evaluate checks each size only in its turn
        for size in options.sizes or ():
            check_absent(*evaluation_files(options.out, size), overwrite=options.overwrite)
    written = []
    for size in options.sizes or [None]:
        what = f"{options.batch_size} images" + (" of {}x{}".format(*size) if size else "") + " at a time"
        with enough_memory(OptionError, what, "lower --batch-size or --sizes"):
            metrics, warnings = evaluate(options.run, options.data, size=size, console=progress_on(err), **values)
        if not main_process:
            continue
        if options.out:
            written += [file.name for file in evaluation_files(options.out, metrics["size"])]
        if options.as_json:
            print(json.dumps(metrics, allow_nan=False), flush=True)
        else:
            _print_metrics(metrics, f"{options.run} on {options.data}")
        warn(warnings)
    if written and not options.as_json:
        out.print(f"in {options.out}: {', '.join(written)}", markup=False, highlight=False)


@command("predict", PredictOptions)
def predict(options):
    """Classify image files: the most probable classes with their probabilities.

    A missing or unreadable file is named on stderr with the reason, the others are classified, and the exit code is 1.
    With --json such a file has "error", the reason, instead of "classes".
    """
    images = options.images
    absent = {path: reason for path in images if (reason := no_image(path))}
    refuse(absent, options, "read")
    warn(f"{path}: {reason}" for path, reason in absent.items())  # now, because the rest takes time
    from gspn.runs import load_classifier

    classifier = load_classifier(options.run, options.checkpoint)
    answers, problems = [], dict(absent)
    with Progress("predicting", len(images), console=progress_on(err)) as bar:
        for number, path in enumerate(images):
            bar.update(number)
            image = None if path in problems else decoded(path, problems)
            if image is None:
                answers.append({"image": str(path), "error": problems[path]})
                continue
            (classes,) = classifier.rank(classifier.pixels(image)[None], options.top)
            answers.append({"image": str(path), "classes": [{"name": n, "probability": p} for n, p in classes]})
    refuse(problems, options, "read")
    if options.as_json:
        print(json.dumps(answers, allow_nan=False))
    else:
        for answer in answers:
            classes = "  ".join(f"{c['name']} {c['probability']:.1%}" for c in answer.get("classes", []))
            out.print(f"{answer['image']}: {classes or 'unreadable'}", markup=False, highlight=False)
    if problems:
        fail(told(problems, images, "read", known=absent), 1)


@command("show", ShowOptions)
def show(options):
    """Draw where the context of one pixel of IMAGE comes from, in each direction and merged.

    RUN is a run of gspn train or gspn train-segmentation."""
    image, picture = options.image, options.out or options.beside(f"context-{options.image.stem}.png")
    if reason := no_image(image):
        raise OptionError(f"{image} cannot be read as an image: {reason}")
    check_out(picture.parent)
    from gspn.files import check_absent, make_folder

    check_absent(picture, overwrite=options.overwrite)
    from gspn import plots
    from gspn.data.images import DataError

    loaded, problems = _classifier_or_segmenter(options.run, options.checkpoint), {}
    if (opened := decoded(image, problems)) is None:
        raise DataError(f"{image} cannot be read as an image: {problems[image]}")
    make_folder(picture.parent)
    try:
        plots.context(picture, loaded, opened, options.place, options.block, options.narrowest)
    except ValueError as error:  # no such pixel or block
        raise OptionError(str(error)) from error
    out.print(f"wrote {picture}", markup=False, highlight=False)


@command("export", ExportOptions)
def export_run(options):
    """Export a run for use without gspn (--onnx), compiled (--aoti), as a pipeline (--diffusers), for the hub (--hub).

    Classes, preprocessing and the model's configuration are kept in the file. A segmenter's output is the logits
    (batch, classes, height, width). Example: gspn export runs/first --onnx
    """
    run = options.run
    if options.diffusers:
        from gspn.sampling.generators import export_pipeline

        folder, checkpoint = options.out or options.beside("pipeline"), options.checkpoint or "last"  # as gspn sample
        check_out(folder.parent)
        export_pipeline(run, folder, checkpoint, options.vae, overwrite=options.overwrite)
        out.print(f"wrote {folder}, checkpoint {checkpoint}", markup=False, highlight=False)
        return
    if options.hub:
        _export_for_hub(options)
        return
    file = options.out or options.beside(f"model{options.suffix()}")
    check_out(file.parent)
    from gspn.files import check_absent, make_folder
    from gspn.runs import Classifier

    check_absent(file, overwrite=options.overwrite)
    given = {name: getattr(options, name) for name in ("size", "batch", "opset", "precision")}
    given = {name: value for name, value in given.items() if value is not None}
    loaded = _classifier_or_segmenter(run, options.checkpoint or "best")
    preprocessing = loaded.preprocessing.to_json()
    if isinstance(loaded, Classifier):
        given["metadata"] = {"class_names": loaded.classes, "preprocessing": preprocessing}
        if options.size and (far := far_from(options.size, loaded.preprocessing.size, "the run was trained at")):
            warn([far])
    else:
        given["metadata"] = {"class_names": loaded.classes.names, "classes": loaded.classes.to_json()}
        given["metadata"] |= {"preprocessing": preprocessing | {"scale": loaded.scale}}
    write = gspn.export_onnx if options.onnx else gspn.export_aoti
    make_folder(file.parent)
    try:
        with Progress("exporting", console=progress_on(err)):  # compiling takes minutes
            written = write(loaded.model, file, check=not options.no_check, **given)
    except ImportError as error:
        fail(str(error), 2)
    sizes = ", ".join("x".join(map(str, shape)) for shape in written.checked)
    checked = (
        f"differs by {written.difference:.0e} of the largest output at {sizes}"
        if not options.no_check
        else "not checked"
    )
    out.print(f"wrote {written.path}, {written.size_bytes / 1e6:.1f} MB, {checked}", markup=False, highlight=False)


def _classifier_or_segmenter(run, checkpoint):
    """Errors: RunError, which says what takes a run of another task."""
    from gspn.runs import load_classifier, load_segmenter
    from gspn.train.run import Run

    task = Run.open(run).check_task("classification", "segmentation")
    return (load_classifier if task == "classification" else load_segmenter)(run, checkpoint)


def _task_of(run):
    return (config_or_none(run / "config.json") or {}).get("task")


def _export_for_hub(options):
    task = _task_of(options.run)
    if task not in ("classification", "segmentation"):
        raise OptionError(f"--hub is for classifiers and segmenters, but {options.run} is a run of {task}")
    folder, checkpoint = options.out or options.beside("saved"), options.checkpoint or "best"
    check_out(folder)
    from gspn.files import check_absent, remove

    check_absent(folder, overwrite=options.overwrite)
    import torch

    from gspn.pretrained import CARD, Card
    from gspn.runs import load_run

    own = Card.read(options.run / CARD) or Card()  # of a saved model: it tells of the same weights
    told = Card(options.license, options.trained_on, _on_card(options.evaluation, task)).over(own)
    loaded = load_run(options.run, checkpoint)
    config, card = folder / "config.json", folder / CARD
    if card.is_dir():
        raise OptionError(f"{card} is a folder, expected the model's card: rename it, or choose another --out")
    # --overwrite also means a model of another class, which would be refused, and any card: what it tells of data and
    # metrics belongs to the old weights. The licence of a card that nobody changed is kept.
    other = (config_or_none(config) or {}).get("class") not in (None, loaded.model._saved_as)
    license = told.license or (Card.read(card) or Card()).license
    old = {file: file.read_bytes() for file in ([config, card] if other else [card]) if file.exists()}
    try:
        for file in old:
            remove(file)
        try:
            dtype = torch.float16 if options.precision == "fp16" else None
            loaded.save_pretrained(folder, dtype=dtype, license=license, data=told.data, metrics=told.metrics)
        except ValueError as error:  # weights too large for fp16, a config.json that is damaged
            raise OptionError(str(error)) from error
    except BaseException:
        for file, content in old.items():
            if not file.exists():
                file.write_bytes(content)
        raise
    out.print(f"wrote {folder}, checkpoint {checkpoint}; README.md is its card", markup=False, highlight=False)


def _on_card(file, task):
    """The figures of an evaluation of a run of `task`, as a model card names them. Errors: OptionError."""
    if file is None:
        return {}
    found = config_or_none(file)
    if found is None or not {"split", "images"} <= found.keys():
        raise OptionError(f"evaluation: {file} was not written by `gspn eval --out`")
    if MAIN[task] not in found:
        raise OptionError(
            f"evaluation: {file} holds no {ON_CARDS[MAIN[task]]}, expected an evaluation of a run of {task}"
        )
    of = f"{found['split']}, {found['images']} images"
    if (size := found.get("size")) != found.get("trained_size"):
        of += " at {}x{}".format(*size)
    if (scale := found.get("scale", 1)) != 1:
        of += f" at {scale:g} times their size"
    return {f"{name} ({of})": found[key] for key, name in ON_CARDS.items() if found.get(key) is not None}


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
