"""Samples of a trained generator, by one process or several (`gspn sample`).

All randomness of sample i is a function of (seed, i). It does not depend on batch, number of processes or
interruptions; another batch size may change rounding in the last bit. A batch is a range of consecutive samples; if it
was interrupted, only the missing images are written.
"""

import itertools
import json
import math
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from rich.console import Console

from gspn.data.images import decode, generator
from gspn.digests import digest, settings, tensors_of
from gspn.files import make_folder, remove, write_json, writing
from gspn.memory import enough_memory
from gspn.models.latents import NotFiniteError
from gspn.models.pipeline import last_steps
from gspn.options import OptionError, far_from
from gspn.options.generators import PER_CLASS, SampleOptions
from gspn.places import check_out, expanded
from gspn.plots import GRID_CLASSES, GRID_COLUMNS, draw_grid, save_picture
from gspn.progress import Progress
from gspn.sampling.generators import cast, load_pipeline, named_scheduler, unclipped
from gspn.sampling.sample_folder import ABOUT, ARRAYS, GRID, IMAGES, Samples
from gspn.train.loop import TrainingError, make_accelerator
from gspn.train.run import RunError

ALWAYS = (0.0, 1.0)  # the parts of all timesteps that are guided by default
EARLY = 0.88  # part of all timesteps that the first step has to reach


def sample(
    source: str | Path,
    out: str | Path,
    options: SampleOptions | None = None,
    *,
    checkpoint: str = "last",
    vae: str | Path | None = None,
    console: Console | None = None,
) -> dict:
    """Samples a generator into the folder `out`, or makes what is missing there. More images can be asked for later.

    Args:
        source, checkpoint, vae: see load_pipeline. options: SampleOptions. console: rich's; None is silent.
        out: the folder: new, empty, or begun with the same generator and options.
    Returns: {"images", "made" (by this call, all processes), "seconds", "folder", "files"}, in every process.
    Errors: BusyError, OptionError, RunError, SaveError; TrainingError where memory does not suffice or values are not
        finite.
    """
    options = options or SampleOptions()
    accelerator, out = make_accelerator(), expanded(out)
    check_out(out)
    pipeline = load_pipeline(source, checkpoint, vae)
    wanted, notes = _plan(pipeline, out, options)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(accelerator.device)
    if options.precision == "bf16":
        cast(pipeline.transformer, torch.bfloat16)
    if pipeline.vae is not None:
        pipeline.vae.enable_slicing()  # decodes an image at a time, which bounds the memory
    main = accelerator.is_main_process
    for note in notes if console and main else ():
        console.print(f"note: {note}", markup=False, highlight=False)
    _check_folder(wanted)
    accelerator.wait_for_everyone()  # until all have checked the folder
    start = time.perf_counter()
    with writing(out) if main else nullcontext():
        batches = None
        if main:
            _check_folder(wanted)  # again: another process may have begun it since
            _begin(wanted)
            batches = _batches(wanted, options.batch_size)
        [batches] = broadcast_object_list([batches])
        made = sum(len(missing) for _, missing in batches)
        _make(pipeline, wanted, options, batches, accelerator, console if main else None)
        accelerator.wait_for_everyone()
        seconds = time.perf_counter() - start
        files = [IMAGES]
        if main:
            files += _finish(wanted, options)
        [files] = broadcast_object_list([files])
    return {"images": wanted.count, "made": made, "seconds": seconds, "folder": str(out), "files": files}


# -- what to make --


