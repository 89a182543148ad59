"""Compares samples with reference images by the features of a network (`gspn fid`): Frechet distance (FID, with
Inception's features), kernel distance, precision, recall, score, accuracy.

The statistics of the reference are cached in a file, by images, size and network.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from rich.console import Console

from gspn.data.images import DataError, listed
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
from gspn.metrics.image_statistics import (
    OF_SAMPLES,
    Statistics,
    Work,
    is_safetensors,
    read_statistics,
    refusal,
    save_statistics,
)
from gspn.options import OptionError
from gspn.options.generators import FidOptions
from gspn.places import expanded
from gspn.progress import Progress
from gspn.train.loop import make_accelerator

__all__ = ["default_cache", "evaluate_samples", "frechet_distance"]

INCEPTION_FEATURES = 2048
RESIZED = "to the largest centred box of these proportions, bicubic with antialiasing (Pillow), if not of this size"


def default_cache() -> Path:
    """The default folder of `gspn fid` for cached statistics."""
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
        samples: see image_sets.open_images; of DATA with splits the one that evaluation takes, or samples_split.
        reference: likewise, of DATA with splits by default "train", or split; or a file of statistics that `save`
            made, or an npz file of Inception's mu and sigma, as others publish them.
        features: see features.load_extractor; or an Extractor of your own.
        size: (H, W) at which they are compared; None: that of the reference images. Images of another size are resized
            to it first, by the rule that the result states.
        cache: the folder for statistics; None keeps none. save: a .safetensors file for those of the
            reference; what is there is an error, unless it holds the same statistics or `overwrite`.
        open_options: see labelled.open_data.
    Returns: the same in every process:
        "frechet_distance", "precision", "recall"; "kernel_distance" {"mean", "std", "subsets", "subset_size"};
        "score" and "reference_score" {"mean", "std"}: of the network's probabilities, the Inception Score's formula;
        "accuracy" and "reference_accuracy": of a classifier, on images whose class is known. None: not to be had;
        "names": what to call each of these, with the network, such as "Frechet distance (classifier:runs/a)";
        "features", "dimension"; "size", "resized"; "notes": what the user should know, one text each;
        "samples" and "reference": {"where", "split", "images", "unreadable"}.
    Errors: DataError, ExistsError, OptionError, RunError, SaveError.
    """
    FidOptions.check(batch_size=batch_size, workers=workers, save=save)
    accelerator, notes = make_accelerator(), []
    main = accelerator.is_main_process
    extractor = features if isinstance(features, Extractor) else load_extractor(features)
    cache, save = (None if path is None else expanded(path) for path in (cache, save))

    # 1. what is compared: two sets of images, or images and a file of the reference's statistics
    stored = _stored(reference, extractor, split, save, strict)
    with Progress("opening the images", console=console if main else None):
        reference_images = None if stored else open_images(reference, split, "train", **open_options)
        sample_images = open_images(samples, samples_split, **open_options)
    if unused := sample_images.unused & (reference_images or sample_images).unused:
        raise OptionError(
            f"{', '.join(sorted(unused))} cannot apply to {samples} or {reference}: class_names is for classes without "
            "names, the others for DATA; leave out what does not apply"
        )
    size = _common_size(size, sample_images, reference_images, stored, reference)
    sample_images = _numbered(sample_images, extractor, "the samples", notes)

    # 2. their features
    batch_size += -batch_size % accelerator.num_processes  # the processes share a batch
    work = Work(extractor, size, accelerator, batch_size, workers, strict, cache, console, notes)
    if stored:
        theirs = stored
    else:
        reference_images = _numbered(reference_images, extractor, "the reference", notes)
        theirs = _of_reference(reference_images, reference, work, save, overwrite)
    notes += _other_classes(sample_images.classes, theirs.classes, extractor)
    statistics, file = work.statistics(sample_images, "samples")
    ours = FeatureSet(str(samples), sample_images.part, statistics, classes=sample_images.classes)

    # 3. how far they are from each other
    result = None
    if main:
        result = {"features": extractor.name, **_compare(ours, theirs, extractor, notes)}
        result |= {"samples": ours.described(), "reference": theirs.described()}
        result |= {"size": list(size), "resized": f"{RESIZED}; then {extractor.rule}", "notes": notes}
        if file is not None and file.name.endswith(OF_SAMPLES):
            remove(file, quietly=True)  # samples come and go; a reference stays
    (result,) = broadcast_object_list([result])
    return result


