"""What the tests of the GPU kernels share, in the interpreter and on a device: problems, and how wrong they may be.

The budget. Every result is held against the same problem in float64. Its largest error may be twice that of eager torch
in the same dtype (the reference's scans; for `propagate` the layer unfused, every map rounded to the dtype as a layer
would hold it), plus FLOOR ulps of the largest value, for what eager torch happens to get exactly right, and because the
kernels' exponentials and reciprocals are good to a few ulps, not to half of one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

import gspn
from gspn.kernels import reference
from gspn.layers import input_means

ALL = (0, 1, 2, 3)
FLOOR = {torch.float64: 64, torch.float32: 8, torch.bfloat16: 1, torch.float16: 1}
NAMES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


class Case(NamedTuple):
    """Sizes, and how the tensors lie in memory."""

    batch: int
    channels: int
    height: int
    width: int
    groups: int
    segment: int | None = None
    directions: tuple[int, ...] = ALL
    dtype: torch.dtype = torch.float32
    layout: str = "channels_last"  # or channels_first, sliced, transposed, projected
    centered: bool = False  # propagate gets a center

    def __str__(self):
        size = f"{self.batch}x{self.channels}x{self.height}x{self.width}-G{self.groups}"
        directions = "".join("rdlu"[d] for d in self.directions)
        segment = "" if self.segment is None else f"-K{self.segment}"
        return f"{size}{segment}-{directions}-{NAMES[self.dtype]}-{self.layout}{'-centered' * self.centered}"


@contextmanager
def nan_filled() -> Iterator[None]:
    """torch.empty and its kin give memory full of NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1).isnan()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = True


def laid_out(layout: str, *shape: int, dim: int, dtype: torch.dtype, device: str) -> Tensor:
    """Random numbers of a shape whose dimension `dim` is the channels and whose last two are rows and columns."""
    inside = [n for d, n in enumerate(shape) if d != dim] + [shape[dim]]
    draw = lambda *sizes: torch.randn(*sizes, dtype=torch.float32).to(device, dtype)  # noqa: E731
    if layout == "channels_first":
        return draw(*shape)
    if layout == "transposed":  # columns outside of rows
        inside[-3], inside[-2] = inside[-2], inside[-3]
        return draw(*inside).transpose(-3, -2).movedim(-1, dim)
    if layout == "sliced":
        bigger = draw(*(n + 1 for n in inside[:-1]), inside[-1] + 3)
        return bigger[(*(slice(1, None) for _ in inside[:-1]), slice(2, -1))].movedim(-1, dim)
    return draw(*inside).movedim(-1, dim)


def scan_problem(case: Case, device: str = "cpu") -> list[Tensor]:
    """x, input_gate, logits, and a gradient of h, for gated_scan."""
    batch, channels, height, width, groups, _, directions, dtype, layout, _ = case
    count = len(directions)
    make = lambda dim, *shape: laid_out(layout, *shape, dim=dim, dtype=dtype, device=device)  # noqa: E731
    grad = make(2, batch, count, channels, height, width)
    if layout == "projected":  # all three are parts of one projection's output
        sizes = [channels, count * channels, count * 3 * groups]
        x, gate, logits = torch.randn(batch, height, width, sum(sizes)).to(device, dtype).split(sizes, -1)
        x = x.permute(0, 3, 1, 2)
        gate = gate.unflatten(-1, (count, channels)).permute(0, 3, 4, 1, 2)
        logits = logits.unflatten(-1, (count, 3, groups)).permute(0, 3, 5, 4, 1, 2)
        return [x, gate, logits, grad]
    x = make(1, batch, channels, height, width)
    gate = make(2, batch, count, channels, height, width)
    return [x, gate, make(2, batch, count, groups, 3, height, width), grad]


def propagate_problem(case: Case, features: int, skip: bool, device: str = "cpu") -> list[Tensor | None]:
    """x, proxy, weight_proj, input_proj, output_proj and skip_proj, and a gradient of y."""
    batch, channels, height, width, groups, _, directions, dtype, layout, _ = case
    make = lambda n: laid_out(layout, batch, n, height, width, dim=1, dtype=dtype, device=device)  # noqa: E731
    draw = lambda *shape: (torch.randn(*shape) / features**0.5).to(device, dtype)  # noqa: E731
    count = len(directions)
    projections = [draw(count, 3, groups, features), draw(count, channels, features), draw(count, channels, features)]
    return [make(channels), make(features), *projections, draw(channels, features) if skip else None, make(channels)]


