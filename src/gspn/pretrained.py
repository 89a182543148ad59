"""Trained models in folders and on the Hugging Face hub: `save_pretrained`, `from_pretrained`, `push_to_hub`.

    FOLDER/config.json         the class, the arguments that make the model again, and what a run knows of it
    FOLDER/model.safetensors   the weights
    FOLDER/README.md           the model card

config.json has the format of a run's, so that whatever takes a run takes such a folder too. Local folders are read
without any further package; writing a card, uploading and downloading need huggingface_hub. Its ModelHubMixin is no
base class of the models: importing it is slow, and it would store the arguments of ``__init__``, which
``reset_classifier`` overrides. An object that holds a model inherits it instead. The layer imports this module, so what
is slow to import is imported where it is used.
"""

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from gspn import weights
from gspn.digests import digest
from gspn.extras import need

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FORMAT = 1  # of config.json, here and in a run; raised when an older gspn could no longer read it
DTYPES = (None, torch.float64, torch.float32, torch.float16, torch.bfloat16)
KINDS = {"Backbone": "classifier or backbone", "Segmenter": "segmenter", "GSPN2d": "layer"}  # as cards name them
TAGS = {"classification": "image-classification", "segmentation": "image-segmentation"}  # the hub's names of tasks


# Ends a card: the digest of the text before it and of what is told, then what is told, as JSON.
MARK = "\n<!-- gspn writes this card anew as long as nobody changes it: "


class OnMetaError(RuntimeError):
    """Weights cannot be loaded into a model without memory."""


@dataclass(frozen=True)
class Card:
    """What only the person who trained a model can tell about it.

    Attributes:
        license: of the weights, an identifier of the hub such as "apache-2.0" or "cc-by-4.0".
        data: what the model was trained on, with the credit that the data's licence asks for.
        metrics: {name: value}, such as {"top-1 accuracy (test, 359 images)": 0.99}.
    """

    license: str | None = None
    data: str | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)

    def signed(self, text: str) -> str:
        """The text of a card that tells this, with the mark by which `read` knows it."""
        metrics = {name: _shown(value) for name, value in self.metrics.items()}
        told = json.dumps({"license": self.license, "data": self.data, "metrics": metrics})
        told = told.replace(">", "\\u003e")  # so that it does not end the comment
        return f"{text}{MARK}{digest([text, told])} {told} -->\n"

    @classmethod
    def read(cls, file: Path) -> "Card | None":
        """What the card in a file tells; None where it cannot be read, is not gspn's, or was changed."""
        try:
            text, _, mark = file.read_bytes().decode("utf-8", "replace").rpartition(MARK)
            found, _, told = mark.removesuffix(" -->\n").partition(" ")
            return cls(**json.loads(told)) if found == digest([text, told]) else None
        except (OSError, ValueError, TypeError):
            return None

    def over(self, before: "Card") -> "Card":
        """This, with what `before` told where this tells nothing."""
        return Card(self.license or before.license, self.data or before.data, self.metrics or before.metrics)


