"""The weights that the paper's authors published (tiny.pth, small.pth, base.pth), in our models.

Their layout is converted key by key; no key may be missing or left over:

    patch_embed.{0,2,5,7}                    stem.{0,1,3,4}
    layers.I.downsample.{1,3}                levels.(I+1).downsample.{0,1}
    layers.I.blocks.J.norm, norm2            levels.I.blocks.J.norm1, norm2
    ... op.in_proj, conv2d, out_norm         ... in_proj, dwconv, norm
    ... op.grn, out_proj                     ... grn (1,D,1,1) to (D,), out_proj
    ... op.x_conv_down                       ... gspn.proxy_proj
    ... op.w_conv_up                         ... gspn.weight_proj, (3 x 4 x D,S,1,1) to (4,3,D,S)
    ... op.l_conv_up, u_conv_up, d_conv      ... gspn.input_proj, output_proj, skip_proj, (4 x D,S,1,1) to (4,D,S)
    ... op.m_conv                            ... gspn.merger, (1,4,1,1) to (4,)
    ... mlp.fc1, mlp.fc2                     ... mlp.0, mlp.2
    classifier.norm, classifier.head         norm, head

The four directions keep their order. The authors' code always scans to the right: the map as it is, transposed, flipped
along the width, and transposed and then flipped. On the map, these scans travel right, down, left and up, in the order
of ``gspn.DIRECTIONS``, and count the places of a line as ours do. So both alignments take the same tensors: "released"
computes what the authors' code computes, "aligned" is a start for fine-tuning.
"""

import os
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gspn.models.backbone import Backbone, create_model, list_models, size_of

PARTS = ("model_ema", "model")  # where a file may hold the weights; the first is preferred
_LISTED = 8  # keys of each kind that an error lists

_RENAMED = [  # ours to theirs
    (r"^stem\.0\.", "patch_embed.0."),
    (r"^stem\.1\.", "patch_embed.2."),
    (r"^stem\.3\.", "patch_embed.5."),
    (r"^stem\.4\.", "patch_embed.7."),
    (r"^levels\.(\d+)\.downsample\.0\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.1."),
    (r"^levels\.(\d+)\.downsample\.1\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.3."),
    (r"^levels\.", "layers."),
    (r"^norm\.", "classifier.norm."),
    (r"^head\.", "classifier.head."),
    (r"(blocks\.\d+)\.norm\.", r"\1.op.out_norm."),
    (r"(blocks\.\d+)\.norm1\.", r"\1.norm."),
    (r"(blocks\.\d+)\.(in_proj|out_proj|grn)\.", r"\1.op.\2."),
    (r"(blocks\.\d+)\.dwconv\.", r"\1.op.conv2d."),
    (r"(blocks\.\d+)\.mlp\.0\.", r"\1.mlp.fc1."),
    (r"(blocks\.\d+)\.mlp\.2\.", r"\1.mlp.fc2."),
    (r"\.gspn\.proxy_proj\.", ".op.x_conv_down."),
    (r"\.gspn\.weight_proj$", ".op.w_conv_up.weight"),
    (r"\.gspn\.input_proj$", ".op.l_conv_up.weight"),
    (r"\.gspn\.output_proj$", ".op.u_conv_up.weight"),
    (r"\.gspn\.skip_proj$", ".op.d_conv.weight"),
    (r"\.gspn\.merger$", ".op.m_conv.weight"),
]


