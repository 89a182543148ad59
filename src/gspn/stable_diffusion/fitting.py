"""The layer-wise fit: each swapped layer learns its attention's output on feature maps of the model, before any
distillation."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from gspn.models.latents import is_whole
from gspn.stable_diffusion.feature_maps import FeatureMaps, check_swap, collect, relative_error


def fit(
    swap,
    run: Callable[[], object],
    *,
    maps: int = 256,
    steps: int = 200,
    batch_size: int = 8,
    lr: float = 1e-3,
    memory_mib: int = 4096,
    seed: int = 0,
    progress: Callable[[str, float, float], None] | None = None,
) -> dict[str, tuple[float, float]]:
    """Fits each layer of a :class:`gspn.Swap` to the output of the attention that it replaced, on feature maps of the
    UNet with attention: to_out by least squares, then all by AdamW on the squared error, to_out again.

    Args:
        run: see `collect`.
        maps: feature maps of each layer, of which an eighth is held out, drawn from all of them.
        steps, batch_size, lr: of AdamW; the learning rate falls to 0 along a cosine.
        memory_mib: for maps and outputs in the CPU's memory;
            the layers are fitted in groups that stay below it, one by one if need be.
        seed: of the order of the maps.
        progress: called after each layer with its name and the errors.

    Returns the relative error on the held-out maps (see `relative_error`), before and after, by the layer's name. A
    layer that the fit would make worse on them keeps its weights. Computes in float32, also inside autocast; the layers
    keep their dtype. After an error or an interrupt each layer has the best weights that were found so far.

    Raises TypeError for something else than a Swap and for numbers that are not whole; ValueError for numbers that are
    too small, in inference mode, where run() does not run the UNet, and where an attention or a layer is not finite;
    the layers before it are fitted then.
    """
    check_swap(swap, run)
    for name, value, least in (("maps", maps, 2), ("steps", steps, 0), ("batch_size", batch_size, 1)):
        if not is_whole(value):
            raise TypeError(f"{name} has to be a whole number, got {value!r}")
        if value < least:
            raise ValueError(f"{name} has to be at least {least}, got {value}")
    if torch.is_inference_mode_enabled():
        raise ValueError("fit trains the layers, which torch.inference_mode() does not allow: call it outside")
    errors = {}
    waiting = list(swap.layers)
    shapes = collect(swap, run, 1, device="meta")
    while waiting:
        group = []
        while waiting and (not group or _bytes_of(shapes, [*group, waiting[0]], maps) <= memory_mib * 2**20):
            group.append(waiting.pop(0))
        collected = collect(swap, run, maps, group)
        for name in group:
            with torch.autocast(next(swap.layers[name].parameters()).device.type, enabled=False):
                errors[name] = _fit_layer(swap, name, collected.pop(name), steps, batch_size, lr, seed)
            if progress is not None:
                progress(name, *errors[name])
    return errors


def _bytes_of(shapes: dict[str, FeatureMaps], names: Sequence[str], count: int) -> float:
    """The bytes of at least `count` feature maps of each layer, in whole runs, and of the attention's output on the
    maps of one layer at a time."""
    maps = {}
    for name in names:
        of_one_run = len(shapes[name])
        maps[name] = sum(t.numel() for t in shapes[name].tokens) * -(-count // of_one_run)
    outputs = max(maps.values()) * torch.float32.itemsize
    return sum(maps[name] * shapes[name].tokens[0].element_size() for name in names) + outputs


@torch.enable_grad()
def _fit_layer(swap, name, maps, steps, batch_size, lr, seed):
    layer, attention = swap.layers[name], swap.attentions[name]
    device, dtype = next(layer.parameters()).device, next(layer.parameters()).dtype
    attention_dtype = next(attention.parameters()).dtype
    training, held = maps.split(1 / 8)
    wanted, state = [(p, p.requires_grad) for p in layer.parameters()], _copy(layer)
    try:
        layer.float().requires_grad_(True)
        with torch.no_grad():
            both = [
                [attention(t.to(device, attention_dtype)).float().cpu() for t in part.tokens]
                for part in (training, held)
            ]
        if not all(bool(target.isfinite().all()) for targets in both for target in targets):
            hint = ": it overflows in float16, load it in bfloat16" if attention_dtype == torch.float16 else ""
            raise ValueError(f"the output of the attention {name} is not finite on feature maps of the UNet{hint}")
        targets = both[0]
        before = best = relative_error(layer, attention, held)
        if not math.isfinite(before):
            raise ValueError(f"the output of the layer for {name} is not finite on feature maps of the UNet")

        def keep_if_better():
            nonlocal best, state
            error = relative_error(layer, attention, held)
            if error < best:  # false for NaN
                best, state = error, _copy(layer)

        _solve_out(layer, training, targets, device)
        keep_if_better()
        layer.load_state_dict(state)
        optimizer = torch.optim.AdamW(layer.parameters(), lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
        order = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            chosen = torch.randint(len(training), (batch_size,), generator=order).tolist()
            loss = 0.0
            for size in {training.sizes[i] for i in chosen}:  # a batch has maps of one size
                of_size = [i for i in chosen if training.sizes[i] == size]
                x = torch.cat([training.tokens[i] for i in of_size]).to(device, torch.float32)
                y = torch.cat([targets[i] for i in of_size]).to(device)
                loss = loss + (layer(x, map_size=size) - y).square().mean() * (len(of_size) / batch_size)
            optimizer.zero_grad()
            (loss / max(_power(targets, chosen), 1e-12)).backward()
            torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        keep_if_better()
        _solve_out(layer, training, targets, device)
        keep_if_better()
    finally:
        layer.load_state_dict(state)
        layer.to(dtype)
        torch.clear_autocast_cache()  # a surrounding autocast would go on with its casts of the old weights
        for parameter, wants in wanted:
            parameter.requires_grad_(wants)
            parameter.grad = None
    return before, best


def _copy(layer):
    return {key: value.clone() for key, value in layer.state_dict().items()}


def _power(targets, chosen):
    return sum(targets[i].square().mean().item() for i in chosen) / len(chosen)


@torch.no_grad()
def _solve_out(layer, maps, targets, device, ridge: float = 1e-4):
    """to_out by least squares: the best linear map from the scan's output to the attention's."""
    out = layer.to_out[0]
    found = []
    hook = out.register_forward_pre_hook(lambda module, args: found.append(args[0].detach()))
    gram = cross = 0.0
    try:
        for tokens, size, target in zip(maps.tokens, maps.sizes, targets, strict=True):
            layer(tokens.to(device, torch.float32), map_size=size)
            z = found.pop().flatten(0, 1).double()
            z = z if out.bias is None else F.pad(z, (0, 1), value=1.0)
            gram = gram + z.T @ z
            cross = cross + z.T @ target.to(device).flatten(0, 1).double()
    finally:
        hook.remove()
    gram.diagonal().add_(ridge * gram.diagonal().mean().clamp(min=1e-12))
    solution = torch.linalg.solve(gram, cross).float()
    out.weight.copy_(solution[: out.in_features].T)
    if out.bias is not None:
        out.bias.copy_(solution[-1])
