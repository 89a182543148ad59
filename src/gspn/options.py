"""The options of training. Each is defined once, as a field here: the flags of the command, the keys of a configuration
file and what a run keeps of its options all follow from it. Imports nothing that is slow to import.
"""

import inspect
import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Self, get_args, get_type_hints

import typer
import yaml

from gspn.names import guess, unknown
from gspn.places import OptionError, location

FAR = 1.25  # times the size that a model was trained at: beyond, and below 1 / FAR, results are clearly worse


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float = float("inf"),
    choices: tuple = (),
    otherwise: Any = None,
    parse: Any = None,
    flag: str | None = None,
    metavar: str | None = None,
    same_result: bool = False,
    path: bool = False,
):
    """A field of a set of options.

    Args:
        default: None where the kind of data, or else `otherwise`, decides. help: what the flag and the file say.
        low, high: the smallest and the largest value. choices: the only values.
        parse: makes the value from what a flag (text) or a file (text, number, list or mapping) holds; ValueError says
            what it takes. flag: its name where that is not the field's. metavar: what its help calls the value.
        same_result: the option does not change what is trained, so a resumed run may be given another value.
        path: the value may be the path of a file or folder; a run keeps it as an absolute one.
    """
    what = dict(help=help, low=low, high=high, choices=choices, otherwise=otherwise, parse=parse)
    what |= dict(flag=flag, metavar=metavar, same_result=same_result, path=path)
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=what)
    return field(default=default, metadata=what)


# -- from the text or the number that a flag or a file holds to an option's value; ValueError says what is taken --


def parse_number(value):
    """A float; also of text, as which YAML reads 1e-3."""
    try:
        if not isinstance(value, bool):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise ValueError("a number")


def parse_whole(value):
    """An int."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError("a whole number")


def parse_truth(value):
    """A bool."""
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def parse_text(value):
    """A str."""
    if not isinstance(value, str):
        raise ValueError("text")
    return value


def parse_model_args(value):
    """{"stem_stride": 1} from ["stem_stride=1"]; a value is JSON, or text if it does not begin as JSON does."""
    if isinstance(value, Mapping):
        return dict(value)
    arguments = {}
    for pair in value if isinstance(value, list | tuple) else [value]:
        key, equals, text = str(pair).partition("=")
        if not equals or not key.isidentifier():
            raise ValueError("KEY=VALUE")
        try:
            arguments[key] = json.loads(text)
        except ValueError as error:
            if re.match(r"[\[\]{}()\"'0-9.+-]", text) or text in ("True", "False", "None"):
                hint = {"True": "true", "False": "false", "None": "null"}.get(text, "4, true, [1,2] or a word")
                raise ValueError(f"a value in JSON for {key}, such as {hint} ({error})") from None
            arguments[key] = text
    return arguments


def parse_size(value):
    """(H, W) from "N" or "HxW", a number or two."""
    parts = value if isinstance(value, list | tuple) else str(value).lower().split("x")
    if len(parts) not in (1, 2) or not all(str(part).isdecimal() and int(part) > 0 for part in parts):
        raise ValueError("N or HxW in pixels")
    return int(parts[0]), int(parts[-1])


def far_from(size: tuple[int, int], trained: tuple[int, int], what: str) -> str | None:
    """A warning where a size (H, W) is more than FAR times another one or less than 1 / FAR of it; `what` says of the
    other one what it is.

    >>> far_from((12, 8), (8, 8), "it was trained at")
    '12x8 is far from 8x8, which it was trained at (1.50 times the height, 1.00 times the width): expect worse results'
    """
    ratios = [side / other for side, other in zip(size, trained, strict=True)]
    if all(1 / FAR <= ratio <= FAR for ratio in ratios):
        return None
    (height, width), (h, w) = size, trained
    times = "{:.2f} times the height, {:.2f} times the width".format(*ratios)
    return f"{height}x{width} is far from {h}x{w}, which {what} ({times}): expect worse results"


def parse_names(value):
    """("a", "b") from "a,b" or a list."""
    names = tuple(str(name).strip() for name in (value if isinstance(value, list | tuple) else str(value).split(",")))
    if len(set(names)) < len(names) or "" in names:
        raise ValueError("distinct names with commas between them")
    return names


def parse_interval(value):
    """ "500" (steps), "15min" or "never", as it is."""
    text = str(value).strip()
    if not re.fullmatch(r"[1-9]\d*|\d+(\.\d+)?min|never", text):
        raise ValueError("a number of steps, minutes such as 15min, or never")
    return text


_PARSERS = {int: parse_whole, float: parse_number, bool: parse_truth, str: parse_text}

# -- the options --


@dataclass(frozen=True, kw_only=True)
class OptionSet:
    """What every set of options can do. OptionError names a value that cannot be.

    Attributes: presets: by a kind of data, what fills in options left open; a help shows it."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({})

    def __post_init__(self):
        for one in fields(self):
            check(one, getattr(self, one.name))

    def settled(self, chosen: Mapping[str, Any] | None = None) -> Self:
        """The same options with those left open filled in: from `chosen`, and else with what the option says."""
        open_ones = [one for one in fields(self) if getattr(self, one.name) is None]
        values = {one.name: (chosen or {}).get(one.name, one.metadata["otherwise"]) for one in open_ones}
        return replace(self, **values)

    def located(self) -> Self:
        """The same options with absolute paths, where a path is of something that is there."""
        named = {one.name: getattr(self, one.name) for one in fields(self) if one.metadata["path"]}
        return replace(self, **{name: location(value) for name, value in named.items() if value is not None})

    @classmethod
    def read(cls, values: Mapping[str, Any], source: str = "") -> Self:
        """Options from texts and numbers by name, as flags or a file give them. `source` begins a message.

        Errors: OptionError for an unknown name, with the nearest one, and for a value of another type."""
        known = {one.name: one for one in fields(cls)}
        types = get_type_hints(cls)
        for name in values:
            if name not in known:
                raise OptionError(f"{source}{unknown('option', name, known)}")
        try:
            return cls(**{name: _converted(known[name], types[name], value) for name, value in values.items()})
        except OptionError as error:
            raise OptionError(f"{source}{error}") from None


