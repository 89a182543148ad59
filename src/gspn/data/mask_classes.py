"""The classes of masks: which value in a mask is which class, their names and colours."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor

from gspn.data.images import SPREAD, DataError, listed
from gspn.names import unknown

IGNORED = 255  # in the masks of a batch: pixels that count neither in the loss nor in a metric
LEAST, MOST = 2, 255  # classes: one alone leaves nothing to learn; a mask has 8 bits and one value is IGNORED
VALUES = 65536  # that a mask of 16 bits may hold
_UNKNOWN = -1
_KEYS = ("name", "value", "color")  # of a class in the file
_INDEXED = ("P", "L", "1")  # Pillow's modes of masks with one value for each pixel, beside I;16
EXPECTED = (
    'expected a list of names, of objects with "name" and, if wanted, "value" (in the masks) and "color" ("#rrggbb" or '
    "[r, g, b]), or an object {value: name}"
)


@dataclass(frozen=True)
class Classes:
    """The classes of masks, in the order of a model's logits.

    Attributes:
        names: theirs. values: the value of each in a mask. colours: (r, g, b) of each, 0 to 255.
        ignored: values of pixels without a class. named: whether names were given; otherwise they are the values.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    colours: tuple[tuple[int, int, int], ...]
    ignored: tuple[int, ...] = ()
    named: bool = True

    def __post_init__(self):
        for name in ("names", "values", "ignored"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "colours", tuple(map(tuple, self.colours)))
        table = np.full(VALUES, _UNKNOWN, np.int16)
        table[list(self.ignored)] = IGNORED
        table[list(self.values)] = np.arange(len(self.values))
        object.__setattr__(self, "_table", table)

    def __len__(self):
        return len(self.names)

    @classmethod
    def of_values(cls, values: Iterable[int], ignored: Sequence[int], mask: Image.Image | None = None) -> "Classes":
        """Classes that are called like their values, in the colours of the palette of `mask` if it has one."""
        values = sorted(set(values) - set(ignored))
        return cls([str(value) for value in values], values, _colours(values, mask), tuple(ignored), named=False)

    @classmethod
    def read(cls, file: Path, ignore: Sequence[str] | None, mask: Image.Image | None = None) -> "Classes":
        """The classes in a JSON file, see EXPECTED. Without "value", a class is numbered by its place in the list.

        Args: ignore: values, or names of the file, of pixels without a class; None: IGNORED, which is an error if
            it is a class of the file. mask: its palette colours the classes that have no colour.
        Errors: DataError."""
        try:
            content = json.loads(file.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise DataError(f"the classes in {file} cannot be read: {error}") from error
        if not isinstance(content, list | dict):
            raise DataError(f"{file} does not hold classes, but {str(content)[:60]!r}: {EXPECTED}")
        try:
            rows = [_row(*each) for each in (content.items() if isinstance(content, dict) else enumerate(content))]
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise DataError(f"{file} does not hold classes ({type(error).__name__}: {error}): {EXPECTED}") from error
        for what, column in (("value", [value for value, *_ in rows]), ("name", [name for _, name, _ in rows])):
            twice = sorted({str(each) for each in column if column.count(each) > 1})
            if twice:
                raise DataError(f"{file} has two classes of one {what}: {', '.join(twice)}; expected distinct ones")
        ignored = ignored_values(ignore, {name: value for value, name, _ in rows})
        rows = [row for row in rows if row[0] not in ignored]
        check_number([name for _, name, _ in rows], f"{file} holds")
        numbers = [value for value, *_ in rows]
        colours = [given or other for (*_, given), other in zip(rows, _colours(numbers, mask), strict=True)]
        return cls([name for _, name, _ in rows], numbers, colours, ignored)

    def numbers(self, mask: Image.Image, advice: str = "give these pixels one of these values") -> np.ndarray:
        """The number of the class of each pixel, or IGNORED: uint8 (H, W).
        Errors: DataError for colours instead of values, and for values that are no class, with `advice`; without the
        file's name."""
        values = values_of(mask)
        numbers = self._table[values]
        if (unknown := numbers == _UNKNOWN).any():
            found, counts = np.unique(values[unknown], return_counts=True)
            most = sorted(zip(counts.tolist(), found.tolist(), strict=True), reverse=True)
            told = listed([f"{value} ({count:,} pixels)" for count, value in most], "value", "values")
            shown = [f"{value} {name}" for value, name in zip(self.values[:8], self.names, strict=False)]
            known = ", ".join([*shown, "..."] if len(self) > 8 else shown)
            raise DataError(
                f"holds {told} that {'is' if len(most) == 1 else 'are'} no class; the classes are {known}, and "
                f"{', '.join(map(str, self.ignored)) or 'nothing'} is ignored. Correct the mask: {advice}"
            )
        return numbers.astype(np.uint8)

    def picture(self, numbers: np.ndarray) -> Image.Image:
        """A mask of class numbers, uint8 (H, W), as an image with palette: its values are those of the data's masks."""
        if max(self.values) > 255:
            image, values = Image.fromarray(numbers), range(len(self))  # the values do not fit: the classes' numbers
        else:
            image, values = Image.fromarray(np.array(self.values, np.uint8)[numbers]), self.values
        palette = np.zeros((256, 3), np.uint8)
        palette[list(values)] = self.colours
        image.putpalette(palette.tobytes())
        return image

    def coloured(self, numbers: np.ndarray) -> np.ndarray:
        """The colours of class numbers, uint8 (H, W, 3); IGNORED is black."""
        table = np.zeros((256, 3), np.uint8)
        table[: len(self)] = self.colours
        return table[numbers]

    def to_json(self) -> dict:
        return asdict(self)


def check_number(names: Sequence[str], holder: str) -> None:
    """Raises DataError unless a segmenter can learn so many classes. `holder` begins the message: "the masks hold"."""
    if not LEAST <= len(names) <= MOST:
        only = f", {names[0]!r}" if len(names) == 1 else ""
        advice = ". A background is a class too, not a value to ignore" if len(names) < LEAST else ""
        count = f"{len(names)} class{'es' * (len(names) != 1)}"
        raise DataError(f"{holder} {count} beside the ignored values{only}; expected {LEAST} to {MOST}{advice}")


def values_of(mask: Image.Image) -> np.ndarray:
    """The values of a mask's pixels, (H, W), as its file has them. Errors: DataError for a mask in colours."""
    if mask.mode not in _INDEXED and not mask.mode.startswith("I;16"):
        raise DataError(
            f"is in colours without a palette (Pillow's mode {mask.mode}); expected one value for each pixel, in a PNG "
            "of indices or with a palette. Convert it: write the number of the class of each colour into an 8-bit grey "
            'image (mode "L")'
        )
    return np.asarray(mask).astype(np.uint16) // mask.info.get(SPREAD, 1)


def ignored_values(ignore: Sequence[str] | None, named: dict[str, int]) -> tuple[int, ...]:
    """The values of what is to be ignored, values or names among `named`. None: IGNORED.
    Errors: DataError for other names, and for None where a class has the value IGNORED."""
    if ignore is None:
        for name in (name for name, value in named.items() if value == IGNORED):
            raise DataError(
                f"the class {name!r} has the value {IGNORED}, which is ignored by default: say whether it counts "
                f'(--ignore "") or not (--ignore {IGNORED})'
            )
        return (IGNORED,)
    for each in ignore:
        if each not in named and not (each.isdecimal() and int(each) < VALUES):
            names = f"one of {', '.join(named)}" if named else "names are known with --classes only"
            raise DataError(f"ignore names {each!r}, which is neither a value of masks nor a class: {names}")
    return tuple(sorted({named[each] if each in named else int(each) for each in ignore}))


def _row(key, value):
    """(value, name, colour or None) of an entry of the file."""
    entry = {"name": value} if isinstance(value, str) else value
    if not isinstance(entry, dict):
        raise ValueError(f"{str(entry)[:60]!r}")
    if others := sorted(entry.keys() - set(_KEYS)):
        raise ValueError(unknown("key", others[0], _KEYS))
    number, colour = entry.get("value", key), entry.get("color")
    if not isinstance(entry["name"], str) or isinstance(number, bool):
        raise ValueError(f"{str(entry)[:60]!r}")
    if isinstance(colour, str):
        colour = ImageColor.getrgb(colour)
    if colour is not None and (len(colour) != 3 or not all(type(c) is int and 0 <= c <= 255 for c in colour)):
        raise ValueError(f"the color {colour!r}")
    whole = not isinstance(number, float) or number.is_integer()
    if not whole or not 0 <= int(number) < VALUES:
        raise ValueError(f"the value {number!r}, expected a whole number from 0 to {VALUES - 1}")
    return int(number), entry["name"], colour and tuple(colour)


def _colours(values, mask):
    """A colour for each value: of the palette of `mask`, else distinct ones."""
    palette = mask.getpalette() if mask is not None and mask.mode == "P" else None
    if palette is not None and all(3 * value + 3 <= len(palette) for value in values):
        colours = [tuple(palette[3 * value : 3 * value + 3]) for value in values]
        if len(set(colours)) == len(colours):
            return colours
    # the golden ratio spreads any number of hues; brightness alternates, so that neighbours differ in that too
    tints = [(i * 0.618034 % 1 * 360, (75, 55, 90)[i % 3], (95, 65, 80)[i % 3]) for i in range(len(values))]
    return [ImageColor.getrgb("hsv({:.0f},{}%,{}%)".format(*tint)) for tint in tints]
