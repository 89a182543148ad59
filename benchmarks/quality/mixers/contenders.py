"""One small backbone with the mixer as an argument, and the mixers that are compared in it.

Every mixer takes and gives (B,H,W,C), holds its own projections and works at any size. The backbones have the same
width, depth, stem and head; the inner width of the feed-forward network makes the numbers of parameters agree.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.mixers.remedies import REMEDIES, Variant
from gspn.bench.contenders import (
    Attention,
    Depthwise,
    GatedConvolution,
    Gspn,
    ReluLinearAttention,
    ReluLinearAttentionConvolution,
    on_maps,
)
from gspn.depthwise import DepthwiseConv2d

WIDTH, DEPTH, PATCH = 64, 4, 2
PARAMETERS = 190_000  # of every backbone with ten outputs, as nearly as whole inner widths allow
TOLERANCE = 0.05
FORMS = (
    "bare",
    "conv",
)  # bare: nothing but the mixer mixes pixels; conv: so does a 3x3 depthwise convolution in the MLP
HEADS = 4  # of softmax attention
POSITIONS = 16  # side of the grid of learned positions, which is resized to other maps


# -- mixers --


class Pointwise(nn.Linear):
    """Mixes nothing: what the rest of the backbone reaches by itself."""

    def __init__(self, width: int):
        super().__init__(width, width)


class Mamba(nn.Module):
    """A Mamba block of mambapy over four orders of the tokens: rows and columns, each forward and backward. One block
    serves all four, as in PlainMamba (arXiv 2403.17695); the results are summed."""

    def __init__(self, width: int, state: int = 8):
        super().__init__()
        from mambapy.mamba import MambaBlock, MambaConfig

        config = MambaConfig(d_model=width, n_layers=1, expand_factor=1, d_state=state, d_conv=4, pscan=True)
        self.block = MambaBlock(config)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        rows, columns = x.flatten(1, 2), x.transpose(1, 2).flatten(1, 2)
        y = self.block(torch.cat([rows, rows.flip(1), columns, columns.flip(1)]))
        rows, rows_back, columns, columns_back = y.split(batch)
        by_rows = (rows + rows_back.flip(1)).unflatten(1, (height, width))
        return by_rows + (columns + columns_back.flip(1)).unflatten(1, (width, height)).transpose(1, 2)


def thirds(mixer: nn.Module) -> nn.Module:
    """The mixer with propagation weights of 1/3, whatever its input: their logits are 0 and stay so."""
    for name, parameter in mixer.named_parameters():
        if name.endswith("weight_proj"):
            nn.init.zeros_(parameter).requires_grad_(False)
    return mixer


# -- the contenders --


class Contender(NamedTuple):
    """`make` gives the mixer of a block from the width and the block's number; `positions` adds a learned grid after
    the stem; `title` is what tables call it; `why_not` says why the study does not run it; a `remedy` is GSPN with
    something changed, which is compared with GSPN rather than with the others."""

    title: str
    make: Callable[[int, int], nn.Module]
    positions: bool = False
    why_not: str = ""
    remedy: bool = False


LOCAL_SEGMENT = 4  # of the local GSPN: what the published Stable Diffusion form uses
PAPER_SEGMENT = 2  # of the local blocks of the paper's classification models

CONTENDERS = {
    "none": Contender("none", lambda width, block: Pointwise(width)),
    "dw7": Contender("depthwise 7x7", lambda width, block: Depthwise(width)),
    "attention-pos": Contender("attention, positions", lambda width, block: Attention(width, HEADS), positions=True),
    "attention": Contender("attention", lambda width, block: Attention(width, HEADS)),
    "linear": Contender("ReLU linear attention", lambda width, block: ReluLinearAttention(width)),
    "linear-dw5": Contender(
        "ReLU linear attention + dw 5x5 (LiT)", lambda width, block: ReluLinearAttentionConvolution(width)
    ),
    "gated-conv": Contender("gated convolution (MambaOut)", lambda width, block: GatedConvolution(width)),
    "gspn-global": Contender("GSPN global", lambda width, block: Gspn(width)),
    "gspn-local": Contender("GSPN local (4 lines)", lambda width, block: Gspn(width, segment=LOCAL_SEGMENT)),
    # the paper's first two levels are local, its last two global
    "gspn-hybrid": Contender(
        "GSPN hybrid (paper's)", lambda width, block: Gspn(width, segment=PAPER_SEGMENT if block < DEPTH // 2 else None)
    ),
    "gspn-center": Contender("GSPN global, centred", lambda width, block: Gspn(width, center=True)),
    "gspn-compact": Contender("GSPN compact (scan in 16)", lambda width, block: Gspn(width, scan_dim=16)),
    "mamba": Contender(
        "Mamba, four orders",
        lambda width, block: Mamba(width),
        why_not="not run: mambapy's scan takes 28 times as long as attention or GSPN on a CPU (23.9 s a step of 64 "
        "photos, where these took 0.8 to 1.2 under the same load), which makes two hours or more of every run",
    ),
    "gspn-center-thirds": Contender(
        "GSPN global, centred, weights 1/3", lambda width, block: thirds(Gspn(width, center=True)), remedy=True
    ),
} | {
    name: Contender(title, lambda width, block, options=options: Variant(width, **options), remedy=True)
    for name, (title, options) in REMEDIES.items()
}


# -- the backbone --


class FeedForward(nn.Module):
    """Linear, GELU, Linear; in the form `conv` a 3x3 depthwise convolution before the GELU."""

    def __init__(self, width: int, inner: int, form: str):
        super().__init__()
        self.into, self.out = nn.Linear(width, inner), nn.Linear(inner, width)
        self.convolution = DepthwiseConv2d(inner, 3) if form == "conv" else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        x = x if self.convolution is None else on_maps(self.convolution, x)
        return self.out(F.gelu(x))


class Block(nn.Module):
    """Pre-norm: x + mixer(LN x), then x + feed-forward(LN x), each scaled by a learned vector that starts at 1/2."""

    def __init__(self, mixer: nn.Module, width: int, inner: int, form: str):
        super().__init__()
        self.norm1, self.mixer, self.scale1 = nn.LayerNorm(width), mixer, nn.Parameter(torch.full((width,), 0.5))
        self.norm2, self.mlp, self.scale2 = (
            nn.LayerNorm(width),
            FeedForward(width, inner, form),
            nn.Parameter(torch.full((width,), 0.5)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale1 * self.mixer(self.norm1(x))
        return x + self.scale2 * self.mlp(self.norm2(x))


class Backbone(nn.Module):
    """Patches of 2x2 pixels, blocks, LayerNorm, and a linear head: on the mean of all tokens (`pooled`), or on each.

    The head is linear and the mean stands right before it, so without a mixer the answer is a sum over tokens.

    Shape: x (B,3,H,W), H and W even, and `hidden`, bool (B,H/2,W/2), whose tokens are replaced by one learned vector;
    gives (B,outputs), or (B,H/2,W/2,outputs) where not pooled.
    """

    def __init__(self, contender: str, form: str, outputs: int, pooled: bool, inner: int):
        super().__init__()
        spec = CONTENDERS[contender]
        self.pooled = pooled
        self.stem = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.hidden_token = None if pooled else nn.Parameter(torch.randn(WIDTH) * 0.02)
        positions = torch.randn(1, WIDTH, POSITIONS, POSITIONS) * 0.02
        self.positions = nn.Parameter(positions) if spec.positions else None
        self.blocks = nn.ModuleList(Block(spec.make(WIDTH, i), WIDTH, inner, form) for i in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, outputs)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        if hidden is not None:
            x = torch.where(hidden.unsqueeze(-1), self.hidden_token, x)
        if self.positions is not None:
            size = x.shape[1:3]
            grid = self.positions
            if size != grid.shape[-2:]:
                grid = F.interpolate(grid, size=size, mode="bicubic", align_corners=False)
            x = x + grid.permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x.mean((1, 2)) if self.pooled else x)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def fitted_inner(contender: str, form: str) -> int:
    """The feed-forward network's inner width, a multiple of 4, that brings the backbone nearest to PARAMETERS."""
    with torch.random.fork_rng(devices=[]):
        sizes = [count(Backbone(contender, form, 10, True, inner)) for inner in (4, 8)]
    return 4 * round(1 + (PARAMETERS - sizes[0]) / (sizes[1] - sizes[0]))


def backbone(contender: str, form: str, outputs: int, pooled: bool, seed: int) -> Backbone:
    """The contender's backbone, its parameters drawn from `seed`. Errors: ValueError for an unknown name or form."""
    if contender not in CONTENDERS:
        raise ValueError(f"no contender is called {contender!r}; expected one of {', '.join(CONTENDERS)}")
    if form not in FORMS:
        raise ValueError(f"no form is called {form!r}; expected one of {', '.join(FORMS)}")
    inner = fitted_inner(contender, form)
    torch.manual_seed(seed)
    model = Backbone(contender, form, outputs, pooled, inner)
    found = count(model)
    assert abs(found / PARAMETERS - 1) <= TOLERANCE, f"{contender}, {form}: {found} parameters, not {PARAMETERS}"
    return model
