"""Runs the tests as other machines would: other instruction sets, thread counts, terminals, places.

    .venv/bin/python tests/tools/other_machines.py                                  every setting, all tests: hours
    .venv/bin/python tests/tools/other_machines.py --list
    .venv/bin/python tests/tools/other_machines.py --settings threads-2 tests/metrics/test_distances.py
    .venv/bin/python tests/tools/other_machines.py --settings threads-2+aten-default+openblas-prescott   in one run

What is not said here goes to pytest; without anything it is `-n 2 -m "not slow and not timm and not triton"`. Another
Python is one whose environment this is started with. Prints one line for each setting: how many tests passed, failed
and were skipped, and the names of those that failed; ends with 1 if any did, or if a setting ran none.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
DEFAULT = ["-n", "2", "-m", "not slow and not timm and not triton"]
ISA = "GSPN_TESTS_ISA"  # read below by pytest, never by the product
SETTINGS = {
    "threads-1": {},
    "threads-2": {"OMP_NUM_THREADS": "2"},
    # torch's own kernels, oneDNN's convolutions, MKL's linear algebra in torch; OpenBLAS is numpy's and scipy's
    "aten-default": {"ATEN_CPU_CAPABILITY": "default"},
    "aten-avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "onednn-avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "mkl-avx2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "mkl-compatible": {"MKL_CBWR": "COMPATIBLE"},
    "openblas-haswell": {"OPENBLAS_CORETYPE": "Haswell"},
    "openblas-skylakex": {"OPENBLAS_CORETYPE": "SkylakeX"},
    "openblas-prescott": {"OPENBLAS_CORETYPE": "Prescott"},
    "kernels-portable": {ISA: "portable"},
    "kernels-avx2": {ISA: "avx2"},
    "kernels-avx512": {ISA: "avx512"},
    "narrow-terminal": {"COLUMNS": "40"},
    "far-east": {"TZ": "Pacific/Kiritimati"},
    "one-cpu": {},
    "private-umask": {},
    "reversed": {"GSPN_TESTS_REVERSED": "1"},
}


def _one_cpu():
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


BEFORE = {"one-cpu": _one_cpu, "private-umask": lambda: os.umask(0o077)}  # in the process of pytest, before it starts


# -- pytest takes this file as a plugin: what no variable of a library can do --


def pytest_configure():
    if os.environ.get("ATEN_CPU_CAPABILITY") == "avx2":
        # torch asks the processor, not this variable, whether it has AMX, and then fails in its own attention
        import torch

        torch.backends.cuda.enable_flash_sdp(False)
    if ISA in os.environ:
        from gspn.kernels import cpu

        code = cpu._isa_code
        cpu._isa_code = lambda isa: code(os.environ[ISA] if isa is None else isa)


def pytest_collection_modifyitems(items):
    if "GSPN_TESTS_REVERSED" in os.environ:
        items.reverse()


# -- the command --


def run(names, arguments) -> tuple[bool, str]:
    """(whether tests ran under all of these settings and none failed, the line that says so)."""

    def prepare():
        for name in BEFORE.keys() & set(names):
            BEFORE[name]()

    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-p", "other_machines", f"--junit-xml={report}", *arguments]
        result = subprocess.run(
            command,
            cwd=ROOT,
            env=environment | {variable: value for name in names for variable, value in SETTINGS[name].items()},
            preexec_fn=prepare,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if not report.exists():
            return False, f"ended with {result.returncode}: {' '.join(result.stdout.splitlines()[-1:])}"
        cases = [*ElementTree.parse(report).iter("testcase")]
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    which = ", ".join(f"{case.get('classname')}::{case.get('name')}" for case in failed)
    told = f"{len(cases) - len(failed) - skipped} passed, {len(failed)} failed, {skipped} skipped"
    told += f" in {time.monotonic() - start:.0f} s" + (f": {which}" if which else "")
    return result.returncode == 0, told


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--settings", default=",".join(SETTINGS), help="names with commas between them; + takes several into one run"
    )
    parser.add_argument("--list", action="store_true", help="the names of the settings, and what they set")
    options, arguments = parser.parse_known_args()
    if options.list:
        for name, variables in SETTINGS.items():
            print(name, *(f"{variable}={value}" for variable, value in variables.items()))
        return 0
    chosen = [names.split("+") for names in options.settings.split(",")]
    if unknown := {name for names in chosen for name in names} - set(SETTINGS):
        parser.error(f"unknown settings {', '.join(sorted(unknown))}; there are {', '.join(SETTINGS)}")
    good = True
    for names in chosen:
        passed, told = run(names, arguments or DEFAULT)
        good = good and passed
        print(f"{'+'.join(names):18} {told}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
