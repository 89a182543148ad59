"""The GSPN layer on a GPU: the scan against the copy bandwidth, the layer against others, whole models. One command:

    python -m benchmarks.speed.layer_gpu --out DIR [--quick] [--only scan layer ...] [--official FOLDER] [--minutes 9]

Every contender is checked against the reference before it is timed. The copy bandwidth is measured first; shares are
of it. A case that the machine cannot run is recorded as not measured, with the reason. DIR gets layer-gpu.json, written
after every case (``--resume`` measures the cases that are left), layer-gpu.md and figures. ``--rehearse`` runs the same
path at toy sizes on the CPU under Triton's interpreter, for a machine without a GPU.
"""

import argparse
import os
import sys
import time
from pathlib import Path

SECTIONS = ("gate", "scan", "layer", "models")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed"))
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: the goals and the crossover")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument(
        "--tune", action="store_true", help="also launch plans; only these if `--only` names no section"
    )
    parser.add_argument("--minutes", type=float, default=60, help="begin no case after this many minutes")
    parser.add_argument("--resume", action="store_true", help="keep the cases that the file has already")
    parser.add_argument("--official", type=Path, help="your checkout of the released kernel, to build and time")
    parser.add_argument("--commit", default="", help="the commit to record if the sources have no git history")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU; no measurement")
    options, start = parser.parse_args(), time.monotonic()
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is imported, which is later
    import torch

    if not options.rehearse and not torch.cuda.is_available():
        print("torch finds no GPU; --rehearse runs the same path on the CPU.", file=sys.stderr)
        return 2
    from benchmarks.harness import gpu_harness
    from benchmarks.speed import suite_gpu

    machine = gpu_harness.Rehearsal() if options.rehearse else gpu_harness.Gpu()
    try:
        content = suite_gpu.measure_all(machine, options)
    except gpu_harness.DeviceLost as lost:
        print(f"This process has lost the device ({lost}); a new process continues.", flush=True)
        left = options.minutes - (time.monotonic() - start) / 60
        again = [*sys.argv[1:], "--resume", "--minutes", str(left)]
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.speed.layer_gpu", *again])
    for goal in content["goals"]:
        print(f"{goal['verdict']:>12}: {goal['goal']}: {goal['measured'] or '-'} (wanted {goal['wanted']})")
    for wrong in content["wrong"]:
        print(f"WRONG RESULTS: {wrong}")
    if content["left"]:
        print(f"{len(content['left'])} cases left when the time was up; --resume measures them")
    verdicts = [goal["verdict"] for goal in content["goals"]]
    told = ", ".join(f"{verdicts.count(v)} {v}" for v in ("reached", "missed", "not measured"))
    print(f"goals: {told}; wrong results: {len(content['wrong'])}; cases left: {len(content['left'])}")
    return 1 if content["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