class Pretrained:
    """What makes a module savable. A subclass says how it is called (`_saved_as`), which arguments make it again
    (`_arguments`), and how (`_made_from`)."""

    _saved_as: ClassVar[str]
    _import_as: ClassVar[str]

    def _arguments(self) -> dict[str, Any]:
        raise NotImplementedError

    @classmethod
    def _made_from(cls, arguments: dict[str, Any]) -> Self:
        raise NotImplementedError

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        dtype: torch.dtype | None = None,
        license: str | None = None,
        data: str | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes the model to a folder: config.json, model.safetensors, and a model card, README.md.

        Args:
            save_directory: a new folder, or one that save_pretrained wrote before for a model of the same class; its
                weights are replaced. Its card is replaced too if nobody has changed it; it then still tells the
                license, data and metrics of before where no others are given. Another card stays as it is.
            dtype: of the stored weights, such as torch.float16; None keeps the model's.
            license, data, metrics: for the card: the licence of the weights (such as "cc-by-4.0"), what the model was
                trained on, and {name: value}.

        Raises ExistsError if the folder holds another config.json, such as that of a run or of another class;
        ValueError if the model was not made from arguments, was changed since, or holds no values (on the device
        "meta"), if a weight is too large for `dtype`, or if license, data or metrics are given and the folder holds a
        card that somebody wrote or changed; ImportError if huggingface_hub is not installed; SaveError if the folder
        cannot be written.
        """
        save(self, save_directory, Card(license, data, metrics or {}), dtype)

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
        """Uploads what :meth:`save_pretrained` writes to a repository on the Hugging Face hub, which is made if there
        is none.

        Args:
            repo_id: OWNER/NAME. dtype, license, data, metrics: as for save_pretrained.
            options: those of huggingface_hub's ``ModelHubMixin.push_to_hub``: private, token, branch, create_pr,
                commit_message.

        Returns: the address of the commit.
        """
        return push(self, repo_id, Card(license, data, metrics or {}), dtype, **options)

    @classmethod
    def from_pretrained(
        cls,
        where: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Self:
        """The model in a folder that :meth:`save_pretrained` wrote, or in a repository on the Hugging Face hub, in
        evaluation mode and float32.

        Args:
            where: a folder. Where none exists, the name of weights in the package gspn-weights, or else OWNER/NAME on
                the hub.
            revision, token, cache_dir, force_download, local_files_only: as for huggingface_hub.snapshot_download. A
                local folder needs none of them.

        Raises FileNotFoundError if there is no such folder and it is no name on the hub; ValueError if it is a file,
        holds another model, is damaged, or was written by a newer gspn; RuntimeError under torch.device("meta");
        huggingface_hub's errors for the hub.
        """
        folder = weights.named(where) or Path(where)
        if folder.is_file():
            raise ValueError(f"{folder} is a file, expected a folder that save_pretrained wrote: pass {folder.parent}")
        if not folder.is_dir():
            folder = _downloaded(
                str(where),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
            )
        config, tensors = read(folder, cls._saved_as)
        try:
            model: Any = cls._made_from(config["model"])
            load_weights(model, tensors)
        except OnMetaError:
            raise
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"the {cls._saved_as} in {folder} is damaged: {type(error).__name__}: {error}") from error
        return model


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts weights into a model that was just made: in float32, whatever torch's default dtype is, and in evaluation
    mode. Raises OnMetaError under torch.device("meta"), another RuntimeError if the weights do not fit."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise OnMetaError('a model on torch.device("meta") holds no weights: load it outside of it')
    model.float().load_state_dict(tensors)
    model.eval()


def read(folder: Path, expected: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, weights) of a folder that save_pretrained wrote. `expected` is the class. Raises ValueError."""
    from gspn.files import check_format

    config = _config(folder)
    found = config.get("class")
    if found is None:
        hint = "; it is the folder of a run, which gspn.load_run reads" if "task" in config else ""
        raise ValueError(f"{folder} was not written by save_pretrained: its {CONFIG} names no class{hint}")
    check_format(folder, config.get("format"), FORMAT, ValueError)
    if found != expected:
        raise ValueError(f"{folder} holds a {found}, expected a {expected}")
    return config, read_weights(folder)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights in a folder that save_pretrained wrote. Raises ValueError where they are missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS} cannot be read: {error}") from error


def _config(folder):
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no model: there is no {folder / CONFIG}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG} is damaged: expected an object, got {type(config).__name__}")
    return config


