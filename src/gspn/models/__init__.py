"""The models: classification backbones, and what looks into them."""

from gspn.models.backbone import Backbone, context_maps, create_model, list_models

__all__ = ["Backbone", "context_maps", "create_model", "list_models"]
