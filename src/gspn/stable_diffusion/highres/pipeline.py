"""Images far larger than a Stable Diffusion model was trained for: made at its own size, then refined in stages."""

import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gspn.memory import MIB, free_bytes, weight_bytes
from gspn.models.latents import check_finite, is_real, is_whole
from gspn.models.pipeline import OUTPUT_TYPES
from gspn.models.schedulers import check_eta
from gspn.progress import Progress
from gspn.stable_diffusion.adapting import adapt
from gspn.stable_diffusion.highres.images import decode, encode, rematched, resize
from gspn.stable_diffusion.highres.memory import SHARE, choose, is_offloaded
from gspn.stable_diffusion.highres.passes import Guidance, allowed_options, cosine_share
from gspn.stable_diffusion.highres.plan import STEPS, STRENGTHS, Stage, check_pipeline, last_timesteps, make_stages
from gspn.stable_diffusion.highres.savers import SAVERS, Savers, saving
from gspn.stable_diffusion.highres.state import described, fingerprint, opened

try:
    from diffusers import LMSDiscreteScheduler
    from diffusers.utils import BaseOutput, logging
    from diffusers.utils.torch_utils import randn_tensor

    from gspn.stable_diffusion.pipelines import StableDiffusionPipeline, StableDiffusionXLPipeline
except ImportError as error:
    raise ImportError(f'high resolution needs diffusers ({error}): pip install "gspn[diffusion]"') from error

logger = logging.get_logger(__name__)
LEAST_SHARE = 0.01  # of the dilated pass in the prediction; below it, the pass is left out


@dataclass
class HighResOutput(BaseOutput):
    """What :class:`HighResPipeline` returns.

    Attributes:
        images: the image, in a list of one (or an array or tensor of one).
        stages: the image after each stage, the last one too.
        plan: the stages as they were run, with their savers and their expected memory.
        seed: the seed that makes the same image again.
        nsfw_content_detected: what the pipeline's safety checker found in the image, None without one.
    """

    images: Any
    stages: list
    plan: list[Stage]
    seed: int
    nsfw_content_detected: list[bool] | None = None


