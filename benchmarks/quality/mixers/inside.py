"""What happens inside a layer: the calls of `gspn.propagate` that a model makes, their figures, and what a call gives
when a part of it is replaced.

Every contender and remedy whose scan is one call of the operator can be looked into, because the call is caught at the
operator. A replaced part stays a call of the operator: a proxy channel that is 1 everywhere turns a column of a
projection into a constant, and a second proxy beside the first one serves the replaced part alone.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import gspn
from benchmarks.quality.mixers.contenders import DEPTH, Backbone
from gspn.layers import input_means

APART = (1, 2, 4)  # places; the scan's neighbours are 1 apart
LEVERED = 100  # photos for the levers
INFLUENCED = 48  # photos over which the influence of the gated inputs on one state is averaged


class Call(NamedTuple):
    """The operator's arguments: x (B,C,H,W), proxy (B,S,H,W), projections (D,3,G,S), (D,C,S), (D,C,S), (C,S)."""

    x: Tensor
    proxy: Tensor
    weight_proj: Tensor
    input_proj: Tensor
    output_proj: Tensor
    skip_proj: Tensor  # the contenders all have a skip
    directions: list[int]
    segment: int | None
    workspace_mib: int
    center: Tensor | None  # (B,D,C)
    backend: str

    def __call__(self) -> Tensor:
        return torch.ops.gspn.propagate(*self)


class Calls(TorchDispatchMode):
    """Catches the operator's calls; works where gradients are off.

    Args:
        change: gives the call that takes the place of a block's call; None changes nothing.
        keep: whether `seen`, the calls of each block, are kept.
    """

    def __init__(self, change: Callable[[int, Call], Call] | None = None, keep: bool = False):
        super().__init__()
        self.change, self.keep, self.count = change, keep, 0
        self.seen: list[list[Call]] = [[] for _ in range(DEPTH)]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.gspn.propagate.default:
            block, call = self.count % DEPTH, Call(*args)
            self.count += 1
            if self.keep:
                self.seen[block].append(call)
            args = call if self.change is None else self.change(block, call)
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def calls_of(model: Backbone, batches: list[Tensor]) -> list[Call]:
    """Each block's call for all photos of the batches. Errors: ValueError where a block does not make one call."""
    with Calls(keep=True) as calls:
        for x in batches:
            model(x)
    if calls.count != DEPTH * len(batches):
        raise ValueError(
            f"expected {DEPTH} calls of gspn.propagate for each batch, one in each block, got {calls.count} for "
            f"{len(batches)} batches: only mixers that scan by that operator can be looked into"
        )
    found = []
    for seen in calls.seen:
        center = None if seen[0].center is None else torch.cat([call.center for call in seen])
        x, proxy = torch.cat([call.x for call in seen]), torch.cat([call.proxy for call in seen])
        found.append(seen[0]._replace(x=x, proxy=proxy, center=center))
    return found


# -- one direction of a call --


class Pass(NamedTuple):
    """What one direction computes, turned such that it travels to the right: lines are the last axis, places the one
    before. weights and logits (B,G,3,P,T); gates, gated input and state (B,C,P,T)."""

    logits: Tensor
    weights: Tensor
    input_gate: Tensor
    output_gate: Tensor
    gated: Tensor
    state: Tensor


def turned(maps: Tensor, direction: int) -> Tensor:
    """(...,H,W) such that the direction travels to the right: `down`, `up` are transposed, `left`, `up` flipped."""
    maps = maps if direction % 2 == 0 else maps.transpose(-1, -2)
    return maps.flip(-1) if direction >= 2 else maps


def project(projection: Tensor, proxy: Tensor) -> Tensor:
    """(...,S) and (B,S,H,W) to (B,...,H,W)."""
    return torch.einsum("...s,bshw->b...hw", projection, proxy)


