"""Distils a small text-to-image UNet with and without random sizes, and compares how well teacher and students denoise
at the teacher's size and at others, with and without remedies for larger maps.

python -m benchmarks.quality.text_to_image_sizes --photos FOLDER --teacher FILE --train 60    trains the teacher
python -m benchmarks.quality.text_to_image_sizes --photos FOLDER --teacher FILE --minutes 60  makes missing runs
python -m benchmarks.quality.text_to_image_sizes --list                                       says what is missing
python -m benchmarks.quality.text_to_image_sizes --report                                     tables and a picture

FOLDER holds CIFAR-10 as tables with the splits train and test. The teacher is a UNet2DConditionModel with attention at
16x16 and 8x8, on blocks of 2x2 pixels in the place of latents; a caption is a class, with states that are learned. It
is trained for --train minutes, in which its learning rate falls, and FILE is written. A student is what `gspn distill`
makes: the same swap, loss and random sizes, in a loop of its own without a run folder. The command may be stopped at
any time and started again: only complete runs are written, one JSON file each. The loss is the squared error of v on
test photos resized to each size, with the same timesteps and noise for all.
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
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from matplotlib.figure import Figure
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import gspn
from benchmarks.harness import harness, study
from benchmarks.quality.denoising import pixels
from benchmarks.quality.mixers.tasks import Photos
from gspn import lattices
from gspn.data.images import Preprocessing
from gspn.data.unreadable import Unreadable
from gspn.stable_diffusion.feature_maps import map_sizes
from gspn.stable_diffusion.highres.passes import dilated
from gspn.stable_diffusion.keeping import level_of
from gspn.tasks.objective import Objective
from gspn.tasks.sizes import ChosenSizes
from gspn.tasks.student import Distillation, Student

RESULTS = harness.ROOT / "benchmarks" / "results" / "quality" / "text-to-image-sizes"
CAPTIONS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TOKENS, WIDTH = 4, 64  # states of a caption
SIDE, BLOCK = 32, 2  # pixels; a "latent" is a block of BLOCK x BLOCK of them: nothing is lost
BATCH, RATE, EMA, DROPPED = 8, 2e-3, 0.995, 0.1
STEPS, STUDENT_RATE, WARM_UP = 200, 2e-3, 20
FACTORS = (0.75, 1, 1.5)
SEEDS = (0, 1)
SIZES = {"32x32": 300, "48x48": 150, "64x64": 150, "32x64": 150}  # test photos at each size
BUCKETS = 5  # of the timesteps


# -- the teacher --


class Teacher(nn.Module):
    """The UNet, the states of its captions and its noise: what gspn.tasks.student needs of a TextToImage."""

    def __init__(self):
        super().__init__()
        widths = (32, 64)
        self.unet = UNet2DConditionModel(
            sample_size=SIDE // BLOCK,
            in_channels=3 * BLOCK**2,
            out_channels=3 * BLOCK**2,
            block_out_channels=widths,
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",) * len(widths),
            up_block_types=("CrossAttnUpBlock2D",) * len(widths),
            attention_head_dim=tuple(width // 16 for width in widths),  # diffusers' name for the number of heads
            cross_attention_dim=WIDTH,
            norm_num_groups=16,
        )
        self.captions = nn.Embedding(len(CAPTIONS) + 1, TOKENS * WIDTH)  # the last is the empty caption
        scheduler = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction"
        )
        self.objective = Objective(scheduler)

    def latents(self, images: Tensor, *, draw: bool = False) -> Tensor:
        """(B,12,H/2,W/2) of images (B,3,H,W) in [-1, 1]."""
        return F.pixel_unshuffle(images, BLOCK)

    def states(self, labels: Tensor) -> dict[str, Tensor]:
        return {"text": self.captions(labels).unflatten(1, (TOKENS, WIDTH))}

    def conditions(self, captions: list[str | None], size: tuple[int, int]) -> dict[str, Tensor]:
        index = [len(CAPTIONS) if caption is None else CAPTIONS.index(caption) for caption in captions]
        return self.states(torch.tensor(index))

    def predict(self, noisy: Tensor, timestep: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        return self.unet(noisy, timestep, encoder_hidden_states=conditions["text"], return_dict=False)[0]


def train_teacher(photos: Photos, file: Path, minutes: float, seed: int = 0) -> None:
    """Trains, averages and saves the teacher, in that time: the learning rate falls along it as a cosine. Saves what
    there is every 100 steps."""
    torch.manual_seed(seed)
    teacher, (images, labels) = Teacher().train(), photos["train"]
    optimizer = torch.optim.AdamW(teacher.parameters(), RATE, betas=(0.9, 0.99), weight_decay=0.01)
    averaged = {name: value.clone() for name, value in teacher.state_dict().items()}
    began, recent, step, part = time.time(), [], 0, 0.0
    while part < 1:
        part = min(1.0, (time.time() - began) / 60 / minutes)
        rate = RATE * min(1.0, (step + 1) / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * part)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        index = torch.randint(len(images), (BATCH,))
        x, label = pixels(images[index]), labels[index].where(torch.rand(BATCH) >= DROPPED, len(CAPTIONS))
        start = teacher.latents(torch.where(torch.rand(BATCH, 1, 1, 1) < 0.5, x.flip(3), x))
        noise, t = torch.randn(start.shape), torch.randint(teacher.objective.steps, (BATCH,))
        output = teacher.predict(teacher.objective.noisy(start, noise, t), t, teacher.states(label))
        loss = teacher.objective.losses(output, start, noise, t)[0].mean()
        loss.backward()
        nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        with torch.no_grad():
            keep = min(EMA, (1 + step) / (10 + step))
            for name, value in teacher.state_dict().items():
                averaged[name].lerp_(value, 1 - keep)
        step += 1
        if step % 100 == 0 or part == 1:
            save_file(averaged, file, {"steps": str(step), "seed": str(seed)})
            print(f"step {step}  loss {statistics.fmean(recent):.4f}  {part:.0%} of {minutes} minutes", flush=True)
            recent = []


def open_teacher(file: Path) -> tuple[Teacher, int]:
    """(the teacher, the steps that it was trained for)."""
    teacher = Teacher().eval().requires_grad_(False)
    teacher.load_state_dict(load_file(file))
    with safe_open(file, "pt") as opened:
        return teacher, int(opened.metadata()["steps"])


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
CONTENDERS = {
    "teacher": Contender("teacher", None, adapted=ALL[:4]),
    "segment4": Contender("segment 4", LOCAL, adapted=ALL[:4]),
    "segment4-sizes": Contender("segment 4, --sizes", LOCAL, FACTORS, adapted=("sub-lattices",)),
    "global": Contender("global", QKV, adapted=ALL),
    "global-sizes": Contender("global, --sizes", QKV, FACTORS),
    "attention": Contender("the teacher's attention, trained on", None),
    "attention-sizes": Contender("the teacher's attention, trained on, --sizes", None, FACTORS),
    "segment4-sizes-away": Contender("segment 4, --sizes --away-weight 1", LOCAL, FACTORS, 1.0),
    "lowest": Contender("segment 4, lowest level kept", LOCAL | {"keep": "lowest"}),
    "lowest-sizes": Contender("segment 4, lowest level kept, --sizes", LOCAL | {"keep": "lowest"}, FACTORS),
}


class Run(NamedTuple):
    """The settings of a run; its file is named after them."""

    contender: str
    seed: int
    steps: int = STEPS

    @property
    def stem(self) -> str:
        return f"{self.contender}-seed{self.seed}-{self.steps}steps"


MAIN = ("segment4", "segment4-sizes", "attention-sizes", "global", "global-sizes")


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


def distilled(run: Run, teacher: Teacher, student: Student, photos: Photos, batch: int) -> list[dict]:
    """Trains the student as gspn distill does, or the teacher's attention on the same images; returns the curve of the
    loss."""
    contender, (images, labels) = CONTENDERS[run.contender], photos["train"]
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
    learning = student.swap.attentions.values() if attentive else student.swap.layers.values()
    learning = [parameter.requires_grad_(True) for module in learning for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(learning, STUDENT_RATE, weight_decay=0.01)
    curve, recent = [], []
    for step in range(run.steps):
        torch.manual_seed(10_000 * (run.seed + 1) + step)  # the same photos, noise and timesteps for all students
        index = torch.randint(len(images), (batch,))
        image = images[index]
        if sizes:
            image = ((pixels(image, sizes.largest) + 1) * 127.5).round().byte()
        prepared = task.prepare({"image": image, "label": labels[index], "index": index})
        warm = min(1.0, (step + 1) / WARM_UP)
        for group in optimizer.param_groups:
            group["lr"] = STUDENT_RATE * warm * (0.02 + 0.49 * (1 + math.cos(math.pi * step / run.steps)))
        if attentive:
            start, noise, t = (prepared[name] for name in ("start", "noise", "timestep"))
            loss = teacher.objective.losses(teacher.predict(*task.inputs(prepared)), start, noise, t)[0].mean()
        else:
            loss = task.loss(student, prepared) / batch
        loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if len(recent) == max(1, run.steps // 10):
            curve.append({"step": step + 1, "loss": statistics.fmean(recent)})
            recent = []
    return curve


def train(run: Run, photos: Photos, file: Path, sizes: dict[str, int] = SIZES, batch: int = BATCH) -> dict:
    """Distils and measures; returns the content of the run's file."""
    torch.manual_seed(run.seed)
    contender, (teacher, steps) = CONTENDERS[run.contender], open_teacher(file)
    began, curve = time.thread_time(), []
    swapped = gspn.swap(teacher.unet, **contender.swap or QKV)
    if contender.swap is None:
        swapped.use("attention")
    if run.steps:
        curve = distilled(run, teacher, Student(teacher, swapped), photos, batch)
    seconds, test = time.thread_time() - began, photos["test"]
    found = lambda size, count: measure(teacher.predict, teacher, test, size, count)  # noqa: E731
    content = {
        **run._asdict(),
        "teacher_steps": steps,
        "test": {size: found(size, count) for size, count in sizes.items()},
        "remedies": {},
        "curve": curve,
        "cpu_seconds": round(seconds, 1),
    }
    for name in contender.adapted:
        content["remedies"][name], remedy = {}, REMEDIES[name]
        for size, count in sizes.items():
            if times(shape := tuple(map(int, size.split("x")))) != (1, 1) or remedy is nothing_seen:
                with remedy(swapped, shape):
                    content["remedies"][name][size] = found(size, count)
    return content


