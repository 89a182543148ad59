"""line_scan and gated_scan of the native CPU kernels, against a loop over lines in torch that is written out here."""

import itertools
import os
import re
import threading
import time

import pytest
import torch

from gspn.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.available()[0], reason=cpu.available()[1])

ISAS = cpu.supported_isas() if cpu.available()[0] else ()
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
ALL = [0, 1, 2, 3]
#        B  C   G   H   W
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 3, 5, 7),
    (1, 4, 2, 17, 19),
    (2, 6, 1, 1, 33),
    (1, 20, 20, 33, 1),
    (1, 33, 33, 14, 14),
    (1, 40, 4, 16, 37),
    (1, 2, 2, 9, 70),
]


# ---- the definition --------------------------------------------------------------------------------------------------


def normalize(logits, direction):
    """(..., 3, H, W): clamp, sigmoid, divided by the sum over the neighbours that exist."""
    sigmoid = torch.sigmoid(torch.clamp(logits, min=-28))
    columns = direction in (0, 2)
    places = logits.shape[-2 if columns else -1]
    exists = torch.ones(3, places, dtype=torch.bool)
    exists[0, 0] = exists[2, -1] = False
    exists = exists[:, :, None] if columns else exists[:, None, :]
    sigmoid = torch.where(exists, sigmoid, torch.zeros_like(sigmoid))
    return sigmoid / sigmoid.sum(-3, keepdim=True)


def loop(x, weights, direction, segment=None):
    """h of gated input x (B, C, H, W) and weights (B, G, 3, H, W), line after line."""
    weights = weights.repeat_interleave(x.shape[1] // weights.shape[1], 1)
    if direction in (0, 2):
        x, weights = x.transpose(-1, -2), weights.transpose(-1, -2)
    if direction in (2, 3):
        x, weights = x.flip(-2), weights.flip(-2)
    lines = []
    for t, (line, (prev, same, following)) in enumerate(
        zip(x.unbind(-2), zip(*[w.unbind(-2) for w in weights.unbind(2)], strict=False), strict=False)
    ):
        if t % (segment or x.shape[-2]):
            h = lines[-1]
            line = line + same * h
            line = line + torch.nn.functional.pad(prev[..., 1:] * h[..., :-1], (1, 0))
            line = line + torch.nn.functional.pad(following[..., :-1] * h[..., 1:], (0, 1))
        lines.append(line)
    h = torch.stack(lines, -2)
    h = h.flip(-2) if direction in (2, 3) else h
    return h.transpose(-1, -2) if direction in (0, 2) else h


def gated_loop(x, gate, logits, directions, segment=None):
    scans = [loop(gate[:, i] * x, normalize(logits[:, i], d), d, segment) for i, d in enumerate(directions)]
    return torch.stack(scans, 1)


def with_gradients(function, inputs, grad):
    """[h, gradients of the inputs]; zeros for inputs that h does not depend on."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    h = function(*inputs)
    found = torch.autograd.grad(h, inputs, grad, allow_unused=True)
    return [h.detach()] + [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=False)]


# ---- the kernels -----------------------------------------------------------------------------------------------------


def native_gated(x, gate, logits, grad, directions, segment=None, **options):
    """[h, dx, dgate, dlogits], written into buffers that hold NaN."""
    poisoned = lambda t, dtype=None: torch.full_like(t, torch.nan, dtype=dtype)  # noqa: E731
    state = torch.float64 if x.dtype == torch.float64 else torch.float32
    shared = logits.shape[2] != x.shape[1]
    out = (poisoned(x, state), poisoned(gate), poisoned(logits, state if shared else None))
    h = cpu.gated_scan(x, gate, logits, directions, segment, out=poisoned(gate), **options)
    return [h, *cpu.gated_scan_backward(grad, x, gate, logits, h, directions, segment, out=out, **options)]


def native_line(x, weights, grad, direction, segment=None, **options):
    h = cpu.line_scan(x, weights, direction, segment, **options)
    return [h, *cpu.line_scan_backward(grad, weights, h, direction, segment, **options)]


def channels_last(t):
    """The same values with the channels (groups of logits) innermost in memory; (B, C, H, W), gates and logits."""
    channel = {4: 1, 5: 2, 6: 2}[t.dim()]
    return t.movedim(channel, -1).contiguous().movedim(-1, channel)


def weights_last(t):
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def sliced(t):
    storage = torch.full([2 * n for n in t.shape], torch.nan, dtype=t.dtype)
    view = storage[tuple(slice(0, None, 2) for _ in t.shape)]
    return view.copy_(t)


LAYOUTS = {
    "contiguous": (lambda t: t, lambda t: t),
    "channels_last": (channels_last, weights_last),
    "sliced": (sliced, sliced),
    "mixed": (channels_last, lambda t: t),
}


def problem(batch, channels, groups, height, width, directions=4, dtype=torch.float64, seed=0):
    """x, gate, logits, gradient of h."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    size, logits = (height, width), 2 * draw(batch, directions, groups, 3, height, width)
    return (
        draw(batch, channels, *size),
        draw(batch, directions, channels, *size),
        logits,
        draw(batch, directions, channels, *size),
    )


def error(found, expected):
    """Of the largest element; relative to the largest one expected, but for gradients that vanish exactly."""
    if not expected.numel():
        return 0.0
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=0.1)).item()


