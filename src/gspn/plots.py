"""Pictures: learning curves, predictions on test images, confusion, where one pixel's context comes from, samples."""

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter
from PIL import Image, ImageDraw, ImageFont

from gspn.data.images import UNREADABLE
from gspn.files import atomic, make_folder
from gspn.models import Backbone, context_maps
from gspn.models.latents import NotFiniteError
from gspn.ops import DIRECTIONS
from gspn.train.loop import TrainingError

BLUE, ORANGE, RED, GREY = "#2f6db3", "#e07b22", "#c62828", "#5f6368"
COLUMNS, ROWS, WRONG = 8, 5, 8  # the grid of predictions, and how many wrong ones it shows at most
GRID_COLUMNS, GRID_CLASSES = 10, 60  # of a grid of samples: the most images of a class, and the most classes
GRID_SIDES = 96, 256  # pixels: smaller images are enlarged to the first by a whole factor, larger ones are shrunk
GAP, LETTERS, INK, PAPER = 4, 20, "black", "white"
AS_IT_IS = {"parse_math": False}  # for text with names of classes, in which matplotlib would read $...$ as a formula


def save(figure, path):
    """Writes a figure as PNG, atomically. Errors: SaveError."""
    with atomic(path) as temporary, warnings.catch_warnings():
        for said in ("Glyph .* missing from", "Matplotlib currently does not support .* natively"):
            warnings.filterwarnings("ignore", said)  # a line for each letter; docs/limits.md tells of them
        figure.savefig(temporary, format="png", dpi=130, facecolor="white")


def save_picture(path: Path | str, picture: Image.Image) -> None:
    """Writes an image as PNG, atomically, and makes its folder if there is none. Errors: SaveError."""
    make_folder(Path(path).parent)
    with atomic(path) as temporary:
        picture.save(temporary, format="png")


def curves(run, shown=(("top1", "top-1"), ("top5", "top-5"))):
    """Draws RUN/curves.png from the run's metrics: losses, and accuracy with the best epoch marked.

    Args: shown: two metrics, each with what it is called; the best checkpoint has the largest of the first one."""
    rows = run.metrics
    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    marker = "o" if len(rows) < 3 else None
    smoothing = run.config["options"].get("label_smoothing")
    smoothed = f" (label smoothing {smoothing:g})" if smoothing else ""
    loss.plot(epochs, [row["train_loss"] for row in rows], color=BLUE, marker=marker, label=f"training{smoothed}")
    loss.plot(epochs, [row["val_loss"] for row in rows], color=ORANGE, marker=marker, label="validation")
    loss.set(title="Loss", xlabel="epoch", yscale="log")
    loss.legend(frameon=False)
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_locator(NullLocator())

    (first, name), (second, other_name) = shown
    main = [row[first] for row in rows]
    best = max(range(len(rows)), key=lambda i: (main[i], -rows[i]["val_loss"]))  # as the loop chooses
    accuracy.plot(epochs, main, color=ORANGE, marker=marker, label=name)
    if all(row[second] is not None for row in rows):
        other = [row[second] for row in rows]
        accuracy.plot(epochs, other, color=GREY, linestyle="--", marker=marker, label=other_name)
    accuracy.plot([epochs[best]], [main[best]], "o", color=RED, label=f"best: {main[best]:.2%}, epoch {epochs[best]}")
    accuracy.set(title="Validation accuracy", xlabel="epoch")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    accuracy.legend(frameon=False, loc="lower right")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    save(figure, run.path / "curves.png")


def losses(run):
    """Draws RUN/curves.png of a generator: the loss, and the two parts of its validation loss."""
    rows = run.metrics
    epochs, marker = [row["epoch"] for row in rows], "o" if len(rows) < 3 else None
    learned = any(row["val_bound"] for row in rows)  # else there is no variance, and nothing bounds it
    figure = Figure(figsize=(12 if learned else 8, 3.6), layout="constrained")
    loss, error, *bound = figure.subplots(1, 2 + learned)
    loss.plot(epochs, [row["train_loss"] for row in rows], color=BLUE, marker=marker, label="training")
    loss.plot(epochs, [row["val_loss"] for row in rows], color=ORANGE, marker=marker, label="validation")
    loss.set(title="Loss")
    loss.legend(frameon=False)
    error.plot(epochs, [row["val_error"] for row in rows], color=ORANGE, marker=marker)
    error.set(title="Squared error, validation")
    for axes in bound:
        axes.plot(epochs, [row["val_bound"] for row in rows], color=ORANGE, marker=marker)
        axes.set(title="Variational bound, validation (bits)")
    _save_losses(run, figure)