# -- which runs are missing --


def read(folder: Path) -> dict[Run, dict]:
    """The finished runs in a folder."""
    return study.read(folder, Run)


def wanted(done: dict[Run, dict]) -> Iterator[Run]:
    """All runs, the most important first: MAIN before the others."""
    yield Run("teacher", 0, 0)
    for main in (True, False):
        for seed in SEEDS:
            names = [name for name in CONTENDERS if (name in MAIN) == main and name != "teacher"]
            yield from (Run(name, seed) for name in names)


# -- tables --


def runs_of(done: dict[Run, dict], name: str) -> list[dict]:
    return [content for run, content in done.items() if run.contender == name]


def difference(contents: list[dict], teacher: dict, size: str) -> tuple[float, float]:
    """(mean over seeds and photos of the loss minus the teacher's, its error over the photos, shared by the seeds)."""
    losses = [content["test"][size]["each"] for content in contents]
    return study.difference([(teacher["test"][size]["each"], each) for each in losses])[:2]


def report(folder: Path) -> str:
    """Markdown: the losses, their differences from the teacher's, by timestep, and what the remedies change."""
    done = read(folder)
    (teacher,) = runs_of(done, "teacher")
    rows, late, remedies = [], [], []
    for name, contender in CONTENDERS.items():
        contents = runs_of(done, name)
        if not contents:
            rows.append([contender.title, "not run", *[""] * len(SIZES)])
            continue
        cells = [contender.title, str(len(contents))]
        for size in SIZES:
            mean = statistics.fmean(content["test"][size]["loss"] for content in contents)
            by, error = difference(contents, teacher, size)
            cells.append(f"{mean:.4f}" + ("" if name == "teacher" else f" ({by:+.4f} ± {error:.4f})"))
        rows.append(cells)
        buckets = zip(*(content["test"]["64x64"]["by_timestep"] for content in contents), strict=True)
        late.append([contender.title, *(f"{statistics.fmean(values):.4f}" for values in buckets)])
        one = next((content for content in contents if content["remedies"]), {"remedies": {}})
        for remedy, found in one["remedies"].items():
            cells = [contender.title, remedy]
            for size in SIZES:
                if size not in found:
                    cells.append("")
                    continue
                by, error, _ = study.difference([(one["test"][size]["each"], found[size]["each"])])
                old, new = one["test"][size]["by_timestep"], found[size]["by_timestep"]
                cells.append(f"{by:+.4f} ± {error:.4f}; noisiest fifth {new[-1] - old[-1]:+.4f}")
            remedies.append(cells)
    steps = [f"{i / BUCKETS:.1f} to {(i + 1) / BUCKETS:.1f}" for i in range(BUCKETS)]
    return (
        f"# Distilled for sizes\n\nA small text-to-image UNet on CIFAR-10, trained at 32x32 for "
        f"{teacher['teacher_steps']} steps of {BATCH} photos; students of {STEPS} steps of {BATCH}. Made by "
        "`python -m benchmarks.quality.text_to_image_sizes --report`.\n\nDenoising loss on test photos resized to a "
        "size; in brackets the student's minus the teacher's, with the error of the mean over the same photos, "
        "timesteps and noise. It does not tell what another seed would change. `--sizes` is "
        f"{','.join(f'{factor:g}' for factor in FACTORS)}, without the teacher at other sizes than its own.\n\n"
        f"{harness.table(['model', 'seeds', *SIZES], rows)}\n\n## 64x64 by timestep, from little noise to all\n\n"
        f"{harness.table(['model', *steps], late)}\n\n## Remedies without training\n\n"
        "Loss with the remedy minus loss without; negative is better. One seed each. The lines without "
        "self-attention are no remedy: they say what it, or what is in its place, is worth.\n\n"
        f"{harness.table(['model', 'remedy', *SIZES], remedies)}\n"
    )


