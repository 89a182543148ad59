"""Batches of a split's images for training and evaluation.

Everything random is a function of numbers that a later run can repeat: the order of an epoch of (seed, epoch), the
augmentation of an image of (seed, epoch, index). Nothing depends on the number of workers or processes.
"""

import os
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from gspn.data.augment import Augmentation
from gspn.data.images import UNREADABLE, DataError, Preprocessing, Split, generator


class ImageDataset(Dataset):
    """A split (see data.py) as the loader reads it: by lists of (epoch, *key), see EpochSampler, in batches.

    A batch is {"image": uint8 (B, C, H, W), "label": int64 (B,), "index": int64 (B,)}; the label of an image that
    could not be decoded is UNREADABLE and its pixels are 0, so that batches keep their size.
    """

    def __init__(self, split, preprocessing, augmentation=None, seed=0):
        self.split, self.preprocessing, self.augmentation, self.seed = split, preprocessing, augmentation, seed
        self.epoch = self.numbers = self.pixels = None
        wanted = (preprocessing.channels, *preprocessing.size)
        if split.pixels is not None and not (augmentation and augmentation.crop):
            if tuple(split.pixels.shape[1:]) == wanted and preprocessing.crop == 1:
                self.pixels = split.pixels
            else:
                self.pixels = torch.stack([preprocessing(split.image(i)) for i in range(len(split))])

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
                try:
                    image[row] = self.preprocessing(self.split.image(*key[1:]), *crop)
                except Exception:  # Pillow raises anything on damaged files; Split.problem says later what it was
                    label[row] = UNREADABLE
        if self.augmentation:
            images = [(self.seed, epoch, i) for i in index.tolist()]
            image = self.augmentation(image, numbers[:, :3], images, self.preprocessing)
        return {"image": image, "label": label, "index": index}

    def epoch_numbers(self, epoch):
        """(N, 7) random numbers in [0, 1) for the whole epoch: a row belongs to (seed, epoch, index)."""
        if self.epoch != epoch:
            self.numbers, self.epoch = torch.rand(len(self), 7, generator=generator(self.seed, epoch, 1)), epoch
        return self.numbers


class EpochSampler(Sampler):
    """Yields (epoch, *key) for the keys of a split (Split.keys): in order, or shuffled as (seed, epoch) say."""

    def __init__(self, split, shuffle, seed=0):
        self.split, self.shuffle, self.seed, self.epoch, self.start = split, shuffle, seed, 0, 0

    def __len__(self):
        return len(self.split)

    def __iter__(self):
        keys = self.split.keys(generator(self.seed, self.epoch, 0) if self.shuffle else None)
        return ((self.epoch, *key) for key in islice(keys, self.start, None))


class Loader(DataLoader):
    """What `make_loader` gives. It does not warn of too many workers as torch does, each time it is begun:
    `workers_note` tells that once."""

    def check_worker_number_rationality(self) -> None:
        pass

    def begin(self, epoch: int, batches_done: int = 0) -> None:
        """The next iteration goes through `epoch`, without its first batches. Also for a loader that accelerate made
        of this one: they share the sampler."""
        self.sampler.epoch, self.sampler.start = epoch, batches_done * self.batch_size


def make_loader(
    split: Split,
    preprocessing: Preprocessing,
    batch_size: int,
    *,
    train: bool = False,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    workers: int = 0,
) -> Loader:
    """A Loader of ImageDataset's batches. Training shuffles, augments and leaves out the last incomplete batch
    (unless it is the only one); evaluation goes through the images in order."""
    dataset = ImageDataset(split, preprocessing, augmentation if train else None, seed)
    slow = dataset.pixels is None or (train and augmentation is not None and augmentation.slow)
    return Loader(
        dataset,
        batch_size=batch_size,
        sampler=EpochSampler(split, shuffle=train, seed=seed),
        drop_last=train and len(split) >= batch_size,
        collate_fn=_as_it_is,
        num_workers=workers if slow else 0,
        persistent_workers=slow and workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


@contextmanager
def untold_workers() -> Iterator[None]:
    """In the block, a DataLoader that is made of a Loader does not warn of too many workers either."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        yield


def workers_note(workers: int, split: Split) -> str | None:
    """What to tell where a split's images are read by more processes than there are processors."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if split.pixels is not None or workers <= processors:
        return None
    return f"{workers} workers on {processors} processor{'s' * (processors > 1)}: fewer (--workers) may be faster"


def _as_it_is(batch):
    return batch


def batches(loader: Iterable[dict]) -> Iterator[dict]:
    """The batches of a loader, also one that accelerate prepared. Errors: DataError where a worker process died."""
    try:
        try:
            yield from loader
        except (OSError, EOFError) as error:
            # a worker is dead, too, where the connection breaks on which its batch is fetched
            if not any(frame.f_code.co_name == "_try_get_data" for frame, _ in traceback.walk_tb(error.__traceback__)):
                raise
            raise _died(error) from error
    except RuntimeError as error:  # by a signal: torch tells of a dead worker at any moment, also in the lines above
        if str(error).startswith("Caught DamagedShard in DataLoader worker"):
            raise DataError(str(error).strip().splitlines()[-1].partition(": ")[2]) from error
        if "DataLoader worker (pid" not in str(error):
            raise
        raise _died(error) from error


def _died(error):
    return DataError(
        "a process that reads images died, mostly because memory (or shared memory) ran out: "
        f"{type(error).__name__}: {error}. Fewer --workers or a smaller --batch-size need less; --workers 0 reads "
        "in this process"
    )
