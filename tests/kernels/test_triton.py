"""The GPU kernels in the interpreter: every result against float64, with NaN in all memory that a launch is to fill,
and every launch watched for races and stray addresses.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_triton.py

The interpreter takes about a millisecond for an operation, so maps are tiny and launch parameters given; what the plans
of plan.py launch is for test_triton_gpu.py.
"""

import pytest
import torch

triton = pytest.importorskip("triton")

from helpers.triton_cases import (  # noqa: E402
    ALL,
    Case,
    assert_within_budget,
    check_line_scans,
    check_propagate,
    check_scans,
    force,
    nan_filled,
    scan_problem,
    wide,
)

from gspn.kernels import reference  # noqa: E402
from gspn.kernels import triton as backend  # noqa: E402
from gspn.kernels.triton import launch, pieces  # noqa: E402
from gspn.kernels.triton.launch import INTERPRETED  # noqa: E402
from gspn.kernels.triton.plan import Plan, plan  # noqa: E402

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter: set TRITON_INTERPRET=1"),
]

BF16, FP16, FP64 = torch.bfloat16, torch.float16, torch.float64
ONE = Plan(1, 1, 1, 1, 1)


@pytest.fixture(autouse=True)
def _watched():
    from helpers.triton_race import watched

    with nan_filled(), watched() as watch:
        yield watch


# ---- scans -----------------------------------------------------------------------------------------------------------

SCANS = [
    # sizes that break things: single lines, single places, primes, one axis much longer than the other
    (Case(1, 1, 1, 1, 1), ONE),
    (Case(1, 3, 1, 5, 3), Plan(1, 5, 4, 1, 1)),
    (Case(1, 3, 5, 1, 1), Plan(2, 3, 4, 1, 1)),
    (Case(2, 6, 4, 3, 3), Plan(2, 2, 4, 1, 1)),
    (Case(1, 2, 7, 2, 2), Plan(4, 2, 2, 1, 1)),  # a launch for each axis
    (Case(1, 2, 3, 5, 1, dtype=FP64), Plan(8, 1, 2, 1, 2)),
    # groups: shared by all, a block of several groups, groups wider than a block (also not a power of two)
    (Case(1, 4, 3, 4, 1, directions=(0, 3)), Plan(4, 1, 4, 1, 1)),
    (Case(1, 6, 3, 2, 2, directions=(1, 2)), Plan(1, 3, 8, 1, 1)),  # 3 members of 4, and 2 groups
    (Case(1, 10, 3, 2, 2, directions=(0, 1)), Plan(2, 2, 2, 1, 1)),  # 5 members in parts of 2
    (Case(1, 7, 2, 3, 1, dtype=FP64, directions=(3, 2)), Plan(4, 1, 4, 1, 1)),  # 7 in parts of 4
    (Case(1, 8, 3, 5, 2, directions=(2, 1)), Plan(8, 1, 2, 1, 1)),  # parts, and a launch for each axis
    (Case(2, 5, 3, 3, 5, directions=(3,)), Plan(1, 3, 2, 1, 1)),  # a last block that is not full
    # segments: dividing, not dividing, a line each
    (Case(1, 2, 3, 5, 2, segment=2), Plan(1, 5, 2, 1, 1)),
    (Case(1, 3, 4, 6, 1, segment=3, directions=(2, 0)), Plan(4, 1, 4, 1, 1)),
    (Case(1, 2, 3, 3, 2, segment=1, directions=(0, 3)), Plan(4, 1, 2, 1, 1)),
    # tiles with a halo: chained through memory, with segments shorter and longer than the halo, and in parts
    (Case(1, 2, 7, 5, 2, directions=(0, 2)), Plan(4, 2, 2, 1, 1, 2)),
    (Case(1, 2, 5, 6, 1, directions=(3, 1)), Plan(8, 1, 2, 1, 1, 3)),
    (Case(1, 2, 9, 4, 2, segment=3, directions=(0,)), Plan(4, 2, 2, 1, 1, 2)),
    (Case(1, 2, 9, 4, 2, segment=2, directions=(2,)), Plan(4, 2, 2, 1, 1, 2)),
    (Case(1, 3, 5, 7, 1, directions=(1, 0)), Plan(8, 1, 2, 1, 1, 2)),
    (Case(1, 2, 3, 8, 1, directions=ALL), Plan(4, 1, 1, 1, 1, 1)),  # axes differ, parts, tiles
    # 16 bits
    (Case(1, 4, 3, 4, 4, dtype=BF16), Plan(2, 2, 4, 1, 1)),
    (Case(1, 4, 3, 4, 1, dtype=FP16), Plan(4, 1, 4, 1, 1)),
    (Case(1, 4, 5, 4, 2, dtype=BF16, segment=3, directions=(3, 0)), Plan(8, 1, 1, 1, 1)),
    # memory
    (Case(1, 3, 3, 4, 3, layout="channels_first", directions=(0, 1)), Plan(4, 1, 4, 1, 1)),
    (Case(2, 3, 3, 2, 3, layout="sliced", directions=(2, 1)), Plan(1, 3, 4, 1, 1)),
    (Case(1, 4, 2, 3, 2, layout="transposed", directions=(3, 0)), Plan(1, 3, 4, 1, 1)),
    (Case(1, 4, 4, 3, 2, layout="projected", dtype=BF16, directions=(1, 2)), Plan(2, 2, 4, 1, 1)),
]


