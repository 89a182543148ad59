"""The layers: GSPN2d, a replacement of self-attention, and the blocks of the backbones."""

from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from gspn.depthwise import DepthwiseConv2d
from gspn.kernels.reference import lines_before, no_autocast
from gspn.layers_released import propagate_released, scan_released, turn_back
from gspn.lean import propagate_lean
from gspn.ops import DIRECTIONS, check_backend, direction_indices, gated_scan, propagate, validate_segment, whole_number
from gspn.pretrained import Pretrained

# torch.fx.symbolic_trace cannot follow code that depends on sizes and layouts. Each function wrapped here and below is
# one node of its graphs.
for _name in ("propagate", "average_over_lines", "input_means"):
    torch.fx.wrap(_name)


class Context(NamedTuple):
    """The influence maps of one output pixel, as GSPN2d.context returns them.

    Attributes:
        directions: (B,D,H,W), the propagation weight with which each pixel's gated input arrives at the output pixel,
            mean over channels. It is non-negative; in a global layer it sums to 1 over each line that has a path.
        merged: (B,H,W), the share of each pixel in the layer's output there: magnitude of the sum over directions of
            merger * output gate * weight * input gate, mean over channels; the skip gate counts at the pixel itself.
        narrowest: (B,D,H,W), like `directions`, of one channel: that with the largest sum(map^2) / sum(map)^2 in this
            direction. Channels with weights of their own follow paths of their own, which the mean over channels blurs.
    """

    directions: Tensor
    merged: Tensor
    narrowest: Tensor


@torch.fx.wrap
def _pointwise(x: Tensor, weight: Tensor) -> Tensor:
    # vmap cannot tell the memory format. torch.compile copies a convolution's output that is kept for the gradients to
    # another layout with the traced sizes as constants: every other size would compile again.
    if x.ndim == 4 and (torch.compiler.is_compiling() or (x.shape[1] > 1 and x.stride(1) == 1)):
        return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1)).permute(0, 3, 1, 2)
    return F.conv2d(x, weight)


class Pointwise(nn.Conv2d):
    """A 1x1 convolution without bias; a matrix product on channels_last maps, whose backward takes half the time."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return _pointwise(x, self.weight)


@torch.fx.wrap
def _check_map(x: Tensor, channels: int, alignment: str) -> None:
    if x.ndim != 4 or x.shape[1] != channels or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"GSPN2d expects (B,{channels},H,W) with H, W >= 1, got {tuple(x.shape)}")
    if alignment == "released" and x.shape[2] != x.shape[3]:
        raise ValueError(
            f'alignment="released" takes square feature maps, got {x.shape[2]}x{x.shape[3]}; "aligned" takes any size'
        )


def average_over_lines(
    output_proj: Tensor, directions: Sequence[str], size: tuple[int, int], segment: int | None
) -> Tensor:
    """`output_proj` (D,...), each direction divided by the number of lines that its scan on a (H,W) map passes before
    it resets. Because the output gate multiplies the hidden state, this averages the state over the lines."""
    lines = [size[1] if direction in ("right", "left") else size[0] for direction in directions]
    if segment is not None:  # torch.jit.trace gives sizes as tensors, and would keep what min finds
        lines = [n.clamp(max=segment) if isinstance(n, Tensor) else min(segment, n) for n in lines]
    with no_autocast(output_proj):  # which refuses to stack 16-bit data of another dtype than its own
        return torch.stack([projection / n for projection, n in zip(output_proj.unbind(0), lines, strict=True)])


def input_means(x: Tensor, proxy: Tensor, input_proj: Tensor) -> Tensor:
    """The mean over the map of each direction's gated input (input_proj[d] proxy) * x, (B,D,C), from the second moments
    of x and proxy: no gated input is made. float32 for 16-bit data: a scan adds up the mean's rounding line by line."""
    exact = torch.promote_types(x.dtype, torch.float32)
    with no_autocast(x):
        # the other way round the product takes two to three times as long
        moments = proxy.flatten(2).to(exact) @ x.flatten(2).mT.to(exact) / (x.shape[-2] * x.shape[-1])  # (B,S,C)
        return torch.einsum("bsc,dcs->bdc", moments, input_proj.to(exact))


