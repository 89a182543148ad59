"""Tiny Stable Diffusion and SDXL pipelines with random weights, made in code."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerFast

WORDS = ("red", "green", "blue", "fox", "owl", "house", "a", "of", "with", "smile")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words of :data:`WORDS`, at most 8 tokens."""
    vocabulary = {word: i for i, word in enumerate(("<pad>", "<bos>", "<eos>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=8
    )


def text_config(**config) -> CLIPTextConfig:
    sizes = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2, projection_dim=16)
    ids = dict(vocab_size=4 + len(WORDS), bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return CLIPTextConfig(**sizes | ids | dict(max_position_embeddings=8) | config)


def tiny_vae(factor: int = 2, **config) -> AutoencoderKL:
    """An AutoencoderKL whose latents are `factor` times smaller: 1, 2, 4 or 8."""
    levels = factor.bit_length()
    kinds = dict(down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels)
    config = dict(sample_size=8 * factor, latent_channels=4, norm_num_groups=4, scaling_factor=0.5) | config
    return AutoencoderKL(block_out_channels=(8,) * levels, **kinds, **config)


def tiny_unet(**config) -> UNet2DConditionModel:
    """Two levels of attention for maps of 8x8."""
    kinds = dict(down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2)
    sizes = dict(sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4)
    return UNet2DConditionModel(**kinds | sizes | dict(cross_attention_dim=16, attention_head_dim=8) | config)


def ddim(**config) -> DDIMScheduler:
    return DDIMScheduler(
        **dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1)
        | config
    )


def tiny_sd(*, factor: int = 2, scheduler=None, vae: dict | None = None, **unet) -> StableDiffusionPipeline:
    """A StableDiffusionPipeline with random weights, made for images of 8 * factor."""
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        tiny_vae(factor, **(vae or {})).eval(),
        CLIPTextModel(text_config()).eval(),
        tiny_tokenizer(),
        tiny_unet(**unet).eval(),
        scheduler or ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sdxl(*, factor: int = 2, scheduler=None, vae: dict | None = None, **unet) -> StableDiffusionXLPipeline:
    """A StableDiffusionXLPipeline with random weights, made for images of 8 * factor."""
    torch.manual_seed(0)
    sizes = dict(addition_embed_type="text_time", addition_time_embed_dim=4, use_linear_projection=True)
    sizes |= dict(projection_class_embeddings_input_dim=6 * 4 + 16, cross_attention_dim=32)
    pipe = StableDiffusionXLPipeline(
        tiny_vae(factor, **(vae or {})).eval(),
        CLIPTextModel(text_config()).eval(),
        CLIPTextModelWithProjection(text_config()).eval(),
        tiny_tokenizer(),
        tiny_tokenizer(),
        tiny_unet(**sizes | unet).eval(),
        scheduler or ddim(),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_ip_adapter(unet: UNet2DConditionModel) -> dict:
    """Random weights of an IP-Adapter for embeddings of 6 numbers, as its files have them."""
    dim, keys = unet.config.cross_attention_dim, torch.Generator().manual_seed(5)
    crosses = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    adapter = {
        f"{2 * i + 1}.to_{part}_ip.weight": torch.randn(cross.inner_dim, dim, generator=keys)
        for i, cross in enumerate(crosses)
        for part in ("k", "v")
    }
    projection = {"proj.weight": torch.randn(4 * dim, 6, generator=keys), "proj.bias": torch.zeros(4 * dim)}
    return {
        "image_proj": projection | {"norm.weight": torch.ones(dim), "norm.bias": torch.zeros(dim)},
        "ip_adapter": adapter,
    }