@pytest.mark.parametrize("case, plan", SCANS, ids=[f"{c}-{'.'.join(map(str, p))}" for c, p in SCANS])
def test_gated_scan(case, plan):
    check_scans(case, plan)


@pytest.mark.parametrize(
    "case, plan",
    [
        (Case(1, 4, 3, 5, 4, directions=(0,)), Plan(1, 3, 4, 1, 1)),
        (Case(1, 4, 3, 5, 1, directions=(3,)), Plan(8, 1, 4, 1, 1)),
        (Case(1, 6, 5, 3, 2, segment=2, directions=(1,), layout="sliced"), Plan(2, 2, 4, 1, 1)),
        (Case(1, 4, 7, 3, 1, directions=(2,), dtype=FP64), Plan(4, 2, 2, 1, 1, 2)),
        (Case(1, 2, 1, 4, 2, directions=(0,), layout="channels_first"), Plan(2, 1, 2, 1, 1)),
        (Case(1, 2, 4, 3, 2, directions=(2,), dtype=BF16), Plan(4, 1, 2, 1, 1)),
    ],
    ids=str,
)
def test_line_scan(case, plan):
    check_line_scans(case, plan)


def test_plans_of_its_own():
    """Without parameters given: those of plan.py."""
    check_scans(Case(1, 2, 3, 2, 2, directions=(0, 3)))


def test_segments_as_long_as_the_scan_are_none():
    case, options = Case(1, 2, 3, 4, 1), (list(ALL), None)
    *problem, grad = scan_problem(case)
    p = Plan(4, 1, 2, 1, 1)
    h = backend.gated_scan(*problem, *options, plan=p)
    grads = backend.gated_scan_backward(grad, *problem, h, *options, plan=p)
    for segment in (4, 99):
        again = backend.gated_scan(*problem, list(ALL), segment, plan=p)
        assert torch.equal(again, h)
        for a, b in zip(backend.gated_scan_backward(grad, *problem, h, list(ALL), segment, plan=p), grads, strict=True):
            assert torch.equal(a, b)


def test_tiles_compute_what_whole_lines_do():
    """Bit for bit: the same places by the same operations."""
    case, directions = Case(1, 2, 9, 5, 2), [0, 2]
    *problem, grad = scan_problem(case._replace(directions=(0, 2)))
    found = []
    for p in (Plan(16, 1, 2, 1, 1), Plan(8, 1, 2, 1, 1, 2)):
        h = backend.gated_scan(*problem, directions, None, plan=p)
        found.append([h, *backend.gated_scan_backward(grad, *problem, h, directions, None, plan=p)])
    for whole, tiled in zip(*found, strict=True):
        assert torch.equal(whole, tiled)


