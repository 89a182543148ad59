"""Statistics of the features of a set of images. They are computed batch by batch, over several processes, and kept in
a file, from which an interrupted call resumes.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from filelock import FileLock
from rich.console import Console
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gspn.data.images import UNREADABLE, DataError, Preprocessing, Split
from gspn.data.loader import batches, make_loader, workers_note
from gspn.digests import SCHEME, digest, tensors_of
from gspn.files import LOCK, atomic, check_format, make_folder, remove_left, save_tensors
from gspn.metrics.distances import Moments, Score
from gspn.metrics.features import Extractor
from gspn.metrics.image_sets import NO_CLASS, ImageSet, Rest
from gspn.places import NOTHING, missing
from gspn.progress import Progress

FORMAT = 1  # of a file of statistics
KEPT = 10_000  # images whose features are kept for kernel distance, precision and recall
SAVE_EVERY = 60  # seconds between two saves
OF_SAMPLES = ".samples.safetensors"  # ends the name of a cache file that goes when the samples have been compared
NAMED = 20  # unreadable images that are named at most


class Statistics:
    """Statistics of a set of N images, from batches.

    Attributes:
        images: N. done: the number of images seen, the first ones. unreadable: the number of these without pixels.
        left_out: int64 (U,), the indices of the unreadable ones; empty in files of older versions.
        moments: of the features of all images, a Moments.
        kept: float32 (M, d), the features of up to KEPT images, evenly spaced.
        score: of the network's probabilities, a Score; None where it gives none.
        classified, right: the number of images whose class is known, and of those that the network classifies right.
    """

    def __init__(self, images: int, d: int, classes: int | None):
        self.images, self.done, self.unreadable, self.classified, self.right = images, 0, 0, 0, 0
        self.left_out = torch.empty(0, dtype=torch.int64)
        self.moments, self.score = Moments.empty(d), Score(images, classes) if classes else None
        self.kept = torch.empty(0, d)
        self.wanted = torch.zeros(images, dtype=torch.bool)
        self.wanted[torch.linspace(0, images - 1, min(images, KEPT), dtype=torch.float64).round().long()] = True

    def add(self, index: Tensor, label: Tensor, features: Tensor, logits: Tensor | None) -> None:
        """Adds the next images, `index`, with labels as ImageDataset gives them."""
        self.done += len(index)
        seen = label != UNREADABLE
        self.unreadable += int((~seen).sum())
        self.left_out = torch.cat([self.left_out, index[~seen]])
        index, label, features = index[seen], label[seen], features[seen]
        logits = None if logits is None else logits[seen]
        for what, values in (("features", features), ("logits", logits)):
            if values is not None and not values.isfinite().all():
                raise DataError(f"the network's {what} of image {int(index[0])} or one after it are no finite numbers")
        self.moments.add(features)
        self.kept = torch.cat([self.kept, features[self.wanted[index]].float()])
        if logits is not None:
            self.score.add(index, logits)
            known = label != NO_CLASS
            self.classified += int(known.sum())
            self.right += int((logits.argmax(1) == label)[known].sum())

    def accuracy(self) -> float | None:
        return self.right / self.classified if self.classified else None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, for a file."""
        counts = [self.images, self.done, self.unreadable, self.classified, self.right, self.moments.count]
        tensors = {"counts": torch.tensor(counts), "mean": self.moments.mean, "scatter": self.moments.scatter}
        tensors |= {"kept": self.kept, "left_out": self.left_out}
        if self.score is not None:
            tensors |= {f"score.{key}": getattr(self.score, key) for key in ("count", "entropy", "probability")}
        return tensors

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "Statistics":
        """The statistics that `tensors` gave."""
        images, done, unreadable, classified, right, count = tensors["counts"].tolist()
        scored = "score.probability" in tensors
        self = cls(images, len(tensors["mean"]), tensors["score.probability"].shape[1] if scored else None)
        self.done, self.unreadable, self.classified, self.right = done, unreadable, classified, right
        self.moments, self.kept = Moments(count, tensors["mean"], tensors["scatter"]), tensors["kept"]
        self.left_out = tensors.get("left_out", self.left_out)
        for key in ("count", "entropy", "probability") if scored else ():
            setattr(self.score, key, tensors[f"score.{key}"])
        return self


