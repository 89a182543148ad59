"""How torch knows the operators: schemas, the choice of a backend, and the rules for fake tensors, autograd, vmap and
FLOP counting. ops.py says what the operators compute; kernels/ computes it.

Every backend module has the same six functions: line_scan, gated_scan, propagate and their ``_backward``. The operators
are registered for CPU, for CUDA (ROCm too), and with a composite default for every other device; forward and backward
are operators of their own, so that compiled and exported graphs hold one node for each.
"""

import importlib
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.fx.traceback
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

BACKENDS = ("reference", "cpu", "triton")
NATIVE_BACKENDS = {"cpu": "cpu", "cuda": "triton"}  # device type to the backend that is native there


# Backends


class BackendStatus(NamedTuple):
    """Whether a backend can be used here, and its description or the reason why not."""

    available: bool
    reason: str


_statuses: dict[str, BackendStatus] = {}
_warned: set[str] = set()


def available_backends() -> dict[str, BackendStatus]:
    """Whether each of the three backends can be used here, and why (not).

    Returns:
        a dict from ``"reference"``, ``"cpu"`` and ``"triton"`` to ``(available, reason)``.

    >>> import gspn
    >>> gspn.available_backends()["reference"].available
    True
    """
    return {name: backend_status(name) for name in BACKENDS}


def backend_status(name: str) -> BackendStatus:
    if name not in _statuses:
        try:
            _statuses[name] = BackendStatus(*importlib.import_module(f"gspn.kernels.{name}").available())
        except ModuleNotFoundError as error:
            missing = f"gspn.kernels.{name}"
            _statuses[name] = BackendStatus(
                False, "not part of this version of gspn" if error.name == missing else f"{error.name} is not installed"
            )
        except Exception as error:  # whatever a damaged package raises while it is imported
            _statuses[name] = BackendStatus(False, f"it cannot be imported: {type(error).__name__}: {error}")
    return _statuses[name]


def _select(backend: str, device_type: str):
    """The module of the named backend, or an error; for "" the native one, or the reference with a warning."""
    name = backend or NATIVE_BACKENDS.get(device_type, "")
    missing = f"gspn has no kernel for devices of type {device_type!r}"
    status = backend_status(name) if name else BackendStatus(False, missing)
    if status.available:
        return importlib.import_module(f"gspn.kernels.{name}")
    if backend:
        raise RuntimeError(f"backend {backend!r} is not available here: {status.reason}")
    if device_type not in _warned:
        _warned.add(device_type)
        warnings.warn(
            f"gspn uses its slow reference backend on {device_type}, because the native one is missing: "
            f"{status.reason}",
            stacklevel=2,
        )
    return importlib.import_module("gspn.kernels.reference")


_library = torch.library.Library("gspn", "DEF")


# The backends' functions as torch operators


def in_format_of(template: Tensor, result: Tensor) -> Tensor:
    """The result in the memory format that torch.empty_like(template) has, copied only where it differs."""
    promised = torch.empty_like(template)
    if result.stride() == promised.stride():
        return result
    if torch._C._are_functorch_transforms_active():  # vmap may map the result and not the template
        promised = result.new_empty_strided(result.shape, promised.stride(), dtype=template.dtype)
    return promised.copy_(result)


def _as_promised(template: Tensor | None, result: Tensor | None, x: Tensor) -> Tensor:
    """The result in the memory format that the fake rule promised; an empty tensor for an absent optional input."""
    if template is None or result is None:
        return x.new_empty(0)
    # A fresh result is dense: with the template's strides it has the promised ones. No allocation is needed to compare.
    if result.dtype == template.dtype and result.stride() == template.stride():
        return result
    return in_format_of(template, result)


def _implementation(name: str, templates: list[int], device_type: str | None) -> Callable:
    def run(*args):
        *args, backend = args
        x = args[0]
        results = getattr(_select(backend, device_type or x.device.type), name)(*args)
        if isinstance(results, Tensor):
            return _as_promised(args[templates[0]], results, x)
        return tuple(_as_promised(args[i], r, x) for i, r in zip(templates, results, strict=True))

    return run


