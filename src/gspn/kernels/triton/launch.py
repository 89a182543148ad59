"""From tensors to launches: layouts, strides and grids of the kernels in device.py and merge.py.

A tensor given here has its channels (logits: their groups) innermost in memory: `channels_inside` sees to it.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from gspn.kernels.triton import device
from gspn.kernels.triton import merge as merging
from gspn.kernels.triton.plan import Plan, blocks, plan

INTERPRETED = not isinstance(device.scan_forward, triton.JITFunction)  # TRITON_INTERPRET was set: on the CPU, slowly
_TYPES = {torch.float32: triton.language.float32, torch.float64: triton.language.float64}
_ALIGN = 16  # elements by which strides are known to be divisible, at most
_TILE, _CHANNELS = 2048, 32  # elements of a tile of the elementwise kernels, and the most channels of one
_ENDLESS = 1 << 30  # the segment of a global scan


class Band(NamedTuple):
    """Lines of a map in one direction that are scanned by themselves.

    Attributes:
        origin: number of the first line in the map, in the order of the scan.
        total: lines of the map.
        state_in: (B, 1, P, C) the state before the first line, in the state's dtype; in the
            backward scan the adjoint after the last line. It is not read where a segment starts.
        state_out: where to put the one that the next band is entered with.
    """

    origin: int
    total: int
    state_in: Tensor
    state_out: Tensor


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in for data of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def on(x: Tensor) -> AbstractContextManager:
    """Launches go to the device of `x`. Errors: ValueError if that is none for these kernels."""
    if x.device.type != ("cpu" if INTERPRETED else "cuda"):
        expected = "the CPU, under Triton's interpreter" if INTERPRETED else "a GPU"
        raise ValueError(f'backend "triton" expects tensors on {expected}; got x on {x.device}')
    return nullcontext() if INTERPRETED else torch.cuda.device(x.device)


def channels_inside(t: Tensor, dim: int) -> Tensor:
    """`t` if dimension `dim` is innermost in memory, else a copy in which it is."""
    if t.stride(dim) == 1 or t.shape[dim] == 1:
        return t
    return t.movedim(dim, -1).contiguous().movedim(-1, dim)


def empty_like_channels_last(t: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a result like `t` with dimension `dim` innermost: in the layout of `t`, unless that repeats elements
    (an expanded tensor), from which torch may conclude another order."""
    out = torch.empty_like(t, dtype=dtype)
    return out if out.stride(dim) == 1 or out.shape[dim] == 1 else out.movedim(dim, -1).contiguous().movedim(-1, dim)


