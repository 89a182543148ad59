"""What `gspn bench` measures, and what of it fits into the minutes.

Every suite adds its part to the results, which are saved after each case: samples in seconds, their quartiles in
milliseconds, ratios to GSPN's time in the same round, and the peak memory that one call takes beyond its inputs. What
does not fit into the time or the memory, or fails, is added to "left out" with the reason.
"""

import copy
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import gspn
from gspn.bench.contenders import CONTENDERS, OURS
from gspn.bench.measuring import (
    MIB,
    Cpu,
    Gpu,
    WrongResult,
    environment,
    eval_call,
    in_own_process,
    load,
    peak_extra_mib,
    summary,
    train_call,
)
from gspn.names import reason_of
from gspn.progress import Progress, duration

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}  # relative errors against the reference
WEIGHTS = {"layer": 3, "growth": 4, "models": 3}  # of the suites in the time that is left
BATCH = {"cpu": 1, "cuda": 16}
LAYERS = ((144, 56, 56), (576, 14, 14), (384, 14, 14), (320, 32, 32), (64, 256, 256))  # C, H, W
CHANNELS, FIRST_SIDE, LAST_SIDE = 64, 16, 16384  # of the growing map
CHECKED = 64  # sides up to which GSPN is compared with the reference, which takes long on larger maps
PASSES = "forward", "training"
ROUNDS = 3, 9  # the fewest and the most
SLOW = 60.0  # seconds of a round of all contenders beyond which there is only one
CALLS = 2 + ROUNDS[0]  # of a slow case: for memory, to warm up, in rounds
SHARE = 0.8  # of the free memory that a case may be expected to take
SIDES = (224, 384, 512, 1024)  # of the images for models
MODELS = ("gspn_mobile", "gspn_micro", "gspn_tiny", "gspn_small", "gspn_base")
TIMM = {
    "ConvNeXt-T": "convnext_tiny",
    "Swin-T": "swin_tiny_patch4_window7_224",
    "DeiT-S": "deit_small_patch16_224",
}
COUNTED = (
    "torch.utils.flop_counter: convolutions, matrix products, attention and gspn's operators; no norms, activations, "
    "softmax, pooling or sums"
)


@dataclass
class Session:
    """What the suites share. `last_sides`: of the growing map in each pass. `end` is when the present suite has to be
    over, in seconds of time.monotonic."""

    machine: Cpu | Gpu
    dtype: torch.dtype
    progress: Progress
    save: Callable[[dict], None]
    results: dict
    last_sides: dict[str, int]
    start: float = field(default_factory=lambda: time.monotonic())
    end: float = 0.0
    grown: list = field(default_factory=list)  # cases of growth that were measured earlier
    only: list = field(default_factory=list)  # contenders of growth; all, if empty

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    @property
    def on_cpu(self) -> bool:
        return self.machine.device.type == "cpu"

    def leave_out(self, suite: str, what: str, why: str) -> None:
        self.results["left out"].append({"suite": suite, "what": what, "why": why})

    def is_over(self, suite: str, what: str) -> bool:
        """Whether the time is up, which is noted."""
        if self.left <= 0:
            self.leave_out(suite, what, "no time was left")
        return self.left <= 0

    def attempt(self, suite: str, name: str, what: str, run: Callable):
        """What `run` returns; None where it cannot be measured, which is noted. GSPN may lack memory, but not fail."""
        self.tell(f"{suite}: {name}, {what}")
        try:
            return run()
        except (torch.OutOfMemoryError, MemoryError) as error:
            self.leave_out(suite, f"{name}, {what}", f"out of memory: {reason_of(error)}")
        except (RuntimeError, AssertionError) as error:
            if name.startswith(OURS) and "allocate memory" not in str(error):  # as the CPU's allocator says it
                raise
            self.leave_out(suite, f"{name}, {what}", f"failed: {reason_of(error)}")
        return None

    def seconds_of(self, call: Callable) -> float:
        """Wall time of one call, which also warms up. The plan goes by it, no result does."""
        start = time.monotonic()
        call()
        self.machine.wait()
        return time.monotonic() - start

    def timed(self, calls: dict[str, Callable], once: dict[str, float], seconds: float, ours: str) -> dict[str, dict]:
        """The times of each; `seconds` is about what all rounds may take, but for the fewest."""
        if not calls:
            return {}
        each = max(sum(once[name] for name in calls), 1e-6)
        rounds = 1 if each > SLOW else min(ROUNDS[1], max(ROUNDS[0], int(seconds / each)))
        self.tell("all take turns" if len(calls) > 1 else next(iter(calls)))
        samples = self.machine.rounds(calls, rounds, once)
        rows = summary(samples, ours)
        return {name: {"samples": [round(s, 9) for s in samples[name]], **rows[name]} for name in samples}

    def tell(self, what: str) -> None:
        """Shows the time that has passed, and what comes now."""
        self.progress.update(min(self.progress.total - 1, round(time.monotonic() - self.start)), what)


