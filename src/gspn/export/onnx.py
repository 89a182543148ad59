"""ONNX files of standard operators, for any batch and size."""

import copy
import importlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int

import gspn
from gspn.export.program import (
    Exported,
    ExportError,
    Size,
    as_text,
    compare,
    config_of,
    input_shape,
    prepared,
    shapes_to_check,
    to_be_written,
    traced,
    without_notices,
)
from gspn.files import atomic

OLDEST_OPSET, DEFAULT_OPSET = 18, 20  # torch's exporter writes 18 and newer; GELU is one operator from 20 on
_TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}  # of the largest output, against the float32 model
_LARGEST = 2**31 - 1  # bytes in one protobuf message


def export_onnx(
    model: nn.Module,
    path: Path | str,
    example: Tensor | None = None,
    *,
    size: Size | None = None,
    batch: int | None = None,
    opset: int = DEFAULT_OPSET,
    precision: str = "fp32",
    metadata: Mapping | None = None,
    check: bool = True,
) -> Exported:
    """Writes the model as an ONNX file of standard operators. Each direction is one Scan over the lines, not unrolled,
    so that one file serves every size.

    The file has one input, "input" (B,C,H,W) (or (B,C,*size)), and one output, "output", or several, "output_0" and so
    on, if the model has several.

    Args:
        model, example, size, batch: as in :func:`export_program`. All options of gspn's layers are exported:
            activation, alignment, segments, groups, directions.
        path: the file. An existing one is replaced when the new one is complete.
        opset: version of the ONNX operators, 18 or newer.
        precision: "fp32", or "fp16" for weights, input and output in float16; the scan's state stays float32.
        metadata: kept in the file, as text or JSON, beside "gspn" (version) and the config of a backbone or segmenter
            as "model".
        check: compares the outputs with the model's at several sizes in onnxruntime before the file gets its name.

    Returns:
        the path and size of the file, and the difference of its outputs from the model's.

    Errors: ExportError for options, models and results that do not fit, ImportError if the extra `onnx` is not
    installed, gspn.files.SaveError if the file cannot be written.

    >>> import gspn
    >>> gspn.export_onnx(gspn.GSPN2d(16), "layer.onnx")  # doctest: +SKIP
    """
    for package in ("onnx", "onnxscript", *(["onnxruntime"] if check else [])):
        _require(package)
    newest = importlib.import_module("onnx").defs.onnx_opset_version()
    if not isinstance(opset, int) or not OLDEST_OPSET <= opset <= newest:
        raise ExportError(f"opset has to be from {OLDEST_OPSET} to {newest} (the newest of this onnx), got {opset!r}")
    if precision not in tuple(_TOLERANCE):  # of anything, also of what has no hash
        raise ExportError(f"precision has to be {' or '.join(_TOLERANCE)}, got {precision!r}")
    path = to_be_written(path)
    model, example = prepared(model, example, size, batch)
    text = as_text({"gspn": gspn.__version__, **config_of(model), **(metadata or {})})
    model = model.to("cpu", torch.float32)
    exported = model if precision == "fp32" else copy.deepcopy(model).half()
    dtype = torch.float32 if precision == "fp32" else torch.float16
    program = traced(exported, example.to("cpu", dtype), size, batch)
    content = _content(program, opset, text)
    shapes = shapes_to_check(model, example, size, batch) if check else []
    with atomic(path) as temporary:
        temporary.write_bytes(content)
        difference = compare(model, _runner(temporary, dtype), shapes, _TOLERANCE[precision]) if check else None
    return Exported(path, len(content), tuple(shapes), difference)


def _require(package: str) -> None:
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ImportError(f'ONNX export needs {error.name}: pip install "gspn[onnx]"') from error


def _content(program: torch.export.ExportedProgram, opset: int, metadata: Mapping[str, str]) -> bytes:
    """The bytes of the file."""
    import onnx
    import onnx_ir as ir
    import onnxscript

    from gspn.export import onnx_scan

    outputs = len(program.graph_signature.user_outputs)
    names = ["output"] if outputs == 1 else [f"output_{i}" for i in range(outputs)]
    sizes = _names_of_sizes(program)
    with without_notices("torch.onnx"):
        program = program.run_decompositions(onnx_scan.symbols())
        written = torch.onnx.export(
            program, opset_version=opset, input_names=["input"], output_names=names, verbose=False
        )
        model = written.model
    onnx_scan.expand(model)
    onnxscript.optimizer.fold_constants(model, input_size_limit=_LARGEST, output_size_limit=_LARGEST)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    foreign = sorted(set(model.graph.opset_imports) - {""})
    if foreign:
        raise ExportError(f"the model has operators that ONNX lacks, of the domains {', '.join(foreign)}")
    ir.passes.common.ClearMetadataAndDocStringPass()(model)  # source lines and paths of this machine
    for value in [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, sizes) for dim in value.shape])
    model.producer_name, model.producer_version = "gspn", gspn.__version__
    model.metadata_props.update(metadata)
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if weights > _LARGEST - 2**24:
        raise ExportError(f"an ONNX file holds at most 2 GiB, but the model's weights take {weights / 2**30:.1f} GiB")
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString()


def _names_of_sizes(program: torch.export.ExportedProgram) -> dict[str, str]:
    """torch's symbols for the open sizes, and their names in the file."""
    named = zip(input_shape(program), ("batch", "", "height", "width"), strict=True)
    found: dict[str, str] = {}
    for symbol, name in named:
        if not is_concrete_int(symbol):
            found.setdefault(str(symbol), name)  # a square input has the height as its width
    return found


def _renamed(dim, names: Mapping[str, str]) -> int | str | None:
    if isinstance(dim, int):
        return dim
    return dim.value and re.sub(r"\w+", lambda word: names.get(word[0], word[0]), dim.value)


def _runner(path: Path, dtype: torch.dtype):
    """A function that runs the file in onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: [torch.from_numpy(y) for y in session.run(None, {"input": x.to(dtype).numpy()})]
