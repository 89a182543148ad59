"""Compiles the kernels of the scan's cases in several processes at once, into Triton's cache on disk.

A part of ``python -m benchmarks.speed.layer_gpu``. A kernel takes seconds to compile and milliseconds to time: on a
fresh machine, compiling one kernel after the other would take most of the minutes. Each process runs its share of the
cases on two images under the launch plan of the full size. Nothing depends on it: a missing kernel is compiled when it
is needed.

    python -m benchmarks.speed.warm_gpu SHARE JOBS [--quick] [--tune]     one such process
"""

import argparse
import os
import subprocess
import sys
import time

import torch

from benchmarks.harness import gpu_harness
from benchmarks.harness.harness import ROOT
from benchmarks.speed import cases_gpu, scan_gpu, tune_gpu
from benchmarks.speed.cases_gpu import Case
from gspn.kernels import triton

LIMIT_S = 150
LARGEST_GIB = 4  # of a case on two images; larger ones are left to the measurement


def start(quick: bool, tune: bool) -> dict:
    """Runs one process for every two cores, at most twelve, and waits for them; what became of them."""
    jobs = max(1, min(12, (os.cpu_count() or 2) // 2))
    arguments = [str(jobs), *(["--quick"] if quick else []), *(["--tune"] if tune else [])]
    begun = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.speed.warm_gpu", str(share), *arguments],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )
        for share in range(jobs)
    ]
    statuses = []
    for process in processes:
        try:
            statuses.append(process.wait(max(1, LIMIT_S - (time.monotonic() - begun))))
        except subprocess.TimeoutExpired:
            process.kill()
            statuses.append(process.wait())
    return {"processes": jobs, "statuses": statuses}


def compile_share(machine, cases: list[Case], tune: bool) -> int:
    """Calls every case once on two images, with the plan of its full size and, to tune, with that plan's neighbours."""
    done = 0
    for case in cases:
        small = case._replace(shape=(min(2, case.shape[0]), *case.shape[1:]))
        if small.resident_gib > LARGEST_GIB:
            continue
        inputs = scan_gpu.problem(small, machine.device)
        arguments = (inputs.x, inputs.gate, inputs.logits)
        plan = tune_gpu.chosen(case, machine.processors)
        for p in [plan, *(tune_gpu.candidates(plan, max(case.shape[2:]), case.train) if tune else [])]:

            def call(p=p, case=case, inputs=inputs, arguments=arguments):
                if not case.train:
                    return triton.gated_scan(*arguments, cases_gpu.DIRECTIONS, None, plan=p)
                h = torch.zeros_like(inputs.gate)
                return triton.gated_scan_backward(inputs.grad, *arguments, h, cases_gpu.DIRECTIONS, None, plan=p)

            done += gpu_harness.attempt(machine, call)[1] is None
        machine.free()
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("share", type=int)
    parser.add_argument("jobs", type=int)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args()
    cases = tune_gpu.cases(False) if options.tune else cases_gpu.cases(options.quick, False)
    compile_share(gpu_harness.Gpu(), cases[options.share :: options.jobs], options.tune)
    return 0


if __name__ == "__main__":
    sys.exit(main())
