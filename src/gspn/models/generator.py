"""GSPN's class-conditional generator, a diffusers model: the line scan replaces DiT's self-attention."""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspn.depthwise import DepthwiseConv2d
from gspn.layers import DropPath, GSPN2d, LayerNorm2d, Pointwise
from gspn.models import gspn_dit
from gspn.models.generator_base import Generator
from gspn.names import check_arguments, unknown

try:
    from diffusers import ModelMixin  # noqa: F401 - pipelines look for it in the module of a component's class
    from diffusers.configuration_utils import register_to_config
except ImportError as error:
    raise ImportError(
        f'generation needs diffusers, which cannot be imported ({error}): pip install "gspn[diffusion]"'
    ) from error


class GatedFeedForward(nn.Module):
    """Channel mixing between neighbours: Linear(a * ReLU(a)), a = DWConv3x3(Conv1x1(x)), all of width C, no bias.

    Shape: (B,C,H,W) to (B,C,H,W). Source: arXiv 2501.12381, appendix on generation.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.in_proj = Pointwise(channels, channels)
        self.dwconv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.out_proj = Pointwise(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        a = self.dwconv(self.in_proj(x))
        return self.out_proj(a * F.relu(a))


class GeneratorBlock(nn.Module):
    """A block of the generator: spatial mixing, then channel mixing, in one residual branch.

        residual += drop_path(h);  h = FFN(GSPN(DWConv7x7(Conv1x1(LN residual))))

    Args:
        channels: C.
        drop_path: rate of stochastic depth.
        gspn: the options of :class:`gspn.GSPN2d`.
        joins: the block first merges h with the output of a block in the first half: Linear(2C -> C).

    Shape: the branch h and the residual, both (B,C,H,W), to the same two. Source: arXiv 2501.12381, section 3.5.

    State dict (frozen): ``join.weight``, ``join.bias``, ``norm`` (C,), ``in_proj.weight`` (C,C,1,1), ``dwconv``
    (C,1,7,7) with bias, ``gspn.*``, ``ffn.in_proj.weight``, ``ffn.dwconv.weight`` (C,1,3,3), ``ffn.out_proj.weight``.
    """

    def __init__(self, channels: int, *, joins: bool = False, drop_path: float = 0.0, **gspn):
        super().__init__()
        self.join = nn.Linear(2 * channels, channels) if joins else None
        self.drop_path = DropPath(drop_path)
        self.norm = LayerNorm2d(channels)
        self.in_proj = Pointwise(channels, channels)
        self.dwconv = DepthwiseConv2d(channels, 7)
        self.gspn = GSPN2d(channels, **gspn)
        self.ffn = GatedFeedForward(channels)

    def forward(self, h: Tensor, residual: Tensor | None, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.join is not None:
            h = self.join(torch.cat([h, kept], 1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        residual = h if residual is None else residual + self.drop_path(h)
        return self.ffn(self.gspn(self.dwconv(self.in_proj(self.norm(residual))))), residual


class GSPNTransformer2DModel(Generator):
    """GSPN for class-conditional diffusion; it is used like diffusers' DiTTransformer2DModel.

    Patches of the noisy map become a feature map; the embeddings of timestep and class are added to it once. depth/2
    blocks, a middle block and depth/2 more follow. Each of the second half is joined with the output of its counterpart
    in the first half (as in U-ViT). A final layer, modulated by the embeddings, predicts the noise and its variance.
    There is no positional embedding and no fixed size: H and W are any multiples of the patch.

    Args:
        sample_size: side of the square map that :class:`diffusers.DiTPipeline` generates; the model takes any H and W.
        patch_size: side of a patch in pixels of the map.
        in_channels: 4 for a VAE's latents, 1 or 3 for images.
        learn_sigma: the output has twice the channels, the second half for the variance.
        hidden_size: width D.
        depth: number of blocks without the middle one, an even number.
        num_classes: the classes are 0 to num_classes - 1; num_classes itself is the null class of guidance.
        class_dropout_prob: how often training replaces a class by the null class; with 0 there is no null class.
        segment: lines between resets of the scan, except in the last ``global_blocks`` blocks, which scan the whole map
            at any size.
        proxy_dim: None is D // 16.
        skip: adds the scan's skip gate.
        center: takes the map's mean once instead of in each line (:class:`gspn.GSPN2d`).
        drop_path: rate of stochastic depth in the last block, rising linearly from 0 in the first.
        prediction_type: what the model is trained to predict: "epsilon", "v_prediction" or "sample". Pipelines refuse a
            scheduler that expects something else.

    Shape: (B,in_channels,H,W), timesteps and class labels (B,), to (B,out_channels,H,W), in the weights' dtype, or in
    autocast's inside it.

    Raises ValueError if sizes do not fit or, on the CPU, a class is out of range. Source: arXiv 2501.12381, section
    3.5, which describes the global blocks; the sizes are those of the authors' training code.

    State dict (frozen): ``patch_embed`` (D,in_channels,p,p) with bias, ``embed.*`` as in diffusers, ``blocks.i.*`` (see
    GeneratorBlock), ``norm`` (D,), ``modulation`` (2D,D) and ``proj_out`` (p*p*out_channels,D) with bias.
    """

    _no_split_modules = ("GeneratorBlock",)
    _skip_layerwise_casting_patterns = ("norm", "patch_embed")

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int | None = None,
        learn_sigma: bool = True,
        hidden_size: int = 368,
        depth: int = 24,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        segment: int | None = 2,
        global_blocks: int = 2,
        proxy_dim: int | None = None,
        skip: bool = True,
        center: bool = False,
        drop_path: float = 0.0,
        prediction_type: str = "epsilon",
    ):
        super().__init__()
        self._make_start()
        if depth % 2:
            raise ValueError(f"depth has to be even, as each block of the second half has a counterpart, got {depth}")
        if not 0 <= global_blocks <= depth + 1:
            raise ValueError(f"global_blocks has to be from 0 to {depth + 1} (all blocks), got {global_blocks}")
        proxy_dim = max(1, hidden_size // 16) if proxy_dim is None else proxy_dim
        self.blocks = nn.ModuleList(
            GeneratorBlock(
                hidden_size,
                joins=i > depth // 2,
                drop_path=drop_path * i / depth,
                proxy_dim=proxy_dim,
                segment=None if i > depth - global_blocks else segment,
                skip=skip,
                center=center,
            )
            for i in range(depth + 1)
        )
        self.norm = LayerNorm2d(hidden_size)
        self._make_end()
        self._init_weights()

    def _init_weights(self):
        """The last projection of a block shrinks with the number of blocks, so that the residual keeps its scale."""
        self._init_ends()
        with torch.no_grad():
            for block in self.blocks:
                block.ffn.out_proj.weight /= math.sqrt(len(self.blocks))

    def _predict(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        h = self.patch_embed(hidden_states)
        h = h.contiguous(memory_format=torch.channels_last)  # the faster layout throughout
        condition = self.embed(timestep, class_labels, hidden_dtype=h.dtype)
        h = h + condition[:, :, None, None].to(h.dtype)
        residual, kept, half = None, [], self.config.depth // 2
        for i, block in enumerate(self.blocks):
            joined = (kept.pop(),) if i > half else ()
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                h, residual = self._gradient_checkpointing_func(block, h, residual, *joined)
            else:
                h, residual = block(h, residual, *joined)
            if i < half:
                kept.append(h)
        return self._project_out(self.norm(residual + h).permute(0, 2, 3, 1), condition)


SIZES = {
    # Ours, for small images on a CPU. Nine blocks with short segments would not see the whole image.
    "micro": dict(hidden_size=160, depth=8, segment=None),
    "S": dict(hidden_size=368, depth=24),
    "B": dict(hidden_size=900, depth=30),
    "L": dict(hidden_size=1200, depth=56),
    "XL": dict(hidden_size=1500, depth=56),
}
PATCHES = (2, 4)
# the published model, and ours
FAMILIES = {"GSPN": (GSPNTransformer2DModel, SIZES), "GSPN-DiT": (gspn_dit.GSPNDiTTransformer2DModel, gspn_dit.SIZES)}


@functools.cache
def generator_names() -> tuple[str, ...]:
    """The names that `create_generator` takes."""
    return tuple(f"{family}-{n}/{patch}" for family, (_, sizes) in FAMILIES.items() for n in sizes for patch in PATCHES)


def _parts(name: str) -> tuple[type[Generator], dict]:
    if name not in generator_names():
        raise ValueError(unknown("generator", name, generator_names()))
    named, patch = name.split("/")
    family, size = named.rsplit("-", 1)
    model, sizes = FAMILIES[family]
    return model, {"patch_size": int(patch)} | sizes[size]


def config_of(name: str) -> dict:
    """The arguments of the model that a generator's name stands for."""
    return _parts(name)[1]


