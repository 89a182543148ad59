"""The operators as mathematics: against the formula, and the properties that the paper proves or that users rely on."""

import pytest
import torch
from helpers.problems import pixel_loop, random_problem
from hypothesis import given, settings
from hypothesis import strategies as st

import gspn
from gspn.kernels import reference
from gspn.layers import input_means

FLIP = {"width": ({"right": "left", "left": "right"}, 3), "height": ({"down": "up", "up": "down"}, 2)}
SIZES = [(1, 1), (1, 6), (6, 1), (5, 7), (7, 4), (2, 11)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("segment", [None, 1, 3, 50])
def test_gated_scan_is_the_formula(size, segment, backend):
    x, gate = torch.randn(1, 4, *size, dtype=torch.float64), torch.randn(1, 4, 4, *size, dtype=torch.float64)
    logits = 3 * torch.randn(1, 4, 2, 3, *size, dtype=torch.float64)
    h = gspn.gated_scan(x, gate, logits, segment=segment, backend=backend)
    for i, direction in enumerate(gspn.DIRECTIONS):
        expected = pixel_loop(x[0], gate[0, i], logits[0, i], direction, segment)
        torch.testing.assert_close(h[0, i], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("segment", [None, 2])
@pytest.mark.parametrize("groups", [6, 3, 1])
def test_propagate_is_gated_scans_merged(segment, groups, backend):
    x, proxy, weight, entry, exit_, skip = random_problem(2, 6, 5, 7, 3, groups)
    project = lambda p: torch.einsum("...s,bshw->b...hw", p, proxy)  # noqa: E731
    logits = project(weight).transpose(2, 3)
    h = gspn.gated_scan(x, project(entry), logits, segment=segment, backend="reference")
    expected = (project(exit_) * h).sum(1) + project(skip) * x
    y = gspn.propagate(x, proxy, weight, entry, exit_, skip, segment=segment, backend=backend)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    without = gspn.propagate(x, proxy, weight, entry, exit_, segment=segment, backend=backend)
    torch.testing.assert_close(without, expected - project(skip) * x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("segment", [None, 1, 3, 50])
def test_center_is_taken_in_lines_that_go_on(size, segment, backend):
    """Of a pixel_loop whose gated input is what is left."""
    x, proxy, weight, entry, exit_, skip = random_problem(2, 4, *size, 3, 2)
    center = torch.randn(2, 4, 4, dtype=torch.float64)
    project = lambda p: torch.einsum("...s,bshw->b...hw", p, proxy)  # noqa: E731
    logits, gates, expected = project(weight).transpose(2, 3), project(entry), project(skip) * x
    for i, direction in enumerate(gspn.DIRECTIONS):
        lines = size[i % 2 == 0]
        taken = [float(t % (segment or lines) > 0) for t in range(lines)]
        taken = torch.tensor(taken[::-1] if i >= 2 else taken, dtype=torch.float64)
        taken = (taken if i % 2 == 0 else taken[:, None]) * center[:, i, :, None, None]
        left, ones = gates[:, i] * x - taken, torch.ones_like(x)
        h = [pixel_loop(ones[n], left[n], logits[n, i], direction, segment) for n in range(2)]
        expected = expected + project(exit_)[:, i] * torch.stack(h)
    y = gspn.propagate(x, proxy, weight, entry, exit_, skip, center=center, segment=segment, backend=backend)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


def test_the_mean_arrives_once(backend):
    """With the mean of the gated input for center, what a constant adds comes through as it is, not once a line."""
    x, proxy, weight, entry, exit_, _ = random_problem(2, 4, 6, 9, 3, skip=False)
    proxy[:, 0], entry[:, :, 1:] = 1, 0  # the input gate is constant: a constant in x is one in the gated input
    more = torch.randn(2, 4, 1, 1, dtype=torch.float64)
    run = lambda x: gspn.propagate(  # noqa: E731
        x, proxy, weight, entry, exit_, center=(entry[None, :, :, 0] * x.mean((2, 3))[:, None]), backend=backend
    )
    gate = torch.einsum("dcs,bshw->bdchw", exit_, proxy) * entry[None, :, :, :1, None]
    torch.testing.assert_close(run(x + more) - run(x), gate.sum(1) * more, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("directions", [("right",), ("up", "down"), ("left", "down", "right")])
def test_any_directions_in_any_order(directions, backend):
    problem = random_problem(1, 3, 4, 6, 2, directions=len(directions))
    y = gspn.propagate(*problem, directions=directions, backend=backend)
    x, proxy, *projections, skip = problem
    parts = [
        gspn.propagate(x, proxy, *(p[i : i + 1] for p in projections), directions=(d,), backend="reference")
        for i, d in enumerate(directions)
    ]
    expected = sum(parts) + torch.einsum("cs,bshw->bchw", skip, proxy) * x
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (4, 6)])
@pytest.mark.parametrize("segment", [None, 1, 4])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_the_written_out_gradients_are_those_of_autograd(size, segment, groups):
    """The operators' backward functions against autograd through the definition, in float64."""
    problem = [t.requires_grad_() for t in random_problem(2, 4, *size, 3, groups)]
    center = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    y = gspn.propagate(*problem, center=center, segment=segment, backend="reference")
    grad = torch.randn_like(y)
    by_autograd = torch.autograd.grad(y, [*problem, center], grad, materialize_grads=True)  # one line uses no weights
    options = ([0, 1, 2, 3], segment, 0, center.detach())
    written = reference.propagate_backward(grad, *(t.detach() for t in problem), *options)
    for got, expected in zip(written, by_autograd, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("segment", [None, 4, 3])
def test_gradcheck(segment):
    """Gradients of the registered operators by finite differences, with segments that do not divide the size."""
    if not gspn.available_backends()["cpu"].available:
        pytest.skip("without the native kernel this is the reference, which the test above covers")
    small = [t.requires_grad_() for t in random_problem(1, 2, 5, 7, 2)]
    center = torch.randn(1, 4, 2, dtype=torch.float64, requires_grad=True)
    centered = lambda center, *a: gspn.propagate(*a, center=center, segment=segment)  # noqa: E731
    assert torch.autograd.gradcheck(centered, [center, *small])
    x, gate = torch.randn(1, 2, 5, 7, dtype=torch.float64), torch.randn(1, 2, 2, 5, 7, dtype=torch.float64)
    logits = torch.randn(1, 2, 1, 3, 5, 7, dtype=torch.float64)
    scan = lambda *a: gspn.gated_scan(*a, directions=("left", "down"), segment=segment)  # noqa: E731
    assert torch.autograd.gradcheck(scan, [t.requires_grad_() for t in (x, gate, logits)])
    line = lambda *a: gspn.line_scan(*a, direction="up", segment=segment)  # noqa: E731
    assert torch.autograd.gradcheck(line, [x, logits[:, 0].detach().requires_grad_()])


def test_gradients_of_gradients_by_the_reference_alone():
    problem = [t.requires_grad_() for t in random_problem(1, 2, 3, 2, 2)]
    assert torch.autograd.gradgradcheck(lambda *a: gspn.propagate(*a, segment=2, backend="reference"), problem)
    (first,) = torch.autograd.grad(gspn.propagate(*problem).sum(), problem[:1], create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        torch.autograd.grad(first.sum(), problem)


def test_the_gradients_unfused_on_native_scans():
    if not gspn.available_backends()["cpu"].available:
        pytest.skip(gspn.available_backends()["cpu"].reason)
    from gspn.kernels import cpu

    problem, center = random_problem(2, 4, 5, 7, 3, groups=2), torch.randn(2, 4, 4, dtype=torch.float64)
    arguments = (torch.randn(2, 4, 5, 7, dtype=torch.float64), *problem, [0, 1, 2, 3], 3, 0, center)
    unfused = reference.propagate_backward(*arguments, cpu.gated_scan, cpu.gated_scan_backward)
    for got, expected in zip(unfused, reference.propagate_backward(*arguments), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


# The stability-context condition


@pytest.mark.parametrize("direction", gspn.DIRECTIONS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [0.0, 3.0, 40.0])
def test_rows_sum_to_one_at_edges_and_for_lines_of_length_one(direction, size, scale):
    logits = torch.randn(2, 3, 3, *size).sign() * scale
    weights = gspn.normalize_weights(logits, direction=direction)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 3, *size))
    along = 3 if direction in ("right", "left") else 4
    assert (weights.select(along, 0)[:, :, 0] == 0).all()
    assert (weights.select(along, size[along - 3] - 1)[:, :, 2] == 0).all()


def test_zero_logits_count_the_lines_in_bfloat16(backend):
    """x = 1 and gate 1 give the line's number, within 1% after 4096 lines, where bfloat16 itself counts to 256."""
    ones = torch.ones(1, 1, 65, 4096, dtype=torch.bfloat16)
    logits = torch.zeros(1, 1, 1, 3, 65, 4096, dtype=torch.bfloat16)
    h = gspn.gated_scan(ones, ones[:, None], logits, directions=("right",), backend=backend)
    assert h.dtype == torch.bfloat16
    error = (h[0, 0, 0].double() / torch.arange(1, 4097) - 1).abs()
    assert error.max() < 0.01


def test_a_constant_state_stays_constant_over_4096_lines(backend):
    x, logits = torch.zeros(1, 1, 4096, 9), 5 * torch.randn(1, 1, 1, 3, 4096, 9)
    x[..., 0, :] = 1
    h = gspn.gated_scan(x, torch.ones_like(x)[:, None], logits, directions=("down",), backend=backend)
    torch.testing.assert_close(h, torch.ones_like(h), rtol=0, atol=2e-4)


@pytest.mark.parametrize("logit", [-40.0, 40.0])
def test_extreme_logits(logit, backend):
    """Saturated logits weigh all neighbours alike; those below -28 have no gradient, those above do not overflow."""
    x = torch.randn(1, 2, 6, 5)
    logits = torch.full((1, 4, 2, 3, 6, 5), logit, requires_grad=True)
    gate = torch.ones(1, 4, 2, 6, 5)
    h = gspn.gated_scan(x, gate, logits, backend=backend)
    expected = gspn.gated_scan(x, gate, torch.zeros_like(logits), backend="reference")
    torch.testing.assert_close(h, expected, rtol=1e-5, atol=1e-5)
    h.square().sum().backward()
    assert (logits.grad == 0).all() if logit < 0 else logits.grad.isfinite().all()


def test_below_the_floor_the_other_neighbours_take_over(backend):
    """Unlike a clamped sum, a clamped logit keeps the rows at 1 where all logits are far below zero."""
    logits = torch.tensor([-40.0, -20.0, -40.0]).view(1, 1, 1, 3, 1, 1).expand(1, 1, 1, 3, 4, 6).contiguous()
    x = torch.zeros(1, 1, 4, 6)
    x[0, 0, :, 0] = 1
    h = gspn.gated_scan(x, torch.ones_like(x)[:, None], logits, directions=("right",), backend=backend)
    torch.testing.assert_close(h, torch.ones_like(h), rtol=0, atol=1e-5)


# Where context comes from


def jacobian(height, width, segment, backend, directions=gspn.DIRECTIONS):
    problem = random_problem(1, 1, height, width, 2, directions=len(directions))
    problem[0].requires_grad_()
    y = gspn.propagate(*problem, directions=directions, segment=segment, backend=backend)
    rows = [torch.autograd.grad(v, problem[0], retain_graph=True)[0].flatten() for v in y.flatten()]
    return torch.stack(rows)


@pytest.mark.parametrize("size", [(6, 6), (4, 9), (9, 3)])
def test_four_global_directions_connect_every_pair_of_pixels(size, backend):
    """On a square map the four cones cover everything; beyond it, everything within 45 degrees of an axis."""
    height, width = size
    found = jacobian(*size, None, backend) != 0
    index = torch.arange(height * width)
    rows, columns = index // width, index % width
    down, across = (rows[:, None] - rows).abs(), (columns[:, None] - columns).abs()
    assert ((down <= across) | (across <= down)).all()  # one of the two holds: every pair lies in a cone
    assert found.all()


def test_local_scans_do_not_reach_beyond_the_segment(backend):
    found = jacobian(6, 7, 3, backend, ("right",)) != 0
    for to in range(42):
        for source in range(42):
            steps = to % 7 - source % 7
            same_segment = (to % 7) // 3 == (source % 7) // 3
            inside = same_segment and 0 <= steps and abs(to // 7 - source // 7) <= steps
            assert bool(found[to, source]) == inside, (to, source)


@pytest.mark.parametrize("direction", gspn.DIRECTIONS)
def test_an_impulse_spreads_in_a_45_degree_cone(direction, backend):
    x = torch.zeros(1, 1, 9, 11)
    x[0, 0, 4, 5] = 1
    logits = torch.randn(1, 1, 1, 3, 9, 11)
    h = gspn.gated_scan(x, torch.ones_like(x)[:, None], logits, directions=(direction,), backend=backend)[0, 0, 0]
    rows, columns = torch.arange(9)[:, None] - 4, torch.arange(11) - 5
    ahead = {"right": columns, "left": -columns, "down": rows, "up": -rows}[direction]
    aside = rows if direction in ("right", "left") else columns
    assert torch.equal(h > 0, ((ahead >= 0) & (aside.abs() <= ahead)).expand(9, 11))


@pytest.mark.parametrize("segment", [None, 3])
@pytest.mark.parametrize("axis", ["width", "height"])
def test_flipping_the_map_exchanges_two_directions(axis, segment, backend):
    exchanged, dim = FLIP[axis]
    x, proxy, weight, entry, exit_, skip = random_problem(1, 4, 5, 7, 3)
    order = [gspn.DIRECTIONS.index(exchanged.get(d, d)) for d in gspn.DIRECTIONS]
    # Along the line the previous and the next place change sides in the directions whose lines are flipped.
    across = [d not in exchanged for d in gspn.DIRECTIONS]
    turned = torch.stack([weight[i].flip(0) if a else weight[i] for i, a in zip(order, across, strict=True)])
    y = gspn.propagate(x, proxy, weight, entry, exit_, skip, segment=segment, backend=backend)
    z = gspn.propagate(
        x.flip(dim), proxy.flip(dim), turned, entry[order], exit_[order], skip, segment=segment, backend=backend
    )
    torch.testing.assert_close(z, y.flip(dim), rtol=1e-10, atol=1e-10)


def test_transposing_the_map_exchanges_rows_and_columns(backend):
    x, proxy, weight, entry, exit_, skip = random_problem(1, 4, 5, 7, 3)
    order = [1, 0, 3, 2]
    y = gspn.propagate(x, proxy, weight, entry, exit_, skip, segment=3, backend=backend)
    turned = (x.mT, proxy.mT, weight[order], entry[order], exit_[order], skip)
    z = gspn.propagate(*turned, segment=3, backend=backend)
    torch.testing.assert_close(z, y.mT, rtol=1e-10, atol=1e-10)


def test_linear_in_x(backend):
    first, second = random_problem(1, 3, 4, 5, 2), torch.randn(1, 3, 4, 5, dtype=torch.float64)
    run = lambda x: gspn.propagate(x, *first[1:], backend=backend)  # noqa: E731
    torch.testing.assert_close(run(2 * first[0] - 3 * second), 2 * run(first[0]) - 3 * run(second))


def test_a_segment_as_long_as_the_map_is_global(backend):
    problem = random_problem(1, 3, 4, 5, 2)
    globally = gspn.propagate(*problem, backend=backend)
    torch.testing.assert_close(gspn.propagate(*problem, segment=5, backend=backend), globally, rtol=0, atol=0)


# What is not a number, and what is not there


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "proxy"])
def test_nan_and_inf_propagate_as_in_the_definition(value, where, backend):
    problem = random_problem(1, 3, 5, 6, 2, dtype=torch.float32)
    problem[where == "proxy"][0, 0, 2, 3] = value
    got = gspn.propagate(*problem, segment=4, backend=backend)
    expected = gspn.propagate(*(None if t is None else t.double() for t in problem), segment=4, backend="reference")
    assert torch.equal(got.isnan(), expected.isnan())
    assert got.isnan().any() or got.isinf().any()


def test_nan_logits_stay_nan():
    logits = torch.zeros(1, 1, 3, 2, 2)
    logits[0, 0, 1, 0, 0] = float("nan")
    assert gspn.normalize_weights(logits, direction="down")[0, 0, :, 0, 0].isnan().any()


def test_empty_batch(backend):
    problem = random_problem(0, 3, 4, 5, 2, dtype=torch.float32)
    for t in problem:
        t.requires_grad_()
    y = gspn.propagate(*problem, backend=backend)
    y.sum().backward()
    assert y.shape == (0, 3, 4, 5) and problem[2].grad.abs().sum() == 0


@pytest.mark.parametrize("direction", gspn.DIRECTIONS)
@pytest.mark.parametrize(("size", "segment"), [((1, 1), None), ((2, 1), 1), ((1, 4), 1), ((3, 4), 1), ((3, 4), 2)])
@pytest.mark.parametrize("batch", [0, 2])
def test_every_input_has_a_gradient(batch, size, segment, direction, backend):
    """Zeros where no line reaches another, so that trainers treat the parameters alike on every backend."""
    x, proxy, weight, entry, exit_, skip = random_problem(batch, 4, *size, 3, groups=2, directions=1)
    center = torch.randn(batch, 1, 4, dtype=torch.float64)
    weights, logits = (torch.randn(batch, *shape, 3, *size, dtype=torch.float64) for shape in ((2,), (1, 2)))
    gate, options = torch.randn(batch, 1, 4, *size, dtype=torch.float64), {"segment": segment, "backend": backend}
    several = {"directions": [direction], **options}
    calls = [  # with the place of what gives the weights
        (1, [x, weights], lambda *t: gspn.line_scan(*t, direction=direction, **options)),
        (2, [x, gate, logits], lambda *t: gspn.gated_scan(*t, **several)),
        (2, [x, proxy, weight, entry, exit_, skip], lambda *t: gspn.propagate(*t, **several)),
        (2, [x, proxy, weight, entry, exit_, center], lambda *t: gspn.propagate(*t[:-1], center=t[-1], **several)),
    ]
    for place, tensors, call in calls:
        tensors = [t.clone().requires_grad_() for t in tensors]
        grads = torch.autograd.grad(call(*tensors).square().sum(), tensors, allow_unused=True)
        assert all(g is not None and g.isfinite().all() for g in grads)
        assert [g.shape for g in grads] == [t.shape for t in tensors]
        reaches = batch > 0 and segment != 1 and size != (1, 1)
        assert (grads[place] != 0).any() == reaches and (grads[0] != 0).any() == (batch > 0)
    fixed = gspn.line_scan(x, weights.requires_grad_(), direction=direction, **options)
    assert fixed.requires_grad  # by the weights alone


def test_weights_that_no_line_reads_change_nothing_on_the_reference():
    x, weights = torch.tensor([-0.0, 1.0]).view(1, 2, 1, 1), torch.full((1, 2, 3, 1, 1), float("nan"))
    h = gspn.line_scan(x, weights, direction="right", backend="reference")
    assert torch.equal(h, x) and h[0, 0].signbit().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_at_most_twice_that_of_the_reference(dtype, backend):
    if backend == "reference":
        pytest.skip("the yardstick")
    allowed, found = [0.0] * 8, [0.0] * 8  # of y and the gradients: the largest of three problems
    for _ in range(3):
        x, proxy, weight, entry, *rest = random_problem(2, 5, 13, 9, 3, dtype=dtype)
        given = [x, proxy, weight, entry, *rest, input_means(x, proxy, entry)]
        exact, eager, mine = ([t.detach().to(d).requires_grad_() for t in given] for d in (torch.float64, dtype, dtype))
        for problem in (eager, mine):
            problem[-1] = given[-1].detach().clone().requires_grad_()
        grad, outputs = torch.randn(2, 5, 13, 9).to(dtype), []
        for problem, name in ((exact, "reference"), (eager, "reference"), (mine, backend)):
            y = gspn.propagate(*problem[:-1], center=problem[-1], backend=name)
            y.backward(grad.to(y.dtype))
            outputs.append([y.detach(), *(t.grad for t in problem)])
        for i, (truth, eagerly, got) in enumerate(zip(*outputs, strict=True)):
            assert got.dtype == eagerly.dtype
            floor = truth.abs().max() * torch.finfo(dtype).eps / 2
            allowed[i] = max(allowed[i], 2 * floor.item(), 2 * (eagerly - truth).abs().max().item())
            found[i] = max(found[i], (got - truth).abs().max().item())
    assert all(f <= a for f, a in zip(found, allowed, strict=True)), (found, allowed)


@settings(deadline=None, max_examples=40)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 14), st.integers(1, 14), st.integers(1, 5)),
    segment=st.one_of(st.none(), st.integers(1, 15)),
    memory_format=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)
