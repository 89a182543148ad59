"""The work folder of a high-resolution image: the arguments of the call, and each finished stage."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gspn.digests import SCHEME, digest, settings
from gspn.files import atomic, check_format, save_tensors, write_json, writing
from gspn.models.latents import is_whole
from gspn.stable_diffusion.highres.savers import SAVERS, Savers

RECORD, LATENTS, IMAGE = "highres.json", "latents.safetensors", "image.png"
FORMAT = 1
# The attributes of modules, beside weights, that FreeU, IP-Adapter and LoRA set.
SETTINGS = ("s1", "s2", "b1", "b2", "scale", "scaling", "_active_adapter", "_disable_adapters", "merged_adapters")


@contextmanager
def opened(path: Path | str | None) -> Iterator["Workdir | None"]:
    """The Workdir at `path`, created if missing, for this process alone until the block's end; None for None. Raises
    BusyError, a ValueError, if another process is writing to it."""
    if path is None:
        yield None
        return
    path = Path(os.path.expanduser(path))
    if path.exists() and not path.is_dir():
        raise ValueError(f"workdir has to be a folder, {path} is a file")
    with writing(path):
        yield Workdir(path)


class Workdir:
    """A folder that holds the stages of one image, each written when it is done.

    Attributes: kept: the record that the folder held, or None where it holds no stage. earlier: whether the digests in
    it are of the earlier scheme (see gspn.digests). Raises ValueError for a folder whose record is damaged or missing.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.kept = None
        record, begun = self.path / RECORD, any(self.path.glob("stage-*"))
        if record.exists():
            try:
                kept = json.loads(record.read_text(encoding="utf-8"))
                found = kept["format"]
                if not isinstance(found, int) or found <= FORMAT:  # a newer one may hold something else
                    _check(kept["asked"], kept["chosen"]["savers"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                reason = f"there is no {error}" if isinstance(error, KeyError) else error
                raise ValueError(f"{record} is damaged ({reason}): remove it and the stages beside it") from error
            check_format(record, found, FORMAT, ValueError)
            self.kept = kept if begun else None  # without a stage nothing was made, as with a call that failed
        elif begun:  # of which image, nobody knows
            raise ValueError(f"{self.path} holds stages but no {RECORD}: choose another workdir, or remove them")

    @property
    def earlier(self) -> bool:
        return self.kept is not None and any(
            f" {SCHEME}" not in text for text in self.kept["asked"]["pipeline"].values()
        )

    def begin(self, asked: dict, chosen: dict) -> None:
        """Records the arguments and what was chosen for them, or compares them with the record.

        Raises ValueError, with the differences, if the folder belongs to another image."""
        asked = json.loads(json.dumps(asked))
        if self.kept is None:
            write_json(self.path / RECORD, {"format": FORMAT, "asked": asked, "chosen": chosen})
            return
        kept = self.kept["asked"]
        different = sorted(name for name in {*asked, *kept} if asked.get(name) != kept.get(name))
        if different:
            shown = "; ".join(_change(name, kept.get(name), asked.get(name)) for name in different)
            raise ValueError(f"{self.path} holds stages of another image: {shown}. Choose another workdir")

    def folder(self, index: int, size: tuple[int, int]) -> Path:
        """The folder of a stage."""
        return self.path / f"stage-{index}-{size[0]}x{size[1]}"

    def save(self, index: int, size: tuple[int, int], latents: Tensor, image=None) -> None:
        """Saves a finished stage: its latents, and its picture (PIL) to look at."""
        with atomic(self.folder(index, size)) as temporary:
            temporary.mkdir()
            save_tensors(temporary / LATENTS, {"latents": latents.cpu().contiguous()})
            if image is not None:
                image.save(temporary / IMAGE, compress_level=1)

    def load(self, index: int, size: tuple[int, int], shape: tuple[int, ...]) -> Tensor | None:
        """The latents of a stage, or None if it is not done."""
        path = self.folder(index, size) / LATENTS
        if not path.parent.exists():
            return None
        try:
            latents = load_file(path)["latents"]
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}): remove {path.parent}, to make the stage again"
            ) from error
        if latents.shape != shape or latents.dtype != torch.float32:
            raise ValueError(f"{path} holds {tuple(latents.shape)} in {latents.dtype}, expected {shape} in float32")
        return latents


def _check(asked, savers):
    """Raises ValueError or another error for a record that cannot be gone on with."""
    if not is_whole(asked["seed"]) or not all(isinstance(text, str) for text in asked["pipeline"].values()):
        raise ValueError("expected a number as seed, and texts as digests of the pipeline")
    if [len(each) for each in savers] != [len(SAVERS)] * len(asked["stages"]):
        raise ValueError(f"expected {len(SAVERS)} savers of each stage")
    for each in savers:
        Savers(*each)


def _change(name, before, now):
    """The differences, in nested objects by member."""
    if isinstance(before, dict) and isinstance(now, dict):
        changed = [member for member in sorted({*before, *now}) if before.get(member) != now.get(member)]
        return ", ".join(_change(f"{name}.{member}", before.get(member), now.get(member)) for member in changed)
    return f"{name} {_short(before)}, now {_short(now)}"


def _short(value):
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def described(value, earlier: bool = False):
    """A value as JSON; tensors and pictures become their digests. earlier: in the form of a folder of an older gspn."""
    if isinstance(value, dict):
        return {str(name): described(item, earlier) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [described(item, earlier) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype} {_digest(value, earlier)}"
    if hasattr(value, "tobytes"):  # a picture of PIL, an array
        about = [value.mode, value.size] if hasattr(value, "mode") else [str(value.dtype), value.shape]
        return f"{type(value).__name__} {_digest(value.tobytes(), earlier, about)}"
    raise TypeError(
        f"with a workdir, options have to be numbers, texts, tensors or pictures, got {type(value).__name__}"
    )


def _digest(data, earlier, about=None):
    return digest([data], like="")[:16] if earlier else digest([data, about])


def fingerprint(pipe) -> dict:
    """Digests that identify a pipeline: of its models' classes, settings and weights (except offloaded weights), the
    scheduler's settings, and the tokenizers' vocabularies."""
    parts = {}
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            parts[name] = f"{type(part).__name__} {digest(_parts(part))}"
        elif name == "scheduler":
            parts[name] = f"{type(part).__name__} {digest([settings(part)])}"
        elif hasattr(part, "get_vocab"):
            parts[name] = f"{type(part).__name__} {digest([part.get_vocab(), part.model_max_length])}"
    return parts


def _parts(model):
    yield settings(model)
    for name, module in model.named_modules():
        yield f"{name} {module.extra_repr()} {_settings_of(module)}"
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield name
        yield tensor


def _settings_of(module):
    """Those of its attributes that change images. Defaults are left out, as older folders do not have them."""
    found = {name: value for name, value in vars(module).items() if name in SETTINGS and value}
    if getattr(module, "apart", (1, 1)) != (1, 1):  # by gspn.adapt
        found["apart"] = tuple(module.apart)
    swapped = vars(module).get("_gspn_swap")
    if swapped is not None and swapped.adapted and all(each.apart == (1, 1) for each in swapped.layers.values()):
        found["adapted"] = True  # at a size that changes nothing, but stages may have others
    if getattr(module, "use_tiling", False):  # of a VAE
        found |= {name: value for name, value in vars(module).items() if name.startswith(("use_tiling", "tile_"))}
    return found
