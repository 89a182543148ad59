"""GSPN's class-conditional generator, a diffusers model: the line scan replaces DiT's self-attention."""

import functools
import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspn.depthwise import DepthwiseConv2d
from gspn.layers import DropPath, GSPN2d, LayerNorm2d, Pointwise
from gspn.names import check_arguments, unknown

try:
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config
    from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings
    from diffusers.models.modeling_outputs import Transformer2DModelOutput
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


class GSPNTransformer2DModel(ModelMixin, ConfigMixin):
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

    _supports_gradient_checkpointing = True
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
        positive = dict(
            sample_size=sample_size, patch_size=patch_size, in_channels=in_channels, num_classes=num_classes
        )
        for name, value in (positive | dict(hidden_size=hidden_size, depth=depth)).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} has to be a positive whole number, got {value!r}")
        if depth % 2:
            raise ValueError(f"depth has to be even, as each block of the second half has a counterpart, got {depth}")
        if not 0 <= global_blocks <= depth + 1:
            raise ValueError(f"global_blocks has to be from 0 to {depth + 1} (all blocks), got {global_blocks}")
        if not 0 <= class_dropout_prob < 1:
            raise ValueError(f"class_dropout_prob has to be at least 0 and below 1, got {class_dropout_prob}")
        if sample_size % patch_size:
            raise ValueError(f"sample_size has to be a multiple of patch_size {patch_size}, got {sample_size}")
        if prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"prediction_type has to be epsilon, v_prediction or sample, got {prediction_type!r}")
        channels = in_channels * (1 + bool(learn_sigma))
        if out_channels not in (None, channels):
            raise ValueError(
                f"out_channels has to be {channels} for in_channels={in_channels}, learn_sigma={learn_sigma}, got "
                f"{out_channels}"
            )
        self.out_channels = channels
        self.register_to_config(out_channels=channels)  # tells pipelines whether there is a variance
        self.gradient_checkpointing = False
        self.patch_embed = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        self.embed = CombinedTimestepLabelEmbeddings(num_classes, hidden_size, class_dropout_prob)
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
        self.modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj_out = nn.Linear(hidden_size, patch_size * patch_size * channels)
        self._init_weights()

    def _init_weights(self):
        """As in DiT, the layers that predict start at 0, embeddings from a normal of deviation 0.02 (with 1, the first
        epochs learn less). The last projection of a block shrinks with the number of blocks, so that the residual keeps
        its scale."""
        with torch.no_grad():
            for linear in (self.modulation, self.proj_out):
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)
            for name, parameter in self.embed.named_parameters():
                if name.endswith("weight"):
                    nn.init.normal_(parameter, std=0.02)
            for block in self.blocks:
                block.ffn.out_proj.weight /= math.sqrt(len(self.blocks))

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | None = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Self | Any:  # a tuple with return_unused_kwargs=True
        """As in diffusers. Raises ValueError for the config of another model."""
        name = (config or {}).get("_class_name", cls.__name__)
        if name != cls.__name__:
            raise ValueError(f"this is the config of a {name}, expected that of a {cls.__name__}")
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> Self | Any:  # a tuple with output_loading_info=True
        """As in diffusers. Raises ValueError if the weights belong to another model or are incomplete; diffusers would
        fill the gaps with random ones."""
        with_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        for key, what in (("missing_keys", "lacks"), ("unexpected_keys", "also has")):
            if names := sorted(info[key]):
                shown = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
                raise ValueError(f"{pretrained_model_name_or_path} has another architecture: it {what} {shown}")
        return (model, info) if with_info else model

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | Any:  # a tuple with return_dict=False
        """The prediction for the noisy maps `hidden_states` (B,in_channels,H,W) at `timestep` (B,) for `class_labels`
        (B,), with the arguments of diffusers' DiTTransformer2DModel. cross_attention_kwargs has to be empty."""
        patch, config = self.config.patch_size, self.config
        if hidden_states.ndim != 4 or hidden_states.shape[1] != config.in_channels:
            raise ValueError(f"expected (B,{config.in_channels},H,W), got {tuple(hidden_states.shape)}")
        height, width = hidden_states.shape[-2:]
        if height % patch or width % patch or not height or not width:
            raise ValueError(f"H and W have to be multiples of the patch of {patch}, got {height}x{width}")
        if timestep is None or class_labels is None:
            raise ValueError("timestep and class_labels have to be tensors (B,), got None")
        if cross_attention_kwargs:
            names = sorted(cross_attention_kwargs)
            raise ValueError(f"cross_attention_kwargs has to be empty, as there is no attention, got {names}")
        self._check_labels(class_labels)

        h = self.patch_embed(hidden_states)
        h = h.contiguous(memory_format=torch.channels_last)  # the faster layout throughout
        condition = self.embed(timestep, class_labels, hidden_dtype=h.dtype)
        h = h + condition[:, :, None, None].to(h.dtype)
        residual, kept, half = None, [], config.depth // 2
        for i, block in enumerate(self.blocks):
            joined = (kept.pop(),) if i > half else ()
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                h, residual = self._gradient_checkpointing_func(block, h, residual, *joined)
            else:
                h, residual = block(h, residual, *joined)
            if i < half:
                kept.append(h)
        h = self.norm(residual + h).permute(0, 2, 3, 1)
        shift, scale = self.modulation(F.silu(condition)).chunk(2, dim=1)
        h = h * (1 + scale[:, None, None]) + shift[:, None, None]
        sample = F.pixel_shuffle(self.proj_out(h).permute(0, 3, 1, 2), patch)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    if TYPE_CHECKING:  # nn.Module's is typed as Any

        def __call__(
            self,
            hidden_states: Tensor,
            timestep: Tensor | None = None,
            class_labels: Tensor | None = None,
            cross_attention_kwargs: dict | None = None,
            return_dict: bool = True,
        ) -> Transformer2DModelOutput | Any: ...

    def _check_labels(self, labels):
        # Reading labels on a GPU would stall it; there, torch's own assertion finds the wrong ones.
        if labels.device.type != "cpu" or torch.compiler.is_compiling() or labels.numel() == 0:
            return
        last = self.config.num_classes - (self.config.class_dropout_prob == 0)
        if labels.min() < 0 or labels.max() > last:
            wrong = sorted({label for label in labels.tolist() if not 0 <= label <= last})
            null = "" if last < self.config.num_classes else f", {last} is the null class of guidance"
            raise ValueError(f"class labels have to be from 0 to {last}{null}; got {wrong}")


