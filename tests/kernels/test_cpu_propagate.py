"""propagate and its gradients in the native CPU kernel, against a loop over lines in torch that is written out here.

The loop is differentiable, so autograd through it, in float64, is what the gradients are held against. Results are
written into memory that was filled with NaN, and the kernels' scratch memory has seen NaN before.
"""

import functools
import threading
from typing import NamedTuple

import pytest
import torch

from gspn.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.available()[0], reason=cpu.available()[1])

ISAS = cpu.supported_isas() if cpu.available()[0] else ()
NAMES = ("x", "proxy", "weight_proj", "input_proj", "output_proj", "skip_proj", "center")
ALL = (0, 1, 2, 3)
LAYOUTS = ("channels_first", "channels_last", "sliced", "transposed")


class Case(NamedTuple):
    batch: int = 1
    channels: int = 17
    height: int = 5
    width: int = 7
    features: int = 3
    groups: int | None = None  # None: a group for each channel
    directions: tuple[int, ...] = ALL
    segment: int | None = None
    skip: bool = True
    centered: bool = False

    def __str__(self):
        shape, ways = f"{self.batch}x{self.channels}x{self.height}x{self.width}", "".join(map(str, self.directions))
        return f"{shape}-S{self.features}-G{self.groups}-{ways}-K{self.segment}{'-centered' * self.centered}"


CASES = [
    Case(1, 1, 1, 1, 1),
    Case(2, 5, 1, 13, 3, segment=2, centered=True),
    Case(1, 5, 11, 1, 20, groups=1),
    Case(2, 17, 5, 7, 3),
    Case(2, 17, 5, 7, 3, centered=True),
    Case(1, 40, 13, 4, 8, groups=20, segment=3, skip=False, centered=True),
    Case(1, 40, 7, 11, 1, groups=2, directions=(2,), segment=4),
    Case(2, 33, 9, 31, 16, groups=1, segment=4, centered=True),
    Case(3, 16, 17, 3, 20, directions=(3, 0, 1), segment=1),
    Case(1, 18, 6, 19, 12, groups=9, directions=(1, 3), segment=7, centered=True),
    Case(1, 20, 3, 67, 5, directions=(2, 0), segment=100, skip=False),
    Case(1, 16, 43, 2, 36, directions=(1,), centered=True),
    Case(1, 1, 6, 5, 2, groups=1),
    Case(3, 19, 18, 35, 9, groups=1, directions=(3, 0, 1), segment=5, centered=True),
    Case(2, 34, 37, 17, 40, groups=1, directions=(2,), skip=False),
    Case(1, 20, 13, 70, 80, segment=5),
    Case(2, 33, 14, 15, 44, directions=(0, 3), segment=6, centered=True),
    Case(1, 17, 66, 14, 33, groups=1),
    Case(1, 3, 107, 108, 24, directions=(0, 3), centered=True),
]
# Enough work for several threads: many blocks of channels; one block, so that directions are dealt out; several images.
BUSY = [
    Case(1, 40, 24, 37, 20, centered=True),
    Case(1, 4, 64, 80, 7, segment=5),
    Case(5, 12, 20, 21, 16, groups=3, directions=(0, 1, 3), centered=True),
    Case(2, 70, 24, 37, 20, groups=1, segment=9, centered=True),
    Case(1, 4, 64, 80, 7, groups=1),
]


# ---- the definition --------------------------------------------------------------------------------------------------