def load_released(
    path_or_state_dict: str | os.PathLike | Mapping,
    name: str,
    *,
    alignment: str = "released",
    part: str | None = None,
    num_classes: int | None = None,
    in_chans: int = 3,
    **kwargs: Any,
) -> Backbone:
    """A backbone with weights in the layout that the paper's authors published.

    Args:
        path_or_state_dict: a file (.pth, or .safetensors with the same keys), or its contents. Only tensors are read
            from a file: nothing in it is executed.
        name: "gspn_tiny", "gspn_small" or "gspn_base".
        alignment: "released" computes what the authors' code computes, and only takes square images; "aligned" puts the
            same weights into the correct form, which takes any size. Its outputs differ (a warning says so): it is a
            start for fine-tuning.
        part: "model" or "model_ema", if the file has both; None then takes "model_ema", with a warning.
        num_classes: None keeps the weights' classes and head; any other number than theirs makes a new head.
        in_chans: if not 3, the stem's weights are adapted: summed for 1 channel, else repeated in turn and scaled.
        kwargs: other arguments of :func:`gspn.create_model`, such as ``drop_path_rate`` or ``backend``.

    Returns:
        the model, without activation after the depthwise convolution, as the weights were trained. ``model.config``
        says so, and makes the same form again.

    Raises FileNotFoundError, and ValueError for a file that cannot be read, that holds more than weights and known
    settings, that has another model size, or whose keys or shapes do not fit: the error lists the first eight of each
    kind and counts the rest.

    >>> import gspn
    >>> model = gspn.load_released("tiny.pth", "gspn_tiny")  # doctest: +SKIP
    """
    state = _part(_contents(path_or_state_dict), part)
    options = dict(alignment=alignment, activation=None, **kwargs)
    weights = convert_released(state, {"name": name, **options})
    trained = weights["head.weight"].shape[0]
    num_classes = trained if num_classes is None else num_classes
    model = create_model(name, num_classes=num_classes, in_chans=in_chans, **options)
    if num_classes != trained:
        new_head = {f"head.{k}": v for k, v in model.head.state_dict().items()}
        weights = {k: v for k, v in weights.items() if not k.startswith("head.")} | new_head
    weights["stem.0.weight"] = _adapt_channels(weights["stem.0.weight"], in_chans)
    model.load_state_dict(weights)
    return model


def is_released(state: Mapping) -> bool:
    """Whether the keys have the released layout rather than ours."""
    return any(str(key).startswith(("patch_embed.", "layers.", "classifier.")) for key in state)


def convert_released(state: Mapping[str, Tensor], config: dict) -> dict[str, Tensor]:
    """Converts a state dict in the released layout to that of the model with this ``config``; head and channels remain
    those of the weights.

    Warns if the model is aligned, because the weights were trained for other outputs. Raises ValueError with the keys
    that are missing, left over or of another shape, and the model size that fits, if any.
    """
    block = (size_of(config["name"]) | config).get("block", "paper")
    if block != "paper":
        raise ValueError(
            f'the published weights are for block="paper", but the blocks of {config["name"]} are {block!r} here: '
            "expected gspn_tiny, gspn_small or gspn_base"
        )
    head = state.get("classifier.head.weight")
    classes = head.shape[0] if isinstance(head, Tensor) and head.ndim == 2 else 1000
    with torch.device("meta"):
        ours = create_model(**config | {"num_classes": classes, "global_pool": "avg", "in_chans": 3}).state_dict()
    theirs = {_released_key(key): key for key in ours}
    shapes = {key: _released_shape(own, ours[own]) for key, own in theirs.items()}
    problems = {
        "missing": [key for key in shapes if key not in state],
        "left over": [str(key) for key in state if key not in shapes],
        "not a tensor": [key for key in shapes if key in state and not isinstance(state[key], Tensor)],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {shape}"
            for key, shape in shapes.items()
            if isinstance(state.get(key), Tensor) and tuple(state[key].shape) != shape
        ],
    }
    if any(problems.values()):
        name, found = config["name"], _name_of(state)
        hint = f"these are the weights of {found}, not of {name}; " if found not in (None, name) else ""
        listed = "; ".join(f"{kind}: {_list(keys)}" for kind, keys in problems.items() if keys)
        raise ValueError(f"the released weights do not fit {name}: {hint}{listed}")
    if config["alignment"] == "aligned":
        warnings.warn(
            'released weights in alignment="aligned": outputs differ from those the weights were trained for, so '
            'fine-tune before use; alignment="released" computes the trained outputs',
            stacklevel=3,
        )
    return {own: _reshape(own, state[key], ours[own].shape) for key, own in theirs.items()}


