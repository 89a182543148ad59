"""What the GPU benchmarks share: a timed GPU, a rehearsal of the same path on the CPU, and results that survive a crash
and stop at a deadline.

Times are CUDA events around one call. Before each call the L2 cache is filled with other data by reading them (writing
would leave dirty lines, whose eviction would delay the next kernel). Contenders take turns within a round. Calls that
launches may bound are measured twice: as a user calls them, and replayed from a CUDA graph.
"""

import gc
import random
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness import harness

REHEARSAL = "rehearsal on the CPU, not a measurement"
WRONG = "not measured: wrong"
LAUNCH_BOUND = 2e-3  # seconds below which a call is also replayed from a CUDA graph
MIB = 2**20
Call = Callable[[], object]


class DeviceLost(RuntimeError):
    """This process can no longer use the device; a new process can."""


class WrongResult(AssertionError):
    """A contender computes something else. It is not timed, and the benchmark ends with an error."""


class Gpu:
    """The current CUDA device."""

    device = torch.device("cuda")
    rehearsal = False

    def __init__(self):
        cache = torch.cuda.get_device_properties().L2_cache_size
        self._other = torch.zeros(max(64 * MIB, 2 * cache) // 4, device=self.device)
        self._sink = torch.zeros((), device=self.device)

    def cool(self) -> None:
        """Fills the L2 cache with data that no contender uses, none of it dirty."""
        torch.sum(self._other, 0, out=self._sink)

    def round(self, calls: list[tuple[str, Call]]) -> dict[str, float]:
        """Seconds of one call of each, in the given order, each with a cold cache."""
        events = {}
        for name, run in calls:
            self.cool()
            events[name] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[name][0].record()
            run()
            events[name][1].record()
        torch.cuda.synchronize()
        return {name: start.elapsed_time(end) / 1e3 for name, (start, end) in events.items()}

    def graph(self, run: Call) -> Call:
        """The call as one replay of a CUDA graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def extra_mib(self, run: Call) -> float:
        """Peak of one call above what was allocated before it; what the call returns counts."""
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / MIB, 1)

    def free(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def check(self) -> None:
        """Raises DeviceLost where an earlier error has made the device unusable for this process."""
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise DeviceLost(str(error)) from error

    def describe(self) -> dict:
        """Name, memory and driver, and the present clocks as nvidia-smi reports them."""
        properties = torch.cuda.get_device_properties()
        fields = (
            "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu"
        )
        told = {}
        try:
            asked = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id=GPU-{properties.uuid}"]
            line = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
            told = dict(zip(fields.split(","), (v.strip() for v in line.split(",")), strict=True))
        except (OSError, subprocess.SubprocessError, ValueError, AttributeError) as error:
            told = {"nvidia-smi": f"failed: {error}"}
        return {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "l2_mib": properties.L2_cache_size // MIB,
            "cuda": torch.version.cuda or torch.version.hip,
        } | told

    def memory_gib(self) -> float:
        return torch.cuda.get_device_properties().total_memory / 2**30

    @property
    def processors(self) -> int:
        return torch.cuda.get_device_properties().multi_processor_count


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
    """Seconds of a call, one sample in each round for each contender; every round has a new random order."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls.items()), random.Random(0)
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle.shuffle(order)
            for name, seconds in machine.round(order).items():
                samples[name].append(seconds)
    finally:
        gc.enable()
    return samples


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