@pytest.mark.parametrize("expanded", [(0, 1, 2, 3, 4), (1,), (3, 4)], ids=str)
def test_gradients_that_repeat_in_memory(expanded):
    case, options = Case(1, 2, 2, 3, 2, directions=(0, 1)), ([0, 1], None)
    *problem, grad = scan_problem(case)
    for dim in expanded:
        grad = grad.narrow(dim, 0, 1)
    grad = grad.expand(1, 2, 2, 2, 3)
    h = reference.gated_scan(*problem, *options)
    got = backend.gated_scan_backward(grad, *problem, h, *options, plan=Plan(1, 3, 2, 1, 1))
    assert_within_budget(
        got,
        reference.gated_scan_backward(grad, *problem, h, *options),
        reference.gated_scan_backward(*wide((grad, *problem, h)), *options),
    )


@pytest.mark.parametrize("sizes", [(0, 2, 3, 3), (1, 0, 3, 3), (1, 2, 0, 3), (1, 2, 3, 0)], ids=str)
def test_empty(sizes):
    batch, channels, height, width = sizes
    x, gate = torch.randn(sizes), torch.randn(batch, 4, channels, height, width)
    logits = torch.randn(batch, 4, max(channels, 1), 3, height, width)
    h = backend.gated_scan(x, gate, logits, list(ALL), None)
    grads = backend.gated_scan_backward(h, x, gate, logits, h, list(ALL), None)
    assert [t.shape for t in (h, *grads)] == [t.shape for t in (gate, x, gate, logits)]
    if channels:
        weights = [torch.randn(4, 3, channels, 2), *torch.randn(2, 4, channels, 2), torch.randn(channels, 2)]
        proxy, center = torch.randn(batch, 2, height, width), torch.randn(batch, 4, channels)
        options = (list(ALL), None, 256, center)
        assert backend.propagate(x, proxy, *weights, *options).shape == x.shape
        grads = backend.propagate_backward(x, x, proxy, *weights, *options)
        assert [g.shape for g in grads] == [t.shape for t in (x, proxy, *weights, center)]
        assert not any(g.any() for g in grads[2:])


@pytest.mark.parametrize("plan", [Plan(4, 1, 2, 1, 1), Plan(1, 4, 2, 1, 1), Plan(2, 2, 2, 1, 1)], ids=str)
def test_nan_goes_where_the_reference_lets_it(plan):
    """Of x, gate and logits, and from the last place of a line, which is nobody's neighbour at the other end."""
    options = ([1], None)
    *problem, grad = scan_problem(Case(1, 3, 3, 4, 3, directions=(1,)))
    x, gate, logits = problem
    x[0, 0, 1, 3] = gate[0, 0, 1, 0, 3] = logits[0, 0, 2, 0, 1, 1] = float("nan")
    h, expected = backend.gated_scan(*problem, *options, plan=plan), reference.gated_scan(*problem, *options)
    assert expected.isnan().any() and torch.equal(h.isnan(), expected.isnan())
    got = backend.gated_scan_backward(grad, *problem, expected, *options, plan=plan)
    for a, b in zip(got, reference.gated_scan_backward(grad, *problem, expected, *options), strict=True):
        assert (a.isnan() | ~b.isnan()).all()  # NaN is never lost


@pytest.mark.parametrize("plan", [Plan(2, 2, 2, 1, 1), Plan(4, 1, 2, 1, 1, 1)], ids=str)
def test_nan_in_a_center_spares_lines_that_start_a_segment(plan):
    """And NaN in the weights of these lines spares them still."""
    x, gate, logits, _ = scan_problem(Case(1, 2, 4, 3, 2, directions=(1,)))
    center, h = torch.zeros(1, 1, 2), launch.empty_maps(x, 1, torch.float32)
    center[0, 0, 1] = logits[:, :, :, :, 0] = float("nan")
    launch.scan(x, gate, logits, h, [1], 3, center=center, plan=plan)
    expected = torch.zeros(h.shape, dtype=torch.bool)
    expected[0, 0, 1, 1:3] = True
    assert torch.equal(h.isnan(), expected)


