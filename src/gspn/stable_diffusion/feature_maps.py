"""Feature maps before a UNet's self-attention, and how far a GSPN layer is from its attention on them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class FeatureMaps:
    """The inputs of one self-attention: `tokens`, a list of (b,N,C), and the (H, W) of each in `sizes`."""

    tokens: list[Tensor] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(len(t) for t in self.tokens)

    def split(self, share: float) -> tuple["FeatureMaps", "FeatureMaps"]:
        """Two parts, at least one map each: the last `share` of the maps, after the first ones."""
        singles = [(t[i : i + 1], size) for t, size in zip(self.tokens, self.sizes, strict=True) for i in range(len(t))]
        if len(singles) < 2:
            raise ValueError(f"at least two feature maps are needed, got {len(singles)}")
        cut = min(len(singles) - 1, max(1, round(len(singles) * (1 - share))))
        return tuple(
            FeatureMaps(*(list(part) for part in zip(*s, strict=True))) for s in (singles[:cut], singles[cut:])
        )


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
    size = {}

    def sized(name):
        def hook(transformer, args, kwargs):
            size[name] = tuple((args[0] if args else kwargs["hidden_states"]).shape[-2:])

        return hook

    def taken(name, transformer):
        def hook(attention, args, kwargs):
            x = args[0] if args else kwargs["hidden_states"]
            maps[name].tokens.append(x.detach().to(device, copy=True))
            maps[name].sizes.append(size[transformer])

        return hook

    hooks = []
    with swap.use("attention"), torch.no_grad():
        try:
            for transformer in {name.partition(".transformer_blocks.")[0] for name in maps}:
                module = swap.unet.get_submodule(transformer)
                hooks.append(module.register_forward_pre_hook(sized(transformer), with_kwargs=True))
            for name in maps:
                transformer = name.partition(".transformer_blocks.")[0]
                hook = taken(name, transformer)
                hooks.append(swap.attentions[name].register_forward_pre_hook(hook, with_kwargs=True))
            before = -1
            while (least := min(map(len, maps.values()))) < count:
                if least == before:
                    raise ValueError("run() did not run the UNet of this swap")
                before = least
                run()
        finally:
            for hook in hooks:
                hook.remove()
    return maps


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
