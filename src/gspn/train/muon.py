"""Muon: steps along orthogonalised momentum for the matrices inside a model. torch.optim.Muon takes 2-D parameters
only; most of ours are convolutions of 1x1, or projections with an axis for the directions.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gspn.layers import GSPN2d

MOMENTUM, ROUNDS = 0.95, 5
SCALE = 0.2  # of a step, times the root of the longer side: as large as AdamW's usual steps, so its rates fit
# The first and last layers of our models and of diffusers', by a part of their names: AdamW suits them better.
ENDS = {"stem", "patch_embed", "pos_embed", "conv_in"}
ENDS |= {"head", "classifier", "proj_out", "proj_out_1", "proj_out_2", "conv_out"}

View = Callable[[Tensor], Tensor]


def matrices_of(model: nn.Module) -> dict[nn.Parameter, View]:
    """The parameters that are matrices, with a function that shows a tensor of their shape as such, (..., out, in):
    weights of linear layers and of convolutions over all channels, and the projections of GSPN2d. Not those of the
    first and the last layers."""
    found: dict[nn.Parameter, View] = {}
    for path, module in model.named_modules():
        if ENDS & set(path.split(".")):
            continue
        if isinstance(module, nn.Linear):
            found[module.weight] = lambda t: t
        elif isinstance(module, nn.Conv2d) and module.groups == 1:
            found[module.weight] = lambda t: t.flatten(1)
        elif isinstance(module, GSPN2d):
            found[module.weight_proj] = lambda t: t.flatten(1, 2)
            rest = (module.input_proj, module.output_proj, module.skip_proj)
            found |= {projection: lambda t: t for projection in rest if projection is not None}
    return found


def orthogonalised(matrices: Tensor) -> Tensor:
    """Of each matrix U S V^T, (..., out, in), roughly U V^T, float32: all singular values that are not tiny become 0.7
    to 1.2.

    By five rounds of Newton and Schulz's iteration, X <- a X + (b X X^T + c (X X^T)^2) X. Source of the method and its
    coefficients: Jordan et al., Muon (2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    high = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if high else matrices).float()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12)
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if high else x


class Muon(torch.optim.AdamW):
    """Muon in the groups whose "muon" is true, AdamW in the others.

    M <- MOMENTUM M + G,  W <- (1 - lr decay) W - lr SCALE sqrt(max(out, in)) orthogonalised(G + MOMENTUM M)

    Sources: Jordan et al., Muon (2024); the scale that makes AdamW's learning rates fit: arXiv 2502.16982.
    """

    def __init__(self, groups: list[dict], views: dict[nn.Parameter, View], **adamw):
        super().__init__(groups, **adamw)
        self._views = views

    @torch.no_grad()
    def step(self, closure=None):
        every = self.param_groups
        self.param_groups = [group for group in every if not group["muon"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = every
        for group in every:
            for parameter in group["params"] if group["muon"] else ():
                if parameter.grad is not None:
                    self._step(parameter, group["lr"], group["weight_decay"])
        return loss

    def _step(self, parameter, lr, decay):
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].mul_(MOMENTUM).add_(parameter.grad)
        update = orthogonalised(self._views[parameter](parameter.grad + MOMENTUM * momentum))
        scale = SCALE * max(update.shape[-2:]) ** 0.5
        parameter.mul_(1 - lr * decay).add_(update.reshape(parameter.shape), alpha=-lr * scale)
