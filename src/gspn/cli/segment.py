"""The command `gspn segment`, and what `gspn eval` does with a run of segmentation."""

import json

from rich.markup import escape
from rich.table import Table

from gspn.cli.app import command, decoded, err, fail, out, progress_on, refuse, told, warn
from gspn.options import OptionError
from gspn.options.segment import SegmentArguments
from gspn.places import RunError, check_out, no_image

AT_ONCE = 16  # images that are read at a time, at most: they are large, and segmented one by one


def evaluate(options, values):
    """`gspn eval` of a run of segmentation. `values`: the arguments of metrics.segmentation.evaluate."""
    from gspn.memory import enough_memory
    from gspn.metrics.segmentation import evaluate, evaluation_files
    from gspn.train.loop import make_accelerator

    main_process = make_accelerator().is_main_process
    values["batch_size"] = min(values["batch_size"], AT_ONCE)
    with enough_memory(OptionError, f"{values['batch_size']} images at a time", "lower --batch-size or --scale"):
        metrics, warnings = evaluate(options.run, options.data, console=progress_on(err), **values)
    if not main_process:
        return
    if options.as_json:
        print(json.dumps(metrics, allow_nan=False), flush=True)
    else:
        _print_metrics(metrics, f"{options.run} on {options.data}")
        if options.out:
            files = ", ".join(file.name for file in evaluation_files(options.out))
            out.print(f"in {options.out}: {files}", markup=False, highlight=False)
    warn(warnings)


def _print_metrics(metrics, title):
    table = Table(title=escape(title), show_header=False, title_justify="left")
    at = "" if metrics["scale"] == 1 else f", seen at {metrics['scale']:g} times their size"
    table.add_row("images", f"{metrics['images']:,} ({metrics['split']}){at}")
    table.add_row("mean IoU", f"{metrics['miou']:.2%}")
    table.add_row("pixel accuracy", f"{metrics['pixel_accuracy']:.2%}")
    if metrics["boundary_f1"] is not None:
        table.add_row("boundary F1", f"{metrics['boundary_f1']:.2%}")
    table.add_row("loss", f"{metrics['loss']:.4f}")
    both = f"{metrics['images_per_second']:.3g} with reading, {metrics['model_images_per_second']:.3g} without"
    table.add_row("images/s", both)
    for name, value in metrics["iou"].items():
        table.add_row(f"IoU {escape(name)}", "nan (no pixel)" if value is None else f"{value:.2%}")
    out.print(table)


@command("segment", SegmentArguments)
def segment(options):
    """Give each pixel of image files a class: a mask as an indexed PNG, and an overlay with a legend.

    An image of any size is taken in one go if it fits into --max-memory (what it takes is estimated beforehand), and
    otherwise in overlapping tiles. Example: gspn segment runs/street photo.jpg --out masks --max-memory 2GB
    """
    absent = {path: reason for path in options.images if (reason := no_image(path))}
    folder = options.out or options.beside("segmented")
    check_out(folder)
    from gspn.files import check_absent

    files = {path: (folder / f"{path.stem}-mask.png", folder / f"{path.stem}-overlay.png") for path in options.images}
    if len({mask for mask, _ in files.values()}) < len(files):
        raise OptionError("two of the images have the same name but for folder and ending: segment them one by one")
    check_absent(*(file for pair in files.values() for file in pair), overwrite=options.overwrite)
    refuse(absent, options, "segmented")
    warn(f"{path}: {reason}" for path, reason in absent.items())
    import numpy as np

    from gspn import plots, plots_masks
    from gspn.memory import is_out_of_memory
    from gspn.runs import load_segmenter

    segmenter = load_segmenter(options.run, options.checkpoint)
    names, answers, problems = segmenter.classes.names, [], dict(absent)
    for path, (mask_file, overlay_file) in files.items():
        image = None if path in problems else decoded(path, problems)
        if image is None:
            refuse(problems, options, "segmented")
            answers.append({"image": str(path), "error": problems[path]})
            continue
        said = []
        bound = segmenter.allowed_bytes(image) if options.max_memory is None else options.max_memory
        try:
            numbers = segmenter.numbers(image, bound, said.append)
        except RunError:  # the weights are damaged, so no image can be segmented
            raise
        except (ValueError, RuntimeError, MemoryError) as error:  # it does not fit
            if not isinstance(error, ValueError) and not is_out_of_memory(error):
                raise
            lines = str(error).splitlines() or ["memory does not suffice"]
            problems[path] = f"{lines[0]} (--max-memory)"
            refuse(problems, options, "segmented")
            answers.append({"image": str(path), "error": problems[path]})
            continue
        plots.save_picture(mask_file, segmenter.classes.picture(numbers))
        plots.save_picture(overlay_file, plots_masks.overlay(image, numbers, segmenter.classes))
        shares = np.bincount(numbers.ravel(), minlength=len(names)) / numbers.size
        answer = {"image": str(path), "size": [image.height, image.width], "how": said[0]}
        answer |= {"mask": str(mask_file), "overlay": str(overlay_file)}
        answers.append(answer | {"classes": dict(zip(names, shares.tolist(), strict=True))})
        if not options.as_json:
            most = sorted(answers[-1]["classes"].items(), key=lambda each: -each[1])[:5]
            shown = "  ".join(f"{name} {share:.1%}" for name, share in most if share)
            size = f"{image.height}x{image.width}"
            out.print(f"{path} ({size}, {said[0]}): {shown}", markup=False, highlight=False)
    if options.as_json:
        print(json.dumps(answers, allow_nan=False))
    else:
        out.print(f"in {folder}: *-mask.png, *-overlay.png", markup=False, highlight=False)
    if problems:
        fail(told(problems, options.images, "segmented", known=absent), 1)
