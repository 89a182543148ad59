"""The reference backend: the operators in eager torch, on any device and in any floating dtype.

This file defines what every other backend has to compute. The forward functions are plain torch and differentiable
any number of times: autograd through them is the definition of the gradients. The ``*_backward`` functions are the
same gradients written out (the adjoint of a line scan is a line scan that travels back), because autograd through
the loop costs several times as much; dispatch.py calls them, and the tests hold them against autograd.

The scan works a line at a time for all batch items, channels and places at once. Inside, maps are held line-major,
(T, ..., P) with T lines in the order of travel and P places in a line. Directions are numbered 0 to 3: right, down,
left, up. The state is float32 for 16-bit and 32-bit data and float64 for float64, also inside autocast.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

LOGIT_FLOOR = -28.0  # keeps (1 + e^-a)^3 finite in float32, and so every row sum exactly what it should be


def available() -> tuple[bool, str]:
    return True, "eager torch, any device"


# Values


def normalize_weights(logits: Tensor, direction: int) -> Tensor:
    """(B,G,3,H,W) logits to row-stochastic weights of the same shape, in the state's dtype."""
    return _weights_and_sigmoids(logits, direction)[0]


def line_scan(x: Tensor, weights: Tensor, direction: int, segment: int | None) -> Tensor:
    """h (B,C,H,W) of gated input x (B,C,H,W) and weights (B,G,3,H,W)."""
    with no_autocast(x):
        inputs, weights = _group_lines(_state(x), weights.shape[1], direction), _weight_lines(weights, direction)
        if segment == 1 or len(inputs) == 1:
            # No line reaches another. As on the native backends, the gradient of the weights exists and is 0: the empty
            # sum changes no bit of the inputs, whatever the weights hold.
            inputs = inputs - weights[:0].sum()
        previous, same, following = (w.unbind(0) for w in weights.unbind(-2))
        states: list[Tensor] = []
        for t, line in enumerate(inputs.unbind(0)):
            if not _starts_segment(t, segment):
                padded = F.pad(states[-1], (1, 1))
                line = torch.addcmul(line, previous[t], padded[..., :-2])
                line = torch.addcmul(line, same[t], states[-1])
                line = torch.addcmul(line, following[t], padded[..., 2:])
            states.append(line)
        return _from_lines(torch.stack(states).flatten(2, 3), direction).to(x.dtype)


def gated_scan(x: Tensor, input_gate: Tensor, logits: Tensor, directions: list[int], segment: int | None) -> Tensor:
    """h (B,D,C,H,W) of x (B,C,H,W), input_gate (B,D,C,H,W) and logits (B,D,G,3,H,W)."""
    with no_autocast(x):
        states = [
            line_scan(_state(x) * _state(input_gate[:, i]), normalize_weights(logits[:, i], d), d, segment)
            for i, d in enumerate(directions)
        ]
        return torch.stack(states, 1).to(x.dtype)


def propagate(
    x: Tensor,
    proxy: Tensor,
    weight_proj: Tensor,
    input_proj: Tensor,
    output_proj: Tensor,
    skip_proj: Tensor | None,
    directions: list[int],
    segment: int | None,
    workspace_mib: int = 0,
    center: Tensor | None = None,
) -> Tensor:
    """y (B,C,H,W) of x (B,C,H,W) and proxy (B,S,H,W), with center (B,D,C) taken from the gated input of every line that
    another one comes before. Memory holds one direction's maps at a time, whatever the workspace."""
    with no_autocast(x):
        dtype, x, proxy = x.dtype, _state(x), _state(proxy)
        y = torch.zeros_like(x) if skip_proj is None else _project(skip_proj, proxy) * x
        for i, d in enumerate(directions):
            weights = normalize_weights(_project(weight_proj[i], proxy).transpose(1, 2), d)
            gated = _project(input_proj[i], proxy) * x
            if center is not None:
                gated = gated - _goes_on(x, d, segment) * center[:, i, :, None, None]
            h = line_scan(gated, weights, d, segment)
            y = torch.addcmul(y, _project(output_proj[i], proxy), h)
        return y.to(dtype)


# Gradients, written out


