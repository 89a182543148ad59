"""Stable Diffusion for distillation: opens a pipeline from a folder or the hub, and turns images into latents and
captions into the UNet's conditions. SD-1.5, SD-2 and SDXL differ only in this file.
"""

import json
import logging
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from safetensors import SafetensorError
from torch import Tensor

from gspn.data.hub import out_of_reach
from gspn.digests import digest, settings, tensors_of
from gspn.models.latents import check_scale, scale_latents
from gspn.models.schedulers import check_schedule
from gspn.options import OptionError
from gspn.places import expanded, location
from gspn.progress import bars_on_terminals_only
from gspn.sampling.generators import named_scheduler
from gspn.stable_diffusion.pipelines import StableDiffusionPipeline, StableDiffusionXLPipeline, latent_scale, unit_of
from gspn.stable_diffusion.swap import own_size
from gspn.tasks.objective import Objective

CLASSES = {kind.__name__: kind for kind in (StableDiffusionPipeline, StableDiffusionXLPipeline)}
CONDITIONS = ("text", "pooled", "ids")  # of a UNet; only SDXL has the last two
# The entries of a scheduler's config that define the noise; the rest is about sampling or the version of diffusers.
SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)
WARN_OF_LENGTHS = (
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
    "transformers.tokenization_utils_base",
)
LOOKED_AT = 1000  # captions whose length is checked


