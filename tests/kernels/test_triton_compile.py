"""What the compiler makes of the GPU scans, for GPUs that need not be there: no spills, few barriers, whole vectors.

Bounds on registers are what keeps enough warps on a multiprocessor; those on barriers and wide loads are what makes a
step of a scan as cheap as the launch plan takes it to be. They were read off Triton 3.7.1 and leave some room.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.triton
pytest.importorskip("triton")

from gspn.kernels.triton import plan as plans  # noqa: E402

SCRIPT = Path(__file__).parents[1] / "helpers" / "triton_compile.py"


def compile_all(cases: list[dict]) -> list[dict]:
    """The resources of each case, compiled in a process without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *map(json.dumps, cases)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def scan(places: int, *, backward: bool = False, target: str = "sm_90", value: str = "bf16", **options) -> dict:
    """A case with the plan that lines of `places` places get where there is enough to do."""
    size = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}[value]
    found = plans.plan(places, places, 1024, 1 << 20, size, backward)
    return dict(target=target, backward=backward, value=value, plan=list(found), chained=found.halo > 0, **options)


def tables(target: str) -> list[dict]:
    """Every entry of the plan tables, and the tiles, forward (centred, which takes more registers) and backward."""
    return [
        scan(places, backward=backward, target=target, value=value, centered=not backward)
        for backward in (False, True)
        for places in [longest for longest, _ in plans._FORWARD] + [5000]
        for value in ("bf16", "fp32")
    ] + [scan(longest, backward=True, target=target, merged=True) for longest, _ in plans._BACKWARD]


def check(found: dict) -> None:
    """No memory for want of registers, and few enough of these for eight warps on a multiprocessor."""
    assert found["spills"] == 0 and found.get("stack", 0) == 0, found
    warps = found["plan"][3]
    assert 65536 // (found["registers"] * warps * 32) * warps >= 8 or found["target"].startswith("gfx"), found


def test_scans_keep_their_state_in_registers_and_load_whole_vectors():
    cases = [
        scan(7),
        scan(56),
        scan(64, value="fp32", centered=True),
        scan(5000, centered=True),
        scan(64, share=8),
        scan(7, backward=True),
        scan(56, backward=True),
        scan(5000, backward=True, target="sm_80"),
        scan(64, backward=True, share=64),
        scan(28, target="gfx942"),
    ]
    found = compile_all(cases)
    for one in found:
        check(one)
    p7, p56, p64, tile, shared, back7, back56, *_ = found
    assert p7["registers"] <= 128 and back7["registers"] <= 168  # four and three warps on a scheduler
    assert p7["barriers"] == p7["shuffles"] == back7["barriers"] == 0  # a line in a thread's own registers
    assert p56["registers"] <= 128 and p64["registers"] <= 128 and tile["registers"] <= 128
    for one in (p56, p64, tile):  # every load 16 bytes wide and on its way before it is needed
        assert one["wide_loads"] == one["async_copies"] == one["loads"] == 20
        assert one["barriers"] <= 2  # one warp: borders of strips go by shuffles
    assert shared["instructions"] < 0.5 * p56["instructions"]  # a sigmoid for all channels of a group
    assert back56["async_copies"] == back56["loads"] and back56["barriers"] <= 4 and back56["registers"] <= 128


def test_elementwise_kernels_compile():
    cases = [
        dict(kernel="merge_forward", COUNT=4, SKIP=True, ADD=True),
        dict(kernel="merge_backward", COUNT=4, SKIP=True, ADD=True, MERGED=True),
        dict(kernel="finish_logits", PARTS=4, NORMALIZED=True),
        dict(kernel="merge_forward", COUNT=1, SKIP=False, ADD=False, wide=True),
    ]
    for one in compile_all([dict(target="sm_90", value="bf16", **case) for case in cases]):
        assert one["spills"] == one["stack"] == 0, one


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_every_entry_of_the_plan_tables_compiles_without_spills(target):
    for one in compile_all(tables(target)):
        check(one)


@pytest.mark.slow
def test_float64_float16_and_weights_as_given_compile():
    cases = [
        scan(places, backward=backward, value=value, gated=gated)
        for places in (14, 64, 5000)
        for backward in (False, True)
        for value, gated in (("fp64", True), ("fp16", True), ("bf16", False))
    ]
    for one in compile_all(cases):
        assert one["registers"] <= 255, one
