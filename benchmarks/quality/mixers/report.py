"""Draws tables and pictures of the study's finished runs.

python -m benchmarks.quality.mixers.report [--runs FOLDER] [--out STEM]      writes STEM.md and STEM-TASK-FORM-*.png
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.harness import harness
from benchmarks.harness.study import commits, times
from benchmarks.quality.mixers.contenders import CONTENDERS, FORMS
from benchmarks.quality.mixers.inside import LEVERS
from benchmarks.quality.mixers.study import EXAMPLES, MAIN, RATES, RESULTS, SEEDS, STEPS, Run, best_rate, read
from benchmarks.quality.mixers.tasks import SIDE, TASKS

TIME = "cpu_ms_per_step"
OURS = "gspn-global"  # what the others are compared with
CONTROL = "gspn-g8"  # what the remedies are compared with
REMEDIES = (
    "Remedies (remedies.py). Their channels share weights in 8 groups, which those of GSPN global do not, so the "
    "difference is from *GSPN, 8 groups*."
)
_PALETTE = "#9aa0a6 #e07b22 #c62828 #ef9a9a #3a8f5c #1b5e20 #8d6e63 #2f6db3 #85aede #5e35b1 #0b2e63 #00acc1".split()
COLOURS = dict(zip([n for n, c in CONTENDERS.items() if not (c.remedy or c.why_not)], _PALETTE, strict=True))


def mean_and_deviation(values: list[float]) -> tuple[float, float | None]:
    """(mean, standard deviation); no deviation of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def paired(ours: dict[int, float], theirs: dict[int, float]) -> tuple[float, float | None] | None:
    """(mean of theirs - ours over the seeds that both have, its standard error); None without such a seed."""
    differences = [theirs[seed] - ours[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not differences:
        return None
    mean, deviation = mean_and_deviation(differences)
    return mean, None if deviation is None else deviation / len(differences) ** 0.5


def at_best(done: dict[Run, dict], task: str, form: str, steps: int) -> dict[str, list[dict]]:
    """Each contender's runs at its best rate, by seed. A rate that was borrowed from another task counts as the best
    one until others have been tried."""
    found = {}
    for name in CONTENDERS:
        rate = best_rate(done, task, form, name, steps)
        runs = [done.get(Run(task, form, name, rate, seed, steps)) for seed in SEEDS] if rate else []
        if any(runs):
            found[name] = [run for run in runs if run]
    return found


def _by_seed(runs: list[dict], setting: str, what: str) -> dict[int, float]:
    return {run["seed"]: run["test"][setting][what] for run in runs}


def _shown(value: float, deviation: float | None, what: str, sign: bool = False) -> str:
    scale, digits = (100, 2) if what == "accuracy" else (1, 4)
    text = f"{value * scale:{'+' if sign else ''}.{digits}f}"
    return text if deviation is None else f"{text} ± {deviation * scale:.{digits}f}"


def main_table(runs: dict[str, list[dict]], task, ms: dict[str, float], ours: str = OURS) -> str:
    """A row a contender: held-out loss, test at the usual setting with the difference from `ours`, every other
    setting; what a training step takes."""
    what, others = task.better, [s for s in task.settings if s != task.usual]
    unit = "%" if what == "accuracy" else what
    header = ["mixer", "parameters", "rate", "seeds", "held-out loss", f"test, {unit}"]
    header += [f"minus {CONTENDERS[ours].title}", *others, *(["CPU ms a step"] if ms else [])]
    rows = []
    compared = _by_seed(runs[ours], task.usual, what) if ours in runs else {}
    for name, content in runs.items():
        values = _by_seed(content, task.usual, what)
        difference = paired(compared, values) if name != ours else None
        rows.append(
            [
                CONTENDERS[name].title,
                f"{content[0]['parameters']:,}",
                f"{content[0]['rate']:g}",
                str(len(content)),
                _shown(*mean_and_deviation([c["val"]["loss"] for c in content]), "loss"),
                _shown(*mean_and_deviation(list(values.values())), what),
                _shown(*difference, what, sign=True) if difference else "",
                *(_shown(*mean_and_deviation(list(_by_seed(content, s, what).values())), what) for s in others),
                *([f"{ms[name]:.0f}" if name in ms else ""] if ms else []),
            ]
        )
    return harness.table(header, rows)


def rates_table(done: dict[Run, dict], task: str, form: str, steps: int) -> str:
    """Loss on the held-out examples at each rate; the best in bold, and marked where it is the least or the largest."""
    tried = sorted({r.rate for r in done if r[:2] == (task, form) and r.steps == steps and r.seed == SEEDS[0]})
    rows = []
    for name, contender in CONTENDERS.items():
        best, cells = best_rate(done, task, form, name, steps), []
        for rate in tried:
            content = done.get(Run(task, form, name, rate, SEEDS[0], steps))
            text = "" if content is None else f"{content['val']['loss']:.4f}" if content["finite"] else "diverged"
            cells.append(f"**{text}**" if rate == best else text)
        if any(cells):
            own = [r.rate for r in done if r[:3] == (task, form, name) and r.steps == steps and r.seed == SEEDS[0]]
            edge = "at the edge" if len(own) > 1 and best in (min(own), max(own)) else ""
            rows.append([contender.title, *cells, edge])
    return harness.table(["mixer", *(f"{rate:g}" for rate in tried), ""], rows)


# -- pictures --

TASK_TITLES = {
    "classes": "CIFAR-10",
    "tracing": "Following curves",
    "filling": "Filling in",
    "far": "Comparing far ends",
}
FORM_TITLES = {"bare": "only this layer mixes pixels", "conv": "beside a depthwise 3x3 convolution"}


def _title(task, form: str) -> str:
    return f"{TASK_TITLES[task.name]}, a small backbone: {FORM_TITLES[form]}"


def _axes(title: str, across: str, up: str):
    figure = Figure(figsize=(9.5, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=across, ylabel=up)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _scale(task) -> float:
    return 100.0 if task.better == "accuracy" else 1.0


def _unit(task) -> str:
    return "accuracy in %" if task.better == "accuracy" else task.better


def _style(name: str) -> dict:
    """Of a contender's line; ours is the thickest."""
    ours = name == MAIN[0]
    return dict(
        color=COLOURS[name], label=CONTENDERS[name].title, marker="o", ms=5 if ours else 3, lw=3 if ours else 1.4
    )


def _save(figure: Figure, path: Path) -> None:
    figure.legend(loc="outside right center", fontsize=9, frameon=False)
    figure.savefig(path, dpi=120)


def curves_picture(runs: dict[str, list[dict]], task, form: str, path: Path, ms: dict[str, float]) -> None:
    """What the held-out examples said while training, mean over the seeds, against CPU time. The figure after training
    is of more examples, and no part of the line."""
    steps = next(iter(runs.values()))[0]["steps"]
    last = max(look["step"] for content in runs.values() for run in content for look in run["looks"])
    across = f"CPU seconds of training, one core, up to step {last} of {steps}"
    figure, axes = _axes(_title(task, form), across, f"{_unit(task)}, first {EXAMPLES['look']:,} held-out examples")
    for name, content in runs.items():
        if name not in ms:
            continue
        looks = [run["looks"] for run in content]
        seconds = [look["step"] * ms[name] / 1e3 for look in looks[0]]
        means = [_scale(task) * statistics.fmean(look[task.better] for look in row) for row in zip(*looks, strict=True)]
        axes.plot(seconds, means, **_style(name))
    _save(figure, path)


def settings_picture(runs: dict[str, list[dict]], task, form: str, path: Path) -> None:
    """The test examples at every numbered setting, mean and deviation over the seeds."""
    numbered, far = [s for s in task.settings if s.replace(".", "").isdigit()], task.usual == "mixed"
    across = "distance of the ends, places" if far else f"pixels a side (trained: {SIDE})"
    several = any(len(content) > 1 for content in runs.values())
    across += "; bars: deviation, where there are several seeds" if several else ""
    figure, axes = _axes(_title(task, form), across, f"{_unit(task)}, test")
    for name, content in runs.items():
        found = [mean_and_deviation(list(_by_seed(content, s, task.better).values())) for s in numbered]
        means = [_scale(task) * mean for mean, _ in found]
        deviations = [_scale(task) * (deviation or 0.0) for _, deviation in found]
        axes.errorbar([float(s) for s in numbered], means, yerr=deviations, capsize=2, **_style(name))
    axes.set_xscale("log", base=2)
    axes.set_xticks([float(s) for s in numbered], numbered if far else [f"{float(s) * SIDE:g}" for s in numbered])
    axes.minorticks_off()
    _save(figure, path)


# -- inside trained layers --


def _of_directions(what: Callable[[dict, dict], float]) -> Callable[[dict], list[float]]:
    """A figure of every block: the mean over its directions of what is said of (block, direction)."""
    return lambda content: [
        statistics.fmean(what(block, direction) for direction in block["directions"].values())
        for block in content["blocks"]
    ]


def _of_projections(what: Callable[[dict, str], float]) -> Callable[[dict], list[float]]:
    return lambda content: [what(content, str(block)) for block in range(len(content["blocks"]))]


def _gradient(when: str, what: str, name: str) -> Callable[[dict], list[float]]:
    return _of_projections(lambda content, block: content["gradients"][when][f"{block}.{name}"][what])


def _change(name: str) -> Callable[[dict], list[float]]:
    return lambda content: [block["output changes"][name] for block in content["blocks"]]


CHOSEN = "chosen: what the input's part of the weights moves the state in one line, over what the input adds"
FIGURES: dict[str, Callable[[dict], list[float]]] = {
    "x, deviation": lambda content: [block["x"]["std"] for block in content["blocks"]],
    "proxy, deviation": lambda content: [block["proxy"]["std"] for block in content["blocks"]],
    "logits, deviation over the pixels of an image": _of_directions(lambda b, d: d["logits"]["pixels"]),
    "logits, deviation of the images' means": _of_directions(lambda b, d: d["logits"]["images"]),
    "logits, part of their differences that depends on the input": _of_directions(lambda b, d: d["logits by input"]),
    "weights, deviation": _of_directions(lambda b, d: d["weights"]["std"]),
    "weights, part of their deviation from 1/3 that depends on the input": _of_directions(
        lambda b, d: d["weights by input"]
    ),
    "weights, entropy over log 3": _of_directions(lambda b, d: d["entropy"]),
    "weights, mean of the largest": _of_directions(lambda b, d: d["largest"]),
    "input gate, deviation": _of_directions(lambda b, d: d["input gate"]["std"]),
    "input gate, size of its mean": _of_directions(lambda b, d: d["input gate"]["mean"]),
    "output gate, deviation": _of_directions(lambda b, d: d["output gate"]["std"]),
    "output gate, size of its mean": _of_directions(lambda b, d: d["output gate"]["mean"]),
    "skip gate, deviation": lambda content: [block["skip gate"]["std"] for block in content["blocks"]],
    "size of the scan's part over that of the skip's": lambda content: [
        block["scan's part"] / block["skip's part"] for block in content["blocks"]
    ],
    "state over x, first line": _of_directions(lambda b, d: d["state by line"][0] / b["x"]["rms"]),
    "state over x, last line": _of_directions(lambda b, d: d["state by line"][-1] / b["x"]["rms"]),
    "state over x at the largest size, last line": lambda content: [
        statistics.fmean(lines[-1] for lines in block["state by line, largest"].values()) / block["x"]["rms"]
        for block in content["blocks"]
    ],
    "reach: drift sideways over the longest way, in places": _of_directions(lambda b, d: d["influence"]["drift"][-1]),
    "reach: deviation of this drift over images": _of_directions(lambda b, d: d["influence"]["drift by input"][-1]),
    "reach: spread sideways over the longest way": _of_directions(lambda b, d: d["influence"]["spread"][-1]),
    "reach: variance of white noise that is left after 4 lines": _of_directions(
        lambda b, d: d["influence"]["kept"][4]
    ),
    "reach: the same over the longest way": _of_directions(lambda b, d: d["influence"]["kept"][-1]),
    "difference of neighbours in a line over the deviation": _of_directions(lambda b, d: d["neighbours"]),
    "choice: deviation of the three states over their size": _of_directions(lambda b, d: d["choice"]["1"]),
    "choice, if the neighbours were 4 places apart": _of_directions(lambda b, d: d["choice"]["4"]),
    CHOSEN: _of_directions(lambda b, d: d["chosen"]),
    "change of a block's output with weights of 1/3": _change("weights are 1/3"),
    "change of a block's output with mean weights": _change("weights are their mean"),
    "change of a block's output with another photo's weights": _change("weights of another photo"),
} | {
    f"lever: change with mean weights, {title}": (
        lambda content, title=title: [block["levers"][title] for block in content["blocks"]]
    )
    for title in (f"{name}{end}" for name in LEVERS for end in ("", ", centred"))
} | {
    title: figure
    for when in ("start", "trained")
    for title, figure in (
        (f"gradient over its projection, {when}: weights", _gradient(when, "relative", "weight_proj")),
        (f"gradient over its projection, {when}: input gate", _gradient(when, "relative", "input_proj")),
        (f"gradient over its projection, {when}: output gate", _gradient(when, "relative", "output_proj")),
        (f"an element of the weights' gradient, {when}", _gradient(when, "element", "weight_proj")),
        (f"agreement of batches on the gradient, {when}: weights", _gradient(when, "agreement", "weight_proj")),
        (f"agreement of batches on the gradient, {when}: input gate", _gradient(when, "agreement", "input_proj")),
    )
} | {
    f"moved in training, over the start: {title}": _of_projections(
        lambda content, block, name=name: content["moved"][f"{block}.{name}"]
    )
    for title, name in (("weights", "weight_proj"), ("input gate", "input_proj"), ("output gate", "output_proj"))
}  # fmt: skip


def _trained(content: dict) -> str:
    return f"{CONTENDERS[content['contender']].title}, {content['steps']} steps, rate {content['rate']:g}"


def figures_table(inside: dict[str, dict]) -> str:
    """A row a figure, a column a contender: mean over the blocks, and the least and the largest block."""
    rows = []
    for title, figure in FIGURES.items():
        cells = []
        for content in inside.values():
            values = figure(content)
            cells.append(f"{statistics.fmean(values):.3g} ({min(values):.2g} to {max(values):.2g})")
        rows.append([title, *cells])
    titles = [_trained(content) for content in inside.values()]
    return harness.table(["mean of the blocks (least to largest)", *titles], rows)


def replaced_table(inside: dict[str, dict]) -> str:
    """A row a replacement, two columns a contender, at the usual setting and at the largest: accuracy and loss."""
    header, columns = ["replaced in every block"], []
    for content in inside.values():
        for setting, found in content["replaced"].items():
            header.append(f"{_trained(content)}, at {setting} ({found['nothing']['examples']} photos)")
            loss = found["nothing"]["loss"]
            columns.append({n: f"{100 * m['accuracy']:.1f} ({m['loss'] - loss:+.3f})" for n, m in found.items()})
    rows = [[what, *(column[what] for column in columns)] for what in columns[0]]
    return harness.table(header, rows)


def inside_picture(inside: dict[str, dict], path: Path) -> None:
    """What is lost by each replacement; what the weights move; how states grow; how strongly the weights learn."""
    figure = Figure(figsize=(12, 9), layout="constrained")
    (lost, chosen), (grown, learnt) = figure.subplots(2, 2)
    count, settings = len(inside), next(iter(inside.values()))["settings"]
    names = [what for what in next(iter(inside.values()))["replaced"][settings[0]] if what != "nothing"]
    gradients = {"weights": "weight_proj", "input gate": "input_proj", "output gate": "output_proj"}
    for i, content in enumerate(inside.values()):
        style = {"color": f"C{i}", "label": _trained(content)}
        shift, thickness = (i - (count - 1) / 2) * 0.8 / count, 0.8 / count
        found = content["replaced"][settings[0]]
        losses = [100 * (found[what]["accuracy"] - found["nothing"]["accuracy"]) for what in names]
        lost.barh([j + shift for j in range(len(names))], losses, thickness, **style)
        blocks = FIGURES[CHOSEN](content)
        chosen.bar([j + shift for j in range(len(blocks))], [100 * value for value in blocks], thickness, **style)
        for block in content["blocks"]:
            lines = zip(*block["state by line, largest"].values(), strict=True)
            sizes = [statistics.fmean(line) / block["x"]["rms"] for line in lines]
            grown.plot(range(1, len(sizes) + 1), sizes, lw=1.2, **style)
            style["label"] = None
        sizes = [
            statistics.geometric_mean(_gradient("trained", "relative", projection)(content))
            for projection in gradients.values()
        ]
        learnt.plot(range(len(sizes)), sizes, "o", ms=9, color=style["color"])  # no bars: a logarithm has no foot
    lost.set(title=f"Test accuracy without retraining, at {settings[0]}: change in points", xlabel="points")
    lost.set_yticks(range(len(names)), names, fontsize=8)
    lost.invert_yaxis()
    chosen.set(
        title="What the input-dependent part of the weights\nmoves a state in one line",
        xlabel="block",
        ylabel="% of what the gated input adds",
        xticks=range(len(next(iter(inside.values()))["blocks"])),
    )
    grown.set(title=f"Size of the state, at {settings[1]}, each block", xlabel="line", ylabel="state over x (RMS)")
    learnt.set(title="Gradient over its projection, trained", yscale="log", ylabel="ratio of norms")
    learnt.set_xticks(range(len(gradients)), gradients)
    for axes in (lost, chosen, grown, learnt):
        axes.spines[["top", "right"]].set_visible(False)
    learnt.margins(0.2)
    figure.legend(*lost.get_legend_handles_labels(), loc="outside upper center", ncols=min(count, 3), frameon=False)
    figure.savefig(path, dpi=110)


def inside_section(inside: dict[str, dict], stem: Path, name: str) -> list[str]:
    """The parts of the report on what analyse.py found in one task's models; draws the picture."""
    order = [*CONTENDERS]
    inside = dict(sorted(inside.items(), key=lambda item: (order.index(item[1]["contender"]), item[1]["rate"])))
    picture = stem.with_name(f"{stem.name}-inside-{name}.png")
    inside_picture(inside, picture)
    first = next(iter(inside.values()))
    numbers = lambda what: ", ".join(str(what(content)) for content in inside.values())  # noqa: E731
    return [
        f"## What the trained layers look like: {name}",
        f"Backbones of seed {first['seed']}, by analyse.py. Figures are of the first "
        f"{numbers(lambda c: c['photos']['figures'])} test photos, gradients of "
        f"{numbers(lambda c: c['gradient batches'])} batches (noise alone agrees to one over the root of that). "
        "Figures of a direction are means over the four. A state can only choose among three neighbours "
        "of the line before, so its weights count for as much as these differ (*choice*) and as they vary (*chosen*). "
        "Replacements are made in all blocks at once, without retraining: test accuracy in % and change "
        "of the loss, on the same photos for all rows of a column.",
        replaced_table(inside),
        f"![Inside]({picture.name})",
        figures_table(inside),
    ]


def report(done: dict[Run, dict], stem: Path, steps: int = STEPS, inside: dict[str, dict] | None = None) -> str:
    """Writes STEM.md and the pictures beside it; gives the text. `inside` holds files of analyse.py by their stems."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    parts = ["# What the mixer is worth in one small backbone", _about(done, steps)]
    for task in TASKS.values():
        for form in FORMS:
            found = at_best(done, task.name, form, steps)
            if not found:
                continue
            runs = {mixer: content for mixer, content in found.items() if not CONTENDERS[mixer].remedy}
            remedies = {mixer: content for mixer, content in found.items() if mixer not in runs}
            name = f"{stem.name}-{task.name}-{form}"
            parts += [
                f"## {task.name}, {form}",
                f"{task.about} Mean ± standard deviation over the seeds; a difference is paired by seed, ± its "
                "standard error.",
            ]
            if runs:
                own = [c for run, c in done.items() if run[:2] == (task.name, form) and run.steps == steps]
                processor, ms = times((c for c in own if c["contender"] in runs), TIME)
                curves_picture(runs, task, form, stem.with_name(f"{name}-curves.png"), ms)
                settings_picture(runs, task, form, stem.with_name(f"{name}-settings.png"))
                pictures = f"![Curves]({name}-curves.png) ![Settings]({name}-settings.png)"
                parts += [main_table(runs, task, ms), _about_times(processor, runs, ms), pictures]
            if remedies:
                parts += [REMEDIES, main_table(remedies, task, {}, CONTROL)]
            parts += [
                "Loss on the held-out examples by learning rate, first seed:",
                rates_table(done, task.name, form, steps),
            ]
    for name, content in (inside or {}).items():
        parts += inside_section(content, stem, name)
    text = "\n\n".join(parts) + "\n"
    stem.with_suffix(".md").write_text(text)
    return text


def _about_times(processor: str, runs: dict, ms: dict[str, float]) -> str:
    text = (
        f"Times are CPU time: medians over rates and seeds on one processor, {processor}, while other work ran beside. "
        "The picture multiplies them by the steps. It shows what was measured while training, on the first "
        f"{EXAMPLES['look']:,} held-out examples."
    )
    if left := [CONTENDERS[name].title for name in runs if name not in ms]:
        text += f" It lacks what ran on other processors only: {', '.join(left)}."
    return text


def _about(done: dict[Run, dict], steps: int) -> str:
    """How the runs were made, and what was not run."""
    chosen = [content for run, content in done.items() if run.steps == steps]
    machines = sorted({f"{c['environment']['cpu']}, torch {c['environment']['torch']}" for c in chosen})
    optimizers = sorted({c.get("optimizer", "adamw") for c in chosen})  # files of before know AdamW alone
    lines = [
        f"Runs: {len(chosen)}, each {steps} steps of {chosen[0]['batch'] if chosen else 0} examples on one core, by "
        f"benchmarks/quality/mixers, with {' and '.join(optimizers)}. Machine: {'; '.join(machines)}. Commits: "
        f"{commits(chosen)}. The learning rate is the one of those tried with the least loss on {EXAMPLES['val']:,} "
        f"held-out training photos. Test figures at the setting that was trained on are of {EXAMPLES['test']:,} test "
        f"photos, at every other setting of the first {EXAMPLES['setting']:,}. Finished means {len(RATES)} rates and "
        f"{len(SEEDS)} seeds; with fewer a row is a first look.",
        *(f"- {c.title}: {c.why_not}" for c in CONTENDERS.values() if c.why_not),
    ]
    return "\n\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=RESULTS, help="the folder of the runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "report", help="the stem of the files")
    arguments = parser.parse_args()
    done = read(arguments.runs)
    if not done:
        parser.error(f"found no runs in {arguments.runs}: make them with benchmarks.quality.mixers.study")
    inside = {file.stem: json.loads(file.read_text()) for file in sorted((arguments.runs / "inside").glob("*.json"))}
    report(done, arguments.out, inside=inside)
    print(f"wrote {arguments.out}.md from {len(done)} runs")


if __name__ == "__main__":
    main()
