"""The files of a folder of latents, as encode.py writes and latents.py reads them.

    LATENTS/config.json                the VAE, the sizes, the data, how many images a split has
    LATENTS/train-00000.safetensors    a shard: the first shard_size images of train, and so on

A shard holds mean and std of the VAE's posterior (N, C, h, w), with `flip` those of the mirrored images too (mean_flip,
std_flip), and int64 (N,) label and index, an image's number in its split. Images that could not be read are left out
and named in the shard's header, which also identifies the latents that the shard belongs to.
"""

import json
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gspn.data.images import TOGETHER, DataError
from gspn.data.latent_folder import is_latents
from gspn.digests import digest
from gspn.files import check_format

FORMAT = 1  # of config.json and the shards; increased when an older gspn cannot read them
ABOUT = "gspn"  # the only entry of a shard's header: safetensors would write several in any order
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPEN_SHARDS = 2 * TOGETHER  # mapped at a time


class Shards:
    """The shards of one split, the last OPEN_SHARDS of which stay mapped."""

    def __init__(self, folder: Path, config: dict, split: str):
        self.folder, self.config, self.split = folder, config, split
        self.mapped: OrderedDict[int, dict] = OrderedDict()

    def __len__(self):
        return -(-self.config["splits"][self.split] // self.config["shard_size"])

    def __getstate__(self):
        return {**self.__dict__, "mapped": OrderedDict()}  # a worker maps them itself

    def path(self, number: int) -> Path:
        return self.folder / f"{self.split}-{number:05}.safetensors"

    def images(self, number: int) -> range:
        """The indices of the images of a shard."""
        size = self.config["shard_size"]
        return range(number * size, min((number + 1) * size, self.config["splits"][self.split]))

    def missing(self) -> list[int]:
        """The numbers of the missing shards."""
        return [number for number in range(len(self)) if not self.path(number).exists()]

    def tensors(self, number: int) -> dict[str, Tensor]:
        """The tensors of a shard by name, mapped. Errors: DataError, see `read`."""
        if number not in self.mapped:
            self.mapped[number] = self.read(number)[0]
            if len(self.mapped) > OPEN_SHARDS:
                self.mapped.popitem(last=False)
        self.mapped.move_to_end(number)
        return self.mapped[number]

    def about(self, number: int) -> dict:
        """What a shard's header identifies it by."""
        return {"latents": identity(self.config), "split": self.split, "shard": number}

    def layout(self) -> dict[str, tuple]:
        """(dtype, shape of one row) of each tensor in a shard."""
        latent = DTYPES[self.config["dtype"]], (self.config["channels"], *self.config["size"])
        names = ["mean", "std"] + ["mean_flip", "std_flip"] * self.config["flip"]
        return dict.fromkeys(names, latent) | dict.fromkeys(("label", "index"), (torch.int64, ()))

    def read(self, number: int) -> tuple[dict[str, Tensor], list[tuple[int, str]]]:
        """(tensors by name, mapped into memory; index of each unreadable image and what was wrong with it).

        Errors: DamagedShard for a shard that is cut off or holds something unexpected; DataError for one of other
        latents, or for another one of these.
        """
        path = self.path(number)
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get(ABOUT, "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, ValueError, SafetensorError) as error:
            raise DamagedShard(path, f"{error}; it has {_bytes(path)} bytes") from error
        about = about if isinstance(about, dict) else {}
        unreadable = about.pop("unreadable", None)
        if about != self.about(number):
            origin = {"latents": "other latents", "split": f"the split {about.get('split')}"}
            other = [text for name, text in origin.items() if about and about.get(name) != self.about(number)[name]]
            found = other[0] if other else f"shard {about['shard']}" if "shard" in about else "no gspn encode"
            raise DataError(f"{path} is not the shard {number} of {self.split} of these latents: it is of {found}")
        found = {name: (tensor.dtype, tuple(tensor.shape[1:])) for name, tensor in tensors.items()}
        if found != self.layout():
            raise DamagedShard(path, f"it holds {found}, expected {self.layout()}")
        rows = [*tensors["index"].tolist(), *(i for i, _ in unreadable)]
        if sorted(rows) != [*self.images(number)] or {len(t) for t in tensors.values()} != {len(tensors["index"])}:
            raise DamagedShard(path, f"it holds {len(rows)} images, expected {self.images(number)}")
        return tensors, [(i, text) for i, text in unreadable]


class DamagedShard(DataError):
    """A shard that cannot be read; encoding again replaces it."""

    def __init__(self, path, what):
        super().__init__(f"the shard {path} is damaged: {what}. The `gspn encode` that made it will make it again")


def _bytes(path):
    return path.stat().st_size if path.exists() else "no"


# -- config.json --


def identity(config: dict) -> str:
    """A digest of all that the shards depend on, in the scheme of the data's fingerprint in the config."""
    parts = {name: config[name] for name in ("format", "channels", "dtype", "flip", "shard_size", "precision")}
    parts |= {name: list(config[name]) for name in ("size", "image_size", "class_names")}
    parts |= {"vae": config["vae"]["digest"], "data": config["data"]["fingerprint"]}
    return digest([json.dumps(parts, sort_keys=True)], like=config["data"]["fingerprint"])


def read_config(folder: Path) -> dict:
    """The content of config.json. Errors: DataError if there is none, or if it is of something else or of a newer
    gspn."""
    path = folder / "config.json"
    if not is_latents(folder):
        found = "is of something else" if path.exists() else "is missing"
        raise DataError(f"{folder} holds no latents: its config.json {found}; expected a folder that gspn encode made")
    config = json.loads(path.read_text(encoding="utf-8"))
    check_format(folder, config.get("format", 0), FORMAT, DataError)
    try:
        identity(config)
        wanted = {"splits": dict, "class_names": list, "vae": dict, "data": dict}
        if not all(isinstance(config[name], kind) for name, kind in wanted.items()) or config["dtype"] not in DTYPES:
            raise TypeError("entries of another kind than expected")
        config["vae"]["scaling_factor"], config["vae"]["shift_factor"]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return config
