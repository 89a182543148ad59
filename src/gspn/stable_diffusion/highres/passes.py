"""The UNet's passes in a step of a high-resolution stage: both halves of guidance, and a second pass with dilated
convolutions."""

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

try:
    from gspn.stable_diffusion.pipelines import StableDiffusionXLPipeline, rescale_noise_cfg
except ImportError as error:
    raise ImportError(f'high resolution needs diffusers ({error}): pip install "gspn[diffusion]"') from error

SIZES = ("original_size", "crops_coords_top_left", "target_size")  # SDXL's conditions on size
STEPPING = ("cross_attention_kwargs", "eta", "guidance_rescale", "ip_adapter_image", "ip_adapter_image_embeds")


def allowed_options(pipe) -> list[str]:
    """The pipeline's own options that hold in all stages."""
    encoding = set(inspect.signature(pipe.encode_prompt).parameters)
    encoding -= {"prompt", "negative_prompt", "device", "num_images_per_prompt", "do_classifier_free_guidance"}
    encoding -= {"lora_scale"}  # the pipelines take it from cross_attention_kwargs
    return sorted(encoding | {*STEPPING, *(SIZES if isinstance(pipe, StableDiffusionXLPipeline) else ())})


def cosine_share(t: Tensor | float, noise_steps: int, power: float) -> float:
    """((1 - cos(pi t / T)) / 2) ** power: 1 where all is noise, at t = T, 0 where there is none, at t = 0."""
    return ((1 - math.cos(math.pi * float(t) / noise_steps)) / 2) ** power


@contextmanager
def dilated(unet: nn.Module, dilation: int | tuple[int, int], parts: Sequence[str] = ("",)) -> Iterator[None]:
    """In the block, the convolutions of the UNet that keep (or halve) the map's size are dilated by `dilation` (one
    number, or one for the height and one for the width), so that they reach as far in a map that many times as large as
    in training; afterwards, also on an exception, as before. `parts`: the beginnings of their names; all by default."""
    before = []
    times = (dilation, dilation) if isinstance(dilation, int) else dilation
    for name, conv in unet.named_modules():
        if not name.startswith(tuple(parts)):
            continue
        if not isinstance(conv, nn.Conv2d) or conv.padding_mode != "zeros" or max(conv.kernel_size) == 1:
            continue
        reach = tuple(d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
        if isinstance(conv.padding, tuple) and all(2 * p == r for p, r in zip(conv.padding, reach, strict=True)):
            before.append((conv, conv.dilation, conv.padding))
    try:
        for conv, dilations, paddings in before:
            conv.dilation = tuple(d * k for d, k in zip(dilations, times, strict=True))
            conv.padding = tuple(p * k for p, k in zip(paddings, times, strict=True))
        yield
    finally:
        for conv, dilations, paddings in before:
            conv.dilation, conv.padding = dilations, paddings


class Guidance:
    """The prompt's conditions for the UNet, and its guided prediction.

    Args:
        pipe: the pipeline. prompt, negative_prompt, options: as it takes them. scale: of guidance.
        native: (height, width) of the first stage, which SDXL gets as its size in all stages: it was trained on it.
    """

    def __init__(self, pipe, prompt, negative_prompt, scale: float, options: dict, native: tuple[int, int]):
        self.pipe, self.scale = pipe, scale
        self.guided = scale > 1 and pipe.unet.config.time_cond_proj_dim is None
        self.rescale = options.get("guidance_rescale", 0.0)
        self.attention = options.get("cross_attention_kwargs")
        device = pipe._execution_device
        names = inspect.signature(pipe.encode_prompt).parameters
        given = {name: value for name, value in options.items() if name in names}
        encoded = pipe.encode_prompt(
            prompt=prompt,
            negative_prompt=negative_prompt,
            device=device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=self.guided,
            lora_scale=(self.attention or {}).get("scale"),
            **given,
        )
        added = None
        if isinstance(pipe, StableDiffusionXLPipeline):
            text, null_text, pooled, null_pooled = encoded
            sizes = self._sizes(options, native, pooled)
            added = {"text_embeds": self._halves(pooled, null_pooled), "time_ids": self._halves(sizes, sizes)}
        else:
            text, null_text = encoded
        image, embeds = options.get("ip_adapter_image"), options.get("ip_adapter_image_embeds")
        if image is not None or embeds is not None:
            both = pipe.prepare_ip_adapter_image_embeds(image, embeds, device, 1, self.guided)
            added = (added or {}) | {"image_embeds": [list(one.chunk(1 + self.guided)) for one in both]}
        conditions = {"encoder_hidden_states": self._halves(text, null_text)}
        if added is not None:
            conditions["added_cond_kwargs"] = added
        if pipe.unet.config.time_cond_proj_dim is not None:
            embedding = pipe.get_guidance_scale_embedding(
                torch.tensor([scale - 1.0]), embedding_dim=pipe.unet.config.time_cond_proj_dim
            )
            conditions["timestep_cond"] = [embedding.to(pipe.unet.dtype)]
        # Each leaf is a list of one tensor for each half: [null, prompt] or [prompt].
        self._conditions = tree_map_only(Tensor, lambda value: value.to(device), conditions)

    def _halves(self, value, null):
        return [null, value] if self.guided else [value]

    def _sizes(self, options, native, pooled):
        sizes = {"original_size": native, "crops_coords_top_left": (0, 0), "target_size": native}
        sizes |= {name: tuple(options[name]) for name in SIZES if options.get(name) is not None}
        encoder = self.pipe.text_encoder_2
        width = int(pooled.shape[-1]) if encoder is None else encoder.config.projection_dim
        return self.pipe._get_add_time_ids(
            *(sizes[name] for name in SIZES), dtype=pooled.dtype, text_encoder_projection_dim=width
        )

    def _runs(self, sequential: bool) -> list[dict]:
        """The UNet's arguments for each of its runs: one, or one for each half of guidance."""

        def is_halves(value):
            return isinstance(value, list) and isinstance(value[0], Tensor)

        def each(make):
            return tree_map(make, self._conditions, is_leaf=is_halves)

        if not sequential:
            return [each(lambda halves: torch.cat(halves))]
        return [each(lambda halves, i=i: halves[i]) for i in range(1 + self.guided)]

    def on_meta(self, savers) -> dict:
        """The UNet's arguments in one run, except the map and the timestep, as tensors on "meta"."""
        run = self._runs(savers.sequential_guidance)[-1] | {"cross_attention_kwargs": self.attention}
        return tree_map_only(Tensor, lambda value: value.to("meta"), run)

    def predict(self, maps: Tensor, t: Tensor, *, sequential: bool, dilation: int = 1) -> Tensor:
        """The guided prediction (1,C,h,w), in float32, for noisy `maps` (1,C,h,w) at timestep t."""
        unet, parts = self.pipe.unet, []
        maps = maps.to(unet.dtype)
        with dilated(unet, dilation) if dilation > 1 else nullcontext():
            for run in self._runs(sequential):
                batch = maps.expand(len(run["encoder_hidden_states"]), -1, -1, -1)
                part = unet(batch, t, cross_attention_kwargs=self.attention, return_dict=False, **run)[0]
                parts.append(part.float())
        prediction = torch.cat(parts)
        if not self.guided:
            return prediction
        null, prompted = prediction.chunk(2)
        prediction = null + self.scale * (prompted - null)
        if self.rescale > 0:
            prediction = rescale_noise_cfg(prediction, prompted, guidance_rescale=self.rescale)
        return prediction
