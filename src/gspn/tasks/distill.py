"""Distillation of Stable Diffusion with GSPN in the place of self-attention: `distill` and `resume_distillation`, which
are what `gspn distill` runs. The loss is student.py's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from gspn import plots as pictures
from gspn.data.augment import Augmentation
from gspn.data.captions import open_captions
from gspn.data.images import Preprocessing, Split, mixed_seed
from gspn.data.labelled import Data
from gspn.data.loader import Loader, batches, make_loader
from gspn.data.tables import Stream
from gspn.data.unreadable import Unreadable, warning_of
from gspn.digests import is_earlier
from gspn.options import OptionError, far_from
from gspn.stable_diffusion import fit
from gspn.stable_diffusion.swap import swap
from gspn.tasks.base import resume, start
from gspn.tasks.distill_options import PRESET, DistillOptions
from gspn.tasks.side_by_side import SideBySide
from gspn.tasks.student import PARTS, Distillation, Student
from gspn.tasks.text_to_image import TextToImage, open_text_to_image
from gspn.train.loop import autocast, seed_everything, train
from gspn.train.run import Run, RunError

TASK = "distillation"  # in a run's config.json


@dataclass
class Setup:
    """What is distilled on what: the teacher, the data, and options that leave nothing open."""

    data: Data
    train_split: Split
    eval_split: Split
    eval_name: str
    teacher: TextToImage
    digest: str
    preprocessing: Preprocessing
    options: DistillOptions
    notes: list[str]
    fitted: dict[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, where: str | Path, options: DistillOptions) -> "Setup":
        """Opens data and teacher, and settles the options for them. Errors: DataError, OptionError."""
        options = options.settled(PRESET)
        if options.base is None:
            raise OptionError("base: the pipeline to learn from is missing")
        if options.fsdp:
            raise OptionError("fsdp: only the swapped layers are trained, which are too small to be sharded")
        if not options.noise_weight + options.output_weight + options.feature_weight:
            raise OptionError("noise_weight, output_weight and feature_weight are all 0: nothing would be learned")
        data = open_captions(
            where,
            val_fraction=options.val_fraction,
            image_column=options.image_column,
            caption_column=options.caption_column,
            streaming=options.streaming,
        )
        train_split, eval_split, eval_name = data.for_training()
        if isinstance(eval_split, Stream) and len(eval_split) > options.eval_images:
            raise OptionError(
                f"eval_images: of a stream no part can be taken, and the {eval_name} split has {len(eval_split)} "
                f"images: expected as many, got {options.eval_images}"
            )
        teacher = open_text_to_image(
            options.base, precision=options.precision, variant=options.variant, cache=options.cache
        )
        far = None
        if options.size and teacher.unet.config.sample_size is not None:
            far = far_from(options.size, teacher.native_size(), f"{teacher.path} was made for")
        options = replace(options, base=teacher.path, size=options.size or teacher.native_size())
        teacher.check_size(options.size)
        preprocessing = Preprocessing(3, options.size, (0.5,) * 3, (0.5,) * 3)
        notes = [*data.notes, far, teacher.too_long(train_split.captions)]
        return cls(
            data,
            train_split,
            eval_split,
            eval_name,
            teacher,
            teacher.digest(),
            preprocessing,
            options,
            [note for note in notes if note],
        )

    def model(self, device: torch.device) -> Student:
        """Swaps the UNet's attention, and tries it once; float32 layers, whatever the rest is. Errors: OptionError."""
        options, teacher = self.options, self.teacher
        torch.manual_seed(options.seed)
        teacher.pipe.to(device)
        try:
            swapped = swap(teacher.unet, form=options.form, segment=options.segment, init=options.init)
        except (TypeError, ValueError) as error:
            raise OptionError(f"the attention of {options.base} cannot be swapped: {error}") from error
        for layer in swapped.layers.values():
            layer.float().requires_grad_(True)
        if options.gradient_checkpointing:
            teacher.unet.enable_gradient_checkpointing()
        student = Student(teacher, swapped)
        try:
            with torch.no_grad(), autocast(device, options.precision):
                start = teacher.latents(torch.zeros(1, 3, *options.size, device=device), draw=False)
                student(start, torch.zeros(1, device=device).long(), teacher.conditions([None], options.size))
        except (RuntimeError, TypeError, ValueError) as error:
            what = f"{options.base} fails when tried with {options.size[0]}x{options.size[1]}"
            raise OptionError(f"{what}: {error}") from error
        return student

    def first_weights(self, model):
        """With `fit`, teaches each layer its own attention's output first; a note on that."""
        options = self.options
        if not options.fit:
            return None
        task, loader, epoch = self.task(model, None, None), self.loader(self.train_split, train=True), 0
        waiting = iter(())

        def run():
            nonlocal waiting, epoch
            batch = next(waiting, None)
            if batch is None:
                loader.begin(epoch)
                waiting, epoch = batches(loader), epoch + 1
                batch = next(waiting)
            device = model.teacher.unet.device
            seed_everything(mixed_seed(options.seed, epoch, int(batch["index"][0])))
            batch = task.prepare({name: rows.to(device) for name, rows in batch.items()})
            for part in task.cut(batch):
                with autocast(device, options.precision):
                    model.teacher.predict(*task.inputs(part))

        self.fitted = fit(
            model.swap, run, maps=options.fit_maps, steps=options.fit, batch_size=options.batch_size, seed=options.seed
        )
        before, after = (np.mean([errors[i] for errors in self.fitted.values()]) for i in range(2))
        return (
            f"each layer was taught its attention's output on {options.fit_maps} feature maps: relative error "
            f"{before:.3f} before, {after:.3f} after (mean of {len(self.fitted)} layers)"
        )

    def config(self, model) -> dict:
        """What config.json keeps of a distillation."""
        options, teacher = self.options, self.teacher
        return {
            "base": {"path": teacher.path, "class": type(teacher.pipe).__name__, "digest": self.digest},
            "swap": {
                "form": options.form,
                "segment": options.segment,
                "init": options.init,
                "layers": {name: layer.channels for name, layer in model.swap.layers.items()},
                "fitted": self.fitted,
            },
            "prediction_type": teacher.objective.prediction_type,
            "image_size": list(options.size),
        }

    def check_config(self, config):
        """Raises RunError where the teacher is not the one that the run began with."""
        told = config["base"]["digest"]
        own = self.teacher.digest(like=told) if is_earlier(told) else self.digest
        if own != told:
            raise RunError(
                f"{self.teacher.path} is not the pipeline that the run learns from: other weights, settings or noise"
            )

    def describe(self, model) -> str:
        options, (height, width) = self.options, self.options.size
        ours, rest = (sum(p.numel() for p in module.parameters()) for module in (model, self.teacher.unet))
        extent = "global" if options.segment is None else f"segments of {options.segment}"
        return (
            f"{self.teacher.path}: GSPN ({options.form}, {extent}) for {len(model.swap.layers)} self-attentions, "
            f"{ours:,} of the UNet's {rest:,} parameters, which are trained; {len(self.train_split):,} training and "
            f"{len(self.eval_split):,} {self.eval_name} images with captions, {height}x{width}\n"
            f"{options.epochs} epoch{'s' * (options.epochs > 1)}, batch size {options.batch_size}, learning rate "
            f"{options.lr:g}, EMA {options.ema:g}, {options.precision}, predicts "
            f"{self.teacher.objective.prediction_type}, seed {options.seed}"
        )

    def loader(self, split: Split, train: bool = False) -> Loader:
        """Batches of a split."""
        options = self.options
        return make_loader(
            split,
            self.preprocessing,
            options.batch_size,
            train=train,
            augmentation=Augmentation(flip=True) if options.flip else None,
            seed=options.seed,
            workers=options.workers,
        )

    def task(self, student: Student, held_out: Split | None, loader: Loader | None, **more) -> Distillation:
        """The task, with the held-out images that `loader` gives."""
        options = self.options
        splits = {"train": self.train_split} | ({"evaluation": held_out} if held_out else {})
        return Distillation(
            student,
            self.train_split.captions,
            held_out and held_out.captions,
            self.preprocessing,
            loader,
            weights={name: getattr(options, f"{name}_weight") for name in PARTS},
            dropout=options.caption_dropout,
            parts=options.accumulate,
            unreadable=Unreadable(splits, options.strict),
            **more,
        )


