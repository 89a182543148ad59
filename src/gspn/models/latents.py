"""Shared by all pipelines: the scaling of a VAE's latents, the check that values are finite before they become images,
and those of numbers that callers give."""

import math
from collections.abc import Mapping
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor


class NotFiniteError(RuntimeError):
    """Values that should become images are infinite or NaN.

    Attributes: images: the indices of the images with such values.
    """

    def __init__(self, message: str, images: list[int]):
        super().__init__(message)
        self.images = images


def check_finite(values: Tensor | np.ndarray, hint: str = "") -> None:
    """Raises NotFiniteError, with their number, if some of the values (B,...) of B images are not finite."""
    wrong = (~torch.as_tensor(values).isfinite()).flatten(1).sum(1).tolist()
    if images := [i for i, count in enumerate(wrong) if count]:
        total = values.shape[0] * math.prod(values.shape[1:])
        raise NotFiniteError(
            f"{sum(wrong)} of {total} values, in {len(images)} of {len(wrong)} images, are not finite{hint}", images
        )


def is_whole(value: object) -> bool:
    """Whether a value is a whole number; numpy's count, booleans do not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_real(value: object) -> bool:
    """Whether a value is a number; numpy's count, booleans do not."""
    return isinstance(value, Real) and not isinstance(value, bool)


# -- latents --


def scale_latents(z: Tensor, vae: Mapping) -> Tensor:
    """The latents that a model is trained on, from a VAE's z (B,C,h,w): (z - mean) * scaling_factor / std.

    Args:
        vae: the config of diffusers' VAE. mean is latents_mean by channel, else shift_factor, else 0; std is
            latents_std by channel, else 1.
    """
    mean, std = _statistics(z, vae)
    scaled = (z - mean) * vae["scaling_factor"]
    return scaled if std is None else scaled / std


def unscale_latents(x: Tensor, vae: Mapping) -> Tensor:
    """The latents that the VAE decodes, from a model's x: x * std / scaling_factor + mean. Undoes scale_latents."""
    mean, std = _statistics(x, vae)
    return (x if std is None else x * std) / vae["scaling_factor"] + mean


def _statistics(like, vae):
    mean, std = (vae.get(name) for name in ("latents_mean", "latents_std"))
    if std is None:
        return vae.get("shift_factor") or 0.0, None
    return (torch.tensor(values).view(1, -1, 1, 1).to(like) for values in (mean, std))


def check_scale(vae: Mapping) -> None:
    """Raises ValueError if a VAE's config does not say unambiguously how latents are scaled."""
    mean, std, channels = vae.get("latents_mean"), vae.get("latents_std"), vae["latent_channels"]
    if mean is None and std is None:
        return
    if mean is None or std is None:
        raise ValueError("the VAE has only one of latents_mean and latents_std: expected both or neither")
    if vae.get("shift_factor"):
        raise ValueError("the VAE has both shift_factor and latents_mean: expected one of them")
    if len(mean) != channels or len(std) != channels or not all(0 < each < math.inf for each in std):
        raise ValueError(
            f"the VAE has {channels} latent channels: expected {channels} numbers in latents_mean and {channels} above "
            f"0 in latents_std, got {list(mean)} and {list(std)}"
        )
