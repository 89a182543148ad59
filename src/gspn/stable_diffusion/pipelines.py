"""Stable Diffusion's pipelines of diffusers, without the advice that transformers logs when they are imported: to
install torchvision for its image processors. Nothing here has images processed by them, and Pillow does it as well. And
how these pipelines scale latents.
"""

import logging

ADVICE = "requires torchvision (not installed)"
LOGGER = logging.getLogger("transformers.utils.import_utils")


def _is_other(record: logging.LogRecord) -> bool:
    return ADVICE not in record.getMessage()


LOGGER.addFilter(_is_other)
try:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
finally:
    LOGGER.removeFilter(_is_other)

__all__ = ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "rescale_noise_cfg", "retrieve_latents", "scale_of"]


def scale_of(pipe: StableDiffusionPipeline | StableDiffusionXLPipeline) -> dict:
    """How the pipeline itself scales latents, for gspn.models.latents: SDXL's uses the VAE's mean and deviation by
    channel, the others only scaling_factor. Neither applies a shift_factor."""
    config = pipe.vae.config
    scale = {name: config.get(name) for name in ("scaling_factor", "latents_mean", "latents_std")}
    if None in scale.values() or not isinstance(pipe, StableDiffusionXLPipeline):
        return {"scaling_factor": config.scaling_factor}
    return scale
