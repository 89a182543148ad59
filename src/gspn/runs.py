"""From a run folder back to Python: `gspn.load_run`, and the classifier that it and the commands use."""

import os
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gspn.data.images import Preprocessing, decode, upright, with_channels
from gspn.data.mask_classes import Classes
from gspn.data.mask_loader import scaled
from gspn.memory import free_bytes
from gspn.models import Backbone, Segmenter, create_model
from gspn.models.latents import NotFiniteError
from gspn.models.segmenter import segmenter_from
from gspn.models.tiles import segment
from gspn.options import OptionError
from gspn.places import run_folder
from gspn.pretrained import CARD, Card, OnMetaError, load_weights, push, save
from gspn.train.run import Run, RunError

if TYPE_CHECKING:
    from gspn.models.pipeline import GSPNPipeline

TASKS = ("classification", "diffusion", "segmentation")  # what `load_run` can load
MANY_PIXELS = 4_000_000  # of an image that is compared with the free memory; the estimate takes seconds
LOADED = {"classification": "classifier", "segmentation": "segmenter"}  # what messages call them


# The options of a run that its evaluation needs. A saved model keeps only these: others may hold paths.
KEPT_OPTIONS = ("precision", "scale")


class Saving:
    """What Classifier and Segmentation share: the model is saved with its classes and preprocessing, so that whatever
    takes a run takes the folder, too."""

    run: Run
    model: Any
    classes: Any

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        dtype: torch.dtype | None = None,
        license: str | None = None,
        data: str | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes the model to a folder: weights, config.json with classes and preprocessing, and a model card. See
        :meth:`gspn.models.Backbone.save_pretrained` for the arguments and the errors. Without `license` and `data` the
        card tells those of the saved model that this was loaded from, or names the data of the run. ValueError also if
        `classes` does not name as many classes as the model has, as after ``model.reset_classifier``: set `classes`
        first.
        """
        save(self.model, save_directory, self._card(license, data, metrics), dtype, self._kept())

    def push_to_hub(
        self,
        repo_id: str,
        *,
        dtype: torch.dtype | None = None,
        license: str | None = None,
        data: str | None = None,
        metrics: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> str:
        """Uploads what :meth:`save_pretrained` writes; see :meth:`gspn.models.Backbone.push_to_hub`."""
        return push(self.model, repo_id, self._card(license, data, metrics), dtype, self._kept(), **options)

    def _card(self, license, data, metrics):
        """The card: a model that was itself saved keeps its licence and its data's credit. Metrics belong to weights,
        which may have changed since."""
        own = Card.read(self.run.path / CARD) or Card()
        return Card(license, data, metrics or {}).over(Card(own.license, own.data))

    def _named(self):
        """The classes as config.json holds them."""
        raise NotImplementedError

    def _kept(self):
        """What config.json keeps of the run: nothing that names places of this machine."""
        advice = "set `classes` to names for all of them, or save the `model` alone"
        _check_classes(self.classes, self.model.num_classes, advice)
        config = self.run.config
        kept = {name: config[name] for name in ("task", "preprocessing") if name in config} | self._named()
        where = config["data"]["where"]
        kept["data"] = {**config["data"], "where": Path(where).name if Path(where).is_absolute() else where}
        kept["options"] = {name: config["options"][name] for name in KEPT_OPTIONS if name in config["options"]}
        return kept | {name: config[name] for name in ("seed", "versions") if name in config}


@dataclass
class Classifier(Saving):
    """A trained classifier, ready for use.

    Attributes:
        model: the backbone, in evaluation mode.
        classes: their names, in the order of the logits. Set them after ``model.reset_classifier``.
        preprocessing: how an image becomes the model's input: size, channels, crop, mean and deviation.
        run: the run folder: its path, config and metrics.
    """

    run: Run
    model: Backbone
    preprocessing: Preprocessing
    classes: list[str]

    def _named(self):
        return {"class_names": list(self.classes)}

    def preprocess(self, image: Image.Image | str | os.PathLike) -> Tensor:
        """The model's input for an image: float (C,H,W), in the model's dtype and on its device.
        ``model(preprocess(image)[None])`` returns the logits (1, number of classes).

        Args:
            image: a PIL image of any size and mode, or a file. Both are turned upright according to their EXIF data.

        Raises TypeError for anything else, and Pillow's errors for a file that it cannot read.
        """
        return self._normalized(self.pixels(_image(image))[None])[0]

    def pixels(self, image: Image.Image) -> Tensor:
        """The pixels that the model sees of an upright PIL image: uint8 (C,H,W)."""
        return self.preprocessing(image)

    def predict(self, image: Image.Image | str | os.PathLike, top: int | None = None) -> dict[str, float]:
        """{class: probability}, the most probable class first.

        Args:
            image: as for `preprocess`, with its errors.
            top: the number of classes; None for all.
        """
        if top is not None and top < 1:
            raise ValueError(f"top has to be at least 1, got {top}")
        (ranked,) = self._ranked(self.preprocess(image)[None], top)
        return self.by_name(ranked)

    def by_name(self, ranked: list[tuple[str, float]]) -> dict[str, float]:
        """What `rank` returns for one image as `predict` returns it. ValueError where two of the classes have the same
        name."""
        if len(ranked) > len(answer := dict(ranked)):
            raise ValueError(f"two classes of {self.run.path} have the same name; model(...) returns all logits")
        return answer

    def rank(self, pixels: Tensor, top: int | None = None) -> list[list[tuple[str, float]]]:
        """[(class, probability), ...] for each image of a batch, the most probable class first.

        Args:
            pixels: uint8 (B,C,H,W), the output of `preprocessing`.
            top: as for `predict`.
        """
        return self._ranked(self._normalized(pixels), top)

    def _normalized(self, pixels):
        where = next(self.model.parameters())
        return self.preprocessing.normalize(pixels.to(where.device)).to(where.dtype)

    @torch.inference_mode()
    def _ranked(self, inputs, top):
        probability = self.model(inputs).float().softmax(1)
        _check_classes(self.classes, probability.shape[1], "set `classes` to names for all of them")
        check_finite(probability.sum(1), self.run.path)
        probability, number = probability.topk(min(top or len(self.classes), len(self.classes)))
        return [
            [(self.classes[n], p) for n, p in zip(ns, ps, strict=True)]
            for ns, ps in zip(number.tolist(), probability.tolist(), strict=True)
        ]


@dataclass
class Segmentation(Saving):
    """A trained segmenter, ready for use.

    Attributes:
        model: the segmenter, in evaluation mode.
        classes: their names, values in masks and colours (data.mask_classes.Classes). Others of the same number may
            be set.
        preprocessing: channels, mean and deviation; its size is that of the crops in training.
        scale: the factor by which images are resized before the model sees them.
        run: the run folder: its path, config and metrics.
    """

    run: Run
    model: Segmenter
    preprocessing: Preprocessing
    classes: Classes
    scale: float

    def _named(self):
        return {"classes": self.classes.to_json(), "class_names": list(self.classes.names)}

    def segment(self, image: Image.Image | str | os.PathLike, max_bytes: int | None = None) -> Image.Image:
        """The mask of an image of any size: a palette image of the same size (turned upright), with the values of the
        masks in training, or the numbers of the classes if one of the values is above 255.

        Args:
            image: a PIL image of any mode, or a file.
            max_bytes: what it may take in memory; a larger image is segmented in overlapping tiles. None: no limit.

        Raises ValueError if not even small tiles fit, RunError for logits that are not finite; otherwise as
        Classifier.preprocess.
        """
        return self.classes.picture(self.numbers(_image(image), max_bytes))

    def pixels(self, image: Image.Image) -> Tensor:
        """The pixels that the model sees of an upright PIL image: uint8 (C,H,W)."""
        size = scaled(image.size, self.scale)
        resized = with_channels(image, self.preprocessing.channels).resize(size, Image.Resampling.BICUBIC)
        return torch.from_numpy(np.atleast_3d(np.array(resized))).permute(2, 0, 1)

    def allowed_bytes(self, image: Image.Image) -> int | None:
        """`max_bytes` for an image: 9/10 of the free memory where it has more than 4 megapixels, else None."""
        if image.width * image.height * self.scale**2 <= MANY_PIXELS:
            return None
        return int(0.9 * free_bytes(next(self.model.parameters()).device))

    def numbers(self, image: Image.Image, max_bytes: int | None = None, tell: Callable[[str], None] | None = None):
        """The number of the class of each pixel of an upright PIL image, uint8 (H,W); arguments as for `segment`.
        `tell` gets a sentence on whether tiles are used, and on the memory, before the work begins."""
        pixels, size = self.pixels(image)[None], (image.height, image.width)
        try:
            return segment(self.model, pixels, self.preprocessing.normalize, size, max_bytes, tell)
        except NotFiniteError as error:
            raise _damaged(self.run.path, str(error)) from error


def _check_classes(classes, count, advice):
    """Raises ValueError unless there is a name for each of the model's `count` classes."""
    if len(classes) != count:
        raise ValueError(f"there are names of {len(classes)} classes, but the model has {count}: {advice}")


