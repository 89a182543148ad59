"""What the GPU kernels are compared with, beside the modules of peers.py.

``LineLaunches`` is a scan written the way arXiv 2501.12381 describes its own: channels first, one launch a line, one
thread an element, neighbours through global memory, weights normalised and directions stacked beforehand. We wrote
it for comparison. The other contenders need packages; ``missing`` says which of them a machine lacks.
"""

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

import gspn
from gspn.bench.contenders import Attention, OnMaps, heads_of

BLOCK = 256  # threads and elements of a program of the kernels below
STATE = 64  # of the Mamba scans: state channels a head


@triton.jit(do_not_specialize=["t"])
def _line_forward(x, gate, left, middle, right, h, t, rows, places, lines, BLOCK: tl.constexpr):
    """Line t of every map at once; (rows, lines) in memory, a row is one place of one map."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    place = row % places
    at = row * lines + t
    state = tl.load(x + at, inside, 0.0).to(tl.float32) * tl.load(gate + at, inside, 0.0).to(tl.float32)
    met = inside & (row * 0 + t > 0)
    before = h + at - 1
    state += tl.load(left + at, met, 0.0).to(tl.float32) * tl.load(before - lines, met & (place > 0), 0.0).to(
        tl.float32
    )
    state += tl.load(middle + at, met, 0.0).to(tl.float32) * tl.load(before, met, 0.0).to(tl.float32)
    below = met & (place < places - 1)
    state += tl.load(right + at, met, 0.0).to(tl.float32) * tl.load(before + lines, below, 0.0).to(tl.float32)
    tl.store(h + at, state.to(h.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["t"])
def _line_backward(
    grad, x, gate, left, middle, right, h, g, dx, dgate, dleft, dmiddle, dright, t, rows, places, lines,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The adjoint of line t: g from the line after, then every gradient of this line."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    place = row % places
    at = row * lines + t
    above, below = inside & (place > 0), inside & (place < places - 1)
    last = row * 0 + t == lines - 1
    after = at + 1
    adjoint = tl.load(grad + at, inside, 0.0).to(tl.float32)
    to = inside & (last == 0)
    adjoint += tl.load(middle + after, to, 0.0).to(tl.float32) * tl.load(g + after, to, 0.0).to(tl.float32)
    to = below & (last == 0)
    adjoint += tl.load(left + after + lines, to, 0.0).to(tl.float32) * tl.load(g + after + lines, to, 0.0).to(
        tl.float32
    )
    to = above & (last == 0)
    adjoint += tl.load(right + after - lines, to, 0.0).to(tl.float32) * tl.load(g + after - lines, to, 0.0).to(
        tl.float32
    )
    tl.store(g + at, adjoint.to(g.dtype.element_ty), inside)
    tl.store(dx + at, (adjoint * tl.load(gate + at, inside, 0.0).to(tl.float32)).to(dx.dtype.element_ty), inside)
    tl.store(dgate + at, (adjoint * tl.load(x + at, inside, 0.0).to(tl.float32)).to(dgate.dtype.element_ty), inside)
    first = row * 0 + t == 0
    met = h + at - 1
    for_left = tl.load(met - lines, above & (first == 0), 0.0).to(tl.float32)
    for_middle = tl.load(met, inside & (first == 0), 0.0).to(tl.float32)
    for_right = tl.load(met + lines, below & (first == 0), 0.0).to(tl.float32)
    tl.store(dleft + at, (adjoint * for_left).to(dleft.dtype.element_ty), inside)
    tl.store(dmiddle + at, (adjoint * for_middle).to(dmiddle.dtype.element_ty), inside)
    tl.store(dright + at, (adjoint * for_right).to(dright.dtype.element_ty), inside)


class LineLaunches:
    """Four directions of a gated scan, one launch a line; directions of equal size share their launches.

    The state is kept in the maps' dtype, as there. ``forward`` and ``backward`` launch kernels into buffers that are
    kept; ``prepare`` makes what they read and is no part of them.
    """

    def __init__(self, x: Tensor, gate: Tensor, logits: Tensor, train: bool = False):
        square = x.shape[2] == x.shape[3]
        self.sets = [(0, 1, 2, 3)] if square else [(0, 2), (1, 3)]  # directions that share their launches
        self.stacks = self.prepare(x, gate, logits)
        self.h = [torch.empty_like(s[0]) for s in self.stacks]
        self.grads = [[torch.empty_like(s[0]) for _ in range(6)] for s in self.stacks] if train else []

    def prepare(self, x: Tensor, gate: Tensor, logits: Tensor) -> list[list[Tensor]]:
        """For each stack x, gate and three weights, (directions, B, C, P, T), contiguous, all scans to the right."""
        repeats = x.shape[1] // logits.shape[2]
        stacks = []
        for directions in self.sets:
            maps = []
            for d in directions:
                weights = gspn.normalize_weights(logits[:, d], direction=gspn.DIRECTIONS[d]).to(x.dtype)
                parts = [x, gate[:, d], *weights.repeat_interleave(repeats, 1).unbind(2)]
                maps.append([_to_the_right(p, d) for p in parts])
            stacks.append([torch.stack(parts).contiguous() for parts in zip(*maps, strict=True)])
        return stacks

    def forward(self) -> None:
        for inputs, h in zip(self.stacks, self.h, strict=True):
            rows, places, lines = h.numel() // h.shape[-1], h.shape[-2], h.shape[-1]
            for t in range(lines):
                _line_forward[(triton.cdiv(rows, BLOCK),)](
                    *inputs, h, t, rows, places, lines, BLOCK, num_warps=BLOCK // 32
                )

    def backward(self, grads: list[Tensor]) -> None:
        """From the gradients of h, stacked as h is (``stacked``); ``forward`` has to have run."""
        for grad, inputs, h, out in zip(grads, self.stacks, self.h, self.grads, strict=True):
            rows, places, lines = h.numel() // h.shape[-1], h.shape[-2], h.shape[-1]
            for t in range(lines - 1, -1, -1):
                _line_backward[(triton.cdiv(rows, BLOCK),)](
                    grad, *inputs, h, *out, t, rows, places, lines, BLOCK, num_warps=BLOCK // 32
                )

    def stacked(self, maps: Tensor) -> list[Tensor]:
        """(B,D,C,H,W) in the stacks' layout."""
        return [torch.stack([_to_the_right(maps[:, d], d) for d in s]).contiguous() for s in self.sets]

    def unstacked(self, stacks: list[Tensor]) -> Tensor:
        """The inverse of ``stacked``: (B,D,C,H,W)."""
        pairs = [(d, m) for s, stack in zip(self.sets, stacks, strict=True) for d, m in zip(s, stack, strict=True)]
        return torch.stack([_from_the_right(m, d) for d, m in sorted(pairs, key=lambda pair: pair[0])], 1)

    def gate_gradient(self) -> Tensor:
        return self.unstacked([out[2] for out in self.grads])

    def input_gradient(self) -> Tensor:
        return self.unstacked([out[1] for out in self.grads]).sum(1)