@dataclass(frozen=True, kw_only=True)
class LoopOptions(OptionSet):
    """What loop.train needs to know."""

    panel: ClassVar = "The loop"  # of the command's help

    epochs: int | None = option(None, "Passes over the training images.", low=1, high=1_000_000)
    batch_size: int | None = option(None, "Images a step, over all processes together.", low=1, high=1_000_000)
    accumulate: int = option(1, "Parts that a step's batch is cut into, to need less memory.", low=1, high=1_000_000)
    lr: float | None = option(None, "The highest learning rate.", low=0)
    min_lr: float | None = option(None, "The last learning rate. Default: a hundredth of the highest.", low=0)
    warmup_lr: float | None = option(None, "The learning rate that the warm-up starts from.", low=0, otherwise=0.0)
    weight_decay: float | None = option(None, "Of AdamW; never on biases and norms.", low=0, high=10, otherwise=0.05)
    warmup: float | None = option(None, "Epochs in which the learning rate rises.", low=0, high=1e6, otherwise=0.0)
    layer_decay: float = option(
        1.0, "Learning rate of a layer as a part of that of the layer above it, for fine-tuning.", low=0.01, high=1
    )
    beta1: float = option(0.9, "Of AdamW: memory of the mean gradient.", low=0, high=0.999999)
    beta2: float = option(0.999, "Of AdamW: memory of the mean squared gradient.", low=0, high=0.999999)
    eps: float = option(1e-8, "Of AdamW: added to the root of the mean squared gradient.", low=0)
    clip: float | None = option(None, "Largest gradient norm; 0 for no limit.", low=0, otherwise=1.0)
    ema: float | None = option(
        None, "Decay of the averaged weights, which are evaluated; 0 for none.", low=0, high=0.999999, otherwise=0.0
    )
    ema_device: str | None = option(None, "Where the averaged weights are kept, such as cpu. Default: with the model.")
    precision: str | None = option(
        None, "fp32, or bf16 for autocast to bfloat16.", choices=("fp32", "bf16"), otherwise="fp32"
    )
    seed: int = option(0, "Same seed, same training.", low=0, high=2**63 - 1)
    freeze: tuple | None = option(
        None, "Parts of the model that keep their weights: stem,levels.0", parse=parse_names, metavar="NAMES"
    )
    fsdp: bool = option(False, "Several processes: shard the model over them (for large ones).")
    save_every: str = option(
        "15min",
        "How often to save inside an epoch: 500 (steps), 15min, or never.",
        parse=parse_interval,
        metavar="INTERVAL",
        same_result=True,
    )
    keep_every: int = option(
        0, "Keep the checkpoint of every so manieth epoch; 0 for none.", low=0, high=1_000_000, same_result=True
    )
    tensorboard: bool = option(False, "Write RUN/tensorboard for TensorBoard to show.", same_result=True)
    keep: int = option(
        0, "How many of those to keep, the oldest go first; 0 for all.", low=0, high=1_000_000, same_result=True
    )


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(OptionSet):
    """What is done to the training images and their labels."""

    panel: ClassVar = "Augmentation"

    preset: str | None = option(
        None, "Where the rest comes from: digits, idx, fashion, small, photos, imagenet. Default: by the data."
    )
    augment: str | None = option(
        None,
        "none, shift (small images, by up to an eighth) or crop (photos, random boxes).",
        choices=("none", "shift", "crop"),
    )
    flip: bool | None = option(None, "Mirror half of the images.")
    crop_area: float | None = option(
        None, "crop: the smallest part of the image that a box may be.", low=0.01, high=1, otherwise=0.25
    )
    erase: float | None = option(
        None, "How often a random box is erased (filled with noise).", low=0, high=1, otherwise=0.0
    )
    rand_augment: str | None = option(
        None, "RandAugment by timm: m9-mstd0.5-inc1 in the published recipe, or none.", otherwise="none"
    )
    color_jitter: float | None = option(
        None, "Brightness, contrast and saturation, by timm; only without RandAugment.", low=0, high=1, otherwise=0.0
    )
    mixup: float | None = option(
        None,
        "Blends pairs of images, by timm: alpha of the beta distribution, 0 for never.",
        low=0,
        high=100,
        otherwise=0.0,
    )
    cutmix: float | None = option(
        None,
        "Pastes boxes between pairs, by timm: alpha of the beta distribution, 0 for never.",
        low=0,
        high=100,
        otherwise=0.0,
    )
    mix_switch: float = option(0.5, "How often cutmix is taken where mixup is on too.", low=0, high=1)
    label_smoothing: float | None = option(
        None, "Part of the target spread over all classes.", low=0, high=0.99, otherwise=0.1
    )


