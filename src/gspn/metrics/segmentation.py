"""Evaluation of segmentation: confusion of pixels, IoU, boundary F1 (`gspn eval` with a run of segmentation)."""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from gspn import plots_masks
from gspn.data.images import UNREADABLE, DataError
from gspn.data.loader import batches, workers_note
from gspn.data.mask_classes import IGNORED, Classes
from gspn.data.mask_loader import make_masked_loader
from gspn.data.masks import open_masked
from gspn.files import check_absent, check_writable, make_folder, write_json
from gspn.metrics.classification import opening, seen_in_training, warnings_of
from gspn.options import OptionError
from gspn.places import check_outside
from gspn.progress import Progress
from gspn.runs import check_finite, load_segmenter
from gspn.train.loop import autocast, make_accelerator

OPEN_OPTIONS = ("val_fraction", "image_column", "mask_column")  # of open_masked, which a run keeps
TOLERANCE = 0.0075  # of the diagonal: how far a predicted boundary may be from the true one


@dataclass
class Segmented:
    """A segmenter's predictions on a split, a row for each image.

    Attributes:
        index, label: (N,); the label of an unreadable pair is UNREADABLE.
        confusion: int64 (K,K): pixels of class i that were taken for class j, over all images.
        loss, pixels: (N,), the cross-entropy summed over an image's labelled pixels, and their number.
        boundary: (N,2), the sum of the boundary F1 over an image's classes, and their number; None if not asked for.
        shown: the predictions, uint8 (H,W), of the images asked for that this process saw.
        waiting, working: the seconds that this process waited for images and worked on them.
    """

    index: Tensor
    label: Tensor
    confusion: Tensor
    loss: Tensor
    pixels: Tensor
    boundary: Tensor | None
    shown: dict[int, np.ndarray] = field(default_factory=dict)
    waiting: float = 0.0
    working: float = 0.0

    def metrics(self, classes: Classes) -> dict:
        """loss (a mean over pixels), miou, pixel_accuracy, iou (by class name; None for a class without a pixel in the
        truth and the predictions, which does not count in the mean), boundary_f1 if asked for, images, unreadable,
        missing_classes (those without a pixel in the truth)."""
        read = self.label != UNREADABLE
        if not read.any():
            raise DataError(f"none of the {len(read)} pairs could be read")
        if not self.pixels.sum():
            raise DataError(f"no pixel of the {int(read.sum())} images has a class: all are ignored")
        iou = intersection_over_union(self.confusion)
        named = dict(zip(classes.names, iou.tolist(), strict=True))
        metrics = {
            "loss": float(self.loss.sum() / self.pixels.sum()),
            "miou": float(iou.nanmean()),
            "pixel_accuracy": float(self.confusion.diagonal().sum().double() / self.confusion.sum()),
            "iou": {name: None if value != value else value for name, value in named.items()},
        }
        if self.boundary is not None:
            total, count = self.boundary.sum(0).tolist()
            metrics["boundary_f1"] = total / count if count else None
        counts = {"images": int(read.sum()), "unreadable": int((~read).sum())}
        missing = [name for name, count in zip(classes.names, self.confusion.sum(1).tolist(), strict=True) if not count]
        return {**metrics, **counts, "missing_classes": missing}


def confusion_of(prediction: Tensor, truth: Tensor, classes: int) -> Tensor:
    """How many pixels of class i were taken for class j, int64 (K,K); IGNORED in the truth does not count."""
    counted = truth != IGNORED
    pairs = truth[counted].long() * classes + prediction[counted].long()
    return pairs.bincount(minlength=classes * classes).view(classes, classes)


def intersection_over_union(confusion: Tensor) -> Tensor:
    """The IoU of each class, float64 (K,); nan for a class that neither the truth nor the prediction has."""
    hits = confusion.diagonal().double()
    return hits / (confusion.sum(0) + confusion.sum(1) - hits)


