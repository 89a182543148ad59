"""Draws the pictures of the README and of the documents, into docs/images.

    python docs/figures.py              # growth.png and directions.png
    python docs/figures.py --run RUN    # and context.png; RUN is a classifier of colour images; the published picture
                                        # shows gspn-micro-plain of benchmarks/README.md
    python docs/figures.py --model FILE # and paths.png; FILE holds the weights of a centred backbone, as
                                        # `benchmarks.quality.mixers.study --models FOLDER` keeps them; the published
                                        # picture shows classes-bare-gspn-center-lr0.012-seed0-600steps

The photo is scikit-learn's china.jpg, by danielbuechele, CC BY 2.0.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_sample_image
from torch import Tensor

import gspn
from gspn.models.influence import context_maps

ROOT = Path(__file__).parents[1]
GROWTH = ROOT / "benchmarks/results/speed/growth-cpu.json"
# name in the results: name and place of the label, colour
CONTENDERS = {
    "attention": ("self-attention", (7, 3), "#c62828"),
    "linear attention": ("linear attention", (-96, 6), "#3a8f5c"),
    "gspn": ("GSPN", (7, 0), "#2f6db3"),
    "depthwise 7x7": ("depthwise 7x7", (-24, -27), "#e07b22"),
}
SIDE, PIXEL, BLOCK = 160, (100, 90), "levels.0.blocks.1"
CREDIT = "photo: danielbuechele, CC BY 2.0"


def photo() -> Image.Image:
    image = Image.fromarray(load_sample_image("china.jpg"))
    left = (image.width - image.height) // 2
    square = image.crop((left, 0, left + image.height, image.height))
    return square.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def weights_by_colour(x: Tensor, direction: str, sharpness: float = 300) -> Tensor:
    """Propagation weights (B,1,3,H,W) set by hand: softmax of -sharpness * |colour - colour of the neighbour|^2.

    They are non-negative and sum to 1 over the neighbours that exist, as a layer's are.
    """
    line, across = (3, 2) if direction in ("right", "left") else (2, 3)
    before = x.roll(1 if direction in ("right", "down") else -1, line)
    place = torch.arange(x.shape[across]).view((-1, 1) if across == 2 else (1, -1))
    scores = []
    for offset in (-1, 0, 1):
        distance = (x - before.roll(-offset, across)).square().sum(1)
        missing = (place + offset < 0) | (place + offset >= x.shape[across])
        scores.append((-sharpness * distance).masked_fill(missing, -torch.inf))
    return torch.stack(scores, 1).softmax(1)[:, None]


def influence(weights: Tensor, direction: str, pixel: tuple[int, int]) -> Tensor:
    """The influence map (H,W) of a pixel in one direction: the gradient of its state."""
    x = torch.zeros(1, 1, *weights.shape[-2:], requires_grad=True)
    h = gspn.line_scan(x, weights, direction=direction)
    return torch.autograd.grad(h[0, 0, *pixel], x)[0][0, 0]


def show(axes, values, pixel, title):
    values = torch.as_tensor(values).clone()
    others = values.clone()
    others[pixel] = 0  # the pixel's own share outshines the rest
    most = float(others.flatten().quantile(0.998)) or float(others.max())
    height, width = values.shape
    axes.imshow(values, cmap="magma", norm=PowerNorm(0.5, 0, most), extent=(0, SIDE, SIDE, 0))
    finish(axes, title, ((pixel[0] + 0.5) * SIDE / height, (pixel[1] + 0.5) * SIDE / width))


def finish(axes, title, at):
    axes.set_title(title, fontsize=9.5)
    axes.set_xticks([])
    axes.set_yticks([])
    for colour, width in (("black", 3.2), ("#35e0ff", 1.6)):
        axes.add_patch(Rectangle((at[1] - 3, at[0] - 3), 6, 6, fill=False, edgecolor=colour, linewidth=width))


def caption(figure, text):
    figure.supxlabel(text, fontsize=8, color="#5f6368")


def draw_growth() -> Figure:
    """Time of one layer's forward pass against the pixels of the map, from the published results."""
    results = json.loads(GROWTH.read_text())
    figure = Figure(figsize=(7.2, 3.9), layout="constrained")
    axes = figure.subplots()
    sides = set()
    for name, (label, offset, colour) in CONTENDERS.items():
        rows = [row for row in results["growth"]["cases"] if row["pass"] == "forward" and name in row["contenders"]]
        points = [(row["side"] ** 2, row["contenders"][name]["ms"][1]) for row in rows]
        axes.plot(*zip(*points, strict=True), "o-", color=colour, ms=4, label=label)
        axes.annotate(label, points[-1], offset, textcoords="offset points", color=colour, fontsize=10)
        sides |= {row["side"] for row in rows}
    sides = sorted(sides)
    axes.set(xscale="log", yscale="log", ylabel="milliseconds", xlabel="size of the feature map")
    axes.set_xticks([side**2 for side in sides], [f"{side}²" for side in sides], fontsize=9)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.margins(x=0.12)
    axes.grid(alpha=0.25, axis="y")
    axes.spines[["top", "right"]].set_visible(False)
    channels = results["growth"]["channels"]
    axes.set_title(f"One layer of {channels} channels, forward, one CPU thread, float32", fontsize=11, loc="left")
    caption(figure, f"{results['title']}; torch {results['machine']['torch']}; medians of CPU time")
    return figure


