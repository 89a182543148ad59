"""The loss of a diffusion model: the squared error of its prediction, and the bound that teaches its variance.

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise,  t uniform in 0 .. T-1, a_t the cumulative product of 1 - beta
    loss = mean |prediction - target|^2 + L_vlb

The target is the noise (epsilon), sqrt(a_t) noise - sqrt(1 - a_t) x_0 (v_prediction) or x_0 (sample). L_vlb, in bits
per value, is the Kullback-Leibler divergence of q(x_{t-1} | x_t, x_0) from the model's step, and at t = 0 the negative
log-likelihood of x_0 as an 8-bit value. It only trains the variance: the prediction enters it without gradient.

Sources: arXiv 2102.09672 (hybrid loss, learned variance), 2212.09748 (DiT, which weights both terms equally).
"""

import math

import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.distributions import Normal, kl_divergence

HALF = 1 / 255  # half the step between two values of an 8-bit image in [-1, 1]


def make_scheduler(prediction_type: str = "epsilon", *, learn_sigma: bool = True, clip: bool = False, **config):
    """The DDPMScheduler for training; the run keeps its config. clip: samples are clipped to [-1, 1], as pixels are."""
    kind = "learned_range" if learn_sigma else "fixed_small"
    steps = config.get("num_train_timesteps", 1000)
    if config.get("beta_schedule", "linear") in ("linear", "scaled_linear"):
        # 1e-4 to 0.02 are for 1000 steps; in fewer, an image would not become noise
        config = {"beta_start": 1e-4 * 1000 / steps, "beta_end": 0.02 * 1000 / steps} | config
    return DDPMScheduler(prediction_type=prediction_type, variance_type=kind, clip_sample=clip, **config)


class Objective:
    """The loss for the schedule of a diffusers scheduler (num_train_timesteps, betas, prediction_type).

    Attributes:
        steps: T. prediction_type: "epsilon", "v_prediction" or "sample".
    """

    def __init__(self, scheduler: DDPMScheduler):
        self.scheduler, self.prediction_type = scheduler, scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"prediction_type has to be epsilon, v_prediction or sample, got {self.prediction_type!r}")
        betas = scheduler.betas.double()
        self.steps = len(betas)
        product = torch.cumprod(1 - betas, 0)
        before = torch.cat([product.new_ones(1), product[:-1]])
        variance = betas * (1 - before) / (1 - product)
        # At t = 0 the posterior's variance is 0 and has no logarithm: it takes that of t = 1.
        smallest = torch.cat([variance[1:2], variance[1:]]) if self.steps > 1 else betas
        self.tables = {
            "signal": product.sqrt(),
            "noise": (1 - product).sqrt(),
            "mean_of_start": betas * before.sqrt() / (1 - product),
            "mean_of_noisy": (1 - before) * (1 - betas).sqrt() / (1 - product),
            "log_smallest": smallest.log(),
            "log_largest": betas.log(),
        }

    def table(self, name: str, timestep: Tensor, like: Tensor) -> Tensor:
        """The constants `name` at the timesteps (B,), in float32, shaped to multiply maps such as `like`."""
        values = self.tables[name]
        if values.device != like.device:
            values = self.tables[name] = values.to(like.device, torch.float32)
        return values[timestep].float().view(-1, *[1] * (like.ndim - 1))

    def noisy(self, start: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """x_t."""
        return self.table("signal", timestep, start) * start + self.table("noise", timestep, start) * noise

    def losses(self, output: Tensor, start: Tensor, noise: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """(squared error, L_vlb in bits), each (B,), means over an item's values.

        Args:
            output: the model's, (B,C,H,W), or (B,2C,H,W) with the variance; without the variance L_vlb is 0.
            start, noise: (B,C,H,W). timestep: (B,).
        """
        channels = start.shape[1]
        output, start, noise = output.float(), start.float(), noise.float()
        prediction = output[:, :channels]
        signal, spread = self.table("signal", timestep, start), self.table("noise", timestep, start)
        target = {
            "epsilon": lambda: noise,
            "v_prediction": lambda: signal * noise - spread * start,
            "sample": lambda: start,
        }[self.prediction_type]()
        error = (prediction - target).square().flatten(1).mean(1)
        if output.shape[1] == channels:
            return error, torch.zeros_like(error)
        if output.shape[1] != 2 * channels:
            raise ValueError(
                f"the output for {channels} channels has to have {channels} or {2 * channels}, got {output.shape[1]}"
            )
        bound = self.bound(prediction.detach(), output[:, channels:], start, noise, timestep)
        return error, bound.flatten(1).mean(1)

    def bound(self, prediction: Tensor, variance: Tensor, start: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """L_vlb of every value, in bits. `variance`: the model's, from -1 (the smallest) to 1 (the largest)."""
        signal, spread = self.table("signal", timestep, start), self.table("noise", timestep, start)
        x = signal * start + spread * noise
        expected = {
            "epsilon": lambda: (x - spread * prediction) / signal,
            "v_prediction": lambda: signal * x - spread * prediction,
            "sample": lambda: prediction,
        }[self.prediction_type]()
        of_start, of_noisy = (self.table(f"mean_of_{what}", timestep, x) for what in ("start", "noisy"))
        smallest, largest = (self.table(f"log_{what}", timestep, x) for what in ("smallest", "largest"))
        part = (variance + 1) / 2
        step = Normal(
            of_start * expected + of_noisy * x,
            (0.5 * (part * largest + (1 - part) * smallest)).exp(),
            validate_args=False,
        )
        true = Normal(of_start * start + of_noisy * x, (0.5 * smallest).exp().expand_as(x), validate_args=False)
        first = (timestep == 0).view(-1, *[1] * (x.ndim - 1))
        return torch.where(first, negative_log_likelihood(start, step), kl_divergence(true, step)) / math.log(2)


def negative_log_likelihood(value: Tensor, distribution: Normal) -> Tensor:
    """The negative log-likelihood in nats of an 8-bit `value` in [-1, 1], which stands for the interval that is rounded
    to it; at both ends the interval is open."""
    upper, lower = distribution.cdf(value + HALF), distribution.cdf(value - HALF)
    upper = torch.where(value > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(value < -0.999, torch.zeros_like(lower), lower)
    return -(upper - lower).clamp(min=1e-12).log()
