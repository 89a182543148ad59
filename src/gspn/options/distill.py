"""The options of `gspn distill`, beside those that trainings share (training.py)."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from gspn.options.base import OptionSet, option, parse_factors, parse_names, parse_size, parse_whole
from gspn.options.task import TaskSpec
from gspn.options.training import LoopOptions
from gspn.places import check_named


def parse_keep(value):
    """A whole number, or names as a tuple."""
    if isinstance(value, str) and value.strip().isdecimal():  # from a flag
        return int(value)
    if isinstance(value, int):
        return parse_whole(value)
    return parse_names(value)


@dataclass(frozen=True, kw_only=True)
class CaptionOptions(OptionSet):
    """How images and captions are read."""

    panel: ClassVar = "Data"

    size: tuple | None = option(
        None,
        "Size in pixels to which images are resized and centre-cropped: N or HxW. Default: that of BASE.",
        parse=parse_size,
        metavar="N|HxW",
    )
    sizes: tuple | None = option(
        None,
        "Train at several sizes: a batch's height and width are those of SIZE times one of these factors each. A "
        "factor that is given twice is drawn twice as often.",
        parse=parse_factors,
        metavar="F,F,...",
    )
    val_fraction: float = option(
        0.05, "Fraction of the images to hold out where DATA has no evaluation split.", low=0, high=1
    )
    image_column: str | None = option(None, "datasets: the column with the images.")
    caption_column: str | None = option(None, "The column, or the JSON key, with the captions.")
    streaming: bool = option(False, "datasets: read rows as a stream, without a copy in its cache.")
    workers: int = option(2, "Processes that decode image files.", low=0, high=1024, resumable=True)
    cache: bool = option(
        False, "Keep latents and encoded captions in memory, for small data and many epochs; not with --sizes."
    )
    strict: bool = option(False, "Stop at an unreadable image, instead of leaving it out.")


@dataclass(frozen=True, kw_only=True)
class TeachingOptions(OptionSet):
    """The loss and its targets."""

    panel: ClassVar = "Distillation"

    noise_weight: float = option(1.0, "Weight of the loss against the true noise.", low=0, high=1e6)
    output_weight: float = option(0.5, "Weight of the loss against the teacher's prediction.", low=0, high=1e6)
    feature_weight: float = option(
        0.5, "Weight of the mean loss against the outputs of the teacher's attention layers.", low=0, high=1e6
    )
    away_weight: float = option(
        0.0,
        "With --sizes: how much the teacher's prediction and attention count at other sizes than SIZE, where it was "
        "not trained. 0 learns from the images alone there, 1 as much as at SIZE.",
        low=0,
        high=1,
    )
    caption_dropout: float = option(
        0.1, "Probability of replacing a caption by the empty one, for guidance.", low=0, high=1
    )
    flip: bool = option(False, "Mirror half of the images.")


@dataclass(frozen=True, kw_only=True)
class DistillWatchOptions(OptionSet):
    """Validation and samples during training."""

    panel: ClassVar = "Watching"

    eval_images: int = option(256, "Images of the evaluation split for the validation loss.", low=1)
    sample_every: int = option(
        1, "Draw samples of teacher and student every N epochs; 0 for never.", low=0, resumable=True
    )
    sample_captions: int = option(
        8, "How many captions of the evaluation split to draw.", low=1, high=60, resumable=True
    )
    sample_steps: int = option(25, "Sampling steps.", low=2, resumable=True)
    guidance: float = option(7.0, "Guidance scale of these samples; 1 for none.", low=1, resumable=True)


@dataclass(frozen=True, kw_only=True)
class SwapOptions(OptionSet):
    """What replaces self-attention."""

    panel: ClassVar = "Model"

    base: str | None = option(
        None,
        "The Stable Diffusion or SDXL pipeline to learn from: a folder, or a name on the hub.",
        metavar="BASE",
        argument=True,
        resumable=True,
        path=True,
    )
    variant: str | None = option(None, "Variant of BASE's files, such as fp16.", resumable=True)
    form: str = option("pure", "pure, or qkv, with projections Q, K and V.", choices=("pure", "qkv"))
    segment: int | None = option(None, "Lines per segment of a scan. Default: the whole map.", low=1)
    proxy_dim: int | None = option(
        None,
        "Width of the proxies that predict weights and gates. Default: an eighth of the channels in form pure, a 32nd "
        "in form qkv, as published.",
        low=1,
        high=65536,
    )
    init: str = option(
        "pretrained",
        "Initial weights: those of the attention layers (pretrained), or random.",
        choices=("pretrained", "random"),
    )
    keep_attention: tuple | int | None = option(
        None,
        "Attentions that stay: lowest (the smallest maps), level:N (maps that were halved N times), names or globs of "
        "names, with commas between them. Or a number K: those K whose replacement costs most after --fit.",
        parse=parse_keep,
        metavar="WHICH|K",
    )
    fit: int = option(0, "Steps in which each layer first learns the output of its attention layer; 0 for none.", low=0)
    fit_maps: int = option(256, "Feature maps for --fit.", low=2, high=1_000_000)
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass, to save memory.")


# The values of options that are None. Learning rate and bfloat16 are the paper's authors'; float16 overflows in SDXL.
PRESET = dict(epochs=5, batch_size=16, lr=1e-4, warmup=0.1, weight_decay=0.01, clip=1.0, ema=0.999, precision="bf16")


@dataclass(frozen=True, kw_only=True)
class DistillOptions(CaptionOptions, DistillWatchOptions, TeachingOptions, LoopOptions, SwapOptions):
    """All options of `gspn distill`; PRESET replaces None."""

    presets: ClassVar = {"all": PRESET}

    def idle(self):
        found, default = super().idle(), type(self)
        if self.fit_maps != default.fit_maps and not self.fit:
            found.append("--fit-maps does nothing without --fit")
        for name in ("sample_captions", "sample_steps", "guidance"):
            if getattr(self, name) != getattr(default, name) and not self.sample_every:
                found.append(f"--{name.replace('_', '-')} does nothing with --sample-every 0, which draws no samples")
        if self.away_weight and not self.output_weight + self.feature_weight:
            found.append("--away-weight does nothing where --output-weight and --feature-weight are both 0")
        return found

    def check_paths(self):
        check_named(self.base, "BASE", "the folder of a pipeline, or a name on the hub")


SPEC = TaskSpec(
    name="distillation",
    command="distill",
    help="""Distil a Stable Diffusion or SDXL pipeline into one with GSPN in the place of self-attention.

    After every epoch that is the best so far, the run folder holds what gspn.load_swap(pipe, RUN) reads.
    Example: gspn distill models/sd15 --data photos --out runs/sd15 --segment 4
    """,
    module="gspn.tasks.distill",
    extra="diffusion",
    options=DistillOptions,
    data_help="Images with captions: a folder with metadata.jsonl, .csv or .parquet or a .txt beside each image, tar "
    "files (webdataset), or what Hugging Face datasets loads.",
    label=lambda options: Path(options.base).name or "base",
    written=("samples/epoch-*.png", "gspn_swap.safetensors"),
    drawn=("curves.png",),
    taken_by='its layers go into a pipeline: gspn.load_swap(pipe, "{}")',
)
