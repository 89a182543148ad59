"""propagate on the GPU: projections by matrix products, scans, and the merger, piece by piece in a bounded workspace.

A piece is all directions of as many images as fit the workspace, else one direction of them; where one image does not
fit, bands of lines of one direction, between which the state of the scan is carried. The gradient is computed in the
same kind of pieces from x and proxy alone: for bands, a first pass finds the state that each is entered with, then
they are scanned back.

Rounding. Projections and gates are held in the dtype of x as long as the parts of all directions are summed up in
float32; h always has float32. Where there is no room for such a sum, y itself is the sum, and the gates have float32.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gspn.kernels.triton import launch
from gspn.kernels.triton.launch import (
    Band,
    Merged,
    channels_inside,
    empty_like_channels_last,
    empty_maps,
    on,
    state_dtype,
)

LINES = 16  # of a band, if there is a choice: a gradient keeps a state in float32 for each band


def propagate(
    x: Tensor, proxy: Tensor, weight_proj: Tensor, input_proj: Tensor, output_proj: Tensor, skip_proj: Tensor | None,
    directions: list[int], segment: int | None, workspace_mib: int = 256, center: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y (B,C,H,W) of x (B,C,H,W), proxy (B,S,H,W) and center (B,D,C), in a workspace of about `workspace_mib` MiB
    beside them, or as much as one line of one direction takes."""
    projections = (weight_proj, input_proj, output_proj, skip_proj)
    with on(x), torch.autocast(x.device.type, enabled=False):
        x, proxy = channels_inside(x, 1), channels_inside(proxy, 1)
        y = empty_like_channels_last(x, 1)
        images = _images_at_once(x, weight_proj, len(directions), workspace_mib, backward=False)
        for some, features, out, means in _split(images, x, proxy, y, center):
            work = _Work.choose(some, weight_proj, directions, segment, workspace_mib, backward=False)
            work = work._replace(center=means)
            total = empty_like_channels_last(some, 1, state_dtype(x.dtype)) if work.wide_sum else out
            for pieces in work.passes() if x.numel() else ():
                state = None
                for piece in pieces:
                    state = _forward(work, piece, features, projections, total, state)
            if total is not out:
                out.copy_(total)
        return y


def _forward(work, piece, proxy, projections, total, state_in) -> Tensor | None:
    """Adds a piece to `total`; the state that it leaves with, where it was entered with one. What it holds beside is
    given back when it returns."""
    band, x = work.band(piece, state_in), piece.of(work.x)
    maps = _Maps.project(piece, proxy, *projections, work.gate_dtype)
    h = work.scan(piece, maps, band)
    launch.merge(h, maps.output_gate, maps.skip, x, piece.of(total), add=not piece.opens)
    return band and band.state_out


