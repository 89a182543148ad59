r"""The operators: what they compute and what they accept::

    normalize_weights   logits to propagation weights (the stability-context condition)
    line_scan           one direction, weights given: the primitive
    gated_scan          several directions, normalisation fused
    propagate           several directions, weights and gates projected from a proxy while scanning

In one direction, for line t and place p in the line, with the state before the first line 0::

    h[p,t] = wl[p,t] h[p-1,t-1] + wm[p,t] h[p,t-1] + wr[p,t] h[p+1,t-1] + b[p,t]

A neighbour outside the line contributes 0; b is the gated input. Weights are read at the current pixel. A direction
says where the scan travels: for "right" and "left" the lines are columns and p runs down a column, for "down" and "up"
the lines are rows and p runs along a row. Source: GSPN (arXiv 2501.12381), section 3; shared weights: GSPN-2
(arXiv 2512.07884).

Common rules:

- Maps are (B,C,H,W), any H, W >= 1 and any strides.
- Groups share weights: G divides C and channel c belongs to group c * G // C.
- Data is float64, float32, bfloat16 or float16; the state is float32 (float64 for float64) whatever the data.
- All maps have one dtype; inside autocast the others are cast to x's. Results have x's dtype and memory format.
- ``segment=K`` sets the state to 0 every K lines, counted from where the scan starts; None is global.
- Results are deterministic for a given number of threads.
- ``backend=None`` picks the native kernel for x's device or, if it is missing, the reference with one warning. A named
  backend never falls back.
- Gradients of gradients, forward-mode derivatives and torch.func.grad need ``backend="reference"``; vmap does not.
- Every differentiable input has a gradient on every backend: zeros if it does not reach the output.
- Errors: TypeError for inputs that are not floating tensors or mix dtypes, ValueError for shapes, devices, names and
  numbers that do not fit, RuntimeError for a backend that is not available.
"""

import operator
from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gspn.dispatch import BACKENDS, NATIVE_BACKENDS, available_backends, in_format_of, refuse_onnx_export
from gspn.kernels import reference

__all__ = ["DIRECTIONS", "available_backends", "gated_scan", "line_scan", "normalize_weights", "propagate"]

DIRECTIONS = ("right", "down", "left", "up")  # inside the operators a direction is its index here

LARGEST_SEGMENT = 2**63 - 1
_LARGEST_WORKSPACE_MIB = 2**43 - 1  # bytes are numbers of 64 bits

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def normalize_weights(logits: Tensor, *, direction: str) -> Tensor:
    """Propagation weights: non-negative, summing to 1 at every pixel (the stability-context condition)::

        w_k = sigmoid(a_k) / (sum of sigmoid(a_j) over the neighbours j that exist),  a = max(logits, -28)

    Args:
        logits: (B,G,3,H,W), for the previous, same and next place in the line.
        direction: one of ``DIRECTIONS``; it says along which axis a line runs, and so where neighbours are missing.

    Returns:
        (B,G,3,H,W), 0 where a neighbour does not exist. float32 for 16-bit logits too, in and out of autocast,
        because weights rounded to bfloat16 do not sum to 1.

    Below -28 the gradient is 0; NaN propagates. Errors: see the module.

    >>> import torch, gspn
    >>> gspn.normalize_weights(torch.zeros(1, 1, 3, 3, 1), direction="right")[0, 0, :, :, 0].T
    tensor([[0.0000, 0.5000, 0.5000],
            [0.3333, 0.3333, 0.3333],
            [0.5000, 0.5000, 0.0000]])
    """
    _check_tensor("logits", logits, "(B,G,3,H,W)")
    _check_three("logits", logits, "(B,G,3,H,W)", 2)
    return reference.normalize_weights(logits, _direction_index(direction))