def _contents(source: str | os.PathLike | Mapping) -> Mapping:
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"expected a path or a state dict, got {type(source).__name__}")
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Training scripts of this family save their settings with the weights. They are read as data, without yacs.
        with torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")]):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"WeightsUnpickler error:\s*(.*?)(?: by default|\n|$)", str(error))
        reason = found[1] if found else error
        raise ValueError(
            f"{path} holds more than tensors, or is damaged; nothing in it was executed: {reason}"
        ) from error
    except Exception as error:  # readers do not document what a damaged file makes them raise; nothing is executed
        raise ValueError(f"{path} cannot be read as a file of weights: {error!r}") from error
    if not isinstance(contents, Mapping):
        raise ValueError(f"{path} holds a {type(contents).__name__}, expected a state dict")
    return contents


def _part(contents: Mapping, part: str | None) -> Mapping:
    """The weights among a file's contents: ``model``, ``model_ema``, or all of them."""
    there = [p for p in PARTS if isinstance(contents.get(p), Mapping)]
    if part is not None and part not in there:
        raise ValueError(f"there are no weights in part {part!r}; parts with weights: {', '.join(there) or 'none'}")
    if part is None and len(there) > 1:
        warnings.warn(f"{' and '.join(there)} both hold weights; {there[0]} is taken, part= chooses", stacklevel=3)
    weights = contents[part or there[0]] if there else contents
    wrapped = "module."  # torch's wrappers for several processes put this before each key
    if weights and all(str(key).startswith(wrapped) for key in weights):
        return {key.removeprefix(wrapped): value for key, value in weights.items()}
    return weights


def _released_key(key: str) -> str:
    for pattern, replacement in _RENAMED:
        key = re.sub(pattern, replacement, key)
    return key


def _released_shape(key: str, own: Tensor) -> tuple[int, ...]:
    if ".gspn." in key and key.endswith("merger"):
        return (1, own.numel(), 1, 1)
    if ".gspn." in key and key.endswith("_proj"):
        return (own.shape[:-1].numel(), own.shape[-1], 1, 1)
    return (1, own.numel(), 1, 1) if ".grn." in key else tuple(own.shape)


def _reshape(key: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
    if key.endswith("weight_proj"):  # their order: previous, same and next; directions; channels
        directions, three, *rest = shape
        return tensor.reshape(three, directions, *rest).transpose(0, 1)
    return tensor.reshape(shape)


def _adapt_channels(weight: Tensor, in_chans: int) -> Tensor:
    channels = weight.shape[1]
    if in_chans == channels:
        return weight
    if in_chans == 1:
        return weight.sum(1, keepdim=True)
    repeated = weight.repeat(1, -(-in_chans // channels), 1, 1)[:, :in_chans]
    return repeated * (channels / in_chans)


def _name_of(state: Mapping[str, Tensor]) -> str | None:
    """The model size with the width, depths and proxy_dim of the weights."""
    matches = [re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", str(key)) for key in state]
    blocks = {(int(m[1]), int(m[2])) for m in matches if m}
    stem, proxy = state.get("patch_embed.5.weight"), state.get("layers.0.blocks.0.op.x_conv_down.weight")
    if not blocks or not isinstance(stem, Tensor) or not isinstance(proxy, Tensor):
        return None
    depths = tuple(sum(level == i for level, _ in blocks) for i in range(1 + max(level for level, _ in blocks)))
    for name in list_models():
        size = size_of(name)
        if ((size["width"],), size["depths"], (size["proxy_dim"],)) == (stem.shape[:1], depths, proxy.shape[:1]):
            return name
    return None


def _list(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return f"{', '.join(keys[:_LISTED])}{more}"