def boundary_scores(prediction: Tensor, truth: Tensor) -> tuple[float, int]:
    """(sum of the boundary F1 over the classes in the truth, their number) of an image, both (H,W) with IGNORED.

    A boundary pixel of a class has a neighbour (of 8) of another one. F1 = 2 P R / (P + R), where P is the share of the
    predicted boundary that is within TOLERANCE of the true one, and R the other way round. Distances are Euclidean.
    Source: Csurka et al., 2013.
    """
    prediction = torch.where(truth == IGNORED, truth, prediction)  # what is ignored bounds both alike
    present = [number for number in truth.unique().tolist() if number != IGNORED]
    if not present:
        return 0.0, 0
    reach = max(1, round(TOLERANCE * float(np.hypot(*truth.shape))))
    near, edges, found = [], [], []
    for side in (prediction, truth):
        inside = torch.stack([side == number for number in present])
        edges.append(inside & (F.max_pool2d((~inside).float(), 3, 1, 1) > 0))
        found.append(inside.any((1, 2)))
        near.append(within(edges[-1], reach))
    hits = [(edges[0] & near[1]).sum((1, 2)), (edges[1] & near[0]).sum((1, 2))]
    lengths = [edge.sum((1, 2)) for edge in edges]
    filled = (lengths[0] == 0) & (lengths[1] == 0) & found[0]  # a class that fills the image, and is found so
    precision, recall = (hit / length.clamp(min=1) for hit, length in zip(hits, lengths, strict=True))
    score = 2 * precision * recall / (precision + recall).clamp(min=1e-9)
    return float(torch.where(filled, 1.0, score).sum()), len(present)


def within(edge: Tensor, reach: int) -> Tensor:
    """Which pixels are at most `reach` pixels away, in a straight line, from one of `edge`, bool (K,H,W)."""
    height, width = edge.shape[1:]
    edge = F.pad(edge, (reach,) * 4)
    wide, found = torch.zeros_like(edge[..., :width]), torch.zeros_like(edge[..., :height, :width])
    for column in range(reach + 1):  # a disc is made of rectangles, the narrowest and highest first
        for start in (reach - column, reach + column):
            wide |= edge[..., start : start + width]
        for row in range(reach + 1):
            if math.isqrt(reach**2 - row**2) == column:
                for start in (reach - row, reach + row):
                    found |= wide[..., start : start + height, :]
    return found


@torch.inference_mode()
def segment_batches(model, loader, preprocessing, accelerator, *, boundary=False, shown=(), bar=None) -> Segmented:
    """Runs a segmenter over the batches of a prepared loader. Every process gets the whole Segmented, in which each
    image counts once, except `shown`, the indices of images whose predictions are kept. `bar`: a Progress of images."""
    rows, confusion, kept, waiting, start = [], 0, {}, 0.0, time.perf_counter()
    before = start
    for batch in batches(loader):
        waiting += time.perf_counter() - before
        images = preprocessing.normalize(batch["image"])
        found = []
        for row, (inner, outer) in enumerate(zip(batch["inner"].tolist(), batch["outer"].tolist(), strict=True)):
            # one by one: sizes may differ, and logits at full size are large
            image, truth = images[row : row + 1, :, : inner[0], : inner[1]], batch["mask"][row, : outer[0], : outer[1]]
            logits = model(image, tuple(outer)).float()
            prediction = logits.argmax(1)[0].to(truth.dtype)
            loss = F.cross_entropy(logits, truth[None].long(), ignore_index=IGNORED, reduction="sum")
            scores = boundary_scores(prediction, truth) if boundary else (0.0, 0)
            numbers = [loss, (truth != IGNORED).sum().float(), *loss.new_tensor(scores)]
            found.append((torch.stack(numbers), confusion_of(prediction, truth, logits.shape[1])))
            if (index := int(batch["index"][row])) in shown and batch["label"][row] != UNREADABLE:
                kept[index] = prediction.cpu().numpy()
        numbers, matrices = (torch.stack(column) for column in zip(*found, strict=True))
        *row, matrices = accelerator.gather_for_metrics((batch["index"], batch["label"], numbers, matrices))
        confusion = confusion + matrices.sum(0).cpu()
        rows.append([column.cpu() for column in row])
        if bar is not None:
            bar.update(bar.done + len(rows[-1][0]))
        before = time.perf_counter()
    index, label, numbers = (torch.cat(column) for column in zip(*rows, strict=True))
    numbers = numbers.double()
    working = before - start - waiting
    more = dict(boundary=numbers[:, 2:] if boundary else None, shown=kept, waiting=waiting, working=working)
    return Segmented(index, label, confusion, numbers[:, 0], numbers[:, 1], **more)


