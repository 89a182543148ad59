"""What type checkers see: every public name with its type, and the README's snippets without an error."""

import ast
import re
import subprocess
import sys
from inspect import Parameter, Signature, isclass, isfunction, signature, unwrap
from pathlib import Path

from helpers.fresh import fresh
from test_readme import NAMES, SNIPPETS

import gspn

STUB = ast.parse((Path(gspn.__file__).with_suffix(".pyi")).read_text())

# What mypy follows. All of torch takes it two minutes; these modules say what tensors and modules are.
CONFIG = """
[mypy]
[mypy-torch.*,numpy.*,diffusers.*,transformers.*,accelerate.*,datasets.*,PIL.*,safetensors.*,rich.*,matplotlib.*]
follow_imports = skip
[mypy-torch,torch._tensor,torch._C,torch._C._VariableFunctions,torch.nn,torch.nn.modules,torch.nn.modules.module]
follow_imports = silent
[mypy-torch.nn.parameter]
follow_imports = silent
"""

REVEALED = {
    "gspn.GSPN2d(96)": "gspn.layers.GSPN2d",
    "gspn.GSPN2d(96)(x)": "torch._tensor.Tensor",
    "gspn.propagate(x, x, x, x, x)": "torch._tensor.Tensor",
    'gspn.create_model("gspn_tiny")': "gspn.models.backbone.Backbone",
    'gspn.create_model("gspn_tiny")(x)': "torch._tensor.Tensor",
    'gspn.create_model("gspn_tiny").forward_intermediates(x, intermediates_only=True)': "list[torch._tensor.Tensor]",
    'gspn.create_model("gspn_tiny").forward_intermediates(x)[0]': "torch._tensor.Tensor",
    'gspn.load_released("tiny.pth", "gspn_tiny")': "gspn.models.backbone.Backbone",
    'gspn.create_generator("GSPN-S/2")': "gspn.models.generator.GSPNTransformer2DModel",
    "gspn.swap(unet)": "gspn.stable_diffusion.swap.Swap",
    'gspn.load_run("a", task="classification").classes': "list[str]",
    'gspn.load_run("a", task="segmentation").classes.names': "tuple[str, ...]",
    'gspn.create_segmenter("gspn_tiny", num_classes=3)(x)': "torch._tensor.Tensor",
    'gspn.load_run("a", task="diffusion")': "gspn.models.pipeline.GSPNPipeline",
    "gspn.export_onnx": "def (",
    "gspn.__version__": "str",
}


def test_mypy_knows_the_public_names_and_the_snippets(tmp_path):
    """In a folder of its own, where it finds gspn as an installed package, as for a user."""
    for name, code in zip(NAMES, SNIPPETS, strict=True):
        given = "from typing import Any\n\npipe: Any\n" if name == "swap" else ""
        (tmp_path / f"{name}.py").write_text(given + code)
    names = ast.unparse(ast.List([ast.Attribute(ast.Name("gspn"), name) for name in dir(gspn)]))
    lines = ["import gspn, torch", "x, unet = torch.ones(1), torch.nn.Module()", names]
    lines += [f"reveal_type({expression})" for expression in REVEALED]
    (tmp_path / "public.py").write_text("\n".join(lines) + "\n")
    (tmp_path / "wrong.py").write_text("import gspn\ngspn.GSPN3d\ngspn.create_model(3)\n")
    (tmp_path / "mypy.ini").write_text(CONFIG)
    command = [sys.executable, "-m", "mypy", "--cache-dir", "cache", "."]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    out = result.stdout
    assert not result.stderr, result.stderr
    errors = [line for line in out.splitlines() if ": error:" in line]
    assert [bool(re.search(r"wrong\.py:2:.*GSPN3d|wrong\.py:3:.*incompatible type", e)) for e in errors] == [True] * 2
    found = re.findall(r'public\.py:\d+: note: Revealed type is "(.*)"', out)
    assert len(found) == len(REVEALED), out
    for (expression, expected), revealed in zip(REVEALED.items(), found, strict=True):
        assert revealed.startswith(expected), f"{expression}: {revealed}"


def test_the_stub_says_what_there_is():
    """`__all__` is written in the module and in the stub, which lazy_loader does not read it from."""
    (told,) = [ast.literal_eval(node.value) for node in STUB.body if isinstance(node, ast.Assign)]
    assert sorted(told) == sorted(gspn.__all__)
    named = {
        alias.asname or alias.name for node in STUB.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert named | {"__version__"} == set(dir(gspn))
    assert (Path(gspn.__file__).parent / "py.typed").exists()


def test_public_functions_are_annotated():
    """Their parameters and what they return, and those of the public methods of classes."""
    for name in dir(gspn):
        value, functions = getattr(gspn, name), []
        if isclass(value):
            members = {key: getattr(member, "__func__", member) for key, member in vars(value).items()}
            functions = [f for key, f in members.items() if key in ("__init__", "__call__") or not key.startswith("_")]
            functions = [getattr(f, "fget", f) for f in functions]
        for function in [value, *functions]:
            if not isfunction(function):
                continue
            told = signature(unwrap(function))
            assert function.__name__ == "__init__" or told.return_annotation is not Signature.empty, function
            for parameter in told.parameters.values():
                assert parameter.name in ("self", "cls") or parameter.annotation is not Parameter.empty, function


def test_star_import_needs_no_extra():
    """As after `pip install gspn` alone."""
    code = (
        "import sys; sys.modules |= dict.fromkeys(('diffusers', 'accelerate', 'datasets', 'matplotlib', 'timm'));"
        "from gspn import *; print(create_model('gspn_micro').num_classes, __version__)"
    )
    result = fresh(code)
    assert result.stdout == f"1000 {gspn.__version__}\n"
