"""Where swapped layers start: how far each layer's output is from that of the attention it replaces, with random
weights, as gspn.swap starts from the attention's weights, and after the layer-wise fit.

    python -m benchmarks.quality.swap_start --stem benchmarks/results/quality/swap-start \\
        --teacher TEACHER/pipeline --data DATA
    python -m benchmarks.quality.swap_start ... --curve "random=RUN1" --curve "pretrained=RUN2" --curve "fitted=RUN3"

TEACHER and DATA are made by examples/emoji. The feature maps are those of the teacher on noisy training images, with
timesteps drawn uniformly. The errors are measured on other maps, which are the same for all starts. The curves come
from runs of gspn distill that differ in their start alone: after how many steps does each reach a validation loss?
Writes STEM.json, STEM.md and STEM.png.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from matplotlib.figure import Figure

import gspn
from benchmarks.harness import harness
from examples.emoji.text_to_image import read_data, to_model
from gspn.stable_diffusion import fit
from gspn.stable_diffusion.feature_maps import collect, relative_error
from gspn.train.run import Run

STARTS = ("random", "pretrained", "fitted")
COLOURS = {"random": "#5f6368", "pretrained": "#e07b22", "fitted": "#2f6db3"}
FORMS = {
    f"{form}, {name}": (form, segment)
    for form in ("pure", "qkv")
    for name, segment in (("segment 4", 4), ("global", None))
}


class Feeder:
    """Runs a pipeline's UNet on new noisy training images at each call; `rewind(seed)` starts the sequence again."""

    def __init__(self, pipe, pixels: torch.Tensor, captions: list[str], batch: int):
        self.pipe, self.pixels, self.captions, self.batch = pipe, pixels, captions, batch
        self.rewind(0)

    def rewind(self, seed: int) -> None:
        self.draw = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def __call__(self) -> None:
        pipe, draw = self.pipe, self.draw
        chosen = torch.randint(len(self.pixels), (self.batch,), generator=draw).tolist()
        start = pipe.vae.encode(to_model(self.pixels[chosen])).latent_dist.mean * pipe.vae.config.scaling_factor
        steps = torch.randint(pipe.scheduler.config.num_train_timesteps, (self.batch,), generator=draw)
        noisy = pipe.scheduler.add_noise(start, torch.randn(start.shape, generator=draw), steps)
        text = pipe.encode_prompt([self.captions[n] for n in chosen], "cpu", 1, False)[0]
        pipe.unet(noisy, steps, text)


def measure(feeder: Feeder, form: str, segment: int | None, arguments) -> list[dict]:
    """A row for each layer, with the error of each start."""
    pipe, errors = feeder.pipe, {}
    for start in STARTS:
        torch.manual_seed(arguments.seed)
        with gspn.swap(pipe, form=form, segment=segment, init="random" if start == "random" else "pretrained") as swap:
            if start == "fitted":
                feeder.rewind(arguments.seed)
                fit(swap, feeder, maps=arguments.maps, steps=arguments.steps, progress=partial(print, flush=True))
            feeder.rewind(arguments.seed + 1)  # maps that no fit has seen
            maps = collect(swap, feeder, arguments.batch)
            errors[start] = {
                name: relative_error(layer, swap.attentions[name], maps[name]) for name, layer in swap.layers.items()
            }
            about = {name: (layer.channels, maps[name].sizes[0]) for name, layer in swap.layers.items()}
    return [
        {"layer": name, "channels": about[name][0], "size": about[name][1]}
        | {start: errors[start][name] for start in STARTS}
        for name in about
    ]


def curves_of(runs: dict[str, Path]) -> dict[str, list[dict]]:
    """Validation losses by step, of the epochs that all runs have."""
    found = {name: Run.open(run) for name, run in runs.items()}
    options = [
        {k: v for k, v in run.config["options"].items() if k not in ("init", "fit", "out")} for run in found.values()
    ]
    if any(others != options[0] for others in options[1:]):
        raise SystemExit(f"expected runs that differ in --init and --fit alone, got the options {options}")
    shared = min((len(run.metrics) for run in found.values()), default=0)
    return {
        name: [{"step": row["step"], "loss": row["val_loss"]} for row in run.metrics[:shared]]
        for name, run in found.items()
    }


def steps_to(curve: list[dict], loss: float) -> int | None:
    """The first step with at most that loss."""
    return next((row["step"] for row in curve if row["loss"] <= loss), None)