def definition(x, proxy, weight_proj, input_proj, output_proj, skip_proj, center, directions, segment=None):
    channels = x.shape[1]
    project = lambda w, proxy: torch.einsum("cs,bs...->bc...", w, proxy)  # noqa: E731
    y = torch.zeros_like(x) if skip_proj is None else project(skip_proj, proxy) * x
    for i, direction in enumerate(directions):
        scan_axis = 3 if direction in (0, 2) else 2
        weight_projs = [w.repeat_interleave(channels // w.shape[0], 0) for w in weight_proj[i]]
        inputs, proxies = (project(input_proj[i], proxy) * x).unbind(scan_axis), proxy.unbind(scan_axis)
        states, h = [None] * len(inputs), None
        for step in range(len(inputs)):
            t = step if direction in (0, 1) else len(inputs) - 1 - step
            if step % (segment or len(inputs)) == 0:
                h = inputs[t]
            else:
                previous, same, following = normalize([project(w, proxies[t]) for w in weight_projs])
                zero = torch.zeros_like(h[..., :1])
                from_previous = torch.cat((zero, previous[..., 1:] * h[..., :-1]), -1)
                from_next = torch.cat((following[..., :-1] * h[..., 1:], zero), -1)
                taken = 0 if center is None else center[:, i, :, None]
                h = (inputs[t] - taken) + from_previous + same * h + from_next
            states[t] = h
        y = y + project(output_proj[i], proxy) * torch.stack(states, scan_axis)
    return y


def normalize(logits):
    """Clamped, sigmoid, divided by the sum. What does not exist is left out before the sigmoid: 0 times NaN is NaN."""
    exists = torch.ones(3, logits[0].shape[-1], dtype=torch.bool)
    exists[0, 0] = exists[2, -1] = False
    sigmoids = []
    for logit, there in zip(logits, exists, strict=True):
        clamped = torch.where(
            logit < -28.0, torch.full_like(logit, -28.0), logit
        )  # a NaN's gradient is NaN, unlike clamp
        sigmoid = torch.sigmoid(torch.where(there, clamped, torch.zeros_like(logit)))
        sigmoids.append(torch.where(there, sigmoid, torch.zeros_like(logit)))
    total = sum(sigmoids)
    return [s / total for s in sigmoids]


def gradients(grad_y, *inputs, directions, segment):
    """y and the gradients of all inputs; zeros where nothing depends on an input."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    y = definition(*leaves, directions, segment)
    used = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(y, used, grad_y, allow_unused=True, materialize_grads=True))
    return y.detach(), [None if t is None else next(found) for t in leaves]


# ---- problems --------------------------------------------------------------------------------------------------------


@functools.cache
def problem(case, dtype=torch.float32, seed=0):
    """grad_y, inputs (maps rounded to dtype; all float64), and in float64 y and the gradients."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    b, c, h, w, s, groups, directions, segment, skip, centered = case
    d, groups = len(directions), c if groups is None else groups
    grad_y, x, proxy = (draw(b, n, h, w).to(dtype).double() for n in (c, c, s))
    projections = [draw(d, 3, groups, s), draw(d, c, s), draw(d, c, s), draw(c, s) if skip else None]
    inputs = [x, proxy, *(None if p is None else (p / s**0.5).float().double() for p in projections)]
    gated = torch.einsum("dcs,bshw->bdchw", inputs[3], proxy) * x[:, None]
    inputs.append(gated.mean((3, 4)).float().double() if centered else None)
    y, grads = gradients(grad_y, *inputs, directions=directions, segment=segment)
    return grad_y, inputs, y, grads


def cast(tensors, dtype):
    """Maps to dtype, projections to that of the state."""
    state = torch.float64 if dtype == torch.float64 else torch.float32
    return [None if t is None else t.to(dtype if i < 2 else state) for i, t in enumerate(tensors)]


def lay(t, layout):
    if layout == "channels_last":
        return t.to(memory_format=torch.channels_last)
    if layout == "sliced":
        return torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), torch.nan, dtype=t.dtype)[..., 1::2].copy_(t)
    if layout == "transposed":
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    return t.contiguous()


def error(found, expected):
    """Largest error over the largest value, NaN if there is any. Below 1e-2 the gradients here are cancellations."""
    return ((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-2)).item()


@pytest.fixture(autouse=True)
def _nan_in_new_memory():
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="module")
def _one_thread_for_the_definition():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def forward(inputs, directions, segment=None, **options):
    *inputs, center = inputs
    return cpu.propagate(*inputs, list(directions), segment, center=center, **options)