def evenly(count: int, most: int) -> list[int]:
    """At most `most` indices below `count`, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, most).astype(int)).tolist()


def evaluate(
    path: str | Path,
    data: str | Path,
    *,
    split: str | None = None,
    checkpoint: str = "best",
    batch_size: int = 8,
    scale: float | None = None,
    workers: int = 2,
    strict: bool = False,
    out: str | Path | None = None,
    overwrite: bool = False,
    console: Console | None = None,
    **open_options,
) -> tuple[dict, list[str]]:
    """Evaluates a run of segmentation on `data`, whose masks have the run's classes.

    Args:
        path: the run folder. data, open_options: see masks.open_masked.
        split: "train", "val", "test", "all"; None: see labelled.Data.for_evaluation.
        scale: the factor on the images' size; None: as in training. Masks are never resized.
        out: a folder for evaluation.json, confusion.png and predictions.png. overwrite: these may be replaced.
        console: rich's, for the progress; None is silent.
    Missing `open_options` are as in training; for other data than those of the run only val_fraction.
    Returns: (metrics, list of warnings); metrics are those of Segmented, and "split", "scale", "images_per_second",
        "model_images_per_second".
    Errors: DataError, ExistsError, OptionError, RunError, SaveError.
    """
    if scale is not None and not 0.01 <= scale <= 16:
        raise OptionError(f"scale must be from 0.01 to 16, got {scale}")
    segmenter = load_segmenter(path, checkpoint)
    config, classes = segmenter.run.config, segmenter.classes
    scale = segmenter.scale if scale is None else scale
    files = evaluation_files(out) if out is not None else ()
    if files:
        check_outside(out, data)
        check_absent(*files, overwrite=overwrite)
    trained_on, accelerator = config["data"], make_accelerator()
    console = console if accelerator.is_main_process else None
    open_options = opening(data, trained_on, OPEN_OPTIONS, open_options)
    with Progress(f"opening {data}", console=console):
        data_set = open_masked(data, **open_options)
    chosen, name = data_set.for_evaluation(split, trained_on=trained_on["where"])
    seen = seen_in_training(data, data_set, name, split, open_options.get("val_fraction"), trained_on, console)
    batch_size += -batch_size % accelerator.num_processes  # they share a batch
    model, preprocessing = segmenter.model.to(accelerator.device), segmenter.preprocessing
    loader = make_masked_loader(chosen, classes, preprocessing, batch_size, scale=scale, workers=workers)
    loader, shown = accelerator.prepare(loader), evenly(len(chosen), plots_masks.PAIRS) if files else []
    if files and accelerator.is_main_process:  # before the work, which takes long
        make_folder(Path(out))
        check_writable(files[0])
    bar = Progress("evaluating", len(chosen), console=console)
    with bar, autocast(accelerator.device, config["options"]["precision"]):
        outcome = segment_batches(model, loader, preprocessing, accelerator, boundary=True, shown=shown, bar=bar)
    problems = [chosen.problem(i) for i in outcome.index[outcome.label == UNREADABLE].tolist()]
    if problems and strict:
        raise DataError(f"unreadable image (--strict): {problems[0]}")
    check_finite(outcome.loss[outcome.label != UNREADABLE], path)
    metrics = {"split": name, "scale": scale, **outcome.metrics(classes)}
    seconds = {"images_per_second": outcome.waiting + outcome.working, "model_images_per_second": outcome.working}
    metrics |= {rate: round(len(chosen) / duration, 2) for rate, duration in seconds.items()}
    if files and accelerator.is_main_process:
        table, confusion, predictions = files
        write_json(table, metrics)
        plots_masks.pixel_confusion(confusion, outcome.confusion, classes.names, metrics)
        plots_masks.pairs(predictions, chosen, outcome.shown, classes, metrics)
    told = [*data_set.left_out, *filter(None, [workers_note(workers, chosen)]), *seen]
    return metrics, [*told, *warnings_of(metrics, problems, "pixel", "the mean IoU")]


def evaluation_files(folder: str | Path) -> tuple[Path, Path, Path]:
    """The files of an evaluation in a folder: its metrics and its pictures."""
    return tuple(Path(folder) / name for name in ("evaluation.json", "confusion.png", "predictions.png"))
