"""The GSPN layer on a GPU: the scan against its floor, the layer against its rivals, whole models. One command:

    python -m benchmarks.layer_gpu --out DIR [--quick] [--only scan layer ...] [--official FOLDER] [--minutes 9]

Before anything is timed it is checked against the reference; the copy bandwidth, of which fractions are given, is
measured first. What a machine cannot run is recorded as not measured, with the reason. DIR gets layer-gpu.json (after
every case, so that nothing is lost; ``--resume`` goes on with what is left), layer-gpu.md and figures.
``--rehearse`` runs the same path at toy sizes on the CPU under Triton's interpreter: for a machine without a GPU.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

SECTIONS = ("gate", "scan", "layer", "models")
OUT = "layer-gpu.json"
SLOWEST_ATTENTION = 2.0  # estimated seconds of a call above which attention is not asked


class LayerCase(NamedTuple):
    """A layer with its projections: an input, a dtype, and a pass."""

    family: str
    shape: tuple[int, int, int, int]
    dtype: str
    train: bool

    def __str__(self) -> str:
        batch, channels, height, width = self.shape
        step = "forward + backward" if self.train else "forward"
        return f"{self.family}: B{batch} C{channels} {height}x{width}, {self.dtype}, {step}"


def layer_cases(quick: bool, rehearsal: bool) -> list[LayerCase]:
    """From 16x16 to 128x128 at two widths (where does attention fall behind?), then the sizes of the scan."""
    from benchmarks import scan_gpu

    if rehearsal:
        return [LayerCase("toy", (2, 16, 4, 6), "bfloat16", train) for train in (False, True)]
    sides = (16, 32, 64, 128) if quick else (16, 24, 32, 48, 64, 96, 128)
    found = []
    for dtype in ("bfloat16",) if quick else ("bfloat16", "float32"):
        for train in (False, True):
            for batch, channels in ((2, 640), (16, 192)):
                found += [LayerCase("crossover", (batch, channels, n, n), dtype, train) for n in sides]
    if not quick:
        sizes = scan_gpu.SIZES.items()
        found += [LayerCase(name, shape, "bfloat16", train) for train in (False, True) for name, shape in sizes]
    return found


def layer_contenders(machine, case: LayerCase) -> dict[str, Callable]:
    """Names to functions that make a module; the packaged ones only where they can be imported."""
    import gspn
    from benchmarks import peers, peers_gpu

    channels = case.shape[1]
    shared = max(1, channels // 8)
    backend = None if machine.rehearsal else "triton"
    makers = {
        "gspn": lambda: gspn.GSPN2d(channels, backend=backend),
        "gspn, 8 channels share weights": lambda: gspn.GSPN2d(
            channels, groups=shared if channels % shared == 0 else channels, backend=backend
        ),
        "gspn, scan in 8 channels": lambda: gspn.GSPN2d(channels, scan_dim=min(8, channels), backend=backend),
        "attention": lambda: peers.Attention(channels),
        "linear attention": lambda: peers.LinearAttention(channels),
    }
    absent = peers_gpu.missing()
    return makers | {
        n: (lambda make=make: make(channels)) for n, (_, make) in peers_gpu.PACKAGED.items() if n not in absent
    }


def run_layer(machine, case: LayerCase, seconds: float) -> dict:
    import torch

    from benchmarks import gpu_harness, harness, scan_gpu

    dtype = scan_gpu.DTYPES[case.dtype]
    x = torch.randn(case.shape, device=machine.device, dtype=dtype).to(memory_format=torch.channels_last)
    row, calls = {}, {}
    for name, make in layer_contenders(machine, case).items():
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


def _attention_seconds(case: LayerCase) -> float:
    """A rough lower bound: matrix products at a rate that the dtype allows, exponentials at that of the chip."""
    from benchmarks.peers import heads_of

    batch, channels, height, width = case.shape
    pairs = batch * (height * width) ** 2
    rate = 4e14 if case.dtype == "bfloat16" else 2e13
    return max(4 * pairs * channels / rate, pairs * heads_of(channels) / 2e12) * (3.5 if case.train else 1)


def _check_layer(module, x) -> None:
    """The correctness gate: the first image against the reference backend in float32."""
    import copy

    import torch

    from benchmarks import gpu_harness

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


def run_gate(machine) -> dict[str, Callable[[], dict]]:
    """Small problems, every dtype and pass, through the whole gate; a failure here is the first thing to look at."""
    from benchmarks import scan_gpu

    shapes = {"odd": (2, 24, 13, 7), "line": (1, 8, 1, 33), "oblong": (1, 16, 20, 70)}
    if machine.rehearsal:
        shapes = {"odd": (1, 8, 5, 3)}
    found = {}
    for name, shape in shapes.items():
        for dtype in scan_gpu.DTYPES:
            for shared in (False, True):
                for train in (False, True):
                    case = scan_gpu.Case(name, shape, dtype, shared, train)
                    found[str(case)] = lambda case=case: scan_gpu.errors_of(machine, case)
    return found


def measure_all(machine, options) -> dict:
    """Every section that was asked for, into the file; returns its content."""
    from benchmarks import gpu_harness, harness, models_gpu, official_gpu, peers_gpu, plots_gpu, scan_gpu

    environment = harness.environment()
    environment["commit"] = environment["commit"] or options.commit
    environment["gpu"] = machine.describe()["name"]
    what = gpu_harness.REHEARSAL if machine.rehearsal else "GSPN on a GPU"
    head = {"what": what, "rehearsal": machine.rehearsal, "quick": options.quick, "environment": environment}
    head |= {"device before": machine.describe(), "packages": peers_gpu.missing()}
    results = gpu_harness.Results(options.out / OUT, head, options.minutes, options.resume)
    seconds = 0.0 if machine.rehearsal else 0.2 if options.quick else 0.6
    official, built = None, {}
    if options.official:
        official, built = official_gpu.load(options.official)
    results.content["official"] = built

    def case(section: str, name: str, run: Callable[[], dict]) -> dict | None:
        def guarded():
            found, why_not = gpu_harness.attempt(machine, run)
            machine.free()
            return found if why_not is None else {"why": why_not}

        row = results.case(section, name, guarded)
        print(f"{section}: {name}: {_told(row)}", flush=True)
        return row

    rate = lambda: (results.content["sections"].get("copy", {}).get("copy") or {}).get("best GB/s")  # noqa: E731
    if "gate" in options.only:
        for name, run in run_gate(machine).items():
            case("gate", name, run)
    case("copy", "copy", lambda: gpu_harness.copy_bandwidth(machine, 0.5))
    sections = results.content["sections"]
    if "scan" in options.only:
        for c in scan_gpu.cases(options.quick, machine.rehearsal):
            slow = not c.shared and not (options.quick and (c.train or c.dtype == "float32"))
            case("scan", str(c), lambda c=c, slow=slow: scan_gpu.run(machine, c, seconds, rate(), official, slow))
    if "layer" in options.only:
        for c in layer_cases(options.quick, machine.rehearsal):
            case("layer", str(c), lambda c=c: run_layer(machine, c, seconds))
    if "models" in options.only:
        for c in models_gpu.cases(options.quick, machine.rehearsal):
            case("models", str(c), lambda c=c: models_gpu.run(machine, c, 3 * seconds))
    if options.tune:
        from benchmarks import tune_gpu  # needs the Triton kernels

        for c in tune_gpu.cases(machine.rehearsal):
            case("tune", str(c), lambda c=c: tune_gpu.run(machine, c, seconds, rate()))
    results.content["wrong"] = gpu_harness.wrong_results(sections)
    results.content["goals"] = scan_gpu.goals(sections.get("scan", {}), sections.get("layer", {}))
    results.content["device after"] = machine.describe()
    results.write(quiet=False)
    plots_gpu.write(results.content, options.out / OUT)
    return results.content


def _told(row: dict | None) -> str:
    """A case in a few words, for the terminal."""
    if row is None:
        return "left: the time is up"
    if "why" in row:
        return row["why"]
    parts = []
    for name, found in row.items():
        if isinstance(found, dict) and "ms" in found:
            graph = f" ({found['graph']['ms'][1]:.3f} in a graph)" if "ms" in found.get("graph", {}) else ""
            share = f", {found['of copy']:.0%} of copy" if "of copy" in found else ""
            parts.append(f"{name} {found['ms'][1]:.3f} ms{graph}{share}")
        elif isinstance(found, dict) and "why" in found:
            parts.append(f"{name} {found['why']}")
    return "; ".join(parts) or str({k: v for k, v in row.items() if k != "took_s"})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: the goals and the crossover")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--tune", action="store_true", help="also launch plans; with `--only` and no section only they")
    parser.add_argument("--minutes", type=float, default=60, help="begin no case after so many")
    parser.add_argument("--resume", action="store_true", help="keep the cases that are in the file already")
    parser.add_argument("--official", type=Path, help="your own checkout of the released kernel, to be built and timed")
    parser.add_argument("--commit", default="", help="to be recorded where the sources have no history beside them")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU; no measurement")
    options, start = parser.parse_args(), time.monotonic()
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # read by triton when it is imported, which is later
    import torch

    from benchmarks import gpu_harness

    if not options.rehearse and not torch.cuda.is_available():
        print("No GPU that torch can use is here; --rehearse runs the same path on the CPU.", file=sys.stderr)
        return 2
    machine = gpu_harness.Rehearsal() if options.rehearse else gpu_harness.Gpu()
    try:
        content = measure_all(machine, options)
    except gpu_harness.DeviceLost as lost:
        print(f"The device is lost to this process ({lost}); a fresh one goes on.", flush=True)
        left = options.minutes - (time.monotonic() - start) / 60
        again = [*sys.argv[1:], "--resume", "--minutes", str(left)]
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.layer_gpu", *again])
    for goal in content["goals"]:
        print(f"{goal['verdict']:>12}: {goal['goal']}: {goal['measured'] or '-'} (wanted {goal['wanted']})")
    if content["left"]:
        print(f"{len(content['left'])} cases left when the time was up; --resume goes on with them")
    for wrong in content["wrong"]:
        print(f"WRONG RESULTS: {wrong}")
    return 1 if content["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
