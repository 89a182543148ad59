"""Draws the paths that the channels of a trained backbone follow over a photo.

python -m benchmarks.quality.mixers.paths --models FOLDER --contender gspn-center --rate 0.012 --out paths.png

FOLDER holds trained weights, as `study --models FOLDER` and `analyse` keep them. For two blocks it shows the channels
whose weights vary most over the photo: where the context of one pixel comes from in the scan that goes right.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_sample_image
from torch import Tensor

import gspn
from benchmarks.quality.mixers import inside
from benchmarks.quality.mixers.contenders import CONTENDERS, PATCH, backbone
from benchmarks.quality.mixers.study import Run
from benchmarks.quality.mixers.tasks import normalized

SIDE, PIXEL, BLOCKS, CHANNELS = 160, (100, 90), (0, 1), 4
CREDIT = "photo: danielbuechele, CC BY 2.0"


def photo() -> Image.Image:
    image = Image.fromarray(load_sample_image("china.jpg"))
    left = (image.width - image.height) // 2
    return image.crop((left, 0, left + image.height, image.height)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def path(weights: Tensor, place: tuple[int, int]) -> Tensor:
    """The influence map (H,W) of a pixel, for weights (3,H,W) of the direction right: the gradient of its state."""
    x = torch.zeros(1, 1, *weights.shape[-2:], requires_grad=True)
    state = gspn.line_scan(x, weights[None, None], direction="right")
    return torch.autograd.grad(state[0, 0, *place], x)[0][0, 0]


def most_varied(weights: Tensor, count: int) -> list[int]:
    """Of weights (G,3,H,W), the groups with the largest deviation over the map, mean over the three neighbours."""
    return weights.std((2, 3)).mean(1).topk(count).indices.tolist()


def draw(run: Run, models: Path) -> Figure:
    image = photo()
    model = backbone(run.contender, run.form, 10, True, run.seed)
    model.load_state_dict(load_file(models / f"{run.stem}.safetensors"))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    calls = inside.calls_of(model.eval(), [normalized(pixels)])
    place = (PIXEL[0] // PATCH, PIXEL[1] // PATCH)
    figure = Figure(figsize=(9.6, 4), layout="constrained")
    names = [[f"{block},{i}" for i in range(CHANNELS)] for block in BLOCKS]
    panels = figure.subplot_mosaic([["photo", *row] for row in names], width_ratios=(2.1, *[1] * CHANNELS))
    panels["photo"].imshow(image)
    panels["photo"].set_title("where does this pixel's context come from?", fontsize=10)
    panels["photo"].plot(PIXEL[1], PIXEL[0], "s", ms=10, mfc="none", mec="#35e0ff", mew=2)
    for block in BLOCKS:
        weights = inside.one_pass(calls[block], 0).weights[0].detach()
        for i, group in enumerate(most_varied(weights, CHANNELS)):
            axes, share = panels[f"{block},{i}"], path(weights[group], place)
            axes.imshow(share.numpy(), cmap="magma", norm=PowerNorm(0.4, 0, share.max().item()))
            axes.plot(place[1], place[0], "s", ms=5, mfc="none", mec="#35e0ff", mew=1.2)
            axes.set_title(f"block {block + 1}, channel {group}", fontsize=9)
    for axes in panels.values():
        axes.set_xticks([])
        axes.set_yticks([])
    about = f"{CONTENDERS[run.contender].title}, trained on CIFAR-10 for {run.steps} steps, learning rate {run.rate:g}"
    figure.supxlabel(f"{about}; the scan going right; {CREDIT}", fontsize=9, color="#5f6368")
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="the folder of trained weights")
    parser.add_argument("--contender", default="gspn-center", choices=CONTENDERS, metavar="MIXER")
    parser.add_argument("--rate", type=float, required=True, help="learning rate of the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    run = Run("classes", "bare", arguments.contender, arguments.rate, arguments.seed)
    draw(run, arguments.models).savefig(arguments.out, dpi=110, facecolor="white")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