def line_scan(
    x: Tensor, weights: Tensor, *, direction: str, segment: int | None = None, backend: str | None = None
) -> Tensor:
    """One direction of the scan, with weights used as given::

        h[p,t] = wl[p,t] h[p-1,t-1] + wm[p,t] h[p,t-1] + wr[p,t] h[p+1,t-1] + x[p,t]

    Args:
        x: (B,C,H,W), the input, already gated.
        weights: (B,G,3,H,W), for the previous, same and next place; any values. x's dtype, or float32 with 16-bit x.
        direction: one of ``DIRECTIONS``.
        segment: lines between resets of the state; None for none.
        backend: ``"reference"``, ``"cpu"``, ``"triton"``, or None to pick by device.

    Returns:
        h (B,C,H,W). The module says the rules and the errors.

    States are saved in x's dtype. So beside 16-bit x the gradient of float32 weights is exact to 16 bits only. The
    Triton kernels give NaN where a state is infinite, or beyond about 1.7e38.

    >>> import torch, gspn
    >>> x = torch.ones(1, 1, 1, 4)
    >>> weights = torch.tensor([0.0, 0.5, 0.0]).view(1, 1, 3, 1, 1).expand(1, 1, 3, 1, 4)
    >>> gspn.line_scan(x, weights, direction="right")
    tensor([[[[1.0000, 1.5000, 1.7500, 1.8750]]]])
    """
    _check_tensor("x", x, "(B,C,H,W)")
    _check_tensor("weights", weights, "(B,G,3,H,W)")
    _check_three("weights", weights, "(B,G,3,H,W)", 2)
    _check_shape("weights", weights, "(B,G,3,H,W)", (x.shape[0], None, 3, *x.shape[2:]))
    _check_groups("weights", weights.shape[1], x.shape[1])
    weights = _same_dtype(x, weights=weights, float32_beside_16_bit=True)[0]
    _check_devices(x, weights=weights)
    index, segment = _direction_index(direction), validate_segment(segment)
    if _validate_backend(backend, x) == "reference":
        return in_format_of(x, reference.line_scan(x, weights, index, segment))
    _check_native(x, weights)
    return torch.ops.gspn.line_scan(x, weights, index, segment, backend or "")