def check_finite(values: Tensor, path: str | Path) -> None:
    """Raises RunError, with their number, where the `values` (N,) that the model of a run gave are not finite."""
    if wrong := int((~values.isfinite()).sum()):
        raise _damaged(path, f"{wrong} of {len(values)} images")


def _damaged(path, where):
    return RunError(
        f"the outputs of the model of {path} are not finite for {where}: its weights are damaged; choose another "
        "checkpoint or run"
    )


def _image(image):
    """A PIL image, turned upright, from one or from a file."""
    if isinstance(image, Image.Image):
        return upright(image)
    if isinstance(image, str | os.PathLike):
        return decode(image)
    raise TypeError(f"expected a PIL image or a path, got {type(image).__name__}")


def load_classifier(path: str | Path, checkpoint: str = "best") -> Classifier:
    """The Classifier of a run folder: in evaluation mode, on the CPU, with the averaged weights if the run has them.

    Errors: RunError.
    """
    with _opened(path, "classification", create_model, checkpoint) as (run, model):
        names = run.config["class_names"]
        _check_classes(names, model.num_classes, "correct class_names in its config.json")
        return Classifier(run, model, preprocessing_of(run.config, model.in_chans), names)


def load_segmenter(path: str | Path, checkpoint: str = "best") -> Segmentation:
    """The Segmentation of a run folder; as load_classifier."""
    with _opened(path, "segmentation", segmenter_from, checkpoint) as (run, model):
        preprocessing = preprocessing_of(run.config, model.backbone.in_chans)
        classes = Classes(**run.config["classes"])
        _check_classes(classes, model.num_classes, "correct classes in its config.json")
        return Segmentation(run, model, preprocessing, classes, run.config["options"]["scale"])


