"""Image classification: the task for the loop, and `train_classifier`, which is what `gspn train` runs."""

import platform
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console

import gspn
from gspn.models import create_model
from gspn.train import pictures
from gspn.train.checkpoint import Run
from gspn.train.data import DataError, open_data
from gspn.train.evaluate import OPEN_OPTIONS, classify, load_classifier, warnings_of
from gspn.train.images import UNREADABLE, Preprocessing
from gspn.train.loader import make_loader
from gspn.train.loop import autocast, make_accelerator, train
from gspn.train.options import OptionError, Options, file_text
from gspn.train.recipe import Augmentation

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL = 96  # images of at most this many pixels a side keep their size and are not cropped
PRESETS = {  # what Options leaves open, by kind of data
    "digits": dict(epochs=12, lr=4e-3, batch_size=128, warmup=2.0, ema=0.98, flip=False, augment="shift"),
    "idx": dict(epochs=8, lr=3e-3, batch_size=128, warmup=0.5, ema=0.998, flip=False, augment="shift"),
    "small": dict(epochs=30, lr=2e-3, batch_size=128, warmup=2.0, ema=0.998, flip=True, augment="shift"),
    "photos": dict(epochs=100, lr=1e-3, batch_size=128, warmup=5.0, ema=0.9995, flip=True, augment="crop"),
}


class Classification:
    """The Task of loop.py: cross-entropy on labelled images."""

    best = "top1"

    def __init__(self, train_split, eval_split, eval_loader, preprocessing, class_names, options):
        self.splits = {"train": train_split, "evaluation": eval_split}
        self.loader, self.preprocessing, self.class_names = eval_loader, preprocessing, class_names
        self.smoothing, self.strict = options.label_smoothing, options.strict
        self.problems = {}  # an unreadable image's name and what is wrong with it, by split and index

    def loss(self, model, batch):
        self.note_unreadable("train", batch["index"], batch["label"])
        logits = model(self.preprocessing.normalize(batch["image"]))
        total = F.cross_entropy(
            logits.float(), batch["label"], label_smoothing=self.smoothing, ignore_index=UNREADABLE, reduction="sum"
        )
        return total / (batch["label"] != UNREADABLE).sum().clamp(min=1)

    def evaluate(self, model, accelerator):
        outcome = classify(model, self.loader, self.preprocessing, accelerator)
        self.note_unreadable("evaluation", outcome.index, outcome.label)
        return {f"val_{k}" if k == "loss" else k: v for k, v in outcome.metrics(self.class_names).items()} | {
            "unreadable_in_training": sum(split == "train" for split, _ in self.problems)
        }

    def note_unreadable(self, split, index, label):
        for i in index[label == UNREADABLE].tolist():
            if (split, i) not in self.problems:
                self.problems[split, i] = self.splits[split].problem(i)
            if self.strict:
                raise DataError(f"unreadable image (--strict): {self.problems[split, i]}")

    def line(self, row):
        top5 = "" if row["top5"] is None else f"  top-5 {row['top5']:.2%}"
        return (
            f"epoch {row['epoch']:3d}  loss {row['train_loss']:.3f}  validation loss {row['val_loss']:.3f}  "
            f"top-1 {row['top1']:.2%}{top5}  {row['images_per_second']:.0f} images/s  {row['seconds']:.1f} s"
        )


# -- train --


