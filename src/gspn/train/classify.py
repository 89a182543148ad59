"""Image classification: the task for the loop, and `train_classifier` and `resume_classifier`, which are what
`gspn train` runs.
"""

import platform
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from rich.console import Console

import gspn
from gspn.models import create_model
from gspn.train import pictures
from gspn.train.checkpoint import STATE_FORMAT, Run, RunError, writing
from gspn.train.data import Data, DataError, open_data
from gspn.train.evaluate import OPEN_OPTIONS, classify, load_classifier, warnings_of
from gspn.train.finetune import Source, open_source, start_from
from gspn.train.images import UNREADABLE, Preprocessing, Split
from gspn.train.loader import make_loader
from gspn.train.loop import Position, autocast, make_accelerator, train
from gspn.train.optim import frozen_modules, make_optimizer
from gspn.train.options import OptionError, Options, file_text
from gspn.train.recipe import SMALL, Augmentation, Mixing, preset_for

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Classification:
    """The Task of loop.py: cross-entropy on labelled images."""

    def __init__(self, train_split, eval_split, eval_loader, preprocessing, class_names, options, mixing=None):
        self.splits = {"train": train_split, "evaluation": eval_split}
        self.loader, self.preprocessing, self.class_names = eval_loader, preprocessing, class_names
        self.smoothing, self.strict = options.label_smoothing, options.strict
        self.format = torch.channels_last if options.channels_last else torch.contiguous_format
        self.mixing = mixing
        self.seen = []  # numbers and labels of training images, to be looked at when that keeps no GPU waiting
        self.problems = {}  # an unreadable image's name and what is wrong with it, by split and index

    def prepare(self, batch):
        index, label = batch["index"], batch["label"]
        self.seen.append((index, label))
        if self.strict:
            self.note_unreadable()
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
        self.note_unreadable()
        outcome = classify(model, self.loader, self.preprocessing, accelerator)
        self.note("evaluation", outcome.index[outcome.label == UNREADABLE].tolist())
        for problems in gather_object([self.problems]):  # each process has read its own share of the images
            self.problems |= problems
        return {f"val_{k}" if k == "loss" else k: v for k, v in outcome.metrics(self.class_names).items()} | {
            "unreadable_in_training": sum(split == "train" for split, _ in self.problems)
        }

    def note_unreadable(self):
        """Looks at the labels of the training images since the last time."""
        for index, label in self.seen:
            self.note("train", index[label == UNREADABLE].tolist())
        self.seen.clear()

    def note(self, split, unreadable):
        for i in unreadable:
            if (split, i) not in self.problems:
                self.problems[split, i] = self.splits[split].problem(i)
            if self.strict:
                raise DataError(f"unreadable image (--strict): {self.problems[split, i]}")

    def state(self):
        self.note_unreadable()
        return {"unreadable": [[*key, problem] for key, problem in self.problems.items()]}

    def restore(self, state):
        self.problems = {(split, i): problem for split, i, problem in state["unreadable"]}

    def score(self, metrics):
        return [metrics["top1"], -metrics["val_loss"]]  # of equally good ones, that of the lower loss

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

    @classmethod
    def of(cls, data_set: Data, options: Options, source: Source | None = None) -> "Setup":
        """Settles the options for these data. Errors: DataError, OptionError."""
        train_split, eval_split, eval_name = data_set.for_training()
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
        )

    def model(self, device) -> torch.nn.Module:
        """A new model. Errors: OptionError."""
        model = build_model(self.options, self.preprocessing, len(self.class_names), device)
        options = self.options
        frozen_modules(model, options.freeze or ())  # what cannot be is found before the run's folder is made
        make_optimizer(model, options)
        try:
            torch.zeros(1, device=options.ema_device or device).item()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise OptionError(
                f"ema_device {options.ema_device!r} cannot be used: {str(error).splitlines()[0]}"
            ) from error
        return model

    def describe(self, model) -> str:
        options, count = self.options, sum(parameter.numel() for parameter in model.parameters())
        return (
            f"{options.model}, {count:,} parameters; {len(self.train_split):,} training and {len(self.eval_split):,} "
            f"{self.eval_name} images of {len(self.class_names)} classes, {describe(self.preprocessing)}\n"
            f"{options.epochs} epoch{'s' * (options.epochs > 1)}, batch size {options.batch_size}, "
            f"learning rate {options.lr:g}, EMA {options.ema:g}, {options.precision}, preset {options.preset}, "
            f"augmentation {options.augment}{' and flip' * bool(options.flip)}, seed {options.seed}"
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
    Errors: DataError, OptionError, RunError, SaveError, TrainingError.
    """
    options = options or Options()
    accelerator = make_accelerator()
    say = _speaker(accelerator, console)
    Run.check_free(out, overwrite)
    data_set, source = open_with(data, options), None
    if options.init_from:
        channels = options.channels or data_set.splits["train"].channels()
        source = open_source(options.init_from, options.model, options.model_args, channels)
    converts = options.channels is not None
    setup = Setup.of(data_set, options, source)
    check_processes(setup, accelerator)
    model = setup.model(accelerator.device)
    notes = [*setup.notes, start_from(source, model, setup.class_names, data_set.where)] if source else setup.notes
    for note in notes:
        say(f"note: {note}")
    say(setup.describe(model))

    config = {
        "task": "classification",
        "model": model.config,
        "preprocessing": setup.preprocessing.to_json(),
        "class_names": setup.class_names,
        "data": {
            "where": setup.data.where,
            "kind": setup.data.kind,
            "split": setup.eval_name,
            "converts": converts,
            "fingerprint": setup.data.fingerprint(),
            **{name: getattr(options, name) for name in OPEN_OPTIONS},
        },
        "options": asdict(setup.options),
        "init_from": source and source.digest(),
        "seed": setup.options.seed,
        "versions": _versions(),
    }
    accelerator.wait_for_everyone()  # all have found the folder free
    with writing(out) if accelerator.is_main_process else nullcontext():
        run = None
        if accelerator.is_main_process:
            run = Run.create(out, config, overwrite, options=file_text(setup.options, {"data": str(data)}))
        try:
            return _train(setup, model, out, run, accelerator, console)
        except BaseException:
            if run and run.restore_earlier():
                say(f"the run that was in {out} is there again, as this training has no checkpoint")
            elif run and run.has_checkpoint("last"):
                say(f"`gspn train --resume {out}` goes on from its last checkpoint")
            raise


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
    options = _changed(Run.open(path).config, changes or {})
    accelerator = make_accelerator()
    say = _speaker(accelerator, console)
    with writing(path) if accelerator.is_main_process else nullcontext():
        run, checkpoint = Run.open(path), None
        with readable(path):
            config = run.config
            setup = Setup.of(open_with(data or config["data"]["where"], options), options)
            if setup.data.fingerprint() != config["data"].get("fingerprint"):
                raise RunError(
                    f"{setup.data.where} is not what {path} was trained on: images, labels or class names have "
                    f"changed; `gspn train --init-from {path}` starts a new training from its weights"
                )
            setup.preprocessing = Preprocessing(**config["preprocessing"])
            other_versions = config["versions"] != _versions() and config["versions"]
        check_processes(setup, accelerator)
        model = setup.model(accelerator.device)
        if run.has_checkpoint("last"):
            checkpoint = _complete(path, *run.load_checkpoint("last"))
            state = checkpoint[1]
            place = f"step {state['step']} (epoch {state['position']['epoch'] + 1})"
            if state["processes"] != accelerator.num_processes:
                say(
                    f"note: {accelerator.num_processes} processes instead of {state['processes']}: what is random in "
                    "the model will differ"
                )
        else:
            place = "the start, as there is no checkpoint yet"
            if options.init_from:
                channels = setup.preprocessing.channels
                source = open_source(options.init_from, options.model, options.model_args, channels)
                if source.digest() != config.get("init_from"):
                    raise RunError(f"{source.where} holds other weights than those that {path} started from")
                say(f"note: {start_from(source, model, setup.class_names, setup.data.where)}")
        if other_versions:
            say(f"note: other versions than before, so not the same to the last bit: {other_versions}")
        say(f"{setup.describe(model)}\ngoing on from {place}")
        accelerator.wait_for_everyone()  # all have read
        if accelerator.is_main_process:
            run.rewind(checkpoint[1]["epoch"] if checkpoint else 0)
            run.prune(options.keep)
        return _train(
            setup, model, path, run if accelerator.is_main_process else None, accelerator, console, checkpoint
        )


@contextmanager
def readable(path):
    """What a run's files do not hold, or hold as something else, is a RunError."""
    try:
        yield
    except (RunError, DataError, OptionError):
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"the run {path} is damaged or foreign: {type(error).__name__}: {error}") from error


