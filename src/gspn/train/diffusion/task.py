"""Class-conditional diffusion: the task for the loop, and `train_generator` and `resume_generator`, which are what
`gspn train-diffusion` runs.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.models.embeddings import LabelEmbedding
from rich.console import Console
from torch import Tensor

from gspn.models.dit import create_dit, dit_names
from gspn.models.generator import create_generator, generator_names
from gspn.train.checkpoint import Run, RunError, writing
from gspn.train.classify import _changed, _complete, _speaker, _versions, open_with, readable
from gspn.train.data import Data
from gspn.train.evaluate import OPEN_OPTIONS
from gspn.train.diffusion.objective import Objective, make_scheduler
from gspn.train.diffusion.options import PRESETS, GeneratorOptions
from gspn.train.images import UNREADABLE, Preprocessing, Split, generator
from gspn.train.loader import make_loader
from gspn.train.loop import autocast, make_accelerator, train
from gspn.train.options import OptionError, file_text
from gspn.train.recipe import SMALL, Augmentation


class Diffusion:
    """The Task of loop.py: the hybrid loss of objective.py on images or latents with a class."""

    def __init__(self, objective, normalize, num_classes, eval_loader, options):
        self.objective, self.normalize, self.num_classes = objective, normalize, num_classes
        self.loader, self.dropout = eval_loader, options.class_dropout

    def prepare(self, batch):
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
        rows = []
        for batch in self.loader:
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
        known, error, bound = rows[first, 1:].sum(0).tolist()
        error, bound = error / max(known, 1), bound / max(known, 1)
        return {"val_loss": error + bound, "val_error": error, "val_bound": bound, "images": int(known)}

    def state(self):
        return {}

    def restore(self, state):
        pass

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
    """What a generator is trained on and with: the data, and options that leave nothing open."""

    data: Data
    train_split: Split
    eval_split: Split
    eval_name: str
    class_names: list[str]
    preprocessing: Preprocessing
    options: GeneratorOptions
    notes: list[str]

    @classmethod
    def of(cls, data: Data, options: GeneratorOptions) -> "Setup":
        """Settles the options for these data. Errors: DataError, OptionError."""
        train_split, eval_split, eval_name = data.for_training()
        class_names = train_split.class_names or [str(i) for i in range(int(train_split.labels.max()) + 1)]
        train_split, eval_split = train_split.relabelled(class_names), eval_split.relabelled(class_names)
        channels = options.channels or train_split.channels()
        if options.size is not None:
            size = options.size
        elif train_split.pixels is not None:
            size = tuple(train_split.pixels.shape[2:])
        else:
            sizes = {(image.height, image.width) for image in train_split.sample()}
            size = sizes.pop() if len(sizes) == 1 else (64, 64)
        size = tuple(size)
        # to [-1, 1], between which the noise and the bound are meant
        preprocessing = Preprocessing(channels, size, (0.5,) * channels, (0.5,) * channels)
        options = replace(options, size=size, channels=channels, model=options.model or "GSPN-micro/2")
        options = options.settled(PRESETS["pixels"])
        return cls(data, train_split, eval_split, eval_name, class_names, preprocessing, options, list(data.notes))

    def scheduler(self) -> DDPMScheduler:
        options = self.options
        return make_scheduler(
            options.prediction,
            learn_sigma=options.learn_sigma,
            clip=True,
            num_train_timesteps=options.timesteps,
            beta_schedule=options.schedule,
        )

    def model_config(self) -> dict:
        """What config.json keeps of the model: build_generator makes it of this."""
        options = self.options
        arguments = {
            "num_classes": len(self.class_names),
            "sample_size": self.options.size[0],
            "in_channels": self.preprocessing.channels,
            "learn_sigma": options.learn_sigma,
        }
        return {"name": options.model, "arguments": arguments | dict(options.model_args)}

    def describe(self, model) -> str:
        options, count = self.options, sum(parameter.numel() for parameter in model.parameters())
        height, width = options.size
        return (
            f"{options.model}, {count:,} parameters; {len(self.train_split):,} training and {len(self.eval_split):,} "
            f"{self.eval_name} images of {len(self.class_names)} classes, {height}x{width}\n"
            f"{options.epochs} epoch{'s' * (options.epochs > 1)}, batch size {options.batch_size}, learning rate "
            f"{options.lr:g}, EMA {options.ema:g}, {options.precision}, predicts {options.prediction}, seed {options.seed}"
        )


def build_generator(config: Mapping) -> torch.nn.Module:
    """The model, with random weights, of a run's config["model"]. Errors: OptionError."""
    name, arguments = config["name"], config["arguments"]
    names = (*generator_names(), *dit_names())
    if name not in names:
        raise OptionError(f"there is no generator {name!r}; there are {', '.join(names)}")
    try:
        model = (create_generator if name in generator_names() else create_dit)(name, **arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        raise OptionError(f"the model {name} cannot be made: {error}") from error
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0  # Diffusion.prepare drops classes
    return model


def make_model(setup: Setup, device) -> torch.nn.Module:
    """A new model, tried on one empty image. Errors: OptionError."""
    torch.manual_seed(setup.options.seed)
    model = build_generator(setup.model_config()).to(device)
    height, width = setup.options.size
    try:
        with torch.inference_mode():
            empty = torch.zeros(1, setup.preprocessing.channels, height, width, device=device)
            index = torch.zeros(1, dtype=torch.long, device=device)
            model.eval()(empty, timestep=index, class_labels=index)
    except (RuntimeError, ValueError) as error:
        raise OptionError(f"{setup.options.model} fails when tried with {height}x{width}: {error}") from error
    if setup.options.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def train_generator(
    data: str | Path,
    out: str | Path,
    options: GeneratorOptions | None = None,
    *,
    overwrite: bool = False,
    console: Console | None = None,
) -> Run:
    """Trains a generator on `data` into the run folder `out`.

    Args:
        data: see data.open_data. out: the run folder; not to exist, to be empty, or an earlier run with `overwrite`.
        options: GeneratorOptions. console: rich's, or None for silence.
    Errors: DataError, OptionError, RunError, SaveError, TrainingError.
    """
    options = options or GeneratorOptions()
    accelerator = make_accelerator()
    say = _speaker(accelerator, console)
    Run.check_free(out, overwrite)
    setup = Setup.of(open_with(data, options), options)
    model = make_model(setup, accelerator.device)
    for note in setup.notes:
        say(f"note: {note}")
    say(setup.describe(model))
    config = {
        "task": "diffusion",
        "model": {**setup.model_config(), "class": type(model).__name__, "config": dict(model.config)},
        "scheduler": {"class": "DDPMScheduler", "config": dict(setup.scheduler().config)},
        "space": {
            "kind": "pixels",
            "channels": setup.preprocessing.channels,
            "size": list(setup.options.size),
            "image_size": list(setup.options.size),
        },
        "vae": None,
        "class_names": setup.class_names,
        "data": {
            "where": setup.data.where,
            "kind": setup.data.kind,
            "split": setup.eval_name,
            "fingerprint": setup.data.fingerprint(),
            **{name: getattr(options, name) for name in OPEN_OPTIONS},
        },
        "options": asdict(setup.options),
        "seed": setup.options.seed,
        "versions": _versions(),
    }
    accelerator.wait_for_everyone()
    with writing(out) if accelerator.is_main_process else nullcontext():
        run = None
        if accelerator.is_main_process:
            run = Run.create(out, config, overwrite, options=file_text(setup.options, {"data": str(data)}))
        return _train(setup, model, run, accelerator, console)


def resume_generator(
    path: str | Path,
    changes: Mapping[str, Any] | None = None,
    *,
    data: str | Path | None = None,
    console: Console | None = None,
) -> Run:
    """Goes on with a training that was stopped, from its last checkpoint, exactly as if it had not been."""
    options = _changed(Run.open(path).config, changes or {}, "diffusion", GeneratorOptions)
    accelerator = make_accelerator()
    say = _speaker(accelerator, console)
    with writing(path) if accelerator.is_main_process else nullcontext():
        run, checkpoint = Run.open(path), None
        with readable(path):
            setup = Setup.of(open_with(data or run.config["data"]["where"], options), options)
            if setup.data.fingerprint() != run.config["data"]["fingerprint"]:
                raise RunError(f"{setup.data.where} is not what {path} was trained on")
        model = make_model(setup, accelerator.device)
        if run.has_checkpoint("last"):
            checkpoint = _complete(path, *run.load_checkpoint("last"))
        say(f"{setup.describe(model)}\ngoing on from step {checkpoint[1]['step'] if checkpoint else 0}")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            run.rewind(checkpoint[1]["epoch"] if checkpoint else 0)
            run.prune(options.keep)
        return _train(setup, model, run if accelerator.is_main_process else None, accelerator, console, checkpoint)


def _train(setup, model, run, accelerator, console, checkpoint=None):
    options = setup.options
    augmentation = Augmentation(flip=options.flip) if options.flip else None
    loader = make_loader(
        setup.train_split,
        setup.preprocessing,
        options.batch_size,
        train=True,
        augmentation=augmentation,
        seed=options.seed,
        workers=options.workers,
    )
    held_out = setup.eval_split
    if len(held_out) > options.eval_images:
        held_out = held_out.subset(np.linspace(0, len(held_out) - 1, options.eval_images).astype(int))
    eval_loader = make_loader(held_out, setup.preprocessing, options.batch_size, workers=options.workers)
    task = Diffusion(
        Objective(setup.scheduler()),
        setup.preprocessing.normalize,
        len(setup.class_names),
        accelerator.prepare(eval_loader),
        options,
    )
    train(task, model, loader, options, run, accelerator, console, checkpoint)
    return run
