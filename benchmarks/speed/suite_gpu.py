"""Everything that ``python -m benchmarks.speed.layer_gpu`` measures, in order, into one file."""

from collections.abc import Callable

import torch

from benchmarks.contenders import official_gpu, peers_gpu
from benchmarks.harness import gpu_harness, harness, plots_gpu
from benchmarks.speed import cases_gpu, mixers_gpu, models_gpu, scan_gpu, tune_gpu, warm_gpu

OUT = "layer-gpu.json"


def measure_all(machine, options) -> dict:
    """Measures the sections that were asked for and writes the file; returns its content."""
    environment = harness.environment()
    environment["commit"] = environment["commit"] or options.commit
    environment["gpu"] = machine.describe()["name"]
    environment["float32 matrix products"] = torch.get_float32_matmul_precision()
    what = gpu_harness.REHEARSAL if machine.rehearsal else "GSPN on a GPU"
    head = {"what": what, "rehearsal": machine.rehearsal, "quick": options.quick, "environment": environment}
    head |= {"device before": machine.describe(), "packages": peers_gpu.missing()}
    results = gpu_harness.Results(options.out / OUT, head, options.minutes, options.resume)
    seconds = 1e9 if machine.rehearsal else 0.2 if options.quick else 0.6
    official, built = None, {}
    if options.official:
        official, built = official_gpu.load(options.official)
    results.content["official"] = built
    if "scan" in options.only or options.tune:
        print("compiling", flush=True)
        results.content["compiled beforehand"] = (
            warm_gpu.compile_share(machine, cases_gpu.cases(False, True)[-1:], False)
            if machine.rehearsal
            else warm_gpu.start(options.quick, options.tune)
        )

    def case(section: str, name: str, run: Callable[[], dict]) -> dict | None:
        def guarded():
            found, why_not = gpu_harness.attempt(machine, run)
            machine.free()
            return found if why_not is None else {"why": why_not}

        row = results.case(section, name, guarded)
        print(f"{section}: {name}: {_in_words(row)}", flush=True)
        return row

    rate = lambda: (results.content["sections"].get("copy", {}).get("copy") or {}).get("best GB/s")  # noqa: E731
    if "gate" in options.only:
        for name, run in gates(machine, options.quick).items():
            case("gate", name, run)
    case("copy", "copy", lambda: gpu_harness.copy_bandwidth(machine, 0.5))
    sections = results.content["sections"]
    if "scan" in options.only:
        for c in cases_gpu.cases(options.quick, machine.rehearsal):
            slow = not c.shared and not (options.quick and (c.train or c.dtype == "float32"))
            case("scan", str(c), lambda c=c, slow=slow: scan_gpu.run(machine, c, seconds, rate(), official, slow))
    if "layer" in options.only:
        for c in mixers_gpu.cases(options.quick, machine.rehearsal):
            case("layer", str(c), lambda c=c: mixers_gpu.run(machine, c, seconds))
    if "models" in options.only:
        for c in models_gpu.cases(options.quick, machine.rehearsal):
            case("models", str(c), lambda c=c: models_gpu.run(machine, c, 3 * seconds))
    if options.tune:
        for c in tune_gpu.cases(machine.rehearsal):
            case("tune", str(c), lambda c=c: tune_gpu.run(machine, c, seconds, rate()))
    results.content["wrong"] = gpu_harness.wrong_results(sections)
    results.content["goals"] = cases_gpu.goals(sections.get("scan", {}), sections.get("layer", {}))
    results.content["device after"] = machine.describe()
    results.write(quiet=False)
    plots_gpu.write(results.content, options.out / OUT)
    return results.content


def gates(machine, quick: bool) -> dict[str, Callable[[], dict]]:
    """The correctness gate on small problems, every dtype and pass; look at a failure here first."""
    shapes = {"odd": (2, 24, 13, 7), "line": (1, 8, 1, 33), "oblong": (1, 16, 20, 70)}
    kinds = [
        (dtype, shared, train) for dtype in cases_gpu.DTYPES for shared in (False, True) for train in (False, True)
    ]
    if quick:
        shapes = {"odd": shapes["odd"]}
    if machine.rehearsal:
        shapes, kinds = {"odd": (1, 8, 1, 2)}, [("float32", False, False)]
    cases = [cases_gpu.Case(name, shape, *kind) for name, shape in shapes.items() for kind in kinds]
    return {str(case): lambda case=case: scan_gpu.errors_of(machine, case) for case in cases}


def _in_words(row: dict | None) -> str:
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
