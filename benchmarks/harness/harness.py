"""What every benchmark shares: interleaved rounds, ratios within a round, peak memory in a process of its own, and a
JSON file that records machine, versions and commit.

On one thread the clock is the thread's own CPU time, which other processes disturb little; on several threads it is
wall time. A speed claim is a ratio: both contenders are measured in every round, one after the other, and the median
over the rounds of their ratio counts.
"""

import gc
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from ctypes import CDLL
from pathlib import Path

import numpy as np
import torch

import gspn

ROOT = Path(__file__).resolve().parents[2]
LEAST_SECONDS = 0.01  # a sample repeats its call until it has lasted this long


def interleaved(contenders: dict[str, Callable[[], None]], rounds: int, threads: int) -> dict[str, list[float]]:
    """Seconds of a call, one sample in each round for each contender; every round has a new random order."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    calls = {}
    for name, run in contenders.items():
        calls[name] = 1
        for _ in range(2):  # the first call warms up
            start = clock()
            run()
            seconds = clock() - start
            if seconds > 50 * LEAST_SECONDS:
                break
        else:
            calls[name] = max(1, round(LEAST_SECONDS / max(seconds, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    order, shuffle = list(contenders), random.Random(0)
    gc.disable()
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            run = contenders[name]
            start = clock()
            for _ in range(calls[name]):
                run()
            samples[name].append((clock() - start) / calls[name])
        gc.collect()
    gc.enable()
    return samples


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


def train_call(module: torch.nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """One forward and one backward pass, with gradients of the input and of every parameter."""
    x = x.detach().requires_grad_()
    ones = torch.ones_like(x)

    def run():
        x.grad = None
        module.zero_grad()
        y = module(x)
        y.backward(ones)
        return y

    return run


def peak_extra_mib(run: Callable[[], object]) -> float:
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


def in_fresh_process(module: str, *arguments: str) -> dict:
    """Runs ``python -m module arguments`` and reads the JSON that it prints last."""
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )
    if result.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def environment() -> dict:
    """Machine, versions and commit, for the JSON file."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gspn": gspn.__version__,
        "backends": {name: list(status) for name, status in gspn.available_backends().items()},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "src", "benchmarks")),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def _git(*arguments: str) -> str:
    """What git prints; empty where the sources have no history or git is not installed."""
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())
    return f"{name} ({', '.join(f for f in ('avx2', 'avx512f', 'avx512_bf16', 'amx_bf16') if f in flags)})"


def write_json(path: Path, content: dict, quiet: bool = False) -> None:
    """Replaces the file at once: a benchmark that is killed leaves the file of the case before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)
    if not quiet:
        print(f"wrote {path}")