def one_pass(call: Call, index: int) -> Pass:
    """Of the call's direction number `index`."""
    x, proxy = (turned(maps, call.directions[index]) for maps in (call.x, call.proxy))
    logits = project(call.weight_proj[index], proxy).transpose(1, 2)
    weights = gspn.normalize_weights(logits, direction="right")
    input_gate, output_gate = (project(p[index], proxy) for p in (call.input_proj, call.output_proj))
    gated = input_gate * x
    if call.center is not None:
        lines = torch.arange(gated.shape[-1])
        goes_on = (lines if call.segment is None else lines % call.segment) > 0
        gated = gated - goes_on * call.center[:, index, :, None, None]
    state = gspn.line_scan(gated, weights, direction="right", segment=call.segment)
    return Pass(logits, weights, input_gate, output_gate, gated, state)


# -- figures --


def rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def spread(maps: Tensor) -> dict[str, float]:
    """Standard deviations of (B,...,H,W), pooled over channels: over everything (`std`), over the pixels of an image,
    and of the images' means, with std^2 = pixels^2 + images^2. `mean` is the size of the channels' means (RMS)."""
    maps = maps.flatten(1, -3).flatten(-2)
    means = maps.mean(-1)
    pixels, images = maps.var(-1, correction=0).mean(), means.var(0, correction=0).mean()
    return {
        "std": (pixels + images).sqrt().item(),
        "pixels": pixels.sqrt().item(),
        "images": images.sqrt().item(),
        "mean": rms(means.mean(0)),
    }


def inner(maps: Tensor) -> Tensor:
    """(...,P,T) without the first and last place of a line, which lack a neighbour."""
    return maps[..., 1:-1, :]


def share_of_input(maps: Tensor, middle: Tensor | float) -> float:
    """The share of the second moment of (B,G,3,P,T) around `middle` that varies with the input, the rest being the
    mean of each group and neighbour."""
    mean = maps.mean((0, -2, -1), keepdim=True)
    varying, fixed = (maps - mean).square().mean(), (mean - middle).square().mean()
    return (varying / (varying + fixed).clamp(min=1e-30)).item()


