"""The commands around generators: sample, encode, fid."""

import json

from rich.markup import escape
from rich.table import Table

from gspn.cli.app import command, err, out, progress_on, warn
from gspn.options import OptionError
from gspn.options.generators import EncodeOptions, FidOptions, SampleArguments
from gspn.places import check_out


@command("sample", SampleArguments)
def sample(options):
    """Draw samples of classes: PNG files, a grid with the classes' names, an npz file. A stopped call continues.

    torchrun runs it over several processes. Example: gspn sample runs/digits --out samples --classes 3,7 --guidance 2
    """
    from gspn.sampling.sample import sample
    from gspn.train.loop import make_accelerator

    main_process = make_accelerator().is_main_process
    made = sample(
        options.run, options.out, options, checkpoint=options.checkpoint, vae=options.vae, console=progress_on(out)
    )
    if main_process:
        rate = f", {made['made'] / made['seconds']:.2g} images/s" if made["made"] else ""
        out.print(f"{made['images']} samples, {made['made']} of them made now{rate}", highlight=False)
        out.print(f"in {options.out}: {', '.join(made['files'])}", markup=False, highlight=False)


@command("encode", EncodeOptions)
def encode_images(options):
    """Encode the images of DATA into files of latents, on which `gspn train-diffusion` trains.

    The same call continues after a stop. Several processes (torchrun) share the work.
    Example: gspn encode photos --vae models/vae --size 256 --out latents/photos
    """
    from gspn.data.unreadable import warning_of
    from gspn.sampling.encode import encode
    from gspn.train.loop import make_accelerator

    main_process = make_accelerator().is_main_process
    folder, values = options.out, options.values("data", "vae", "out", "split", "as_json")
    console = progress_on(err if options.as_json else out)
    latents = encode(options.data, options.vae, folder, splits=options.split, console=console, **values)
    if not main_process:
        return
    whole = {"train": "all"} if "all" in latents.splits else {}  # of which training holds out a part
    images = {name: len(latents.splits[whole.get(name, name)]) for name in latents.config["splits"]}
    shape = [latents.channels, *latents.size]
    if options.as_json:
        print(json.dumps({"out": str(folder), "images": images, "shape": shape, "unreadable": latents.unreadable}))
    else:
        counts = ", ".join(f"{count:,} ({name})" for name, count in images.items())
        out.print(f"in {folder}: {counts} latents of {'x'.join(map(str, shape))}", markup=False, highlight=False)
    if latents.unreadable:
        warn([warning_of(latents.unreadable)])


@command("fid", FidOptions)
def fid(options):
    """Compare samples with images: FID (or a named Frechet distance), KID, precision, recall, score.

    The same call continues after a stop; torchrun runs it over several processes.
    Example: gspn fid samples --reference digits --features classifier:runs/digits
    """
    for file, flag in ((options.out, "--out"), (options.save, "--save")):
        if file is not None:
            check_out(file.parent, flag)
    from gspn.files import check_absent, make_folder, write_json

    if options.out is not None:
        check_absent(options.out, overwrite=options.overwrite)
    from gspn.memory import enough_memory
    from gspn.metrics.fid import default_cache, evaluate_samples
    from gspn.train.loop import make_accelerator

    main_process = make_accelerator().is_main_process
    values = options.values("cache", "no_cache", "out", "as_json")
    values["cache"] = None if options.no_cache else options.cache or default_cache()
    with enough_memory(OptionError, f"{options.batch_size} images at a time", "lower --batch-size or --size"):
        result = evaluate_samples(**values, console=progress_on(err if options.as_json else out))
    if not main_process:
        return
    if options.as_json:
        print(json.dumps(result), flush=True)
    else:
        _print_comparison(result)
    warn(result["notes"])
    if options.out is not None:  # last, as the disk may be full by now
        make_folder(options.out.parent)
        write_json(options.out, result)


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
