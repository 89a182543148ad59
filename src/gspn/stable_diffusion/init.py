"""Where a swapped layer starts: from the weights of the attention it replaces, then fitted to that attention's own
output on feature maps, layer by layer, before any distillation.

The scan is kin to attention: both are gated sums over places. With constant gates and even propagation weights it is an
average over the places that it reaches, as attention is where all scores are equal. `initialize` sets just that up, in
closed form and from weights alone; which places count more is what training adds, from Q and K: the gates read a little
of them, in a way that cancels at first.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspn.ops import DIRECTIONS

SLIGHT = 0.3  # of a gate follows what its proxy has of Q and K
DOUBT = 1e-3  # in a predicted covariance, as a part of the mean variance: gates are to be nearly constant in truth


@torch.no_grad()
def initialize(
    layer: nn.Module,
    attention: nn.Module,
    norm: nn.LayerNorm | None,
    size: tuple[int, int],
    before: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Sets the weights of `layer` so that its output, in the mean over a map, is that of `attention` were all its
    scores equal; that can still be further from the attention than no output where places have little in common.

        qkv:   x + to_v x = W_v x, and likewise K and Q; gates constant; to_out = W_out
        pure:  to_out = W_out W_v; gates read the direction p in which x is most nearly constant, the least squares
               solution of p . x = 1 for x of mean m and covariance S:  p = S^-1 m / (1 + m . S^-1 m)

    Args:
        layer: a :class:`gspn.GSPNAttention`, in place, in float32. attention: diffusers' Attention, of any dtype.
        norm: the LayerNorm before it, whose scale and shift tell, with `before`, mean and covariance of x; None is one
            without scale and shift.
        size: H and W of the map at the UNet's own size, over which a global scan is to average; segments do not need
            it.
        before: mean (C,) and covariance (C,C) of what comes before the norm, as `stream_statistics` predicts them; None
            takes 0 and 1, with which only the norm's shift is constant, and without shift the pure form starts near
            zero output.

    The proxies of Q and K are the directions in which both are largest, within each head. Of each gate a part SLIGHT
    follows one of them, in vertical directions with the other sign: where nothing did, the proxies would learn nothing
    until the projections from them have grown, and as all directions give about the same average, it cancels in their
    sum. Source: ours; arXiv 2501.12381 names the kinship and gives no formula.
    """
    w = {name: getattr(attention, f"to_{name}").weight.float() for name in "qkv"}
    out, v_bias = attention.to_out[0], attention.to_v.bias
    scale, shift = _affine(norm, w["v"])
    mean, covariance = _normalised(before, scale, shift)
    # A direction that has gone through n of its N lines gives n / N times the average; in the mean over the map that is
    # a little more than a half. The merger takes the mean over the directions.
    shares = [_mean_lines(n, layer.segment) / (n if layer.segment is None else min(n, layer.segment)) for n in size]
    gate = (len(shares) / sum(shares)) ** 0.5
    if layer.form == "pure":
        _initialize_pure(layer.gspn, w, scale, mean, covariance, gate, attention.heads)
        layer.to_out[0].weight.copy_(out.weight.float() @ w["v"])
        if layer.to_out[0].bias is not None:
            passed = 0 if v_bias is None else out.weight.float() @ v_bias.float()
            layer.to_out[0].bias.copy_(out.bias.float() + passed)
        return
    eye = torch.eye(layer.channels, dtype=torch.float32, device=out.weight.device)
    for name, weight in w.items():
        linear, source = getattr(layer, f"to_{name}"), getattr(attention, f"to_{name}")
        linear.weight.copy_(weight - eye)
        if linear.bias is not None:
            linear.bias.copy_(source.bias)
    directions = _shared_directions(w["q"], w["k"], scale, attention.heads, layer.proxy_dim)
    for name, source in (("input", "k"), ("output", "q")):
        proxy = directions / _deviation(directions @ w[source], covariance)
        getattr(layer, f"{name}_proxy").weight.copy_(proxy)
        if layer.gate_bias:
            projection, bias = getattr(layer, f"{name}_proj"), getattr(layer, f"{name}_bias")
            _read_slightly(projection.zero_(), gate)
            shared = getattr(layer, f"to_{source}").bias
            middle = w[source] @ mean if shared is None else w[source] @ mean + shared
            bias.copy_(gate - projection @ (proxy @ middle))
    for name in ("weight", "skip"):
        if layer.gate_bias:
            getattr(layer, f"{name}_proj").zero_()
            getattr(layer, f"{name}_bias").zero_()
    layer.to_out[0].load_state_dict(out.state_dict())