def _changed(config, changes, task="classification", kind=Options):
    """The options of a run of that task, with `changes`."""
    if config.get("task") != task:
        raise RunError(f"this is a run of {config.get('task')}, expected {task}")
    if not isinstance(config.get("options"), dict):
        raise RunError("the run's config.json is damaged or foreign: it holds no options")
    saved = kind.read(config["options"], "the run's config.json: ")
    changed = kind.read({**config["options"], **changes})
    for one in fields(kind):
        if getattr(saved, one.name) != getattr(changed, one.name) and not one.metadata["same_result"]:
            free = ", ".join(one.name for one in fields(kind) if one.metadata["same_result"])
            raise OptionError(
                f"{one.name} was {getattr(saved, one.name)} and cannot be {getattr(changed, one.name)} in a training "
                f"that goes on exactly; what can be changed: {free}. --init-from starts a new training from its weights"
            )
    return changed


def _complete(path, tensors, state):
    """A checkpoint, if a training can go on from it."""
    if state.get("format", 1) < STATE_FORMAT:
        raise RunError(f"{path} was written by an older gspn, which could not resume: nothing to go on from")
    with readable(f"{path}, checkpoint `last`,"):
        position = Position(**state["position"])
        counts = [position.epoch, position.batch, position.step, position.images, state["epoch"], state["processes"]]
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError(f"counts are {counts}")
        if not {"model", "optimizer"} <= set(tensors) or not isinstance(state["task"].get("unreadable", []), list):
            raise KeyError("model, optimizer or what is unreadable")
    return tensors, state


