"""The GSPN layer on a CPU against its alternatives: time, and peak memory beyond the inputs.

    python -m benchmarks.speed.layer_cpu --out benchmarks/results/speed/layer-cpu.json [--rounds 15] [--threads 1]

Seven sizes, forward and forward + backward, float32 and bfloat16, one and two threads. Every contender is checked
against float64 before it is timed. ``--before`` compares the kernel with an earlier build of it; ``--prototype`` names
a folder with the built libraries of the prototype.
"""

import argparse
import copy
import json
from pathlib import Path

import torch

import gspn
from benchmarks.contenders import peers
from benchmarks.harness import harness
from benchmarks.speed import models_cpu
from gspn import layers
from gspn.kernels import cpu, reference

SIZES = [  # B, C, H, W, S
    (1, 144, 56, 56, 8),
    (1, 576, 14, 14, 8),
    (4, 384, 14, 14, 8),
    (1, 64, 256, 256, 8),
    (2, 640, 64, 64, 20),
    (2, 640, 64, 64, 80),
    (1, 320, 32, 32, 16),
]
SMALL_SIZES = [  # without gradients
    (1, 16, 4, 4, 8),
    *((1, 64, side, side, 8) for side in (8, 16, 32)),
    (1, 384, 14, 14, 8),
    (1, 576, 14, 14, 8),
    (4, 384, 14, 14, 8),
    (1, 144, 56, 56, 8),
]
COMPACT_SIZE = (1, 32, 56, 56, 8)  # few channels that share weights, as in GSPN-2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMS_OF_THE_LAYER = ("gspn", "gspn, kernel alone", "unfused", "unfused, tuned", "prototype", "prototype, unfused")
SLOW_TOKENS = 20_000  # beyond it attention, like the slow forms of the layer always, gets few rounds of its own


def problem(size, dtype):
    batch, channels, height, width, features = size
    torch.manual_seed(0)
    layer = gspn.GSPN2d(channels, proxy_dim=features).to(dtype)
    x = torch.randn(batch, channels, height, width).to(dtype).to(memory_format=torch.channels_last)
    return layer, x


def contenders(size, dtype, train, prototype=None, threads=1, only=None):
    """Name to a call without arguments that does one forward or one forward + backward and returns the output."""
    layer, x = problem(size, dtype)
    eager = copy.deepcopy(layer)
    eager.backend = "reference"
    channels = x.shape[1]
    modules = {
        "gspn": lambda: layer,
        "reference": lambda: eager,
        "unfused": lambda: peers.Unfused(layer),
        "attention": lambda: peers.Attention(channels).to(dtype),
        "linear attention": lambda: peers.LinearAttention(channels).to(dtype),
    }
    calls = {}
    for name, make in modules.items():
        if only in (None, name):
            calls[name] = harness.train_call(make(), x) if train else harness.eval_call(make(), x)
    if dtype == torch.float32:
        if only in (None, "unfused, tuned"):
            tuned = peers.TunedUnfused(layer, x)
            grad = torch.ones_like(x)
            calls["unfused, tuned"] = (lambda: (tuned.forward(), tuned.backward(grad))[0]) if train else tuned.forward
        if only is None:
            alone = peers.KernelAlone(layer, x)
            calls["gspn, kernel alone"] = (lambda: alone.train(torch.ones_like(x))) if train else alone.forward
        if prototype and only is None:
            old = peers.Prototype(prototype, layer, x, threads)
            ones = torch.ones_like(x)
            calls["prototype"] = (lambda: old.train(ones)) if train else old.forward
            if not train:
                calls["prototype, unfused"] = old.unfused_forward
    return calls


def check(size, dtype, calls):
    """The correctness gate: every form of the layer against the reference in float64."""
    layer, x = problem(size, dtype)
    small = x[:1]
    exact = layer.double()
    exact.backend = "reference"
    with torch.no_grad():
        expected = exact(small.double())
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for name in FORMS_OF_THE_LAYER:
        if name in calls:
            got = calls[name]().detach()[:1].double()
            error = ((got - expected).abs().max() / expected.abs().max()).item()
            if not error < tolerance:
                raise AssertionError(f"{name} at {size} in {dtype} is wrong: relative error {error:.2e}")


