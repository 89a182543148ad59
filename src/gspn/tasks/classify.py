"""Image classification: the task for the loop, and `train_classifier` and `resume_classifier`, which are what
`gspn train` runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console

from gspn import plots as pictures
from gspn.data.augment import SMALL, Augmentation, Mixing, preset_for
from gspn.data.images import UNREADABLE, Preprocessing, Split
from gspn.data.labelled import Data, DataError
from gspn.data.loader import make_loader
from gspn.data.unreadable import Unreadable
from gspn.metrics.classification import classify, progress, warnings_of
from gspn.models import create_model
from gspn.options import OptionError, Options
from gspn.runs import load_classifier
from gspn.tasks.base import describe_size, open_with, resume, start
from gspn.tasks.finetune import Source, open_source, start_from
from gspn.train.loop import autocast, train
from gspn.train.run import Run, RunError

TASK = "classification"  # in a run's config.json
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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


# -- train --


@dataclass
class Setup:
    """What a classifier is trained on and with: the data, and options that leave nothing open."""

    data: Data
    train_split: Split
    eval_split: Split
    eval_name: str
    class_names: list[str]
    preprocessing: Preprocessing
    options: Options
    augmentation: Augmentation
    mixing: Mixing | None
    notes: list[str]
    converts: bool
    source: Source | None = None
    begun_from: str | None = None  # the digest of the weights of init_from, in a run that is gone on with

    @classmethod
    def begin(cls, data: str | Path, options: Options) -> "Setup":
        """For a new training on `data`: with the weights that it starts from."""
        data_set, source = open_with(data, options), None
        if options.init_from:
            channels = options.channels or data_set.splits["train"].channels()
            source = open_source(options.init_from, options.model, options.model_args, channels)
        return cls.of(data_set, options, source)

    @classmethod
    def again(cls, data: str | Path, options: Options) -> "Setup":
        """For a training that is gone on with."""
        return cls.of(open_with(data, options), options)

    @classmethod
    def of(cls, data_set: Data, options: Options, source: Source | None = None) -> "Setup":
        """Settles the options for these data. Errors: DataError, OptionError."""
        converts = options.channels is not None
        train_split, eval_split, eval_name = data_set.for_training()
        refuse_one_class(data_set, train_split)
        class_names = train_split.class_names or [str(i) for i in range(int(train_split.labels.max()) + 1)]
        train_split, eval_split = train_split.relabelled(class_names), eval_split.relabelled(class_names)
        preprocessing, options, notes = settle(options, data_set.kind, train_split, source)
        return cls(
            data_set,
            train_split,
            eval_split,
            eval_name,
            class_names,
            preprocessing,
            options,
            Augmentation.of(options, data_set.kind, preprocessing.size),
            Mixing.of(options, len(class_names)),
            [*data_set.notes, *notes],
            converts=converts,
            source=source,
        )

    def model(self, device) -> torch.nn.Module:
        """A new model. Errors: OptionError."""
        return build_model(self.options, self.preprocessing, len(self.class_names), device)

    def first_weights(self, model) -> str | None:
        """Copies the weights of --init-from into it; a note on them. Errors: OptionError."""
        if not self.options.init_from:
            return None
        if self.source is None:  # of a run that is gone on with and has no checkpoint yet
            self.source = open_source(
                self.options.init_from, self.options.model, self.options.model_args, self.preprocessing.channels
            )
            if self.source.digest(like=self.begun_from) != self.begun_from:
                raise RunError(f"{self.source.where} holds other weights than those that the run started from")
        return start_from(self.source, model, self.class_names, self.data.where)

    def config(self, model) -> dict:
        """What config.json keeps of a classifier."""
        return {
            "model": model.config,
            "preprocessing": self.preprocessing.to_json(),
            "class_names": self.class_names,
            "data": {"converts": self.converts},
            "init_from": self.source and self.source.digest(),
        }

    def check_config(self, config) -> None:
        """Takes over the run's preprocessing, and which weights it began from."""
        self.preprocessing = Preprocessing(**config["preprocessing"])
        self.begun_from = config.get("init_from")

    def describe(self, model) -> str:
        options, count = self.options, sum(parameter.numel() for parameter in model.parameters())
        return (
            f"{options.model}, {count:,} parameters; {len(self.train_split):,} training and {len(self.eval_split):,} "
            f"{self.eval_name} images of {len(self.class_names)} classes, {describe_size(self.preprocessing)}\n"
            f"{options.epochs} epoch{'s' * (options.epochs > 1)}, batch size {options.batch_size}, "
            f"learning rate {options.lr:g}, EMA {options.ema:g}, {options.precision}, preset {options.preset}, "
            f"augmentation {options.augment}{' and flip' * bool(options.flip)}, seed {options.seed}"
        )