class HighResPipeline:
    """Images of any size, up to 16K x 8K, by a Stable Diffusion or SDXL pipeline of diffusers.

    The pipeline makes an image of its training size, in the aspect asked for. Each stage then enlarges the last image,
    encodes it (z0) and adds noise until the last ceil(steps * strength) steps remain::

        x = c(t)^blend * (z0 noised to t) + (1 - c(t)^blend) * x,   c(t) = (1 - cos(pi t / T)) / 2
        prediction = (1 - c(t)^dilation) * UNet(x) + c(t)^dilation * UNet with dilated convolutions(x)
        x = the scheduler's step from x with the prediction

    and sets mean and deviation of each channel of the result to those of z0. Convolutions are dilated by the ratio of
    the stage's side to the trained one, rounded.

    Args:
        pipe: a StableDiffusionPipeline or StableDiffusionXLPipeline, its self-attention replaced (:func:`gspn.swap`)
            or not; attention's cost grows with the square of the pixels. Its scheduler has to be one of DDIM, DDPM,
            DPM-Solver++ (multistep), DEIS, Euler, LMS, PNDM or LCM. After each call it is as before.

    Raises TypeError and ValueError for another one. Source: arXiv 2501.12381, on ultra-high resolution; blending and
    the exponents' defaults as in DemoFusion, arXiv 2311.16973.
    """

    def __init__(self, pipe: StableDiffusionPipeline | StableDiffusionXLPipeline):
        check_pipeline(pipe)
        self.pipe = pipe

    @torch.no_grad()
    def plan(
        self,
        height: int | None = None,
        width: int | None = None,
        *,
        stages: Sequence[tuple[int, int]] | None = None,
        native_steps: int = 50,
        steps: int | Sequence[int] = STEPS,
        strengths: float | Sequence[float] = STRENGTHS,
        guidance_scale: float = 7.0,
        dilation: float | None = 1.0,
        memory_mib: float | None = None,
        vae_tiling: bool | None = None,
        sequential_guidance: bool | None = None,
        chunked_feed_forward: bool | None = None,
        parked_residuals: bool | None = None,
        offload: bool | None = None,
        **options: Any,
    ) -> list[Stage]:
        """The stages that a call with these arguments would run, with sizes, savers and memory. Makes no image. Other
        arguments of a call, such as seed and workdir, change nothing and are not checked.

        Raises ValueError and TypeError, as the call does, for the arguments that are named here and the options of the
        pipeline."""
        check_pipeline(self.pipe)
        called = inspect.signature(self.__call__).parameters
        options = {name: value for name, value in options.items() if name not in called}
        _check_options(self.pipe, options)
        found = make_stages(self.pipe, height, width, stages, native_steps, steps, strengths, dilation is not None)
        wanted = Savers(vae_tiling, sequential_guidance, chunked_feed_forward, parked_residuals, offload)
        guidance = Guidance(self.pipe, "", None, _scale(guidance_scale), options, found[0].size)
        return self._fit(found, [wanted] * len(found), guidance, memory_mib)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        *,
        negative_prompt: str | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        stages: Sequence[tuple[int, int]] | None = None,
        native_steps: int = 50,
        steps: int | Sequence[int] = STEPS,
        strengths: float | Sequence[float] = STRENGTHS,
        guidance_scale: float = 7.0,
        blend: float | None = 3.0,
        dilation: float | None = 1.0,
        rematch: bool = True,
        memory_mib: float | None = None,
        vae_tiling: bool | None = None,
        sequential_guidance: bool | None = None,
        chunked_feed_forward: bool | None = None,
        parked_residuals: bool | None = None,
        offload: bool | None = None,
        workdir: str | Path | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable | None = None,
        callback_on_stage_end: Callable | None = None,
        **options: Any,
    ) -> HighResOutput:
        """One image of `prompt`.

        Args:
            prompt, negative_prompt: texts.
            guidance_scale: g in null + g * (prompted - null), at least 1, which is without.
            height, width: of the image, multiples of 8 (and of the VAE's factor).
            seed: the first stage's image is then the one that the pipeline makes with
                ``torch.Generator().manual_seed(seed)``; None draws one, from `generator` if there is one.
            stages: sizes (height, width) of all stages, the first made from noise, the last the image; None doubles
                the sides from the trained size on.
            native_steps: of the first stage.
            steps, strengths: of the others, the last value for all that follow.
            blend, dilation: the exponents above; None leaves blending or the second pass out.
            rematch: whether mean and deviation are matched.
            memory_mib: the memory that the call may take beside the weights; None is nine tenths of the free memory.
            vae_tiling, sequential_guidance, chunked_feed_forward, parked_residuals, offload: the savers, see
                :class:`gspn.stable_diffusion.highres.savers.Savers`; None switches one on in the stages that do not fit
                without it (vae_tiling also where it saves most of the VAE's time). Savers that are on in the first
                stage change the VAE alone, the feed-forward layers and the residuals: its guidance is the pipeline's.
            workdir: a folder for each finished stage (latents, picture). A call with the same arguments continues after
                the last finished stage, to the same image. Other arguments, and a second process at the same time, are
                refused.
            output_type: "pil", "np" (1,H,W,3) or "pt" (1,3,H,W) in [0, 1], or "latent" (1,C,h,w).
            callback_on_step_end: called as f(pipeline, step, timestep, {"latents": ..., "stage": i}) after every step;
                may return a dict with other latents.
            callback_on_stage_end: as f(pipeline, i, image).
            options: the pipeline's own that hold in all stages: prompt_2, clip_skip, prompt_embeds, eta,
                cross_attention_kwargs, guidance_rescale, ip_adapter_image, ...
        Raises ValueError and TypeError, before any work, for arguments that do not fit together or into the memory
        (with the numbers); NotFiniteError, a RuntimeError, if latents or an image are not finite after a stage.
        """
        pipe = self.pipe
        self._check(prompt, negative_prompt, seed, generator, blend, dilation, output_type, options)
        guidance_scale = _scale(guidance_scale)
        # as JSON has them
        blend, dilation = (None if value is None else float(value) for value in (blend, dilation))
        seed = None if seed is None else int(seed)
        found = make_stages(pipe, height, width, stages, native_steps, steps, strengths, dilation is not None)
        wanted = Savers(vae_tiling, sequential_guidance, chunked_feed_forward, parked_residuals, offload)
        with opened(workdir) as folder:
            if generator is not None:
                seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
            if folder is not None and folder.kept is not None and seed is None:
                seed = folder.kept["asked"]["seed"]
            if seed is None:
                seed = int(torch.randint(2**31, ()))

            guidance = Guidance(pipe, prompt, negative_prompt, guidance_scale, options, found[0].size)
            by_stage = [wanted] * len(found)
            if folder is not None:
                asked = dict(prompt=prompt, negative_prompt=negative_prompt, seed=seed, guidance_scale=guidance_scale)
                asked |= dict(blend=blend, dilation=dilation, rematch=rematch)
                asked |= dict(options=described(options, folder.earlier))
                asked |= dict(stages=[[*stage.size, stage.steps, stage.strength, stage.dilation] for stage in found])
                known = folder.kept["asked"]["pipeline"] if folder.earlier else fingerprint(pipe)
                asked |= dict(pipeline=known, savers=asdict(wanted))
                if folder.earlier:
                    logger.warning(
                        "%s was begun by an older gspn, whose digests of the pipeline differ from process to process: "
                        "that this is the same pipeline is not checked",
                        folder.path,
                    )
                if folder.kept is not None:
                    folder.begin(asked, {})
                    # The savers chosen by the memory that was free then are kept: others would change the bits.
                    by_stage = [
                        Savers(**dict(zip(SAVERS, chosen, strict=True))) for chosen in folder.kept["chosen"]["savers"]
                    ]
            found = self._fit(found, by_stage, guidance, memory_mib)
            if folder is not None and folder.kept is None:
                folder.begin(asked, {"savers": [astuple(stage.savers) for stage in found]})

            given = (callback_on_step_end, prompt, negative_prompt)
            run = _Run(pipe, found, guidance, seed, blend, dilation, rematch, *given)
            return self._made(run, folder, options, output_type, callback_on_stage_end)

    def _made(self, run, folder, options, output_type, callback):
        """The image, stage by stage; stages that `folder` (a Workdir or None) holds are read from there."""
        pipe, found, finished, nsfw = self.pipe, run.stages, [], None
        with _offloading(pipe, any(stage.savers.offload for stage in found)):
            image = None
            for i, stage in enumerate(found):
                with run.progress(i), saving(pipe, stage.savers), _adapted(pipe, stage.size):
                    shape = (1, pipe.unet.config.in_channels, *(side // pipe.vae_scale_factor for side in stage.size))
                    latents = folder.load(i, stage.size, shape) if folder is not None else None
                    known = latents is not None
                    if not known:
                        logger.info("stage %d of %d: %s", i + 1, len(found), stage)
                        latents = run.native(options) if i == 0 else run.refine(i, image, options)
                        _check_finite(latents, i, stage, pipe)
                    last = i + 1 == len(found)
                    pictured = output_type != "latent" or (folder is not None and not known)
                    if not last or pictured:
                        image = decode(pipe, latents)
                    shown, nsfw = (latents, None) if output_type == "latent" else self._shown(image, output_type)
                    if folder is not None and not known:
                        picture = shown if output_type == "pil" else self._shown(image, "pil")[0]
                        folder.save(i, stage.size, latents, picture[0])
                finished.append(shown)
                if callback is not None:
                    callback(pipe, i, shown)
                pipe.maybe_free_model_hooks()
        return HighResOutput(
            images=finished[-1], stages=finished, plan=found, seed=run.seed, nsfw_content_detected=nsfw
        )

    def _check(self, prompt, negative_prompt, seed, generator, blend, dilation, output_type, options):
        check_pipeline(self.pipe)
        _check_options(self.pipe, options)
        if not isinstance(prompt, str) and not (prompt is None and options.get("prompt_embeds") is not None):
            raise TypeError(f"prompt has to be one text, as one image is made, got {prompt!r}")
        if negative_prompt is not None and not isinstance(negative_prompt, str):
            raise TypeError(f"negative_prompt has to be one text or None, got {negative_prompt!r}")
        for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            if text is not None and options.get(f"{name}_embeds") is not None:
                raise ValueError(f"{name} and {name}_embeds both say what to draw: pass one of them")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(f"generator has to be one torch.Generator, as one image is made, got {generator!r}")
        if seed is not None and generator is not None:
            raise ValueError("seed and generator both set the noise: pass one of them")
        if seed is not None and not (is_whole(seed) and 0 <= seed < 2**63):
            raise ValueError(f"seed has to be a whole number from 0 on, got {seed!r}")
        for name, value in (("blend", blend), ("dilation", dilation)):
            if value is not None and not _is_finite(value):
                raise ValueError(f"{name} has to be a finite number of at least 0, or None for none, got {value!r}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type has to be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")

    def _fit(self, found, by_stage, guidance, memory_mib):
        """The stages with their savers and memory. Raises ValueError if one does not fit."""
        pipe, device = self.pipe, self.pipe._execution_device
        if memory_mib is not None and not (is_real(memory_mib) and memory_mib > 0):
            raise ValueError(f"memory_mib has to be a number above 0, got {memory_mib!r}")
        room = SHARE * free_bytes(device) if memory_mib is None else memory_mib * MIB
        if device.type == "cpu" and any(wanted.offload for wanted in by_stage):
            raise ValueError(
                "offload moves models to the GPU while they work, but the pipeline is on the CPU: move it to the GPU "
                "or call its enable_model_cpu_offload() first"
            )
        encoders = [getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2", "vae")]
        by_offload = 0 if device.type == "cpu" else sum(map(weight_bytes, encoders))
        planned = []
        for i, (stage, wanted) in enumerate(zip(found, by_stage, strict=True)):
            useless = set()
            if i == 0 or not guidance.guided:  # the guidance of the first stage is the pipeline's
                useless.add("sequential_guidance")
            if device.type == "cpu":
                useless |= {name for name in ("parked_residuals", "offload") if not getattr(wanted, name)}
            with _adapted(pipe, stage.size):
                savers, need = choose(pipe, stage.size, wanted, useless, guidance.on_meta, device, room, by_offload)
            planned.append(replace(stage, savers=savers, memory_mib=None if need is None else need / MIB))
        return planned

    def _shown(self, image, output_type):
        """An image (1,3,H,W) in [-1, 1] as it is asked for, and what the pipeline's safety checker found."""
        pipe, nsfw = self.pipe, None
        if getattr(pipe, "safety_checker", None) is not None:
            # It blackens in place what it finds, and the next stage would start from that.
            image, nsfw = pipe.run_safety_checker(image.clone(), pipe._execution_device, pipe.unet.dtype)
        if getattr(pipe, "watermark", None) is not None:
            image = pipe.watermark.apply_watermark(image)
        denormalize = None if nsfw is None else [not found for found in nsfw]
        return pipe.image_processor.postprocess(image, output_type=output_type, do_denormalize=denormalize), nsfw


@dataclass
class _Run:
    """The run of one image's stages."""

    pipe: Any
    stages: list[Stage]
    guidance: Guidance
    seed: int
    blend: float | None
    dilation: float | None
    rematch: bool
    callback: Callable | None
    prompt: str | None
    negative_prompt: str | None
    lines: Progress | None = None  # instead of the pipeline's bar: see `progress`

    @contextmanager
    def progress(self, index: int) -> Iterator[None]:
        """In the block, a stage. Unless stderr is a terminal, lines replace the pipeline's progress bar."""
        config = getattr(self.pipe, "_progress_bar_config", None) or {}
        if config.get("disable") or "file" in config or sys.stderr.isatty():
            yield
            return
        with Progress(self._told(index), self.stages[index].taken, "steps", say=_to_stderr) as self.lines:
            yield
        self.lines = None

    def native(self, options: dict) -> Tensor:
        """The first stage: latents (1,C,h,w), float32."""
        stage = self.stages[0]

        def called(pipe, step, t, tensors):
            return {"latents": self._called(0, step, t, tensors["latents"])}

        watched = self.callback is not None or self.lines is not None
        with self._bar(0):
            result = self.pipe(
                prompt=self.prompt,
                negative_prompt=self.negative_prompt,
                height=stage.height,
                width=stage.width,
                num_inference_steps=stage.steps,
                guidance_scale=self.guidance.scale,
                generator=torch.Generator().manual_seed(self.seed),
                output_type="latent",
                callback_on_step_end=called if watched else None,
                **options,
            )
        return result.images.float()

    def refine(self, index: int, image: Tensor, options: dict) -> Tensor:
        """A stage after the first: from the image of the one before (1,3,H,W) to latents (1,C,h,w), float32."""
        pipe, stage, device = self.pipe, self.stages[index], self.pipe._execution_device
        start = encode(pipe, resize(image.to(device), stage.size))
        words = np.random.SeedSequence([self.seed, index]).generate_state(2)
        generator = torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
        noise = randn_tensor(start.shape, generator=generator, device=device, dtype=start.dtype)

        scheduler = copy.deepcopy(pipe.scheduler)
        timesteps = last_timesteps(scheduler, stage, device)
        extra = pipe.prepare_extra_step_kwargs(generator, options.get("eta", 0.0))
        x = scheduler.add_noise(start, noise, timesteps[:1])
        with self._bar(index), pipe.progress_bar(total=len(timesteps)) as bar:
            for i, t in enumerate(timesteps):
                if i and self.blend is not None:
                    share = self._share(scheduler, t, self.blend)
                    x = share * scheduler.add_noise(start, noise, t[None]) + (1 - share) * x
                prediction = self._predict(scheduler, stage, x, t)
                if isinstance(scheduler, LMSDiscreteScheduler):
                    extra["order"] = min(4, i + 1)  # it would count the skipped steps too
                x = scheduler.step(prediction, t, x, **extra, return_dict=False)[0]
                x = self._called(index, i, t, x)
                bar.update()
        return rematched(x, start) if self.rematch else x

    def _predict(self, scheduler, stage, x, t):
        maps, sequential = scheduler.scale_model_input(x, t), stage.savers.sequential_guidance
        prediction = self.guidance.predict(maps, t, sequential=sequential)
        if stage.dilation > 1:
            share = self._share(scheduler, t, self.dilation)
            if share >= LEAST_SHARE:
                far = self.guidance.predict(maps, t, sequential=sequential, dilation=stage.dilation)
                prediction = (1 - share) * prediction + share * far
        return prediction

    @staticmethod
    def _share(scheduler, t, power):
        return cosine_share(t, scheduler.config.num_train_timesteps, power)

    def _called(self, index, step, t, latents):
        if self.lines is not None:
            self.lines.update(min(step + 1, self.lines.total))  # PNDM takes one more
        if self.callback is None:
            return latents
        changed = (self.callback(self.pipe, step, t, {"latents": latents, "stage": index}) or {}).get("latents")
        return latents if changed is None else changed

    @contextmanager
    def _bar(self, index) -> Iterator[None]:
        """In the block, the pipeline's progress bar names the stage."""
        pipe, before = self.pipe, getattr(self.pipe, "_progress_bar_config", None)
        hidden = {} if self.lines is None else {"disable": True}
        pipe.set_progress_bar_config(**{"desc": self._told(index), **(before or {}), **hidden})
        try:
            yield
        finally:
            if before is None:
                del pipe._progress_bar_config
            else:
                pipe.set_progress_bar_config(**before)

    def _told(self, index):
        stage = self.stages[index]
        return f"stage {index + 1}/{len(self.stages)}, {stage.height}x{stage.width}{stage.savers.told()}"


def _to_stderr(line):
    print(line, file=sys.stderr, flush=True)


# -- what is asked for --


def _check_options(pipe, options):
    known = allowed_options(pipe)
    if unknown := sorted(set(options) - set(known)):
        names = ", ".join(unknown)
        raise TypeError(f"there is no option {names} for all stages; expected some of {', '.join(known)}")
    check_eta(pipe.scheduler, options.get("eta", 0.0))
    for name, value in options.items():
        if name.endswith("prompt_embeds") and value is not None and len(value) != 1:
            raise ValueError(f"{name} has to be of one prompt, as one image is made, got {tuple(value.shape)}")


def _scale(value):
    if not _is_finite(value) or value < 1:
        raise ValueError(
            f"guidance_scale has to be a finite number of at least 1, which is without guidance, got {value!r}"
        )
    return float(value)


def _is_finite(value):
    return is_real(value) and 0 <= value < float("inf")


def _check_finite(latents, index, stage, pipe):
    hint = ": the UNet overflows in float16, load it in bfloat16" if pipe.unet.dtype == torch.float16 else ""
    check_finite(latents, f" after stage {index + 1} ({stage.height}x{stage.width}){hint}")


def _adapted(pipe, size) -> AbstractContextManager:
    """In its block, layers that gspn.adapt has changed, for whatever size, are adapted to that of a stage."""
    swapped = getattr(pipe.unet, "_gspn_swap", None)
    if swapped is None or not swapped.adapted:
        return nullcontext()
    return adapt(pipe, size)


@contextmanager
def _offloading(pipe, on: bool) -> Iterator[None]:
    if not on or is_offloaded(pipe):
        yield
        return
    device = pipe._execution_device
    pipe.enable_model_cpu_offload(device=device)
    try:
        yield
    finally:
        pipe.remove_all_hooks()
        pipe.to(device)