def refuse_onnx_export() -> None:
    """Raises an error inside torch.onnx.export, whose own error names neither the cause nor a way out.

    A program of torch.export, which runs node by node, may pass: the caller may have a translation for it.
    """
    if torch.onnx.is_in_onnx_export() and not torch.fx.traceback.has_preserved_node_meta():
        raise RuntimeError(
            "gspn: torch.onnx.export does not know gspn's operators. gspn.export_onnx(model, path) writes a file of "
            "standard ONNX operators; to translate them yourself, export a program of torch.export with a "
            "custom_translation_table"
        )


def _fake(templates: list[int]) -> Callable:
    def run(*args):
        refuse_onnx_export()
        outputs = [args[0].new_empty(0) if args[i] is None else torch.empty_like(args[i]) for i in templates]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return run


# Autograd


def _line_scan_save(ctx, inputs, output):
    _, weights, *ctx.options = inputs
    ctx.save_for_backward(weights, output)


def _line_scan_gradient(ctx, grad):
    weights, h = ctx.saved_tensors
    return *torch.ops.gspn.line_scan_backward(grad, weights, h, *ctx.options), None, None, None


def _gated_scan_save(ctx, inputs, output):
    x, input_gate, logits, *ctx.options = inputs
    ctx.save_for_backward(x, input_gate, logits, output)


def _gated_scan_gradient(ctx, grad):
    return *torch.ops.gspn.gated_scan_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None


def _propagate_save(ctx, inputs, output):
    *tensors, ctx.directions, ctx.segment, ctx.workspace_mib, center, ctx.backend = inputs
    ctx.save_for_backward(*tensors, center)  # neither gates nor states: the backward pass computes them again


def _propagate_gradient(ctx, grad):
    *tensors, center = ctx.saved_tensors  # read once: gradient checkpointing returns them a single time
    options = (ctx.directions, ctx.segment, ctx.workspace_mib, center, ctx.backend)
    *grads, skip_grad, center_grad = torch.ops.gspn.propagate_backward(grad, *tensors, *options)
    skip_grad = None if tensors[-1] is None else skip_grad
    return *grads, skip_grad, None, None, None, None if center is None else center_grad, None


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        'gspn: this gradient cannot be differentiated again; call the operator with backend="reference", '
        "which can be differentiated any number of times"
    )


# vmap


def _vmap(name: str, batched: list[int]) -> Callable:
    """Folds the mapped dimension into the batch if every mapped tensor has a batch, else calls once for each entry."""
    operator = getattr(torch.ops.gspn, name)

    def run(info, in_dims, *args):
        size = info.batch_size
        mapped = [isinstance(a, Tensor) and d is not None for a, d in zip(args, in_dims, strict=True)]
        moved = [a.movedim(d, 0) if m else a for a, d, m in zip(args, in_dims, mapped, strict=True)]
        if not any(m for i, m in enumerate(mapped) if i not in batched):
            folded = list(moved)
            for i in batched:
                if moved[i] is not None:
                    folded[i] = (moved[i] if mapped[i] else moved[i].expand(size, *moved[i].shape)).flatten(0, 1)
            results = operator(*folded)
            unfold = [r.unflatten(0, (size, -1)) for r in ((results,) if isinstance(results, Tensor) else results)]
        else:
            calls = [operator(*(a[i] if m else a for a, m in zip(moved, mapped, strict=True))) for i in range(size)]
            calls = [(c,) if isinstance(c, Tensor) else c for c in calls]
            unfold = [torch.stack(r) for r in zip(*calls, strict=True)]
        return (unfold[0], 0) if len(unfold) == 1 else (tuple(unfold), (0,) * len(unfold))

    return run


# FLOPs from shapes: as in torch's counter, a multiply-add counts two, and sigmoids and divisions are not counted.

_STEP = 6  # three neighbours


def _line_scan_flops(x, *_, **__) -> int:
    return _STEP * math.prod(x)


def _line_scan_backward_flops(grad, *_, **__) -> int:
    return 2 * _line_scan_flops(grad)


def _gated_scan_flops(x, input_gate, *_, **__) -> int:
    return (_STEP + 2) * math.prod(input_gate)


def _gated_scan_backward_flops(grad, *inputs, **__) -> int:
    return 2 * _gated_scan_flops(*inputs)


def _propagate_flops(x, proxy, weight_proj, input_proj, output_proj, skip_proj, *_, **__) -> int:
    projections = sum(math.prod(p) for p in (weight_proj, input_proj, output_proj, skip_proj) if p is not None)
    scans = weight_proj[0] * math.prod(x)
    skip = 0 if skip_proj is None else 2 * math.prod(x)
    return 2 * projections * proxy[0] * proxy[2] * proxy[3] + (_STEP + 4) * scans + skip


