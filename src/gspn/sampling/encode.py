"""Images into latents: `encode`, which is what `gspn encode` runs.

The batches of a shard are the same whenever it is made. An encode that was stopped therefore makes the missing shards
only, and the result is the same as without the stop. Several processes (torchrun, accelerate launch) share the shards;
while they encode they communicate by the files alone.
"""

import copy
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import diffusers
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import default_convert

import gspn
from gspn.data.images import SPLIT_NAMES, UNREADABLE, DataError, Preprocessing, Split
from gspn.data.labelled import Data, open_data
from gspn.data.latent_files import ABOUT, DTYPES, FORMAT, DamagedShard, Shards, identity, read_config
from gspn.data.latent_folder import KIND
from gspn.data.latents import LatentData, open_latents
from gspn.data.loader import ImageDataset, Loader, batches, workers_note
from gspn.files import LOCK, atomic, is_temporary, remove, save_tensors, write_json, writing
from gspn.memory import enough_memory
from gspn.options import OptionError
from gspn.options.generators import EncodeOptions
from gspn.places import check_out, check_outside, expanded
from gspn.progress import Progress, duration
from gspn.sampling.vae import describe_vae, latent_shape, open_vae
from gspn.train.loop import autocast, make_accelerator
from gspn.train.run import RunError

