"""Feature maps before a UNet's self-attention, how far a GSPN layer is from its attention on them, and how much the
UNet's output changes by it."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only


@dataclass
class FeatureMaps:
    """The inputs of one self-attention: `tokens`, a list of (b,N,C), and the (H, W) of each in `sizes`."""

    tokens: list[Tensor] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(len(t) for t in self.tokens)

    def split(self, share: float) -> tuple["FeatureMaps", "FeatureMaps"]:
        """Two parts, at least one map each. The second holds a `share` of the maps, drawn from all calls of the UNet,
        always in the same way. The i-th maps of both halves of a batch stay together: with guidance they are alike."""
        units = []
        for tokens, size in zip(self.tokens, self.sizes, strict=True):
            half = len(tokens) // 2 if len(tokens) % 2 == 0 else len(tokens)
            units += [[(one, size) for one in tokens[i::half].split(1)] for i in range(half)]
        if len(self) < 2:
            raise ValueError(f"at least two feature maps are needed, got {len(self)}")
        if len(units) == 1:
            units = [[one] for one in units[0]]
        order = torch.randperm(len(units), generator=torch.Generator().manual_seed(0)).tolist()
        held = set(order[: min(len(units) - 1, max(1, round(len(units) * share)))])
        parts = [[unit for i, unit in enumerate(units) if (i in held) == second] for second in (False, True)]
        return tuple(FeatureMaps(*map(list, zip(*chain(*part), strict=True))) for part in parts)


def collect(
    swap, run: Callable[[], object], count: int = 256, names: Iterable[str] | None = None, device: str = "cpu"
) -> dict:
    """The inputs of the self-attentions `names` (all by default) of a :class:`gspn.Swap`, while its UNet runs with
    attention: by name a :class:`FeatureMaps` of at least `count` maps, on `device`, in the UNet's dtype.

    Args:
        run: called without arguments until there are enough; each call runs the UNet at least once.
        device: "meta" keeps only the maps' shapes.
    """
    maps = {name: FeatureMaps() for name in (swap.attentions if names is None else names)}

    def taken(name, size):
        def hook(attention, args, kwargs):
            x = args[0] if args else kwargs["hidden_states"]
            maps[name].tokens.append(x.detach().to(device, copy=True))
            maps[name].sizes.append(size())

        return hook

    with swap.use("attention"), torch.no_grad(), map_sizes(swap, maps) as sizes:
        hooks = [
            swap.attentions[name].register_forward_pre_hook(taken(name, sizes[name]), with_kwargs=True) for name in maps
        ]
        try:
            _until(count, run, lambda: min(map(len, maps.values())))
        finally:
            for hook in hooks:
                hook.remove()
    return maps


@contextmanager
def map_sizes(swap, names: Iterable[str]) -> Iterator[dict[str, Callable[[], tuple[int, int]]]]:
    """In the block, by the name of each attention: what returns the (H, W) of the map that is there now."""
    size = {}

    def sized(name):
        def hook(transformer, args, kwargs):
            size[name] = tuple((args[0] if args else kwargs["hidden_states"]).shape[-2:])

        return hook

    around = {name: name.partition(".transformer_blocks.")[0] for name in names}
    hooks = []
    try:
        for transformer in dict.fromkeys(around.values()):
            module = swap.unet.get_submodule(transformer)
            hooks.append(module.register_forward_pre_hook(sized(transformer), with_kwargs=True))
        yield {name: partial(size.__getitem__, transformer) for name, transformer in around.items()}
    finally:
        for hook in hooks:
            hook.remove()


def _until(count, run, done):
    """Calls run() until done() gives `count`."""
    before = -1
    while (least := done()) < count:
        if least == before:
            raise ValueError("run() did not run the UNet of this swap")
        before = least
        run()


def check_swap(swap, run) -> None:
    """Raises TypeError unless `swap` is a Swap and `run` can be called."""
    if not hasattr(swap, "attentions"):
        raise TypeError(f"expected a Swap, as gspn.swap and gspn.load_swap return it, got a {type(swap).__name__}")
    if not callable(run):
        raise TypeError(f"run has to be a function that runs the UNet, got {run!r}")


@torch.no_grad()
def rank(swap, run: Callable[[], object], *, maps: int = 16) -> dict[str, float]:
    """The error that the replacement of each self-attention causes, the largest first: the relative error of the UNet's
    output with this one layer of a :class:`gspn.Swap` and the attention everywhere else, ``norm(y - y') / norm(y)``.

    Args:
        run: called without arguments until there are enough; each call runs the UNet at least once.
        maps: at least so many inputs of the UNet are compared, 1 or more.

    The layers are judged as they are: `fit` them first to know what is lost after training. The UNet runs again on
    copies of the inputs that it got in run(), under the autocast of the caller; nothing else may use it meanwhile.
    Raises TypeError for something else than a Swap; ValueError where run() does not run the UNet, or where an output is
    not finite, which cannot be ranked.
    """
    check_swap(swap, run)
    if maps < 1:
        raise ValueError(f"maps has to be at least 1, got {maps}")
    inputs, unet, count = [], swap.unet, 0

    def seen(module, args, kwargs):
        nonlocal count
        inputs.append(tree_map_only(Tensor, Tensor.clone, (args, kwargs)))  # run() may write into its own tensors
        count += len(args[0] if args else kwargs["sample"])

    def again(given):
        args, kwargs = tree_map(lambda leaf: leaf, given)  # diffusers empties a list of a T2I-Adapter's residuals
        return _sample(unet(*args, **kwargs)).float()

    with swap.use("attention"), map_sizes(swap, swap.layers) as sizes:
        hook = unet.register_forward_pre_hook(seen, with_kwargs=True)
        try:
            _until(maps, run, lambda: count)
        finally:
            hook.remove()
        outputs = [again(given) for given in inputs]
        whole = sum(output.square().sum().item() for output in outputs)
        errors = {}
        for name, layer in swap.layers.items():
            replaced = partial(_instead, layer, sizes[name])
            hook = swap.attentions[name].register_forward_hook(replaced, with_kwargs=True)
            try:
                pairs = zip(inputs, outputs, strict=True)
                wrong = sum((again(given) - output).square().sum().item() for given, output in pairs)
            finally:
                hook.remove()
            errors[name] = (wrong / max(whole, 1e-30)) ** 0.5
            if not math.isfinite(errors[name]):
                raise ValueError(f"the UNet's output is not finite with {name} replaced, or with attention alone")
    return dict(sorted(errors.items(), key=lambda item: -item[1]))


def _sample(output):
    return output[0] if isinstance(output, tuple) else output.sample


def _instead(layer, size, attention, args, kwargs, output):
    """Hook of an attention: the layer's output in the place of its own."""
    x = args[0] if args else kwargs["hidden_states"]
    return layer(x.to(next(layer.parameters()).dtype), map_size=size()).to(output.dtype)


@torch.no_grad()
def relative_error(layer: nn.Module, attention: nn.Module, maps: FeatureMaps) -> float:
    """|layer(x) - attention(x)| / |attention(x)|, norms over all maps; a zero output has 1. In float32."""
    device, wrong, whole = next(layer.parameters()).device, 0.0, 0.0
    dtypes = [next(module.parameters()).dtype for module in (layer, attention)]
    for tokens, size in zip(maps.tokens, maps.sizes, strict=True):
        x = tokens.to(device)
        target = attention(x.to(dtypes[1])).float()
        wrong += (layer(x.to(dtypes[0]), map_size=size).float() - target).square().sum().item()
        whole += target.square().sum().item()
    return (wrong / max(whole, 1e-30)) ** 0.5