def assert_close(found, expected, dtype, what, slack=1.0):
    for name, f, e in zip(("h", "dx", "dgate or dweights", "dlogits"), found, expected, strict=False):
        assert (f.shape == e.shape and f.dtype == dtype) or name.startswith("dgate")
        assert error(f, e) <= slack * TOLERANCE[dtype], (name, error(f, e), *what)


# ---- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_scan(dtype, layout):
    place, place_logits = LAYOUTS[layout]
    for shape, segment in zip(SHAPES * 2, itertools.cycle((None, 3, 1, 8, 50))):
        x, gate, logits, grad = problem(*shape, dtype=dtype)
        wide = [t.double() for t in (x, gate, logits)]
        expected = with_gradients(lambda *a, s=segment: gated_loop(*a, ALL, s), wide, grad.double())
        inputs = place(x), place(gate), place_logits(logits), place(grad)
        for isa, threads in zip(ISAS, (1, 2, 2), strict=False):
            found = native_gated(*inputs, ALL, segment, isa=isa, threads=threads)
            assert_close(found, expected, dtype, (shape, segment, isa))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", [(d, d) for d in DTYPES] + [(d, torch.float32) for d in DTYPES[1:3]], ids=str)
def test_line_scan(dtypes, layout):
    dtype, weight_dtype = dtypes
    place, place_weights = LAYOUTS[layout][0], weights_last if layout == "channels_last" else LAYOUTS[layout][1]
    for shape, segment, direction in zip(
        SHAPES * 2, itertools.cycle((None, 3, 1, 8, 50)), itertools.cycle((0, 1, 2, 3))
    ):
        x, _, weights, grad = problem(*shape, directions=1, dtype=dtype)
        weights, grad = (0.2 * weights[:, 0]).to(weight_dtype), grad[:, 0]
        for d in (direction, (direction + 2) % 4, (direction + 1) % 4):
            wide = [x.double(), weights.double()]
            expected = with_gradients(lambda *a, d=d, s=segment: loop(*a, d, s), wide, grad.double())
            isa = ISAS[d % len(ISAS)]
            found = native_line(place(x), place_weights(weights), place(grad), d, segment, isa=isa)
            assert found[2].dtype == weight_dtype
            assert_close(found, expected, dtype, (shape, segment, isa, d))


@pytest.mark.parametrize("directions", [[0], [3], [2, 1], [1, 3, 0], [3, 2, 1, 0]], ids=str)
def test_any_directions(directions):
    x, gate, logits, grad = problem(2, 5, 5, 6, 11, len(directions))
    expected = with_gradients(lambda *a: gated_loop(*a, directions), (x, gate, logits), grad)
    assert_close(native_gated(x, gate, logits, grad, directions), expected, torch.float64, ())


