"""Trains every contender on every task, a few minutes each on one core, and writes one JSON file for each run.

python -m benchmarks.quality.mixers.study --photos FOLDER --minutes 60    makes missing runs, the most important first
python -m benchmarks.quality.mixers.study --photos FOLDER --list          says what is done and what is missing
python -m benchmarks.quality.mixers.report                                tables and pictures of the finished runs
python -m benchmarks.quality.mixers.analyse                               looks into trained models, see there

FOLDER holds CIFAR-10 as tables with the splits train and test. The command may be stopped at any time and started
again: only complete runs are written.
"""

import argparse
import math
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.harness import harness, study
from benchmarks.quality.mixers.contenders import CONTENDERS, backbone, count
from benchmarks.quality.mixers.tasks import TASKS, Photos, Task
from gspn.options import LoopOptions
from gspn.train.optim import make_optimizer

RESULTS = harness.ROOT / "benchmarks" / "results" / "quality" / "mixers"
RATES = (1.5e-3, 3e-3, 6e-3)
SEEDS = (0, 1, 2)
STEPS = 600
BATCH = 64
WARM_UP = 0.1  # of the steps
DECAY = 0.05
FIRST = ("none", "dw7", "attention-pos", "gspn-global", "linear-dw5")  # enough to tell whether a remedy is worth having
WATCHED = (
    "gspn-g8",
    "gspn-centred-alone",
    "gspn-centred-alone-thirds",
    "gspn-centred",
)  # remedies that are run with every seed
TRACERS = ("gspn-normed", "gspn-normed-thirds", "gspn-global", "attention-pos", "dw7", "linear-dw5", "gspn-g8", "none")
CHOOSERS = TRACERS[:2]  # with learned weights and without: these are run with every seed
MAIN = ("gspn-center", *FIRST)  # of the README's table: every task, rate and seed of these comes before the others
SLOW = "forget"  # remedies so named scan outside the fused kernel, four times as slow: they wait
LOOKS = 6  # at the held-out examples while training
EXAMPLES = {"look": 1_000, "val": 5_000, "test": 10_000, "setting": 2_000}


class Run(NamedTuple):
    """The settings of a run; its file is named after them."""

    task: str
    form: str
    contender: str
    rate: float
    seed: int
    steps: int = STEPS

    @property
    def stem(self) -> str:
        return f"{self.task}-{self.form}-{self.contender}-lr{self.rate:g}-seed{self.seed}-{self.steps}steps"


# -- one run --


def rate_at(step: int, run: Run) -> float:
    """Linear warm-up, then a cosine to 0."""
    warm = min(1.0, (step + 1) / max(1, WARM_UP * run.steps))
    return run.rate * warm * 0.5 * (1 + math.cos(math.pi * step / run.steps))


def train(
    run: Run,
    task: Task,
    examples: dict[str, int],
    batch_size: int = BATCH,
    models: Path | None = None,
    optimizer_name: str = "adamw",
) -> dict:
    """Trains and measures; returns the content of the run's file. Times are those of the thread's own CPU clock.

    The trained weights are kept in the folder `models`, where there is one, as STEM.safetensors.
    """
    model = backbone(run.contender, run.form, task.outputs, task.pooled, run.seed)
    options = LoopOptions(lr=run.rate, weight_decay=DECAY, optimizer=optimizer_name).resolved()
    optimizer = make_optimizer(model, options)
    look_at = {round(run.steps * (i + 1) / LOOKS) for i in range(LOOKS - 1)}
    curve, looks, recent, seconds, wall = [], [], [], 0.0, time.perf_counter()
    for step, batch in enumerate(task.batches(run.seed, run.steps, batch_size)):
        start = time.thread_time()
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, run)
        loss = task.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds += time.thread_time() - start
        recent.append(loss.item())
        if len(recent) == max(1, run.steps // 30):
            curve.append({"step": step + 1, "loss": sum(recent) / len(recent), "cpu_seconds": round(seconds, 2)})
            recent = []
        if step + 1 in look_at:
            found = task.measure(model, "val", task.usual, examples["look"])
            looks.append({"step": step + 1, "cpu_seconds": round(seconds, 2), **found})
            print(f"      step {step + 1}: {_number(found)}", flush=True)
    training_wall = time.perf_counter() - wall
    if models is not None:
        models.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), models / f"{run.stem}.safetensors")
    result = {
        **run._asdict(),
        "optimizer": optimizer_name,
        "parameters": count(model),
        "batch": batch_size,
        "finite": all(math.isfinite(row["loss"]) for row in curve),
        "val": task.measure(model, "val", task.usual, examples["val"]),
        "test": {
            setting: task.measure(
                model, "test", setting, examples["test"] if setting == task.usual else examples["setting"]
            )
            for setting in task.settings
        },
        "curve": curve,
        "looks": looks,
        "cpu_ms_per_step": round(1e3 * seconds / run.steps, 1),
        "wall_ms_per_step": round(1e3 * training_wall / run.steps, 1),
    }
    return result


