"""What the loop optimizes with: AdamW or Muon in groups, the learning rate schedule, averaged weights, frozen parts."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from gspn.names import unknown
from gspn.options import LoopOptions, OptionError
from gspn.train.muon import Muon, matrices_of

PREVIOUS = 99999  # in a group_matcher, as timm has it: belongs to the layer before


def make_optimizer(model: nn.Module, options: LoopOptions) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, or Muon, which is AdamW with other steps for matrices. 1-D parameters
    (biases, norms) and those that model.no_weight_decay() names have no weight decay; with layer_decay, each layer's
    group has an "lr_scale".

    Errors: OptionError if no parameter is trainable, or for layer_decay on a model without group_matcher().
    """
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    scales = layer_scales(model, options.layer_decay) if options.layer_decay < 1 else {}
    matrices = matrices_of(model) if options.optimizer == "muon" else {}
    groups: dict = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if parameter.ndim <= 1 or name in exempt else options.weight_decay
            groups.setdefault((decay, scales.get(name, 1.0), matrices.get(parameter)), []).append(parameter)
    if not groups:
        raise nothing_to_train()
    groups = [
        {"params": each, "weight_decay": decay, "lr_scale": scale, "matrix": matrix}
        for (decay, scale, matrix), each in groups.items()
    ]
    adamw = {"lr": options.lr, "betas": (options.beta1, options.beta2), "eps": options.eps}
    return (Muon if options.optimizer == "muon" else torch.optim.AdamW)(groups, **adamw)


def check_trainable(model: nn.Module, options: LoopOptions) -> None:
    """Raises OptionError where `freeze` or `layer_decay` do not fit the model, before `frozen_modules` and
    `make_optimizer` would."""
    frozen = {p for module in named(model, options.freeze or ()) for p in module.parameters()}
    if all(p in frozen or not p.requires_grad for p in model.parameters()):
        raise nothing_to_train()
    if options.layer_decay < 1:
        layer_scales(model, options.layer_decay)


def nothing_to_train() -> OptionError:
    return OptionError("nothing is left to train: every parameter is frozen")


def layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """{parameter name: decay ** layers above its own}; model.group_matcher(), in timm's form, tells the layers.

    Errors: OptionError for a model without one."""
    if not hasattr(model, "group_matcher"):
        raise OptionError(f"layer_decay needs a model with group_matcher(), which {type(model).__name__} does not have")
    specs = []
    for ordinal, spec in enumerate(model.group_matcher().values()):
        for pattern, suffix in spec if isinstance(spec, list | tuple) else [(spec, None)]:
            specs.append((re.compile(pattern), ordinal, suffix or ()))

    def key(name):
        for pattern, ordinal, suffix in specs:
            if found := pattern.match(name):
                return (ordinal, *map(int, filter(None, found.groups())), *suffix)
        return (math.inf,)  # the head

    keys = {name: key(name) for name, _ in model.named_parameters()}
    number, numbers = -1, {}
    for each in sorted(set(keys.values())):
        number += each[-1] != PREVIOUS
        numbers[each] = number
    return {name: decay ** (number - numbers[each]) for name, each in keys.items()}


def learning_rate(step: int, steps_an_epoch: int, options: LoopOptions) -> float:
    """The learning rate at `step`: linear from warmup_lr to lr in the warm-up, then a cosine down to min_lr.

    >>> options = LoopOptions(epochs=3, lr=1.0, warmup=1.0).resolved()
    >>> [round(learning_rate(step, 2, options), 2) for step in range(6)]
    [0.5, 1.0, 1.0, 0.86, 0.51, 0.15]
    """
    warmup, total = round(options.warmup * steps_an_epoch), options.epochs * steps_an_epoch
    if step < warmup:
        return options.warmup_lr + (options.lr - options.warmup_lr) * (step + 1) / warmup
    last = options.lr / 100 if options.min_lr is None else options.min_lr
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))
    return last + (options.lr - last) * cosine


class Ema:
    """Averaged weights of a model's parameters: mean = decay * mean + (1 - decay) * parameter after every step. The
    running statistics of batch norm are averaged too, as they belong to the weights.

    Args:
        model: whole, or sharded by FSDP, where each process averages its shard. device: of the averages.
    """

    def __init__(self, model: nn.Module, decay: float, device: torch.device | str):
        self.model, self.decay = model, decay
        self.means = {name: p.to(device, copy=True) for name, p in self._parameters()}

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in chain(self.model.named_parameters(), running_statistics(self.model).items()):
            parameter = parameter.detach()
            yield name, parameter.to_local() if isinstance(parameter, DTensor) else parameter

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Call it after `step`. Early on, the average is roughly over the steps so far."""
        means = list(self.means.values())
        now = [p.to(mean.device) for (_, p), mean in zip(self._parameters(), means, strict=True)]
        torch._foreach_lerp_(means, now, 1 - min(self.decay, (1 + step) / (10 + step)))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block, the model's parameters and running statistics are the averages."""
        mine = {name: p.clone() for name, p in self._parameters()}
        self.load(self.means)
        try:
            yield
        finally:
            self.load(mine)

    @torch.no_grad()
    def load(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters():
            parameter.copy_(values[name])

    @torch.no_grad()
    def copy_from(self) -> None:
        """Sets the averages to the model's parameters and running statistics."""
        for name, parameter in self._parameters():
            self.means[name].copy_(parameter)


def running_statistics(model: nn.Module, training_only: bool = False) -> dict[str, Tensor]:
    """The running means and variances of the batch norms in a model, by name; `training_only`: of those that a training
    step changes."""
    found = {}
    for prefix, module in model.named_modules():
        wanted = isinstance(module, _BatchNorm) and module.running_mean is not None
        if wanted and (module.training or not training_only):
            found |= {f"{prefix}.{name}": getattr(module, name) for name in ("running_mean", "running_var")}
    return found


def frozen_modules(model: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    """Freezes the weights of the modules `names` ("stem", "levels.0"). Returns them with all modules inside them, which
    the loop keeps in evaluation mode. Errors: OptionError for a name that the model does not have."""
    modules = named(model, names)
    for module in modules:
        module.requires_grad_(False)
    return list(chain.from_iterable(module.modules() for module in modules))


def named(model: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    """The modules of these names. Errors: OptionError for a name that the model does not have."""
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules or not name:
            known = [n for n, m in modules.items() if n and not re.search(r"\.\d+\.", n) and list(m.parameters())]
            raise OptionError(f"freeze: {unknown('part of the model', name, known)}")
    return [modules[name] for name in names]
