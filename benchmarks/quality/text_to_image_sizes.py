"""Distils a small text-to-image UNet with and without random sizes, by AdamW and by Muon, and compares how well teacher
and students denoise at the teacher's size and at others, with and without remedies for larger maps.

python -m benchmarks.quality.text_to_image_sizes --photos FOLDER --teachers FILE --train 30 --teacher-seed 0
                                                                         trains a teacher
python -m benchmarks.quality.text_to_image_sizes --photos FOLDER --teachers FILE... --minutes 60
                                                                         makes missing runs
python -m benchmarks.quality.text_to_image_sizes --list                  says what is missing
python -m benchmarks.quality.text_to_image_sizes --report                tables and a picture

FOLDER holds CIFAR-10 as tables with the splits train and test. A teacher (text_to_image_teacher.py) is trained for
--train minutes, in which its learning rate falls, and FILE is written. A student is what `gspn distill` makes: the same
swap, loss, optimizer and random sizes, in a loop of its own without a run folder; only, the biases of its gates decay.
Beside it the teacher's own attention is trained on, for as many steps on the same images. Each contender has three
learning rates with the first teacher; the best on validation photos, over all sizes, is used with the second. The
command may be stopped at any time and started again: only complete runs are written, one JSON file each. The loss is
the squared error of v on test photos resized to each size, with the same timesteps and noise for all.
"""

import argparse
import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import gspn
from benchmarks.harness import harness, study
from benchmarks.quality.denoising import pixels
from benchmarks.quality.mixers.tasks import Photos
from benchmarks.quality.text_to_image_teacher import (
    BATCH,
    BLOCK,
    CAPTIONS,
    DROPPED,
    SIDE,
    Teacher,
    open_teacher,
    train_teacher,
)
from gspn import lattices
from gspn.data.images import Preprocessing
from gspn.data.unreadable import Unreadable
from gspn.options import LoopOptions
from gspn.stable_diffusion.feature_maps import map_sizes
from gspn.stable_diffusion.highres.passes import dilated
from gspn.stable_diffusion.keeping import level_of
from gspn.tasks.sizes import ChosenSizes
from gspn.tasks.student import Distillation, Student
from gspn.train.optim import make_optimizer

RESULTS = harness.ROOT / "benchmarks" / "results" / "quality" / "text-to-image-sizes"
STEPS, WARM_UP = 600, 20
RATES = {"muon": (0.008, 0.004, 0.016), "adamw": (0.002, 0.004, 0.001)}  # the middle one first
FACTORS = (0.75, 1, 1.5)
TEACHERS = (0, 1)  # their seeds; a teacher's students have its seed
SIZES = {"32x32": 600, "48x48": 300, "64x64": 300, "32x64": 300}  # test photos at each size
HELD_OUT = 150  # validation photos at each size
BUCKETS = 5  # of the timesteps


# -- the contenders --


class Contender(NamedTuple):
    """`title` is what tables call it; `swap` are options of gspn.swap, None for attention; `sizes` and `away` are
    options of gspn distill; `adapted`: the remedies for larger maps that are measured too."""

    title: str
    swap: dict | None
    sizes: tuple | None = None
    away: float = 0.0
    adapted: tuple = ()


