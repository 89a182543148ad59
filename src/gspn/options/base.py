"""What an option is, and a set of options: values that are checked, flags of a command, configuration files."""

import inspect
import json
import math
import re
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Annotated, Any, ClassVar, Self, get_args, get_origin, get_type_hints

import typer
import yaml

from gspn.names import guess, unknown
from gspn.places import OptionError, expanded, location, runs_like

REQUIRED = MISSING  # the default of an option that has to be given
FAR = 1.25  # times the size that a model was trained at: beyond, and below 1 / FAR, results are clearly worse


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float = float("inf"),
    choices: tuple = (),
    fallback: Any = None,
    parse: Any = None,
    flag: str | None = None,
    metavar: str | None = None,
    argument: bool = False,
    resumable: bool = False,
    path: bool = False,
    suffix: str | None = None,
    complete: tuple[str, ...] = (),
):
    """A field of a set of options.

    Args:
        default: REQUIRED, or None where the kind of data decides, or else `fallback`. help: the text for the flag and
            the file.
        low, high: the smallest and the largest value. choices: the only values.
        parse: makes the value from what a flag (text) or a file (text, number, list or mapping) holds; its ValueError
            says what was expected. flag: its name where that is not the field's. metavar: the value in the help.
        argument: the option is the command's positional argument, not a flag.
        resumable: the option does not change the result, so a resumed run may get another value.
        path: the value may be the path of a file or folder; a run keeps it as an absolute path.
        suffix: the value is a file to write, whose name has to end so, because its format is fixed.
        complete: what a shell offers for the value, beside `choices`. For the metavar RUN it offers runs.
    """
    metadata = dict(help=help, low=low, high=high, choices=choices, fallback=fallback, parse=parse)
    metadata |= dict(flag=flag, metavar=metavar, argument=argument, resumable=resumable, path=path, suffix=suffix)
    metadata["complete"] = complete
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


# -- parsers: the value of an option from what a flag or a file holds; ValueError says what was expected --


def parse_number(value):
    """A float; also from text, because YAML reads 1e-3 as text."""
    try:
        if not isinstance(value, bool):
            return float(value)
    except (TypeError, ValueError):
        pass
    except OverflowError:
        raise ValueError("a number of at most 308 digits") from None
    raise ValueError("a number")


def numbers_of(value):
    """(0.1, 0.8) from "0.1,0.8" or a list; empty where one of them is no number."""
    try:
        return tuple(map(parse_number, value if isinstance(value, list | tuple) else str(value).split(",")))
    except ValueError:
        return ()


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
    """{"stem_stride": 1} from ["stem_stride=1"]; a value is JSON, or a word that does not begin like JSON."""
    if isinstance(value, Mapping):
        return dict(value)
    arguments = {}
    for pair in value if isinstance(value, list | tuple) else [value]:
        key, equals, text = str(pair).partition("=")
        if not equals or not key.isidentifier():
            raise ValueError("KEY=VALUE")
        try:
            arguments[key] = json.loads(text)
        except (ValueError, RecursionError) as error:
            if re.match(r"[\[\]{}()\"'0-9.+-]", text) or text in ("True", "False", "None"):
                hint = {"True": "true", "False": "false", "None": "null"}.get(text, "4, true, [1,2] or a word")
                raise ValueError(f"a value in JSON for {key}, such as {hint} ({error})") from None
            arguments[key] = text
    return arguments


def parse_size(value):
    """(H, W) from "N", "HxW", a number or two numbers."""
    parts = value if isinstance(value, list | tuple) else str(value).lower().split("x")
    if len(parts) not in (1, 2) or not all(re.fullmatch(r"0*[1-9]\d{0,8}", str(part)) for part in parts):
        raise ValueError("N or HxW in pixels")
    return int(parts[0]), int(parts[-1])


