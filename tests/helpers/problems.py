"""Inputs of the operators, and a scan as a loop over pixels."""

import torch


def pixel_loop(x, gate, logits, direction, segment=None):
    """h (C,H,W) by the formula, pixel by pixel in Python floats, of x (C,H,W), gate (C,H,W), logits (G,3,H,W)."""
    channels, height, width = x.shape
    groups = logits.shape[0]
    columns = direction in ("right", "left")
    lines, places = (width, height) if columns else (height, width)
    order = range(lines - 1, -1, -1) if direction in ("left", "up") else range(lines)
    at = (lambda t, p: (p, t)) if columns else (lambda t, p: (t, p))
    h = torch.zeros(channels, height, width, dtype=torch.float64)
    for c in range(channels):
        before = None
        for step, t in enumerate(order):
            for p in range(places):
                i, j = at(t, p)
                total = float(gate[c, i, j]) * float(x[c, i, j])
                if before is not None and not (segment and step % segment == 0):
                    neighbours = [k for k in (-1, 0, 1) if 0 <= p + k < places]
                    logit = {k: max(float(logits[c * groups // channels, k + 1, i, j]), -28.0) for k in neighbours}
                    sigmoid = {k: 1 / (1 + 2.718281828459045 ** -logit[k]) for k in neighbours}
                    for k in neighbours:
                        total += sigmoid[k] / sum(sigmoid.values()) * float(h[(c, *at(before, p + k))])
                h[c, i, j] = total
            before = t
    return h


def random_problem(batch, channels, height, width, features, groups=None, directions=4, dtype=torch.float64, skip=True):
    """x, proxy and projections for gspn.propagate; weights that vary, gates of both signs."""
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64).to(dtype)  # noqa: E731
    groups = channels if groups is None else groups
    return [
        draw(batch, channels, height, width),
        draw(batch, features, height, width),
        draw(directions, 3, groups, features),
        draw(directions, channels, features),
        draw(directions, channels, features),
        draw(channels, features) if skip else None,
    ]
