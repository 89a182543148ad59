"""GSPN with one thing changed at a time: what makes its propagation weights count?

Each variant is a mixer (B,H,W,C) to (B,H,W,C) for the backbone in contenders.py. Where the fused operator can compute
it, it does; the variants that forget scan with weights made here, which takes about twice as long.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gspn
from gspn.layers import input_means

GROUPS = 8  # channel groups that share propagation weights; 64 (every channel its own) costs much more to try
PROXY = 8
LEVEL = -2.0  # logits so low that sigmoids are nearly exponentials: weights that sum to 1 are then a softmax
LONGEST = 64  # lines: the memory of the group that forgets least, as the layer starts


class Variant(nn.Module):
    """out(N(sum over directions of u h + skip x) * SiLU(gate z)) with x = into(z), h the scan of lambda x.

    Args:
        normed_proxy: RMSNorm of the proxy, from which weights and gates are projected.
        normed_output: N is RMSNorm over the channels, and the output is multiplied by a SiLU gate; else N is the
            identity and there is no such gate.
        thirds: the logits do not depend on the input; without `rays` each weight is 1/3.
        rays: a learned bias of the logits, which starts at LEVEL for one of the three neighbours and this much lower
            for the others; a third of the groups starts with each. A state then moves along a ray instead of spreading
            out, so that neighbours of a line differ and it matters which one is taken. 0: no bias.
        forget: "no": rows sum to 1. "yes": rows sum to r = sigmoid(projection of the proxy + bias), and the biases
            start such that the groups remember 2 to LONGEST lines. "tied": the input is multiplied by 1 - r as well, so
            that a state is a weighted mean of the inputs. "fixed": as "yes", but r does not depend on the input.
        scale: of the logits.
        level: of a learned bias of all logits without rays, as it starts; LEVEL makes the weights' changes larger than
            0 does. 0: no bias.
        centred: the mean of the gated input over the map is taken once instead of once in each line: the state is the
            scan of what differs from this mean, plus the mean. Rows that sum to 1 let nobody choose how much of the
            mean arrives, which is most of a state after some lines and grows with the map.
        ramp: with `centred`, where a learned number r for each direction and channel starts: line t of T has r t / T
            times the mean besides. So a state tells how far its line is from the border, at any size. None: no r.
    """

    def __init__(
        self,
        width: int,
        *,
        normed_proxy: bool = True,
        normed_output: bool = True,
        thirds: bool = False,
        rays: float = 0.0,
        forget: str = "no",
        scale: float = 1.0,
        level: float = 0.0,
        centred: bool = False,
        ramp: float | None = None,
        groups: int = GROUPS,
        proxy_dim: int = PROXY,
    ):
        super().__init__()
        count = len(gspn.DIRECTIONS)
        self.forget, self.scale, self.thirds, self.centred = forget, scale, thirds, centred
        self.into, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.proxy = nn.Linear(width, proxy_dim, bias=False)
        self.proxy_norm = nn.RMSNorm(proxy_dim) if normed_proxy else nn.Identity()
        self.gate = nn.Linear(width, width) if normed_output else None
        self.norm = nn.RMSNorm(width) if normed_output else nn.Identity()
        self.ramp = None if ramp is None else nn.Parameter(torch.full((count, width), ramp))

        def projection(*shape):
            return nn.Parameter(torch.empty(count, *shape, proxy_dim).uniform_(-(proxy_dim**-0.5), proxy_dim**-0.5))

        self.weight_proj = projection(3, groups)
        if thirds:
            self.weight_proj = None
            self.register_buffer("no_logits", torch.zeros(count, 3, groups, proxy_dim), persistent=False)
        self.ray_bias = None
        if rays or level:
            others = 1 - F.one_hot(torch.arange(groups) % 3, 3).T  # (3,groups)
            self.ray_bias = nn.Parameter(((level or LEVEL) - rays * others).repeat(count, 1, 1))
        self.input_proj, self.output_proj, self.skip_proj = (projection(width) for _ in range(3))
        if forget != "no":
            remembered = torch.logspace(1, math.log2(LONGEST), groups, base=2)
            self.retain_bias = nn.Parameter(torch.log(remembered - 1).repeat(count, 1))  # r = 1 - 1/lines
            self.retain_proj = projection(groups) if forget != "fixed" else None

    def forward(self, z: Tensor) -> Tensor:
        x = self.into(z).permute(0, 3, 1, 2)
        proxy = self.proxy_norm(self.proxy(z)).permute(0, 3, 1, 2)
        weight_proj = self.no_logits if self.thirds else self.weight_proj * self.scale
        merge = 1 / len(gspn.DIRECTIONS)
        if self.forget == "no":
            input_proj, output_proj, skip_proj = (
                self.input_proj,
                self.output_proj * merge,
                self.skip_proj.sum(0) * merge,
            )
            if self.ray_bias is not None:  # a proxy channel that is 1 everywhere turns a column of weights into a bias
                proxy = torch.cat([proxy, torch.ones_like(proxy[:, :1])], 1)
                weight_proj = torch.cat([weight_proj, self.ray_bias.unsqueeze(-1)], -1)
                input_proj, output_proj, skip_proj = (F.pad(p, (0, 1)) for p in (input_proj, output_proj, skip_proj))
            center = input_means(x, proxy, input_proj) if self.centred else None
            if self.ramp is not None:
                lines = [x.shape[3 if direction in ("right", "left") else 2] for direction in gspn.DIRECTIONS]
                center = center * (1 - self.ramp / self.ramp.new_tensor(lines).unsqueeze(-1))
            y = gspn.propagate(x, proxy, weight_proj, input_proj, output_proj, skip_proj, center=center)
        else:
            y = merge * self._forgetting(x, proxy, weight_proj)
        y = self.norm(y.permute(0, 2, 3, 1))
        return self.out(y if self.gate is None else y * F.silu(self.gate(z)))

    def _forgetting(self, x: Tensor, proxy: Tensor, weight_proj: Tensor) -> Tensor:
        # everything channels first and contiguous: mixed layouts take most of the time
        x, flat = x.contiguous(), proxy.contiguous().flatten(2)

        def project(projection: Tensor) -> Tensor:
            """(...,S) to (B,...,H,W)."""
            maps = torch.matmul(projection.reshape(-1, projection.shape[-1]), flat)
            return maps.view(len(x), *projection.shape[:-1], *x.shape[2:])

        y = project(self.skip_proj.sum(0)) * x
        for i, direction in enumerate(gspn.DIRECTIONS):
            weights = gspn.normalize_weights(project(weight_proj[i]).transpose(1, 2), direction=direction)
            level = self.retain_bias[i, :, None, None]
            if self.retain_proj is not None:
                level = level + project(self.retain_proj[i])
            retained = torch.sigmoid(level).expand(len(x), -1, *x.shape[2:])
            value = project(self.input_proj[i]) * x
            if self.forget == "tied":
                grouped = value.unflatten(1, (retained.shape[1], -1))
                value = (grouped * (1 - retained).unsqueeze(2)).flatten(1, 2)
            h = gspn.line_scan(value, weights * retained.unsqueeze(2), direction=direction)
            y = y + project(self.output_proj[i]) * h
        return y


REMEDIES = {  # the most telling first: the study goes through them in this order
    "gspn-g8": ("GSPN, 8 groups", dict(normed_proxy=False, normed_output=False)),
    "gspn-centred-alone": ("GSPN, centred", dict(centred=True, normed_proxy=False, normed_output=False)),
    "gspn-centred-ramp": (
        "GSPN, centred, ramp",
        dict(centred=True, ramp=1.0, normed_proxy=False, normed_output=False),
    ),
    "gspn-centred-alone-thirds": (
        "GSPN, centred, weights 1/3",
        dict(centred=True, thirds=True, normed_proxy=False, normed_output=False),
    ),
    "gspn-normed": ("GSPN, both normalised", dict()),
    "gspn-normed-thirds": ("GSPN, both normalised, weights 1/3", dict(thirds=True)),
    "gspn-rays": ("GSPN, both normalised, rays", dict(rays=3.0)),
    "gspn-rays-fixed": ("GSPN, both normalised, rays whatever the input", dict(rays=3.0, thirds=True)),
    "gspn-normed-scale4": ("GSPN, both normalised, logits times 4", dict(scale=4.0)),
    "gspn-sharp": ("GSPN, both normalised, logits times 4 at level -3", dict(scale=4.0, level=-3.0)),
    "gspn-sharp-centred": (
        "GSPN, both normalised, logits times 4 at level -3, centred",
        dict(scale=4.0, level=-3.0, centred=True),
    ),
    "gspn-centred": ("GSPN, both normalised, centred", dict(centred=True)),
    "gspn-centred-thirds": ("GSPN, both normalised, centred, weights 1/3", dict(centred=True, thirds=True)),
    "gspn-output": ("GSPN, normalised output, SiLU gate", dict(normed_proxy=False)),
    "gspn-proxy": ("GSPN, normalised proxy", dict(normed_output=False)),
    "gspn-forget": ("GSPN, both normalised, forgets", dict(forget="yes")),
    "gspn-forget-thirds": ("GSPN, both normalised, forgets, weights 1/3", dict(forget="yes", thirds=True)),
    "gspn-forget-tied": ("GSPN, both normalised, forgets, input times 1 - r", dict(forget="tied")),
    "gspn-forget-fixed": ("GSPN, both normalised, forgets at fixed rates", dict(forget="fixed")),
    "gspn-forget-scale4": ("GSPN, both normalised, forgets, logits times 4", dict(forget="yes", scale=4.0)),
}