def distillation(run):
    """Draws RUN/curves.png of a distillation: the loss, and the three parts of its validation loss; beside the noise
    loss the teacher's own."""
    rows = run.metrics
    epochs, marker = [row["epoch"] for row in rows], "o" if len(rows) < 3 else None
    figure = Figure(figsize=(15, 3.6), layout="constrained")
    loss, *parts = figure.subplots(1, 4)
    loss.plot(epochs, [row["train_loss"] for row in rows], color=BLUE, marker=marker, label="training")
    loss.plot(epochs, [row["val_loss"] for row in rows], color=ORANGE, marker=marker, label="validation")
    loss.set(title="Loss")
    titles = {"noise": "Noise", "output": "Against the teacher's output", "feature": "Against its attentions"}
    for axes, (name, title) in zip(parts, titles.items(), strict=True):
        axes.plot(epochs, [row[f"val_{name}"] for row in rows], color=ORANGE, marker=marker, label="student")
        axes.set(title=f"{title}, validation")
    parts[0].plot(epochs, [row["val_teacher"] for row in rows], "--", color=GREY, marker=marker, label="teacher")
    for axes in (loss, parts[0]):
        axes.legend(frameon=False)
    _save_losses(run, figure)


def _save_losses(run, figure):
    for axes in figure.axes:
        axes.set(xlabel="epoch", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.25, which="both")
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    save(figure, run.path / "curves.png")


def predictions(path, split, outcome, preprocessing, class_names, split_name):
    """Draws a grid of a split's images as the model sees them, with predicted class and its probability: up to eight
    wrong ones first, marked red and with the true class, then right ones, evenly spaced.

    Args:
        path: of the PNG. split: images.Split. outcome: classification.Outcome on it.
        preprocessing: images.Preprocessing.
    """
    readable = outcome.label != UNREADABLE
    right = outcome.top[:, 0] == outcome.label
    wrong_rows, right_rows = torch.where(readable & ~right)[0], torch.where(readable & right)[0]
    shown = _spaced(wrong_rows, WRONG)
    shown += _spaced(right_rows, COLUMNS * ROWS - len(shown))
    rows = -(-len(shown) // COLUMNS)
    tall = preprocessing.size[0] / preprocessing.size[1]  # an image is 1 wide and this tall, with 0.32 for its text
    figure = Figure(figsize=(COLUMNS * 1.3, rows * (tall + 0.32) * 1.3 + 0.6), layout="constrained")
    total, correct = int(readable.sum()), int((readable & right).sum())
    axes = figure.subplots()
    axes.set_title(
        f"{correct:,} of {total:,} {split_name} images right ({correct / total:.2%}); {len(wrong_rows):,} wrong, red",
        fontsize=12,
    )
    axes.axis("off")
    guesses, labels = shortened(class_names, 10), shortened(class_names, 14)
    for cell, row in enumerate(shown):
        left, top = cell % COLUMNS, cell // COLUMNS * (tall + 0.32) + 0.32
        extent = (left + 0.04, left + 0.96, top + tall * 0.92, top)
        pixels = preprocessing(split.image(int(outcome.index[row])))
        axes.imshow(_shown(pixels), cmap="gray", vmin=0, vmax=255, extent=extent)
        guess, label = guesses[int(outcome.top[row, 0])], labels[int(outcome.label[row])]
        title, colour = f"{guess} ({float(outcome.probability[row, 0]):.0%})", "black"
        if not right[row]:
            title, colour = f"{title}\nis {label}", RED
            frame = dict(edgecolor=RED, linewidth=3, fill=False)
            axes.add_patch(Rectangle((extent[0], top), 0.92, tall * 0.92, **frame))
        axes.text(left + 0.5, top - 0.03, title, fontsize=8, color=colour, ha="center", va="bottom", **AS_IT_IS)
    axes.set(xlim=(0, COLUMNS), ylim=(rows * (tall + 0.32), 0))
    save(figure, path)


def confusion(path, matrix, class_names, metrics):
    """Draws the confusion matrix, in parts of the images of a class, and beside it how often predictions of a given
    probability are right.

    Args:
        path: of the PNG. matrix: of Outcome.confusion, int64 (K, K). metrics: of classification.evaluate.
    """
    side, margin = matrix_size(class_names)
    figure = Figure(figsize=(side + margin + 5.6, side + margin + 0.9), layout="constrained")
    axes, reliability = figure.subplots(1, 2, width_ratios=(side + margin + 1.2, 4.2))
    draw_matrix(figure, axes, matrix, class_names)
    height, width = metrics["size"]
    title = f"{metrics['images']:,} {metrics['split']} images at {height}x{width}: top-1 {metrics['top1']:.2%}"
    axes.set_title(title, fontsize=11, loc="left")

    rows = metrics["reliability"]
    left, width = [row["from"] for row in rows], [row["to"] - row["from"] for row in rows]
    reliability.bar(left, [row["accuracy"] for row in rows], width, align="edge", color=BLUE, edgecolor="white")
    centre = [(row["from"] + row["to"]) / 2 for row in rows]
    share = [row["images"] / metrics["images"] for row in rows]
    reliability.plot(centre, share, "o-", color=ORANGE, markersize=4, label="part of the images")
    reliability.plot([0, 1], [0, 1], "--", color="black", linewidth=1, label="as often right as probable")
    reliability.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="probability of the answer", ylabel="part right")
    reliability.set_title(f"calibration error {metrics['ece']:.2%}", fontsize=11)
    reliability.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    for axis in (reliability.xaxis, reliability.yaxis):
        axis.set_major_formatter(PercentFormatter(1, 0))
    reliability.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def matrix_size(class_names):
    """Inches: the side of a confusion matrix, and the margin for its names."""
    names = shortened(class_names, 18) if len(class_names) <= 40 else []
    return min(max(0.42 * len(class_names), 4.2), 12), 0.08 * max(map(len, names), default=0)


