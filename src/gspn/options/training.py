"""The options that several trainings share, of the loop and of data with classes; how other commands read images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from gspn.options.base import OptionSet, option, parse_interval, parse_names, parse_size
from gspn.places import OptionError

INIT_FROM = "a run folder, a saved model, a .safetensors or a .pth file"
DATA_HELP = (
    "`digits` (embedded), a folder of class folders with images, a folder of MNIST-format idx files, tar files "
    "(webdataset), or anything that Hugging Face datasets loads: a folder made by save_to_disk, a parquet, arrow, csv "
    "or json file, a name on the hub."
)


@dataclass(frozen=True, kw_only=True)
class LoopOptions(OptionSet):
    """What train.loop.train needs."""

    panel: ClassVar = "The loop"  # of the command's help

    epochs: int | None = option(None, "Passes over the training images.", low=1, high=1_000_000)
    batch_size: int | None = option(None, "Images per step, over all processes together.", low=1, high=1_000_000)
    accumulate: int = option(
        1, "Split each batch into this many parts, to save memory. Batch norm sees one part.", low=1, high=1_000_000
    )
    optimizer: str | None = option(
        None,
        "adamw, or muon, which moves the matrices inside a model along their orthogonalised momentum. Default: adamw, "
        "but muon for gspn_mobile, to classify small photos and to segment from random weights.",
        choices=("adamw", "muon"),
        fallback="adamw",
    )
    lr: float | None = option(None, "The highest learning rate.", low=0)
    min_lr: float | None = option(None, "The final learning rate. Default: a hundredth of the highest.", low=0)
    warmup_lr: float | None = option(None, "The learning rate at the start of the warm-up.", low=0, fallback=0.0)
    weight_decay: float | None = option(
        None, "Weight decay; biases and norms have none.", low=0, high=10, fallback=0.05
    )
    warmup: float | None = option(
        None,
        "Epochs over which the learning rate rises. Default: the preset's, at most half of the epochs.",
        low=0,
        high=1e6,
        fallback=0.0,
    )
    layer_decay: float = option(
        1.0, "Factor on the learning rate from each layer to the one below it, for fine-tuning.", low=0.01, high=1
    )
    beta1: float = option(0.9, "AdamW: decay of the mean gradient.", low=0, high=0.999999)
    beta2: float = option(0.999, "AdamW: decay of the mean squared gradient.", low=0, high=0.999999)
    eps: float = option(1e-8, "AdamW: added to the root of the mean squared gradient.", low=0)
    clip: float | None = option(None, "Clip the gradient norm at this value; 0 for no limit.", low=0, fallback=1.0)
    ema: float | None = option(
        None,
        "Decay of the averaged weights, which are evaluated; 0 for no averaging.",
        low=0,
        high=0.999999,
        fallback=0.0,
    )
    ema_device: str | None = option(None, "Device of the averaged weights, such as cpu. Default: the model's.")
    precision: str | None = option(
        None, "fp32, or bf16 for autocast to bfloat16.", choices=("fp32", "bf16"), fallback="fp32"
    )
    seed: int = option(0, "Random seed: the same seed gives the same training.", low=0, high=2**63 - 1)
    freeze: tuple | None = option(
        None, "Modules of the model to freeze: stem,levels.0", parse=parse_names, metavar="NAMES"
    )
    fsdp: bool = option(False, "Shard the model over the processes, for large models. It trains with AdamW.")
    save_every: str = option(
        "15min",
        "How often to save within an epoch: 500 (steps), 15min, or never.",
        parse=parse_interval,
        metavar="INTERVAL",
        resumable=True,
    )
    keep_every: int = option(0, "Keep a checkpoint every N epochs; 0 for none.", low=0, high=1_000_000, resumable=True)
    tensorboard: bool = option(False, "Write logs for TensorBoard to RUN/tensorboard.", resumable=True)
    keep: int = option(
        0,
        "How many of the checkpoints of --keep-every to keep, the newest ones; 0 for all.",
        low=0,
        high=1_000_000,
        resumable=True,
    )

    def resolved(self, preset: Mapping[str, Any] | None = None) -> Self:
        """As for every OptionSet; a preset's warm-up takes at most half of the epochs, and its other rates are at most
        the highest one.

        Errors: OptionError for a rate of the user's above the highest one, and for Muon with FSDP."""
        if self.optimizer == "muon" and self.fsdp:
            raise OptionError("muon needs whole matrices, but fsdp shards them: choose --optimizer adamw, or no --fsdp")
        preset = dict(preset or {})
        if self.fsdp:
            preset.pop("optimizer", None)
        if "warmup" in preset and (epochs := self.epochs or preset.get("epochs")):
            preset["warmup"] = min(preset["warmup"], epochs / 2)
        lr = (preset.get("lr") or float("inf")) if self.lr is None else self.lr
        for name in ("min_lr", "warmup_lr"):
            if (rate := getattr(self, name)) is not None and rate > lr:
                raise OptionError(f"{name} has to be at most lr, the highest rate, {lr:g}: got {rate:g}")
            if preset.get(name) is not None:
                preset[name] = min(preset[name], lr)
        return super().resolved(preset)

    def idle(self) -> list[str]:
        """Notes on values that do nothing, or not what their names say, because of others."""
        found = []
        if self.lr == 0:
            found.append("the learning rate is 0, so the training changes no weight; expected a --lr above 0")
        if self.warmup and self.epochs and self.warmup >= self.epochs:
            found.append(
                f"the warm-up takes {self.warmup:g} epochs of {self.epochs}, so the learning rate only rises; a lower "
                "--warmup lets it reach --lr and fall again"
            )
        if self.keep and not self.keep_every:
            found.append("--keep does nothing without --keep-every")
        if self.ema_device and not self.ema:
            found.append("--ema-device does nothing without averaged weights (--ema)")
        return found


@dataclass(frozen=True, kw_only=True)
class ReadOptions(OptionSet):
    """How any command reads images and their classes."""

    class_names: tuple | None = option(
        None, "Class names, in order, for data that have none: a,b,c.", parse=parse_names, metavar="NAMES"
    )
    image_column: str | None = option(None, "datasets: the column with the images.")
    label_column: str | None = option(None, "datasets: the column with the classes.")
    workers: int = option(2, "Processes that decode image files.", low=0, high=1024, resumable=True)
    strict: bool = option(False, "Stop at an unreadable image, instead of leaving it out.")


@dataclass(frozen=True, kw_only=True)
class ShapeOptions(OptionSet):
    """What a training makes of the images."""

    size: tuple | None = option(
        None,
        "Input size in pixels: N or HxW. Default: that of the data; to classify photos or images of mixed sizes, 224.",
        parse=parse_size,
        metavar="N|HxW",
    )
    channels: int | None = option(None, "Convert the images to 1 (grey) or 3 (colour) channels.", choices=(1, 3))
    val_fraction: float = option(
        0.1, "Fraction of the images to hold out where DATA has no evaluation split.", low=0, high=1
    )
    streaming: bool = option(False, "datasets: read rows as a stream, without a copy in its cache.")


@dataclass(frozen=True, kw_only=True)
class DataOptions(ReadOptions, ShapeOptions):
    """How a training reads its images."""

    panel: ClassVar = "Data"
