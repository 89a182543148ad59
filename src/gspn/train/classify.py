"""Image classification: the task for the loop, and what one does with a trained classifier.

`train_classifier` is what `gspn train` runs, `evaluate` and `predict` are `gspn eval` and `gspn predict`.
"""

import platform
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import accelerate
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console

import gspn
from gspn.models import create_model
from gspn.train import pictures
from gspn.train.checkpoint import Run, RunError
from gspn.train.data import DataError, location, open_data
from gspn.train.images import UNREADABLE, Preprocessing
from gspn.train.loader import make_loader
from gspn.train.loop import LoopOptions, autocast, train
from gspn.train.recipe import Augmentation


class OptionError(ValueError):
    """An option of training, or an argument of the model, that cannot be used."""


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL = 96  # images of at most this many pixels a side keep their size and are not cropped
PRESETS = {  # what Options leaves open, by kind of data
    "digits": dict(epochs=12, lr=4e-3, batch_size=128, warmup=2.0, ema=0.98, flip=False, augment="shift"),
    "idx": dict(epochs=8, lr=3e-3, batch_size=128, warmup=0.5, ema=0.998, flip=False, augment="shift"),
    "small": dict(epochs=30, lr=2e-3, batch_size=128, warmup=2.0, ema=0.998, flip=True, augment="shift"),
    "photos": dict(epochs=100, lr=1e-3, batch_size=128, warmup=5.0, ema=0.9995, flip=True, augment="crop"),
}


@dataclass(frozen=True)
class Options:
    """Options of `train_classifier`; None is filled in from the data and PRESETS.

    Attributes:
        model: a name that gspn.create_model knows; model_args: its keyword arguments.
        epochs, lr, weight_decay, warmup, clip, ema, precision, seed: see loop.LoopOptions.
        batch_size: images a step, over all processes together.
        label_smoothing: the part of the target that is spread over all classes.
        size: (H, W) of the model's input. channels: 1 or 3; given, images are converted.
        augment: "none", "shift" (by up to an eighth of the size) or "crop" (random boxes). flip: mirrors half of them.
        workers: processes that decode images. strict: an unreadable image is an error.
    """

    model: str = "gspn_micro"
    model_args: dict = field(default_factory=dict)
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    weight_decay: float = 0.05
    warmup: float | None = None
    label_smoothing: float = 0.1
    clip: float = 1.0
    ema: float | None = None
    precision: str = "fp32"
    size: tuple | None = None
    channels: int | None = None
    augment: str | None = None
    flip: bool | None = None
    seed: int = 0
    workers: int = 2
    strict: bool = False

    def __post_init__(self):
        for name in _RANGES:
            check_range(name, getattr(self, name))
        for name, allowed in _CHOICES:
            if getattr(self, name) not in (None, *allowed):
                raise OptionError(f"{name} must be {' or '.join(map(str, allowed))}, got {getattr(self, name)!r}")


_RANGES = {
    "epochs": (1, 1_000_000),
    "batch_size": (1, 1_000_000),
    "lr": (0, float("inf")),
    "weight_decay": (0, 10),
    "warmup": (0, 1_000_000),
    "label_smoothing": (0, 0.99),
    "clip": (0, float("inf")),
    "ema": (0, 0.999999),
    "seed": (0, 2**63 - 1),
    "workers": (0, 1024),
}
_CHOICES = (("precision", ("fp32", "bf16")), ("channels", (1, 3)), ("augment", ("none", "shift", "crop")))


def check_range(name: str, value: float | None) -> None:
    """Raises OptionError unless `value` is one that the option `name` may have, or None."""
    low, high = _RANGES[name]
    if value is not None and not low <= value <= high:
        raise OptionError(f"{name} must be from {low} to {high}, got {value}")


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


