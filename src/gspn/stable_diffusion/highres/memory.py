"""How much memory a stage of a high-resolution image needs, how much is free, and which savers to switch on."""

import weakref
from collections.abc import Callable, Collection
from dataclasses import asdict, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gspn.stable_diffusion.highres.savers import SAVERS, Savers, saving, tile_of, vae_factor

MIB = 2**20
SHARE = 0.9  # of the free memory that a plan may use: kernels take workspaces that no estimate sees
MANY_PIXELS = 4096 * 4096  # from here on all savers are on where no estimate can be made
VAE_ATTENTION = 2**16  # tokens in the VAE's attention above which tiles are much faster


class _Peak(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, except the `known` ones."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.now, self.peak = 0, 0
        self.seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor):
        storage = tensor.untyped_storage()
        if storage not in self.seen:
            size = storage.nbytes()
            self.seen.add(storage)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, size)

    def _free(self, size):
        self.now -= size


class _FusedAttention(TorchFunctionMode):
    """Attention as fused kernels compute it, which keep no matrix of all pairs; on "meta" torch would take another."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            query, _, value = (*args, *((kwargs or {})[name] for name in ("query", "key", "value")[len(args) :]))[:3]
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return func(*args, **(kwargs or {}))


class _Method(nn.Module):
    def __init__(self, module: nn.Module, name: str):
        super().__init__()
        self.module, self.name = module, name

    def forward(self, *args, **kwargs):
        return getattr(self.module, self.name)(*args, **kwargs)


@torch.no_grad()
def peak_bytes(module: nn.Module, method: str, *args, dtype: torch.dtype | None = None, **kwargs) -> int:
    """The peak, in bytes, of the tensors that ``module.method(*args, **kwargs)`` makes, with weights in `dtype` (None:
    their own).

    Nothing is computed and no memory is taken: only shapes pass through the module, as tensors on "meta". Tensors among
    the arguments have to be on "meta" too. Workspaces inside kernels (some hundred MiB at most) are not counted.
    """
    module = getattr(module, "_orig_mod", module)  # a compiled module's own
    weights = {
        f"module.{name}": tensor.to("meta", dtype if tensor.is_floating_point() else None)
        for named in (module.named_parameters, module.named_buffers)
        for name, tensor in named(remove_duplicate=False)
    }
    known = [value for value in tree_leaves((weights, args, kwargs)) if isinstance(value, Tensor)]
    with torch.compiler.set_stance("force_eager"), _FusedAttention(), _Peak(known) as peak:
        torch.func.functional_call(_Method(module, method), weights, args, kwargs, tie_weights=False)
    return peak.peak


def free_bytes(device: torch.device) -> int:
    """The memory for new tensors on `device`: what is free and what torch holds without using it."""
    if device.type == "cpu":
        import psutil  # comes with accelerate, which the extra installs

        return psutil.virtual_memory().available
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    held = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    return torch.accelerator.get_memory_info(device)[0] + held


def weight_bytes(module: nn.Module | None) -> int:
    """The bytes of a module's weights."""
    if module is None:
        return 0
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def is_offloaded(pipe) -> bool:
    """Whether hooks bring the weights to the device only when they are needed."""
    models = [m for m in pipe.components.values() if isinstance(m, nn.Module)]
    hooked = ("_hf_hook", "_diffusers_hook")
    return any(hasattr(part, name) for model in models for part in model.modules() for name in hooked)


def working_dtype(vae) -> torch.dtype:
    """The dtype in which the VAE works: float32 where float16 would overflow."""
    upcast = vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
    return torch.float32 if upcast else vae.dtype


def tiles_are_faster(vae, height: int, width: int) -> bool:
    """Whether the VAE has attention over the whole image and the image is so large that it would take most of the
    time."""
    attends = vae.config.get("mid_block_add_attention", True)
    return attends and height * width // vae_factor(vae) ** 2 > VAE_ATTENTION


