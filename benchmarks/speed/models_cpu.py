"""Whole models on a CPU: images/s and peak memory, against the same backbone with other mixers and on the reference.

python -m benchmarks.speed.models_cpu --out benchmarks/results/speed/models-cpu.json [--threads 1 2] [--profile]

In bfloat16 models are evaluated with weights of that type and trained with float32 weights by autocast; the reference
backend is measured in float32 alone.
"""

import argparse
import itertools
import json
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import gspn
from benchmarks.contenders import peers
from benchmarks.harness import harness
from gspn.layers import GSPNBlock

CASES = [("gspn_micro", 28, 1, dict(num_classes=10, in_chans=1)), ("gspn_tiny", 224, 3, dict(num_classes=1000))]
BATCHES = (1, 8)
RIVALS = {
    "attention": peers.Attention,
    "linear attention": peers.LinearAttention,
    "relu attention + 5x5": peers.LinearAttentionConvolution,
}
DTYPES = {"float32": ("gspn", "reference", *RIVALS), "bfloat16": ("gspn", *RIVALS)}  # and the mixers measured in each


def build(case, mixer):
    """The model with its mixers exchanged; everything else, and the seed, is the same."""
    name, _, _, arguments = case
    torch.manual_seed(0)
    model = gspn.create_model(name, **arguments, backend="reference" if mixer == "reference" else None)
    if mixer in RIVALS:
        for block in [m for m in model.modules() if isinstance(m, GSPNBlock)]:
            block.gspn = RIVALS[mixer](block.gspn.channels)
    return model.to(memory_format=torch.channels_last)


def call_of(case, batch, mixer, train, dtype="float32"):
    _, side, channels, _ = case
    model = build(case, mixer).train(train)
    x = torch.randn(batch, channels, side, side).to(memory_format=torch.channels_last)
    if not train:
        model, x = model.to(getattr(torch, dtype)), x.to(getattr(torch, dtype))

        def run():
            with torch.inference_mode():
                model(x)

        return run
    optimizer = torch.optim.AdamW(model.parameters())
    target = torch.zeros(batch, dtype=torch.long)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = torch.nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def measure(case, batch, train, dtype, threads, rounds):
    torch.set_num_threads(threads)
    calls = {mixer: call_of(case, batch, mixer, train, dtype) for mixer in DTYPES[dtype]}
    found = harness.summary(harness.interleaved(calls, rounds, threads), "gspn")
    for row in found.values():
        row["images/s"] = round(1e3 * batch / row["ms"][1], 1)
    return found


def memory_of(case_number, batch, train, mixer, dtype):
    torch.set_num_threads(1)
    call_of(("gspn_micro", 8, 1, dict(num_classes=2, in_chans=1)), 1, mixer, train, dtype)()
    call = call_of(CASES[case_number], batch, mixer, train, dtype)
    print(json.dumps({"mib": round(harness.peak_extra_mib(call), 1)}))


def where_the_time_goes(case, batch, train):
    """Share of each kind of operation in the model's time on one thread: gspn's own and torch's."""
    torch.set_num_threads(1)
    call = call_of(case, batch, "gspn", train)
    call()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(3):
            call()
    total = sum(e.self_cpu_time_total for e in recorded.key_averages())
    rows = sorted(recorded.key_averages(), key=lambda e: -e.self_cpu_time_total)[:14]
    return {e.key: round(e.self_cpu_time_total / total, 3) for e in rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed/models-cpu.json"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cases", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--profile", action="store_true", help="only print where the time goes")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        memory_of(*json.loads(options.memory_of))
        return
    if options.profile:
        for number in options.cases:
            for train in (False, True):
                print(CASES[number][0], "train" if train else "eval", where_the_time_goes(CASES[number], 8, train))
        return
    content = {"what": "whole models", "environment": harness.environment(), "rounds": options.rounds, "cases": []}
    for number, batch, train, dtype in itertools.product(options.cases, BATCHES, (False, True), options.dtypes):
        case = CASES[number]
        row = {"model": case[0], "side": case[1], "batch": batch, "pass": "train" if train else "eval", "dtype": dtype}
        for threads in options.threads:
            found = measure(case, batch, train, dtype, threads, options.rounds)
            row[f"{threads} thread{'s' * (threads > 1)}"] = found
            times = ", ".join(f"{n} {v['ratio'][1]:.2f}x" for n, v in found.items() if n != "gspn")
            told = (row["model"], batch, row["pass"], dtype, f"{threads}t: {found['gspn']['images/s']} images/s;")
            print(*told, times, flush=True)
        if not options.no_memory:
            row["peak extra MiB"] = {
                mixer: harness.in_fresh_process(
                    "benchmarks.speed.models_cpu", "--memory-of", json.dumps([number, batch, train, mixer, dtype])
                )["mib"]
                for mixer in DTYPES[dtype]
            }
            print("   peak extra MiB:", row["peak extra MiB"], flush=True)
        if not train:
            row["parameters"] = {
                mixer: sum(parameter.numel() for parameter in build(case, mixer).parameters())
                for mixer in DTYPES[dtype]
            }
        content["cases"].append(row)
        harness.write_json(options.out, content)


if __name__ == "__main__":
    main()
