"""The layer with its projections against attention, linear attention and state-space scans, on a GPU.

A part of ``python -m benchmarks.speed.layer_gpu``: from which size of the feature map on is the layer ahead?
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch

import gspn
from benchmarks.contenders import peers, peers_gpu
from benchmarks.harness import gpu_harness, harness
from benchmarks.speed import cases_gpu
from gspn.bench.contenders import heads_of

SLOWEST_ATTENTION = 2.0  # estimated seconds of a call above which attention is not measured


class Case(NamedTuple):
    """A layer with its projections: an input, a dtype, and a pass."""

    family: str
    shape: tuple[int, int, int, int]
    dtype: str
    train: bool

    def __str__(self) -> str:
        batch, channels, height, width = self.shape
        step = "forward + backward" if self.train else "forward"
        return f"{self.family}: B{batch} C{channels} {height}x{width}, {self.dtype}, {step}"


def cases(quick: bool, rehearsal: bool) -> list[Case]:
    """From 16x16 to 128x128 at two widths (where does attention fall behind?), then the sizes of the scan."""
    if rehearsal:
        return [Case("toy", (2, 16, 4, 6), "bfloat16", train) for train in (False, True)]
    sides = (16, 32, 64, 128) if quick else (16, 24, 32, 48, 64, 96, 128)
    found = []
    for dtype in ("bfloat16",) if quick else ("bfloat16", "float32"):
        for train in (False, True):
            for batch, channels in ((2, 640), (16, 192)):
                found += [Case("crossover", (batch, channels, n, n), dtype, train) for n in sides]
    if not quick:
        sizes = cases_gpu.SIZES.items()
        found += [Case(name, shape, "bfloat16", train) for train in (False, True) for name, shape in sizes]
    return found


def contenders(machine, case: Case) -> dict[str, Callable]:
    """Functions that make a module, by name; those from packages only if the package can be imported."""
    channels = case.shape[1]
    groups = channels // cases_gpu.sharing(channels)
    backend = None if machine.rehearsal else "triton"
    makers = {
        "gspn": lambda: gspn.GSPN2d(channels, backend=backend),
        "gspn, shared weights": lambda: gspn.GSPN2d(channels, groups=groups, backend=backend),
        "gspn, scan in 8 channels": lambda: gspn.GSPN2d(channels, scan_dim=min(8, channels), backend=backend),
        "attention": lambda: peers.Attention(channels),
        "linear attention": lambda: peers.LinearAttention(channels),
    }
    absent = peers_gpu.missing()
    return makers | {
        n: (lambda make=make: make(channels)) for n, (_, make) in peers_gpu.PACKAGED.items() if n not in absent
    }


def run(machine, case: Case, seconds: float) -> dict:
    dtype = cases_gpu.DTYPES[case.dtype]
    x = torch.randn(case.shape, device=machine.device, dtype=dtype).to(memory_format=torch.channels_last)
    row, calls = {}, {}
    for name, make in contenders(machine, case).items():
        if name == "attention" and _attention_seconds(case) > SLOWEST_ATTENTION:
            row[name] = {"why": f"not measured: estimated {_attention_seconds(case):.0f} s a call"}
            continue

        def prepare(name=name, make=make):
            torch.manual_seed(0)
            module = make().to(machine.device, dtype)
            if name.startswith("gspn"):
                _check_layer(module, x)
            return harness.train_call(module, x) if case.train else harness.eval_call(module, x)

        found, why_not = gpu_harness.attempt(machine, prepare)
        if why_not:
            row[name] = {"why": why_not}
        else:
            calls[name] = found
    row |= gpu_harness.measure(machine, calls, "gspn", seconds)
    return {"side": min(case.shape[2:]), "family": case.family} | row


def _attention_seconds(case: Case) -> float:
    """A rough lower bound: matrix products at the rate of the dtype, exponentials at the rate of the chip."""
    batch, channels, height, width = case.shape
    pairs = batch * (height * width) ** 2
    rate = 4e14 if case.dtype == "bfloat16" else 2e13
    return max(4 * pairs * channels / rate, pairs * heads_of(channels) / 2e12) * (3.5 if case.train else 1)


def _check_layer(module, x) -> None:
    """The correctness gate: the first image against the reference backend in float32."""
    exact = copy.deepcopy(module).float()
    exact.backend = "reference"
    with torch.no_grad():
        found, expected = module(x[:1]).float(), exact(x[:1].float())
    error = ((found - expected).norm() / expected.norm()).item()
    limit = 3e-2 if x.dtype == torch.bfloat16 else 1e-4
    if not error <= limit:
        raise gpu_harness.WrongResult(
            f"the layer differs from the reference: relative error {error:.2e}, allowed {limit:.0e}"
        )
