"""The stages of a high-resolution image: sizes, steps, strengths and supported pipelines, decided before any work."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from gspn.models.latents import is_real, is_whole
from gspn.models.schedulers import check_sampler, check_schedule, check_steps
from gspn.stable_diffusion.highres.savers import Savers
from gspn.stable_diffusion.swap import own_size, trained_size

try:
    import diffusers

    from gspn.stable_diffusion.pipelines import StableDiffusionPipeline, StableDiffusionXLPipeline, unit_of
except ImportError as error:
    raise ImportError(f'high resolution needs diffusers ({error}): pip install "gspn[diffusion]"') from error

# Steps and strengths of the stages after the native one, the last for all that follow. Source: arXiv 2501.12381.
STEPS, STRENGTHS = (50, 50, 30, 30), (0.42, 0.32, 0.32, 0.28)

# A step of these schedulers starts from the sample that is passed in. Second-order and single-step solvers and
# correctors (Heun, KDPM2, DPMSolverSinglestep, UniPC, SASolver) start from one that they kept: blending would be lost.
SCHEDULERS = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
)
NO_SAVERS = Savers()


@dataclass(frozen=True)
class Stage:
    """One stage of a plan.

    Attributes:
        height, width: of its image in pixels.
        steps: of the scheduler's whole schedule. taken: how many of them, the last ones, are run.
        strength: taken = ceil(steps * strength); 1 in the first stage, which starts from noise.
        dilation: of the convolutions in the second pass; 1 has none.
        savers: which savers of memory are on. memory_mib: an estimate of the memory that it needs beside the loaded
            weights; None if the weights are offloaded, as there is no estimate then.
    """

    height: int
    width: int
    steps: int
    strength: float = 1.0
    dilation: int = 1
    savers: Savers = NO_SAVERS
    memory_mib: float | None = None

    @property
    def taken(self) -> int:
        return max(1, math.ceil(self.steps * self.strength - 1e-9))  # 50 * 0.28 is a little more than 14

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    def __str__(self) -> str:
        memory = "" if self.memory_mib is None else f", {self.memory_mib:,.0f} MiB"
        return f"{self.height}x{self.width}, {self.taken} of {self.steps} steps{memory}{self.savers.told()}"


def native_area(pipe) -> int:
    """The number of pixels of the images that the UNet, or what is swapped into it and runs, was trained on."""
    return math.prod(native_latents(pipe.unet)) * pipe.vae_scale_factor**2


def native_latents(unet) -> tuple[int, int] | None:
    """(H, W) of the input for which what runs in the UNet was trained; None where nothing says it."""
    swapped = getattr(unet, "_gspn_swap", None)
    return own_size(unet) if swapped is None or swapped.active == "attention" else trained_size(unet)


def native_size(height: int, width: int, area: int, unit: int) -> tuple[int, int]:
    """The (H, W), multiples of `unit`, of about `area` pixels whose aspect is nearest to height / width."""
    ideal = math.sqrt(area * height / width)
    first, last = max(1, math.floor(0.9 * ideal / unit)), max(1, math.ceil(1.1 * ideal / unit))
    heights = [unit * n for n in range(first, last + 1)]
    sizes = [(h, unit * max(1, round(h * width / height / unit))) for h in heights]
    return min(sizes, key=lambda s: abs(math.log(s[0] * s[1] / area)) / 2 + abs(math.log(s[1] / s[0] * height / width)))


def stage_sizes(height: int, width: int, area: int, unit: int) -> list[tuple[int, int]]:
    """Sizes from the native one of the same aspect to (height, width), each about twice the sides of the one before, or
    less. A size of no more than `area` pixels is made in one stage."""
    if height * width <= area:
        return [(height, width)]
    low, high = native_size(height, width, area, unit), (height, width)
    # a little more than twice does not need another stage
    count = max(1, math.ceil(math.log2(math.sqrt(height * width / area)) - 0.1))
    between = [
        tuple(unit * round(a * (b / a) ** (i / count) / unit) for a, b in zip(low, high, strict=True))
        for i in range(count)
    ]
    return [*(size for size in dict.fromkeys(between) if size != high), high]


def check_pipeline(pipe) -> None:
    """Raises TypeError or ValueError for a pipeline that cannot make high-resolution images."""
    if not isinstance(pipe, StableDiffusionPipeline | StableDiffusionXLPipeline):
        raise TypeError(
            f"expected a StableDiffusionPipeline or StableDiffusionXLPipeline of diffusers, got {type(pipe).__name__}"
        )
    for part in ("unet", "vae", "scheduler"):
        if getattr(pipe, part, None) is None:
            raise ValueError(f"the pipeline has no {part}")
    takes, latent = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
    if takes != latent:
        raise ValueError(
            f"the UNet takes {takes} channels, the VAE's latents have {latent}: UNets for inpainting and the like are "
            "not supported"
        )
    if native_latents(pipe.unet) is None:
        raise ValueError("the UNet's configuration has no sample_size: the size that it was trained on is not known")
    check_scheduler(pipe.scheduler)


def check_scheduler(scheduler) -> None:
    """Raises ValueError for a scheduler with which stages cannot be run."""
    name = type(scheduler).__name__
    if not isinstance(scheduler, tuple(getattr(diffusers, known) for known in SCHEDULERS)):
        raise ValueError(
            f"the scheduler {name} cannot run the stages: it is for flow matching, or its steps do not start from the "
            f"sample passed in; expected one of {', '.join(SCHEDULERS)}"
        )
    check_sampler(scheduler)
    check_schedule(scheduler)
    if name == "PNDMScheduler" and not scheduler.config.skip_prk_steps:
        raise ValueError(
            "PNDMScheduler cannot run the stages with its Runge-Kutta steps: make it with "
            "PNDMScheduler.from_config(scheduler.config, skip_prk_steps=True)"
        )
    if str(scheduler.config.get("variance_type")).startswith("learned"):
        raise ValueError(f"the scheduler {name} needs a learned variance, which the UNet does not predict")


def last_timesteps(scheduler, stage: Stage, device: torch.device) -> Tensor:
    """Sets a scheduler up for the last steps of a stage. Returns their timesteps, in order."""
    scheduler.set_timesteps(stage.steps, device=device)
    skipped = stage.steps - stage.taken
    if isinstance(scheduler, diffusers.PNDMScheduler):
        # Its second step always repeats the first one, from the same sample, with the first one's prediction.
        timesteps = scheduler.timesteps.unique_consecutive()[skipped:]
        return torch.cat([timesteps[:2], timesteps[1:]])
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    return scheduler.timesteps[skipped:]


def make_stages(
    pipe,
    height: int | None,
    width: int | None,
    sizes: Sequence[tuple[int, int]] | None,
    native_steps: int,
    steps: int | Sequence[int],
    strengths: float | Sequence[float],
    dilated: bool,
) -> list[Stage]:
    """The stages without their savers. Raises ValueError for arguments that do not fit together."""
    unit, area = unit_of(pipe), native_area(pipe)
    if sizes is not None:
        sizes = [_size(size, unit) for size in sizes]
        if not sizes:
            raise ValueError("stages is empty: expected sizes (height, width), the last of them that of the image")
        if (height, width) not in ((None, None), sizes[-1]):
            raise ValueError(f"the last of stages is {_shown(sizes[-1])}, but height and width are {height}x{width}")
        for before, after in pairwise(sizes):
            if any(b > a for b, a in zip(before, after, strict=True)) or before == after:
                raise ValueError(f"stages have to grow, got {_shown(before)} before {_shown(after)}")
    elif height is None or width is None:
        raise ValueError(f"height and width are needed (or stages), got {height} and {width}")
    else:
        sizes = stage_sizes(*_size((height, width), unit), area, unit)
    count = len(sizes) - 1
    steps = [_whole(n, "steps", pipe) for n in _each(steps, count, "steps")]
    strengths = [_strength(s) for s in _each(strengths, count, "strengths")]
    first = Stage(*sizes[0], _whole(native_steps, "native_steps", pipe))
    scales = [max(1, round(math.sqrt(h * w / area))) if dilated else 1 for h, w in sizes]
    later = zip(sizes[1:], steps, strengths, scales[1:], strict=True)
    found = [first, *(Stage(*size, n, strength, scale) for size, n, strength, scale in later)]
    for count in {stage.steps: None for stage in found}:
        check_steps(pipe.scheduler, count)
    return found


def _size(size, unit):
    size = tuple(size) if isinstance(size, Sequence) else size
    if not isinstance(size, tuple) or len(size) != 2:
        raise ValueError(f"a stage is (height, width), got {size!r}")
    if not all(is_whole(side) and side > 0 and side % unit == 0 for side in size):
        raise ValueError(f"height and width have to be multiples of {unit}, got {_shown(size)}")
    return tuple(map(int, size))


def _shown(size):
    return "x".join(map(str, size))


def _each(values, count, name):
    """One value for each of `count` stages; the last one is repeated for the rest."""
    values = list(values) if isinstance(values, Sequence) else [values]
    if not values:
        raise ValueError(f"{name} is empty")
    return [values[min(i, len(values) - 1)] for i in range(count)]


def _whole(value, name, pipe):
    last = pipe.scheduler.config.num_train_timesteps
    if not is_whole(value) or not 1 <= value <= last:
        raise ValueError(f"{name} have to be whole numbers from 1 to {last}, got {value!r}")
    return int(value)


def _strength(value):
    if not is_real(value) or not 0 < value <= 1:
        raise ValueError(f"strengths have to be above 0 and at most 1, got {value!r}")
    return float(value)