@dataclass
class Outcome:
    """A classifier's answers on a split, one row an image: index and label (N,), UNREADABLE where there was none;
    top (N, K) classes by falling probability, their probability (N, K), loss (N,)."""

    index: torch.Tensor
    label: torch.Tensor
    top: torch.Tensor
    probability: torch.Tensor
    loss: torch.Tensor

    def metrics(self, class_names):
        """loss, top1, top5 (None where there are no more than five classes), images, unreadable, and the names of the
        classes of which there was no image."""
        seen = self.label != UNREADABLE
        if not seen.any():
            raise DataError(f"none of the {len(seen)} images could be read")
        hits = self.top[seen] == self.label[seen, None]
        present = set(self.label[seen].tolist())
        return {
            "loss": self.loss[seen].mean().item(),
            "top1": hits[:, 0].float().mean().item(),
            "top5": hits.any(1).float().mean().item() if len(class_names) > 5 else None,
            "images": int(seen.sum()),
            "unreadable": int((~seen).sum()),
            "missing_classes": [name for i, name in enumerate(class_names) if i not in present],
        }


@torch.inference_mode()
def classify(model, loader, preprocessing, accelerator):
    """Runs a classifier over a prepared loader's batches; with several processes each of them gets the whole Outcome,
    in which no image counts twice."""
    rows = []
    for batch in loader:
        logits = model(preprocessing.normalize(batch["image"])).float()
        probability, top = logits.softmax(1).topk(min(5, logits.shape[1]))
        loss = F.cross_entropy(logits, batch["label"], ignore_index=UNREADABLE, reduction="none")
        rows.append(accelerator.gather_for_metrics((batch["index"], batch["label"], top, probability, loss)))
    return Outcome(*(torch.cat(column).cpu() for column in zip(*rows, strict=True)))


# -- train --


