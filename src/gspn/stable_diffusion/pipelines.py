"""Stable Diffusion's pipelines of diffusers, without the advice that transformers logs when they are imported: to
install torchvision for its image processors. Nothing here has images processed by them, and Pillow does it as well. And
how these pipelines scale latents, and which sides images may have.
"""

import logging
import math

ADVICE = "requires torchvision (not installed)"
LOGGER = logging.getLogger("transformers.utils.import_utils")
SIDE_UNIT = 8  # diffusers' pipelines require sides divisible by it, whatever the VAE's factor


def _is_other(record: logging.LogRecord) -> bool:
    return ADVICE not in record.getMessage()


LOGGER.addFilter(_is_other)
try:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
finally:
    LOGGER.removeFilter(_is_other)

__all__ = [
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "latent_scale",
    "rescale_noise_cfg",
    "retrieve_latents",
    "unit_of",
]


def unit_of(pipe: StableDiffusionPipeline | StableDiffusionXLPipeline) -> int:
    """The number by which the sides of images have to be divisible."""
    return math.lcm(SIDE_UNIT, pipe.vae_scale_factor)


def latent_scale(pipe: StableDiffusionPipeline | StableDiffusionXLPipeline) -> dict:
    """How the pipeline itself scales latents, for gspn.models.latents: SDXL's uses the VAE's mean and deviation by
    channel, the others only scaling_factor. Neither applies a shift_factor."""
    config = pipe.vae.config
    scale = {name: config.get(name) for name in ("scaling_factor", "latents_mean", "latents_std")}
    if None in scale.values() or not isinstance(pipe, StableDiffusionXLPipeline):
        return {"scaling_factor": config.scaling_factor}
    return scale
