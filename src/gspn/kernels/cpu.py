"""The native CPU kernels: finds the shared library, checks the tensors, passes their addresses and strides to C.

The C++ sources are in the folder `cpu/` beside this file. The library is loaded when first needed, after torch has
loaded its OpenMP runtime, which ours then shares. It takes any layout: nothing is copied here.

After a fork the child runs these kernels on one thread, whatever torch.get_num_threads() says: GNU OpenMP hangs in a
child whose parent has used several threads. (Workers of a DataLoader set one thread anyhow.)
"""

import ctypes
import os
import struct
import sys
import threading
from pathlib import Path

import torch

ABI_VERSION = 6  # GSPN_ABI_VERSION in cpu/api.h
DEPTHWISE_KERNELS = (5, 7)  # those that cpu/depthwise/ is compiled for
COMPILERS = "GCC 12, Clang 14 or newer"  # the oldest with what cpu/vec.h needs
ISAS = ("portable", "avx2", "avx512", "amx")  # GspnIsa in cpu/api.h, worst first

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # GspnDtype in cpu/api.h
_VIEW = 7  # words of a GspnView
_NO_VIEW = (0,) * _VIEW
_SCAN_WORDS = struct.Struct(f"={15 + 8 * _VIEW}q")  # GspnScanArgs in cpu/api.h
_PROPAGATE_WORDS = struct.Struct(f"={21 + 6 * _VIEW + 10}q")  # GspnPropagateArgs in cpu/api.h
_DEPTHWISE_WORDS = struct.Struct(f"={8 + 2 * _VIEW + 1}q")  # GspnDepthwiseArgs in cpu/api.h
_MERGED = (0, 0, 0, 0)  # no words of a layer's merger
_STATUS = {1: "out of memory for scratch buffers", 2: "bad argument"}  # GspnStatus in cpu/api.h


# ---- the library -----------------------------------------------------------------------------------------------------

_lock = threading.Lock()
_loaded: tuple[ctypes.CDLL | None, str] | None = None
_forked = False


def _after_fork() -> None:
    global _forked, _lock
    _forked = True
    _lock = threading.Lock()  # another thread of the parent may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _find() -> Path | None:
    # An editable install has two folders: the sources and, in site-packages, the built library.
    for folder in (Path(__file__).parent, *map(Path, sys.modules[__package__].__path__)):
        path = folder / "libgspn_cpu.so"
        if path.exists():
            return path
    return None


def _open(path: Path | None) -> tuple[ctypes.CDLL | None, str]:
    if path is None:
        return None, f"not built: no C++ compiler ({COMPILERS}), or compilation failed"
    try:
        library = ctypes.CDLL(str(path))
        library.gspn_abi_version.restype = ctypes.c_int64
        version = library.gspn_abi_version()
    except (OSError, AttributeError) as error:
        return None, f"the native library cannot be loaded: {error}"
    if version != ABI_VERSION:
        return None, f"the native library has ABI version {version}, expected {ABI_VERSION}: install gspn again"
    for name in (
        *("scan_forward", "scan_backward", "propagate", "propagate_backward", "propagate_scratch"),
        "depthwise_dweight",
    ):
        function = getattr(library, f"gspn_{name}")
        function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_char_p]
    library.gspn_best_isa.restype = ctypes.c_int64
    library.gspn_scratch_peak.restype, library.gspn_scratch_peak.argtypes = ctypes.c_int64, [ctypes.c_int64]
    return library, ""


def _load() -> tuple[ctypes.CDLL | None, str]:
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                _loaded = _open(_find())
    return _loaded


def _library() -> ctypes.CDLL:
    library, reason = _loaded or _load()
    if library is None:
        raise RuntimeError(f"gspn's CPU kernels are not available: {reason}")
    return library


def available() -> tuple[bool, str]:
    """Whether the native kernels can be used, and their instruction set, or why not."""
    library, reason = _load()
    return library is not None, reason or f"native, {supported_isas()[-1]}"


def supported_isas() -> tuple[str, ...]:
    """The instruction sets that the library has kernels for and this machine can run, worst first."""
    return ISAS[: _library().gspn_best_isa() + 1]


def scratch_peak_bytes(*, reset: bool = False) -> int:
    """The peak of scratch memory, over all threads, since the last reset."""
    return _library().gspn_scratch_peak(int(reset))


