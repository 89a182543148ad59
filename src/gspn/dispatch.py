"""How torch knows the operators: schemas, the choice of a backend, and the rules for fake tensors, autograd, vmap and
FLOP counting. What the operators compute stands in ops.py; who computes it, in kernels/.

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
    """Whether a backend can be used here, and what it is or why it cannot."""

    available: bool
    reason: str


_statuses: dict[str, BackendStatus] = {}
_warned: set[str] = set()


def available_backends() -> dict[str, BackendStatus]:
    """The three backends, each with whether it can be used here and why (not).

    Returns:
        a dict from ``"reference"``, ``"cpu"`` and ``"triton"`` to ``(available, reason)``.

    >>> import gspn
    >>> gspn.available_backends()["reference"].available
    True
    """
    return {name: _status(name) for name in BACKENDS}


def _status(name: str) -> BackendStatus:
    if name not in _statuses:
        try:
            _statuses[name] = BackendStatus(*importlib.import_module(f"gspn.kernels.{name}").available())
        except ModuleNotFoundError as error:
            missing = f"gspn.kernels.{name}"
            _statuses[name] = BackendStatus(
                False, "not part of this version of gspn" if error.name == missing else f"{error.name} is not installed"
            )
    return _statuses[name]


def _select(backend: str, device_type: str):
    """The module that computes: the one named or an error; for "" the native one, or the reference with a warning."""
    name = backend or NATIVE_BACKENDS.get(device_type, "")
    status = _status(name) if name else BackendStatus(False, f"gspn has no kernel for devices of type {device_type!r}")
    if status.available:
        return importlib.import_module(f"gspn.kernels.{name}")
    if backend:
        raise RuntimeError(f"backend {backend!r} is not available here: {status.reason}")
    if device_type not in _warned:
        _warned.add(device_type)
        warnings.warn(
            f"gspn uses its reference backend on {device_type}, which is slow, because the native one is missing: "
            f"{status.reason}",
            stacklevel=2,
        )
    return importlib.import_module("gspn.kernels.reference")


# Schemas. `backend` comes last: "" picks by device.

_library = torch.library.Library("gspn", "DEF")
_SCAN = "int[] directions, int? segment"
_PROJECTIONS = "Tensor weight_proj, Tensor input_proj, Tensor output_proj, Tensor? skip_proj"
_SCHEMAS = {
    "line_scan": "(Tensor x, Tensor weights, int direction, int? segment, str backend) -> Tensor",
    "line_scan_backward": "(Tensor grad, Tensor weights, Tensor h, int direction, int? segment, str backend)"
    " -> (Tensor, Tensor)",
    "gated_scan": f"(Tensor x, Tensor input_gate, Tensor logits, {_SCAN}, str backend) -> Tensor",
    "gated_scan_backward": f"(Tensor grad, Tensor x, Tensor input_gate, Tensor logits, Tensor h, {_SCAN}, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    "propagate": f"(Tensor x, Tensor proxy, {_PROJECTIONS}, {_SCAN}, int workspace_mib, str backend) -> Tensor",
    "propagate_backward": f"(Tensor grad, Tensor x, Tensor proxy, {_PROJECTIONS}, {_SCAN}, int workspace_mib, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
}


def _templates(name: str, args: tuple) -> list[Tensor | None]:
    """The inputs whose shape, dtype and memory format the outputs have, in the order of the outputs."""
    if name == "line_scan":
        return [args[0]]
    if name == "line_scan_backward":
        return [args[2], args[1]]
    if name == "gated_scan":
        return [args[1]]
    if name == "gated_scan_backward":
        return list(args[1:4])
    return [args[0]] if name == "propagate" else list(args[1:7])


def _like(template: Tensor | None, result: Tensor | None, x: Tensor) -> Tensor:
    """The result in the memory format that the fake rule promised; an empty tensor for an optional input not given."""
    if template is None or result is None:
        return x.new_empty(0)
    # A fresh result is dense; with the template's strides it has the promised ones. This saves allocating to compare.
    if result.dtype == template.dtype and result.stride() == template.stride():
        return result
    promised = torch.empty_like(template)
    return result if result.stride() == promised.stride() else promised.copy_(result)


def _implementation(name: str, device_type: str | None) -> Callable:
    def run(*args):
        *args, backend = args
        x = args[0]
        results = getattr(_select(backend, device_type or x.device.type), name)(*args)
        if isinstance(results, Tensor):
            return _like(_templates(name, args)[0], results, x)
        return tuple(_like(t, r, x) for t, r in zip(_templates(name, args), results, strict=True))

    return run


def refuse_onnx_export() -> None:
    """An error inside torch.onnx.export, whose own names neither the cause nor the way.

    A program of torch.export passes, which is run node by node: with it the caller may bring a translation.
    """
    if torch.onnx.is_in_onnx_export() and not torch.fx.traceback.has_preserved_node_meta():
        raise RuntimeError(
            "gspn: torch.onnx.export does not know gspn's operators. gspn.export_onnx(model, path) writes a file of "
            "standard ONNX operators; to translate them yourself, export a program of torch.export with a "
            "custom_translation_table"
        )


def _fake(name: str) -> Callable:
    def run(*args):
        refuse_onnx_export()
        outputs = [args[0].new_empty(0) if t is None else torch.empty_like(t) for t in _templates(name, args)]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return run


# Autograd


def _line_scan_setup(ctx, inputs, output):
    _, weights, *ctx.options = inputs
    ctx.save_for_backward(weights, output)


def _line_scan_gradient(ctx, grad):
    weights, h = ctx.saved_tensors
    return *torch.ops.gspn.line_scan_backward(grad, weights, h, *ctx.options), None, None, None


def _gated_scan_setup(ctx, inputs, output):
    x, input_gate, logits, *ctx.options = inputs
    ctx.save_for_backward(x, input_gate, logits, output)


def _gated_scan_gradient(ctx, grad):
    return *torch.ops.gspn.gated_scan_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None


def _propagate_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])  # neither gates nor states: the backward pass computes them again
    ctx.options = inputs[6:]


def _propagate_gradient(ctx, grad):
    saved = ctx.saved_tensors  # once: gradient checkpointing hands them out a single time
    grads = torch.ops.gspn.propagate_backward(grad, *saved, *ctx.options)
    return *grads[:5], None if saved[5] is None else grads[5], None, None, None, None


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        'gspn: this gradient cannot be differentiated again; call the operator with backend="reference", '
        "which can be differentiated any number of times"
    )


_GRADIENTS = {
    "line_scan": (_line_scan_gradient, _line_scan_setup),
    "gated_scan": (_gated_scan_gradient, _gated_scan_setup),
    "propagate": (_propagate_gradient, _propagate_setup),
}


# vmap


def _vmap(name: str) -> Callable:
    """Folds the mapped dimension into the batch where every tensor has a batch, else calls once for each entry."""
    operator = getattr(torch.ops.gspn, name)
    tensors = {"line_scan": 2, "line_scan_backward": 3, "gated_scan": 3, "gated_scan_backward": 5}

    def run(info, in_dims, *args):
        size = info.batch_size
        batched = [isinstance(a, Tensor) and d is not None for a, d in zip(args, in_dims, strict=True)]
        moved = [a.movedim(d, 0) if b else a for a, d, b in zip(args, in_dims, batched, strict=True)]
        count = tensors.get(name, 2 if name == "propagate" and not any(batched[2:6]) else 0)
        if count:
            folded = [
                (a if b else a.expand(size, *a.shape)).flatten(0, 1)
                for a, b in zip(moved[:count], batched[:count], strict=True)
            ]
            results = operator(*folded, *moved[count:])
            unfold = [r.unflatten(0, (size, -1)) for r in ((results,) if isinstance(results, Tensor) else results)]
        else:
            calls = [operator(*(a[i] if b else a for a, b in zip(moved, batched, strict=True))) for i in range(size)]
            calls = [(c,) if isinstance(c, Tensor) else c for c in calls]
            unfold = [torch.stack(r) for r in zip(*calls, strict=True)]
        return (unfold[0], 0) if len(unfold) == 1 else (tuple(unfold), (0,) * len(unfold))

    return run


# FLOPs: multiply-adds count two, as in torch's counter; sigmoids and divisions are not counted, as there.

_STEP = 6  # three neighbours


def _line_scan_flops(x, *_, **__) -> int:
    return _STEP * math.prod(x)


def _gated_scan_flops(x, input_gate, *_, **__) -> int:
    return (_STEP + 2) * math.prod(input_gate)


def _propagate_flops(x, proxy, weight_proj, input_proj, output_proj, skip_proj, *_, **__) -> int:
    projections = sum(math.prod(p) for p in (weight_proj, input_proj, output_proj, skip_proj) if p is not None)
    scans = weight_proj[0] * math.prod(x)
    skip = 0 if skip_proj is None else 2 * math.prod(x)
    return 2 * projections * proxy[0] * proxy[2] * proxy[3] + (_STEP + 4) * scans + skip


_FLOPS = {"line_scan": _line_scan_flops, "gated_scan": _gated_scan_flops, "propagate": _propagate_flops}


def _flops(name: str) -> Callable:
    if not name.endswith("_backward"):
        return _FLOPS[name]
    forward = _FLOPS[name.removesuffix("_backward")]
    skipped = 0 if name.startswith("line") else 1  # the gradient, and for line_scan it stands for x
    return lambda *shapes, **rest: 2 * forward(*shapes[skipped:], **rest)


for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _implementation(_name, "cpu"), "CPU")
    _library.impl(_name, _implementation(_name, "cuda"), "CUDA")
    _library.impl(_name, _implementation(_name, None), "CompositeExplicitAutograd")
    torch.library.register_fake(f"gspn::{_name}", _fake(_name), lib=_library)
    if _name in _GRADIENTS:
        _gradient, _setup = _GRADIENTS[_name]
        torch.library.register_autograd(f"gspn::{_name}", _gradient, setup_context=_setup, lib=_library)
    else:
        torch.library.register_autograd(f"gspn::{_name}", _no_second_derivative, lib=_library)
    torch.library.register_vmap(f"gspn::{_name}", _vmap(_name), lib=_library)
    register_flop_formula(getattr(torch.ops.gspn, _name))(_flops(_name))