def run(
    suites: Iterable[str],
    machine: Cpu | Gpu,
    *,
    minutes: float,
    dtype: str = "fp32",
    save: Callable[[dict], None] = lambda results: None,
    last_sides: dict[str, int] | None = None,
    only: list[str] | None = None,
    earlier: list[dict] | None = None,
    console=None,
) -> dict:
    """Measures the suites within about `minutes` and returns the results, which `save` also gets after each case. In
    `growth` the map grows to `last_sides` in each pass, by default as far as it fits, for all contenders or `only`
    some; what the results of `earlier` runs have becomes a part of these and is not measured again.

    Errors: WrongResult where GSPN's layer does not agree with the reference."""
    on_cpu = machine.device.type == "cpu"
    head = {"what": "gspn bench", "machine": environment(), "device": machine.device.type, "dtype": dtype}
    title = head["machine"]["cpu" if on_cpu else "gpu"].partition(" (avx")[0].replace("(R)", "").replace("(TM)", "")
    head |= {"title": title, "batch": BATCH[machine.device.type]}
    head |= {"threads": machine.threads if on_cpu else None, "minutes": minutes}
    head["clock"] = "CUDA events" if not on_cpu else "CPU time" if machine.threads == 1 else "wall time"
    with Progress("measuring", round(60 * minutes), "seconds", console=console) as progress:
        last = dict.fromkeys(PASSES, LAST_SIDE) | (last_sides or {})
        earlier = earlier or []
        head |= (
            {"earlier": [{key: each[key] for key in ("machine", "left out")} for each in earlier]} if earlier else {}
        )
        session = Session(machine, DTYPES[dtype], progress, save, head | {"left out": []}, last)
        session.grown = [case for each in earlier for case in each["growth"]["cases"]]
        session.only = only or []
        todo = list(suites)
        while todo:
            part = WEIGHTS[todo[0]] / sum(WEIGHTS[name] for name in todo)
            session.end = time.monotonic() + part * (session.start + 60 * minutes - time.monotonic())
            {"layer": layer, "growth": growth, "models": models}[todo.pop(0)](session)
        session.results["load_after"] = load()
        session.results["seconds"] = round(time.monotonic() - session.start, 1)
        save(session.results)
    return session.results


def affordable(costs: dict, left: float) -> set:
    """Those of the cases with these costs in seconds that fit: together into the time that is left, and each into a
    quarter of it while there are four or more. The most expensive are left out first."""
    kept = dict(costs)
    while kept:
        worst = max(kept, key=kept.get)
        if sum(kept.values()) <= left and kept[worst] <= left / min(len(kept), 4):
            break
        del kept[worst]
    return set(kept)


def _too_long(cost, left):
    return "no time was left" if left <= 0 else f"would take about {duration(cost)} of the {duration(left)} left"


def check_layer(module: gspn.GSPN2d, x: torch.Tensor) -> None:
    """Raises WrongResult unless the layer agrees with the reference in float32 on the first image."""
    exact = copy.deepcopy(module).float()
    exact.backend = "reference"
    with torch.no_grad():
        found, expected = module(x[:1]).float(), exact(x[:1].float())
    error = ((found - expected).norm() / expected.norm()).item()
    if not error <= LIMITS[x.dtype]:
        raise WrongResult(
            f"the layer differs from the reference: relative error {error:.2e}, allowed {LIMITS[x.dtype]:.0e}"
        )


# -- layers --


def layer_call(name: str, x: torch.Tensor, grad: torch.Tensor | None = None) -> Callable:
    """A pass of a contender over a feature map: forward, or forward + backward where there is a gradient."""
    module = CONTENDERS[name].make(x.shape[1]).to(x.device, x.dtype)
    return eval_call(module, x) if grad is None else train_call(module, x, grad)


