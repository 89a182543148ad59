"""How near samples are to reference images, by the features of a network: Frechet distance (FID, where the features are
Inception's), kernel distance, precision, recall, score, accuracy (`gspn fid`).

The reference's statistics are kept in a file, by what the images, their size and the network are.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from rich.console import Console

from gspn.data.images import DataError, Split, listed
from gspn.files import check_absent, remove
from gspn.metrics.distances import (
    NEIGHBOUR,
    SPLITS,
    SUBSETS,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from gspn.metrics.features import Extractor, load_extractor
from gspn.metrics.image_sets import ARRAYS, NO_CLASS, ImageSet, open_images
from gspn.metrics.image_statistics import Statistics, Work, read_statistics, refusal, save_statistics
from gspn.options import OptionError, check_range
from gspn.progress import Progress
from gspn.train.loop import make_accelerator

__all__ = ["default_cache", "evaluate_samples", "frechet_distance"]

INCEPTION_FEATURES = 2048
RESIZED = "to the largest centred box of these proportions, bicubic with antialiasing (Pillow), if not of this size"


def default_cache() -> Path:
    """The folder for statistics that `gspn fid` takes."""
    return Path.home() / ".cache" / "gspn" / "fid"


def evaluate_samples(
    samples: str | Path,
    reference: str | Path,
    features: str | Extractor,
    *,
    samples_split: str | None = None,
    split: str | None = None,
    size: tuple[int, int] | None = None,
    batch_size: int = 64,
    workers: int = 2,
    strict: bool = False,
    cache: str | Path | None = None,
    save: str | Path | None = None,
    overwrite: bool = False,
    console: Console | None = None,
    **open_options,
) -> dict:
    """Compares samples with reference images by the features of a network.

    Args:
        samples: see imagesets.open_images; of DATA with splits the one that evaluation takes, or samples_split.
        reference: likewise, of DATA with splits by default "train", or split; or a file of statistics that `save`
            made, or an npz file of Inception's mu and sigma, as others publish them.
        features: see features.load_extractor; or an Extractor of your own.
        size: (H, W) at which they are compared; None: that of the reference images. Images of another size are resized
            to it first, by the rule that the result states.
        cache: the folder for statistics; None keeps none. save: a file for those of the reference; what
            is there is an error, unless it holds the same statistics or `overwrite`.
        open_options: see data.open_data.
    Returns: the same in every process:
        "frechet_distance", "precision", "recall"; "kernel_distance" {"mean", "std", "subsets", "subset_size"};
        "score" and "reference_score" {"mean", "std"}: of the network's probabilities, the Inception Score's formula;
        "accuracy" and "reference_accuracy": of a classifier, on images whose class is known. None: not to be had;
        "names": what to call each of these, with the network, such as "Frechet distance (classifier:runs/a)";
        "features", "dimension"; "size", "resized"; "notes": what the user should know, one text each;
        "samples" and "reference": {"where", "split", "images", "unreadable"}.
    Errors: DataError, ExistsError, OptionError, RunError, SaveError.
    """
    check_range("batch_size", batch_size)
    check_range("workers", workers)
    accelerator, notes = make_accelerator(), []
    extractor = features if isinstance(features, Extractor) else load_extractor(features)
    main = accelerator.is_main_process
    batch_size += -batch_size % accelerator.num_processes  # they share a batch
    known = _given(reference, extractor, split, save, strict)
    with Progress("opening the images", console=console if main else None):
        theirs = None if known else open_images(reference, split, "train", **open_options)
        ours = open_images(samples, samples_split, **open_options)
    if known and known.size and size not in (None, known.size):
        raise OptionError("{} is of images of {}x{}, but size is {}x{}".format(reference, *known.size, *size))
    size = size or (known.size if known else theirs.size()) or ours.size()
    cache = Path(cache).expanduser() if cache is not None else None
    work = Work(extractor, size, accelerator, batch_size, workers, strict, cache, console, notes)
    ours = _numbered(ours, extractor, "the samples", notes)
    if theirs is not None:
        theirs = _numbered(theirs, extractor, "the reference", notes)
        key = work.key(theirs) if save is not None else None
        if save is not None and not _holds(Path(save).expanduser(), key):
            check_absent(Path(save).expanduser(), overwrite=overwrite)
        statistics, _ = work.statistics(theirs, "reference")
        known = main and Known.of(statistics, size)
        if main and save is not None:
            save_statistics(Path(save).expanduser(), statistics, key)
    notes += _other_classes(ours.classes, theirs.classes if theirs else known.classes, extractor)
    statistics, file = work.statistics(ours, "samples")
    result = None
    if main:
        of_samples = _described(statistics, samples, ours.part)
        of_reference = _described(known.statistics, reference, theirs.part if theirs else None)
        compared = _compare(statistics, known, extractor, notes)
        result = {"features": extractor.name, **compared, "samples": of_samples, "reference": of_reference}
        result |= {"size": list(size), "resized": f"{RESIZED}; then {extractor.rule}", "notes": notes}
        if file is not None and file.exists():
            remove(file, quietly=True)  # samples come and go; the reference stays
    (result,) = broadcast_object_list([result])
    return result


def _holds(file: Path, key: dict) -> bool:
    """Whether the file holds statistics of these images by this network, as one that a stopped call saved."""
    try:
        return read_statistics(file)[1] == key
    except DataError:
        return False


@dataclass
class Known:
    """What is known of a reference: mean and covariance; where they are known, statistics, (H, W) and classes of its
    images."""

    mean: np.ndarray
    covariance: np.ndarray
    statistics: Statistics | None = None
    size: tuple[int, int] | None = None
    classes: set[str] | None = None

    @classmethod
    def of(cls, statistics: Statistics, size: tuple[int, int], classes=None) -> "Known":
        moments = statistics.moments
        return cls(moments.mean.numpy(), moments.covariance().numpy(), statistics, size, classes)


def _given(reference, extractor, split, save, strict) -> Known | None:
    """The reference if it is a file of statistics. Errors: DataError, OptionError if they are of something else."""
    path, known = Path(reference).expanduser(), None
    if path.suffix == ".safetensors":
        statistics, key = read_statistics(path)
        if key["network"] != extractor.digest(like=key["network"]):
            raise OptionError(f"{reference} is of features {key['features']}, not of {extractor.name} as it is now")
        if statistics.done < statistics.images:
            raise DataError(f"{reference} is of {statistics.done} of {statistics.images} images: it was interrupted")
        if strict and (refused := refusal(statistics, key["where"], None, path)):
            raise DataError(refused)
        known = Known.of(statistics, tuple(key["size"]), set(key.get("classes") or ()) or None)
    elif path.suffix == ".npz" and path.is_file():
        known = _published(path, extractor)
    if known and (split or save):
        raise OptionError(f"{reference} holds statistics: neither a split can be chosen nor can they be saved again")
    return known


def _published(path, extractor):
    """Mean and covariance of an npz file that holds no images."""
    try:
        with np.load(path) as arrays:
            if "arr_0" in arrays.files:
                return None
            if not {"mu", "sigma"} <= set(arrays.files):
                raise DataError(f"{path} holds {', '.join(arrays.files)}; expected mu and sigma, or {ARRAYS}")
            mean, covariance = (arrays[name].astype(np.float64) for name in ("mu", "sigma"))
    except DataError:
        raise
    except Exception as error:  # zipfile's and zlib's, of a damaged file
        raise DataError(f"{path} cannot be read, it is damaged or no npz file: {error}") from error
    if not extractor.standard:
        raise OptionError(f"{path} holds mu and sigma of unnamed features, taken for Inception's: not {extractor.name}")
    d = INCEPTION_FEATURES
    if mean.shape != (d,) or covariance.shape != (d, d):
        raise DataError(f"mu and sigma of {path} are {mean.shape} and {covariance.shape}; expected {d} features")
    return Known(mean, covariance)


def _numbered(images: ImageSet, extractor: Extractor, what: str, notes: list[str]) -> ImageSet:
    """The set with labels that number the network's classes, NO_CLASS where they do not."""
    notes += [f"{what}: {note}" for note in images.notes]
    split = images.split
    if extractor.class_names is not None:
        try:
            if bool((split.labels == NO_CLASS).any()):
                raise DataError("their classes are not known")
            images.split = split.relabelled(extractor.class_names)
            return images
        except DataError as error:
            notes.append(f"no accuracy on {what}: {error}")
    images.split = Split(torch.full_like(split.labels, NO_CLASS), None, read=split.image, names=split.names)
    return images