class GSPN2d(Pretrained, nn.Module):
    """The GSPN unit: context from the whole feature map at linear cost, instead of self-attention::

        proxy = proxy_proj x                                                   (S channels)
        y = sum over directions d of merger[d] * ((output_proj[d] proxy) * h[d] + (skip_proj[d] proxy) * x)
        h[d] = line scan of (input_proj[d] proxy) * x with weights normalised from weight_proj[d] proxy

    All projections are linear and without bias. There is no norm, activation, residual or positional embedding inside,
    and no size is fixed: any H, W >= 1.

    Args:
        channels: C, of input and output.
        proxy_dim: S, the width from which weights and gates are predicted; None is max(8, C // 16).
        groups: G, channel groups that share propagation weights; None is C, one for each channel (1 with scan_dim).
        scan_dim: the number of scanned channels, between 1x1 projections C -> scan_dim -> C (GSPN-2's compact channel
            propagation); the proxy still comes from the input. None scans all C channels.
        segment: lines between resets of the state; None is global, at any size.
        skip: adds the skip gate.
        merger: "learned" (one scalar for each direction) or "mean". Both start at 1/D for D directions.
        average: divides h[d] by the number of lines that its scan passes before it resets: H, W or the segment. A
            global scan's output then does not grow with the map. Use it if maps may be larger than in training.
        center: takes the mean over the map once instead of once in each line, h[d] = scan(g - mean g) + mean g for the
            gated input g. Rows of weights sum to 1, so without it the mean arrives from every line, whatever the
            weights are: after some lines it is most of the state, and on a larger map more of it than in training.
        directions: some of ``gspn.DIRECTIONS``.
        alignment: "aligned", or "released" for the form in which the paper's authors trained their published weights
            (:func:`gspn.load_released`): weights and gates are not turned with the map, see layers_released.py. It only
            takes square maps, and holds all weights and gates in memory.
        backend: "reference", "cpu", "triton", or None to pick by device.

    Shape: (B,C,H,W) to (B,C,H,W), in the input's dtype and memory format; channels_last is the faster one. Inside
    autocast the projections around a scan_dim return its dtype, as convolutions do.

    State dict (frozen): ``proxy_proj.weight`` (S,C,1,1), ``weight_proj`` (D,3,G,S), ``input_proj``, ``output_proj``,
    ``skip_proj`` (D,K,S) with K = scan_dim or C, ``merger`` (D,), ``reduce.weight`` (K,C,1,1), ``expand.weight``
    (C,K,1,1); without an option, its entries are absent.

    Raises ValueError if sizes, groups or names do not fit, TypeError if a size is no integer or a switch no bool.
    Source: arXiv 2501.12381, section 3.4; scan_dim and groups: arXiv 2512.07884.

    >>> import torch, gspn
    >>> layer = gspn.GSPN2d(96, backend="reference")
    >>> layer(torch.randn(2, 96, 7, 12)).shape
    torch.Size([2, 96, 7, 12])
    """

    skip_proj: nn.Parameter | None
    merger: nn.Parameter | None

    _saved_as = "GSPN2d"
    _import_as = "gspn.GSPN2d"

    def __init__(
        self,
        channels: int,
        *,
        proxy_dim: int | None = None,
        groups: int | None = None,
        scan_dim: int | None = None,
        segment: int | None = None,
        skip: bool = True,
        merger: str = "learned",
        average: bool = False,
        center: bool = False,
        directions: Sequence[str] = DIRECTIONS,
        alignment: str = "aligned",
        backend: str | None = None,
    ):
        super().__init__()
        channels = whole_number("channels", channels)
        scan_dim = None if scan_dim is None else whole_number("scan_dim", scan_dim)
        scanned = channels if scan_dim is None else scan_dim
        proxy_dim = max(8, channels // 16) if proxy_dim is None else proxy_dim
        groups = (scanned if scan_dim is None else 1) if groups is None else groups
        proxy_dim, groups = whole_number("proxy_dim", proxy_dim), whole_number("groups", groups)
        sizes = {"channels": channels, "proxy_dim": proxy_dim, "groups": groups, "scan_dim": scanned}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} has to be at least 1, got {value}")
        if scanned % groups:
            raise ValueError(f"groups has to divide the {scanned} scanned channels, got {groups}")
        if merger not in ("learned", "mean"):
            raise ValueError(f'merger has to be "learned" or "mean", got {merger!r}')
        if alignment not in ("aligned", "released"):
            raise ValueError(f'alignment has to be "aligned" or "released", got {alignment!r}')
        for name, value in {"skip": skip, "average": average, "center": center}.items():
            if not isinstance(value, bool):  # the text "false" would be true
                raise TypeError(f"{name} has to be True or False, got {value!r}")
            if value and name != "skip" and alignment == "released":
                raise ValueError(f'{name}=True needs alignment="aligned": the released form has no such part')
        check_backend(backend)
        directions = tuple(DIRECTIONS[i] for i in direction_indices(directions))
        count = len(directions)
        self.channels, self.proxy_dim, self.groups, self.scan_dim = channels, proxy_dim, groups, scan_dim
        self.segment, self.directions, self.backend = validate_segment(segment), directions, backend
        self.alignment, self.average, self.center = alignment, average, center
        self.proxy_proj = Pointwise(channels, proxy_dim)
        self.weight_proj = nn.Parameter(torch.empty(count, 3, groups, proxy_dim))
        self.input_proj = nn.Parameter(torch.empty(count, scanned, proxy_dim))
        self.output_proj = nn.Parameter(torch.empty(count, scanned, proxy_dim))
        self.register_parameter("skip_proj", nn.Parameter(torch.empty(count, scanned, proxy_dim)) if skip else None)
        self.register_parameter("merger", nn.Parameter(torch.empty(count)) if merger == "learned" else None)
        self.reduce = Pointwise(channels, scan_dim) if scan_dim else nn.Identity()
        self.expand = Pointwise(scan_dim, channels) if scan_dim else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the projections as torch does a 1x1 convolution, the merger's scalars with 1/D."""
        for module in (self.proxy_proj, self.reduce, self.expand):
            if isinstance(module, Pointwise):
                module.reset_parameters()
        for projection in (self.weight_proj, self.input_proj, self.output_proj, self.skip_proj):
            if projection is not None:
                nn.init.uniform_(projection, -(self.proxy_dim**-0.5), self.proxy_dim**-0.5)
        if self.merger is not None:
            nn.init.constant_(self.merger, 1 / len(self.directions))

    def _scaled(self, projection: Tensor) -> Tensor:
        """Each direction's projection times its scalar of the merger, which is exact because both are linear."""
        if self.merger is None:
            return projection / len(self.directions)
        return projection * self.merger.view(-1, 1, 1)

    def _merged_projections(self, size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor | None]:
        """Output and skip projections times the merger's scalars, the skips of all directions summed; with `average`,
        for a map of that (H,W)."""
        output = self._scaled(self.output_proj)
        output = average_over_lines(output, self.directions, size, self.segment) if self.average else output
        return output, None if self.skip_proj is None else self._scaled(self.skip_proj).sum(0)

    def forward(self, x: Tensor) -> Tensor:
        _check_map(x, self.channels, self.alignment)
        if self.scan_dim is None:
            return self._propagate(x, self.proxy_proj(x))
        return self.expand(self._propagate(self.reduce(x), self.proxy_proj(x)))

    if TYPE_CHECKING:  # nn.Module's is typed as Any

        def __call__(self, x: Tensor) -> Tensor: ...

    def _propagate(self, x: Tensor, proxy: Tensor) -> Tensor:
        """The merged directions (B,K,H,W) of x (B,K,H,W) and proxy (B,S,H,W)."""
        center = input_means(x, proxy, self.input_proj) if self.center else None
        merged = propagate_lean(self, x, proxy, center)
        if merged is not None:
            return merged
        if self.alignment == "released":
            output_proj = self._scaled(self.output_proj)
            skip_proj = None if self.skip_proj is None else self._scaled(self.skip_proj)
            run = propagate_released
        else:
            output_proj, skip_proj = self._merged_projections(x.shape[-2:])
            run = propagate
        tensors = (x, proxy, self.weight_proj, self.input_proj, output_proj, skip_proj)
        options = {} if center is None else {"center": center}
        return run(*tensors, **options, directions=self.directions, segment=self.segment, backend=self.backend)

    def _scan(self, gated: Tensor, logits: Tensor) -> Tensor:
        """h (B,D,K,H,W) of the gated inputs (B,D,K,H,W) and logits (B,D,G,3,H,W)."""
        options = {"segment": self.segment, "backend": self.backend}
        if self.alignment == "released":
            return scan_released(gated, logits, **options)
        return gated_scan(torch.ones_like(gated[:, 0]), gated, logits, directions=self.directions, **options)

    # This differentiates the scan, which inference mode forbids. Leaving that mode turns gradients on: so no_grad too.
    @torch.inference_mode(False)
    @torch.no_grad()
    def context(self, x: Tensor, row: int, column: int) -> Context:
        """The influence maps of the output pixel (row, column) for input x (B,C,H,W): the pixels it depends on."""
        _check_map(x, self.channels, self.alignment)
        height, width = x.shape[-2:]
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(f"the pixel ({row}, {column}) is not on the {height}x{width} feature map")
        with no_autocast(x):
            return self._context(x.to(self.proxy_proj.weight.dtype), row, column)

    def _context(self, x: Tensor, row: int, column: int) -> Context:
        height, width = x.shape[-2:]
        exact = torch.promote_types(x.dtype, torch.float32)
        proxy, scanned = self.proxy_proj(x).to(exact), self.reduce(x)
        project = lambda p: torch.einsum("...s,bshw->b...hw", p.to(exact), proxy)  # noqa: E731
        logits = project(self.weight_proj).transpose(2, 3)
        # A scan is linear in its gated input: the gradient of the state at (row, column) is the weight of each pixel.
        with torch.enable_grad():
            gate = logits.new_zeros(logits.shape[0], len(self.directions), *scanned.shape[1:])
            gate.requires_grad_()
            (arriving,) = torch.autograd.grad(self._scan(gate, logits)[..., row, column].sum(), gate)
        passed = arriving
        if self.center:
            passes = (lines_before(arriving, d, self.segment) for d in direction_indices(self.directions))
            lines = torch.stack([n.expand(height, width)[row, column] for n in passes])
            passed = arriving - lines.view(-1, 1, 1, 1) / (height * width)
        out_gate = project(self._merged_projections((height, width))[0])[..., row, column, None, None]
        parts = out_gate * passed * project(self.input_proj)
        if self.skip_proj is not None:
            parts[..., row, column] += project(self._scaled(self.skip_proj))[..., row, column]
        if self.alignment == "released":
            arriving, parts = (turn_back(maps, self.directions) for maps in (arriving, parts))
        narrowness = arriving.square().sum((-1, -2)) / arriving.sum((-1, -2)).square()
        channel = narrowness.argmax(2)[:, :, None, None, None].expand(-1, -1, 1, height, width)
        return Context(arriving.mean(2), parts.sum(1).abs().mean(1), arriving.gather(2, channel)[:, :, 0])

    def _arguments(self) -> dict[str, Any]:
        kept = ("channels", "proxy_dim", "groups", "scan_dim", "segment", "average", "center", "alignment")
        arguments = {name: getattr(self, name) for name in kept}
        merger = "mean" if self.merger is None else "learned"
        return arguments | {"skip": self.skip_proj is not None, "merger": merger, "directions": list(self.directions)}

    @classmethod
    def _made_from(cls, arguments: dict[str, Any]) -> Self:
        return cls(**arguments)

    def __prepare_scriptable__(self):
        """torch.jit.script asks this of every module inside the one that it compiles."""
        raise RuntimeError("gspn: torch.jit.script cannot compile GSPN2d; use torch.export.export or torch.jit.trace")

    def extra_repr(self) -> str:
        extent = "global" if self.segment is None else f"segment={self.segment}"
        scan = f", scan_dim={self.scan_dim}" if self.scan_dim else ""
        form = ", released" if self.alignment == "released" else ""
        form += ", average" if self.average else ""
        form += ", center" if self.center else ""
        return f"{self.channels}, proxy_dim={self.proxy_dim}, groups={self.groups}{scan}, {extent}{form}"


