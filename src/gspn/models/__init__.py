"""The models: classification backbones, their influence maps and released weights, the bridge to timm, the
class-conditional generator, its pipeline, and DiT.
"""

from gspn.models.backbone import Backbone, create_model, list_models
from gspn.models.influence import context_maps
from gspn.models.released import load_released


def register_timm() -> None:
    """Registers gspn_micro, gspn_tiny, gspn_small and gspn_base with timm, as ``import gspn.models.timm`` does.

    Afterwards ``timm.create_model("gspn_tiny", ...)`` works with all that timm offers; see :mod:`gspn.models.timm`.

    Raises ImportError if timm is not installed.
    """
    import gspn.models.timm  # noqa: F401


__all__ = ["Backbone", "context_maps", "create_model", "list_models", "load_released", "register_timm"]
