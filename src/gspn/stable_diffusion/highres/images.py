"""Images and latents: encoding, decoding, enlarging, and matching the statistics of latents."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from gspn.models.latents import check_finite, scale_latents, unscale_latents
from gspn.stable_diffusion.highres.memory import working_dtype

try:
    from gspn.stable_diffusion.pipelines import latent_scale, retrieve_latents
except ImportError as error:
    raise ImportError(f'high resolution needs diffusers ({error}): pip install "gspn[diffusion]"') from error


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """An image (B,C,H,W) in [-1, 1] enlarged to `size`, bicubic."""
    return F.interpolate(image, size=size, mode="bicubic", align_corners=False).clamp(-1, 1)


def rematched(latents: Tensor, reference: Tensor) -> Tensor:
    """Latents (B,C,h,w) with the mean and deviation that each channel has in `reference`."""
    mean, deviation = latents.mean((2, 3), keepdim=True), latents.std((2, 3), keepdim=True, correction=0)
    wanted = reference.std((2, 3), keepdim=True, correction=0)
    scale = wanted / deviation.clamp(min=torch.finfo(latents.dtype).tiny)
    return (latents - mean) * scale + reference.mean((2, 3), keepdim=True)


def encode(pipe, image: Tensor) -> Tensor:
    """The latents (1,C,h,w), float32, of an image (1,3,H,W) in [-1, 1]: the mode of the VAE's distribution, scaled for
    the UNet."""
    with _working(pipe.vae) as dtype:
        latents = retrieve_latents(pipe.vae.encode(image.to(dtype)), sample_mode="argmax").float()
    return scale_latents(latents, latent_scale(pipe))


def decode(pipe, latents: Tensor) -> Tensor:
    """The image (1,3,H,W) in [-1, 1], float32, on the CPU. Raises NotFiniteError if it is not finite."""
    latents = unscale_latents(latents.to(pipe._execution_device, torch.float32), latent_scale(pipe))
    with _working(pipe.vae) as dtype:
        image = pipe.vae.decode(latents.to(dtype), return_dict=False)[0].float().cpu()
    check_finite(image, f": the VAE overflows in {dtype}, load it in float32" if dtype != torch.float32 else "")
    return image


@contextmanager
def _working(vae) -> Iterator[torch.dtype]:
    """In the block, the VAE has the dtype in which it can work; yields that dtype."""
    before, dtype = vae.dtype, working_dtype(vae)
    if dtype != before:
        vae.to(dtype)
    try:
        yield dtype
    finally:
        if dtype != before:
            vae.to(before)