class TextToImage:
    """A text-to-image pipeline of diffusers, with all its weights frozen.

    Args:
        pipe: StableDiffusionPipeline or StableDiffusionXLPipeline, its VAE in float32, the rest in any one dtype.
        where: its name in messages. cache: keeps the encoded images and captions in memory.

    Attributes:
        unet, vae: the pipeline's. objective: the Objective of its noise schedule and prediction type.
        path: `where` as an absolute path, or as it is if it is a name.

    Errors: OptionError for a pipeline that cannot be trained on.
    """

    def __init__(self, pipe: DiffusionPipeline, where: str | Path, *, cache: bool = False):
        self.pipe, self.unet, self.vae, self.path = pipe, pipe.unet, pipe.vae, location(where)
        self.cache = {} if cache else None
        self.is_xl, self._null = isinstance(pipe, StableDiffusionXLPipeline), None
        for part in ("unet", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"):
            if getattr(pipe, part, pipe) is None and not (self.is_xl and part in ("text_encoder", "tokenizer")):
                raise OptionError(f"the pipeline {where} has no {part}")
        if isinstance(self.vae, AutoencoderTiny):
            raise OptionError(
                f"the VAE of {where} is an AutoencoderTiny, which has no posterior: expected an AutoencoderKL"
            )
        unet, latents = self.unet.config, self.vae.config.latent_channels
        if {unet.in_channels, unet.out_channels} != {latents}:
            raise OptionError(
                f"the UNet of {where} takes {unet.in_channels} channels and returns {unet.out_channels}, but its VAE "
                f"has {latents}: expected a text-to-image model, not one for inpainting or the like"
            )
        if unet.time_cond_proj_dim is not None:
            raise OptionError(
                f"the UNet of {where} is conditioned on guidance: expected one without time_cond_proj_dim"
            )
        if self.vae.config.get("latents_mean") is not None and not self.is_xl:
            raise OptionError(
                f"the VAE of {where} has latents_mean, which {type(pipe).__name__} does not apply: expected a "
                "StableDiffusionXLPipeline, or a VAE with one scaling_factor for all channels"
            )
        if "beta_schedule" not in pipe.scheduler.config:
            raise OptionError(
                f"the scheduler of {where}, {type(pipe.scheduler).__name__}, has no betas: expected one for diffusion, "
                "not for flow matching or EDM"
            )
        try:
            check_scale(self.vae.config)
            check_schedule(pipe.scheduler)
            self.objective = Objective(named_scheduler("ddpm", pipe.scheduler))
        except ValueError as error:
            raise OptionError(f"{where} cannot be trained on: {error}") from error
        pipe.set_progress_bar_config(disable=True)
        for part in self._models().values():
            part.requires_grad_(False).eval()

    def _models(self):
        return {name: part for name, part in self.pipe.components.items() if isinstance(part, torch.nn.Module)}

    # -- sizes --

    def native_size(self) -> tuple[int, int]:
        """The UNet's own (H, W) in pixels. Errors: OptionError if its config does not say."""
        if (size := own_size(self.unet)) is None:
            raise OptionError(f"the UNet of {self.path} has no sample_size in its config: pass a size")
        return size[0] * self.pipe.vae_scale_factor, size[1] * self.pipe.vae_scale_factor

    @property
    def multiple(self) -> int:
        """The sides of images in pixels are multiples of it."""
        return unit_of(self.pipe)

    def check_size(self, size: tuple[int, int]) -> None:
        """Raises OptionError unless images of (H, W) can be trained on and drawn."""
        if any(length % self.multiple for length in size):
            raise OptionError(f"size must be divisible by {self.multiple}, got {size[0]}x{size[1]}")

    # -- from a batch to latents, conditions and predictions --

    @torch.no_grad()
    def latents(self, images: Tensor, *, draw: bool = True) -> Tensor:
        """Scaled latents, float32 (B,C,h,w), of images (B,3,H,W) in [-1, 1]: a draw from the VAE's posterior, or its
        mean."""
        found = self._by_item(self._posterior, images, lambda image: digest([image]))
        # randn_like draws in the order of the memory, which depends on the VAE, the cache and the number of images
        mean, std = (each.contiguous(memory_format=torch.channels_last) for each in found)
        z = mean + std * torch.randn_like(std) if draw else mean
        return scale_latents(z, latent_scale(self.pipe))

    def _posterior(self, images):
        posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()

    @torch.no_grad()
    def conditions(self, captions: Sequence[str | None], size: tuple[int, int]) -> dict[str, Tensor]:
        """The UNet's conditions, on its device: "text" (B,L,D); for SDXL also "pooled" (B,P) and "ids" (B,6).

        A caption None becomes the unconditional half of guidance: the empty text or, if SDXL is configured so, zeros.
        SDXL's "ids" are the pipeline's defaults: the image originally had this size and was not cropped.
        """
        dropped = torch.tensor([caption is None for caption in captions], device=self.unet.device)
        encoded = self._by_item(self._texts, [caption or "" for caption in captions], lambda caption: caption)
        if self._null is None:
            self._null = self._encoded([""], guided=True)[1::2]
        merged = [
            torch.where(dropped.view(-1, *[1] * (text.ndim - 1)), null, text)
            for text, null in zip(encoded, self._null, strict=True)
        ]
        conditions = {"text": merged[0]}
        if self.is_xl:
            ids = torch.tensor([*size, 0, 0, *size], dtype=merged[0].dtype, device=self.unet.device)
            conditions |= {"pooled": merged[1], "ids": ids.repeat(len(captions), 1)}
        return conditions

    def _texts(self, texts):
        return self._encoded(texts, guided=False)[::2]

    def _encoded(self, texts, guided):
        """The pipeline's (text, its unconditional half) and, for SDXL, the pooled form of both."""
        with lengths_untold(), self._without_autocast():
            return self.pipe.encode_prompt(
                prompt=texts,
                device=self.unet.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=guided,
            )

    def _by_item(self, encode, items, key):
        """The tensors that `encode` makes of a batch. With a cache it encodes each item alone, so that no bit depends
        on the batch in which the item came first."""
        with self._without_autocast():
            if self.cache is None:
                return encode(items)
            keys = [key(item) for item in items]
            for i, name in enumerate(keys):
                if name not in self.cache:
                    self.cache[name] = [tensor.cpu() for tensor in encode(items[i : i + 1])]
            found = [self.cache[name] for name in keys]
            return [torch.cat(tensors).to(self.unet.device) for tensors in zip(*found, strict=True)]

    def _without_autocast(self):
        return torch.autocast(self.unet.device.type, enabled=False)

    def predict(self, noisy: Tensor, timestep: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """The UNet's prediction (B,C,h,w) for x_t, t (B,) and the result of `conditions`."""
        dtype = self.unet.dtype
        added = None
        if self.is_xl:
            added = {"text_embeds": conditions["pooled"].to(dtype), "time_ids": conditions["ids"].to(dtype)}
        return self.unet(
            noisy.to(dtype),
            timestep,
            encoder_hidden_states=conditions["text"].to(dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    # -- identity --

    def digest(self, like: str | None = None) -> str:
        """A digest of the models' weights and settings, the tokenizers' vocabularies and the noise schedule, in the
        scheme of `like`. Call it before the UNet is swapped."""
        schedule = {key: self.objective.scheduler.config.get(key) for key in SCHEDULE}
        parts, models = [json.dumps(schedule, sort_keys=True, default=list)], sorted(self._models().items())
        for part, model in models:
            parts += tensors_of(model.state_dict(), part + " {name} {shape} {dtype}")
        tokenizers = [self.pipe.components.get(name) for name in ("tokenizer", "tokenizer_2")]
        words = [one and [one.get_vocab(), one.model_max_length] for one in tokenizers]
        return digest([*parts, [[part, settings(model)] for part, model in models], words], like)

    def too_long(self, captions: Sequence[Sequence[str]]) -> str | None:
        """A note, if some of the first captions have more tokens than the text encoder takes."""
        tokenizer, looked_at = self.pipe.tokenizer or self.pipe.tokenizer_2, captions[:LOOKED_AT]
        most = tokenizer.model_max_length
        lengths = [len(tokenizer(texts[0], truncation=False, verbose=False).input_ids) for texts in looked_at]
        longer = sum(length > most for length in lengths)
        if not longer:
            return None
        what = f"{longer} of the first {len(lengths)} captions have more than the {most} tokens"
        return f"{what} that the text encoder takes: the rest is cut off"


@contextmanager
def lengths_untold():
    """In the block, diffusers and transformers do not warn of each text that is too long: `too_long` says it once."""
    loggers = [logging.getLogger(name) for name in WARN_OF_LENGTHS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def open_text_to_image(
    where: str | Path, *, precision: str = "fp32", variant: str | None = None, cache: bool = False
) -> TextToImage:
    """A Stable Diffusion pipeline, on the CPU.

    Args:
        where: a folder written by save_pretrained, or a name on the Hugging Face hub; only safetensors files are read.
        precision: "fp32", or "bf16" for all but the VAE in bfloat16. variant: of the files, such as "fp16".
        cache: see TextToImage.
    Errors: OptionError.
    """
    path = expanded(where)
    name = str(path) if path.exists() else str(where)
    problem = None if path.exists() else out_of_reach(name, "model_index.json")
    offline = problem is not None  # then the local copy is used
    try:
        found = DiffusionPipeline.load_config(name, local_files_only=offline).get("_class_name")
        if found not in CLASSES:
            raise OptionError(f"{where} holds a {found}, expected a {' or '.join(CLASSES)}")
        more = (
            {} if found == "StableDiffusionXLPipeline" else {"safety_checker": None, "requires_safety_checker": False}
        )
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        with bars_on_terminals_only():
            pipe = CLASSES[found].from_pretrained(
                name,
                use_safetensors=True,
                variant=variant,
                dtype={"default": dtype, "vae": torch.float32},
                local_files_only=offline,
                **more,
            )
        for part, model in pipe.components.items():  # an older diffusers does not know `dtype`
            wanted = torch.float32 if part == "vae" else dtype
            parameters = model.parameters() if isinstance(model, torch.nn.Module) else ()
            if any(p.is_floating_point() and p.dtype != wanted for p in parameters):  # diffusers warns of any cast
                model.to(wanted)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, AttributeError, SafetensorError) as error:
        if isinstance(error, OptionError):
            raise
        reason = "; ".join(filter(None, [problem, " ".join(str(error).strip().splitlines()[:2])]))
        raise OptionError(f"the pipeline {where} cannot be loaded: {reason}") from error
    return TextToImage(pipe, where, cache=cache)