SIZES = {
    # Ours, for small images on a CPU. Nine blocks with short segments would not see the whole image.
    "micro": dict(hidden_size=160, depth=8, segment=None),
    "S": dict(hidden_size=368, depth=24),
    "B": dict(hidden_size=900, depth=30),
    "L": dict(hidden_size=1200, depth=56),
    "XL": dict(hidden_size=1500, depth=56),
}
PATCHES = (2, 4)


@functools.cache
def generator_names() -> tuple[str, ...]:
    """The names that `create_generator` takes."""
    return tuple(f"GSPN-{size}/{patch}" for size in SIZES for patch in PATCHES)


def config_of(name: str) -> dict:
    """The arguments of :class:`GSPNTransformer2DModel` that a generator's name stands for."""
    if name not in generator_names():
        raise ValueError(unknown("generator", name, generator_names()))
    size, patch = name.removeprefix("GSPN-").split("/")
    return {"patch_size": int(patch)} | SIZES[size]


def create_generator(
    name: str,
    *,
    pretrained: bool = False,
    num_classes: int = 1000,
    sample_size: int = 32,
    in_channels: int = 4,
    skip: bool = True,
    **config: Any,
) -> GSPNTransformer2DModel:
    """A class-conditional generator with random weights.

    Args:
        name: "GSPN-S/2", "GSPN-B/2", "GSPN-L/2", "GSPN-XL/2" (the published sizes), the same with "/4" for patches of
            4, and "GSPN-micro/2", "GSPN-micro/4" for small images, which scan globally in all blocks.
        pretrained: has to be False: there are no weights to download yet.
        num_classes, sample_size, in_channels, skip, config: arguments of :class:`GSPNTransformer2DModel`.

    Raises ValueError for an unknown name, RuntimeError for ``pretrained=True``, and what the model raises. Parameters
    with 1000 classes, 4 channels and skip: S/2 20,151,812, B/2 144,016,356, L/2 465,230,660, XL/2 723,513,260.
    """
    check_arguments(GSPNTransformer2DModel.__init__, config)
    config = config_of(name) | config
    if pretrained:
        raise RuntimeError(
            f"there are no pretrained weights of {name} to download yet. Instead, gspn.load_run('RUN') reads a run of "
            "gspn train-diffusion, GSPNTransformer2DModel.from_pretrained reads what its save_pretrained wrote, and "
            "pretrained=False gives random weights to train"
        )
    return GSPNTransformer2DModel(
        num_classes=num_classes, sample_size=sample_size, in_channels=in_channels, skip=skip, **config
    )