def draw_directions() -> Figure:
    """Influence maps of one pixel in the four directions: with even weights, and with weights set by colour."""
    image = photo()
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    figure = Figure(figsize=(11, 4.9), layout="constrained")
    panels = figure.subplots(2, 5)
    arrows = {"right": "→", "down": "↓", "left": "←", "up": "↑"}
    for row, name in zip(panels, ("even weights", "weights by colour, set by hand"), strict=True):
        row[0].imshow(image, extent=(0, SIDE, SIDE, 0))
        finish(row[0], name, PIXEL)
        for axes, direction in zip(row[1:], gspn.DIRECTIONS, strict=True):
            if name == "even weights":
                logits = torch.zeros(1, 1, 3, SIDE, SIDE)
                weights = gspn.normalize_weights(logits, direction=direction)
            else:
                weights = weights_by_colour(x, direction)
            show(axes, influence(weights, direction, PIXEL), PIXEL, f"{arrows[direction]} {direction}")
    caption(figure, f"both rows: weights are non-negative and sum to 1 at every pixel; {CREDIT}")
    return figure


def draw_context(run: str) -> Figure:
    """The photo, and where the context of one of its pixels comes from: in a trained layer, and by colour."""
    image, classifier = photo(), gspn.load_run(run, task="classification")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    trained = context_maps(classifier.model, classifier.preprocessing.normalize(pixels)[0], PIXEL, BLOCK)
    x = pixels.float() / 255
    by_hand = {d: influence(weights_by_colour(x, d), d, PIXEL) for d in gspn.DIRECTIONS}
    figure = Figure(figsize=(9, 4.9), layout="constrained")
    panels = figure.subplot_mosaic([["photo", "a", "b"], ["photo", "c", "d"]], width_ratios=(2.05, 1, 1))
    panels["photo"].imshow(image, extent=(0, SIDE, SIDE, 0))
    finish(panels["photo"], "where does this pixel's context come from?", PIXEL)
    show(panels["a"], trained["right"], trained["place"], "trained layer,\nscan going right")
    show(panels["b"], trained["merged"], trained["place"], "trained layer,\nall four merged, with gates")
    show(panels["c"], by_hand["right"], PIXEL, "weights set by hand,\nscan going right")
    show(panels["d"], sum(by_hand.values()) / 4, PIXEL, "weights set by hand,\nall four merged")
    caption(
        figure, f"trained: {BLOCK} of gspn_micro, CIFAR-10, three epochs; by hand: from differences of colour; {CREDIT}"
    )
    return figure


def draw_paths(weights: Path) -> Figure:
    """The photo, and the paths to one of its pixels in channels of a trained backbone: those whose weights vary most
    over the photo (deviation over the pixels, mean over the three neighbours), in its first two blocks."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.quality.mixers import inside
    from benchmarks.quality.mixers.contenders import PATCH, backbone
    from benchmarks.quality.mixers.tasks import normalized

    model, image = backbone("gspn-center", "bare", 10, True, seed=0), photo()
    model.load_state_dict(load_file(weights))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    calls, place = inside.calls_of(model.eval(), [normalized(pixels)]), tuple(side // PATCH for side in PIXEL)
    figure = Figure(figsize=(9.6, 4), layout="constrained")
    rows = [["photo", *(f"{block},{i}" for i in range(4))] for block in range(2)]
    panels = figure.subplot_mosaic(rows, width_ratios=(2.1, 1, 1, 1, 1))
    panels["photo"].imshow(image, extent=(0, SIDE, SIDE, 0))
    finish(panels["photo"], "where does this pixel's context come from?", PIXEL)
    for block in range(2):
        own = inside.one_pass(calls[block], 0).weights[0].detach()  # (channels,3,H,W), of the scan going right
        for i, channel in enumerate(own.std((2, 3)).mean(1).topk(4).indices.tolist()):
            title = f"block {block + 1}, channel {channel}"
            show(panels[f"{block},{i}"], influence(own[None, channel, None], "right", place), place, title)
    caption(figure, f"the scan going right; GSPN2d(center=True), CIFAR-10, 600 steps, learning rate 0.012; {CREDIT}")
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="a run of gspn train --model gspn_micro on colour images, for context.png")
    parser.add_argument("--model", type=Path, help="the weights of a centred backbone, for paths.png")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images")
    options = parser.parse_args()
    figures = {"growth": draw_growth(), "directions": draw_directions()}
    if options.run:
        figures["context"] = draw_context(options.run)
    if options.model:
        figures["paths"] = draw_paths(options.model)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(options.out / f"{name}.png", dpi=110)
        print(f"wrote {options.out / name}.png")


if __name__ == "__main__":
    main()