def line_scan_backward(
    grad: Tensor, weights: Tensor, h: Tensor, direction: int, segment: int | None
) -> tuple[Tensor, Tensor]:
    """Gradients of x (B,C,H,W) and weights (B,G,3,H,W), from the gradient and the value of h (B,C,H,W).

    With g_t the gradient of the line's state, g_t = grad_t + W_(t+1)^T g_(t+1): the transpose of W moves each gradient
    back to the place that its state came from. The gradient of x is g, and that of a weight is g times its state.
    """
    groups = weights.shape[1]
    lines = _weight_lines(weights, direction)
    previous, same, following = lines.unbind(-2)
    adjoint = list(_group_lines(_state(grad), groups, direction).unbind(0))
    for t in range(len(adjoint) - 2, -1, -1):
        if not _starts_segment(t + 1, segment):
            later = adjoint[t + 1]
            total = torch.addcmul(adjoint[t], same[t + 1], later)
            total[..., :-1].addcmul_(previous[t + 1][..., 1:], later[..., 1:])
            total[..., 1:].addcmul_(following[t + 1][..., :-1], later[..., :-1])
            adjoint[t] = total
    g = torch.stack(adjoint)
    met = F.pad(_group_lines(_state(h), groups, direction)[:-1], (1, 1) + (0, 0) * 3 + (1, 0))  # states one line back
    starts = [t for t in range(len(adjoint)) if _starts_segment(t, segment)]
    met[starts] = 0
    neighbours = (met[..., :-2], met[..., 1:-1], met[..., 2:])
    grad_weights = torch.stack([(g * n).sum(-2) for n in neighbours], -2)  # (T,B,G,3,P)
    grad_weights[..., 0, :1] = 0  # a neighbour that does not exist, however large the state beside it
    grad_weights[..., 2, -1:] = 0
    grad_x = _from_lines(g.flatten(2, 3), direction).to(grad.dtype)
    return grad_x, _from_lines(grad_weights, direction).to(weights.dtype)


