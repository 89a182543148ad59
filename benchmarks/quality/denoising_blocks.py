"""Blocks for benchmarks.quality.denoising: those of the convolutional generators FCDM (2026) and DiCo (2025), written
from the descriptions in their papers, and one that adds positions before GSPN-DiT's own.

FCDM and DiCo were published as U-nets. Here each stands in the place of GSPN-DiT's block, so that all contenders have
as many tokens in every block. All take maps (B,H,W,C) and a condition (B,C), as GSPNDiTBlock does, and start as the
identity.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspn.bench.contenders import on_maps
from gspn.depthwise import DepthwiseConv2d
from gspn.layers import GlobalResponseNorm
from gspn.models.gspn_dit import modulated, stretched_positions


class _Modulated(nn.Module):
    """A block with `count` modulating vectors of C channels, which start at 0."""

    def __init__(self, channels: int, count: int):
        super().__init__()
        self.count, self.modulation = count, nn.Linear(channels, count * channels)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def modulating(self, c: Tensor) -> tuple[Tensor, ...]:
        return self.modulation(c)[:, None, None].chunk(self.count, dim=-1)


class ConvNeXtBlock(_Modulated):
    """ConvNeXt V2's block with an adaptive norm (FCDM, arXiv 2603.09408)::

    x = x + g * out(GRN(GELU(in(LN(DWConv7x7(x)) * (1 + s) + b))))
    """

    def __init__(self, channels: int, expansion: float):
        super().__init__(channels, 3)
        hidden = int(channels * expansion)
        self.depthwise = DepthwiseConv2d(channels, 7)
        self.expand, self.project = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.grn = GlobalResponseNorm(hidden)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.modulating(c)
        h = F.gelu(self.expand(modulated(on_maps(self.depthwise, x), shift, scale)))
        return torch.addcmul(x, gate, self.project(self.grn(h)))


class DiCoBlock(_Modulated):
    """DiCo's block (arXiv 2505.11196): a depthwise convolution between two pointwise ones, with compact channel
    attention, and a feed-forward network::

        y = GELU(DWConv3x3(in(LN(x) * (1 + s1) + b1)))
        x = x + g1 * out(y * sigmoid(attention(mean of y over the map)))
        x = x + g2 * down(GELU(up(LN(x) * (1 + s2) + b2)))
    """

    def __init__(self, channels: int, expansion: float):
        super().__init__(channels, 6)
        hidden = int(channels * expansion)
        self.inner, self.outer = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.depthwise, self.attention = DepthwiseConv2d(channels, 3), nn.Linear(channels, channels)
        self.up, self.down = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulating(c)
        y = F.gelu(on_maps(self.depthwise, self.inner(modulated(x, shift1, scale1))))
        y = y * torch.sigmoid(self.attention(y.mean((1, 2), keepdim=True)))
        x = torch.addcmul(x, gate1, self.outer(y))
        return torch.addcmul(x, gate2, self.down(F.gelu(self.up(modulated(x, shift2, scale2)))))


class GatedPositions(nn.Module):
    """Adds DiT's positions p, stretched over the map, where the condition switches them on: x + gate(c) * p. The gate
    starts at 0.

    Args:
        trained: side of the map, in tokens, over which the positions are not stretched.
    """

    def __init__(self, channels: int, trained: int):
        super().__init__()
        self.gate, self.trained = nn.Linear(channels, channels), trained
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        positions = stretched_positions(x.shape[-1], x.shape[1], x.shape[2], self.trained, x.device)
        return torch.addcmul(x, self.gate(c)[:, None, None], positions.to(x.dtype))