def test_channels_of_a_group_in_several_pieces():
    """A line of many channels does not fit the scratch of one scan: their weights' gradients are summed over pieces."""
    x, gate, logits, grad = problem(1, 384, 1, 3, 160, dtype=torch.float32)
    wide = [t.double() for t in (x, gate, logits)]
    expected = with_gradients(lambda *a: gated_loop(*a, ALL), wide, grad.double())
    for place in (lambda t: t, channels_last, sliced):
        assert_close(native_gated(place(x), place(gate), logits, place(grad), ALL), expected, torch.float32, ())


def test_blocks_of_lines():
    """A long line leaves room for few lines at a time in the scratch of the transposing kernel."""
    x, gate, logits, grad = problem(1, 1, 1, 700, 150, directions=2, dtype=torch.float32)
    wide = [t.double() for t in (x, gate, logits)]
    expected = with_gradients(lambda *a: gated_loop(*a, [0, 2], 67), wide, grad.double())
    assert_close(native_gated(x, gate, logits, grad, [0, 2], 67), expected, torch.float32, ())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_not_less_exact_than_eager(isa, dtype):
    """At most twice the error of the same loop in eager torch in the same dtype (where that has an error at all)."""
    for shape in ((2, 8, 8, 24, 24), (1, 12, 3, 31, 18)):
        inputs = problem(*shape, dtype=dtype)
        exact = with_gradients(lambda *a: gated_loop(*a, ALL), [t.double() for t in inputs[:3]], inputs[3].double())
        eager = with_gradients(lambda *a: gated_loop(*a, ALL), inputs[:3], inputs[3])
        for place in (lambda t: t, channels_last):
            found = native_gated(*(place(t) for t in inputs), ALL, isa=isa)
            for name, f, g, e in zip(("h", "dx", "dgate", "dlogits"), found, eager, exact, strict=False):
                floor = torch.finfo(dtype).eps * (20 if dtype == torch.float64 else 1)
                assert error(f, e) <= max(2 * error(g, e), floor), (name, shape, error(f, e), error(g, e))


def test_strided_outputs_and_expanded_inputs():
    x, gate, logits, _ = problem(2, 3, 1, 6, 5)
    grad = torch.ones(()).double().expand(2, 4, 3, 6, 5)
    x = x[:, :1].expand(2, 3, 6, 5)
    expected = with_gradients(lambda *a: gated_loop(*a, ALL), (x, gate, logits), grad)
    out = sliced(torch.full_like(gate, torch.nan))
    assert cpu.gated_scan(x, gate, logits, ALL, out=out) is out
    assert_close([out, *cpu.gated_scan_backward(grad, x, gate, logits, out, ALL)], expected, torch.float64, ())


def test_outputs_keep_the_memory_format():
    x, gate, logits, grad = (channels_last(t) for t in problem(2, 4, 4, 6, 5))
    found = native_gated(x, gate, logits, grad, ALL)
    assert [t.stride() for t in found] == [t.stride() for t in (gate, x, gate, logits)]


def test_empty_batch():
    found = native_gated(*problem(0, 4, 2, 3, 5), ALL)
    assert [t.shape[0] for t in found] == [0] * 4
    weights = torch.zeros(0, 4, 3, 3, 5)
    assert cpu.line_scan(torch.zeros(0, 4, 3, 5), weights, 0).shape == (0, 4, 3, 5)


# ---- what is exact ---------------------------------------------------------------------------------------------------


