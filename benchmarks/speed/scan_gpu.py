"""The scan by itself on a GPU: correctness, time, and the share of the copy bandwidth that it reaches.

A part of ``python -m benchmarks.speed.layer_gpu``; cases_gpu.py says what is measured.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.contenders import peers_gpu
from benchmarks.harness import gpu_harness
from benchmarks.harness.gpu_harness import measure
from benchmarks.speed.cases_gpu import DIRECTIONS, DTYPES, LINES, OURS, PREPARED, REFERENCE, Case
from gspn.kernels import reference, triton
from gspn.kernels.triton.plan import Plan

TOY_PLAN = Plan(4, 1, 8, 1, 1)  # few operations for the interpreter, which takes a millisecond for each
# ‖kernel - float64 reference‖ / ‖float64 reference‖; the state that is rounded at each line is allowed more
LIMITS = {torch.float32: 5e-5, torch.bfloat16: 1e-2}
LINES_LIMITS = {torch.float32: 5e-5, torch.bfloat16: 5e-2}


class Problem(NamedTuple):
    """x (B,C,H,W), gate (B,D,C,H,W), logits (B,D,G,3,H,W), and grad like gate: channels (groups) last in memory."""

    x: Tensor
    gate: Tensor
    logits: Tensor
    grad: Tensor | None


def problem(case: Case, device: torch.device, seed: int = 0) -> Problem:
    batch, channels, height, width = case.shape
    count, groups = len(DIRECTIONS), channels // case.channels_a_group
    generator = torch.Generator(device).manual_seed(seed)
    draw = lambda *s: torch.randn(s, generator=generator, device=device, dtype=DTYPES[case.dtype])  # noqa: E731
    x = draw(batch, height, width, channels).permute(0, 3, 1, 2)
    gate = draw(batch, count, height, width, channels).permute(0, 1, 4, 2, 3)
    logits = draw(batch, count, 3, height, width, groups).permute(0, 1, 5, 2, 3, 4)
    grad = draw(batch, count, height, width, channels).permute(0, 1, 4, 2, 3) if case.train else None
    return Problem(x, gate, logits, grad)


def scan_of(
    machine, name: str = "triton"
) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor, Tensor]]]:
    """gated_scan and its backward: torch's operators on a GPU; in a rehearsal the functions behind them, because the
    operators refuse CPU tensors."""
    if name == "reference":
        return reference.gated_scan, reference.gated_scan_backward
    if machine.rehearsal:
        return partial(triton.gated_scan, plan=TOY_PLAN), partial(triton.gated_scan_backward, plan=TOY_PLAN)
    operators = torch.ops.gspn
    return (
        lambda *a: operators.gated_scan(*a, name),
        lambda *a: operators.gated_scan_backward(*a, name),
    )


# Correctness


def gate(case: Case, inputs: Problem, h: Tensor | None, gradients: tuple[Tensor, ...] | None, limit: float) -> dict:
    """Relative errors against the float64 reference of what a kernel computed, on the first and the last channels of
    the first and the last image, at full height and width; every value has to be finite.

    Raises WrongResult where something is: what is wrong is not measured.
    """
    step = case.channels_a_group
    count = max(step, 8 // step * step)  # channels looked at
    channels, groups = case.shape[1], case.shape[1] // step
    errors: dict[str, float] = {}
    for image, start in {(0, 0), (case.shape[0] - 1, max(0, channels - count))}:
        images, some = slice(image, image + 1), slice(start, start + count)
        few = slice(start // step, min(groups, (start + count) // step))
        x, gates, logits = inputs.x[images, some], inputs.gate[images, :, some], inputs.logits[images, :, few]
        exact = [t.double() for t in (x, gates, logits)]
        if gradients is None:
            found, expected = {"h": h[images, :, some]}, {"h": reference.gated_scan(*exact, DIRECTIONS, None)}
        else:
            states = reference.gated_scan(*exact, DIRECTIONS, None)
            grad = inputs.grad[images, :, some].double()
            wanted = reference.gated_scan_backward(grad, *exact, states, DIRECTIONS, None)
            names = ("x", "gate", "logits")[: len(gradients)]
            expected = dict(zip(names, wanted, strict=False))
            parts = (gradients[0][images, some], gradients[1][images, :, some])
            found = dict(zip(names, [*parts, *(g[images, :, few] for g in gradients[2:])], strict=True))
        for name, value in found.items():
            error = ((value.double() - expected[name]).norm() / expected[name].norm()).item()
            errors[name] = max(errors.get(name, 0.0), error)
    whole = {"h": h} if gradients is None else dict(zip(("x", "gate", "logits"), gradients, strict=False))
    for name, value in whole.items():
        if not torch.isfinite(value).all():
            errors[name] = float("nan")
    for name, error in errors.items():
        if not error <= limit:
            raise gpu_harness.WrongResult(f"{name} is wrong: relative error {error:.2e}, allowed {limit:.0e}")
    return {name: float(f"{error:.2e}") for name, error in errors.items()}


class poisoned:
    """Within it torch.empty returns memory filled with NaN, so that elements which a kernel leaves out are seen."""

    def __enter__(self):
        self._before = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *_):
        torch.use_deterministic_algorithms(self._before[0], warn_only=self._before[1])


# Time


def run(machine, case: Case, seconds: float, copy: float | None, official=None, slow: bool = True) -> dict:
    """A row of the results: the gate, then the contenders. Shares are of ``copy`` (GB/s); ``official`` makes the
    contender of that name; ``slow`` adds the eager reference."""
    room = machine.memory_gib()
    if case.resident_gib > 0.92 * room:
        return {"why": f"not measured: needs {case.resident_gib:.0f} GiB, the device has {room:.0f}"}
    inputs, calls, errors = problem(case, machine.device), {}, {}
    row: dict = {"gib": round(case.bytes_moved / 2**30, 3)}
    makers = {OURS: _ours, LINES: _lines}
    if slow:
        makers[REFERENCE] = _reference
    if official is not None:
        makers["official"] = official
    for name, make in makers.items():
        if name != OURS and 3 * case.resident_gib > room:
            row[name] = {"why": "not measured: too little memory for it beside the others"}
        elif case.shared and name in (LINES, "official"):
            row[name] = {"why": "not measured: its weights are per channel"}
        else:
            found, why_not = gpu_harness.attempt(machine, lambda make=make: make(machine, case, inputs))
            if why_not:
                row[name] = {"why": why_not}
            else:
                more, errors[name] = found
                calls |= more
    row |= measure(machine, calls, OURS, seconds, graphs=(LINES,) if LINES in calls else ())
    for name, found in row.items():
        ms = gpu_harness.best_ms(found) if isinstance(found, dict) else None
        if ms:
            found["GB/s"] = round(case.bytes_moved / ms / 1e6, 1)
            if copy:
                found["of copy"] = round(found["GB/s"] / copy, 4)
            if name in errors:
                found["errors"] = errors[name]
    return row


def errors_of(machine, case: Case) -> dict:
    """The gate by itself."""
    return {OURS: {"errors": _ours(machine, case, problem(case, machine.device))[1]}}


def _ours(machine, case: Case, inputs: Problem):
    return operators(*scan_of(machine), case, inputs, LIMITS)


def _reference(machine, case: Case, inputs: Problem):
    calls, errors = operators(*scan_of(machine, "reference"), case, inputs, LIMITS)
    return {REFERENCE: calls[OURS]}, errors


def operators(forward, backward, case: Case, inputs: Problem, limits):
    """({OURS: one call}, errors): the pass that the case asks for, after its gate."""
    arguments = (inputs.x, inputs.gate, inputs.logits)
    limit = limits[DTYPES[case.dtype]]
    with poisoned():
        h = forward(*arguments, DIRECTIONS, None)
        gradients = backward(inputs.grad, *arguments, h, DIRECTIONS, None) if case.train else None
    errors = gate(case, inputs, h, gradients, limit)
    if not case.train:
        return {OURS: lambda: forward(*arguments, DIRECTIONS, None)}, errors
    return {OURS: lambda: backward(inputs.grad, *arguments, h, DIRECTIONS, None)}, errors


def _lines(machine, case: Case, inputs: Problem):
    arguments = (inputs.x, inputs.gate, inputs.logits)
    scan = peers_gpu.LineLaunches(*arguments, train=case.train)
    limit = LINES_LIMITS[DTYPES[case.dtype]]
    with torch.no_grad():
        for buffer in [*scan.h, *(b for out in scan.grads for b in out)]:
            buffer.fill_(float("nan"))
        scan.forward()
        if not case.train:
            errors = gate(case, inputs, scan.unstacked(scan.h), None, limit)
            prepare = lambda: (scan.prepare(*arguments), scan.forward())  # noqa: E731
            return {LINES: scan.forward, PREPARED: prepare}, errors
        grad = scan.stacked(inputs.grad)
        scan.backward(grad)
        errors = gate(case, inputs, None, (scan.input_gradient(), scan.gate_gradient()), limit)
        return {LINES: lambda: scan.backward(grad)}, errors