def center_of(case: Case, x, proxy, weight_proj, input_proj, *_) -> Tensor | None:
    """What a layer with center=True gives to propagate: the means of the gated input, (B,D,C)."""
    return input_means(x, proxy, input_proj) if case.centered else None


def unfused(x, proxy, weight_proj, input_proj, output_proj, skip_proj, center, directions, segment) -> Tensor:
    """What propagate computes, by its definition, every map in the dtype of x, and what center is subtracted from as
    exact as center. Differentiable."""
    project = lambda p: torch.einsum("...s,bshw->b...hw", p, proxy.to(p.dtype)).to(x.dtype)  # noqa: E731
    logits = project(weight_proj).transpose(2, 3)
    if center is None:
        h = reference.gated_scan(x, project(input_proj), logits, list(directions), segment)
    else:
        gated = project(input_proj).to(center.dtype) * x[:, None].to(center.dtype)
        gated = torch.stack([_centered(gated[:, i], center[:, i], d, segment) for i, d in enumerate(directions)], 1)
        ones = torch.ones_like(gated[:, 0])
        h = reference.gated_scan(ones, gated, logits, list(directions), segment).to(x.dtype)
    y = project(output_proj) * h
    return y.sum(1) if skip_proj is None else y.sum(1) + project(skip_proj) * x


def _centered(gated: Tensor, center: Tensor, direction: int, segment: int | None) -> Tensor:
    """The gated input (B,C,H,W) of a direction, line by line, less center (B,C) where a line comes before."""
    axis = 3 if direction % 2 == 0 else 2
    lines = list(gated.unbind(axis))
    order = range(len(lines)) if direction < 2 else range(len(lines) - 1, -1, -1)
    for step, t in enumerate(order):
        if step % (segment or len(lines)) > 0:
            lines[t] = lines[t] - center[..., None]
    return torch.stack(lines, axis)


def with_gradients(function, tensors: list[Tensor | None], grad: Tensor) -> list[Tensor]:
    """The value and all gradients of a differentiable function."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    value = function(*leaves)
    given = [t for t in leaves if t is not None]
    grads = torch.autograd.grad(value, given, grad.to(value.dtype), allow_unused=True, materialize_grads=True)
    return [value.detach(), *grads]


def wide(tensors) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def assert_within_budget(got, eager, exact, factor: float = 2.0, floor: float | None = None) -> None:
    """`got` and `eager` in the problem's dtype against `exact` in float64; see the top of this file."""
    assert len(got) == len(eager) == len(exact)
    for number, (result, plain, truth) in enumerate(zip(got, eager, exact, strict=True)):
        assert result.shape == truth.shape and result.dtype == plain.dtype, (number, result.shape, result.dtype)
        if truth.numel() == 0:
            continue
        assert result.isfinite().all(), f"result {number}: {int((~result.isfinite()).sum())} are not finite"
        error, allowed = ((t.double() - truth).abs().max().item() for t in (result, plain))
        ulps = FLOOR[result.dtype] if floor is None else floor
        allowed = factor * allowed + ulps * torch.finfo(result.dtype).eps * truth.abs().max().item()
        assert error <= allowed, f"result {number}: error {error:.3g}, allowed {allowed:.3g}"


def force(patch, mode) -> None:
    """Makes propagate work on all directions "together", on "each" by itself, or in bands of so many lines."""
    from gspn.kernels.triton import pieces
    from gspn.kernels.triton.launch import state_dtype

    def choose(x, weight_proj, directions, segment, workspace_mib, *, backward):
        wide = state_dtype(x.dtype)
        if mode == "together":
            return pieces._Work(x, directions, segment, True, None, False, x.dtype)
        if mode == "each":
            return pieces._Work(x, directions, segment, False, None, wide != x.dtype and not backward, x.dtype)
        return pieces._Work(x, directions, segment, False, mode, False, x.dtype if backward else wide)

    patch.setattr(pieces._Work, "choose", choose)


