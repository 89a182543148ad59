"""Trains gspn_mobile on small photos alike, each time with another mixer in the place of its scan, and compares.

python -m benchmarks.quality.photos --photos FOLDER --minutes 60    makes missing runs, the most important first
python -m benchmarks.quality.photos --list                          says what is done and what is missing
python -m benchmarks.quality.photos --report                        a table and a picture of the finished runs

FOLDER holds CIFAR-10 as tables with the splits train and test. Every contender is trained by what `gspn train` runs:
same images in the same order, same augmentation, steps and optimizer. As the scan does, each mixer works in 16 channels
between two projections; with "none" the block is an inverted residual alone. The width of the blocks is chosen so that
the parameters agree within 2%.

The command may be stopped at any time and started again: only complete runs are written, one JSON file each.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import nn

import gspn
from benchmarks.harness import harness, study
from benchmarks.quality.compact_mixers import Depthwise, Nothing, between
from gspn.bench.contenders import Attention, ReluLinearAttentionConvolution
from gspn.layers import InvertedBlock
from gspn.metrics.classification import evaluate
from gspn.options import Options
from gspn.tasks import classify

RESULTS = harness.ROOT / "benchmarks" / "results" / "quality" / "photos"
MODEL, CLASSES, SIDE = "gspn_mobile", 10, 32
RATES = (5e-3, 1e-2, 2.5e-3)  # the first is that of the library's preset
SEEDS = (0, 1, 2)
FACTORS = (0.75, 1, 1.5, 2)  # of the trained side, at which the test images are classified


# -- the contenders --


class Contender(NamedTuple):
    """`make` gives a layer of maps (B,C,H,W) from C; None keeps GSPN. `options` are those of the model."""

    title: str
    make: Callable[[int], nn.Module] | None = None
    options: Mapping[str, Any] = MappingProxyType({})


CONTENDERS = {
    "gspn": Contender("GSPN"),
    "none": Contender("none: depthwise 3x3 alone", lambda channels: Nothing()),
    "attention": Contender("attention", between(lambda width: Attention(width, 2, bias=False))),
    "linear": Contender(
        "linear attention + 5x5", between(lambda width: ReluLinearAttentionConvolution(width, bias=False))
    ),
    "dw7": Contender("depthwise 7x7", between(Depthwise)),
    "own": Contender("GSPN, every channel with weights of its own", options={"groups": 16}),
}


def classifier_with(mixer: str, name: str, **arguments) -> nn.Module:
    """`create_model` with another mixer. The model's config is that of the GSPN backbone."""
    model, make = gspn.create_model(name, **arguments), CONTENDERS[mixer].make
    if make is not None:
        for block in [module for module in model.modules() if isinstance(module, InvertedBlock)]:
            block.gspn = make(block.gspn.channels)
    return model


@cache
def expansion_of(mixer: str) -> float:
    """The inner width of the blocks, as a factor, with which a classifier has the parameters of GSPN's."""
    if CONTENDERS[mixer].make is None:
        return 2.0
    wanted = study.parameters_of(classifier_with("gspn", MODEL, num_classes=CLASSES))
    return study.nearest_factor(
        lambda factor: classifier_with(mixer, MODEL, num_classes=CLASSES, expansion=factor), wanted
    )


def is_statistic(name: str) -> bool:
    """Whether a tensor of a state dict belongs to batch norm's running statistics, and is no parameter."""
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


@contextmanager
def exchanged(mixer: str) -> Iterator[None]:
    """The library makes classifiers with this mixer, and draws no influence maps, which others do not have."""
    make = lambda name, **arguments: classifier_with(mixer, name, **arguments)  # noqa: E731
    nothing = lambda *given: None  # noqa: E731
    built = patch.object(classify, "build_model", partial(classify.build_model, make=make))
    with built, patch("gspn.runs.create_model", make), patch("gspn.plots.context", nothing):
        yield


# -- one run --


class Run(NamedTuple):
    contender: str
    rate: float
    seed: int
    epochs: int

    @property
    def stem(self) -> str:
        return f"{self.contender}-lr{self.rate:g}-seed{self.seed}-{self.epochs}epochs"


def train(run: Run, photos: Path, console: Console | None = None, **more) -> dict:
    """Trains, and classifies the test images; gives the content of the run's file. `more`: options of the training."""
    arguments = {"expansion": expansion_of(run.contender), **CONTENDERS[run.contender].options}
    shared = dict(model=MODEL, model_args=arguments, epochs=run.epochs, lr=run.rate, seed=run.seed, workers=0, ema=0.99)
    options = Options(**shared, **{"optimizer": "adamw", "warmup": 0.3, "erase": 0.0, "precision": "bf16", **more})
    with exchanged(run.contender), tempfile.TemporaryDirectory() as folder:
        path, began, at = Path(folder) / "run", time.thread_time(), {}
        trained, _, _ = classify.train_classifier(photos, path, options, console=console)
        tensors = trained.load_checkpoint("last", ("model",))[0]["model"]
        seconds = time.thread_time() - began
        for factor in FACTORS:
            size = (round(SIDE * factor),) * 2
            found, _ = evaluate(path, photos, checkpoint="last", size=size, workers=0)
            at[str(factor)] = {name: found[name] for name in ("top1", "loss")}
        rows = [{key: row[key] for key in ("epoch", "train_loss", "val_loss", "top1")} for row in trained.metrics]
    return {
        **run._asdict(),
        "parameters": sum(tensor.numel() for name, tensor in tensors.items() if not is_statistic(name)),
        "mixer": sorted({name.split(".gspn.")[1] for name in tensors if ".gspn." in name}),
        "curve": rows,
        "test": at,
        "cpu_seconds_of_training": round(seconds, 1),
    }