def _plan(pipeline, out, options):
    """(the Samples to make, notes for the user). Sets the pipeline's scheduler."""
    count = pipeline.num_classes
    names = [pipeline.id2label.get(i, str(i)) for i in range(count)]
    classes = _classes(pipeline, options.classes, names)
    if options.count and options.per_class:
        raise OptionError(f"count {options.count} and per_class {options.per_class} exclude each other: give one")
    number = options.count or (options.per_class or PER_CLASS) * len(classes)
    own = pipeline.scheduler
    if options.scheduler:
        pipeline.scheduler = named_scheduler(options.scheduler, own, options.steps)
    size = options.size or (None, None)
    try:
        dilated = {"dilation": options.dilation, "dilate_from": options.dilate_from}
        moved = {"timestep_shift": options.timestep_shift, "guidance_interval": _interval(options)}
        _, shape = pipeline.check_inputs(classes, options.guidance, options.steps, *size, **dilated, **moved)
        full = tuple(side * pipeline.vae_scale_factor for side in shape[2:])
        small = None if options.enlarge is None else _first_size(pipeline, classes, options, full)
    except ValueError as error:
        raise OptionError(str(error)) from error
    scheduler = pipeline.scheduler
    settings = {
        "weights": _digest(pipeline, like=_weights_told(out)),
        "guidance": options.guidance,
        "steps": options.steps,
        "size": list(full),
        "scheduler": {"class": type(scheduler).__name__, **_plain(scheduler.config)},
        "seed": options.seed,
        "precision": options.precision,
    }
    if options.dilation != 1:  # absent else, as in folders that were made before there was dilation
        settings |= dilated
    if options.timestep_shift != 1:
        settings["timestep_shift"] = options.timestep_shift
    if moved["guidance_interval"] != ALWAYS:
        settings["guidance_interval"] = list(moved["guidance_interval"])
    if small is not None:
        settings |= {"enlarge": options.enlarge, "first_size": list(small)}
    notes = [
        *options.idle(),
        unclipped(scheduler, own),
        _late_start(scheduler, options.steps),
        far_from(settings["size"], pipeline.native_size, "the generator was trained at"),
    ]
    settings = json.loads(json.dumps(settings))  # as a file gives it back
    return Samples(out, settings, number, classes, names), [note for note in notes if note]


def _first_size(pipeline, classes, options, size):
    """(H, W) of the images that are enlarged to `size`: the same proportions, about as many pixels as in training.

    Errors: ValueError, OptionError."""
    unit = pipeline.transformer.config.patch_size * pipeline.vae_scale_factor
    native = pipeline.native_size
    factor = (math.prod(size) / math.prod(native)) ** 0.5
    small = tuple(max(1, round(side / factor / unit)) * unit for side in size)
    if math.prod(small) >= math.prod(size):
        raise OptionError(
            f"enlarge is for images larger than in training, {native[0]}x{native[1]}, but these are {size[0]}x{size[1]}"
        )
    if not last_steps(options.steps, options.enlarge):
        raise OptionError(f"enlarge: {options.enlarge:g} of {options.steps} steps is no step, choose more of either")
    start = torch.zeros(len(classes), _channels(pipeline), 1, 1)
    again = {"image": start, "strength": options.enlarge, "timestep_shift": options.timestep_shift}
    pipeline.check_inputs(classes, options.guidance, options.steps, *size, **again)
    return small


def _interval(options):
    """The parts of all timesteps between which there is guidance."""
    return ALWAYS if options.guidance_interval is None else tuple(options.guidance_interval)


def _channels(pipeline):
    """The number of channels of images."""
    return pipeline.transformer.config.in_channels if pipeline.vae is None else pipeline.vae.config.in_channels


def _late_start(scheduler, steps):
    """A note where the first of `steps` steps assumes an image that is not all noise; it names the nearest number of
    steps that avoids this. Leaves the scheduler set to `steps`."""
    last, firsts = scheduler.config.num_train_timesteps, {}
    for count in [*(n for n in range(1, last + 1) if last % n == 0), steps]:
        try:
            scheduler.set_timesteps(count)
        except ValueError:  # some schedulers refuse few steps
            continue
        firsts[count] = int(scheduler.timesteps[0])
    good = [count for count, first in firsts.items() if first >= EARLY * last]
    if steps in good or not good or steps not in firsts:
        return None
    better = min(good, key=lambda count: abs(count - steps))
    return (
        f"with {steps} steps {type(scheduler).__name__} begins at timestep {firsts[steps]} of {last}, where an image "
        f"is not all noise yet; with {better} it begins at {firsts[better]}, which is better"
    )