def _other_classes(ours, theirs, extractor) -> list[str]:
    """Notes where the samples are not of the classes of the reference, or not of all that the network knows."""
    if ours is None:
        return []
    notes = []
    if theirs is not None and theirs != ours:
        pairs = (("samples", theirs - ours), ("reference images", ours - theirs))
        told = "; ".join(f"no {what} of {listed(sorted(c), 'class', 'classes')}" for what, c in pairs if c)
        notes.append(f"samples and reference are not of the same classes, which the distances show too: {told}")
    missing = set(extractor.class_names or ()) - ours
    if missing and missing != (theirs or set()) - ours:
        notes.append(f"no samples of {listed(sorted(missing), 'class', 'classes')} that {extractor.name} knows")
    return notes


def _described(statistics, where, part):
    counts = {name: getattr(statistics, name, None) for name in ("images", "unreadable")}
    return {"where": str(where), "split": part or None, **counts}


def _compare(ours: Statistics, known: Known, extractor: Extractor, notes: list[str]) -> dict:
    """The part of evaluate_samples' result that compares."""
    d, theirs = len(known.mean), known.statistics
    for what, statistics in (("samples", ours), ("reference", theirs)):
        if statistics is None:
            continue
        if statistics.unreadable:
            notes.append(
                f"{statistics.unreadable} of {statistics.images} images of the {what} are unreadable, left out"
            )
        if statistics.moments.count <= d:
            notes.append(
                f"{what}: {statistics.moments.count} images are too few for {d} features, their covariance has a rank "
                f"of at most {statistics.moments.count - 1}: the distance comes out too large, and compares only with "
                "those of as many images"
            )
    moments = ours.moments
    result = {
        "dimension": d,
        "frechet_distance": frechet_distance(
            moments.mean.numpy(), moments.covariance().numpy(), known.mean, known.covariance
        ),
    }
    result |= dict.fromkeys(("kernel_distance", "precision", "recall", "reference_score", "reference_accuracy"))
    if theirs is None:
        notes.append(
            f"no kernel distance, precision, recall: {ARRAYS.split(' as')[0]} with mu and sigma has no features"
        )
    else:
        mean, std, size = kernel_distance(ours.kept, theirs.kept)
        result["kernel_distance"] = {"mean": mean, "std": std, "subsets": SUBSETS, "subset_size": size}
        if min(len(ours.kept), len(theirs.kept)) > NEIGHBOUR:
            result["precision"], result["recall"] = precision_recall(ours.kept, theirs.kept)
        else:
            notes.append(f"no precision and recall: they take more than {NEIGHBOUR} images of each set")
    for prefix, what, statistics in (("", "samples", ours), ("reference_", "reference", theirs)):
        scored = statistics is not None and statistics.score is not None
        if scored and statistics.score.count.min() < 2:  # which scores 1, whatever the image is
            scored = False
            notes.append(
                f"no score of the {what}: it takes two images in each of {SPLITS} parts, of {statistics.moments.count}"
            )
        value = dict(zip(("mean", "std"), statistics.score.value(), strict=True)) if scored else None
        result[f"{prefix}score"] = value
        result[f"{prefix}accuracy"] = statistics.accuracy() if statistics else None
    result["names"] = {
        "frechet_distance": extractor.called("Frechet distance"),
        "kernel_distance": extractor.called("kernel distance"),
        "precision": extractor.called("precision"),
        "recall": extractor.called("recall"),
        "score": extractor.called("score"),
        "accuracy": extractor.called("accuracy"),
    }
    return result