# -- which runs are missing --


def read(folder: Path) -> dict[Run, dict]:
    """The finished runs in a folder."""
    return study.read(folder, Run)


def best_rate(done: dict[Run, dict], contender: str, epochs: int) -> float | None:
    """The rate with the lowest training loss of the last epoch, among the runs of the first seed: the test images,
    which the table shows, choose nothing."""
    found = {
        run.rate: content["curve"][-1]["train_loss"]
        for run, content in done.items()
        if (run.contender, run.seed, run.epochs) == (contender, SEEDS[0], epochs)
    }
    return min(found, key=found.__getitem__) if found else None


def wanted(done: dict[Run, dict], epochs: int) -> Iterator[Run]:
    """All runs, the most important first: each contender at the preset's rate with each seed, then other rates, then
    the seeds at the best of them."""
    for seed in SEEDS[:2]:
        yield from (Run(name, RATES[0], seed, epochs) for name in CONTENDERS)
    for rate in RATES[1:]:
        yield from (Run(name, rate, SEEDS[0], epochs) for name in CONTENDERS)
    for seed in SEEDS[1:]:
        yield from (Run(name, rate, seed, epochs) for name in CONTENDERS if (rate := best_rate(done, name, epochs)))


# -- the report --


def chosen(done: dict[Run, dict], name: str, epochs: int) -> list[dict]:
    """The runs of a contender at its best rate, one for each seed."""
    rate = best_rate(done, name, epochs)
    runs = [Run(name, rate, seed, epochs) for seed in SEEDS] if rate else []
    return [done[run] for run in runs if run in done]


def report(folder: Path) -> str:
    """Markdown: each contender at its best rate, with the mean over the seeds."""
    done = read(folder)
    text = (
        "# Small photos with other mixers in the place of GSPN\n\nMade by `python -m benchmarks.quality.photos "
        "--report`. CIFAR-10, gspn_mobile from random weights; accuracy in percent on the 10,000 test images. *rate*: "
        "the best of how many learning rates, by the loss of the last epoch in training. Of several seeds a figure is "
        "the mean, with the standard deviation. *time*: CPU time of the whole training, with reading and "
        "evaluation, over that of GSPN.\n"
    )
    for epochs in sorted({run.epochs for run in done}):
        text += f"\n## {epochs} epochs\n\n"
        header = ["mixer", "parameters", "rate", "seeds", *(f"{round(SIDE * f)}x{round(SIDE * f)}" for f in FACTORS)]
        rows, ours = [], chosen(done, "gspn", epochs)
        for name, contender in CONTENDERS.items():
            runs = chosen(done, name, epochs)
            if not runs:
                rows.append([contender.title, *["not run"] * len(header)])
                continue
            tried = sum((run.contender, run.seed, run.epochs) == (name, SEEDS[0], epochs) for run in done)
            cells = [contender.title, f"{runs[0]['parameters']:,}", f"{runs[0]['rate']:g} of {tried}", str(len(runs))]
            for factor in FACTORS:
                values = [100 * run["test"][str(factor)]["top1"] for run in runs]
                spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                cells.append(f"{statistics.fmean(values):.1f}{spread}")
            time_of = lambda each: statistics.fmean(run["cpu_seconds_of_training"] for run in each)  # noqa: E731
            cells.append(f"{time_of(runs) / time_of(ours):.2f}" if ours else "")
            rows.append(cells)
        text += harness.table([*header, "time"], rows) + "\n"
    return text


def draw(folder: Path, out: Path) -> None:
    """Accuracy against the size of the photos, for each number of epochs."""
    done = read(folder)
    found = sorted({run.epochs for run in done})
    figure = Figure(figsize=(6 * max(1, len(found)), 4), layout="constrained")
    for axes, epochs in zip(figure.subplots(1, max(1, len(found)), squeeze=False)[0], found, strict=False):
        for name, contender in CONTENDERS.items():
            if runs := chosen(done, name, epochs):
                means = [100 * statistics.fmean(run["test"][str(f)]["top1"] for run in runs) for f in FACTORS]
                axes.plot([SIDE * f for f in FACTORS], means, marker="o", label=contender.title)
        axes.set(title=f"{epochs} epochs at {SIDE}x{SIDE}", xlabel="side of the test photos", ylabel="accuracy (%)")
        axes.set_xticks([SIDE * f for f in FACTORS])
        axes.legend(fontsize=8)
    figure.savefig(out, dpi=120)


# -- the command --


def work(folder: Path, photos: Path, minutes: float, epochs: int, runs: Sequence[Run] | None = None) -> int:
    """Makes `runs`, or else what is missing, until the time is over. Returns the number of runs."""

    def told(content: dict) -> str:
        at = ", ".join(f"{factor} times {found['top1']:.2%}" for factor, found in content["test"].items())
        return f"{at}; {content['cpu_seconds_of_training']:.0f} s of training"

    every = lambda done: wanted(done, epochs)  # noqa: E731
    return study.work(folder, Run, every, lambda run: train(run, photos), told, minutes, runs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    study.add_options(parser, RESULTS, Run, CONTENDERS)
    parser.add_argument("--photos", type=Path, help="the folder of CIFAR-10")
    parser.add_argument("--epochs", type=int, default=2, help="of training (default: 2)")
    arguments = parser.parse_args()
    if study.told(arguments, read, lambda done: wanted(done, arguments.epochs), report, draw):
        return
    if arguments.photos is None:
        parser.error("--photos is missing: give the folder of CIFAR-10, tables with the splits train and test")
    torch.set_num_threads(1)
    work(arguments.out, arguments.photos, arguments.minutes, arguments.epochs, arguments.runs)


if __name__ == "__main__":
    main()
