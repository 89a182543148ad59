"""The options of `gspn train-diffusion`, beside those that trainings share (training.py)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from gspn.options.base import OptionSet, option, parse_model_args
from gspn.options.task import TaskSpec
from gspn.options.training import DATA_HELP, DataOptions, LoopOptions

FAMILIES, SIZES = ("GSPN-DiT", "GSPN", "DiT"), ("micro", "S", "B", "L", "XL")
DEFAULT = "GSPN-DiT-micro/2"


def parse_range(value):
    """(0.75, 1.5) from "0.75,1.5" or two numbers."""
    try:
        low, high = map(float, value if isinstance(value, list | tuple) else str(value).split(","))
    except (TypeError, ValueError):
        raise ValueError("two factors with a comma between them, such as 0.75,1.5") from None
    if not 0 < low <= high < math.inf:
        raise ValueError("two positive factors, the smaller one first")
    return low, high


@dataclass(frozen=True, kw_only=True)
class DiffusionOptions(OptionSet):
    """The diffusion process and its loss."""

    panel: ClassVar = "Diffusion"

    prediction: str | None = option(
        None,
        "What the model predicts: epsilon (the noise), v_prediction (velocity) or sample.",
        choices=("epsilon", "v_prediction", "sample"),
        metavar="TYPE",
    )
    timesteps: int = option(1000, "Timesteps from image to noise.", low=25, high=100_000)
    schedule: str | None = option(
        None,
        "Noise schedule: linear, scaled_linear, squaredcos_cap_v2 (cosine).",
        choices=("linear", "scaled_linear", "squaredcos_cap_v2"),
    )
    learn_sigma: bool = option(True, "Predict the variance too, trained by the variational bound.")
    class_dropout: float = option(
        0.1, "Probability of replacing a class by the null class, for guidance.", low=0, high=0.9
    )
    flip: bool = option(False, "Mirror half of the images.")
    sizes: tuple | None = option(
        None,
        "Train at random sizes: a batch's height and width are the size times factors from LOW to HIGH. DiT takes "
        "squares only. GSPN-DiT is told the size.",
        parse=parse_range,
        metavar="LOW,HIGH",
    )


@dataclass(frozen=True, kw_only=True)
class WatchOptions(OptionSet):
    """Validation and samples during training."""

    panel: ClassVar = "Watching"

    eval_images: int = option(1000, "Images of the evaluation split for the validation loss.", low=1)
    sample_every: int = option(1, "Draw a grid of samples every N epochs; 0 for never.", low=0, resumable=True)
    sample_steps: int = option(25, "Sampling steps (DPM-Solver++).", low=2, resumable=True)
    guidance: float = option(2.0, "Guidance scale of these samples; 1 for none.", low=0, resumable=True)


@dataclass(frozen=True, kw_only=True)
class GeneratorModelOptions(OptionSet):
    """The model."""

    panel: ClassVar = "Model"

    model: str | None = option(
        None,
        "GSPN-DiT-S/2 (ours), GSPN-S/2 (the paper's), DiT-S/2 (for comparison), or micro, B, L, XL, or /4.",
        fallback=DEFAULT,
        complete=tuple(f"{family}-{size}/{patch}" for family in FAMILIES for size in SIZES for patch in (2, 4)),
    )
    model_args: Mapping = option(
        {},
        "An argument of the model, as a JSON value; repeatable.",
        parse=parse_model_args,
        flag="--model-arg",
        metavar="KEY=VALUE",
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass, to save memory.")
    compile: bool = option(False, "Compile the model with torch.compile.")


# By the kind of data: what is None in the options. Latents are trained on as the paper's authors do it, but for the
# batch, which is for one GPU; their learning rate of 1e-4 is for 1024 images. With the noise as target, small images'
# class is learned late: at high noise, where it decides, that target asks for next to nothing of the image.
PRESETS = {
    "pixels": dict(epochs=20, batch_size=64, lr=1e-3, warmup=0.2, weight_decay=0.0, clip=1.0, ema=0.999)
    | dict(prediction="v_prediction", schedule="squaredcos_cap_v2"),
    "latents": dict(epochs=80, batch_size=256, lr=1e-4, min_lr=1e-6, warmup=5, weight_decay=0.0, clip=1.0, ema=0.9999)
    | dict(prediction="epsilon", schedule="linear"),
}


@dataclass(frozen=True, kw_only=True)
class GeneratorOptions(DataOptions, WatchOptions, DiffusionOptions, LoopOptions, GeneratorModelOptions):
    """All options of `gspn train-diffusion`; the preset for the kind of data replaces None."""

    presets: ClassVar = PRESETS


SPEC = TaskSpec(
    name="diffusion",
    command="train-diffusion",
    help="""Train a class-conditional generator on DATA by denoising diffusion; draw samples and loss curves.

    Options that are not given follow from the kind of data, and are printed.
    Example: gspn train-diffusion digits --out runs/digits
    """,
    module="gspn.tasks.diffusion",
    extra="diffusion",
    options=GeneratorOptions,
    data_help=f"{DATA_HELP} Or a folder of latents that `gspn encode` made.",
    label=lambda options: (options.model or DEFAULT).replace("/", "-"),
    written=("samples/epoch-*.png",),
    drawn=("curves.png",),
    taken_by="gspn sample takes it, and gspn.load_run in Python",
)