def test_logits_beneath_the_floor_have_no_gradient_and_make_no_nan():
    *problem, grad = scan_problem(Case(1, 2, 3, 4, 2, directions=(0,)))
    logits = problem[2]
    logits[0, 0, 0, 0], logits[0, 0, 0, 1], logits[0, 0, 1] = -1e30, -28.01, float("-inf")
    logits[0, 0, 0, 2] = 1e30
    options, p = ([0], None), Plan(4, 1, 2, 1, 1)
    h = backend.gated_scan(*problem, *options, plan=p)
    dlogits = backend.gated_scan_backward(grad, *problem, h, *options, plan=p)[2]
    assert h.isfinite().all() and dlogits.isfinite().all()
    assert not dlogits[0, 0, 0, :2].any() and not dlogits[0, 0, 1].any()
    expected = reference.gated_scan(*wide(problem), *options)
    torch.testing.assert_close(h.double(), expected, rtol=1e-5, atol=1e-5)


# ---- propagate -------------------------------------------------------------------------------------------------------


PROPAGATES = [
    (Case(1, 2, 3, 4, 2, segment=3, centered=True), "together", True),  # of one axis two segments, of the other one
    (Case(2, 3, 3, 2, 1, directions=(3, 0)), "together", False),
    (Case(1, 2, 3, 4, 2, directions=(2, 1)), "each", True),
    (Case(1, 2, 2, 3, 1, directions=(0, 3), dtype=BF16, centered=True), "each", True),
    (Case(1, 2, 2, 3, 2, directions=(0, 3), dtype=BF16, layout="sliced"), "together", True),
    (Case(1, 2, 2, 3, 2, directions=(1, 0), dtype=FP16), "each", True),
    (Case(2, 2, 3, 5, 1, directions=(2, 0), centered=True), 2, True),  # the state is carried from band to band
    (Case(1, 2, 5, 2, 2, directions=(1, 3), dtype=FP64, layout="channels_first", centered=True), 2, True),
    (Case(1, 1, 3, 4, 1, directions=(0, 1)), 1, True),  # a band for each line
    (Case(1, 2, 2, 5, 1, directions=(0, 2), segment=2, centered=True), 2, False),  # bands along segments carry nothing
    (Case(1, 2, 2, 7, 2, directions=(2,), segment=4, centered=True), 3, True),  # segments end within bands
    (Case(1, 2, 2, 4, 2, directions=(0, 2), dtype=BF16), 2, True),
]


@pytest.mark.parametrize("case, mode, skip", PROPAGATES, ids=[f"{c}-{m}" for c, m, _ in PROPAGATES])
def test_propagate(case, mode, skip, monkeypatch):
    force(monkeypatch, mode)
    check_propagate(case, skip=skip)


def test_propagate_with_projections_wider_than_the_maps(monkeypatch):
    force(monkeypatch, 2)
    check_propagate(Case(1, 2, 2, 4, 2, directions=(0,), dtype=BF16), exact_weights=True)


def test_propagate_image_by_image(monkeypatch):
    monkeypatch.setattr(pieces, "_images_at_once", lambda *_, **__: 1)
    check_propagate(Case(2, 2, 2, 3, 1, directions=(2,), dtype=BF16, centered=True))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("segment", [None, 7, 1000])
@pytest.mark.parametrize("mib", [0, 1, 2, 8, 20, 100000])
def test_pieces_fit_the_workspace(mib, segment, dtype, backward):
    """They cover every line once, and the maps of each fit: logits, gates with the skip's, features, and h."""
    batch, channels, height, width, features = 2, 24, 96, 130, 8
    x, weight_proj = torch.empty(batch, channels, height, width, dtype=dtype), torch.empty(4, 3, channels, features)
    work = pieces._Work.choose(x, weight_proj, list(ALL), segment, mib, backward=backward)
    gate_size = work.gate_dtype.itemsize
    for number, passes in enumerate(work.passes()):
        covered = 0
        for piece in passes:
            places = height if piece.axis == -1 else width
            pixels = batch * (height * width if piece.lines is None else piece.lines * places)
            each = len(piece.indices) * channels * (3 * x.element_size() + 2 * gate_size + 4)
            each += features * x.element_size() + channels * gate_size * piece.opens
            needed = pixels * each * (2 if backward else 1) + (x.numel() * 4 if work.wide_sum else 0)
            assert needed <= mib << 20 or piece.lines == 1, (piece, needed)
            assert piece.origin == covered
            covered += (piece.total or 1) if piece.lines is None else piece.lines
            if work.band_lines and segment and not work.carries:
                assert piece.origin % segment == 0
        assert piece.lines is None or covered == piece.total == (width if number % 2 == 0 else height)
    assert work.together == (mib == 100000)
    if mib == 0:
        assert work.band_lines == 1


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_images_at_once(dtype, backward):
    """As many as fit with all directions, in equal parts, else with one, else a single one in bands."""
    x, weight_proj = torch.empty(16, 24, 32, 32, dtype=dtype), torch.empty(4, 3, 24, 8)
    workspaces = (0, 4, 10, 20, 1000)
    images = [pieces._images_at_once(x, weight_proj, 4, mib, backward=backward) for mib in workspaces]
    for mib, count in zip(workspaces, images, strict=True):
        work = pieces._Work.choose(x[:count], weight_proj, list(ALL), None, mib, backward=backward)
        assert (work.band_lines is not None) == (mib == 0), mib
        assert work.together or mib < 10
    assert images[0] == 1 and images[-1] == 16 and images == sorted(images)


