"""Between images and latents: a pipeline's VAE, enlarging, and the statistics of latents."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from gspn.models.highres.memory import working_dtype

try:
    from gspn.models.stable_diffusion import StableDiffusionXLPipeline, retrieve_latents
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
    """The latents (1,C,h,w), float32, of an image (1,3,H,W) in [-1, 1], scaled as the UNet wants them; the mode of the
    VAE's distribution."""
    with _working(pipe.vae) as dtype:
        latents = retrieve_latents(pipe.vae.encode(image.to(dtype)), sample_mode="argmax").float()
    mean, deviation = _statistics(pipe, latents)
    return (latents - mean) / deviation * pipe.vae.config.scaling_factor


def decode(pipe, latents: Tensor) -> Tensor:
    """The image (1,3,H,W) in [-1, 1], float32, on the CPU."""
    latents = latents.to(pipe._execution_device, torch.float32)
    mean, deviation = _statistics(pipe, latents)
    latents = latents / pipe.vae.config.scaling_factor * deviation + mean
    with _working(pipe.vae) as dtype:
        return pipe.vae.decode(latents.to(dtype), return_dict=False)[0].float().cpu()


def _statistics(pipe, latents):
    """The VAE's latents' mean and deviation by channel, which SDXL's pipelines alone look at."""
    config = pipe.vae.config
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    if mean is None or deviation is None or not isinstance(pipe, StableDiffusionXLPipeline):
        return 0.0, 1.0
    return (torch.tensor(value).view(1, -1, 1, 1).to(latents) for value in (mean, deviation))


@contextmanager
def _working(vae) -> Iterator[torch.dtype]:
    """The VAE in the dtype in which it can work, which is given."""
    before, dtype = vae.dtype, working_dtype(vae)
    if dtype != before:
        vae.to(dtype)
    try:
        yield dtype
    finally:
        if dtype != before:
            vae.to(before)
