"""The state of a training as tensors by name, as a checkpoint stores it, and back; also where FSDP has sharded it.

All processes call these functions together.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from gspn.train.optim import Ema
from gspn.train.run import RunError

Tensors = dict[str, dict[str, Tensor]]


def full_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None, is_main: bool) -> Tensors:
    """{"model": ..., "optimizer": ..., "ema": ...}: the model's state by name, the optimizer's as "parameter.slot".
    Sharded tensors are whole where `is_main` is true; the other processes take part and get empty ones."""
    tensors = {
        "model": {name: _whole(tensor, is_main) for name, tensor in model.state_dict().items()},
        "optimizer": {f"{name}.{slot}": _whole(tensor, is_main) for name, slot, tensor in _slots(model, optimizer)},
    }
    if ema is not None:
        with ema.applied():
            tensors["ema"] = {name: _whole(tensor, is_main).clone() for name, tensor in model.state_dict().items()}
    return tensors


@torch.no_grad()
def restore(tensors: Tensors, model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None) -> None:
    """Restores what `full_state_dict` returned. Errors: RunError where the tensors are not those of this training."""
    if ema is not None:
        load_weights(model, tensors.get("ema", {}))
        ema.copy_from()
    load_weights(model, tensors["model"])
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for key, tensor in tensors.get("optimizer", {}).items():
        name, _, slot = key.rpartition(".")
        if name not in parameters:
            raise RunError(f"the checkpoint has optimizer state of a parameter that is not trained here: {name}")
        if slot != "step" and tensor.shape != parameters[name].shape:
            raise RunError(
                f"the checkpoint's optimizer state of {name} has the shape {tuple(tensor.shape)}, expected "
                f"{tuple(parameters[name].shape)}: its files are of another run"
            )
        optimizer.state[parameters[name]][slot] = _like(tensor, parameters[name], on_device=slot != "step")
    missing = [name for name, p in parameters.items() if p not in optimizer.state]
    if missing:
        raise RunError(f"the checkpoint has no optimizer state of {len(missing)} parameters, such as {missing[0]}")


@torch.no_grad()
def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies weights and buffers by name. Errors: RunError names what is missing, unknown or of another shape."""
    state = model.state_dict()
    problems = [f"{name} is missing" for name in state if name not in tensors]
    problems += [f"the model has no {name}" for name in tensors if name not in state]
    problems += [
        f"{name} has the shape {tuple(tensors[name].shape)}, expected {tuple(own.shape)}"
        for name, own in state.items()
        if name in tensors and tensors[name].shape != own.shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise RunError(f"the weights do not fit the model: {'; '.join(problems[:5])}{more}")
    for name, own in state.items():
        own.copy_(_like(tensors[name], own))


def _slots(model, optimizer) -> Iterator[tuple[str, str, Tensor]]:
    for name, parameter in model.named_parameters():
        for slot, tensor in optimizer.state.get(parameter, {}).items():
            yield name, slot, tensor


def _whole(tensor, is_main):
    """The whole of a sharded tensor, on the CPU, because it may be too large for one device."""
    if not isinstance(tensor, DTensor):
        return tensor
    whole = tensor.full_tensor()
    return whole.cpu() if is_main else whole.new_empty(0)


def _like(tensor, model_tensor, on_device=True):
    """A whole tensor on the device, and sharded, as `model_tensor` is. AdamW's step count is a scalar on the CPU."""
    if isinstance(model_tensor, DTensor) and tensor.ndim:
        return distribute_tensor(tensor.to(model_tensor.device), model_tensor.device_mesh, model_tensor.placements)
    return tensor.to(model_tensor.device) if on_device else tensor
