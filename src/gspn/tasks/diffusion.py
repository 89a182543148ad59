"""Class-conditional diffusion: what `gspn train-diffusion` runs, and `train_generator` and `resume_generator`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DDPMScheduler
from rich.console import Console
from torch import Tensor

from gspn import plots
from gspn.data.augment import Augmentation
from gspn.data.images import UNREADABLE, Preprocessing, Split, generator
from gspn.data.latent_folder import is_latents
from gspn.data.latents import check_mirrored, make_latent_loader, open_latents
from gspn.data.loader import Loader, batches, can_be_kept, make_loader
from gspn.data.unreadable import Unreadable, warning_of
from gspn.models.dit import dit_names
from gspn.models.generator import config_of, generator_names
from gspn.models.pipeline import GSPNPipeline
from gspn.options import OptionError
from gspn.options.diffusion import PRESETS, SPEC, GeneratorOptions
from gspn.plots import draw_grid, drawing_samples, save_picture
from gspn.sampling.generators import build_generator, drop_classes, named_scheduler
from gspn.sampling.vae import check_vae, open_vae, scale_of
from gspn.tasks.base import Setup as BaseSetup
from gspn.tasks.base import Training, check_stream, labelled_splits, open_with, parameters_of, resume, start, tried
from gspn.tasks.held_out import HeldOutTask, fixed_noise
from gspn.tasks.objective import Objective, make_scheduler
from gspn.tasks.sizes import RandomSizes
from gspn.train.run import Run

SHOWN_CLASSES, SHOWN_EACH = 10, 4  # in the pictures of samples


class Diffusion(HeldOutTask):
    """The Task of loop.py: the hybrid loss of objective.py on images or latents with a class.

    Args:
        normalize: turns a batch's "image" into what the model sees. loader: of the held-out images.
        class_dropout: the probability of replacing a class by the null class.
        unreadable: counts the images that could not be read.
        draw: called with the model and the number of the epoch; returns a picture of samples or None.
        sizes: resizes the training images.
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
        sizes: RandomSizes | None = None,
    ):
        super().__init__(unreadable)
        self.objective, self.normalize, self.num_classes = objective, normalize, num_classes
        self.loader, self.dropout, self.draw, self.sizes = loader, class_dropout, draw, sizes

    def prepare(self, batch):
        self.unreadable.saw(batch)
        start, label = self.normalize(batch["image"]), batch["label"]
        start = self.sizes(start) if self.sizes else start
        count, device = len(label), start.device
        # Not in the model: diffusers' DiT embeds the class in each block, and would drop it in some of them only.
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
        """(squared error, bound) of each item (B,); 0 for images that could not be read."""
        start, noise, timestep, label = (batch[name] for name in ("start", "noise", "timestep", "label"))
        known = label != UNREADABLE
        noisy = self.objective.noisy(start, noise, timestep)
        output = model(noisy, timestep=timestep, class_labels=label.where(known, 0), return_dict=False)[0]
        with torch.autocast(start.device.type, enabled=False):
            losses = self.objective.losses(output, start, noise, timestep)
        return tuple(loss.where(known, 0.0) for loss in losses)

    def held_out_losses(self, model):
        for batch in batches(self.loader):
            start = self.normalize(batch["image"])
            noise, timestep = fixed_noise(batch["index"], start.shape[1:], self.objective.steps, start.device)
            parts = {"start": start, "noise": noise, "timestep": timestep, "label": batch["label"]}
            yield batch, dict(zip(("error", "bound"), self.losses(model, parts), strict=True))

    def metrics(self, means):
        return {
            "val_loss": means["error"] + means["bound"],
            "val_error": means["error"],
            "val_bound": means["bound"],
        }

    def after_epoch(self, model, loss):
        return self.draw(model, self.epochs) if self.draw else None

    def line(self, row):
        return (
            f"epoch {row['epoch']:3d}  loss {row['train_loss']:.4f}  validation: squared error {row['val_error']:.4f}, "
            f"bound {row['val_bound']:.4f} bits  {row['images_per_second']:.0f} images/s  {row['seconds']:.1f} s"
        )