# -- files of statistics --


def save_statistics(path: Path, statistics: Statistics, key: dict) -> None:
    """Writes statistics and their key, atomically. Errors: SaveError."""
    tensors = {name: tensor.contiguous() for name, tensor in statistics.tensors().items()}
    metadata = {"gspn": json.dumps(key), "digest": _digest(tensors, key)}
    make_folder(path.parent)
    with atomic(path) as temporary:
        save_tensors(temporary, tensors, metadata)


def is_safetensors(path: Path) -> bool:
    """Whether there is a safetensors file, whatever its name."""
    try:
        with path.open("rb") as file:
            length, start = int.from_bytes(file.read(8), "little"), file.read(1)  # of the header, which is JSON
        return start == b"{" and 8 + length <= path.stat().st_size
    except OSError:
        return False


def read_statistics(path: Path) -> tuple[Statistics, dict]:
    """(statistics, their key). Errors: DataError where the file is damaged or of another kind."""
    try:
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            # copies: the tensors are mapped, and the file may change
            tensors = {name: file.get_tensor(name).clone() for name in names}
        if "gspn" not in metadata:
            raise DataError(f"{path} holds no statistics of images; `gspn fid --save` writes such files")
        key = json.loads(metadata["gspn"])
        told = metadata.get("digest")
        if told is None or told != _digest(tensors, key, like=told):
            raise DataError(f"{path} is damaged: its content is not what was written")
        check_format(path, key["format"], FORMAT, DataError)
        if not all(tensor.isfinite().all() for tensor in tensors.values()):  # older versions did not check logits
            raise DataError(f"{path} holds statistics that are no finite numbers: remove it, to compute them again")
        return Statistics.of(tensors), key
    except DataError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged or holds no statistics of images: {error}") from error


def _digest(tensors, key, like=None):
    return digest([json.dumps(key), *tensors_of(tensors, "{name} {dtype} {shape}")], like)


def refusal(statistics: Statistics, where: str, split: Split | None, file: Path | str) -> str | None:
    """The error of --strict for statistics from a file; None where every image was read."""
    if not statistics.unreadable:
        return None
    first = ""
    if split is not None and len(statistics.left_out):
        first = f", the first: {split.problem(int(statistics.left_out[0]))}"
    return (
        f"unreadable images (--strict): {statistics.unreadable} of {statistics.images} of {where} were left out of the "
        f"statistics in {file}{first}"
    )


# -- from images to statistics --