def backward(grad_y, inputs, directions, segment=None, **options):
    *inputs, center = inputs
    return cpu.propagate_backward(grad_y, *inputs, list(directions), segment, center=center, **options)


def equal(found, expected):
    pairs = zip(found, expected, strict=True)
    return all(torch.equal(a, b) if torch.is_tensor(a) and torch.is_tensor(b) else a is b for a, b in pairs)


def run(case, dtype=torch.float32, layout="channels_first", seed=0, **options):
    grad_y, inputs, y, grads = problem(case, dtype, seed)
    arguments = cast(inputs, dtype)
    arguments[:2] = [lay(t, layout) for t in arguments[:2]]
    out = lay(torch.full_like(y, torch.nan, dtype=dtype), layout)
    found = forward(arguments, case.directions, case.segment, out=out, **options)
    assert found is out and found.dtype == dtype
    found_grads = backward(lay(grad_y.to(dtype), layout), arguments, case.directions, case.segment, **options)
    for t, d in zip(arguments, found_grads, strict=True):
        assert (t is None and d is None) or (d.shape == t.shape and d.dtype == t.dtype)
    return found, found_grads, y, grads


# ---- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_gives_the_definition(case, isa):
    for layout in ("channels_first", "channels_last"):
        y, grads, expected, expected_grads = run(case, torch.float64, layout, isa=isa, threads=1)
        assert error(y, expected) < 1e-13
        for name, d, e in zip(NAMES, grads, expected_grads, strict=True):
            assert d is None or error(d, e) < 1e-12, name


@functools.cache
def eager_errors(case, seeds):
    """Of y and the gradients, the largest error of the definition run in float32."""
    worst = [0.0] * 8
    for seed in range(seeds):
        grad_y, inputs, expected, expected_grads = problem(case, seed=seed)
        arguments = cast(inputs, torch.float32)
        y, grads = gradients(grad_y.float(), *arguments, directions=case.directions, segment=case.segment)
        for i, (d, e) in enumerate(zip((y, *grads), (expected, *expected_grads), strict=True)):
            worst[i] = max(worst[i], 0.0 if d is None else error(d, e))
    return worst


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_is_as_accurate_as_eager_torch(case, isa):
    own = eager_errors(case, len(LAYOUTS))
    for seed, layout in enumerate(LAYOUTS):
        y, grads, expected, expected_grads = run(case, torch.float32, layout, seed, isa=isa, threads=1)
        for name, d, e, limit in zip(("y", *NAMES), (y, *grads), (expected, *expected_grads), own, strict=True):
            assert d is None or error(d, e) <= 2 * limit + 1e-7, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_16_bit_storage_costs_one_rounding(case, isa, dtype):
    rounding, exponential = torch.finfo(dtype).eps / 2, 7.5e-5  # the second: of those that y's weights come from
    product = 2**-16 if isa == "amx" and dtype == torch.bfloat16 else 2e-6  # tiles multiply two terms of bfloat16
    for layout in LAYOUTS:
        y, grads, expected, expected_grads = run(case, dtype, layout, isa=isa, threads=1)
        for name, d, e in zip(("y", *NAMES), (y, *grads), (expected, *expected_grads), strict=True):
            if d is None:
                continue
            one_rounding = rounding if name in ("y", "x", "proxy") else 0  # the projections' gradients are float32
            slack = exponential if name == "y" and case.groups != 1 else product
            assert ((d.double() - e).abs() <= one_rounding * e.abs() + slack * e.abs().max().clamp(min=1)).all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", [CASES[4], CASES[9], *BUSY], ids=str)
