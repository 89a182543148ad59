"""Launch parameters of the GPU scans: a plain function of the sizes, so that equal sizes always run the same program.

The parameters come in a few fixed shapes, so that few kernels are compiled however many sizes are used. The table comes
from what the compiler makes of each shape (registers, spills, barriers, vector loads, bytes in flight), within these
bounds: at most 32 elements a thread in the forward scan and 16 in the backward scan, else registers spill; one warp
where a line fits, because then strips exchange their borders by shuffles, without a barrier; 16 bytes a load.
"""

from typing import NamedTuple

HALO = 16  # places on either side of a tile, and so lines from launch to launch
TILE = 96  # places of a tile without its halo
FEW = 2  # programs for each multiprocessor, below which smaller programs are worth their price


class Plan(NamedTuple):
    """How a scan is cut into programs.

    Attributes:
        strips: strips of places, the tensor axis across lanes; a power of two.
        places: places in a strip, unrolled. strips * places is at least the length of a line, or of a tile with halo.
        channels: channels of a program, a power of two; strips * channels is 32 * warps at least, or lanes idle.
        warps: warps of a program.
        stages: lines being fetched at a time; 1 leaves fetching to the warps at hand.
        halo: 0, or the places on either side of a tile, where lines are cut into tiles.
    """

    strips: int
    places: int
    channels: int
    warps: int
    stages: int
    halo: int = 0

    @property
    def own(self) -> int:
        """Places that a program writes."""
        return self.strips * self.places - 2 * self.halo


# Longest line: strips, places, channels for 16-bit values, warps, stages.
_FORWARD = (
    (4, Plan(1, 4, 64, 1, 1)),
    (7, Plan(1, 7, 64, 1, 1)),
    (8, Plan(1, 8, 64, 1, 1)),
    (14, Plan(2, 7, 64, 2, 1)),
    (16, Plan(4, 4, 64, 1, 2)),
    (28, Plan(4, 7, 32, 2, 1)),
    (32, Plan(16, 2, 16, 1, 3)),
    (64, Plan(16, 4, 16, 1, 2)),
    (128, Plan(32, 4, 8, 1, 2)),
    (256, Plan(64, 4, 8, 2, 2)),
    (512, Plan(128, 4, 8, 4, 2)),
    (1024, Plan(256, 4, 8, 8, 2)),
)
_BACKWARD = (
    (4, Plan(1, 4, 64, 1, 1)),
    (7, Plan(1, 7, 64, 1, 1)),
    (8, Plan(1, 8, 32, 1, 1)),
    (14, Plan(2, 7, 32, 2, 1)),
    (16, Plan(8, 2, 16, 1, 1)),
    (28, Plan(4, 7, 16, 2, 1)),
    (32, Plan(16, 2, 8, 1, 1)),
    (64, Plan(32, 2, 8, 2, 2)),
    (128, Plan(32, 4, 8, 4, 1)),
    (256, Plan(64, 4, 8, 4, 1)),
    (512, Plan(128, 4, 4, 8, 1)),
    (1024, Plan(512, 2, 4, 16, 1)),
)
_TILED = {False: Plan(32, 4, 8, 1, 2, HALO), True: Plan(32, 4, 8, 4, 1, HALO)}


def plan(
    places: int, lines: int, channels: int, scans: int, bytes_each: int, backward: bool = False, processors: int = 132
) -> Plan:
    """The launch parameters for scans over `lines` lines of `places` places each.

    Args:
        places: length of a line (the longer one where directions of both axes run in one launch).
        lines: lines from the start of a scan, or of a segment, to its end.
        channels: channels of the map.
        scans: independent scans: images times directions times segments.
        bytes_each: bytes of a value in memory; wider ones come in narrower programs.
        backward: whether the adjoint is scanned.
        processors: multiprocessors of the GPU.
    """
    found = next((p for longest, p in (_BACKWARD if backward else _FORWARD) if places <= longest), None)
    if found is not None:
        found = _fit(found, channels, scans, bytes_each, processors)
        few = scans * -(-channels // found.channels) < FEW * processors
        # Tiles cost a launch for every HALO lines and a third of redundant reads from the cache.
        if not (few and places > 2 * TILE and lines >= 2 * HALO):
            return found
    return _fit(_TILED[backward], channels, scans, bytes_each, processors)


def _fit(found: Plan, channels: int, scans: int, bytes_each: int, processors: int) -> Plan:
    """The plan with its channels adapted: no more than the map has, half as many for wider values, and fewer where
    there would be too few programs; but no fewer than give each lane something to do."""
    wanted = min(found.channels, 1 << (channels - 1).bit_length())
    least = max(32 * found.warps // found.strips, 16 // bytes_each)
    if bytes_each > 2 and wanted > least:
        wanted //= 2
    while wanted > least and scans * -(-channels // wanted) < FEW * processors:
        wanted //= 2
    return found._replace(channels=wanted)


def blocks(plan: Plan, channels: int, share: int) -> tuple[int, int, int]:
    """(groups of a program, channels of each, blocks of channels) where `share` channels share weights."""
    members = min(1 << (share - 1).bit_length(), plan.channels)
    groups = plan.channels // members
    parts = -(-share // members)
    return groups, members, -(-(channels // share) // groups) * parts