def far_from(size: tuple[int, int], trained: tuple[int, int], what: str) -> str | None:
    """A warning where a side of `size` (H, W) is more than FAR times that of `trained`, or less than 1 / FAR of it;
    None elsewhere. `what` says what `trained` is.

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


def parse_factors(value):
    """(0.75, 1.0, 1.5) from "0.75,1,1.5" or a list."""
    factors = numbers_of(value)
    if not factors or not all(0 < factor < math.inf for factor in factors):
        raise ValueError("positive numbers with commas between them, such as 0.75,1,1.5")
    return factors


def parse_parts(value):
    """(0.1, 0.8) from "0.1,0.8" or a list: two parts of a whole, the lower first."""
    parts = numbers_of(value)
    if len(parts) != 2 or not 0 <= parts[0] <= parts[1] <= 1:
        raise ValueError("two numbers from 0 to 1 with a comma between them, the lower first, such as 0.1,0.8")
    return parts


def parse_sizes(value):
    """((H, W), ...) from "N,HxW"."""
    try:
        return tuple(parse_size(each.strip()) for each in value.split(","))
    except ValueError:
        raise ValueError("N or HxW in pixels, with commas between them") from None


def parse_position(value):
    """(row, column) from "ROW,COL"."""
    parts = value.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError("ROW,COL in pixels of the model's input")
    return int(parts[0]), int(parts[1])


def parse_block(value):
    """An index as an int; otherwise the text, which is a name."""
    return int(value) if value.removeprefix("-").isdecimal() else value


def parse_interval(value):
    """ "500" (steps), "15min" or "never", as it is."""
    text = str(value).strip()
    if not re.fullmatch(r"[1-9]\d*|\d+(\.\d+)?min|never", text):
        raise ValueError("a number of steps, minutes such as 15min, or never")
    return text


def parse_path(value):
    """A Path, with ~ expanded, which a shell leaves in `--out=~/x`."""
    return expanded(value)


_PARSERS = {int: parse_whole, float: parse_number, bool: parse_truth, str: parse_text, Path: parse_path, list: list}

# -- sets of options --


@dataclass(frozen=True, kw_only=True)
class OptionSet:
    """What every set of options can do. OptionError names a value that is not allowed.

    Attributes:
        presets: by the kind of data, the values of options that are None; the help shows them.
        panel: the heading in the help of the options that the class has, unless a base gives them one.
        plain: only flags set the options, no file: a bool that is False has no --no-, and the message about a value
            that cannot be read names the flag.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({})
    plain: ClassVar[bool] = False

    def __post_init__(self):
        for one in fields(self):
            _check(one, getattr(self, one.name))

    def resolved(self, preset: Mapping[str, Any] | None = None) -> Self:
        """The same options with every None replaced: by the value in `preset`, or else by the option's fallback."""
        unset = [one for one in fields(self) if getattr(self, one.name) is None]
        return replace(self, **{one.name: (preset or {}).get(one.name, one.metadata["fallback"]) for one in unset})

    def values(self, *without: str) -> dict[str, Any]:
        """The values by name, except for some."""
        return {name: value for name, value in vars(self).items() if name not in without}

    def located(self) -> Self:
        """The same options with absolute paths, where a path exists."""
        paths = {one.name: getattr(self, one.name) for one in fields(self) if one.metadata["path"]}
        return replace(self, **{name: location(value) for name, value in paths.items() if value is not None})

    def check_paths(self) -> None:
        """Raises OptionError or RunError where a file or folder that an option names does not exist."""

    @classmethod
    def check(cls, **values: Any) -> None:
        """Raises OptionError unless these options allow the values."""
        for name, value in cls._converted(values).items():
            _check(cls.__dataclass_fields__[name], value)

    @classmethod
    def read(cls, values: Mapping[str, Any], source: str = "") -> Self:
        """Options from texts and numbers by name, as flags or a file hold them. `source` begins a message.

        Errors: OptionError for an unknown name, with the nearest one, and for a value of another type."""
        try:
            return cls(**cls._converted(values))
        except OptionError as error:
            raise OptionError(f"{source}{error}") from None

    def updated(self, overrides: Mapping[str, Any]) -> Self:
        """The same options with other values for some, a mapping's entries added to those there; arguments and errors
        as for `read`."""
        values = self._converted(overrides)
        for name, value in values.items():
            if isinstance(value, Mapping):
                values[name] = {**(getattr(self, name) or {}), **value}
        return replace(self, **values)

    @classmethod
    def _converted(cls, values):
        known, types = {one.name: one for one in fields(cls)}, get_type_hints(cls)
        for name in values:
            if name not in known:
                raise OptionError(unknown("option", name, known))
        return {name: _converted(known[name], types[name], value, cls.plain) for name, value in values.items()}