def distill(
    data: str | Path,
    out: str | Path,
    options: DistillOptions,
    *,
    overwrite: bool = False,
    console: Console | None = None,
) -> tuple[Run | None, list[str]]:
    """Distils a Stable Diffusion pipeline, `options.base`, into one with GSPN in the place of self-attention; keeps the
    swapped layers of the best epoch in `out`, from where gspn.load_swap reads them, draws curves and samples.

    Args:
        data: images with captions, see captions.open_captions.
        out: the run folder; not to exist, to be empty, or an earlier run with `overwrite`.
        options: DistillOptions. console: rich's, or None for silence.
    Returns: (Run, in other processes than the main one None; warnings). Errors: BusyError, DataError,
        OptionError, RunError, SaveError, TrainingError.
    """
    return start(TASK, Setup.of, _train, data, out, options, overwrite=overwrite, console=console)


def resume_distillation(
    path: str | Path,
    changes: Mapping[str, Any] | None = None,
    *,
    data: str | Path | None = None,
    console: Console | None = None,
) -> tuple[Run | None, list[str]]:
    """Goes on with a distillation that was stopped, from its last checkpoint, exactly as if it had not been.

    Args:
        path: the run folder. data: where the data are now, if they were moved. console: as in `distill`.
        changes: options by name that change nothing of the result, such as the number of workers, or where the pipeline
            is now (base).
    Returns and errors: as `distill`.
    """
    return resume(TASK, Setup.of, _train, path, changes, DistillOptions, data=data, console=console)


def _train(setup, student, out, run, accelerator, console, checkpoint):
    options, held_out = setup.options, setup.eval_split
    if len(held_out) > options.eval_images:
        held_out = held_out.subset(np.linspace(0, len(held_out) - 1, options.eval_images).astype(int))
    draw = None
    if run and options.sample_every:
        draw = SideBySide(student, held_out.captions, options, run.path / "samples")
    task = setup.task(
        student,
        held_out,
        accelerator.prepare(setup.loader(held_out)),
        draw=draw,
        save=partial(student.swap.save, run.path) if run else None,
    )
    loader = setup.loader(setup.train_split, train=True)
    train(task, student, loader, options, run, accelerator, console, checkpoint)
    if run:
        pictures.distillation(run)
    problems = list(task.unreadable.problems.values())
    return run, [warning_of(problems)] if problems else []