def measure(size, dtype_name, train, threads, rounds, prototype):
    dtype = DTYPES[dtype_name]
    torch.set_num_threads(threads)
    calls = contenders(size, dtype, train, prototype, threads)
    if not train:
        check(size, dtype, calls)
    tokens = size[2] * size[3]
    slow = [n for n in calls if n in ("reference", "unfused") or (n == "attention" and tokens > SLOW_TOKENS)]
    few = {name: calls.pop(name) for name in slow}
    result = harness.summary(harness.interleaved(calls, rounds, threads), "gspn")
    if dtype_name == "float32" and threads == 1:
        for name, call in few.items():
            count = 1 if tokens > SLOW_TOKENS else 3
            pair = harness.interleaved({"gspn": calls["gspn"], name: call}, count, threads)
            result[name] = harness.summary(pair, "gspn")[name] | {"rounds": count}
    return result


def crossover(rounds):
    """At which S do gradients cost less unfused? Both recompute from x and the proxy; one thread, float32."""
    torch.set_num_threads(1)
    rows = []
    for batch, channels, height, width in ((1, 144, 56, 56), (1, 320, 32, 32)):
        for features in (20, 40, 80, 160, 320):
            layer, x = problem((batch, channels, height, width, features), torch.float32)
            output, skip = (t.detach() for t in layer._merged_projections())
            weights, entry = layer.weight_proj.detach(), layer.input_proj.detach()
            with torch.no_grad():
                arguments = (
                    torch.ones_like(x),
                    x,
                    layer.proxy_proj(x),
                    weights,
                    entry,
                    output,
                    skip,
                    [0, 1, 2, 3],
                    None,
                )
            calls = {
                "gspn": lambda a=arguments: cpu.propagate_backward(*a),
                "unfused": lambda a=arguments: reference.propagate_backward(
                    *a, 0, cpu.gated_scan, cpu.gated_scan_backward
                ),
            }
            found = harness.summary(harness.interleaved(calls, rounds, 1), "gspn")
            rows.append({"size (B,C,H,W,S)": (batch, channels, height, width, features), "1 thread": found})
            print(rows[-1]["size (B,C,H,W,S)"], f"unfused takes {found['unfused']['ratio'][1]:.2f}x", flush=True)
    return rows


def scaling(rounds):
    """How much faster is the layer on two threads than on one, and in bfloat16 than in float32?

    Wall time, so on an idle machine only.
    """
    rows = []
    for size in SIZES:
        for train in (False, True):
            layers = {name: contenders(size, dtype, train, only="gspn")["gspn"] for name, dtype in DTYPES.items()}

            def on(threads, dtype, layers=layers):
                torch.set_num_threads(threads)
                layers[dtype]()

            for dtype in DTYPES:
                calls = {"gspn": lambda dtype=dtype: on(2, dtype), "one thread": lambda dtype=dtype: on(1, dtype)}
                if dtype != "float32":
                    calls["float32"] = lambda: on(2, "float32")
                found = harness.summary(harness.interleaved(calls, rounds, 2), "gspn")
                row = {"size (B,C,H,W,S)": size, "dtype": dtype, "pass": "train" if train else "forward"}
                rows.append(row | {"2 threads": found})
                ratios = {name: f"{found[name]['ratio'][1]:.2f}x" for name in list(calls)[1:]}
                print(size, dtype, row["pass"], f"beside two threads: {ratios}", flush=True)
    return rows


def layer_options(rounds):
    """What the options of the layer cost beside the plain layer: one thread, float32."""
    torch.set_num_threads(1)
    forms = {"gspn": {}, "average": dict(average=True), "center": dict(center=True)}
    rows = []
    for size in (SIZES[i] for i in (0, 1, 3)):
        _, x = problem(size, torch.float32)
        layers = {name: gspn.GSPN2d(size[1], proxy_dim=size[4], **form) for name, form in forms.items()}
        for name, call in (("forward", harness.eval_call), ("train", harness.train_call)):
            calls = {form: call(layer, x) for form, layer in layers.items()}
            row = {"size (B,C,H,W,S)": size, "pass": name}
            rows.append(row | {"1 thread": harness.summary(harness.interleaved(calls, rounds, 1), "gspn")})
            ratios = ", ".join(f"{form} {v['ratio'][1]:.2f}x" for form, v in rows[-1]["1 thread"].items())
            print(size, name, ratios, flush=True)
    return rows


