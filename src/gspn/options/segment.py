"""The options of `gspn train-segmentation`, beside those that trainings share, and of `gspn segment`."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from gspn.options.base import REQUIRED, OptionSet, numbers_of, option, parse_names, parse_size
from gspn.options.classifiers import RunOptions, WriteOptions
from gspn.options.classify import ModelOptions
from gspn.options.task import TaskSpec
from gspn.options.training import INIT_FROM, LoopOptions
from gspn.places import OptionError, check_file, run_folder

MASKED_HELP = (
    "A folder with images/ and masks/ (PNGs of indices or with a palette, of the same names), with or without train/ "
    "and val/; tar files (webdataset: 0001.jpg, 0001.seg.png), or what Hugging Face datasets loads, with two columns "
    "of images."
)
UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_weights(value):
    """ "none", "balanced", or ("0.5", "2", ...) as a tuple of numbers."""
    if value in ("none", "balanced"):
        return value
    numbers = numbers_of(value)
    if not numbers or not all(0 <= number < float("inf") for number in numbers) or not any(numbers):
        raise ValueError("none, balanced, or a number for each class with commas between them")
    return numbers


def parse_ignored(value):
    """("255", "void") from "255,void" or a list, which may be empty."""
    return () if value in (None, "", (), []) else parse_names(value)


def parse_memory(value):
    """Bytes from "2GB" or "512MiB"; a number alone is more likely a forgotten unit than bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?)B?", str(value).strip().upper())
    if not found or not 0 < float(found[1]) < float("inf"):
        raise ValueError("a size with a unit such as 2GB, 512MB or 1GiB")
    return int(float(found[1]) * UNITS[found[2]])


@dataclass(frozen=True, kw_only=True)
class MaskOptions(OptionSet):
    """How images and masks are read."""

    panel: ClassVar = "Data"

    size: tuple | None = option(
        None,
        "Size of the random crops in training: N or HxW. Default: that of the largest images, at most 512.",
        parse=parse_size,
        metavar="N|HxW",
    )
    scale: float = option(
        1.0,
        "Resize all images by this factor; predictions are brought back to the size of the masks.",
        low=0.01,
        high=16,
    )
    channels: int | None = option(None, "Convert the images to 1 (grey) or 3 (colour) channels.", choices=(1, 3))
    classes: str | None = option(
        None,
        "A JSON file with the classes: names, values in the masks, colours. Default: classes.json in DATA, "
        "id2label.json of a data set on the hub, or else one class for each value that occurs.",
        metavar="FILE",
        path=True,
    )
    ignore: tuple | None = option(
        None,
        'Values of pixels that do not count, or names of classes: 255,void; or "" for none. Default: 255.',
        parse=parse_ignored,
        metavar="NAMES",
    )
    val_fraction: float = option(
        0.1, "Fraction of the images to hold out where DATA has no evaluation split.", low=0, high=1
    )
    image_column: str | None = option(None, "datasets: the column with the images.")
    mask_column: str | None = option(None, "datasets: the column with the masks.")
    workers: int = option(2, "Processes that decode image files.", low=0, high=1024, resumable=True)
    strict: bool = option(False, "Stop at an unreadable image or mask, instead of leaving it out.")


@dataclass(frozen=True, kw_only=True)
class MaskRecipeOptions(OptionSet):
    """How training images and masks are augmented, and the loss."""

    panel: ClassVar = "Augmentation and loss"

    min_scale: float = option(0.5, "The smallest factor by which a training image is resized.", low=0.05, high=16)
    max_scale: float = option(2.0, "The largest one.", low=0.05, high=16)
    flip: bool = option(True, "Mirror half of the images.")
    jitter: float = option(0.4, "How much brightness, contrast and saturation change.", low=0, high=1)
    class_weights: str | tuple = option(
        "none",
        "Weights of the classes in the loss: none, balanced (rare ones more, by the median frequency), or numbers.",
        parse=parse_weights,
        metavar="none|balanced|W,W,...",
    )
    dice: float = option(0.0, "Weight of the Dice loss, beside the cross-entropy.", low=0, high=100)

    def __post_init__(self):
        super().__post_init__()
        if self.min_scale > self.max_scale:
            raise OptionError(f"min_scale must be at most max_scale, got {self.min_scale} and {self.max_scale}")


PRESET = dict(epochs=60, batch_size=8, lr=2e-3, warmup=2.0, ema=0.99)
MOBILE = dict(lr=4e-3, optimizer="muon")  # gspn_mobile from random weights: what was measured


@dataclass(frozen=True, kw_only=True)
class SegmentationOptions(MaskOptions, MaskRecipeOptions, LoopOptions, ModelOptions):
    """All options of `gspn train-segmentation`; PRESET and the data replace None."""

    presets: ClassVar = {"gspn_mobile from random weights": PRESET | MOBILE, "others": PRESET}

    def check_paths(self):
        if self.init_from:
            check_file(run_folder(self.init_from), "init_from", INIT_FROM)
        if self.classes:
            check_file(self.classes, "classes", "a JSON file with the classes")


@dataclass(frozen=True, kw_only=True)
class SegmentArguments(WriteOptions, RunOptions):
    """All options of `gspn segment`."""

    run: Path = option(
        REQUIRED,
        "A run folder of `gspn train-segmentation`, or a saved model.",
        metavar="RUN",
        argument=True,
        parse=run_folder,
    )
    images: list[Path] = option(REQUIRED, "Image files of any kind and size.", metavar="IMAGE...", argument=True)
    out: Path | None = option(None, "The folder for the pictures. Default: RUN/segmented.")
    max_memory: int | None = option(
        None,
        "What a picture may take in memory, beside the program and the model. Larger ones are segmented in overlapping "
        "tiles. Default: what is free, for more than 4 megapixels.",
        parse=parse_memory,
        metavar="2GB",
    )
    strict: bool = option(False, "Stop at an unreadable image, instead of leaving it out.")
    as_json: bool = option(False, "Print JSON: the share of each class in each image.", flag="--json")


SPEC = TaskSpec(
    name="segmentation",
    command="train-segmentation",
    help="""Train a model that gives each pixel a class, on images with masks; draw curves and predictions.

    Masks hold the number of a class in each pixel. Images may have any size, and differ in it.
    Example: gspn train-segmentation street --classes classes.json --out runs/street
    """,
    module="gspn.tasks.segment",
    options=SegmentationOptions,
    data_help=MASKED_HELP,
    label=lambda options: options.model or ("finetuned" if options.init_from else "gspn"),
    drawn=("curves.png", "predictions.png", "confusion.png", "segmented/*.png", "context-*.png"),
    taken_by="gspn eval, segment, show and export take it, and gspn.load_run in Python",
)