def _to_the_right(maps: Tensor, direction: int) -> Tensor:
    """(...,H,W), scanned in the direction, as (...,P,T), scanned to the right."""
    maps = maps if direction % 2 == 0 else maps.transpose(-1, -2)
    return maps if direction < 2 else maps.flip(-1)


def _from_the_right(maps: Tensor, direction: int) -> Tensor:
    maps = maps if direction < 2 else maps.flip(-1)
    return maps if direction % 2 == 0 else maps.transpose(-1, -2)


# Layers of other packages, (B,C,H,W) to (B,C,H,W) with their projections


class FlaLinearAttention(Attention):
    """Linear attention by flash-linear-attention's chunked kernel, which is always causal: here in raster order."""

    def __init__(self, channels: int):
        super().__init__(channels, bias=False)
        self.kernel = importlib.import_module("fla.ops.linear_attn").chunk_linear_attn

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2).contiguous() for t in (F.elu(q) + 1, F.elu(k) + 1, v))
        return self.kernel(q, k, v)[0].transpose(1, 2)


class FourRasterScans(nn.Module):
    """A state-space mixer over an image: by rows and by columns, each there and back, summed; STATE state channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.heads = heads_of(channels)
        self.project = nn.Linear(channels, channels + 2 * STATE + self.heads, bias=False)
        self.log_decay = nn.Parameter(torch.zeros(self.heads))
        self.out = nn.Linear(channels, channels, bias=False)

    def scan(self, values: Tensor, keys: Tensor, queries: Tensor, steps: Tensor) -> Tensor:
        """values (N,L,C), keys and queries (N,L,STATE), steps (N,L,heads) > 0; returns (N,L,C)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        maps = self.project(x.permute(0, 2, 3, 1))
        orders = (maps.flatten(1, 2), maps.transpose(1, 2).flatten(1, 2))
        tokens = torch.cat([t for o in orders for t in (o, o.flip(1))])
        values, keys, queries, steps = tokens.split([channels, STATE, STATE, self.heads], -1)
        rows, back, columns, up = self.scan(values, keys, queries, F.softplus(steps)).chunk(4)
        by_rows = (rows + back.flip(1)).view(batch, height, width, channels)
        by_columns = (columns + up.flip(1)).view(batch, width, height, channels).transpose(1, 2)
        return self.out(by_rows + by_columns).permute(0, 3, 1, 2)


