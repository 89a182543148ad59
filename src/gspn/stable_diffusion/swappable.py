"""What can be swapped: the UNet of a pipeline, its blocks with self-attention, and what stands in the way."""

from collections.abc import Iterator

import torch
from torch import nn

try:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
    from diffusers.models.transformers.transformer_2d import Transformer2DModel as Transformer2DModel  # for swap.py
    from diffusers.utils.torch_utils import is_compiled_module
except ImportError as error:
    raise ImportError(
        f'a swap needs diffusers, which cannot be imported ({error}): pip install "gspn[diffusion]"'
    ) from error

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def unet_of(target) -> UNet2DConditionModel:
    """The UNet of a pipeline, or the UNet itself. Raises TypeError for anything else."""
    unet = target if isinstance(target, nn.Module) else getattr(target, "unet", None)
    unet = unet._orig_mod if isinstance(unet, nn.Module) and is_compiled_module(unet) else unet
    if isinstance(unet, UNet2DConditionModel):
        return unet
    other = unet if unet is not None else getattr(target, "transformer", None)
    found = type(target if other is None else other).__name__
    if "Transformer" in found:
        raise TypeError(
            f"{found} is a diffusion transformer (as DiT, PixArt, SD3 and FLUX), whose attention a swap does not "
            "replace: expected a UNet2DConditionModel or a pipeline with one (SD-1.5, SD-2, SDXL)"
        )
    raise TypeError(f"expected a UNet2DConditionModel or a pipeline with one, got a {found}")


def swappable(target) -> tuple[UNet2DConditionModel, dict[str, BasicTransformerBlock]]:
    """The UNet and, by the name of their attn1, its blocks that have self-attention there. Raises ValueError for a UNet
    that cannot be swapped."""
    unet = unet_of(target)
    if "_gspn_swap" in unet.__dict__:
        raise ValueError(f"this UNet is swapped already: {unet._gspn_swap}; gspn.restore undoes that")
    whole = target if isinstance(target, nn.Module) else target.unet
    if is_compiled_module(whole) or any(getattr(m, "_compiled_call_impl", None) for m in unet.modules()):
        raise ValueError("this UNet is compiled already: swap first, then compile")
    blocks, others = {}, []
    for name, module in unet.named_modules():
        if not hasattr(module, "attn1"):
            continue
        if not isinstance(module, BasicTransformerBlock) or not isinstance(module.attn1, Attention):
            others.append(f"{name}.attn1 ({type(module.attn1).__name__} in a {type(module).__name__})")
        elif not module.only_cross_attention:
            blocks[f"{name}.attn1"] = module
    if others:
        raise ValueError(f"a swap does not know the self-attention {', '.join(others[:3])}")
    if not blocks:
        raise ValueError("this UNet has no self-attention (attn1) to swap")
    check_free(unet)
    for name, block in blocks.items():
        check_linears(name, block.attn1)
        shapes = {tuple(linear.weight.shape) for linear in linears(block.attn1)}
        if len(shapes) != 1 or len(set(next(iter(shapes)))) != 1:
            raise ValueError(f"the projections of {name} have to be square and alike, got {sorted(shapes)}")
    return unet, blocks


def linears(module) -> Iterator[nn.Module]:
    for name in ("to_q", "to_k", "to_v"):
        if hasattr(module, name):
            yield getattr(module, name)
    yield module.to_out[0]


def check_linears(name, module):
    """Raises ValueError if a projection of an attention or layer is not a plain Linear, or has another dtype."""
    for linear in linears(module):
        if type(linear) is not nn.Linear:
            raise ValueError(
                f"{name} has a {type(linear).__name__} of {type(linear).__module__} where a plain Linear is expected: "
                "unload LoRA adapters (before a swap, fuse them to keep their effect) and do not quantise"
            )
        if linear.weight.dtype not in DTYPES:
            raise ValueError(
                f"{name} has weights of {linear.weight.dtype}, expected float32, bfloat16, float16 or float64: swap, "
                "save and restore without quantisation and layer-wise casting"
            )


def check_free(unet):
    """Raises ValueError if something else holds on to the modules that a swap exchanges."""
    if any(isinstance(getattr(module, "processor", None), FusedAttnProcessor2_0) for module in unet.modules()):
        raise ValueError("the projections of this UNet's attentions are fused: call unfuse_qkv_projections() first")
    for name, module in unet.named_modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and registry.get_hook("group_offloading") is not None:
            raise ValueError("this UNet is offloaded in groups: swap, or restore, before that is enabled")
        if registry is not None and (casting := registry.get_hook("layerwise_casting")) is not None:
            raise ValueError(
                f"this UNet is cast layer-wise, from {casting.storage_dtype} to {casting.compute_dtype}: swap, or "
                "restore, before enable_layerwise_casting(); where that is too late, load the pipeline again"
            )
        # A hook on the UNet itself moves it as a whole, with the layers.
        if name and hasattr(module, "_hf_hook"):
            raise ValueError(
                "parts of this UNet are moved between devices by accelerate (sequential offload or a device map): "
                "swap, or restore, before that is enabled or after remove_all_hooks() of the pipeline"
            )