class StridedConv2d(nn.Conv2d):
    """A 3x3 convolution with padding: (B,C,H,W) to (B,C',H/stride,W/stride), rounded up; strides 1 and 2.

    Compiled or exported with open sizes, it first pads the map with zeros to an even size, which changes nothing: the
    convolution would pad there too. The output sizes are then quotients, not quotients plus one, whose products
    Inductor of torch 2.13 cannot factorise.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 2):
        super().__init__(in_channels, out_channels, 3, stride=stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == (2, 2) and torch.compiler.is_compiling():
            height, width = x.shape[-2:]
            x = F.pad(x, (0, 2 * ((width + 1) // 2) - width, 0, 2 * ((height + 1) // 2) - height))
        return super().forward(x)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B,C,H,W); keeps channels_last."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@torch.fx.wrap
def _global_response(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    # linalg.vector_norm takes 1.5 to 5 times as long; the floor keeps the root's gradient finite
    squares = x.to(torch.promote_types(x.dtype, torch.float32)).square().sum((1, 2), keepdim=True)
    norm = squares.clamp(min=1e-30).sqrt()
    relative = norm / (norm.mean(-1, keepdim=True) + eps)
    return torch.addcmul(beta.to(x.dtype), x, (gamma * relative + 1).to(x.dtype))


class GlobalResponseNorm(nn.Module):
    """Global response normalisation over (B,H,W,C): gamma * (x * n) + beta + x, n = |x| / (mean over channels of |x|).

    |x| is a channel's L2 norm over H and W. gamma and beta start at 0. Source: ConvNeXt V2 (arXiv 2301.00808).
    """

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return _global_response(x, self.gamma, self.beta, self.eps)


@torch.fx.wrap
def _drop_path(x: Tensor, rate: float) -> Tensor:
    # float32, whatever torch's default: bfloat16 is so coarse that the rate would change
    kept = torch.rand(x.shape[0], *[1] * (x.ndim - 1), dtype=torch.float32, device=x.device) >= rate
    return x * (kept.to(x.dtype) / (1 - rate))


class DropPath(nn.Module):
    """Stochastic depth: in training, drops a residual branch of a sample with probability ``rate`` and rescales."""

    def __init__(self, rate: float = 0.0):
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"the rate of drop path has to be at least 0 and below 1, got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        return _drop_path(x, self.rate)

    def extra_repr(self) -> str:
        return f"{self.rate}"


def _widened(channels: int, name: str, ratio: float) -> int:
    if isinstance(ratio, bool) or not isinstance(ratio, Real) or not 0 < channels * ratio < float("inf"):
        raise ValueError(f"{name} has to be a positive number, got {ratio!r}")
    if channels * ratio < 1:
        raise ValueError(f"{name} times {channels} channels has to be at least 1 channel, got {ratio!r}")
    return int(channels * ratio)


class GSPNBlock(nn.Module):
    """A block of the classification backbone: spatial mixing by GSPN, then channel mixing by an MLP.

        x + Linear(GRN(LN(GSPN(SiLU(DWConv7x7(Linear(LN x))))))), then x + MLP(LN x)

    Args:
        channels: C. expansion: width of the mixing branch, as a multiple of C. mlp_ratio: that of the MLP.
        drop_path: rate of stochastic depth. activation: "silu", or None for no activation.
        gspn: the options of :class:`GSPN2d`.

    Shape: (B,C,H,W) to (B,C,H,W). Source: arXiv 2501.12381, figure 4.

    State dict (frozen), D = expansion * C: ``norm1``, ``norm2`` (C,), ``in_proj.weight`` (D,C), ``dwconv.weight``
    (D,1,7,7), ``gspn.*``, ``norm`` (D,), ``grn.gamma``, ``grn.beta`` (D,), ``out_proj.weight`` (C,D), ``mlp.0``,
    ``mlp.2``.
    """

    def __init__(
        self,
        channels: int,
        *,
        expansion: float = 1.5,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        activation: str | None = "silu",
        **gspn,
    ):
        super().__init__()
        if activation not in ("silu", None):
            raise ValueError(f'activation has to be "silu" or None (null in JSON), got {activation!r}')
        inner, hidden = _widened(channels, "expansion", expansion), _widened(channels, "mlp_ratio", mlp_ratio)
        self.norm1 = nn.LayerNorm(channels)
        self.in_proj = nn.Linear(channels, inner, bias=False)
        self.dwconv = DepthwiseConv2d(inner, 7, bias=False)
        self.activation = nn.SiLU() if activation else nn.Identity()
        self.gspn = GSPN2d(inner, **gspn)
        self.norm = nn.LayerNorm(inner)
        self.grn = GlobalResponseNorm(inner)
        self.out_proj = nn.Linear(inner, channels, bias=False)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # a view where x is channels_last, as in the backbones: Linear and LN work on C last
        z = self.in_proj(self.norm1(x)).permute(0, 3, 1, 2)
        z = self.gspn(self.activation(self.dwconv(z))).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.out_proj(self.grn(self.norm(z))))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class InvertedBlock(nn.Module):
    """A block for small backbones: an inverted residual with a GSPN unit inside.

        z = SiLU(BN(DWConv3x3(SiLU(BN(Linear x)))));  x + BN(Linear(z + LN(GSPN(z))))

    In training its batch norm (BN) makes the output depend on the other images of a batch; in evaluation it takes
    running means and variances. LayerNorm's weight starts at 0: the block starts as the inverted residual alone.

    Args:
        channels: C. expansion: inner width, as a multiple of C. drop_path: rate of stochastic depth.
        gspn: the options of :class:`GSPN2d`.

    Shape: (B,C,H,W) to (B,C,H,W). Sources: arXiv 1801.04381 for the inverted residual; the scan inside it is ours.

    State dict (frozen), D = expansion * C: ``in_proj.weight`` (D,C,1,1), ``norm1``, ``norm2`` (D,), ``dwconv.weight``
    (D,1,3,3), ``gspn.*``, ``norm`` (D,), ``out_proj.weight`` (C,D,1,1), ``norm3`` (C,).
    """

    def __init__(self, channels: int, *, expansion: float = 2.0, drop_path: float = 0.0, **gspn):
        super().__init__()
        inner = _widened(channels, "expansion", expansion)
        self.in_proj = Pointwise(channels, inner)
        self.norm1 = nn.BatchNorm2d(inner)
        self.dwconv = DepthwiseConv2d(inner, 3, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.gspn = GSPN2d(inner, **gspn)
        self.norm = LayerNorm2d(inner)
        nn.init.zeros_(self.norm.weight)
        self.out_proj = Pointwise(inner, channels)
        self.norm3 = nn.BatchNorm2d(channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        z = F.silu(self.norm1(self.in_proj(x)))
        z = F.silu(self.norm2(self.dwconv(z)))
        z = z + self.norm(self.gspn(z))
        return x + self.drop_path(self.norm3(self.out_proj(z)))


BLOCKS = {"paper": GSPNBlock, "inverted": InvertedBlock}


def init_weights(module: nn.Module) -> None:
    """For ``Module.apply``: Linear weights from a normal of deviation 0.02, biases 0; the rest keeps torch's values."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
