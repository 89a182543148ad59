"""The GPU kernels on a device, as users reach them: one command, on a machine with a GPU.

    python -m pytest tests/kernels/test_triton_gpu.py

It needs torch, triton, pytest and the sources. With TRITON_INTERPRET=1 and without a GPU the same bodies run in the
interpreter at toy sizes: a rehearsal, so that what fails on the first device is the device's doing.
"""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from helpers.triton_cases import (  # noqa: E402
    ALL,
    Case,
    center_of,
    check_public,
    check_scans,
    nan_filled,
    propagate_problem,
    scan_problem,
)

import gspn  # noqa: E402
from gspn import dispatch  # noqa: E402
from gspn.kernels import reference  # noqa: E402
from gspn.kernels.triton import device as kernels  # noqa: E402
from gspn.kernels.triton import launch, merge  # noqa: E402
from gspn.kernels.triton import plan as plans  # noqa: E402

ON_GPU = torch.cuda.is_available() and not launch.INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not ON_GPU and not launch.INTERPRETED, reason="needs a GPU; TRITON_INTERPRET=1 rehearses it"),
]
gpu_only = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

if ON_GPU:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for where NaN fills memory
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(autouse=True)
def _native(monkeypatch):
    """Where there is no GPU, the operators take these kernels for the CPU's."""
    if not ON_GPU:
        monkeypatch.setitem(dispatch.NATIVE_BACKENDS, "cpu", "triton")


# ---- first: what no interpreter can tell -----------------------------------------------------------------------------


@triton.jit
def _crossing(low, high, before, after, STRIPS: tl.constexpr, GROUPS: tl.constexpr, MEMBERS: tl.constexpr):
    group, member = tl.arange(0, GROUPS)[None, :, None], tl.arange(0, MEMBERS)[None, None, :]
    at = (tl.arange(0, STRIPS)[:, None, None] * GROUPS + group) * MEMBERS + member
    found_before, found_after = kernels._cross(tl.load(low + at), tl.load(high + at), STRIPS, GROUPS, MEMBERS)
    tl.store(before + at, found_before)
    tl.store(after + at, found_after)


_TABLES = [*(p for _, p in plans._FORWARD), *(p for _, p in plans._BACKWARD), *plans._TILED.values()]


