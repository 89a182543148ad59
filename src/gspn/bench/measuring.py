"""How things are measured: rounds in which the contenders take turns, peak memory, and what is told of the machine.

On one thread the clock is the thread's own CPU time, which other processes disturb little; on several threads it is
wall time; on a GPU it is CUDA's events. A speed claim is a ratio: the contenders are measured in every round, one after
the other, and the median over the rounds of their ratio counts.
"""

import gc
import os
import platform
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from ctypes import CDLL
from functools import cache
from multiprocessing import active_children, forkserver, get_context, resource_tracker
from pathlib import Path

import numpy as np
import torch

import gspn
from gspn.memory import free_bytes

LEAST_SECONDS = 0.01  # a sample on a CPU repeats its call until it has lasted this long
MIB = 2**20
PR_SET_PDEATHSIG = 1  # of Linux's prctl
Call = Callable[[], object]


class WrongResult(AssertionError):
    """A contender computes something else than it should. It is not timed."""


class DeviceLost(RuntimeError):
    """This process can no longer use the device; a new process can."""


# -- time --


def in_turns(one_round: Callable, calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """One sample in each round for each contender; every round has a new random order. `one_round` gives the seconds
    by name from [(name, call), ...]."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls.items()), random.Random(0)
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle.shuffle(order)
            for name, seconds in one_round(order).items():
                samples[name].append(seconds)
    finally:
        gc.enable()
    return samples


def interleaved(
    contenders: dict[str, Call], rounds: int, threads: int, once: dict[str, float] | None = None
) -> dict[str, list[float]]:
    """Seconds of a call on the CPU, one sample in each round for each contender. `once` holds the seconds of calls that
    were made before: slow ones are not warmed up again."""
    clock = time.thread_time if threads == 1 else time.perf_counter

    def seconds(run, calls):
        start = clock()
        for _ in range(calls):
            run()
        return (clock() - start) / calls

    calls = {}
    for name, run in contenders.items():
        last = (once or {}).get(name) or seconds(run, 1)  # warms up
        last = last if last > 50 * LEAST_SECONDS else seconds(run, 1)
        calls[name] = max(1, round(LEAST_SECONDS / max(last, 1e-7)))

    def one_round(order):
        gc.collect()
        return {name: seconds(run, calls[name]) for name, run in order}

    return in_turns(one_round, contenders, rounds)


def summary(samples: dict[str, list[float]], ours: str) -> dict[str, dict]:
    """For each contender: milliseconds and the ratio to our time, as quartiles; no ratio if ours was not measured."""
    quartiles = lambda values: [round(float(q), 4) for q in np.quantile(values, (0.25, 0.5, 0.75))]  # noqa: E731
    found = {name: {"ms": quartiles([1e3 * s for s in values])} for name, values in samples.items()}
    if ours in samples:
        for name, values in samples.items():
            found[name]["ratio"] = quartiles([s / o for s, o in zip(values, samples[ours], strict=True)])
    return found


def eval_call(module: torch.nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """One forward pass without gradients."""

    def run():
        with torch.no_grad():
            return module(x)

    return run


def train_call(
    module: torch.nn.Module, x: torch.Tensor, grad: torch.Tensor | None = None
) -> Callable[[], torch.Tensor]:
    """One forward and one backward pass, with gradients of the input and of every parameter. `grad`: of the output;
    ones, unless given."""
    x = x.detach().requires_grad_()
    grad = torch.ones_like(x) if grad is None else grad

    def run():
        module.zero_grad()
        y = module(x)
        y.backward(grad)
        x.grad = None
        return y

    return run


# -- memory on a CPU --


def peak_extra_mib(run: Call) -> float:
    """Peak resident memory of one call above what was there before it, in MiB (Linux)."""
    gc.collect()
    CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_kib("VmRSS")
    kept = run()
    peak = _status_kib("VmHWM")
    del kept
    return (peak - before) / 1024


def _status_kib(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1])


def in_own_process(function: Callable, *arguments):
    """What `function(*arguments)` returns in a process of its own, which begins with what importing gspn.bench takes.
    Ctrl+C ends it silently.

    Errors: MemoryError where the system ends the process, which it does to one that takes too much memory."""
    context = get_context("forkserver")
    # what the first backward pass imports takes longer than most passes
    context.set_forkserver_preload(["__main__", "torch.fx.experimental.symbolic_shapes", "gspn.bench.suites"])
    _start_server(context)
    others = active_children()
    try:
        with ProcessPoolExecutor(1, context, initializer=_end_with_the_server) as pool:
            try:
                return pool.submit(function, *arguments).result()
            except KeyboardInterrupt:
                for process in set(active_children()) - set(others):
                    process.kill()  # or leaving the pool waits for it
                raise
    except BrokenProcessPool:
        raise MemoryError("the system ended the process, probably for want of memory") from None


@cache
def _start_server(context):
    """Starts the server that forks the processes. Ctrl+C goes to all processes of a terminal: the server and what it
    forks inherit that SIGINT is blocked, so that this process alone answers it."""
    resource_tracker.ensure_running()  # which the server starts, too, and which unblocks SIGINT here
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    first = context.Process(target=abs, args=(0,))  # it waits for the server's imports, and may be left behind
    first.start()
    first.join()


def _end_with_the_server():
    """Lets Linux end this process with the server, which ends with the process that measures: where that is interrupted
    at the start, nobody else would."""
    if sys.platform == "linux":
        CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


# -- machines --


class Cpu:
    """The CPU, with a number of threads."""

    device = torch.device("cpu")

    def __init__(self, threads: int):
        self.threads = threads
        torch.set_num_threads(threads)

    def rounds(self, calls: dict[str, Call], rounds: int, once: dict[str, float]) -> dict[str, list[float]]:
        return interleaved(calls, rounds, self.threads, once)

    def wait(self) -> None:
        pass

    def free_mib(self) -> float:
        return free_bytes(self.device) / MIB


class Gpu:
    """The current CUDA device. Before each call the L2 cache is filled with other data by reading them: writing would
    leave dirty lines, whose eviction would delay the next kernel."""

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

    def rounds(self, calls: dict[str, Call], rounds: int, once: dict[str, float]) -> dict[str, list[float]]:
        return in_turns(self.round, calls, rounds)  # `once` was measured, so they are warm

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

    def wait(self) -> None:
        torch.cuda.synchronize()

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

    def free_mib(self) -> float:
        held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return (torch.cuda.mem_get_info()[0] + held) / MIB

    @property
    def processors(self) -> int:
        return torch.cuda.get_device_properties().multi_processor_count


def environment() -> dict:
    """Machine and versions, for a result file."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load_before": load(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gspn": gspn.__version__,
        "backends": {name: list(status) for name, status in gspn.available_backends().items()},
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def load() -> float | None:
    """How many processes wanted to compute, on average over the last minute; None where the system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def cpu_name() -> str:
    """The CPU and those of its vector instructions that matter here, as Linux names them; elsewhere what Python
    knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = lambda key: next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")  # noqa: E731
    name, has = told("model name") or platform.processor() or platform.machine(), told("flags").split()
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in has]
    return f"{name} ({', '.join(flags)})" if flags else name
