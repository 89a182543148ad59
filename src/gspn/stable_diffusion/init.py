"""Initialisation of a swapped layer, in closed form, from the weights of the attention that it replaces.

The scan and attention are both gated sums over pixels. With constant gates and even propagation weights the scan is an
average over the pixels that it reaches; attention is the average over all pixels if all its scores are equal.
`initialize` sets up that common case. Training adds which pixels count more: the gates already read a little of Q and
K, in a way that cancels at first.
"""

import torch
from torch import Tensor, nn

from gspn.ops import DIRECTIONS

SLIGHT = 0.3  # the share of a gate that follows Q and K
DOUBT = 1e-3  # added to a predicted covariance, as a share of the mean variance: the real one differs a little


@torch.no_grad()
def initialize(
    layer: nn.Module,
    attention: nn.Module,
    norm: nn.LayerNorm | None,
    size: tuple[int, int],
    before: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Sets the weights of `layer` so that its output, in the mean over a map, is what `attention` gives if all its
    scores are equal. Where pixels have little in common, this can be further from the attention than no output.

        qkv:   x + to_v x = W_v x, and likewise K and Q; gates constant; to_out = W_out
        pure:  to_out = W_out W_v; gates read the direction p in which x is most nearly constant, the least squares
               solution of p . x = 1 for x of mean m and covariance S:  p = S^-1 m / (1 + m . S^-1 m)

    Args:
        layer: a :class:`gspn.GSPNAttention`, in place, in float32. attention: diffusers' Attention, of any dtype.
        norm: the LayerNorm before it; its scale and shift and `before` give mean and covariance of x. None stands for a
            norm without scale and shift.
        size: H and W of the map at the UNet's own size, over which a global scan averages; segments do not need it.
        before: mean (C,) and covariance (C,C) of the norm's input, as `stream_statistics` predicts them. None takes 0
            and 1: then only the norm's shift is constant, and without shift the pure form starts near zero output.

    The proxies of Q and K are the directions in which both are largest, within each head. The share SLIGHT of each gate
    follows one of them, with opposite signs in horizontal and vertical directions. Without it, the proxies would learn
    nothing until the projections from them have grown. As all directions give about the same average, it cancels in
    their sum. Source: ours; arXiv 2501.12381 names the kinship and gives no formula.
    """
    w = {name: getattr(attention, f"to_{name}").weight.float() for name in "qkv"}
    out, v_bias = attention.to_out[0], attention.to_v.bias
    scale, shift = _affine(norm, w["v"])
    mean, covariance = _normalised(before, scale, shift)
    # After n of N lines a direction gives n / N times the average, in the mean over the map a little more than a half.
    # The merger takes the mean over the directions.
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
    # The constant is smaller where less of x is constant.
    spread = torch.linalg.solve(covariance, mean)
    constant = spread / (1 + mean @ spread)
    others = _shared_directions(w["q"], w["k"], scale, heads, unit.proxy_dim - 1)
    in_input = others @ (w["q"] + w["k"])
    in_input -= (in_input @ mean)[:, None] * constant  # without its constant part
    in_input /= _deviation(in_input, covariance)
    unit.proxy_proj.weight.copy_(torch.cat([constant[None], in_input])[..., None, None])
    for name in ("weight_proj", "input_proj", "output_proj", "skip_proj"):
        getattr(unit, name).zero_()
    for turn, projection in enumerate((unit.input_proj, unit.output_proj)):
        projection[..., 0] = gate
        # The two gates read different proxy channels, so that the product of what they read has mean 0.
        _read_slightly(projection, gate, first=1, turn=turn)


def _read_slightly(projection, gate, first=0, turn=0):
    """Lets the gate of each channel read a little of one proxy channel from `first` on, each in turn. If nothing is
    constant, this also keeps both gates from being 0, where neither passes a gradient.
    """
    channels, count = torch.arange(projection.shape[1], device=projection.device), projection.shape[2] - first
    if count > 0:
        signs = projection.new_tensor([1.0 if name in ("left", "right") else -1.0 for name in DIRECTIONS])
        projection[:, channels, first + (channels + turn) % count] = SLIGHT * gate * signs[:, None]


@torch.no_grad()
def stream_statistics(transformer: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean (C,) and covariance (C,C), in float32, of the tokens with which the blocks of a Transformer2DModel begin,
    predicted from its weights. A GroupNorm gives channels of mean b and deviation g, its shift and scale, taken as
    independent; the projection turns them into W b + c and W diag(g^2) W^T. What blocks add to the tokens is left out.
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
    """Mean and covariance after a LayerNorm of that scale and shift, of tokens with those of `before`."""
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
    """How many lines, its own among them, a pixel sees in one direction, averaged over `length` lines."""
    reach = length if segment is None else min(segment, length)
    whole, rest = divmod(length, reach)
    return (whole * reach * (reach + 1) + rest * (rest + 1)) / (2 * length)


def _shared_directions(q: Tensor, k: Tensor, scale: Tensor, heads: int, count: int) -> Tensor:
    """`count` orthonormal directions (count,C) in the space of Q and K, each within one head: those in which the
    product of the variances of Q and K is largest, for inputs of standard deviation `scale`."""
    found = []
    width = q.shape[0] // heads
    for head in range(heads):
        rows = slice(head * width, (head + 1) * width)
        of_q, of_k = ((m[rows] * scale) @ (m[rows] * scale).T for m in (q, k))
        both = of_q / of_q.trace().clamp(min=1e-12) + of_k / of_k.trace().clamp(min=1e-12)
        vectors = torch.linalg.eigh(both).eigenvectors.T
        # Either sign solves it, and the library decides which one it returns: the largest component is made positive.
        vectors = vectors * vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()
        power = (vectors @ of_q * vectors).sum(1) * (vectors @ of_k * vectors).sum(1)
        found += [(power[i].item(), rows, vectors[i]) for i in range(width)]
    found.sort(key=lambda entry: entry[0], reverse=True)
    directions = q.new_zeros(count, q.shape[0])
    for row, (_, rows, vector) in zip(directions, found, strict=False):
        row[rows] = vector
    return directions