@dataclass(kw_only=True)
class Setup(BaseSetup):
    """A generator and its data: labelled images, or latents of them.

    Attributes, beside those of the base: `preprocessing` is None for latents; `channels` and `size` (H, W) are those of
    the model's input.
    """

    spec: ClassVar = SPEC

    class_names: list[str]
    preprocessing: Preprocessing | None
    channels: int
    size: tuple[int, int]
    options: GeneratorOptions

    @classmethod
    def of(cls, where: str | Path, options: GeneratorOptions, *, resuming: bool = False) -> "Setup":
        latents = is_latents(where)
        data = open_latents(where, val_fraction=options.val_fraction) if latents else open_with(where, options)
        train_split, eval_split, eval_name, class_names = labelled_splits(data)
        check_stream(eval_split, eval_name, options.eval_images)
        if latents:
            _check_latents(where, data, train_split, options)
            preprocessing, channels, size, image_size = None, data.channels, data.size, data.image_size
        else:
            channels, size = options.channels or train_split.channels(), options.size or _size_of(train_split)
            # to [-1, 1], which noise and bound expect
            preprocessing = Preprocessing(channels, size, (0.5,) * channels, (0.5,) * channels)
            image_size = preprocessing.size
        options = replace(options, size=tuple(image_size))
        options = options.resolved(PRESETS["latents" if latents else "pixels"])
        if options.sizes:
            options = options.updated({"sizes": options.sizes})  # checks what did not come from a flag
            if latents:
                raise OptionError("sizes: latents cannot be resized, expected images as DATA")
        if options.sample_every and options.sample_steps > options.timesteps:
            raise OptionError(
                f"sample_steps must be at most timesteps, {options.timesteps}, got {options.sample_steps}"
            )
        if options.model in dit_names() and size[0] != size[1]:
            square = "encode square images (gspn encode --size N)" if latents else "choose a square --size"
            raise OptionError(
                f"size: diffusers' DiT takes square images only, got {image_size[0]}x{image_size[1]}: {square}, or "
                "choose a model of GSPN"
            )
        if options.fsdp and options.model in dit_names():
            raise OptionError("fsdp cannot shard DiT, whose blocks share an embedding")
        if latents and options.sample_every:
            _vae_of(data.vae)  # a VAE that cannot decode is found before the run folder is made
        return cls(
            data=data,
            train_split=train_split,
            eval_split=eval_split,
            eval_name=eval_name,
            class_names=class_names,
            preprocessing=preprocessing,
            channels=channels,
            size=tuple(size),
            options=options,
            notes=list(data.notes),
        )

    def scheduler(self) -> DDPMScheduler:
        """The noise schedule of the training."""
        options = self.options
        return make_scheduler(
            options.prediction,
            learn_sigma=options.learn_sigma,
            clip=self.preprocessing is not None,
            num_train_timesteps=options.timesteps,
            beta_schedule=options.schedule,
        )

    def model_config(self) -> dict:
        """The arguments of build_generator. Errors: OptionError."""
        options = self.options
        arguments = {
            "num_classes": len(self.class_names),
            "sample_size": self.size[0],
            "in_channels": self.channels,
            "learn_sigma": options.learn_sigma,
        }
        if options.model in generator_names():
            arguments |= {"prediction_type": options.prediction, "class_dropout_prob": options.class_dropout}
        # Written out, so that a run's model stays the same if a later version changes what a name stands for.
        named = config_of(options.model) if options.model in generator_names() else {}
        if options.sizes and options.model.startswith("GSPN-DiT"):
            named["size_condition"] = True
        own = sorted(set(arguments) & set(options.model_args))
        if own:
            raise OptionError(f"model_arg: {', '.join(own)} follows from the data and the other options")
        return {"name": options.model, "arguments": named | arguments | dict(options.model_args)}

    def model(self, device: torch.device) -> torch.nn.Module:
        """A new model, tried on one empty input. Errors: OptionError."""
        torch.manual_seed(self.options.seed)
        model = build_generator(self.model_config()).to(device)
        drop_classes(model, 0.0)  # Diffusion.prepare does
        with tried(self.options.model, f"{self.size[0]}x{self.size[1]}"), torch.inference_mode():
            empty, none = torch.zeros(1, self.channels, *self.size, device=device), torch.zeros(1, device=device)
            output = model.eval()(empty, timestep=none.long(), class_labels=none.long()).sample
            if output.shape[2:] != empty.shape[2:]:
                raise ValueError(f"it gives {output.shape[2]}x{output.shape[3]}")
        if "prediction_type" not in model.config:  # DiT of diffusers does not know what it predicts
            model.register_to_config(prediction_type=self.options.prediction)
        if self.options.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        return model

    def vae(self) -> dict | None:
        """For config.json: the VAE of the latents; None for pixels."""
        if self.preprocessing is not None:
            return None
        described = self.data.vae
        return {"path": described["path"], **scale_of(described), "digest": described["digest"]}

    def config(self, model) -> dict:
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

    def about(self, model):
        options, (h, w) = self.options, self.size
        as_latents = f" as latents of {self.channels}x{h}x{w}" if self.preprocessing is None else ""
        return (
            f"{options.model}, {parameters_of(model)}",
            f"of {len(self.class_names)} classes, {options.size[0]}x{options.size[1]}{as_latents}",
            (f"predicts {options.prediction}",),
        )

    def normalize(self, image: Tensor) -> Tensor:
        """The model's input for a batch of the loader."""
        return image if self.preprocessing is None else self.preprocessing.normalize(image)

    def reads_without_workers(self) -> bool:
        if self.preprocessing is None or self.options.epochs == 1:
            return False
        return can_be_kept(self.train_split, self.preprocessing, None)

    def loader(self, split: Split, train: bool = False) -> Loader:
        """Batches of a split."""
        options = self.options
        common = dict(train=train, seed=options.seed, workers=options.workers)
        if self.preprocessing is None:
            return make_latent_loader(split, options.batch_size, flip=options.flip, **common)
        augmentation = Augmentation(flip=True) if options.flip else None
        common |= dict(augmentation=augmentation, keep=options.epochs > 1)
        return make_loader(split, self.preprocessing, options.batch_size, **common)

    def random_sizes(self) -> RandomSizes | None:
        if not self.options.sizes:
            return None
        # diffusers' DiT has one side only, and a patch of its own
        return RandomSizes(*self.options.sizes, self.patch_size(), square=self.options.model in dit_names())

    def patch_size(self) -> int:
        """The model's patch in pixels of its map."""
        return self.model_config()["arguments"].get("patch_size") or int(self.options.model.split("/")[1])

    def train(self, training: Training) -> tuple[Run | None, list[str]]:
        options, run, held_out = self.options, training.run, self.held_out()
        draw = None
        if options.sample_every and (run or options.fsdp):  # a sharded model needs all processes to draw
            draw = Samples(self, run and run.path / "samples")
        task = Diffusion(
            Objective(self.scheduler()),
            self.normalize,
            len(self.class_names),
            training.accelerator.prepare(self.loader(held_out)),
            options.class_dropout,
            Unreadable({"train": self.train_split, "evaluation": held_out}, options.strict),
            draw,
            self.random_sizes(),
        )
        training.loop(task, self.loader(self.train_split, train=True), options)
        if run:
            plots.losses(run)
        problems = list(task.unreadable.problems.values())
        return run, [warning_of(problems)] if problems else []


