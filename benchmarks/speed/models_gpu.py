"""Whole models on a GPU: images/s of the backbones at 224, against the same backbone with other mixers.

A part of ``python -m benchmarks.speed.layer_gpu``. Tensors are channels_last; bfloat16 means autocast; float32 means
torch's default precision (convolutions may use TF32, matrix products not). A training step is loss, gradients, AdamW.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F

import gspn
from benchmarks.harness import gpu_harness
from benchmarks.speed import models_cpu

MIXERS = ("gspn", "attention", "linear attention")
LIMIT = 1e-3  # relative error of the logits against the reference backend, float32


class Case(NamedTuple):
    model: str
    side: int
    in_chans: int
    batch: int
    dtype: str
    train: bool

    def __str__(self) -> str:
        return f"{self.model} {self.side}x{self.side} B{self.batch}, {self.dtype}, {'train' if self.train else 'eval'}"


def cases(quick: bool, rehearsal: bool) -> list[Case]:
    if rehearsal:
        return [Case("gspn_micro", 8, 1, 2, "bfloat16", train) for train in (False, True)]
    names = ("gspn_tiny",) if quick else ("gspn_tiny", "gspn_small", "gspn_base")
    dtypes = ("bfloat16",) if quick else ("bfloat16", "float32")
    sizes = [(128, False), (64, True), (1, False)]
    return [Case(n, 224, 3, batch, d, train) for d in dtypes for n in names for batch, train in sizes]


def run(machine, case: Case, seconds: float) -> dict:
    """A row of the results: images/s, times and memory for each mixer."""
    row, calls = {}, {}
    for mixer in MIXERS:
        found, why_not = gpu_harness.attempt(machine, lambda mixer=mixer: _call(machine, case, mixer))
        if why_not:
            row[mixer] = {"why": why_not}
        else:
            calls[mixer] = found
    row |= gpu_harness.measure(machine, calls, "gspn", seconds)
    for found in row.values():
        ms = gpu_harness.best_ms(found)
        if ms:
            found["images/s"] = round(1e3 * case.batch / ms, 1)
    return row


def _build(machine, case: Case, mixer: str) -> torch.nn.Module:
    arguments = {"num_classes": 1000, "in_chans": case.in_chans}
    return models_cpu.build((case.model, case.side, case.in_chans, arguments), mixer).to(machine.device)


def _call(machine, case: Case, mixer: str):
    status = gspn.available_backends()["triton"]
    if mixer == "gspn" and not (machine.rehearsal or status.available):
        raise RuntimeError(f"the triton backend is not available: {status.reason}")  # the reference would replace it
    model = _build(machine, case, mixer).train(case.train)
    shape = (case.batch, case.in_chans, case.side, case.side)
    x = torch.randn(shape, device=machine.device).to(memory_format=torch.channels_last)
    if mixer == "gspn":
        _gate(machine, case, model, x)
    mixed = case.dtype == "bfloat16"

    def logits():
        # without the cache of cast weights, which a replayed graph would read after it is gone
        cast = torch.autocast(machine.device.type, torch.bfloat16, cache_enabled=case.train) if mixed else nullcontext()
        with cast:
            return model(x)

    if not case.train:

        def forward():
            with torch.no_grad():
                return logits()

        return forward
    optimizer = torch.optim.AdamW(model.parameters(), fused=not machine.rehearsal)
    target = torch.zeros(case.batch, dtype=torch.long, device=machine.device)

    def step():
        loss = F.cross_entropy(logits(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _gate(machine, case: Case, model: torch.nn.Module, x: torch.Tensor) -> None:
    expected = _build(machine, case, "reference").eval()
    expected.load_state_dict(model.state_dict())
    training, some = model.training, x[:2]
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        found, wanted = model.eval()(some), expected(some)
    model.train(training)
    error = ((found - wanted).norm() / wanted.norm()).item()
    if not error <= LIMIT:
        raise gpu_harness.WrongResult(f"{case.model} differs from the reference backend: relative error {error:.2e}")