def _propagate_backward_flops(grad, *inputs, **__) -> int:
    return 2 * _propagate_flops(*inputs)


# The operators


class Op(NamedTuple):
    """What torch has to know about an operator.

    Attributes:
        schema: its arguments and results. The argument `backend` comes last; "" picks by device.
        outputs: for each output the argument whose shape, dtype and memory format it has.
        batched: the arguments with a batch dimension; if vmap maps only these, every output has one too. Empty if an
            output sums over the batch.
        flops: counts FLOPs from the arguments' shapes.
        gradient, save: autograd's formula, and the function that keeps its inputs; None if there is no second
            derivative.
    """

    schema: str
    outputs: tuple[str, ...]
    batched: tuple[str, ...]
    flops: Callable[..., int]
    gradient: Callable = _no_second_derivative
    save: Callable | None = None


_SCAN = "int[] directions, int? segment"
_PROPAGATE = f"{_SCAN}, int workspace_mib, Tensor? center"
_INPUTS = "Tensor x, Tensor proxy, Tensor weight_proj, Tensor input_proj, Tensor output_proj, Tensor? skip_proj"
_OPS = {
    "line_scan": Op(
        "(Tensor x, Tensor weights, int direction, int? segment, str backend) -> Tensor",
        outputs=("x",),
        batched=("x", "weights"),
        flops=_line_scan_flops,
        gradient=_line_scan_gradient,
        save=_line_scan_save,
    ),
    "line_scan_backward": Op(
        "(Tensor grad, Tensor weights, Tensor h, int direction, int? segment, str backend) -> (Tensor, Tensor)",
        outputs=("h", "weights"),
        batched=("grad", "weights", "h"),
        flops=_line_scan_backward_flops,
    ),
    "gated_scan": Op(
        f"(Tensor x, Tensor input_gate, Tensor logits, {_SCAN}, str backend) -> Tensor",
        outputs=("input_gate",),
        batched=("x", "input_gate", "logits"),
        flops=_gated_scan_flops,
        gradient=_gated_scan_gradient,
        save=_gated_scan_save,
    ),
    "gated_scan_backward": Op(
        f"(Tensor grad, Tensor x, Tensor input_gate, Tensor logits, Tensor h, {_SCAN}, str backend)"
        " -> (Tensor, Tensor, Tensor)",
        outputs=("x", "input_gate", "logits"),
        batched=("grad", "x", "input_gate", "logits", "h"),
        flops=_gated_scan_backward_flops,
    ),
    "propagate": Op(
        f"({_INPUTS}, {_PROPAGATE}, str backend) -> Tensor",
        outputs=("x",),
        batched=("x", "proxy", "center"),
        flops=_propagate_flops,
        gradient=_propagate_gradient,
        save=_propagate_save,
    ),
    "propagate_backward": Op(
        f"(Tensor grad, {_INPUTS}, {_PROPAGATE}, str backend)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        outputs=("x", "proxy", "weight_proj", "input_proj", "output_proj", "skip_proj", "center"),
        batched=(),
        flops=_propagate_backward_flops,
    ),
}


def _register(name: str, op: Op) -> None:
    _library.define(name + op.schema, tags=(torch.Tag.pt2_compliant_tag,))
    operator = getattr(torch.ops.gspn, name)
    arguments = [argument.name for argument in operator.default._schema.arguments]
    templates = [arguments.index(output) for output in op.outputs]
    _library.impl(name, _implementation(name, templates, "cpu"), "CPU")
    _library.impl(name, _implementation(name, templates, "cuda"), "CUDA")
    _library.impl(name, _implementation(name, templates, None), "CompositeExplicitAutograd")
    torch.library.register_fake(f"gspn::{name}", _fake(templates), lib=_library)
    torch.library.register_autograd(f"gspn::{name}", op.gradient, setup_context=op.save, lib=_library)
    batched = [arguments.index(argument) for argument in op.batched]
    torch.library.register_vmap(f"gspn::{name}", _vmap(name, batched), lib=_library)
    register_flop_formula(operator)(op.flops)


for _name, _op in _OPS.items():
    _register(_name, _op)