ALL = ("without self-attention", "sub-lattices", "dilated, down and middle", "dilated, all", "segments as trained")
QKV = {"form": "qkv"}
LOCAL = QKV | {"segment": 4}
WIDE = QKV | {"proxy_dim": 16}  # S; the usual one is 1 and 2 at 32 and 64 channels
CONTENDERS = {
    "teacher": Contender("teacher", None, adapted=ALL[:4]),
    "segment4": Contender("segment 4", LOCAL, adapted=ALL[:4]),
    "segment4-sizes": Contender("segment 4, --sizes", LOCAL, FACTORS, adapted=("sub-lattices",)),
    "global": Contender("global", QKV, adapted=ALL),
    "global-sizes": Contender("global, --sizes", QKV, FACTORS),
    "wide": Contender("global, proxy_dim=16", WIDE),
    "wide-sizes": Contender("global, proxy_dim=16, --sizes", WIDE, FACTORS),
    "pure": Contender("global, form pure", {"form": "pure"}),
    "pure-sizes": Contender("global, form pure, --sizes", {"form": "pure"}, FACTORS),
    "attention": Contender("attention, trained on", None),
    "attention-sizes": Contender("attention, trained on, --sizes", None, FACTORS),
    "segment4-sizes-away": Contender("segment 4, --sizes --away-weight 1", LOCAL, FACTORS, 1.0),
    "lowest": Contender("segment 4, lowest level kept", LOCAL | {"keep": "lowest"}),
    "lowest-sizes": Contender("segment 4, lowest level kept, --sizes", LOCAL | {"keep": "lowest"}, FACTORS),
}


class Run(NamedTuple):
    """The settings of a run; its file is named after them. `teacher` is the seed of the teacher and of the run."""

    contender: str
    optimizer: str
    rate: float
    teacher: int
    steps: int = STEPS

    @property
    def stem(self) -> str:
        if self.contender == "teacher":
            return f"teacher{self.teacher}"
        return f"{self.contender}-{self.optimizer}-lr{self.rate:g}-teacher{self.teacher}-{self.steps}steps"


MAIN = ("wide-sizes", "attention-sizes", "global-sizes")


# -- remedies for larger maps, without training --


def times(size: tuple[int, int]) -> tuple[int, int]:
    """How many times the trained side height and width are, as whole numbers; half goes up."""
    height, width = (max(1, math.floor(side / SIDE + 0.5)) for side in size)
    return height, width


@contextlib.contextmanager
def sub_lattices(swap, size: tuple[int, int]) -> Iterator[None]:
    """Self-attention, or the layers in its place, on interleaved sub-lattices as large as in training."""
    apart = times(size)
    modules = swap.layers if swap.active == "gspn" else swap.attentions

    def instead(forward, size, x, *args, map_size=None, **more):
        x = lattices.sub_lattices(x.unflatten(1, size()), apart)
        given = {"map_size": tuple(x.shape[1:3])} if swap.active == "gspn" else {}
        y = forward(x.flatten(1, 2), **given).unflatten(1, x.shape[1:3])
        return lattices.interleaved(y, apart).flatten(1, 2)

    with map_sizes(swap, modules) as sizes:
        for name, module in modules.items():
            module.forward = partial(instead, module.forward, sizes[name])
        try:
            yield
        finally:
            for module in modules.values():
                del module.forward


@contextlib.contextmanager
def trained_segments(swap, size: tuple[int, int]) -> Iterator[None]:
    """Global layers scan segments as long as the map in training; others stay as they are."""
    before = {name: layer.segment for name, layer in swap.layers.items()}
    deepest = SIDE // BLOCK // 2
    for name, layer in swap.layers.items():
        trained = deepest if level_of(swap.unet, name) else 2 * deepest
        layer.segment = min(layer.segment or trained, trained)
    try:
        yield
    finally:
        for name, segment in before.items():
            swap.layers[name].segment = segment


def wide_convolutions(parts: tuple, swap, size: tuple[int, int]) -> contextlib.AbstractContextManager:
    return dilated(swap.unet, times(size), parts)


