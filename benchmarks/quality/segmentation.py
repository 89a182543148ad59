"""Trains segmenters on street scenes alike, each with another mixer in the place of GSPN, and compares them.

python -m benchmarks.quality.segmentation --scenes FOLDER --minutes 60    makes missing runs, the most important first
python -m benchmarks.quality.segmentation --list                          says what is done and what is missing
python -m benchmarks.quality.segmentation --report                        tables and a picture of the finished runs

FOLDER holds CamVid as tables with the splits train, validation and test (480x360 pixels, 11 classes). The contenders
are `gspn_mobile` and `gspn_micro` segmenters, each model with several mixers (segmentation_mixers.py). They are made
and trained by what `gspn train-segmentation` runs: same images in the same order, same crops, steps and optimizer. The
width of the blocks' inner maps is chosen so that the parameters of a model's contenders agree within 2%. The test
images are then segmented at the trained size and at larger ones, and compared with masks of their full size.

The command may be stopped at any time and started again: only complete runs are written, one JSON file each.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.harness import harness, study
from benchmarks.quality.segmentation_mixers import CONTENDERS, EXPANSIONS, arguments_of, exchanged, made
from gspn.metrics.segmentation import evaluate
from gspn.options.segment import SegmentationOptions
from gspn.tasks.base import start
from gspn.tasks.segment import Setup

RESULTS = harness.ROOT / "benchmarks" / "results" / "quality" / "segmentation"
FULL = (360, 480)
RATES = {"gspn_mobile": (2e-3, 4e-3, 8e-3), "gspn_micro": (1e-3, 2e-3, 4e-3)}
SEEDS = (0, 1)
FACTORS = (1, 2, 4)  # of the trained sides, at which the test images are segmented


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
    options = SegmentationOptions(
        model=CONTENDERS[run.contender].model,
        model_args=arguments_of(run.contender),
        size=tuple(round(side * run.scale) for side in FULL),
        scale=run.scale,
        ignore=("11", "255"),
        epochs=run.epochs,
        lr=run.rate,
        seed=run.seed,
        workers=0,
        channels_last=True,
        **{"precision": "bf16", "optimizer": "adamw", **more},
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
            "optimizer": options.optimizer,
            "parameters": study.parameters_of(made(run.contender)),
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
    """All runs, the most important first, model by model: each contender at the middle rate, then at the others, then
    the other seeds at the best rate."""
    for model, rates in RATES.items():
        names = of_model(model)
        for rate in (rates[1], rates[2], rates[0]):
            yield from (Run(name, rate, SEEDS[0], epochs, scale) for name in names)
        for seed in SEEDS[1:]:
            for name in names:
                if rate := best_rate(done, name, epochs, scale):
                    yield Run(name, rate, seed, epochs, scale)


# -- tables --


def groups(done: dict[Run, dict]) -> list[tuple[str, int, float]]:
    """The (model, epochs, scale) of the runs."""
    order = list(EXPANSIONS)
    found = {(CONTENDERS[run.contender].model, run.epochs, run.scale) for run in done}
    return sorted(found, key=lambda group: (-order.index(group[0]), *group[1:]))


def of_model(model: str) -> dict:
    """The contenders of a model."""
    return {name: contender for name, contender in CONTENDERS.items() if contender.model == model}


def chosen(done: dict[Run, dict], name: str, epochs: int, scale: float) -> list[dict]:
    """The runs of a contender at its best rate, one for each seed."""
    rate = best_rate(done, name, epochs, scale)
    runs = [Run(name, rate, seed, epochs, scale) for seed in SEEDS] if rate else []
    return [done[run] for run in runs if run in done]


def report(folder: Path) -> str:
    """Markdown: each contender at its best rate, with the mean over the seeds."""
    done = read(folder)
    optimizers = sorted({content.get("optimizer", "adamw") for content in done.values()})  # of before: AdamW alone
    text = (
        "# Street scenes with other mixers in the place of GSPN\n\nMade by `python -m benchmarks.quality.segmentation "
        "--report`. CamVid, from random weights; mean IoU on the 233 test images, against masks of 480x360. *rate*: "
        "the best of how many learning rates, by the validation images. Of several seeds a figure is the mean ± the "
        "sample standard deviation (n - 1). *CPU s*: of a training with its validations and pictures, while other work "
        f"ran beside; the median of the runs on one processor. Optimizer: {' and '.join(optimizers)}. "
        f"Commits: {study.commits(done.values())}.\n"
    )
    ran = {run.contender for run in done}
    for model, epochs, scale in groups(done):
        sides = [tuple(round(side * scale * factor) for side in reversed(FULL)) for factor in FACTORS]
        text += f"\n## {model}, trained at {sides[0][0]}x{sides[0][1]} for {epochs} epochs\n\n"
        header = ["mixer", "parameters", "rate", "seeds", *(f"{w}x{h}" for w, h in sides), "CPU s"]
        rows, missing, group = [], [], of_model(model)
        own = [done[run] for run in done if run.contender in group and (run.epochs, run.scale) == (epochs, scale)]
        processor, seconds = study.times(own, "cpu_seconds_of_training")
        for name, contender in group.items():
            runs = chosen(done, name, epochs, scale)
            if not runs:
                missing += [contender.title] * (name in ran)
                continue
            tried = sum((r.contender, r.seed, r.epochs, r.scale) == (name, SEEDS[0], epochs, scale) for r in done)
            cells = [contender.title, f"{runs[0]['parameters']:,}", f"{runs[0]['rate']:g} of {tried}", str(len(runs))]
            for factor in FACTORS:
                values = [100 * run["test"][str(factor)]["miou"] for run in runs]
                spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                cells.append(f"{statistics.fmean(values):.1f}{spread}")
            cells.append(f"{seconds[name]:.0f}" if name in seconds else "")
            rows.append(cells)
        text += harness.table(header, rows) + "\n"
        text += f"\nNot run: {'; '.join(missing)}.\n" if missing else ""
        text += f"\nTimes are of {processor}.\n"
    never = [f"{each.title} ({each.model})" for name, each in CONTENDERS.items() if name not in ran]
    return text + (f"\nNever run: {'; '.join(never)}.\n" if never else "")


def draw(folder: Path, out: Path) -> None:
    """Mean IoU against the size of the image, for each budget."""
    done = read(folder)
    found = groups(done)
    across, down = min(2, max(1, len(found))), max(1, -(-len(found) // 2))
    figure = Figure(figsize=(6 * across, 4 * down), layout="constrained")
    titles = dict.fromkeys(contender.title for contender in CONTENDERS.values())
    colours = {title: colormaps["tab20"](i) for i, title in enumerate(titles)}
    panels = figure.subplots(down, across, squeeze=False).flat
    for axes in panels[len(found) :]:
        axes.axis("off")
    for axes, (model, epochs, scale) in zip(panels, found, strict=False):
        for name, contender in of_model(model).items():
            runs = chosen(done, name, epochs, scale)
            if runs:
                mean = [100 * statistics.fmean(run["test"][str(f)]["miou"] for run in runs) for f in FACTORS]
                widths = [round(FULL[1] * scale * factor) for factor in FACTORS]
                axes.plot(range(len(widths)), mean, marker="o", label=contender.title, color=colours[contender.title])
                axes.set_xticks(range(len(widths)), [f"{w}x{w * 3 // 4}" for w in widths])
        title = f"{model}, trained at {round(FULL[1] * scale)}x{round(FULL[0] * scale)}, {epochs} epochs"
        axes.set(title=title, xlabel="size of the test images", ylabel="mean IoU (%)")
        axes.legend(fontsize=8)
    figure.savefig(out, dpi=120)


# -- the command --


def work(
    folder: Path,
    scenes: Path,
    minutes: float,
    epochs: int,
    scale: float,
    runs: Sequence[Run] | None = None,
    optimizer: str = "adamw",
) -> int:
    """Makes `runs`, or else what is missing, until the time is over. Returns the number of runs."""

    def told(content: dict) -> str:
        found = ", ".join(f"{factor} times {at['miou']:.2%}" for factor, at in content["test"].items())
        return f"validation {content['val_miou']:.2%}; test, {found}"

    every = lambda done: wanted(done, epochs, scale)  # noqa: E731
    made = lambda run: train(run, scenes, optimizer=optimizer)  # noqa: E731
    return study.work(folder, Run, every, made, told, minutes, runs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    study.add_options(parser, RESULTS, Run, CONTENDERS)
    parser.add_argument("--scenes", type=Path, help="the folder of CamVid")
    parser.add_argument("--epochs", type=int, default=12, help="of training (default: 12)")
    parser.add_argument("--scale", type=float, default=0.25, help="of the training images (default: 0.25)")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), help="muon needs another folder (default: adamw)")
    arguments = parser.parse_args()
    settings = study.settings(parser, arguments, {"optimizer": "adamw"})
    if study.told(arguments, read, lambda done: wanted(done, arguments.epochs, arguments.scale), report, draw):
        return
    if arguments.scenes is None:
        parser.error("--scenes is missing: give the folder of CamVid, tables with train, validation and test")
    torch.set_num_threads(1)
    given = (arguments.minutes, arguments.epochs, arguments.scale, arguments.runs)
    work(arguments.out, arguments.scenes, *given, **settings)


if __name__ == "__main__":
    main()