def test_16_bit_maps_lose_no_more_than_the_rounding_of_exact_ones(case, isa, dtype):
    y, _, expected, _ = run(case, dtype, isa=isa, threads=1)
    deviation = lambda found: (found.double() - expected).norm()  # noqa: E731
    assert deviation(y) <= 1.01 * deviation(expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", BUSY, ids=str)
def test_several_threads(case, isa, dtype):
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float64: 1e-12}[dtype]
    for threads in (1, 2, 3, 8):
        layout = LAYOUTS[threads % 4]
        first = run(case, dtype, layout, isa=isa, threads=threads)
        again = run(case, dtype, layout, isa=isa, threads=threads)
        for d, a, e in zip((first[0], *first[1]), (again[0], *again[1]), (first[2], *first[3]), strict=True):
            # deterministic for a given number of threads
            assert d is a is None or (torch.equal(d, a) and error(d, e) < tolerance)


@pytest.mark.parametrize("case", [CASES[4], CASES[7]], ids=str)
def test_a_long_segment_is_global(case):
    longest = max(case.height, case.width)
    for segment in (longest, longest + 5):
        whole, cut = (run(case._replace(segment=k)) for k in (None, segment))
        assert equal((whole[0], *whole[1]), (cut[0], *cut[1]))


def test_batch_of_nothing():
    case = Case(centered=True)
    _, inputs, _, _ = problem(case)
    x, proxy, *projections, center = cast(inputs, torch.float32)
    inputs = [x[:0], proxy[:0], *projections, center[:0]]
    y = forward(inputs, ALL)
    assert y.shape == (0, *x.shape[1:])
    dx, dproxy, *grads, dcenter = backward(x[:0], inputs, ALL)
    assert dx.shape == (0, *x.shape[1:]) and dproxy.shape == (0, *proxy.shape[1:]) and dcenter.shape == (0, 4, 17)
    assert all((d == 0).all() for d in grads)


@pytest.mark.parametrize("size", [(0, 3), (3, 0)])
def test_maps_of_no_pixels_are_refused(size):
    x, proxy = torch.randn(2, 4, *size), torch.randn(2, 3, *size)
    tensors = (x, proxy, torch.randn(4, 3, 4, 3), torch.randn(4, 4, 3), torch.randn(4, 4, 3), None, list(ALL))
    for call in (lambda: cpu.propagate(*tensors), lambda: cpu.propagate_backward(x, *tensors)):
        with pytest.raises(ValueError, match=r"H >= 1 and W >= 1.*\(2, 4, "):
            call()


def test_16_bit_projections_keep_their_type():
    case = CASES[4]
    grad_y, inputs, _, _ = problem(case, torch.bfloat16)
    arguments = [t.bfloat16() for t in inputs]
    grads = backward(grad_y.bfloat16(), arguments, ALL)
    _, expected = gradients(grad_y, *[t.double() for t in arguments], directions=ALL, segment=None)
    assert all(d.dtype == torch.bfloat16 and error(d, e) < 5e-3 for d, e in zip(grads, expected, strict=True))


# ---- numerics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
def test_saturated_logits(isa):
    """Logits of -40, -28, 0 and 40: finite, weights that sum to 1, and no gradient below -28."""
    steps = torch.tensor([-40.0, -28.0, 0.0, 40.0])
    proxy = torch.ones(1, 1, 6, 5)
    weight_proj = steps[torch.cartesian_prod(*[torch.arange(4)] * 3)].T.reshape(1, 3, 64, 1)
    x, one = torch.randn(1, 64, 6, 5), torch.ones(1, 64, 1)
    for direction in ALL:
        arguments = (x, proxy, weight_proj, one, one, None, None)
        expected, grads = gradients(
            x.double(), *[t if t is None else t.double() for t in arguments], directions=[direction], segment=None
        )
        assert error(forward(arguments, [direction], isa=isa), expected) < 1e-6
        found = backward(x, arguments, [direction], isa=isa)
        assert all(d is None or error(d, e) < 2e-6 for d, e in zip(found, grads, strict=True))
        assert (found[2][weight_proj == -40] == 0).all() and (found[2][weight_proj == -28] != 0).any()