def _check_latents(where, data, train_split, options):
    """Raises OptionError for options that encoded images cannot follow."""
    if options.size not in (None, data.image_size):
        raise OptionError(f"size: {where} holds latents of images of {data.image_size}, got {options.size}")
    for name in ("channels", "class_names", "image_column", "label_column", "streaming"):
        if getattr(options, name) not in (None, False):
            raise OptionError(f"{name}: {where} holds latents, for which `gspn encode` has settled it: leave it out")
    if options.strict and data.unreadable:
        raise OptionError(
            f"strict: {len(data.unreadable)} images were left out of {where}, such as {data.unreadable[0]}"
        )
    if options.flip:
        check_mirrored(train_split)


def _vae_of(described):
    """The VAE of the latents. Errors: OptionError."""
    try:
        return check_vae(open_vae(described["path"]), described)
    except OptionError as error:
        raise OptionError(f"{error} (--sample-every 0 trains without the VAE and draws no samples)") from error


def _size_of(split):
    """The size of the images. Errors: OptionError where there are several."""
    if split.pixels is not None:
        return tuple(split.pixels.shape[2:])
    sizes = sorted({(image.height, image.width) for image in split.sample()})
    if len(sizes) > 1:
        raise OptionError(f"the images have several sizes, such as {sizes[0]} and {sizes[-1]}: choose one with --size")
    return sizes[0]


class Samples:
    """Draws RUN/samples/epoch-0001.png and so on: a few classes, with the same noise every time."""

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
        scheduler = named_scheduler("dpm-solver++", setup.scheduler(), options.sample_steps)
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
        data: see labelled.open_data; or a folder of latents that encode made.
        out: the run folder: new, empty, or with `overwrite` an earlier run.
        options: GeneratorOptions. console: rich's, or None for silence.
    Returns: (the Run, in the main process; list of warnings).
    Errors: BusyError, DataError, OptionError, RunError, SaveError, TrainingError.
    """
    return start(Setup, data, out, options or GeneratorOptions(), overwrite=overwrite, console=console)


def resume_generator(
    path: str | Path,
    changes: Mapping[str, Any] | None = None,
    *,
    data: str | Path | None = None,
    console: Console | None = None,
) -> tuple[Run, list[str]]:
    """Continues a training that was stopped, see gspn.tasks.base.resume. Returns and errors: as train_generator."""
    return resume(Setup, path, changes, data=data, console=console)
