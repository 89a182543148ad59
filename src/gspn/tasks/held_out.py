"""Validation on held-out images: means over those that could be read, over all processes, and samples."""

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from gspn.data.images import UNREADABLE, DataError, generator
from gspn.data.unreadable import Unreadable


def masked_means(
    batches: Iterable[tuple[dict, dict[str, Tensor]]], accelerator, unreadable: Unreadable
) -> tuple[dict[str, float], dict[str, int]]:
    """The mean of each loss over the held-out images that could be read.

    Args:
        batches: pairs of a batch with "index" and "label" (B,), and its losses by name, each (B,).
        unreadable: takes note of the images that could not be read.
    Returns: ({name: mean}, {"images": how many were read, "unreadable": how many were not, "unreadable_in_training"}),
        the same in every process. Errors: DataError where no image could be read.
    """
    names, images, rows = (), [], []
    for batch, losses in batches:
        names, known = tuple(losses), batch["label"] != UNREADABLE
        images.append(torch.stack([batch["index"], known.long()], 1))
        rows.append(torch.stack([column.float() for column in losses.values()], 1))
    # float64 on the CPU only: Apple's GPUs have none
    images, rows = (accelerator.gather(torch.cat(each)).cpu().numpy() for each in (images, rows))
    _, first = np.unique(images[:, 0], return_index=True)  # processes get equal shares, some images twice
    images, rows = images[first], rows[first].astype(np.float64)
    unreadable.note("evaluation", images[images[:, 1] == 0, 0].tolist())
    known, sums = int(images[:, 1].sum()), rows.sum(0).tolist()
    if not known:
        raise DataError(f"none of the {len(rows)} images of the evaluation could be read")
    counts = {"images": known, "unreadable": len(rows) - known, "unreadable_in_training": unreadable.gather()}
    return {name: total / known for name, total in zip(names, sums, strict=True)}, counts


class HeldOutTask:
    """The part of a loop.Task that follows from `held_out_losses`, `metrics` and `after_epoch`.

    Args:
        unreadable: counts the images that could not be read.
    """

    def __init__(self, unreadable: Unreadable):
        self.unreadable, self.epochs, self.drawn = unreadable, 0, {}

    def held_out_losses(self, model) -> Iterable[tuple[dict, dict[str, Tensor]]]:
        """See `masked_means`."""
        raise NotImplementedError

    def metrics(self, means: dict[str, float]) -> dict[str, float]:
        """The row of metrics from the mean losses, "val_loss" among them."""
        raise NotImplementedError

    def after_epoch(self, model, loss: float):
        """Called after epoch `self.epochs` with a finite validation loss. Returns a picture of samples, or None."""

    @torch.no_grad()
    def evaluate(self, model, accelerator):
        self.unreadable.look()
        means, counts = masked_means(self.held_out_losses(model), accelerator, self.unreadable)
        metrics = self.metrics(means)
        self.epochs += 1
        loss = metrics["val_loss"]  # the loop stops a training that has diverged
        picture = self.after_epoch(model, loss) if math.isfinite(loss) else None
        self.drawn = {"samples": picture} if picture else {}
        return metrics | counts

    def score(self, metrics):
        return [-metrics["val_loss"]]

    def pictures(self):
        return self.drawn

    def state(self):
        return {"epochs": self.epochs, "unreadable": self.unreadable.state()}

    def restore(self, state):
        self.epochs = state["epochs"]
        self.unreadable.restore(state.get("unreadable", []))  # which runs of an earlier gspn do not have


def fixed_noise(index: Tensor, shape: tuple[int, ...], steps: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(noise (B, *shape), timestep (B,) below `steps`) of held-out images: always the same for the same index."""
    sources = [generator(0, i) for i in index.tolist()]
    noise = torch.stack([torch.randn(shape, generator=source) for source in sources])
    timestep = torch.stack([torch.randint(steps, (), generator=source) for source in sources])
    return noise.to(device), timestep.to(device)
