"""Initialisation of a swapped layer, in closed form, from the weights of the attention that it replaces.

The scan and attention are both gated sums over pixels. With constant gates and even propagation weights the scan is an
average over the pixels that it reaches; attention is the average over all pixels if all its scores are equal.
`initialize` sets up that common case. Training adds which pixels count more: the gates already read a little of Q and
K, in a way that cancels at first.
"""

import torch
from torch import Tensor, nn

from gspn.ops import DIRECTIONS

SLIGHT = 0.3  # of a gate follows what its proxy has of Q and K
DOUBT = 1e-3  # in a predicted covariance, as a part of the mean variance: gates are to be nearly constant in truth


@torch.no_grad()
def initialize(
    layer: nn.Module,
    attention: nn.Module,
    norm: nn.LayerNorm | None,
    size: tuple[int, int],
    before: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Sets the weights of `layer` so that its output, in the mean over a map, is that of `attention` were all its
    scores equal; that can still be further from the attention than no output where places have little in common.

        qkv:   x + to_v x = W_v x, and likewise K and Q; gates constant; to_out = W_out
        pure:  to_out = W_out W_v; gates read the direction p in which x is most nearly constant, the least squares
               solution of p . x = 1 for x of mean m and covariance S:  p = S^-1 m / (1 + m . S^-1 m)

    Args:
        layer: a :class:`gspn.GSPNAttention`, in place, in float32. attention: diffusers' Attention, of any dtype.
        norm: the LayerNorm before it, whose scale and shift tell, with `before`, mean and covariance of x; None is one
            without scale and shift.
        size: H and W of the map at the UNet's own size, over which a global scan is to average; segments do not need
            it.
        before: mean (C,) and covariance (C,C) of what comes before the norm, as `stream_statistics` predicts them; None
            takes 0 and 1, with which only the norm's shift is constant, and without shift the pure form starts near
            zero output.

    The proxies of Q and K are the directions in which both are largest, within each head. Of each gate a part SLIGHT
    follows one of them, in vertical directions with the other sign: where nothing did, the proxies would learn nothing
    until the projections from them have grown, and as all directions give about the same average, it cancels in their
    sum. Source: ours; arXiv 2501.12381 names the kinship and gives no formula.
    """
    w = {name: getattr(attention, f"to_{name}").weight.float() for name in "qkv"}
    out, v_bias = attention.to_out[0], attention.to_v.bias
    scale, shift = _affine(norm, w["v"])
    mean, covariance = _normalised(before, scale, shift)
    # A direction that has gone through n of its N lines gives n / N times the average; in the mean over the map that is
    # a little more than a half. The merger takes the mean over the directions.
    shares = [_mean_lines(n, layer.segment) / (n if layer.segment is None else min(n, layer.segment)) for n in size]
    gate = (len(shares) / sum(shares)) ** 0.5
    if layer.form == "pure":
        _initialize_pure(layer.gspn, w, scale, mean, covariance, gate, attention.heads)
        layer.to_out[0].weight.copy_(out.weight.float() @ w["v"])
        if layer.to_out[0].bias is not None:
            passed = 0 if v_bias is None else out.weight.float() @ v_bias.float()
            layer.to_out[0].bias.copy_(out.bias.float() + passed)
        return
    eye = torch.eye(layer.channels, dtype=torch.float32, device=out.weight.device)
    for name, weight in w.items():
        linear, source = getattr(layer, f"to_{name}"), getattr(attention, f"to_{name}")
        linear.weight.copy_(weight - eye)
        if linear.bias is not None:
            linear.bias.copy_(source.bias)
    directions = _shared_directions(w["q"], w["k"], scale, attention.heads, layer.proxy_dim)
    for name, source in (("input", "k"), ("output", "q")):
        proxy = directions / _deviation(directions @ w[source], covariance)
        getattr(layer, f"{name}_proxy").weight.copy_(proxy)
        if layer.gate_bias:
            projection, bias = getattr(layer, f"{name}_proj"), getattr(layer, f"{name}_bias")
            _read_slightly(projection.zero_(), gate)
            shared = getattr(layer, f"to_{source}").bias
            middle = w[source] @ mean if shared is None else w[source] @ mean + shared
            bias.copy_(gate - projection @ (proxy @ middle))
    for name in ("weight", "skip"):
        if layer.gate_bias:
            getattr(layer, f"{name}_proj").zero_()
            getattr(layer, f"{name}_bias").zero_()
    layer.to_out[0].load_state_dict(out.state_dict())


def _initialize_pure(unit, w, scale, mean, covariance, gate, heads):
    # The smaller the less there is that is constant.
    spread = torch.linalg.solve(covariance, mean)
    constant = spread / (1 + mean @ spread)
    others = _shared_directions(w["q"], w["k"], scale, heads, unit.proxy_dim - 1)
    in_input = others @ (w["q"] + w["k"])
    in_input -= (in_input @ mean)[:, None] * constant  # what it has of the constant
    in_input /= _deviation(in_input, covariance)
    unit.proxy_proj.weight.copy_(torch.cat([constant[None], in_input])[..., None, None])
    for name in ("weight_proj", "input_proj", "output_proj", "skip_proj"):
        getattr(unit, name).zero_()
    for turn, projection in enumerate((unit.input_proj, unit.output_proj)):
        projection[..., 0] = gate
        # of another place in either gate: the product of what they read is to have no mean
        _read_slightly(projection, gate, first=1, turn=turn)


def _read_slightly(projection, gate, first=0, turn=0):
    """Lets the gate of each channel read a little of one of the proxy's places from `first` on, each place in turn. As
    this is the only reading where nothing is constant, it also keeps both gates from 0, where none passes a gradient.
    """
    channels, count = torch.arange(projection.shape[1], device=projection.device), projection.shape[2] - first
    if count > 0:
        signs = projection.new_tensor([1.0 if name in ("left", "right") else -1.0 for name in DIRECTIONS])
        projection[:, channels, first + (channels + turn) % count] = SLIGHT * gate * signs[:, None]


@torch.no_grad()
def stream_statistics(transformer: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean (C,) and covariance (C,C), in float32, of the tokens with which the blocks of a Transformer2DModel begin,
    predicted from its weights: a GroupNorm gives channels of mean b and deviation g, its shift and scale, taken as
    independent; the projection makes W b + c and W diag(g^2) W^T of them. What blocks add to the tokens is not in it.
    """
    weight, bias = transformer.proj_in.weight, transformer.proj_in.bias
    if not weight.is_floating_point():
        raise ValueError(
            f'proj_in has weights of {weight.dtype}: swap before they are quantised, or with init="random"'
        )
    weight = weight.float().flatten(1)
    scale, shift = _affine(transformer.norm, weight)
    mean = weight @ shift if bias is None else weight @ shift + bias.float()
    return mean, (weight * scale.square()) @ weight.T


def _normalised(before, scale, shift):
    """Mean and covariance of what a LayerNorm of that scale and shift makes of tokens with those of `before`."""
    eye = torch.eye(len(scale), dtype=scale.dtype, device=scale.device)
    mean, covariance = before or (torch.zeros_like(scale), eye)
    mean = mean - mean.mean()  # over the channels, as a LayerNorm does
    covariance = covariance - covariance.mean(0)
    covariance = covariance - covariance.mean(1, keepdim=True)
    variance = (mean.square().mean() + covariance.diagonal().mean()).clamp(min=1e-12)
    covariance = scale[:, None] * covariance * scale / variance
    doubt = DOUBT * covariance.diagonal().mean().clamp(min=1e-6)
    return scale * mean / variance.sqrt() + shift, covariance + doubt * eye


def _affine(norm, like) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) of a norm."""
    ones = torch.ones(like.shape[1], dtype=torch.float32, device=like.device)
    if norm is None or norm.weight is None:
        return ones, torch.zeros_like(ones)
    shift = torch.zeros_like(ones) if norm.bias is None else norm.bias.float()
    return norm.weight.float(), shift


def _deviation(directions, covariance):
    """Standard deviations (n,1) along directions (n,C)."""
    return (directions @ covariance * directions).sum(1, keepdim=True).sqrt().clamp(min=1e-6)


def _mean_lines(length: int, segment: int | None) -> float:
    """How many lines, its own among them, a place sees in one direction, averaged over `length` lines."""
    reach = length if segment is None else min(segment, length)
    whole, rest = divmod(length, reach)
    return (whole * reach * (reach + 1) + rest * (rest + 1)) / (2 * length)


def _shared_directions(q: Tensor, k: Tensor, scale: Tensor, heads: int, count: int) -> Tensor:
    """`count` orthonormal directions (count,C) in the space of Q and K, each within one head: those in which the
    product of what Q and K have of variance is largest, for inputs of standard deviation `scale`."""
    found = []
    width = q.shape[0] // heads
    for head in range(heads):
        rows = slice(head * width, (head + 1) * width)
        of_q, of_k = ((m[rows] * scale) @ (m[rows] * scale).T for m in (q, k))
        both = of_q / of_q.trace().clamp(min=1e-12) + of_k / of_k.trace().clamp(min=1e-12)
        vectors = torch.linalg.eigh(both).eigenvectors.T
        # either sign solves it, and which one comes depends on the library: the largest component is positive
        vectors = vectors * vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()
        power = (vectors @ of_q * vectors).sum(1) * (vectors @ of_k * vectors).sum(1)
        found += [(power[i].item(), rows, vectors[i]) for i in range(width)]
    found.sort(key=lambda entry: entry[0], reverse=True)
    directions = q.new_zeros(count, q.shape[0])
    for row, (_, rows, vector) in zip(directions, found, strict=False):
        row[rows] = vector
    return directions
