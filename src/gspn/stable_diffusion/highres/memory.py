"""How much memory a stage of a high-resolution image needs, and which savers to switch on."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

import torch
from torch import nn

from gspn.layers import GSPN2d
from gspn.memory import MIB, peak_bytes
from gspn.models.pipeline import vae_factor
from gspn.stable_diffusion.highres.savers import SAVERS, Savers, has_tiling, saving, tile_of
from gspn.stable_diffusion.layer import GSPNAttention

SHARE = 0.9  # of the free memory that a plan may use: kernels take workspaces that no estimate sees
MANY_PIXELS = 4096 * 4096  # from here on all savers are on where no estimate can be made
VAE_ATTENTION = 2**16  # tokens in the VAE's attention above which tiles are much faster


def is_offloaded(pipe) -> bool:
    """Whether hooks bring the weights to the device only when they are needed."""
    models = [m for m in pipe.components.values() if isinstance(m, nn.Module)]
    hooked = ("_hf_hook", "_diffusers_hook")
    return any(hasattr(part, name) for model in models for part in model.modules() for name in hooked)


def working_dtype(vae) -> torch.dtype:
    """The dtype in which the VAE works: float32 where float16 would overflow."""
    upcast = vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
    return torch.float32 if upcast else vae.dtype


def tiles_are_faster(vae, height: int, width: int) -> bool:
    """Whether the VAE has attention over the whole image and the image is so large that it would take most of the
    time."""
    attends = vae.config.get("mid_block_add_attention", True)
    return attends and height * width // vae_factor(vae) ** 2 > VAE_ATTENTION


def unet_bytes(pipe, height: int, width: int, savers: Savers, conditions: Callable) -> int:
    """The bytes that one step of the UNet takes beside the weights. `conditions(savers)` gives the UNet's arguments for
    one run except sample and timestep, as tensors on "meta"."""
    arguments = conditions(savers)
    batch, channels = len(arguments["encoder_hidden_states"]), pipe.unet.config.in_channels
    shape = (batch, channels, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
    arguments |= {
        "sample": torch.empty(shape, dtype=pipe.unet.dtype, device="meta"),
        "timestep": torch.empty((), dtype=torch.int64, device="meta"),
        "return_dict": False,
    }
    with saving(pipe, replace(savers, vae_tiling=False)), _any_backend(pipe.unet):
        peak = peak_bytes(pipe.unet, "forward", **arguments)
    # in addition: latents, encoded image, noise, the blended map and the predictions of two passes, in float32
    return peak + 10 * 4 * channels * shape[2] * shape[3]


@contextmanager
def _any_backend(unet) -> Iterator[None]:
    """In the block, the layers of a swap take any backend: native ones, which they may name, do not run on "meta"."""
    layers = [module for module in unet.modules() if isinstance(module, GSPNAttention | GSPN2d)]
    named = [(layer, layer.backend) for layer in layers if layer.backend != "reference"]
    for layer, _ in named:
        layer.backend = None
    try:
        yield
    finally:
        for layer, backend in named:
            layer.backend = backend


def vae_bytes(pipe, height: int, width: int, tiling: bool) -> int:
    """The bytes that encoding or decoding an image takes beside the weights."""
    vae, factor, dtype = pipe.vae, pipe.vae_scale_factor, working_dtype(pipe.vae)
    high, wide = (min(side, tile_of(vae)) if tiling else side for side in (height, width))
    shapes = {
        "decode": (1, vae.config.latent_channels, high // factor, wide // factor),
        "encode": (1, vae.config.get("in_channels", 3), high, wide),
    }
    peaks = [
        peak_bytes(vae, method, torch.empty(shape, dtype=dtype, device="meta"), return_dict=False, dtype=dtype)
        for method, shape in shapes.items()
    ]
    image = 3 * 4 * height * width
    return max(peaks) + (4 if tiling else 2) * image  # all tiles, which overlap, and what is put together from them


def choose(
    pipe,
    size: tuple[int, int],
    wanted: Savers,
    useless: Collection[str],
    conditions: Callable,
    device: torch.device,
    room: float,
    by_offload: float = 0,
) -> tuple[Savers, int | None]:
    """The savers for a stage and the bytes that it needs beside the loaded weights, None where that is unknown.

    Args:
        size: (height, width) in pixels. wanted: the savers asked for; one that is None is on only if the stage does not
            fit without it (tiles also if the VAE's attention would take most of the time).
        useless: savers that do nothing in this stage, whatever is asked for: they stay off.
        conditions: see unet_bytes. room: the bytes that it may take. by_offload: what offloading adds to them.
    Raises ValueError, with the numbers, where it does not fit; and where tiles are asked for and the VAE has none.
    """
    if not has_tiling(pipe.vae):
        if wanted.vae_tiling:
            raise ValueError(f"{type(pipe.vae).__name__}, the VAE, has no tiling: pass vae_tiling=False or None")
        useless = {*useless, "vae_tiling"}
    asked = {name: value for name, value in asdict(wanted).items() if name not in useless}
    on = dict.fromkeys(SAVERS, False) | {name: bool(value) for name, value in asked.items()}
    undecided = [name for name, value in asked.items() if value is None]
    if "vae_tiling" in undecided:
        on["vae_tiling"] = tiles_are_faster(pipe.vae, *size)
    if is_offloaded(pipe):
        large = size[0] * size[1] > MANY_PIXELS
        return Savers(**on | dict.fromkeys(undecided, large) | {"offload": False}), None

    def unet():
        return unet_bytes(pipe, *size, Savers(**on), conditions)

    def vae():
        return vae_bytes(pipe, *size, on["vae_tiling"])

    needs = {"UNet": unet(), "VAE": vae()}
    for name in ("sequential_guidance", "chunked_feed_forward", "parked_residuals"):
        if needs["UNet"] > room and name in undecided:
            on[name] = True
            needs["UNet"] = unet()
    if needs["VAE"] > room and "vae_tiling" in undecided and not on["vae_tiling"]:
        on["vae_tiling"] = True
        needs["VAE"] = vae()
    if max(needs.values()) > room and "offload" in undecided and by_offload:
        on["offload"] = True
    if on["offload"]:
        room += by_offload
    if max(needs.values()) > room:
        numbers = ", ".join(f"the {part} {need / MIB:,.0f} MiB" for part, need in needs.items())
        off = [name for name, value in asked.items() if value is False]
        advice = f" or allow {', '.join(off)}" if off else ""
        raise ValueError(
            f"an image of {size[0]}x{size[1]} does not fit: beside the weights {numbers}"
            f"{Savers(**on).told() or ' (no savers)'}, of {room / MIB:,.0f} MiB that may be used on {device}: choose a "
            f"smaller size{advice}"
        )
    return Savers(**on), max(needs.values())