def _classes(pipeline, text, names):
    if text.strip() == "all" and "all" not in names:
        return list(range(pipeline.num_classes))
    classes, parts = [], [part.strip() for part in text.split(",")]
    whole = {tuple(part.strip() for part in name.split(",")): name for name in names}
    most = max(map(len, whole))
    while parts:
        # names may hold commas: the longest one comes first
        count = next((n for n in range(most, 1, -1) if len(parts) >= n and tuple(parts[:n]) in whole), 1)
        part, parts = whole.get(tuple(parts[:count]), parts[0]), parts[count:]
        try:
            classes += pipeline.get_label_ids(int(part) if part.isdecimal() and part not in names else part)
        except ValueError as error:
            raise OptionError(f"classes: {error}") from error
    if len(set(classes)) < len(classes):
        raise OptionError(f"classes names a class twice: {text!r}")
    return classes


def _plain(config):
    """The entries of a scheduler's config that samples depend on, as JSON gives them back."""
    return {key: value for key, value in sorted(config.items()) if not key.startswith("_") and value is not None}


def _digest(pipeline, like=None):
    """A digest of weights and settings of transformer and VAE, in the scheme of `like`."""
    models = [part for part in (pipeline.transformer, pipeline.vae) if part is not None]
    parts = [part for model in models for part in tensors_of(model.state_dict())]
    return digest([*parts, *map(settings, models)], like)


def _weights_told(folder):
    """The stored digest of the weights that made the samples in the folder, if there are any."""
    return Samples.open(folder).settings.get("weights") if (folder / ABOUT).exists() else None


def _check_folder(wanted):
    """Raises RunError unless the samples can go into their folder."""
    folder = wanted.folder
    if not (folder / ABOUT).exists():
        if folder.exists() and any(not file.name.startswith(".") for file in folder.iterdir()):
            raise RunError(f"{folder} is not empty and holds no samples (no {ABOUT}): choose another folder")
        return
    before = Samples.open(folder)
    pairs = [(name, getattr(before, name), getattr(wanted, name)) for name in ("classes", "class_names")]
    for name in {**wanted.settings, **before.settings}:  # some are only there where they are used
        was, value = before.settings.get(name), wanted.settings.get(name)
        if isinstance(value, dict) and isinstance(was, dict):  # the scheduler's config: what differs in it
            pairs += [(f"{name} {key}", was.get(key), value.get(key)) for key in ("class", *sorted({*was, *value}))]
        else:
            pairs.append((name, was, value))
    for name, was, value in pairs:
        if was != value:
            what = "other weights" if name == "weights" else _differs(name, was, value)
            raise RunError(f"the samples in {folder} were made with {what}: choose another folder")
    if before.count > wanted.count:
        raise RunError(f"{folder} is of {before.count} samples, more than {wanted.count}: choose another folder")


def _differs(name, was, value):
    was, value = (None if each is None else _short(str(each)) for each in (was, value))
    if was is None or value is None:
        return f"no {name}, not {value}" if was is None else f"{name} {was}, not without it"
    return f"{name} {was}, not {value}"


def _short(text):
    return text if len(text) < 200 else text[:200] + " ..."


def _begin(wanted):
    if (wanted.folder / ABOUT).exists() and Samples.open(wanted.folder).count < wanted.count:
        for name in (GRID, ARRAYS):  # of fewer samples
            remove(wanted.folder / name)
    write_json(wanted.folder / ABOUT, wanted.about())  # first, so that an interrupted folder is recognised
    make_folder(wanted.folder / IMAGES)


