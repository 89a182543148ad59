"""GSPN2d on a CPU without gradients: from the layer's own tensors straight into the kernel.

On maps of a few pixels the usual way, through the merger's products, the checks and torch's dispatch, takes many times
as long as the kernel. Here one call does all of it, and nothing is kept between calls that could become outdated.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gspn.dispatch import backend_status
from gspn.kernels import cpu
from gspn.ops import LARGEST_SEGMENT, direction_indices

_TENSORS = (Tensor, torch.nn.Parameter)


def _observed() -> bool:
    """Whether something watches or rewrites torch's operators, which has to see ours too."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or forward_ad._current_level >= 0
        or torch.autograd._profiler_enabled()
    )


def propagate_lean(layer: torch.nn.Module, x: Tensor, proxy: Tensor, center: Tensor | None) -> Tensor | None:
    """What GSPN2d._propagate returns, or None where only the usual way is right: with gradients, on other devices and
    backends, under torch's transforms, for tensors that are not plain ones."""
    if torch.is_grad_enabled() or _observed() or type(x) is not Tensor or type(proxy) is not Tensor:
        return None
    if layer.backend not in (None, "cpu") or layer.alignment != "aligned" or not backend_status("cpu").available:
        return None
    segment = layer.segment
    if segment is not None and not (type(segment) is int and 0 < segment <= LARGEST_SEGMENT):
        return None  # the usual way says what is wrong
    tensors = []
    for name in ("weight_proj", "input_proj", "output_proj", "skip_proj", "merger"):
        if name not in layer._parameters:  # parametrised: a property computes it
            return None
        tensor = layer._parameters[name]
        if tensor is not None and type(tensor) not in _TENSORS:
            return None
        tensors.append(tensor)
    indices = direction_indices(layer.directions)
    center = None if center is None else center.contiguous()
    return cpu.propagate_unmerged(x, proxy, *tensors, indices, segment, layer.average, center)