def _initialize_pure(unit, w, scale, mean, covariance, gate, heads):
    # The smaller the less there is that is constant.
    spread = torch.linalg.solve(covariance, mean)
    constant = spread / (1 + mean @ spread)
    others = _shared_directions(w["q"], w["k"], scale, heads, unit.proxy_dim - 1)
    in_input = others @ (w["q"] + w["k"])
    in_input -= (in_input @ mean)[:, None] * constant  # what it has of the constant
    in_input /= _deviation(in_input, covariance)
    unit.proxy_proj.weight.copy_(torch.cat([constant[None], in_input])[..., None, None])
    for name in ("weight_proj", "input_proj", "output_proj", "skip_proj"):
        getattr(unit, name).zero_()
    for turn, projection in enumerate((unit.input_proj, unit.output_proj)):
        projection[..., 0] = gate
        # of another place in either gate: the product of what they read is to have no mean
        _read_slightly(projection, gate, first=1, turn=turn)


def _read_slightly(projection, gate, first=0, turn=0):
    """Lets the gate of each channel read a little of one of the proxy's places from `first` on, each place in turn. As
    this is the only reading where nothing is constant, it also keeps both gates from 0, where none passes a gradient.
    """
    channels, count = torch.arange(projection.shape[1], device=projection.device), projection.shape[2] - first
    if count > 0:
        signs = projection.new_tensor([1.0 if name in ("left", "right") else -1.0 for name in DIRECTIONS])
        projection[:, channels, first + (channels + turn) % count] = SLIGHT * gate * signs[:, None]


