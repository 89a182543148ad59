"""What the GSPN layer is compared with. Each module maps (B,H,W,C) to (B,H,W,C), holds its own projections and works at
any size; `OnMaps` turns it into a layer of feature maps (B,C,H,W). Depthwise convolutions are the library's own, which
train faster on a CPU than torch's: each contender is as fast as we can make it.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

import gspn
from gspn.depthwise import DepthwiseConv2d


def heads_of(channels: int) -> int:
    """Heads of 64 channels, or of the next larger size that divides the width."""
    return next(n for n in range(max(1, channels // 64), 0, -1) if channels % n == 0)


def on_maps(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A layer of feature maps (B,C,H,W), applied to (B,H,W,C)."""
    return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class OnMaps(nn.Module):
    """A module for (B,H,W,C), applied to feature maps (B,C,H,W). Nothing is copied if they are channels_last."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Depthwise(nn.Module):
    """A depthwise convolution between two projections."""

    def __init__(self, width: int, kernel: int = 7, bias: bool = True):
        super().__init__()
        self.into, self.out = (nn.Linear(width, width, bias=bias) for _ in range(2))
        self.convolution = DepthwiseConv2d(width, kernel)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(on_maps(self.convolution, self.into(x)))


class GatedConvolution(nn.Module):
    """MambaOut's token mixer (arXiv 2405.07992): out(GELU(g) * DWConv7x7(v)), where [g, v] is a projection of x."""

    def __init__(self, width: int, kernel: int = 7, bias: bool = True):
        super().__init__()
        self.into, self.out = nn.Linear(width, 2 * width, bias=bias), nn.Linear(width, width, bias=bias)
        self.convolution = DepthwiseConv2d(width, kernel)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.into(x).chunk(2, -1)
        return self.out(F.gelu(gate) * on_maps(self.convolution, value))


class Attention(nn.Module):
    """Softmax attention over all pixels: qkv and output projections, torch's scaled_dot_product_attention. `heads`:
    None is `heads_of`."""

    def __init__(self, width: int, heads: int | None = None, bias: bool = True):
        super().__init__()
        self.heads = heads or heads_of(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width, bias=bias)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B,heads,N,D) to (B,heads,N,D)."""
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        qkv = self.qkv(x).reshape(batch, height * width, 3, self.heads, channels // self.heads)
        mixed = self.mix(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).reshape(x.shape)
        local = self.local(qkv[:, :, 2].reshape(x.shape))  # a view
        return self.out(mixed if local is None else mixed + local)

    def local(self, v: Tensor) -> Tensor | None:
        """What is added to the mixed values, from v (B,H,W,C)."""
        return None


class LinearAttention(Attention):
    """y = phi(q) (phi(k)^T v) / (phi(q) sum phi(k)) with phi = elu + 1 (arXiv 2006.16236) and the same projections."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        return (q @ (k.mT @ v)) / (q @ k.sum(-2).unsqueeze(-1))


class ReluLinearAttention(Attention):
    """Linear attention with phi = ReLU and few heads."""

    def __init__(self, width: int, heads: int = 2, bias: bool = True):
        super().__init__(width, heads, bias)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.relu(q), F.relu(k)
        return (q @ (k.mT @ v)) / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)


class ReluLinearAttentionConvolution(ReluLinearAttention):
    """LiT's mixer (arXiv 2501.12976): ReLU linear attention plus a 5x5 depthwise convolution of v."""

    def __init__(self, width: int, kernel: int = 5, bias: bool = True):
        super().__init__(width, bias=bias)
        self.convolution = DepthwiseConv2d(width, kernel)

    def local(self, v: Tensor) -> Tensor:
        return on_maps(self.convolution, v)


class Gspn(nn.Module):
    """GSPN2d between two projections; where it scans in fewer channels, its own projections take their place."""

    def __init__(self, width: int, bias: bool = True, **options):
        super().__init__()
        compact = options.get("scan_dim") is not None
        self.into, self.out = (nn.Identity() if compact else nn.Linear(width, width, bias=bias) for _ in range(2))
        self.scan = gspn.GSPN2d(width, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(on_maps(self.scan, self.into(x)))


class Contender(NamedTuple):
    """`make` gives a layer of feature maps (B,C,H,W) from C. Its cost grows with the pixels to the given `power`."""

    make: Callable[[int], nn.Module]
    power: int = 1


def _on_maps(module: Callable, channels: int) -> nn.Module:
    return OnMaps(module(channels, bias=False))  # as GSPN2d, which has no bias


OURS = "gspn"
CONTENDERS = {
    OURS: Contender(lambda channels: gspn.GSPN2d(channels)),
    "gspn + projections": Contender(partial(_on_maps, Gspn)),
    "attention": Contender(partial(_on_maps, Attention), power=2),
    "linear attention": Contender(partial(_on_maps, LinearAttention)),
    "relu attention + 5x5": Contender(partial(_on_maps, ReluLinearAttentionConvolution)),
    "depthwise 7x7": Contender(partial(_on_maps, Depthwise)),
    "gated convolution": Contender(partial(_on_maps, GatedConvolution)),
}