@dataclass
class Work:
    """Computes statistics of sets of images with a network, at the size (H, W); `notes` collects notes for the user."""

    extractor: Extractor
    size: tuple[int, int]
    accelerator: object
    batch_size: int
    workers: int
    strict: bool
    cache: Path | None
    console: Console | None
    notes: list[str]

    def key(self, images: ImageSet) -> dict:
        """All that the statistics of these images depend on, and a description of them."""
        console = self.console if self.accelerator.is_main_process else None
        key = {"format": FORMAT, "images": images.identity(console), "where": images.where, "part": images.part}
        key["classes"] = sorted(images.classes) if images.classes else None
        return key | {"size": list(self.size), "features": self.extractor.name, "network": self.extractor.digest()}

    def file(self, key: dict) -> Path:
        """The cache file for a key; the images' path and the network's name do not count."""
        what = [key[name] for name in ("format", "images", "size", "network")]
        return self.cache / f"{digest([what]).removeprefix(SCHEME)[:32]}.safetensors"

    def statistics(self, images: ImageSet, what: str) -> tuple[Statistics | None, Path | None]:
        """(the statistics of all images, in the main process; the cache file). `what` is "samples" or "reference". The
        file of samples ends in OF_SAMPLES, unless the images are a reference's too: then it is the reference's."""
        main = self.accelerator.is_main_process
        key = self.key(images) if self.cache is not None else None  # this reads all images
        file = self.file(key) if key else None
        reason = missing(file) if main and file else None
        if reason == NOTHING and what == "samples":
            file = file.with_suffix(OF_SAMPLES)
        elif reason not in (None, NOTHING):
            file, note = None, f"the cache {self.cache} cannot be used, nothing is kept there: {reason}"
            self.notes += [note] if note not in self.notes else []
        statistics = self.found(file, len(images.split)) if main and file else None
        known = statistics.left_out.tolist() if statistics else []
        refused = self.strict and statistics and refusal(statistics, images.where, images.split, file)
        # one process looks, as the others may not see the same files
        start, refused = broadcast_object_list([statistics.done if statistics else 0, refused])
        if refused:
            raise DataError(refused)
        self.notes += [f"unreadable: {images.split.problem(i)}" for i in known[:NAMED]]
        if start < len(images.split):
            statistics = self.extract(images, what, start, statistics, file, key)
        if main and statistics.moments.count < 2:
            raise DataError(f"{images.where}: {statistics.moments.count} of {statistics.images} images could be read")
        return statistics, file

    def found(self, file, images):
        """The statistics in a file; None if there are none or they are damaged."""
        if not file.exists():
            return None
        try:
            statistics, _ = read_statistics(file)
        except DataError as error:
            self.notes.append(f"computed again: {error}")
            return None
        return statistics if statistics.images == images else None

    def extract(self, images, what, start, statistics, file, key):
        """Goes through the images from `start` on. Returns the statistics of all images in the main process."""
        size, workers = self.batch_size, self.workers
        how = Preprocessing(self.extractor.channels, self.size, (0.0,) * 3, (1.0,) * 3)
        loader = self.accelerator.prepare(make_loader(Rest(images.split, start), how, size, workers=workers))
        if (crowded := workers_note(workers, images.split)) and crowded not in self.notes:
            self.notes.append(crowded)
        network, saved, unreadable = self.extractor.network.to(self.accelerator.device), time.monotonic(), []
        main = self.accelerator.is_main_process
        bar = Progress(what, len(images.split), done=start, console=self.console if main else None)
        with bar, torch.inference_mode():
            for batch in batches(loader):
                features, logits = network(batch["image"])
                row = [batch["index"] + start, batch["label"], features.float()]
                row += [] if logits is None else [logits.float()]
                index, label, features, *rest = (each.cpu() for each in self.accelerator.gather_for_metrics(row))
                unreadable += index[label == UNREADABLE].tolist()
                if unreadable and self.strict:
                    raise DataError(f"unreadable image (--strict): {images.split.problem(unreadable[0])}")
                if not main:
                    continue
                if statistics is None:
                    classes = rest[0].shape[1] if rest else None
                    statistics = Statistics(len(images.split), features.shape[1], classes)
                statistics.add(index, label, features, rest[0] if rest else None)
                bar.update(statistics.done)
                if time.monotonic() - saved > SAVE_EVERY or statistics.done == statistics.images:
                    self.keep(file, statistics, key)
                    saved = time.monotonic()
        self.notes += [f"unreadable: {images.split.problem(i)}" for i in unreadable[:NAMED]]
        return statistics

    def keep(self, file, statistics, key):
        if file is None:
            return
        try:
            make_folder(file.parent)
            with FileLock(file.parent / LOCK, timeout=SAVE_EVERY):  # other calls write to the same cache
                remove_left(file.parent)
                save_statistics(file, statistics, key)
        except OSError as error:  # SaveError, FileLock's Timeout; the result does not depend on the cache
            note = f"the cache {self.cache} was not written: {error}"
            self.notes += [note] if note not in self.notes else []