def _batches(wanted, size):
    """[(numbers of a batch, those of them to be written), ...]. Batches begin at multiples of their size, so that
    an interrupted batch is made again with the same images."""
    batches = {}
    for i in wanted.missing():
        batches.setdefault(i // size * size, []).append(i)
    return [(list(range(at, min(at + size, wanted.count))), missing) for at, missing in batches.items()]


# -- making them --


def _make(pipeline, wanted, options, batches, accelerator, console):
    """Makes the batches of this process: of n processes each takes every n-th batch."""
    own = batches[accelerator.process_index :: accelerator.num_processes]
    total, done = sum(len(missing) for _, missing in batches), 0
    scheduler = pipeline.scheduler
    steps = len(scheduler.timesteps) + last_steps(options.steps, options.enlarge or 0) * scheduler.order
    with Progress("sampling", total, console=console) as bar:
        for numbers, missing in own:
            share = len(missing) * accelerator.num_processes  # the others are about as far
            taken = itertools.count(1)

            def step(pipeline, i, t, tensors, done=done, share=share, taken=taken):
                at = next(taken)
                bar.update(min(round(done + share * at / steps, 1), total), f"step {at}/{steps}")

            pixels = _images(pipeline, wanted, options, numbers, step)
            images = pipeline.numpy_to_pil(pixels)
            for i in missing:
                save_picture(wanted.path(i), images[numbers.index(i)])
            done += share


def _images(pipeline, wanted, options, numbers, step):
    """float32 (B,H,W,C) in [0, 1]. Errors: TrainingError."""
    height, width = wanted.settings["size"]
    labels, start = [wanted.label(i) for i in numbers], {}
    common = {"generator": [generator(options.seed, i) for i in numbers], "callback_on_step_end": step}
    common["guidance_interval"] = _interval(options)
    what = f"{len(numbers)} images of {height}x{width} at a time"
    try:
        with enough_memory(TrainingError, what, "lower --batch-size; the samples made so far are kept"):
            if "first_size" in wanted.settings:
                small = pipeline(
                    labels, options.guidance, options.steps, *wanted.settings["first_size"], output_type="pt", **common
                )
                start = {"image": small.images, "strength": options.enlarge}
            return pipeline(
                labels,
                options.guidance,
                options.steps,
                height,
                width,
                output_type="np",
                dilation=options.dilation,
                dilate_from=options.dilate_from,
                timestep_shift=options.timestep_shift,
                **start,
                **common,
            ).images
    except NotFiniteError as error:
        wrong = [str(numbers[i]) for i in error.images]
        shown = ", ".join(wrong[:5]) + ", ..." * (len(wrong) > 5)
        raise TrainingError(f"cannot make sample{'s' * (len(wrong) > 1)} {shown}: {error}") from error


def _finish(wanted, options):
    """Writes the files on all samples. Returns their names."""
    files = []
    if options.npz:
        files.append(wanted.write_arrays().name)
    if options.grid:
        save_picture(wanted.folder / GRID, _grid(wanted))
        files.insert(0, GRID)
    return files


def _grid(wanted):
    shown = range(min(wanted.count, GRID_COLUMNS * len(wanted.classes)))  # they take turns
    classes = set(sorted({wanted.label(i) for i in shown})[:GRID_CLASSES])
    shown = [i for i in shown if wanted.label(i) in classes]
    images, labels = [decode(wanted.path(i)) for i in shown], [wanted.label(i) for i in shown]
    settings = wanted.settings
    height, width = settings["size"]
    between = "from {:g} to {:g} ".format(*settings["guidance_interval"]) if "guidance_interval" in settings else ""
    title = (
        f"{height}x{width}, guidance {settings['guidance']:g} {between}".rstrip() + f", {settings['steps']} steps of "
        f"{settings['scheduler']['class'].removesuffix('Scheduler')}, seed {settings['seed']}"
        + (f", shift {settings['timestep_shift']:g}" if "timestep_shift" in settings else "")
        + (f", dilation {settings['dilation']}" if "dilation" in settings else "")
        + (f", enlarged, {settings['enlarge']:g} of the steps again" if "enlarge" in settings else "")
    )
    return draw_grid(images, labels, wanted.class_names, title=title)