def refuse_one_class(data: Data, split: Split) -> None:
    """Raises DataError for training images that are all of one class."""
    present = split.labels.unique().tolist()
    if len(present) < 2:
        name = split.class_names[present[0]] if split.class_names else present[0]
        expected = f"expected several class folders, {data.where}/CLASS/IMAGE" if data.kind == "folder" else ""
        raise DataError(
            f"all {len(split)} training images of {data.where} are of one class, {name!r}, which leaves nothing to "
            f"learn: {expected or 'expected two classes at least'}"
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
        data: see data.open_data.
        out: the run folder; not to exist, to be empty, or an earlier run with `overwrite`.
        options: Options. console: rich's, or None for silence.
    Returns: (Run, metrics of the best checkpoint, list of warnings).
    Errors: BusyError, DataError, OptionError, RunError, SaveError, TrainingError.
    """
    options = options or Options()
    return start(TASK, Setup.begin, _train, data, out, options, overwrite=overwrite, console=console)


def resume_classifier(
    path: str | Path,
    changes: Mapping[str, Any] | None = None,
    *,
    data: str | Path | None = None,
    console: Console | None = None,
) -> tuple[Run, dict, list[str]]:
    """Goes on with a training that was stopped, from its last checkpoint, exactly as if it had not been.

    Args:
        path: the run folder. data: where the data are now, if they were moved. console: as in train_classifier.
        changes: options by name that change nothing of the result, such as the number of workers.
    Returns and errors: as train_classifier; OptionError also for changes of the result, RunError also where data,
    checkpoint and run do not belong together.
    """
    return resume(TASK, Setup.again, _train, path, changes, Options, data=data, console=console)


def _train(setup, model, out, run, accelerator, console, checkpoint):
    """Trains, evaluates the best checkpoint, draws the pictures."""
    options, preprocessing, class_names = setup.options, setup.preprocessing, setup.class_names
    size, workers = options.batch_size, options.workers
    loader = make_loader(
        setup.train_split,
        preprocessing,
        size,
        train=True,
        augmentation=setup.augmentation,
        seed=options.seed,
        workers=workers,
    )
    eval_loader = accelerator.prepare(make_loader(setup.eval_split, preprocessing, size, workers=workers))
    splits = setup.train_split, setup.eval_split
    task = Classification(*splits, eval_loader, preprocessing, class_names, options, setup.mixing)
    if options.compile:
        model.compile()
    console = console if accelerator.is_main_process else None
    train(task, model, loader, options, run, accelerator, console, checkpoint)

    accelerator.wait_for_everyone()  # the checkpoint is written
    classifier = load_classifier(out)
    bar = progress(len(setup.eval_split), accelerator, console)
    with bar, autocast(accelerator.device, options.precision):
        outcome = classify(classifier.model.to(accelerator.device), eval_loader, preprocessing, accelerator, bar)
    metrics = outcome.metrics(class_names)
    if accelerator.is_main_process:
        pictures.curves(run)
        path, split = run.path / "predictions.png", setup.eval_split
        pictures.predictions(path, split, outcome, preprocessing, class_names, setup.eval_name)
        first = int(outcome.index[outcome.label != UNREADABLE][0])
        pictures.context(run.path / "context.png", classifier, split.image(first))
    return classifier.run, metrics, warnings_of(metrics, list(task.unreadable.problems.values()))


def settle(
    options: Options, kind: str, split: Split, source: Source | None = None
) -> tuple[Preprocessing, Options, list[str]]:
    """What is open in `options` filled in, for training on `split`, data of that kind, from the weights `source`.

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

    model = options.model or (source and source.name) or "gspn_micro"
    arguments = dict(options.model_args)
    if source and source.model_args:
        arguments = {**source.model_args, **arguments}
    elif model == "gspn_micro" and "stem_stride" not in arguments:
        arguments["stem_stride"] = 1 if max(size) <= 16 else 2 if small else 4
    name, preset, notes = preset_for(kind, size, len(split), model, options.preset)
    if scale := preset.get("scale_lr"):
        factor = (options.batch_size or preset["batch_size"]) / scale
        preset = preset | {rate: preset[rate] * factor for rate in ("lr", "min_lr", "warmup_lr")}
    options = replace(options, size=size, channels=channels, model=model, model_args=arguments, preset=name)
    return preprocessing, options.settled(preset), notes


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
    layout = torch.channels_last if options.channels_last else torch.preserve_format
    try:
        model = create_model(options.model, **arguments).to(device, memory_format=layout)
    except (RuntimeError, TypeError, ValueError) as error:
        raise OptionError(f"the model {options.model} cannot be made: {error}") from error
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, preprocessing.channels, *preprocessing.size, device=device))
    except (RuntimeError, ValueError) as error:
        what = f"an image of {describe_size(preprocessing)} on {device}"
        raise OptionError(f"{options.model} fails when tried with {what}: {error}") from error
    return model
