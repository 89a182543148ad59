"""The rules of the house that can be read off the sources: layers, optional packages, public names."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from helpers.fresh import fresh

import gspn

SOURCE = Path(__file__).parent.parent / "src" / "gspn"
# Each may import those before it.
CORE = "names progress extras weights digests files pretrained kernels dispatch registration ops depthwise".split()
CORE += ["lattices", "lean", "layers_released", "layers", "memory", "models", "stable_diffusion", "export"]
LAYERS = [*CORE, *"places options data train plots plots_masks sampling runs metrics tasks bench demo cli".split()]
BASE = {"torch", "numpy", "safetensors", "gspn", "filelock", "lazy_loader"}


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_public_name_is_on_the_page_of_the_api():
    page = (SOURCE.parents[1] / "docs/api.md").read_text(encoding="utf-8")
    names = [name for name in dir(gspn) if not name.startswith("_") and name not in ("DIRECTIONS", "train")]
    told = re.findall(r":: gspn\.(\w+)", page)
    modules = [name for name in names if isinstance(getattr(gspn, name), ModuleType)]
    assert "propagate" in told and sorted(set(names) - set(told) - set(modules)) == []


def layer_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "gspn" and len(parts) > 1 and parts[1] in LAYERS else None


def test_every_room_is_a_layer():
    rooms = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__", "__main__"} == set(LAYERS)


def test_nobody_imports_upwards():
    for path in SOURCE.rglob("*.py"):
        own = layer_of("gspn." + ".".join(path.relative_to(SOURCE).with_suffix("").parts))
        if own is None:
            continue
        for module in imports(path):
            other = layer_of(module)
            if other is not None:
                assert LAYERS.index(other) <= LAYERS.index(own), f"{path} ({own}) imports {module}"
            if own == "kernels":
                own_folder = ".".join(("gspn", *path.parent.relative_to(SOURCE).parts))
                allowed = own_folder != "gspn.kernels" and module.startswith(own_folder)
                assert allowed or not module.startswith("gspn"), f"{path} imports {module}: kernels stand alone"


def test_importing_gspn_imports_nothing_optional_and_sets_nothing():
    code = (
        "import sys, warnings; warnings.simplefilter('error');"
        "import torch, torch.utils.flop_counter; before = set(sys.modules);"  # which imports triton where it is
        "threads = torch.get_num_threads(); import gspn; gspn.create_model; gspn.propagate;"
        "assert torch.get_num_threads() == threads;"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    result = fresh(code)
    optional = {
        "accelerate",
        "datasets",
        "diffusers",
        "gradio",
        "huggingface_hub",
        "matplotlib",
        "PIL",
        "rich",
        "sklearn",
        "timm",
        "triton",
        "typer",
    }
    assert not optional & set(result.stdout.split()), result.stdout


def test_the_core_needs_base_dependencies_only():
    for layer in (*CORE, "__init__"):
        paths = (SOURCE / layer).rglob("*.py") if (SOURCE / layer).is_dir() else [SOURCE / f"{layer}.py"]
        for path in paths:
            if path.parent.name == "triton" or path.name == "onnx_scan.py":  # imported by those who need them
                continue
            outside = {m.split(".")[0] for m in imports(path, top_level_only=True)}
            assert outside <= BASE | set(sys.stdlib_module_names), f"{path}: {outside}"


def test_public_names():
    assert set(gspn.__all__) == {
        "DIRECTIONS",
        "GSPN2d",
        "__version__",
        "available_backends",
        "create_model",
        "create_segmenter",
        "export_aoti",
        "export_onnx",
        "export_program",
        "gated_scan",
        "line_scan",
        "list_models",
        "load_released",
        "normalize_weights",
        "propagate",
        "register_timm",
    }
    of_extras = {"create_generator", "GSPNPipeline", "GSPNTransformer2DModel", "GSPNAttention", "HighResPipeline"}
    of_extras |= {"GSPNDiTTransformer2DModel"}
    of_extras |= {"adapt", "load_run", "load_swap", "restore", "swap"}
    modules = {"export", "layers", "models", "ops", "train"}
    assert set(dir(gspn)) == {*gspn.__all__, *of_extras, *modules}
    assert all(isinstance(getattr(gspn, name), ModuleType) for name in modules)
    for name in {*gspn.__all__, *of_extras}:
        value = getattr(gspn, name)
        assert not callable(value) or value.__doc__
    with pytest.raises(AttributeError, match="importlib"):
        gspn.importlib  # noqa: B018


def test_no_environment_variables_in_the_product():
    for path in SOURCE.rglob("*.py"):
        assert not re.search(r"\benviron\b|getenv", path.read_text(encoding="utf-8")), path
    for path in [*SOURCE.rglob("*.cpp"), *SOURCE.rglob("*.h")]:
        assert "getenv" not in path.read_text(encoding="utf-8"), path


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["test", "test-all"])
def test_make_test_runs_every_part_and_fails_if_one_does(target, tmp_path):
    shutil.copy(SOURCE.parent.parent / "Makefile", tmp_path)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\npart="$PYTHONPATH$TRITON_INTERPRET"\necho "$part" >> ran\n[ "$part" != "$FAILS" ]\n')
    python.chmod(0o755)
    (tmp_path / ".timm").mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET", "MAKEFLAGS")}
    for fails in ("none", "", ".timm", "1"):  # the main part sets neither variable
        command = ["make", "-o", ".venv/.installed", "-o", ".timm/.installed", target]
        result = subprocess.run(command, cwd=tmp_path, env=environment | {"FAILS": fails}, capture_output=True)
        *side_by_side, last = (tmp_path / "ran").read_text().splitlines()
        assert sorted(side_by_side) == ["", ".timm"] and last == "1"
        assert (result.returncode == 0) == (fails == "none"), result.stderr
        (tmp_path / "ran").unlink()
