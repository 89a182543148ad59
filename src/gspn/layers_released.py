"""The released form of GSPN2d: what the code of the paper's authors computes; their published weights need it.

Each direction's input is turned so that its scan runs to the right. The weights and gates, predicted on the unturned
map, are not turned with it, and the results are summed without turning them back. So the output at (i,j) mixes content
of (i,j), (j,i), (i,W-1-j) and (j,W-1-i). Maps are square. All weights and gates are in memory at once.
"""

from collections.abc import Sequence

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor

from gspn.kernels.reference import no_autocast
from gspn.ops import line_scan

torch.fx.wrap("line_scan")  # as in layers.py

# How a direction turns the map before its scan to the right, and how it turns it back.
_TURN = {"right": lambda t: t, "down": lambda t: t.mT, "left": lambda t: t.flip(-1), "up": lambda t: t.mT.flip(-1)}
_BACK = {"right": lambda t: t, "down": lambda t: t.mT, "left": lambda t: t.flip(-1), "up": lambda t: t.flip(-1).mT}


def propagate_released(
    x: Tensor,
    proxy: Tensor,
    weight_proj: Tensor,
    input_proj: Tensor,
    output_proj: Tensor,
    skip_proj: Tensor | None,
    *,
    directions: Sequence[str],
    segment: int | None,
    backend: str | None,
) -> Tensor:
    """As :func:`gspn.propagate`, in the released form.

        y = sum over d of (output_proj[d] proxy) * h[d] + (skip_proj[d] proxy) * turned[d]

    Args:
        x: (B,C,H,H). proxy: (B,S,H,H). skip_proj: (D,C,S), because each direction adds its own turned input. The
            others are those of :func:`gspn.propagate`.

    Returns:
        y (B,C,H,H), in x's memory format.
    """

    def project(projection: Tensor) -> Tensor:
        return F.conv2d(proxy, projection.flatten(0, -2)[..., None, None]).unflatten(1, projection.shape[:-1])

    turned = _turned(x, directions)
    logits = project(weight_proj).transpose(2, 3)
    h = scan_released(project(input_proj) * turned, logits, segment=segment, backend=backend)
    y = project(output_proj) * h
    if skip_proj is not None:
        y = y + project(skip_proj) * turned
    return _in_layout_of(x, y.sum(1).to(x.dtype))


def scan_released(gated: Tensor, logits: Tensor, *, segment: int | None, backend: str | None) -> Tensor:
    """h (B,D,C,H,H) of the scans to the right, for turned and gated inputs (B,D,C,H,H) and logits (B,D,G,3,H,H)."""
    weights = _normalize(logits).flatten(1, 2)
    h = line_scan(gated.flatten(1, 2), weights, direction="right", segment=segment, backend=backend)
    return h.unflatten(1, gated.shape[1:3])


def turn_back(maps: Tensor, directions: Sequence[str]) -> Tensor:
    """Turns the maps (B,D,C,H,H) back, each from the orientation of its direction."""
    return torch.stack([_BACK[d](t) for d, t in zip(directions, maps.unbind(1), strict=True)], 1)


@torch.fx.wrap
def _turned(x: Tensor, directions: Sequence[str]) -> Tensor:
    with no_autocast(x):  # which refuses to stack 16-bit data of another dtype than its own
        return torch.stack([_TURN[d](x) for d in directions], 1)


@torch.fx.wrap
def _normalize(logits: Tensor) -> Tensor:
    """Propagation weights (...,3,H,W) for a scan to the right as the released models normalise them: sigmoids divided
    by their sum over the neighbours that exist. The sum, not the logits, is at least 1e-7: weights from three logits
    below about -16 do not sum to 1."""
    sigmoids = torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    previous, same, following = sigmoids.unbind(-3)
    total = same + F.pad(previous[..., 1:, :], (0, 0, 1, 0)) + F.pad(following[..., :-1, :], (0, 0, 0, 1))
    return sigmoids / total.clamp(min=1e-7).unsqueeze(-3)


@torch.fx.wrap
def _in_layout_of(template: Tensor, x: Tensor) -> Tensor:
    """x, channels_last if the template is channels_last but not contiguous, else contiguous."""
    last = template.is_contiguous(memory_format=torch.channels_last) and not template.is_contiguous()
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