def empty_maps(x: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """(B, count, C, H, W) of undefined content, channels innermost, for x (B, C, H, W)."""
    batch, channels, height, width = x.shape
    return torch.empty(batch, count, height, width, channels, dtype=dtype, device=x.device).permute(0, 1, 4, 2, 3)


# ---- scans -----------------------------------------------------------------------------------------------------------


def scan(
    x: Tensor, gate: Tensor | None, logits: Tensor, h: Tensor, directions: Sequence[int], segment: int | None,
    *, center: Tensor | None = None, band: Band | None = None, plan: Plan | None = None,
) -> None:  # fmt: skip
    """Fills h (B,D,C,H,W) with the scans of x (B,C,H,W). With gate (B,D,C,H,W), of gate * x under the normalised logits
    (B,D,G,3,H,W); without, the logits are the weights. center (B,D,C) is subtracted from the input of every line that
    has a line before it in its segment."""
    align, x_strides, gate_strides, h_strides = _strides(_of_map(x), _of_maps(gate), _of_maps(h), size=x.shape[1])
    align_logits, logits_strides = _strides(_of_logits(logits), size=logits.shape[2])
    index = _index(x, h, logits, gate)
    means = x if center is None else center.contiguous()
    for cut in _cuts(x, logits, directions, segment, plan, backward=False):
        for launch in cut.launches(x, len(directions), segment, band, backward=False):
            device.scan_forward[launch.grid](
                x, x if gate is None else gate, means, logits, h, launch.state_in, launch.state_out,
                *x_strides, *gate_strides, *logits_strides, *h_strides,
                x.shape[2], x.shape[3], x.shape[1] // align, *launch.numbers, **launch.constants,
                GATED=gate is not None, CENTERED=center is not None, NORMALIZED=gate is not None, ALIGN=align,
                ALIGN_LOGITS=align_logits, INDEX=index, X_DENSE=_dense(x),
                GATE_DENSE=gate is not None and _dense(gate), H_DENSE=_dense(h),
            )  # fmt: skip


def scan_backward(
    grad: Tensor, output_gate: Tensor | None, logits: Tensor, h: Tensor, dlogits: Tensor, directions: Sequence[int],
    segment: int | None, *, normalized: bool, band: Band | None = None, plan: Plan | None = None,
) -> Tensor:  # fmt: skip
    """g (B,D,C,H,W) in the state's dtype, the gradient of what goes into the scans of which grad (B,D,C,H,W), times the
    output gates if given, is the gradient of h; and fills dlogits, which is that of the weights unless `normalized`."""
    batch, count, channels, height, width = grad.shape
    like_x, groups = grad[:, 0], logits.shape[2]
    g = empty_maps(like_x, count, state_dtype(h.dtype))
    of_h = tuple(h.stride(d) for d in (0, 1, 3, 4)) if band else _of_maps(h)  # one line has a line before it
    align, grad_strides, gate_strides, h_strides = _strides(_of_maps(grad), _of_maps(output_gate), of_h, size=channels)
    cuts = _cuts(like_x, logits, directions, segment, plan, backward=True)
    parts, out = max((cut.parts for cut in cuts), default=1), dlogits
    if parts > 1:
        make = torch.empty if len(cuts) == 1 else torch.zeros  # cuts with fewer parts leave some untouched
        partial = make(parts, batch, count, height, width, 3, groups, dtype=g.dtype, device=g.device)
        out = partial[0].permute(0, 1, 5, 4, 2, 3)
    align_logits, logits_strides, out_strides = _strides(_of_logits(logits), _of_logits(out), size=groups)
    index = _index(grad, h, logits, out, g, output_gate)
    for cut in cuts:
        for launch in cut.launches(like_x, count, segment, band, backward=True):
            device.scan_backward[launch.grid](
                grad, grad if output_gate is None else output_gate, logits, h, g, out,
                launch.state_in, launch.state_out,
                *grad_strides, *gate_strides, *logits_strides, *h_strides, *out_strides,
                partial.stride(0) if parts > 1 else 0, band.total if band else 0,
                height, width, channels // align, *launch.numbers, **launch.constants,
                GATED=output_gate is not None, NORMALIZED=normalized, ALIGN=align, ALIGN_LOGITS=align_logits,
                PARTIAL=parts > 1, INDEX=index, GRAD_DENSE=_dense(grad), H_DENSE=_dense(h),
                DLOGITS_ALIKE=out_strides == logits_strides,
            )  # fmt: skip
    if parts > 1:
        align, logits_strides, out_strides = _strides(_of_logits(logits), _of_logits(dlogits), size=groups)
        merging.finish_logits[_elementwise_grid(batch * count, height, width, groups)](
            partial, logits, dlogits, *logits_strides, *out_strides, partial.stride(0),
            height, width, groups // align, pack_directions(list(enumerate(directions))), count, _chunks(groups),
            PARTS=parts, NORMALIZED=normalized, ALIGN=align, STATE=_TYPES[g.dtype],
            INDEX=_pixel_index(height, width), **_tile(groups),
        )  # fmt: skip
    return g


class _Launch(NamedTuple):
    grid: tuple[int]
    state_in: Tensor
    state_out: Tensor
    numbers: tuple[int, ...]  # maps to segments, of the kernel's arguments
    constants: dict


class _Cut(NamedTuple):
    """How the scans of some directions are cut into programs."""

    plan: Plan
    numbered: list[tuple[int, int]]  # the directions, each with its index in the call
    places: int  # of the longest line
    lines: int  # the most lines of a direction
    share: int
    groups: int  # of a program
    members: int  # channels of each of them
    blocks: int  # of channels

    @property
    def parts(self) -> int:
        """Blocks that a group of channels is spread over."""
        return -(-self.share // self.members)

    def launches(self, x: Tensor, maps: int, segment: int | None, band: Band | None, backward: bool):
        batch, channels, height, width = x.shape
        dtype, step = state_dtype(x.dtype), self.plan.halo or self.lines
        chained = band is not None or (step < self.lines and (segment is None or segment > step))
        period = segment or _ENDLESS
        length = step if chained else min(period, self.lines)
        segments = 1 if chained else -(-self.lines // length)
        tiles = -(-self.places // self.plan.own) if self.plan.halo else 1
        firsts = list(range(0, self.lines, step)) if chained else [0]
        between = [x, x]  # not read and not written where nothing is chained
        if len(firsts) > 1:
            between = [
                torch.empty(batch, maps, max(height, width), channels, dtype=dtype, device=x.device) for _ in "ab"
            ]
        constants = dict(
            SHARE=self.share, STRIPS=self.plan.strips, PLACES=self.plan.places, GROUPS=self.groups,
            MEMBERS=self.members, HALO=self.plan.halo, CHAINED=chained, STATE=_TYPES[dtype], STAGES=self.plan.stages,
            num_warps=self.plan.warps,
        )  # fmt: skip
        grid = (self.blocks * tiles * len(self.numbered) * segments * batch,)
        for n, first in enumerate(reversed(firsts) if backward else firsts):
            state_in = band.state_in if band and n == 0 else between[n % 2]
            state_out = band.state_out if band and n == len(firsts) - 1 else between[1 - n % 2]
            numbers = (
                maps, pack_directions(self.numbered), len(self.numbered), period if chained else length,
                band.origin if band else 0, self.places if band else max(height, width), first, length,
                self.plan.own, self.blocks, tiles, segments,
            )  # fmt: skip
            yield _Launch(grid, state_in, state_out, numbers, constants)


def _cuts(x, logits, directions, segment, chosen, backward) -> list[_Cut]:
    """One cut for all directions in one launch, or one for each axis where lines differ so much in length that programs
    for the longer ones would mostly idle on the shorter ones."""
    batch, channels, height, width = x.shape
    if x.numel() == 0:
        return []
    share = channels // logits.shape[2]
    numbered = list(enumerate(directions))
    axes = [axis for axis in ([n for n in numbered if n[1] % 2 == parity] for parity in (0, 1)) if axis]
    if len(axes) == 2 and max(height, width) <= 2 * min(height, width):
        axes = [numbered]
    cuts = []
    for axis in axes:
        places = max(width if d % 2 else height for _, d in axis)
        lines = max(height if d % 2 else width for _, d in axis)
        length = min(segment or lines, lines)
        found = chosen or plan(
            places, length, channels, batch * len(axis) * -(-lines // length), x.element_size(), backward,
            _processors(x.device),
        )  # fmt: skip
        cuts.append(_Cut(found, axis, places, lines, share, *blocks(found, channels, share)))
    return cuts


def pack_directions(numbered: list[tuple[int, int]]) -> int:
    """Directions as the kernels take them: 4 bits for each, its index and its number."""
    return sum((index | direction << 2) << (4 * n) for n, (index, direction) in enumerate(numbered))


@cache
def _processors(of: torch.device) -> int:
    return 132 if INTERPRETED else torch.cuda.get_device_properties(of).multi_processor_count


# ---- elementwise -----------------------------------------------------------------------------------------------------


def merge(
    h: Tensor, output_gate: Tensor, skip: Tensor | None, x: Tensor, y: Tensor, *, add: bool = False
) -> None:  # fmt: skip
    """y (B,C,H,W) = sum over the directions of output_gate * h (B,D,C,H,W), plus skip * x, plus y as it is if `add`."""
    batch, channels, height, width = x.shape
    align, h_strides, gate_strides, *strides = _strides(
        _of_maps(h), _of_maps(output_gate), *(_of_map(t) for t in (skip, x, y)), size=channels
    )
    merging.merge_forward[_elementwise_grid(batch, height, width, channels)](
        h, output_gate, x if skip is None else skip, x, y, y,
        *h_strides, *gate_strides, *(n for of in strides for n in of),
        height, width, channels // align, _chunks(channels), COUNT=h.shape[1], SKIP=skip is not None, ADD=add,
        ALIGN=align, STATE=_TYPES[state_dtype(x.dtype)], INDEX=_pixel_index(height, width), **_tile(channels),
    )  # fmt: skip


class Merged(NamedTuple):
    """What the gradient of a merger needs and what it fills: grad and skip (B,C,H,W), h (B,D,C,H,W), and the gradients
    of the output gates (B,D,C,H,W) and of the skip (B,C,H,W)."""

    grad: Tensor
    h: Tensor
    skip: Tensor | None
    doutput: Tensor
    dskip: Tensor | None


def merge_backward(
    g: Tensor, gate: Tensor, x: Tensor, dx: Tensor, dgate: Tensor, merged: Merged | None = None, *, add: bool = False
) -> None:  # fmt: skip
    """From g (B,D,C,H,W) as `scan_backward` gives it: fills dgate with g * x and dx with the sum of g * gate, plus dx
    as it is if `add`. With `merged`, also the gradients of the merger."""
    batch, channels, height, width = x.shape
    if x.numel() == 0:
        return
    skip = merged is not None and merged.skip is not None
    grad, h, skip_map, doutput, dskip = merged or (None,) * 5
    align, gate_strides, h_strides, dgate_strides, doutput_strides, *strides = _strides(
        *(_of_maps(t) for t in (gate, h, dgate, doutput)), *(_of_map(t) for t in (x, grad, skip_map, dx, dskip)),
        size=channels,
    )  # fmt: skip
    x_strides, grad_strides, skip_strides, dx_strides, dskip_strides = strides
    merging.merge_backward[_elementwise_grid(batch, height, width, channels)](
        g, gate, x, *(x if t is None else t for t in (grad, h, skip_map)), dx, dx, dgate,
        *(dgate if t is None else t for t in (doutput, dskip)),
        *gate_strides, *x_strides, *grad_strides, *h_strides, *skip_strides, *dx_strides, *dgate_strides,
        *doutput_strides, *dskip_strides, height, width, channels // align, _chunks(channels),
        COUNT=gate.shape[1], MERGED=merged is not None, SKIP=skip, ADD=add,
        ALIGN=align, STATE=_TYPES[g.dtype], INDEX=_pixel_index(height, width), **_tile(channels),
    )  # fmt: skip


def _tile(channels: int) -> dict[str, int]:
    """The tile of an elementwise kernel: whole vectors of channels, as many pixels as that leaves room for."""
    wide = min(1 << (channels - 1).bit_length(), _CHANNELS)
    return {"PIXELS": _TILE // wide, "BC": wide}


def _pixel_index(height: int, width: int):
    """The type of the pixels' numbers in an elementwise kernel, and of those up to a tile beyond the last."""
    return triton.language.int32 if height * width + _TILE < 1 << 31 else triton.language.int64


def _elementwise_grid(images: int, height: int, width: int, channels: int) -> tuple[int]:
    return (images * -(-height * width // _tile(channels)["PIXELS"]) * _chunks(channels),)


def _chunks(channels: int) -> int:
    return -(-channels // _tile(channels)["BC"])


def _index(*tensors: Tensor | None):
    """The type of positions within maps (B,C,H,W), (B,D,C,H,W) or logits (B,D,G,3,H,W): wide enough for the last
    element of the largest, and for the places beyond its ends that a program computes and does not touch."""
    sizes = [(t.shape[-2] + 1) * t.stride(-2) + (t.shape[-1] + 1) * t.stride(-1) for t in tensors if t is not None]
    sizes += [t.stride(3) for t in tensors if t is not None and t.dim() == 6]
    return triton.language.int32 if 2 * max(sizes) < 1 << 31 else triton.language.int64


# ---- strides ---------------------------------------------------------------------------------------------------------


def _of_map(t: Tensor | None) -> tuple[int, ...]:
    """(B, H, W) strides of a map (B,C,H,W); 0 for dimensions of size 1, whose strides mean nothing."""
    return _of(t, (0, 2, 3))


def _of_maps(t: Tensor | None) -> tuple[int, ...]:
    """(B, D, H, W) strides of maps (B,D,C,H,W)."""
    return _of(t, (0, 1, 3, 4))


def _of_logits(t: Tensor) -> tuple[int, ...]:
    """(B, D, 3, H, W) strides of logits (B,D,G,3,H,W)."""
    return _of(t, (0, 1, 3, 4, 5))


def _dense(t: Tensor) -> bool:
    """Whether rows and columns of maps (..., C, H, W) follow one another without gaps, channels innermost."""
    return (t.stride(-1), t.stride(-2)) == (t.shape[-3], t.shape[-3] * t.shape[-1])


def _of(t, dims):
    return (0,) * len(dims) if t is None else tuple(0 if t.shape[d] == 1 else t.stride(d) for d in dims)


def _strides(*strides: tuple[int, ...], size: int) -> tuple:
    """(align, *strides divided by it): the largest alignment that all of them and the number of channels have."""
    align = math.gcd(_ALIGN, size, *(s for of in strides for s in of))
    return align, *(tuple(s // align for s in of) for of in strides)
