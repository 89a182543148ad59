"""Batches of a split's images for training and evaluation.

Everything random can be repeated: the order of an epoch is a function of (seed, epoch), the augmentation of an image of
(seed, epoch, index). Neither depends on the number of workers or processes.
"""

import math
import multiprocessing
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_convert

from gspn.data.augment import SMALL, Augmentation
from gspn.data.images import UNREADABLE, DataError, Preprocessing, Split, generator, raise_if_of_machine

PROBLEM = "problem"  # a batch's key for a DataError's text: torch would bury a worker's exception in a traceback
DYING = 1.0  # seconds for a worker to be gone after its connection broke
KEPT = 2**29  # bytes of images that a loader keeps in memory


class ImageDataset(Dataset):
    """A Split as the loader reads it, in batches, by lists of (epoch, *key); see EpochSampler.

    A batch is {"image": uint8 (B, C, H, W), "label": int64 (B,), "index": int64 (B,)}. An image that could not be
    decoded has the label UNREADABLE and pixels of 0, so that batches keep their size.

    With `keep` each image is decoded once and kept, as it is before it is augmented. Images in memory are resized at
    once if they then fit into KEPT bytes, and otherwise as they are needed.
    """

    def __init__(self, split, preprocessing, augmentation=None, seed=0, keep=False):
        self.split, self.preprocessing, self.augmentation, self.seed = split, preprocessing, augmentation, seed
        self.epoch = self.numbers = self.pixels = None
        wanted = (preprocessing.channels, *preprocessing.size)
        self.kept = torch.empty(len(split), *wanted, dtype=torch.uint8) if keep else None
        self.known = torch.zeros(len(split), dtype=torch.bool)  # which of them
        if split.pixels is not None and not (augmentation and augmentation.crop):
            if tuple(split.pixels.shape[1:]) == wanted and preprocessing.crop == 1:
                self.pixels = split.pixels
            elif _fits(split, preprocessing):
                self.pixels = torch.empty(len(split), *wanted, dtype=torch.uint8)
                for i, pixels in enumerate(self.pixels):
                    pixels.copy_(preprocessing(split.image(i)))

    def __len__(self):
        return len(self.split)

    def __getitems__(self, keys):
        epoch, index = keys[0][0], torch.tensor([key[1] for key in keys])
        label = self.split.labels[index]
        numbers = self.epoch_numbers(epoch)[index] if self.augmentation else None
        if self.pixels is not None:
            image = self.pixels[index]
        else:
            image = torch.zeros(len(keys), self.preprocessing.channels, *self.preprocessing.size, dtype=torch.uint8)
            for row, key in enumerate(keys):
                crop = ()
                if self.augmentation and self.augmentation.crop:
                    crop = numbers[row, 3:], self.augmentation.crop_area
                found = self.read(key[1:], *crop)
                if found is None:
                    label[row] = UNREADABLE
                else:
                    image[row] = found
        if self.augmentation:
            images = [(self.seed, epoch, i) for i in index.tolist()]
            image = self.augmentation(image, numbers[:, :3], images, self.preprocessing)
        return {"image": image, "label": label, "index": index}

    def read(self, key, *crop):
        """One image, preprocessed; None if it cannot be decoded. Errors: those of the machine."""
        if self.known[key[0]]:
            return self.kept[key[0]]
        try:
            found = self.preprocessing(self.split.image(*key), *crop)
        except Exception as error:  # Pillow raises anything on damaged files; Split.problem says what it was
            raise_if_of_machine(error)
            return None
        if self.kept is not None:
            self.kept[key[0]], self.known[key[0]] = found, True
        return found

    def epoch_numbers(self, epoch):
        """(N, 7) random numbers in [0, 1) for the whole epoch: a row belongs to (seed, epoch, index)."""
        if self.epoch != epoch:
            self.numbers, self.epoch = torch.rand(len(self), 7, generator=generator(self.seed, epoch, 1)), epoch
        return self.numbers


class EpochSampler(Sampler):
    """Yields (epoch, *key) for the keys of a split (Split.keys): in order, or shuffled by (seed, epoch)."""

    def __init__(self, split, shuffle, seed=0):
        self.split, self.shuffle, self.seed, self.epoch, self.start = split, shuffle, seed, 0, 0

    def __len__(self):
        return len(self.split)

    def __iter__(self):
        keys = self.split.keys(generator(self.seed, self.epoch, 0) if self.shuffle else None)
        return ((self.epoch, *key) for key in islice(keys, self.start, None))


class WorkerContext(BaseContext):
    """The default context of multiprocessing, which remembers the processes that it started."""

    def __init__(self):
        self._processes = []

    @property
    def started(self):
        return [process for process in self._processes if process.pid is not None]

    def get_context(self, method=None):
        return multiprocessing.get_context(method)

    def Process(self, *args, **kwargs):
        process = multiprocessing.Process(*args, **kwargs)
        self._processes = [each for each in self._processes if each.exitcode is None] + [process]
        return process


