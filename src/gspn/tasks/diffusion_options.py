"""The options of `gspn train-diffusion`, beside those that all trainings share (options.py). Imports nothing that is
slow to import, and not diffusers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from gspn.options import DataOptions, LoopOptions, OptionSet, option, parse_model_args


@dataclass(frozen=True, kw_only=True)
class DiffusionOptions(OptionSet):
    """What is learned."""

    panel: ClassVar = "Diffusion"

    prediction: str | None = option(
        None,
        "What the model predicts: epsilon (the noise), v_prediction (velocity) or sample.",
        choices=("epsilon", "v_prediction", "sample"),
        metavar="TYPE",
    )
    timesteps: int = option(1000, "Steps from an image to noise.", low=25, high=100_000)
    schedule: str | None = option(
        None,
        "How the noise grows: linear, scaled_linear, squaredcos_cap_v2 (cosine).",
        choices=("linear", "scaled_linear", "squaredcos_cap_v2"),
    )
    learn_sigma: bool = option(True, "Predict the variance too, learned by the variational bound.")
    class_dropout: float = option(
        0.1, "How often a class is replaced by the null class, for guidance.", low=0, high=0.9
    )
    flip: bool = option(False, "Mirror half of the images.")


@dataclass(frozen=True, kw_only=True)
class WatchOptions(OptionSet):
    """What is looked at during training."""

    panel: ClassVar = "Watching"

    eval_images: int = option(1000, "Images of the evaluation split that the validation loss is taken of.", low=1)
    sample_every: int = option(
        1, "Draw a grid of samples after every so manieth epoch; 0 for never.", low=0, same_result=True
    )
    sample_steps: int = option(25, "Steps of a sample's making (DPM-Solver++).", low=2, same_result=True)
    guidance: float = option(2.0, "Guidance of these samples; 1 is none.", low=0, same_result=True)


@dataclass(frozen=True, kw_only=True)
class GeneratorModelOptions(OptionSet):
    """What is trained."""

    panel: ClassVar = "Model"

    model: str | None = option(
        None,
        "GSPN-micro, S, B, L or XL with /2 or /4, such as GSPN-S/2; DiT-S/2 and the like to compare with.",
        otherwise="GSPN-micro/2",
    )
    model_args: Mapping = option(
        {},
        "An argument of the model, a JSON value; repeatable.",
        parse=parse_model_args,
        flag="--model-arg",
        metavar="KEY=VALUE",
    )
    gradient_checkpointing: bool = option(False, "Compute activations twice, to keep fewer.")
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
    """Everything that `gspn train-diffusion` can be told; what is None is filled in from the data."""

    presets: ClassVar = PRESETS
