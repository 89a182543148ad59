"""The interleaved sub-lattices of a map: pixels that lie a few apart."""

from torch import Tensor


def sub_lattices(x: Tensor, apart: tuple[int, int]) -> Tensor:
    """(B,H,W,C) to (B*k*l,H/k,W/l,C): the sub-lattices of pixels that lie k rows and l columns apart."""
    k, m = apart
    x = x.unflatten(2, (-1, m)).unflatten(1, (-1, k))  # (B,H/k,k,W/m,m,C)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def interleaved(x: Tensor, apart: tuple[int, int]) -> Tensor:
    """The inverse of sub_lattices."""
    x = x.unflatten(0, (-1, *apart))  # (B,k,m,H/k,W/m,C)
    return x.permute(0, 3, 1, 4, 2, 5).flatten(3, 4).flatten(1, 2)
