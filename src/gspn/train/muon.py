"""Muon: steps along orthogonalised momentum for the matrices inside a model. torch.optim.Muon takes 2-D parameters
only; most of ours are convolutions of 1x1, or projections with an axis for the directions.
"""

import torch
from torch import Tensor, nn

MOMENTUM, ROUNDS = 0.95, 5
SCALE = 0.2  # of a step, times the root of the longer side: as large as AdamW's usual steps, so its rates fit
# The first and last layers of our models and of diffusers', by a part of their names: AdamW suits them better.
ENDS = {"stem", "patch_embed", "pos_embed", "conv_in"}
ENDS |= {"head", "classifier", "proj_out", "proj_out_1", "proj_out_2", "conv_out"}
# Of a layer that scans, GSPN2d or GSPNAttention: (D,...,S), a matrix for each of the D directions.
PROJECTIONS = ("weight_proj", "input_proj", "output_proj", "skip_proj")


def matrices_of(model: nn.Module) -> dict[nn.Parameter, str]:
    """The parameters that are matrices: "one" for weights of linear layers and of convolutions over all channels,
    (out, in, ...), "each" for projections of scans, which hold a matrix for each direction. Not those of the first and
    the last layers."""
    found: dict[nn.Parameter, str] = {}
    for path, module in model.named_modules():
        if ENDS & set(path.split(".")):
            continue
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            found[module.weight] = "one"
        projections = (getattr(module, name, None) for name in PROJECTIONS)
        found |= {each: "each" for each in projections if isinstance(each, nn.Parameter)}
    return found


def as_matrices(tensor: Tensor, kind: str) -> Tensor:
    """A tensor of a parameter of that kind as (out, in), or (D, out, in)."""
    return tensor.flatten(1) if kind == "one" else tensor.flatten(1, -2)


def orthogonalised(matrices: Tensor) -> Tensor:
    """Of each matrix U S V^T, (..., out, in), roughly U V^T, float32: all singular values that are not tiny become 0.7
    to 1.2.

    By five rounds of Newton and Schulz's iteration, X <- a X + (b X X^T + c (X X^T)^2) X. Source of the method and its
    coefficients: Jordan et al., Muon (2024). Rounds of X X^T alone, with one product with X at the end, would be
    faster, but products in TF32 or bfloat16 make them diverge: X corrects what was rounded.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    high = matrices.shape[-2] > matrices.shape[-1]
    with torch.autocast(matrices.device.type, enabled=False):
        x = (matrices.mT if high else matrices).float()
        x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12)
        for _ in range(ROUNDS):
            square = x @ x.mT
            x = a * x + (b * square + c * square @ square) @ x
    return x.mT if high else x


class Muon(torch.optim.AdamW):
    """Muon in the groups that have a "matrix", a kind of `matrices_of`; AdamW in those where it is None.

    M <- MOMENTUM M + G,  W <- (1 - lr decay) W - lr SCALE sqrt(max(out, in)) orthogonalised(G + MOMENTUM M)

    Sources: Jordan et al., Muon (2024); the scale that makes AdamW's learning rates fit: arXiv 2502.16982.
    """

    @torch.no_grad()
    def step(self, closure=None):
        every = self.param_groups
        self.param_groups = [group for group in every if group.get("matrix") is None]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = every
        for group in every:
            if (kind := group.get("matrix")) is not None:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step(parameter, kind, group["lr"], group["weight_decay"])
        return loss

    def _step(self, parameter, kind, lr, decay):
        state = self.state[parameter]
        if not state:  # AdamW's methods expect a step in every state
            state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(parameter)}
        state["step"] += 1
        momentum = state["momentum"].mul_(MOMENTUM).add_(parameter.grad)
        update = orthogonalised(as_matrices(parameter.grad + MOMENTUM * momentum, kind))
        scale = SCALE * max(update.shape[-2:]) ** 0.5
        parameter.mul_(1 - lr * decay).add_(update.reshape(parameter.shape), alpha=-lr * scale)