def _train(setup, model, out, run, accelerator, console, checkpoint=None):
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
    with autocast(accelerator.device, options.precision):
        outcome = classify(classifier.model.to(accelerator.device), eval_loader, preprocessing, accelerator)
    metrics = outcome.metrics(class_names)
    if accelerator.is_main_process:
        pictures.curves(run)
        path, split = run.path / "predictions.png", setup.eval_split
        pictures.predictions(path, split, outcome, preprocessing, class_names, setup.eval_name)
        first = int(outcome.index[outcome.label != UNREADABLE][0])
        pictures.context(run.path / "context.png", classifier, split.image(first))
    return classifier.run, metrics, warnings_of(metrics, list(task.problems.values()))


def open_with(data, options):
    """data.open_data with what the options say about it."""
    return open_data(data, **{name: getattr(options, name) for name in OPEN_OPTIONS})


def check_processes(setup, accelerator):
    """Raises OptionError unless the processes can share a batch."""
    count, size = accelerator.num_processes, setup.options.batch_size
    if size % count:
        raise OptionError(f"batch_size is of all {count} processes together: expected a multiple, got {size}")
    share = min(size, len(setup.train_split)) // count
    if setup.mixing is not None and share % 2:
        raise OptionError(f"mixup and cutmix pair images: expected an even number for each process, got {share}")


def _speaker(accelerator, console):
    def say(text):
        if console and accelerator.is_main_process:
            console.print(text, markup=False, highlight=False)

    return say


def _versions():
    return {
        "gspn": gspn.__version__,
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "python": platform.python_version(),
    }


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
        what = f"an image of {describe(preprocessing)} on {device}"
        raise OptionError(f"{options.model} fails when tried with {what}: {error}") from error
    return model


def describe(preprocessing):
    """'28x28, grey'."""
    return f"{preprocessing.size[0]}x{preprocessing.size[1]}, {'grey' if preprocessing.channels == 1 else 'colour'}"
