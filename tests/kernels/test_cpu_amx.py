"""What only the tile registers of AMX can get wrong: permission, other libraries that use them, processes and threads.
Their results are tested with those of the other instruction sets."""

import concurrent.futures
import inspect

import pytest
import torch
from helpers.fresh import fresh

from gspn.kernels import cpu

pytestmark = pytest.mark.skipif(
    not cpu.available()[0] or "amx" not in cpu.supported_isas(), reason="no AMX on this machine"
)


def found(isa=None):
    """y and the gradients of one problem."""
    draw = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, n, 28, 48, generator=draw).bfloat16() for n in (24, 40, 24)]
    projections = [torch.randn(s, generator=draw) / 6 for s in ((4, 3, 24, 40), (4, 24, 40), (4, 24, 40), (24, 40))]
    y = cpu.propagate(*maps[:2], *projections, [0, 1, 2, 3], isa=isa)
    return [y, *cpu.propagate_backward(maps[2], *maps[:2], *projections, [0, 1, 2, 3], isa=isa)[:-1]]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


COMMON = "import torch\nfrom gspn.kernels import cpu\n" + inspect.getsource(found) + inspect.getsource(same)


@pytest.fixture(scope="module", autouse=True)
def _permission():
    """Some systems have AMX and refuse it, with a filter of system calls for example."""
    code = "import ctypes; print(ctypes.CDLL(None).syscall(158, 0x1023, 18))"  # arch_prctl(ARCH_REQ_XCOMP_PERM, ...)
    if fresh(code).stdout != "0\n":
        pytest.skip("the system refuses the tile registers")


def test_it_is_the_best_and_differs_from_avx512():
    code = """
assert cpu.supported_isas()[-1] == "amx" and same(found(), found("amx"))
print([torch.equal(a, b) for a, b in zip(found(), found("avx512"))])
"""
    assert fresh(COMMON + code).stdout == f"{[False] * 7}\n"


@pytest.mark.parametrize(
    ("height", "width", "features", "segment", "groups", "expected"),
    [
        (28, 48, 24, None, 3, (True, True)),
        (28, 48, 23, None, 3, (True, False)),
        (28, 48, 11, None, 3, (False, False)),
        (28, 48, 15, None, 1, (False, False)),
        (28, 48, 24, None, 1, (True, True)),
        (28, 48, 24, 3, 3, (True, False)),  # short segments
        (28, 35, 24, 4, 3, (True, False)),  # tiles of which half the rows would be empty
        (8, 48, 24, None, 3, (False, False)),
        (9, 14, 24, None, 3, (True, False)),
    ],
)
def test_tiles_are_for_these(height, width, features, segment, groups, expected):
    code = f"""
draw = lambda *s: torch.randn(*s)
x, proxy, grad = (draw(1, n, {height}, {width}).bfloat16() for n in (3, {features}, 3))
projections = [draw(4, 3, {groups}, {features}), draw(4, 3, {features}), draw(4, 3, {features}), None]
ways = [0, 1, 2, 3]
tensors, isas = (x, proxy, *projections, ways, {segment}), ("amx", "avx512")
y, other = (cpu.propagate(*tensors, isa=isa) for isa in isas)
dw, dother = (cpu.propagate_backward(grad, *tensors, isa=isa)[3] for isa in isas)
print(not torch.equal(y, other), not torch.equal(dw, dother))
"""
    assert fresh("import torch\nfrom gspn.kernels import cpu\n" + code).stdout == "{} {}\n".format(*expected)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("shape", [(9, 16, 4096, 80), (1, 16, 2000, 300), (2, 64, 28, 48)], ids=str)
def test_scratch_is_not_much_more_than_that_of_avx512(shape, backward):
    height, channels, width, features = shape
    maps = [torch.randn(1, n, height, width).bfloat16() for n in (channels, features, channels)]
    gates = torch.randn(1, channels, features)
    arguments = (*maps[:2], torch.randn(1, 3, channels, features), gates, gates, None, [1])
    estimates = [
        cpu.propagate_scratch_bytes(*arguments[:3], [1], backward=backward, threads=1, isa=isa)
        for isa in ("amx", "avx512")
    ]
    assert estimates[0] <= 2 * estimates[1]


@pytest.mark.parametrize("backward", [False, True])
def test_scratch_is_as_estimated(backward):
    """Of wide rows with many features, whose packing takes more than their scan."""
    code = f"""
maps = [torch.randn(1, n, 9, 4096).bfloat16() for n in (16, 512, 16)]
projections = [torch.randn(s) for s in ((1, 3, 16, 512), (1, 16, 512), (1, 16, 512))]
tensors = (*maps[:2], *projections, None, [1])
print(cpu.propagate_scratch_bytes(*tensors[:3], [1], backward={backward}, threads=1))
cpu.scratch_peak_bytes(reset=True)
torch.set_num_threads(1)
cpu.propagate_backward(maps[2], *tensors) if {backward} else cpu.propagate(*tensors)
print(cpu.scratch_peak_bytes())
"""
    estimate, peak = map(int, fresh("import torch\nfrom gspn.kernels import cpu\n" + code).stdout.split())
    assert estimate <= peak <= estimate + 2 * (2 << 20)  # two buffers, rounded up to huge pages


def test_refused_permission_leaves_avx512():
    """Linux refuses the registers while a thread's stack for signals is too small to keep them."""
    small_stack = """
import ctypes
class Stack(ctypes.Structure):
    _fields_ = [("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(4096)
stack = Stack(ctypes.addressof(memory), 0, 4096)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
"""
    run = fresh(small_stack + COMMON + "print(same(found(), found('avx512')))")
    assert run.stdout == "True\n" and run.stderr == ""


def test_permission_is_asked_for_when_tiles_are_needed():
    """After it, Linux refuses stacks for signals that are too small for the registers."""
    code = """
import ctypes
class Stack(ctypes.Structure):
    _fields_ = [("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(4096)
def set_stack(flags):
    return ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), flags, 4096)), None)
cpu.supported_isas()
found("avx512")
disable = 2
results = [set_stack(0), set_stack(disable)]
found()
print(*results, set_stack(0))
"""
    assert fresh(COMMON + code).stdout == "0 0 -1\n"


def test_in_turns_with_another_library():
    """oneDNN multiplies bfloat16 with tiles of its own shapes."""
    a, b = torch.randn(70, 50).bfloat16(), torch.randn(50, 90).bfloat16()
    ours, theirs = found(), a @ b
    for _ in range(3):
        assert torch.equal(a @ b, theirs) and same(found(), ours)


def test_in_several_threads_at_once():
    expected = found()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(same(f.result(), expected) for f in [pool.submit(found) for _ in range(12)])


def test_in_a_forked_child():
    code = """
import os
torch.set_num_threads(1)  # those of GNU OpenMP do not survive a fork
expected = found()
child = os.fork()
if child == 0:
    os._exit(0 if same(found(), expected) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert fresh(COMMON + code).stdout == "0\n"