# -- which runs are missing --


def read(folder: Path) -> dict[Run, dict]:
    """The finished runs in a folder."""
    return study.read(folder, Run)


def best_rate(done: dict[Run, dict], task: str, form: str, contender: str, steps: int = STEPS) -> float | None:
    """The rate with the least loss on the held-out examples among the runs of the first seed; None before any."""
    losses = {
        run.rate: content["val"]["loss"]
        for run, content in done.items()
        if run[:3] == (task, form, contender) and run.seed == SEEDS[0] and run.steps == steps and content["finite"]
    }
    return min(losses, key=losses.__getitem__) if losses else None


def stages(done: dict[Run, dict]) -> Iterator[tuple[str, list[Run]]]:
    """The wanted runs, the most important first, as (purpose, runs). A stage may depend on the finished runs, so the
    stages are computed again after each run."""
    running = [name for name, contender in CONTENDERS.items() if not contender.why_not and not contender.remedy]
    remedies = [name for name, contender in CONTENDERS.items() if contender.remedy]

    def rates(task, form, only=None, names=running):
        return [Run(task, form, name, rate, SEEDS[0]) for rate in only or RATES for name in names]

    def edges(task, form, names=running):
        """One further rate where the best one is the smallest or the largest of those tried."""
        further = {RATES[0]: RATES[0] / 2, RATES[-1]: RATES[-1] * 2}
        best = {name: best_rate(done, task, form, name) for name in names}
        return [Run(task, form, name, further[rate], SEEDS[0]) for name, rate in best.items() if rate in further]

    def seeds(task, form, borrowed=None, names=running):
        """Each contender at its best rate: that of this task, or else that of the task in `borrowed`."""
        found = []
        for seed in SEEDS:
            for name in names:
                rate = best_rate(done, task, form, name) or (borrowed and best_rate(done, *borrowed, name))
                found += [Run(task, form, name, rate, seed)] if rate else []
        return found

    middle = RATES[1]
    yield "classes, bare: first look", [Run("classes", "bare", name, middle, SEEDS[0]) for name in FIRST]
    for task in ("classes", "tracing", "filling", "far"):
        yield f"{task}, bare: the main contenders at the middle rate", rates(task, "bare", (middle,), MAIN)
        yield f"{task}, bare: the main contenders' rates", rates(task, "bare", names=MAIN)
        yield f"{task}, bare: the main contenders' rates further out", edges(task, "bare", MAIN)
        yield f"{task}, bare: the main contenders' seeds", seeds(task, "bare", names=MAIN)
    quick = [name for name in remedies if SLOW not in name]
    for task in ("classes", "far"):
        names = ("gspn-global", *quick)
        yield f"{task}, bare: remedies", [Run(task, "bare", name, middle, SEEDS[0]) for name in names]
        names = ("gspn-global", *WATCHED)
        yield (
            f"{task}, bare: remedies' seeds",
            [Run(task, "bare", name, middle, seed) for seed in SEEDS for name in names],
        )
    yield "tracing, bare: first look", [Run("tracing", "bare", name, middle, SEEDS[0]) for name in TRACERS]
    yield (
        "tracing, bare: remedies' seeds",
        [Run("tracing", "bare", name, middle, seed) for seed in SEEDS for name in CHOOSERS],
    )
    yield "far, bare: first look", [Run("far", "bare", name, middle, SEEDS[0]) for name in FIRST]
    yield "remedies that forget", [Run("classes", "bare", name, middle, SEEDS[0]) for name in remedies]
    yield "classes, bare: all at the middle rate", rates("classes", "bare", (middle,))
    yield "classes, bare: learning rates", rates("classes", "bare")
    yield "classes, bare: rates further out", edges("classes", "bare")
    yield "classes, bare: seeds", seeds("classes", "bare")
    for task in ("far", "tracing"):
        yield f"{task}, bare: learning rates", rates(task, "bare")
        yield f"{task}, bare: rates further out", edges(task, "bare")
        yield f"{task}, bare: seeds", seeds(task, "bare")
    yield "filling, bare: seeds", seeds("filling", "bare", ("classes", "bare"))
    yield "classes, conv: seeds", seeds("classes", "conv", ("classes", "bare"))
    for task, form in (("filling", "bare"), ("classes", "conv")):
        yield f"{task}, {form}: learning rates", rates(task, form)
        yield f"{task}, {form}: seeds", seeds(task, form)
    for task in ("far", "filling"):
        yield f"{task}, conv: seeds", seeds(task, "conv", (task, "bare"))