@pytest.mark.parametrize("isa", ISAS)
def test_saturated_logits_that_all_channels_share(isa):
    """The same logits, each combination at a pixel of its own."""
    steps = torch.tensor([-40.0, -28.0, 0.0, 40.0])
    proxy = steps[torch.cartesian_prod(*[torch.arange(4)] * 3)].T.reshape(1, 3, 8, 8).contiguous()
    x, ones = torch.randn(1, 18, 8, 8), torch.ones(1, 18, 3) / 40
    for direction in ALL:
        arguments = (x, proxy, torch.eye(3).view(1, 3, 1, 3), ones, ones, None, None)
        expected, grads = gradients(
            x.double(), *[t if t is None else t.double() for t in arguments], directions=[direction], segment=None
        )
        assert error(forward(arguments, [direction], isa=isa), expected) < 1e-6
        found = backward(x, arguments, [direction], isa=isa)
        assert all(d is None or error(d, e) < 2e-6 for d, e in zip(found, grads, strict=True))


@pytest.mark.parametrize("isa", ISAS)
def test_weights_sum_to_one_over_thousands_of_lines(isa):
    shapes = [(1, 17, 3, 4096), (1, 17, 4096, 1)]
    for shape in shapes:
        x = torch.zeros(shape)
        x[:, :, 0] = 1
        along = [0] if shape[3] > 1 else [1]
        x = torch.zeros(shape).index_fill(3 if along == [0] else 2, torch.tensor(0), 1.0)
        proxy, one = torch.ones(1, 1, *shape[2:]), torch.ones(1, 17, 1)
        for groups in (17, 1):
            y = cpu.propagate(x, proxy, 3 * torch.randn(1, 3, groups, 1), one, one, None, along, isa=isa)
            assert (y - 1).abs().max() < 1e-3  # 4096 roundings


@pytest.mark.parametrize("isa", ISAS)
def test_large_values_do_not_overflow_on_the_way(isa):
    shape = (1, 18, 4, 9)
    x, proxy, one = torch.full(shape, 1e35), torch.ones(1, 1, *shape[2:]), torch.ones(1, 18, 1)
    y = cpu.propagate(x, proxy, torch.full((1, 3, 18, 1), -27.0), one, one, None, [0], isa=isa)
    assert torch.allclose(y / 1e35, torch.arange(1.0, 10.0).expand(shape), rtol=1e-5)


