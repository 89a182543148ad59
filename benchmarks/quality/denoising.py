"""Trains small generators alike, and compares how well they denoise, at the trained size and at others.

python -m benchmarks.quality.denoising --photos FOLDER --minutes 60    makes missing runs, the most important first
python -m benchmarks.quality.denoising --list                          says what is done and what is missing
python -m benchmarks.quality.denoising --report                        tables and a picture of the finished runs

FOLDER holds CIFAR-10, or other images of at most 32x32 pixels (smaller ones get a black margin), with the splits train
and test. The command may be stopped at any time and started again: only complete runs are written, one JSON file each.
All models have patches of 2 (16x16 tokens), predict v and see the same images, classes, timesteps and noise in the same
order. The loss is the squared error of v, of the averaged weights, on test images with fixed timesteps and noise. With
--sizes each batch has another size, chosen as `gspn train-diffusion --sizes` does; models that take only squares see
other sizes than the rest, and so other noise.
"""

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.harness import harness, study
from benchmarks.quality.denoising_blocks import ConvNeXtBlock, DiCoBlock, GatedPositions
from benchmarks.quality.mixers.tasks import Photos
from gspn.bench.contenders import Attention, OnMaps
from gspn.data.labelled import open_data
from gspn.depthwise import DepthwiseConv2d
from gspn.models.dit import create_dit
from gspn.models.generator import GSPNTransformer2DModel
from gspn.models.gspn_dit import GSPNDiTTransformer2DModel
from gspn.tasks.objective import Objective, make_scheduler
from gspn.tasks.sizes import RandomSizes, resized
from gspn.train.muon import PROJECTIONS, Muon, matrices_of

RESULTS = harness.ROOT / "benchmarks" / "results" / "quality" / "denoising"
STEPS, BATCH, WARM_UP, DECAY, EMA = 800, 16, 50, 0.01, 0.995
DROPPED = 0.1  # of the classes, for the null class
RATES = (5e-3, 1e-2, 2e-2)
SEEDS = (0, 1)
SIZES = {"32x32": 2_000, "48x48": 400, "64x64": 400, "32x64": 400}  # test photos at each size
TRAINED = "32x32"
BUCKETS = 5  # of the timesteps
SIDE = 32  # pixels a side of an image
HELD_OUT = 5_000  # the last training images, by which the learning rate is chosen; at most a tenth


# -- the contenders --


class NoScan(nn.Module):
    """In the scan's place: nothing. Its block still gates channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def as_dit(module: nn.Module) -> nn.Module:
    """Gives its linear layers DiT's start, which GSPN-DiT's have too: Xavier's weights and biases of 0. What starts at
    0 stays there."""
    for part in module.modules():
        if isinstance(part, nn.Linear) and part.weight.any():
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    return module


def _ours(mixer: Callable[[int], nn.Module] | None = None, **config) -> nn.Module:
    """GSPN-DiT, with another mixer in the scan's place."""
    shape = dict(sample_size=SIDE, patch_size=2, in_channels=3, learn_sigma=False, num_classes=10)
    shape |= dict(class_dropout_prob=DROPPED, prediction_type="v_prediction", hidden_size=64, depth=4)
    model = GSPNDiTTransformer2DModel(**shape | config)
    for block in model.blocks:
        if mixer is not None:
            block.gspn = as_dit(mixer(64))
    return model


def _convolutions(block: type[nn.Module], expansion: float, depth: int, **data) -> nn.Module:
    """GSPN-DiT's patches, embeddings and end around other blocks."""
    model = _ours(**data)
    model.blocks = nn.ModuleList(as_dit(block(64, expansion)) for _ in range(depth))
    return model


def _gated_positions(**data) -> nn.Module:
    """GSPN-DiT with positions that timestep and class switch on."""
    model = _ours(**data)
    model.blocks.insert(0, GatedPositions(64, trained=16))
    return model


def _paper(**config) -> nn.Module:
    shape = dict(sample_size=SIDE, patch_size=2, in_channels=3, learn_sigma=False, num_classes=10)
    shape |= dict(class_dropout_prob=DROPPED, prediction_type="v_prediction", segment=None)
    return GSPNTransformer2DModel(**shape | config)