@dataclass(frozen=True, kw_only=True)
class DataOptions(OptionSet):
    """How the images are found and read."""

    panel: ClassVar = "Data"

    size: tuple | None = option(
        None, "Input size in pixels: N or HxW. Default: as the data.", parse=parse_size, metavar="N|HxW"
    )
    channels: int | None = option(None, "Convert the images to 1 (grey) or 3 (colour) channels.", choices=(1, 3))
    val_fraction: float = option(0.1, "Part of the images to hold out where DATA has no evaluation split.")
    class_names: tuple | None = option(
        None, "Names for data without any, in order: a,b,c.", parse=parse_names, metavar="NAMES"
    )
    image_column: str | None = option(None, "datasets: the column with the images.")
    label_column: str | None = option(None, "datasets: the column with the classes.")
    streaming: bool = option(False, "datasets: take the rows as they come, without a copy of the table in its cache.")
    workers: int = option(2, "Processes that decode image files.", low=0, high=1024, same_result=True)
    strict: bool = option(False, "An unreadable image is an error, not left out and named.")


@dataclass(frozen=True, kw_only=True)
class ModelOptions(OptionSet):
    """What is trained."""

    panel: ClassVar = "Model"

    model: str | None = option(
        None, "gspn_micro (small images), gspn_tiny, gspn_small, gspn_base.", otherwise="gspn_micro"
    )
    model_args: Mapping = option(
        {},
        "An argument of the model, a JSON value; repeatable.",
        parse=parse_model_args,
        flag="--model-arg",
        metavar="KEY=VALUE",
    )
    init_from: str | None = option(
        None,
        "Start from trained weights: a run folder, a .safetensors file, a published .pth.",
        metavar="RUN|FILE",
        path=True,
    )
    channels_last: bool = option(False, "Keep weights and images with their channels side by side in memory.")
    compile: bool = option(False, "Compile the model with torch.compile.")