# -- checks, flags and files --


def _check(one, value):
    """Raises OptionError unless the option (a field) allows `value`; None is always allowed."""
    low, high, choices, suffix = (one.metadata[name] for name in ("low", "high", "choices", "suffix"))
    if value is None:
        return
    if choices and value not in choices:
        names = [str(choice) for choice in choices]
        expected = " or ".join(names) if len(names) < 4 else f"one of {', '.join(names)}"
        raise OptionError(f"{one.name} must be {expected}, got {value!r}{guess(value, choices)}")
    if low is not None and not low <= value <= min(high, sys.float_info.max):
        finite = "" if value < low else " and finite"
        limits = f"from {low} to {high}" if math.isfinite(high) else f"from {low} on{finite}"
        raise OptionError(f"{one.name} must be {limits}, got {value}")
    if suffix:
        check_suffix(one.name, value, suffix)


def check_suffix(name: str, file: Path | str | None, suffix: str) -> None:
    """Raises OptionError unless the name of `file`, which the option `name` gives, ends in `suffix`."""
    if file is not None and Path(file).suffix.lower() != suffix:
        raise OptionError(f"{name} must end in {suffix}, the format of the file that is written, got {file}")


def _converted(one, annotation, value, plain):
    """The value of a flag or a file as the option's type. None stays None where the type allows it."""
    if value is None and type(None) in get_args(annotation):
        return None
    if value is None:
        default = one.default if one.default_factory is MISSING else one.default_factory()
        advice = "give a value" if default is REQUIRED else f"leave the option out for its default, {_yaml(default)}"
        raise OptionError(f"{one.name} takes no null: {advice}")
    kind = _kind(annotation)
    try:
        return (one.metadata["parse"] or _PARSERS[get_origin(kind) or kind])(value)
    except ValueError as error:
        shown = value[0] if isinstance(value, list) and len(value) == 1 else value
        raise OptionError(f"{_flag(one) if plain else one.name} takes {error}, got {shown!r}") from None


def _kind(annotation):
    """A type without None."""
    return get_args(annotation)[0] if isinstance(annotation, UnionType) else annotation


def _flag(one):
    return one.metadata["flag"] or "--" + one.name.replace("_", "-")


def flags(options: type[OptionSet]) -> list[inspect.Parameter]:
    """A parameter of a typer command for every option. Its value is None where the user gave none, except that the
    defaults of a `plain` set are filled in."""
    declared, types, panels = fields(options), get_type_hints(options), {}
    for base in reversed(options.__mro__):
        if "panel" in vars(base):
            panels = dict.fromkeys(base.__dataclass_fields__, base.panel) | panels
    if options.plain:  # the command's own flags before those that it shares with others
        order = [name for base in options.__mro__ for name in inspect.get_annotations(base)]
        declared = sorted(declared, key=lambda one: -1 if one.metadata["argument"] else order.index(one.name))
    return [_parameter(options, one, types[one.name], panels.get(one.name)) for one in declared]


def _parameter(options, one, annotation, panel):
    metadata, kind, flag = one.metadata, _kind(annotation), _flag(one)
    default = (one.default if one.default is not MISSING else inspect.Parameter.empty) if options.plain else None
    if metadata["parse"]:
        kind = list[str] if kind is Mapping else str
    elif kind is bool and (one.default or not options.plain) and "/" not in flag:
        flag = f"{flag}/--no-{flag[2:]}"
    shared = dict(help=metadata["help"], metavar=metadata["metavar"], autocompletion=_completion(metadata))
    if metadata["argument"]:
        info = typer.Argument(**shared, show_default=False)
    else:
        shown = options.plain or _default_text(options, one)
        info = typer.Option(flag, **shared, show_default=shown, rich_help_panel=panel)
    if default is not inspect.Parameter.empty:
        kind = kind | None
    return inspect.Parameter(
        one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
    )