# ---- arguments -------------------------------------------------------------------------------------------------------


def _isa_code(isa: str | None) -> int:
    if isa is None:
        return -1
    if isa not in ISAS:
        raise ValueError(f"isa must be one of {ISAS}, got {isa!r}")
    if isa not in supported_isas():
        raise ValueError(f"this machine does not support {isa}, expected one of {supported_isas()}")
    return ISAS.index(isa)


def _thread_count(threads: int | None) -> int:
    if _forked:
        return 1
    return torch.get_num_threads() if threads is None else max(1, int(threads))


def _segment_code(segment: int | None) -> int:
    if segment is None:
        return 0
    if segment < 1:
        raise ValueError(f"segment must be None or at least 1, got {segment}")
    return int(segment)


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raw pointers follow: whatever passes here must be readable as `shape` elements of `dtype` in this process."""
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a strided tensor on the CPU, got {tensor.layout} on {tensor.device}")


def _check_x(x: torch.Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise TypeError(f"x must be one of {sorted(map(str, _DTYPES))}, got {x.dtype}")
    _check("x", x, x.shape, x.dtype)


def _direction_words(directions) -> tuple[int, ...]:
    count = len(directions)
    if not 1 <= count <= 4 or not set(directions) <= {0, 1, 2, 3}:
        raise ValueError(f"directions must be one to four of 0, 1, 2, 3, got {directions}")
    return (count, *directions, *(0,) * (4 - count))


def _check_groups(channels: int, groups: int) -> None:
    if channels == 0:
        raise ValueError("x has 0 channels, expected at least 1")
    if groups == 0 or channels % groups:
        raise ValueError(f"groups must divide the {channels} channels, got {groups}")


def _state_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _widened(weights: torch.Tensor) -> torch.Tensor:
    return weights.float() if weights.dtype in (torch.bfloat16, torch.float16) else weights


def _view_bchw(tensor: torch.Tensor) -> tuple[int, ...]:  # (B, C, H, W)
    b, c, h, w = tensor.stride()
    return tensor.data_ptr(), b, 0, c, 0, h, w


def _view_bdchw(tensor: torch.Tensor) -> tuple[int, ...]:  # (B, D, C, H, W)
    b, d, c, h, w = tensor.stride()
    return tensor.data_ptr(), b, d, c, 0, h, w


def _view_weights(tensor: torch.Tensor) -> tuple[int, ...]:  # (B, G, 3, H, W)
    b, g, k, h, w = tensor.stride()
    return tensor.data_ptr(), b, 0, g, k, h, w


def _view_logits(tensor: torch.Tensor) -> tuple[int, ...]:  # (B, D, G, 3, H, W)
    return tensor.data_ptr(), *tensor.stride()


def _run(function, arguments: bytes) -> None:
    status = function(arguments)
    if status:
        raise (MemoryError if status == 1 else RuntimeError)(f"gspn's CPU kernel failed: {_STATUS[status]}")


# ---- operators -------------------------------------------------------------------------------------------------------


def line_scan(x, weights, direction, segment=None, *, isa=None, threads=None, out=None):
    """Scan x (B, C, H, W) in one direction with weights (B, G, 3, H, W) as given; returns h (B, C, H, W).

    Weights are float32 with a 16-bit x; 16-bit weights, which do not sum to 1, are widened first.
    """
    weights = _widened(weights)
    head = _line_scan_head(x, weights, direction, segment, isa, threads)
    h = _output("out", out, x)
    words = (*_view_bchw(x), *_NO_VIEW, *_view_weights(weights), *_view_bchw(h), *_NO_VIEW * 4)
    _run(_library().gspn_scan_forward, _SCAN_WORDS.pack(*head, *words))
    return h


def line_scan_backward(grad_h, weights, h, direction, segment=None, *, isa=None, threads=None, out=None):
    """Gradients (dx, dweights) of `line_scan`, from the gradient of h and h itself."""
    dtype, weights = weights.dtype, _widened(weights)
    head = _line_scan_head(h, weights, direction, segment, isa, threads)
    _check("grad_h", grad_h, h.shape, h.dtype)
    dx, dweights = out or (None, None)
    dx, dweights = _output("dx", dx, h), _output("dweights", dweights, weights)
    words = (*_NO_VIEW * 2, *_view_weights(weights), *_view_bchw(h))
    words += (*_view_bchw(grad_h), *_view_bchw(dx), *_NO_VIEW, *_view_weights(dweights))
    _run(_library().gspn_scan_backward, _SCAN_WORDS.pack(*head, *words))
    return dx, dweights.to(dtype)


def gated_scan(x, input_gate, logits, directions, segment=None, *, isa=None, threads=None, out=None):
    """Scan input_gate (B, D, C, H, W) * x (B, C, H, W) in D directions; returns h (B, D, C, H, W).

    logits (B, D, G, 3, H, W) are normalised on the way: clamped at -28, sigmoid, divided by the neighbours' sum.
    """
    head = _gated_scan_head(x, input_gate, logits, directions, segment, isa, threads)
    h = _output("out", out, input_gate)
    words = (*_view_bchw(x), *_view_bdchw(input_gate), *_view_logits(logits), *_view_bdchw(h), *_NO_VIEW * 4)
    _run(_library().gspn_scan_forward, _SCAN_WORDS.pack(*head, *words))
    return h


def gated_scan_backward(
    grad_h, x, input_gate, logits, h, directions, segment=None, *, isa=None, threads=None, out=None
):
    """Gradients (dx, dinput_gate, dlogits) of `gated_scan`, from the gradient of h and h itself."""
    head = _gated_scan_head(x, input_gate, logits, directions, segment, isa, threads)
    _check("h", h, input_gate.shape, x.dtype)
    _check("grad_h", grad_h, input_gate.shape, x.dtype)
    shared = logits.shape[2] != x.shape[1]
    dx, dgate, dlogits = out or (None, None, None)
    dx = _output("dx", dx, x, _state_dtype(x))  # the directions are summed in it
    dgate = _output("dinput_gate", dgate, input_gate)
    dlogits = _output("dlogits", dlogits, logits, _state_dtype(x) if shared else logits.dtype)
    words = (*_view_bchw(x), *_view_bdchw(input_gate), *_view_logits(logits), *_view_bdchw(h))
    words += (*_view_bdchw(grad_h), *_view_bchw(dx), *_view_bdchw(dgate), *_view_logits(dlogits))
    _run(_library().gspn_scan_backward, _SCAN_WORDS.pack(*head, *words))
    return dx.to(x.dtype), dgate, dlogits.to(logits.dtype)


def propagate(
    x, proxy, weight_proj, input_proj, output_proj, skip_proj, directions, segment=None, workspace_mib=0, center=None,
    *, isa=None, threads=None, out=None,
):  # fmt: skip
    """Scan with gates and weights projected from proxy (B, S, H, W) on the way; returns y (B, C, H, W).

    weight_proj (D, 3, G, S), input_proj and output_proj (D, C, S), skip_proj (C, S) or None; of any floating dtype.
    center (B, D, C), or None, is taken from the gated input of each line that has a line before it.
    workspace_mib limits the scratch memory by running fewer threads; 0 is 256 MiB.
    """
    projections = _projections(x, proxy, weight_proj, input_proj, output_proj, skip_proj, center, directions)
    head = _propagate_head(x, proxy, weight_proj, directions, segment, isa, threads, workspace_mib)
    y = _output("out", out, x)
    views = (*_view_bchw(x), *_view_bchw(proxy), *_view_bchw(y), *_NO_VIEW * 3)
    pointers = (*map(_pointer, projections), 0, 0, 0, 0, 0)
    _run(_library().gspn_propagate, _PROPAGATE_WORDS.pack(*head, *views, *pointers))
    return y


def propagate_backward(
    grad_y, x, proxy, weight_proj, input_proj, output_proj, skip_proj, directions, segment=None, workspace_mib=0,
    center=None, *, isa=None, threads=None,
):  # fmt: skip
    """Gradients of `propagate`, for x, proxy, weight_proj, input_proj, output_proj, skip_proj and center; None for each
    of the last two that is None."""
    projections = _projections(x, proxy, weight_proj, input_proj, output_proj, skip_proj, center, directions)
    head = _propagate_head(x, proxy, weight_proj, directions, segment, isa, threads, workspace_mib, backward=1)
    _check("grad_y", grad_y, x.shape, x.dtype)
    dx, dproxy = torch.empty_like(x), torch.empty_like(proxy)
    gradients = [None if p is None else torch.empty_like(p) for p in projections]
    views = (*_view_bchw(x), *_view_bchw(proxy), *_NO_VIEW, *_view_bchw(grad_y), *_view_bchw(dx), *_view_bchw(dproxy))
    pointers = (*map(_pointer, projections), *map(_pointer, gradients))
    _run(_library().gspn_propagate_backward, _PROPAGATE_WORDS.pack(*head, *views, *pointers))
    originals = (weight_proj, input_proj, output_proj, skip_proj, center)
    return dx, dproxy, *(None if p is None else d.to(p.dtype) for p, d in zip(originals, gradients, strict=True))


def propagate_unmerged(
    x, proxy, weight_proj, input_proj, output_proj, skip_proj, merger, directions, segment=None, average=False,
    center=None, *, isa=None,
):  # fmt: skip
    """`propagate` with the projections as a layer keeps them: output_proj (D, C, S) and skip_proj (D, C, S), or None,
    are multiplied by merger (D,), or by 1/D without it; with `average`, output_proj[d] is divided by the lines of a
    segment. All have one dtype: that of x, or float32 with 16-bit x.

    The layer calls this in evaluation, with maps of a few pixels too: so nothing is converted, copied or checked twice.
    Returns None for what needs that: other dtypes, shapes or layouts. `propagate` takes it, or says what is wrong.
    """
    batch, channels, height, width = x.shape
    features, groups, count, dtype = proxy.shape[1], weight_proj.shape[2], len(directions), weight_proj.dtype
    weight_proj = weight_proj.contiguous()  # channels_last in models that were turned to it: a small copy
    gates, skip, scalars = (count, channels, features), skip_proj is not None, merger is not None
    if not (
        proxy.shape == (batch, features, height, width)
        and proxy.dtype == x.dtype
        and (dtype == x.dtype or (dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)))
        and (x.is_cpu and proxy.is_cpu and x.layout == torch.strided == proxy.layout)
        and not (x.is_neg() or proxy.is_neg())
        and _plain(weight_proj, (count, 3, groups, features), dtype)
        and (groups and channels % groups == 0)
        and _plain(input_proj, gates, dtype)
        and _plain(output_proj, gates, dtype)
        and (not skip or _plain(skip_proj, gates, dtype))
        and (not scalars or _plain(merger, (count,), dtype))
        and (center is None or _plain(center, (batch, count, channels), _state_dtype(x)))
    ):
        return None
    y = torch.empty_like(x)
    threads = 1 if _forked else torch.get_num_threads()
    words = _PROPAGATE_WORDS.pack(
        *(_isa_code(isa), threads, 0, _DTYPES[x.dtype]),
        *(batch, channels, features, groups, height, width, segment or 0, 0, count),
        *(*directions, *(0,) * (4 - count)),
        *(1, average, _DTYPES[dtype], merger.data_ptr() if scalars else 0),
        *(*_view_bchw(x), *_view_bchw(proxy), *_view_bchw(y), *_NO_VIEW * 3),
        *(weight_proj.data_ptr(), input_proj.data_ptr(), output_proj.data_ptr(), skip_proj.data_ptr() if skip else 0),
        *(0 if center is None else center.data_ptr(), 0, 0, 0, 0, 0),
    )
    _run(_library().gspn_propagate, words)
    return y


def _plain(tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether the kernel can read the tensor where it lies."""
    return (
        tensor.shape == shape
        and tensor.dtype == dtype
        and tensor.is_cpu
        and tensor.layout == torch.strided
        and tensor.is_contiguous()
        and not tensor.is_neg()
    )


