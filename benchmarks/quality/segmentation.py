"""Trains segmenters on street scenes alike, each with another mixer in the place of GSPN, and compares them.

python -m benchmarks.quality.segmentation --scenes FOLDER --minutes 60    makes missing runs, the most important first
python -m benchmarks.quality.segmentation --list                          says what is done and what is missing
python -m benchmarks.quality.segmentation --report                        tables and a picture of the finished runs

FOLDER holds CamVid as tables with the splits train, validation and test (480x360 pixels, 11 classes). Each contender is
a `gspn_micro` segmenter, made and trained by what `gspn train-segmentation` runs: same images in the same order, same
crops, steps and optimizer. The width of the blocks' inner maps is chosen so that the parameters agree within 2%. The
test images are then segmented at the trained size and at larger ones, and compared with masks of their full size.

The command may be stopped at any time and started again: only complete runs are written, one JSON file each.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn

import gspn
from benchmarks.harness import harness, study
from gspn.bench.contenders import Attention, OnMaps, ReluLinearAttentionConvolution
from gspn.layers import GSPNBlock
from gspn.metrics.segmentation import evaluate
from gspn.options.segment import SegmentationOptions
from gspn.tasks.base import start
from gspn.tasks.segment import Setup

RESULTS = harness.ROOT / "benchmarks" / "results" / "quality" / "segmentation"
MODEL, CLASSES = "gspn_micro", 11
FULL = (360, 480)
RATES = (1e-3, 2e-3, 4e-3)
SEEDS = (0, 1)
FACTORS = (1, 2, 4)  # of the trained sides, at which the test images are segmented


# -- the contenders --


class WindowAttention(Attention):
    """Softmax attention within windows of 7x7 pixels, which begin `shift` pixels before the map does (Swin's shifted
    windows, arXiv 2103.14030, without its bias of positions: the block's depthwise convolution tells them)."""

    side = 7

    def __init__(self, width: int, shift: int = 0):
        super().__init__(width, bias=False)
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        (batch, height, width, channels), side = x.shape, self.side
        padding = (self.shift, -(width + self.shift) % side, self.shift, -(height + self.shift) % side)
        qkv = F.pad(self.qkv(x).permute(0, 3, 1, 2), padding)
        inside = F.pad(x.new_ones(1, 1, height, width), padding)

        def windows(t: Tensor) -> Tensor:
            """(B,C,H,W) to (B * windows, pixels, C)."""
            t = t.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 3, 5, 1)
            return t.flatten(3, 4).flatten(0, 2)

        heads = (3, self.heads, channels // self.heads)
        q, k, v = windows(qkv).unflatten(2, heads).permute(2, 0, 3, 1, 4)
        mask = windows(inside).bool().mT.expand(-1, side * side, -1) | torch.eye(side * side, dtype=torch.bool)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat(batch, 1, 1)[:, None])
        mixed = mixed.transpose(1, 2).flatten(2)
        rows, columns = (n // side for n in qkv.shape[2:])
        mixed = mixed.reshape(batch, rows, columns, side, side, channels).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return self.out(mixed[:, self.shift :, self.shift :][:, :height, :width])


def _attention(channels: int, reduction: int, index: int) -> nn.Module:
    """Windows where the map has many pixels, all pixels from an eighth of the image's sides on."""
    return OnMaps(Attention(channels, bias=False) if reduction >= 8 else WindowAttention(channels, 3 * (index % 2)))


class Contender(NamedTuple):
    """`make` gives a layer of maps (B,C,H,W) from C, the pixels of the image for one of the map, and the number of the
    block; None keeps GSPN."""

    title: str
    make: Callable[[int, int, int], nn.Module] | None
    center: bool = False


CONTENDERS = {
    "gspn": Contender("GSPN", None),
    "none": Contender("depthwise 7x7 alone", lambda *_: nn.Identity()),
    "attention": Contender("attention (7x7 windows at 1/4)", _attention),
    "linear": Contender("linear attention + 5x5", lambda c, *_: OnMaps(ReluLinearAttentionConvolution(c, bias=False))),
    "gspn-centred": Contender("GSPN, center", None, center=True),
}


def segmenter_with(mixer: str, name: str, **arguments) -> nn.Module:
    """`create_segmenter` with another mixer. The model's config is that of the GSPN segmenter."""
    model, make = gspn.create_segmenter(name, **arguments), CONTENDERS[mixer].make
    if make is not None:
        levels = zip(model.backbone.levels, model.backbone.feature_info, strict=True)
        parts = [(level, info["reduction"]) for level, info in levels] + [(model.blocks, model.stride)]
        for part, reduction in parts:
            for index, block in enumerate(m for m in part.modules() if isinstance(m, GSPNBlock)):
                block.gspn = make(block.gspn.channels, reduction, index)
    return model


@cache
def expansion_of(mixer: str) -> float:
    """The inner width of the backbone's blocks, as a factor, with which a segmenter has the parameters of GSPN's."""
    shape = dict(num_classes=CLASSES)
    wanted = study.parameters_of(segmenter_with("gspn", MODEL, **shape))
    if CONTENDERS[mixer].make is None:
        return 1.5
    return study.nearest_factor(lambda factor: segmenter_with(mixer, MODEL, expansion=factor, **shape), wanted)


@contextmanager
def exchanged(mixer: str) -> Iterator[None]:
    """The library makes segmenters with this mixer."""
    make = lambda name, **arguments: segmenter_with(mixer, name, **arguments)  # noqa: E731
    with patch("gspn.tasks.segment.create_segmenter", make), patch("gspn.runs.create_segmenter", make):
        yield


# -- one run --


class Run(NamedTuple):
    contender: str
    rate: float
    seed: int
    epochs: int
    scale: float  # of the images in training

    @property
    def stem(self) -> str:
        return f"{self.contender}-lr{self.rate:g}-seed{self.seed}-{self.epochs}epochs-scale{self.scale:g}"


def train(run: Run, scenes: Path, console: Console | None = None, **more) -> dict:
    """Trains, and segments the test images; returns the content of the run's file. `more`: options of the training."""
    arguments = {"expansion": expansion_of(run.contender), "center": CONTENDERS[run.contender].center}
    options = SegmentationOptions(
        model=MODEL,
        model_args=arguments,
        size=tuple(round(side * run.scale) for side in FULL),
        scale=run.scale,
        ignore=("11", "255"),
        epochs=run.epochs,
        lr=run.rate,
        seed=run.seed,
        workers=0,
        channels_last=True,
        **{"precision": "bf16", **more},
    )
    with exchanged(run.contender), tempfile.TemporaryDirectory() as folder:
        path, began, at = Path(folder) / "run", time.thread_time(), {}
        trained, _ = start(Setup, scenes, path, options, console=console)
        seconds, rows = time.thread_time() - began, trained.metrics
        for factor in FACTORS:
            found, _ = evaluate(path, scenes, split="test", scale=run.scale * factor, workers=0, batch_size=4)
            at[str(factor)] = {name: found[name] for name in ("miou", "pixel_accuracy", "iou")}
            at[str(factor)] |= {"seconds_with_metrics": round(1 / found["model_images_per_second"], 4)}
        return {
            **run._asdict(),
            "parameters": study.parameters_of(segmenter_with(run.contender, MODEL, num_classes=CLASSES, **arguments)),
            "val_miou": max(row["miou"] for row in rows),
            "curve": [{name: row[name] for name in ("epoch", "train_loss", "val_loss", "miou")} for row in rows],
            "test": at,
            "cpu_seconds_of_training": round(seconds, 1),
        }


# -- which runs are missing --


def read(folder: Path) -> dict[Run, dict]:
    """The finished runs in a folder."""
    return study.read(folder, Run)


def best_rate(done: dict[Run, dict], contender: str, epochs: int, scale: float) -> float | None:
    """The rate with the highest mean IoU on the validation images, among the runs of the first seed."""
    found = {
        run.rate: content["val_miou"]
        for run, content in done.items()
        if (run.contender, run.seed, run.epochs, run.scale) == (contender, SEEDS[0], epochs, scale)
    }
    return max(found, key=found.__getitem__) if found else None


def wanted(done: dict[Run, dict], epochs: int, scale: float) -> Iterator[Run]:
    """All runs, the most important first: each contender at the middle rate, then at the others, then the other seeds
    at the best rate."""
    for rate in (RATES[1], RATES[2], RATES[0]):
        yield from (Run(name, rate, SEEDS[0], epochs, scale) for name in CONTENDERS)
    for seed in SEEDS[1:]:
        for name in CONTENDERS:
            if rate := best_rate(done, name, epochs, scale):
                yield Run(name, rate, seed, epochs, scale)


# -- tables --


def budgets(done: dict[Run, dict]) -> list[tuple[int, float]]:
    """The (epochs, scale) of the runs."""
    return sorted({(run.epochs, run.scale) for run in done})


def chosen(done: dict[Run, dict], name: str, epochs: int, scale: float) -> list[dict]:
    """The runs of a contender at its best rate, one for each seed."""
    rate = best_rate(done, name, epochs, scale)
    runs = [Run(name, rate, seed, epochs, scale) for seed in SEEDS] if rate else []
    return [done[run] for run in runs if run in done]


def report(folder: Path) -> str:
    """Markdown: each contender at its best rate, with the mean over the seeds."""
    done = read(folder)
    text = (
        "# Street scenes with other mixers in the place of GSPN\n\nMade by `python -m benchmarks.quality.segmentation "
        "--report`. CamVid, from random weights; mean IoU on the 233 test images, against masks of 480x360. *rate*: "
        "the best of how many learning rates, by the validation images. Of two seeds a figure is the mean, "
        "with half of their difference.\n"
    )
    for epochs, scale in budgets(done):
        sides = [tuple(round(side * scale * factor) for side in reversed(FULL)) for factor in FACTORS]
        text += f"\n## Trained at {sides[0][0]}x{sides[0][1]} for {epochs} epochs\n\n"
        header = ["mixer", "parameters", "rate", "seeds", *(f"{w}x{h}" for w, h in sides)]
        rows = []
        for name, contender in CONTENDERS.items():
            runs = chosen(done, name, epochs, scale)
            if not runs:
                rows.append([contender.title, *["not run"] * (len(header) - 1)])
                continue
            tried = sum((r.contender, r.seed, r.epochs, r.scale) == (name, SEEDS[0], epochs, scale) for r in done)
            cells = [contender.title, f"{runs[0]['parameters']:,}", f"{runs[0]['rate']:g} of {tried}", str(len(runs))]
            for factor in FACTORS:
                values = [100 * run["test"][str(factor)]["miou"] for run in runs]
                spread = f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
                cells.append(f"{statistics.fmean(values):.1f}{spread}")
            rows.append(cells)
        text += "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)) + "\n"
    return text


def draw(folder: Path, out: Path) -> None:
    """Mean IoU against the size of the image, for each budget."""
    done = read(folder)
    found = budgets(done)
    figure = Figure(figsize=(6 * max(1, len(found)), 4), layout="constrained")
    for axes, (epochs, scale) in zip(figure.subplots(1, max(1, len(found)), squeeze=False)[0], found, strict=False):
        for name, contender in CONTENDERS.items():
            runs = chosen(done, name, epochs, scale)
            if runs:
                mean = [100 * statistics.fmean(run["test"][str(f)]["miou"] for run in runs) for f in FACTORS]
                widths = [round(FULL[1] * scale * factor) for factor in FACTORS]
                axes.plot(range(len(widths)), mean, marker="o", label=contender.title)
                axes.set_xticks(range(len(widths)), [f"{w}x{w * 3 // 4}" for w in widths])
        title = f"Trained at {round(FULL[1] * scale)}x{round(FULL[0] * scale)}, {epochs} epochs"
        axes.set(title=title, xlabel="size of the test images", ylabel="mean IoU (%)", ylim=(0, None))
        axes.legend(fontsize=8)
    figure.savefig(out, dpi=120)


# -- the command --


def work(folder: Path, scenes: Path, minutes: float, epochs: int, scale: float) -> int:
    """Makes missing runs until the time is over. Returns the number of runs."""

    def told(content: dict) -> str:
        found = ", ".join(f"{factor} times {at['miou']:.2%}" for factor, at in content["test"].items())
        return f"validation {content['val_miou']:.2%}; test, {found}"

    runs = lambda done: wanted(done, epochs, scale)  # noqa: E731
    return study.work(folder, Run, runs, lambda run: train(run, scenes), told, minutes)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    study.add_options(parser, RESULTS)
    parser.add_argument("--scenes", type=Path, help="the folder of CamVid")
    parser.add_argument("--epochs", type=int, default=12, help="of training (default: 12)")
    parser.add_argument("--scale", type=float, default=0.25, help="of the training images (default: 0.25)")
    arguments = parser.parse_args()
    if study.told(arguments, read, lambda done: wanted(done, arguments.epochs, arguments.scale), report, draw):
        return
    if arguments.scenes is None:
        parser.error("--scenes is missing: give the folder of CamVid, tables with train, validation and test")
    torch.set_num_threads(1)
    work(arguments.out, arguments.scenes, arguments.minutes, arguments.epochs, arguments.scale)


if __name__ == "__main__":
    main()
