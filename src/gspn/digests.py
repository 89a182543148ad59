"""Digests of data, weights and settings. Every digest that gspn stores is made here.

A digest is SCHEME and 64 hexadecimal digits, the SHA-256 of the digests of its parts in order. Each part is hashed
with its kind and its shape or length, so that any change of a part changes the digest, and different lists of parts
have different digests.

The earlier scheme, whose digests have no prefix SCHEME, concatenated all parts, and of files hashed only name and size.
Older versions wrote such digests. To compare with one, a function that makes a digest takes it as `like`, and follows
its scheme.
"""

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

SCHEME = "2:"
THREADS = 16  # more than there are cores: they wait for a disk or a network
BATCH = 512  # parts that the threads share at a time; the parts of a table are in memory meanwhile


@dataclass(frozen=True)
class Content:
    """The content of a file, or of bytes; the digest is the same for both.

    Attributes:
        source: the file's path, or anything with a buffer of bytes.
        name: its name within the data, where that counts. images: how many it holds, for the progress bar.
    """

    source: Any
    name: PurePath | None = None
    images: int = 1


@dataclass(frozen=True)
class Earlier:
    """A text that is hashed in the earlier scheme only."""

    text: str


def is_earlier(told: str | None) -> bool:
    """Whether a stored digest is of the earlier scheme."""
    return isinstance(told, str) and not told.startswith(SCHEME)


def digest(parts: Iterable, like: str | None = None, advance: Callable[[int], None] = lambda images: None) -> str:
    """The digest of some parts, which are read in parallel.

    Args:
        parts: texts, bytes, tensors, arrays, Content; anything else is hashed as JSON, such as settings, which the
            earlier scheme left out. A file that cannot be read has a digest of its own.
        like: the digest to compare with, whose scheme is used. None: the present scheme.
        advance: called with the number of images of the Content that was read since the last call.
    """
    if is_earlier(like):
        return _earlier(parts)
    total, parts = hashlib.sha256(), (part for part in parts if not isinstance(part, Earlier))
    with ThreadPoolExecutor(THREADS) as pool:
        while batch := list(islice(parts, BATCH)):
            shares = [batch[start::THREADS] for start in range(min(THREADS, len(batch)))]
            hashed = pool.map(_hash_all, shares) if len(shares) > 1 else map(_hash_all, shares)
            found = [b""] * len(batch)
            for start, share in enumerate(hashed):
                found[start::THREADS] = share
            total.update(b"".join(found))
            advance(sum(part.images for part in batch if isinstance(part, Content)))
    return SCHEME + total.hexdigest()


def tensors_of(tensors: Mapping[str, Tensor], label: str = "{name}") -> Iterator:
    """Parts of named tensors, in the order of the names: for each its label, in which {name}, {dtype} and {shape} stand
    for its own, and its values. In the present scheme values count with dtype and shape anyway."""
    for name, tensor in sorted(tensors.items()):
        yield label.format(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape))
        yield tensor


def settings(model) -> dict:
    """What a model or a scheduler computes with, beside weights: its class, and the entries of its config that differ
    from the defaults, so that an option that a newer library adds changes nothing. The model's origin and its kernels
    do not count."""
    config = getattr(model, "config", None) or getattr(model, "default_cfg", None) or {}
    if hasattr(config, "to_dict"):  # transformers
        about = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
        config, defaults = config.to_dict(), type(config)().to_dict()
        config = {name: value for name, value in config.items() if name not in about}
    elif "architecture" in config:  # timm, where networks that pad otherwise have weights of the same names and shapes
        config, defaults = {"architecture": config["architecture"]}, {}
    elif "name" in config:  # ours
        config, defaults = {name: value for name, value in config.items() if name != "backend"}, {}
    else:  # diffusers
        parameters = inspect.signature(type(model).__init__).parameters
        defaults = {name: one.default for name, one in parameters.items() if name in config}
        config = {name: config[name] for name in defaults}
    own = {
        name: value for name, value in config.items() if name not in defaults or _json(value) != _json(defaults[name])
    }
    return {"class": type(model).__name__, **own}


def _json(value):
    return json.dumps(value, sort_keys=True, default=str)


# -- the present scheme --


def _hash_all(parts):
    return [_hash(part) for part in parts]


def _hash(part):
    if isinstance(part, Content):
        return _hash_content(part)
    if isinstance(part, Tensor):
        kind, data = f"tensor {part.dtype} {tuple(part.shape)}", _bytes_of(part)
    elif isinstance(part, np.ndarray):
        kind, data = f"array {part.dtype.str} {part.shape}", np.ascontiguousarray(part).tobytes()
    elif isinstance(part, bytes):
        kind, data = "bytes", part
    elif isinstance(part, str):
        kind, data = "text", part.encode("utf-8", "surrogatepass")
    else:
        kind, data = "json", _json(part).encode()
    found = hashlib.sha256(f"{kind}\0".encode())
    found.update(data)
    return found.digest()


def _hash_content(part):
    start = b"content\0" + (os.fsencode(part.name.as_posix()) if part.name else b"") + b"\0"
    found = hashlib.sha256(start)
    if not isinstance(part.source, str | os.PathLike):
        found.update(part.source)
        return found.digest()
    try:
        with open(part.source, "rb", buffering=0) as file:
            return hashlib.file_digest(file, lambda: found).digest()
    except OSError:
        return hashlib.sha256(b"unreadable " + start).digest()


def _bytes_of(tensor):
    """The values of a tensor; empty for one whose values are elsewhere (offloaded)."""
    if tensor.device.type == "meta":
        return b""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


# -- the earlier scheme --


def _earlier(parts):
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Content):
            if part.name is not None:
                total.update(os.fsencode(part.name) + f" {Path(part.source).stat().st_size}\n".encode())
        elif isinstance(part, Earlier):
            total.update(part.text.encode())
        elif isinstance(part, str):
            total.update(part.encode())
        elif isinstance(part, bytes):
            total.update(part)
        elif isinstance(part, Tensor):
            total.update(_bytes_of(part))
        elif isinstance(part, np.ndarray):
            total.update(part.tobytes())
    return total.hexdigest()
