"""Image classification: what `gspn train` runs, and `train_classifier` and `resume_classifier`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from rich.console import Console

from gspn import plots
from gspn.data.augment import SMALL, Augmentation, Mixing, preset_for
from gspn.data.images import UNREADABLE, DataError, Preprocessing, Split
from gspn.data.labelled import Data
from gspn.data.loader import can_be_kept, make_loader
from gspn.data.unreadable import Unreadable
from gspn.metrics.classification import classify, progress, warnings_of
from gspn.models import create_model
from gspn.options import OptionError
from gspn.options.classify import SPEC, ModelOptions, Options
from gspn.runs import load_classifier, preprocessing_of
from gspn.tasks.base import Setup as BaseSetup
from gspn.tasks.base import Training, describe_size, labelled_splits, open_with, parameters_of, resume, start, tried
from gspn.tasks.finetune import Source, open_source, start_from
from gspn.train.loop import autocast
from gspn.train.run import Run, RunError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TITLES = {"flip": "flip", "erase": "random erasing", "rand_augment": "RandAugment", "color_jitter": "colour jitter"}
TITLES |= {"mixup": "mixup", "cutmix": "cutmix"}


class Classification:
    """The Task of loop.py: cross-entropy on labelled images."""

    def __init__(self, train_split, eval_split, eval_loader, preprocessing, class_names, options, mixing=None):
        self.unreadable = Unreadable({"train": train_split, "evaluation": eval_split}, options.strict)
        self.loader, self.preprocessing, self.class_names = eval_loader, preprocessing, class_names
        self.smoothing = options.label_smoothing
        self.format = torch.channels_last if options.channels_last else torch.contiguous_format
        self.mixing = mixing

    def prepare(self, batch):
        label = batch["label"]
        self.unreadable.saw(batch)
        image = self.preprocessing.normalize(batch["image"]).contiguous(memory_format=self.format)
        if self.mixing is None:
            return {"image": image, "label": label}
        image, target = self.mixing(image, label)
        return {"image": image, "target": target}

    def count(self, batch):
        return batch["target"].sum() if "target" in batch else (batch["label"] != UNREADABLE).sum()

    def loss(self, model, batch):
        logits = model(batch["image"]).float()
        if "target" in batch:
            return -(batch["target"] * logits.log_softmax(1)).sum()
        return F.cross_entropy(
            logits, batch["label"], label_smoothing=self.smoothing, ignore_index=UNREADABLE, reduction="sum"
        )

    def evaluate(self, model, accelerator):
        self.unreadable.look()
        outcome = classify(model, self.loader, self.preprocessing, accelerator)
        self.unreadable.note("evaluation", outcome.index[outcome.label == UNREADABLE].tolist())
        return {f"val_{k}" if k == "loss" else k: v for k, v in outcome.metrics(self.class_names).items()} | {
            "unreadable_in_training": self.unreadable.gather()
        }

    def state(self):
        return {"unreadable": self.unreadable.state()}

    def restore(self, state):
        self.unreadable.restore(state["unreadable"])

    def score(self, metrics):
        return [metrics["top1"], -metrics["val_loss"]]  # of equally good ones, that of the lower loss

    def pictures(self):
        return {}

    def line(self, row):
        top5 = "" if row["top5"] is None else f"  top-5 {row['top5']:.2%}"
        return (
            f"epoch {row['epoch']:3d}  loss {row['train_loss']:.3f}  validation loss {row['val_loss']:.3f}  "
            f"top-1 {row['top1']:.2%}{top5}  {row['images_per_second']:.0f} images/s  {row['seconds']:.1f} s"
        )


@dataclass(kw_only=True)
class Setup(BaseSetup):
    """A classifier and its data.

    Attributes, beside those of the base: `converts`: images are converted to `options.channels`. `source`: the weights
    of --init-from. `begun_from`: when resuming, the digest of those that the run began with.
    """

    spec: ClassVar = SPEC

    class_names: list[str]
    preprocessing: Preprocessing
    options: Options
    augmentation: Augmentation
    mixing: Mixing | None
    converts: bool
    source: Source | None = None
    begun_from: str | None = None

    def for_file(self):
        return self.options if self.converts else replace(self.options, channels=None)

    @classmethod
    def of(cls, where: str | Path, options: Options, *, resuming: bool = False) -> "Setup":
        data, source = open_with(where, options), None
        if options.init_from and not resuming:
            channels = options.channels or data.for_training()[0].channels()
            source = open_source(options.init_from, options.model, options.model_args, channels)
        converts = options.channels is not None
        refuse_one_class(data, data.for_training()[0])
        train_split, eval_split, eval_name, class_names = labelled_splits(data)
        preprocessing, options, notes = settle(options, data.kind, train_split, source)
        return cls(
            data=data,
            train_split=train_split,
            eval_split=eval_split,
            eval_name=eval_name,
            class_names=class_names,
            preprocessing=preprocessing,
            options=options,
            augmentation=Augmentation.of(options, data.kind, preprocessing.size),
            mixing=Mixing.of(options, len(class_names)),
            notes=[*data.notes, *notes],
            converts=converts,
            source=source,
        )

    def model(self, device) -> torch.nn.Module:
        """A new model. Errors: OptionError."""
        return build_model(self.options, self.preprocessing, len(self.class_names), device)

    def first_weights(self, model) -> str | None:
        """Copies the weights of --init-from into it; returns a note on them. Errors: OptionError, RunError."""
        if not self.options.init_from:
            return None
        if self.source is None:  # resuming a run that has no checkpoint yet
            self.source = open_source(
                self.options.init_from, self.options.model, self.options.model_args, self.preprocessing.channels
            )
            if self.source.digest(like=self.begun_from) != self.begun_from:
                raise RunError(f"{self.source.where} does not hold the weights that the run started from")
        return start_from(self.source, model, self.class_names, self.data.where)

    def config(self, model) -> dict:
        return {
            "model": model.config,
            "preprocessing": self.preprocessing.to_json(),
            "class_names": self.class_names,
            "data": {"converts": self.converts},
            "init_from": self.source and self.source.digest(),
        }

    def check_config(self, config) -> None:
        """Takes over the run's preprocessing, and the digest of the weights it began with."""
        self.preprocessing = preprocessing_of(config, config["model"]["in_chans"])
        self.begun_from = config.get("init_from")

    def about(self, model):
        options = self.options
        augmentation = [options.augment] * (options.augment != "none")
        augmentation += [title for name, title in TITLES.items() if getattr(options, name) not in (0, "none")]
        if options.rand_augment != "none" and options.color_jitter:
            augmentation.remove(TITLES["color_jitter"])  # RandAugment takes its place
        return (
            f"{options.model}, {parameters_of(model)}",
            f"of {len(self.class_names)} classes, {describe_size(self.preprocessing)}",
            (f"preset {options.preset}", f"augmentation {' + '.join(augmentation) or 'none'}"),
        )

    def reads_without_workers(self) -> bool:
        return self.options.epochs > 1 and can_be_kept(self.train_split, self.preprocessing, self.augmentation)

    def train(self, training: Training) -> tuple[Run, dict, list[str]]:
        """Trains, evaluates the best checkpoint, draws the pictures."""
        options, preprocessing, class_names = self.options, self.preprocessing, self.class_names
        size, workers, accelerator = options.batch_size, options.workers, training.accelerator
        loader = make_loader(
            self.train_split,
            preprocessing,
            size,
            train=True,
            augmentation=self.augmentation,
            seed=options.seed,
            workers=workers,
            keep=options.epochs > 1,
        )
        eval_loader = accelerator.prepare(
            make_loader(self.eval_split, preprocessing, size, workers=workers, keep=options.epochs > 1)
        )
        splits = self.train_split, self.eval_split
        task = Classification(*splits, eval_loader, preprocessing, class_names, options, self.mixing)
        training.loop(task, loader, options)

        accelerator.wait_for_everyone()  # the checkpoint is written
        classifier = load_classifier(training.path)
        bar = progress(len(self.eval_split), accelerator, training.console)
        with bar, autocast(accelerator.device, options.precision):
            outcome = classify(classifier.model.to(accelerator.device), eval_loader, preprocessing, accelerator, bar)
        metrics = outcome.metrics(class_names)
        if run := training.run:
            plots.curves(run)
            path, split = run.path / "predictions.png", self.eval_split
            plots.predictions(path, split, outcome, preprocessing, class_names, self.eval_name)
            first = int(outcome.index[outcome.label != UNREADABLE][0])
            plots.context(run.path / "context.png", classifier, split.image(first))
        return classifier.run, metrics, warnings_of(metrics, list(task.unreadable.problems.values()))


