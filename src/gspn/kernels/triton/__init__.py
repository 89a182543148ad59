"""The GPU backend, for CUDA and ROCm, in Triton.

    device.py     the scans: what a program computes
    merge.py      the kernels around them: merger, gradients of gates
    plan.py       launch parameters, a plain function of the sizes
    launch.py     from tensors to launches: layouts, strides, grids
    pieces.py     propagate: projections, scans and merging, piece by piece in a bounded workspace

Maps are read where they lie if their channels (logits: their groups) are innermost in memory: channels_last, or a slice
of a projection's output; others are copied once. Everything runs on the current stream of the tensors' device and
nothing waits for the GPU; results are the same bit for bit in every run.
"""

from functools import cache

import torch
import triton
from torch import Tensor

from gspn.kernels.triton import launch
from gspn.kernels.triton.launch import INTERPRETED, channels_inside, empty_like_channels_last, on
from gspn.kernels.triton.pieces import propagate, propagate_backward
from gspn.kernels.triton.plan import Plan

__all__ = [
    "available", "gated_scan", "gated_scan_backward", "line_scan", "line_scan_backward", "propagate",
    "propagate_backward",
]  # fmt: skip

OLDEST_TRITON = (3, 6)
OLDEST_GPU = (8, 0)  # compute capability: the oldest with bfloat16 and asynchronous copies


@cache
def available() -> tuple[bool, str]:
    """Whether these kernels can be used, and on what, or why not."""
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return False, f"triton {triton.__version__} is installed; {oldest} or newer is needed"
    if INTERPRETED:
        return True, "Triton's interpreter, on the CPU"
    if not torch.cuda.is_available():
        return False, "torch finds no CUDA or ROCm device"
    if torch.version.hip is None and torch.cuda.get_device_capability() < OLDEST_GPU:
        found = ".".join(map(str, torch.cuda.get_device_capability()))
        return False, f"{torch.cuda.get_device_name()} has compute capability {found}; 8.0 or newer is needed"
    return True, f"Triton {triton.__version__}, {torch.cuda.get_device_name()}"


def line_scan(x: Tensor, weights: Tensor, direction: int, segment: int | None, *, plan: Plan | None = None) -> Tensor:
    """h (B,C,H,W) of gated input x (B,C,H,W) and weights (B,G,3,H,W)."""
    with on(x):
        x, weights = channels_inside(x, 1), channels_inside(weights[:, None], 2)
        h = empty_like_channels_last(x, 1)
        launch.scan(x, None, weights, h[:, None], [direction], segment, plan=plan)
        return h


def line_scan_backward(
    grad: Tensor, weights: Tensor, h: Tensor, direction: int, segment: int | None, *, plan: Plan | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weights, from the gradient and the value of h."""
    with on(grad):
        grad, weights, h = (channels_inside(t[:, None], 2) for t in (grad, weights, h))
        dweights = empty_like_channels_last(weights, 2)
        g = launch.scan_backward(
            grad, None, weights, h, dweights, [direction], segment, normalized=False, plan=plan
        )  # fmt: skip
        return g[:, 0].to(grad.dtype), dweights[:, 0]


def gated_scan(
    x: Tensor, input_gate: Tensor, logits: Tensor, directions: list[int], segment: int | None,
    *, plan: Plan | None = None,
) -> Tensor:  # fmt: skip
    """h (B,D,C,H,W) of x (B,C,H,W), input_gate (B,D,C,H,W) and logits (B,D,G,3,H,W)."""
    with on(x):
        x, input_gate, logits = channels_inside(x, 1), channels_inside(input_gate, 2), channels_inside(logits, 2)
        h = empty_like_channels_last(input_gate, 2, x.dtype)
        launch.scan(x, input_gate, logits, h, directions, segment, plan=plan)
        return h


def gated_scan_backward(
    grad: Tensor, x: Tensor, input_gate: Tensor, logits: Tensor, h: Tensor, directions: list[int], segment: int | None,
    *, plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, input_gate and logits, from the gradient and the value of h."""
    with on(x):
        x = channels_inside(x, 1)
        grad, input_gate, logits, h = (channels_inside(t, 2) for t in (grad, input_gate, logits, h))
        dx, dgate, dlogits = (
            empty_like_channels_last(x, 1),
            empty_like_channels_last(input_gate, 2),
            empty_like_channels_last(logits, 2),
        )
        g = launch.scan_backward(grad, None, logits, h, dlogits, directions, segment, normalized=True, plan=plan)
        launch.merge_backward(g, input_gate, x, dx, dgate)
        return dx, dgate, dlogits
