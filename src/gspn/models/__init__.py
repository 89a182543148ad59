"""The models: classification backbones, segmenters, their influence maps and released weights, the bridge to timm, the
class-conditional generator, its pipeline, and DiT.
"""

from gspn.models.backbone import Backbone, create_model, list_models
from gspn.models.influence import context_maps
from gspn.models.released import load_released
from gspn.models.segmenter import Segmenter, create_segmenter


def register_timm() -> None:
    """Registers with timm the models that :func:`gspn.list_models` names, as ``import gspn.models.timm`` does.

    Afterwards ``timm.create_model("gspn_tiny", ...)`` works with all that timm offers; see :mod:`gspn.models.timm`.

    Raises ImportError if timm is not installed.
    """
    import gspn.models.timm  # noqa: F401


__all__ = [
    "Backbone",
    "Segmenter",
    "context_maps",
    "create_model",
    "create_segmenter",
    "list_models",
    "load_released",
    "register_timm",
]