def influence(weights: Tensor, segment: int | None) -> dict[str, list[float]]:
    """How the gated inputs of each line arrive at the state in the middle of the last line, by distance in lines.

    The weight with which an input arrives is the gradient of the state; over a line of the same segment these sum to 1.
    They have `drift` (RMS of their mean place, from the state's), `drift by input` (its deviation over photos),
    `spread` (standard deviation of the place), and `kept`, the sum of their squares: what is left of the variance of
    an input that is white noise.
    """
    batch, groups, _, places, lines = weights.shape
    gated = weights.new_zeros(batch, groups, places, lines, requires_grad=True)
    with torch.enable_grad():
        state = gspn.line_scan(gated, weights, direction="right", segment=segment)
        (arriving,) = torch.autograd.grad(state[..., places // 2, -1].sum(), gated)
    arriving = arriving.flip(-1)  # by distance
    offset = (torch.arange(places, dtype=weights.dtype) - places // 2).unsqueeze(-1)
    drift = (arriving * offset).sum(-2)  # (B,G,T)
    variance = (arriving * offset.square()).sum(-2) - drift.square()
    return {
        "drift": drift.square().mean((0, 1)).sqrt().tolist(),
        "drift by input": drift.var(0, correction=0).mean(0).sqrt().tolist(),
        "spread": variance.clamp(min=0).sqrt().mean((0, 1)).tolist(),
        "kept": arriving.square().sum(-2).mean((0, 1)).tolist(),
    }


def by_line(state: Tensor) -> list[float]:
    """RMS of (B,C,P,T) at each line."""
    return state.square().mean((0, 1, 2)).sqrt().tolist()


def three_states(state: Tensor, apart: int = 1) -> Tensor:
    """The states (B,C,P,T) of the line before at p - apart, p and p + apart: (B,C,3,P-2*apart,T-1)."""
    before = state[..., :-1]
    return torch.stack([before[..., : -2 * apart, :], before[..., apart:-apart, :], before[..., 2 * apart :, :]], 2)


def leverage(found: Pass) -> dict[str, Any]:
    """What the weights can do: they choose among three states of the line before, so only differences count.

    neighbours: mean |h[i] - h[i+1]| along a line, over the standard deviation of h, mean over channels.
    choice: size of the three states' deviations from their mean, over that of the states (both RMS); and what it would
        be if the neighbours were 2 or 4 places apart.
    chosen: size of sum over k of (w_k - mean w_k) h_k, over that of the gated input that is added at the same place:
        how much the part of the weights that depends on the input moves the state in one line.
    """
    state, groups = found.state, found.weights.shape[1]
    steps = (state[..., 1:, :] - state[..., :-1, :]).abs().mean((0, 2, 3))
    deviation = state.var((0, 2, 3), correction=0).sqrt()
    three = {apart: three_states(state, apart) for apart in APART if 2 * apart < state.shape[-2]}
    weights = inner(found.weights)[..., 1:]
    varying = weights - weights.mean((0, -2, -1), keepdim=True)
    chosen = (three[1].unflatten(1, (groups, -1)) * varying.unsqueeze(2)).sum(3)
    return {
        "neighbours": (steps / deviation.clamp(min=1e-30)).mean().item(),
        "choice": {str(apart): rms(h - h.mean(2, keepdim=True)) / rms(h) for apart, h in three.items()},
        "chosen": rms(chosen) / rms(inner(found.gated)[..., 1:]),
    }


@torch.no_grad()
def figures(call: Call) -> dict:
    """Of one block: of its input, and of each direction."""
    passes = {}
    for index, direction in enumerate(call.directions):
        found = one_pass(call, index)
        weights = inner(found.weights)
        passes[gspn.DIRECTIONS[direction]] = {
            "logits": spread(found.logits),
            "input gate": spread(found.input_gate),
            "output gate": spread(found.output_gate),
            # only differences between the three logits of a place move its weights
            "logits by input": share_of_input(found.logits - found.logits.mean(2, keepdim=True), 0.0),
            "weights": spread(weights),
            "weights by input": share_of_input(weights, 1 / 3),
            "entropy": torch.special.entr(weights).sum(2).mean().item() / math.log(3),
            "largest": weights.amax(2).mean().item(),
            "gated": rms(found.gated),
            "state by line": by_line(found.state),
            "influence": influence(found.weights[:INFLUENCED], call.segment),
            **leverage(found),
        }
    return {
        "x": spread(call.x) | {"rms": rms(call.x)},
        "proxy": spread(call.proxy),
        "skip gate": spread(project(call.skip_proj, call.proxy)),
        "scan's part": rms(without_skip(call)()),
        "skip's part": rms(without_scan(call)()),
        "directions": passes,
    }


@torch.no_grad()
def growth(call: Call) -> dict[str, list[float]]:
    """RMS of the state by line, for each direction."""
    indices = enumerate(call.directions)
    return {gspn.DIRECTIONS[d]: by_line(one_pass(call, index).state) for index, d in indices}


# -- replacements --


class Means(NamedTuple):
    """Of a block, over photos and places: weights (D,3,G) where all neighbours exist, gates (D,C), (D,C), (C,)."""

    weights: Tensor
    input_gate: Tensor
    output_gate: Tensor
    skip_gate: Tensor


@torch.no_grad()
def means(call: Call) -> Means:
    proxy = call.proxy.mean((0, 2, 3))
    weights = [
        inner(one_pass(call, index).weights).mean((0, -2, -1)).T  # of (G,3): a mean of weights still sums to 1
        for index in range(len(call.directions))
    ]
    return Means(torch.stack(weights), *(p @ proxy for p in (call.input_proj, call.output_proj, call.skip_proj)))


PARTS = {"weights": "weight_proj", "input gate": "input_proj", "output gate": "output_proj", "skip gate": "skip_proj"}


def recentred(call: Call) -> Call:
    """With the mean of its own gated input, where the call takes a mean away."""
    return call if call.center is None else call._replace(center=input_means(call.x, call.proxy, call.input_proj))


def with_constant(call: Call, part: str, value: Tensor) -> Call:
    """One part is `value` (D,3,G), (D,C) or (C,) everywhere, whatever the input."""
    widened = {name: F.pad(getattr(call, name), (0, 1)) for name in PARTS.values()}
    name = PARTS[part]
    widened[name] = torch.cat([torch.zeros_like(getattr(call, name)), value.unsqueeze(-1)], -1)
    return recentred(call._replace(proxy=torch.cat([call.proxy, torch.ones_like(call.proxy[:, :1])], 1), **widened))


def with_mean(call: Call, part: str, means: Means) -> Call:
    """One part is its mean everywhere. Weights that sum to 1 are their own sigmoids, so their logits are known; where
    a neighbour is missing the others make up for it."""
    value = getattr(means, part.replace(" ", "_"))
    return with_constant(call, part, torch.logit(value) if part == "weights" else value)


def of_another_photo(call: Call, part: str) -> Call:
    """One part comes from the photo half a batch away: as spread out as ever, but of no use to this one."""
    size = call.proxy.shape[1]
    other = call.proxy.roll(max(1, len(call.proxy) // 2), 0)
    widened = {
        name: F.pad(getattr(call, name), (size, 0) if name == PARTS[part] else (0, size)) for name in PARTS.values()
    }
    return recentred(call._replace(proxy=torch.cat([call.proxy, other], 1), **widened))


def thirds(call: Call) -> Call:
    return call._replace(weight_proj=torch.zeros_like(call.weight_proj))


def without_scan(call: Call) -> Call:
    return call._replace(output_proj=torch.zeros_like(call.output_proj))


def without_skip(call: Call) -> Call:
    return call._replace(skip_proj=torch.zeros_like(call.skip_proj))


def along(call: Call, axis: int) -> Call:
    """Only the directions that travel along rows (0) or columns (1)."""
    kept = torch.tensor([float(direction % 2 == axis) for direction in call.directions])
    return call._replace(output_proj=call.output_proj * kept.view(-1, 1, 1))


REPLACEMENTS: dict[str, Callable[[Call, Means], Call]] = {
    "nothing": lambda call, means: call,
    "weights are 1/3": lambda call, means: thirds(call),
    "weights are their mean": lambda call, means: with_mean(call, "weights", means),
    "weights of another photo": lambda call, means: of_another_photo(call, "weights"),
    "input gate is its mean": lambda call, means: with_mean(call, "input gate", means),
    "input gate of another photo": lambda call, means: of_another_photo(call, "input gate"),
    "output gate is its mean": lambda call, means: with_mean(call, "output gate", means),
    "output gate of another photo": lambda call, means: of_another_photo(call, "output gate"),
    "skip gate is its mean": lambda call, means: with_mean(call, "skip gate", means),
    "no skip": lambda call, means: without_skip(call),
    "no scan": lambda call, means: without_scan(call),
    "only along rows": lambda call, means: along(call, 0),
    "only along columns": lambda call, means: along(call, 1),
}


def at_level(call: Call, level: float, scale: float) -> Call:
    """The logits times `scale`, plus `level`: far below 0 sigmoids are exponentials, and the weights a softmax."""
    changed = with_constant(call, "weights", torch.full(call.weight_proj.shape[:3], level))
    weight_proj = torch.cat([scale * call.weight_proj, changed.weight_proj[..., -1:]], -1)
    return changed._replace(weight_proj=weight_proj)


LEVERS = {
    "as it is": lambda call: call,
    "logits times 4": lambda call: at_level(call, 0.0, 4.0),
    "logits at level -3": lambda call: at_level(call, -3.0, 1.0),
    "logits times 4 at level -3": lambda call: at_level(call, -3.0, 4.0),
}


@torch.no_grad()
def levers(call: Call) -> dict[str, float]:
    """By how much the input-dependent part of the weights would move a block's output, over its size (both RMS), if
    the layer were another one with the same input and projections; `centred`, if the mean of the gated input over the
    map came once instead of once in each line (GSPN2d: center)."""
    call, found = recentred(call._replace(x=call.x[:LEVERED], proxy=call.proxy[:LEVERED])), {}
    for name, change in LEVERS.items():
        changed = change(call)
        usual = changed()
        moved = rms(with_mean(changed, "weights", means(changed))() - usual)
        centred = call._replace(center=input_means(call.x, call.proxy, call.input_proj))()
        found |= {name: moved / rms(usual), f"{name}, centred": moved / rms(centred)}
    return found


@torch.no_grad()
def output_changes(call: Call, means: Means) -> dict[str, float]:
    """How much a block's own output changes by each replacement, over its size (both RMS)."""
    usual = call()
    return {name: rms(replace(call, means)() - usual) / rms(usual) for name, replace in REPLACEMENTS.items()}