class FlaMamba2(FourRasterScans):
    """Mamba-2's recurrence (scalar decay a head) by flash-linear-attention's chunked kernel for it."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.kernel = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla

    def scan(self, values, keys, queries, steps):
        per_head = lambda t: t.unsqueeze(2).expand(-1, -1, self.heads, -1).contiguous()  # noqa: E731
        values = values.unflatten(-1, (self.heads, -1)) * steps.unsqueeze(-1)
        decay = -self.log_decay.exp().float() * steps.float()
        return self.kernel(per_head(queries), per_head(keys), values.contiguous(), decay, scale=1.0)[0].flatten(2)


class MambaSelectiveScan(FourRasterScans):
    """Mamba's selective scan by mamba_ssm's CUDA kernel, 16 of the state channels, as its own layers have."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.kernel = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn

    def scan(self, values, keys, queries, steps):
        first = lambda t: t[..., :16].transpose(1, 2).unsqueeze(1).contiguous()  # noqa: E731
        channels = values.shape[-1]
        delta = steps.repeat_interleave(channels // self.heads, -1).transpose(1, 2).contiguous()
        decay = -self.log_decay.exp().float().repeat_interleave(channels // self.heads)[:, None].expand(-1, 16)
        y = self.kernel(values.transpose(1, 2).contiguous(), delta, decay.contiguous(), first(keys), first(queries))
        return y.transpose(1, 2)


PACKAGED: dict[str, tuple[str, Callable[[int], nn.Module]]] = {
    "linear attention (fla, causal)": ("fla.ops.linear_attn", lambda channels: OnMaps(FlaLinearAttention(channels))),
    "Mamba-2 scan (fla)": ("fla.ops.simple_gla", FlaMamba2),
    "Mamba scan (mamba_ssm)": ("mamba_ssm.ops.selective_scan_interface", MambaSelectiveScan),
}


def missing() -> dict[str, str]:
    """Names of PACKAGED that cannot be measured here, each with the reason."""
    found = {}
    for name, (module, _) in PACKAGED.items():
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            found[name] = f"not measured: not installed ({error.name})"
        except Exception as error:  # a package built for another torch fails in its own ways
            found[name] = f"not measured: importing {module} failed: {error}"
    return found