def train_classifier(
    data: str | Path,
    out: str | Path,
    options: Options | None = None,
    *,
    overwrite: bool = False,
    console: Console | None = None,
    **open_options,
) -> tuple[Run, dict, list[str]]:
    """Trains a classifier on `data` into the run folder `out`, evaluates its best checkpoint, draws the pictures.

    Args:
        data: see data.open_data, to which `open_options` go.
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
    run = Run.create(out, config, overwrite) if accelerator.is_main_process else None

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
        loop_options = LoopOptions(**{name: getattr(options, name) for name in LoopOptions.__dataclass_fields__})
        train(task, model, loader, loop_options, run, accelerator, console)
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
    options = replace(
        options,
        size=size,
        channels=channels,
        **{name: value for name, value in preset.items() if getattr(options, name) is None},
    )
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


def make_accelerator():
    """accelerate's Accelerator; a loader's batch is split over the processes."""
    return accelerate.Accelerator(dataloader_config=accelerate.DataLoaderConfiguration(split_batches=True))


def warnings_of(metrics, problems):
    """What must not go unsaid after training or evaluation, one text each."""
    warnings = []
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:20]) + ("\n  ..." if len(problems) > 20 else "")
        warnings.append(f"{len(problems)} unreadable image{'s' * (len(problems) > 1)} left out:{shown}")
    if metrics["missing_classes"]:
        missing = ", ".join(metrics["missing_classes"])
        warnings.append(f"no image of these classes in the evaluation; accuracy is over the others: {missing}")
    return warnings


# -- use --


@dataclass
class Classifier:
    """A trained model with all it needs: see `load_classifier`."""

    run: Run
    model: torch.nn.Module
    preprocessing: Preprocessing
    class_names: list[str]


def load_classifier(path: str | Path, checkpoint: str = "best") -> Classifier:
    """The Classifier in a run folder: in evaluation mode, on the CPU, with the averaged weights if the run has them.

    Errors: RunError.
    """
    run = Run.open(path)
    try:
        if run.config["task"] != "classification":
            raise RunError(f"{path} is a run of {run.config['task']}, expected classification")
        preprocessing = Preprocessing(**run.config["preprocessing"])
        # The backend is of the machine that trained, not of the model: a run made on a GPU is used on a CPU as well.
        model = create_model(**{**run.config["model"], "backend": None})
        tensors, _ = run.load_checkpoint(checkpoint, ("model", "ema"))
        model.load_state_dict(tensors["ema"] if "ema" in tensors else tensors["model"])
        for part, needed in (("data", "where"), ("options", "precision")):
            run.config[part][needed]  # evaluation needs them: better missed here than there
        return Classifier(run, model.eval(), preprocessing, run.config["class_names"])
    except RunError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RunError(f"the run {path} is damaged or foreign: {type(error).__name__}: {error}") from error


_OPEN_OPTIONS = ("val_fraction", "class_names", "image_column", "label_column")  # of open_data, kept by a run


def evaluate(
    path: str | Path,
    data: str | Path,
    *,
    split: str | None = None,
    checkpoint: str = "best",
    batch_size: int = 256,
    channels: int | None = None,
    workers: int = 2,
    strict: bool = False,
    **open_options,
) -> tuple[dict, list[str]]:
    """Evaluates a run on `data`.

    Args:
        path: the run folder. data, open_options: see data.open_data.
        split: "train", "val", "test", "all"; None: see data.Data.for_evaluation.
        channels: that of the model, which converts images of another number of channels. Without it they are an
            error, but not in the data that the run was trained on, nor if it was trained with `channels`.
    What `open_options` leave out is as in training if `data` is what the run was trained on.
    Returns: (metrics, list of warnings); metrics are those of Outcome, "split" and "images_per_second".
    Errors: DataError, OptionError, RunError.
    """
    check_range("batch_size", batch_size)
    check_range("workers", workers)
    classifier = load_classifier(path, checkpoint)
    preprocessing, class_names, config = classifier.preprocessing, classifier.class_names, classifier.run.config
    if channels not in (None, preprocessing.channels):
        raise OptionError(f"channels is {channels}, but the model of {path} takes {preprocessing.channels}")
    trained_on = config["data"]
    own = location(data) == trained_on["where"]
    if own:
        given = {name: value for name, value in open_options.items() if value is not None}
        open_options = {name: trained_on[name] for name in _OPEN_OPTIONS if name in trained_on} | given
    data_set = open_data(data, **open_options)
    chosen, name = data_set.for_evaluation(split, trained_on=trained_on["where"])
    chosen = chosen.relabelled(class_names)
    converts = channels is not None or own or trained_on.get("converts", False)
    if not converts and chosen.channels() != preprocessing.channels:
        raise DataError(
            f"the model takes {preprocessing.channels} channels but the images have {chosen.channels()}; "
            f"--channels {preprocessing.channels} converts them"
        )
    accelerator = make_accelerator()
    model = classifier.model.to(accelerator.device)
    loader = accelerator.prepare(make_loader(chosen, preprocessing, batch_size, workers=workers))
    start = time.perf_counter()
    with autocast(accelerator.device, config["options"]["precision"]):
        outcome = classify(model, loader, preprocessing, accelerator)
    seconds = time.perf_counter() - start
    problems = [chosen.problem(i) for i in outcome.index[outcome.label == UNREADABLE].tolist()]
    if problems and strict:
        raise DataError(f"unreadable image (--strict): {problems[0]}")
    metrics = outcome.metrics(class_names)
    rate = round(len(chosen) / seconds, 1)
    return {"split": name, **metrics, "images_per_second": rate}, warnings_of(metrics, problems)


def predict(classifier: Classifier, images: list[Image.Image], top: int = 5) -> list[list[tuple[str, float]]]:
    """The most probable classes of PIL images: for each a list of (class name, probability), `top` of them."""
    return predict_pixels(classifier, torch.stack([classifier.preprocessing(image) for image in images]), top)


@torch.inference_mode()
def predict_pixels(classifier: Classifier, pixels: torch.Tensor, top: int = 5) -> list[list[tuple[str, float]]]:
    """As `predict`, of what the classifier's preprocessing made of images: uint8 (B, C, H, W)."""
    device = next(classifier.model.parameters()).device
    logits = classifier.model(classifier.preprocessing.normalize(pixels.to(device))).float()
    probability, number = logits.softmax(1).topk(min(top, logits.shape[1]))
    return [
        [(classifier.class_names[n], p) for n, p in zip(ns, ps, strict=True)]
        for ns, ps in zip(number.tolist(), probability.tolist(), strict=True)
    ]
