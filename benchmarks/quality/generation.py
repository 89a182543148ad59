"""Compares trained generators: samples at the trained size and at unseen sizes, their distances from the training
images, a classifier's guesses, loss curves, and the time of a training step.

    python -m benchmarks.quality.generation --stem benchmarks/results/quality/fashion-generation --data DATA \\
        --classifier RUN --run GSPN=runs/fashion-gspn --run DiT=runs/fashion-dit --checkpoint epoch-0003 --work DIR

The runs are made by `gspn train-diffusion` with equal settings. DIR keeps samples and statistics, so that the command
can be stopped and started again. With --photos, for runs on CIFAR-10, it also measures the denoising loss of test
photos, by timestep, with the right class and with the null class. Writes STEM.json, STEM.md, STEM-curves.png,
STEM-sizes.png and a grid of each run at the trained size.
"""

import argparse
import itertools
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from benchmarks.harness import harness, study
from benchmarks.quality import denoising
from benchmarks.quality.mixers.tasks import Photos
from gspn.metrics.fid import evaluate_samples
from gspn.options.base import parse_parts
from gspn.options.generators import SampleOptions
from gspn.sampling.generators import build_generator, load_pipeline
from gspn.sampling.sample import sample
from gspn.tasks.objective import Objective
from gspn.train.run import Run

COLOURS = ("#2f6db3", "#e07b22", "#5f6368")
COLUMNS = {
    "frechet_distance": ("Frechet distance", ".1f"),
    "kernel_distance": ("kernel distance", ".4f"),
    "precision": ("precision", ".1%"),
    "recall": ("recall", ".1%"),
    "accuracy": ("taken for their class", ".1%"),
}


def step_times(runs: dict[str, Path], checkpoint: str, rounds: int) -> dict[str, dict]:
    """Milliseconds of a training step (noise, forward, backward, AdamW) on one thread, taken in turns."""
    torch.set_num_threads(1)
    calls = {}
    for name, path in runs.items():
        pipeline, config = load_pipeline(path, checkpoint), Run.open(path).config
        model = pipeline.transformer.train()
        objective, optimizer = Objective(pipeline.scheduler), torch.optim.AdamW(model.parameters())
        batch = config["options"]["batch_size"]
        start = torch.randn(batch, config["space"]["channels"], *config["space"]["size"])
        labels = torch.zeros(batch, dtype=torch.long)
        half = config["options"]["precision"] == "bf16"

        def step(model=model, objective=objective, optimizer=optimizer, start=start, labels=labels, half=half):
            noise, timestep = torch.randn_like(start), torch.randint(objective.steps, (len(start),))
            noisy = objective.noisy(start, noise, timestep)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                output = model(noisy, timestep=timestep, class_labels=labels).sample.float()
            error, bound = objective.losses(output, start, noise, timestep)
            (error + bound).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        calls[name] = step
    return harness.summary(harness.interleaved(calls, rounds, threads=1), next(iter(runs)))


class Way(NamedTuple):
    """How one set of samples is made. `name`: of the run; `factor`: size over trained size."""

    name: str
    factor: float
    count: int
    guidance: float
    dilation: int = 1
    enlarge: float | None = None
    shift: float = 1.0
    interval: tuple[float, float] | None = None  # of guidance

    @property
    def title(self) -> str:
        dilated = "" if self.dilation == 1 else f", dilated by {self.dilation}"
        enlarged = "" if self.enlarge is None else f", enlarged, {self.enlarge:g} of the steps again"
        shifted = "" if self.shift == 1 else f", timesteps shifted by {self.shift:g}"
        between = "" if self.interval is None else ", guided from {:g} to {:g}".format(*self.interval)
        return self.name + dilated + enlarged + shifted + between

    def size(self, trained) -> tuple[int, int]:
        return tuple(round(side * self.factor) for side in trained)

    def folder(self, arguments, trained) -> Path:
        height, width = self.size(trained)
        name = f"{self.name}-{arguments.checkpoint}-{height}x{width}-g{self.guidance:g}"
        name += "" if self.dilation == 1 else f"-dilation{self.dilation}"
        name += "" if self.enlarge is None else f"-enlarge{self.enlarge:g}"
        name += "" if self.shift == 1 else f"-shift{self.shift:g}"
        return arguments.work / (name if self.interval is None else "{}-from{:g}to{:g}".format(name, *self.interval))


