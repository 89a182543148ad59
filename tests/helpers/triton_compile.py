"""Compiles the GPU scans for a GPU that need not be there, and reads off the machine code what decides their speed.

Run as a script it prints one JSON line for each case given as JSON on the command line; it is a process of its own
because Triton's interpreter, which other tests use, cannot be switched off once triton is imported.
"""

import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gspn.kernels.triton import device, merge
from gspn.kernels.triton.device import SIZES
from gspn.kernels.triton.plan import Plan, blocks

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def compile_scan(
    target, backward, value, plan, share=1, channels=64, gated=True, chained=False, partial=None, merged=False,
    centered=False,
):  # fmt: skip
    """The compiled scan_forward or scan_backward with these launch parameters, for maps of dtype `value`; `merged` is
    the backward scan as propagate runs it, with output gates and h in the state's dtype."""
    plan = Plan(*plan)
    groups, members, _ = blocks(plan, channels, share)
    constants = dict(
        SHARE=share, STRIPS=plan.strips, PLACES=plan.places, GROUPS=groups, MEMBERS=members, HALO=plan.halo,
        CHAINED=chained,
        GATED=gated, NORMALIZED=gated, ALIGN=math.gcd(channels, 16), ALIGN_LOGITS=math.gcd(channels // share, 16),
        STATE=_STATE[value], INDEX=tl.int32, STAGES=plan.stages, H_DENSE=True,
    )  # fmt: skip
    if backward:
        partial = share > members if partial is None else partial
        constants.update(GATED=merged, PARTIAL=partial, GRAD_DENSE=True, DLOGITS_ALIKE=not partial)
        wide = {"g"} | ({"dlogits"} if partial else set()) | ({"h"} if merged else set())
        return _compile(device.scan_backward, target, value, constants, wide, plan.warps)
    constants.update(CENTERED=centered, X_DENSE=True, GATE_DENSE=True)
    return _compile(device.scan_forward, target, value, constants, {"center"} if centered else set(), plan.warps)


def compile_elementwise(target, kernel, value, wide=False, **constants):
    """One of merge.py's kernels, compiled; `wide`, for maps of 2^31 pixels."""
    index = tl.int64 if wide else tl.int32
    constants = dict(ALIGN=16, STATE=_STATE[value], INDEX=index, PIXELS=64, BC=32, **constants)
    return _compile(getattr(merge, kernel), target, value, constants, {"g", "h", "partial"}, 4)


_STATE = {"fp64": tl.float64, "fp32": tl.float32, "bf16": tl.float32, "fp16": tl.float32}


def _compile(kernel, target, value, constants, wide, warps):
    state = "fp64" if value == "fp64" else "fp32"
    pointers = {name: state for name in wide | {"state_in", "state_out"}}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in SIZES:
            signature[name] = "i32"
        else:
            signature[name] = "*" + pointers.get(name, value)
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[target], options={"num_warps": warps})


def resources(compiled, target) -> dict:
    """Registers, spilled bytes, and of the machine code of the loop: barriers, shuffles, wide loads, instructions."""
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        number = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # noqa: E731
        # Scalars that do not fit go to lanes of vector registers, not to memory: only vectors are counted.
        return dict(registers=number("vgpr_count"), spills=number("vgpr_spill_count"))
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        usage = _run(tools / "cuobjdump", "-res-usage", binary)
        code = _run(tools / "nvdisasm", "-c", binary)
    loop = _innermost_loop(code)
    count = lambda pattern: len(re.findall(pattern, loop))  # noqa: E731
    return dict(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)),
        shared=compiled.metadata.shared,
        barriers=count(r"\bBAR\."),
        shuffles=count(r"\bSHFL\."),
        wide_loads=count(r"\bLDGSTS\.\S*128|\bLDG\.\S*128"),
        loads=count(r"\bLDGSTS\b|\bLDG\b"),
        stores=count(r"\bSTG\b"),
        async_copies=count(r"\bLDGSTS\b"),
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]+\*/", loop, re.M)),
    )


def _run(*command) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout


def _innermost_loop(code: str) -> str:
    """From the label that the last long jump backwards goes to, up to that jump: the loop over the lines."""
    lines = code.splitlines()
    labels = {m[1]: n for n, line in enumerate(lines) if (m := re.match(r"(\.L_x_\d+):", line))}
    jumps = [(labels[m[1]], n) for n, line in enumerate(lines) if (m := re.search(r"BRA.*`\((\.L_x_\d+)\)", line))
             and labels.get(m[1], n) < n - 8]  # fmt: skip
    start, end = max(jumps, key=lambda jump: jump[1] - jump[0], default=(0, len(lines)))
    return "\n".join(lines[start:end])


if __name__ == "__main__":
    for case in map(json.loads, sys.argv[1:]):
        compiled = compile_elementwise(**case) if "kernel" in case else compile_scan(**case)
        print(json.dumps({**case, **resources(compiled, case["target"])}), flush=True)
