"""How much memory is free: a container's limit counts; and errors of too little of it."""

import psutil
import pytest
import torch

from gspn import memory
from gspn.options import OptionError

GIB = 2**30
CPU = torch.device("cpu")


@pytest.fixture
def free(tmp_path, monkeypatch):
    """Gives a function that makes groups, with their files, and returns what is free in the process's `own` ones, on a
    machine with 64 GiB."""
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 64 * GIB}))

    def make(own=None, **groups):
        if own is not None:
            (tmp_path / "own").write_text(own)
        for name, files in groups.items():
            folder = tmp_path / "cgroup" / name.replace("__", "/").removeprefix("root")
            folder.mkdir(parents=True, exist_ok=True)
            for file, text in files.items():
                (folder / f"memory.{file}").write_text(f"{text}\n")
        return memory.free_bytes(CPU) / GIB

    return make


def two(limit, used, inactive):
    """The files of a group of version 2."""
    return {"max": limit, "current": used * GIB, "stat": f"anon 5\ninactive_file {inactive * GIB}\nactive_file 7"}


def one(limit, used, inactive):
    """The files of a group of version 1, whose own inactive_file is without that of the groups below it."""
    stat = f"inactive_file 0\ntotal_inactive_file {inactive * GIB}"
    return {"limit_in_bytes": limit, "usage_in_bytes": used * GIB, "stat": stat}


def test_without_a_group_or_a_limit_it_is_what_the_machine_has(free):
    assert free() == 64
    assert free("0::/\n") == 64
    assert free("0::/job\n", job=two("max", 3, 1)) == 64
    assert free("4:memory:/job\n", memory__job=one(2**63 - 4096, 3, 1)) == 64
    assert free("nonsense\n\n") == 64


def test_the_limit_of_a_group_and_of_those_around_it(free):
    assert free("0::/\n", root=two(8 * GIB, 3, 1)) == 6  # a container sees its own group as the root
    assert free("0::/pod/box\n", pod__box=two(7 * GIB, 3, 0)) == 4
    assert free("0::/pod/box\n", pod=two(4 * GIB, 3, 1)) == 2
    assert free("0::/pod/box\n", pod__box=two(GIB, 3, 1)) == 0


def test_a_container_whose_groups_have_the_paths_of_the_machine(free):
    assert free("0::/docker/abc\n", root=two(8 * GIB, 3, 1)) == 6


def test_the_first_version(free):
    own = "9:cpu,cpuacct:/other\n4:hugetlb,memory:/pod/box\n1:name=systemd:/pod/box\n0::/pod/box\n"
    assert free(own, memory__pod__box=one(9 * GIB, 4, 1), memory__pod=one(8 * GIB, 4, 2)) == 6
    assert free(own, memory__other=one(GIB, 0, 0)) == 6


def test_files_that_are_missing_or_damaged(free):
    files = two(8 * GIB, 3, 1)
    for name in ("max", "current"):
        assert free("0::/job\n", job=files | {name: "what"}) == 64
    assert free("0::/job\n", job=files | {"stat": "anon"}) == 5  # then all that is used counts
    assert free("0::/job\n", job=files | {"stat": "anon 5"}) == 5


# -- too little --


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), None])
def test_too_little_memory_is_told_with_what_mends_it(error):
    with (
        pytest.raises(OptionError, match=r"^memory does not suffice for 3 images: take fewer$") as told,
        memory.enough_memory(OptionError, "3 images", "take fewer"),
    ):
        if error is None:
            torch.empty(10**7, 10**7)  # which no address space holds
        raise error
    assert isinstance(told.value.__cause__, type(error) if error else RuntimeError)


def test_more_bytes_than_can_be_counted_are_too_many():
    with pytest.raises(RuntimeError, match="overflow") as told:
        torch.empty(10**9, 10**9, 10)
    assert memory.is_out_of_memory(told.value)


def test_other_errors_stay_as_they_are():
    with pytest.raises(RuntimeError, match="the kernel"), memory.enough_memory(OptionError, "it", "mend it"):
        raise RuntimeError("the kernel")