def ways(names: list[str], arguments) -> list[Way]:
    """All sets of samples: every size at the guidance of the pictures, the trained size at the others too."""
    found = []
    for factor, count in zip(arguments.factors, arguments.counts, strict=True):
        for name in names:
            found.append(Way(name, factor, count, arguments.guidance))
            if factor > 1 and name in arguments.dilate:
                found.append(Way(name, factor, count, arguments.guidance, dilation=2))
            if factor > 1:
                found += [Way(name, factor, count, arguments.guidance, enlarge=part) for part in arguments.enlarge]
                found += [Way(name, factor, count, arguments.guidance, shift=shift) for shift in arguments.shift]
            if factor == 1:
                found += [Way(name, factor, count, other) for other in arguments.other_guidance]
            if factor == 1 and arguments.interval is not None:
                found.append(Way(name, factor, count, arguments.guidance, interval=arguments.interval))
    return found


def compare(runs: dict[str, Path], trained: tuple[int, int], arguments) -> list[dict]:
    """A row for each way to sample and network of features."""
    rows, console = [], Console()
    for way in ways(list(runs), arguments):
        options = SampleOptions(
            count=way.count,
            guidance=way.guidance,
            steps=arguments.steps,
            size=way.size(trained),
            dilation=way.dilation,
            enlarge=way.enlarge,
            timestep_shift=way.shift,
            guidance_interval=way.interval,
            scheduler=arguments.scheduler,
            seed=arguments.seed,
            batch_size=20,
            precision=arguments.precision,
        )
        folder = way.folder(arguments, trained)
        sample(runs[way.name], folder, options, checkpoint=arguments.checkpoint, console=console)
        for features in [f"classifier:{arguments.classifier}", *arguments.features]:
            found = evaluate_samples(folder, arguments.data, features, size=trained, cache=arguments.work, workers=0)
            found["features"] = found["features"].replace(str(arguments.classifier), "a run of gspn train")
            row = {"run": way.title, "factor": way.factor, "size": way.size(trained), "guidance": way.guidance}
            row |= {"images": way.count, "features": found["features"]}
            rows.append(row | {key: found[key] for key in COLUMNS} | {"notes": found["notes"]})
            print(rows[-1], flush=True)
    return rows


def losses(runs: dict[str, Path], trained: tuple[int, int], arguments) -> dict[str, dict]:
    """{run: {size: what denoising.measure gives}} of test photos."""
    photos, found = Photos.open(arguments.photos)["test"], {}
    for name, path in runs.items():
        pipeline = load_pipeline(path, arguments.checkpoint)
        model, objective = pipeline.transformer, Objective(pipeline.scheduler)
        for factor, count in zip(arguments.factors, arguments.loss_counts, strict=True):
            size = "x".join(str(round(side * factor)) for side in trained)
            measured = denoising.measure(model, objective, photos, size, count)
            found.setdefault(name, {})[size] = measured
            print(name, size, measured["loss"], flush=True)
    return found


def losses_table(found: dict[str, dict]) -> str:
    """Markdown."""
    edges = [f"{round(1_000 * i / denoising.BUCKETS)}" for i in range(denoising.BUCKETS + 1)]
    parts, rows = [f"t {a} to {b}" for a, b in itertools.pairwise(edges)], []
    for size in next(iter(found.values())):
        for name, sizes in found.items():
            values = [sizes[size]["loss"], *sizes[size]["by_timestep"]]
            worth = sum(sizes[size]["class_is_worth"]) / denoising.BUCKETS
            rows.append([size, name, *(f"{value:.4f}" for value in (*values, worth))])
    first, told = next(iter(found)), []
    for size in found[first]:
        for name in list(found)[1:]:
            if "each" in found[first][size]:
                mean, error, _ = study.difference([(found[first][size]["each"], found[name][size]["each"])])
                told.append(
                    f"{name} minus {first} at {size}, over the same photos and noise: {mean:+.4f} ± {error:.4f}."
                )
    table = harness.table(["size", "model", "loss", *parts, "class is worth"], rows)
    return f"{table}\n\nDenoising loss of test photos. {' '.join(told)}"


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = []
    for row in sorted(rows, key=lambda row: (row["features"], row["factor"], row["guidance"])):
        values = [row[key]["mean"] if isinstance(row[key], dict) else row[key] for key in COLUMNS]
        cells = [
            "" if value is None else format(value, form)
            for value, (_, form) in zip(values, COLUMNS.values(), strict=True)
        ]
        size = f"{row['size'][0]}x{row['size'][1]}"
        about = [row["features"], size, f"{row['guidance']:g}", row["run"], str(row["images"])]
        lines.append(about + cells)
    titles = [title for title, _ in COLUMNS.values()]
    return harness.table(["features", "size", "guidance", "samples of", "images", *titles], lines)


