"""Latents instead of images: opening what `gspn encode` made, and the batches that a generator trains on.

Shards are mapped into memory and read on demand. Mirroring and the sample of the VAE's posterior are functions of
(seed, epoch, index).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_convert

from gspn.data.folders import counts
from gspn.data.images import DataError, Split, generator, listed
from gspn.data.labelled import Data
from gspn.data.latent_files import Shards, identity, read_config
from gspn.data.latent_folder import KIND
from gspn.data.loader import PROBLEM, EpochSampler, Loader
from gspn.data.sources import with_held_out
from gspn.digests import Content
from gspn.models.latents import scale_latents
from gspn.places import expanded


@dataclass(kw_only=True)
class LatentData(Data):
    """What `open_latents` gives: Data with LatentSplits.

    Attributes:
        channels, size: C and (h, w) of the latents. image_size: (H, W) of the images.
        flip: whether the mirrored images are encoded too.
        vae: see vae.describe_vae.
        config: all of config.json.
        unreadable: what was wrong with the images that were left out, one text each.
    """

    channels: int
    size: tuple[int, int]
    image_size: tuple[int, int]
    flip: bool
    vae: dict
    config: dict
    unreadable: list[str]


class LatentSplit(Split):
    """A Split whose images are latents.

    Attributes, beside those of Split:
        shape: (C, h, w). flip: whether the mirrored images are there too.
        row: int64 (N,), the index of an image in its shard.
        vae: how the VAE's latents are scaled, see models.latents.scale_latents.
    """

    def __init__(self, labels, class_names, names, shard, row, shards):
        super().__init__(labels, class_names, names=names, shard=shard)
        self.row, self.shards = torch.as_tensor(row, dtype=torch.int64), shards
        self.shape, self.flip = (shards.config["channels"], *shards.config["size"]), shards.config["flip"]
        self.vae = shards.config["vae"]

    def image(self, i):
        raise DataError(f"{self.names(i)} is a latent, not an image")

    def channels(self):
        return self.shape[0]

    def subset(self, index):
        index = torch.as_tensor(index, dtype=torch.int64)
        names = _Names(self.names.where, self.names.index[index])
        return LatentSplit(self.labels[index], self.class_names, names, self.shard[index], self.row[index], self.shards)

    def identity(self) -> Iterator:
        yield from super().identity()
        yield identity(self.shards.config)
        yield self.names.index.numpy().tobytes()
        for number, images in enumerate(self.shard.bincount(minlength=len(self.shards)).tolist()):
            yield Content(self.shards.path(number), images=images)

    def posterior(self, index: Tensor, mirrored: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of images, as the VAE gives them, without scale and shift.

        Args:
            index: int64 (B,). mirrored: bool (B,), of which of them the mirror image.
        Returns: two float32 (B, C, h, w).
        Errors: DataError names a shard that cannot be read or holds values that are no numbers.
        """
        mean = torch.empty(len(index), *self.shape)
        std = torch.empty_like(mean)
        if mirrored is None:
            mirrored = torch.zeros(len(index), dtype=torch.bool)
        for number in self.shard[index].unique().tolist():
            for ending, wanted in (("", ~mirrored), ("_flip", mirrored)):
                here = ((self.shard[index] == number) & wanted).nonzero()[:, 0]
                if len(here):
                    tensors, row = self.shards.tensors(number), self.row[index[here]]
                    mean[here], std[here] = (tensors[name + ending][row].float() for name in ("mean", "std"))
                    if not (mean[here].isfinite().all() and std[here].isfinite().all()):
                        raise DataError(f"the shard {self.shards.path(number)} is damaged: it holds no finite numbers")
        return mean, std


@dataclass(frozen=True)
class _Names:
    """The name of the i-th latent in messages."""

    where: str
    index: Tensor

    def __call__(self, i):
        return f"{self.where}, image {int(self.index[i])}"