def small_maps(rounds):
    """The layer without gradients where a map has few pixels, against itself by the usual way through torch's dispatch,
    attention and linear attention; gspn_micro at 28x28 likewise. One thread."""
    torch.set_num_threads(1)
    rows = []

    def by_the_usual_way(call):
        def run():
            lean, layers.propagate_lean = layers.propagate_lean, lambda *arguments: None
            try:
                return call()
            finally:
                layers.propagate_lean = lean

        return run

    def compare(case, calls):
        calls["usual way"] = by_the_usual_way(calls["gspn"])
        rows.append(case | {"1 thread": harness.summary(harness.interleaved(calls, rounds, 1), "gspn")})
        print(*case.values(), {name: round(v["ratio"][1], 2) for name, v in rows[-1]["1 thread"].items()}, flush=True)

    for size in SMALL_SIZES:
        for name, dtype in DTYPES.items():
            layer, x = problem(size, dtype)
            others = {"attention": peers.Attention, "linear attention": peers.LinearAttention}
            calls = {"gspn": harness.eval_call(layer, x)}
            calls |= {other: harness.eval_call(kind(size[1]).to(dtype), x) for other, kind in others.items()}
            compare({"size (B,C,H,W,S)": size, "dtype": name}, calls)
    for case in models_cpu.CASES[:1]:
        calls = {m: models_cpu.call_of(case, 1, m, False) for m in ("gspn", "attention", "linear attention")}
        compare({"model": case[0], "side": case[1], "batch": 1}, calls)
    return rows


def kernel_forms(rounds, before):
    """The kernel alone with weights for each channel ("gspn") against weights that all channels share and, in bfloat16,
    against float32; with `before`, against another build of it too. One thread."""
    torch.set_num_threads(1)
    now = cpu._load()
    rows = []

    def on(library, call):
        def run():
            cpu._loaded = library
            try:
                return call()
            finally:
                cpu._loaded = now

        return run

    for size in (*SIZES, COMPACT_SIZE):
        for name, dtype in DTYPES.items():
            for train in (False, True):
                calls = {"gspn": kernel_call(size, dtype, size[1], train), "shared": kernel_call(size, dtype, 1, train)}
                if before:
                    calls |= {f"{form}, before": on(before, call) for form, call in calls.items()}
                if dtype != torch.float32:
                    calls["float32"] = kernel_call(size, torch.float32, size[1], train)
                row = {"size (B,C,H,W,S)": size, "dtype": name, "pass": "train" if train else "forward"}
                rows.append(row | {"1 thread": harness.summary(harness.interleaved(calls, rounds, 1), "gspn")})
                ratios = {n: round(v["ratio"][1], 2) for n, v in rows[-1]["1 thread"].items()}
                print(*row.values(), ratios, flush=True)
    return rows


def kernel_call(size, dtype, groups, train):
    """A call of the kernel on what a layer would hand it, after a check against float64 on a part of the map."""
    batch, channels, height, width, features = size
    torch.manual_seed(0)
    layer = gspn.GSPN2d(channels, groups=groups, proxy_dim=features)
    maps = [torch.randn(batch, n, height, width).to(dtype) for n in (channels, features, channels)]
    x, proxy, grad = (t.to(memory_format=torch.channels_last) for t in maps)
    output, skip = (t.detach() for t in layer._merged_projections())
    projections = (layer.weight_proj.detach(), layer.input_proj.detach(), output, skip)
    part = [t[:1, :, :15, :17] for t in (grad, x, proxy)]
    exact = [t.double() for t in (*part, *projections)]
    found = (
        cpu.propagate(*part[1:], *projections, [0, 1, 2, 3]),
        *cpu.propagate_backward(*part, *projections, [0, 1, 2, 3]),
    )
    expected = (
        reference.propagate(*exact[1:], [0, 1, 2, 3], None),
        *reference.propagate_backward(*exact, [0, 1, 2, 3], None),
    )
    for f, e in zip(found, expected, strict=True):
        if e is not None:
            error = ((f.double() - e).abs().max() / e.abs().max()).item()
            if not error < {torch.float32: 1e-5, torch.bfloat16: 5e-3}[dtype]:
                raise AssertionError(f"the kernel at {size} in {dtype} is wrong: relative error {error:.2e}")
    y = torch.empty_like(x)

    def forward():
        return cpu.propagate(x, proxy, *projections, [0, 1, 2, 3], out=y)

    def forward_and_backward():
        return forward(), cpu.propagate_backward(grad, x, proxy, *projections, [0, 1, 2, 3])

    return forward_and_backward if train else forward