def check_scans(case: Case, plan=None, device: str = "cpu") -> None:
    """gated_scan and its gradients, straight from the backend."""
    from gspn.kernels import triton

    *problem, grad = scan_problem(case, device)
    options = (list(case.directions), case.segment)
    h = triton.gated_scan(*problem, *options, plan=plan)
    got = [h, *triton.gated_scan_backward(grad, *problem, h, *options, plan=plan)]
    found = []
    for tensors in (problem, wide(problem)):
        expected = reference.gated_scan(*tensors, *options)
        dh = grad.to(expected.dtype)
        found.append([expected, *reference.gated_scan_backward(dh, *tensors, expected, *options)])
    assert_within_budget(got, *found)


def check_line_scans(case: Case, plan=None, device: str = "cpu") -> None:
    """line_scan and its gradients with weights that are not normalised, and beside neighbours that do not exist of any
    size, where the state is large, too."""
    from gspn.kernels import triton

    x, _, logits, grad = scan_problem(case, device)
    direction, segment = case.directions[0], case.segment
    x, weights, grad = x * 100, logits[:, 0] * 0.3, grad[:, 0]
    missing = weights.movedim(3 if direction % 2 == 0 else 4, 0)  # (P,B,G,3,T)
    missing[0, :, :, 0], missing[-1, :, :, 2] = 3e4, -3e4
    h = triton.line_scan(x, weights, direction, segment, plan=plan)
    got = [h, *triton.line_scan_backward(grad, weights, h, direction, segment, plan=plan)]
    found = []
    for a, b, c in ((x, weights, grad), wide((x, weights, grad))):
        expected = reference.line_scan(a, b, direction, segment)
        found.append([expected, *reference.line_scan_backward(c, b, expected, direction, segment)])
    assert_within_budget(got, *found)


def check_propagate(
    case: Case, features: int = 2, skip: bool = True, device: str = "cpu", workspace_mib: int = 256, exact_weights=False
) -> None:
    """propagate and its gradients, straight from the backend; with `exact_weights`, projections in float32."""
    from gspn.kernels import triton

    *problem, grad = propagate_problem(case, features, skip, device)
    if exact_weights:
        problem[2:] = [None if p is None else p.float() + torch.randn_like(p.float()) * 1e-3 for p in problem[2:]]
    center = center_of(case, *problem)
    options = (list(case.directions), case.segment)
    got = [triton.propagate(*problem, *options, workspace_mib, center)]
    grads = triton.propagate_backward(grad, *problem, *options, workspace_mib, center)
    problem.append(center)
    got += [g for g, t in zip(grads, problem, strict=True) if t is not None]
    plain = lambda *tensors: unfused(*tensors, *options)  # noqa: E731
    assert_within_budget(got, with_gradients(plain, problem, grad), with_gradients(plain, wide(problem), grad))


def check_public(name: str, case: Case, device: str, features: int = 8) -> None:
    """An operator as users call it, with autograd: "gated_scan", "line_scan" or "propagate"."""
    options = dict(directions=[gspn.DIRECTIONS[d] for d in case.directions], segment=case.segment)
    if name == "propagate":
        *problem, grad = propagate_problem(case, features, True, device)
        problem.append(center_of(case, *problem))
        plain = lambda *tensors: unfused(*tensors, case.directions, case.segment)  # noqa: E731
        found = [with_gradients(lambda *t: gspn.propagate(*t[:-1], center=t[-1], **options), problem, grad)]
        found += [with_gradients(plain, tensors, grad) for tensors in (problem, wide(problem))]
        return assert_within_budget(*found)
    *problem, grad = scan_problem(case, device)
    if name == "line_scan":
        problem, grad = [problem[0], problem[2][:, 0] * 0.3], grad[:, 0]
        options = dict(direction=options["directions"][0], segment=case.segment)
    scan = lambda backend: lambda *tensors: getattr(gspn, name)(*tensors, **options, backend=backend)  # noqa: E731
    found = [with_gradients(scan(None), problem, grad)]
    found += [with_gradients(scan("reference"), tensors, grad) for tensors in (problem, wide(problem))]
    return assert_within_budget(*found)