def test_any_shape_and_layout(size, segment, memory_format):
    problem = random_problem(*size)
    formatted = [t.to(memory_format=memory_format) for t in problem[:2]] + problem[2:]
    expected = gspn.propagate(*problem, segment=segment, backend="reference")
    y = gspn.propagate(*formatted, segment=segment)
    assert y.stride() == torch.empty_like(formatted[0]).stride()
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("direction", gspn.DIRECTIONS)
def test_scans_keep_the_memory_format(direction, backend):
    x, weights = torch.randn(2, 4, 5, 7), torch.rand(2, 4, 3, 5, 7)
    for formatted in (x, x.to(memory_format=torch.channels_last)):
        h = gspn.line_scan(formatted, weights, direction=direction, backend=backend)
        assert h.stride() == formatted.stride()
    gate, logits = torch.randn(2, 1, 4, 5, 7), torch.randn(2, 1, 4, 3, 5, 7)
    h = gspn.gated_scan(x, gate, logits, directions=(direction,), backend=backend)
    assert h.stride() == gate.stride()


def test_sliced_and_expanded_inputs(backend):
    problem = random_problem(2, 6, 7, 8, 4)
    whole = torch.randn(2, 12, 14, 16, dtype=torch.float64)
    problem[0] = whole[:, ::2, 1::2, 3:11]
    problem[1] = torch.randn(1, 4, 7, 1, dtype=torch.float64).expand(2, 4, 7, 8)
    contiguous = [t.contiguous() for t in problem]
    expected = gspn.propagate(*contiguous, backend="reference")
    torch.testing.assert_close(gspn.propagate(*problem, backend=backend), expected, rtol=1e-10, atol=1e-10)


def test_runs_are_equal_bit_for_bit(backend):
    problem = [t.requires_grad_() for t in random_problem(2, 40, 33, 29, 5, dtype=torch.float32)]
    outputs = []
    for _ in range(3):
        y = gspn.propagate(*problem, backend=backend)
        outputs.append([y, *torch.autograd.grad(y.square().sum(), problem)])
    for first, second, third in zip(*outputs, strict=True):
        assert torch.equal(first, second) and torch.equal(first, third)