def figure_of(rows: dict[str, list[dict]], curves: dict[str, list[dict]], path: Path) -> None:
    figure = Figure(figsize=(11, 3.4 * (2 if curves else 1)), layout="constrained")
    upper, *lower = figure.subfigures(2 if curves else 1, 1, squeeze=False)[:, 0]
    for axes, (title, of_form) in zip(
        upper.subplots(1, len(rows), sharey=True, squeeze=False)[0], rows.items(), strict=True
    ):
        for start in STARTS:
            axes.plot([row[start] for row in of_form], "o-", markersize=3, color=COLOURS[start], label=start)
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set(title=title, xlabel="layer", yscale="log")
        for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatted("{x:.3g}")
        axes.grid(alpha=0.25, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    first = upper.axes[0]
    first.set_ylabel("relative error (dotted: zero output)")
    first.legend(frameon=False, fontsize=8)
    for part in lower:
        axes = part.subplots()
        for name, curve in curves.items():
            axes.plot([r["step"] for r in curve], [r["loss"] for r in curve], color=COLOURS.get(name), label=name)
        axes.set(xlabel="steps of distillation", ylabel="validation loss", yscale="log")
        axes.yaxis.set_minor_formatter("{x:.2g}")
        axes.grid(alpha=0.25, which="both")
        axes.legend(frameon=False)
    figure.savefig(path, dpi=100, facecolor="white")


def text_of(rows: dict[str, list[dict]], curves: dict[str, list[dict]], arguments) -> str:
    """Markdown."""
    parts = [
        "# Where swapped layers start\n\nRelative error of a layer's output against the attention it replaces, on "
        f"{arguments.batch} feature maps that no fit has seen (it had {arguments.maps} of each layer and "
        f"{arguments.steps} steps). A zero output has error 1. `order` says whether zero > random > pretrained > "
        f"fitted holds, or which order does. {' '.join(arguments.note)}".rstrip()
    ]
    for title, of_form in rows.items():
        lines = []
        for row in of_form:
            order = sorted(("zero", *STARTS), key=lambda start: -row.get(start, 1))
            order = "holds" if order == ["zero", *STARTS] else " > ".join(order)
            values = [f"{row[start]:.3f}" for start in STARTS]
            lines.append([row["layer"], row["channels"], "x".join(map(str, row["size"])), 1, *values, order])
        means = [f"{sum(row[s] for row in of_form) / len(of_form):.3f}" for s in STARTS]
        lines.append(["mean", "", "", 1, *means, ""])
        parts += [f"## {title}", harness.table(["layer", "C", "map", "zero", *STARTS, "order"], lines)]
    if curves:
        goal = curves["random"][-1]["loss"] if "random" in curves else max(c[-1]["loss"] for c in curves.values())
        steps = [row["step"] for row in next(iter(curves.values()))]
        lines = []
        for name, curve in curves.items():
            losses = [f"{row['loss']:.4f}" for row in curve]
            lines.append([name, *losses, steps_to(curve, goal) or "not reached"])
        table = harness.table(["start", *(f"{step:,}" for step in steps), f"steps until {goal:.4f}"], lines)
        parts += ["## Validation loss by steps of distillation", table, *arguments.curve_note]
    parts.append(f"![Errors by layer]({arguments.stem.name}.png)")
    return "\n\n".join(parts) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stem", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--curve", action="append", default=[], metavar="START=RUN", help="a run of gspn distill")
    parser.add_argument("--maps", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--note", action="append", default=[], help="a sentence for the report")
    parser.add_argument("--curve-note", action="append", default=[], help="a sentence below the table of the curves")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    curves = curves_of({name: Path(run) for name, _, run in (each.partition("=") for each in arguments.curve)})
    pipe = StableDiffusionPipeline.from_pretrained(arguments.teacher)
    pixels, captions = read_data(arguments.data)
    feeder = Feeder(pipe, pixels, captions, arguments.batch)
    rows = {}
    for title, (form, segment) in FORMS.items():
        rows[title] = measure(feeder, form, segment, arguments)
        print(title, {s: round(sum(r[s] for r in rows[title]) / len(rows[title]), 3) for s in STARTS}, flush=True)
    result = {"environment": harness.environment(), "maps": arguments.maps, "steps": arguments.steps}
    harness.write_json(Path(f"{arguments.stem}.json"), result | {"rows": rows, "curves": curves}, quiet=True)
    figure_of(rows, curves, Path(f"{arguments.stem}.png"))
    Path(f"{arguments.stem}.md").write_text(text_of(rows, curves, arguments))
    print(f"wrote {arguments.stem}.json, .md and .png")


if __name__ == "__main__":
    main()
