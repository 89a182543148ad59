"""A study of many trainings: one JSON file for each run, made in the order of their importance, whenever there is time.

A run is a NamedTuple whose fields stand in its file too; its `stem` names the file.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from benchmarks.harness import harness


def read(folder: Path, kind: type) -> dict:
    """{run: content} of the finished runs in a folder; `kind` is the class of the runs."""
    contents = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    return {kind(*(content[name] for name in kind._fields)): content for content in contents}


def keep(run: Any, content: dict, folder: Path) -> None:
    """Writes the file of a run."""
    harness.write_json(folder / f"{run.stem}.json", content, quiet=True)


def work(
    folder: Path,
    kind: type,
    wanted: Callable,
    train: Callable,
    told: Callable[[dict], str],
    minutes: float,
    runs: Sequence | None = None,
    named: Callable[[Any], str] = lambda run: run.stem,
) -> int:
    """Makes missing runs until the time is over; finishes the run that it began. Returns the number of runs.

    Args:
        wanted: gives all runs, the most important first, for {run: content} of those that are done. runs: these and
            no others.
        train: gives the content of a run's file. told: what to print of it. named: what to print before the run.
    """
    end, made = time.monotonic() + 60 * minutes, 0
    environment = harness.environment()  # once: later edits do not change the code that runs
    while time.monotonic() < end:
        done = read(folder, kind)
        run = next((run for run in runs or wanted(done) if run not in done), None)
        if run is None:
            print("nothing is missing")
            break
        environment |= {"load_before": os.getloadavg()[0], "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}
        print(f"{time.strftime('%H:%M')} {named(run)}", flush=True)
        start = time.monotonic()
        content = train(run)
        environment["load_after"] = os.getloadavg()[0]
        keep(run, content | {"environment": environment}, folder)
        print(f"      {told(content)}; {(time.monotonic() - start) / 60:.1f} minutes", flush=True)
        made += 1
    return made


def times(contents: Iterable[dict], what: str) -> tuple[str, dict[str, float]]:
    """(a processor, the median of `what` by contender) of the contents of runs: on the processor that ran most of the
    contenders, as times of different processors cannot be compared."""
    found: dict[str, dict[str, list[float]]] = {}
    for content in contents:
        of_processor = found.setdefault(content["environment"]["cpu"], {})
        of_processor.setdefault(content["contender"], []).append(content[what])
    processor = max(found, key=lambda each: (len(found[each]), sum(map(len, found[each].values()))))
    return processor, {name: statistics.median(values) for name, values in found[processor].items()}


def difference(pairs: Sequence[tuple[list[float], list[float]]]) -> tuple[float, float, list[float]]:
    """Of losses on the same examples, (ours, theirs) for each seed: the mean of theirs - ours, its standard error over
    the examples, and the mean for each seed.

    An example's differences are averaged over the seeds first: as all seeds are tested on the same examples, their
    errors are not independent.
    """
    by_seed = [[b - a for a, b in zip(ours, theirs, strict=True)] for ours, theirs in pairs]
    means = [statistics.fmean(values) for values in zip(*by_seed, strict=True)]
    error = statistics.stdev(means) / len(means) ** 0.5
    return statistics.fmean(means), error, [statistics.fmean(values) for values in by_seed]


def commits(contents: Iterable[dict]) -> str:
    """The commits of the code that made the runs, marked where it had uncommitted changes. In files from before
    December 2026 these may be changes of results alone."""
    environments = [content["environment"] for content in contents]
    found = {(each["commit"][:8] or "unknown", each["uncommitted_changes"]) for each in environments}
    return ", ".join(commit + " with uncommitted changes" * changed for commit, changed in sorted(found))


def parameters_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def nearest_factor(make: Callable[[float], nn.Module], wanted: int) -> float:
    """Of the sixteenths from 1/2 to 4, the factor with which `make` gives a model of about `wanted` parameters."""
    return min((n / 16 for n in range(8, 65)), key=lambda factor: abs(parameters_of(make(factor)) - wanted))


def told(arguments: argparse.Namespace, read: Callable, wanted: Callable, report: Callable, draw: Callable) -> bool:
    """Does what --list or --report asks for; False where neither is given."""
    if arguments.list:
        done = read(arguments.out)
        list_runs(done, wanted(done))
    elif arguments.report:
        (arguments.out / "report.md").write_text(report(arguments.out))
        draw(arguments.out, arguments.out / "sizes.png")
    return arguments.list or arguments.report


def settings(parser: argparse.ArgumentParser, arguments: argparse.Namespace, usual: dict[str, Any]) -> dict[str, Any]:
    """What the options ask for, of the settings that hold for a whole folder of runs (--out). `usual` holds the value
    where an option is not given (None) and where a file lacks it. To --list or --report, what is not given may be
    anything, if it is the same in all runs.

    Errors: the parser's where a run in the folder has other settings."""
    asked = {name: value for name in usual if (value := getattr(arguments, name)) is not None}
    expected = asked if arguments.list or arguments.report else usual | asked
    for file in sorted(arguments.out.glob("*.json")):
        content = json.loads(file.read_text())
        found = {name: content.get(name, value) for name, value in usual.items()}
        for name, value in expected.items():
            if found[name] != value:
                what = f"{name} {found[name] or 'none'}, expected {value or 'none'}"
                parser.error(f"{file} has {what}: runs of other settings need another folder (--out)")
        expected = found
    return usual | asked


def list_runs(done: dict, runs: Iterable) -> None:
    """Prints which of the runs are done and which are missing."""
    for run in dict.fromkeys(runs):
        print("done   " if run in done else "missing", run.stem)


def run_of(kind: type, contenders: Collection[str], text: str) -> NamedTuple:
    """The run of a class of runs that a text such as "contender=dit,rate=0.01,seed=0" describes.

    Errors: argparse's for a field that is unknown, missing or no number, and for a contender that there is not."""
    types = kind.__annotations__
    try:
        given = dict(part.split("=", 1) for part in text.split(","))
        run = kind(**{name: types[name](value) for name, value in given.items()})
    except (ValueError, KeyError, TypeError):
        fields = ",".join(f"{name}={each.__name__}" for name, each in types.items())
        raise argparse.ArgumentTypeError(f"expected {fields}, got {text!r}") from None
    if run.contender not in contenders:
        raise argparse.ArgumentTypeError(f"expected a contender of {', '.join(contenders)}, got {run.contender!r}")
    return run


def add_options(parser: argparse.ArgumentParser, folder: Path, kind: type, contenders: Collection[str]) -> None:
    """Adds the options that studies share; `folder` is that of the published results, `kind` the class of the runs."""
    parser.add_argument("--minutes", type=float, default=60, help="begin no run after this many minutes (default: 60)")
    parser.add_argument("--out", type=Path, default=folder, help="the folder of the results")
    parser.add_argument("--list", action="store_true", help="list what is done and what is missing")
    parser.add_argument("--report", action="store_true", help="write report.md and sizes.png into the folder")
    add_runs(parser, kind, contenders)


def add_runs(parser: argparse.ArgumentParser, kind: type, contenders: Collection[str]) -> None:
    """Adds the option that names single runs."""
    parser.add_argument(
        "--runs",
        nargs="+",
        type=partial(run_of, kind, contenders),
        metavar="FIELD=VALUE,...",
        help="make these runs and no others, such as contender=NAME,rate=0.01,seed=0",
    )
