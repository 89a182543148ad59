"""Which launch plan is the fastest at each size? A part of ``python -m benchmarks.speed.layer_gpu --tune``.

The plan that ``gspn.kernels.triton.plan`` chooses is timed against its neighbours: one parameter changed at a time.
Every candidate passes the correctness gate first. The result is a table to be read by whoever edits the plan's tables;
nothing is tuned while a user's program runs.
"""

from benchmarks.harness import gpu_harness
from benchmarks.harness.gpu_harness import best_ms
from benchmarks.speed import cases_gpu, scan_gpu
from benchmarks.speed.cases_gpu import Case
from gspn.kernels import triton
from gspn.kernels.triton import plan as planning
from gspn.kernels.triton.plan import Plan

MOST_ELEMENTS = {False: 64, True: 32}  # a thread, forward and backward: twice what should be best
CHOSEN = "as chosen"
TILES = Plan(32, 4, 8, 1, 2, planning.HALO)


def cases(rehearsal: bool) -> list[Case]:
    """Both passes of every size in bfloat16, per channel; of those with goals in float32 and shared too."""
    return cases_gpu.cases(True, rehearsal)[: 1 if rehearsal else None]


def chosen(case: Case, processors: int) -> Plan:
    batch, channels, height, width = case.shape
    return planning.plan(
        max(height, width),
        max(height, width),
        channels,
        batch * len(cases_gpu.DIRECTIONS),
        cases_gpu.DTYPES[case.dtype].itemsize,
        case.train,
        processors,
    )


def candidates(start: Plan, places: int, backward: bool) -> list[Plan]:
    """The plan's neighbours. Each fits a line (or is cut into tiles) and gives a thread no more than it can hold."""
    total = start.strips * start.places
    found = [start._replace(stages=n) for n in (1, 2, 3)]
    found += [start._replace(warps=n) for n in (start.warps // 2, 2 * start.warps)]
    found += [start._replace(channels=n) for n in (start.channels // 2, 2 * start.channels)]
    found += [start._replace(strips=n, places=-(-total // n)) for n in (start.strips // 2, 2 * start.strips) if n]
    if places > TILES.own and not start.halo:
        found += [TILES, TILES._replace(warps=2, stages=1)]
    fitting = []
    for plan in dict.fromkeys(p for p in found if p != start):
        if min(plan.warps, plan.channels) >= 1 and (plan.halo or plan.strips * plan.places >= places):
            elements = plan.strips * plan.places * plan.channels / (32 * plan.warps)
            if elements <= MOST_ELEMENTS[backward]:
                fitting.append(plan)
    return fitting


def _told(plan: Plan) -> str:
    return " ".join(f"{name}={value}" for name, value in plan._asdict().items())


def run(machine, case: Case, seconds: float, copy: float | None) -> dict:
    """Times of every candidate, the fastest, and how many times the speed of the chosen plan it has."""
    if case.resident_gib > 0.6 * machine.memory_gib():
        return {"why": f"not measured: needs {case.resident_gib:.0f} GiB and room for several plans"}
    inputs = scan_gpu.problem(case, machine.device)
    start = chosen(case, machine.processors)
    row: dict = {"start": start._asdict()}
    calls = {}
    plans = {CHOSEN: None} | {_told(p): p for p in candidates(start, max(case.shape[2:]), case.train)}
    if machine.rehearsal:
        plans = {CHOSEN: scan_gpu.TOY_PLAN, "another": scan_gpu.TOY_PLAN._replace(stages=2)}
    for name, plan in plans.items():
        forward = lambda *a, p=plan: triton.gated_scan(*a, plan=None if case.train else p)  # noqa: E731
        backward = lambda *a, p=plan: triton.gated_scan_backward(*a, plan=p)  # noqa: E731
        made, why_not = gpu_harness.attempt(
            machine, lambda f=forward, b=backward: scan_gpu.operators(f, b, case, inputs, scan_gpu.LIMITS)
        )
        if why_not:
            row[name] = {"why": why_not}
        else:
            calls[name] = made[0][cases_gpu.OURS]
    row |= gpu_harness.measure(machine, calls, CHOSEN, seconds)
    times = {n: best_ms(row[n]) for n in calls if best_ms(row[n])}
    for name, ms in times.items():
        row[name]["of copy"] = round(case.bytes_moved / ms / 1e6 / copy, 4) if copy else None
    if CHOSEN in times:
        winner = min(times, key=times.get)
        row["winner"] = {"plan": winner, "times the speed of the chosen": round(times[CHOSEN] / times[winner], 3)}
    return row