def curves(runs: dict[str, Path], last: int, path: Path) -> dict[str, list[dict]]:
    """Draws the losses of all runs up to epoch `last`; gives their rows of metrics."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    both, found = figure.subplots(1, 2), {}
    for (name, run), colour in zip(runs.items(), COLOURS, strict=False):
        rows = found[name] = [row for row in Run.open(run).metrics if row["epoch"] <= last]
        for axes, key, title in zip(
            both,
            ("train_loss", "val_error"),
            ("Training loss", "Validation, squared error"),
            strict=True,
        ):
            marker = "o" if len(rows) < 6 else None
            axes.plot([r["epoch"] for r in rows], [r[key] for r in rows], color=colour, marker=marker, label=name)
            axes.set(title=title, xlabel="epoch", yscale="log")
            axes.yaxis.set_major_formatter("{x:.3g}")
            axes.yaxis.set_minor_formatter("{x:.3g}")
            axes.grid(alpha=0.25, which="both")
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False)
            axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=110, facecolor="white")
    return found


def sizes_picture(names: list[str], trained: tuple[int, int], arguments, classes: list[str], path: Path) -> None:
    """A row of samples, one for each class, for every size and run, all at their own number of pixels; with help for
    larger sizes, at the largest size."""
    shown = [
        way
        for way in ways(names, arguments)
        if (way.guidance, way.interval) == (arguments.guidance, None)
        and (way.title == way.name or way.factor == max(arguments.factors))
    ]
    figure = Figure(figsize=(1.1 * len(classes) + 1, 1.12 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), len(classes), squeeze=False)
    for way, line in zip(shown, axes, strict=True):
        height, width = way.size(trained)
        files = sorted((way.folder(arguments, trained) / "images").iterdir())
        for file, panel in zip(files[: len(classes)], line, strict=True):
            with Image.open(file) as image:
                panel.imshow(image.convert("RGB"), interpolation="nearest")
            panel.axis("off")
        line[0].set_title(f"{way.title}, {height}x{width}", loc="left", fontsize=9)
    for name, panel in zip(classes, axes[-1], strict=True):
        panel.text(0.5, -0.05, name, transform=panel.transAxes, ha="center", va="top", fontsize=9)
    figure.savefig(path, dpi=80, facecolor="white")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stem", type=Path, required=True)
    parser.add_argument("--data", required=True, help="the data that the runs were trained on")
    parser.add_argument("--run", action="append", required=True, metavar="NAME=RUN")
    parser.add_argument("--classifier", type=Path, required=True, help="a run of gspn train on these data")
    parser.add_argument("--features", action="append", default=[], help="further networks, named as for gspn fid")
    parser.add_argument("--checkpoint", default="last")
    parser.add_argument("--factors", type=float, nargs="+", default=[1, 1.5, 2])
    parser.add_argument("--counts", type=int, nargs="+", default=[500, 300, 300], help="number of samples at each size")
    parser.add_argument("--guidance", type=float, default=2)
    parser.add_argument("--other-guidance", type=float, nargs="*", default=[], help="further ones at the trained size")
    parser.add_argument("--dilate", action="append", default=[], metavar="NAME", help="also sampled with dilation 2")
    parser.add_argument("--enlarge", type=float, nargs="*", default=[], help="also larger sizes from enlarged samples")
    parser.add_argument("--shift", type=float, nargs="*", default=[], help="also larger sizes with shifted timesteps")
    parser.add_argument("--interval", type=parse_parts, metavar="LOW,HIGH", help="also the trained size guided there")
    parser.add_argument("--photos", type=Path, help="the folder of CIFAR-10, for losses of test photos")
    parser.add_argument("--loss-counts", type=int, nargs="+", default=[2_000, 400, 400], help="test photos a size")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scheduler", default="dpm-solver++", help="as for gspn sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="fp32", help="precision of the samples: fp32 or bf16")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that time a training step")
    parser.add_argument("--command", action="append", default=[], help="a command that made the runs")
    parser.add_argument("--commit", required=True, help="the commit of the code that made the runs")
    parser.add_argument("--note", action="append", default=[], help="a sentence for the Markdown file")
    parser.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()
    runs = {name: Path(path) for name, _, path in (each.partition("=") for each in arguments.run)}

    opened = {name: Run.open(path) for name, path in runs.items()}
    states = {name: run.load_checkpoint(arguments.checkpoint, ())[1] for name, run in opened.items()}
    if len({(state["epoch"], state["step"]) for state in states.values()}) > 1:
        raise SystemExit(
            f"expected runs at the same epoch and step, got {[(s['epoch'], s['step']) for s in states.values()]}"
        )
    state = next(iter(states.values()))
    config = next(iter(opened.values())).config
    stem, classes, trained = arguments.stem, config["class_names"], tuple(config["space"]["image_size"])
    parameters = {
        name: sum(p.numel() for p in build_generator(run.config["model"]).parameters())  # as trained: DiT's ties count
        for name, run in opened.items()
    }
    measured = losses(runs, trained, arguments) if arguments.photos else {}
    rows = compare(runs, trained, arguments)
    seconds = step_times(runs, arguments.checkpoint, arguments.rounds)
    epochs = curves(runs, state["epoch"], Path(f"{stem}-curves.png"))
    sizes_picture(list(runs), trained, arguments, classes, Path(f"{stem}-sizes.png"))
    first = min(arguments.factors, key=lambda factor: abs(factor - 1))
    for name in runs:
        folder = Way(name, first, 0, arguments.guidance).folder(arguments, trained)
        shutil.copyfile(folder / "grid.png", f"{stem}-{name}.png")
    result = {
        "commands": arguments.command,
        "commit": arguments.commit,
        "environment": harness.environment(),
        "versions": {name: run.config["versions"] for name, run in opened.items()},
        "options": {name: run.config["options"] for name, run in opened.items()},
        "parameters": parameters,
        "steps": state["step"],
        "epochs": epochs,
        "guidance": arguments.guidance,
        "sampling_steps": arguments.steps,
        "scheduler": arguments.scheduler,
        "sampling_precision": arguments.precision,
        "training_step": seconds,
        "losses": measured,
        "rows": rows,
    }
    harness.write_json(stem.with_suffix(".json"), result, quiet=True)
    told = [f"{name} {count:,} parameters" for name, count in parameters.items()]
    times = ", ".join(f"{name} {row['ms'][1]:.0f} ms ({row['ratio'][1]:.2f})" for name, row in seconds.items())
    minutes = {name: sum(row["seconds"] for row in rows) / 60 for name, rows in epochs.items()}
    text = [
        f"{'; '.join(told)}; {state['step']:,} steps ({state['epoch']} epochs) each, the same data, order, learning "
        f"rate and seed; commit {arguments.commit[:12]}. Samples: averaged weights, "
        f"{arguments.steps} steps of {arguments.scheduler} in {arguments.precision}, resized to the trained size "
        "before they are compared with the training images.",
        *["```sh\n" + "\n".join(arguments.command) + "\n```"][: bool(arguments.command)],
        table(rows),
        *[losses_table(measured)][: bool(measured)],
        f"A training step on one thread, in turns (ratio to the first): {times}. Minutes of training, on a machine "
        f"busy with other work: {', '.join(f'{name} {value:.0f}' for name, value in minutes.items())}.",
        *arguments.note,
        *[f"![Samples of {name}]({stem.name}-{name}.png)" for name in runs],
        f"![A sample of each class at every size]({stem.name}-sizes.png)",
        f"![Loss curves]({stem.name}-curves.png)",
    ]
    stem.with_suffix(".md").write_text("\n\n".join(text) + "\n")
    print(f"wrote {stem}.json, .md and pictures")


if __name__ == "__main__":
    main()
