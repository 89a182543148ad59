"""Semantic segmentation: what `gspn train-segmentation` runs."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gspn import plots, plots_masks
from gspn.data.images import UNREADABLE, DataError, Preprocessing
from gspn.data.mask_classes import IGNORED, Classes
from gspn.data.mask_loader import MaskAugmentation, make_masked_loader
from gspn.data.masks import find_classes, open_masked, survey
from gspn.data.unreadable import Unreadable
from gspn.metrics.classification import warnings_of
from gspn.metrics.segmentation import OPEN_OPTIONS, evenly, segment_batches
from gspn.models.segmenter import OF_CLASSIFIERS, create_segmenter
from gspn.options import OptionError
from gspn.options.segment import MOBILE, PRESET, SPEC, SegmentationOptions
from gspn.progress import Progress
from gspn.runs import load_segmenter, preprocessing_of
from gspn.tasks.base import Setup as BaseSetup
from gspn.tasks.base import Training, parameters_of
from gspn.tasks.classify import IMAGENET_MEAN, IMAGENET_STD, build_model
from gspn.tasks.finetune import Source, copy_weights, open_source
from gspn.train.loop import autocast
from gspn.train.run import Run, RunError

CROP = 512  # the largest side of training crops that is chosen without --size


class SegmentationTask:
    """The Task of loop.py: cross-entropy of pixels, and Dice.

    A batch's loss is a mean over its labelled pixels, whatever the number of processes and parts. The Dice loss of an
    image is 1 - the mean over its classes of 2 |P T| / (|P| + |T|), and counts for all of its pixels.
    """

    def __init__(self, setup: "Setup", loader):
        self.unreadable = Unreadable({"train": setup.train_split, "evaluation": setup.eval_split}, setup.options.strict)
        self.loader, self.setup, self.preprocessing = loader, setup, setup.preprocessing
        self.weights = None if setup.class_weights is None else torch.tensor(setup.class_weights)
        self.format = torch.channels_last if setup.options.channels_last else torch.contiguous_format
        self.shown: dict[int, np.ndarray] = {}

    def prepare(self, batch):
        self.unreadable.saw(batch)
        image = self.preprocessing.normalize(batch["image"]).contiguous(memory_format=self.format)
        return {"image": image, "mask": batch["mask"]}

    def count(self, batch):
        return (batch["mask"] != IGNORED).sum()

    def loss(self, model, batch):
        logits, truth = model(batch["image"]).float(), batch["mask"].long()
        weights = None if self.weights is None else self.weights.to(logits.device)
        loss = F.cross_entropy(logits, truth, weights, ignore_index=IGNORED, reduction="sum")
        if self.setup.options.dice:
            loss = loss + self.setup.options.dice * dice_losses(logits, truth).sum()
        return loss

    def evaluate(self, model, accelerator):
        self.unreadable.look()
        shown = evenly(len(self.setup.eval_split), plots_masks.PAIRS)
        outcome = segment_batches(model, self.loader, self.preprocessing, accelerator, shown=shown)
        self.unreadable.note("evaluation", outcome.index[outcome.label == UNREADABLE].tolist())
        self.shown = outcome.shown
        metrics = outcome.metrics(self.setup.classes)
        return {"val_loss": metrics.pop("loss"), **metrics, "unreadable_in_training": self.unreadable.gather()}

    def score(self, metrics):
        return [metrics["miou"], -metrics["val_loss"]]

    def pictures(self):
        setup = self.setup
        if not (setup.options.tensorboard and self.shown):
            return {}
        return {"predictions": plots_masks.pairs_picture(setup.eval_split, self.shown, setup.classes)}

    def line(self, row):
        return (
            f"epoch {row['epoch']:3d}  loss {row['train_loss']:.3f}  validation loss {row['val_loss']:.3f}  "
            f"mean IoU {row['miou']:.2%}  pixels {row['pixel_accuracy']:.2%}  {row['images_per_second']:.3g} images/s  "
            f"{row['seconds']:.1f} s"
        )

    def state(self):
        return {"unreadable": self.unreadable.state()}

    def restore(self, state):
        self.unreadable.restore(state["unreadable"])


def dice_losses(logits: Tensor, truth: Tensor) -> Tensor:
    """(B,), the Dice loss of each image over the classes in its truth, times its labelled pixels. logits (B,K,H,W),
    truth (B,H,W) with IGNORED."""
    counted = truth != IGNORED
    target = F.one_hot(truth.where(counted, 0), logits.shape[1]).permute(0, 3, 1, 2) * counted[:, None]
    probability = logits.softmax(1) * counted[:, None]
    both, total = (probability * target).sum((2, 3)), (probability + target).sum((2, 3))
    present = target.sum((2, 3)) > 0
    dice = (2 * both / total.clamp(min=1e-6) * present).sum(1) / present.sum(1).clamp(min=1)
    return (1 - dice) * counted.sum((1, 2))


@dataclass(kw_only=True)
class Setup(BaseSetup):
    """A segmenter and its data.

    Attributes, beside those of the base: `class_weights`: of the loss, or None. `source`: the weights of --init-from.
    `begun_from`: when resuming, the digest of those that the run began with. Classes, preprocessing and weights of a
    resumed run are its own.
    """

    spec: ClassVar = SPEC

    options: SegmentationOptions
    classes: Classes | None = None
    preprocessing: Preprocessing | None = None
    class_weights: list[float] | None = None
    source: Source | None = None
    begun_from: str | None = None

    @classmethod
    def of(cls, where: str | Path, options: SegmentationOptions, *, resuming: bool = False) -> "Setup":
        data = open_masked(where, **{name: getattr(options, name) for name in OPEN_OPTIONS})
        train_split, eval_split, eval_name = data.for_training()
        splits = dict(train_split=train_split, eval_split=eval_split, eval_name=eval_name)
        if resuming:
            return cls(data=data, **splits, options=options, notes=[])
        found = survey(
            {"train": train_split, eval_name: eval_split},
            find_classes(data, options.classes),
            options.ignore,
            options.strict,
        )
        channels, source = options.channels or train_split.channels(), None
        if options.init_from:
            source = open_source(options.init_from, options.model, options.model_args, channels)
        notes = [*data.notes, *found.notes()]
        if not found.classes.named:
            notes.append(
                f"no names of classes: each of the {len(found.classes)} values in the masks is one (--classes)"
            )
        if options.ignore is None:
            options = replace(options, ignore=tuple(map(str, found.classes.ignored)))
        options = settle(options, found.sizes, channels, source)
        mean, std = IMAGENET_MEAN, IMAGENET_STD
        if channels == 1:
            mean, std = (sum(mean) / 3,), (sum(std) / 3,)
        return cls(
            data=data,
            **splits,
            options=options,
            notes=notes,
            classes=found.classes,
            preprocessing=Preprocessing(channels, options.size, mean, std),
            class_weights=weights_of(options.class_weights, found.pixels["train"], found.classes),
            source=source,
        )

    def model(self, device) -> torch.nn.Module:
        size = self.preprocessing.size
        return build_model(self.options, self.preprocessing, len(self.classes), device, create_segmenter, size)

    def first_weights(self, model) -> str | None:
        if not self.options.init_from:
            return None
        if self.source is None:  # resuming a run that has no checkpoint yet
            options = self.options
            self.source = open_source(options.init_from, options.model, options.model_args, self.preprocessing.channels)
            if self.source.digest(like=self.begun_from) != self.begun_from:
                raise RunError(f"{self.source.where} does not hold the weights that the run started from")
        backbone = model.backbone
        copy_weights(self.source, backbone, set(backbone.state_dict()), but=("head", "norm"))
        return f"weights of {self.source.where} in the backbone, with a new decoder"

    def config(self, model) -> dict:
        return {
            "model": model.config,
            "preprocessing": self.preprocessing.to_json(),
            "classes": self.classes.to_json(),
            "class_names": list(self.classes.names),
            "class_weights": self.class_weights,
            "data": {"mask_column": self.options.mask_column},
            "init_from": self.source and self.source.digest(),
        }

    def check_config(self, config) -> None:
        """Takes over the run's classes, preprocessing, class weights, and the digest of the weights it began with."""
        self.classes = Classes(**config["classes"])
        self.preprocessing = preprocessing_of(config, config["model"]["in_chans"])
        self.class_weights, self.begun_from = config["class_weights"], config.get("init_from")

    def about(self, model):
        options, (height, width) = self.options, self.preprocessing.size
        scales = f"scaled by {options.min_scale * options.scale:g} to {options.max_scale * options.scale:g}"
        return (
            f"{options.model} with a decoder, {parameters_of(model)}",
            f"with masks of {len(self.classes)} class{'es' * (len(self.classes) > 1)}",
            (f"crops of {height}x{width}, {scales}",),
        )

    def train(self, training: Training) -> tuple[Run, list[str]]:
        """Trains, evaluates the best checkpoint, draws the pictures."""
        options, accelerator = self.options, training.accelerator
        common = self.classes, self.preprocessing, options.batch_size
        more = dict(scale=options.scale, seed=options.seed, workers=options.workers)
        scales = (options.min_scale, options.max_scale)
        augmentation = MaskAugmentation(scales, flip=options.flip, jitter=options.jitter)
        loader = make_masked_loader(self.train_split, *common, augmentation=augmentation, **more)
        eval_loader = accelerator.prepare(make_masked_loader(self.eval_split, *common, **more))
        task = SegmentationTask(self, eval_loader)
        training.loop(task, loader, options)

        accelerator.wait_for_everyone()  # the checkpoint is written
        segmenter = load_segmenter(training.path)
        console = training.console if accelerator.is_main_process else None
        bar, shown = (
            Progress("evaluating", len(self.eval_split), console=console),
            evenly(len(self.eval_split), plots_masks.PAIRS),
        )
        with bar, autocast(accelerator.device, options.precision):
            model = segmenter.model.to(accelerator.device)
            outcome = segment_batches(model, eval_loader, self.preprocessing, accelerator, shown=shown, bar=bar)
        metrics = {"split": self.eval_name, "scale": options.scale, **outcome.metrics(self.classes)}
        if run := training.run:
            plots.curves(run, (("miou", "mean IoU"), ("pixel_accuracy", "pixels")))
            plots_masks.pixel_confusion(run.path / "confusion.png", outcome.confusion, self.classes.names, metrics)
            plots_masks.pairs(run.path / "predictions.png", self.eval_split, outcome.shown, self.classes, metrics)
        problems = list(task.unreadable.problems.values())
        return segmenter.run if training.run else None, warnings_of(metrics, problems, "pixel", "the mean IoU")


