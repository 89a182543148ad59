"""The VAE between images and latents: an AutoencoderKL of diffusers."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

from diffusers import AutoencoderKL
from safetensors import SafetensorError

from gspn.data.hub import out_of_reach
from gspn.digests import digest, settings, tensors_of
from gspn.models.latents import check_scale
from gspn.models.pipeline import vae_factor
from gspn.names import reason_of
from gspn.options import OptionError
from gspn.places import alike, expanded, location
from gspn.progress import bars_on_terminals_only


def open_vae(where: str | Path) -> AutoencoderKL:
    """A VAE with its weights, in float32 on the CPU.

    Args:
        where: a folder that save_pretrained made, of the VAE or of a pipeline that has one, or a name on the Hugging
            Face hub. Weights are read from safetensors only.
    Errors: OptionError.
    """
    path = expanded(where)
    within = "vae" if not (path / "config.json").exists() and (path / "vae" / "config.json").exists() else None
    name = str(path) if path.exists() else str(where)
    absent = None if path.exists() else f"there is no folder {where} here{alike(path)}"
    problem = absent and out_of_reach(name, "config.json")
    offline = problem is not None  # then a local copy is used
    try:
        with bars_on_terminals_only(), warnings.catch_warnings():
            # diffusers gives the hub's library an argument that this no longer takes
            warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument", UserWarning)
            config = AutoencoderKL.load_config(name, subfolder=within, local_files_only=offline)
            if (kind := config.get("_class_name")) != "AutoencoderKL":
                holds = f"holds a {kind}" if kind else "is a run of gspn" if "format" in config else "is another model"
                raise OptionError(f"{where} {holds}, not a VAE of diffusers: expected the folder of an AutoencoderKL")
            vae, found = AutoencoderKL.from_pretrained(
                name, subfolder=within, use_safetensors=True, output_loading_info=True, local_files_only=offline
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, OptionError):
            raise
        reason = "; ".join(filter(None, [absent, problem, reason_of(error)]))
        raise OptionError(f"the VAE {where} cannot be loaded: {reason}") from error
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise OptionError(f"the VAE {where} lacks {len(missing)} of its weights, such as {missing[0]}")
    try:
        check_scale(vae.config)
    except ValueError as error:
        raise OptionError(f"{where}: {error}") from error
    return vae.float()


def scale_of(config: Mapping) -> dict:
    """The entries of a VAE's config, or of describe_vae, that decide how latents are scaled: scaling_factor,
    shift_factor and, if they are set, latents_mean and latents_std."""
    scale = {name: config[name] for name in ("scaling_factor", "shift_factor")}
    return scale | {name: list(config[name]) for name in ("latents_mean", "latents_std") if config.get(name)}


def describe_vae(vae: AutoencoderKL, where: str | Path, like: str | None = None) -> dict:
    """The entry for a VAE in config.json: path, class, scale_of, and a digest of its settings and weights, in the
    scheme of `like`."""
    scale = scale_of(vae.config)
    weights = tensors_of(vae.state_dict(), "{name} {shape}")
    told = digest([json.dumps(scale), *weights, settings(vae)], like)
    return {"path": location(where), "class": "AutoencoderKL", **scale, "digest": told}


def check_vae(vae: AutoencoderKL, described: dict) -> AutoencoderKL:
    """The VAE, if it is the `described` one. Errors: OptionError."""
    told = described.get("digest")
    if told is not None and describe_vae(vae, described["path"], like=told)["digest"] != told:
        raise OptionError(
            f"the VAE in {described['path']} is not the one whose latents these are: other weights or settings"
        )
    return vae


def latent_shape(vae: AutoencoderKL, size: tuple[int, int]) -> tuple[int, int, int]:
    """(C, h, w) of the latents of (H, W) images. Errors: OptionError for a size that the VAE's factor does not
    divide."""
    factor = vae_factor(vae)
    if any(length % factor for length in size):
        raise OptionError(
            f"size must be divisible by {factor}, by which the VAE shrinks images, got {size[0]}x{size[1]}"
        )
    return vae.config.latent_channels, size[0] // factor, size[1] // factor
