"""Runs the tests of the CPU kernels with kernels that were compiled for another processor, under an emulator.

Every call is sent to a program under the emulator, with all the memory that it may read or write, and comes back. On
Debian, for aarch64 (packages g++-aarch64-linux-gnu and qemu-user), in the folder of the sources:

    cmake -S . -B build/arm -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
        -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ && cmake --build build/arm
    aarch64-linux-gnu-g++ -O2 -o build/arm/emulated tests/tools/emulated.cpp -ldl
    GSPN_EMULATED="qemu-aarch64 -L /usr/aarch64-linux-gnu build/arm/emulated build/arm/libgspn_cpu.so" \
        PYTHONPATH=tests .venv/bin/python -m pytest -p tools.emulated -m "not slow" \
        tests/kernels/test_cpu_scan.py tests/kernels/test_cpu_propagate.py tests/kernels/test_cpu_depthwise.py
"""

import ctypes
import os
import struct
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_leaves

from gspn.kernels import cpu

ADDRESS = 2**42  # no size, stride or workspace is as large, and no address as small


class Emulated:
    """What cpu.py takes for the library. A kernel's tensors are found among the variables of the functions in cpu.py
    that are calling."""

    def __init__(self, command: list[str]):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.lock, self.calls = threading.Lock(), 0

    def __getattr__(self, name):
        return partial(self._call, name)

    def gspn_best_isa(self):
        return 0

    def _call(self, name, argument=b""):
        if not isinstance(argument, bytes):
            pytest.skip(f"{name}, which takes no block of arguments, is not emulated")
        storages = {}
        frame = sys._getframe(1)
        while frame and frame.f_code.co_filename == cpu.__file__:
            for each in tree_leaves(list(frame.f_locals.values())):
                if isinstance(each, torch.Tensor) and each.untyped_storage().nbytes():
                    storages[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
            frame = frame.f_back
        words = struct.unpack(f"={len(argument) // 8}q", argument)
        pointers = []
        for place, word in enumerate(words):
            for number, (start, size) in enumerate(storages.items()):
                if start <= word < start + size:
                    pointers += [place, number, word - start]
                    break
            else:
                assert word < ADDRESS, f"{name}: word {place} points to no tensor"
        sent = [struct.pack("=q", len(name)), name.encode(), struct.pack("=q", len(words)), argument]
        sent.append(struct.pack("=q", len(storages)))
        for start, size in storages.items():
            sent += [struct.pack("=q", size), ctypes.string_at(start, size)]
        sent.append(struct.pack(f"={1 + len(pointers)}q", len(pointers) // 3, *pointers))
        with self.lock:
            self.calls += 1
            self.process.stdin.write(b"".join(sent))
            self.process.stdin.flush()
            (result,) = struct.unpack("=q", self._take(8))
            for start, size in storages.items():
                ctypes.memmove(start, self._take(size), size)
        return result

    def _take(self, size):
        content = self.process.stdout.read(size)
        if len(content) < size:
            raise RuntimeError(f"the emulator ended with {self.process.wait()}")
        return content


def pytest_configure():
    """Only as a plugin: pytest also imports this file to look for doctests."""
    cpu._loaded = (Emulated(os.environ["GSPN_EMULATED"].split()), "")


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"{cpu._loaded[0].calls} calls of kernels were emulated")