def gated_scan(
    x: Tensor,
    input_gate: Tensor,
    logits: Tensor,
    *,
    directions: Sequence[str] = DIRECTIONS,
    segment: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Several directions of the scan, with the input gate applied and the logits normalised on the way::

        h[d] = line_scan(input_gate[d] * x, normalize_weights(logits[d]), direction=directions[d])

    Args:
        x: (B,C,H,W).
        input_gate: (B,D,C,H,W), lambda of the paper, no activation.
        logits: (B,D,G,3,H,W), for the previous, same and next place.
        directions: D of ``DIRECTIONS``, each at most once.
        segment, backend: as in :func:`line_scan`.

    Returns:
        h (B,D,C,H,W). The module says the rules and the errors.

    >>> import torch, gspn
    >>> x, gate, logits = torch.ones(1, 2, 5, 4), torch.ones(1, 4, 2, 5, 4), torch.zeros(1, 4, 2, 3, 5, 4)
    >>> h = gspn.gated_scan(x, gate, logits, backend="reference")
    >>> h[0, :, 0, 2, 1].round()  # right, down, left, up: how many lines each has travelled
    tensor([2., 3., 3., 3.])
    """
    indices = direction_indices(directions)
    _check_tensor("x", x, "(B,C,H,W)")
    _check_tensor("input_gate", input_gate, "(B,D,C,H,W)")
    _check_tensor("logits", logits, "(B,D,G,3,H,W)")
    batch, channels, *size = x.shape
    _check_three("logits", logits, "(B,D,G,3,H,W)", 3)
    _check_shape("input_gate", input_gate, "(B,D,C,H,W)", (batch, len(indices), channels, *size))
    _check_shape("logits", logits, "(B,D,G,3,H,W)", (batch, len(indices), None, 3, *size))
    _check_groups("logits", logits.shape[2], channels)
    input_gate, logits = _same_dtype(x, input_gate=input_gate, logits=logits)
    _check_devices(x, input_gate=input_gate, logits=logits)
    segment = validate_segment(segment)
    if _validate_backend(backend, x) == "reference":
        return in_format_of(input_gate, reference.gated_scan(x, input_gate, logits, indices, segment))
    _check_native(x, input_gate, logits)
    return torch.ops.gspn.gated_scan(x, input_gate, logits, indices, segment, backend or "")


def propagate(
    x: Tensor,
    proxy: Tensor,
    weight_proj: Tensor,
    input_proj: Tensor,
    output_proj: Tensor,
    skip_proj: Tensor | None = None,
    *,
    center: Tensor | None = None,
    directions: Sequence[str] = DIRECTIONS,
    segment: int | None = None,
    workspace_mib: int = 256,
    backend: str | None = None,
) -> Tensor:
    """Several directions of the scan, merged, with weights and gates projected from a small proxy of the input::

        y = sum over d of (output_proj[d] proxy) * h[d] + (skip_proj proxy) * x
        h[d] = gated_scan of x with input gate input_proj[d] proxy and logits weight_proj[d] proxy

    With ``center``, center[d] is subtracted from the gated input of every line that does not start a segment.
    A product of a projection and the proxy is a 1x1 convolution from S channels. Native kernels compute it while they
    scan and write no map of weights or gates to memory, except that on a CPU weights that all channels share are
    written once, for a few images at a time. Only x and the proxy are kept for the gradients.

    Args:
        x: (B,C,H,W).
        proxy: (B,S,H,W).
        weight_proj: (D,3,G,S), to the logits of the previous, same and next place.
        input_proj, output_proj: (D,C,S), to the input gate lambda and the output gate u. A merger's scalars are
            multiplied into output_proj by the caller.
        skip_proj: (C,S), to the skip gate d, or None for no skip.
        center: (B,D,C), what is subtracted from the gated input of each direction, or None. float32, or float64 with
            float64 x. With the mean m of the gated input over the map, h[d] is m plus the scan of the differences from
            m, because weights sum to 1: the mean arrives once, instead of once from each line.
        directions: D of ``DIRECTIONS``, each at most once.
        segment, backend: as in :func:`line_scan`.
        workspace_mib: MiB of scratch memory that a native kernel may use for more threads or larger pieces. It always
            uses what one thread needs. The reference ignores it.

    Returns:
        y (B,C,H,W). Projections have x's dtype, or float32 with 16-bit x; every gradient has its input's dtype.
        For gates with their own proxies, concatenate the proxies and pad the projections with zeros, which is exact.
        The module says the rules and the errors.

    >>> import torch, gspn
    >>> x, proxy = torch.randn(2, 6, 9, 7), torch.randn(2, 4, 9, 7)
    >>> w, i, o = torch.randn(4, 3, 6, 4), torch.randn(4, 6, 4), torch.randn(4, 6, 4)
    >>> gspn.propagate(x, proxy, w, i, o, backend="reference").shape
    torch.Size([2, 6, 9, 7])
    """
    indices = direction_indices(directions)
    _check_tensor("x", x, "(B,C,H,W)")
    _check_tensor("proxy", proxy, "(B,S,H,W)")
    projections = {"weight_proj": weight_proj, "input_proj": input_proj, "output_proj": output_proj}
    expected = {"weight_proj": "(D,3,G,S)", "input_proj": "(D,C,S)", "output_proj": "(D,C,S)", "skip_proj": "(C,S)"}
    if skip_proj is not None:
        projections["skip_proj"] = skip_proj
    for name, projection in projections.items():
        _check_tensor(name, projection, expected[name])
    if center is not None:
        _check_tensor("center", center, "(B,D,C)")
    count, (batch, channels, *size), features = len(indices), x.shape, proxy.shape[1]
    if features == 0:
        raise ValueError(f"proxy (B,S,H,W) has to have S >= 1, got {tuple(proxy.shape)}")
    workspace_mib = whole_number("workspace_mib", workspace_mib)
    if workspace_mib < 1:
        raise ValueError(f"workspace_mib has to be at least 1 MiB, got {workspace_mib}")
    if workspace_mib > _LARGEST_WORKSPACE_MIB:
        raise ValueError(f"workspace_mib has to be below 2^43 MiB, got {workspace_mib}")
    _check_shape("proxy", proxy, "(B,S,H,W)", (batch, None, *size))
    _check_shape("weight_proj", weight_proj, "(D,3,G,S)", (count, 3, None, features))
    _check_groups("weight_proj", weight_proj.shape[2], channels)
    for name in ("input_proj", "output_proj"):
        _check_shape(name, projections[name], "(D,C,S)", (count, channels, features))
    if skip_proj is not None:
        _check_shape("skip_proj", skip_proj, "(C,S)", (channels, features))
    (proxy,) = _same_dtype(x, proxy=proxy)
    cast = _same_dtype(x, **projections, float32_beside_16_bit=True)
    _check_devices(x, proxy=proxy, **projections)
    if center is not None:
        _check_shape("center", center, "(B,D,C)", (batch, count, channels))
        _check_devices(x, center=center)
        exact = torch.promote_types(x.dtype, torch.float32)
        if center.dtype != exact:
            raise TypeError(f"center has to be {exact} beside x {x.dtype}, got {center.dtype}")
    weight_proj, input_proj, output_proj, *rest = cast
    skip_proj, segment = (rest[0] if rest else None), validate_segment(segment)
    tensors = (x, proxy, weight_proj, input_proj, output_proj, skip_proj)
    if _validate_backend(backend, x) == "reference":
        return in_format_of(x, reference.propagate(*tensors, indices, segment, center=center))
    _check_native(*tensors, center)
    return torch.ops.gspn.propagate(*tensors, indices, segment, workspace_mib, center, backend or "")


# Checks: each says what was got and what was expected.


def _check_tensor(name: str, value: Tensor, form: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} has to be a tensor {form}, got {type(value).__name__}")
    if value.dtype not in _DTYPES:
        raise TypeError(f"{name} has to be float64, float32, bfloat16 or float16, got {value.dtype}")
    dims = form.count(",") + 1
    if value.ndim != dims:
        raise ValueError(f"{name} has to have {dims} dimensions {form}, got {value.ndim}: {tuple(value.shape)}")
    if form.endswith(",H,W)") and (value.shape[-1] == 0 or value.shape[-2] == 0):
        raise ValueError(f"{name} has to have H >= 1 and W >= 1, got {tuple(value.shape)}")


def _check_three(name: str, value: Tensor, form: str, axis: int) -> None:
    if value.shape[axis] != 3:
        raise ValueError(f"{name} {form} has to have 3 in dimension {axis}, got {tuple(value.shape)}")


def _check_shape(name: str, value: Tensor, form: str, expected: tuple[int | None, ...]) -> None:
    if any(e is not None and e != got for e, got in zip(expected, value.shape, strict=True)):
        wanted = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{name} {form} has to be ({wanted}) to fit x and directions, got {tuple(value.shape)}")


def _check_groups(name: str, groups: int, channels: int) -> None:
    if channels == 0:
        raise ValueError("x has 0 channels, expected at least 1")
    if groups == 0 or channels % groups:
        raise ValueError(f"{name} has {groups} groups, expected a divisor of x's {channels} channels")


def _same_dtype(x: Tensor, *, float32_beside_16_bit: bool = False, **others: Tensor) -> list[Tensor]:
    """The others in x's dtype (or float32 with 16-bit x if allowed): cast inside autocast, an error outside."""
    allowed = {x.dtype} | ({torch.float32} if float32_beside_16_bit and x.dtype.itemsize == 2 else set())
    if all(other.dtype in allowed for other in others.values()):
        return list(others.values())
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return [other if other.dtype in allowed else other.to(x.dtype) for other in others.values()]
    got = ", ".join(f"{name} {other.dtype}" for name, other in others.items())
    raise TypeError(f"dtypes have to agree outside autocast, got x {x.dtype}, {got}")


def _check_native(*tensors: Tensor | None) -> None:
    """Raises an error for what only the reference can do, before torch's own error, which does not say that."""
    if forward_ad._current_level >= 0:  # torch would silently return zero tangents
        for t in tensors:
            if t is not None and forward_ad.unpack_dual(t).tangent is not None:
                raise RuntimeError('gspn: native kernels have no forward-mode derivatives; use backend="reference"')
    if torch._C._are_functorch_transforms_active() and any(map(_tracked_by_functorch, tensors)):
        raise RuntimeError(
            "gspn: torch.func (grad, vjp, jacrev, hessian) cannot differentiate the native kernels; use "
            'backend="reference", or torch.autograd, which works on every backend'
        )
    if torch.jit.is_tracing():  # torch.onnx.export(dynamo=False) traces with real tensors
        refuse_onnx_export()


def _tracked_by_functorch(t: Tensor | None) -> bool:
    """Whether a transform of torch.func takes a gradient with respect to t, at any level of transforms."""
    while t is not None and torch._C._functorch.is_functorch_wrapped_tensor(t):
        if torch._C._functorch.is_gradtrackingtensor(t) and t.requires_grad:
            return True
        t = torch._C._functorch.get_unwrapped(t)
    return False


def _check_devices(x: Tensor, **others: Tensor) -> None:
    for name, other in others.items():
        if other.device != x.device:
            raise ValueError(f"{name} has to be on x's device {x.device}, got {other.device}")


def _direction_index(direction: str) -> int:
    if direction not in DIRECTIONS:
        raise ValueError(f"unknown direction {direction!r}, expected one of {', '.join(DIRECTIONS)}")
    return DIRECTIONS.index(direction)


def direction_indices(directions: Sequence[str]) -> list[int]:
    if isinstance(directions, str):
        raise TypeError(f"directions has to be a sequence of names, got the string {directions!r}")
    names = tuple(directions)
    indices = [_direction_index(d) for d in names]
    if not indices or len(set(indices)) != len(indices):
        raise ValueError(f"directions has to name one to four different directions, got {names}")
    return indices


def validate_segment(segment: int | None) -> int | None:
    if segment is None:
        return None
    segment = whole_number("segment", segment, "a number of lines or None")
    if segment < 1:
        raise ValueError(f"segment has to be at least 1 line, or None for global, got {segment}")
    if segment > LARGEST_SEGMENT:
        raise ValueError(f"segment has to be below 2^63 lines, or None for global, got {segment}")
    return segment


def whole_number(name: str, value: SupportsIndex, expected: str = "a whole number") -> int:
    """The value as an int, whatever integer it is, such as one of numpy."""
    if isinstance(value, torch.SymInt):
        raise TypeError(f"{name} has to be {expected}, got the open size {value} of a model that is traced: fix it")
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name} has to be {expected}, got {value!r}")


def whole_numbers(name: str, values: Any) -> tuple[int, ...]:
    """The argument `name` as whole numbers, from any sequence. Errors: TypeError."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} takes a list of whole numbers such as [2,2,2], got {values!r}")
    return tuple(whole_number(f"each of {name}", value) for value in values)


def check_backend(backend: str | None) -> None:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}, expected one of {', '.join(BACKENDS)} or None")


def _validate_backend(backend: str | None, x: Tensor) -> str | None:
    check_backend(backend)
    if backend not in (None, "reference", NATIVE_BACKENDS.get(x.device.type)):
        raise ValueError(f"backend {backend!r} does not run on {x.device}; backend=None picks one that does")
    return backend
