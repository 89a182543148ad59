"""Class-conditional diffusion: the task for the loop, and `train_generator` and `resume_generator`, which are what
`gspn train-diffusion` runs.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from rich.console import Console
from torch import Tensor

from gspn import plots as pictures
from gspn.data.augment import Augmentation
from gspn.data.images import UNREADABLE, Preprocessing, Split, generator
from gspn.data.labelled import Data, DataError
from gspn.data.latent_folder import is_latents
from gspn.data.latents import make_latent_loader, open_latents
from gspn.data.loader import Loader, batches, make_loader
from gspn.data.unreadable import Unreadable, warning_of
from gspn.models.dit import dit_names
from gspn.models.generator import config_of, generator_names
from gspn.models.pipeline import GSPNPipeline
from gspn.options import OptionError
from gspn.plots import draw_grid, drawing_samples, save_picture
from gspn.sampling.generators import build_generator, named_scheduler
from gspn.sampling.vae import check_vae, open_vae, scale_of
from gspn.tasks.base import open_with, resume, start
from gspn.tasks.diffusion_options import PRESETS, GeneratorOptions
from gspn.tasks.objective import Objective, make_scheduler
from gspn.train.loop import train
from gspn.train.run import Run

TASK = "diffusion"  # in a run's config.json
SHOWN_CLASSES, SHOWN_EACH = 10, 4  # in the pictures of samples that are drawn in training


class Diffusion:
    """The Task of loop.py: the hybrid loss of objective.py on images or latents with a class.

    Args:
        normalize: makes of a batch's "image" what the model sees. loader: of the held-out images.
        unreadable: keeps count of what could not be read.
        draw: called with the model and the number of the epoch; gives a picture of samples or None.
    """

    def __init__(
        self,
        objective: Objective,
        normalize: Callable[[Tensor], Tensor],
        num_classes: int,
        loader: Loader,
        class_dropout: float,
        unreadable: Unreadable,
        draw: Callable | None = None,
    ):
        self.objective, self.normalize, self.num_classes = objective, normalize, num_classes
        self.loader, self.dropout, self.unreadable, self.draw = loader, class_dropout, unreadable, draw
        self.epochs, self.drawn = 0, {}

    def prepare(self, batch):
        self.unreadable.saw(batch)
        start, label = self.normalize(batch["image"]), batch["label"]
        count, device = len(label), start.device
        # Here and not in the model: DiT of diffusers embeds the class in each block, and would drop it in some of them.
        dropped = torch.rand(count, device=device) < self.dropout
        return {
            "start": start,
            "noise": torch.randn_like(start),
            "timestep": torch.randint(self.objective.steps, (count,), device=device),
            "label": torch.where(dropped & (label != UNREADABLE), self.num_classes, label),
        }

    def count(self, batch):
        return (batch["label"] != UNREADABLE).sum()

    def loss(self, model, batch):
        return torch.stack(self.losses(model, batch)).sum()

    def losses(self, model, batch) -> tuple[Tensor, Tensor]:
        """(squared error, bound) of each item, 0 for those that could not be read."""
        start, noise, timestep, label = (batch[name] for name in ("start", "noise", "timestep", "label"))
        known = label != UNREADABLE
        noisy = self.objective.noisy(start, noise, timestep)
        output = model(noisy, timestep=timestep, class_labels=label.where(known, 0), return_dict=False)[0]
        with torch.autocast(start.device.type, enabled=False):
            losses = self.objective.losses(output, start, noise, timestep)
        return tuple(loss.where(known, 0.0) for loss in losses)

    @torch.no_grad()
    def evaluate(self, model, accelerator):
        """The losses of held-out images, each with noise and a timestep of its own that are always the same."""
        self.unreadable.look()
        rows = []
        for batch in batches(self.loader):
            start, index = self.normalize(batch["image"]), batch["index"]
            drawn = [generator(0, i) for i in index.tolist()]
            noise = torch.stack([torch.randn(start.shape[1:], generator=each) for each in drawn])
            timestep = torch.stack([torch.randint(self.objective.steps, (), generator=each) for each in drawn])
            parts = {"start": start, "noise": noise.to(start.device), "timestep": timestep.to(start.device)}
            error, bound = self.losses(model, parts | {"label": batch["label"]})
            known = (batch["label"] != UNREADABLE).double()
            rows.append(torch.stack([index.double(), known, error.double(), bound.double()], 1))
        rows = accelerator.gather(torch.cat(rows)).cpu().numpy()
        _, first = np.unique(rows[:, 0], return_index=True)  # processes get equal shares, some images twice
        rows = rows[first]
        self.unreadable.note("evaluation", rows[rows[:, 1] == 0, 0].astype(int).tolist())
        known, error, bound = rows[:, 1:].sum(0).tolist()
        if not known:
            raise DataError(f"none of the {len(rows)} images of the evaluation could be read")
        error, bound = error / known, bound / known
        self.epochs += 1
        drawn = self.draw and math.isfinite(error + bound)  # the loop ends a training that has diverged
        picture = self.draw(model, self.epochs) if drawn else None
        self.drawn = {"samples": picture} if picture else {}
        return {
            "val_loss": error + bound,
            "val_error": error,
            "val_bound": bound,
            "images": int(known),
            "unreadable": len(rows) - int(known),
            "unreadable_in_training": self.unreadable.gather(),
        }

    def pictures(self):
        return self.drawn

    def state(self):
        return {"epochs": self.epochs, "unreadable": self.unreadable.state()}

    def restore(self, state):
        self.epochs = state["epochs"]
        self.unreadable.restore(state.get("unreadable", []))  # which runs of an earlier gspn do not have

    def score(self, metrics):
        return [-metrics["val_loss"]]

    def line(self, row):
        return (
            f"epoch {row['epoch']:3d}  loss {row['train_loss']:.4f}  validation: squared error {row['val_error']:.4f}, "
            f"bound {row['val_bound']:.4f} bits  {row['images_per_second']:.0f} images/s  {row['seconds']:.1f} s"
        )


# -- what is trained, on what --


@dataclass
class Setup:
    """What a generator is trained on and with: the data, and options that leave nothing open.

    `preprocessing` is None where the data are latents.
    """

    data: Data
    train_split: Split
    eval_split: Split
    eval_name: str
    class_names: list[str]
    preprocessing: Preprocessing | None
    channels: int
    size: tuple[int, int]  # of what the model sees
    options: GeneratorOptions
    notes: list[str]

    @classmethod
    def of(cls, where: str | Path, options: GeneratorOptions) -> "Setup":
        """Settles the options for these data. Errors: DataError, OptionError."""
        latents = is_latents(where)
        data = open_latents(where, val_fraction=options.val_fraction) if latents else open_with(where, options)
        train_split, eval_split, eval_name = data.for_training()
        class_names = train_split.class_names or [str(i) for i in range(int(train_split.labels.max()) + 1)]
        train_split, eval_split = train_split.relabelled(class_names), eval_split.relabelled(class_names)
        if latents:
            for name, given, own in (("size", options.size, data.image_size), ("channels", options.channels, None)):
                if given not in (None, own):
                    raise OptionError(f"{name}: {where} holds latents of images of {data.image_size}, got {given}")
            preprocessing, channels, size, image_size = None, data.channels, data.size, data.image_size
        else:
            channels, size = options.channels or train_split.channels(), options.size or _size_of(train_split)
            # to [-1, 1], for which the noise and the bound are meant
            preprocessing = Preprocessing(channels, size, (0.5,) * channels, (0.5,) * channels)
            image_size = preprocessing.size
        options = replace(options, size=tuple(image_size))
        options = options.settled(PRESETS["latents" if latents else "pixels"])
        if options.sample_every and options.sample_steps > options.timesteps:
            raise OptionError(f"sample_steps {options.sample_steps} are more than the {options.timesteps} timesteps")
        if options.fsdp and options.model in dit_names():
            raise OptionError("fsdp cannot shard DiT, whose blocks share an embedding")
        if latents and options.sample_every:
            _vae_of(data.vae)  # what cannot be decoded is found before the run's folder is made
        return cls(
            data,
            train_split,
            eval_split,
            eval_name,
            class_names,
            preprocessing,
            channels,
            tuple(size),
            options,
            list(data.notes),
        )

    def scheduler(self) -> DDPMScheduler:
        """Of the training, as DDPM samples with it."""
        options = self.options
        return make_scheduler(
            options.prediction,
            learn_sigma=options.learn_sigma,
            clip=self.preprocessing is not None,
            num_train_timesteps=options.timesteps,
            beta_schedule=options.schedule,
        )

    def model_config(self) -> dict:
        """What build_generator makes the model of."""
        options = self.options
        arguments = {
            "num_classes": len(self.class_names),
            "sample_size": self.size[0],
            "in_channels": self.channels,
            "learn_sigma": options.learn_sigma,
        }
        if options.model in generator_names():
            arguments |= {"prediction_type": options.prediction, "class_dropout_prob": options.class_dropout}
        own = sorted(set(arguments) & set(options.model_args))
        if own:
            raise OptionError(f"model_arg: {', '.join(own)} follows from the data and the other options")
        # Written out, so that a run's model stays what it is should a name come to stand for something else.
        named = config_of(options.model) if options.model in generator_names() else {}
        return {"name": options.model, "arguments": named | arguments | dict(options.model_args)}

    def model(self, device: torch.device) -> torch.nn.Module:
        """A new model, tried on one empty map. Errors: OptionError."""
        torch.manual_seed(self.options.seed)
        model = build_generator(self.model_config()).to(device)
        what = f"{self.options.model} fails when tried with {self.size[0]}x{self.size[1]}"
        with torch.inference_mode():
            empty, none = torch.zeros(1, self.channels, *self.size, device=device), torch.zeros(1, device=device)
            try:
                output = model.eval()(empty, timestep=none.long(), class_labels=none.long()).sample
            except (RuntimeError, ValueError) as error:
                raise OptionError(f"{what}: {error}") from error
        if output.shape[2:] != empty.shape[2:]:
            raise OptionError(f"{what}: it gives {output.shape[2]}x{output.shape[3]}")
        if "prediction_type" not in model.config:  # DiT of diffusers does not know what it predicts
            model.register_to_config(prediction_type=self.options.prediction)
        if self.options.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        return model

    def first_weights(self, model):
        """None: a generator starts from random weights."""

    def vae(self) -> dict | None:
        """What the run keeps of the VAE whose latents these are."""
        if self.preprocessing is not None:
            return None
        described = self.data.vae
        return {"path": described["path"], **scale_of(described), "digest": described["digest"]}

    def config(self, model) -> dict:
        """What config.json keeps of a generator."""
        return {
            "model": {**self.model_config(), "class": type(model).__name__, "config": dict(model.config)},
            "scheduler": {"class": "DDPMScheduler", "config": dict(self.scheduler().config)},
            "space": {
                "kind": "latents" if self.preprocessing is None else "pixels",
                "channels": self.channels,
                "size": list(self.size),
                "image_size": list(self.options.size),
            },
            "vae": self.vae(),
            "class_names": self.class_names,
        }

    def check_config(self, config):
        """Nothing: the fingerprint of the data and the options tell all."""

    def describe(self, model) -> str:
        options, count = self.options, sum(parameter.numel() for parameter in model.parameters())
        (height, width), (h, w) = options.size, self.size
        as_latents = f" as latents of {self.channels}x{h}x{w}" if self.preprocessing is None else ""
        return (
            f"{options.model}, {count:,} parameters; {len(self.train_split):,} training and {len(self.eval_split):,} "
            f"{self.eval_name} images of {len(self.class_names)} classes, {height}x{width}{as_latents}\n"
            f"{options.epochs} epoch{'s' * (options.epochs > 1)}, batch size {options.batch_size}, learning rate "
            f"{options.lr:g}, EMA {options.ema:g}, {options.precision}, predicts {options.prediction}, "
            f"seed {options.seed}"
        )

    def normalize(self, image: Tensor) -> Tensor:
        """What the model sees of a batch of the loader."""
        return image if self.preprocessing is None else self.preprocessing.normalize(image)

    def loader(self, split: Split, train: bool = False) -> Loader:
        """Batches of a split."""
        options = self.options
        common = dict(train=train, seed=options.seed, workers=options.workers)
        if self.preprocessing is None:
            return make_latent_loader(split, options.batch_size, flip=options.flip, **common)
        augmentation = Augmentation(flip=True) if options.flip else None
        return make_loader(split, self.preprocessing, options.batch_size, augmentation=augmentation, **common)


def _vae_of(described):
    """The VAE whose latents are trained on. Errors: OptionError."""
    try:
        return check_vae(open_vae(described["path"]), described)
    except OptionError as error:
        raise OptionError(f"{error} (--sample-every 0 trains without the VAE, and draws no samples)") from error


def _size_of(split):
    """The size of the images, if it is one."""
    if split.pixels is not None:
        return tuple(split.pixels.shape[2:])
    sizes = sorted({(image.height, image.width) for image in split.sample()})
    if len(sizes) > 1:
        raise OptionError(f"the images have several sizes, such as {sizes[0]} and {sizes[-1]}: say with --size which")
    return sizes[0]


class Samples:
    """Draws RUN/samples/epoch-0001.png and so on: a few classes, the same noise each time."""

    def __init__(self, setup: Setup, folder: Path | None):
        self.setup, self.folder = setup, folder
        self.vae = None if setup.preprocessing is not None else _vae_of(setup.vae())

    def __call__(self, model, epoch):
        """A picture; None in an epoch without one. Errors: SaveError; TrainingError for values that are not finite."""
        setup, options = self.setup, self.setup.options
        if epoch % options.sample_every and epoch < options.epochs:
            return None
        count = len(setup.class_names)
        classes = np.unique(np.linspace(0, count - 1, min(count, SHOWN_CLASSES)).astype(int)).tolist()
        labels = [label for label in classes for _ in range(SHOWN_EACH)]
        scheduler = named_scheduler("dpm-solver++", setup.scheduler())
        device = next(model.parameters()).device
        if self.vae is not None:
            self.vae.to(device)
        pipeline = GSPNPipeline(model, scheduler, self.vae)
        pipeline.set_progress_bar_config(disable=True)
        images = []
        with drawing_samples(epoch):
            for label in classes:
                images += pipeline(
                    [label] * SHOWN_EACH,
                    guidance_scale=options.guidance if options.class_dropout else 1.0,
                    num_inference_steps=options.sample_steps,
                    height=options.size[0],
                    width=options.size[1],
                    generator=[generator(options.seed, label, i) for i in range(SHOWN_EACH)],
                ).images
        if self.vae is not None:
            self.vae.to("cpu")
        guidance = options.guidance if options.class_dropout else 1.0
        title = f"after epoch {epoch}, guidance {guidance:g}, {options.sample_steps} steps"
        picture = draw_grid(images, labels, setup.class_names, title=title)
        if self.folder is not None:
            save_picture(self.folder / f"epoch-{epoch:04}.png", picture)
        return picture


def train_generator(
    data: str | Path,
    out: str | Path,
    options: GeneratorOptions | None = None,
    *,
    overwrite: bool = False,
    console: Console | None = None,
) -> tuple[Run, list[str]]:
    """Trains a generator on `data` into the run folder `out`; draws loss curves and, in between, samples.

    Args:
        data: see data.open_data; or a folder of latents that encode made.
        out: the run folder; not to exist, to be empty, or an earlier run with `overwrite`.
        options: GeneratorOptions. console: rich's, or None for silence.
    Returns: (the Run, in the main process; list of warnings).
    Errors: BusyError, DataError, OptionError, RunError, SaveError, TrainingError.
    """
    options = options or GeneratorOptions()
    return start(TASK, Setup.of, _train, data, out, options, overwrite=overwrite, console=console)


def resume_generator(
    path: str | Path,
    changes: Mapping[str, Any] | None = None,
    *,
    data: str | Path | None = None,
    console: Console | None = None,
) -> tuple[Run, list[str]]:
    """Goes on with a training that was stopped, from its last checkpoint, exactly as if it had not been.

    Args:
        path: the run folder. data: where the data are now, if they were moved. console: as in train_generator.
        changes: options by name that change nothing of the result, such as the number of workers.
    Returns and errors: as train_generator.
    """
    return resume(TASK, Setup.of, _train, path, changes, GeneratorOptions, data=data, console=console)


def _train(setup, model, out, run, accelerator, console, checkpoint):
    options, held_out = setup.options, setup.eval_split
    if len(held_out) > options.eval_images:
        held_out = held_out.subset(np.linspace(0, len(held_out) - 1, options.eval_images).astype(int))
    draw = None
    if options.sample_every and (run or options.fsdp):  # of a model in parts, all processes have to draw
        draw = Samples(setup, run and run.path / "samples")
    task = Diffusion(
        Objective(setup.scheduler()),
        setup.normalize,
        len(setup.class_names),
        accelerator.prepare(setup.loader(held_out)),
        options.class_dropout,
        Unreadable({"train": setup.train_split, "evaluation": held_out}, options.strict),
        draw,
    )
    if options.compile:
        model.compile()
    train(task, model, setup.loader(setup.train_split, train=True), options, run, accelerator, console, checkpoint)
    if run:
        pictures.losses(run)
    problems = list(task.unreadable.problems.values())
    return run, [warning_of(problems)] if problems else []
