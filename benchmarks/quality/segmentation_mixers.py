"""The segmenters that benchmarks.quality.segmentation trains and benchmarks.speed.segmenters_cpu times: two models of
the library, with GSPN and with other mixers in its place, whose parameters agree within 2%.

In `gspn_micro` a mixer works in all channels of a block. In `gspn_mobile` it works in 16 channels between two
projections, as the scan does there.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gspn
from benchmarks.harness import study
from benchmarks.quality.compact_mixers import Depthwise, Nothing, between
from gspn.bench.contenders import Attention, OnMaps, ReluLinearAttentionConvolution
from gspn.layers import GSPNBlock, InvertedBlock

CLASSES = 11
EXPANSIONS = {"gspn_micro": 1.5, "gspn_mobile": 2.0}  # of the models with GSPN


class WindowAttention(Attention):
    """Softmax attention within windows of 7x7 pixels, which begin `shift` pixels before the map does (Swin's shifted
    windows, arXiv 2103.14030, without its bias of positions: the block's depthwise convolution tells them)."""

    side = 7

    def __init__(self, width: int, shift: int = 0, heads: int | None = None):
        super().__init__(width, heads, bias=False)
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        (batch, height, width, channels), side = x.shape, self.side
        padding = (self.shift, -(width + self.shift) % side, self.shift, -(height + self.shift) % side)
        qkv = F.pad(self.qkv(x).permute(0, 3, 1, 2), padding)
        inside = F.pad(x.new_ones(1, 1, height, width), padding)

        def windows(t: Tensor) -> Tensor:
            """(B,C,H,W) to (B * windows, pixels, C)."""
            t = t.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 3, 5, 1)
            return t.flatten(3, 4).flatten(0, 2)

        heads = (3, self.heads, channels // self.heads)
        q, k, v = windows(qkv).unflatten(2, heads).permute(2, 0, 3, 1, 4)
        mask = windows(inside).bool().mT.expand(-1, side * side, -1) | torch.eye(side * side, dtype=torch.bool)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat(batch, 1, 1)[:, None])
        mixed = mixed.transpose(1, 2).flatten(2)
        rows, columns = (n // side for n in qkv.shape[2:])
        mixed = mixed.reshape(batch, rows, columns, side, side, channels).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return self.out(mixed[:, self.shift :, self.shift :][:, :height, :width])


class Residual(nn.Module):
    """x + layer(x), of maps (B,C,H,W). GSPNBlock has no way around its mixer. GSPN2d has one inside, its gated skip.
    Attention has none, and at the start it is almost a mean over pixels: alone it would erase the map."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


def _attention(width: int, reduction: int, index: int, heads: int | None = None) -> nn.Module:
    """Windows where the map has many pixels, all pixels from an eighth of the image's sides on."""
    return Attention(width, heads, bias=False) if reduction >= 8 else WindowAttention(width, 3 * (index % 2), heads)


class Contender(NamedTuple):
    """`model` with another mixer in its `blocks`. `make` gives a layer of maps (B,C,H,W) from C, pixels of the image
    for one of the map, and the number of the block; None keeps GSPN. In `gspn_micro` the attentions add to their input,
    as GSPN does by its skip and the block does not: see `Residual`. `options` are those of the model. `segments` are
    numbers of lines between the resets of all scans, None for no resets: in training one of them is drawn for each
    batch, after it the first is taken."""

    model: str
    title: str
    make: Callable[[int, int, int], nn.Module] | None = None
    options: Mapping[str, Any] = MappingProxyType({})
    blocks: tuple[type[nn.Module], ...] = (GSPNBlock, InvertedBlock)
    segments: tuple[int | None, ...] = ()


CONTENDERS = {
    "mobile": Contender("gspn_mobile", "GSPN, center"),
    "mobile-none": Contender("gspn_mobile", "depthwise 3x3 alone", lambda *_: Nothing()),
    "mobile-dw7": Contender("gspn_mobile", "depthwise 7x7", lambda c, *_: between(Depthwise)(c)),
    "mobile-attention": Contender(
        "gspn_mobile",
        "attention (7x7 windows at 1/4)",
        lambda c, *where: between(lambda width: _attention(width, *where, heads=2))(c),
    ),
    "mobile-linear": Contender(
        "gspn_mobile",
        "linear attention + 5x5",
        lambda c, *_: between(lambda width: ReluLinearAttentionConvolution(width, bias=False))(c),
    ),
    "mobile-plain": Contender("gspn_mobile", "GSPN", options={"center": False}),
    "mobile-decoder": Contender(
        "gspn_mobile", "GSPN, center, in the decoder alone", lambda *_: Nothing(), blocks=(InvertedBlock,)
    ),
    "mobile-local": Contender("gspn_mobile", "GSPN, center, the backbone's local", options={"global_levels": ()}),
    "mobile-15": Contender("gspn_mobile", "GSPN, center, segments of 15 lines", segments=(15,)),
    "mobile-random": Contender(
        "gspn_mobile", "GSPN, center, whole in half of the batches, else 15 lines", segments=(None, 15)
    ),
    "mobile-own": Contender("gspn_mobile", "GSPN, center, own weights", options={"groups": 16}),
    "mobile-path": Contender("gspn_mobile", "GSPN, center, drop path 0.1", options={"drop_path_rate": 0.1}),
    "gspn": Contender("gspn_micro", "GSPN"),
    "none": Contender("gspn_micro", "depthwise 7x7 alone", lambda *_: nn.Identity()),
    "attention": Contender(
        "gspn_micro", "attention (7x7 windows at 1/4)", lambda c, *where: Residual(OnMaps(_attention(c, *where)))
    ),
    "linear": Contender(
        "gspn_micro",
        "linear attention + 5x5",
        lambda c, *_: Residual(OnMaps(ReluLinearAttentionConvolution(c, bias=False))),
    ),
    "gspn-centred": Contender("gspn_micro", "GSPN, center", options={"center": True}),
}


def segmenter_with(mixer: str, name: str, **arguments) -> nn.Module:
    """`create_segmenter` with another mixer. The model's config is that of the GSPN segmenter."""
    model, make, kinds = gspn.create_segmenter(name, **arguments), CONTENDERS[mixer].make, CONTENDERS[mixer].blocks
    if make is not None:
        levels = zip(model.backbone.levels, model.backbone.feature_info, strict=True)
        parts = [(level, info["reduction"]) for level, info in levels] + [(model.blocks, model.stride)]
        for part, reduction in parts:
            blocks = [module for module in part.modules() if isinstance(module, kinds)]
            for index, block in enumerate(blocks):
                block.gspn = make(block.gspn.channels, reduction, index)
                if isinstance(block, GSPNBlock) and isinstance(block.gspn, Nothing):
                    block.gspn = nn.Identity()  # the mixer is all of this block's branch: zeros would switch it off
    if segments := CONTENDERS[mixer].segments:
        dice = random.Random(0)  # not torch's generator, which draws the crops
        model.register_forward_pre_hook(partial(_cut, segments=segments, dice=dice))
    return model


def _cut(model: nn.Module, _, segments: tuple[int | None, ...], dice: random.Random) -> None:
    """Before a segmenter's forward pass: sets the lines between the resets of its scans."""
    segment = dice.choice(segments) if model.training else segments[0]
    for module in model.modules():
        if isinstance(module, gspn.GSPN2d):
            module.segment = segment


def made(mixer: str, **arguments) -> nn.Module:
    """A contender's segmenter."""
    return segmenter_with(mixer, CONTENDERS[mixer].model, num_classes=CLASSES, **arguments_of(mixer), **arguments)


def arguments_of(mixer: str) -> dict[str, Any]:
    """What `create_segmenter` is given for a contender."""
    return {"expansion": expansion_of(mixer), **CONTENDERS[mixer].options}


@cache
def expansion_of(mixer: str) -> float:
    """The inner width of the backbone's blocks, as a factor, with which a segmenter has the parameters of GSPN's."""
    contender = CONTENDERS[mixer]
    if contender.make is None:
        return EXPANSIONS[contender.model]
    wanted = study.parameters_of(gspn.create_segmenter(contender.model, num_classes=CLASSES))
    with_factor = lambda factor: segmenter_with(mixer, contender.model, expansion=factor, num_classes=CLASSES)  # noqa: E731
    return study.nearest_factor(with_factor, wanted)


@contextmanager
def exchanged(mixer: str) -> Iterator[None]:
    """The library makes segmenters with this mixer."""
    make = lambda name, **arguments: segmenter_with(mixer, name, **arguments)  # noqa: E731
    with patch("gspn.tasks.segment.create_segmenter", make), patch("gspn.runs.create_segmenter", make):
        yield
