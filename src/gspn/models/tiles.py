"""Segmenting an image of any size within a bound of memory: in one go where it fits, else in overlapping tiles.

Tiles begin at multiples of the model's coarsest reduction, so that their maps lie on the grid of the whole image's
maps. Their logits are blended before they are enlarged, with weights that rise linearly from the edge of a tile.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from gspn.memory import MIB, peak_bytes
from gspn.models.latents import NotFiniteError
from gspn.models.segmenter import Segmenter

OVERLAP = 4  # a quarter of a tile at least lies in its neighbour
WORKSPACE = 384 * MIB  # what kernels take beside the tensors: 130 to 280 MB were measured, up to 16 megapixels
LEAST = 4  # times the coarsest reduction: a smaller tile sees too little

Normalize = Callable[[Tensor], Tensor]


class _Steps(nn.Module):
    """The two steps of a segmentation, as one module for `peak_bytes`."""

    def __init__(self, model: Segmenter, normalize: Normalize):
        super().__init__()
        self.model, self.normalize = model, normalize

    def coarse(self, pixels: Tensor) -> Tensor:
        """Coarse logits (1,K,h,w) of pixels uint8 (1,C,H,W)."""
        return self.model.coarse_logits(self.normalize(pixels).to(self.model.classifier.weight.dtype)).float()

    def best(self, logits: Tensor, image: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """The class of the largest logit at each pixel, uint8 `size`; class by class, as all logits at full size would
        take more memory than the model."""
        most = best = None
        for number in range(logits.shape[1]):
            own = self.model.enlarge(logits[:, number : number + 1], image, size)[0, 0]
            if most is None or best is None:
                most, best = own.clone(), torch.zeros(size, dtype=torch.uint8, device=own.device)
                continue
            best.masked_fill_(own > most, number)
            torch.maximum(most, own, out=most)
        return best


@torch.inference_mode()
def segment(
    model: Segmenter,
    pixels: Tensor,
    normalize: Normalize,
    size: tuple[int, int],
    max_bytes: int | None = None,
    tell: Callable[[str], None] | None = None,
) -> np.ndarray:
    """The number of the class of each pixel, uint8 of (height, width) `size`.

    Args:
        model: in evaluation mode. pixels: uint8 (1,C,H,W), what the model is to see. normalize: makes them its input.
        max_bytes: what this may take, with `pixels` and beside the weights and the program; None: no limit.
        tell: gets a sentence on what is done, before the work begins.
    Raises ValueError where not even small tiles fit; NotFiniteError for logits that are infinite or NaN.
    """
    steps, where = _Steps(model, normalize), model.classifier.weight.device
    image = (pixels.shape[-2], pixels.shape[-1])
    tile, needed = fitting_tile(steps, pixels, size, max_bytes)
    if tell is not None:
        about = f"about {needed / 1e9:.2g} GB beside the model" if needed else "without a bound of memory"
        count = math.prod(len(list(spans(*each, model.reduction))) for each in zip(image, tile, strict=True))
        how = "in one go" if tile == image else f"in {count} overlapping tiles of {tile[0]}x{tile[1]}"
        tell(f"{how}, {about}")
    if tile == image:
        logits = steps.coarse(pixels.to(where))
    else:
        logits = _blended(steps, pixels, tile, where)
    if not bool(logits.sum().isfinite()):  # a sum takes no memory; of NaN the largest logit says nothing
        raise NotFiniteError("some pixels", [0])
    return steps.best(logits, image, size).cpu().numpy()


def fitting_tile(
    steps: _Steps, pixels: Tensor, size: tuple[int, int], max_bytes: int | None
) -> tuple[tuple[int, int], int | None]:
    """(height and width of the largest tile that fits, the bytes needed): the whole image if it fits.
    Raises ValueError if nothing fits."""
    image, stride, reduction = (pixels.shape[-2], pixels.shape[-1]), steps.model.stride, steps.model.reduction
    if max_bytes is None:
        return image, None
    logits = torch.empty(1, steps.model.num_classes, *(-(-side // stride) for side in image), device="meta")
    enlarging = peak_bytes(steps, "best", logits, image, size)
    fixed, logit_bytes = pixels.nbytes + WORKSPACE, logits.nbytes
    longest, parts = max(image), 1
    while True:
        side = -(-longest // parts // reduction) * reduction
        if parts > 1 and side < LEAST * reduction:
            break
        tile = image if parts == 1 else (min(side, image[0]), min(side, image[1]))
        seen = torch.empty(*pixels.shape[:2], *tile, dtype=torch.uint8, device="meta")
        seen = seen.contiguous(memory_format=torch.channels_last)
        # two maps hold the blended logits and the sum of the weights while the tiles are computed
        held = 0 if parts == 1 else logit_bytes + logit_bytes // steps.model.num_classes
        seeing = peak_bytes(steps, "coarse", seen)
        needed = fixed + max(seeing + held, enlarging + logit_bytes)
        if needed <= max_bytes:
            return tile, needed
        room = max_bytes - fixed - logit_bytes - logit_bytes // steps.model.num_classes
        if room <= 0 or fixed + enlarging + logit_bytes > max_bytes:
            break
        parts = max(parts + 1, int(parts * math.sqrt(seeing / room)))  # a tile's need grows with its area
    whole = (fixed + enlarging + logit_bytes) / 1e9
    raise ValueError(
        f"an image of {image[0]}x{image[1]} does not fit into {max_bytes / 1e9:.2g} GB: reading it and writing its "
        f"mask take {whole:.2g} GB, and tiles of {tile[0]}x{tile[1]} {needed / 1e9:.2g} GB; allow more"
    )


def spans(length: int, tile: int, step: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of tiles along a side: they begin at multiples of `step`, are at most `tile` long, and overlap by at
    least a quarter of it (rounded to `step`).

    >>> list(spans(100, 48, 8))
    [(0, 48), (24, 72), (56, 100)]
    """
    if tile >= length:
        yield 0, length
        return
    overlap = -(-tile // OVERLAP // step) * step
    count = -(-(length - overlap) // (tile - overlap))
    last = -(-(length - tile) // step)  # in steps
    for number in range(count):
        begin = number * last // (count - 1) * step
        yield begin, min(begin + tile, length)


def _blended(steps, pixels, tile, where):
    """The coarse logits of all tiles together."""
    model, stride = steps.model, steps.model.stride
    coarse = [-(-side // stride) for side in pixels.shape[-2:]]
    total = torch.zeros(1, model.num_classes, *coarse, device=where)
    weights = torch.zeros(1, 1, *coarse, device=where)
    rows, columns = (list(spans(*each, model.reduction)) for each in zip(pixels.shape[-2:], tile, strict=True))
    for top, bottom in rows:
        for left, right in columns:
            logits = steps.coarse(pixels[..., top:bottom, left:right].to(where))
            height, width = logits.shape[-2:]
            weight = _ramp(height, where)[:, None] * _ramp(width, where)
            place = (..., slice(top // stride, top // stride + height), slice(left // stride, left // stride + width))
            total[place] += logits * weight
            weights[place] += weight
    return total.div_(weights)


def _ramp(length, where):
    """Weights that rise linearly from both ends of a tile, over a quarter of it."""
    at = torch.arange(length, device=where, dtype=torch.float32)
    return ((torch.minimum(at, length - 1 - at) + 1) / max(1, length // OVERLAP)).clamp(max=1)