def settle(options: SegmentationOptions, sizes: Counter, channels: int, source: Source | None) -> SegmentationOptions:
    """Replaces None in the options by what fits images of these (height, width) and the weights `source`."""
    if options.size is None:
        largest = (max(side) * options.scale for side in zip(*(size for size in sizes if sizes[size]), strict=True))
        options = replace(options, size=tuple(max(1, min(round(side), CROP)) for side in largest))
    brought = (source and source.model_args) or {}
    arguments = {name: value for name, value in brought.items() if name not in OF_CLASSIFIERS} | options.model_args
    model = options.model or (source and source.name) or "gspn_mobile"
    preset = PRESET | (MOBILE if model == "gspn_mobile" and source is None else {})
    return replace(options, channels=channels, model=model, model_args=arguments).resolved(preset)


def weights_of(wanted: str | tuple, pixels: np.ndarray, classes: Classes) -> list[float] | None:
    """The classes' weights in the loss, whose mean over the training pixels is 1; None for no weights.

    "balanced" is median frequency balancing: the median of the frequencies of the classes over a class's own. A class
    without a pixel has the weight 0. Errors: OptionError for another number of weights than of classes."""
    if wanted == "none":
        return None
    if wanted == "balanced":
        weights = np.divide(np.median(pixels[pixels > 0]), pixels, where=pixels > 0, out=np.zeros(len(pixels)))
    elif len(wanted) != len(classes):
        names = ", ".join(classes.names)
        raise OptionError(f"class_weights has {len(wanted)} numbers, expected {len(classes)}: one for each of {names}")
    else:
        weights = np.array(wanted, float)
    total = (weights * pixels).sum()
    if not total:
        raise DataError("every training pixel has the weight 0: expected a class with pixels and a weight above 0")
    return (weights * pixels.sum() / total).tolist()
