"""Evaluation of a trained classifier (`gspn eval`)."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console

from gspn import plots
from gspn.data.images import UNREADABLE, DataError
from gspn.data.labelled import Data, open_data
from gspn.data.loader import batches, make_loader, workers_note
from gspn.data.sources import with_held_out
from gspn.data.unreadable import warning_of
from gspn.files import check_absent, check_writable, make_folder, write_json
from gspn.options import OptionError, far_from
from gspn.options.classifiers import EvalOptions
from gspn.places import check_outside, location
from gspn.progress import Progress
from gspn.runs import check_finite, load_classifier
from gspn.train.loop import autocast, make_accelerator

# Options of open_data that a run keeps for its evaluation.
OPEN_OPTIONS = ("val_fraction", "class_names", "image_column", "label_column", "streaming")


@dataclass
class Outcome:
    """A classifier's predictions on a split, a row for each image.

    Attributes:
        index, label: (N,); the label of an unreadable image is UNREADABLE.
        top: (N, K) classes by falling probability. probability: theirs, (N, K). loss: (N,).
        waiting, working: the seconds that this process waited for images and worked on them.
    """

    index: torch.Tensor
    label: torch.Tensor
    top: torch.Tensor
    probability: torch.Tensor
    loss: torch.Tensor
    waiting: float
    working: float

    @property
    def seen(self):
        """Which images could be read, bool (N,). Errors: DataError if none could."""
        seen = self.label != UNREADABLE
        if not seen.any():
            raise DataError(f"none of the {len(seen)} images could be read")
        return seen

    def metrics(self, class_names):
        """loss, top1, top5 (None with five classes or fewer), ece, images, unreadable, and missing_classes: the names
        of the classes without an image."""
        seen = self.seen
        hits = self.top[seen] == self.label[seen, None]
        present = set(self.label[seen].tolist())
        return {
            "loss": self.loss[seen].mean().item(),
            "top1": hits[:, 0].float().mean().item(),
            "top5": hits.any(1).float().mean().item() if len(class_names) > 5 else None,
            "ece": self.calibration()[0],
            "images": int(seen.sum()),
            "unreadable": int((~seen).sum()),
            "missing_classes": [name for i, name in enumerate(class_names) if i not in present],
        }

    def calibration(self, bins: int = 15) -> tuple[float, list[dict]]:
        """Whether predictions with a probability of 80% are right 80% of the time.

        Returns: (the expected calibration error, that is the mean over the images of |accuracy - mean probability| of
        their bin; the bins of equal width that have images, each with from, to, images, probability, accuracy).
        """
        seen = self.seen
        probability, right = self.probability[seen, 0].double(), (self.top[seen, 0] == self.label[seen]).double()
        number = (probability * bins).long().clamp(max=bins - 1)
        rows = []
        for i in number.unique().tolist():
            inside = number == i
            row = {"from": i / bins, "to": (i + 1) / bins, "images": int(inside.sum())}
            rows.append(
                row | {"probability": probability[inside].mean().item(), "accuracy": right[inside].mean().item()}
            )
        error = sum(row["images"] * abs(row["accuracy"] - row["probability"]) for row in rows) / len(right)
        return error, rows

    def confusion(self, classes: int) -> torch.Tensor:
        """How often an image of class i was taken for class j, int64 (classes, classes)."""
        seen = self.seen
        pairs = self.label[seen] * classes + self.top[seen, 0]
        return pairs.bincount(minlength=classes * classes).view(classes, classes)


@torch.inference_mode()
def classify(model, loader, preprocessing, accelerator, bar=None):
    """Runs a classifier over the batches of a prepared loader. Every process gets the whole Outcome, in which each
    image counts once. `bar`: a Progress that counts images."""
    rows, waiting, start = [], 0.0, time.perf_counter()
    before = start
    for batch in batches(loader):
        waiting += time.perf_counter() - before
        logits = model(preprocessing.normalize(batch["image"])).float()
        probability, top = logits.softmax(1).topk(min(5, logits.shape[1]))
        loss = F.cross_entropy(logits, batch["label"], ignore_index=UNREADABLE, reduction="none")
        row = accelerator.gather_for_metrics((batch["index"], batch["label"], top, probability, loss))
        rows.append([column.cpu() for column in row])
        if bar is not None:
            bar.update(bar.done + len(rows[-1][0]))
        before = time.perf_counter()
    working = before - start - waiting
    return Outcome(*(torch.cat(column) for column in zip(*rows, strict=True)), waiting, working)


def progress(images: int, accelerator, console: Console | None) -> Progress:
    """The Progress for `classify`; only the main process prints."""
    return Progress("evaluating", images, console=console if accelerator.is_main_process else None)


def warnings_of(metrics: dict, problems: list[str], unit: str = "image", figure: str = "accuracy") -> list[str]:
    """The warnings after training or evaluation, where `figure` counts the `unit`s of each class. The IoU of a class
    that is missing, but was predicted, is 0."""
    warnings = [warning_of(problems)] if problems else []
    found = {name for name, value in metrics.get("iou", {}).items() if value is not None}
    for counts, what in ((False, "is over the others"), (True, "counts them as 0, because they were predicted")):
        if missing := [name for name in metrics["missing_classes"] if (name in found) == counts]:
            warnings.append(f"no {unit} of these classes in the evaluation; {figure} {what}: {', '.join(missing)}")
    return warnings


def opening(data: str | Path, trained_on: dict, names: Sequence[str], given: dict) -> dict:
    """The options with which a run's evaluation opens `data`.

    Args:
        trained_on: "data" of the run's config. names: the options that it keeps. given: those that the caller gave.
    Returns: what is given; else the run's own, of which only val_fraction is for other data than those of the run.
    """
    kept = names if location(data) == trained_on["where"] else ("val_fraction",)
    given = {name: value for name, value in given.items() if value is not None}
    return {name: trained_on[name] for name in kept if name in trained_on} | given


def seen_in_training(
    data: str | Path,
    opened: Data,
    name: str,
    split: str | None,
    fraction: float | None,
    trained_on: dict,
    console: Console | None,
) -> list[str]:
    """The warnings that a run may have been trained on the images of its evaluation. Which images are held out of data
    without an evaluation split follows from the whole of the data: where that matters, all of them are read.

    Args:
        data: as the user gave it. opened: its Data. name: of the evaluated split. split: the one asked for, or None.
        fraction: the val_fraction of `opened`. trained_on: "data" of the run's config.
        console: rich's, for the progress; None is silent.
    """
    recorded, kept = trained_on.get("fingerprint"), trained_on.get("val_fraction")
    own = opened.where == trained_on["where"]
    more = name == "val" and kept is not None and fraction > kept  # a smaller part lies in the one of the training
    doubtful = more or (name == "val" if own else name == "all" and split is None)
    if not doubtful or "all" not in opened.splits or recorded is None:
        return []
    if kept not in (None, fraction):  # the fingerprint holds the sizes of the splits
        opened = replace(opened, splits=with_held_out({"train": opened.splits["all"]}, kept)[0])
    same_kind = opened.kind == trained_on.get("kind", opened.kind)
    if not same_kind or opened.fingerprint(recorded, console) != recorded:
        if not own:
            return []
        return [
            f"{data} has changed since the run was trained: other images may be held out of it now, so that some of "
            "these may have been trained on"
        ]
    if more:
        return [
            f"val_fraction is {fraction:g}, but was {kept:g} in the training on the same data: some of these images "
            "were trained on"
        ]
    if own:
        return []
    return [
        f"{data} holds what the run was trained on, in another place: most of these images were trained on; "
        "--split val evaluates those that were held out"
    ]


def evaluate(
    path: str | Path,
    data: str | Path,
    *,
    split: str | None = None,
    checkpoint: str = "best",
    batch_size: int = 256,
    channels: int | None = None,
    size: tuple[int, int] | None = None,
    workers: int = 2,
    strict: bool = False,
    out: str | Path | None = None,
    overwrite: bool = False,
    console: Console | None = None,
    **open_options,
) -> tuple[dict, list[str]]:
    """Evaluates a run on `data`.

    Args:
        path: the run folder. data, open_options: see labelled.open_data.
        split: "train", "val", "test", "all"; None: see labelled.Data.for_evaluation.
        channels: the model's number of channels, to which images are converted. Without it, images of another number
            are an error, except where the run was trained on these data or with `channels`.
        size: (H, W) of the input; None: as in training.
        out: a folder for evaluation-HxW.json and confusion-HxW.png. overwrite: these may be replaced.
        console: rich's, for the progress; None is silent.
    Missing `open_options` are as in training; for other data than those of the run only val_fraction.
    Returns: (metrics, list of warnings); metrics, the same in every process, are those of Outcome and
        "split", "size", "trained_size";
        "reliability": see Outcome.calibration;
        "confused": the 20 most frequent mistakes [class, taken for, images];
        "images_per_second": with reading; "model_images_per_second": without.
    Errors: DataError, ExistsError, OptionError, RunError, SaveError.
    """
    EvalOptions.check(batch_size=batch_size, workers=workers)
    classifier = load_classifier(path, checkpoint)
    preprocessing, class_names, config = classifier.preprocessing, classifier.classes, classifier.run.config
    trained_size = preprocessing.size
    if size is not None:
        preprocessing = replace(preprocessing, size=size)
    if out is not None:
        check_outside(out, data)
        check_absent(*evaluation_files(out, preprocessing.size), overwrite=overwrite)
    if channels not in (None, preprocessing.channels):
        raise OptionError(f"channels is {channels}, but the model of {path} takes {preprocessing.channels}")
    trained_on, accelerator = config["data"], make_accelerator()
    console = console if accelerator.is_main_process else None
    open_options = opening(data, trained_on, OPEN_OPTIONS, open_options)
    with Progress(f"opening {data}", console=console):
        data_set = open_data(data, **open_options)
    chosen, name = data_set.for_evaluation(split, trained_on=trained_on["where"])
    chosen = chosen.relabelled(class_names)
    seen = seen_in_training(data, data_set, name, split, open_options.get("val_fraction"), trained_on, console)
    own = data_set.where == trained_on["where"]
    converts = channels is not None or own or trained_on.get("converts", False)
    if not converts and chosen.channels() != preprocessing.channels:
        raise DataError(
            f"the model takes {preprocessing.channels} channels but the images have {chosen.channels()}; "
            f"--channels {preprocessing.channels} converts them"
        )
    batch_size += -batch_size % accelerator.num_processes  # they share a batch
    model = classifier.model.to(accelerator.device)
    loader = accelerator.prepare(make_loader(chosen, preprocessing, batch_size, workers=workers))
    if out is not None and accelerator.is_main_process:  # before the work, which takes long
        make_folder(Path(out))
        check_writable(evaluation_files(out, preprocessing.size)[0])
    bar = progress(len(chosen), accelerator, console)
    with bar, autocast(accelerator.device, config["options"]["precision"]):
        outcome = classify(model, loader, preprocessing, accelerator, bar)
    problems = [chosen.problem(i) for i in outcome.index[outcome.label == UNREADABLE].tolist()]
    if problems and strict:
        raise DataError(f"unreadable image (--strict): {problems[0]}")
    check_finite(outcome.loss[outcome.seen], path)
    seconds = {"images_per_second": outcome.waiting + outcome.working, "model_images_per_second": outcome.working}
    sizes = {"size": list(preprocessing.size), "trained_size": list(trained_size)}
    metrics = {"split": name, **sizes, **outcome.metrics(class_names)}
    metrics |= {rate: round(len(chosen) / duration, 1) for rate, duration in seconds.items()}
    confusion = outcome.confusion(len(class_names))
    metrics |= {"reliability": outcome.calibration()[1], "confused": mistakes(confusion, class_names)}
    if out is not None and accelerator.is_main_process:
        table, picture = evaluation_files(out, preprocessing.size)
        write_json(table, metrics)
        plots.confusion(picture, confusion, class_names, metrics)
    far = far_from(preprocessing.size, trained_size, f"the model of {path} was trained at")
    told = [*data_set.left_out, *filter(None, [far, workers_note(workers, chosen)]), *seen]
    return metrics, [*told, *warnings_of(metrics, problems)]


def evaluation_files(folder: str | Path, size: tuple[int, int]) -> tuple[Path, Path]:
    """The files of an evaluation at (H, W) in a folder: its metrics and its picture."""
    at = "x".join(map(str, size))
    return Path(folder) / f"evaluation-{at}.json", Path(folder) / f"confusion-{at}.png"


def mistakes(confusion: torch.Tensor, class_names: list[str], count: int = 20) -> list[tuple[str, str, int]]:
    """The most frequent mistakes in a confusion matrix (see Outcome): (class, taken for, images)."""
    wrong = confusion.clone().fill_diagonal_(0)
    number, index = wrong.flatten().topk(min(count, wrong.numel()))
    pairs = [(n, *divmod(i, len(class_names))) for n, i in zip(number.tolist(), index.tolist(), strict=True) if n]
    return [(class_names[label], class_names[guess], n) for n, label, guess in pairs]