def open_latents(folder: str | Path, *, val_fraction: float = 0.1) -> LatentData:
    """Opens what `gspn encode` made, and checks the header of every shard.

    Args:
        val_fraction: as for labelled.open_data, where only the split train was encoded.
    Returns: LatentData, its kind "latents", with the splits of the data, without the images that could not be read.
    Errors: DataError names the shards that are missing, damaged or of other latents.
    """
    folder = expanded(folder)
    config = read_config(folder)
    shards = {name: Shards(folder, config, name) for name in config["splits"]}
    missing = [each.path(number).name for each in shards.values() for number in each.missing()]
    if missing:
        raise DataError(
            f"{folder} is incomplete, it lacks {listed(missing, 'shard', 'shards')}: "
            "the `gspn encode` that began it goes on with these"
        )
    known = {each.path(number) for each in shards.values() for number in range(len(each))}
    strange = sorted(file.name for file in set(folder.glob("*.safetensors")) - known if counts(file.name))
    if strange:
        raise DataError(f"{folder} holds {listed(strange, 'shard', 'shards')} that its config.json does not know")
    splits, unreadable = {}, []
    for name, each in shards.items():
        splits[name], problems = _open_split(each, f"{folder}, {name}")
        unreadable += problems
    many, where = "s" * (len(unreadable) > 1), config["data"]["where"]
    notes = [f"{len(unreadable)} unreadable image{many} of {where} left out"] if unreadable else []
    splits, held_out = with_held_out(splits, val_fraction)
    return LatentData(
        KIND,
        str(folder.resolve()),
        splits,
        [*notes, *held_out],
        channels=config["channels"],
        size=tuple(config["size"]),
        image_size=tuple(config["image_size"]),
        flip=config["flip"],
        vae=config["vae"],
        config=config,
        unreadable=unreadable,
    )


def _open_split(shards, where):
    """(LatentSplit, problems) of all shards of a split."""
    label, index, shard, row, problems = [], [], [], [], []
    for number in range(len(shards)):
        tensors, unreadable = shards.read(number)
        label.append(tensors["label"].clone())
        index.append(tensors["index"].clone())
        shard.append(torch.full_like(index[-1], number))
        row.append(torch.arange(len(index[-1])))
        problems += [problem for _, problem in unreadable]
    label, index, shard, row = (torch.cat(each) for each in (label, index, shard, row))
    if not len(label):
        raise DataError(f"{where}: none of its {len(problems)} images could be read; the first: {problems[0]}")
    if not 0 <= int(label.min()) <= int(label.max()) < len(shards.config["class_names"]):
        raise DataError(
            f"{where}: labels from {int(label.min())} to {int(label.max())} for "
            f"{len(shards.config['class_names'])} classes"
        )
    return LatentSplit(label, shards.config["class_names"], _Names(where, index), shard, row, shards), problems


# -- batches --


def check_mirrored(split: LatentSplit) -> None:
    """Raises DataError where the mirrored images were not encoded."""
    if not split.flip:
        raise DataError(f"{split.shards.folder} was encoded without the mirrored images: expected gspn encode --flip")


class LatentDataset(Dataset):
    """A LatentSplit as the loader reads it: by lists of (epoch, index), in batches.

    A batch is {"image": float32 (B, C, h, w), "label": int64 (B,), "index": int64 (B,)}. The image is
    scale_latents(z), where z is a sample of the posterior if `draw`, and else its mean. Where a shard cannot be read,
    the batch is {PROBLEM: what is wrong}.
    """

    def __init__(self, split: LatentSplit, draw: bool, flip: bool, seed: int):
        self.split, self.draw, self.flip, self.seed = split, draw, flip, seed

    def __len__(self):
        return len(self.split)

    def __getitems__(self, keys):
        epoch, index = keys[0][0], torch.tensor([key[1] for key in keys])
        sources = [generator(self.seed, epoch, i, 3) for i in index.tolist()] if self.draw else []
        mirrored = None
        if self.flip:
            mirrored = torch.stack([torch.rand((), generator=source) < 0.5 for source in sources])
        try:
            z, std = self.split.posterior(index, mirrored)
        except DataError as error:
            return {PROBLEM: str(error)}
        if self.draw:
            z += std * torch.stack([torch.randn(self.split.shape, generator=source) for source in sources])
        return {"image": scale_latents(z, self.split.vae), "label": self.split.labels[index], "index": index}


def make_latent_loader(
    split: LatentSplit,
    batch_size: int,
    *,
    train: bool = False,
    flip: bool = False,
    seed: int = 0,
    workers: int = 0,
) -> Loader:
    """A Loader of LatentDataset's batches. Training shuffles, draws from the posterior, mirrors half of the images if
    `flip`, and leaves out the last incomplete batch (unless it is the only one); evaluation goes through the means in
    order.

    Errors: DataError for `flip` where the mirrored images were not encoded.
    """
    if train and flip:
        check_mirrored(split)
    return Loader(
        LatentDataset(split, draw=train, flip=train and flip, seed=seed),
        batch_size=batch_size,
        sampler=EpochSampler(split, shuffle=train, seed=seed),
        drop_last=train and len(split) >= batch_size,
        collate_fn=default_convert,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