def memory(size, dtype_name, train):
    """Peak MiB beyond the inputs and the parameters, each contender in a process of its own, one thread."""
    names = ["gspn", "reference", "unfused", "unfused, tuned", "linear attention", "attention"]
    arguments = ["--memory-of", json.dumps([size, dtype_name, train])]
    return {
        name: harness.in_fresh_process("benchmarks.speed.layer_cpu", *arguments, name)["mib"]
        for name in names
        if not (name == "attention" and size[2] * size[3] > SLOW_TOKENS)
    }


def memory_of(size, dtype_name, train, name):
    """Peak of one call, buffers that the contender keeps included; libraries are warmed up at a small size first."""
    torch.set_num_threads(1)
    dtype = DTYPES[dtype_name]
    for call in contenders((1, 16, 4, 4, 2), dtype, train).values():
        call()
    _, x = problem(size, dtype)  # the inputs, resident before the peak is taken; the contender makes its own copy
    del x
    kept = {}

    def run():
        kept["call"] = contenders(size, dtype, train, only=name)[name]
        return kept["call"]()

    inputs = 2 if train else 1  # x, and the gradient that comes in
    batch, channels, height, width, _ = size
    fixed = inputs * batch * channels * height * width * dtype.itemsize / 2**20
    print(json.dumps({"mib": round(max(harness.peak_extra_mib(run) - fixed, 0), 1)}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed/layer-cpu.json"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--prototype", help="the folder with the prototype's bwdlib.py and built libraries")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES))
    parser.add_argument("--sizes", type=int, nargs="+", default=list(range(len(SIZES))), help="indices into SIZES")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--crossover", action="store_true", help="only gradients, over S: fused against unfused")
    parser.add_argument(
        "--scaling", action="store_true", help="only the layer, on two threads against one, and its dtypes"
    )
    parser.add_argument("--small", action="store_true", help="only small maps without gradients")
    parser.add_argument("--options", action="store_true", help="only the layer, with its options against without")
    parser.add_argument("--kernel", action="store_true", help="only the kernel: its weights shared, its dtypes")
    parser.add_argument("--before", type=Path, help="with --kernel: the library of an earlier build, to compare")
    parser.add_argument("--note", help="with --kernel: what else the machine did, for the file")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        memory_of(*json.loads(options.memory_of[0]), options.memory_of[1])
        return
    if options.kernel:
        before = options.before and cpu._open(options.before)
        if before and not before[0]:
            parser.error(f"--before {options.before}: {before[1]}")
        content = {"environment": harness.environment(), "rounds": options.rounds, "note": options.note}
        harness.write_json(options.out, content | {"cases": kernel_forms(options.rounds, before)})
        return
    modes = {"crossover": crossover, "scaling": scaling, "small": small_maps, "options": layer_options}
    chosen = [run for name, run in modes.items() if getattr(options, name)]
    if chosen:
        rows = chosen[0](options.rounds)
        harness.write_json(options.out, {"environment": harness.environment(), "rounds": options.rounds, "cases": rows})
        return
    content = {"what": "GSPN layer, all contenders with their projections", "environment": harness.environment()}
    content |= {"rounds": options.rounds, "cases": []}
    for size in (SIZES[i] for i in options.sizes):
        for dtype_name in options.dtypes:
            for train in (False, True):
                row = {"size (B,C,H,W,S)": size, "dtype": dtype_name, "pass": "train" if train else "forward"}
                x_mib = size[0] * size[1] * size[2] * size[3] * DTYPES[dtype_name].itemsize / 2**20
                row["x_mib"] = round(x_mib, 2)
                for threads in options.threads:
                    found = measure(size, dtype_name, train, threads, options.rounds, options.prototype)
                    row[f"{threads} thread{'s' * (threads > 1)}"] = found
                    times = ", ".join(f"{n} {v['ratio'][1]:.2f}x" for n, v in found.items() if n != "gspn")
                    print(
                        size,
                        dtype_name,
                        row["pass"],
                        f"{threads}t: gspn {found['gspn']['ms'][1]:.2f} ms;",
                        times,
                        flush=True,
                    )
                if not options.no_memory and dtype_name == "float32":
                    row["peak extra MiB"] = memory(size, dtype_name, train)
                    print("   peak extra MiB:", row["peak extra MiB"], flush=True)
                content["cases"].append(row)
                harness.write_json(options.out, content)


if __name__ == "__main__":
    main()
