"""The cases of the scan on a GPU, how many bytes each has to move, and the goals.

The bytes are the fewest that the design can move: every map is read or written once for each direction, the
normalisation is fused, and the hidden states are kept.
"""

from typing import NamedTuple

import torch

from benchmarks.harness.gpu_harness import best_ms

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
DIRECTIONS = [0, 1, 2, 3]
SIZES = {  # B, C, H, W
    "a": (16, 8, 1024, 1024),
    "b1": (128, 96, 56, 56),
    "b2": (128, 192, 28, 28),
    "b3": (128, 384, 14, 14),
    "b4": (128, 768, 7, 7),
    "c1": (2, 640, 64, 64),
    "c2": (2, 1280, 32, 32),
    "c3": (2, 640, 512, 1024),
    "c4": (2, 1280, 256, 512),
    "d1": (32, 1152, 16, 16),
    "d2": (256, 1152, 32, 32),
    # the eight of the bandwidth table of arXiv 2512.07884
    "p1": (32, 196, 32, 32),
    "p2": (1, 768, 64, 64),
    "p3": (1, 1152, 64, 64),
    "p4": (1, 32, 64, 64),
    "p5": (1, 32, 128, 128),
    "p6": (1, 64, 256, 256),
    "p7": (8, 64, 256, 256),
    "p8": (1, 128, 512, 512),
}
TOY_SIZES = {"toy square": (1, 8, 2, 2), "toy oblong": (1, 8, 1, 2)}
FIRST = ("b1", "b2", "d2", "c1", "a")  # those with goals: measured before the others
SHARING = 8  # channels that share weights, where they do
OURS = "gspn"
LINES = "one launch a line"
PREPARED = "one launch a line, with its preparation"
REFERENCE = "eager reference"


def sharing(channels: int) -> int:
    """How many channels share weights in the shared cases: SHARING, or the next smaller number that divides them."""
    return next(n for n in range(SHARING, 0, -1) if channels % n == 0)


class Case(NamedTuple):
    """One measurement: a size, a dtype, how weights are shared, and a pass."""

    size: str
    shape: tuple[int, int, int, int]
    dtype: str
    shared: bool
    train: bool

    def __str__(self) -> str:
        batch, channels, height, width = self.shape
        weights = "shared" if self.shared else "per channel"
        step = "backward" if self.train else "forward"
        return f"{self.size}: B{batch} C{channels} {height}x{width}, {self.dtype}, {weights}, {step}"

    @property
    def channels_a_group(self) -> int:
        return sharing(self.shape[1]) if self.shared else 1

    @property
    def elements(self) -> int:
        """Elements of the hidden states of four directions."""
        batch, channels, height, width = self.shape
        return len(DIRECTIONS) * batch * channels * height * width

    @property
    def bytes_moved(self) -> float:
        """Forward: x, gate, h and three logits. Backward: the gradient of h, h, its adjoint, three logits and their
        gradients; then, elementwise, gate and x read and the gradients of both written (3.5 an element, for x is
        shared by the directions)."""
        logits = 3 / self.channels_a_group
        maps = 3 + 2 * logits + 3.5 if self.train else 3 + logits
        return maps * self.elements * DTYPES[self.dtype].itemsize

    @property
    def resident_gib(self) -> float:
        """GiB of everything that is in memory at once: about the bytes moved, and one map of slack."""
        maps = (8.5 if self.train else 3.25) + (6 if self.train else 3) / self.channels_a_group
        return maps * self.elements * DTYPES[self.dtype].itemsize / 2**30


def cases(quick: bool, rehearsal: bool) -> list[Case]:
    """The cases, the most important first; quick omits float32 and sharing at sizes without a goal."""
    if rehearsal:
        square, oblong = (Case(name, shape, "bfloat16", False, False) for name, shape in TOY_SIZES.items())
        return [square, square._replace(train=True), square._replace(shared=True, dtype="float32"), oblong]
    found = []
    for number, (dtype, shared, train) in enumerate(
        [
            ("bfloat16", False, False),
            ("bfloat16", False, True),
            ("float32", False, False),
            ("bfloat16", True, False),
            ("float32", False, True),
            ("bfloat16", True, True),
            ("float32", True, False),
            ("float32", True, True),
        ]
    ):
        order = sorted(SIZES, key=lambda s: (s not in FIRST, s in ("c3", "c4")))
        for size in order:
            if not (quick and number >= 2 and size not in FIRST):
                found.append(Case(size, SIZES[size], dtype, shared, train))
    return sorted(found, key=lambda c: c.size not in FIRST)


def goals(results: dict, layers: dict) -> list[dict]:
    """What was aimed at on an H100, each with what was measured: reached, missed or not measured."""
    found = []

    def add(goal: str, wanted: float, got: float | None, form: str) -> None:
        verdict = "not measured" if got is None else "reached" if got >= wanted else "missed"
        told = None if got is None else form.format(got)
        found.append({"goal": goal, "wanted": form.format(wanted), "measured": told, "verdict": verdict})

    forward = lambda size: results.get(str(Case(size, SIZES[size], "bfloat16", False, False)), {})  # noqa: E731
    for size in FIRST:
        batch, channels, height, width = SIZES[size]
        share = forward(size).get(OURS, {}).get("of copy")
        least, most = (0.6, 0.7) if size in ("c1", "a") else (0.8, 0.9)
        name = f"share of copy bandwidth, forward, bfloat16, B{batch} C{channels} {height}x{width}"
        add(name, least, share, "{:.0%}")
        add(f"{name} (stretch)", most, share, "{:.0%}")
    row = forward("a")
    times = [best_ms(row.get(name, {})) for name in (OURS, LINES)]
    share = row.get(LINES, {}).get("of copy")
    add(
        "times the speed of one launch a line, B16 C8 1024x1024",
        40,
        times[1] / times[0] if all(times) else None,
        "{:.1f}",
    )
    add("its own share of copy bandwidth, so that it is a fair one", 0.03, share, "{:.1%}")
    for name, row in layers.items():
        if "bfloat16" in name and "forward" in name and row.get("side", 0) >= 32:
            times = [best_ms(row.get(n, {})) for n in (OURS, "attention")]
            add(f"times the speed of attention, {name}", 1, times[1] / times[0] if all(times) else None, "{:.2f}")
    return found
