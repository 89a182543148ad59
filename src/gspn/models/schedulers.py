"""Timesteps of diffusers' schedulers, and checks before any work, for models that were trained with DDPM's noise."""

import inspect
import math
from collections.abc import Mapping

import numpy as np
import torch

from gspn.models.latents import is_real
from gspn.names import reason_of

# They turn an image into noise, or need more than a prediction, a timestep and a sample for a step.
NO_SAMPLERS = (
    "CogVideoXDPMScheduler",
    "DDIMInverseScheduler",
    "DPMSolverMultistepInverseScheduler",
    "RePaintScheduler",
    "UnCLIPScheduler",
)
LEAST_SIGNAL = 2**-30  # in the place of 0, less than any that a schedule holds
INSTEAD = "expected another scheduler, such as DDPM, DDIM, DPM-Solver++ or UniPC"


def explicit(config: Mapping) -> dict:
    """A scheduler's config with all values explicit. from_config would take those that diffusers holds to be defaults
    from the new class, whose noise schedule may differ; it holds values passed by position to be defaults too."""
    return {key: value for key, value in config.items() if key != "_use_default_values"}


def check_schedule(scheduler) -> None:
    """Raises ValueError for a scheduler of diffusers that ends in pure noise while the model predicts the noise. There
    x_0 = (x_t - sqrt(1 - a_t) noise) / sqrt(a_t) divides by 0: it is infinite or NaN, or only a sign if clipped. Some
    schedulers, such as Euler, put 2^-24 in the place of a_t = 0, which is no better."""
    product, config = getattr(scheduler, "alphas_cumprod", None), scheduler.config
    if product is None or config.get("prediction_type") != "epsilon":
        return
    if bool((product > 0).all()) and not (config.get("rescale_betas_zero_snr") and float(product[-1]) < 1e-6):
        return
    raise ValueError(
        f"the scheduler ({type(scheduler).__name__}) cannot be used with prediction_type 'epsilon': its last timestep "
        "is pure noise (alphas_cumprod is 0), so predicted noise gives infinity or NaN. "
        "Make the scheduler with rescale_betas_zero_snr=False, or use a model that predicts 'v_prediction' or 'sample'"
    )


def check_sampler(scheduler) -> None:
    """Raises ValueError for a scheduler of diffusers whose steps do not lead from DDPM's noise to an image."""
    name, config = type(scheduler).__name__, scheduler.config
    if any(kind.__name__ in NO_SAMPLERS for kind in type(scheduler).__mro__):
        raise ValueError(f"{name} does not make images from noise by predictions alone: {INSTEAD}")
    if config.get("use_flow_sigmas"):
        raise ValueError(
            f"{name} has use_flow_sigmas=True, which is for models of flow matching: make it with "
            f"{name}.from_config(scheduler.config, use_flow_sigmas=False)"
        )
    if config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction":
        raise ValueError(
            f'{name} has timestep_type="continuous", but the model was trained with whole timesteps: make it with '
            f'{name}.from_config(scheduler.config, timestep_type="discrete")'
        )


def check_eta(scheduler, eta: float) -> None:
    """Raises ValueError unless `eta` is a number from 0 to 1 that a step of the scheduler of diffusers takes."""
    if not is_real(eta) or not 0 <= eta <= 1:
        raise ValueError(f"eta has to be a number from 0 to 1, got {eta!r}")
    if eta and "eta" not in inspect.signature(scheduler.step).parameters:
        raise ValueError(f"{type(scheduler).__name__} takes no eta, got {eta}: leave it out, or take DDIMScheduler")


class ShiftError(ValueError):
    """The timesteps cannot be shifted."""


def set_timesteps(scheduler, steps: int, shift: float = 1.0, device: torch.device | str | None = None) -> None:
    """Sets the scheduler of diffusers to `steps` steps, with `shift` s > 1 to noisier ones.

    Where r(t) = sqrt((1 - a_t) / a_t) is the noise of timestep t, relative to the signal, the scheduler's own timesteps
    t_i become t'_i with r(t'_i) = s r(u t_i). The factor u <= 1 is such that the first one stays as it is. In a larger
    image more pixels say the same, so that a layout is still seen at more noise (Hoogeboom et al., "simple diffusion",
    2023); s is about the ratio of the sides.

    Raises ShiftError, a ValueError, where the scheduler cannot be given timesteps, or where they would repeat."""
    scheduler.set_timesteps(steps, device=device)
    own = np.array(list(dict.fromkeys(scheduler.timesteps.tolist())))  # solvers of second order name most of them twice
    if shift == 1 or len(own) == 1:
        return
    name = type(scheduler).__name__
    if "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise ShiftError(
            f"{name} cannot be given timesteps, so timestep_shift has to be 1, got {shift}: expected another "
            "scheduler, such as DDPM, DPM-Solver++, Euler or Heun"
        )
    signal, every = (
        scheduler.alphas_cumprod.cpu().double().numpy().clip(LEAST_SIGNAL),  # add_noise leaves them on a GPU
        np.arange(len(scheduler.alphas_cumprod)),
    )
    # some schedulers put a small signal in the place of none, and so make the last timestep less noisy
    noise = np.maximum.accumulate((np.log1p(-signal) - np.log(signal)) / 2)
    first = np.interp(np.interp(own[0], every, noise) - math.log(shift), noise, every)
    shifted = np.interp(np.interp(own * (first / own[0]), every, noise) + math.log(shift), noise, every)
    shifted = [round(own[0]), *shifted[1:].round().astype(int).tolist()]
    if len(set(shifted)) < len(shifted):
        raise ShiftError(f"timestep_shift={shift} makes {steps} steps repeat a timestep: choose less of either")
    try:
        scheduler.set_timesteps(device=device, timesteps=shifted)
    except ValueError as error:
        raise ShiftError(
            f"this {name} cannot be given timesteps, so timestep_shift has to be 1, got {shift} ({reason_of(error)})"
        ) from error


def check_steps(scheduler, steps: int, learned: bool = False, shift: float = 1.0) -> None:
    """Runs all steps on a tiny map. Raises ValueError if the scheduler of diffusers refuses one of them, or if values
    that are not finite come out, as they do of a solver whose timesteps repeat.

    Args:
        learned: whether the scheduler takes a learned variance beside the prediction. shift: see set_timesteps.
    """
    name, config = type(scheduler).__name__, scheduler.config
    last, predicted = config.num_train_timesteps, config.get("prediction_type")
    scheduler, x = type(scheduler).from_config(explicit(config)), torch.ones(1, 2, 2, 2)
    output = torch.zeros(1, 4 if learned else 2, 2, 2)
    try:
        with torch.random.fork_rng(devices=[]):
            set_timesteps(scheduler, steps, shift)
            for t in scheduler.timesteps:
                scheduler.scale_model_input(x, t)  # some want to be asked before a step
                x = scheduler.step(output, t, x, return_dict=False)[0]
    except ShiftError:
        raise
    except (IndexError, NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name} cannot make {steps} steps with the model's prediction_type {predicted!r}: {INSTEAD}, or another "
            f"number of steps ({reason_of(error)})"
        ) from error
    if not bool(x.isfinite().all()):
        trailing = ', or timestep_spacing="trailing"' if steps == last else ""
        raise ValueError(
            f"{name} makes infinity or NaN in {steps} steps of {last} timesteps: expected another number of "
            f"steps{trailing}, or another scheduler"
        )