@torch.no_grad()
def stream_statistics(transformer: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean (C,) and covariance (C,C), in float32, of the tokens with which the blocks of a Transformer2DModel begin,
    predicted from its weights: a GroupNorm gives channels of mean b and deviation g, its shift and scale, taken as
    independent; the projection makes W b + c and W diag(g^2) W^T of them. What blocks add to the tokens is not in it.
    """
    weight, bias = transformer.proj_in.weight, transformer.proj_in.bias
    if not weight.is_floating_point():
        raise ValueError(
            f'proj_in has weights of {weight.dtype}: swap before they are quantised, or with init="random"'
        )
    weight = weight.float().flatten(1)
    scale, shift = _affine(transformer.norm, weight)
    mean = weight @ shift if bias is None else weight @ shift + bias.float()
    return mean, (weight * scale.square()) @ weight.T


def _normalised(before, scale, shift):
    """Mean and covariance of what a LayerNorm of that scale and shift makes of tokens with those of `before`."""
    eye = torch.eye(len(scale), dtype=scale.dtype, device=scale.device)
    mean, covariance = before or (torch.zeros_like(scale), eye)
    mean = mean - mean.mean()  # over the channels, as a LayerNorm does
    covariance = covariance - covariance.mean(0)
    covariance = covariance - covariance.mean(1, keepdim=True)
    variance = (mean.square().mean() + covariance.diagonal().mean()).clamp(min=1e-12)
    covariance = scale[:, None] * covariance * scale / variance
    doubt = DOUBT * covariance.diagonal().mean().clamp(min=1e-6)
    return scale * mean / variance.sqrt() + shift, covariance + doubt * eye


def _affine(norm, like) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) of a norm."""
    ones = torch.ones(like.shape[1], dtype=torch.float32, device=like.device)
    if norm is None or norm.weight is None:
        return ones, torch.zeros_like(ones)
    shift = torch.zeros_like(ones) if norm.bias is None else norm.bias.float()
    return norm.weight.float(), shift


def _deviation(directions, covariance):
    """Standard deviations (n,1) along directions (n,C)."""
    return (directions @ covariance * directions).sum(1, keepdim=True).sqrt().clamp(min=1e-6)


def _mean_lines(length: int, segment: int | None) -> float:
    """How many lines, its own among them, a place sees in one direction, averaged over `length` lines."""
    reach = length if segment is None else min(segment, length)
    whole, rest = divmod(length, reach)
    return (whole * reach * (reach + 1) + rest * (rest + 1)) / (2 * length)


def _shared_directions(q: Tensor, k: Tensor, scale: Tensor, heads: int, count: int) -> Tensor:
    """`count` orthonormal directions (count,C) in the space of Q and K, each within one head: those in which the
    product of what Q and K have of variance is largest, for inputs of standard deviation `scale`."""
    found = []
    width = q.shape[0] // heads
    for head in range(heads):
        rows = slice(head * width, (head + 1) * width)
        of_q, of_k = ((m[rows] * scale) @ (m[rows] * scale).T for m in (q, k))
        both = of_q / of_q.trace().clamp(min=1e-12) + of_k / of_k.trace().clamp(min=1e-12)
        vectors = torch.linalg.eigh(both).eigenvectors.T
        # either sign solves it, and which one comes depends on the library: the largest component is positive
        vectors = vectors * vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()
        power = (vectors @ of_q * vectors).sum(1) * (vectors @ of_k * vectors).sum(1)
        found += [(power[i].item(), rows, vectors[i]) for i in range(width)]
    found.sort(key=lambda entry: entry[0], reverse=True)
    directions = q.new_zeros(count, q.shape[0])
    for row, (_, rows, vector) in zip(directions, found, strict=False):
        row[rows] = vector
    return directions


# -- feature maps, and how far a layer is from its attention on them --


@dataclass
class FeatureMaps:
    """What came before one self-attention: `tokens`, a list of (b,N,C), and to each its (H, W) in `sizes`."""

    tokens: list[Tensor] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(len(t) for t in self.tokens)

    def split(self, share: float) -> tuple["FeatureMaps", "FeatureMaps"]:
        """The first maps and the last `share` of them, at least one each."""
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
    """Feature maps before the self-attentions `names` (all by default) of a :class:`gspn.Swap`, while its UNet runs
    with attention: by name a :class:`FeatureMaps` of at least `count` maps, on `device`, in the UNet's dtype.

    Args:
        run: called without arguments until there are enough; each call runs the UNet at least once.
        device: "meta" keeps the maps' shapes alone.
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
    """|layer(x) - attention(x)| / |attention(x)|, norms over all maps: 1 is what a zero output has. In float32."""
    device, wrong, whole = next(layer.parameters()).device, 0.0, 0.0
    dtypes = [next(module.parameters()).dtype for module in (layer, attention)]
    for tokens, size in zip(maps.tokens, maps.sizes, strict=True):
        x = tokens.to(device)
        target = attention(x.to(dtypes[1])).float()
        wrong += (layer(x.to(dtypes[0]), map_size=size).float() - target).square().sum().item()
        whole += target.square().sum().item()
    return (wrong / max(whole, 1e-30)) ** 0.5


# -- the layer-wise fit --


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
        run: see `collect`. maps: feature maps of each layer, of which an eighth is held out. steps, batch_size, lr: of
            AdamW, cosine to 0. memory_mib: of maps and outputs kept in the CPU's memory; the layers are dealt with in
            groups below it, each by itself if need be.
        seed: of the order of the maps. progress: called after each layer with its name and the errors.

    Returns the relative error on the maps held out (see `relative_error`), before and after, by the layer's name. What
    a layer had is kept where the fit would be worse on them. Computes in float32; the layers keep their dtype.
    """
    errors = {}
    waiting = list(swap.layers)
    shapes = collect(swap, run, 1, device="meta")
    while waiting:
        group = []
        while waiting and (not group or _bytes_of(shapes, [*group, waiting[0]], maps) <= memory_mib * 2**20):
            group.append(waiting.pop(0))
        collected = collect(swap, run, maps, group)
        for name in group:
            errors[name] = _fit_layer(swap, name, collected.pop(name), steps, batch_size, lr, seed)
            if progress is not None:
                progress(name, *errors[name])
    return errors


def _bytes_of(shapes: dict[str, FeatureMaps], names: Sequence[str], count: int) -> float:
    """Of at least `count` feature maps of each layer, in whole runs, and of the attention's output on those of one
    layer at a time."""
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
    wanted = [(p, p.requires_grad) for p in layer.parameters()]
    try:
        layer.float().to(device).requires_grad_(True)
        before = relative_error(layer, attention, held)
        best, state = before, _copy(layer)

        def keep_if_better():
            nonlocal best, state
            error = relative_error(layer, attention, held)
            if error < best:  # false for NaN
                best, state = error, _copy(layer)

        with torch.no_grad():
            targets = [attention(t.to(device, attention_dtype)).float().cpu() for t in training.tokens]
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
        layer.load_state_dict(state)
    finally:
        layer.to(dtype)
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
    """to_out by least squares: the best linear map from what the scan gives to the attention's output."""
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