@dataclass(frozen=True, kw_only=True)
class Options(DataOptions, RecipeOptions, LoopOptions, ModelOptions):
    """Everything that `gspn train` can be told; what is None is filled in from the data and their preset."""


# -- checks, flags and files --


def check(one, value) -> None:
    """Raises OptionError unless `value` is one that the option (a field) may have, or None."""
    low, high, choices = (one.metadata[name] for name in ("low", "high", "choices"))
    if value is None:
        return
    if choices and value not in choices:
        names = [str(choice) for choice in choices]
        expected = " or ".join(names) if len(names) < 4 else f"one of {', '.join(names)}"
        raise OptionError(f"{one.name} must be {expected}, got {value!r}{guess(value, choices)}")
    if low is not None and not (low <= value <= high and math.isfinite(value)):
        limits = f"from {low} to {high}" if math.isfinite(high) else f"from {low} on and finite"
        raise OptionError(f"{one.name} must be {limits}, got {value}")


def check_range(name: str, value: float | None) -> None:
    """Raises OptionError unless `value` is one that the option `name` of training may have, or None."""
    check(next(one for one in fields(Options) if one.name == name), value)


def _converted(one, annotation, value):
    """What a flag or a file says, as the option's type; None stays."""
    types = [kind for kind in (get_args(annotation) or (annotation,)) if kind is not type(None)]
    if value is None and len(types) < len(get_args(annotation)):
        return None
    try:
        return (one.metadata["parse"] or _PARSERS[types[0]])(value)
    except ValueError as error:
        shown = value[0] if isinstance(value, list) and len(value) == 1 else value
        raise OptionError(f"{one.name} takes {error}, got {shown!r}") from None


def flags(options: type[OptionSet]) -> list[inspect.Parameter]:
    """A parameter of a typer command for every option, None where it was not given, in a panel for every base."""
    panels = {name: base for base in options.__mro__ for name in inspect.get_annotations(base)}
    types, parameters = get_type_hints(options), []
    for one in fields(options):
        what, kind = one.metadata, types[one.name]
        name = what["flag"] or "--" + one.name.replace("_", "-")
        if what["parse"]:
            kind = list[str] if kind is Mapping else str
        elif kind is bool or bool in get_args(kind):
            name, kind = f"{name}/--no-{name[2:]}", bool
        default = what["otherwise"] if one.default in (None, MISSING) else one.default
        shown = False if default is None or isinstance(default, dict) else str(default)
        chosen = {kind: preset[one.name] for kind, preset in options.presets.items() if one.name in preset}
        if len(set(chosen.values())) == 1 and len(chosen) == len(options.presets):
            shown = str(next(iter(chosen.values())))
        elif chosen:
            shown = ", ".join(f"{value} for {where}" for where, value in chosen.items())
        info = typer.Option(
            name,
            help=what["help"],
            metavar=what["metavar"],
            show_default=shown,
            rich_help_panel=panels[one.name].panel,
        )
        parameters.append(
            inspect.Parameter(
                one.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info]
            )
        )
    return parameters


def read_file(path: Path) -> dict:
    """What a configuration file holds: options by name, with - or _ between words.

    Errors: OptionError if it is missing, is not .yaml, .yml or .toml, or does not hold names with values."""
    try:
        content = path.read_bytes()
        if path.suffix == ".toml":
            values = tomllib.loads(content.decode())
        elif path.suffix in (".yaml", ".yml"):
            values = yaml.safe_load(content)
        else:
            raise OptionError(f"{path} has to be a .yaml or .toml file")
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise OptionError(f"{path} cannot be read: {reason}") from error
    if not isinstance(values, dict):
        raise OptionError(f"{path} has to hold options with their values, such as `epochs: 12`")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def file_text(options: OptionSet, more: Mapping[str, Any]) -> str:
    """The text of a YAML file that `read_file` reads back: `more`, then every option with what it does."""
    lines = [f"{name}: {_yaml(value)}\n" for name, value in more.items()]
    for one in fields(options):
        lines.append(f"\n# {one.metadata['help']}\n{one.name}: {_yaml(getattr(options, one.name))}\n")
    return "".join(lines)


def _yaml(value):
    """The value on one line."""
    plain = list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value
    text = yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=float("inf"), sort_keys=False)
    return text.removesuffix("...\n").strip()
