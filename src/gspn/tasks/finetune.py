"""Starting from trained weights (`--init-from`) of a run, a file of weights, or a published checkpoint."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gspn.digests import digest, tensors_of
from gspn.models import Backbone, load_released
from gspn.options import OptionError
from gspn.options.training import INIT_FROM
from gspn.places import config_or_none, run_folder
from gspn.pretrained import CONFIG, WEIGHTS
from gspn.runs import load_classifier
from gspn.train.run import Run


@dataclass(frozen=True)
class Source:
    """Trained weights.

    Attributes:
        where: their name in messages. weights: tensors by name.
        name, model_args: the model's, without classes and channels; None if unknown.
        class_names: the classes of the head; None if unknown.
        data: where the training data were.
    """

    where: str
    weights: Mapping[str, Tensor]
    name: str | None = None
    model_args: Mapping | None = None
    class_names: list[str] | None = None
    data: str | None = None

    def digest(self, like: str | None = None) -> str:
        """A digest of the weights, their model and its classes, in the scheme of `like`, a digest to compare it
        with."""
        about = {"model": self.name, "arguments": dict(self.model_args or {}), "class_names": self.class_names}
        return digest([*tensors_of(self.weights), about], like)


def open_source(path: str | Path, model: str | None, model_args: Mapping, channels: int | None = None) -> Source:
    """The weights in a run folder (the averaged ones of its best checkpoint, if it has them) or a saved model, of which
    the name in the package gspn-weights or its own file of weights will do; in another .safetensors file with the names
    of our models; or in a published checkpoint (.pth). The last two need the name `model`; the stem of a published one
    can be converted to `channels` other than 3.

    Errors: RunError, OptionError."""
    path = run_folder(path)
    if path.name == WEIGHTS and "class" in (config_or_none(path.parent / CONFIG) or {}):
        path = path.parent  # its arguments belong to the weights, and their shapes do not tell all of them
    if path.is_dir():
        run = Run.open(path)
        kind = run.config.get("class")  # None for a run
        if kind not in (None, "Backbone"):
            raise OptionError(f"init_from: {path} is a saved {kind}, expected a saved backbone, a classifier or a run")
        if kind and "task" not in run.config:
            try:
                saved, where = Backbone.from_pretrained(path), f"the saved model {path}"
            except (ValueError, OSError) as error:
                raise OptionError(f"init_from: {error}") from error
            arguments, weights, known = dict(saved.config), saved.state_dict(), ()
        else:
            classifier, where = load_classifier(path), f"the run {path}"
            arguments, weights = dict(classifier.run.config["model"]), classifier.model.state_dict()
            known = (classifier.classes, classifier.run.config["data"]["where"])
        name = arguments.pop("name")
        if model not in (None, name):
            raise OptionError(f"init_from: {where} has a {name}, expected a {model} (--model)")
        for own in ("num_classes", "in_chans", "backend"):
            arguments.pop(own, None)
        return Source(where, weights, name, arguments, *known)
    if not path.is_file() and path.suffix != ".safetensors":
        raise OptionError(f"init_from: there is no {path}; expected {INIT_FROM}")
    if path.suffix == ".safetensors":
        try:
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise OptionError(f"init_from: {path} cannot be read: {error}") from error
        if model is not None:
            return Source(str(path), weights)
    if model is None:
        raise OptionError(f"init_from: {path} does not say which model its weights have; name it with --model")
    arguments = {
        name: value for name, value in model_args.items() if name not in ("num_classes", "in_chans", "activation")
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "fine-tune before use": that comes next
            published = load_released(path, model, in_chans=channels or 3, **{"alignment": "aligned", **arguments})
    except (OSError, ValueError, TypeError) as error:
        raise OptionError(f"init_from: {error}") from error
    arguments |= {name: published.config[name] for name in ("alignment", "activation")}
    return Source(str(path), published.state_dict(), model, arguments)


@torch.no_grad()
def start_from(source: Source, model: nn.Module, class_names: list[str], data: str) -> str:
    """Copies the weights into a model. Its head stays new unless the source has the same classes, by name and order.
    Names that are bare numbers (data without names have them) only count as the same if the `data` are the same.

    Returns: a note that says whether the head is new. Errors: OptionError names what does not fit."""
    own = model.state_dict()
    (head,) = (name for name, module in model.named_modules() if module is model.get_classifier())
    named = not all(name.isdecimal() for name in class_names)
    keep_head = source.class_names == class_names and (named or source.data == data)
    body = {name for name in own if keep_head or not name.startswith(f"{head}.")}
    copy_weights(source, model, body)
    became = "its head too" if keep_head else f"with a new head for {len(class_names)} classes"
    return f"weights of {source.where}, {became}"


@torch.no_grad()
def copy_weights(source: Source, model: nn.Module, body: set[str], but: tuple[str, ...] = ()) -> None:
    """Copies the weights named in `body`. The source may hold others, but only of the model, or of the parts `but`.
    Errors: OptionError names what does not fit."""
    own = model.state_dict()
    problems = [f"{name} is missing there" for name in sorted(body - set(source.weights))]
    known = (name for name in source.weights if name.partition(".")[0] not in but)
    problems += [f"{type(model).__name__} has no {name}" for name in known if name not in own]
    for name in (n for n in own if n in body and n in source.weights):  # in the model's order, the same in every run
        theirs, mine = tuple(source.weights[name].shape), tuple(own[name].shape)
        if theirs != mine and name.startswith("stem.0") and theirs[1:2] != mine[1:2] and theirs[2:] == mine[2:]:
            raise OptionError(
                f"init_from: the model of {source.where} takes {theirs[1]} channels, but the images have {mine[1]}; "
                f"--channels {theirs[1]} converts them"
            )
        if theirs != mine:
            problems.append(f"{name} has the shape {theirs} there and {mine} here")
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise OptionError(f"init_from: the weights of {source.where} do not fit the model: {shown}")
    for name in body:
        own[name].copy_(source.weights[name])