def _downloaded(name, **options):
    need("hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS], library_name="gspn", **options))
    except HFValidationError as error:
        raise FileNotFoundError(f"there is no folder {name}, and it cannot be a name on the hub: {error}") from error
    except Exception as error:
        error.add_note(f"there is no folder {name} here, so it was taken for a name on the Hugging Face hub")
        raise


def save(
    model: Any,
    folder: str | os.PathLike,
    card: Card | None = None,
    dtype: torch.dtype | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """What :meth:`Pretrained.save_pretrained` does. `more` goes to config.json beside the model."""
    from gspn.files import ExistsError

    folder = Path(folder)
    if (folder / CONFIG).exists() and (found := _config(folder).get("class")) != model._saved_as:
        what = f"a saved {found}" if found else f"the {CONFIG} of something else, such as a run"
        raise ExistsError(f"{folder} holds {what}, and this is a {model._saved_as}: choose another folder")
    _holder(model, card, dtype, more, folder.resolve().name).save_pretrained(folder)


def push(
    model: Any,
    repo_id: str,
    card: Card | None = None,
    dtype: torch.dtype | None = None,
    more: Mapping[str, Any] | None = None,
    **options: Any,
) -> str:
    """What :meth:`Pretrained.push_to_hub` does. `more` goes to config.json beside the model."""
    return _holder(model, card, dtype, more, repo_id).push_to_hub(repo_id, **options)


def _holder(model, card, dtype, more, name):
    """The object that is saved and uploaded. What may fail for the model comes before anything is written."""
    need("hub")
    config = {"format": FORMAT, "class": model._saved_as, **(more or {}), "model": model._arguments()}
    try:
        json.dumps(config)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"this {type(model).__name__} cannot be saved, because {CONFIG} cannot hold its arguments: {error}"
        ) from error
    _check_made_again(model, config["model"])
    return _holder_class()(model, config, stored(model.state_dict(), dtype), card or Card(), name)


def _check_made_again(model, arguments):
    """Raises ValueError where the arguments make a model with other weights, as after `model.head = ...`, or with
    layers of other arguments, as after `layer.segment = ...`."""
    with torch.device("meta"):
        twin = type(model)._made_from(arguments)
    own, made = _form(model), _form(twin)
    if changed := sorted(name for name in own.keys() | made.keys() if own.get(name) != made.get(name)):
        raise ValueError(
            f"this {type(model).__name__} was changed after it was made, so its arguments do not make it again: "
            f"{', '.join(changed[:3])}{', ...' * (len(changed) > 3)}. Use reset_classifier for another head, and make "
            "another model for other arguments"
        )


def _form(model):
    """{name: value} of what has to agree in a model made again: arguments of the parts, shapes of the weights, and what
    the parts without weights are (an activation, say). Where a parameter is called as an argument (the merger), its
    shape says enough."""
    parts = dict(model.named_modules(remove_duplicate=False))  # tied ones under each of their names
    bare = {name: repr(part) for name, part in parts.items() if name and not any(True for _ in part.parameters())}
    of = {name: part._arguments() for name, part in parts.items() if name and isinstance(part, Pretrained)}
    arguments = {f"{name}.{key}": value for name, own in of.items() for key, value in own.items()}
    return arguments | bare | {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def stored(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors in `dtype`, contiguous. Raises ValueError where one is finite, but too large for it, or has no values
    at all."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype has to be float64, float32, float16 or bfloat16 of torch, or None, got {dtype}")
    result = {}
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f'{name} is on the device "meta" and holds no values to save: load weights first')
        kept = tensor.detach().to(dtype if tensor.is_floating_point() else None).contiguous()
        if dtype is not None and bool((tensor.isfinite() & ~kept.isfinite()).any()):
            largest = tensor.abs().max().item()
            raise ValueError(f"{name} holds {largest:.3g}, which {dtype} cannot: choose another dtype")
        result[name] = kept
    return result


@functools.cache
def _holder_class():
    from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin

    from gspn.files import atomic, make_folder, save_tensors, write_json, write_text

    class Holder(ModelHubMixin, library_name="gspn", tags=["gspn"], paper_url="https://arxiv.org/abs/2501.12381"):
        def __init__(self, model, config, tensors, card, name):
            self.model, self.config, self.tensors, self.card, self.name = model, config, tensors, card, name

        def save_pretrained(self, save_directory, **_):
            """In place of the mixin's, which removes the old config.json before it can know that a new one follows."""
            card = self._new_card(save_directory / CARD)
            make_folder(save_directory)
            with atomic(save_directory / WEIGHTS) as temporary:
                save_tensors(temporary, self.tensors, {"format": "pt"})
            write_json(save_directory / CONFIG, self.config)
            if card is not None:
                write_text(save_directory / CARD, card)

        def _new_card(self, file):
            """The text of the card to write; None where somebody else's stays."""
            if file.exists():
                before = Card.read(file)
                if before is None:
                    if self.card != Card():
                        raise ValueError(
                            f"{file} was changed or is not of this gspn, so license, data and metrics cannot go there: "
                            "write them into it and give none, or remove it for a new card"
                        )
                    return None
                self.card = self.card.over(before)
            return self.card.signed(str(self.generate_model_card()))

        def generate_model_card(self):
            """Called by the mixin too."""
            data = ModelCardData(**self._hub_mixin_info.model_card_data.to_dict())
            data.license, data.pipeline_tag = self.card.license, TAGS.get(self.config.get("task"))
            text = card_text(self.model, self.config, self.tensors, self.card, self.name)
            return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")

    return Holder


def _shown(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def card_text(model: Any, config: Mapping[str, Any], tensors: Mapping[str, Tensor], card: Card, where: str) -> str:
    """The text of the model card, without its head."""
    arguments, names = config["model"], config.get("class_names")
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    count = sum(parameter.numel() for parameter in model.parameters())
    kind, where = arguments.get("name", config["class"]), json.dumps(where, ensure_ascii=False)
    use = f"model = {model._import_as}.from_pretrained({where})  # this folder, or OWNER/NAME on the hub"
    if config.get("task") == "classification":
        use += f'\nanswer = gspn.load_run({where}).predict("image.png")  # this folder; {{class: probability}}'
    if config.get("task") == "segmentation":
        use += f'\nmask = gspn.load_run({where}).segment("image.png")  # this folder'
    metrics = "\n".join(f"| {name} | {_shown(value)} |" for name, value in card.metrics.items())
    unknown = "The author of this model did not say what it was trained on."
    data = card.data or config.get("data", {}).get("where", unknown)
    of = f", for {len(names)} classes" if names else ""
    parts = [
        f"# {kind}",
        f"A {KINDS[config['class']]} of [GSPN](https://arxiv.org/abs/2501.12381){of}: {count:,} parameters, stored as "
        f"{', '.join(dtypes)}.",
        f"## Load it\n\n```python\nimport gspn\n\n{use}\n```",
        f"## Data\n\n{data}",
        f"## Metrics\n\n| metric | value |\n|---|---|\n{metrics}" if metrics else "## Metrics\n\nNone were given.",
        f"## Licence\n\n{card.license or 'None was given.'}",
        f"## Architecture\n\n```json\n{json.dumps(arguments, indent=2)}\n```",
    ]
    if names:
        parts.insert(2, f"The classes: {', '.join(map(str, names[:100]))}{', ...' * (len(names) > 100)}.")
    return "\n\n".join(parts) + "\n"