def preprocessing_of(config: Mapping, channels: int) -> Preprocessing:
    """That in the config of a run whose model takes this number of channels. Errors: ValueError, KeyError."""
    found = Preprocessing(**config["preprocessing"])
    if not found.channels == len(found.mean) == channels:
        raise ValueError(f"the model takes images of {channels} channels, but its config.json holds {found}")
    return found


@contextmanager
def _opened(path, task, make, checkpoint):
    """(Run, its model in evaluation mode); turns what is wrong with the run, also in the block, into a RunError."""
    run = Run.open(path)
    try:
        run.check_task(task)
        # The backend belongs to the machine that trained, not to the model: a run from a GPU also works on a CPU.
        model = make(**{**run.config["model"], "backend": None})
        tensors, _ = run.load_checkpoint(checkpoint, ("model", "ema"))
        load_weights(model, tensors["ema"] if "ema" in tensors else tensors["model"])
        for part, needed in (("data", "where"), ("options", "precision")):
            run.config[part][needed]  # evaluation needs them: fail here rather than there
        yield run, model
    except (RunError, OnMetaError):
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RunError(f"the run {path} is damaged or foreign: {type(error).__name__}: {error}") from error


@overload
def load_run(
    path: str | os.PathLike,
    checkpoint: str | None = None,
    *,
    task: Literal["classification"],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Classifier: ...


@overload
def load_run(
    path: str | os.PathLike,
    checkpoint: str | None = None,
    *,
    task: Literal["diffusion"],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    vae: str | os.PathLike | None = None,
) -> "GSPNPipeline": ...


@overload
def load_run(
    path: str | os.PathLike,
    checkpoint: str | None = None,
    *,
    task: Literal["segmentation"],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Segmentation: ...


@overload
def load_run(
    path: str | os.PathLike,
    checkpoint: str | None = None,
    *,
    task: None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    vae: str | os.PathLike | None = None,
) -> Any: ...


def load_run(
    path: str | os.PathLike,
    checkpoint: str | None = None,
    *,
    task: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    vae: str | os.PathLike | None = None,
) -> Any:
    """The trained model of a run, ready for use, with the averaged weights if the run has them.

    Args:
        path: the run folder of `gspn train`, `gspn train-segmentation` or `gspn train-diffusion`; a folder that
            ``save_pretrained`` of a loaded classifier, segmenter or generator wrote; or, where nothing exists at that
            path, the name of weights in the package gspn-weights: "digits", "digits-generator".
        checkpoint: "best", "last", "epoch-0010", ... As in the commands, None is "last" for a generator and "best" for
            the others.
        task: "classification", "segmentation" or "diffusion"; refuses a run of another kind, and gives type checkers
            the return type.
        device, dtype: of the model; None keeps float32.
        vae: the VAE's present folder, for a generator of latents whose VAE was moved since the training.

    Returns:
        For a classifier a :class:`Classifier`, with ``model``, ``classes``, ``preprocess(image)`` and
        ``predict(image)``. For a segmenter a :class:`Segmentation`, with ``model``, ``classes`` and
        ``segment(image)``. For a generator a :class:`gspn.GSPNPipeline`, with its VAE if it has one; ``id2label`` holds
        the names of the classes.

    Raises RunError, a ValueError, for a folder that is no run, is damaged, or belongs to `gspn distill`
    (:func:`gspn.load_swap` takes that); OptionError, also a ValueError, for a VAE that does not fit; RuntimeError for a
    classifier or segmenter under torch.device("meta"); ImportError if the extra ``train``, or ``diffusion`` for a
    generator, is not installed.

    >>> import gspn
    >>> run = gspn.load_run("runs/first")  # doctest: +SKIP
    >>> run.predict("picture.png", top=2)  # doctest: +SKIP
    {'7': 0.98, '1': 0.01}
    """
    if task is not None and task not in TASKS:
        raise OptionError(f"task has to be {' or '.join(TASKS)}, got {task!r}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise OptionError(f"dtype has to be a floating-point dtype such as torch.bfloat16, got {dtype!r}")
    path = run_folder(path)
    saved_pipeline = task in (None, "diffusion") and (path / "model_index.json").exists()
    found = "diffusion" if saved_pipeline else Run.open(path).check_task(*TASKS if task is None else (task,))
    if found == "diffusion":
        from gspn.sampling.generators import cast, load_pipeline

        pipeline = load_pipeline(path, checkpoint or "last", vae).to(device)
        if dtype is not None:
            cast(pipeline.transformer, dtype)  # the VAE stays in float32, as in `gspn sample`
        return pipeline
    if vae is not None:
        raise OptionError(f"vae is only for generators of latents, but {path} holds a {LOADED[found]}")
    load = load_classifier if found == "classification" else load_segmenter
    loaded = load(path, checkpoint or "best")
    loaded.model.to(device=device, dtype=dtype)
    return loaded
