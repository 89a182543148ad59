"""The native library is there, is the right one, and its absence does not break an installation."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest
from helpers.fresh import fresh

from gspn.kernels import cpu

ROOT = Path(__file__).parents[2]

needs_library = pytest.mark.skipif(not cpu.available()[0], reason=cpu.available()[1])


def test_the_module_wins_over_the_folder_of_sources():
    assert Path(cpu.__file__).name == "cpu.py"


def test_available_says_why_not(monkeypatch):
    for library, words in ((None, "not built: no C++ compiler"), (ROOT / "pyproject.toml", "cannot be loaded")):
        monkeypatch.setattr(cpu, "_loaded", None)
        monkeypatch.setattr(cpu, "_find", lambda library=library: library)
        found, reason = cpu.available()
        assert not found and words in reason
        with pytest.raises(RuntimeError, match=re.escape(words)):
            cpu.supported_isas()


def test_the_oldest_compilers_are_the_same_everywhere():
    """GCC 11 lacks __builtin_shufflevector."""
    gcc = cpu.COMPILERS.split(",")[0]
    assert gcc == "GCC 12" and cpu.COMPILERS in cpu._open(None)[1]
    texts = [ROOT / "README.md", ROOT / "docs/install.md", ROOT / "src/gspn/kernels/cpu/vec.h"]
    for text in (*texts, ROOT / "src/gspn/cli/doctor.py"):
        named = re.findall(r"GCC (?:>= )?\d+", text.read_text())
        assert {name.replace(">= ", "") for name in named} <= {gcc}, text
        assert named or "COMPILERS" in text.read_text(), text


@needs_library
def test_another_abi_is_refused(monkeypatch):
    monkeypatch.setattr(cpu, "_loaded", None)
    monkeypatch.setattr(cpu, "ABI_VERSION", cpu.ABI_VERSION + 1)
    found, reason = cpu.available()
    assert not found and f"ABI version {cpu.ABI_VERSION - 1}, expected {cpu.ABI_VERSION}" in reason


@needs_library
def test_instruction_sets_are_those_of_this_machine():
    found = cpu.supported_isas()
    assert found[0] == "portable"
    flags = Path("/proc/cpuinfo")
    if not flags.exists() or " sse2 " not in flags.read_text():
        pytest.skip("no list of the processor's features here")
    words = set(flags.read_text().split())
    assert ("avx2" in found) == ({"avx2", "fma", "f16c"} <= words)
    assert ("avx512" in found) == ({"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= words)
    assert "amx" not in found or {"amx_tile", "amx_bf16"} <= words  # which the system may refuse


@needs_library
def test_torch_and_the_library_share_one_openmp_runtime():
    """In a process of its own: other packages of the tests bring OpenMP runtimes too."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("no list of loaded libraries here")
    code = "from gspn.kernels import cpu; cpu.supported_isas(); print(open('/proc/self/maps').read())"
    maps = fresh(code).stdout
    runtimes = {line.split()[-1] for line in maps.splitlines() if "libgomp" in line or "libiomp" in line}
    assert len(runtimes) == 1 and "libgspn_cpu" in maps, runtimes


@needs_library
def test_the_library_needs_neither_torch_nor_python():
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf is not installed")
    dynamic = subprocess.run([readelf, "-d", cpu._find()], capture_output=True, text=True, check=True).stdout
    needed = [line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line]
    assert not [name for name in needed if "torch" in name or "python" in name or "c10" in name]


@needs_library
def test_the_fuzzer_starts_from_anywhere(tmp_path):
    command = [sys.executable, ROOT / "tests/tools/fuzz_cpu.py", "--cases", "2"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0 and "2 cases, 0 failures" in result.stdout, result.stderr


def test_a_source_distribution_holds_every_source(tmp_path, monkeypatch):
    build = pytest.importorskip("scikit_build_core.build")
    monkeypatch.chdir(ROOT)
    with tarfile.open(tmp_path / build.build_sdist(str(tmp_path))) as archive:
        found = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "src/gspn/kernels/cpu").rglob("*.*")}
    assert {"src/gspn/kernels/cpu/scan/tiles.h", "src/gspn/kernels/cpu/propagate/gemm.h"} <= sources <= found


def test_the_workflow_tests_the_oldest_torch_that_the_package_takes():
    (oldest,) = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert f'"torch=={oldest}.*"' in (ROOT / ".github/workflows/tests.yml").read_text()


@pytest.mark.slow
def test_installation_without_a_compiler(tmp_path):
    """The package installs where CMake finds no compiler, and says what is missing."""
    pytest.importorskip("scikit_build_core")
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "build", "runs", "*.so"))
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("cmake", "ninja"):  # pip brings these along, but no compiler
        beside_python = Path(sys.executable).parent / name
        (tools / name).symlink_to(beside_python if beside_python.exists() else shutil.which(name))
    environment = os.environ | {"CC": "/nowhere/cc", "CXX": "/nowhere/c++", "PATH": str(tools)}
    # The build requirements and torch come from this environment: nothing is downloaded.
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p.endswith("site-packages"))
    command = [python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", source]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    site = next((tmp_path / "venv").glob("lib*/python*/site-packages/gspn"))
    assert not [path for ending in ("*.so", "*.cpp", "*.h") for path in site.rglob(ending)]
    assert (site / "__init__.pyi").exists() and (site / "py.typed").exists()
    code = "import gspn; print(gspn.__file__); print(gspn.available_backends()['cpu'])"
    environment["PYTHONPATH"] = os.pathsep.join([str(site.parent), environment["PYTHONPATH"]])
    result = subprocess.run([python, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert str(site) in result.stdout, result.stdout + result.stderr
    assert "False" in result.stdout and "no C++ compiler" in result.stdout
