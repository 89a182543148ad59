"""The options of `gspn train`, beside those that trainings share (training.py)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from gspn.options.base import OptionSet, option, parse_model_args
from gspn.options.task import TaskSpec
from gspn.options.training import DATA_HELP, INIT_FROM, DataOptions, LoopOptions
from gspn.places import check_file, run_folder


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(OptionSet):
    """How training images and labels are augmented."""

    panel: ClassVar = "Augmentation"

    preset: str | None = option(
        None,
        "Values for options that are not given: digits, idx, fashion, small, photos, imagenet. Default: by the data.",
    )
    augment: str | None = option(
        None,
        "none, shift (by up to an eighth; small images) or crop (random boxes; photos).",
        choices=("none", "shift", "crop"),
    )
    flip: bool | None = option(None, "Mirror half of the images.")
    crop_area: float | None = option(
        None, "crop: the smallest box, as a fraction of the image.", low=0.01, high=1, fallback=0.25
    )
    erase: float | None = option(
        None, "Probability of erasing a random box (filled with noise).", low=0, high=1, fallback=0.0
    )
    rand_augment: str | None = option(
        None, "RandAugment of timm: m9-mstd0.5-inc1 in the published recipe, or none.", fallback="none"
    )
    color_jitter: float | None = option(
        None,
        "Jitter of brightness, contrast and saturation, by timm; only without RandAugment.",
        low=0,
        high=1,
        fallback=0.0,
    )
    mixup: float | None = option(
        None,
        "Blend pairs of images, by timm: alpha of the beta distribution; 0 for never.",
        low=0,
        high=100,
        fallback=0.0,
    )
    cutmix: float | None = option(
        None,
        "Paste boxes between pairs, by timm: alpha of the beta distribution; 0 for never.",
        low=0,
        high=100,
        fallback=0.0,
    )
    mix_switch: float = option(0.5, "Probability of cutmix where mixup is on too.", low=0, high=1)
    label_smoothing: float | None = option(
        None, "Fraction of the target spread over all classes.", low=0, high=0.99, fallback=0.1
    )


@dataclass(frozen=True, kw_only=True)
class ModelOptions(OptionSet):
    """The model."""

    panel: ClassVar = "Model"

    model: str | None = option(
        None,
        "gspn_mobile, gspn_micro, gspn_tiny, gspn_small, gspn_base. Default: that of --init-from; else gspn_micro to "
        "classify grey images and gspn_mobile otherwise.",
        complete=("gspn_micro", "gspn_mobile", "gspn_tiny", "gspn_small", "gspn_base"),
    )
    model_args: Mapping = option(
        {},
        "An argument of the model, as a JSON value; repeatable.",
        parse=parse_model_args,
        flag="--model-arg",
        metavar="KEY=VALUE",
    )
    init_from: str | None = option(
        None,
        "Start from trained weights: a run folder, a saved model, a .safetensors file, a published .pth.",
        metavar="RUN|FILE",
        path=True,
    )
    channels_last: bool = option(False, "Use the memory format channels_last.")
    compile: bool = option(False, "Compile the model with torch.compile.")


@dataclass(frozen=True, kw_only=True)
class Options(DataOptions, RecipeOptions, LoopOptions, ModelOptions):
    """All options of `gspn train`; the data and their preset replace None."""

    def check_paths(self):
        if self.init_from:
            check_file(run_folder(self.init_from), "init_from", INIT_FROM)

    def idle(self):
        found = super().idle()
        if self.mix_switch != type(self).mix_switch and not (self.mixup and self.cutmix):
            found.append("--mix-switch does nothing unless both --mixup and --cutmix are on")
        return found


SPEC = TaskSpec(
    name="classification",
    command="train",
    help="""Train a classifier on DATA, evaluate its best checkpoint, and draw curves, predictions and influence maps.

    Options that are not given follow from the kind of data, and are printed.
    Example: gspn train digits --out runs/first
    """,
    module="gspn.tasks.classify",
    options=Options,
    takes_own_runs=True,
    data_help=DATA_HELP,
    label=lambda options: options.model or ("finetuned" if options.init_from else "gspn"),
    drawn=("curves.png", "predictions.png", "context.png", "context-*.png"),
    taken_by="gspn eval, predict, show and export take it, and gspn.load_run in Python",
)