def propagate_backward(
    grad: Tensor, x: Tensor, proxy: Tensor, weight_proj: Tensor, input_proj: Tensor, output_proj: Tensor,
    skip_proj: Tensor | None, directions: list[int], segment: int | None, workspace_mib: int = 256,
    center: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, proxy, the four projections and center. Beside the workspace this holds the proxy's gradient in
    float32, and where one image does not fit, dx of one in float32 and for each band the state that the scan enters it
    with. What lies between the products has the dtype of x: gradients of float32 projections beside 16-bit maps are as
    exact as those of linear layers under autocast."""
    projections = (weight_proj, input_proj, output_proj, skip_proj)
    with on(x), torch.autocast(x.device.type, enabled=False):
        grad, x, proxy = (channels_inside(t, 1) for t in (grad, x, proxy))
        state, dx = state_dtype(x.dtype), empty_like_channels_last(x, 1)
        dproxy = empty_like_channels_last(proxy, 1, state).zero_()
        found = [None if p is None else torch.zeros_like(p, dtype=state) for p in projections]
        dcenter = None if center is None else torch.zeros_like(center, dtype=state)
        images = _images_at_once(x, weight_proj, len(directions), workspace_mib, backward=True)
        parts = _split(images, x, proxy, grad, dx, dproxy, center, dcenter)
        for some, features, dy, out, dfeatures, means, dmeans in parts:
            work = _Work.choose(some, weight_proj, directions, segment, workspace_mib, backward=True)
            work = work._replace(center=means)
            total = out if work.single else empty_like_channels_last(some, 1, state)
            for pieces in work.passes() if x.numel() else ():
                pieces = list(pieces)
                entered, adjoint = work.entered(pieces, features, projections), None
                for piece, state_before in zip(reversed(pieces), reversed(entered), strict=True):
                    grads = (total, dfeatures, found, dmeans)
                    adjoint = _backward(work, piece, features, projections, dy, state_before, adjoint, *grads)
            if total is not out:
                out.copy_(total)
        others = zip((*projections, center), (*found, dcenter), strict=True)
        return dx, dproxy.to(proxy.dtype), *(None if t is None else f.to(t.dtype) for t, f in others)


def _backward(work, piece, proxy, projections, grad, state_in, adjoint, dx, dproxy, found, dcenter) -> Tensor | None:
    """Adds what a piece gives to the gradients; the adjoint that it leaves with, where it was entered with one."""
    maps = _Maps.project(piece, proxy, *projections, work.gate_dtype)
    h = work.scan(piece, maps, work.band(piece, state_in))
    dmaps, dy, band = maps.alike(), piece.of(grad), work.band(piece, adjoint)
    g = launch.scan_backward(
        dy[:, None].expand(-1, len(piece.indices), -1, -1, -1), maps.output_gate, maps.logits, h, dmaps.logits,
        piece.directions, work.segment, normalized=True, band=band,
    )  # fmt: skip
    merged = Merged(dy, h, maps.skip, dmaps.output_gate, dmaps.skip)
    x, dx = piece.of(work.x), piece.of(dx)
    launch.merge_backward(g, maps.input_gate, x, dx, dmaps.input_gate, merged, add=not piece.opens)
    _add_gradients(piece, maps, dmaps, piece.of(dproxy), *found)
    if dcenter is not None:
        _add_center_gradient(piece, g, work.segment, dcenter)
    return band and band.state_out


def _split(images: int, *tensors: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
    """So many images of each tensor at a time; None for a tensor that is None. The first one is not None."""
    absent = [None] * len(tensors[0].split(images))
    return zip(*(absent if t is None else t.split(images) for t in tensors), strict=True)


def _workspace_bytes_per_pixel(x, weight_proj, count, gate_bytes, backward) -> int:
    """Workspace for a pixel of `count` directions: projections (with the skip's), their features and h, and with
    `backward` the gradients of all of these and of what the scans take in."""
    channels, narrow, wide = x.shape[1], x.element_size(), state_dtype(x.dtype).itemsize
    _, _, groups, features = weight_proj.shape
    features *= 2 if weight_proj.element_size() > narrow else 1
    maps = 3 * groups * count * narrow + channels * (2 * count + 1) * gate_bytes
    taken = maps + features * narrow + channels * count * wide
    return 2 * (taken + features * wide) if backward else taken


def _images_at_once(x, weight_proj, count, workspace_mib, *, backward) -> int:
    """Images that are worked on together: as many as fit with all directions, else with one, else with bands of LINES
    lines; in equal parts."""
    batch, channels, height, width = x.shape
    narrow, wide = x.element_size(), state_dtype(x.dtype).itemsize
    together = _workspace_bytes_per_pixel(x, weight_proj, count, narrow, backward)
    sums = channels * wide * (wide > narrow and not backward)
    alone = _workspace_bytes_per_pixel(x, weight_proj, 1, narrow, backward) + sums
    band = _workspace_bytes_per_pixel(x, weight_proj, 1, narrow if backward else wide, backward)
    sizes = (height * width * together, height * width * alone, LINES * max(height, width) * band)
    images = next((n for n in ((workspace_mib << 20) // max(size, 1) for size in sizes) if n), 1)
    return -(-batch // -(-batch // min(images, batch))) if batch else 1


class _Piece(NamedTuple):
    """All lines of some directions of the call, or a band of lines of one."""

    indices: range  # in the call's directions
    directions: list[int]
    origin: int = 0  # first line, in the order of the scan
    lines: int | None = None  # None: all
    total: int = 0  # lines of the map

    @property
    def opens(self) -> bool:
        """Whether it is the first to write where it writes: it brings the skip, and later ones add."""
        return self.indices[0] == 0

    @property
    def axis(self) -> int:
        return -1 if self.directions[0] % 2 == 0 else -2

    @property
    def reverse(self) -> bool:
        return self.directions[0] >= 2

    def of(self, t: Tensor) -> Tensor:
        """Its part of a map (..., H, W)."""
        if self.lines is None:
            return t
        return t.narrow(self.axis, self.total - self.origin - self.lines if self.reverse else self.origin, self.lines)


class _Work(NamedTuple):
    """How a call is cut into pieces."""

    x: Tensor
    directions: list[int]
    segment: int | None
    together: bool  # all directions in one piece
    band_lines: int | None  # of a piece, if directions are cut into bands
    wide_sum: bool  # the directions' parts are summed up in the state's dtype, which y has not
    gate_dtype: torch.dtype
    center: Tensor | None = None  # (B,D,C), for all directions of the call

    @classmethod
    def choose(cls, x, weight_proj, directions, segment, workspace_mib, *, backward) -> "_Work":
        """All directions together, or one after the other, or in bands of lines: what fits."""
        batch, channels, height, width = x.shape
        narrow, wide = x.element_size(), state_dtype(x.dtype).itemsize
        pixels, room = batch * height * width, workspace_mib << 20
        if pixels * _workspace_bytes_per_pixel(x, weight_proj, len(directions), narrow, backward) <= room:
            return cls(x, directions, segment, True, None, False, x.dtype)
        sums = wide > narrow and not backward
        if pixels * (_workspace_bytes_per_pixel(x, weight_proj, 1, narrow, backward) + sums * channels * wide) <= room:
            return cls(x, directions, segment, False, None, sums, x.dtype)
        one = _workspace_bytes_per_pixel(x, weight_proj, 1, narrow if backward else wide, backward)
        longest = max(width if d % 2 else height for d in directions)
        lines = max(room // max(batch * longest * one, 1), 1)
        if segment is not None and segment <= lines:
            lines -= lines % segment
        return cls(x, directions, segment, False, lines, False, x.dtype if backward else state_dtype(x.dtype))

    @property
    def single(self) -> bool:
        return self.together or (self.band_lines is None and len(self.directions) == 1)

    @property
    def carries(self) -> bool:
        """Whether the state of a scan crosses the borders of bands."""
        return self.band_lines is not None and (self.segment is None or self.band_lines % self.segment > 0)

    def passes(self) -> Iterator[Iterator[_Piece]]:
        """The pieces, in the order of the scan, for each direction or for all together."""
        if self.together:
            yield iter([_Piece(range(len(self.directions)), list(self.directions))])
            return
        for index, direction in enumerate(self.directions):
            yield self._bands(index, direction)

    def _bands(self, index, direction):
        total = self.x.shape[-1 if direction % 2 == 0 else -2]
        step = self.band_lines or total
        for origin in range(0, total, step):
            lines = min(step, total - origin) if self.band_lines else None
            yield _Piece(range(index, index + 1), [direction], origin, lines, total)

    def band(self, piece: _Piece, state_in: Tensor | None) -> Band | None:
        """What the scan of a band needs to know; None where it stands alone. The first one is entered with nothing."""
        if not self.carries:
            return None
        batch, channels, height, width = self.x.shape
        places = height if piece.axis == -1 else width
        state_out = self.x.new_empty(batch, 1, places, channels, dtype=state_dtype(self.x.dtype))
        return Band(piece.origin, piece.total, state_out if state_in is None else state_in, state_out)

    def entered(self, pieces: list[_Piece], proxy: Tensor, projections) -> list[Tensor | None]:
        """The state that each piece is entered with, found by a scan of its own; None where they stand alone."""
        states: list[Tensor | None] = [None] * len(pieces)
        for n, piece in enumerate(pieces[:-1] if self.carries else ()):
            band = self.band(piece, states[n])
            self.scan(piece, _Maps.project(piece, proxy, *projections, self.gate_dtype), band)
            states[n + 1] = band.state_out
        return states

    def scan(self, piece: _Piece, maps: "_Maps", band: Band | None) -> Tensor:
        """h (B,D,C,H,W) of a piece, in the state's dtype. In a band the state that it was entered with lies in memory
        where the line before would, for the gradients of the first line's weights."""
        x = piece.of(self.x)
        if band is None or piece.origin == 0:
            h = empty_maps(x, len(piece.indices), state_dtype(x.dtype))
        else:
            shape = list(x.shape)
            shape[piece.axis] += 1
            longer = empty_maps(x.new_empty(()).expand(shape), 1, band.state_in.dtype)
            line = longer.narrow(piece.axis, piece.lines if piece.reverse else 0, 1)
            line.copy_(band.state_in.transpose(2, 3).unsqueeze(piece.axis))
            h = longer.narrow(piece.axis, 0 if piece.reverse else 1, piece.lines)
        center = None if self.center is None else self.center[:, piece.indices.start : piece.indices.stop]
        launch.scan(x, maps.input_gate, maps.logits, h, piece.directions, self.segment, center=center, band=band)
        return h


class _Maps(NamedTuple):
    """The projections of a piece's proxy, as two products: (2D + skip) C gates, and 3DG logits."""

    features: Tensor  # (N,S), or twice side by side for projections in two parts
    gate_proj: Tensor  # ((2D + skip) C, S), or two parts side by side
    logit_proj: Tensor  # (3DG, S), likewise
    gates: Tensor  # (B,H,W,(2D + skip) C)
    flat_logits: Tensor  # (B,H,W,3DG)
    sizes: tuple[int, int, int]  # D, C, G

    @classmethod
    def project(cls, piece, proxy, weight_proj, input_proj, output_proj, skip_proj, gate_dtype) -> "_Maps":
        proxy, chosen = piece.of(proxy), slice(piece.indices.start, piece.indices.stop)
        features = proxy.permute(0, 2, 3, 1).reshape(-1, proxy.shape[1])
        gate_proj = [input_proj[chosen].flatten(0, 1), output_proj[chosen].flatten(0, 1)]
        if skip_proj is not None and piece.opens:
            gate_proj.append(skip_proj)
        gate_proj, logit_proj = torch.cat(gate_proj), weight_proj[chosen].flatten(0, 2)
        widest = torch.promote_types(gate_proj.dtype, logit_proj.dtype)
        gate_proj, logit_proj = gate_proj.to(widest), logit_proj.to(widest)
        if features.element_size() < gate_proj.element_size():
            features = features.repeat(1, 2)
            gate_proj, logit_proj = _two_parts(gate_proj, features.dtype), _two_parts(logit_proj, features.dtype)
        elif features.dtype != gate_proj.dtype:
            gate_proj, logit_proj = gate_proj.to(features.dtype), logit_proj.to(features.dtype)
        gates, logits = _product(features, gate_proj.T, gate_dtype), _product(features, logit_proj.T, features.dtype)
        pixels = (proxy.shape[0], *proxy.shape[2:], -1)
        sizes = (len(piece.indices), input_proj.shape[1], weight_proj.shape[2])
        return cls(features, gate_proj, logit_proj, gates.view(pixels), logits.view(pixels), sizes)

    def alike(self) -> "_Maps":
        """Maps of undefined content, for the gradients of these."""
        return self._replace(gates=torch.empty_like(self.gates), flat_logits=torch.empty_like(self.flat_logits))

    @property
    def logits(self) -> Tensor:  # (B,D,G,3,H,W)
        count, _, groups = self.sizes
        return self.flat_logits.unflatten(-1, (count, 3, groups)).permute(0, 3, 5, 4, 1, 2)

    @property
    def input_gate(self) -> Tensor:  # (B,D,C,H,W)
        return self._gates(0, self.sizes[0])

    @property
    def output_gate(self) -> Tensor:  # (B,D,C,H,W)
        return self._gates(self.sizes[0], self.sizes[0])

    @property
    def skip(self) -> Tensor | None:  # (B,C,H,W)
        count, channels, _ = self.sizes
        return self._gates(2 * count, 1)[:, 0] if self.gates.shape[-1] > 2 * count * channels else None

    def _gates(self, first, number):
        channels = self.sizes[1]
        part = self.gates[..., first * channels : (first + number) * channels]
        return part.unflatten(-1, (number, channels)).permute(0, 3, 4, 1, 2)


def _add_gradients(piece, maps, dmaps, dproxy, dweight_proj, dinput_proj, doutput_proj, dskip_proj) -> None:
    """Adds what the gradients of a piece's maps give to those of the proxy and the projections."""
    state, chosen = dproxy.dtype, slice(piece.indices.start, piece.indices.stop)
    dgates, dlogits = dmaps.gates.flatten(0, 2), dmaps.flat_logits.flatten(0, 2)
    features = maps.features[:, : dproxy.shape[1]]
    rows = _product(dgates, maps.gate_proj, state) + _product(dlogits, maps.logit_proj, state)
    if rows.shape[1] > dproxy.shape[1]:  # the projections are in two parts
        rows = rows[:, : dproxy.shape[1]] + rows[:, dproxy.shape[1] :]
    dproxy += rows.view(*dmaps.gates.shape[:3], -1).permute(0, 3, 1, 2)
    dweight_proj[chosen] += _product(dlogits.T, features, state).view_as(dweight_proj[chosen])
    count, channels, _ = maps.sizes
    parts = _product(dgates.T, features, state).split([count * channels] * 2 + [channels] * (maps.skip is not None))
    dinput_proj[chosen] += parts[0].view_as(dinput_proj[chosen])
    doutput_proj[chosen] += parts[1].view_as(doutput_proj[chosen])
    if maps.skip is not None:
        dskip_proj += parts[2]


def _add_center_gradient(piece: _Piece, g: Tensor, segment: int | None, dcenter: Tensor) -> None:
    """Subtracts from dcenter (B,D,C) the sum of g (B,D,C,H,W), the gradient of a piece's gated input, over the lines
    that center was subtracted from."""
    for of_direction, index, direction in zip(g.unbind(1), piece.indices, piece.directions, strict=True):
        sums = of_direction.sum(-2 if direction % 2 == 0 else -1)  # of each line: (B,C,T)
        lines = piece.origin + torch.arange(sums.shape[-1], device=g.device)
        starts = (lines if segment is None else lines % segment) == 0
        dcenter[:, index] -= sums.masked_fill(starts.flip(0) if direction >= 2 else starts, 0).sum(-1)


def _two_parts(projection: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, S) as (n, 2S) in a narrower dtype, whose two parts sum up to it: rounding the projections once more would
    exceed the error budget, and a product with few columns costs what it writes, not what it reads."""
    first = projection.to(dtype)
    return torch.cat((first, (projection - first).to(dtype)), 1)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b as `dtype`: that of both, or a wider one, which the sums then have too."""
    if dtype == a.dtype == b.dtype:
        return a @ b
    if a.is_cuda and a.dtype == b.dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)