def test_no_gradient_beneath_the_clamp_and_where_no_neighbour_is():
    x, gate, logits, grad = problem(1, 2, 2, 5, 6)
    logits[..., 1, 2, 3] = -28.5
    logits[..., 0, 1, 1] = -1000.0
    expected = with_gradients(lambda *a: gated_loop(*a, ALL), (x, gate, logits), grad)
    found = native_gated(x, gate, logits, grad, ALL)
    assert_close(found, expected, torch.float64, ())
    assert not found[3][..., 1, 2, 3].any() and not found[3][..., 0, 1, 1].any()
    assert not found[3][:, 0, :, 0, 0].any() and not found[3][:, 0, :, 2, -1].any()  # right: places run down
    assert not found[3][:, 1, :, 0, :, 0].any() and not found[3][:, 3, :, 2, :, -1].any()  # down and up
    single = native_gated(*problem(1, 2, 2, 1, 6, directions=1), [0])
    assert not single[3].any()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_constant_field_stays_constant(dtype):
    """Weights that sum to 1 keep a constant state; with input only in the first line nothing is added."""
    logits = 4 * torch.randn(1, 1, 3, 3, 7, 400).to(dtype)
    gate = torch.zeros(1, 1, 3, 7, 400, dtype=dtype)
    gate[..., 0] = 1
    h = cpu.gated_scan(torch.ones(1, 3, 7, 400, dtype=dtype), gate, logits, [0])
    assert (h.double() - 1).abs().max() <= 3e-5


@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "sliced"))
def test_nan_and_infinity_go_where_they_go_in_eager(layout, value):
    place, place_logits = LAYOUTS[layout]
    for seed, (shape, segment) in enumerate(
        itertools.product(((2, 3, 3, 7, 9), (1, 4, 2, 6, 20), (1, 18, 18, 5, 5)), (None, 3))
    ):
        inputs = problem(*shape, dtype=torch.float32, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for which in range(3):
            spoiled = [t.clone() for t in inputs[:3]]
            flat = spoiled[which].view(-1)
            flat[torch.randint(flat.numel(), (2,), generator=generator)] = value
            flat[0] = value  # a corner: a neighbour that is missing in some directions
            expected = gated_loop(*spoiled, ALL, segment)
            x, gate, logits = spoiled
            for isa in ISAS:
                found = cpu.gated_scan(place(x), place(gate), place_logits(logits), ALL, segment, isa=isa)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("dtype", "bits", "integer"),
    [
        (torch.float64, 0x7FF80000000007A2, torch.int64),
        (torch.float64, 0x7FF00000000007A2, torch.int64),
        (torch.float64, -1, torch.int64),
        (torch.float32, 0x7FC00081, torch.int32),
        (torch.float32, 0x7FC001FF, torch.int32),
        (torch.bfloat16, 0x7FC1, torch.int16),
        (torch.float16, 0x7E55, torch.int16),
    ],
)
def test_nan_of_any_payload_stays_nan(dtype, bits, integer, isa):
    nan = torch.tensor([bits], dtype=integer).view(dtype)
    x, logits = torch.ones(1, 20, 3, 4, dtype=dtype), torch.zeros(1, 1, 20, 3, 3, 4, dtype=dtype)
    for k in range(3):
        poisoned = logits.clone()
        poisoned[0, 0, 7, k, 1, 2] = nan
        h = cpu.gated_scan(x, x[:, None], poisoned, [0], isa=isa)[0, 0]
        assert h[7, 1, 2].isnan() and h.isnan().sum() < h[7].numel()


def test_weights_of_missing_neighbours_and_first_lines_are_not_read():
    for shape, place in itertools.product(((1, 3, 3, 6, 9), (1, 4, 1, 6, 9), (2, 20, 20, 5, 5)), LAYOUTS.values()):
        x, _, weights, grad = problem(*shape, directions=1)
        weights, grad = 0.2 * weights[:, 0], grad[:, 0]
        for d in ALL:
            spoiled = weights.clone()
            if d in (0, 2):
                spoiled[:, :, 0, 0], spoiled[:, :, 2, -1] = torch.nan, torch.inf
                spoiled[..., 0 if d == 0 else -1] = torch.nan
            else:
                spoiled[:, :, 0, :, 0], spoiled[:, :, 2, :, -1] = torch.nan, torch.inf
                spoiled[..., 0 if d == 1 else -1, :] = torch.nan
            move_weights = weights_last if place[1] is channels_last else place[1]
            expected = native_line(x, weights, grad, d)
            found = native_line(place[0](x), move_weights(spoiled), place[0](grad), d)
            assert_close(found, expected, torch.float64, (shape, d))