def propagate_scratch_bytes(
    x, proxy, weight_proj, directions, segment=None, *, backward=False, isa=None, threads=None, workspace_mib=0
) -> int:
    """The scratch memory, over all threads, that `propagate` (or its backward) takes for these arguments."""
    head = _propagate_head(x, proxy, weight_proj, directions, segment, isa, threads, workspace_mib, int(backward))
    views = (*_view_bchw(x), *_view_bchw(proxy), *_NO_VIEW * 4)
    return _library().gspn_propagate_scratch(_PROPAGATE_WORDS.pack(*head, *views, *(0,) * 10))


def depthwise_dweight(grad_y, x, kernel, *, isa=None, threads=None):
    """The gradient (C, 1, kernel, kernel) of the weight of a depthwise convolution y of x, both (B, C, H, W), whose
    channels lie side by side; stride 1, padding kernel // 2, a kernel of 5 or 7. It is float32 for 16-bit maps."""
    _check_x(x)
    _check("grad_y", grad_y, x.shape, x.dtype)
    if kernel not in DEPTHWISE_KERNELS:
        raise ValueError(f"the kernel must be one of {DEPTHWISE_KERNELS}, got {kernel}")
    for name, tensor in (("x", x), ("grad_y", grad_y)):
        if tensor.stride(1) != 1:
            raise ValueError(f"{name} must have channels side by side (channels_last), got strides {tensor.stride()}")
    dweight = x.new_empty(x.shape[1], 1, kernel, kernel, dtype=_state_dtype(x))
    head = (_isa_code(isa), _thread_count(threads), _DTYPES[x.dtype], *x.shape, kernel)
    words = (*head, *_view_bchw(x), *_view_bchw(grad_y), dweight.data_ptr())
    _run(_library().gspn_depthwise_dweight, _DEPTHWISE_WORDS.pack(*words))
    return dweight


