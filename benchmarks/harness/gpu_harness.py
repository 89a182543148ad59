"""What the GPU benchmarks share: a timed GPU, a rehearsal of the same path on the CPU, and results that survive a crash
and stop at a deadline.

Times are CUDA events around one call. Before each call the L2 cache is filled with other data by reading them (writing
would leave dirty lines, whose eviction would delay the next kernel). Contenders take turns within a round. Calls that
launches may bound are measured twice: as a user calls them, and replayed from a CUDA graph.
"""

import gc
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness import harness
from gspn.bench import measuring
from gspn.bench.measuring import MIB, Call, DeviceLost, Gpu, WrongResult

__all__ = [
    "MIB", "Call", "DeviceLost", "Gpu", "Rehearsal", "Results", "WrongResult", "attempt", "best_ms",
    "copy_bandwidth", "interleaved", "measure", "wrong_results",
]  # fmt: skip

REHEARSAL = "rehearsal on the CPU, not a measurement"
WRONG = "not measured: wrong"
LAUNCH_BOUND = 2e-3  # seconds below which a call is also replayed from a CUDA graph


class Rehearsal:
    """Replaces the GPU: CPU tensors, a wall clock, no graphs. It shows that the path runs; its times mean nothing."""

    device = torch.device("cpu")
    rehearsal = True
    processors = 1

    def cool(self) -> None:
        pass

    def round(self, calls: list[tuple[str, Call]]) -> dict[str, float]:
        seconds = {}
        for name, run in calls:
            start = time.perf_counter()
            run()
            seconds[name] = time.perf_counter() - start
        return seconds

    def graph(self, run: Call) -> Call:
        return run

    def extra_mib(self, run: Call) -> float:
        return 0.0

    def free(self) -> None:
        gc.collect()

    def check(self) -> None:
        pass

    def describe(self) -> dict:
        return {"name": REHEARSAL}

    def memory_gib(self) -> float:
        return 1.0


