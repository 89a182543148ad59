"""Pictures of segmentation: the confusion of pixels, images with truth and prediction, masks laid over images."""

import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ticker import PercentFormatter
from PIL import Image, ImageDraw, ImageFont

from gspn.data.images import with_channels
from gspn.plots import BLUE, GAP, INK, PAPER, draw_matrix, matrix_size, save, save_picture, shortened

PAIRS, PAIR_SIDE = 5, 320  # images with truth and prediction in a picture, and the pixels of their longer side


def pixel_confusion(path, matrix, class_names, metrics):
    """Draws the confusion matrix of pixels, in parts of the pixels of a class, with the IoU of each class.

    Args:
        path: of the PNG. matrix: int64 (K, K). metrics: of metrics.segmentation, with "split" and "scale".
    """
    side, margin = matrix_size(class_names)
    # "compressed" lays out what surrounds the square matrix, and keeps the bars beside its rows
    figure = Figure(figsize=(side + margin + 5.0, side + margin + 1.3), layout="compressed")
    axes, bars = figure.subplots(1, 2, width_ratios=(side + margin + 1.2, 3.2))
    draw_matrix(figure, axes, matrix, class_names)
    at = "" if metrics["scale"] == 1 else f" at {metrics['scale']:g} times their size"
    axes.set_title(f"Pixels of {metrics['images']:,} {metrics['split']} images{at}", fontsize=11, loc="left")
    iou = [metrics["iou"][name] for name in class_names]
    bars.barh(range(len(iou)), [value or 0 for value in iou], color=BLUE)
    for row, value in enumerate(iou if len(iou) <= 40 else ()):
        text = "no pixel" if value is None else f"{value:.1%}"
        bars.text((value or 0) + 0.01, row, text, va="center", fontsize=8)
    bars.set(xlim=(0, 1.15), ylim=(len(iou) - 0.5, -0.5), xlabel="IoU")
    bars.set_yticks([])
    bars.xaxis.set_major_formatter(PercentFormatter(1, 0))
    bars.set_title(f"mean IoU {metrics['miou']:.2%}", fontsize=11)
    bars.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def pairs(path, split, predictions, classes, metrics):
    """Draws images of a split with their truth and their prediction, and a legend.

    Args:
        path: of the PNG. split: images.MaskedSplit. predictions: {index: uint8 (H, W) of class numbers}.
        classes: mask_classes.Classes. metrics: with "split", "images" and "miou".
    """
    if predictions:
        title = f"{metrics['images']:,} {metrics['split']} images, mean IoU {metrics['miou']:.2%}"
        save_picture(path, pairs_picture(split, predictions, classes, title))


def pairs_picture(split, predictions, classes, title="image, truth, prediction") -> Image.Image:
    """The picture that `pairs` saves."""
    rows, counts = [], np.zeros(256, np.int64)
    for index in sorted(predictions):
        image, truth = split.pair(index, classes.numbers)
        masks = truth, predictions[index]
        columns = [with_channels(image, 3), *(Image.fromarray(classes.coloured(numbers)) for numbers in masks)]
        for numbers in masks:
            counts += np.bincount(numbers.ravel(), minlength=256)
        rows.append([_pair_sized(each) for each in columns])
    width, height = (max(row[0].size[side] for row in rows) for side in (0, 1))
    there = [(name, classes.colours[i]) for i, name in enumerate(classes.names) if counts[i]]
    there += [("ignored", (0, 0, 0))] if counts[255] else []
    legend = _legend(there, 16)
    font = ImageFont.truetype(findfont("DejaVu Sans"), 14)
    top, across = 2 * GAP + sum(font.getmetrics()), width + GAP
    size = GAP + 3 * across + legend.width, max(top + len(rows) * (height + GAP), top + legend.height)
    picture = Image.new("RGB", size, PAPER)
    heading = f"{title}: image, truth, prediction" if "truth" not in title else title
    ImageDraw.Draw(picture).text((GAP, GAP), heading, INK, font)
    for y, row in enumerate(rows):
        for x, cell in enumerate(row):
            picture.paste(cell, (GAP + x * across, top + y * (height + GAP)))
    picture.paste(legend, (GAP + 3 * across, top))
    return picture


def _pair_sized(image):
    """A cell of `pairs`, at most PAIR_SIDE wide and high; classes keep their colours."""
    scale = PAIR_SIDE / max(image.size)
    size = [max(1, round(side * scale)) for side in image.size]
    return image.resize(size, Image.Resampling.NEAREST)


def overlay(image, numbers, classes) -> Image.Image:
    """An image with the colours of its mask laid over it, and a legend with the share of each class beside it.

    Args:
        image: PIL. numbers: uint8 (H, W) of class numbers. classes: mask_classes.Classes.
    """
    laid = Image.blend(with_channels(image, 3), Image.fromarray(classes.coloured(numbers)), 0.5)
    share = np.bincount(numbers.ravel(), minlength=len(classes)) / numbers.size
    order = [i for i in np.argsort(-share).tolist() if share[i] > 0]
    rows = [(f"{classes.names[i]}  {share[i]:.1%}", classes.colours[i]) for i in order]
    legend = _legend(rows, min(max(14, max(image.size) // 40), laid.height // (2 * len(rows)) + 6))
    picture = Image.new("RGB", (laid.width + legend.width, max(laid.height, legend.height)), PAPER)
    picture.paste(laid, (0, 0))
    picture.paste(legend, (laid.width, 0))
    return picture


def _legend(rows, size) -> Image.Image:
    """A column of (name, colour), in letters of `size` pixels."""
    font = ImageFont.truetype(findfont("DejaVu Sans"), max(8, size))
    line, gap = sum(font.getmetrics()) + size // 3, max(GAP, size // 2)
    names = shortened([name for name, _ in rows], 32)
    width = line + 3 * gap + math.ceil(max(map(font.getlength, names), default=0))
    legend = Image.new("RGB", (width, 2 * gap + line * len(rows)), PAPER)
    draw = ImageDraw.Draw(legend)
    for number, (name, (_, colour)) in enumerate(zip(names, rows, strict=True)):
        top = gap + number * line
        draw.rectangle((gap, top + line // 8, gap + line * 3 // 4, top + line * 7 // 8), colour, INK)
        draw.text((2 * gap + line * 3 // 4, top + line / 2), name, INK, font, anchor="lm")
    return legend