def _output(name: str, out: torch.Tensor | None, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`out` if the caller reuses a buffer, else a new tensor with the strides of `like`."""
    if out is None:
        return torch.empty_like(like, dtype=dtype)
    _check(name, out, like.shape, dtype or like.dtype)
    return out


def _line_scan_head(x, weights, direction, segment, isa, threads) -> tuple[int, ...]:
    _check_x(x)
    batch, channels, height, width = x.shape
    groups = weights.shape[1]
    _check("weights", weights, (batch, groups, 3, height, width), _state_dtype(x))
    _check_groups(channels, groups)
    if direction not in (0, 1, 2, 3):
        raise ValueError(f"direction must be 0, 1, 2 or 3, got {direction}")
    return (
        *(_isa_code(isa), _thread_count(threads), 0, _DTYPES[x.dtype]),
        *(batch, 1, channels, groups, height, width, _segment_code(segment)),
        *(direction, 0, 0, 0),
    )


def _gated_scan_head(x, input_gate, logits, directions, segment, isa, threads) -> tuple[int, ...]:
    _check_x(x)
    batch, channels, height, width = x.shape
    count, groups = len(directions), logits.shape[2]
    _check("input_gate", input_gate, (batch, count, channels, height, width), x.dtype)
    _check("logits", logits, (batch, count, groups, 3, height, width), x.dtype)
    _check_groups(channels, groups)
    return (
        *(_isa_code(isa), _thread_count(threads), 1, _DTYPES[x.dtype]),
        *(batch, count, channels, groups, height, width, _segment_code(segment)),
        *_direction_words(directions)[1:],
    )


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _projections(
    x, proxy, weight_proj, input_proj, output_proj, skip_proj, center, directions
) -> list[torch.Tensor | None]:
    """The projections and center as the kernel takes them: contiguous and of the state's dtype. They are small."""
    channels, features, count, groups = x.shape[1], proxy.shape[1], len(directions), weight_proj.shape[2]
    state = _state_dtype(x)
    found = []
    for name, tensor, shape in (
        ("weight_proj", weight_proj, (count, 3, groups, features)),
        ("input_proj", input_proj, (count, channels, features)),
        ("output_proj", output_proj, (count, channels, features)),
        ("skip_proj", skip_proj, (channels, features)),
        ("center", center, (x.shape[0], count, channels)),
    ):
        if tensor is not None:
            tensor = tensor.detach().to(state).contiguous()
            _check(name, tensor, shape, state)
        found.append(tensor)
    return found


def _propagate_head(
    x, proxy, weight_proj, directions, segment, isa, threads, workspace_mib, backward=0
) -> tuple[int, ...]:
    batch, channels, height, width = x.shape
    features, groups = proxy.shape[1], weight_proj.shape[2]
    _check_x(x)
    if height == 0 or width == 0:
        raise ValueError(f"x must have H >= 1 and W >= 1, got {tuple(x.shape)}")
    _check("proxy", proxy, (batch, features, height, width), x.dtype)
    _check_groups(channels, groups)
    return (
        *(_isa_code(isa), _thread_count(threads), backward, _DTYPES[x.dtype]),
        *(batch, channels, features, groups, height, width, _segment_code(segment), workspace_mib << 20),
        *_direction_words(directions),
        *_MERGED,
    )