def _completion(metadata) -> Callable[[str], list[str]] | None:
    """What gives a shell the values that begin as what is typed; None where it completes file names as usual."""
    if metadata["metavar"] == "RUN":
        return runs_like
    names = [str(each) for each in (*metadata["choices"], *metadata["complete"])]

    def named(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return named if names else None


def _default_text(options, one):
    """What the help shows as the default of an option: of the presets, if they have it. False for nothing, or where the
    help's own text tells the default."""
    if one.default is None and "Default:" in one.metadata["help"]:
        return False
    default = one.metadata["fallback"] if one.default in (None, MISSING) else one.default
    chosen = {kind: preset[one.name] for kind, preset in options.presets.items() if one.name in preset}
    if len(set(chosen.values())) == 1 and len(chosen) == len(options.presets):
        return str(next(iter(chosen.values())))
    if chosen:
        return ", ".join(f"{value} for {where}" for where, value in chosen.items())
    return False if default is None or isinstance(default, dict) else str(default)


def read_file(path: Path) -> dict:
    """The options in a configuration file by name, with - or _ between words.

    Errors: OptionError if it is missing, is not .yaml, .yml or .toml, or does not hold names with values."""
    if path.suffix not in (".yaml", ".yml", ".toml"):
        raise OptionError(f"{path} has to be a .yaml or .toml file")
    try:
        content = path.read_bytes()
        if path.suffix == ".toml":
            values = tomllib.loads(content.decode("utf-8-sig"))
        else:
            values = yaml.load(content, Loader=_OnceLoader)
    except Exception as error:  # PyYAML raises anything on a value that it cannot make, such as a 45th day
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise OptionError(f"{path} cannot be read: {reason}") from error
    if not isinstance(values, dict):
        raise OptionError(f"{path} has to hold options with their values, such as `epochs: 12`")
    found = {str(name).replace("-", "_"): value for name, value in values.items()}
    if len(found) < len(values):
        names = [str(name).replace("-", "_") for name in values]
        twice = next(name for name in names if names.count(name) > 1)
        raise OptionError(f"{path} names {twice} twice, with - and with _: expected it once")
    return found


class _OnceLoader(yaml.SafeLoader):
    """Refuses a key that is repeated, of which YAML's own loader takes the last value."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)  # as written: later a merge (<<) adds keys that may be repeated
        keys = [(key.tag, key.value) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.composer.ComposerError(problem=f"{key[1]} is there twice", problem_mark=node.start_mark)
        return node


def file_text(options: OptionSet, more: Mapping[str, Any]) -> str:
    """The text of a YAML file that `read_file` reads back: `more`, then every option after its help text."""
    lines = [f"{name}: {_yaml(value)}\n" for name, value in more.items()]
    for one in fields(options):
        lines.append(f"\n# {one.metadata['help']}\n{one.name}: {_yaml(getattr(options, one.name))}\n")
    return "".join(lines)


def with_option(text: str, name: str, value: Any) -> str:
    """The text of a YAML file with another value for one of its options; the same text where it holds no such option or
    is no YAML. Names within the value of another option stay."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return text
    for key, old in node.value if isinstance(node, yaml.MappingNode) else ():
        begin, end = key.end_mark.index, old.end_mark.index
        if key.value == name and begin <= end:  # an alias has the place of its anchor
            line_end = "\n" if text[begin:end].endswith("\n") else ""  # a block takes the end of its last line
            changed = f"{text[:begin]}: {_yaml(value)}{line_end}{text[end:]}"
            try:  # an anchor in the old value may be needed elsewhere, and a key may be written in another way
                same = yaml.safe_load(changed) == yaml.safe_load(text) | {name: yaml.safe_load(_yaml(value))}
            except yaml.YAMLError:
                same = False
            return changed if same else text
    return text


def _yaml(value):
    """The value on one line."""
    plain = list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value
    text = yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=float("inf"), sort_keys=False)
    return text.removesuffix("...\n").strip()
