"""What stands in the place of gspn_mobile's scan in the studies photos.py and segmentation.py."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gspn.bench.contenders import OnMaps, on_maps
from gspn.depthwise import DepthwiseConv2d
from gspn.layers import Pointwise

INNER = 16  # channels in which a mixer works, as the scan of gspn_mobile does


class Nothing(nn.Module):
    """Zeros: the block is an inverted residual alone."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Depthwise(nn.Module):
    """A depthwise 7x7 convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.convolution = DepthwiseConv2d(width, 7)

    def forward(self, x: Tensor) -> Tensor:
        return on_maps(self.convolution, x)


def between(make: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    """A mixer for (B,H,W,INNER) between two projections."""
    return lambda channels: nn.Sequential(Pointwise(channels, INNER), OnMaps(make(INNER)), Pointwise(INNER, channels))
