"""Savers of memory for large images, each with its own switch."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields

from gspn.models.pipeline import vae_factor

try:
    from diffusers.models.attention import BasicTransformerBlock
except ImportError as error:
    raise ImportError(f'high resolution needs diffusers ({error}): pip install "gspn[diffusion]"') from error

TILE = 512  # pixels, the smallest side of the VAE's tiles: in smaller ones its norms see too little of the image
TILING = ("use_tiling", "tile_sample_min_size", "tile_latent_min_size")  # what a VAE that has it is set by
CHUNK = 2**14  # tokens in one piece of a feed-forward layer


@dataclass(frozen=True)
class Savers:
    """Which savers of memory are on: True or False; in what a call asks for, None leaves one to the plan.

    Attributes:
        vae_tiling: the VAE works on overlapping tiles. The only one that changes the image, slightly.
        sequential_guidance: the halves of guidance run one after the other, not in one batch.
        chunked_feed_forward: the feed-forward layers of the UNet work on pieces of 16,384 tokens at most.
        parked_residuals: the residuals of the UNet's first half wait for the second half in the CPU's memory.
        offload: the pipeline's models are on the GPU only while they work (``enable_model_cpu_offload``).

    Raises TypeError for any other value.
    """

    vae_tiling: bool | None = False
    sequential_guidance: bool | None = False
    chunked_feed_forward: bool | None = False
    parked_residuals: bool | None = False
    offload: bool | None = False

    def __post_init__(self):
        for name, value in asdict(self).items():
            if value is not None and not isinstance(value, bool):
                raise TypeError(f"{name} has to be True, False or None, got {value!r}")

    def told(self) -> str:
        """The names of those that are on, in parentheses."""
        names = [f.name.replace("_", " ") for f in fields(self) if getattr(self, f.name)]
        return f" ({', '.join(names)})" if names else ""


SAVERS = tuple(field.name for field in fields(Savers))


@contextmanager
def saving(pipe, savers: Savers) -> Iterator[None]:
    """In the block, the pipeline works with `savers`; afterwards it is as before. Offloading, and running the halves of
    guidance one after the other, is left to the caller."""
    with ExitStack() as stack:
        if savers.vae_tiling:
            stack.enter_context(_tiled(pipe.vae))
        if savers.chunked_feed_forward:
            stack.enter_context(_chunked(pipe.unet))
        if savers.parked_residuals:
            stack.enter_context(_parked(pipe.unet))
        yield


def has_tiling(vae) -> bool:
    """Whether the VAE can work on tiles; AsymmetricAutoencoderKL, for one, cannot."""
    return all(hasattr(vae, name) for name in TILING)


@contextmanager
def _tiled(vae):
    before = {name: getattr(vae, name) for name in TILING}
    vae.enable_tiling()
    vae.tile_sample_min_size = tile_of(vae)
    vae.tile_latent_min_size = tile_of(vae) // vae_factor(vae)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)


def tile_of(vae) -> int:
    """The side of the VAE's tiles in pixels."""
    size = vae.config.get("sample_size") or TILE
    return max(TILE, size if isinstance(size, int) else max(size))


@contextmanager
def _chunked(unet):
    blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
    before = [(block._chunk_size, block._chunk_dim) for block in blocks]
    hooks = [block.register_forward_pre_hook(_set_chunk, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for block, hook, (size, dim) in zip(blocks, hooks, before, strict=True):
            hook.remove()
            block.set_chunk_feed_forward(size, dim)


def _set_chunk(block, args, kwargs):
    tokens = (args[0] if args else kwargs["hidden_states"]).shape[1]
    pieces = -(-tokens // CHUNK)
    while tokens % pieces:  # diffusers wants pieces of one size
        pieces += 1
    block.set_chunk_feed_forward(tokens // pieces if pieces > 1 else None, 1)


@contextmanager
def _parked(unet):
    hooks = [block.register_forward_hook(_park) for block in unet.down_blocks]
    hooks += [block.register_forward_pre_hook(_fetch, with_kwargs=True) for block in unet.up_blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _park(block, args, output):
    sample, kept = output
    return sample, tuple(_away(residual) for residual in kept)


def _fetch(block, args, kwargs):
    kept = _Parked(kwargs["res_hidden_states_tuple"])
    kept.device = kwargs["hidden_states"].device
    return args, kwargs | {"res_hidden_states_tuple": kept}


class _Parked(tuple):
    """Residuals that come back from the CPU one by one, when the block reads them."""

    def __getitem__(self, index):
        found = super().__getitem__(index)
        if not isinstance(index, slice):
            return _back(found, self.device)
        rest = _Parked(found)
        rest.device = self.device
        return rest


# An estimate runs on "meta" tensors, which cannot go to the CPU: an expanded one, which takes no memory, replaces them.
def _away(tensor):
    return tensor.new_empty(()).expand(tensor.shape) if tensor.is_meta else tensor.to("cpu")


def _back(tensor, device):
    return tensor.contiguous() if tensor.is_meta else tensor.to(device)
