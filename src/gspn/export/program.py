"""The start of every export, torch.export with open sizes, and its end, the comparison with the model."""

import copy
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils import _pytree as pytree

from gspn.files import check_writable
from gspn.layers import GSPN2d
from gspn.models import Backbone, Segmenter

Size = tuple[int, int]


class ExportError(ValueError):
    """A model or an option cannot be exported, or a file's outputs differ from the model's."""


class Exported(NamedTuple):
    """A file that was written.

    Attributes:
        path: the file.
        size_bytes: its size.
        checked: the input shapes (B,C,H,W) at which its outputs were compared with the model's.
        difference: the largest difference there, relative to the largest output; None without a check.
    """

    path: Path
    size_bytes: int
    checked: tuple[tuple[int, ...], ...]
    difference: float | None


def export_program(
    model: nn.Module, example: Tensor | None = None, *, size: Size | None = None, batch: int | None = None
) -> torch.export.ExportedProgram:
    """The model as a graph of torch's operators, in which each scan is one gspn operator.

    Args:
        model: takes one image or feature map (B,C,H,W): a backbone, a segmenter, a layer, or any module that contains
            some. A copy of it is exported, in evaluation mode.
        example: an input with the right channels, dtype and device; gspn's backbones, segmenters and layers do not
            need it.
        size, batch: (H,W) and B, to fix the program's size or batch; None leaves them open.

    Returns:
        a program for any B >= 2 and any H, W with at least two rows and columns on the smallest map. To torch a size of
        1 is another program: ``batch=1`` makes it. (ONNX files do not have this limit.)

    Errors: ExportError if the model does not take such an input, or itself works at one size only.
    """
    return traced(*prepared(model, example, size, batch), size, batch)


def prepared(
    model: nn.Module, example: Tensor | None, size: Size | None, batch: int | None
) -> tuple[nn.Module, Tensor]:
    """A copy of the model in evaluation mode, with scans as operators, and an input of a shape for the export."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model has to be a torch module, got {type(model).__name__}")
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if size is not None and not (isinstance(size, tuple | list) and len(size) == 2 and all(map(_counts, size))):
        raise ExportError(f"size has to be (height, width) of at least 1 pixel, got {size!r}")
    if batch is not None and not _counts(batch):
        raise ExportError(f"batch has to be at least 1, got {batch!r}")
    if example is None:
        example = _example_for(model)
    elif not isinstance(example, Tensor):
        raise ExportError(f"example has to be a floating tensor (B,C,H,W), got {type(example).__name__}")
    elif example.ndim != 4 or not example.is_floating_point():
        raise ExportError(f"example has to be a floating tensor (B,C,H,W), got {_described(example)}")
    height, width = size or (max(n, 2) for n in example.shape[2:])
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, GSPN2d):
            module.backend = None  # the reference would be unrolled; other kernels may be missing where it is loaded
    return model, example.new_zeros(batch or 2, example.shape[1], height, width)


def traced(model: nn.Module, example: Tensor, size: Size | None, batch: int | None) -> torch.export.ExportedProgram:
    """The program for a model and an input from :func:`prepared`."""
    open_dims = ({} if batch else {0: "batch"}) | ({} if size else {2: "height", 3: "width"})
    with torch.no_grad():
        try:
            model(example)
        except Exception as error:  # whatever the model raises
            raise ExportError(f"the model does not take an input of {_described(example)}: {_said(error)}") from error
        try:
            dynamic = dict.fromkeys(open_dims, torch.export.Dim.AUTO)
            with without_notices("torch.fx.experimental.symbolic_shapes"):  # about what it cannot simplify
                program = torch.export.export(model, (example,), dynamic_shapes=(dynamic,))
        except Exception as error:
            raise ExportError(f"torch.export cannot follow the model: {_said(error)}") from error
    fixed = [name for d, name in open_dims.items() if is_concrete_int(input_shape(program)[d])]
    if fixed:
        raise ExportError(f"the model works at one {' and '.join(fixed)} only; fix it with size=(H, W) or batch=B")
    return program


def _example_for(model: nn.Module) -> Tensor:
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if isinstance(model, Backbone | Segmenter):
        backbone = model.backbone if isinstance(model, Segmenter) else model
        side = 4 * backbone.feature_info[-1]["reduction"]
        return weight.new_zeros(2, backbone.in_chans, side, side)
    channels = getattr(model, "channels", None)
    if weight is None or not isinstance(channels, int):
        raise ExportError(f"to export a {type(model).__name__}, pass an example input (B,C,H,W)")
    return weight.new_zeros(2, channels, 8, 8)


def input_shape(program: torch.export.ExportedProgram) -> torch.Size:
    """(B,C,H,W) of the program's input; an open size is a torch.SymInt."""
    (name,) = program.graph_signature.user_inputs
    return next(node.meta["val"].shape for node in program.graph.nodes if node.name == name)