def draw_matrix(figure, axes, matrix, class_names):
    """Draws a confusion matrix, in parts of a class."""
    K = len(class_names)
    share = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    image = axes.imshow(share.numpy(), cmap="Blues", norm=PowerNorm(0.5, 0, 1))  # a root scale: rare mistakes show
    figure.colorbar(image, ax=axes, shrink=0.7, format=PercentFormatter(1))
    axes.set(xlabel="taken for", ylabel="class")
    if K <= 40:
        names = shortened(class_names, 18)
        axes.set_xticks(range(K), names, rotation=90, fontsize=8, **AS_IT_IS)
        axes.set_yticks(range(K), names, fontsize=8, **AS_IT_IS)
    if K <= 20:
        for i, j in matrix.nonzero().tolist():
            colour = "white" if share[i, j] > 0.4 else "black"
            axes.text(j, i, f"{share[i, j]:.0%}", ha="center", va="center", fontsize=7, color=colour)


def _spaced(rows, count):
    at = np.unique(np.linspace(0, len(rows) - 1, count).astype(int)) if len(rows) and count else []
    return [int(rows[i]) for i in at]


def _shown(pixels):
    return (pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)).numpy()


def shortened(names, length):
    """The names, cut to `length` characters. Of those that begin alike both ends are kept, which tell them apart."""
    begin = Counter(name[: length - 1] for name in names)
    cut, short = (length - 1) // 2, []
    for name in names:
        if len(name) > length:
            alike = begin[name[: length - 1]] > 1
            name = f"{name[:cut]}…{name[cut + 1 - length :]}" if alike else name[: length - 1] + "…"
        short.append(name)
    return short


def context(path, loaded, image, place=None, block=None, narrowest=False):
    """Draws where the context of one pixel of a model's input comes from; arguments and errors as for
    `context_figure`, and SaveError.

    Args:
        path: of the PNG. loaded: runs.Classifier or runs.Segmentation. image: PIL, upright.
    """
    pixels, normalize = loaded.pixels(image), loaded.preprocessing.normalize
    save(context_figure(loaded.model, pixels, normalize, place, block, narrowest), path)


