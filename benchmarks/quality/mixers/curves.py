"""Curves for the task `tracing`: random smooth lines that keep their distance from each other."""

import numpy as np

MARGIN = 2.0  # pixels between a curve and the border
APART = 5.0  # pixels between two curves, and between parts of one that are not near each other along it
TURN = 0.12  # radians: the deviation of a step's change of the curvature
BEND = 0.35  # radians a step: the largest curvature
TRIES = 32  # candidates that are drawn at once


def curves(count: int, length: int, side: int, source: np.random.Generator) -> list[np.ndarray]:
    """`count` curves of `length` steps of a pixel within a square of `side` pixels: (length, 2) each, row and column,
    float. Each begins anywhere."""
    for _ in range(1000):
        found: list[np.ndarray] = []
        while len(found) < count:
            candidate = next((c for c in _candidates(length, side, source) if _keeps_apart(c, found)), None)
            if candidate is None:
                break  # those before leave no room
            found.append(candidate)
        else:
            return found
    raise RuntimeError(f"{count} curves of {length} pixels were not found in {side}x{side}")


def _candidates(length, side, source):
    """Those of TRIES random curves that stay inside. The curvature is a random walk that is kept within bounds."""
    start = source.uniform(MARGIN, side - MARGIN, (TRIES, 1, 2))
    bends = source.uniform(-BEND, BEND, (TRIES, 1)) / 2 + source.normal(0, TURN, (TRIES, length)).cumsum(1)
    heading = source.uniform(0, 2 * np.pi, (TRIES, 1)) + (BEND * np.sin(bends / BEND)).cumsum(1)
    points = start + np.stack([np.sin(heading), np.cos(heading)], -1).cumsum(1)
    return points[((points > MARGIN) & (points < side - MARGIN)).all((1, 2))]


def _keeps_apart(found, others):
    if any(_distances(found, other).min() < APART for other in others):
        return False
    along = np.abs(np.arange(len(found))[:, None] - np.arange(len(found)))
    return _distances(found, found)[along > 3 * APART].min(initial=APART) >= APART


def _distances(a, b):
    return np.sqrt(((a[:, None] - b) ** 2).sum(-1))
