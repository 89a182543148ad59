"""Builds a user's own checkout of the released kernel and times it beside ours. This repository holds no part of it.

The folder holds extension sources (.cpp, .cc, .cu), which torch.utils.cpp_extension builds unchanged, and a file
``adapter.py``. The user writes that file, because only the user can see how the kernel is called:

    def prepare(extension, x, gate, weights):
        '''extension: the built module. x, gate and the three weights (previous, same, next place; normalised):
        contiguous (N,C,P,T), to be scanned along T from its start. Returns a function without arguments that launches
        the kernel and returns h (N,C,P,T). Allocations and conversions made in prepare are not timed.'''
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from benchmarks.contenders import peers_gpu
from benchmarks.speed import cases_gpu, scan_gpu

SUFFIXES = (".cpp", ".cc", ".cu")


def load(folder: Path) -> tuple[Callable | None, dict]:
    """(function that makes the contender, or None if there is none to time; what the file records of it)."""
    sources = sorted(str(p) for p in folder.rglob("*") if p.suffix in SUFFIXES and "build" not in p.parts)
    found: dict = {"folder": folder.name, "sources": [Path(s).name for s in sources]}
    from torch.utils import cpp_extension  # looks for a compiler, and complains, when it is imported

    if not sources:
        return None, found | {"why": f"not measured: no {', '.join(SUFFIXES)} under {folder}"}
    try:
        includes = sorted({str(Path(s).parent) for s in sources})
        extension = cpp_extension.load("official_kernel", sources, extra_include_paths=includes)
    except Exception as error:  # compilers, and what they are given, fail in their own ways
        return None, found | {"why": f"not measured: it does not build: {str(error)[-1500:]}"}
    found["exports"] = [n for n in dir(extension) if not n.startswith("_")]
    adapter = folder / "adapter.py"
    if not adapter.exists():
        why = f"not measured: built, but {adapter} is missing: write it as benchmarks/contenders/official_gpu.py says"
        return None, found | {"why": why}
    spec = importlib.util.spec_from_file_location("official_adapter", adapter)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def make(machine, case: cases_gpu.Case, inputs: scan_gpu.Problem):
        if case.train:
            raise NotImplementedError("only its forward pass is called")
        scan = peers_gpu.LineLaunches(inputs.x, inputs.gate, inputs.logits)
        calls = [module.prepare(extension, *(t.flatten(0, 1) for t in s[:2]), [t.flatten(0, 1) for t in s[2:]])
                 for s in scan.stacks]  # fmt: skip
        states = [call().view_as(h) for call, h in zip(calls, scan.h, strict=True)]
        limit = scan_gpu.LINES_LIMITS[cases_gpu.DTYPES[case.dtype]]
        errors = scan_gpu.gate(case, inputs, scan.unstacked(states), None, limit)
        return {"official": lambda: [call() for call in calls]}, errors

    return make, found
