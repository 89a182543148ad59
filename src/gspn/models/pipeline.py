"""From classes to images: a diffusers pipeline for class-conditional models, in pixels or in a VAE's latents."""

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gspn.models.generator import GSPNTransformer2DModel
from gspn.models.gspn_dit import GSPNDiTTransformer2DModel, whole_dilation
from gspn.models.latents import check_finite, check_scale, is_real, is_whole, scale_latents, unscale_latents
from gspn.models.modes import evaluating
from gspn.models.schedulers import check_eta, check_sampler, check_schedule, check_steps, set_timesteps
from gspn.names import unknown

try:
    from diffusers import (
        AutoencoderKL,
        DDPMParallelScheduler,
        DDPMScheduler,
        DiffusionPipeline,
        DiTTransformer2DModel,
        ImagePipelineOutput,
        LMSDiscreteScheduler,
        PNDMScheduler,
        SchedulerMixin,
    )
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as error:
    raise ImportError(f'generation needs diffusers ({error}): pip install "gspn[diffusion]"') from error

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
START_AT_NOISE = (LMSDiscreteScheduler, PNDMScheduler)  # their first steps are special, so none can be left out
TAKE_VARIANCE = (DDPMScheduler, DDPMParallelScheduler)  # they can use a learned variance


class GSPNPipeline(DiffusionPipeline):
    """Makes images of given classes with a generator of gspn or diffusers' DiTTransformer2DModel.

    Args:
        transformer: the model. During a call it is in evaluation mode; each part is then in its own mode again.
        scheduler: a diffusers scheduler for DDPM's noise (DDPM, DDIM, DPM-Solver++, Euler, UniPC, ...) with the model's
            prediction_type ("epsilon" for DiT). Others, such as those for flow matching, are refused.
        vae: AutoencoderKL, whose scaling_factor, shift_factor, latents_mean and latents_std are applied; None if the
            model's maps are the pixels, in [-1, 1].
        id2label: the classes' names, {0: "tench, Tinca tinca", ...}; each part between commas names the class too.
        image_size: the default (H, W) of images in pixels; None is the square of the model's sample_size.

    ``save_pretrained`` writes all of it. ``GSPNPipeline.from_pretrained`` reads that, and what DiTPipeline saved.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components: ClassVar = ["vae"]
    _callback_tensor_inputs: ClassVar = ["latents"]

    def __init__(
        self,
        transformer: GSPNDiTTransformer2DModel | GSPNTransformer2DModel | DiTTransformer2DModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        id2label: dict | None = None,
        image_size: Sequence[int] | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        id2label = {int(number): name for number, name in (id2label or {}).items()}  # JSON's keys are strings
        for number in id2label:
            if not 0 <= number < self.num_classes:
                raise ValueError(f"id2label names class {number}, but classes are 0 to {self.num_classes - 1}")
        self.id2label, self.image_size = id2label, None if image_size is None else tuple(image_size)
        names = {str(number): name for number, name in id2label.items()}
        self.register_to_config(id2label=names, image_size=image_size and list(image_size))

    # -- properties of the parts --

    @property
    def _model(self):
        """The transformer, without the wrapper that torch.compile puts around it."""
        return getattr(self.transformer, "_orig_mod", self.transformer)

    @property
    def num_classes(self) -> int:
        """The number of classes, without the null class."""
        config = self.transformer.config
        return config["num_classes"] if "num_classes" in config else config["num_embeds_ada_norm"]

    @property
    def vae_scale_factor(self) -> int:
        """The side in pixels of a pixel of the model's map; 1 without a VAE."""
        return 1 if self.vae is None else vae_factor(self.vae)

    @property
    def native_size(self) -> tuple[int, int]:
        """The default (H, W) of images in pixels: image_size, or else the square of the model's sample_size."""
        return self.image_size or (self.transformer.config.sample_size * self.vae_scale_factor,) * 2

    def get_label_ids(self, labels: int | str | Sequence[int | str] | Tensor) -> list[int]:
        """The numbers of classes given by number or name.

        Raises ValueError for a number out of range, and for a name of no class or of several."""
        labels = labels.tolist() if hasattr(labels, "tolist") else labels  # a tensor's or array's
        labels = [labels] if isinstance(labels, str) or not isinstance(labels, Iterable) else list(labels)
        known = {}
        for number, name in self.id2label.items():
            for part in {name, *map(str.strip, name.split(","))}:
                known.setdefault(part, set()).add(number)
        return [self._label_id(label, known) for label in labels]

    def _label_id(self, label, known):
        if isinstance(label, str):
            numbers = {n for n, name in self.id2label.items() if name == label} or known.get(label, set())
            if len(numbers) > 1:
                raise ValueError(f"the classes {sorted(numbers)} are all named {label!r}: pass the number")
            if not numbers:
                names = list(self.id2label.values())
                if not names:
                    raise ValueError(f"there is no class {label!r}: the classes have numbers but no names")
                raise ValueError(unknown("class", label, names))
            return next(iter(numbers))
        if not is_whole(label):
            raise ValueError(f"a class is a whole number or a name, got {label!r}")
        if not 0 <= label < self.num_classes:
            raise ValueError(f"class labels have to be from 0 to {self.num_classes - 1}, got {label}")
        return int(label)

    # -- from noise to images --

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor,
        guidance_scale: float = 4.0,
        num_inference_steps: int = 50,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        eta: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
        sequential_guidance: bool = False,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        dilation: int = 1,
        dilate_from: float = 0.7,
        image: Tensor | None = None,
        strength: float = 0.6,
        timestep_shift: float = 1.0,
        guidance_interval: Sequence[float] = (0.0, 1.0),
    ) -> ImagePipelineOutput | Any:  # a tuple with return_dict=False
        """One image for each of `class_labels`.

        Args:
            class_labels: numbers or names of classes, or one of them.
            guidance_scale: g in null + g * (conditional - null), on all channels of the prediction; 1: no guidance.
            num_inference_steps: the number of the scheduler's steps.
            height, width: of the images in pixels, multiples of the patch (times the VAE's factor). None for both is
                the pipeline's image_size.
            generator: one for all images, or a list with one for each, which is then the same in any batch.
            latents: noise (B,C,h,w) to start from instead of the generator's.
            eta: DDIM's, from 0 to 1, for schedulers that take it.
            output_type: "pil", "np" (B,H,W,C) or "pt" (B,C,H,W) in [0, 1], or "latent": the model's map as it is.
            sequential_guidance: predicts with and without the class one after the other, not in one batch of twice the
                size; takes half the memory.
            callback_on_step_end: called as f(pipeline, step, timestep, {"latents": ...}) after every step; may return
                a dict with other latents. callback_on_step_end_tensor_inputs: what it is given, "latents" or nothing.
            dilation: k for images about k times as large as in training, of GSPNDiTTransformer2DModel. In the noisy
                steps, where an image's layout arises, the model then sees k x k interleaved maps of the trained size.
            dilate_from: the noisy steps begin at this part of all timesteps, from 0 (all steps) to 1.
            image: images (B,C,H,W) in [0, 1] of any size to start from, such as smaller samples (output_type "pt").
                They are enlarged by bicubic interpolation, noise is added, and the last steps are run.
            strength: the part of the steps that are run from `image`, above 0 and up to 1; without `image` it does
                nothing.
            timestep_shift: s for images about s times as large as in training: moves the timesteps to s times as much
                noise, see gspn.models.schedulers.set_timesteps.
            guidance_interval: (low, high), parts of all timesteps. Steps outside of them are made without guidance, at
                half the cost (Kynkaanniemi et al., "Applying guidance in a limited interval", 2024).
        Returns: ImagePipelineOutput, or (images,) without `return_dict`.
        Raises ValueError, before any work, for arguments that do not fit together; NotFiniteError, a RuntimeError, if
        images are infinite or NaN ("latent" is not checked).
        """
        labels, shape = self.check_inputs(
            class_labels,
            guidance_scale,
            num_inference_steps,
            height,
            width,
            latents,
            eta,
            output_type,
            dilation,
            dilate_from,
            image,
            strength,
            timestep_shift,
            guidance_interval,
        )
        generator = _generators(generator, len(labels))
        wrong = sorted(set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs))
        if wrong:
            raise ValueError(f"a callback can take {self._callback_tensor_inputs}, got {wrong}")

        device = self._execution_device
        scheduler, takes_variance = self._scheduler()
        known = inspect.signature(scheduler.step).parameters
        extra = {name: value for name, value in dict(generator=generator, eta=eta).items() if name in known}
        num_inference_steps = int(num_inference_steps)
        set_timesteps(scheduler, num_inference_steps, float(timestep_shift), device)
        labels = torch.tensor(labels, device=device)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        # The map stays in float32, whatever the weights' dtype: a sum over steps must not be rounded to bfloat16.
        latents = latents.to(device, torch.float32)
        timesteps = scheduler.timesteps
        if image is None:
            latents = latents * scheduler.init_noise_sigma
        else:
            skipped = (num_inference_steps - last_steps(num_inference_steps, strength)) * scheduler.order
            timesteps = timesteps[skipped:]
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(skipped)
            latents = scheduler.add_noise(self._encode(image.to(device), shape), latents, timesteps[:1])

        with evaluating(self.transformer), self.progress_bar(total=len(timesteps)) as bar:
            for i, t in enumerate(timesteps):
                scaled, part = scheduler.scale_model_input(latents, t), float(t) / scheduler.config.num_train_timesteps
                options = {"dilation": int(dilation)} if dilation != 1 and part >= dilate_from else {}
                scale = guidance_scale if guidance_interval[0] <= part <= guidance_interval[1] else 1
                prediction, variance = self._predict(scaled, t, labels, scale, sequential_guidance, options)
                if takes_variance:
                    prediction = torch.cat([prediction, variance], 1)
                latents = scheduler.step(prediction, t, latents, **extra, return_dict=False)[0]
                if callback_on_step_end is not None:
                    given = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)  # there is nothing else to give
                    changed = (callback_on_step_end(self, i, t, given) or {}).get("latents")
                    latents = latents if changed is None else changed
                bar.update()
        images = self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predict(self, latents, t, labels, scale, sequential, options):
        """The guided prediction and the class's variance (no channels if none is learned), float32 (B,C,h,w)."""

        def model(maps, classes):
            steps = torch.as_tensor(t, device=maps.device).expand(len(maps))
            output = self.transformer(maps, timestep=steps, class_labels=classes, return_dict=False, **options)
            return output[0].float()

        latents, channels = latents.to(self.transformer.dtype), latents.shape[1]
        null, guided = torch.full_like(labels, self.num_classes), scale != 1
        if not guided:
            conditional = model(latents, labels)
        elif sequential:
            conditional, free = model(latents, labels), model(latents, null)[:, :channels]
        else:
            conditional, free = model(latents.repeat(2, 1, 1, 1), torch.cat([labels, null])).chunk(2)
            free = free[:, :channels]
        prediction, variance = conditional[:, :channels], conditional[:, channels:]
        if guided:
            prediction = free + scale * (prediction - free)
        return prediction, variance

    def _encode(self, images, shape):
        """The model's map, float32 of `shape` (B,C,h,w), of images in [0, 1]. Draws nothing: the VAE's mode."""
        size = tuple(side * self.vae_scale_factor for side in shape[2:])
        images = F.interpolate(images.float(), size, mode="bicubic", antialias=True).clamp(0, 1) * 2 - 1
        if self.vae is None:
            return images
        found = self.vae.encode(images.to(self.vae.dtype)).latent_dist.mode().float()
        return scale_latents(found, self.vae.config)

    def _decode(self, latents, output_type):
        if output_type == "latent":
            return latents
        if self.vae is None:
            images = latents
        else:
            latents = unscale_latents(latents, self.vae.config)
            images = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()
        check_finite(images, ": try more steps, less guidance, or the model and the VAE in float32")
        images = (images / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        images = images.permute(0, 2, 3, 1).cpu().numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images

    # -- checks --

    def check_inputs(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor,
        guidance_scale: float = 4.0,
        num_inference_steps: int = 50,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        eta: float = 0.0,
        output_type: str = "pil",
        dilation: int = 1,
        dilate_from: float = 0.7,
        image: Tensor | None = None,
        strength: float = 0.6,
        timestep_shift: float = 1.0,
        guidance_interval: Sequence[float] = (0.0, 1.0),
    ) -> tuple[list[int], tuple[int, int, int, int]]:
        """Checks the arguments of a call without running the model.

        Returns: (numbers of the classes, shape (B,C,h,w) of the maps). Raises ValueError as the call does."""
        labels = self.get_label_ids(class_labels)
        self._check_parts(output_type)
        self._check_numbers(guidance_scale, num_inference_steps, eta, timestep_shift, guidance_interval)
        scheduler, takes_variance = self._scheduler()
        check_steps(scheduler, int(num_inference_steps), takes_variance, float(timestep_shift))
        self._check_dilation(dilation, dilate_from)
        self._check_image(image, strength, len(labels), num_inference_steps, latents)
        return labels, self._map_shape(len(labels), height, width, latents, dilation)

    def _scheduler(self):
        """The scheduler to step with, and whether it takes the variance."""
        scheduler = self.scheduler
        if isinstance(scheduler, TAKE_VARIANCE):
            return scheduler, scheduler.config.variance_type in ("learned", "learned_range")
        if (scheduler.config.get("variance_type") or "").startswith("learned"):
            # With a learned variance, the solvers cut the prediction to three channels, so drop it here.
            scheduler = copy.deepcopy(scheduler)
            scheduler.register_to_config(variance_type=None)
        return scheduler, False

    def _check_parts(self, output_type):
        config, scheduler = self.transformer.config, self.scheduler
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type has to be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        name, expected = type(scheduler).__name__, config.get("prediction_type", "epsilon")
        actual = scheduler.config.get("prediction_type")
        if actual is None or not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(
                f"{name} does not take the timesteps and predictions of this model, which was trained with DDPM's "
                f"noise: expected DDPM, DDIM, DPM-Solver++, Euler, ... with prediction_type {expected!r}"
            )
        check_sampler(scheduler)
        if actual != expected:
            raise ValueError(
                f"the model predicts {expected!r}, but the scheduler ({name}) has prediction_type {actual!r}: make it "
                f"with {name}.from_config(scheduler.config, prediction_type={expected!r})"
            )
        check_schedule(scheduler)
        channels = config.in_channels
        learns = config.get("out_channels") == 2 * channels
        if config.get("out_channels") not in (None, channels, 2 * channels):
            raise ValueError(f"out_channels has to be {channels} or {2 * channels}, got {config.out_channels}")
        if self._scheduler()[1] and not learns:
            raise ValueError(
                f"the scheduler ({name}) takes a learned variance, but the model predicts none: make it with "
                'variance_type="fixed_small"'
            )
        if self.vae is not None and self.vae.config.latent_channels != channels:
            raise ValueError(f"the VAE has {self.vae.config.latent_channels} latent channels, the model has {channels}")
        if self.vae is not None:
            check_scale(self.vae.config)
        if self.vae is None and output_type == "pil" and channels not in (1, 3):
            raise ValueError(f"maps of {channels} channels are no pictures: pass a vae, or another output_type")

    def _check_numbers(self, scale, steps, eta, shift, interval):
        if not is_real(scale) or not 0 <= scale < math.inf:
            raise ValueError(f"guidance_scale has to be a finite number of at least 0, got {scale!r}")
        last = self.scheduler.config.num_train_timesteps
        if not is_whole(steps) or not 1 <= steps <= last:
            raise ValueError(f"num_inference_steps has to be a whole number from 1 to {last}, got {steps!r}")
        check_eta(self.scheduler, eta)
        if not is_real(shift) or not 1 <= shift < math.inf:
            raise ValueError(f"timestep_shift has to be a finite number of at least 1, got {shift!r}")
        ends = interval if isinstance(interval, list | tuple) and len(interval) == 2 else (math.nan, math.nan)
        if not all(map(is_real, ends)) or not 0 <= ends[0] <= ends[1] <= 1:
            raise ValueError(f"guidance_interval has to be two numbers from 0 to 1, the lower first, got {interval!r}")
        if scale != 1 and self.transformer.config.get("class_dropout_prob", 0.1) == 0:
            raise ValueError(
                f"the model has no null class (class_dropout_prob 0): guidance_scale has to be 1, got {scale}"
            )

    def _check_dilation(self, dilation, dilate_from):
        if whole_dilation(dilation) != 1 and not isinstance(self._model, GSPNDiTTransformer2DModel):
            name = type(self._model).__name__
            raise ValueError(
                f"dilation={dilation} needs a GSPNDiTTransformer2DModel, such as GSPN-DiT-S/2, got a {name}"
            )
        if not is_real(dilate_from) or not 0 <= dilate_from <= 1:
            raise ValueError(f"dilate_from has to be from 0 to 1, got {dilate_from!r}")

    def _check_image(self, image, strength, count, steps, latents):
        if not is_real(strength) or not 0 < strength <= 1:
            raise ValueError(f"strength has to be above 0 and at most 1, got {strength!r}")
        if image is None:
            return
        channels = self.transformer.config.in_channels if self.vae is None else self.vae.config.in_channels
        if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[:2] != (count, channels):
            raise ValueError(
                f"image has to be a tensor ({count},{channels},H,W), an image for each class, got {_kind(image)}"
            )
        if not bool(((image >= 0) & (image <= 1)).all()):
            raise ValueError("image has to have values from 0 to 1; samples of output_type 'pt' have them")
        if latents is not None:
            raise ValueError("image and latents both say where to start: give one")
        if isinstance(self.scheduler, START_AT_NOISE):
            name = type(self.scheduler).__name__
            raise ValueError(f"{name} cannot start from an image: expected DDPM, DDIM, DPM-Solver++, UniPC or Euler")
        if not last_steps(steps, strength):
            raise ValueError(f"strength={strength} of {steps} steps is no step: choose more of either")

    def _map_shape(self, count, height, width, latents, dilation):
        config, factor = self.transformer.config, self.vae_scale_factor
        if not count:
            raise ValueError("expected at least one class, got none")
        if latents is not None and not (isinstance(latents, Tensor) and latents.ndim == 4):
            raise ValueError(f"latents have to be a tensor ({count},{config.in_channels},h,w), got {_kind(latents)}")
        if (height is None) != (width is None):
            raise ValueError(f"expected both height and width or neither, got {height} and {width}")
        if height is None:
            if latents is not None:
                height, width = (side * factor for side in latents.shape[-2:])
            else:
                height, width = self.native_size
        unit = config.patch_size * factor * dilation
        if not all(is_whole(side) and side > 0 and side % unit == 0 for side in (height, width)):
            parts = f"the patch size {config.patch_size}" + (f" times the VAE's factor {factor}" if factor > 1 else "")
            parts += f" times the dilation {dilation}" if dilation > 1 else ""
            raise ValueError(f"height and width have to be multiples of {unit}, {parts}, got {height}x{width}")
        if height != width and isinstance(self._model, DiTTransformer2DModel):
            raise ValueError(f"diffusers' DiT only makes square images, got {height}x{width}")
        shape = (count, config.in_channels, int(height) // factor, int(width) // factor)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents have to have the shape {shape} for these images, got {tuple(latents.shape)}")
        return shape


def vae_factor(vae: AutoencoderKL) -> int:
    """Pixels for one position of the latents, in each dimension."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def _generators(generator, count):
    """As diffusers takes them: one, a list of one for each image, or None."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    if not isinstance(generator, list | tuple) or not all(isinstance(each, torch.Generator) for each in generator):
        raise ValueError(f"generator has to be a torch.Generator, or a list with one for each image, got {generator!r}")
    if len(generator) != count:
        raise ValueError(f"expected one generator for each of {count} images, got {len(generator)}")
    return list(generator)


def _kind(value):
    """A value that should be another tensor, in a message."""
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def last_steps(steps: int, strength: float) -> int:
    """How many of the steps are run from an image."""
    return round(steps * strength)