def gated_scan_backward(
    grad: Tensor, x: Tensor, input_gate: Tensor, logits: Tensor, h: Tensor, directions: list[int], segment: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, input_gate and logits, from the gradient and the value of h."""
    grad_x, grad_gate, grad_logits = torch.zeros_like(_state(x)), [], []
    for i, d in enumerate(directions):
        weights, sigmoids = _weights_and_sigmoids(logits[:, i], d)
        g, grad_weights = line_scan_backward(_state(grad[:, i]), weights, h[:, i], d, segment)
        grad_x += g * _state(input_gate[:, i])
        grad_gate.append(g * _state(x))
        grad_logits.append(_logit_gradient(grad_weights, weights, sigmoids, logits[:, i]))
    return (
        grad_x.to(x.dtype),
        torch.stack(grad_gate, 1).to(input_gate.dtype),
        torch.stack(grad_logits, 1).to(logits.dtype),
    )


def propagate_backward(
    grad: Tensor,
    x: Tensor,
    proxy: Tensor,
    weight_proj: Tensor,
    input_proj: Tensor,
    output_proj: Tensor,
    skip_proj: Tensor | None,
    directions: list[int],
    segment: int | None,
    workspace_mib: int = 0,
    center: Tensor | None = None,
    scan: Callable[..., Tensor] = gated_scan,
    scan_backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = gated_scan_backward,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, proxy, the four projections and center; recomputes what lies between, a direction at a time.

    ``scan`` and ``scan_backward`` may be another backend's: this is then its unfused form.
    """
    with no_autocast(x):
        dy, values, features = _state(grad), _state(x), _state(proxy)
        grad_x, grad_proxy, grad_skip = torch.zeros_like(values), torch.zeros_like(features), None
        if skip_proj is not None:
            grad_x += _project(skip_proj, features) * dy
            grad_skip = _projection_gradient(dy * values, features, skip_proj)
            grad_proxy += _unproject(skip_proj, dy * values)
        ones, grad_center = torch.ones_like(values), []
        found: list[list[Tensor]] = [[], [], []]
        for i, d in enumerate(directions):
            projections = (weight_proj[i], input_proj[i], output_proj[i])
            logits, gate, output_gate = (_project(p, features) for p in projections)
            logits, gated = logits.transpose(1, 2)[:, None], (gate * values)[:, None]  # (B,1,G,3,H,W), (B,1,C,H,W)
            if center is not None:
                gated = gated - _goes_on(values, d, segment) * center[:, i, None, :, None, None]
            h = scan(ones, gated, logits, [d], segment)
            grad_h = (dy * output_gate)[:, None]
            _, g, grad_logits = scan_backward(grad_h, ones, gated, logits, h, [d], segment)
            g = g[:, 0]  # the gradient of the gated input
            grad_x += g * gate
            if center is not None:
                grad_center.append(-(g * _goes_on(values, d, segment)).sum((-2, -1)))
            maps = (grad_logits[:, 0].transpose(1, 2), g * values, dy * h[:, 0])
            for grads, projection, grad_map in zip(found, projections, maps, strict=True):
                grads.append(_projection_gradient(grad_map, features, projection))
                grad_proxy += _unproject(projection, grad_map)
        projections = (*(torch.stack(grads) for grads in found), grad_skip)
        centers = None if center is None else torch.stack(grad_center, 1).to(center.dtype)
        return grad_x.to(x.dtype), grad_proxy.to(proxy.dtype), *projections, centers


# The pieces


def _state(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def no_autocast(x: Tensor) -> AbstractContextManager:
    kind = x.device.type  # not torch.amp.is_autocast_available, which torch 2.11 cannot compile
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


def _starts_segment(t: int, segment: int | None) -> bool:
    return t == 0 or (segment is not None and t % segment == 0)


def lines_before(like: Tensor, direction: int, segment: int | None) -> Tensor:
    """How many lines a scan over like's map (..., H, W) has passed since it last reset: (W,) or (H,1)."""
    axis = -1 if direction % 2 == 0 else -2
    lines = torch.arange(like.shape[axis], device=like.device)
    lines = lines if segment is None else lines % segment
    lines = lines.flip(0) if direction >= 2 else lines
    return lines if axis == -1 else lines.unsqueeze(-1)


def _goes_on(like: Tensor, direction: int, segment: int | None) -> Tensor:
    """1 in the lines that have a line before them in their segment, else 0; in like's dtype."""
    return (lines_before(like, direction, segment) > 0).to(like.dtype)


def _to_lines(t: Tensor, direction: int) -> Tensor:
    """(..., H, W) to (T, ..., P), line 0 being where the scan starts."""
    t = t.movedim(-1 if direction % 2 == 0 else -2, 0)
    return t.flip(0) if direction >= 2 else t


def _from_lines(t: Tensor, direction: int) -> Tensor:
    t = t.flip(0) if direction >= 2 else t
    return t.movedim(0, -1 if direction % 2 == 0 else -2)


def _group_lines(t: Tensor, groups: int, direction: int) -> Tensor:
    """(B,C,H,W) to (T,B,G,C/G,P), contiguous: the loop walks over it a line at a time."""
    channels = t.shape[1]
    return _to_lines(t.reshape(t.shape[0], groups, channels // groups, *t.shape[2:]), direction).contiguous()


def _weight_lines(weights: Tensor, direction: int) -> Tensor:
    """(B,G,3,H,W) to (T,B,G,1,3,P), 0 where the neighbour does not exist: the weight there is never used."""
    previous, same, following = _to_lines(_state(weights), direction).unbind(-2)
    previous, following = F.pad(previous[..., 1:], (1, 0)), F.pad(following[..., :-1], (0, 1))
    return torch.stack((previous, same, following), -2).unsqueeze(3)


def _missing(logits: Tensor, direction: int) -> Tensor:
    """(3,H,W) or a shape that broadcasts to it: whether the previous, same and next place in the line do not exist."""
    lines_are_columns = direction % 2 == 0
    places = logits.shape[-2 if lines_are_columns else -1]
    none = logits.new_zeros(places, dtype=torch.bool)  # fake if the logits are, whatever mode is on
    first, last = (F.pad(none[1:], pad, value=True) for pad in ((1, 0), (0, 1)))
    return torch.stack((first, none, last)).unsqueeze(-1 if lines_are_columns else -2)


def _weights_and_sigmoids(logits: Tensor, direction: int) -> tuple[Tensor, Tensor]:
    """Normalised weights and the sigmoids that they come from: w_k = s_k / (sum over the neighbours that exist)."""
    sigmoids = torch.sigmoid(_state(logits).clamp(min=LOGIT_FLOOR))
    masked = sigmoids.masked_fill(_missing(logits, direction), 0)
    return masked / masked.sum(2, keepdim=True), sigmoids


def _logit_gradient(grad_weights: Tensor, weights: Tensor, sigmoids: Tensor, logits: Tensor) -> Tensor:
    """w_k (1 - s_k) (dw_k - sum_j w_j dw_j): zero below the floor, and where there is no neighbour."""
    centred = grad_weights - (weights * grad_weights).sum(2, keepdim=True)
    return (weights * (1 - sigmoids) * centred).masked_fill(logits < LOGIT_FLOOR, 0)


def _project(projection: Tensor, proxy: Tensor) -> Tensor:
    """(..., S) times (B,S,H,W) to (B,...,H,W): a 1x1 convolution."""
    return torch.tensordot(proxy, projection.to(proxy.dtype), ([1], [projection.ndim - 1])).movedim((1, 2), (-2, -1))


def _unproject(projection: Tensor, grad_map: Tensor) -> Tensor:
    """Gradient of the proxy: (..., S) and (B,...,H,W) to (B,S,H,W)."""
    dims = projection.ndim - 1
    contracted = torch.tensordot(grad_map, projection.to(grad_map.dtype), (list(range(1, 1 + dims)), list(range(dims))))
    return contracted.movedim(-1, 1)


def _projection_gradient(grad_map: Tensor, proxy: Tensor, projection: Tensor) -> Tensor:
    """Gradient of the projection: (B,...,H,W) and (B,S,H,W) to (...,S)."""
    return torch.tensordot(grad_map, proxy, ([0, -2, -1], [0, -2, -1])).to(projection.dtype)