def draw(folder: Path, out: Path) -> None:
    """Each student's loss minus the teacher's, by size."""
    done, figure = read(folder), Figure(figsize=(8, 4), layout="constrained")
    axes, (teacher,) = figure.subplots(), runs_of(done, "teacher")
    axes.axhline(0, color="grey", lw=1, label="teacher")
    for name, contender in CONTENDERS.items():
        if name != "teacher" and (contents := runs_of(done, name)):
            found = [difference(contents, teacher, size) for size in SIZES]
            axes.errorbar(list(SIZES), *zip(*found, strict=True), marker="o", capsize=3, label=contender.title)
    axes.set(title="Distilled at 32x32 or at several sizes", xlabel="size of the photos")
    axes.set_ylabel("denoising loss minus the teacher's")
    figure.legend(loc="outside right center", fontsize=8)
    figure.savefig(out, dpi=120)


# -- the command --


def work(folder: Path, photos: Photos, file: Path, minutes: float, runs: Sequence[Run] | None = None) -> int:
    """Makes `runs`, or else what is missing, until the time is over. Returns the number of runs."""

    def told(content: dict) -> str:
        return ", ".join(f"{size} {found['loss']:.4f}" for size, found in content["test"].items())

    return study.work(folder, Run, wanted, lambda run: train(run, photos, file), told, minutes, runs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    study.add_options(parser, RESULTS, Run, CONTENDERS)
    parser.add_argument("--photos", type=Path, help="the folder of CIFAR-10")
    parser.add_argument("--teacher", type=Path, help="the file of the teacher")
    parser.add_argument("--train", type=float, metavar="MINUTES", help="train the teacher for so long")
    arguments = parser.parse_args()
    if study.told(arguments, read, wanted, report, draw):
        return
    if arguments.photos is None or arguments.teacher is None:
        parser.error("give --photos, the folder of CIFAR-10 (tables with the splits train and test), and --teacher")
    torch.set_num_threads(1)
    photos = Photos.open(arguments.photos)
    if arguments.train:
        train_teacher(photos, arguments.teacher, arguments.train)
    else:
        work(arguments.out, photos, arguments.teacher, arguments.minutes, arguments.runs)


if __name__ == "__main__":
    main()