@dataclass
class FeatureSet:
    """The features of one set of images, as far as they are known.

    Attributes:
        where, part: what was asked for, and which split of it.
        statistics: see Statistics; None in all but the main process, and where only mean and covariance are known.
        published: mean (d,) and covariance (d, d), where only these are known.
        size: (H, W) at which the features were made, where it is fixed. classes: the names of those that have images.
    """

    where: str
    part: str | None
    statistics: Statistics | None = None
    published: tuple[np.ndarray, np.ndarray] | None = None
    size: tuple[int, int] | None = None
    classes: set[str] | None = None

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (d,) and covariance (d, d)."""
        if self.published is not None:
            return self.published
        return self.statistics.moments.mean.numpy(), self.statistics.moments.covariance().numpy()

    def described(self) -> dict:
        """What the result says of the set."""
        counts = {name: getattr(self.statistics, name, None) for name in ("images", "unreadable")}
        return {"where": self.where, "split": self.part or None, **counts}


def _common_size(size, samples, reference, stored, where) -> tuple[int, int]:
    """(H, W) at which the images are compared. Errors: OptionError where stored statistics are of another size."""
    if stored and stored.size and size not in (None, stored.size):
        raise OptionError("{} is of images of {}x{}, but size is {}x{}".format(where, *stored.size, *size))
    return size or (stored.size if stored else reference.size()) or samples.size()


def _of_reference(images: ImageSet, where, work: Work, save: Path | None, overwrite: bool) -> FeatureSet:
    """The features of the reference images, whose statistics are saved if that is wanted."""
    key = work.key(images) if save is not None else None
    if save is not None and not _holds(save, key):
        check_absent(save, overwrite=overwrite)
    statistics, _ = work.statistics(images, "reference")
    if save is not None and statistics is not None and work.accelerator.is_main_process:
        save_statistics(save, statistics, key)
    return FeatureSet(str(where), images.part, statistics, classes=images.classes)


def _holds(file: Path, key: dict) -> bool:
    """Whether the file holds statistics of these images by this network, as one that a stopped call saved."""
    try:
        return read_statistics(file)[1] == key
    except DataError:
        return False


def _stored(reference, extractor, split, save, strict) -> FeatureSet | None:
    """The reference if it is a file of statistics. Errors: DataError, OptionError if they are of something else."""
    path, stored = expanded(reference), None
    if path.suffix == ".safetensors" or is_safetensors(path):  # older versions saved them under any name
        statistics, key = read_statistics(path)
        if key["network"] != extractor.digest(like=key["network"]):
            raise OptionError(f"{reference} holds features {key['features']}, not the present {extractor.name}")
        if statistics.done < statistics.images:
            raise DataError(f"{reference} covers {statistics.done} of {statistics.images} images: it was interrupted")
        if strict and (refused := refusal(statistics, key["where"], None, path)):
            raise DataError(refused)
        classes = set(key.get("classes") or ()) or None
        stored = FeatureSet(str(reference), None, statistics, size=tuple(key["size"]), classes=classes)
    elif path.suffix == ".npz" and path.is_file() and (published := _published(path, extractor)):
        stored = FeatureSet(str(reference), None, published=published)
    if stored and (split or save):
        raise OptionError(f"{reference} holds statistics: neither a split can be chosen nor can they be saved again")
    return stored


def _published(path, extractor):
    """(mean, covariance) of an npz file; None where it holds images."""
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
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise DataError(f"mu or sigma of {path} holds values that are no finite numbers: expected another file")
    return mean, covariance


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
    images.split = copy.copy(split)
    images.split.labels, images.split.class_names = torch.full_like(split.labels, NO_CLASS), None
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


def _compare(samples: FeatureSet, reference: FeatureSet, extractor: Extractor, notes: list[str]) -> dict:
    """The part of evaluate_samples' result that compares."""
    ours, theirs, moments = samples.statistics, reference.statistics, reference.moments()
    d = len(moments[0])
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
    result = {"dimension": d, "frechet_distance": frechet_distance(*samples.moments(), *moments)}
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
