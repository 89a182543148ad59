"""Draws tables and pictures of the study's finished runs.

python -m benchmarks.quality.mixers.report [--runs FOLDER] [--out STEM]      writes STEM.md and STEM-TASK-FORM-*.png
"""

import argparse
import statistics
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.quality.mixers.contenders import CONTENDERS, FORMS
from benchmarks.quality.mixers.study import RATES, RESULTS, SEEDS, STEPS, Run, best_rate, read
from benchmarks.quality.mixers.tasks import TASKS

OURS = "gspn-global"  # what the others are compared with
REMEDIES = (
    "Remedies (remedies.py). Their channels share weights in 8 groups, which those of GSPN global do not: compare them "
    "with *GSPN, 8 groups*."
)
_PALETTE = "#9aa0a6 #e07b22 #c62828 #ef9a9a #3a8f5c #1b5e20 #8d6e63 #2f6db3 #85aede #5e35b1 #00acc1".split()
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


def main_table(runs: dict[str, list[dict]], task) -> str:
    """A row a contender: at the usual setting with the difference from ours, then at every other setting."""
    what, others = task.better, [s for s in task.settings if s != task.usual]
    unit = "%" if what == "accuracy" else what
    header = ["mixer", "parameters", "rate", "seeds", f"test, {unit}", "minus GSPN global", *others]
    rows = []
    ours = _by_seed(runs[OURS], task.usual, what) if OURS in runs else {}
    for name, content in runs.items():
        values = _by_seed(content, task.usual, what)
        difference = paired(ours, values) if name != OURS else None
        rows.append(
            [
                CONTENDERS[name].title,
                f"{content[0]['parameters']:,}",
                f"{content[0]['rate']:g}",
                str(len(content)),
                _shown(*mean_and_deviation(list(values.values())), what),
                _shown(*difference, what, sign=True) if difference else "",
                *(_shown(*mean_and_deviation(list(_by_seed(content, s, what).values())), what) for s in others),
            ]
        )
    return _markdown(header, rows)


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
    return _markdown(["mixer", *(f"{rate:g}" for rate in tried), ""], rows)


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


# -- pictures --


def _axes(title: str, across: str, up: str):
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=across, ylabel=up)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def curves_picture(runs: dict[str, list[dict]], task, form: str, path: Path) -> None:
    """What the held-out examples said while training, mean over the seeds."""
    figure, axes = _axes(f"{task.name}, {form}: while training", "step", f"{task.better} of held-out examples")
    for name, content in runs.items():
        looks = [[*run["looks"], {"step": run["steps"], **run["val"]}] for run in content]
        steps = [look["step"] for look in looks[0]]
        means = [statistics.fmean(look[task.better] for look in row) for row in zip(*looks, strict=True)]
        axes.plot(steps, means, color=COLOURS[name], label=CONTENDERS[name].title, marker="o", ms=3)
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=120)


def settings_picture(runs: dict[str, list[dict]], task, form: str, path: Path) -> None:
    """The test examples at every numbered setting, mean and deviation over the seeds."""
    numbered = [s for s in task.settings if s.replace(".", "").isdigit()]
    across = "distance of the ends, places" if task.usual == "mixed" else "size, times that of training"
    figure, axes = _axes(f"{task.name}, {form}: sizes seen and unseen", across, f"test {task.better}")
    for name, content in runs.items():
        found = [mean_and_deviation(list(_by_seed(content, s, task.better).values())) for s in numbered]
        axes.errorbar(
            [float(s) for s in numbered],
            [mean for mean, _ in found],
            yerr=[deviation or 0.0 for _, deviation in found],
            color=COLOURS[name],
            label=CONTENDERS[name].title,
            marker="o",
            ms=3,
            capsize=2,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks([float(s) for s in numbered], numbered)
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=120)


def report(done: dict[Run, dict], stem: Path, steps: int = STEPS) -> str:
    """Writes STEM.md and the pictures beside it; gives the text."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    parts = ["# What the mixer is worth in one small backbone", _about(done, steps)]
    for task in TASKS.values():
        for form in FORMS:
            found = at_best(done, task.name, form, steps)
            if not found:
                continue
            runs = {mixer: content for mixer, content in found.items() if not CONTENDERS[mixer].remedy}
            remedies = {mixer: content for mixer, content in found.items() if mixer == OURS or mixer not in runs}
            name = f"{stem.name}-{task.name}-{form}"
            curves_picture(runs, task, form, stem.with_name(f"{name}-curves.png"))
            settings_picture(runs, task, form, stem.with_name(f"{name}-settings.png"))
            parts += [
                f"## {task.name}, {form}",
                f"{task.about} Mean ± standard deviation over the seeds; the difference from GSPN global is paired by "
                "seed, ± its standard error.",
                main_table(runs, task),
                f"![Curves]({name}-curves.png) ![Settings]({name}-settings.png)",
                "Loss on the held-out examples by learning rate, first seed:",
                rates_table(done, task.name, form, steps),
            ]
            if remedies.keys() - {OURS}:
                parts += [REMEDIES, main_table(remedies, task)]
    text = "\n\n".join(parts) + "\n"
    stem.with_suffix(".md").write_text(text)
    return text


def _about(done: dict[Run, dict], steps: int) -> str:
    """How the runs were made, and what was not run."""
    chosen = [content for run, content in done.items() if run.steps == steps]
    machines = sorted({f"{c['environment']['cpu']}, torch {c['environment']['torch']}" for c in chosen})
    commits = sorted({c["environment"]["commit"][:8] for c in chosen})
    lines = [
        f"Runs: {len(chosen)}, each {steps} steps of {chosen[0]['batch'] if chosen else 0} examples on one core, by "
        f"benchmarks/quality/mixers. Machine: {'; '.join(machines)}. Commits: {', '.join(commits)}. The learning rate "
        f"is the one of those tried with the least loss on held-out training photos. Finished means {len(RATES)} rates "
        f"and {len(SEEDS)} seeds; with fewer a row is a first look.",
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
    report(done, arguments.out)
    print(f"wrote {arguments.out}.md from {len(done)} runs")


if __name__ == "__main__":
    main()
