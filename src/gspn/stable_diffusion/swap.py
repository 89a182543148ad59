"""GSPN instead of a Stable Diffusion UNet's self-attention: `swap`, `restore`, and loading swapped layers.

A swap replaces each ``attn1`` of a diffusers UNet2DConditionModel and nothing else. The height and width of the feature
map are passed with each call: a hook on the transformer around the layers adds them to its blocks' arguments. So they
are right for every shape, also when gradient checkpointing runs a block again.
"""

import contextlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from gspn.stable_diffusion import file as swap_file
from gspn.stable_diffusion.feature_maps import rank
from gspn.stable_diffusion.fitting import fit
from gspn.stable_diffusion.init import initialize, stream_statistics
from gspn.stable_diffusion.keeping import Keep, check_count, is_count, kept_names, level_of
from gspn.stable_diffusion.layer import GSPNAttention, check_form, usual_proxy_dim
from gspn.stable_diffusion.swappable import (
    DTYPES,
    Attention,
    BasicTransformerBlock,
    Transformer2DModel,
    UNet2DConditionModel,
    check_free,
    check_linears,
    swappable,
    unet_of,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


_LOCK = threading.Lock()  # of all swaps, as one of each could not be pickled


# -- what a swap changes in a UNet --


def _give_size(transformer, args, kwargs):
    """Hook before a Transformer2DModel: adds the H and W of its map to the arguments for attentions."""
    shape = (args[0] if args else kwargs["hidden_states"]).shape
    size = {"map_size": (shape[-2], shape[-1])}
    index = 5  # of cross_attention_kwargs, if it is passed by position
    if len(args) > index:
        return (*args[:index], {**(args[index] or {}), **size}, *args[index + 1 :]), kwargs
    return args, {**kwargs, "cross_attention_kwargs": {**(kwargs.get("cross_attention_kwargs") or {}), **size}}


def _drop_size(attention, args, kwargs):
    """Hook before an attention of diffusers, which would warn about the argument."""
    kwargs.pop("map_size", None)
    return args, kwargs


def _refuse_saving(*args, **kwargs):
    raise ValueError(
        "this UNet's self-attention is swapped for GSPN, and diffusers would load the saved files with random "
        "attention. Save the swapped layers with Swap.save, and the UNet after gspn.restore"
    )


class Swap:
    """A UNet whose self-attention is swapped for GSPN, as :func:`gspn.swap` and :func:`gspn.load_swap` return it. As a
    context manager it restores the UNet at the end.

    Attributes:
        unet: the UNet.
        form, segment: of the layers.
        layers: the GSPN layers by the name of the attn1 that each replaces, in the order of the UNet.
        attentions: the replaced attentions, by the same names. Meanwhile they are not part of the UNet: its parameters
            and its state dict hold those of the layers.
        kept: the names of the attentions that were not replaced.
        sample_size: (H, W) of the UNet's input for which the layers were trained, where it is not the UNet's own; set
            it after training at another size, so that a file says it and :func:`gspn.adapt` goes by it. Else None.
        active: "gspn", "attention", or None once restored.
    """

    _apart: tuple = ()  # what set_apart set and has not ended; of the class, so that swaps pickled before have it

    def __init__(self, unet: UNet2DConditionModel, layers: dict[str, GSPNAttention], kept: Sequence[str] = ()):
        first = next(iter(layers.values()))
        self.kept = tuple(sorted(kept))
        self.sample_size: tuple[int, int] | None = None
        self.unet, self.layers, self.form, self.segment = unet, layers, first.form, first.segment
        self.attentions = {name: unet.get_submodule(name) for name in layers}
        self.active = "attention"
        self._hooks = []
        # The UNet's dtype when each layer or attention was last part of it.
        self._dtypes = {("gspn", name): _anchor(self._block(name)).dtype for name in layers}
        self.use("gspn")
        unet._gspn_swap = self

    def _block(self, name) -> BasicTransformerBlock:
        return self.unet.get_submodule(name.rpartition(".")[0])

    def use(self, which: str) -> contextlib.ExitStack:
        """Makes the UNet run the "gspn" layers or the "attention" they replaced; in a `with` statement, until its end.
        The modules put in take over the UNet's device and mode, and its dtype if that has changed."""
        if which not in ("gspn", "attention"):
            raise ValueError(f'which has to be "gspn" or "attention", got {which!r}')
        if self.active is None:
            raise ValueError("this swap was restored; gspn.swap makes another")
        before = self.active
        if which != before:
            self._check_in_place()
            self._put_in(which)
        stack = contextlib.ExitStack()
        stack.callback(self._back_to, before)
        return stack

    def _back_to(self, which):
        if self.active is not None:
            self.use(which)

    def _check_in_place(self):
        present = self.layers if self.active == "gspn" else self.attentions
        for name, module in present.items():
            found = getattr(self._block(name), "attn1", None)
            if found is not module:
                raise ValueError(f"{name} was replaced by a {type(found).__name__} since the swap; put it back first")
        check_free(self.unet)
        for name, module in present.items():
            check_linears(name, module)

    def _put_in(self, which):
        coming = self.layers if which == "gspn" else self.attentions
        for name, module in coming.items():  # before any replacement: the device may be full
            anchor = _anchor(self._block(name))
            # Follow only a change of the UNet's dtype: layers may differ on purpose, as float32 in training does.
            changed = anchor.dtype != self._dtypes[which, name] and anchor.dtype in DTYPES
            module.to(device=anchor.device, dtype=anchor.dtype if changed else None)
            self._dtypes[self.active, name] = anchor.dtype
        for name, module in coming.items():
            block = self._block(name)
            module.train(block.attn1.training)
            if module.get_processor() is not (processor := block.attn1.get_processor()):
                module.set_processor(processor)
            block.attn1 = module
        self.active = which
        while self._hooks:
            self._hooks.pop().remove()
        self.unet.__dict__.pop("save_pretrained", None)
        if which == "gspn":
            for module in self.unet.modules():
                if isinstance(module, Transformer2DModel):
                    self._hooks.append(module.register_forward_pre_hook(_give_size, with_kwargs=True))
                elif isinstance(module, BasicTransformerBlock):
                    for attention in (module.attn1, module.attn2):
                        if isinstance(attention, Attention):
                            self._hooks.append(attention.register_forward_pre_hook(_drop_size, with_kwargs=True))
            self.unet.save_pretrained = _refuse_saving

    def set_apart(self, apart: tuple[int, int]) -> contextlib.ExitStack:
        """Sets `apart` of all layers; in a `with` statement, until its end. What :func:`gspn.adapt` does. Of several
        that have not ended the one begun last counts, in whatever order they end."""
        entry = [apart]  # a list, which is told from others by its identity
        with _LOCK:
            self._apart = (*self._apart, entry)
            self._spread()
        stack = contextlib.ExitStack()
        stack.callback(self._forget_apart, entry)
        return stack

    def _forget_apart(self, entry):
        with _LOCK:
            self._apart = tuple(each for each in self._apart if each is not entry)
            self._spread()

    def _spread(self):
        (apart,) = self._apart[-1] if self._apart else [(1, 1)]
        for layer in self.layers.values():
            layer.apart = apart

    @property
    def adapted(self) -> bool:
        """Whether the layers are adapted to a size, be it one at which nothing changes."""
        return bool(self._apart)

    def keep(self, keep: str | Sequence[str]) -> None:
        """Puts some of the attentions back for good, and forgets their layers. `keep` is as in :func:`gspn.swap`, but
        for a number. Raises ValueError where it matches none of the layers or all."""
        if self.active is None:
            raise ValueError("this swap was restored; gspn.swap makes another")
        if is_count(keep):
            raise TypeError(
                f"Swap.keep takes no number, got {keep}: expected names, which gspn.stable_diffusion.rank gives"
            )
        names = kept_names(self.unet, list(self.layers), keep)
        with self.use("attention"):
            for name in names:
                del self.layers[name], self.attentions[name]
        self.kept = tuple(sorted({*self.kept, *names}))

    def restore(self) -> None:
        """Puts the attentions back for good; the UNet is what it was before the swap, bit for bit."""
        self.use("attention")
        self.active = None
        del self.unet._gspn_swap

    def __enter__(self) -> "Swap":
        return self

    def __exit__(self, *error) -> None:
        if self.active is not None:
            self.restore()

    def save(self, path: Path | str) -> Path:
        """Saves the layers alone, for :func:`gspn.load_swap`: one safetensors file whose header holds the config. An
        existing file is replaced at once. A `path` that does not end in .safetensors is a folder, and the file in it
        is ``gspn_swap.safetensors``. Returns the file's path. Raises ValueError where `sample_size` is neither None nor
        two whole numbers above 0."""
        for name, layer in self.layers.items():
            check_linears(name, layer)
        first = next(iter(self.layers.values()))
        options = {"form": self.form, "segment": self.segment, "gate_bias": first.gate_bias}
        # These are left out where they are not needed, as earlier versions do not read them.
        if any(layer.proxy_dim != usual_proxy_dim(layer.form, layer.channels) for layer in self.layers.values()):
            options["proxy_dim"] = first.proxy_dim
        options |= {"kept": list(self.kept)} if self.kept else {}
        size = own_size(self.unet) if self.sample_size is None else self.sample_size
        if size is not None:  # always said where it is known: another UNet may have another one
            swap_file.check_size(size, "sample_size")
            options |= {"sample_size": list(size)}
        return swap_file.write(path, self.unet, self.layers, options)

    def __repr__(self) -> str:
        extent = "global" if self.segment is None else f"segment={self.segment}"
        kept = f", kept={len(self.kept)}" if self.kept else ""
        return f"Swap({len(self.layers)} layers{kept}, form={self.form}, {extent}, active={self.active})"


def swap(
    target: "nn.Module | DiffusionPipeline",
    *,
    form: str = "pure",
    segment: int | None = None,
    init: str = "pretrained",
    proxy_dim: int | None = None,
    backend: str | None = None,
    keep: Keep = None,
    run: Callable[[], object] | None = None,
) -> Swap:
    """Replaces every self-attention (attn1) of a Stable Diffusion UNet by a GSPN layer, in place.

    Args:
        target: a pipeline of diffusers with a UNet (SD-1.5, SD-2, SDXL and their fine-tunes), or its
            UNet2DConditionModel.
        form: "pure" (the unit alone) or "qkv" (with Q, K, V); see :class:`gspn.GSPNAttention`.
        segment: lines between resets of the scan; None is global, at any size. The paper's authors train with 4.
        init: "pretrained" starts from the weights of the replaced attention, "random" uses only its shapes.
        proxy_dim: S, the width of each proxy. None is C // 8 in form "pure" and C // 32 in form "qkv", at least 1, as
            published.
        backend: "reference", "cpu", "triton", or None to pick by device.
        keep: the attentions that stay. One or several of: "lowest", the level with the smallest maps; "level:N", the
            maps that were halved N times; a name, a glob of names, or the name of a module around them. Or a whole
            number k: all layers are fitted (gspn.stable_diffusion.fit), and the k attentions stay whose replacement
            changes the UNet's output most (gspn.stable_diffusion.rank); the other layers stay fitted.
        run: for a number `keep`: runs the UNet on what it is to be good at, see gspn.stable_diffusion.fit.

    Returns:
        A :class:`Swap`; as a context manager it restores the UNet at the end, as :func:`gspn.restore` does.

    The new layers have dtype and device of the replaced attention. Cross-attention stays as it is, and with it
    IP-Adapter. Swap before you compile, offload sequentially or in groups, fuse projections, quantise, cast layer-wise
    or load LoRA adapters for attn1: a UNet with one of these cannot be swapped, nor restored, except that a compiled
    one can be restored. LoRA adapters loaded after the swap act on the layers' projections of the same names: to_q,
    to_k, to_v and to_out in form "qkv", to_out in form "pure", where diffusers warns about the others.

    Raises ValueError or TypeError where a swap is not possible, and leaves the target as it was.
    """
    check_form(form)
    if init not in ("pretrained", "random"):
        raise ValueError(f'init has to be "pretrained" or "random", got {init!r}')
    unet, blocks = swappable(target)
    if is_count(keep):
        check_count(keep, list(blocks))
        if run is None:
            raise ValueError(f"keep={keep} compares the layers, which needs run: a function that runs the UNet")
    elif run is not None:
        raise ValueError(f"run is for a number of attentions to keep, got keep={keep!r}")
    kept = () if is_count(keep) else kept_names(unet, list(blocks), keep)
    options = {"form": form, "segment": segment, "proxy_dim": proxy_dim, "backend": backend}
    replaced = {name: block for name, block in blocks.items() if name not in kept}
    swapped = Swap(unet, _new_layers(unet, replaced, init == "pretrained", options), kept)
    if is_count(keep):
        try:
            fit(swapped, run)
            swapped.keep(list(rank(swapped, run))[:keep])
        except BaseException:
            swapped.restore()
            raise
    return swapped


@torch.inference_mode(False)  # else they could never be trained
def _new_layers(unet, blocks, pretrained, options) -> dict[str, GSPNAttention]:
    """A layer for the attn1 of each block."""
    layers, before = {}, {}
    for name, block in blocks.items():
        attention, around = block.attn1, name.partition(".transformer_blocks.")[0]
        weight = attention.to_q.weight
        with torch.device(weight.device):
            layer = GSPNAttention(weight.shape[1], **options, **_options(attention))
        if pretrained and not weight.is_meta:
            norm = block.norm1 if isinstance(block.norm1, nn.LayerNorm) else None
            if around not in before:
                before[around] = stream_statistics(unet.get_submodule(around))
            initialize(layer.float(), attention, norm, _native_size(unet, name), before[around])  # whatever the default
        layers[name] = layer.to(weight.dtype).train(attention.training)
    return layers


def restore(target: "nn.Module | DiffusionPipeline") -> None:
    """Undoes :func:`gspn.swap` in a pipeline or UNet, bit for bit. Raises ValueError if nothing is swapped."""
    unet = unet_of(target)
    if "_gspn_swap" not in unet.__dict__:
        raise ValueError("this UNet is not swapped: there is nothing to restore")
    unet._gspn_swap.restore()


@torch.inference_mode(False)  # as for _new_layers
def load_swap(
    target: "nn.Module | DiffusionPipeline",
    path: Path | str,
    *,
    checkpoint: str | None = None,
    backend: str | None = None,
) -> Swap:
    """Swaps the self-attention of `target`, a pipeline or UNet, for layers saved by :meth:`Swap.save`.

    Args:
        target, backend: as in :func:`gspn.swap`.
        path: the file, or the folder with ``gspn_swap.safetensors``, such as a run of `gspn distill`.
        checkpoint: of such a run: "last", or one that --keep-every kept, such as "epoch-0003". None is the best epoch.

    Raises FileNotFoundError, or ValueError for a file that is damaged, is something else or belongs to another base
    model; the target is left as it was.
    """
    unet, blocks = swappable(target)
    channels = {name: block.attn1.to_q.weight.shape[1] for name, block in blocks.items()}
    config, states = swap_file.read(path, unet, channels)
    if checkpoint is not None:
        states = swap_file.read_checkpoint(path, checkpoint, list(states))
    form = {key: config[key] for key in ("form", "segment", "gate_bias")} | {"proxy_dim": config.get("proxy_dim")}
    layers = {}
    for name in states:
        block, weight = blocks[name], blocks[name].attn1.to_q.weight
        with torch.device("meta"):
            layer = GSPNAttention(channels[name], backend=backend, **form, **_options(block.attn1))
        state = {key: value.to(weight.device, weight.dtype) for key, value in states[name].items()}
        try:
            layer.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{path} does not hold the layer {name} of its config: {error}") from error
        layers[name] = layer.train(block.attn1.training)
    swapped = Swap(unet, layers, [name for name in blocks if name not in states])
    trained = tuple(config.get("sample_size", ()))
    if trained and trained != own_size(unet):
        swapped.sample_size = trained
    return swapped


def trained_size(unet: nn.Module) -> tuple[int, int] | None:
    """(H, W) of the input for which a UNet, or the layers swapped into it, were trained; None where neither says.
    Raises ValueError where `sample_size` of the swap is no size."""
    swapped = getattr(unet, "_gspn_swap", None)  # of a compiled UNet, too
    if swapped is None or swapped.sample_size is None:
        return own_size(unet)
    swap_file.check_size(swapped.sample_size, "sample_size of the Swap")
    return tuple(swapped.sample_size)


def own_size(unet: nn.Module) -> tuple[int, int] | None:
    """(H, W) of the input for which the UNet was trained; None where its config does not say."""
    size = unet.config.sample_size
    return size and ((size, size) if isinstance(size, int) else tuple(size))


def _native_size(unet, name) -> tuple[int, int]:
    """H and W of the map at the attention `name` for an input of the UNet's own sample size (64 if it has none)."""
    return tuple(max(1, -(-n // 2 ** level_of(unet, name))) for n in own_size(unet) or (64, 64))


def _options(attention) -> dict:
    out, dropout = attention.to_out
    return {"qkv_bias": attention.to_q.bias is not None, "out_bias": out.bias is not None, "dropout": dropout.p}


def _anchor(block) -> nn.Parameter:
    """A parameter of the block that a swap does not exchange: it shows the UNet's device and dtype."""
    return next(p for name, p in block.named_parameters() if not name.startswith("attn1."))
