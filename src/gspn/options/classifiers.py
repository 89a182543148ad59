"""The options of the commands around classifiers: eval, predict, show, export."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from gspn import weights
from gspn.options.base import (
    REQUIRED,
    OptionSet,
    check_suffix,
    option,
    parse_block,
    parse_position,
    parse_size,
    parse_sizes,
)
from gspn.options.training import DATA_HELP, ReadOptions
from gspn.places import OptionError, called, check_file, check_named, check_run, is_generator, run_folder


@dataclass(frozen=True, kw_only=True)
class RunOptions(OptionSet):
    """A run."""

    plain: ClassVar = True

    run: Path = option(
        REQUIRED,
        "A run folder, a saved model, or the name of trained weights: digits.",
        metavar="RUN",
        argument=True,
        parse=run_folder,
    )
    checkpoint: str = option("best", "Which checkpoint: best or last.")

    def check_paths(self):
        check_run(self.run)

    def beside(self, name: str) -> Path:
        """Where a file goes by default: into the run's folder, or for weights of an installed package into the current
        one."""
        return Path(name) if weights.root() in self.run.parents else self.run / name


@dataclass(frozen=True, kw_only=True)
class WriteOptions(OptionSet):
    """A command that writes files."""

    plain: ClassVar = True

    overwrite: bool = option(False, "Replace an existing file or folder.")


# The options of `gspn eval` that only runs of one task have.
OF_SEGMENTATION = ("scale", "mask_column")
OF_CLASSIFICATION = ("sizes", "channels", "streaming", "class_names", "label_column")


@dataclass(frozen=True, kw_only=True)
class EvalOptions(ReadOptions, WriteOptions, RunOptions):
    """All options of `gspn eval`."""

    data: str = option(REQUIRED, DATA_HELP, metavar="DATA", argument=True)
    split: str | None = option(None, "train, val, test or all. Default: test, else val.")
    batch_size: int = option(256, "Images per batch.", low=1, high=1_000_000)
    sizes: tuple | None = option(
        None, "Input sizes, evaluated in turn. Default: that of the run.", parse=parse_sizes, metavar="N|HxW,..."
    )
    scale: float | None = option(
        None, "Segmentation: the factor on the images' size. Default: that of the run.", low=0.01, high=16
    )
    mask_column: str | None = option(None, "Segmentation, datasets: the column with the masks.")
    channels: int | None = option(None, "Convert the images to 1 (grey) or 3 (colour) channels.")
    streaming: bool | None = option(None, "datasets: read rows as a stream, without a copy in its cache.")
    out: Path | None = option(
        None,
        "A folder for evaluation-HxW.json and confusion-HxW.png; of segmentation without HxW, and predictions.png.",
    )
    as_json: bool = option(False, "Print JSON, one line per size.", flag="--json")

    def __post_init__(self):
        super().__post_init__()
        twice = [size for size, count in Counter(self.sizes or ()).items() if count > 1]
        if twice:
            raise OptionError(f"sizes holds {'{}x{}'.format(*twice[0])} more than once: expected distinct sizes")

    def check_paths(self):
        super().check_paths()
        check_named(self.data, "DATA", DATA_HELP)

    def of_task(self, task: str) -> dict:
        """The values of the options that the evaluation of a run of this task has, but for run and data.
        Errors: OptionError for the options of another task."""
        without = OF_SEGMENTATION if task != "segmentation" else OF_CLASSIFICATION
        for name in without:
            if getattr(self, name) is not None:
                hint = "; --scale resizes its images" if name == "sizes" else ""
                of = f"a run of {task or 'no task'}"
                raise OptionError(f"--{name.replace('_', '-')} is not for {self.run}, {of}{hint}")
        return self.values("run", "data", "sizes", "as_json", *without)


@dataclass(frozen=True, kw_only=True)
class PredictOptions(RunOptions):
    """All options of `gspn predict`."""

    images: list[Path] = option(REQUIRED, "Image files of any kind.", metavar="IMAGE...", argument=True)
    top: int = option(5, "Number of classes to print.", low=1)
    strict: bool = option(False, "Stop at an unreadable image, instead of leaving it out.")
    as_json: bool = option(False, "Print JSON.", flag="--json")


@dataclass(frozen=True, kw_only=True)
class ShowOptions(WriteOptions, RunOptions):
    """All options of `gspn show`."""

    image: Path = option(REQUIRED, "An image file.", metavar="IMAGE", argument=True)
    place: tuple | None = option(
        None, "The pixel, in the model's input. Default: the centre.", parse=parse_position, metavar="ROW,COL"
    )
    block: int | str | None = option(
        None,
        "The block: an index, negative from the end, or a name. Default: the last with a map of 8x8 or more; of a "
        "segmenter, the last.",
        parse=parse_block,
        metavar="NUMBER|NAME",
    )
    narrowest: bool = option(
        False, "Draw each direction for the channel with the narrowest context, not the mean over channels."
    )
    out: Path | None = option(None, "The PNG to write. Default: RUN/context-IMAGE.png.", suffix=".png")


# The options of `gspn export` that only some formats have, and these formats.
OF_FORMATS = {"opset": ("--onnx",), "precision": ("--onnx", "--hub"), "vae": ("--diffusers",)}
OF_FORMATS |= dict.fromkeys(("size", "batch", "no_check"), ("--onnx", "--aoti"))
OF_FORMATS |= dict.fromkeys(("license", "trained_on", "evaluation"), ("--hub",))


@dataclass(frozen=True, kw_only=True)
class ExportOptions(WriteOptions, RunOptions):
    """All options of `gspn export`."""

    onnx: bool = option(False, "An ONNX file of standard operators, for any runtime.")
    aoti: bool = option(False, "A package compiled for this CPU; needs torch and gspn.")
    diffusers: bool = option(False, "A generator as a folder for GSPNPipeline.from_pretrained.")
    hub: bool = option(False, "A classifier or segmenter as a folder with a model card, for the hub and load_run.")
    out: Path | None = option(
        None, "The file to write. Default: RUN/model.onnx, RUN/model.pt2, RUN/pipeline or RUN/saved."
    )
    checkpoint: str | None = option(None, "Which checkpoint: best or last. Default: best; of a generator last.")
    vae: str | None = option(None, "Where the VAE of a run of latents is now, if it was moved.", metavar="PATH|NAME")
    size: tuple | None = option(
        None, "Fix the input size of the file: N or HxW. Default: any size.", parse=parse_size, metavar="N|HxW"
    )
    batch: int | None = option(None, "Fix the batch size of the file. Default: any.")
    opset: int | None = option(None, "ONNX: opset version. Default: 20.")
    precision: str | None = option(None, "ONNX, hub: fp32 (default) or fp16.")
    no_check: bool = option(False, "Do not compare the file's outputs with the model's.")
    license: str | None = option(None, "Hub: the licence of the weights, such as cc-by-4.0, for the card.")
    trained_on: str | None = option(None, "Hub: what the card says about the data. Default: their name.")
    evaluation: Path | None = option(
        None, "Hub: an evaluation of `gspn eval --out`, whose figures the card shows.", metavar="FILE"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.onnx + self.aoti + self.diffusers + self.hub != 1:
            raise OptionError("choose one of --onnx, --aoti and --hub, or --diffusers for a generator")
        wanted = next(f"--{name}" for name in ("onnx", "aoti", "diffusers", "hub") if getattr(self, name))
        if suffix := self.suffix():
            check_suffix("out", self.out, suffix)
        for name, formats in OF_FORMATS.items():
            if getattr(self, name) not in (None, False) and wanted not in formats:
                raise OptionError(f"--{name.replace('_', '-')} is for {' and '.join(formats)}, not for {wanted}")
        if self.hub and self.precision not in (None, "fp32", "fp16"):
            raise OptionError(f"precision must be fp32 or fp16, got {self.precision!r}")

    def check_paths(self):
        if self.diffusers and is_generator(self.run):
            raise OptionError(f"{called(self.run)} is a folder for GSPNPipeline.from_pretrained already: {self.run}")
        super().check_paths()
        if self.evaluation:
            check_file(self.evaluation, "evaluation", "a JSON file of `gspn eval --out`")

    def suffix(self) -> str:
        """How the name of the file ends; empty for a folder."""
        return ".onnx" if self.onnx else ".pt2" if self.aoti else ""