def unet_bytes(pipe, height: int, width: int, savers: Savers, conditions: Callable) -> int:
    """The bytes that one step of the UNet takes beside the weights. `conditions(savers)` gives the UNet's arguments for
    one run except sample and timestep, as tensors on "meta"."""
    arguments = conditions(savers)
    batch, channels = len(arguments["encoder_hidden_states"]), pipe.unet.config.in_channels
    shape = (batch, channels, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
    arguments |= {
        "sample": torch.empty(shape, dtype=pipe.unet.dtype, device="meta"),
        "timestep": torch.empty((), dtype=torch.int64, device="meta"),
        "return_dict": False,
    }
    with saving(pipe, replace(savers, vae_tiling=False)):
        peak = peak_bytes(pipe.unet, "forward", **arguments)
    # in addition: latents, encoded image, noise, the blended map and the predictions of two passes, in float32
    return peak + 10 * 4 * channels * shape[2] * shape[3]


def vae_bytes(pipe, height: int, width: int, tiling: bool) -> int:
    """The bytes that encoding or decoding an image takes beside the weights."""
    vae, factor, dtype = pipe.vae, pipe.vae_scale_factor, working_dtype(pipe.vae)
    high, wide = (min(side, tile_of(vae)) if tiling else side for side in (height, width))
    shapes = {
        "decode": (1, vae.config.latent_channels, high // factor, wide // factor),
        "encode": (1, vae.config.get("in_channels", 3), high, wide),
    }
    peaks = [
        peak_bytes(vae, method, torch.empty(shape, dtype=dtype, device="meta"), return_dict=False, dtype=dtype)
        for method, shape in shapes.items()
    ]
    image = 3 * 4 * height * width
    return max(peaks) + (4 if tiling else 2) * image  # all tiles, which overlap, and what is put together from them


def choose(
    pipe,
    size: tuple[int, int],
    wanted: Savers,
    useless: Collection[str],
    conditions: Callable,
    device: torch.device,
    room: float,
    by_offload: float = 0,
) -> tuple[Savers, int | None]:
    """The savers for a stage and the bytes that it needs beside the loaded weights, None where that is unknown.

    Args:
        size: (height, width) in pixels. wanted: the savers asked for; one that is None is on only if the stage does not
            fit without it (tiles also if the VAE's attention would take most of the time).
        useless: savers that do nothing in this stage, whatever is asked for: they stay off.
        conditions: see unet_bytes. room: the bytes that it may take. by_offload: what offloading adds to them.
    Raises ValueError, with the numbers, where it does not fit.
    """
    asked = {name: value for name, value in asdict(wanted).items() if name not in useless}
    on = dict.fromkeys(SAVERS, False) | {name: bool(value) for name, value in asked.items()}
    undecided = [name for name, value in asked.items() if value is None]
    if "vae_tiling" in undecided:
        on["vae_tiling"] = tiles_are_faster(pipe.vae, *size)
    if is_offloaded(pipe):
        large = size[0] * size[1] > MANY_PIXELS
        return Savers(**on | dict.fromkeys(undecided, large) | {"offload": False}), None

    def unet():
        return unet_bytes(pipe, *size, Savers(**on), conditions)

    def vae():
        return vae_bytes(pipe, *size, on["vae_tiling"])

    needs = {"UNet": unet(), "VAE": vae()}
    for name in ("sequential_guidance", "chunked_feed_forward", "parked_residuals"):
        if needs["UNet"] > room and name in undecided:
            on[name] = True
            needs["UNet"] = unet()
    if needs["VAE"] > room and "vae_tiling" in undecided and not on["vae_tiling"]:
        on["vae_tiling"] = True
        needs["VAE"] = vae()
    if max(needs.values()) > room and "offload" in undecided and by_offload:
        on["offload"] = True
    if on["offload"]:
        room += by_offload
    if max(needs.values()) > room:
        numbers = ", ".join(f"the {part} {need / MIB:,.0f} MiB" for part, need in needs.items())
        off = [name for name, value in asked.items() if value is False]
        advice = f" or allow {', '.join(off)}" if off else ""
        raise ValueError(
            f"an image of {size[0]}x{size[1]} does not fit: beside the weights {numbers}"
            f"{Savers(**on).told() or ' (no savers)'}, of {room / MIB:,.0f} MiB that may be used on {device}: choose a "
            f"smaller size{advice}"
        )
    return Savers(**on), max(needs.values())
