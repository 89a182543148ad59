"""Images into latents: `encode`, which is what `gspn encode` runs.

The images of a shard go through the VAE in batches that are the same whenever it is made, so that an encoding that was
stopped goes on with the shards that are missing, and the folder comes out as if it had not been. Several processes
(torchrun, accelerate launch) share the shards and say nothing to each other but by the files.
"""

import copy
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import groupby, islice
from pathlib import Path

import diffusers
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import default_convert

import gspn
from gspn.data.images import SPLIT_NAMES, UNREADABLE, Preprocessing, Split
from gspn.data.labelled import Data, DataError, open_data
from gspn.data.latent_files import ABOUT, DTYPES, FORMAT, DamagedShard, Shards, identity, read_config
from gspn.data.latent_folder import KIND, refuse_latents
from gspn.data.latents import LatentData, open_latents
from gspn.data.loader import ImageDataset, Loader, batches, workers_note
from gspn.files import LOCK, atomic, is_temporary, remove, save_tensors, write_json, writing
from gspn.options import OptionError
from gspn.progress import Progress
from gspn.sampling.vae import describe_vae, latent_shape, open_vae
from gspn.train.loop import autocast, make_accelerator
from gspn.train.run import RunError

PRECISIONS = ("fp32", "bf16")


def encode(
    data: str | Path,
    vae: str | Path,
    out: str | Path,
    *,
    size: tuple[int, int],
    flip: bool = False,
    dtype: str = "fp32",
    precision: str = "fp32",
    shard_size: int = 4096,
    batch_size: int = 32,
    splits: Sequence[str] | None = None,
    workers: int = 2,
    strict: bool = False,
    console: Console | None = None,
    **open_options,
) -> LatentData:
    """Encodes the images of `data` into the folder `out`, or goes on where this was stopped.

    Args:
        data, open_options: see data.open_data. vae: see vae.open_vae.
        out: the folder; not to exist, to be empty, or begun with the same data, VAE and options.
        size: (H, W) of the images: their centre is cut out in these proportions and resized, as for classification.
        flip: encode the mirrored images too. dtype: of what is stored, fp32, bf16 or fp16.
        precision: in which the VAE computes: fp32, or bf16 for autocast to bfloat16.
        shard_size: images in a file. batch_size: images that go through the VAE at a time. With another one, as on
            another machine, the last bits may differ.
        splits: those wanted; None for all of the data's. More can be added later.
        workers: processes that decode images. strict: an unreadable image is an error, not left out and named.
        console: rich's, for notes and the progress; None is silent.
    Returns: LatentData, in every process, when the latents are complete.
    Errors: BusyError, DataError, OptionError, SaveError; RunError where something else is in the folder.
    """
    _check(size, dtype, precision, shard_size, batch_size, workers)
    refuse_latents(data)
    accelerator, out = make_accelerator(), Path(out).expanduser()
    main = accelerator.is_main_process
    with Progress(f"opening {data}", console=console if main else None):
        data_set, autoencoder = open_data(data, **open_options), open_vae(vae)
    pictures = _relabelled(data_set)
    for name in splits or ():
        if SPLIT_NAMES.get(name, name) not in pictures:
            raise DataError(f"{data_set.where} has no split {name!r}; it has {', '.join(pictures)}")
    wanted = {SPLIT_NAMES.get(name, name) for name in splits or pictures}
    channels, *latent_size = latent_shape(autoencoder, size)
    accelerator, told = make_accelerator(), _digests_told(out)
    main = accelerator.is_main_process
    new = {
        "kind": KIND,
        "format": FORMAT,
        "channels": channels,
        "size": latent_size,
        "image_size": list(size),
        "dtype": dtype,
        "precision": precision,
        "flip": flip,
        "shard_size": shard_size,
        "vae": describe_vae(autoencoder, vae, like=told["vae"]),
        "class_names": next(iter(pictures.values())).class_names,
        "data": {
            "where": data_set.where,
            "kind": data_set.kind,
            "fingerprint": data_set.fingerprint(told["data"], console if main else None),
            **{name: value for name, value in open_options.items() if value is not None},
        },
        "splits": {name: len(split) for name, split in pictures.items() if name in wanted},
        "versions": {"gspn": gspn.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    # Every process finds out by itself what there is to do, before any of them changes the folder.
    config, is_new = _continued(out, new)
    todo, damaged, unreadable = _missing(out, config)
    if strict and unreadable:
        raise DataError(f"unreadable image (--strict): {unreadable[0]}")
    say = console.print if console and main else lambda *args, **more: None
    crowded = workers_note(workers, next(iter(pictures.values())))
    uncompared = None if is_new else data_set.uncompared(told["data"])
    anew = (f"{path} is damaged and encoded anew" for path in damaged)
    for note in [*data_set.notes, *filter(None, [crowded, uncompared]), *anew]:
        say(f"note: {note}", markup=False, highlight=False)
    with writing(out) if main else nullcontext():
        if main:
            if _continued(out, new) != (config, is_new):
                raise RunError(f"another process has begun to encode into {out} meanwhile: start again to go on")
            for path in damaged:
                remove(path)
            if is_new:
                write_json(out / "config.json", config)
        accelerator.wait_for_everyone()
        own = todo[accelerator.process_index :: accelerator.num_processes]
        autoencoder.to(accelerator.device).requires_grad_(False).eval()
        with _Bar(console if main else None, out, config, todo) as bar:
            for name in pictures:
                numbers = [number for split, number in own if split == name]
                if numbers:
                    loader = _loader(pictures[name], config, numbers, autoencoder, batch_size, workers)
                    shards = Shards(out, config, name)
                    _encode_shards(shards, pictures[name], loader, autoencoder, accelerator.device, strict, bar)
            bar.wait_for_the_others()
    latents = open_latents(out)
    if strict and latents.unreadable:
        raise DataError(f"unreadable image (--strict): {latents.unreadable[0]}")
    return latents


def _check(size, dtype, precision, shard_size, batch_size, workers):
    for name, value, low in (
        ("height", size[0], 1),
        ("width", size[1], 1),
        ("shard_size", shard_size, 1),
        ("batch_size", batch_size, 1),
        ("workers", workers, 0),
    ):
        if value < low:
            raise OptionError(f"{name} must be at least {low}, got {value}")
    for name, value, choices in (("dtype", dtype, DTYPES), ("precision", precision, PRECISIONS)):
        if value not in choices:
            raise OptionError(f"{name} must be {' or '.join(choices)}, got {value!r}")


def _relabelled(data: Data) -> dict[str, Split]:
    """The splits to encode, with the classes of the first of them, train where there is one."""
    splits = {name: data.splits[name] for name in ("train", "val", "test") if name in data.splits}
    names = next(iter(splits.values())).class_names
    if names is None:
        names = [str(i) for i in range(max(int(split.labels.max()) for split in splits.values()) + 1)]
    return {name: split.relabelled(names) for name, split in splits.items()}


# -- what is there already --


def _digests_told(out) -> dict:
    """The digests of data and VAE that a folder was begun with, None without any: their scheme is kept in it."""
    try:
        begun = read_config(out)
    except DataError:  # of which _continued tells
        return {"data": None, "vae": None}
    return {"data": begun["data"]["fingerprint"], "vae": begun["vae"]["digest"]}


def _continued(out, config) -> tuple[dict, bool]:
    """(the config of a folder that was begun, with the splits that are wanted now; whether it has to be written).
    Errors: RunError for a folder that was begun otherwise or holds something else."""
    if not out.is_dir():
        if out.exists():
            raise RunError(f"{out} is a file; expected a folder that is new, empty, or begun by gspn encode")
        return config, True
    if not (out / "config.json").exists():
        if any(file.name != LOCK and not is_temporary(file) for file in out.iterdir()):
            raise RunError(f"{out} is not empty and was not begun by gspn encode (it has no config.json)")
        return config, True
    try:
        begun = read_config(out)
    except DataError as error:
        raise RunError(str(error)) from error
    if identity(begun) != identity(config):
        different = []
        for what, part, digest, where in (("data", "data", "fingerprint", "where"), ("VAE", "vae", "digest", "path")):
            there, here = begun[part], config[part]
            if there[digest] != here[digest]:
                changed = f", not {here[where]}" if here[where] != there[where] else ", as it was then"
                different.append(f"the {what} {there[where]}{changed}")
        for name in ("image_size", "flip", "dtype", "precision", "shard_size", "class_names"):
            if begun[name] != config[name]:
                different.append(f"{name.replace('_', ' ')} {begun[name]}, not {config[name]}")
        raise RunError(f"{out} was begun otherwise: with {'; '.join(different)}. Choose another folder")
    splits = begun["splits"] | config["splits"]
    return {**begun, "splits": splits}, splits != begun["splits"]


def _missing(out, config) -> tuple[list[tuple[str, int]], list[Path], list[str]]:
    """((split, number) of the shards that there are to make; paths of damaged ones; what was wrong with images)."""
    todo, damaged, unreadable = [], [], []
    for split in config["splits"]:
        shards = Shards(out, config, split)
        missing = set(shards.missing())
        for number in range(len(shards)):
            if number not in missing:
                try:
                    unreadable += [text for _, text in shards.read(number)[1]]
                    continue
                except DamagedShard:
                    damaged.append(shards.path(number))
            todo.append((split, number))
    return todo, damaged, unreadable


# -- from images to shards --


def _loader(split, config, numbers, vae, batch_size, workers) -> Loader:
    """Batches of the images of some shards, none of which goes across two shards."""
    channels = vae.config.in_channels
    preprocessing = Preprocessing(channels, config["image_size"], (0.5,) * channels, (0.5,) * channels)
    one_by_one = copy.copy(split)  # ImageDataset would resize all that are in memory at once
    if split.pixels is not None:
        one_by_one.pixels, one_by_one.read = None, split.image
    return Loader(
        ImageDataset(one_by_one, preprocessing),
        batch_sampler=_batches(split, numbers, config["shard_size"], batch_size),
        collate_fn=default_convert,
        num_workers=workers,
    )


def _batches(split, numbers, shard_size, batch_size) -> Iterator[list[tuple]]:
    """Lists of the loader's keys, in the order of the split."""
    wanted = set(numbers)
    for number, keys in groupby(split.keys(), lambda key: key[0] // shard_size):
        if number in wanted:
            while batch := [(0, *key) for key in islice(keys, batch_size)]:
                yield batch
        if number == max(wanted):
            return


@torch.inference_mode()
def _encode_shards(shards, split, loader, vae, device, strict, bar):
    """Encodes the batches of a loader and writes each shard when it is complete."""
    normalize = loader.dataset.preprocessing.normalize
    size = shards.config["shard_size"]
    for number, inside in groupby(batches(loader), lambda batch: int(batch["index"][0]) // size):
        parts, problems = [], []
        for batch in inside:
            readable = batch["label"] != UNREADABLE
            problems += [(i, split.problem(i)) for i in batch["index"][~readable].tolist()]
            if problems and strict:
                raise DataError(f"unreadable image (--strict): {problems[0][1]}")
            image = normalize(batch["image"].to(device))
            tensors = _posterior(vae, image, shards.config)
            if shards.config["flip"]:
                tensors |= {f"{k}_flip": v for k, v in _posterior(vae, image.flip(-1), shards.config).items()}
            tensors = {k: v[readable] for k, v in (tensors | {k: batch[k] for k in ("label", "index")}).items()}
            _check_finite(tensors, split, shards.config["dtype"])
            parts.append(tensors)
            bar.advance(len(readable))
        about = {**shards.about(number), "unreadable": problems}
        with atomic(shards.path(number)) as temporary:
            tensors = {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}
            save_tensors(temporary, tensors, {ABOUT: json.dumps(about)})


def _posterior(vae, image, config) -> dict[str, Tensor]:
    """mean and std of a batch, on the CPU, as they are stored."""
    try:
        with autocast(image.device, config["precision"]):
            posterior = vae.encode(image).latent_dist
    except torch.OutOfMemoryError as error:
        raise OptionError(f"memory does not suffice for {len(image)} images at a time: lower --batch-size") from error
    return {name: getattr(posterior, name).to("cpu", DTYPES[config["dtype"]]) for name in ("mean", "std")}


def _check_finite(tensors, split, dtype):
    for name in tensors.keys() - {"label", "index"}:
        wrong = ~tensors[name].flatten(1).isfinite().all(1)
        if wrong.any():
            first = split.names(int(tensors["index"][wrong][0]))
            raise DataError(f"the VAE's {name} of {first} is not finite in {dtype}: expected another VAE or --dtype")


class _Bar(Progress):
    """The progress over the shards `todo` of all processes; without a console it is silent."""

    def __init__(self, console, out, config, todo):
        every = {name: Shards(out, config, name) for name in config["splits"]}
        self.left = {every[name].path(number): len(every[name].images(number)) for name, number in todo}
        self.own, self.looked = 0, 0.0
        super().__init__("encoding", sum(self.left.values()), console=console)

    def advance(self, images):
        """Takes note of images that this process has encoded."""
        self.own += images
        if time.monotonic() > self.looked + 1:
            self._count()

    def _count(self):
        self.looked = time.monotonic()
        self.left = {path: images for path, images in self.left.items() if not path.exists()}
        self.update(max(self.total - sum(self.left.values()), self.own))

    def wait_for_the_others(self):
        """Until all shards are there. No collective operation, which would give up after some minutes."""
        self._count()
        while self.left:
            time.sleep(0.2)
            self._count()
