"""A few small scans on the GPU, every kind of launch once, for tools that watch a process and slow it down:

    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/tools/triton_smoke.py

Ends with 1 if a result is wrong. Every tensor gets memory of its own, so that what reaches beyond one is seen.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.triton_cases import Case, check_line_scans, check_propagate, check_scans, force

from gspn.kernels.triton.launch import INTERPRETED
from gspn.kernels.triton.plan import Plan

BF16 = torch.bfloat16
SCANS = [
    (Case(2, 12, 9, 7, 12), Plan(4, 4, 8, 1, 2)),
    (Case(1, 20, 7, 9, 2, dtype=BF16), Plan(16, 1, 4, 2, 1)),  # groups in parts, borders through shared memory
    (Case(1, 8, 23, 11, 8, directions=(0, 2), layout="sliced"), Plan(16, 1, 8, 1, 2, 3)),  # tiles, chained
    (Case(1, 6, 5, 13, 2, segment=4, layout="channels_first"), Plan(4, 4, 8, 1, 1)),
    (Case(1, 3, 1, 1, 3), Plan(1, 1, 4, 1, 1)),
]
TOYS = [(Case(1, 2, 5, 2, 1, directions=(0,)), Plan(4, 1, 1, 1, 1, 1))]


class Patch:
    setattr = staticmethod(setattr)


def main() -> int:
    """Runs the checks; says which failed, and returns how many."""
    device = "cpu" if INTERPRETED else "cuda"
    checks = [(check_scans, case, dict(plan=plan)) for case, plan in (TOYS if INTERPRETED else SCANS)]
    checks += [(check_line_scans, case, dict(plan=plan)) for case, plan in (TOYS if INTERPRETED else SCANS[:3])]
    small = Case(1, 2, 2, 3, 1, directions=(2,)) if INTERPRETED else Case(1, 8, 11, 7, 4, directions=(2, 1), dtype=BF16)
    small = small._replace(centered=True)
    checks += [(check_propagate, small, dict(mode=mode)) for mode in ("together", "each", 2)]
    failed = 0
    for check, case, options in checks:
        torch.manual_seed(0)
        if "mode" in options:
            force(Patch, options.pop("mode"))
        try:
            check(case, **options, device=device)
            print(f"{check.__name__} {case}: right", flush=True)
        except Exception as error:
            failed += 1
            print(f"{check.__name__} {case}: {type(error).__name__}: {error}", flush=True)
    if not INTERPRETED:
        torch.cuda.synchronize()
    print(f"{len(checks) - failed} of {len(checks)} right")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