def test_plans_are_within_their_bounds():
    for places in (1, 2, 5, 8, 9, 31, 56, 64, 65, 100, 224, 256, 333, 512, 1024, 1025, 4000, 16384, 50000):
        for channels in (1, 3, 8, 96, 640):
            for scans in (1, 4, 64, 4096):
                for size in (2, 4, 8):
                    for backward in (False, True):
                        p = plan(places, 100, channels, scans, size, backward)
                        assert all(n & (n - 1) == 0 for n in (p.strips, p.channels, p.warps)), p
                        assert (p.halo > 0 and p.own > 0) or p.strips * p.places >= places, p
                        most = (16 if backward else 32) * (4 if size == 2 else 2)  # bound is for 32 lanes
                        assert p.strips * p.places * p.channels <= most * 32 * p.warps, p


# ---- 64-bit addresses ------------------------------------------------------------------------------------------------


def test_maps_of_more_than_two_to_the_31_elements():
    """Reads beyond 2^31 elements: maps whose rows lie 2^29 elements apart, in memory of which little is used."""
    from helpers.triton_race import watched

    rows, apart = 6, 1 << 29
    *problem, grad = scan_problem(Case(1, 2, rows, 2, 1, directions=(1,), dtype=FP16))
    torch.utils.deterministic.fill_uninitialized_memory = False  # the outer fixture switches it on again
    try:
        memory = torch.empty(apart * (rows - 1) + 1000, dtype=FP16)
    except RuntimeError as error:
        pytest.skip(f"no address space for it: {error}")
    taken = 0

    def spread(t: torch.Tensor, channels: int) -> torch.Tensor:
        """The same values with rows far apart and channels innermost."""
        nonlocal taken
        order = [d for d in range(t.dim()) if d not in (t.dim() - 2, channels)] + [channels]
        strides = dict(zip(order, t.permute(t.dim() - 2, *order).contiguous().stride()[1:], strict=True))
        strides[t.dim() - 2] = apart
        found = memory.as_strided(t.shape, [strides[d] for d in range(t.dim())], taken)
        taken += t.numel()
        return found.copy_(t)

    x, gate, logits = (spread(t, channels) for t, channels in zip(problem, (1, 2, 2), strict=True))
    p = Plan(2, 1, 2, 1, 1)
    with watched(overflow=True):
        h = backend.gated_scan(x, gate, logits, [1], None, plan=p)
        got = backend.gated_scan_backward(spread(grad, 2), x, gate, logits, spread(h, 2), [1], None, plan=p)
    assert torch.equal(h, backend.gated_scan(*problem, [1], None, plan=p))
    for a, b in zip(got, backend.gated_scan_backward(grad, *problem, h, [1], None, plan=p), strict=True):
        assert torch.equal(a, b)


def test_numbers_of_pixels_have_64_bits_where_a_map_has_two_to_the_31(monkeypatch):
    narrow, wide_index = triton.language.int32, triton.language.int64
    assert launch._pixel_index(1 << 15, 1 << 15) is narrow and launch._pixel_index(1 << 16, 1 << 15) is wide_index
    assert launch._pixel_index(1, (1 << 31) - 5) is wide_index  # a tile reaches beyond the last pixel
    monkeypatch.setattr(launch, "_pixel_index", lambda *_: wide_index)
    check_propagate(Case(2, 4, 3, 5, 2))
