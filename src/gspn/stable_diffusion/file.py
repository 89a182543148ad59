"""The file of swapped layers: one safetensors file whose header holds the config."""

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from gspn.files import atomic, check_format, save_tensors

FILE = "gspn_swap.safetensors"  # its name in a folder
_FORMAT = 1
_CONFIG = ("form", "segment", "gate_bias", "layers", "unet")

# The entries of a UNet's config that differ between base models and that fine-tunes share. The second kind has one
# value for all levels or one for each.
_OF_BASE = (
    "in_channels",
    "out_channels",
    "block_out_channels",
    "down_block_types",
    "mid_block_type",
    "up_block_types",
    "use_linear_projection",
    "addition_embed_type",
    "class_embed_type",
)
_PER_LEVEL = (
    "layers_per_block",
    "transformer_layers_per_block",
    "cross_attention_dim",
    "attention_head_dim",
    "num_attention_heads",
    "only_cross_attention",
)


def _identity(unet: nn.Module) -> dict:
    identity = {key: unet.config.get(key) for key in _OF_BASE}
    for key in _PER_LEVEL:
        value = unet.config.get(key)
        levels = len(unet.config.down_block_types)
        identity[key] = value if isinstance(value, (list, tuple)) else [value] * levels
    return json.loads(json.dumps(identity))  # tuples become lists, as in what is read


def write(path: Path | str, unet: nn.Module, layers: dict[str, nn.Module], options: dict) -> Path:
    """Writes the layers of `unet` by their names, with the `options` that build them, and returns the file's path:
    `path` if it ends in .safetensors, else a file in the folder `path`. An existing file is replaced at once."""
    path = Path(os.path.expanduser(path))
    path = path if path.suffix == ".safetensors" else path / FILE
    tensors = {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.state_dict().items()}
    if any(value.is_meta for value in tensors.values()):
        raise ValueError("the layers' weights are offloaded or on the meta device: save before offloading")
    if wrong := [key for key, value in tensors.items() if not bool(value.isfinite().all())]:
        raise ValueError(f"{wrong[0]} is not finite: the layers are damaged, and nothing is saved")
    config = options | {
        "format": _FORMAT,
        "layers": {name: layer.channels for name, layer in layers.items()},
        "unet": _identity(unet),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        # One entry: safetensors writes several in any order, and the same layers have to give the same bytes.
        save_tensors(temporary, tensors, {"gspn_swap": json.dumps(config)})
    return path


def read(path: Path | str, unet: nn.Module, channels: dict[str, int]) -> tuple[dict, dict[str, dict[str, Tensor]]]:
    """The config in a file or folder, and the state dict of each layer. Three entries of the config are not always
    there: "kept" names the attentions that stayed, "sample_size" is the size for which the layers were trained,
    "proxy_dim" is the width of their proxies where it is not the usual one.

    Raises FileNotFoundError, or ValueError if the file is damaged, is something else, or holds layers that do not fit
    `unet`, with those `channels` by name."""
    path = Path(os.path.expanduser(path))
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"there are no swapped layers at {path}")
    try:
        with safe_open(path, "pt") as file:
            config = json.loads((file.metadata() or {}).get("gspn_swap", "null"))
            if not isinstance(config, dict) or "format" not in config:
                raise ValueError(f"{path} holds no swapped layers: it was not written by gspn's Swap.save")
            check_format(path, config["format"], _FORMAT, ValueError)
            if missing := [key for key in _CONFIG if key not in config]:
                raise ValueError(f"{path} is damaged: its config lacks {', '.join(missing)}")
            _check_belongs(path, config, unet, channels)
            states = {name: {} for name in channels if name not in config.get("kept", ())}
            for key in file.keys():
                name = next((name for name in states if key.startswith(f"{name}.")), None)
                if name is None:
                    raise ValueError(f"{path} has the tensor {key}, which belongs to none of its layers")
                tensor = file.get_tensor(key).clone()  # not mapped to a file that may change
                states[name][key.removeprefix(f"{name}.")] = tensor
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    return config, states


def read_checkpoint(run: Path | str, checkpoint: str, names: list[str]) -> dict[str, dict[str, Tensor]]:
    """The state dicts of the layers `names` in a checkpoint of a run of `gspn distill`, averaged where it averages.

    Raises FileNotFoundError where there is no such checkpoint, ValueError where it is damaged."""
    run = Path(os.path.expanduser(run))
    run = run.parent if run.is_file() else run
    folders = run / "checkpoints"
    files = [folders / checkpoint / f"{part}.safetensors" for part in ("ema", "model")]
    file = next((each for each in files if each.is_file()), None)
    if file is None:
        there = sorted(each.name for each in folders.glob("[!.]*"))
        raise FileNotFoundError(f"{run} has no checkpoint {checkpoint!r}; it has {', '.join(there) or 'none'}")
    try:
        weights = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if wrong := [key for key, value in weights.items() if not bool(value.isfinite().all())]:
        raise ValueError(f"{file} is damaged: {wrong[0]} is not finite; choose another checkpoint")
    states = {}
    for name in names:
        prefix = f"layers.{name.replace('.', '/')}."
        own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        states[name] = {key: value.clone() for key, value in own.items()}  # not mapped to a file that may change
    return states


def check_size(size, what: str) -> None:
    """Raises ValueError, which begins with `what`, unless `size` is (height, width)."""
    pair = isinstance(size, (list, tuple)) and len(size) == 2
    if not pair or not all(type(side) is int and side > 0 for side in size):
        raise ValueError(f"{what} has to be (height, width), two whole numbers above 0, got {size!r}")


def _check_belongs(path, config, unet, channels):
    own, saved = _identity(unet), config["unet"]
    differing = [key for key in own if own[key] != saved.get(key)]
    if differing:
        shown = "; ".join(f"{key} is {saved.get(key)} there and {own[key]} here" for key in differing[:3])
        raise ValueError(f"{path} belongs to another base model: {shown}")
    kept = config.get("kept", [])
    if not isinstance(kept, list) or not isinstance(config["layers"], dict):
        raise ValueError(f"{path} is damaged: its config does not list layers and kept attentions")
    if type(width := config.get("proxy_dim", 1)) is not int or width < 1:
        raise ValueError(f"{path} is damaged: proxy_dim has to be a whole number above 0, got {width!r}")
    check_size(config.get("sample_size", [1, 1]), f"{path} is damaged: sample_size")
    unknown = [name for name in kept if name not in channels]
    if unknown or config["layers"] != {name: count for name, count in channels.items() if name not in kept}:
        raise ValueError(f"{path} belongs to another base model: its layers are not where this UNet has attention")
