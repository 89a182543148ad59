"""Compares trained generators: samples at the trained size and at unseen sizes, their distances from the training
images, a classifier's guesses, loss curves, and the time of a training step.

    python -m benchmarks.quality.generation --stem benchmarks/results/quality/fashion-generation --data DATA \\
        --classifier RUN --run GSPN=runs/fashion-gspn --run DiT=runs/fashion-dit --checkpoint epoch-0003 --work DIR

The runs are made by `gspn train-diffusion` with equal settings. DIR keeps samples and statistics, so that the command
can be stopped and started again. Writes STEM.json, STEM.md, STEM-curves.png, STEM-sizes.png and a grid of each run at
the trained size.
"""

import argparse
import shutil
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from benchmarks.harness import harness
from gspn.metrics.fid import evaluate_samples
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


def compare(runs: dict[str, Path], arguments) -> list[dict]:
    """A row for each size, run and network of features."""
    rows, console = [], Console()
    trained = Run.open(next(iter(runs.values()))).config["space"]["image_size"]
    for factor, count in zip(arguments.factors, arguments.counts, strict=True):
        size = tuple(round(side * factor) for side in trained)
        for name, path in runs.items():
            folder = arguments.work / f"{name}-{arguments.checkpoint}-{size[0]}x{size[1]}"
            options = SampleOptions(
                count=count,
                guidance=arguments.guidance,
                steps=arguments.steps,
                size=size,
                scheduler=arguments.scheduler,
                seed=arguments.seed,
                batch_size=20,
                precision=arguments.precision,
            )
            sample(path, folder, options, checkpoint=arguments.checkpoint, console=console)
            for features in [f"classifier:{arguments.classifier}", *arguments.features]:
                found = evaluate_samples(
                    folder, arguments.data, features, size=tuple(trained), cache=arguments.work, workers=0
                )
                found["features"] = found["features"].replace(str(arguments.classifier), "a run of gspn train")
                row = {"run": name, "factor": factor, "size": size, "images": count, "features": found["features"]}
                rows.append(row | {key: found[key] for key in COLUMNS} | {"notes": found["notes"]})
                print(rows[-1], flush=True)
    return rows


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = [
        f"| features | size | samples of | images | {' | '.join(title for title, _ in COLUMNS.values())} |",
        f"|---|---|---|---|{'---|' * len(COLUMNS)}",
    ]
    for row in sorted(rows, key=lambda row: (row["features"], row["factor"])):
        values = [row[key]["mean"] if isinstance(row[key], dict) else row[key] for key in COLUMNS]
        cells = [
            "" if value is None else format(value, form)
            for value, (_, form) in zip(values, COLUMNS.values(), strict=True)
        ]
        size = f"{row['size'][0]}x{row['size'][1]}"
        lines.append(f"| {row['features']} | {size} | {row['run']} | {row['images']} | {' | '.join(cells)} |")
    return "\n".join(lines)


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


def sizes_picture(runs: dict[str, Path], arguments, classes: int, path: Path) -> None:
    """A row of samples, one for each class, for every size and run, all at their own number of pixels."""
    trained = Run.open(next(iter(runs.values()))).config["space"]["image_size"]
    figure = Figure(figsize=(1.1 * classes + 1, 1.12 * len(arguments.factors) * len(runs)), layout="constrained")
    axes = figure.subplots(len(arguments.factors) * len(runs), classes, squeeze=False)
    lines = [(factor, name) for factor in arguments.factors for name in runs]
    for (factor, name), line in zip(lines, axes, strict=True):
        height, width = (round(side * factor) for side in trained)
        files = sorted((arguments.work / f"{name}-{arguments.checkpoint}-{height}x{width}" / "images").iterdir())
        for file, panel in zip(files[:classes], line, strict=True):
            with Image.open(file) as image:
                panel.imshow(image.convert("RGB"), interpolation="nearest")
            panel.axis("off")
        line[0].set_title(f"{name}, {height}x{width}", loc="left", fontsize=9)
    figure.savefig(path, dpi=100, facecolor="white")


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

    trained = {name: Run.open(path) for name, path in runs.items()}
    states = {name: run.load_checkpoint(arguments.checkpoint, ())[1] for name, run in trained.items()}
    if len({(state["epoch"], state["step"]) for state in states.values()}) > 1:
        raise SystemExit(
            f"expected runs at the same epoch and step, got {[(s['epoch'], s['step']) for s in states.values()]}"
        )
    state = next(iter(states.values()))
    stem, classes = arguments.stem, len(next(iter(trained.values())).config["class_names"])
    parameters = {
        name: sum(p.numel() for p in build_generator(run.config["model"]).parameters())  # as trained: DiT's ties count
        for name, run in trained.items()
    }
    rows = compare(runs, arguments)
    seconds = step_times(runs, arguments.checkpoint, arguments.rounds)
    epochs = curves(runs, state["epoch"], Path(f"{stem}-curves.png"))
    sizes_picture(runs, arguments, classes, Path(f"{stem}-sizes.png"))
    first = min(arguments.factors, key=lambda factor: abs(factor - 1))
    size = "x".join(str(round(side * first)) for side in next(iter(trained.values())).config["space"]["image_size"])
    for name in runs:
        shutil.copyfile(arguments.work / f"{name}-{arguments.checkpoint}-{size}" / "grid.png", f"{stem}-{name}.png")
    result = {
        "commands": arguments.command,
        "commit": arguments.commit,
        "environment": harness.environment(),
        "versions": {name: run.config["versions"] for name, run in trained.items()},
        "options": {name: run.config["options"] for name, run in trained.items()},
        "parameters": parameters,
        "steps": state["step"],
        "epochs": epochs,
        "guidance": arguments.guidance,
        "sampling_steps": arguments.steps,
        "scheduler": arguments.scheduler,
        "sampling_precision": arguments.precision,
        "training_step": seconds,
        "rows": rows,
    }
    harness.write_json(stem.with_suffix(".json"), result, quiet=True)
    told = [f"{name} {count:,} parameters" for name, count in parameters.items()]
    times = ", ".join(f"{name} {row['ms'][1]:.0f} ms ({row['ratio'][1]:.2f})" for name, row in seconds.items())
    minutes = {name: sum(row["seconds"] for row in rows) / 60 for name, rows in epochs.items()}
    text = [
        f"{'; '.join(told)}; {state['step']:,} steps ({state['epoch']} epochs) each, the same data, order, learning "
        f"rate and seed; commit {arguments.commit[:12]}. Samples: averaged weights, guidance {arguments.guidance:g}, "
        f"{arguments.steps} steps of {arguments.scheduler} in {arguments.precision}, resized to the trained size "
        "before they are compared with the training images.",
        *["```sh\n" + "\n".join(arguments.command) + "\n```"][: bool(arguments.command)],
        table(rows),
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
