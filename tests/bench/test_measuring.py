"""Rounds, quartiles, peak memory. No timing is asserted."""

import os
import signal
import sys

import pytest
import torch

from gspn import memory
from gspn.bench import measuring
from gspn.bench.measuring import Cpu, in_own_process, in_turns, interleaved, peak_extra_mib, summary

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux only")


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_all_contenders_run_once_in_every_round_in_orders_that_change():
    orders = []

    def one_round(order):
        orders.append([name for name, _ in order])
        return {name: float(run()) for name, run in order}

    samples = in_turns(one_round, {"a": lambda: 1, "b": lambda: 2, "c": lambda: 3}, 6)
    assert samples == {"a": [1.0] * 6, "b": [2.0] * 6, "c": [3.0] * 6}
    assert all(sorted(order) == ["a", "b", "c"] for order in orders) and len(set(map(tuple, orders))) > 1


def test_a_slow_call_that_was_made_before_is_not_warmed_up_again(monkeypatch):
    monkeypatch.setattr(measuring, "LEAST_SECONDS", 1e-9)  # no call is repeated within a sample
    counts = {"slow": 0, "quick": 0}

    def count(name):
        counts[name] += 1

    calls = {name: lambda name=name: count(name) for name in counts}
    assert {name: len(s) for name, s in interleaved(calls, 3, 1, {"slow": 1.0}).items()} == {"slow": 3, "quick": 3}
    assert counts["slow"] == 3 and counts["quick"] > 3


def test_quartiles_and_ratios_within_a_round():
    found = summary({"gspn": [1.0, 2.0, 4.0], "other": [3.0, 4.0, 4.0]}, "gspn")
    assert found["other"] == {"ms": [3500.0, 4000.0, 4000.0], "ratio": [1.5, 2.0, 2.5]}
    assert found["gspn"]["ratio"] == [1, 1, 1]
    assert "ratio" not in summary({"other": [1.0]}, "gspn")["other"]


def test_a_training_call_leaves_the_gradients_of_the_parameters_alone():
    layer, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    grad = torch.full((4, 2), 2.0)
    measuring.train_call(layer, x, grad)()
    torch.testing.assert_close(layer.bias.grad, torch.full((2,), 8.0))
    assert x.grad is None


def allocate():
    gone = torch.ones(2**23)  # 32 MiB
    del gone
    return torch.ones(2**24)  # 64 MiB, which are kept


@LINUX
def test_the_peak_of_a_call_is_what_it_allocates():
    # in a process of its own, as the suites do: what other tests have freed here may be used again
    assert 60 < in_own_process(peak_extra_mib, allocate) < 75


@LINUX
def test_a_process_of_its_own():
    assert in_own_process(os.getpid) != os.getpid()
    with pytest.raises(ZeroDivisionError):
        in_own_process(divmod, 1, 0)
    with pytest.raises(MemoryError, match="memory"):
        in_own_process(signal.raise_signal, signal.SIGKILL)


def test_the_cpu_and_the_machine(monkeypatch):
    machine = Cpu(1)
    assert torch.get_num_threads() == 1 and machine.free_mib() > 1
    told = measuring.environment()
    assert told["torch"] == torch.__version__ and told["cpu"] and "commit" not in told
    monkeypatch.setattr(measuring, "Path", lambda path: measuring.os.devnull_path)
    monkeypatch.setattr(measuring.os, "devnull_path", _Unreadable(), raising=False)
    assert measuring.cpu_name()  # as on a system without /proc


def test_the_memory_of_a_container_is_what_its_limit_leaves(monkeypatch):
    monkeypatch.setattr(memory, "_rooms_in_cgroups", lambda: iter([3 * 2**20]))
    assert Cpu(1).free_mib() == 3


class _Unreadable:
    def read_text(self):
        raise FileNotFoundError
