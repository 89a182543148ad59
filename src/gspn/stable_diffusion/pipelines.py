"""Stable Diffusion's pipelines of diffusers, without the advice that transformers logs when they are imported: to
install torchvision for its image processors. Nothing here has images processed by them, and Pillow does it as well.
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

__all__ = ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "rescale_noise_cfg", "retrieve_latents"]