def context_figure(model, pixels, normalize, place=None, block=None, narrowest=False) -> Figure:
    """Where the context of one pixel comes from: the input with the pixel marked, the four directions, merged.

    Args:
        model: Backbone or Segmenter. pixels: uint8 (C,H,W). normalize: makes the model's input of a batch of them.
        place: the pixel (row, column); None is the middle.
        block: number of the block, from the end if negative, or its name. None is the last one whose feature map has at
            least eight rows and columns (or the last of the first level); of a segmenter, the last one of the decoder.
        narrowest: draws each direction for the channel with the narrowest context, not the mean over channels.
    Errors: ValueError for a pixel outside the input, an unknown block, or values that are not finite.
    """
    height, width = pixels.shape[1:]
    row, column = place or (height // 2, width // 2)
    if block is None:
        block = -1
        if isinstance(model, Backbone):
            for depth, level in zip(model.depths, model.feature_info, strict=True):
                if block == -1 or min(height, width) / level["reduction"] >= 8:
                    block += depth
    device = next(model.parameters()).device
    maps = context_maps(model, normalize(pixels[None].to(device))[0], (row, column), block, narrowest)
    if wrong := int((~torch.as_tensor(maps["merged"]).isfinite()).sum()):
        raise ValueError(f"{wrong} values of the context in {maps['block']} are not finite: the weights are damaged")
    figure = Figure(figsize=(9.6, 6.2), layout="constrained")
    figure.suptitle(f"Where the context of pixel ({row}, {column}) comes from, {maps['block']}", fontsize=12)
    panels = ["input", *DIRECTIONS, "merged"]
    arrows = {"right": "→", "down": "↓", "left": "←", "up": "↑"}
    for axes, name in zip(figure.subplots(2, 3).flat, panels, strict=True):
        if name == "input":
            axes.imshow(_shown(pixels), cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0))
            axes.set_title(f"input, {height}x{width}", fontsize=10)
        else:
            values = torch.as_tensor(maps[name]).float().cpu().numpy()
            share = values / max(values.sum(), 1e-30)
            others = share.copy()
            others[maps["place"]] = 0  # the pixel's own share outshines the rest: it is in the title
            most = others.max() or 1.0
            shown = axes.imshow(share, cmap="magma", norm=PowerNorm(0.5, 0, most), extent=(0, width, height, 0))
            decimals = 0 if most > 0.1 else 1 if most > 0.01 else 2
            ticks = MaxNLocator(5)
            bar = figure.colorbar(shown, ax=axes, shrink=0.8, ticks=ticks, format=PercentFormatter(1, decimals))
            bar.ax.tick_params(labelsize=7)
            going = f"{name}, one channel" if narrowest else f"scan going {name}"
            what = "all four merged" if name == "merged" else f"{arrows[name]} {going}"
            axes.set_title(f"{what}; itself {share[maps['place']]:.0%}", fontsize=10)
        _mark(axes, row, column, height, width)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.supxlabel(
        f"the share of the context that comes from each position in the {'x'.join(map(str, share.shape))} feature map; "
        "colours on a square-root scale",
        fontsize=9,
        color=GREY,
    )
    return figure


def _mark(axes, row, column, height, width):
    side = max(1.0, max(height, width) / 32)
    centre = (column + 0.5 - side / 2, row + 0.5 - side / 2)
    axes.add_patch(Rectangle(centre, side, side, fill=False, edgecolor="black", linewidth=3.2))
    axes.add_patch(Rectangle(centre, side, side, fill=False, edgecolor="#35e0ff", linewidth=1.6))


# -- samples --


@contextmanager
def drawing_samples(epoch: int) -> Iterator[None]:
    """Turns a NotFiniteError into a TrainingError that says how to continue without samples."""
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
    columns: int = GRID_COLUMNS,
    classes: int = GRID_CLASSES,
) -> Image.Image:
    """A picture of `images` of one size: a row for each class, with its name to the left. Classes with few images stand
    side by side.

    Args:
        labels: the class of each image. title: a line above.
        columns: the most images of a class. classes: the most classes, the first ones.
    """
    rows = {}
    for image, label in zip(images, labels, strict=True):
        row = rows.setdefault(label, [])
        if len(row) < columns:
            row.append(_enlarged(image))
    rows = {label: rows[label] for label in sorted(rows)[:classes]}
    width, height = next(iter(rows.values()))[0].size
    font = ImageFont.truetype(findfont("DejaVu Sans"), 14 if height >= 40 else 11)
    names = {label: _name_lines(class_names[label]) for label in rows}
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
        for column, image in enumerate(row):
            picture.paste(image, (left + beside + column * (width + GAP), y))
    return picture


def _enlarged(image):
    longest, (least, most) = max(image.size), GRID_SIDES
    if longest > most:
        size = [max(1, round(side * most / longest)) for side in image.size]
        return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    factor = math.ceil(least / longest)
    return image.convert("RGB").resize([side * factor for side in image.size], Image.Resampling.NEAREST)


def _name_lines(name):
    """The name on one or two lines, shortened if necessary."""
    name = name.strip() or "?"
    if len(name) <= LETTERS:
        return [name]
    at = name.rfind(" ", 0, LETTERS + 1)
    first, second = (name[:at], name[at + 1 :]) if at > 0 else (name[:LETTERS], name[LETTERS:])
    return [first, second if len(second) <= LETTERS else second[: LETTERS - 1] + "…"]