def interleaved(machine, calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of a call, one sample in each round for each contender."""
    return measuring.in_turns(machine.round, calls, rounds)


def attempt(machine, run: Call) -> tuple[object, str | None]:
    """(result, None), or (None, reason). A contender's failure is a result; a lost device raises DeviceLost."""
    try:
        return run(), None
    except torch.OutOfMemoryError as error:
        reason = f"not measured: out of memory ({str(error).split('.')[0]})"
    except WrongResult as error:
        reason = f"{WRONG}: {error}"
    except Exception as error:  # what a contender raises is its own affair, except where nothing is measured
        machine.check()
        if machine.rehearsal:
            raise
        traceback.print_exc()
        reason = f"not measured: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    machine.free()
    return None, reason


def measure(
    machine, calls: dict[str, Call], ours: str, seconds: float, graphs: tuple[str, ...] = ()
) -> dict[str, dict]:
    """For each contender its times, ratio to ours, extra memory and, where launches may bind it, times from a graph.

    Args:
        seconds: about how long all rounds of the fast contenders may take; slow contenders get three rounds.
        graphs: names that are replayed from a graph even if they take long.
    """
    found: dict[str, dict] = {}
    once: dict[str, float] = {}
    for name, run in calls.items():
        extra, why_not = attempt(
            machine, lambda run=run: (run(), machine.extra_mib(run))[1]
        )  # compiled, then looked at
        if why_not is None:
            sample, why_not = attempt(machine, lambda run=run, name=name: machine.round([(name, run)])[name])
        if why_not is None:
            once[name], found[name] = sample, {"extra_mib": extra}
        else:
            found[name] = {"why": why_not}
    slow = {name for name, sample in once.items() if name != ours and sample > seconds / 8}
    fast = {name: calls[name] for name in once if name not in slow}
    for name, row in _rounds(machine, fast, ours, seconds, sum(once[n] for n in fast)).items():
        found[name] |= row
    for name in slow:
        pair = {n: calls[n] for n in (ours, name) if n in once}
        found[name] |= harness.summary(interleaved(machine, pair, 3), ours)[name] | {"rounds": 3}
    replays = {}
    for name, sample in once.items():
        if sample < LAUNCH_BOUND or name in graphs or (name == ours and graphs):
            replays[name], why_not = attempt(machine, lambda name=name: machine.graph(calls[name]))
            if why_not:
                found[name]["graph"] = {"why": why_not}
                del replays[name]
    if replays:
        total = sum(once[name] for name in replays)
        for name, row in _rounds(machine, replays, ours, seconds, total).items():
            found[name]["graph"] = row
    return found


def _rounds(machine, calls: dict[str, Call], ours: str, seconds: float, total: float) -> dict[str, dict]:
    rounds = 1 if machine.rehearsal else min(60, max(7, int(seconds / max(total, 1e-6))))
    rows = harness.summary(interleaved(machine, calls, rounds), ours) if calls else {}
    return {name: row | {"rounds": rounds} for name, row in rows.items()}


def wrong_results(sections: dict[str, dict]) -> list[str]:
    """Every case and contender that did not pass its correctness gate."""
    found = []
    for section, cases in sections.items():
        for case, row in cases.items():
            named = {"": row} | {f", {n}": r for n, r in row.items() if isinstance(r, dict)}
            found += [
                f"{section}: {case}{n}: {r['why']}" for n, r in named.items() if r.get("why", "").startswith(WRONG)
            ]
    return found


def best_ms(row: dict) -> float | None:
    """The smaller of the median times as called and from a graph; None if there is neither."""
    times = [r["ms"][1] for r in (row, row.get("graph", {})) if "ms" in r]
    return min(times, default=None)


def copy_bandwidth(machine, seconds: float) -> dict:
    """GB/s of a copy within the device's memory, bytes read plus bytes written. Fractions are of this ceiling."""
    sizes = [1] if machine.rehearsal else [256, 1024, 4096]
    rates = {}
    for mib in sizes:
        source = torch.randn(mib * MIB // 4, device=machine.device)
        target = torch.empty_like(source)
        call = lambda s=source, t=target: t.copy_(s)  # noqa: E731
        call()
        row = _rounds(machine, {"copy": call}, "copy", seconds, 2 * mib * MIB / 2e12)["copy"]
        rates[f"{mib} MiB"] = round(2 * mib * MIB / row["ms"][1] / 1e6, 1)
        machine.free()
    return {"GB/s": rates, "best GB/s": max(rates.values())}


class Results:
    """A JSON file that grows by one case at a time: no case is lost when the process dies, and none is measured twice.

    Args:
        path: the file. With ``resume`` its cases are kept; a case on which the process died is recorded as such.
        head: the first entries of the file.
        minutes: no case begins later; the cases that are left are listed.
    """

    def __init__(self, path: Path, head: dict, minutes: float, resume: bool = False):
        self.path, self.deadline = path, time.monotonic() + 60 * minutes
        self.content = head | {"sections": {}, "left": []}
        if resume and path.exists():
            before = harness.json.loads(path.read_text())
            for key in ("commit", "gpu"):
                if before["environment"][key] != head["environment"][key]:
                    raise ValueError(f"{path} was measured on another {key}: {before['environment'][key]!r}")
            self.content["sections"] = before["sections"]
            died = before.get("running")
            if died:
                self.content["sections"].setdefault(died[0], {})[died[1]] = {"why": "not measured: the process died"}

    def case(self, section: str, name: str, run: Callable[[], dict]) -> dict | None:
        """Measures a case unless the file has it or the time is up; None if the file does not have it afterwards."""
        cases = self.content["sections"].setdefault(section, {})
        if name not in cases:
            if time.monotonic() > self.deadline:
                self.content["left"].append(f"{section}: {name}")
                return None
            self.content["running"] = [section, name]
            self.write()
            start = time.monotonic()
            try:
                cases[name] = run()
            finally:
                if name in cases:
                    cases[name]["took_s"] = round(time.monotonic() - start, 1)
                    del self.content["running"]
            self.write()
        return cases[name]

    def write(self, quiet: bool = True) -> None:
        harness.write_json(self.path, self.content, quiet)