def test_same_result_every_time():
    inputs = problem(2, 24, 6, 20, 30, dtype=torch.float32)
    for threads in (1, 2):
        first = native_gated(*inputs, ALL, threads=threads)
        for _ in range(3):
            assert all(map(torch.equal, first, native_gated(*inputs, ALL, threads=threads)))


# ---- arguments -------------------------------------------------------------------------------------------------------


def test_bad_arguments():
    x, gate, logits, grad = problem(1, 4, 2, 3, 5, dtype=torch.float32)
    h = cpu.gated_scan(x, gate, logits, ALL)
    for wrong, told in ((logits.double(), "float64"), (logits.bfloat16(), "bfloat16"), (logits.to("meta"), "meta")):
        with pytest.raises(TypeError, match=f"logits .*{told}"):
            cpu.gated_scan(x, gate, wrong, ALL)
    for wrong in (logits[:, :, :, :2], logits[..., 1:], logits[:, :3]):
        with pytest.raises(ValueError, match=rf"logits .* got {re.escape(str(tuple(wrong.shape)))}"):
            cpu.gated_scan(x, gate, wrong, ALL)
    with pytest.raises(ValueError, match=r"groups .* 4 channels, got 3"):
        cpu.gated_scan(x, gate, logits[:, :, :1].expand(1, 4, 3, 3, 3, 5), ALL)
    with pytest.raises(TypeError, match=r"grad.* got torch\.float64"):
        cpu.gated_scan_backward(grad.double(), x, gate, logits, h, ALL)
    with pytest.raises(TypeError, match=r"x .* got torch\.int32"):
        cpu.gated_scan(x.int(), gate, logits, ALL)
    with pytest.raises(ValueError, match=r"directions .* got \[0, 1, 2, 4\]"):
        cpu.gated_scan(x, gate, logits, [0, 1, 2, 4])
    with pytest.raises(ValueError, match=r"segment .* got 0"):
        cpu.line_scan(x, logits[:, 0], 0, 0)
    with pytest.raises(ValueError, match=r"direction .* got 5"):
        cpu.line_scan(x, logits[:, 0], 5)
    for isa in ("sse9", "AVX2", ""):
        with pytest.raises(ValueError, match=rf"isa .* got {isa!r}"):
            cpu.line_scan(x, logits[:, 0], 0, isa=isa)


# ---- threads and processes -------------------------------------------------------------------------------------------


def test_calls_from_several_threads():
    """ctypes lets go of the interpreter lock: calls really overlap."""
    inputs = [problem(1, 12, 4, 40, 40, dtype=torch.float32, seed=s) for s in range(4)]
    expected = [native_gated(*i, ALL, threads=1) for i in inputs]
    failures = []

    def work(i):
        for k in range(20):
            found = native_gated(*inputs[i], ALL, threads=1 + k % 2)
            if not all(torch.allclose(f, e, rtol=1e-4, atol=1e-4) for f, e in zip(found, expected[i], strict=False)):
                failures.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process")  # a fork of a process with threads is what is tested
def test_forked_child():
    """GNU OpenMP hangs in a child that asks for threads after its parent has used some."""
    inputs = problem(1, 32, 32, 48, 48, dtype=torch.float32)
    expected = native_gated(*inputs, ALL, threads=2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                h = cpu.gated_scan(*inputs[:3], ALL, threads=2)
                status = 0 if h.numpy().tobytes() == expected[0].numpy().tobytes() else 2
            finally:
                os._exit(status)
        deadline = time.monotonic() + 120  # of a machine that is busy; it takes less than a second
        while (found := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        if found[0] == 0:
            os.kill(child, 9)
            os.waitpid(child, 0)
        assert found[0] != 0, "the child hangs"
        assert os.waitstatus_to_exitcode(found[1]) == 0
    finally:
        torch.set_num_threads(before)


def test_scratch_is_reported_and_bounded():
    cpu.scratch_peak_bytes(reset=True)
    native_gated(*problem(1, 64, 64, 64, 64, dtype=torch.float32), ALL, threads=1)
    assert 0 < cpu.scratch_peak_bytes() <= (64 << 20)