def refuse_one_class(data: Data, split: Split) -> None:
    """Raises DataError if all training images are of one class."""
    present = split.labels.unique().tolist()
    if len(present) < 2:
        name = split.class_names[present[0]] if split.class_names else present[0]
        expected = f"expected several class folders, {data.where}/CLASS/IMAGE" if data.kind == "folder" else ""
        raise DataError(
            f"all {len(split)} training images of {data.where} are of one class, {name!r}: "
            f"{expected or 'expected two classes at least'}"
        )


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
        data: see labelled.open_data.
        out: the run folder: new, empty, or with `overwrite` an earlier run.
        options: Options. console: rich's, or None for silence.
    Returns: (Run, metrics of the best checkpoint, list of warnings).
    Errors: BusyError, DataError, OptionError, RunError, SaveError, TrainingError.
    """
    return start(Setup, data, out, options or Options(), overwrite=overwrite, console=console)


def resume_classifier(
    path: str | Path,
    changes: Mapping[str, Any] | None = None,
    *,
    data: str | Path | None = None,
    console: Console | None = None,
) -> tuple[Run, dict, list[str]]:
    """Continues a training that was stopped, see gspn.tasks.base.resume. Returns and errors: as train_classifier."""
    return resume(Setup, path, changes, data=data, console=console)


def settle(
    options: Options, kind: str, split: Split, source: Source | None = None
) -> tuple[Preprocessing, Options, list[str]]:
    """Replaces None in `options` by what fits `split`, of data of that kind, and the weights `source`.

    Returns: (Preprocessing, Options, notes)."""
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

    model = options.model or (source and source.name) or ("gspn_micro" if channels == 1 else "gspn_mobile")
    arguments = dict(options.model_args)
    if source and source.model_args:
        arguments = {**source.model_args, **arguments}
    elif model in ("gspn_micro", "gspn_mobile") and "stem_stride" not in arguments:
        arguments["stem_stride"] = 1 if max(size) <= 16 else 2 if small else 4
    name, preset, notes = preset_for(kind, size, len(split), model, options.preset)
    if scale := preset.get("scale_lr"):
        factor = (options.batch_size or preset["batch_size"]) / scale
        preset = preset | {rate: preset[rate] * factor for rate in ("lr", "min_lr", "warmup_lr")}
    options = replace(options, size=size, channels=channels, model=model, model_args=arguments, preset=name)
    return preprocessing, options.resolved(preset), notes


def build_model(
    options: ModelOptions,
    preprocessing: Preprocessing,
    num_classes: int,
    device: torch.device | str = "cpu",
    make: Callable[..., torch.nn.Module] = create_model,
    pixels: tuple[int, ...] = (),
) -> torch.nn.Module:
    """The model for these data that `make` makes, on `device` and tried there on one empty image. It has to give a
    number for each class, of an image or of each of `pixels` (H,W). Errors: OptionError."""
    arguments = {"num_classes": num_classes, "in_chans": preprocessing.channels, **options.model_args}
    if arguments["in_chans"] != preprocessing.channels:
        raise OptionError(
            f"the model takes {arguments['in_chans']} channels, but the images have {preprocessing.channels}; "
            f"--channels {arguments['in_chans']} converts them"
        )
    if arguments["num_classes"] != num_classes:
        raise OptionError(f"the model has {arguments['num_classes']} classes, but the data have {num_classes}")
    torch.manual_seed(options.seed)
    layout = torch.channels_last if options.channels_last else torch.preserve_format
    try:
        model = make(options.model, **arguments).to(device, memory_format=layout)
    except (RuntimeError, TypeError, ValueError) as error:
        raise OptionError(f"the model {options.model} cannot be made: {error}") from error
    with tried(options.model, f"an image of {describe_size(preprocessing)} on {device}"), torch.inference_mode():
        found = model.eval()(torch.zeros(1, preprocessing.channels, *preprocessing.size, device=device)).shape
    if tuple(found) != (wanted := (1, num_classes, *pixels)):
        given = ", ".join(f"{name}={value!r}" for name, value in options.model_args.items())
        raise OptionError(
            f"{options.model} with {given} gives an output of shape {tuple(found)} for one image: expected {wanted}"
        )
    return model
