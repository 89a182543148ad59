"""A depthwise convolution whose weight's gradient comes from gspn's CPU kernel: torch's takes longer than all the rest
of a training step of a small backbone in bfloat16.

Everything else is torch's: the forward pass, and all of it wherever something other than eager autograd runs or records
the convolution. So compiled, exported and traced graphs hold an ordinary convolution.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from gspn.kernels import cpu

_BATCHED = torch._C._dispatch_key_parse("Batched")


def _channels_side_by_side(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 else t.contiguous(memory_format=torch.channels_last)


def _eager() -> bool:
    """Whether operators run one by one, with nothing that follows, batches or records them."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.onnx.is_in_onnx_export()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _get_current_dispatch_mode() is not None
    )


def _on_cpu(t: Tensor) -> bool:
    """Whether it is a tensor whose values lie in memory on the CPU: no proxy, no fake tensor or other subclass, not
    negated lazily, and not what autograd's is_grads_batched passes."""
    if type(t) not in (Tensor, nn.Parameter) or t.device.type != "cpu" or t.layout != torch.strided:
        return False
    if t.is_neg():
        return False
    return not torch._C._dispatch_keys(t).has(_BATCHED)


def _torch_gradients(grad, x, weight, has_bias, wanted, *, padding, groups):
    bias_sizes = [groups] if has_bias else None
    return torch.ops.aten.convolution_backward(
        grad, x, weight, bias_sizes, [1, 1], [padding, padding], [1, 1], False, [0, 0], groups, list(wanted)
    )


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[1])

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors  # read once: gradient checkpointing returns them a single time
        geometry = dict(padding=weight.shape[-1] // 2, groups=x.shape[1])
        # torch's gradients can be differentiated again, ours cannot.
        if torch.is_grad_enabled() or not (_eager() and _on_cpu(grad) and _on_cpu(x)):
            return _torch_gradients(grad, x, weight, ctx.has_bias, ctx.needs_input_grad, **geometry)
        grad = _channels_side_by_side(grad)
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0] and grad.dtype.itemsize == 2:
            # The same sums, for which torch takes two to three times as long in bfloat16, and more in float16
            with torch.autocast("cpu", enabled=False):  # whatever is on by now
                dx = F.conv2d(grad, weight.flip(2, 3), **geometry)
        elif ctx.needs_input_grad[0]:
            dx = _torch_gradients(grad, x, weight, False, (True, False, False), **geometry)[0]
        if ctx.needs_input_grad[1]:
            dweight = cpu.depthwise_dweight(grad, _channels_side_by_side(x), weight.shape[-1]).to(x.dtype)
        if ctx.needs_input_grad[2]:  # torch's convolution_backward would compute the weight's gradient along with it
            dbias = grad.sum((0, 2, 3))
        return dx, dweight, dbias


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution with stride 1, and a padding that keeps the size of the map. On channels_last maps on the
    CPU it trains several times as fast as nn.Conv2d, and computes the same."""

    def __init__(self, channels: int, kernel_size: int, *, bias: bool = True):
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if not self._ours(x):
            return super().forward(x)
        tensors = [x, self.weight, self.bias]
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            tensors = [None if t is None else t.to(dtype) for t in tensors]
        return _Depthwise.apply(*tensors)

    def _ours(self, x: Tensor) -> bool:
        if not (_eager() and torch.is_grad_enabled() and cpu.available()[0]):
            return False
        weight, (kernel, _) = self.weight, self.kernel_size
        tensors = (x, weight) if self.bias is None else (x, weight, self.bias)
        if not all(map(_on_cpu, tensors)):
            return False
        # Someone may have set another geometry since __init__.
        geometry = (self.stride, self.padding, self.dilation, self.padding_mode)
        same = geometry == ((1, 1), (kernel // 2, kernel // 2), (1, 1), "zeros") and kernel in cpu.DEPTHWISE_KERNELS
        if not (same and x.ndim == 4 and weight.shape == (x.shape[1], 1, kernel, kernel) and x.numel() > 0):
            return False
        # Autocast leaves float64 alone; of other mixtures torch tells what is wrong.
        dtypes = {t.dtype for t in tensors}
        autocast = torch.is_autocast_enabled("cpu")
        fits = torch.float64 not in dtypes if autocast else len(dtypes) == 1
        # The stride of a single channel tells no layout, and `contiguous` leaves it as it is.
        side_by_side = x.stride(1) == 1 and x.shape[1] > 1
        return fits and side_by_side and all(t.is_floating_point() for t in tensors)
