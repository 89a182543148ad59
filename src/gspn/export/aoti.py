"""Packages that torch's AOTInductor compiles ahead of time; loading one neither traces nor compiles."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import gspn
from gspn.export.program import (
    Exported,
    ExportError,
    Size,
    as_text,
    compare,
    config_of,
    prepared,
    shapes_to_check,
    to_be_written,
    traced,
)
from gspn.files import atomic

_TOLERANCE = 1e-4  # of the largest output


def export_aoti(
    model: nn.Module,
    path: Path | str,
    example: Tensor | None = None,
    *,
    size: Size | None = None,
    batch: int | None = None,
    metadata: Mapping | None = None,
    check: bool = True,
) -> Exported:
    """Compiles the model with its weights into a package for this CPU. Needs a C++ compiler; takes minutes. To use it::

        import gspn, torch

        model = torch._inductor.aoti_load_package("model.pt2")
        logits = model(images)

    ``import gspn`` comes first, because the package calls gspn's kernels. So it loads in Python, with the same version
    of torch and with gspn, but not in C++ alone.

    Args:
        model, example, size, batch: as in :func:`export_program`, but an open batch may be 1 too.
        path: as in :func:`export_onnx`, ends with .pt2.
        metadata: as in :func:`export_onnx`; ``model.get_metadata()`` returns it.
        check: compares the outputs with the model's at several sizes before the file gets its name.

    Returns and errors: as :func:`export_onnx`.
    """
    path = to_be_written(path)
    if path.suffix != ".pt2":
        raise ExportError(f"torch only loads packages named .pt2, got {path.name}")
    model, example = prepared(model, example, size, batch)
    text = as_text({"gspn": gspn.__version__, **config_of(model), **(metadata or {})})
    model, example = model.to("cpu", torch.float32), example.to("cpu", torch.float32)
    program = traced(model, example, size, batch)
    shapes = shapes_to_check(model, example, size, batch) if check else []
    with atomic(path) as temporary:
        with temporary.open("wb") as file:
            try:
                torch._inductor.aoti_compile_and_package(
                    program, package_path=file, inductor_configs={"aot_inductor.metadata": text}
                )
            except RuntimeError as error:
                raise ExportError(f"AOTInductor cannot compile the model: {error}") from error
        difference = compare(model, _runner(temporary), shapes, _TOLERANCE) if check else None
    return Exported(path, path.stat().st_size, tuple(shapes), difference)


def _runner(path: Path):
    """A function that runs the package; reads an open file, because the file does not have its final name yet."""
    with path.open("rb") as file:
        loaded = torch._inductor.aoti_load_package(file)
    return lambda x: torch.utils._pytree.tree_leaves(loaded(x))
