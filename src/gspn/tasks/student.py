"""The student of a distillation, the swapped layers of a UNet, and its loss: the task for the loop.

Teacher and student are one pipeline: the UNet runs with attention, then with the swapped layers. Only these are
trained.

    loss = |student - target|^2 + 0.5 |student - teacher|^2 + 0.5 mean over layers |layer - attention|^2

The target is that of the schedule's prediction type. Each square is a mean over an item's values. Source: arXiv
2501.12381, section 3.5 on text to image. With random sizes, what the teacher says counts less, or not at all, at sizes
that it was not trained at.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from gspn.data.images import UNREADABLE, Preprocessing
from gspn.data.loader import Loader, batches
from gspn.data.unreadable import Unreadable
from gspn.stable_diffusion.swap import Swap
from gspn.tasks.held_out import HeldOutTask, fixed_noise
from gspn.tasks.text_to_image import CONDITIONS, TextToImage

PARTS = ("noise", "output", "feature")  # of the loss


class Student(nn.Module):
    """The swapped layers of a UNet, which are trained, averaged and saved. A call runs the whole UNet with them.

    Args:
        teacher: the pipeline. swapped: the Swap of its UNet.

    Its layers and the attention layers they replace stay in evaluation mode, so that no dropout of the UNet is active.

    State dict: ``layers.{name}.*`` by the names of the attentions replaced, with / for each dot.
    """

    def __init__(self, teacher: TextToImage, swapped: Swap):
        super().__init__()
        self.teacher, self.swap, self._seen = teacher, swapped, None
        self.layers = nn.ModuleDict({name.replace(".", "/"): layer for name, layer in swapped.layers.items()})
        for modules in (swapped.layers, swapped.attentions):
            for name, module in modules.items():
                module.register_forward_hook(partial(self._see, name))

    def keep(self, names: Sequence[str]) -> None:
        """Puts these attentions back, and forgets their layers."""
        self.swap.keep(names)
        for name in names:
            del self.layers[name.replace(".", "/")]

    def no_weight_decay(self) -> set[str]:
        """The names of the biases of gates: their shapes are not 1-D, by which other biases are known."""
        return {name for name, _ in self.named_parameters() if name.endswith("_bias")}

    def train(self, mode: bool = True) -> "Student":
        return super().train(False)

    def forward(self, noisy: Tensor, timestep: Tensor, conditions: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The prediction (B,C,h,w) with the swapped layers, and the output of each, in the order of the UNet."""
        self.swap.use("gspn")
        return self._run(noisy, timestep, conditions)

    @torch.no_grad()
    def teach(self, noisy: Tensor, timestep: Tensor, conditions: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The same with the attention layers that they replace."""
        with self.swap.use("attention"):
            return self._run(noisy, timestep, conditions)

    def _run(self, *inputs):
        self._seen = {}
        try:
            prediction = self.teacher.predict(*inputs)
            return prediction, [self._seen[name] for name in self.swap.layers]
        finally:
            self._seen = None

    def _see(self, name, module, args, output):
        if self._seen is not None:  # None where gradient checkpointing runs a layer again
            self._seen[name] = output


class Distillation(HeldOutTask):
    """The Task of loop.py: images become latents, and captions the conditions of the UNet.

    Args:
        student: Student. captions: of the training images, a tuple of one or more each, and of the held-out ones.
        preprocessing: of the images. loader: of the held-out images.
        weights: of the parts of the loss, by PARTS. away: what multiplies those of the teacher at other sizes than the
            preprocessing's. dropout: the probability of replacing a caption by the empty one.
        parts: the number of parts into which a batch is cut, to save memory.
        sizes: brings the training images, in [-1, 1], to another size.
        draw: called with the number of the epoch; returns a picture of samples or None.
        save: called when the validation loss is the best so far.
        unreadable: counts the images that could not be read.
    """

    def __init__(
        self,
        student: Student,
        captions: Sequence[tuple],
        held_out: Sequence[tuple],
        preprocessing: Preprocessing,
        loader: Loader,
        *,
        weights: Mapping[str, float],
        away: float = 0.0,
        dropout: float = 0.1,
        parts: int = 1,
        sizes: Callable[[Tensor], Tensor] | None = None,
        draw: Callable | None = None,
        save: Callable | None = None,
        unreadable: Unreadable,
    ):
        super().__init__(unreadable)
        self.student, self.teacher, self.objective = student, student.teacher, student.teacher.objective
        self.captions, self.held_out, self.preprocessing, self.loader = captions, held_out, preprocessing, loader
        self.weights, self.away, self.dropout, self.parts, self.sizes = weights, away, dropout, parts, sizes
        self.draw, self.save, self.best = draw, save, None

    def prepare(self, batch):
        self.unreadable.saw(batch)
        known, index = batch["label"] != UNREADABLE, batch["index"].tolist()
        which, dropped = torch.rand(2, len(index)).tolist()
        captions = [
            None if drop < self.dropout else self.captions[i][int(at * len(self.captions[i]))]
            for i, at, drop in zip(index, which, dropped, strict=True)
        ]
        images = self.preprocessing.normalize(batch["image"])
        images = self.sizes(images) if self.sizes else images
        size = tuple(images.shape[2:])
        start = self._latents(images, draw=True)
        trust = 1.0 if size == self.preprocessing.size else self.away
        if not self.weights["output"] + self.weights["feature"]:
            trust = 0.0  # the loss does not ask the teacher, which then need not run
        return {
            "start": start,
            "noise": torch.randn_like(start),
            "timestep": torch.randint(self.objective.steps, (len(index),), device=start.device),
            "known": known,
            "trust": torch.full((len(index),), trust),
            **self.teacher.conditions(captions, size),
        }

    def _latents(self, images, draw):
        return torch.cat([self.teacher.latents(part, draw=draw) for part in images.chunk(self.parts)])

    def count(self, batch):
        return batch["known"].sum()

    def loss(self, model, batch):
        losses, trust = self.losses(model, batch), batch["trust"][0].item()
        weights = {name: weight * (1 if name == "noise" else trust) for name, weight in self.weights.items()}
        return sum(weights[name] * loss.sum() for name, loss in losses.items() if name in weights)

    def inputs(self, batch) -> tuple:
        """x_t, t and conditions of a prepared batch."""
        noisy = self.objective.noisy(batch["start"], batch["noise"], batch["timestep"])
        return noisy, batch["timestep"], {name: batch[name] for name in CONDITIONS if name in batch}

    def cut(self, batch) -> Iterator[dict]:
        """The batch in `parts` parts."""
        for rows in zip(*(each.chunk(self.parts) for each in batch.values()), strict=True):
            yield dict(zip(batch, rows, strict=True))

    def losses(self, model, batch) -> dict[str, Tensor]:
        """The parts of the loss of each item (B,), by PARTS, and "teacher", the teacher's noise loss; 0 for images that
        could not be read. Where the teacher is not trusted at all it does not run, and only "noise" is given."""
        start, noise, timestep = (batch[name] for name in ("start", "noise", "timestep"))
        inputs, taught = self.inputs(batch), None
        if batch["trust"][0]:
            taught, wanted = self.student.teach(*inputs)
        output, seen = model(*inputs)
        with torch.autocast(start.device.type, enabled=False):
            losses = {"noise": self.objective.losses(output, start, noise, timestep)[0]}
            if taught is not None:
                losses["output"] = _squared(output, taught)
                losses["feature"] = torch.stack(list(map(_squared, seen, wanted))).mean(0)
                losses["teacher"] = self.objective.losses(taught, start, noise, timestep)[0]
        return {name: loss.where(batch["known"], 0.0) for name, loss in losses.items()}

    def held_out_losses(self, model):
        """Each image with its first caption."""
        for batch in batches(self.loader):
            for part in self.cut(batch):
                losses = self.losses(model, self._fixed(part))
                yield part, {f"val_{name}": losses[name] for name in (*PARTS, "teacher")}

    def metrics(self, means):
        return {"val_loss": sum(self.weights[name] * means[f"val_{name}"] for name in PARTS), **means}

    def after_epoch(self, model, loss):
        if self.best is None or loss < self.best:
            self.best = loss
            if self.save is not None:
                self.save()
        return self.draw(self.epochs) if self.draw else None

    def _fixed(self, batch):
        """A held-out batch, prepared; always the same for the same image."""
        start = self._latents(self.preprocessing.normalize(batch["image"]), draw=False)
        noise, timestep = fixed_noise(batch["index"], start.shape[1:], self.objective.steps, start.device)
        captions = [self.held_out[i][0] for i in batch["index"].tolist()]
        return {
            "start": start,
            "noise": noise,
            "timestep": timestep,
            "known": batch["label"] != UNREADABLE,
            "trust": torch.ones(len(captions)),
            **self.teacher.conditions(captions, self.preprocessing.size),
        }

    def state(self):
        return super().state() | {"best": self.best}

    def restore(self, state):
        super().restore(state)
        self.best = state["best"]

    def line(self, row):
        return (
            f"epoch {row['epoch']:3d}  loss {row['train_loss']:.4f}  validation: noise {row['val_noise']:.4f} (teacher "
            f"{row['val_teacher']:.4f}), output {row['val_output']:.4f}, features {row['val_feature']:.4f}  "
            f"{row['images_per_second']:.1f} images/s  {row['seconds']:.1f} s"
        )


def _squared(one, other):
    """The mean squared difference of each item (B,)."""
    return (one.float() - other.float()).square().flatten(1).mean(1)
