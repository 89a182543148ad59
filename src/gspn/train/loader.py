"""Batches of a split's images for training and evaluation.

Everything random is a function of numbers that a later run can repeat: the order of an epoch of (seed, epoch), the
augmentation of an image of (seed, epoch, index). Nothing depends on the number of workers or processes.
"""

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from gspn.train.images import UNREADABLE, Preprocessing, Split, generator
from gspn.train.recipe import Augmentation


class ImageDataset(Dataset):
    """A split (see data.py) as the loader reads it: by lists of (epoch, index), in batches.

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
        index = torch.tensor([i for _, i in keys])
        label = self.split.labels[index]
        numbers = self.epoch_numbers(keys[0][0])[index] if self.augmentation else None
        if self.pixels is not None:
            image = self.pixels[index]
        else:
            image = torch.zeros(len(keys), self.preprocessing.channels, *self.preprocessing.size, dtype=torch.uint8)
            for row, i in enumerate(index.tolist()):
                crop = numbers[row, 3:] if self.augmentation and self.augmentation.crop else None
                try:
                    image[row] = self.preprocessing(self.split.image(i), crop)
                except Exception:  # Pillow raises anything on damaged files; Split.problem says later what it was
                    label[row] = UNREADABLE
        if self.augmentation:
            image = self.augmentation.move(image, numbers[:, :3])
        return {"image": image, "label": label, "index": index}

    def epoch_numbers(self, epoch):
        """(N, 7) random numbers in [0, 1) for the whole epoch: a row belongs to (seed, epoch, index)."""
        if self.epoch != epoch:
            self.numbers, self.epoch = torch.rand(len(self), 7, generator=generator(self.seed, epoch, 1)), epoch
        return self.numbers


class EpochSampler(Sampler):
    """Yields (epoch, index): in order, or shuffled as (seed, epoch) say. The loop calls `set_epoch`."""

    def __init__(self, length, shuffle, seed=0):
        self.length, self.shuffle, self.seed, self.epoch = length, shuffle, seed, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.length

    def __iter__(self):
        order = range(self.length)
        if self.shuffle:
            order = torch.randperm(self.length, generator=generator(self.seed, self.epoch, 0)).tolist()
        return ((self.epoch, i) for i in order)


def make_loader(
    split: Split,
    preprocessing: Preprocessing,
    batch_size: int,
    *,
    train: bool = False,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    workers: int = 0,
) -> DataLoader:
    """A DataLoader of ImageDataset's batches. Training shuffles, augments and leaves out the last incomplete batch
    (unless it is the only one); evaluation goes through the images in order."""
    dataset = ImageDataset(split, preprocessing, augmentation if train else None, seed)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=EpochSampler(len(split), shuffle=train, seed=seed),
        drop_last=train and len(split) >= batch_size,
        collate_fn=_as_it_is,
        num_workers=0 if dataset.pixels is not None else workers,
        persistent_workers=dataset.pixels is None and workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def _as_it_is(batch):
    return batch