@contextlib.contextmanager
def nothing_seen(swap, size: tuple[int, int]) -> Iterator[None]:
    """Self-attention, or the layers in its place, give 0: no remedy, but what they are worth."""
    modules = swap.layers if swap.active == "gspn" else swap.attentions
    hooks = [module.register_forward_hook(lambda module, args, output: 0 * output) for module in modules.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


REMEDIES: dict[str, Callable] = {
    "without self-attention": nothing_seen,
    "sub-lattices": sub_lattices,
    "dilated, down and middle": partial(wide_convolutions, ("down_blocks", "mid_block")),
    "dilated, all": partial(wide_convolutions, ("",)),
    "segments as trained": trained_segments,
}


# -- one run --


@torch.no_grad()
def measure(model: Callable, teacher: Teacher, photos: tuple[Tensor, Tensor], size: str, count: int) -> dict:
    """The loss on `count` photos at `size`: in all, by timestep, and of each photo for paired differences."""
    height, width = map(int, size.split("x"))
    source = torch.Generator().manual_seed(7)
    steps = (torch.arange(count) + torch.rand(count, generator=source)) / count * teacher.objective.steps
    steps = steps.long()[torch.randperm(count, generator=source)]
    losses = []
    for index in torch.arange(count).split(20):
        start, t = teacher.latents(pixels(photos[0][index], (height, width))), steps[index]
        noise = torch.randn(start.shape, generator=source)
        output = model(teacher.objective.noisy(start, noise, t), t, teacher.states(photos[1][index]))
        losses.append(teacher.objective.losses(output, start, noise, t)[0])
    each, bucket = torch.cat(losses), steps * BUCKETS // teacher.objective.steps
    by_step = [round(each[bucket == i].mean().item(), 5) for i in range(BUCKETS)]
    return {"loss": each.mean().item(), "by_timestep": by_step, "each": [round(v, 5) for v in each.tolist()]}


def distilled(run: Run, student: Student, photos: Photos, batch: int) -> list[dict]:
    """Trains the student as gspn distill does, or the teacher's attention on the same images; returns the curve of the
    loss."""
    contender, teacher, (images, labels) = CONTENDERS[run.contender], student.teacher, photos["train"]
    native = (SIDE, SIDE)
    sizes = ChosenSizes(native, contender.sizes, 2 * BLOCK) if contender.sizes else None
    task = Distillation(
        student,
        [(CAPTIONS[label],) for label in labels.tolist()],
        [],
        Preprocessing(3, native, (0.5,) * 3, (0.5,) * 3),
        None,
        weights={"noise": 1.0, "output": 0.5, "feature": 0.5},
        away=contender.away,
        dropout=DROPPED,
        sizes=sizes,
        unreadable=Unreadable({}),
    )
    attentive = contender.swap is None
    learning = nn.ModuleList((student.swap.attentions if attentive else student.swap.layers).values())
    learning.requires_grad_(True)
    optimizer = make_optimizer(learning, LoopOptions(optimizer=run.optimizer, lr=run.rate, weight_decay=0.01))
    curve, recent = [], []
    for step in range(run.steps):
        torch.manual_seed(10_000 * (run.teacher + 1) + step)  # the same photos, noise and timesteps for all students
        index = torch.randint(len(images), (batch,))
        image = images[index]
        if sizes:
            image = ((pixels(image, sizes.largest) + 1) * 127.5).round().byte()
        prepared = task.prepare({"image": image, "label": labels[index], "index": index})
        warm = min(1.0, (step + 1) / WARM_UP)
        for group in optimizer.param_groups:
            group["lr"] = run.rate * warm * (0.02 + 0.49 * (1 + math.cos(math.pi * step / run.steps)))
        if attentive:
            start, noise, t = (prepared[name] for name in ("start", "noise", "timestep"))
            loss = teacher.objective.losses(teacher.predict(*task.inputs(prepared)), start, noise, t)[0].mean()
        else:
            loss = task.loss(student, prepared) / batch
        loss.backward()
        nn.utils.clip_grad_norm_(learning.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if len(recent) == max(1, run.steps // 10):
            curve.append({"step": step + 1, "loss": statistics.fmean(recent)})
            recent = []
    return curve


def train(run: Run, photos: Photos, teachers: dict[int, Path], sizes: dict[str, int] = SIZES, batch: int = BATCH):
    """Distils and measures; returns the content of the run's file. `teachers`: their files by their seeds."""
    torch.manual_seed(run.teacher)
    contender, (teacher, made) = CONTENDERS[run.contender], open_teacher(teachers[run.teacher])
    began, curve = time.thread_time(), []
    swapped = gspn.swap(teacher.unet, **contender.swap or QKV)
    if contender.swap is None:
        swapped.use("attention")
    if run.steps:
        curve = distilled(run, Student(teacher, swapped), photos, batch)
    seconds = time.thread_time() - began
    found = lambda split, size, count: measure(teacher.predict, teacher, photos[split], size, count)  # noqa: E731
    held_out = {size: found("val", size, min(count, HELD_OUT))["loss"] for size, count in sizes.items()}
    content = {
        **run._asdict(),
        "teacher_steps": made["steps"],
        "val": held_out,
        "test": {size: found("test", size, count) for size, count in sizes.items()},
        "remedies": {},
        "curve": curve,
        "cpu_seconds": round(seconds, 1),
    }
    for name in contender.adapted:
        content["remedies"][name], remedy = {}, REMEDIES[name]
        for size, count in sizes.items():
            if times(shape := tuple(map(int, size.split("x")))) != (1, 1) or remedy is nothing_seen:
                with remedy(swapped, shape):
                    content["remedies"][name][size] = found("test", size, count)
    return content


# -- which runs are missing --


def read(folder: Path) -> dict[Run, dict]:
    """The finished runs in a folder."""
    return study.read(folder, Run)


def best_rate(done: dict[Run, dict], name: str, optimizer: str) -> float | None:
    """The learning rate with the lowest mean loss over all sizes on validation photos, with the first teacher."""
    found = {
        run.rate: statistics.fmean(content["val"].values())
        for run, content in done.items()
        if (run.contender, run.optimizer, run.teacher) == (name, optimizer, TEACHERS[0]) and run.steps in (STEPS, 0)
    }
    return min(found, key=found.__getitem__) if found else None


def teacher_run(teacher: int) -> Run:
    return Run("teacher", "none", 0.0, teacher, 0)


def wanted(done: dict[Run, dict]) -> Iterator[Run]:
    """All runs, the most important first: MAIN before the others, with Muon before AdamW, with the first teacher before
    the second."""
    yield from map(teacher_run, TEACHERS)
    for names in (MAIN, [name for name in CONTENDERS if name not in (*MAIN, "teacher")]):
        for optimizer, rates in RATES.items():
            yield from (Run(name, optimizer, rate, TEACHERS[0]) for rate in rates for name in names)
        for optimizer in RATES:
            for teacher in TEACHERS[1:]:
                best = {name: best_rate(done, name, optimizer) for name in names}
                yield from (Run(name, optimizer, rate, teacher) for name, rate in best.items() if rate)


# -- tables --


def chosen(done: dict[Run, dict], name: str, optimizer: str, steps: int = STEPS) -> dict[int, dict]:
    """{teacher: run} of a contender at its best rate, which is that of STEPS steps."""
    wanted = (name, optimizer, best_rate(done, name, optimizer))
    return {run.teacher: done[run] for run in done if run[:3] == wanted and run.steps in (steps, 0)}


def difference(contents: dict[int, dict], others: dict[int, dict], size: str) -> tuple[float, float]:
    """(mean over teachers and photos of the loss minus the others', its error over the photos, which they share)."""
    both = sorted(contents.keys() & others.keys())
    return study.difference([(others[t]["test"][size]["each"], contents[t]["test"][size]["each"]) for t in both])[:2]


def beside(contents: dict[int, dict], others: dict[int, dict]) -> list[str]:
    """The cells of `difference` at each size."""
    return ["{:+.4f} ± {:.4f}".format(*difference(contents, others, size)) for size in SIZES]


def rows_of(done: dict[Run, dict], steps: int) -> Iterator[tuple[str, str, dict[int, dict]]]:
    """(contender, optimizer, runs by teacher) of what was run for so many steps."""
    for name in CONTENDERS:
        for optimizer in ("none",) if name == "teacher" else RATES:
            if contents := chosen(done, name, optimizer, steps):
                yield name, optimizer, contents


def losses(done: dict[Run, dict], steps: int) -> str:
    """The tables of the losses, and of their differences from attention trained on alike."""
    teachers, rows, against = chosen(done, "teacher", "none"), [], []
    for name, optimizer, contents in rows_of(done, steps):
        title, own = CONTENDERS[name].title, name == "teacher"
        means = [statistics.fmean(each["test"][size]["loss"] for each in contents.values()) for size in SIZES]
        told = [""] * len(SIZES) if own else beside(contents, teachers)
        cells = [f"{mean:.4f}" + (f" ({by})" if by else "") for mean, by in zip(means, told, strict=True)]
        tried = sum(run[:2] == (name, optimizer) and run[3:] == (TEACHERS[0], STEPS) for run in done)
        rate = "" if own else f"{next(iter(contents.values()))['rate']:g} of {tried}"
        rows.append([title, "" if own else optimizer, rate, str(len(contents)), *cells])
        alike = chosen(done, "attention-sizes" if CONTENDERS[name].sizes else "attention", optimizer, steps)
        if CONTENDERS[name].swap is not None and (both := alike.keys() & contents.keys()):
            against.append([title, optimizer, str(len(both)), *beside(contents, alike)])
    text = harness.table(["model", "optimizer", "rate", "teachers", *SIZES], rows) + "\n\n"
    if against:
        text += "Minus attention, trained on by the same optimizer, on the same sizes:\n\n"
        text += harness.table(["model", "optimizer", "teachers", *SIZES], against) + "\n\n"
    return text


def remedied(done: dict[Run, dict]) -> list[list[str]]:
    """What the remedies change, with the first teacher."""
    rows = []
    for name, optimizer, contents in rows_of(done, STEPS):
        one = contents[TEACHERS[0]]
        for remedy, found in one["remedies"].items():
            cells = [CONTENDERS[name].title, "" if name == "teacher" else optimizer, remedy]
            for size in SIZES:
                if size not in found:
                    cells.append("")
                    continue
                by, error, _ = study.difference([(one["test"][size]["each"], found[size]["each"])])
                old, new = one["test"][size]["by_timestep"], found[size]["by_timestep"]
                cells.append(f"{by:+.4f} ± {error:.4f}; noisiest fifth {new[-1] - old[-1]:+.4f}")
            rows.append(cells)
    return rows


def report(folder: Path) -> str:
    """Markdown: the losses, their differences from the teachers' and from attention trained on, by timestep, and what
    the remedies change."""
    done, late = read(folder), []
    for name, optimizer, contents in rows_of(done, STEPS):
        buckets = zip(*(each["test"]["64x64"]["by_timestep"] for each in contents.values()), strict=True)
        optimizer = "" if name == "teacher" else optimizer
        late.append([CONTENDERS[name].title, optimizer, *(f"{statistics.fmean(values):.4f}" for values in buckets)])
    ran = {run.contender for run in done}
    never = [contender.title for name, contender in CONTENDERS.items() if name not in ran]
    fifths = [f"{i / BUCKETS:.1f} to {(i + 1) / BUCKETS:.1f}" for i in range(BUCKETS)]
    trained = " and ".join(f"{each['teacher_steps']:,}" for each in chosen(done, "teacher", "none").values())
    longer = sorted({run.steps for run in done} - {STEPS, 0})
    return (
        f"# Distilled for sizes\n\nA small text-to-image UNet on CIFAR-10, trained at 32x32 by AdamW for {trained} "
        f"steps of {BATCH} photos (two teachers, two seeds); students of {STEPS} steps of {BATCH}. Made by `python -m "
        "benchmarks.quality.text_to_image_sizes --report`.\n\nDenoising loss on test photos resized to a size; in "
        "brackets the student's minus its teacher's, with the error of the mean over the same photos, timesteps and "
        "noise. It does not tell what another seed would change. *rate*: the best of how many, on validation photos "
        f"at all sizes, with the first teacher. `--sizes` is {','.join(f'{factor:g}' for factor in FACTORS)}, without "
        "the teacher at other sizes than its own. *Attention, trained on*: the teacher's self-attention, trained on "
        f"the same images for as many steps. Commits: {study.commits(done.values())}.\n\n"
        + losses(done, STEPS)
        + (f"Not run: {'; '.join(never)}.\n\n" if never else "")
        + "".join(f"## {steps} steps, at the rates above\n\n{losses(done, steps)}" for steps in longer)
        + "## 64x64 by timestep, from little noise to all\n\n"
        f"{harness.table(['model', 'optimizer', *fifths], late)}\n\n## Remedies without training\n\n"
        "Loss with the remedy minus loss without; negative is better. The first teacher. The lines without "
        "self-attention are no remedy: they say what it, or what is in its place, is worth.\n\n"
        f"{harness.table(['model', 'optimizer', 'remedy', *SIZES], remedied(done))}\n"
    )


def draw(folder: Path, out: Path) -> None:
    """Each student's loss minus its teacher's, by size, for each optimizer."""
    done, figure = read(folder), Figure(figsize=(11, 4), layout="constrained")
    panels, teachers = figure.subplots(1, len(RATES), sharey=True), chosen(done, "teacher", "none")
    colours = {name: f"C{i}" for i, name in enumerate(CONTENDERS)}
    for axes, optimizer in zip(panels, RATES, strict=True):
        axes.axhline(0, color="grey", lw=1, label="teacher")
        for name, contender in CONTENDERS.items():
            if name != "teacher" and (contents := chosen(done, name, optimizer)):
                found = zip(*(difference(contents, teachers, size) for size in SIZES), strict=True)
                axes.errorbar(list(SIZES), *found, marker="o", capsize=3, label=contender.title, color=colours[name])
        axes.set(title=f"Distilled by {optimizer}, {STEPS} steps", xlabel="size of the photos")
    panels[0].set_ylabel("denoising loss minus the teacher's")
    labels = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels, loc="outside right center", fontsize=8)
    figure.savefig(out, dpi=120)


# -- the command --


def work(folder: Path, photos: Photos, teachers: dict[int, Path], minutes: float, runs: Sequence[Run] | None = None):
    """Makes `runs`, or else what is missing, until the time is over. Returns the number of runs."""

    def told(content: dict) -> str:
        return ", ".join(f"{size} {found['loss']:.4f}" for size, found in content["test"].items())

    return study.work(folder, Run, wanted, lambda run: train(run, photos, teachers), told, minutes, runs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    study.add_options(parser, RESULTS, Run, CONTENDERS)
    parser.add_argument("--photos", type=Path, help="the folder of CIFAR-10")
    parser.add_argument("--teachers", type=Path, nargs="+", metavar="FILE", help="the files of the teachers")
    parser.add_argument("--train", type=float, metavar="MINUTES", help="train a teacher for so long")
    parser.add_argument("--teacher-seed", type=int, default=0, help="the seed of the teacher's training (default: 0)")
    arguments = parser.parse_args()
    if study.told(arguments, read, wanted, report, draw):
        return
    if arguments.photos is None or arguments.teachers is None:
        parser.error("give --photos, the folder of CIFAR-10 (tables with the splits train and test), and --teachers")
    torch.set_num_threads(1)
    photos = Photos.open(arguments.photos)
    if arguments.train:
        if len(arguments.teachers) != 1:
            parser.error(f"--train makes one teacher, got {len(arguments.teachers)} files in --teachers")
        train_teacher(photos, arguments.teachers[0], arguments.train, arguments.teacher_seed)
        return
    files = {open_teacher(file)[1]["seed"]: file for file in arguments.teachers}
    if missing := set(TEACHERS) - set(files):
        parser.error(f"no teacher of the seed {', '.join(map(str, sorted(missing)))} is among {arguments.teachers}")
    work(arguments.out, photos, files, arguments.minutes, arguments.runs)


if __name__ == "__main__":
    main()
