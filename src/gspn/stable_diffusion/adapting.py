"""Images larger than a UNet was trained for, without training: `adapt`."""

import contextlib
import math
from typing import TYPE_CHECKING

from torch import nn

from gspn.models.latents import is_whole
from gspn.stable_diffusion.keeping import level_of
from gspn.stable_diffusion.swap import trained_size
from gspn.stable_diffusion.swappable import unet_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def adapt(target: "nn.Module | DiffusionPipeline", size: tuple[int, int]) -> contextlib.ExitStack:
    """Lets the layers of a swapped UNet that scan in segments reach as far in images of `size` as they did in training;
    in a `with` statement, until its end. Of several at once, as in several threads, the one begun last counts.

    For a side k times as long as in training (rounded, half goes up) each layer scans k interleaved sub-lattices of its
    map, so that a segment of 4 lines spans 4k lines. At the trained size nothing changes, nor does any attention.
    The trained size is :attr:`gspn.stable_diffusion.swap.Swap.sample_size`, or that in the UNet's config where it is
    None. The layers change for all threads that use the UNet. Around a :class:`gspn.HighResPipeline`, at whatever size,
    they are adapted to the size of each stage.

    Args:
        target: a swapped pipeline, or its UNet.
        size: (height, width) in pixels; for a UNet those of its input.

    Raises TypeError unless `size` is a pair of whole numbers. Raises ValueError where nothing is swapped, where the
    layers are global, which see the whole map anyway and hardly gain, where neither says the trained size, or where
    the maps cannot be divided by k.
    """
    unet = unet_of(target)
    if not isinstance(size, tuple | list) or len(size) != 2 or not all(map(is_whole, size)):
        raise TypeError(f"size has to be (height, width) in pixels, got {size!r}")
    if min(size) < 1:
        raise ValueError(f"size has to be at least 1x1, got {size[0]}x{size[1]}")
    if "_gspn_swap" not in unet.__dict__:
        raise ValueError("this UNet is not swapped: adapt is for the layers that gspn.swap or gspn.load_swap puts in")
    if unet._gspn_swap.segment is None:
        raise ValueError("the layers are global (segment=None): they see the whole map at any size, nothing is adapted")
    native = trained_size(unet)
    if native is None:
        raise ValueError(
            "the trained size is not known: the UNet has no sample_size in its config. Set sample_size of the Swap, "
            "(height, width) of the UNet's input"
        )
    scale = 1 if isinstance(target, nn.Module) else target.vae_scale_factor
    layers = unet._gspn_swap.layers
    apart = tuple(
        max(1, math.floor(side / (scale * trained) + 0.5)) for side, trained in zip(size, native, strict=True)
    )
    levels = sorted({level_of(unet, name) for name in layers})
    for level in levels:
        sides = [-(-math.ceil(side / scale) // 2**level) for side in size]
        if any(side % k for side, k in zip(sides, apart, strict=True)):
            units = " and ".join(str(scale * 2 ** levels[-1] * k) for k in apart)
            raise ValueError(
                f"at {size[0]}x{size[1]} a map has {sides[0]}x{sides[1]} pixels, which cannot be divided by "
                f"{apart[0]}x{apart[1]}: expected a height and a width that are multiples of {units}"
            )
    return unet._gspn_swap.set_apart(apart)