PATIENCE = 6 * 3600  # seconds without a new shard of another process: a CPU may take more than an hour for 4096 images


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
    """Encodes the images of `data` into the folder `out`, or makes what is missing there.

    Args:
        data, open_options: see labelled.open_data. vae: see vae.open_vae.
        out: the folder: new, empty, or begun with the same data, VAE and options.
        size: (H, W) of the images: the largest centre crop of these proportions is resized, as for classification.
        flip: encode the mirrored images too. dtype: of what is stored, fp32, bf16 or fp16.
        precision: in which the VAE computes: fp32, or bf16 for autocast to bfloat16.
        shard_size: images in a file. batch_size: images that go through the VAE at a time. With another one, as on
            another machine, the last bits may differ.
        splits: those wanted; None for all of the data's. More can be added later.
        workers: processes that decode images. strict: an unreadable image is an error, not left out and named.
        console: rich's, for notes and the progress; None is silent.
    Returns: LatentData, in every process, when the latents are complete.
    Errors: BusyError, DataError, OptionError, SaveError; RunError where something else is in the folder, or where
        another process stopped making its shards.
    """
    EncodeOptions.check(size=size, dtype=dtype, precision=precision, shard_size=shard_size)
    EncodeOptions.check(batch_size=batch_size, workers=workers)
    accelerator, out = make_accelerator(), expanded(out)
    check_out(out)
    check_outside(out, data)
    main = accelerator.is_main_process
    console = console if main else None
    with Progress(f"opening {data}", console=console):
        data_set, autoencoder = open_data(data, **open_options), open_vae(vae)
    pictures = _relabelled(data_set)
    wanted = _wanted(splits, pictures, data_set.where)
    channels, *latent_size = latent_shape(autoencoder, size)
    told = _digests_told(out)
    asked = {
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
            "fingerprint": data_set.fingerprint(told["data"], console),
            **{name: value for name, value in open_options.items() if value is not None},
        },
        "splits": {name: len(split) for name, split in pictures.items() if name in wanted},
        "versions": {"gspn": gspn.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    plan = _Plan.of(out, asked, data_set.uncompared(told["data"]))
    _refuse_unreadable(strict, plan.unreadable)
    crowded = workers_note(workers, next(iter(pictures.values())))
    for note in [*data_set.notes, *filter(None, [crowded]), *plan.notes()] if console else []:
        console.print(f"note: {note}", markup=False, highlight=False)
    with writing(out) if main else nullcontext():
        if main:
            plan.begin(asked)
        accelerator.wait_for_everyone()
        _run(plan, pictures, autoencoder, accelerator, batch_size, workers, strict, console)
    latents = open_latents(out)
    _refuse_unreadable(strict, latents.unreadable)
    return latents


def _relabelled(data: Data) -> dict[str, Split]:
    """The splits to encode, with the classes of the first of them, train where there is one."""
    splits = {name: data.splits[name] for name in ("train", "val", "test") if name in data.splits}
    names = next(iter(splits.values())).class_names
    if names is None:
        names = [str(i) for i in range(max(int(split.labels.max()) for split in splits.values()) + 1)]
    return {name: split.relabelled(names) for name, split in splits.items()}


def _wanted(splits, pictures, where) -> set[str]:
    """The names of the splits to encode. Errors: DataError for one that there is not."""
    for name in splits or ():
        if SPLIT_NAMES.get(name, name) not in pictures:
            raise DataError(f"{where} has no split {name!r}; it has {', '.join(pictures)}")
    return {SPLIT_NAMES.get(name, name) for name in splits or pictures}


def _refuse_unreadable(strict, problems):
    if strict and problems:
        raise DataError(f"unreadable image (--strict): {problems[0]}")


# -- what there is to do --


@dataclass(frozen=True)
class _Plan:
    """What there is to do. Each process finds it out by itself, before any of them changes the folder.

    Attributes:
        config: of the folder, with all splits that are wanted. begun: the one that is there; None in a new folder.
        uncompared: see Data.uncompared.
        todo: (split, number) of each shard to make. damaged: the paths of those that are made again.
        unreadable: what was wrong with images of the shards that are there.
    """

    out: Path
    config: dict
    begun: dict | None
    uncompared: str | None
    todo: list[tuple[str, int]]
    damaged: list[Path]
    unreadable: list[str]

    @classmethod
    def of(cls, out: Path, asked: dict, uncompared: str | None) -> "_Plan":
        """Errors: RunError for a folder that was begun otherwise or holds something else."""
        config, begun = _continued(out, asked, uncompared)
        return cls(out, config, begun, uncompared, *_missing(out, config))

    def notes(self) -> list[str]:
        uncompared = [self.uncompared] if self.begun and self.uncompared else []
        return [*uncompared, *(f"{path} is damaged and encoded anew" for path in self.damaged)]

    def begin(self, asked: dict) -> None:
        """Makes the folder ready for the new shards, in one process. Errors: RunError, SaveError."""
        if _continued(self.out, asked, self.uncompared) != (self.config, self.begun):
            raise RunError(f"another process has meanwhile begun to encode into {self.out}: start again to go on")
        for path in self.damaged:
            remove(path)
        if self.config != self.begun:
            write_json(self.out / "config.json", self.config)


def _digests_told(out) -> dict:
    """The stored digests of data and VAE of a folder, or None: new digests follow their scheme."""
    try:
        begun = read_config(out)
    except DataError:  # _continued reports it
        return {"data": None, "vae": None}
    return {"data": begun["data"]["fingerprint"], "vae": begun["vae"]["digest"]}


def _continued(out, asked, uncompared) -> tuple[dict, dict | None]:
    """(the config of the folder, with the splits that are wanted now, and the places where data and VAE are now; the
    config that is there, None in a new folder). Errors: RunError for a folder that was begun otherwise or holds
    something else."""
    if not out.is_dir():
        return asked, None
    if not (out / "config.json").exists():
        if any(file.name != LOCK and not is_temporary(file) for file in out.iterdir()):
            raise RunError(f"{out} is not empty and was not begun by gspn encode (it has no config.json)")
        return asked, None
    try:
        begun = read_config(out)
    except DataError as error:
        raise RunError(str(error)) from error
    if identity(begun) != identity(asked):
        raise RunError(f"{out} was begun otherwise: with {'; '.join(_different(begun, asked))}. Choose another folder")
    now = {"splits": begun["splits"] | asked["splits"], "vae": {**begun["vae"], "path": asked["vae"]["path"]}}
    if not uncompared:  # else they may be other data than those of the first shards
        now["data"] = {**begun["data"], "where": asked["data"]["where"]}
    return begun | now, begun


def _different(begun, asked) -> list[str]:
    """What differs between two configs, in words. An option of `open_data` that was not given had its default."""
    # class_names are told below, and streaming only says how rows are read
    defaults = {n: value for n, value in open_data.__kwdefaults__.items() if n not in ("class_names", "streaming")}
    found = []
    asked = json.loads(json.dumps(asked))  # as a file gives it back
    for what, part, digest, where in (("data", "data", "fingerprint", "where"), ("VAE", "vae", "digest", "path")):
        there, here = begun[part], asked[part]
        if there[digest] != here[digest]:
            place = f", not {here[where]}" if here[where] != there[where] else ", as it was then"
            found.append(f"the {what} {there[where]}{place}")
            if part == "data" and (options := _differing(defaults, defaults | there, defaults | here)):
                found[-1] += f", or the same data with {' and '.join(options)}"
    names = ("image_size", "flip", "dtype", "precision", "shard_size", "class_names")
    return found + _differing(names, begun, asked)


def _differing(names, there, here) -> list[str]:
    """Which of the named entries differ: "flip True, not False"."""
    return [f"{name.replace('_', ' ')} {there[name]}, not {here[name]}" for name in names if there[name] != here[name]]


def _missing(out, config) -> tuple[list[tuple[str, int]], list[Path], list[str]]:
    """((split, number) of the shards to make; paths of damaged ones; what was wrong with images of the others)."""
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


def _run(plan, pictures, vae, accelerator, batch_size, workers, strict, console):
    """Makes this process's part of the missing shards, then waits for the parts of the others."""
    own = plan.todo[accelerator.process_index :: accelerator.num_processes]
    vae.to(accelerator.device).requires_grad_(False).eval()
    what = "{} images of {}x{} at a time".format(batch_size, *plan.config["image_size"])
    with _Bar(console, plan) as bar, enough_memory(OptionError, what, "lower --batch-size or --size"):
        for name, split in pictures.items():
            numbers = [number for split_name, number in own if split_name == name]
            if numbers:
                loader = _loader(split, plan.config, numbers, vae, batch_size, workers)
                shards = Shards(plan.out, plan.config, name)
                _encode_shards(shards, split, loader, vae, accelerator.device, strict, bar)
        bar.wait_for_the_others()


def _loader(split, config, numbers, vae, batch_size, workers) -> Loader:
    """Batches of the images of some shards. No batch spans two shards."""
    channels = vae.config.in_channels
    preprocessing = Preprocessing(channels, config["image_size"], (0.5,) * channels, (0.5,) * channels)
    one_by_one = copy.copy(split)  # ImageDataset would resize all images in memory at once
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
            _refuse_unreadable(strict, [problem for _, problem in problems])
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
    with autocast(image.device, config["precision"]):
        posterior = vae.encode(image).latent_dist
    return {name: getattr(posterior, name).to("cpu", DTYPES[config["dtype"]]) for name in ("mean", "std")}


def _check_finite(tensors, split, dtype):
    for name in tensors.keys() - {"label", "index"}:
        wrong = ~tensors[name].flatten(1).isfinite().all(1)
        if wrong.any():
            first = split.names(int(tensors["index"][wrong][0]))
            raise DataError(f"the VAE's {name} of {first} is not finite in {dtype}: expected another VAE or --dtype")


class _Bar(Progress):
    """The progress over the missing shards of all processes; without a console it is silent."""

    def __init__(self, console, plan):
        every = {name: Shards(plan.out, plan.config, name) for name in plan.config["splits"]}
        self.left = {every[name].path(number): len(every[name].images(number)) for name, number in plan.todo}
        self.shards, self.own, self.looked = len(plan.todo), 0, 0.0
        super().__init__("encoding", sum(self.left.values()), console=console)

    def advance(self, images):
        """Adds images that this process has encoded."""
        self.own += images
        if time.monotonic() > self.looked + 1:
            self._count()

    def _count(self):
        self.looked = time.monotonic()
        self.left = {path: images for path, images in self.left.items() if not path.exists()}
        self.update(max(self.total - sum(self.left.values()), self.own))

    def wait_for_the_others(self):
        """Waits until all shards are there. A collective operation would give up after some minutes.
        Errors: RunError after PATIENCE seconds without a new shard."""
        self._count()
        since = self.looked
        while self.left:
            before = len(self.left)
            time.sleep(0.2)
            self._count()
            if len(self.left) < before:
                since = self.looked
            elif self.looked - since > PATIENCE:
                raise RunError(
                    f"{len(self.left)} of {self.shards} shards are missing, such as {next(iter(self.left))}, and none "
                    f"has come for {duration(PATIENCE)}: another process of this encode has probably died. Call gspn "
                    "encode again: it makes the missing ones"
                )
