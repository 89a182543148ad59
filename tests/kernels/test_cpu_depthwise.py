"""The gradient of a depthwise convolution's weight in the native CPU kernel, against its definition in float64."""

import threading

import pytest
import torch

from gspn.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.available()[0], reason=cpu.available()[1])

ISAS = cpu.supported_isas() if cpu.available()[0] else ()
KERNELS = cpu.DEPTHWISE_KERNELS
# (B,C,H,W): fewer channels than lanes, exactly as many, blocks that are not full; maps smaller than the kernel
SHAPES = [(1, 1, 1, 1), (2, 5, 1, 13), (1, 17, 11, 1), (3, 16, 4, 4), (2, 33, 5, 3), (1, 40, 9, 8), (2, 7, 7, 20)]
LAYOUTS = ("channels_last", "columns first", "gaps", "cropped")


def definition(grad_y, x, kernel):
    """Sums over the pixels whose tap lies on the map, so that what lies outside adds nothing."""
    (height, width), reach = x.shape[2:], kernel // 2
    dweight = torch.zeros(x.shape[1], 1, kernel, kernel, dtype=x.dtype)
    for ki in range(kernel):
        for kj in range(kernel):
            down, right = ki - reach, kj - reach
            rows = slice(max(0, -down), max(0, min(height, height - down)))
            columns = slice(max(0, -right), max(0, min(width, width - right)))
            seen = x[:, :, max(0, down) : max(0, height + down), max(0, right) : max(0, width + right)]
            g = grad_y[:, :, rows, columns]
            dweight[:, 0, ki, kj] = (g * seen[:, :, : g.shape[2], : g.shape[3]]).sum((0, 2, 3))
    return dweight


