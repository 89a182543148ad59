"""Distillation of Stable Diffusion with GSPN in the place of self-attention: what `gspn distill` runs, `distill` and
`resume_distillation`. The loss is in student.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from rich.console import Console

from gspn import plots
from gspn.data.augment import Augmentation
from gspn.data.captions import open_captions
from gspn.data.images import Preprocessing, Split, mixed_seed
from gspn.data.loader import Loader, batches, make_loader
from gspn.data.unreadable import Unreadable, warning_of
from gspn.digests import is_earlier
from gspn.models.schedulers import check_sampler, check_steps
from gspn.options import OptionError, far_from
from gspn.options.distill import PRESET, SPEC, DistillOptions
from gspn.stable_diffusion import fit, rank
from gspn.stable_diffusion.keeping import check_count, is_count
from gspn.stable_diffusion.swap import swap
from gspn.tasks.base import Setup as BaseSetup
from gspn.tasks.base import Training, check_stream, resume, start, tried
from gspn.tasks.side_by_side import SideBySide
from gspn.tasks.sizes import ChosenSizes, enlarged_note, times
from gspn.tasks.student import PARTS, Distillation, Student
from gspn.tasks.text_to_image import TextToImage, open_text_to_image
from gspn.train.loop import autocast, seed_everything
from gspn.train.run import Run, RunError

RANKED_BY = 64  # inputs of the UNet


@dataclass(kw_only=True)
class Setup(BaseSetup):
    """The teacher and images with captions.

    Attributes, beside those of the base: `digest` is the teacher's before the swap; `fitted` holds the relative errors
    of each layer before and after --fit; `kept` the attentions that stay where their number was given, or that stayed
    in a run that is resumed.
    """

    spec: ClassVar = SPEC

    teacher: TextToImage
    digest: str
    preprocessing: Preprocessing
    options: DistillOptions
    fitted: dict[str, tuple[float, float]] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, where: str | Path, options: DistillOptions, *, resuming: bool = False) -> "Setup":
        options = options.resolved(PRESET)
        if options.base is None:
            raise OptionError("base: expected a pipeline to learn from, got none")
        if options.fsdp:
            raise OptionError("fsdp: distillation cannot shard; only the small swapped layers are trained")
        if options.layer_decay < 1:
            raise OptionError(
                f"layer_decay: got {options.layer_decay:g}, but the swapped layers all learn at one rate: expected 1, "
                "so leave it out"
            )
        if not options.noise_weight + options.output_weight + options.feature_weight:
            raise OptionError("noise_weight, output_weight and feature_weight are all 0: expected one above 0")
        if options.cache and options.sizes:
            raise OptionError(
                "cache and sizes were both given: each epoch cuts and resizes an image anew, so that its latents are "
                "seldom found again and fill the memory: expected one of the two, so leave cache out"
            )
        if options.away_weight and not options.sizes:
            raise OptionError("away_weight is for training at several sizes: expected sizes too, such as 0.75,1,1.5")
        options = options.updated({"size": options.size})  # reads and checks what did not come from a flag
        if options.sizes:
            options = options.updated({"sizes": options.sizes})
            if not options.noise_weight + options.away_weight:
                raise OptionError(
                    "sizes: noise_weight and away_weight are both 0, so that nothing is learned at other sizes: "
                    "expected one above 0"
                )
        if is_count(options.keep_attention) and not options.fit:
            raise OptionError(
                f"keep_attention: the {options.keep_attention} attentions that matter most are found after a fit: "
                "expected a fit above 0, such as 200"
            )
        data = open_captions(
            where,
            val_fraction=options.val_fraction,
            image_column=options.image_column,
            caption_column=options.caption_column,
            streaming=options.streaming,
        )
        train_split, eval_split, eval_name = data.for_training()
        check_stream(eval_split, eval_name, options.eval_images)
        teacher = open_text_to_image(
            options.base, precision=options.precision, variant=options.variant, cache=options.cache
        )
        if options.sample_every:
            try:
                check_sampler(teacher.pipe.scheduler)
                check_steps(teacher.pipe.scheduler, options.sample_steps)
            except ValueError as error:
                raise OptionError(f"sample_steps: {error}; --sample-every 0 draws none") from error
        far = None
        if options.size and teacher.unet.config.sample_size is not None:
            far = far_from(options.size, teacher.native_size(), f"{teacher.path} was made for")
        options = replace(options, base=teacher.path, size=options.size or teacher.native_size())
        teacher.check_size(options.size)
        preprocessing = Preprocessing(3, options.size, (0.5,) * 3, (0.5,) * 3)
        notes = [*data.notes, far, teacher.too_long(train_split.captions)]
        if options.sizes:
            notes += size_notes(options, teacher.multiple)
            notes.append(enlarged_note(train_split, times(options.size, (max(options.sizes),) * 2, teacher.multiple)))
        return cls(
            data=data,
            train_split=train_split,
            eval_split=eval_split,
            eval_name=eval_name,
            teacher=teacher,
            digest=teacher.digest(),
            preprocessing=preprocessing,
            options=options,
            notes=[note for note in notes if note],
        )

    def model(self, device: torch.device) -> Student:
        """Swaps the UNet's attention, and tries it once. The swapped layers are float32. Errors: OptionError."""
        options, teacher = self.options, self.teacher
        torch.manual_seed(options.seed)
        teacher.pipe.to(device)
        keep = options.keep_attention
        try:
            keep = None if is_count(keep) else keep  # first_weights ranks the layers
            chosen = {name: getattr(options, name) for name in ("form", "segment", "proxy_dim", "init")}
            swapped = swap(teacher.unet, **chosen, keep=keep)
            if is_count(options.keep_attention):
                check_count(options.keep_attention, list(swapped.layers))
        except (TypeError, ValueError) as error:
            raise OptionError(f"the attention of {options.base} cannot be swapped: {error}") from error
        for layer in swapped.layers.values():
            layer.float().requires_grad_(True)
        if options.gradient_checkpointing:
            teacher.unet.enable_gradient_checkpointing()
        if teacher.unet.config.sample_size is None or options.size != teacher.native_size():
            swapped.sample_size = tuple(side // teacher.pipe.vae_scale_factor for side in options.size)
        student = Student(teacher, swapped)
        sizes = self.random_sizes()
        size = sizes.largest if sizes else options.size
        tries = tried(options.base, f"{size[0]}x{size[1]}")
        with tries, torch.no_grad(), autocast(device, options.precision):
            start = teacher.latents(torch.zeros(1, 3, *size, device=device), draw=False)
            student(start, torch.zeros(1, device=device).long(), teacher.conditions([None], size))
        return student

    def first_weights(self, model):
        """With `fit`, first fits each layer to the output of its attention layer; returns a note on that."""
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
        note = (
            f"each layer was fitted to its attention layer on {options.fit_maps} feature maps: relative error "
            f"{before:.3f} before, {after:.3f} after (mean of {len(self.fitted)} layers)"
        )
        if is_count(options.keep_attention):
            if self.kept:  # those with which the run began: another machine might rank otherwise
                note += f"; kept as when the run began: {', '.join(self.kept)}"
            else:
                with autocast(model.teacher.unet.device, options.precision):  # as in run
                    errors = rank(model.swap, run, maps=min(options.fit_maps, RANKED_BY))
                self.kept = broadcast_object_list(list(errors)[: options.keep_attention])  # the same in all processes
                told = ", ".join(f"{name} ({errors[name]:.3f})" for name in self.kept)
                note += f"; kept, with the error of the UNet's output that their replacement causes: {told}"
            model.keep(self.kept)
        return note

    def config(self, model) -> dict:
        options, teacher = self.options, self.teacher
        return {
            "base": {"path": teacher.path, "class": type(teacher.pipe).__name__, "digest": self.digest},
            "swap": {
                "form": options.form,
                "segment": options.segment,
                "proxy_dim": options.proxy_dim,
                "init": options.init,
                "layers": {name: layer.channels for name, layer in model.swap.layers.items()},
                "kept": list(model.swap.kept),
                "fitted": self.fitted,
            },
            "prediction_type": teacher.objective.prediction_type,
            "image_size": list(options.size),
        }

    def check_config(self, config):
        """Takes over which attentions stayed. Raises RunError where the teacher is not the one that the run began
        with."""
        self.kept = list(config.get("swap", {}).get("kept", ()))
        recorded = config["base"]["digest"]
        own = self.teacher.digest(like=recorded) if is_earlier(recorded) else self.digest
        if own != recorded:
            raise RunError(
                f"{self.teacher.path} is not the pipeline that the run learns from: its weights, settings or noise "
                "schedule differ"
            )

    def note_moved(self, run):
        run.moved("base", "path", self.teacher.path)

    def about(self, model):
        options, sizes = self.options, "{}x{}".format(*self.options.size)
        if options.sizes:
            sizes += f" times {', '.join(f'{factor:g}' for factor in options.sizes)}"
        layers = {name: layer for name, layer in model.swap.layers.items() if name not in self.kept}
        trained = sum(p.numel() for layer in layers.values() for p in layer.parameters())
        total = sum(p.numel() for p in self.teacher.unet.parameters())
        kept = len({*model.swap.kept, *self.kept})
        kept = f" ({kept} kept)" if kept else ""
        extent = "global" if options.segment is None else f"segments of {options.segment}"
        return (
            f"{self.teacher.path}: GSPN ({options.form}, {extent}) for {len(layers)} self-attentions{kept}, "
            f"{trained:,} of the UNet's {total:,} parameters, which are trained",
            f"with captions, {sizes}",
            (f"predicts {self.teacher.objective.prediction_type}",),
        )

    def random_sizes(self) -> ChosenSizes | None:
        options = self.options
        return ChosenSizes(options.size, options.sizes, self.teacher.multiple) if options.sizes else None

    def loader(self, split: Split, train: bool = False, size: tuple[int, int] | None = None) -> Loader:
        """Batches of a split, at the run's size or another."""
        options = self.options
        return make_loader(
            split,
            replace(self.preprocessing, size=size or options.size),
            options.batch_size,
            train=train,
            augmentation=Augmentation(flip=True) if options.flip else None,
            seed=options.seed,
            workers=options.workers,
        )

    def task(self, student: Student, held_out: Split | None, loader: Loader | None, **more) -> Distillation:
        """The task; `loader` is of the held-out images."""
        options = self.options
        splits = {"train": self.train_split} | ({"evaluation": held_out} if held_out else {})
        return Distillation(
            student,
            self.train_split.captions,
            held_out and held_out.captions,
            self.preprocessing,
            loader,
            weights={name: getattr(options, f"{name}_weight") for name in PARTS},
            away=options.away_weight,
            dropout=options.caption_dropout,
            parts=options.accumulate,
            unreadable=Unreadable(splits, options.strict),
            **more,
        )

    def train(self, training: Training) -> tuple[Run | None, list[str]]:
        options, run, student, held_out = self.options, training.run, training.model, self.held_out()
        draw, sizes = None, self.random_sizes()
        student.keep([name for name in self.kept if name in student.swap.layers])
        if run and options.sample_every:
            draw = SideBySide(student, held_out.captions, options, run.path / "samples")
        task = self.task(
            student,
            held_out,
            training.accelerator.prepare(self.loader(held_out)),
            draw=draw,
            sizes=sizes,
            save=partial(student.swap.save, run.path) if run else None,
        )
        # At the largest size: from there, images are only made smaller.
        loader = self.loader(self.train_split, train=True, size=sizes and sizes.largest)
        training.loop(task, loader, options)
        if run:
            plots.distillation(run)
        problems = list(task.unreadable.problems.values())
        return run, [warning_of(problems)] if problems else []


def size_notes(options: DistillOptions, multiple: int) -> list[str]:
    """Notes on factors of `sizes` that do not give what one would expect, as sides are multiples of `multiple`."""
    factors: dict[str, list[str]] = {}  # by the size that they give
    for factor in dict.fromkeys(options.sizes):  # one that is given twice is meant to be
        size = times(options.size, (factor, factor), multiple)
        factors.setdefault("{}x{}".format(*size), []).append(f"{factor:g}")
    own = "{}x{}".format(*options.size)
    notes = [
        f"sizes: the factors {' and '.join(same)} give the same size, {size}, as sides are multiples of {multiple}"
        for size, same in factors.items()
        if len(same) > 1
    ]
    if own not in factors:
        notes.append(f"sizes: none of the factors gives {own}: the student never sees the size of its validation")
    if options.away_weight and list(factors) == [own]:
        notes.append(f"--away-weight does nothing: no factor of --sizes gives another size than {own}")
    return notes


def distill(
    data: str | Path,
    out: str | Path,
    options: DistillOptions,
    *,
    overwrite: bool = False,
    console: Console | None = None,
) -> tuple[Run | None, list[str]]:
    """Distils a Stable Diffusion pipeline, `options.base`, into one with GSPN in the place of self-attention. Keeps the
    swapped layers of the best epoch in `out`, where gspn.load_swap finds them; draws curves and samples.

    Args:
        data: images with captions, see captions.open_captions.
        out: the run folder: new, empty, or with `overwrite` an earlier run.
        options: DistillOptions. console: rich's, or None for silence.
    Returns: (the Run, in the main process; warnings). Errors: BusyError, DataError, OptionError, RunError, SaveError,
        TrainingError.
    """
    return start(Setup, data, out, options, overwrite=overwrite, console=console)


def resume_distillation(
    path: str | Path,
    changes: Mapping[str, Any] | None = None,
    *,
    data: str | Path | None = None,
    console: Console | None = None,
) -> tuple[Run | None, list[str]]:
    """Continues a distillation that was stopped, see gspn.tasks.base.resume. `changes` may also say where the pipeline
    is now (base). Returns and errors: as `distill`."""
    return resume(Setup, path, changes, data=data, console=console)
