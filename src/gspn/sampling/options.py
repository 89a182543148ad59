"""The options of `gspn sample`. Imports nothing that is slow to import, and not diffusers."""

from dataclasses import dataclass
from typing import ClassVar

from gspn.options import OptionSet, option, parse_size

SCHEDULERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpm-solver++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
}
PER_CLASS = 8


@dataclass(frozen=True, kw_only=True)
class SampleOptions(OptionSet):
    """What to sample, and how."""

    panel: ClassVar = "Samples"

    classes: str = option("all", "Names or numbers of classes with commas between them, or all.", metavar="NAME,3,...")
    per_class: int | None = option(None, f"Images of each class. Default: {PER_CLASS}.", low=1, high=100_000_000)
    count: int | None = option(None, "Images in total; the classes take turns.", low=1, high=100_000_000)
    guidance: float = option(4.0, "Weight of the class: 1 is no guidance.", low=0)
    steps: int = option(50, "Steps from noise to image.", low=1, high=100_000)
    size: tuple | None = option(
        None, "Size of the images in pixels: N or HxW. Default: as in training.", parse=parse_size, metavar="N|HxW"
    )
    scheduler: str | None = option(
        None, f"{', '.join(SCHEDULERS)}. Default: the generator's own.", choices=tuple(SCHEDULERS)
    )
    seed: int = option(0, "Random seed: the same seed gives the same images.", low=0, high=2**63 - 1)
    precision: str = option("fp32", "Precision of the model: fp32 or bf16.", choices=("fp32", "bf16"))
    batch_size: int = option(16, "Images at a time, in each process.", low=1, high=1_000_000, resumable=True)
    grid: bool = option(True, "Draw grid.png, the first images of each class.", resumable=True)
    npz: bool = option(False, "Write samples.npz, as ADM's evaluation takes it.", resumable=True)
