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
    maps = [torch.randn(2, n, 20, 33, generator=draw).bfloat16() for n in (24, 40, 24)]
    projections = [torch.randn(s, generator=draw) / 6 for s in ((4, 3, 24, 40), (4, 24, 40), (4, 24, 40), (24, 40))]
    y = cpu.propagate(*maps[:2], *projections, [0, 1, 2, 3], isa=isa)
    return [y, *cpu.propagate_backward(maps[2], *maps[:2], *projections, [0, 1, 2, 3], isa=isa)[:-1]]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


COMMON = "import torch\nfrom gspn.kernels import cpu\n" + inspect.getsource(found) + inspect.getsource(same)


def test_it_is_the_best_and_differs_from_avx512():
    assert cpu.supported_isas()[-1] == "amx"
    assert same(found(), found("amx")) and not same(found(), found("avx512"))


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