def train_classifier(
    data: str | Path,
    out: str | Path,
    options: Options | None = None,
    *,
    overwrite: bool = False,
    console: Console | None = None,
) -> tuple[Run, dict, list[str]]:
    """Trains a classifier on `data` into the run folder `out`, evaluates its best checkpoint, draws the pictures.

    Args:
        data: see data.open_data.
        out: the run folder; not to exist, to be empty, or an earlier run with `overwrite`.
        options: Options. console: rich's, or None for silence.
    Returns: (Run, metrics of the best checkpoint, list of warnings).
    Errors: DataError, OptionError, RunError, SaveError, TrainingError.
    """
    accelerator, options = make_accelerator(), options or Options()
    console = console if accelerator.is_main_process else None

    def say(text):
        if console:
            console.print(text, markup=False, highlight=False)

    Run.check_free(out, overwrite)
    open_options = {name: getattr(options, name) for name in OPEN_OPTIONS}
    data_set = open_data(data, **open_options)
    train_split, eval_split, eval_name = data_set.for_training()
    class_names = train_split.class_names or [str(i) for i in range(int(train_split.labels.max()) + 1)]
    train_split, eval_split = train_split.relabelled(class_names), eval_split.relabelled(class_names)
    converts = options.channels is not None
    preprocessing, options = settle(options, data_set.kind, train_split)
    model = build_model(options, preprocessing, len(class_names), accelerator.device)
    count = sum(parameter.numel() for parameter in model.parameters())
    for note in data_set.notes:
        say(f"note: {note}")
    say(
        f"{options.model}, {count:,} parameters; {len(train_split):,} training and {len(eval_split):,} {eval_name} "
        f"images of {len(class_names)} classes, {describe(preprocessing)}\n"
        f"{options.epochs} epochs, batch size {options.batch_size}, learning rate {options.lr:g}, EMA {options.ema:g}, "
        f"{options.precision}, augmentation {options.augment}{' and flip' * options.flip}, seed {options.seed}"
    )

    config = {
        "task": "classification",
        "model": model.config,
        "preprocessing": preprocessing.to_json(),
        "class_names": class_names,
        "data": {
            "where": data_set.where,
            "kind": data_set.kind,
            "split": eval_name,
            "converts": converts,
            **open_options,
        },
        "options": asdict(options),
        "seed": options.seed,
        "versions": {"gspn": gspn.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    accelerator.wait_for_everyone()  # all have found the folder free
    text = file_text(options, {"data": str(data)})
    run = Run.create(out, config, overwrite, options=text) if accelerator.is_main_process else None

    try:
        shift = max(max(preprocessing.size) // 8, 1) if options.augment == "shift" else 0
        fill = "zero" if data_set.kind in ("digits", "idx") else "reflect"
        augmentation = Augmentation(shift, fill, options.flip, options.augment == "crop")
        size, seed, workers = options.batch_size, options.seed, options.workers
        loader = make_loader(
            train_split, preprocessing, size, train=True, augmentation=augmentation, seed=seed, workers=workers
        )
        eval_loader = accelerator.prepare(make_loader(eval_split, preprocessing, size, workers=workers))
        task = Classification(train_split, eval_split, eval_loader, preprocessing, class_names, options)
        train(task, model, loader, options, run, accelerator, console)
    except BaseException:
        if run and run.restore_earlier():
            say(f"the run that was in {out} is there again, as this training has no checkpoint")
        raise

    accelerator.wait_for_everyone()  # the checkpoint is written
    classifier = load_classifier(out)
    with autocast(accelerator.device, options.precision):
        outcome = classify(classifier.model.to(accelerator.device), eval_loader, preprocessing, accelerator)
    metrics = outcome.metrics(class_names)
    if accelerator.is_main_process:
        pictures.curves(run)
        pictures.predictions(run.path / "predictions.png", eval_split, outcome, preprocessing, class_names, eval_name)
        first = int(outcome.index[outcome.label != UNREADABLE][0])
        pictures.context(run.path / "context.png", classifier, eval_split.image(first))
    return classifier.run, metrics, warnings_of(metrics, list(task.problems.values()))


def settle(options, kind, split):
    """(Preprocessing, Options without None) for training on `split`, data of that kind."""
    channels = options.channels or split.channels()
    if options.size is not None:
        size = options.size
    elif split.pixels is not None:
        size = tuple(split.pixels.shape[2:])
    else:
        sizes = {(image.height, image.width) for image in split.sample()}
        size = sizes.pop() if len(sizes) == 1 else (224, 224)
        size = size if max(size) <= SMALL else (224, 224)
    small = max(size) <= SMALL
    if split.pixels is not None and split.pixels.shape[1] == channels:
        pixels = split.pixels.float() / 255
        mean, std = pixels.mean((0, 2, 3)).tolist(), pixels.std((0, 2, 3)).clamp(min=1e-3).tolist()
    else:
        mean, std = IMAGENET_MEAN, IMAGENET_STD
        if channels == 1:
            mean, std = (sum(mean) / 3,), (sum(std) / 3,)
    preprocessing = Preprocessing(channels, size, mean, std, crop=1.0 if small else 0.875)
    preset = PRESETS[kind if kind in PRESETS else "small" if small else "photos"]
    options = replace(options, size=size, channels=channels).settled(preset)
    if options.model == "gspn_micro" and "stem_stride" not in options.model_args:
        stride = 1 if max(size) <= 16 else 2 if small else 4
        options = replace(options, model_args={**options.model_args, "stem_stride": stride})
    return preprocessing, options


def build_model(
    options: Options, preprocessing: Preprocessing, num_classes: int, device: torch.device | str = "cpu"
) -> torch.nn.Module:
    """The model for these data, on `device` and tried there on one empty image. Errors: OptionError."""
    arguments = {"num_classes": num_classes, "in_chans": preprocessing.channels, **options.model_args}
    if arguments["in_chans"] != preprocessing.channels:
        raise OptionError(
            f"the model is to take {arguments['in_chans']} channels, but the images have {preprocessing.channels}; "
            f"--channels {arguments['in_chans']} converts them"
        )
    if arguments["num_classes"] != num_classes:
        raise OptionError(f"the model is to tell {arguments['num_classes']} classes, but the data have {num_classes}")
    torch.manual_seed(options.seed)
    try:
        model = create_model(options.model, **arguments).to(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise OptionError(f"the model {options.model} cannot be made: {error}") from error
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, preprocessing.channels, *preprocessing.size, device=device))
    except (RuntimeError, ValueError) as error:
        what = f"an image of {describe(preprocessing)} on {device}"
        raise OptionError(f"{options.model} fails when tried with {what}: {error}") from error
    return model


def describe(preprocessing):
    """'28x28, grey'."""
    return f"{preprocessing.size[0]}x{preprocessing.size[1]}, {'grey' if preprocessing.channels == 1 else 'colour'}"