def parameters(channels: int) -> dict[str, int]:
    """Of each contender."""
    with torch.device("meta"):
        made = {name: contender.make(channels) for name, contender in CONTENDERS.items()}
    return {name: sum(p.numel() for p in module.parameters()) for name, module in made.items()}


def inputs(shape: tuple[int, ...], told: str, device, dtype) -> list[torch.Tensor]:
    """What a pass gets: a feature map, and in training the gradient of the output."""
    x = torch.randn(shape, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    return [x] if told == "forward" else [x, torch.ones_like(x)]


def layer_memory(name: str, shape: tuple[int, ...], told: str, dtype: torch.dtype, threads: int) -> float:
    """The peak MiB of a pass on the CPU, for `in_own_process`; libraries are warmed up on a small map."""
    torch.set_num_threads(threads)
    layer_call(name, *inputs((1, shape[1], 8, 8), told, "cpu", dtype))()
    return round(peak_extra_mib(layer_call(name, *inputs(shape, told, "cpu", dtype))), 1)


def layer(session: Session) -> None:
    """One layer with its projections on typical feature maps, forward and forward + backward."""
    rows = session.results["layer"] = []
    where = session.machine.device, session.dtype
    cases = [((session.results["batch"], *size), told) for size in LAYERS for told in PASSES]
    for number, (shape, told) in enumerate(cases):
        what = f"{'x'.join(map(str, shape))}, {told}"
        share = session.left / (len(cases) - number)
        if session.is_over("layer", what):
            continue
        given = inputs(shape, told, *where)
        check_layer(gspn.GSPN2d(shape[1]).to(*where), given[0])
        calls, once = {}, {}
        for name in CONTENDERS:
            expected = _expected(session, name, shape, told)
            if expected is not None and expected * CALLS > share:
                session.leave_out("layer", f"{name}, {what}", _too_long(expected * CALLS, share))
                continue

            def first(name=name, given=given):
                call = layer_call(name, *given)
                return call, session.seconds_of(call)

            if (measured := session.attempt("layer", name, what, first)) is not None:
                calls[name], once[name] = measured
        found = session.timed(calls, once, share / 2, OURS)
        rows.append({"shape": shape, "pass": told, "parameters": parameters(shape[1]), "contenders": found})
        session.save(session.results)


def _expected(session, name, shape, told):
    """Seconds of a call, by one on a map of a quarter of the side; None for small maps, which take no time."""
    batch, channels, *size = shape
    if min(size) < 64:
        return None
    small = (batch, channels, *(side // 4 for side in size))

    def smaller():
        call = layer_call(name, *inputs(small, told, session.machine.device, session.dtype))
        return min(session.seconds_of(call) for _ in range(2))

    seconds = session.attempt("layer", name, f"{'x'.join(map(str, small))}, {told}", smaller)
    return None if seconds is None else seconds * 16 ** CONTENDERS[name].power


# -- growth --


def growth(session: Session) -> None:
    """Time and peak memory of one layer against the size of the map, until time or memory do not suffice."""
    part = session.results["growth"] = {"channels": CHANNELS, "parameters": parameters(CHANNELS)}
    found: dict[tuple, dict] = {}
    for case in session.grown:
        found.setdefault((case["pass"], case["side"]), {}).update(case["contenders"])
    cases = [{"side": side, "pass": told, "contenders": row} for (told, side), row in found.items()]
    part |= {"cases": cases, "exponents": {}, "crossovers": {}}
    _fit(part)
    running = [(told, name) for told in PASSES for name in session.only or CONTENDERS]
    known: dict[tuple, tuple[float, float | None]] = {}  # of the map before: seconds of a call, MiB
    side = FIRST_SIDE
    while running:
        there = [(told, name) for told, name in running if name in found.get((told, side), ())]
        new = _still_running(session, [case for case in running if case not in there], known, side)
        for told in PASSES:
            names = [name for case, name in new if case == told]
            measured = _grown(session, names, side, told, known) if names else {}
            if measured and (told, side) not in found:
                found[told, side] = {}
                part["cases"].append({"side": side, "pass": told, "contenders": found[told, side]})
            if measured:
                found[told, side].update(measured)
                _fit(part)
                session.save(session.results)
            new = [case for case in new if case[0] != told or case[1] in measured]
        for told, name in there:
            row = found[told, side][name]
            known[told, name] = row["ms"][1] / 1e3, row["extra_mib"]
        running = new + there
        side *= 2


def _still_running(session, running, known, side):
    """Those of the running cases that go on to a map of `side`; of the others it is noted why they end."""
    running = [case for case in running if side <= session.last_sides[case[0]]]
    grown = {case: 4 ** CONTENDERS[case[1]].power for case in running}
    costs = {case: CALLS * known[case][0] * grown[case] if case in known else 0.0 for case in running}
    fits = affordable(costs, session.left)
    one = session.results["batch"] * CHANNELS * side**2 * session.dtype.itemsize / MIB
    room, goes_on = SHARE * session.machine.free_mib(), []
    for case in running:
        told, name = case
        # the inputs, and what grows with the pixels: also in attention, whose matrix of all pairs is never in memory
        needed = one * (1 if told == "forward" else 2) + 4 * (known.get(case, (0, 0))[1] or 0)
        what = f"{name}, {told}, from {side}x{side} on"
        if case not in fits:
            session.leave_out("growth", what, _too_long(costs[case], session.left))
        elif needed > room:
            why = f"would take about {needed:,.0f} MiB; {room:,.0f} could be used"
            session.leave_out("growth", what, why)
        else:
            goes_on.append(case)
    return goes_on


def _grown(session, names, side, told, known):
    """Measures the contenders on a map of `side`; those that fail are missing in what it returns."""
    shape, what = (session.results["batch"], CHANNELS, side, side), f"{told}, {side}x{side}"
    memory, calls, once = {}, {}, {}
    for name in names if session.on_cpu and sys.platform == "linux" else ():
        if session.is_over("growth", f"{name}, {what}"):
            memory[name] = None
            continue
        arguments = (layer_memory, name, shape, told, session.dtype, session.machine.threads)
        memory[name] = session.attempt("growth", name, what, lambda arguments=arguments: in_own_process(*arguments))
    where = session.machine.device, session.dtype
    given = inputs(shape, told, *where)
    if side <= CHECKED and OURS in names:
        check_layer(gspn.GSPN2d(CHANNELS).to(*where), given[0])
    for name in names:
        if memory.get(name, 0) is None or session.is_over("growth", f"{name}, {what}"):
            continue

        def first(name=name):
            call = layer_call(name, *given)
            seconds = session.seconds_of(call)
            if not session.on_cpu:
                memory[name] = session.machine.extra_mib(call)
                seconds = session.seconds_of(call)  # the first one compiled
            return call, seconds

        if (measured := session.attempt("growth", name, what, first)) is not None:
            calls[name], once[name] = measured
            known[told, name] = once[name], memory.get(name)
    found = session.timed(calls, once, 2.0, OURS)
    return {name: row | {"extra_mib": memory.get(name)} for name, row in found.items()}


def exponent(sides: list[int], values: list[float]) -> float | None:
    """p in values ~ pixels^p over the three largest maps; None for fewer or where there is nothing to see."""
    points = [(2 * np.log(side), np.log(value)) for side, value in zip(sides, values, strict=True) if value][-3:]
    return round(float(np.polyfit(*zip(*points, strict=True), 1)[0]), 3) if len(points) == 3 else None


def crossover(sides: list[int], ratios: list[float]) -> float | None:
    """The side of the map from which on a contender takes longer than GSPN, up to the largest one measured: the
    smallest one where it does everywhere, else between two of them (linear in the logarithms). None where it is
    faster at the largest."""
    if not ratios or ratios[-1] <= 1:
        return None
    behind = [i for i, ratio in enumerate(ratios) if ratio <= 1]
    if not behind:
        return float(sides[0])
    at = behind[-1]
    logs = np.log(ratios[at : at + 2])
    return round(float(np.exp(np.interp(0, logs, np.log(sides[at : at + 2])))), 1)


def _fit(part):
    """The cases in order, with exponents and crossovers."""
    part["cases"].sort(key=lambda case: (case["side"], PASSES.index(case["pass"])))
    for told in PASSES:
        part["exponents"][told], part["crossovers"][told] = _fits(part["cases"], told)


def _fits(cases, told):
    """Exponents of time and memory, and crossovers against GSPN, of all contenders of a pass."""
    rows = [(case["side"], case["contenders"]) for case in cases if case["pass"] == told]
    exponents, crossovers = {}, {}
    for name in CONTENDERS:
        own = [(side, row[name]) for side, row in rows if name in row]
        sides = [side for side, _ in own]
        exponents[name] = {
            "time": exponent(sides, [row["ms"][1] for _, row in own]),
            "memory": exponent(sides, [row["extra_mib"] or 0 for _, row in own]),
        }
        both = [(side, row["ratio"][1]) for side, row in own if "ratio" in row]
        if name != OURS and both:
            sides, ratios = map(list, zip(*both, strict=True))
            crossovers[name] = {"behind from side": crossover(sides, ratios), "compared up to side": sides[-1]}
    return exponents, crossovers


# -- models --


def build(name: str, side: int) -> nn.Module:
    """A classifier of 1,000 classes for images of `side`, in evaluation mode."""
    if name in TIMM:
        fixed = {} if name == "ConvNeXt-T" else {"img_size": side}
        return import_module("timm").create_model(TIMM[name], **fixed).eval()
    return gspn.create_model(name).eval()


def model_memory(name: str, batch: int, side: int, dtype: torch.dtype, threads: int) -> float:
    """The peak MiB of an evaluation on the CPU beyond weights and images, for `in_own_process`."""
    torch.set_num_threads(threads)
    _model_call(build("gspn_micro", 32), 1, 32, "cpu", dtype)()  # what libraries take at first
    return round(peak_extra_mib(_model_call(build(name, side), batch, side, "cpu", dtype)), 1)


def _model_call(model, batch, side, device, dtype):
    model = model.to(device, dtype, memory_format=torch.channels_last)
    return eval_call(model, *inputs((batch, 3, side, side), "forward", device, dtype))


def macs(name: str, side: int) -> int:
    """Multiply-adds for one image, as COUNTED says. Only shapes pass through the model."""
    with torch.device("meta"):
        model, x = build(name, side), torch.empty(1, 3, side, side)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() // 2


def models(session: Session) -> None:
    """Whole classifiers in evaluation: images/s, peak memory, parameters, multiply-adds."""
    part = session.results["models"] = {"macs": COUNTED, "cases": []}
    names = [*MODELS]
    try:
        import_module("timm")
        names += TIMM
    except Exception as error:  # also what torchvision raises where it does not fit torch
        why = f'timm cannot be imported ({error}); pip install "gspn[timm]" installs it'
        session.leave_out("models", ", ".join(TIMM), why)
    known: dict[str, tuple[float, int]] = {}  # of the size before: seconds of a call, multiply-adds
    for side in SIDES:
        counted = {name: macs(name, side) for name in names}
        costs = {n: CALLS * known[n][0] * counted[n] / known[n][1] if n in known else 0.0 for n in names}
        fits = affordable(costs, session.left)
        for name in names:
            if name not in fits:
                session.leave_out("models", f"{name}, from {side}x{side} on", _too_long(costs[name], session.left))
        names = [name for name in names if name in fits]
        if names:
            found = _models_at(session, names, side, known, counted)
            if found:
                part["cases"].append({"side": side, "models": found})
                session.save(session.results)
            names = [name for name in names if name in found]


def _models_at(session, names, side, known, counted):
    batch, threads = session.results["batch"], getattr(session.machine, "threads", None)
    rows, calls, once = {}, {}, {}
    for name in names:
        if session.is_over("models", f"{name}, {side}x{side}"):
            continue

        def first(name=name):
            model, memory = build(name, side), None
            parameters = sum(p.numel() for p in model.parameters())
            if session.on_cpu and sys.platform == "linux":
                memory = in_own_process(model_memory, name, batch, side, session.dtype, threads)
            call = _model_call(model, batch, side, session.machine.device, session.dtype)
            seconds = session.seconds_of(call)
            if not session.on_cpu:
                memory = session.machine.extra_mib(call)
                seconds = session.seconds_of(call)  # the first one compiled
            return call, seconds, {"parameters": parameters, "macs": counted[name], "extra_mib": memory}

        if (measured := session.attempt("models", name, f"{side}x{side}", first)) is not None:
            calls[name], once[name], rows[name] = measured
            known[name] = once[name], counted[name]
    for name, times in session.timed(calls, once, max(session.left, 0) / 4, "gspn_tiny").items():
        rows[name] |= times | {"images/s": float(f"{1e3 * batch / times['ms'][1]:.4g}")}
    return rows
