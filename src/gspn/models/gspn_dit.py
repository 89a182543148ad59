"""GSPN-DiT, our own generator: DiT's block with a gated scan instead of attention, and a convolution in its MLP."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspn.depthwise import DepthwiseConv2d
from gspn.lattices import interleaved, sub_lattices
from gspn.layers import GSPN2d
from gspn.models.generator_base import Generator
from gspn.models.latents import is_whole

try:
    from diffusers import ModelMixin  # noqa: F401 - pipelines look for it in the module of a component's class
    from diffusers.configuration_utils import register_to_config
    from diffusers.models.embeddings import get_2d_sincos_pos_embed
except ImportError as error:
    raise ImportError(
        f'generation needs diffusers, which cannot be imported ({error}): pip install "gspn[diffusion]"'
    ) from error

# Parameters within 3% of DiT's of the same name. DiT's blocks are 18 D^2 large, these 15 D^2: so there are more.
SIZES = {
    "micro": dict(hidden_size=168, depth=4),
    "S": dict(hidden_size=384, depth=14),
    "B": dict(hidden_size=768, depth=14, proxy_dim=16),
    "L": dict(hidden_size=1024, depth=28, proxy_dim=16),
    "XL": dict(hidden_size=1152, depth=33, proxy_dim=16),
}


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without parameters over the last axis, then x * (1 + scale) + shift."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class GSPNDiTBlock(nn.Module):
    """A block of GSPN-DiT: DiT's, with a gated line scan instead of attention and a 3x3 convolution in the MLP.

        s1, b1, g1, s2, b2, g2 = modulation(c)
        z, gate = in_proj(LN(x) * (1 + s1) + b1)
        x = x + g1 * out_proj(RMSNorm(GSPN(z)) * SiLU(gate))
        x = x + g2 * mlp_out(SiLU(DWConv3x3(mlp_in(LN(x) * (1 + s2) + b2))))

    LN has no parameters. The modulation starts at 0, so a new block changes nothing (adaLN-Zero, arXiv 2212.09748).

    Args:
        channels: C. mlp_ratio: width of the MLP as a multiple of C. gspn: the options of :class:`gspn.GSPN2d`.

    Shape: x (B,H,W,C) and the condition c (B,C), to (B,H,W,C).

    State dict (frozen), M = mlp_ratio * C: ``modulation`` (6C,C), ``in_proj`` (2C,C), ``gspn.*``, ``norm`` (C,),
    ``out_proj`` (C,C), ``mlp_in`` (M,C), ``dwconv`` (M,1,3,3), ``mlp_out`` (C,M); linear layers and dwconv have biases.
    """

    def __init__(self, channels: int, *, mlp_ratio: float = 3.0, **gspn):
        super().__init__()
        hidden = int(channels * mlp_ratio)
        self.modulation = nn.Linear(channels, 6 * channels)
        self.in_proj = nn.Linear(channels, 2 * channels)
        self.gspn = GSPN2d(channels, **gspn)
        self.norm = nn.RMSNorm(channels, eps=1e-6)
        self.out_proj = nn.Linear(channels, channels)
        self.mlp_in = nn.Linear(channels, hidden)
        self.dwconv = DepthwiseConv2d(hidden, 3)
        self.mlp_out = nn.Linear(hidden, channels)

    def mix(self, x: Tensor) -> Tensor:
        """The branch that mixes pixels, without its norm and its last gate."""
        z, gate = self.in_proj(x).chunk(2, dim=-1)
        # The scan takes channels_last as it is. Half of the channels of a wider map is not dense.
        y = self.gspn(z.contiguous().permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        # Inside autocast y has fewer bits than the weight, for which torch would warn and take a slower way.
        y = F.rms_norm(y, y.shape[-1:], self.norm.weight.to(y.dtype), self.norm.eps)
        return self.out_proj(y * F.silu(gate))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None, None].chunk(6, dim=-1)
        x = torch.addcmul(x, gate1, self.mix(modulated(x, shift1, scale1)))
        h = self.mlp_in(modulated(x, shift2, scale2)).permute(0, 3, 1, 2)
        return torch.addcmul(x, gate2, self.mlp_out(F.silu(self.dwconv(h).permute(0, 2, 3, 1))))


class GSPNDiTTransformer2DModel(Generator):
    """GSPN-DiT for class-conditional diffusion; it is used like diffusers' DiTTransformer2DModel.

    This is our model, not the paper's, which is :class:`gspn.GSPNTransformer2DModel`. Every block hears timestep and
    class, the scan is normalised and gated, and all scans are global. It takes maps of any size.

    Args:
        sample_size: side of the square map that :class:`diffusers.DiTPipeline` generates; the model takes any H and W.
        patch_size: side of a patch in pixels of the map.
        in_channels: 4 for a VAE's latents, 1 or 3 for images.
        learn_sigma: the output has twice the channels, the second half for the variance.
        hidden_size: width D.
        depth: number of blocks.
        mlp_ratio: width of the MLP as a multiple of D.
        num_classes: the classes are 0 to num_classes - 1; num_classes itself is the null class of guidance.
        class_dropout_prob: how often training replaces a class by the null class; with 0 there is no null class.
        proxy_dim: S, the width from which the scan's weights and gates are predicted.
        groups: channel groups that share propagation weights.
        average, center: as in :class:`gspn.GSPN2d`.
        positions: adds DiT's sinusoidal positions, stretched over the map, whatever its size.
        size_condition: the blocks hear log(H / sample_size) and log(W / sample_size), for training at several sizes;
            with a dilation, those of the sub-lattices.
        prediction_type: what the model is trained to predict: "epsilon", "v_prediction" or "sample". Pipelines refuse a
            scheduler that expects something else.

    Shape: (B,in_channels,H,W), timesteps and class labels (B,), to (B,out_channels,H,W), in the weights' dtype, or in
    autocast's inside it. The option ``dilation`` of a call, k, runs the blocks on the k x k interleaved sub-lattices of
    the feature map: each is as large as a map of 1/k of the size. H and W are then multiples of k * patch_size.

    Raises ValueError if sizes do not fit or, on the CPU, a class is out of range.

    State dict (frozen): ``patch_embed`` (D,in_channels,p,p) with bias, ``embed.*`` as in diffusers, ``size_embed``
    (D,2) with size_condition, ``blocks.i.*`` (see GSPNDiTBlock), ``modulation`` (2D,D) and ``proj_out``
    (p*p*out_channels,D) with bias.
    """

    _no_split_modules = ("GSPNDiTBlock",)
    _skip_layerwise_casting_patterns = ("norm", "patch_embed")

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int | None = None,
        learn_sigma: bool = True,
        hidden_size: int = 384,
        depth: int = 14,
        mlp_ratio: float = 3.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        proxy_dim: int = 8,
        groups: int = 8,
        average: bool = True,
        center: bool = False,
        positions: bool = False,
        size_condition: bool = False,
        prediction_type: str = "epsilon",
    ):
        super().__init__()
        self._make_start()
        if int(hidden_size * mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio has to leave at least one of {hidden_size} channels, got {mlp_ratio}")
        if positions and hidden_size % 4:
            raise ValueError(f"positions=True needs a hidden_size that is a multiple of 4, got {hidden_size}")
        self.size_embed = nn.Linear(2, hidden_size, bias=False) if size_condition else None
        gspn = dict(proxy_dim=proxy_dim, groups=groups, average=average, center=center)
        self.blocks = nn.ModuleList(GSPNDiTBlock(hidden_size, mlp_ratio=mlp_ratio, **gspn) for _ in range(depth))
        self._make_end()
        self._init_weights()

    def _init_weights(self):
        """As in DiT. The proxy too is Xavier's: with torch's values the weights and gates would be half as large."""
        for module in (*self.blocks.modules(), self.patch_embed):
            if isinstance(module, nn.Linear) or module is self.patch_embed:
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                nn.init.zeros_(module.bias)
        self._init_ends()
        for block in self.blocks:
            nn.init.xavier_uniform_(block.gspn.proxy_proj.weight.flatten(1))
            nn.init.zeros_(block.modulation.weight)
        if self.size_embed is not None:
            nn.init.zeros_(self.size_embed.weight)

    def _predict(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, dilation: int = 1) -> Tensor:
        x = self.patch_embed(hidden_states).permute(0, 2, 3, 1).contiguous()
        height, width = x.shape[1:3]
        dilation = whole_dilation(dilation)
        if height % dilation or width % dilation:
            patch = self.config.patch_size
            raise ValueError(
                f"dilation={dilation} takes maps whose H and W are multiples of {dilation * patch}, got "
                f"{height * patch}x{width * patch}"
            )
        trained = self.config.sample_size // self.config.patch_size
        if self.config.positions:
            x = x + stretched_positions(x.shape[-1], height, width, trained, x.device).to(x.dtype)
        condition = self.embed(timestep, class_labels, hidden_dtype=x.dtype)
        if self.size_embed is not None:
            # Logarithms of tensors: compiled graphs would keep those of Python as constants, one graph for each size.
            size = torch.tensor([[height, width]], dtype=torch.float32, device=x.device) / (dilation * trained)
            condition = condition + self.size_embed(size.log().to(x.dtype))
        c = F.silu(condition)
        if dilation != 1:
            x, c = sub_lattices(x, (dilation, dilation)), c.repeat_interleave(dilation * dilation, 0)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, c)
            else:
                x = block(x, c)
        x = x if dilation == 1 else interleaved(x, (dilation, dilation))
        return self._project_out(F.layer_norm(x, x.shape[-1:], eps=1e-6), condition)


def stretched_positions(channels: int, height: int, width: int, trained: int, device: torch.device) -> Tensor:
    """(1,height,width,channels): DiT's positions on a map of side `trained`, stretched over one of this size."""
    # Not cached: what torch.export traces must not be kept for later calls.
    grid = (height, width)
    table = get_2d_sincos_pos_embed(channels, grid, base_size=trained, output_type="pt", device=device)
    return table.view(1, height, width, channels)


def whole_dilation(dilation: int) -> int:
    """The dilation as an int, whatever integer it is. Raises ValueError if it is none, or below 1."""
    if not is_whole(dilation) or dilation < 1:
        raise ValueError(f"dilation has to be a positive whole number, got {dilation!r}")
    return int(dilation)
