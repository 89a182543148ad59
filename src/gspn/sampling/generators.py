"""Generators by name and from runs: the model, and the pipeline that samples it."""

import inspect
from collections.abc import Mapping
from pathlib import Path

import diffusers
import torch
from diffusers.models.embeddings import LabelEmbedding
from safetensors import SafetensorError

from gspn.files import atomic, check_absent
from gspn.models.dit import create_dit, dit_names, untie
from gspn.models.generator import create_generator, generator_names
from gspn.models.pipeline import GSPNPipeline
from gspn.models.schedulers import explicit
from gspn.names import unknown
from gspn.options import OptionError
from gspn.options.generators import SCHEDULERS
from gspn.places import expanded
from gspn.progress import bars_on_terminals_only
from gspn.sampling.vae import check_vae, open_vae, scale_of
from gspn.train.run import Run, RunError

MULTISTEP = ("dpm-solver++", "unipc")  # they threshold images, and round the timesteps of "linspace"
SIGNAL_ERROR = 1e-3  # in sqrt(alphas_cumprod): more than the 2^-12 that some schedulers have in the place of 0


def build_generator(config: Mapping) -> torch.nn.Module:
    """The model, with random weights, of a run's config["model"]. Errors: OptionError."""
    name, arguments = config["name"], config["arguments"]
    names = (*generator_names(), *dit_names())
    if name not in names:
        raise OptionError(unknown("generator", name, names))
    try:
        model = (create_generator if name in generator_names() else create_dit)(name, **arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        raise OptionError(f"the model {name} cannot be made: {error}") from error
    return model


def drop_classes(model: torch.nn.Module, probability: float) -> None:
    """Sets how often the model itself, in training mode, replaces a class by the null class."""
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = probability


def load_pipeline(source: str | Path, checkpoint: str = "last", vae: str | Path | None = None) -> GSPNPipeline:
    """The pipeline of a trained generator, on the CPU, with the averaged weights if the run has them.

    Args:
        source: a run of `gspn train-diffusion`, or a folder that GSPNPipeline.save_pretrained made.
        checkpoint: "last", "best" or another one of the run.
        vae: where the VAE is now, if it was moved since the training; see vae.open_vae.
    Errors: RunError; OptionError if the VAE cannot be loaded, or is not the one whose latents were trained on.
    """
    path = expanded(source)
    if (path / "model_index.json").exists():
        if vae is not None:
            raise OptionError(f"vae is for a run, but {path} is a saved pipeline, which holds all that it needs")
        if checkpoint not in ("best", "last"):
            raise RunError(f"{path} is a saved pipeline: it has one set of weights and no checkpoint {checkpoint!r}")
        return _saved_pipeline(path)
    run = Run.open(path)
    run.check_task("diffusion")
    tensors, _ = run.load_checkpoint(checkpoint, ("model", "ema"))
    try:
        config = run.config
        scheduler = getattr(diffusers, config["scheduler"]["class"]).from_config(
            explicit(config["scheduler"]["config"])
        )
        transformer = build_generator(config["model"])
        transformer.load_state_dict(tensors["ema"] if "ema" in tensors else tensors["model"])
        if isinstance(transformer, diffusers.DiTTransformer2DModel):
            untie(transformer)
            dropout = config.get("options", {}).get("class_dropout", 0.1)
            # diffusers' DiT does not know what it predicts, nor whether the null class was trained.
            transformer.register_to_config(prediction_type=scheduler.config.prediction_type, class_dropout_prob=dropout)
            drop_classes(transformer, dropout)
        id2label = dict(enumerate(config["class_names"]))
        autoencoder = _vae_of(path, config["vae"], vae)
        return GSPNPipeline(transformer.eval(), scheduler, autoencoder, id2label, config["space"]["image_size"])
    except (RunError, OptionError):
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = str(error).strip().splitlines()
        raise RunError(
            f"the run {path} is damaged or foreign: {type(error).__name__}: {' '.join(reason[:2])}"
        ) from error


def cast(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Converts a model of diffusers. Its own `to` warns of the modules that should stay in float32, also of none."""
    torch.nn.Module.to(model, dtype)


def _vae_of(run, described, moved):
    """The VAE of a run of latents, from its recorded path or from `moved`; None for a run of pixels."""
    if not described:
        if moved is not None:
            raise OptionError(f"vae is for runs of latents, but {run} was trained on pixels and uses none")
        return None
    if moved is not None:
        described = {**described, "path": moved}
    try:
        vae = check_vae(open_vae(described["path"]), described)
    except OptionError as error:
        hint = "" if moved is not None else " (if it was moved, --vae says where it is now)"
        raise OptionError(f"{error}{hint}") from error
    vae.register_to_config(**scale_of(described))
    return vae


def _saved_pipeline(path):
    try:
        name = GSPNPipeline.load_config(path).get("_class_name")
        if name not in ("GSPNPipeline", "DiTPipeline"):
            raise RunError(f"{path} holds a {name}, expected a GSPNPipeline")
        with bars_on_terminals_only():
            return GSPNPipeline.from_pretrained(path, use_safetensors=True, local_files_only=True)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, AttributeError, SafetensorError) as error:
        if isinstance(error, RunError):
            raise
        reason = " ".join(str(error).strip().splitlines()[:2])
        raise RunError(f"the pipeline {path} cannot be loaded: {reason}") from error


def export_pipeline(
    source: str | Path,
    out: str | Path,
    checkpoint: str = "last",
    vae: str | Path | None = None,
    *,
    overwrite: bool = False,
) -> GSPNPipeline:
    """Writes the pipeline of a trained generator into the new folder `out`, as GSPNPipeline.from_pretrained reads it.

    Args: see load_pipeline. overwrite: an existing pipeline may be replaced.
    Errors: those of load_pipeline; ExistsError, or RunError if something else is there; SaveError."""
    out = expanded(out)
    check_absent(out, overwrite=overwrite)
    if out.exists() and not (out / "model_index.json").exists():
        raise RunError(f"{out} is there and holds no pipeline (no model_index.json): choose another folder")
    pipeline = load_pipeline(source, checkpoint, vae)
    with atomic(out) as temporary:
        pipeline.save_pretrained(temporary)
    return pipeline


def named_scheduler(name: str, own, steps: int | None = None) -> diffusers.SchedulerMixin:
    """The scheduler called `name` (see SCHEDULERS), for the noise schedule and the prediction type of `own`.

    Args:
        steps: how many steps are to be made. With as many as timesteps, some solvers then do not repeat one.
    Errors: OptionError if it cannot have the noise schedule, or would clip otherwise than `own`. Those that do not clip
    at all, Euler's, are allowed; see `unclipped`."""
    config = explicit(own.config)
    if name not in ("ddpm", "ddim"):
        for key in ("timestep_spacing", "steps_offset"):  # how DDPM skips steps; solvers have their own way
            config.pop(key, None)
        if config.get("clip_sample") and not config.get("thresholding"):
            # What DDPM calls clipping, of the image predicted at each step, is to solvers a threshold of at most 1.
            # They divide by a larger one.
            if name in MULTISTEP and config.get("clip_sample_range", 1.0) != 1:
                raise OptionError(
                    f"scheduler: {name} cannot clip images to {config['clip_sample_range']:g}, as the generator's own "
                    "scheduler does, only to 1: expected ddpm, ddim or heun"
                )
            config |= {"thresholding": True, "sample_max_value": 1.0}
        if name in MULTISTEP and steps == own.config.num_train_timesteps:
            config["timestep_spacing"] = "trailing"  # "linspace" rounds one more point than there are timesteps
    made = getattr(diffusers, SCHEDULERS[name]).from_config(config)
    signal, expected = made.alphas_cumprod.sqrt(), own.alphas_cumprod.to(made.alphas_cumprod).sqrt()
    if (signal - expected).abs().max() > SIGNAL_ERROR:
        raise OptionError(
            f"scheduler: {name} would have another noise schedule than {type(own).__name__}, as it does not know a "
            "setting of it, such as rescale_betas_zero_snr: expected another scheduler"
        )
    return made


def unclipped(scheduler, own) -> str | None:
    """A note where `own` clips the image that it predicts at each step, and `scheduler` does not."""
    if not _clips(own) or _clips(scheduler):
        return None
    return (
        f"{type(scheduler).__name__} does not clip the images predicted at each step, as the generator's own "
        f"{type(own).__name__} does: samples may have more contrast; ddpm, ddim, dpm-solver++, unipc and heun clip them"
    )


def _clips(scheduler):
    known = inspect.signature(type(scheduler).__init__).parameters  # its config keeps what others take, too
    return any(name in known and scheduler.config.get(name) for name in ("clip_sample", "thresholding"))
