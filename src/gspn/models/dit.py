"""DiT, the generator's rival: diffusers' model, set up for training from random weights as its authors trained it."""

import copy

from torch import nn

from gspn.models.generator import PATCHES
from gspn.names import check_arguments, unknown

try:
    from diffusers import DiTTransformer2DModel
    from diffusers.models.embeddings import LabelEmbedding
except ImportError as error:
    raise ImportError(f'DiT needs diffusers ({error}): pip install "gspn[diffusion]"') from error

# width, blocks and heads of the published sizes; micro is ours, as large as GSPN-micro
SIZES = {
    "micro": (160, 4, 4),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}


def dit_names() -> tuple[str, ...]:
    """The names that `create_dit` takes."""
    return tuple(f"DiT-{size}/{patch}" for size in SIZES for patch in PATCHES)


def create_dit(
    name: str,
    *,
    num_classes: int = 1000,
    sample_size: int = 32,
    in_channels: int = 4,
    learn_sigma: bool = True,
    **config,
) -> DiTTransformer2DModel:
    """DiT with random weights: "DiT-S/2", "DiT-B/2", "DiT-L/2", "DiT-XL/2" and the like. Other arguments are
    diffusers'.

    Raises ValueError for an unknown name.
    """
    if name not in dit_names():
        raise ValueError(unknown("DiT", name, dit_names()))
    check_arguments(DiTTransformer2DModel.__init__, config)
    size, patch = name.removeprefix("DiT-").split("/")
    width, depth, heads = SIZES[size]
    config = {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "num_layers": depth,
        "patch_size": int(patch),
        "out_channels": in_channels * (1 + learn_sigma),
    } | config
    model = DiTTransformer2DModel(
        num_embeds_ada_norm=num_classes, sample_size=sample_size, in_channels=in_channels, **config
    )
    return as_published(model)


def as_published(model: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """The model with one embedding of timestep and class for all blocks (diffusers has one for each) and with DiT's
    initial values (diffusers keeps torch's): layers that modulate or predict start at 0. Sharing matters only in
    training: published weights hold the same embedding in each block."""
    blocks = model.transformer_blocks
    for block in blocks:
        block.norm1.emb = blocks[0].norm1.emb
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, LabelEmbedding):
            nn.init.normal_(module.embedding_table.weight, std=0.02)
    embedder = blocks[0].norm1.emb.timestep_embedder
    for linear in (embedder.linear_1, embedder.linear_2):
        nn.init.normal_(linear.weight, std=0.02)
    nn.init.xavier_uniform_(model.pos_embed.proj.weight.view(model.pos_embed.proj.out_channels, -1))
    nn.init.zeros_(model.pos_embed.proj.bias)
    for linear in [block.norm1.linear for block in blocks] + [model.proj_out_1, model.proj_out_2]:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return model


def untie(model: DiTTransformer2DModel) -> None:
    """Gives each block its own embedding again, because save_pretrained cannot save shared weights."""
    for block in model.transformer_blocks:
        block.norm1.emb = copy.deepcopy(block.norm1.emb)