def compare(
    model: nn.Module, run: Callable[[Tensor], list[Tensor]], shapes: list[tuple[int, ...]], tolerance: float
) -> float:
    """The largest difference between the outputs of `run` and of the float32 or float64 model, over random inputs of
    these shapes, relative to the model's largest output. Errors: ExportError above the tolerance."""
    like = next(model.parameters(), torch.zeros((), device="cpu"))
    draw, worst = torch.Generator("cpu").manual_seed(0), 0.0
    for shape in shapes:
        x = torch.randn(shape, generator=draw, dtype=like.dtype, device="cpu")
        try:
            with torch.no_grad():
                wanted = pytree.tree_leaves(model(x.to(like.device)))
        except Exception as error:
            advice = "size=(H, W) exports it for one size"
            raise ExportError(f"the model does not take {_sizes(shape)}; {advice}: {_said(error)}") from error
        for got, want in zip(run(x), wanted, strict=True):
            want = want.cpu().double()
            difference = float((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-30))
            if not difference <= tolerance:  # NaN too
                raise ExportError(
                    f"the file is not kept, because its output differs from the model's by {difference:.1e} of the "
                    f"largest at {_sizes(shape)}; expected at most {tolerance:.0e}"
                )
            worst = max(worst, difference)
    return worst


def shapes_to_check(model: nn.Module, example: Tensor, size: Size | None, batch: int | None) -> list[tuple[int, ...]]:
    """Without a fixed size, three: the exported one and odd ones, which are not square if the model takes that."""
    first, channels, height, width = example.shape
    square = any(getattr(module, "alignment", None) == "released" for module in model.modules())
    sizes = [(height, width), (height + 13, width + 6), (height // 2 + 5, width + 1)]
    sizes = [size] * 3 if size else [(h, h if square else w) for h, w in sizes]
    return list(dict.fromkeys((batch or b, channels, *s) for b, s in zip((first, 1, 5), sizes, strict=True)))


def config_of(model: nn.Module) -> dict[str, dict]:
    """{"model": config} of a backbone or segmenter, for gspn.create_model or create_segmenter to make it again."""
    return {"model": model.config} if isinstance(model, Backbone | Segmenter) and model.config else {}


def as_text(metadata: Mapping | None) -> dict[str, str]:
    """Metadata as strings: text as it is, other values as JSON. Errors: ExportError for a value that JSON lacks."""
    text = {}
    for key, value in (metadata or {}).items():
        if not isinstance(key, str):
            raise ExportError(f"the names of metadata have to be strings, got {key!r}")
        try:
            text[key] = value if isinstance(value, str) else json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ExportError(f"metadata[{key!r}] is neither text nor JSON: {error}") from error
    return text


def to_be_written(path: Path | str) -> Path:
    """The path, if a file can have that name; checked before minutes of work, not after."""
    path = Path(path)
    if path.is_dir():
        raise ExportError(f"{path} is a folder, expected the name of a file")
    if not path.parent.is_dir():
        raise ExportError(f"there is no folder {path.parent} to write {path.name} into")
    check_writable(path)
    return path


@contextmanager
def without_notices(name: str) -> Iterator[None]:
    """In the block, there are no warnings, and torch logs nothing under that name."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _counts(number) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1


def _said(error: Exception) -> str:
    """What an error says; with its class where the message may be no sentence, as that of a KeyError."""
    plain = isinstance(error, RuntimeError | ValueError | TypeError)
    return str(error) if plain else f"{type(error).__name__}: {error}"


def _described(t: Tensor) -> str:
    return f"{_sizes(t.shape)} {str(t.dtype).removeprefix('torch.')}"


def _sizes(shape) -> str:
    return "x".join(map(str, shape))