@pytest.mark.parametrize("strips, channels, warps", sorted({(p.strips, p.channels, p.warps) for p in _TABLES}))
def test_strips_exchange_their_borders(strips, channels, warps):
    """The lowering of join, gather and split, for all shapes that the plans have: their channels or fewer, in groups
    of one, of a few, or all in one."""
    while channels >= 1:
        for members in sorted({1, min(4, channels), channels}):
            shape = (strips, channels // members, members)
            for dtype in (FP32, FP64) if members == channels else (FP32,):
                low, high = torch.randn(2, *shape, device=DEVICE, dtype=dtype)
                before, after = torch.full((2, *shape), float("nan"), device=DEVICE, dtype=dtype)
                _crossing[(1,)](low, high, before, after, *shape, num_warps=warps)
                # at the ends of the line a strip gets its own: that neighbour has no weight
                assert torch.equal(before, torch.cat((low[:1], high[:-1]))), (shape, dtype)
                assert torch.equal(after, torch.cat((low[1:], high[-1:]))), (shape, dtype)
        channels //= 4 if ON_GPU else 64


# ---- every plan ------------------------------------------------------------------------------------------------------


def _longest_lines():
    limits = [longest for longest, _ in plans._FORWARD]
    assert limits == [longest for longest, _ in plans._BACKWARD]
    return [(before + 1, longest) for before, longest in zip([0, *limits], limits, strict=False)]


def _plan_cases():
    """For each entry of the tables, lines of the greatest length with enough programs for the entry's own channels in
    bfloat16, and of the least length with few in another dtype; and lines that are cut into tiles."""
    for number, (least, most) in enumerate(_longest_lines()):
        if ON_GPU:
            blocks = -(-96 // plans._FORWARD[number][1].channels)
            batch = -(-plans.FEW * 150 // (2 * blocks))
            yield Case(batch, 96, most, 13, (96, 1, 12)[number % 3], directions=(0, 2), dtype=BF16)
            dtype = (FP32, FP16, FP64)[number % 3]
            yield Case(1, 24, least, 9, (3, 24, 1)[number % 3], directions=(2, 0), segment=4, dtype=dtype)
        elif most <= 8:
            yield Case(1, 3, least, 2, (3, 1)[number % 2], directions=(0,), dtype=(FP32, BF16)[number % 2])
    if ON_GPU:
        for dtype, groups, segment in ((BF16, 8, None), (FP32, 1, None), (FP16, 8, 21), (FP64, 8, None)):
            yield Case(1, 8, 333, 40, groups, segment=segment, directions=(0, 2), dtype=dtype)


@pytest.mark.parametrize("case", list(_plan_cases()), ids=str)
def test_every_plan(case, monkeypatch):
    """Without launch parameters given: those of the table's entry, forward and backward."""
    used = []

    def plan(places, lines, channels, scans, bytes_each, backward, processors):
        found = plans.plan(places, lines, channels, scans, bytes_each, backward, processors)
        used.append((backward, found))
        return found

    monkeypatch.setattr(launch, "plan", plan)
    with nan_filled():
        check_scans(case, device=DEVICE)
    assert [backward for backward, _ in used] == [False, True]
    for backward, found in used:
        table = plans._BACKWARD if backward else plans._FORWARD
        entry = next(p for longest, p in table if case.height <= longest)
        if case.height > 2 * plans.TILE and case.batch == 1 and case.width >= 2 * plans.HALO:
            entry = plans._TILED[backward]
        assert (found.strips, found.places, found.warps, found.halo) == (
            entry.strips, entry.places, entry.warps, entry.halo,
        )  # fmt: skip
        if case.batch > 1 and not backward:
            assert found.channels == entry.channels


# ---- the operators ---------------------------------------------------------------------------------------------------

SIZES = [
    Case(2, 96, 56, 56, 96),
    Case(2, 40, 37, 53, 8, segment=10),
    Case(1, 48, 128, 17, 1, segment=20, layout="sliced"),
    Case(3, 33, 14, 14, 11, directions=(3, 1), layout="channels_first"),
    Case(1, 80, 64, 64, 1, directions=(2, 1, 0), layout="projected"),
    Case(1, 1, 1, 1, 1),
    Case(2, 7, 1, 301, 7, layout="transposed"),
    Case(1, 96, 97, 31, 2, directions=(1,)),
]
TOYS = [Case(1, 2, 2, 3, 1, directions=(0, 3), segment=2), Case(1, 2, 3, 2, 2, directions=(1,), layout="sliced")]


def _operator_cases():
    """Every size in bfloat16 and in one other dtype, one of them centred: each kernel takes seconds to compile on the
    first run."""
    for number, case in enumerate(SIZES if ON_GPU else TOYS):
        other = (FP32, FP16, FP64)[number % 3]
        for dtype in (BF16, other) if ON_GPU else (FP32,):
            yield "gated_scan", case._replace(dtype=dtype)
            layout, centered = case.layout.replace("projected", "sliced"), (dtype == BF16) == (number % 2 == 0)
            yield "propagate", case._replace(dtype=dtype, layout=layout, centered=centered)
        yield "line_scan", case._replace(dtype=(other, BF16)[number % 2])


@pytest.mark.parametrize("name, case", list(_operator_cases()), ids=str)
def test_operators(name, case):
    with nan_filled():
        check_public(name, case, DEVICE)


def _propagate(*tensors, **options):
    *tensors, center = tensors
    return gspn.propagate(*tensors, center=center, **options)


def _layer(*tensors, **options):
    return torch.relu(_propagate(*tensors, **options))


def _centered(case, features):
    """x, proxy, the projections and center, and a gradient of y."""
    *problem, grad = propagate_problem(case, features, True, DEVICE)
    problem.append(center_of(case._replace(centered=True), *problem))
    return [t.requires_grad_() for t in problem], grad


def _small(dtype=FP32, height=24, width=20, directions=ALL):
    """A problem that the tests below share, and a gradient."""
    case = Case(2, 24, height, width, 8, dtype=dtype, directions=directions)
    case = case if ON_GPU else Case(1, 2, 2, 2, 1, dtype=dtype, directions=(0, 1)[: len(directions)])
    problem, grad = _centered(case, 4)
    return problem, grad, [gspn.DIRECTIONS[d] for d in case.directions]


def test_the_same_bits_in_every_run():
    problem, grad, names = _small(BF16)
    found = []
    for _ in range(20 if ON_GPU else 2):
        y = _propagate(*problem, directions=names)
        found.append([y.detach(), *torch.autograd.grad(y, problem, grad)])
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, found[0], strict=True))


@pytest.mark.parametrize("name", ["line_scan", "gated_scan", "propagate"])
def test_opcheck(name):
    case = Case(1, 8, 9, 6, 4, directions=(0, 1)) if ON_GPU else Case(1, 1, 2, 1, 1, directions=(0,))
    directions = list(case.directions)
    if name == "propagate":
        (*problem, center), grad = _centered(case, 2)
        options, backward = (directions, None, 256, center, "triton"), (grad, *problem)
    else:
        *problem, grad = scan_problem(case, DEVICE)
        options = (directions, None, "triton")
        backward = (grad, *problem, grad.clone())
        if name == "line_scan":
            problem, grad = [problem[0], problem[2][:, 0]], grad[:, 0]
            options, backward = (0, None, "triton"), (grad, problem[1], grad.clone())
    operator = getattr(torch.ops.gspn, name).default
    torch.library.opcheck(operator, (*(t.requires_grad_() for t in problem), *options))
    given = [t.detach() if isinstance(t, torch.Tensor) else t for t in (*backward, *options)]
    torch.library.opcheck(getattr(torch.ops.gspn, f"{name}_backward").default, tuple(given))


def test_compile():
    problem, grad, names = _small()
    compiled = torch.compile(_layer, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    found = []
    for function in (_layer, compiled):
        y = function(*problem, directions=names)
        found.append([y, *torch.autograd.grad(y, problem, grad)])
    for plain, result in zip(*found, strict=True):
        torch.testing.assert_close(result, plain, rtol=1e-5, atol=1e-5)


def test_autocast():
    """Maps of two dtypes are taken in that of x; nothing inside is rounded by autocast."""
    problem, _, names = _small()
    narrow = [problem[0].detach().bfloat16(), problem[1].detach(), *(p.detach() for p in problem[2:])]
    with torch.autocast(DEVICE, dtype=BF16):
        y = _propagate(*narrow, directions=names)
        scanned = _propagate(*(t.detach() for t in problem), directions=names)
    expected = _propagate(narrow[0], narrow[1].bfloat16(), *narrow[2:], directions=names)
    assert y.dtype == BF16 and torch.equal(y, expected)
    assert torch.equal(scanned, _propagate(*(t.detach() for t in problem), directions=names))


@gpu_only
def test_two_streams():
    """Launches go to the current stream: the input is only there once that stream has worked for a while."""
    problem, grad, names = _small(height=64, width=64)
    expected = torch.autograd.grad(_propagate(*problem, directions=names), problem, grad)
    torch.cuda.synchronize()
    one, other = torch.cuda.Stream(), torch.cuda.Stream()
    late = torch.full_like(problem[0], float("nan"))
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        busy = _propagate(*problem, directions=names)
    with torch.cuda.stream(one):
        torch.cuda._sleep(200_000_000)
        late.copy_(problem[0].detach())
        tensors = [late.requires_grad_(), *problem[1:]]
        got = torch.autograd.grad(_propagate(*tensors, directions=names), tensors, grad)
    torch.cuda.synchronize()
    assert busy.isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@gpu_only
def test_cuda_graph():
    problem, grad, names = _small()

    def step():
        y = _propagate(*problem, directions=names)
        return [y.detach(), *torch.autograd.grad(y, problem, grad)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        with torch.no_grad():
            problem[0].normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def _variants() -> int:
    names = [
        (kernels, ("scan_forward", "scan_backward")),
        (merge, ("merge_forward", "merge_backward", "finish_logits")),
    ]
    found = [getattr(module, name) for module, of in names for name in of]
    return sum(len(caches[0]) for kernel in found for caches in kernel.device_caches.values())


@gpu_only
@pytest.mark.parametrize("groups", [24, 1])
def test_other_sizes_compile_nothing(groups):
    """Height, width, batch and segment are numbers to a kernel, also where they are 1 or divisible by 16."""

    def run(batch, height, width, segment):
        case = Case(batch, 24, height, width, groups, segment=segment)
        problem, grad = _centered(case, 8)
        torch.autograd.grad(_propagate(*problem, segment=segment), problem, grad)

    run(2, 30, 31, None)
    before = _variants()
    assert before > 0
    for sizes in ((2, 32, 32, None), (1, 29, 32, None), (3, 31, 30, 7), (2, 32, 29, 16), (4, 30, 30, 10)):
        run(*sizes)
        assert _variants() == before, f"{sizes} compiled {_variants() - before} more"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    problem, _, names = _small()
    expected = _propagate(*problem, directions=names)
    with torch.cuda.device(0):
        y = _propagate(*(t.detach().to("cuda:1") for t in problem), directions=names)
    assert y.device.index == 1 and torch.equal(y.cpu(), expected.detach().cpu())


# ---- memory ----------------------------------------------------------------------------------------------------------


def _peak(function) -> tuple[int, object]:
    """Bytes that a call takes at most, beside those that were taken before; run once before to load what stays."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, result


@gpu_only
@pytest.mark.parametrize("mib", [4, 24, 64, 512])  # bands, bands, one direction at a time, all together
def test_propagate_keeps_to_its_workspace(mib):
    case = Case(1, 64, 192, 256, 64, dtype=BF16)
    leaves, grad = _centered(case, 16)
    problem = [t.detach() for t in leaves]
    y_bytes = problem[0].nbytes
    peak, y = _peak(lambda: _propagate(*problem, workspace_mib=mib))
    bound = 1.1 * (mib << 20) + y_bytes + (4 << 20)
    assert peak <= bound, f"{peak >> 20} MiB beside x; {bound / 2**20:.0f} expected at most"
    exact = _propagate(*(t.double() for t in problem), backend="reference")
    assert (y.double() - exact).abs().max() <= 0.03 * exact.abs().max()

    def backward():
        return torch.autograd.grad(_propagate(*leaves, workspace_mib=mib), leaves, grad)

    # beside the workspace: y, dx and dproxy in both dtypes, and the state that enters each band
    lines = (mib << 20) // 600_000
    states = 256 * 64 * 4 * -(-256 // lines)
    peak, _ = _peak(backward)
    bound = 1.1 * (mib << 20) + 6 * y_bytes + states + (8 << 20)
    assert peak <= bound, f"{peak >> 20} MiB for the gradients; {bound / 2**20:.0f} expected at most"


@gpu_only
def test_a_map_of_16k_by_8k_pixels_seen_by_a_diffusion_model():
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 MEMBERS")
    *problem, _ = propagate_problem(Case(2, 640, 512, 1024, 1, dtype=BF16), 16, True, DEVICE)
    peak, y = _peak(lambda: gspn.propagate(*problem))
    assert y.isfinite().all() and peak <= (256 << 20) + y.nbytes + (64 << 20), f"{peak >> 20} MiB"


@gpu_only
def test_more_than_two_to_the_31_elements():
    """The far end of such maps, where the last segment starts anew, against the same lines by themselves."""
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 MEMBERS")
    channels, size, segment = 640, 1840, 20
    assert channels * size * size > 1 << 31
    draw = lambda c: torch.randn(size, size, c, device=DEVICE, dtype=BF16)  # noqa: E731
    x, gate, grad = (draw(channels).permute(2, 0, 1)[None] for _ in "abc")
    gate, grad = gate[:, None], grad[:, None]
    logits = draw(3).permute(2, 0, 1)[None, None, None]
    h = torch.ops.gspn.gated_scan(x, gate, logits, [1], segment, "triton")
    end = lambda t: t[..., -segment:, :].double()  # noqa: E731
    exact = reference.gated_scan(end(x), end(gate), end(logits), [1], segment)
    torch.testing.assert_close(end(h), exact, rtol=0.02, atol=0.02)
    found = torch.ops.gspn.gated_scan_backward(grad, x, gate, logits, h, [1], segment, "triton")
    exact = reference.gated_scan_backward(*map(end, (grad, x, gate, logits, h)), [1], segment)
    for got, expected in zip(found, exact, strict=True):
        error = (end(got) - expected).abs().max()
        assert error <= 0.02 * expected.abs().max()
