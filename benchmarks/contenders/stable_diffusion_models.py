"""The published UNets of Stable Diffusion, and what a swap changes in them: layers, shapes, parameters, operations,
memory.

No weights and no GPU are needed: on torch's "meta" device only shapes pass through a UNet. A size is (height, width) in
pixels, eight times that of the latents.
"""

import copy
from collections.abc import Iterable

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

import gspn
from gspn.stable_diffusion.highres.memory import peak_bytes

SD = dict(
    in_channels=4,
    out_channels=4,
    block_out_channels=(320, 640, 1280, 1280),
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    layers_per_block=2,
    norm_num_groups=32,
)
CONFIGS = {
    "SD-1.5": SD | dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
    "SD-2.1": SD
    | dict(sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20))
    | dict(use_linear_projection=True, upcast_attention=True),
    "SDXL": SD
    | dict(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    # not published: SDXL's plan at toy widths, for rehearsals and tests
    "toy": SD
    | dict(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=(1, 2),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    ),
}
PUBLISHED = {"SD-1.5": 859_520_964, "SD-2.1": 865_910_724, "SDXL": 2_567_463_684}  # parameters
CONTENDERS = {
    "attention": None,
    "GSPN pure": dict(form="pure"),
    "GSPN qkv": dict(form="qkv"),
    "GSPN pure, segment 4": dict(form="pure", segment=4),
}
HYBRIDS = {  # what stays attention in SDXL
    "all": None,
    "none": dict(form="pure"),
    "mid_block": dict(form="pure", keep="mid_block"),
    "lowest": dict(form="pure", keep="lowest"),
    "level:1": dict(form="pure", keep="level:1"),
}
THREE = ("attention", "GSPN pure", "GSPN qkv")  # shapes and operations do not depend on the segment
RATIOS = {  # square, wide, tall, and sides that are no multiples of 64: odd maps in the deeper levels
    "SD-1.5": ((512, 512), (512, 1024), (1024, 512), (520, 328)),
    "SD-2.1": ((768, 768), (576, 1024), (1024, 576), (776, 1000)),
    "SDXL": ((1024, 1024), (768, 1344), (1344, 768), (1000, 616), (256, 4096)),
}
SIZES = ((512, 512), (768, 768), (1024, 1024), (2048, 2048), (4096, 4096), (8192, 8192), (16384, 8192))
TOKENS = 77  # of a text


def build(name: str, device: torch.device | str = "meta", dtype: torch.dtype = torch.bfloat16) -> UNet2DConditionModel:
    """The UNet `name` of :data:`CONFIGS` with random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(**CONFIGS[name])
    return torch.nn.Module.to(unet.eval(), dtype).requires_grad_(False)  # diffusers' own `to` logs for dtypes


def contenders(unet: UNet2DConditionModel, names: Iterable[str]) -> dict[str, UNet2DConditionModel]:
    """For each of :data:`CONTENDERS` or :data:`HYBRIDS` a UNet; they share all weights but those of swapped layers,
    which are random."""
    found, options = {}, CONTENDERS | HYBRIDS
    for name in names:
        shared = {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
        found[name] = copy.deepcopy(unet, shared)
        if options[name]:
            gspn.swap(found[name], init="random", **options[name])
            found[name].requires_grad_(False)
    return found


def arguments(unet: UNet2DConditionModel, size: tuple[int, int], batch: int = 2) -> dict:
    """What the UNet is called with for an image of `size`; a batch of 2 is both halves of guidance."""
    config, like = unet.config, {"device": unet.device, "dtype": unet.dtype}
    found = {
        "sample": torch.randn(batch, config.in_channels, size[0] // 8, size[1] // 8, **like),
        "timestep": torch.tensor(500, device=unet.device),
        "encoder_hidden_states": torch.randn(batch, TOKENS, config.cross_attention_dim, **like),
        "return_dict": False,
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        found["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, pooled, **like),
            "time_ids": torch.randn(batch, 6, **like),
        }
    return found


def maps_of(unet: UNet2DConditionModel, size: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """H and W of the feature map that each swapped layer got in one run for an image of `size`, by the layer's name."""
    found, hooks = {}, []
    for name, module in unet.named_modules():
        if isinstance(module, gspn.GSPNAttention):
            saw = lambda m, args, kwargs, name=name: found.update({name: tuple(kwargs["map_size"])})  # noqa: E731
            hooks.append(module.register_forward_pre_hook(saw, with_kwargs=True))
    try:
        with torch.no_grad():
            unet(**arguments(unet, size, batch=1))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def operations(unet: UNet2DConditionModel, size: tuple[int, int]) -> int:
    """Floating-point operations of a denoising step with guidance for one image: a multiply-add counts two."""
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        unet(**arguments(unet, size))
    return counted.get_total_flops()


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def structure(name: str) -> dict:
    """Parameters before and after a swap, of the UNet and of each layer, and each layer's map at every aspect ratio."""
    unets = contenders(build(name), THREE)
    sizes = {f"{h}x{w}": maps_of(unets["GSPN pure"], (h, w)) for h, w in RATIOS[name]}
    layers = []
    for layer, module in unets["GSPN pure"].named_modules():
        if isinstance(module, gspn.GSPNAttention):
            row = {"name": layer, "channels": module.channels}
            row["maps"] = {size: list(maps[layer]) for size, maps in sizes.items()}
            row["parameters"] = {n: parameters(unet.get_submodule(layer)) for n, unet in unets.items()}
            layers.append(row)
    native = "x".join([str(8 * CONFIGS[name]["sample_size"])] * 2)
    counts = {n: parameters(unet) for n, unet in unets.items()}
    return {"native": native, "published": PUBLISHED[name], "parameters": counts, "layers": layers}


def step(unets: dict[str, UNet2DConditionModel], size: tuple[int, int]) -> dict:
    """What a denoising step with guidance for an image of `size` takes, by contender: operations, and MiB beside the
    weights where attention keeps no matrix of all pairs (without what kernels take inside them)."""
    return {
        name: {
            "operations": operations(unet, size),
            "mib": round(peak_bytes(unet, "forward", **arguments(unet, size)) / 2**20, 1),
        }
        for name, unet in unets.items()
    }
