"""The bridge to timm: importing it (or ``gspn.register_timm()``) registers with timm the models that
:func:`gspn.list_models` names.

    timm.create_model("gspn_tiny", num_classes=10, features_only=True, ...)

Model arguments are those of :class:`gspn.models.Backbone` (the paper's ``drop_path_rate`` by default) and timm's
``device``, ``dtype`` and ``img_size``. timm drops arguments that are None: write ``activation="none"``.

No weights can be downloaded. Those that the paper's authors published are converted wherever timm loads weights:

    form = {"alignment": "released", "activation": "none"}  # or "aligned", the start for fine-tuning at any size
    timm.create_model("gspn_tiny", checkpoint_path="tiny.pth", **form)
    timm.create_model("gspn_tiny", pretrained=True, pretrained_cfg_overlay={"file": "tiny.pth"}, num_classes=10, **form)

The second call adapts the head and the channels of the stem. timm cannot read a file that also holds the authors'
settings: convert it with ``torch.save(gspn.load_released(FILE, NAME).state_dict(), OTHER)``.

To run timm's own scripts, register the models first:

    python -c "import gspn, runpy, sys; gspn.register_timm(); sys.argv.pop(0); \\
        runpy.run_path(sys.argv[0], run_name='__main__')" train.py DATA --model gspn_tiny
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from gspn.layers import BLOCKS
from gspn.models.backbone import Backbone, check_images, no_weights, size_of
from gspn.models.released import convert_released, is_released

try:
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.models import (
        build_model_with_cfg,
        generate_default_cfgs,
        register_model,
        register_notrace_function,
        register_notrace_module,
        resolve_pretrained_cfg,
    )
    from timm.models._features import feature_take_indices
    from timm.models._input import update_model_input_size
except ModuleNotFoundError as error:
    raise ImportError(
        f'the bridge to timm needs timm, which the extra "timm" installs: pip install "gspn[timm]" ({error})'
    ) from error

# timm and torchvision extract features with torch.fx, which has to see a block as one node: its checks need real sizes
for _block in BLOCKS.values():
    register_notrace_module(_block)
register_notrace_function(check_images)

__all__ = ["TimmBackbone", "checkpoint_filter_fn", "default_cfgs"]


class TimmBackbone(Backbone):
    """A backbone with the methods that only timm needs."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_pre_hook(_convert_in_place)  # the scripts' --checkpoint applies no filter

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Records the size for ``timm.models.get_model_input_config``; nothing in the model depends on it.

        Raises ValueError for a size that is not square in the released alignment.
        """
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if self.alignment == "released" and height != width:
            raise ValueError(f'alignment="released" takes square images, got img_size={height}x{width}')
        update_model_input_size(self, (height, width))

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the levels after the last of ``indices``, as timm does; returns the indices from the start."""
        taken, last = feature_take_indices(len(self.levels), indices)
        shortened = last < len(self.levels) - 1
        self.levels = self.levels[: last + 1]
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if shortened or prune_norm:
            self.norm = nn.Identity()
        if shortened or prune_head:
            self.reset_classifier(0, "")
        self.config = {}  # no arguments make this model again
        return taken


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: Backbone) -> Mapping[str, Tensor]:
    """Converts weights in the released layout to the keys of ``model``, except head and channels; leaves others alone.

    Raises ValueError if the weights do not fit, or if the model has an activation: they were trained without one.
    """
    if not is_released(state_dict):
        return state_dict
    if not model.config:
        raise ValueError("released weights do not fit a model whose levels have been pruned: load them before pruning")
    if model.config.get("block") != "inverted" and model.config["activation"] is not None:
        raise ValueError(
            f'released weights were trained without activation, got "{model.config["activation"]}"; create the model '
            'with activation="none" and alignment="released" (as they were trained) or "aligned" (for any size)'
        )
    return convert_released(state_dict, model.config)


def _convert_in_place(model: TimmBackbone, state_dict: dict, prefix: str, *_) -> None:
    if not prefix and is_released(state_dict):
        converted = dict(checkpoint_filter_fn(state_dict, model))
        state_dict.clear()
        state_dict.update(converted)


def _build(
    name: str,
    *,
    img_size: int | Sequence[int] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs,
) -> TimmBackbone:
    if kwargs.get("activation") == "none":
        kwargs["activation"] = None
    with nullcontext() if device is None else torch.device(device):
        model = TimmBackbone.from_name(name, **kwargs)
    if img_size is not None:
        model.set_input_size(img_size)
    return model.to(dtype) if dtype is not None else model


def _create(name: str, pretrained: bool, kwargs: dict) -> nn.Module:
    source = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    if pretrained and not (source.has_weights or source.state_dict):
        raise RuntimeError(
            f"{no_weights(name)}. To read the authors' file with timm: "
            f'timm.create_model("{name}", pretrained=True, pretrained_cfg_overlay={{"file": "FILE.pth"}}, '
            'alignment="released", activation="none")'
        )
    levels = range(len(kwargs.get("depths", size_of(name)["depths"])))
    return build_model_with_cfg(
        _build,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(levels), "feature_cls": "getter"},
        name=name,
        **kwargs,
    )


def _cfg(size: int = 224, pool: int = 7) -> dict:
    return {
        "input_size": (3, size, size),
        "pool_size": (pool, pool),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0",
        "classifier": "head",
        "paper_ids": "arXiv:2501.12381",
    }


default_cfgs = generate_default_cfgs(
    {
        "gspn_micro": _cfg(64, 8),
        "gspn_mobile": _cfg(64, 8),
        "gspn_tiny": _cfg(),
        "gspn_small": _cfg(),
        "gspn_base": _cfg(),
    }
)


@register_model
def gspn_micro(pretrained: bool = False, **kwargs) -> nn.Module:
    return _create("gspn_micro", pretrained, kwargs)


@register_model
def gspn_mobile(pretrained: bool = False, **kwargs) -> nn.Module:
    return _create("gspn_mobile", pretrained, kwargs)


@register_model
def gspn_tiny(pretrained: bool = False, **kwargs) -> nn.Module:
    return _create("gspn_tiny", pretrained, kwargs)


@register_model
def gspn_small(pretrained: bool = False, **kwargs) -> nn.Module:
    return _create("gspn_small", pretrained, kwargs)


@register_model
def gspn_base(pretrained: bool = False, **kwargs) -> nn.Module:
    return _create("gspn_base", pretrained, kwargs)