def _dit(width: int, depth: int, **data) -> nn.Module:
    shape = dict(sample_size=SIDE, in_channels=3, learn_sigma=False, num_classes=10) | data
    return create_dit("DiT-micro/2", **shape, num_layers=depth, num_attention_heads=4, attention_head_dim=width // 4)


class Contender(NamedTuple):
    """`title` is what tables call it, `make` gives the model for `in_channels` and `num_classes` (those of CIFAR-10
    where they are not given), `square`: it takes no other maps."""

    title: str
    make: Callable[..., nn.Module]
    square: bool = False


CONTENDERS = {
    "dit": Contender("DiT", partial(_dit, 64, 4), square=True),
    "ours": Contender("GSPN-DiT", _ours),
    "ours-none": Contender("GSPN-DiT without its scan", partial(_ours, lambda width: NoScan(), mlp_ratio=3.7)),
    "ours-attention": Contender(
        "GSPN-DiT, attention in the scan's place",
        partial(_ours, lambda width: OnMaps(Attention(width, 4)), mlp_ratio=2.2),
    ),
    "ours-attention-positions": Contender(
        "GSPN-DiT, attention in the scan's place, positions",
        partial(_ours, lambda width: OnMaps(Attention(width, 4)), mlp_ratio=2.2, positions=True),
    ),
    "ours-dw7": Contender(
        "GSPN-DiT, depthwise 7x7 in the scan's place",
        partial(_ours, lambda width: DepthwiseConv2d(width, 7), mlp_ratio=3.3),
    ),
    "convnext": Contender("ConvNeXt V2's block (FCDM)", partial(_convolutions, ConvNeXtBlock, 3.8, 6)),
    "dico": Contender("DiCo's block", partial(_convolutions, DiCoBlock, 4.0, 4)),
    "ours-positions": Contender("GSPN-DiT with positions", partial(_ours, positions=True)),
    "ours-gated-positions": Contender("GSPN-DiT with gated positions", _gated_positions),
    "ours-centred": Contender("GSPN-DiT, centred", partial(_ours, center=True)),
    "ours-sized": Contender("GSPN-DiT, told the size", partial(_ours, size_condition=True)),
    "paper": Contender("the paper's block", partial(_paper, hidden_size=96, depth=4)),
}


class Run(NamedTuple):
    """The settings of a run; its file is named after them."""

    contender: str
    rate: float
    seed: int
    steps: int = STEPS

    @property
    def stem(self) -> str:
        return f"{self.contender}-lr{self.rate:g}-seed{self.seed}-{self.steps}steps"


MAIN = ("dit", "ours", "ours-none", "ours-attention")


# -- the images --


def open_images(folder: Path) -> Photos:
    """uint8 images (N,C,32,32) and labels of "train", "val" and "test", from what `gspn train` opens."""
    splits = open_data(folder).splits
    missing = {"train", "test"} - set(splits)
    if missing:
        raise ValueError(f"{folder} has no split {', '.join(sorted(missing))}; expected train and test")
    images, labels = _decoded(splits["train"])
    if len(images) < 10:
        raise ValueError(f"{folder} has {len(images)} training images; expected 10 or more, as a tenth is held out")
    if (labels.diff() >= 0).all():  # folders of classes: the images held out must be of all of them
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        images, labels = images[order], labels[order]
    held_out = min(HELD_OUT, len(images) // 10)
    return Photos(
        {
            "train": (images[:-held_out], labels[:-held_out]),
            "val": (images[-held_out:], labels[-held_out:]),
            "test": _decoded(splits["test"]),
        }
    )


def _decoded(split) -> tuple[Tensor, Tensor]:
    return torch.stack([_with_margin(np.array(split.image(i))) for i in range(len(split))]), split.labels


def _with_margin(pixels: np.ndarray) -> Tensor:
    """(H,W) or (H,W,C) as (C,32,32), black around it."""
    height, width = pixels.shape[:2]
    below, right = SIDE - height, SIDE - width
    if min(below, right) < 0:
        raise ValueError(f"expected images of at most {SIDE}x{SIDE}, got {height}x{width}")
    image = torch.from_numpy(pixels).view(height, width, -1).permute(2, 0, 1)
    return F.pad(image, (right // 2, right - right // 2, below // 2, below - below // 2))


# -- one run --


def pixels(photos: Tensor, size: tuple[int, int] = (SIDE, SIDE)) -> Tensor:
    """uint8 photos (B,C,32,32) in [-1, 1] at `size`."""
    return resized(photos.float() / 127.5 - 1, size)


def denoised(model: nn.Module, objective: Objective, start: Tensor, noise: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """The squared error of each image (B,)."""
    noisy = objective.noisy(start, noise, t)
    return objective.losses(model(noisy, timestep=t, class_labels=label).sample, start, noise, t)[0]


@torch.no_grad()
def measure(
    model: nn.Module, objective: Objective, photos: tuple[Tensor, Tensor], size: str, count: int, null_class: int = 10
) -> dict:
    """The loss on `count` photos at `size` (on all where they are fewer), in all and by timestep; the null class's loss
    minus that of the right class; at the trained size, each photo's loss too, for paired differences."""
    height, width = map(int, size.split("x"))
    count = min(count, len(photos[0]))
    source = torch.Generator().manual_seed(7)
    steps = (torch.arange(count) + torch.rand(count, generator=source)) / count * objective.steps
    steps = steps.long()[torch.randperm(count, generator=source)]
    right, null = [], []
    for index in torch.arange(count).split(25):
        start, t = pixels(photos[0][index], (height, width)), steps[index]
        noise = torch.randn(start.shape, generator=source)
        label = photos[1][index]
        right.append(denoised(model, objective, start, noise, t, label))
        null.append(denoised(model, objective, start, noise, t, torch.full_like(label, null_class)))
    right, null = torch.cat(right), torch.cat(null)
    bucket = steps * BUCKETS // objective.steps
    by_step = lambda values: [round(values[bucket == i].mean().item(), 5) for i in range(BUCKETS)]  # noqa: E731
    found = {"loss": right.mean().item(), "by_timestep": by_step(right), "class_is_worth": by_step(null - right)}
    return found | ({"each": [round(v, 5) for v in right.tolist()]} if size == TRAINED else {})


def make_optimizer(model: nn.Module, rate: float, name: str) -> torch.optim.AdamW:
    """AdamW or Muon, without decay of vectors and of the scan's projections."""
    matrices, groups = matrices_of(model) if name == "muon" else {}, {}
    for path, parameter in model.named_parameters():
        decays = parameter.ndim > 1 and not path.endswith(PROJECTIONS)
        groups.setdefault((decays, matrices.get(parameter)), []).append(parameter)
    groups = [
        {"params": each, "weight_decay": DECAY * decays, "matrix": kind} for (decays, kind), each in groups.items()
    ]
    return (Muon if name == "muon" else torch.optim.AdamW)(groups, lr=rate, betas=(0.9, 0.99))


def train(
    run: Run,
    photos: Photos,
    sizes: dict[str, int] = SIZES,
    batch: int = BATCH,
    optimizer_name: str = "adamw",
    factors: tuple[float, float] | None = None,
) -> dict:
    """Trains and measures; returns the content of the run's file. Times are those of the thread's own CPU clock.

    `factors`: the least and the largest of a batch's height and width over 32, drawn anew for each batch. Those of
    models that take only squares are equal, so the pixels of such batches are 1.22 times as many on average from 0.75
    to 1.5, where those of others are 1.17 times as many.
    """
    torch.manual_seed(run.seed)
    contender, (images, labels) = CONTENDERS[run.contender], photos["train"]
    classes = int(labels.max()) + 1
    model = contender.make(in_channels=images.shape[1], num_classes=classes).train()
    resize = RandomSizes(*factors, 2, square=contender.square) if factors else lambda start: start
    torch.manual_seed(2_000 + run.seed)  # of the sizes; models draw different numbers of random weights before
    for module in model.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0  # classes are dropped below, the same for each contender
    objective = Objective(make_scheduler("v_prediction", learn_sigma=False, beta_schedule="squaredcos_cap_v2"))
    optimizer = make_optimizer(model, run.rate, optimizer_name)
    averaged, source = copy.deepcopy(model), torch.Generator().manual_seed(1_000 + run.seed)
    # noise of random sizes has a source of its own, so that all models see the same images, classes and timesteps
    noises = torch.Generator().manual_seed(3_000 + run.seed) if factors else source
    order = torch.cat(
        [torch.randperm(len(images), generator=source) for _ in range(1 + run.steps * batch // len(images))]
    )
    curve, recent, seconds = [], [], 0.0
    for step in range(run.steps):
        index = order[step * batch : (step + 1) * batch]
        start, t = resize(pixels(images[index])), torch.randint(objective.steps, (batch,), generator=source)
        noise = torch.randn(start.shape, generator=noises)
        label = labels[index].where(torch.rand(batch, generator=source) >= DROPPED, classes)
        warm = min(1.0, (step + 1) / WARM_UP)
        for group in optimizer.param_groups:
            group["lr"] = run.rate * warm * (0.02 + 0.49 * (1 + math.cos(math.pi * step / run.steps)))
        began = time.thread_time()
        loss = denoised(model, objective, start, noise, t, label).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.thread_time() - began
        with torch.no_grad():
            keep = min(EMA, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - keep)
        recent.append(loss.item())
        if len(recent) == max(1, run.steps // 20):
            curve.append({"step": step + 1, "loss": statistics.fmean(recent), "cpu_seconds": round(seconds, 2)})
            recent = []
    averaged.eval()
    wanted = {size: n for size, n in sizes.items() if not contender.square or len(set(size.split("x"))) == 1}
    return {
        **run._asdict(),
        "optimizer": optimizer_name,
        **({"factors": factors} if factors else {}),
        "parameters": sum(p.numel() for p in model.parameters()),
        "finite": all(math.isfinite(row["loss"]) for row in curve),
        "val": measure(averaged, objective, photos["val"], TRAINED, wanted[TRAINED], classes)["loss"],
        "test": {size: measure(averaged, objective, photos["test"], size, n, classes) for size, n in wanted.items()},
        "curve": curve,
        "cpu_ms_per_step": round(1e3 * seconds / run.steps, 1),
    }


# -- which runs are missing --


def read(folder: Path) -> dict[Run, dict]:
    """The finished runs in a folder."""
    return study.read(folder, Run)


def best_rate(done: dict[Run, dict], contender: str) -> float | None:
    """The rate with the least loss on held-out training photos among the runs of the first seed."""
    losses = {
        run.rate: content["val"]
        for run, content in done.items()
        if (run.contender, run.seed, run.steps) == (contender, SEEDS[0], STEPS) and content["finite"]
    }
    return min(losses, key=losses.__getitem__) if losses else None


def wanted(done: dict[Run, dict]) -> Iterator[Run]:
    """All runs, the most important first: each contender at the middle rate, at the other rates and, where the best one
    is the least or the largest, one further out; then the other seeds at the best rate. MAIN before the others."""
    further = {RATES[0]: RATES[0] / 2, RATES[-1]: RATES[-1] * 2}
    for main in (True, False):
        names = [name for name in CONTENDERS if (name in MAIN) == main]
        for rate in (RATES[1], RATES[0], RATES[2]):
            yield from (Run(name, rate, SEEDS[0]) for name in names)
        best = {name: best_rate(done, name) for name in names}
        yield from (Run(name, further[rate], SEEDS[0]) for name, rate in best.items() if rate in further)
        for seed in SEEDS[1:]:
            yield from (Run(name, rate, seed) for name, rate in best.items() if rate)


# -- tables --


def at_best(done: dict[Run, dict], contender: str) -> dict[int, dict]:
    """The runs of a contender at its best rate, by seed."""
    rate = best_rate(done, contender)
    runs = [Run(contender, rate, seed) for seed in SEEDS] if rate else []
    return {run.seed: done[run] for run in runs if run in done}


def tried(done: dict[Run, dict], contender: str) -> list[float]:
    """The learning rates that were tried."""
    return sorted(run.rate for run in done if (run.contender, run.seed, run.steps) == (contender, SEEDS[0], STEPS))


def differences(ours: dict[int, dict], theirs: dict[int, dict]) -> tuple[str, str]:
    """Of the runs by seed, the cells of theirs - ours at the trained size: with its error over the photos, and with its
    deviation over the seeds."""
    each = lambda content: content["test"][TRAINED]["each"]  # noqa: E731
    pairs = [(each(ours[seed]), each(theirs[seed])) for seed in sorted(ours.keys() & theirs.keys())]
    if not pairs:
        return "", ""
    mean, error, of_seeds = study.difference(pairs)
    spread = f"{mean:+.4f} ± {statistics.stdev(of_seeds):.4f}" if len(of_seeds) > 1 else ""
    return f"{mean:+.4f} ± {error:.4f}", spread


def report(folder: Path) -> str:
    """Markdown: each contender at its best rate, its mean over the seeds."""
    done = read(folder)
    made = [content for run, content in done.items() if run.steps == STEPS]
    ours, (processor, ms) = at_best(done, "ours"), study.times(made, "cpu_ms_per_step")
    optimizers = sorted({content.get("optimizer", "adamw") for content in done.values()})  # of before: AdamW alone
    (data,) = {content.get("data", "CIFAR-10") for content in done.values()}  # of before: CIFAR-10 alone
    factors = {tuple(content["factors"]) for content in done.values() if "factors" in content}
    sizes = "".join(f", at random sizes from {low:g} to {high:g} times" for low, high in factors)
    rows, notes = [], []
    for name, contender in sorted(CONTENDERS.items(), key=lambda item: item[0] != "ours"):
        by_seed = at_best(done, name)
        if not by_seed:
            notes.append(f"{contender.title}: not run")
            continue
        contents = list(by_seed.values())
        mean = lambda get, contents=contents: statistics.fmean(map(get, contents))  # noqa: E731
        cells = [
            contender.title,
            f"{contents[0]['parameters']:,}",
            f"{contents[0]['rate']:g} of {len(tried(done, name))}",
            str(len(contents)),
            f"{mean(lambda c: c['test'][TRAINED]['loss']):.4f}",
            *([""] * 2 if name == "ours" else differences(ours, by_seed)),
        ]
        for size in list(SIZES)[1:]:
            known = all(size in c["test"] for c in contents)
            cells.append(f"{mean(lambda c, size=size: c['test'][size]['loss']):.4f}" if known else "square only")
        worth = mean(lambda c: statistics.fmean(c["test"][TRAINED]["class_is_worth"]))
        cells += [f"{worth:.4f}", f"{ms[name]:.0f}" if name in ms else ""]
        rows.append(cells)
    header = ["model", "parameters", "rate", "seeds", f"loss at {TRAINED}", "minus GSPN-DiT"]
    header += ["over seeds", *list(SIZES)[1:], "class is worth", "CPU ms a step"]
    about = (
        f"# Denoising on {data}\n\n{STEPS} steps of {BATCH} images, 16x16 tokens{sizes}, with "
        f"{' and '.join(optimizers)}. Made by `python -m benchmarks.quality.denoising --report`. "
        f"Commits: {study.commits(made)}.\n\n"
        "The error of a difference is that of its mean over the same test photos, timesteps and noise, each photo's "
        "difference being its mean over the seeds that both models have. *over seeds* tells what another seed "
        "changes: the difference with its sample standard deviation over these seeds, where there are several. "
        "*rate*: the best of how many learning rates, by held-out training photos. *class is worth*: loss with the "
        f"null class minus loss with the right one. Times are medians on one processor, {processor}, while other work "
        "ran beside.\n"
    )
    table = harness.table(header, rows)
    return f"{about}\n{table}\n" + "".join(f"\n{note}" for note in notes) + ("\n" if notes else "")


def draw(folder: Path, out: Path) -> None:
    """Loss against the size of the map, of the contenders whose rate was chosen from as many as RATES."""
    done, figure = read(folder), Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    squares = [size for size in SIZES if len(set(size.split("x"))) == 1]
    for name, contender in CONTENDERS.items():
        tests = [content["test"] for content in at_best(done, name).values()]
        if tests and len(tried(done, name)) >= len(RATES):
            losses = [statistics.fmean(test[size]["loss"] for test in tests) for size in squares]
            axes.plot(squares, losses, marker="o", label=contender.title)
    axes.set(title="Trained at 32x32 pixels", xlabel="size of the photos", ylabel="denoising loss", yscale="log")
    ticks = [0.08, 0.09, 0.1, 0.11, 0.12, 0.13]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    figure.legend(loc="outside right center", fontsize=8)
    figure.savefig(out, dpi=120)


# -- the command --


def work(
    folder: Path,
    photos: Photos,
    minutes: float,
    runs: Sequence[Run] | None = None,
    optimizer: str = "adamw",
    factors: tuple[float, float] | None = None,
    data: str = "CIFAR-10",
) -> int:
    """Makes `runs`, or else what is missing, until the time is over. Returns the number of runs."""

    def told(content: dict) -> str:
        losses = ", ".join(f"{size} {found['loss']:.4f}" for size, found in content["test"].items())
        return f"{losses}; {content['cpu_ms_per_step']:.0f} ms a step"

    def made(run: Run) -> dict:
        return train(run, photos=photos, optimizer_name=optimizer, factors=factors) | {"data": data}

    return study.work(folder, Run, wanted, made, told, minutes, runs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    study.add_options(parser, RESULTS, Run, CONTENDERS)
    parser.add_argument("--photos", type=Path, help="the folder of the images")
    parser.add_argument(
        "--name", dest="data", metavar="NAME", help="the name of the data; other than CIFAR-10 it needs its own --out"
    )
    parser.add_argument("--optimizer", choices=("adamw", "muon"), help="muon needs another folder (default: adamw)")
    parser.add_argument(
        "--sizes",
        dest="factors",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="train at random sizes; needs another folder",
    )
    arguments = parser.parse_args()
    settings = study.settings(parser, arguments, {"data": "CIFAR-10", "factors": None, "optimizer": "adamw"})
    if study.told(arguments, read, wanted, report, draw):
        return
    if arguments.photos is None:
        parser.error("--photos is missing: give a folder of images with the splits train and test, such as CIFAR-10")
    torch.set_num_threads(1)
    work(arguments.out, open_images(arguments.photos), arguments.minutes, arguments.runs, **settings)


if __name__ == "__main__":
    main()