def create_generator(
    name: str,
    *,
    pretrained: bool = False,
    num_classes: int = 1000,
    sample_size: int = 32,
    in_channels: int = 4,
    **config: Any,
) -> GSPNTransformer2DModel | gspn_dit.GSPNDiTTransformer2DModel:
    """A class-conditional generator with random weights.

    Args:
        name: "GSPN-DiT-S/2", "GSPN-DiT-B/2", "GSPN-DiT-L/2", "GSPN-DiT-XL/2": our model, as large as DiT of that size.
            "GSPN-S/2", "GSPN-B/2", "GSPN-L/2", "GSPN-XL/2": the published model. The same with "/4" for patches of 4,
            and with "micro" as the size for small images.
        pretrained: has to be False. ``gspn.load_run("digits-generator")`` loads the generator of the package
            gspn-weights.
        num_classes, sample_size, in_channels, config: arguments of :class:`GSPNDiTTransformer2DModel` or of
            :class:`GSPNTransformer2DModel`.

    Raises ValueError for an unknown name, RuntimeError for ``pretrained=True``, and what the model raises. Parameters
    with 1000 classes and 4 channels: GSPN-DiT-S/2 32,717,656, B/2 129,369,688, L/2 452,157,584, XL/2
    672,037,796; GSPN-S/2 20,151,812, B/2 144,016,356, L/2 465,230,660, XL/2 723,513,260.
    """
    model, named = _parts(name)
    check_arguments(model.__init__, config)
    if pretrained:
        raise RuntimeError(
            f"there are no pretrained weights of {name} to download yet. Instead, gspn.load_run('digits-generator') "
            f"reads the generator of gspn-weights, gspn.load_run('RUN') a run of gspn train-diffusion, "
            f"{model.__name__}.from_pretrained what its save_pretrained wrote, and "
            "pretrained=False gives random weights to train"
        )
    named |= dict(num_classes=num_classes, sample_size=sample_size, in_channels=in_channels)
    return model(**named | config)
