"""The options of `gspn distill`, beside those that all trainings share (options.py). Imports nothing that is slow to
import, and not diffusers."""

from dataclasses import dataclass
from typing import ClassVar

from gspn.options import LoopOptions, OptionSet, option, parse_size


@dataclass(frozen=True, kw_only=True)
class CaptionOptions(OptionSet):
    """How images and captions are found and read."""

    panel: ClassVar = "Data"

    size: tuple | None = option(
        None,
        "Of the images in pixels, which are resized and cropped at their middle: N or HxW. Default: as BASE was made "
        "for.",
        parse=parse_size,
        metavar="N|HxW",
    )
    val_fraction: float = option(0.05, "Part of the images to hold out where DATA has no evaluation split.")
    image_column: str | None = option(None, "datasets: the column with the images.")
    caption_column: str | None = option(None, "The column, or the member of JSON, with the captions.")
    streaming: bool = option(False, "datasets: take the rows as they come, without a copy of the table in its cache.")
    workers: int = option(2, "Processes that decode image files.", low=0, high=1024, same_result=True)
    cache: bool = option(
        False, "Keep latents and encoded captions in memory, for data that fit there and are gone through often."
    )
    strict: bool = option(False, "An unreadable image is an error, not left out and named.")


@dataclass(frozen=True, kw_only=True)
class TeachingOptions(OptionSet):
    """What is learned, and from what."""

    panel: ClassVar = "Distillation"

    noise_weight: float = option(1.0, "Of the loss against what the noise was.", low=0, high=1e6)
    output_weight: float = option(0.5, "Of the loss against the teacher's prediction.", low=0, high=1e6)
    feature_weight: float = option(
        0.5, "Of the loss against the outputs of the teacher's attentions, their mean.", low=0, high=1e6
    )
    caption_dropout: float = option(
        0.1, "How often a caption is replaced by the empty one, for guidance.", low=0, high=1
    )
    flip: bool = option(False, "Mirror half of the images.")


@dataclass(frozen=True, kw_only=True)
class DistillWatchOptions(OptionSet):
    """What is looked at during training."""

    panel: ClassVar = "Watching"

    eval_images: int = option(256, "Images of the evaluation split that the validation loss is taken of.", low=1)
    sample_every: int = option(
        1, "Draw teacher and student after every so manieth epoch; 0 for never.", low=0, same_result=True
    )
    sample_captions: int = option(
        8, "How many captions of the evaluation split to draw.", low=1, high=60, same_result=True
    )
    sample_steps: int = option(25, "Steps of a sample's making.", low=2, same_result=True)
    guidance: float = option(7.0, "Guidance of these samples; 1 is none.", low=0, same_result=True)


@dataclass(frozen=True, kw_only=True)
class SwapOptions(OptionSet):
    """What takes the place of self-attention."""

    panel: ClassVar = "Model"

    base: str | None = option(
        None,
        "The pipeline to learn from: a folder, or a name on the hub.",
        metavar="PATH|NAME",
        same_result=True,
        path=True,
    )
    variant: str | None = option(None, "Of BASE's files, such as fp16.", same_result=True)
    form: str = option("pure", "pure, or qkv: with projections Q, K and V.", choices=("pure", "qkv"))
    segment: int | None = option(None, "Lines after which a scan begins anew. Default: never.", low=1)
    init: str = option(
        "pretrained", "Start from the attentions' weights (pretrained), or random.", choices=("pretrained", "random")
    )
    fit: int = option(0, "Steps in which each layer first learns its attention's output; 0 for none.", low=0)
    fit_maps: int = option(256, "Feature maps that it learns this from.", low=2, high=1_000_000)
    gradient_checkpointing: bool = option(False, "Compute activations twice, to keep fewer.")


# What is None in the options. The learning rate and bfloat16 are the paper's authors'; float16 overflows in SDXL.
PRESET = dict(epochs=5, batch_size=16, lr=1e-4, warmup=0.1, weight_decay=0.01, clip=1.0, ema=0.999, precision="bf16")


@dataclass(frozen=True, kw_only=True)
class DistillOptions(CaptionOptions, DistillWatchOptions, TeachingOptions, LoopOptions, SwapOptions):
    """Everything that `gspn distill` can be told; what is None is filled in."""

    presets: ClassVar = {"all": PRESET}