def torchs(grad_y, x, kernel):
    weight, pads = x.new_zeros(x.shape[1], 1, kernel, kernel), [kernel // 2] * 2
    return torch.ops.aten.convolution_backward(
        grad_y, x, weight, None, [1, 1], pads, [1, 1], False, [0, 0], x.shape[1], [False, True, False]
    )[1]


def lay(t, layout):
    """The same values with channels side by side, in memory that holds NaN elsewhere."""
    b, c, h, w = t.shape
    if layout == "columns first":
        storage = torch.full((b, w, h, c), torch.nan, dtype=t.dtype).permute(0, 3, 2, 1)
    elif layout == "gaps":
        storage = torch.full((b, 2 * h, w, c + 3), torch.nan, dtype=t.dtype).permute(0, 3, 1, 2)[:, 2 : c + 2, ::2]
    elif layout == "cropped":
        storage = torch.full((b, h + 2, w + 4, c), torch.nan, dtype=t.dtype).permute(0, 3, 1, 2)[:, :, 1:-1, 3:-1]
    else:
        storage = torch.full((b, h, w, c), torch.nan, dtype=t.dtype).permute(0, 3, 1, 2)
    return storage.copy_(t)


def problem(shape, dtype=torch.float32, seed=0):
    """grad_y and x, rounded to dtype, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).double() for _ in range(2)]


def run(maps, dtype, kernel, layout="channels_last", **options):
    grad_y, x = (lay(t.to(dtype), layout) for t in maps)
    found = cpu.depthwise_dweight(grad_y, x, kernel, **options)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    return found


def error(found, expected):
    return ((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-2)).item()


@pytest.fixture(autouse=True)
def _nan_in_new_memory():
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_definition_is_torchs(shape, kernel):
    maps = problem(shape)
    assert error(definition(*maps, kernel), torchs(*maps, kernel)) < 1e-13


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, kernel, isa):
    """16-bit maps are rounded before: their products are exact in float32, and only the sums round."""
    for dtype, tolerance in (
        (torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6), (torch.float64, 1e-14)
    ):  # fmt: skip
        maps = problem(shape, dtype)
        expected = definition(*maps, kernel)
        for layout in LAYOUTS:
            assert error(run(maps, dtype, kernel, layout, isa=isa, threads=1), expected) < tolerance, (dtype, layout)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(2, 17, 9, 31), (64, 20, 16, 16), (1, 5, 120, 130), (300, 16, 3, 3)], ids=str)
def test_float32_is_as_accurate_as_torch(shape, isa):
    for seed in range(3):
        maps = problem(shape, seed=seed)
        expected = torchs(*maps, 7)
        grad_y, x = (lay(t.float(), "channels_last") for t in maps)
        own = error(torchs(grad_y, x, 7), expected)
        assert error(cpu.depthwise_dweight(grad_y, x, 7, isa=isa, threads=1), expected) <= 2 * own + 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(60, 40, 16, 17), (7, 70, 40, 41), (1, 130, 60, 60)], ids=str)
def test_several_threads(shape, isa, dtype):
    maps = problem(shape, dtype)
    expected = torchs(*maps, 7)
    for threads in (1, 2, 3, 8):
        first, again = (run(maps, dtype, 7, isa=isa, threads=threads) for _ in range(2))
        assert torch.equal(first, again)  # deterministic for a given number of threads
        assert error(first, expected) < (1e-13 if dtype == torch.float64 else 1e-6)


def test_nothing_gives_zeros():
    for shape in ((0, 17, 5, 5), (2, 17, 0, 5), (2, 17, 5, 0)):
        assert torch.equal(run(problem(shape), torch.float32, 7), torch.zeros(17, 1, 7, 7))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", [0, 1], ids=["grad_y", "x"])
@pytest.mark.parametrize("place", [(0, 0), (4, 10), (8, 11)], ids=str)
def test_nan_and_infinity_go_where_torchs_go(where, place, poison):
    maps = [lay(t.float(), "channels_last") for t in problem((2, 18, 9, 12))]
    maps[where][1, 16, *place] = poison
    expected = torchs(*maps, 7)
    assert torch.equal(definition(*maps, 7).isfinite(), expected.isfinite()) and not expected.isfinite().all()
    for isa in ISAS:
        found = cpu.depthwise_dweight(*maps, 7, isa=isa)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("isa", ISAS)
def test_scratch_that_has_seen_nan_leaves_no_trace(isa):
    for shape in (*SHAPES, (60, 40, 16, 17)):
        maps = problem(shape)
        run([torch.full_like(t, torch.nan) for t in maps], torch.float32, 7, isa=isa, threads=2)
        assert error(run(maps, torch.float32, 7, isa=isa, threads=2), torchs(*maps, 7)) < 1e-6


def test_calls_from_several_python_threads():
    maps = [problem(shape) for shape in ((20, 20, 16, 17), (3, 40, 30, 8))]
    alone, wrong = [run(pair, torch.float32, 7, threads=1) for pair in maps], []

    def work(pair, expected):
        for _ in range(5):
            if not torch.equal(run(pair, torch.float32, 7, threads=1), expected):
                wrong.append(pair)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(maps, alone, strict=True)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_what_the_kernel_cannot_read_is_refused():
    x = lay(torch.randn(2, 6, 5, 4), "channels_last")
    with pytest.raises(ValueError, match=r"\(5, 7\), got 3"):
        cpu.depthwise_dweight(x, x, 3)
    with pytest.raises(ValueError, match="grad_y must have channels side by side"):
        cpu.depthwise_dweight(x.contiguous(), x, 7)
    with pytest.raises(ValueError, match=r"x must have channels side by side"):
        cpu.depthwise_dweight(x, x.contiguous(), 7)
    with pytest.raises(ValueError, match=r"grad_y must have shape \(2, 6, 5, 4\)"):
        cpu.depthwise_dweight(x[:1], x, 7)
    with pytest.raises(TypeError, match=r"grad_y must be torch\.float32, got torch\.float64"):
        cpu.depthwise_dweight(x.double(), x, 7)