def missing(done: dict[Run, dict]) -> Iterator[tuple[str, Run]]:
    for what, runs in stages(done):
        for run in runs:
            if run not in done:
                yield what, run


# -- the command --


def work(
    folder: Path,
    photos: Photos,
    minutes: float,
    examples: dict[str, int],
    only: Collection[str] = CONTENDERS,
    models: Path | None = None,
    optimizer: str = "adamw",
    runs: Sequence[Run] | None = None,
) -> int:
    """Makes `runs`, or else what is missing, until the time is over; finishes the run that it began. Returns the number
    of runs.

    Trained weights are kept in the folder `models`, where there is one.
    """
    purposes = {}

    def wanted(done: dict[Run, dict]) -> Iterator[Run]:
        for what, run in missing(done):
            if run.contender in only:
                purposes[run] = what
                yield run

    def told(content: dict) -> str:
        at = ", ".join(f"{setting}: {_number(found)}" for setting, found in content["test"].items())
        return f"{at}; val loss {content['val']['loss']:.4f}; {content['cpu_ms_per_step']:.0f} ms a step"

    made = lambda run: train(run, TASKS[run.task](photos), examples, models=models, optimizer_name=optimizer)  # noqa: E731
    named = lambda run: f"{purposes[run]}: {run.stem}" if run in purposes else run.stem  # noqa: E731
    return study.work(folder, Run, wanted, made, told, minutes, runs, named)


def _number(found: dict[str, float]) -> str:
    return f"{found['accuracy']:.2%}" if "accuracy" in found else f"{found['mse']:.4f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="the folder of CIFAR-10")
    parser.add_argument("--minutes", type=float, default=60, help="begin no run after this many minutes (default: 60)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the results")
    study.add_runs(parser, Run, CONTENDERS)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=CONTENDERS,
        default=list(CONTENDERS),
        metavar="MIXER",
        help="only these, so that two processes can share the work",
    )
    parser.add_argument(
        "--optimizer", choices=("adamw", "muon"), default="adamw", help="runs of muon need another folder (--out)"
    )
    parser.add_argument("--models", type=Path, help="keep the trained weights in this folder (default: keep none)")
    parser.add_argument("--list", action="store_true", help="list what is missing and train nothing")
    arguments = parser.parse_args()
    if arguments.list:
        done = read(arguments.out)
        for what, runs in stages(done):
            print(f"{what}: {sum(run in done for run in runs)} of {len(runs)}")
        return
    if arguments.photos is None:
        parser.error("--photos is missing: give the folder of CIFAR-10, tables with the splits train and test")
    torch.set_num_threads(1)
    if arguments.optimizer != "adamw" and arguments.out == RESULTS:
        parser.error(f"{RESULTS} holds the runs of AdamW: give another folder with --out")
    photos, limits = Photos.open(arguments.photos), (arguments.minutes, EXAMPLES, arguments.only)
    work(arguments.out, photos, *limits, arguments.models, arguments.optimizer, arguments.runs)


if __name__ == "__main__":
    main()
