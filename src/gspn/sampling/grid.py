"""Pictures of samples: a grid with the name of every class beside its images."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from gspn.files import SaveError, atomic
from gspn.models.latents import NotFiniteError
from gspn.train.loop import TrainingError

SHOWN = 96, 256  # pixels that the longer side of an image is brought to at least, by whole factors, and at most
COLUMNS, CLASSES = 10, 60  # the most images of a class, and the most classes, to show
GAP, LETTERS, INK, PAPER = 4, 20, "black", "white"


def save_picture(path: Path | str, picture: Image.Image) -> None:
    """Writes a PNG file, atomically, in a folder that is made if it is not there. Errors: SaveError."""
    folder = Path(path).parent
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise SaveError(f"cannot make the folder {folder}: {error.strerror}") from error
    with atomic(path) as temporary:
        picture.save(temporary, format="png")


@contextmanager
def drawing_samples(epoch: int) -> Iterator[None]:
    """Turns values of samples that are not finite into a TrainingError, which says how to go on without samples."""
    try:
        yield
    except NotFiniteError as error:
        raise TrainingError(
            f"the samples after epoch {epoch} cannot be drawn: {error}. With --sample-every 0, which --resume takes "
            "too, none are drawn"
        ) from error


def draw_grid(
    images: Sequence[Image.Image],
    labels: Sequence[int],
    class_names: Sequence[str],
    *,
    title: str = "",
    columns: int = COLUMNS,
    classes: int = CLASSES,
) -> Image.Image:
    """A picture of `images`, all of one size, a row for each class with its name to the left; where there are few
    images a class, several classes side by side.

    Args:
        labels: the class of each image. title: a line above.
        columns: the most images to show of a class. classes: the most classes to show, the first ones.
    """
    rows = {}
    for image, label in zip(images, labels, strict=True):
        row = rows.setdefault(label, [])
        if len(row) < columns:
            row.append(_enlarged(image))
    rows = {label: rows[label] for label in sorted(rows)[:classes]}
    width, height = next(iter(rows.values()))[0].size
    font = ImageFont.truetype(findfont("DejaVu Sans"), 14 if height >= 40 else 11)
    names = {label: _lines(class_names[label]) for label in rows}
    line = sum(font.getmetrics())
    beside = 2 * GAP + math.ceil(max(font.getlength(text) for lines in names.values() for text in lines))
    across, down = beside + max(map(len, rows.values())) * (width + GAP), max(height, 2 * line) + GAP
    blocks = min(len(rows), max(1, round(math.sqrt(len(rows) * down / across))))  # about as wide as high
    per_block = math.ceil(len(rows) / blocks)
    top = GAP + (line + GAP if title else 0)
    needed = math.ceil(font.getlength(title)) + 2 * GAP
    size = max(blocks * across + GAP, needed), top + per_block * down
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((GAP, GAP), title, INK, font)
    for number, (label, row) in enumerate(rows.items()):
        left, y = GAP + number // per_block * across, top + number % per_block * down
        text = "\n".join(names[label])
        draw.text(
            (left + beside - 2 * GAP, y + (down - GAP) / 2), text, INK, font, anchor="rm", align="right", spacing=2
        )
        for place, image in enumerate(row):
            picture.paste(image, (left + beside + place * (width + GAP), y))
    return picture


def _enlarged(image):
    longest, (least, most) = max(image.size), SHOWN
    if longest > most:
        size = [max(1, round(side * most / longest)) for side in image.size]
        return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    factor = math.ceil(least / longest)
    return image.convert("RGB").resize([side * factor for side in image.size], Image.Resampling.NEAREST)


def _lines(name):
    """The name on one line or two, the second one cut short."""
    name = name.strip() or "?"
    if len(name) <= LETTERS:
        return [name]
    at = name.rfind(" ", 0, LETTERS + 1)
    first, second = (name[:at], name[at + 1 :]) if at > 0 else (name[:LETTERS], name[LETTERS:])
    return [first, second if len(second) <= LETTERS else second[: LETTERS - 1] + "…"]