class Loader(DataLoader):
    """A DataLoader that remembers its workers, so that `batches` can tell whether one died. It does not give torch's
    warning of too many workers at the start of each epoch; `workers_note` says it once."""

    def __init__(self, dataset: Dataset, *, num_workers: int = 0, **more):
        context = WorkerContext() if num_workers else None
        super().__init__(dataset, num_workers=num_workers, multiprocessing_context=context, **more)

    def check_worker_number_rationality(self) -> None:
        pass

    def begin(self, epoch: int, batches_done: int = 0) -> None:
        """Makes the next iteration go through `epoch`, without its first `batches_done` batches. It also holds for a
        loader that accelerate made of this one, as they share the sampler."""
        self.sampler.epoch, self.sampler.start = epoch, batches_done * self.batch_size


def _fits(split, preprocessing):
    """Whether the images of a split fit into KEPT bytes at the model's input size."""
    return len(split) * preprocessing.channels * math.prod(preprocessing.size) <= KEPT


def can_be_kept(split: Split, preprocessing: Preprocessing, augmentation: Augmentation | None) -> bool:
    """Whether decoding a split's images once pays: they are small, as the first of them shows, so that workers would
    gain little; they fit into KEPT bytes at the model's input size; and neither random crops nor RandAugment nor jitter
    works on what was decoded. Streams have no place for an image."""
    if split.pixels is not None or split.read is None or not len(split):
        return False
    if (augmentation is not None and augmentation.slow) or not _fits(split, preprocessing):
        return False
    try:
        return max(split.image(0).size) <= SMALL
    except Exception:  # Pillow raises anything on damaged files
        return False


def make_loader(
    split: Split,
    preprocessing: Preprocessing,
    batch_size: int,
    *,
    train: bool = False,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    workers: int = 0,
    keep: bool = False,
) -> Loader:
    """A Loader of ImageDataset's batches. Training shuffles, augments and leaves out the last incomplete batch
    (unless it is the only one); evaluation goes through the images in order.

    With `keep`, for several epochs, small images are decoded once, without workers; see `can_be_kept`."""
    augmentation = augmentation if train else None
    keep = keep and can_be_kept(split, preprocessing, augmentation)
    dataset = ImageDataset(split, preprocessing, augmentation, seed, keep)
    slow = not keep and (dataset.pixels is None or (augmentation is not None and augmentation.slow))
    return Loader(
        dataset,
        batch_size=batch_size,
        sampler=EpochSampler(split, shuffle=train, seed=seed),
        drop_last=train and len(split) >= batch_size,
        collate_fn=default_convert,
        num_workers=workers if slow else 0,
        persistent_workers=slow and workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


@contextmanager
def untold_workers() -> Iterator[None]:
    """In the block, a DataLoader that accelerate makes of a Loader does not warn of too many workers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        yield


def workers_note(workers: int, split: Split) -> str | None:
    """A note where more processes read a split's images than there are processors; else None."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if split.pixels is not None or workers <= processors:
        return None
    return f"{workers} workers on {processors} processor{'s' * (processors > 1)}: fewer (--workers) may be faster"


def batches(loader: Iterable[dict]) -> Iterator[dict]:
    """The batches of a loader, also of one that accelerate prepared. Errors: DataError where a worker process died, or
    where a batch says what is wrong with the data (PROBLEM)."""
    iterator = iter(loader)
    while True:
        try:
            try:
                batch = next(iterator, None)
            except (OSError, EOFError) as error:  # the connection to a worker breaks when it dies
                _refuse_dead_workers(loader, error)
                raise
        except RuntimeError as error:  # from a signal handler of torch: at any moment, also in the lines above
            _refuse_dead_workers(loader, error)
            raise
        if batch is None:
            return
        if PROBLEM in batch:
            raise DataError(batch[PROBLEM])
        yield batch


def _refuse_dead_workers(loader, error):
    """Raises DataError if workers of the loader were killed or failed."""
    context = getattr(loader, "multiprocessing_context", None)
    workers = context.started if isinstance(context, WorkerContext) else []
    wait([worker.sentinel for worker in workers], DYING)
    for worker in workers:
        if wait([worker.sentinel], 0):  # it is ending: its exit code may come a moment later
            worker.join(DYING)
    if dead := sum(worker.exitcode not in (None, 0) for worker in workers):
        raise DataError(
            f"{dead} of the processes that read images died, most likely because memory or shared memory ran out "
            f"({type(error).__name__}: {error}). Lower --workers or --batch-size, or read in the main process with "
            "--workers 0"
        ) from error