POISONS = ("x", "proxy", "weight_proj", "input_proj", "output_proj", "center", "grad_y")


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", POISONS)
@pytest.mark.parametrize("case", [CASES[4]._replace(height=9, segment=4), CASES[5], CASES[9], CASES[13]], ids=str)
def test_nan_and_infinity_go_where_they_go_in_the_definition(case, where, poison):
    for isa in ISAS:
        grad_y, inputs, _, _ = problem(case)
        grad_y, inputs = grad_y.float(), cast(inputs, torch.float32)
        poisoned = {"grad_y": grad_y, **dict(zip(NAMES, inputs, strict=True))}
        poisoned[where] = poisoned[where].clone()
        poisoned[where].view(-1)[poisoned[where].numel() // 2] = poison
        grad_y, inputs = poisoned.pop("grad_y"), list(poisoned.values())
        expected, expected_grads = gradients(grad_y, *inputs, directions=case.directions, segment=case.segment)
        y = forward(inputs, case.directions, case.segment, isa=isa)
        assert_same_finiteness(y, expected)
        if poison == poison and where != "grad_y":
            continue  # what an infinity leaves behind in a gradient depends on the order of the products
        grads = backward(grad_y, inputs, case.directions, case.segment, isa=isa)
        for name, d, e in zip(NAMES, grads, expected_grads, strict=True):
            if d is not None:
                assert torch.equal(d.isfinite(), e.isfinite()), (isa, name)


def assert_same_finiteness(found, expected):
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isposinf(), expected.isposinf()) and torch.equal(found.isneginf(), expected.isneginf())
    finite = expected.isfinite()
    assert torch.allclose(found[finite], expected[finite], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", POISONS)
@pytest.mark.parametrize("segment", [None, 9])
@pytest.mark.skipif("amx" not in ISAS, reason="no AMX on this machine")
def test_tiles_hide_no_nan_and_no_infinity(segment, where, poison):
    """They may spread further than in the definition (propagate/amx.h), but not to another image."""
    grad_y, inputs, _, _ = problem(Case(2, 17, 30, 28, 24, segment=segment, centered=True), torch.bfloat16)
    maps = {"grad_y": grad_y, **dict(zip(NAMES, inputs, strict=True))}
    maps[where] = maps[where].clone()
    maps[where].view(-1)[maps[where].numel() // 2] = poison
    grad_y, *inputs = maps.values()
    expected, expected_grads = gradients(grad_y, *inputs, directions=ALL, segment=segment)
    y = forward(arguments := cast(inputs, torch.bfloat16), ALL, segment, isa="amx")
    assert not (y.isfinite() & ~expected.isfinite()).any()
    other = where in ("x", "proxy", "grad_y")  # the poison is in the second image
    assert not other or y[0].isfinite().all()
    if poison == poison and where != "grad_y":
        return  # what an infinity leaves behind in a gradient depends on the order of the products
    grads = backward(grad_y.bfloat16(), arguments, ALL, segment, isa="amx")
    for name, d, e in zip(NAMES, grads, expected_grads, strict=True):
        assert not (d.isfinite() & ~e.isfinite()).any(), name
        assert not other or name not in ("x", "proxy") or d[0].isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_scratch_that_has_seen_nan_leaves_no_trace(isa, dtype):
    for case in (*CASES, *BUSY):
        _, inputs, _, _ = problem(case, dtype)
        bad = [None if t is None else torch.full_like(t, torch.nan) for t in cast(inputs, dtype)]
        forward(bad, case.directions, case.segment, isa=isa, threads=2)
        backward(bad[0], bad, case.directions, case.segment, isa=isa, threads=2)
        y, grads, expected, expected_grads = run(case, dtype, isa=isa, threads=2)
        for d, e in zip((y, *grads), (expected, *expected_grads), strict=True):
            assert d is None or error(d, e) < (2e-6 if dtype == torch.float32 else 4e-3)


# ---- memory and threads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", [Case(9, 20, 24, 30, 24), Case(1, 12, 64, 80, 7, segment=5)], ids=str)
def test_a_small_workspace_runs_fewer_threads_and_images_at_a_time(case, isa, dtype):
    _, inputs, _, _ = problem(case, dtype)
    x, proxy, weight_proj = cast(inputs, dtype)[:3]
    for backward in (False, True):
        roomy, tight, alone = (
            cpu.propagate_scratch_bytes(
                x, proxy, weight_proj, list(case.directions), backward=backward, threads=n, workspace_mib=m, isa=isa
            )
            for n, m in ((8, 0), (8, 1), (1, 1))
        )
        assert alone <= tight < roomy and tight <= max(1 << 20, alone)
    y, grads, expected, expected_grads = run(case, dtype, isa=isa, threads=8, workspace_mib=1)
    for d, e in zip((y, *grads), (expected, *expected_grads), strict=True):
        assert d is None or error(d, e) < (1e-6 if dtype == torch.float32 else 4e-3)


def test_calls_from_several_python_threads():
    cases = [CASES[4], CASES[7], BUSY[0], BUSY[1]]
    expected = [run(case, threads=1) for case in cases]
    wrong = []

    def work(case, alone):
        for _ in range(5):
            y, grads, _, _ = run(case, threads=1)
            if not equal((y, *grads), (alone[0], *alone[1])):
                wrong.append(case)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(cases, expected, strict=True)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_gradcheck_of_the_native_code():
    class Propagate(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return forward(inputs, [0, 3], 2)

        @staticmethod
        def backward(ctx, grad_y):
            return backward(grad_y, ctx.saved_tensors, [0, 3], 2)

    _, inputs, _, _ = problem(Case(1, 3, 4, 5, 2, directions=(0, 3), segment=2, centered=True), torch.float64)
    assert torch.autograd.gradcheck(Propagate.apply, [t.clone().requires_grad_() for t in inputs])
